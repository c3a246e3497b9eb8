"""Copies of channels-last tensors with the batch as innermost dimension, which a TF32 weight gradient reads.

A weight gradient is a sum over images. Hopper's tensor cores read half types from shared memory in either order, but TF32 only
if the reduction dimension is contiguous. So the output's gradient and the input of a float32 convolution are copied from
[N, H, W, C] to [H, W, C, N]. The copy is cheapest in a launch that reads the tensor anyway. To transpose blocks in registers
instead took four to six times as long on an H100 (``benchmarks/NOTES.md``, "2026-11-27").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..configs.tables import tile_size
from ..primitives import program_id
from ..runtime.backend import INTERPRETED
from ..runtime.launch import cdiv, launch, needs_int64, new_output
from .cells import cells_size
from .problem import Problem

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def copy_by_batch(
    copy_ptrs,  # a tuple of [N, pixels, channels] contiguous
    copy_out_ptrs,  # out: as many [pixels, channels, N rounded up to a multiple of 4]
    copy_pixels,  # as many ints
    copy_channels,  # as many ints
    N,
    WIDE: tl.constexpr,
    COPY_IMAGES: tl.constexpr,
    COPY_CHANNELS: tl.constexpr,
):
    """Write this program's share of all copies: every ``num_programs``-th tile of COPY_IMAGES x COPY_CHANNELS."""
    pid = program_id(0, WIDE)
    programs = tl.num_programs(0).to(pid.dtype)
    row = tl.cdiv(N, 4) * 4
    blocks_n = tl.cdiv(row, COPY_IMAGES)
    for j in tl.static_range(len(copy_ptrs)):
        channels = copy_channels[j]
        blocks_c = tl.cdiv(channels, COPY_CHANNELS)
        for i in range(pid, copy_pixels[j] * blocks_n * blocks_c, programs):
            pixel = i // blocks_c // blocks_n
            o_n = i // blocks_c % blocks_n * COPY_IMAGES + tl.arange(0, COPY_IMAGES)
            o_c = i % blocks_c * COPY_CHANNELS + tl.arange(0, COPY_CHANNELS)
            mask = (o_n < N)[:, None] & (o_c < channels)[None, :]
            p_in = copy_ptrs[j] + ((o_n * copy_pixels[j] + pixel) * channels)[:, None] + o_c[None, :]
            p_out = copy_out_ptrs[j] + ((pixel * channels + o_c) * row)[None, :] + o_n[:, None]
            # Zeros fill the elements beyond the last image.
            m_out = (o_n < row)[:, None] & (o_c < channels)[None, :]
            tl.store(p_out, tl.load(p_in, mask=mask, other=0.0), mask=m_out)


@triton.jit
def _cells_by_batch_kernel(
    x_ptr,  # [N, H, ROW] contiguous; the first W*C elements of a row are pixels
    out_ptr,  # out: [HS, WS*DEPTH, N rounded up to a multiple of 4]
    N,
    H,
    W,
    pad_h,
    pad_w,
    ROW,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    WS: tl.constexpr,
    WIDE: tl.constexpr,
    COPY_IMAGES: tl.constexpr,
    COPY_CHANNELS: tl.constexpr,
):
    """One program writes COPY_IMAGES x COPY_CHANNELS of the images' cells (:mod:`.cells`), batch innermost."""
    DEPTH: tl.constexpr = STRIDE * STRIDE * C
    pid = program_id(0, WIDE)
    row = tl.cdiv(N, 4) * 4
    blocks_n = tl.cdiv(row, COPY_IMAGES)
    blocks_e = tl.cdiv(WS * DEPTH, COPY_CHANNELS)
    i = pid // blocks_e // blocks_n
    o_n = pid // blocks_e % blocks_n * COPY_IMAGES + tl.arange(0, COPY_IMAGES)
    o_e = pid % blocks_e * COPY_CHANNELS + tl.arange(0, COPY_CHANNELS)
    h = i * STRIDE + o_e % DEPTH // C // STRIDE - pad_h
    w = o_e // DEPTH * STRIDE + o_e // C % STRIDE - pad_w
    m_x = (o_n < N)[:, None] & ((o_e < WS * DEPTH) & (h >= 0) & (h < H) & (w >= 0) & (w < W))[None, :]
    b_x = tl.load(x_ptr + (o_n * H * ROW)[:, None] + (h * ROW + w * C + o_e % C)[None, :], mask=m_x, other=0.0)
    p_out = out_ptr + ((i * (WS * DEPTH) + o_e) * row)[None, :] + o_n[:, None]
    tl.store(p_out, b_x, mask=(o_n < row)[:, None] & (o_e < WS * DEPTH)[None, :])


@triton.jit
def _by_batch_kernel(
    copy_ptrs,
    copy_out_ptrs,
    copy_pixels,
    copy_channels,
    N,
    WIDE: tl.constexpr,
    COPY_IMAGES: tl.constexpr,
    COPY_CHANNELS: tl.constexpr,
):
    """Only the copies, in a launch of their own: one program writes one tile of the largest copy."""
    copy_by_batch(copy_ptrs, copy_out_ptrs, copy_pixels, copy_channels, N, WIDE, COPY_IMAGES, COPY_CHANNELS)


# ------------------------------------------------------------------------------------------------- launch functions


class Copy(NamedTuple):
    """One copy to be written.

    Attributes:
        source: (N, H, W, C), contiguous.
        out: the result of :func:`new_by_batch` for ``source``.
    """

    source: Tensor
    out: Tensor


def new_by_batch(nhwc: Sequence[int], like: Tensor) -> Tensor:
    """Allocate (H, W, C, N rounded up to a multiple of 4), uninitialised: TMA needs rows of whole 16 bytes."""
    n, h, w, c = nhwc
    return new_output((h, w, c, cdiv(n, 4) * 4), like.dtype, like.device)


def rows_by_batch(by_batch: Tensor, n: int, block: Sequence[int]) -> TensorDescriptor:
    """Descriptor [H, W*C, N] over a copy of ``n`` images; TMA fills elements beyond them with zeros."""
    h, w, c, row = by_batch.shape
    return TensorDescriptor(by_batch, [h, w * c, n], [w * c * row, row, 1], list(block))


def copy_arguments(copies: Sequence[Copy], beside: bool = True) -> dict[str, Any]:
    """Kernel arguments for :func:`copy_by_batch`; ``beside``: whether the kernel has other work too."""
    values: dict[str, list[Any]] = {
        "copy_ptrs": [copy.source for copy in copies],
        "copy_out_ptrs": [copy.out for copy in copies],
        "copy_pixels": [copy.source.shape[1] * copy.source.shape[2] for copy in copies],
        "copy_channels": [copy.source.shape[3] for copy in copies],
    }
    arguments: dict[str, Any] = {name: tuple(value) if copies else None for name, value in values.items()}
    n = copies[0].source.shape[0] if copies else 64
    return arguments | {"HAS_COPIES": len(copies) > 0} | _tile(n, beside)


def _tile(n: int, beside: bool) -> dict[str, int]:
    # A kernel with other work may run one program per SM: that program needs many loads in flight.
    images, channels = (128 if n > 64 else 64, 64) if beside else (64, 32)
    if INTERPRETED:
        images, channels = tile_size(n, 16, 64), 128
    return {"COPY_IMAGES": images, "COPY_CHANNELS": channels}


def copy(copies: Sequence[Copy]) -> None:
    """Write the copies in a launch of their own."""
    if not copies:
        return
    arguments = copy_arguments(copies, beside=False)
    arguments.pop("HAS_COPIES")
    n = copies[0].source.shape[0]
    tiles = [
        pixels * cdiv(n, arguments["COPY_IMAGES"]) * cdiv(channels, arguments["COPY_CHANNELS"])
        for pixels, channels in zip(arguments["copy_pixels"], arguments["copy_channels"], strict=True)
    ]
    wide = needs_int64(*[tensor for each in copies for tensor in each])
    launch(_by_batch_kernel, (max(tiles),), N=n, WIDE=wide, num_warps=4, **arguments)


def cells_by_batch(rows: Tensor, problem: Problem) -> Tensor:
    """The images' cells, (rows of cells, columns * depth, N rounded up to a multiple of 4), in a launch of their own.

    Args:
        rows: the images (N, H, W*C or more), contiguous.
    """
    n, c, h, w, _, r, s, p, q, ((stride, _), (pad_h, pad_w), *_), *_ = problem
    height, width = cells_size(stride, (p, q), (r, s))
    columns = width * stride * stride * c
    out = new_output((height, columns, cdiv(n, 4) * 4), rows.dtype, rows.device)
    tile = _tile(n, beside=False)
    launch(
        _cells_by_batch_kernel,
        (height * cdiv(n, tile["COPY_IMAGES"]) * cdiv(columns, tile["COPY_CHANNELS"]),),
        x_ptr=rows,
        out_ptr=out,
        N=n,
        H=h,
        W=w,
        pad_h=pad_h,
        pad_w=pad_w,
        ROW=rows.shape[2],
        C=c,
        STRIDE=stride,
        WS=width,
        WIDE=needs_int64(rows, out),
        num_warps=4,
        **tile,
    )
    return out
