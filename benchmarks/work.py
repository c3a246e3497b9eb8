"""Work of a launch, computed from its arguments: useful and issued FLOPs, fewest bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import triton
from torch import Tensor

from kernels.runtime.launch import tensors_of


def fewest_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct tensors among ``tensors``, each read or written once; an expanded tensor counts its storage."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        size = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        key = tensor.data_ptr()
        sizes[key] = max(sizes.get(key, 0), size)
    return sum(sizes.values())


#: Arguments that a kernel reads and writes.
_IN_PLACE = {"_sgd_kernel": ("param_ptrs", "master_ptrs", "buffer_ptrs")}

#: Arguments that a kernel hardly reads or writes: with random bits one weight in 65,536 is a tie.
_HARDLY_TOUCHED = {"_sgd_kernel": ("tie_ptrs",)}


def moved_bytes(kernel: str, arguments: dict[str, Any]) -> int:
    """Bytes that a launch must move: :func:`fewest_bytes` of its tensors; tensors changed in place count twice."""
    arguments = {name: value for name, value in arguments.items() if name not in _HARDLY_TOUCHED.get(kernel, ())}
    changed = {name: arguments[name] for name in _IN_PLACE.get(kernel, ())}
    return fewest_bytes(tensors_of(arguments)) + fewest_bytes(tensors_of(changed))


def _tile_flops(a: dict[str, Any], reduction: int) -> int:
    """Issued FLOPs of one program: whole tiles, whole steps along the reduction."""
    return 2 * a["BLOCK_M"] * a["BLOCK_N"] * a["BLOCK_K"] * triton.cdiv(reduction, a["BLOCK_K"])


def _conv2d_fprop(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    reduction = a["CG"] * a["R"] * a["S"]
    return 2 * a["M"] * a["G"] * a["KG"] * reduction, grid[0] * _tile_flops(a, reduction)


def _meeting(size: int, stride: int, dilation: int, phase: int) -> int:
    """Number of the ``size`` filter rows that meet a phase of the input."""
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


def _meets(pixels: int, filter_size: int, size: int, pad: int, step: int, first: int) -> int:
    """Number of filter rows that meet the input for any of ``pixels`` output rows from ``first``; ``step`` is -1 in dgrad."""
    return sum(any(0 <= first + i - step * pad + step * r < size for i in range(pixels)) for r in range(filter_size))


def _conv2d_images(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    """Filter positions in the padding count as useful, as in cuDNN, but are not issued, so issued can be less than useful."""
    step = -1 if a["DGRAD"] else 1
    useful = 2 * a["N"] * a["P"] * a["Q"] * a["K"] * a["C"] * a["R"] * a["S"]
    if a["DGRAD"]:  # here P, Q are the input's size; the product is counted over the output's pixels
        useful = 2 * a["N"] * a["H"] * a["W"] * a["K"] * a["C"] * a["R"] * a["S"]
    rows = sum(_meets(1, a["R"], a["H"], a["pad_h"], step, p) for p in range(a["P"]))
    strips = range(0, a["Q"], a["PIXELS"])
    columns = sum(_meets(a["PIXELS"], a["S"], a["W"], a["pad_w"], step, q) for q in strips)
    tile = 2 * a["PIXELS"] * a["BLOCK_M"] * (a["BLOCK_N"] + a["BLOCK_N2"]) * a["C"]
    programs_a_strip = grid[0] // (a["P"] * len(strips))
    return useful, programs_a_strip * rows * columns * tile


def _conv2d_taps(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    """As :func:`_conv2d_images`; chunks of a filter row in the padding are not issued."""
    row = a["S"] * a["C"]
    whole = row // a["BLOCK_K"] * a["BLOCK_K"]
    chunks = [(i, a["BLOCK_K"]) for i in range(0, whole, a["BLOCK_K"])]
    chunks += [(i, a["BLOCK_K2"]) for i in range(whole, row, a["BLOCK_K2"])]
    columns = 0
    for q in range(a["Q"]):
        left, right = (a["pad_w"] - q) * a["C"], (a["W"] + a["pad_w"] - q) * a["C"]
        columns += sum(size for first, size in chunks if first + size > left and first < right)
    rows = sum(_meets(1, a["R"], a["H"], a["pad_h"], 1, p) for p in range(a["P"]))
    programs_a_pixel = grid[0] // (a["P"] * a["Q"])
    useful = 2 * a["N"] * a["P"] * a["Q"] * a["K"] * a["R"] * row
    return useful, programs_a_pixel * rows * columns * 2 * a["BLOCK_M"] * a["BLOCK_N"]


def _conv2d_box(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    x = a["x_desc"].shape
    pixels = x[0] * x[1] * x[2] if a["DGRAD"] else a["N"] * a["P"] * a["Q"]
    reduction = a["C"] * a["R"] * a["S"]
    tile = 2 * a["NB"] * a["TH"] * a["TW"] * a["BLOCK_N"] * reduction
    return 2 * pixels * a["K"] * reduction, grid[0] * tile


def _conv2d_images_wgrad(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    useful = 2 * a["N"] * a["P"] * a["Q"] * a["K"] * a["C"] * a["R"] * a["S"]
    together = a.get("POSITIONS", 1)
    tiles = triton.cdiv(a["K"], a["BLOCK_M"]) * triton.cdiv(a["C"], a["BLOCK_N"] + a["BLOCK_N2"])
    step = 2 * a["BLOCK_M"] * (a["BLOCK_N"] + a["BLOCK_N2"]) * together * a["BLOCK_K"] * triton.cdiv(a["N"], a["BLOCK_K"])
    issued = 0
    for first in range(0, a["R"] * a["S"], together):
        inside = [(max(0, a["pad_h"] - r), min(a["P"], a["H"] + a["pad_h"] - r)) for r in _positions(first, together, a)[0]]
        across = [(max(0, a["pad_w"] - s), min(a["Q"], a["W"] + a["pad_w"] - s)) for s in _positions(first, together, a)[1]]
        rows, columns = (max(0, max(h for _, h in e) - min(low for low, _ in e)) for e in (inside, across))
        columns = a["Q"] if a.get("FOLDED") else columns
        issued += rows * columns * step * tiles
    return useful, issued


def _positions(first: int, together: int, a: dict[str, Any]) -> tuple[list[int], list[int]]:
    positions = range(first, first + together)
    return [rs // a["S"] for rs in positions], [rs % a["S"] for rs in positions]


def _conv2d_stem(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    """Useful FLOPs count the filter before folding; the launch passes its size as USEFUL_POSITIONS."""
    pixels = a["N"] * a["P"] * a["Q"]
    useful = 2 * pixels * a["K"] * a["USEFUL_POSITIONS"]
    if "SPLIT" in a:
        tile = 2 * 3 * a["BLOCK_M"] * (a["BLOCK_N"] + a["BLOCK_N2"]) * a["BLOCK_K"]
        return useful, grid[0] * tile * a["P"] * a["Q"] * triton.cdiv(a["N"], a["BLOCK_K"])
    tile = 2 * 3 * a["BLOCK_M"] * (a["BLOCK_N"] + a["BLOCK_N2"]) * (a["BLOCK_K"] + a["BLOCK_K2"])
    strips = triton.cdiv(a["Q"], a["columns"])
    return useful, grid[0] // strips * a["Q"] * tile


def _conv2d_stem_pool(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    """Useful is the whole convolution once, with pixels that no window sees; rows shared with a neighbour are issued again."""
    useful = 2 * a["N"] * a["CONV_SIZE"] * a["K"] * a["USEFUL_POSITIONS"]
    tile = 2 * 3 * a["BLOCK_M"] * (a["BLOCK_N"] + a["BLOCK_N2"])
    strips = triton.cdiv(a["Q"], a["columns"])
    pixels = (2 * a["ROWS"] + 1) * (2 * a["Q"] + strips)
    return useful, grid[0] // strips * pixels * tile * (a["BLOCK_K"] + a["BLOCK_K2"])


def _conv2d_stem_pool_wgrad(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    """A step has 2 x 2 pixels; each pair of neighbouring columns is multiplied with the positions that both read."""
    useful = 2 * a["N"] * a["CONV_SIZE"] * a["K"] * a["USEFUL_POSITIONS"]
    step = 2 * 2 * 3 * a["BLOCK_M"] * 2 * a["BLOCK_N"] * a["BLOCK_K"]
    return useful, grid[0] * (a["P"] + 1) * (a["Q"] + 1) * triton.cdiv(a["N"], a["BLOCK_K"]) * step


def _conv2d_rows(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    """A first layer by rows of its filters; rows in the padding above and below are not issued."""
    useful = 2 * a["N"] * a["P"] * a["Q"] * a["K"] * a["USEFUL_POSITIONS"]
    rows = sum(0 <= p * a["STRIDE_H"] - a["pad_h"] + r < a["H"] for p in range(a["P"]) for r in range(a["R"]))
    tile = 2 * a["BLOCK_M"] * (a["BLOCK_N"] + a["BLOCK_N2"]) * a["POSITIONS"]
    return useful, grid[0] // a["P"] * rows * tile


def _matmul(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    return 2 * a["M"] * a["N"] * a["K"], grid[0] * _tile_flops(a, a["K"])  # the parts of a split share the steps of K


def _matmul_shares(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    products = a["a_desc"].shape[0 if a["A_TRANSPOSED"] else 1]
    tiles = triton.cdiv(a["M"], a["BLOCK_M"]) * triton.cdiv(a["N"], a["BLOCK_N"])
    return 2 * a["M"] * a["N"] * products, tiles * _tile_flops(a, products)


def _linear_narrow_fprop(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    return 2 * a["M"] * a["N"] * a["K"], grid[0] * 2 * a["ROWS"] * a["BLOCK_N"] * triton.cdiv(a["K"], a["BLOCK_K"]) * a[
        "BLOCK_K"
    ]


def _linear_narrow_backward(grid: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int]:
    products, rows = a["INPUT"] + a["WEIGHT"], triton.cdiv(a["M"], a["BLOCK_M"]) * a["BLOCK_M"]
    issued = grid[0] * 2 * rows * a["BLOCK_N"] * a["BLOCK_K"]
    return products * 2 * a["M"] * a["N"] * a["K"], products * issued


#: Kernels with a matrix product; all others count no FLOPs, since bytes bound their time.
_FLOPS: dict[str, Callable[[tuple[int, ...], dict[str, Any]], tuple[int, int]]] = {
    "_conv2d_fprop_kernel": _conv2d_fprop,
    "_conv2d_dgrad_kernel": _conv2d_dgrad,
    "_conv2d_wgrad_kernel": _conv2d_wgrad,
    "_conv2d_images_kernel": _conv2d_images,
    "_conv2d_taps_kernel": _conv2d_taps,
    "_conv2d_box_kernel": _conv2d_box,
    "_conv2d_images_wgrad_kernel": _conv2d_images_wgrad,
    "_conv2d_stream_k_wgrad_kernel": _conv2d_images_wgrad,
    "_conv2d_stem_kernel": _conv2d_stem,
    "_conv2d_stem_wgrad_kernel": _conv2d_stem,
    "_conv2d_stem_pool_kernel": _conv2d_stem_pool,
    "_conv2d_stem_pool_wgrad_kernel": _conv2d_stem_pool_wgrad,
    "_conv2d_rows_kernel": _conv2d_rows,
    "_conv2d_rows_wgrad_kernel": _conv2d_stem,
    "_linear_narrow_fprop_kernel": _linear_narrow_fprop,
    "_linear_narrow_backward_kernel": _linear_narrow_backward,
    "_matmul_kernel": _matmul,
    "_matmul_descriptor_kernel": _matmul,
    "_matmul_shares_kernel": _matmul_shares,
}


def flops(kernel: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> tuple[int, int]:
    """(useful, issued) FLOPs of a launch; a multiply and an add count as two.

    Useful FLOPs follow from the operation's definition (zero padding included, as cuDNN and the papers count). Issued FLOPs are
    those of the computed tiles.
    """
    count = _FLOPS.get(kernel)
    return count(grid, arguments) if count is not None else (0, 0)
