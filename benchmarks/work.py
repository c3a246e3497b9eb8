"""What a launch computes and must move, from its own arguments: useful and issued FLOPs, fewest bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import triton
from torch import Tensor


def fewest_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct tensors among ``tensors``, each read or written once; an expanded one counts what it stores."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        size = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        key = tensor.data_ptr()
        sizes[key] = max(sizes.get(key, 0), size)
    return sum(sizes.values())


def _tile_flops(a: dict[str, Any], reduction: int) -> int:
    """FLOPs of one program: whole tiles, whole steps along the reduction."""
    return 2 * a["BLOCK_M"] * a["BLOCK_N"] * a["BLOCK_K"] * triton.cdiv(reduction, a["BLOCK_K"])


def _conv2d_fprop(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    reduction = a["CG"] * a["R"] * a["S"]
    return 2 * a["M"] * a["G"] * a["KG"] * reduction, grid[0] * _tile_flops(a, reduction)


def _meeting(size: int, stride: int, dilation: int, phase: int) -> int:
    """How many of ``size`` filter rows meet a phase of the input."""
    return sum(r * dilation % stride == phase for r in range(size))


def _conv2d_dgrad(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    useful = 2 * a["N"] * a["P"] * a["Q"] * a["G"] * a["KG"] * a["CG"] * a["R"] * a["S"]
    phases_h, phases_w = min(a["STRIDE_H"], a["H"]), min(a["STRIDE_W"], a["W"])
    programs = grid[0] // (phases_h * phases_w)
    issued = 0
    for h_first in range(phases_h):
        for w_first in range(phases_w):
            rows = _meeting(a["R"], a["STRIDE_H"], a["DILATION_H"], (h_first + a["pad_h"]) % a["STRIDE_H"])
            columns = _meeting(a["S"], a["STRIDE_W"], a["DILATION_W"], (w_first + a["pad_w"]) % a["STRIDE_W"])
            issued += programs * _tile_flops(a, rows * columns * a["KG"])
    return useful, issued


def _conv2d_wgrad(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    useful = 2 * a["M"] * a["G"] * a["KG"] * a["CG"] * a["R"] * a["S"]
    return useful, grid[0] * grid[1] * _tile_flops(a, a["blocks_per_split"] * a["BLOCK_K"])


def _matmul(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    return 2 * a["M"] * a["N"] * a["K"], grid[0] * _tile_flops(a, a["K"])  # the parts of a split share the steps of K


#: Kernels with a matrix product; all others count no FLOPs, since what they cost is bytes.
_FLOPS: dict[str, Callable[[tuple[int, ...], dict[str, Any]], tuple[int, int]]] = {
    "_conv2d_fprop_kernel": _conv2d_fprop,
    "_conv2d_dgrad_kernel": _conv2d_dgrad,
    "_conv2d_wgrad_kernel": _conv2d_wgrad,
    "_matmul_kernel": _matmul,
    "_matmul_descriptor_kernel": _matmul,
}


def flops(kernel: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> tuple[int, int]:
    """(useful, issued) FLOPs of a launch, a multiply and an add counting two.

    Useful is what the operation's definition asks for (zero padding included, as cuDNN and the papers count), issued what the
    tiles compute.
    """
    count = _FLOPS.get(kernel)
    return count(grid, arguments) if count is not None else (0, 0)
