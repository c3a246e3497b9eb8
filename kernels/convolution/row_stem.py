"""A strided first layer of few channels in TF32, one filter row at a time, reading the images without rearranging them.

The pixels under one filter row are S * C contiguous elements of an image row, [N, H, W*C]. The kernels reduce over them, and a
tile is one pixel of many images, as in :mod:`kernels.convolution.descriptor`. TMA blocks begin at multiples of 16 bytes, which
are four float32 elements. So the forward pass of a layer of stride 4 needs no cells, unlike :mod:`kernels.convolution.stem`.

A pool after it is a kernel of its own: in inference one kernel for both took 342 us on an H100, the two take 199
(``benchmarks/NOTES.md``, "2026-11-27").
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..primitives import dot, program_id
from ..runtime.launch import cdiv, launch, needs_int64, new_output
from .descriptor import dense_nhwc, pixel_offset, store_pixels
from .problem import Problem
from .rules import conv2d_rows_config
from .stem import fold_filter

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _conv2d_rows_kernel(
    x_desc,  # input as rows [H, N, W*C], blocks [1, BLOCK_M, BLOCK_K]
    w_desc,  # filters [R*K, POSITIONS], blocks [BLOCK_N, BLOCK_K]
    w2_desc,  # the same with BLOCK_N2 for BLOCK_N
    bias_ptr,  # [K], or unused
    y_ptr,  # out: [N, P, Q, K] contiguous; without CHANNELS_LAST [N, K, P, Q] contiguous
    N,
    H,
    P,
    Q,
    K,
    pad_h,
    first,  # elements by which the first pixel's positions begin before the row
    USEFUL_POSITIONS: tl.constexpr,  # C * R * S: used to count FLOPs
    R: tl.constexpr,
    POSITIONS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STEP: tl.constexpr,  # elements from one pixel's positions to the next pixel's
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes one pixel of BLOCK_M images x BLOCK_N + BLOCK_N2 filters."""
    pid = program_id(0, WIDE)
    blocks_k = tl.cdiv(K, BLOCK_N + BLOCK_N2)
    blocks_n = tl.cdiv(N, BLOCK_M)
    k0 = (pid % blocks_k * (BLOCK_N + BLOCK_N2)).to(tl.int32)
    pid_n = pid // blocks_k % blocks_n
    n0 = (pid_n * BLOCK_M).to(tl.int32)
    q = (pid // blocks_k // blocks_n % Q).to(tl.int32)
    p = (pid // blocks_k // blocks_n // Q).to(tl.int32)
    CHUNKS: tl.constexpr = POSITIONS // BLOCK_K
    r_low = tl.maximum(0, pad_h - p * STRIDE_H)
    r_high = tl.minimum(R, H + pad_h - p * STRIDE_H)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if BLOCK_N2 > 0:
        acc2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
    for i in range(r_low * CHUNKS, r_high * CHUNKS):
        r = i // CHUNKS
        o_j = i % CHUNKS * BLOCK_K
        b_x = x_desc.load([p * STRIDE_H - pad_h + r, n0, q * STEP - first + o_j]).reshape(BLOCK_M, BLOCK_K)
        acc = dot(b_x, w_desc.load([r * K + k0, o_j]).T, acc, INPUT_PRECISION)
        if BLOCK_N2 > 0:
            acc2 = dot(b_x, w2_desc.load([r * K + k0 + BLOCK_N, o_j]).T, acc2, INPUT_PRECISION)
    o_n = pid_n * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n = o_n < N
    o_row = pixel_offset(o_n, p, q, K, P, Q, CHANNELS_LAST)
    o_k = k0 + tl.arange(0, BLOCK_N)
    store_pixels(y_ptr, bias_ptr, acc, o_row, m_n, o_k, K, P * Q, HAS_BIAS, RELU, CHANNELS_LAST)
    if BLOCK_N2 > 0:
        o_k2 = k0 + BLOCK_N + tl.arange(0, BLOCK_N2)
        store_pixels(y_ptr, bias_ptr, acc2, o_row, m_n, o_k2, K, P * Q, HAS_BIAS, RELU, CHANNELS_LAST)


# ------------------------------------------------------------------------------------------------- launch functions


class Rows(NamedTuple):
    """Where the positions of a pixel, which the kernels reduce over, lie in a row of the images.

    Attributes:
        step: elements from one pixel's positions to the next pixel's; a multiple of 4 in problems that these kernels run.
        first: elements by which the first pixel's positions begin before the row; a multiple of 4, so that TMA and vector loads
            begin at multiples of 16 bytes.
        shift: unused positions before the first useful one.
        useful: elements under one filter row, S * C.
    """

    step: int
    first: int
    shift: int
    useful: int

    @classmethod
    def of(cls, problem: Problem) -> Rows:
        stride, padding, *_ = problem.geometry
        before = padding[1] * problem.c
        return cls(stride[1] * problem.c, cdiv(before, 4) * 4, -before % 4, problem.s * problem.c)

    @property
    def positions(self) -> int:
        """Number of positions of a filter row, rounded up to 16, the smallest reduction that every Triton version accepts."""
        return cdiv(self.shift + self.useful, 16) * 16


def dense_rows(input: Tensor) -> Tensor:
    """(N, C, H, W) as a dense (N, H, W*C rounded up to a multiple of 4): rows are padded with zeros to whole 16 bytes."""
    n, c, h, w = input.shape
    nhwc = dense_nhwc(input)
    if w * c % 4 == 0:
        return nhwc.view(n, h, w * c)
    rows = new_output((n, h, cdiv(w * c, 4) * 4), input.dtype, input.device)
    rows.zero_()
    rows[:, :, : w * c] = nhwc.view(n, h, w * c)
    return rows


def row_blocks(rows: Tensor, images: int, positions: int) -> TensorDescriptor:
    """Descriptor [H, N, elements of a row] over :func:`dense_rows`: a block is one piece of a row of ``images`` images."""
    n, h, row = rows.shape
    return TensorDescriptor(rows, [h, n, row], [row, h * row, 1], [1, images, positions])


def filter_rows(weight: Tensor, problem: Problem) -> Tensor:
    """Filter rows (R, K, positions), dense, with zeros in the positions that are not under the filter."""
    rows = Rows.of(problem)
    return fold_filter(weight, 1, problem.r, rows.positions, rows.shift)


def filter_blocks(filters: Tensor, columns: int, step: int) -> TensorDescriptor:
    """Descriptor [R*K, positions] over :func:`filter_rows`."""
    r, k, positions = filters.shape
    return TensorDescriptor(filters, [r * k, positions], [positions, 1], [columns, step])


def fprop(input: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, relu: bool, channels_last: bool) -> Tensor:
    """Arguments and result as :func:`.select.fprop`."""
    n, c, h, _, k, r, s, p, q, (stride, padding, *_), dtype, device, precision = problem
    rows = Rows.of(problem)
    x, filters = dense_rows(input), filter_rows(weight, problem)
    y = new_output((n, k, p, q), dtype, device, channels_last=channels_last)
    config = conv2d_rows_config(device, n, p, q, rows.positions, k, r)
    m, n1, n2, step = (config[f"BLOCK_{name}"] for name in ("M", "N", "N2", "K"))
    launch(
        _conv2d_rows_kernel,
        (p * q * cdiv(n, m) * cdiv(k, n1 + n2),),
        x_desc=row_blocks(x, m, step),
        w_desc=filter_blocks(filters, n1, step),
        w2_desc=filter_blocks(filters, n2 or n1, step),
        bias_ptr=filters if bias is None else bias.contiguous(),
        y_ptr=y,
        N=n,
        H=h,
        P=p,
        Q=q,
        K=k,
        pad_h=padding[0],
        first=rows.first,
        USEFUL_POSITIONS=c * r * s,
        R=r,
        POSITIONS=rows.positions,
        STRIDE_H=stride[0],
        STEP=rows.step,
        HAS_BIAS=bias is not None,
        RELU=relu,
        CHANNELS_LAST=channels_last,
        WIDE=needs_int64(y),
        INPUT_PRECISION=precision,
        **config,
    )
    return y
