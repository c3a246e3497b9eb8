"""A convolution's forward pass that reduces over rows of taps, through tensor descriptors, for Hopper and later.

The S x C inputs of a pixel under one filter row are contiguous in a row of the image, and so are the row's weights. If C is not
a multiple of 128 bytes, the kernels of :mod:`.descriptor` reduce in chunks that divide C: in half precision 64 bytes for 96
channels, 32 bytes for 48 or 80 channels. The kernel here reduces in chunks of 128 bytes whatever C is, and reduces the rest of
a row in smaller chunks. Chunks that lie in the padding are skipped.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..primitives import dot, program_id
from ..runtime.launch import cdiv, launch, needs_int64, new_output
from .descriptor import dense_nhwc, inner_first, input_rows, matrix, pixel_offset, store_pixels
from .problem import Problem
from .taps_rules import conv2d_taps_config


@triton.jit
def _add_rows_of_taps(
    acc, x_desc, w_desc, h, o_x, n0, k0, r_low, rows, left, right,
    COLUMNS: tl.constexpr, FIRST: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the products of CHUNKS chunks of each filter row, from its column FIRST on. A row has COLUMNS columns.

    Filter row 0 meets input row ``h`` from column ``o_x`` on. Columns ``left`` to ``right`` of each filter row meet the image;
    chunks without any of these columns are skipped.
    """
    low = tl.maximum(left - FIRST, 0) // BLOCK_K
    high = tl.minimum(tl.cdiv(tl.maximum(right - FIRST, 0), BLOCK_K), CHUNKS)
    chunks = tl.maximum(high - low, 0)
    for i in range(rows * chunks):
        r = r_low + i // tl.maximum(chunks, 1)
        column = FIRST + (low + i % tl.maximum(chunks, 1)) * BLOCK_K
        b_w = w_desc.load([k0, r * COLUMNS + column]).T  # [BLOCK_K, BLOCK_N]
        b_x = x_desc.load([h + r, n0, o_x + column])
        acc = dot(b_x.reshape(b_x.shape[1], BLOCK_K), b_w, acc, INPUT_PRECISION)
    return acc


@triton.jit
def _conv2d_taps_kernel(
    x_desc,  # input as rows [H, N, W*C], blocks [1, BLOCK_M, BLOCK_K]
    x2_desc,  # the same with BLOCK_K2 for BLOCK_K
    w_desc,  # filters [K, R*S*C], blocks [BLOCK_N, BLOCK_K]
    w2_desc,  # the same with BLOCK_K2 for BLOCK_K
    bias_ptr,  # [K], or unused
    y_ptr,  # out: [N, P, Q, K] contiguous; without CHANNELS_LAST [N, K, P, Q] contiguous
    N,
    H,
    W,
    P,
    Q,
    K,
    pad_h,
    pad_w,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_K2: tl.constexpr,
):
    """One program computes one pixel of BLOCK_M images x BLOCK_N filters.

    A chunk may reach beyond the image, where TMA fills in zeros. No chunk reaches beyond its filter row: the elements there
    belong to another pixel, and an infinity among them times a zero weight would be NaN.
    """
    pid = program_id(0, WIDE)
    blocks_k = tl.cdiv(K, BLOCK_N)
    blocks_n = tl.cdiv(N, BLOCK_M)
    k0 = (pid % blocks_k * BLOCK_N).to(tl.int32)
    pid_pixel = pid // blocks_k
    n0 = (pid_pixel % blocks_n * BLOCK_M).to(tl.int32)
    p, q = inner_first((pid_pixel // blocks_n).to(tl.int32), P, Q, pad_h, pad_w)
    r_low = tl.maximum(0, pad_h - p)
    rows = tl.maximum(tl.minimum(R, H + pad_h - p) - r_low, 0)
    left = tl.maximum(pad_w - q, 0) * C
    right = tl.minimum(W + pad_w - q, S) * C
    h = p - pad_h
    o_x = (q - pad_w) * C
    COLUMNS: tl.constexpr = S * C
    CHUNKS: tl.constexpr = COLUMNS // BLOCK_K
    REST: tl.constexpr = COLUMNS % BLOCK_K

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = _add_rows_of_taps(
        acc, x_desc, w_desc, h, o_x, n0, k0, r_low, rows, left, right, COLUMNS, 0, CHUNKS, BLOCK_K, INPUT_PRECISION
    )
    if REST > 0:
        acc = _add_rows_of_taps(
            acc, x2_desc, w2_desc, h, o_x, n0, k0, r_low, rows, left, right,
            COLUMNS, COLUMNS - REST, REST // BLOCK_K2, BLOCK_K2, INPUT_PRECISION,
        )  # fmt: skip

    o_n = pid_pixel % blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = pixel_offset(o_n, p, q, K, P, Q, CHANNELS_LAST)
    o_k = k0 + tl.arange(0, BLOCK_N)
    store_pixels(y_ptr, bias_ptr, acc, o_row, o_n < N, o_k, K, P * Q, HAS_BIAS, RELU, CHANNELS_LAST)


def fprop(input: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, relu: bool, channels_last: bool) -> Tensor:
    """Arguments and result as :func:`.select.fprop`."""
    n, c, h, w, k, r, s, p, q, (_, padding, _, _), dtype, device, precision = problem
    config = conv2d_taps_config(device, n, p, q, c, k, r, s, channels_last=channels_last, dtype=dtype)
    x, filters = dense_nhwc(input), dense_nhwc(weight)
    y = new_output((n, k, p, q), dtype, device, channels_last=channels_last)
    launch(
        _conv2d_taps_kernel,
        (cdiv(n, config["BLOCK_M"]) * p * q * cdiv(k, config["BLOCK_N"]),),
        x_desc=input_rows(x, config["BLOCK_M"], config["BLOCK_K"]),
        x2_desc=input_rows(x, config["BLOCK_M"], config["BLOCK_K2"]),
        w_desc=matrix(filters, k, [config["BLOCK_N"], config["BLOCK_K"]]),
        w2_desc=matrix(filters, k, [config["BLOCK_N"], config["BLOCK_K2"]]),
        bias_ptr=filters if bias is None else bias.contiguous(),
        y_ptr=y,
        N=n,
        H=h,
        W=w,
        P=p,
        Q=q,
        K=k,
        pad_h=padding[0],
        pad_w=padding[1],
        C=c,
        R=r,
        S=s,
        HAS_BIAS=bias is not None,
        RELU=relu,
        CHANNELS_LAST=channels_last,
        WIDE=needs_int64(y),
        INPUT_PRECISION=precision,
        **config,
    )
    return y
