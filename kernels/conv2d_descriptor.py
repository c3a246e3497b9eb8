"""Convolution of half-precision channels-last tensors through tensor descriptors: for Hopper and later.

The general kernels of :mod:`kernels.conv2d` gather each element through a pointer of its own. These let the copy engine bring
whole tiles into shared memory (``cp.async.bulk.tensor``), from where the tensor cores read them (``wgmma``, ``tcgen05``). They
take stride 1, dilation 1, one group and channels in multiples of 16; a strided first layer of few channels becomes one by
:func:`space_to_depth`.

What is a tile? A product's rows are output pixels, and for each filter position (r, s) they must be shifted together.

- *Images*: a tile is one pixel of BLOCK_M images. Seen as [H, N, W*C], the shifted tile is a plain block [1, BLOCK_M, BLOCK_K],
  and rows and columns outside of the image come back as zeros. Filter positions that lie outside for the whole tile are left
  out altogether: 11% of conv3's products are with padding, and are never formed. No tile has a wasted row, whatever P and Q.
- *Box*: a tile is a box of images x rows x columns, loaded as [NB, TH, TW, BLOCK_K] and flattened. For few images.

On Hopper an operand of the product stays in shared memory only if it comes straight from a load, or is the second one. A
flattened box as first operand would go through registers, where Triton 3.6 was seen to let it be overwritten while the tensor
cores still read it (wrong values on an H100). So the box kernel's first operand is the filters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .backend import capability
from .config import (
    conv2d_box_config,
    conv2d_images_config,
    conv2d_images_wgrad_config,
    conv2d_stem_config,
    conv2d_stem_wgrad_config,
    conv2d_tile,
    elementwise_config,
)
from .device import cast, dot, program_id, relu
from .launch import launch, needs_int64, new_output, strides
from .reduction import sum_parts

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _store_pixels(y_ptr, bias_ptr, acc, o_row, m_row, o_k, K, HAS_BIAS: tl.constexpr, RELU: tl.constexpr):
    """The epilogue: bias, ReLU, cast, store of [rows, filters]."""
    m_k = o_k < K
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_k, mask=m_k, other=0.0).to(acc.dtype)[None, :]
    if RELU:
        acc = relu(acc)
    p_y = y_ptr + o_row[:, None] + o_k[None, :]
    tl.store(p_y, cast(acc, y_ptr.dtype.element_ty), mask=m_row[:, None] & m_k[None, :])


@triton.jit
def _conv2d_images_kernel(
    x_desc,  # input as rows [H, N, W*C], blocks [1, BLOCK_M, BLOCK_K]
    w_desc,  # filters [K, R*S*C], blocks [BLOCK_N, BLOCK_K]; DGRAD: [C, R*S*K], blocks [BLOCK_K, BLOCK_N]
    w2_desc,  # the same with BLOCK_N2 for BLOCK_N
    bias_ptr,  # [K], or unused
    y_ptr,  # out: [N, P, Q, K] contiguous
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
    DGRAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes PIXELS (1 or 2) neighbouring pixels of BLOCK_M images x BLOCK_N + BLOCK_N2 filters.

    Input row h meets output row p in filter row r where h = p - pad + r. With DGRAD, the input is the output's gradient, C its
    channels, and the same pixels meet where h = p + pad - r. Two blocks of filters, since a block is a power of 2 and 96 is
    not; two pixels, since both read the same filters.
    """
    pid = program_id(0, WIDE)
    blocks_k = tl.cdiv(K, BLOCK_N + BLOCK_N2)
    blocks_n = tl.cdiv(N, BLOCK_M)
    strips = tl.cdiv(Q, PIXELS)
    k0 = (pid % blocks_k * (BLOCK_N + BLOCK_N2)).to(tl.int32)
    pid_pixels = pid // blocks_k
    n0 = (pid_pixels % blocks_n * BLOCK_M).to(tl.int32)
    q = (pid_pixels // blocks_n % strips * PIXELS).to(tl.int32)
    p = (pid_pixels // blocks_n // strips).to(tl.int32)
    # The filter positions that meet the image in any of the pixels.
    if DGRAD:
        r_low = tl.maximum(0, p + pad_h - H + 1)
        r_high = tl.minimum(R, p + pad_h + 1)
        s_low = tl.maximum(0, q + pad_w - W + 1)
        s_high = tl.minimum(S, q + pad_w + PIXELS)
    else:
        r_low = tl.maximum(0, pad_h - p)
        r_high = tl.minimum(R, H + pad_h - p)
        s_low = tl.maximum(0, pad_w - q - (PIXELS - 1))
        s_high = tl.minimum(S, W + pad_w - q)
    rows = tl.maximum(r_high - r_low, 0)
    columns = tl.maximum(s_high - s_low, 0)
    CHUNKS: tl.constexpr = C // BLOCK_K

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if BLOCK_N2 > 0:
        acc2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
    if PIXELS == 2:
        next_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if BLOCK_N2 > 0:
            next_acc2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
    for i in range(rows * columns * CHUNKS):
        c0 = i % CHUNKS * BLOCK_K
        s = s_low + i // CHUNKS % tl.maximum(columns, 1)
        r = r_low + i // CHUNKS // tl.maximum(columns, 1)
        if DGRAD:
            h = p + pad_h - r
            o_x = (q + pad_w - s) * C + c0
            o_w = (r * S + s) * K + k0
            b_w = w_desc.load([c0, o_w])  # [BLOCK_K, BLOCK_N]
        else:
            h = p - pad_h + r
            o_x = (q - pad_w + s) * C + c0
            o_w = (r * S + s) * C + c0
            b_w = w_desc.load([k0, o_w]).T
        b_x = x_desc.load([h, n0, o_x]).reshape(BLOCK_M, BLOCK_K)
        acc = dot(b_x, b_w, acc, INPUT_PRECISION)
        if BLOCK_N2 > 0:
            b_w2 = w2_desc.load([c0, o_w + BLOCK_N]) if DGRAD else w2_desc.load([k0 + BLOCK_N, o_w]).T
            acc2 = dot(b_x, b_w2, acc2, INPUT_PRECISION)
        if PIXELS == 2:
            b_next = x_desc.load([h, n0, o_x + C]).reshape(BLOCK_M, BLOCK_K)
            next_acc = dot(b_next, b_w, next_acc, INPUT_PRECISION)
            if BLOCK_N2 > 0:
                next_acc2 = dot(b_next, b_w2, next_acc2, INPUT_PRECISION)

    o_n = pid_pixels % blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = ((o_n * P + p) * Q + q) * K
    m_n = o_n < N
    o_k = k0 + tl.arange(0, BLOCK_N)
    _store_pixels(y_ptr, bias_ptr, acc, o_row, m_n, o_k, K, HAS_BIAS, RELU)
    if BLOCK_N2 > 0:
        o_k2 = k0 + BLOCK_N + tl.arange(0, BLOCK_N2)
        _store_pixels(y_ptr, bias_ptr, acc2, o_row, m_n, o_k2, K, HAS_BIAS, RELU)
    if PIXELS == 2:
        m_n = m_n & (q + 1 < Q)
        _store_pixels(y_ptr, bias_ptr, next_acc, o_row + K, m_n, o_k, K, HAS_BIAS, RELU)
        if BLOCK_N2 > 0:
            _store_pixels(y_ptr, bias_ptr, next_acc2, o_row + K, m_n, o_k2, K, HAS_BIAS, RELU)


@triton.jit
def _conv2d_box_kernel(
    x_desc,  # input [N, H, W, C], blocks [NB, TH, TW, BLOCK_K]
    w_desc,  # filters [K, R*S*C], blocks [BLOCK_N, BLOCK_K]; DGRAD: [C, R*S*K], blocks [BLOCK_K, BLOCK_N]
    bias_ptr,  # [K], or unused
    y_ptr,  # out: [N, P, Q, K] contiguous
    N,
    P,
    Q,
    K,
    pad_h,  # DGRAD: R - 1 - padding
    pad_w,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DGRAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    NB: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes NB images x TH rows x TW columns x BLOCK_N filters, transposed until it stores them.

    With DGRAD, the input is the output's gradient, C its channels, and the filter is read from its last position to its first.
    """
    BLOCK_M: tl.constexpr = NB * TH * TW
    pid = program_id(0, WIDE)
    blocks_k = tl.cdiv(K, BLOCK_N)
    tiles_p = tl.cdiv(P, TH)
    tiles_q = tl.cdiv(Q, TW)
    pid_tile = pid // blocks_k
    k0 = (pid % blocks_k * BLOCK_N).to(tl.int32)
    q0 = (pid_tile % tiles_q * TW).to(tl.int32)
    p0 = (pid_tile // tiles_q % tiles_p * TH).to(tl.int32)
    n0 = (pid_tile // tiles_q // tiles_p * NB).to(tl.int32)
    CHUNKS: tl.constexpr = C // BLOCK_K

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for i in range(R * S * CHUNKS):
        c0 = i % CHUNKS * BLOCK_K
        rs = i // CHUNKS
        b_x = x_desc.load([n0, p0 + rs // S - pad_h, q0 + rs % S - pad_w, c0]).reshape(BLOCK_M, BLOCK_K)
        if DGRAD:
            b_w = w_desc.load([c0, (R * S - 1 - rs) * K + k0]).T
        else:
            b_w = w_desc.load([k0, rs * C + c0])
        acc = dot(b_w, b_x.T, acc, INPUT_PRECISION)

    o_m = tl.arange(0, BLOCK_M)
    o_n = pid_tile // tiles_q // tiles_p * NB + o_m // (TH * TW)
    o_p = p0 + o_m // TW % TH
    o_q = q0 + o_m % TW
    m_m = (o_n < N) & (o_p < P) & (o_q < Q)
    o_row = ((o_n * P + o_p) * Q + o_q) * K
    _store_pixels(y_ptr, bias_ptr, acc.T, o_row, m_m, k0 + tl.arange(0, BLOCK_N), K, HAS_BIAS, RELU)


@triton.jit
def _conv2d_images_wgrad_kernel(
    z_desc,  # gradient before the activation [N, P*Q*K], blocks [BLOCK_K, BLOCK_M]
    x_desc,  # input as rows [H, N, W*C], blocks [1, BLOCK_K, BLOCK_N]
    x2_desc,  # the same with BLOCK_N2 for BLOCK_N
    partial_ptr,  # out: [SPLIT, K, R*S*C] float32
    N,
    H,
    W,
    P,
    Q,
    K,
    SPLIT,
    pad_h,
    pad_w,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program sums BLOCK_M filters x BLOCK_N + BLOCK_N2 channels of POSITIONS (1 or 2) filter positions over its split.

    A step of the sum is one pixel of BLOCK_K images. Pixels whose input lies in the padding are left out. Two positions share
    the gradient's tile.
    """
    pid = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    blocks_m = tl.cdiv(K, BLOCK_M)
    CHUNKS: tl.constexpr = C // (BLOCK_N + BLOCK_N2)
    k0 = (pid % blocks_m * BLOCK_M).to(tl.int32)
    c0 = (pid // blocks_m % CHUNKS * (BLOCK_N + BLOCK_N2)).to(tl.int32)
    rs = (pid // blocks_m // CHUNKS * POSITIONS).to(tl.int32)
    r = rs // S
    s = rs % S
    # Output rows and columns whose input is inside the image for one of the positions.
    p_low = tl.maximum(0, pad_h - r)
    p_high = tl.minimum(P, H + pad_h - r)
    q_low = tl.maximum(0, pad_w - s)
    q_high = tl.minimum(Q, W + pad_w - s)
    if POSITIONS == 2:
        r2 = (rs + 1) // S
        s2 = (rs + 1) % S
        p_low = tl.minimum(p_low, tl.maximum(0, pad_h - r2))
        p_high = tl.maximum(p_high, tl.minimum(P, H + pad_h - r2))
        q_low = tl.minimum(q_low, tl.maximum(0, pad_w - s2))
        q_high = tl.maximum(q_high, tl.minimum(Q, W + pad_w - s2))
    columns = tl.maximum(q_high - q_low, 0)
    blocks_n = tl.cdiv(N, BLOCK_K)
    steps = tl.maximum(p_high - p_low, 0) * columns * blocks_n
    steps_per_split = tl.cdiv(steps, SPLIT)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if BLOCK_N2 > 0:
        acc2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
    if POSITIONS == 2:
        next_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if BLOCK_N2 > 0:
            next_acc2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
    first = (pid_split * steps_per_split).to(tl.int32)
    for i in range(first, tl.minimum(first + steps_per_split, steps)):
        n0 = i % blocks_n * BLOCK_K
        q = q_low + i // blocks_n % tl.maximum(columns, 1)
        p = p_low + i // blocks_n // tl.maximum(columns, 1)
        b_z = z_desc.load([n0, (p * Q + q) * K + k0]).T  # [BLOCK_M, BLOCK_K]
        h = p + r - pad_h
        o_x = (q + s - pad_w) * C + c0
        acc = dot(b_z, x_desc.load([h, n0, o_x]).reshape(BLOCK_K, BLOCK_N), acc, INPUT_PRECISION)
        if BLOCK_N2 > 0:
            acc2 = dot(b_z, x2_desc.load([h, n0, o_x + BLOCK_N]).reshape(BLOCK_K, BLOCK_N2), acc2, INPUT_PRECISION)
        if POSITIONS == 2:
            h2 = p + r2 - pad_h
            o_x2 = (q + s2 - pad_w) * C + c0
            next_acc = dot(b_z, x_desc.load([h2, n0, o_x2]).reshape(BLOCK_K, BLOCK_N), next_acc, INPUT_PRECISION)
            if BLOCK_N2 > 0:
                b_x2 = x2_desc.load([h2, n0, o_x2 + BLOCK_N]).reshape(BLOCK_K, BLOCK_N2)
                next_acc2 = dot(b_z, b_x2, next_acc2, INPUT_PRECISION)

    o_k = pid % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    p_out = partial_ptr + ((pid_split * K + o_k) * (R * S * C) + rs * C + c0)[:, None]
    m_k = (o_k < K)[:, None]
    o_c = tl.arange(0, BLOCK_N)[None, :]
    tl.store(p_out + o_c, acc, mask=m_k)
    if BLOCK_N2 > 0:
        o_c2 = BLOCK_N + tl.arange(0, BLOCK_N2)[None, :]
        tl.store(p_out + o_c2, acc2, mask=m_k)
    if POSITIONS == 2:
        m_k = m_k & (rs + 1 < R * S)
        tl.store(p_out + C + o_c, next_acc, mask=m_k)
        if BLOCK_N2 > 0:
            tl.store(p_out + C + o_c2, next_acc2, mask=m_k)


@triton.jit
def _space_to_depth_kernel(
    x_ptr,  # [N, C, H, W] through its strides
    out_ptr,  # out: [N, HS, WS, STRIDE*STRIDE*C] contiguous
    H,
    W,
    HS,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    pad_h,
    pad_w,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    WS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n, i, j, (a * STRIDE + b) * C + c] = x[n, c, i * STRIDE + a - pad, j * STRIDE + b - pad]; one program: one (n, i)."""
    DEPTH: tl.constexpr = STRIDE * STRIDE * C
    pid = program_id(0, WIDE)
    n = pid // HS
    i = (pid % HS).to(tl.int32)
    o_e = tl.arange(0, BLOCK)
    o_c = o_e % C
    h = i * STRIDE + o_e % DEPTH // C // STRIDE - pad_h
    w = o_e // DEPTH * STRIDE + o_e // C % STRIDE - pad_w
    m_e = o_e < WS * DEPTH
    m_x = m_e & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    if WIDE:
        o_c = o_c.to(tl.int64)
    b_x = tl.load(x_ptr + n * stride_xn + o_c * stride_xc + h * stride_xh + w * stride_xw, mask=m_x, other=0.0)
    tl.store(out_ptr + pid * (WS * DEPTH) + o_e, b_x, mask=m_e)


@triton.jit
def _fold_filter_kernel(
    w_ptr,  # [K, C, R, S] through its strides
    out_ptr,  # out: [3, K, FOLD] contiguous
    elements,
    K,
    stride_wk,
    stride_wc,
    stride_wr,
    stride_ws,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    FOLD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The filter over an input that :func:`_space_to_depth_kernel` wrote; zeros where it is longer than R x S."""
    o_e = program_id(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    o_f = o_e % FOLD
    o_k = o_e // FOLD % K
    o_c = o_f % C
    o_s = o_f // (STRIDE * STRIDE * C) * STRIDE + o_f // C % STRIDE
    o_r = o_e // FOLD // K * STRIDE + o_f // C // STRIDE % STRIDE
    p_w = w_ptr + o_k * stride_wk + o_c * stride_wc + o_r * stride_wr + o_s * stride_ws
    tl.store(out_ptr + o_e, tl.load(p_w, mask=m_e & (o_r < R) & (o_s < S), other=0.0), mask=m_e)


@triton.jit
def _conv2d_stem_kernel(
    x_desc,  # overlapping patches [HS, Q, N, FOLD], blocks [1, 1, BLOCK_M, BLOCK_K]
    x2_desc,  # the same with BLOCK_K2 for BLOCK_K
    w_desc,  # filters [3, K, FOLD], blocks [1, BLOCK_N, BLOCK_K]
    w2_desc,  # [1, BLOCK_N, BLOCK_K2]
    v_desc,  # [1, BLOCK_N2, BLOCK_K]
    v2_desc,  # [1, BLOCK_N2, BLOCK_K2]
    bias_ptr,  # [K], or unused
    y_ptr,  # out: [N, P, Q, K] contiguous
    N,
    P,
    Q,
    K,
    columns,
    USEFUL_POSITIONS: tl.constexpr,  # C * R * S before folding: for whoever counts FLOPs
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_K2: tl.constexpr,
):
    """One program computes BLOCK_M images x some columns of one output row x BLOCK_N + BLOCK_N2 filters.

    The whole filter waits in shared memory while the columns pass by: three rows of FOLD positions.
    """
    pid = program_id(0, WIDE)
    blocks_k = tl.cdiv(K, BLOCK_N + BLOCK_N2)
    strips = tl.cdiv(Q, columns)
    blocks_n = tl.cdiv(N, BLOCK_M)
    k0 = (pid % blocks_k * (BLOCK_N + BLOCK_N2)).to(tl.int32)
    q0 = (pid // blocks_k % strips * columns).to(tl.int32)
    pid_n = pid // blocks_k // strips % blocks_n
    n0 = (pid_n * BLOCK_M).to(tl.int32)
    p = (pid // blocks_k // strips // blocks_n).to(tl.int32)
    w_0 = w_desc.load([0, k0, 0]).reshape(BLOCK_N, BLOCK_K).T
    w_1 = w_desc.load([1, k0, 0]).reshape(BLOCK_N, BLOCK_K).T
    w_2 = w_desc.load([2, k0, 0]).reshape(BLOCK_N, BLOCK_K).T
    if BLOCK_K2 > 0:
        w2_0 = w2_desc.load([0, k0, BLOCK_K]).reshape(BLOCK_N, BLOCK_K2).T
        w2_1 = w2_desc.load([1, k0, BLOCK_K]).reshape(BLOCK_N, BLOCK_K2).T
        w2_2 = w2_desc.load([2, k0, BLOCK_K]).reshape(BLOCK_N, BLOCK_K2).T
    if BLOCK_N2 > 0:
        v_0 = v_desc.load([0, k0 + BLOCK_N, 0]).reshape(BLOCK_N2, BLOCK_K).T
        v_1 = v_desc.load([1, k0 + BLOCK_N, 0]).reshape(BLOCK_N2, BLOCK_K).T
        v_2 = v_desc.load([2, k0 + BLOCK_N, 0]).reshape(BLOCK_N2, BLOCK_K).T
        if BLOCK_K2 > 0:
            v2_0 = v2_desc.load([0, k0 + BLOCK_N, BLOCK_K]).reshape(BLOCK_N2, BLOCK_K2).T
            v2_1 = v2_desc.load([1, k0 + BLOCK_N, BLOCK_K]).reshape(BLOCK_N2, BLOCK_K2).T
            v2_2 = v2_desc.load([2, k0 + BLOCK_N, BLOCK_K]).reshape(BLOCK_N2, BLOCK_K2).T
    o_n = pid_n * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n = o_n < N
    o_k = k0 + tl.arange(0, BLOCK_N)
    for q in range(q0, tl.minimum(q0 + columns, Q)):
        x_0 = x_desc.load([p, q, n0, 0]).reshape(BLOCK_M, BLOCK_K)
        x_1 = x_desc.load([p + 1, q, n0, 0]).reshape(BLOCK_M, BLOCK_K)
        x_2 = x_desc.load([p + 2, q, n0, 0]).reshape(BLOCK_M, BLOCK_K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = dot(x_0, w_0, acc, INPUT_PRECISION)
        acc = dot(x_1, w_1, acc, INPUT_PRECISION)
        acc = dot(x_2, w_2, acc, INPUT_PRECISION)
        if BLOCK_K2 > 0:
            x2_0 = x2_desc.load([p, q, n0, BLOCK_K]).reshape(BLOCK_M, BLOCK_K2)
            x2_1 = x2_desc.load([p + 1, q, n0, BLOCK_K]).reshape(BLOCK_M, BLOCK_K2)
            x2_2 = x2_desc.load([p + 2, q, n0, BLOCK_K]).reshape(BLOCK_M, BLOCK_K2)
            acc = dot(x2_0, w2_0, acc, INPUT_PRECISION)
            acc = dot(x2_1, w2_1, acc, INPUT_PRECISION)
            acc = dot(x2_2, w2_2, acc, INPUT_PRECISION)
        o_row = ((o_n * P + p) * Q + q) * K
        _store_pixels(y_ptr, bias_ptr, acc, o_row, m_n, o_k, K, HAS_BIAS, RELU)
        if BLOCK_N2 > 0:
            acc2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
            acc2 = dot(x_0, v_0, acc2, INPUT_PRECISION)
            acc2 = dot(x_1, v_1, acc2, INPUT_PRECISION)
            acc2 = dot(x_2, v_2, acc2, INPUT_PRECISION)
            if BLOCK_K2 > 0:
                acc2 = dot(x2_0, v2_0, acc2, INPUT_PRECISION)
                acc2 = dot(x2_1, v2_1, acc2, INPUT_PRECISION)
                acc2 = dot(x2_2, v2_2, acc2, INPUT_PRECISION)
            o_k2 = k0 + BLOCK_N + tl.arange(0, BLOCK_N2)
            _store_pixels(y_ptr, bias_ptr, acc2, o_row, m_n, o_k2, K, HAS_BIAS, RELU)


@triton.jit
def _conv2d_stem_wgrad_kernel(
    x_desc,  # overlapping patches [HS, Q, N, FOLD], blocks [1, 1, BLOCK_K, BLOCK_M]
    z_desc,  # gradient before the activation [P*Q, N, K], blocks [1, BLOCK_K, BLOCK_N]
    z2_desc,  # the same with BLOCK_N2 for BLOCK_N
    partial_ptr,  # out: [SPLIT, FOLD_BLOCKS, 3, BLOCK_M, K] float32
    N,
    P,
    Q,
    K,
    SPLIT,
    USEFUL_POSITIONS: tl.constexpr,  # C * R * S before folding: for whoever counts FLOPs
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    FOLD_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program sums three filter rows of BLOCK_M folded positions x BLOCK_N + BLOCK_N2 filters over its split's pixels."""
    pid = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    f0 = (pid % FOLD_BLOCKS * BLOCK_M).to(tl.int32)
    k0 = (pid // FOLD_BLOCKS * (BLOCK_N + BLOCK_N2)).to(tl.int32)
    blocks_n = tl.cdiv(N, BLOCK_K)
    steps = P * Q * blocks_n
    steps_per_split = tl.cdiv(steps, SPLIT)
    first = (pid_split * steps_per_split).to(tl.int32)
    acc_0 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_1 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if BLOCK_N2 > 0:
        acc2_0 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
        acc2_1 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
        acc2_2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
    for i in range(first, tl.minimum(first + steps_per_split, steps)):
        n0 = i % blocks_n * BLOCK_K
        pq = i // blocks_n
        p = pq // Q
        q = pq % Q
        b_z = z_desc.load([pq, n0, k0]).reshape(BLOCK_K, BLOCK_N)
        x_0 = x_desc.load([p, q, n0, f0]).reshape(BLOCK_K, BLOCK_M).T
        x_1 = x_desc.load([p + 1, q, n0, f0]).reshape(BLOCK_K, BLOCK_M).T
        x_2 = x_desc.load([p + 2, q, n0, f0]).reshape(BLOCK_K, BLOCK_M).T
        acc_0 = dot(x_0, b_z, acc_0, INPUT_PRECISION)
        acc_1 = dot(x_1, b_z, acc_1, INPUT_PRECISION)
        acc_2 = dot(x_2, b_z, acc_2, INPUT_PRECISION)
        if BLOCK_N2 > 0:
            b_z2 = z2_desc.load([pq, n0, k0 + BLOCK_N]).reshape(BLOCK_K, BLOCK_N2)
            acc2_0 = dot(x_0, b_z2, acc2_0, INPUT_PRECISION)
            acc2_1 = dot(x_1, b_z2, acc2_1, INPUT_PRECISION)
            acc2_2 = dot(x_2, b_z2, acc2_2, INPUT_PRECISION)
    o_m = tl.arange(0, BLOCK_M)[:, None] * K
    p_out = partial_ptr + (pid_split * FOLD_BLOCKS + pid % FOLD_BLOCKS) * (3 * BLOCK_M * K) + o_m
    o_k = k0 + tl.arange(0, BLOCK_N)[None, :]
    m_k = o_k < K
    tl.store(p_out + o_k, acc_0, mask=m_k)
    tl.store(p_out + BLOCK_M * K + o_k, acc_1, mask=m_k)
    tl.store(p_out + 2 * BLOCK_M * K + o_k, acc_2, mask=m_k)
    if BLOCK_N2 > 0:
        o_k2 = k0 + BLOCK_N + tl.arange(0, BLOCK_N2)[None, :]
        m_k2 = o_k2 < K
        tl.store(p_out + o_k2, acc2_0, mask=m_k2)
        tl.store(p_out + BLOCK_M * K + o_k2, acc2_1, mask=m_k2)
        tl.store(p_out + 2 * BLOCK_M * K + o_k2, acc2_2, mask=m_k2)


@triton.jit
def _unfold_filter_kernel(
    partial_ptr,  # [SPLIT, FOLD_BLOCKS, 3, BLOCK_M, K] float32
    dw_ptr,  # out: [K, C, R, S] through its strides
    elements,
    K,
    SPLIT,
    stride_wk,
    stride_wc,
    stride_wr,
    stride_ws,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    FOLD_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The filter's gradient: the sum over the parts, each position taken from where folding put it."""
    o_e = program_id(0, WIDE) * BLOCK + tl.arange(0, BLOCK)  # (r, s, c, k), k fastest, as the parts are read
    m_e = o_e < elements
    o_k = o_e % K
    o_c = o_e // K % C
    o_s = o_e // K // C % S
    o_r = o_e // K // C // S
    o_f = (o_s // STRIDE * STRIDE * STRIDE + o_r % STRIDE * STRIDE + o_s % STRIDE) * C + o_c
    o_in = ((o_f // BLOCK_M * 3 + o_r // STRIDE) * BLOCK_M + o_f % BLOCK_M) * K + o_k
    acc = tl.zeros((BLOCK_PARTS, BLOCK), dtype=tl.float32)
    for i in range(0, SPLIT, BLOCK_PARTS):
        o_part = i + tl.arange(0, BLOCK_PARTS)
        p_in = partial_ptr + o_part[:, None] * (FOLD_BLOCKS * 3 * BLOCK_M * K) + o_in[None, :]
        acc += tl.load(p_in, mask=(o_part < SPLIT)[:, None] & m_e[None, :], other=0.0)
    p_dw = dw_ptr + o_k * stride_wk + o_c * stride_wc + o_r * stride_wr + o_s * stride_ws
    tl.store(p_dw, cast(tl.sum(acc, axis=0), dw_ptr.dtype.element_ty), mask=m_e)


# ------------------------------------------------------------------------------------------------- what they can take


def _has_copy_engine(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16) and capability(tensor.device) >= 90


def takes(input: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether the kernels here run this convolution: half precision, stride and dilation 1, one group, 16 | C and K, sm_90+."""
    k, c, _, _ = weight.shape
    return (
        _has_copy_engine(input)
        and groups == 1
        and max(*stride, *dilation) == 1
        and c % 16 == 0
        and k % 16 == 0
        and input.numel() > 0
    )


def takes_stem(input: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether :func:`space_to_depth` makes this strided convolution one of three rows of 48 or 144 positions."""
    k, c, r, s = weight.shape
    step = stride[0]
    depth = c * step * step
    return (
        _has_copy_engine(input)
        and groups == 1
        and max(dilation) == 1
        and stride[1] == step
        and step > 1
        and triton.cdiv(r, step) == 3
        and depth % 8 == 0
        and conv2d_stem_fold(c, s, step) in (48, 144)
        and k % 8 == 0
        and input.numel() > 0
    )


def conv2d_stem_fold(channels: int, filter_width: int, stride: int) -> int:
    """Positions of a filter row after folding: its cells of stride x stride x channels."""
    return triton.cdiv(filter_width, stride) * stride * stride * channels


# ------------------------------------------------------------------------------------------------- launch functions


def _aligned(tensor: Tensor) -> Tensor:
    """Descriptors want 16-byte aligned memory; what is not is copied."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _nhwc(tensor: Tensor) -> Tensor:
    """(N, C, H, W) as a dense (N, H, W, C) tensor, copied only if it is not so in memory."""
    return _aligned(tensor.permute(0, 2, 3, 1).contiguous())


def _rows(nhwc: Tensor, images: int, columns: int) -> TensorDescriptor:
    """[H, N, W*C] over (N, H, W, C): a block is one pixel of ``images`` images."""
    n, h, w, c = nhwc.shape
    return TensorDescriptor(nhwc, [h, n, w * c], [w * c, h * w * c, 1], [1, images, columns])


def _matrix(tensor: Tensor, rows: int, block: Sequence[int]) -> TensorDescriptor:
    """[rows, whatever is left] over a dense tensor."""
    columns = tensor.numel() // rows
    return TensorDescriptor(tensor, [rows, columns], [columns, 1], list(block))


def _filters(weight: Tensor) -> Tensor:
    """(K, C, R, S) as dense (K, R, S, C)."""
    return _nhwc(weight)


def fprop(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    output_size: Sequence[int],
    relu: bool,
) -> Tensor:
    """Convolution, bias, ReLU: (N, C, H, W) and (K, C, R, S) to channels-last (N, K, P, Q)."""
    return _convolve(input, weight, bias, padding, output_size, relu, dgrad=False)


def dgrad(dz: Tensor, weight: Tensor, input_size: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Gradient of the input, channels-last ``input_size``, from that of the output before the activation."""
    return _convolve(dz, weight, None, padding, input_size[2:], False, dgrad=True)


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    output_size: Sequence[int],
    relu: bool,
    *,
    dgrad: bool,
) -> Tensor:
    """Both directions: what is input, output, C and K here is the gradient's, the other way round, with ``dgrad``."""
    r, s = weight.shape[2:]
    n, c, h, w = input.shape
    k = weight.shape[1] if dgrad else weight.shape[0]
    p, q = output_size
    x, filters = _nhwc(input), _filters(weight)
    y = new_output((n, k, p, q), input.dtype, input.device, channels_last=True)
    shared = {
        "bias_ptr": filters if bias is None else bias.contiguous(),
        "y_ptr": y,
        "N": n,
        "P": p,
        "Q": q,
        "K": k,
        "C": c,
        "R": r,
        "S": s,
        "DGRAD": dgrad,
        "HAS_BIAS": bias is not None,
        "RELU": relu,
        "WIDE": needs_int64(y),
        "INPUT_PRECISION": "ieee",
    }
    operation = "conv2d_dgrad" if dgrad else "conv2d_fprop"
    if conv2d_tile(input.device, operation, n, p, q, c, k, r, s) == "images":
        config = conv2d_images_config(input.device, operation, n, p, q, c, k, r, s)
        n2 = config["BLOCK_N2"]

        def filter_blocks(columns: int) -> list[int]:
            return [config["BLOCK_K"], columns] if dgrad else [columns, config["BLOCK_K"]]

        tiles = triton.cdiv(n, config["BLOCK_M"]) * p * triton.cdiv(q, config["PIXELS"])
        launch(
            _conv2d_images_kernel,
            (tiles * triton.cdiv(k, config["BLOCK_N"] + n2),),
            x_desc=_rows(x, config["BLOCK_M"], config["BLOCK_K"]),
            w_desc=_matrix(filters, weight.shape[0], filter_blocks(config["BLOCK_N"])),
            w2_desc=_matrix(filters, weight.shape[0], filter_blocks(n2 or config["BLOCK_N"])),
            H=h,
            W=w,
            pad_h=padding[0],
            pad_w=padding[1],
            **shared,
            **config,
        )
        return y
    config = conv2d_box_config(input.device, operation, n, p, q, c, k, r, s)
    tile = [config["NB"], config["TH"], config["TW"]]
    tiles = triton.cdiv(n, tile[0]) * triton.cdiv(p, tile[1]) * triton.cdiv(q, tile[2])
    block = [config["BLOCK_K"], config["BLOCK_N"]] if dgrad else [config["BLOCK_N"], config["BLOCK_K"]]
    launch(
        _conv2d_box_kernel,
        (tiles * triton.cdiv(k, config["BLOCK_N"]),),
        x_desc=TensorDescriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], [*tile, config["BLOCK_K"]]),
        w_desc=_matrix(filters, weight.shape[0], block),
        pad_h=r - 1 - padding[0] if dgrad else padding[0],
        pad_w=s - 1 - padding[1] if dgrad else padding[1],
        **shared,
        **config,
    )
    return y


def wgrad(dz: Tensor, input: Tensor, dw: Tensor, padding: Sequence[int]) -> None:
    """Gradient of the weight into ``dw`` (K, C, R, S), any dense strides."""
    n, c, h, w = input.shape
    k, _, r, s = dw.shape
    p, q = dz.shape[2:]
    config = conv2d_images_wgrad_config(input.device, n, p, q, c, k, r, s)
    split = config.pop("SPLIT")
    n2 = config["BLOCK_N2"]
    z, x = _nhwc(dz), _nhwc(input)
    partial = new_output((split, dw.numel()), torch.float32, dz.device)
    wide = needs_int64(partial)
    if wide:
        config["POSITIONS"] = 1  # beside two positions' accumulators int64 offsets do not fit the registers
    positions = triton.cdiv(r * s, config["POSITIONS"]) * (c // (config["BLOCK_N"] + n2))
    launch(
        _conv2d_images_wgrad_kernel,
        (triton.cdiv(k, config["BLOCK_M"]) * positions, split),
        z_desc=_matrix(z, n, [config["BLOCK_K"], config["BLOCK_M"]]),
        x_desc=_rows(x, config["BLOCK_K"], config["BLOCK_N"]),
        x2_desc=_rows(x, config["BLOCK_K"], n2 or config["BLOCK_N"]),
        partial_ptr=partial,
        N=n,
        H=h,
        W=w,
        P=p,
        Q=q,
        K=k,
        SPLIT=split,
        pad_h=padding[0],
        pad_w=padding[1],
        C=c,
        R=r,
        S=s,
        WIDE=wide,
        INPUT_PRECISION="ieee",
        **config,
    )
    sum_parts(partial, dw)


def space_to_depth(input: Tensor, stride: int, padding: Sequence[int], size: Sequence[int]) -> Tensor:
    """(N, C, H, W), any strides, to dense (N, *size, stride * stride * C): each cell of stride x stride pixels one pixel.

    A convolution of this stride over ``input`` is one of stride 1 over the result, with a filter ``stride`` times smaller.
    """
    n, c, h, w = input.shape
    out = new_output((n, *size, stride * stride * c), input.dtype, input.device)
    row = size[1] * stride * stride * c
    launch(
        _space_to_depth_kernel,
        (n * size[0],),
        x_ptr=input,
        out_ptr=out,
        H=h,
        W=w,
        HS=size[0],
        **strides("stride_x", "nchw", input),
        pad_h=padding[0],
        pad_w=padding[1],
        C=c,
        STRIDE=stride,
        WS=size[1],
        WIDE=needs_int64(input, out),
        BLOCK=triton.next_power_of_2(row),
        num_warps=4,
    )
    return out


def _patches(cells: Tensor, fold: int, columns: int, block: Sequence[int]) -> TensorDescriptor:
    """[HS, Q, N, fold] over dense (N, HS, WS, depth): neighbours along Q overlap."""
    n, rows, width, depth = cells.shape
    image, row = rows * width * depth, width * depth
    return TensorDescriptor(cells, [rows, columns, n, fold], [row, depth, image, 1], [1, 1, *block])


def _cells(
    input: Tensor, stride: int, padding: Sequence[int], output_size: Sequence[int], filter_size: Sequence[int]
) -> Tensor:
    size = [o + triton.cdiv(f, stride) - 1 for o, f in zip(output_size, filter_size, strict=True)]
    return space_to_depth(input, stride, padding, size)


def stem_fprop(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    output_size: Sequence[int],
    relu: bool,
) -> Tensor:
    """:func:`fprop` of a strided first layer."""
    n, c = input.shape[:2]
    k, _, r, s = weight.shape
    p, q = output_size
    fold = conv2d_stem_fold(c, s, stride)
    cells = _cells(input, stride, padding, output_size, (r, s))
    filters = new_output((3, k, fold), weight.dtype, weight.device)
    config = elementwise_config(filters.numel())
    launch(
        _fold_filter_kernel,
        (triton.cdiv(filters.numel(), config["BLOCK"]),),
        w_ptr=weight,
        out_ptr=filters,
        elements=filters.numel(),
        K=k,
        **strides("stride_w", "kcrs", weight),
        C=c,
        R=r,
        S=s,
        STRIDE=stride,
        FOLD=fold,
        WIDE=needs_int64(weight, filters),
        **config,
    )
    y = new_output((n, k, p, q), input.dtype, input.device, channels_last=True)
    config = conv2d_stem_config(input.device, n, p, q, fold, k)
    columns = config.pop("COLUMNS")
    m, n1, n2, k1, k2 = (config[f"BLOCK_{name}"] for name in ("M", "N", "N2", "K", "K2"))

    def filter_blocks(rows: int, positions: int) -> TensorDescriptor:
        return TensorDescriptor(filters, [3, k, fold], [k * fold, fold, 1], [1, rows, positions])

    launch(
        _conv2d_stem_kernel,
        (p * triton.cdiv(n, m) * triton.cdiv(q, columns) * triton.cdiv(k, n1 + n2),),
        x_desc=_patches(cells, fold, q, [m, k1]),
        x2_desc=_patches(cells, fold, q, [m, k2 or k1]),
        w_desc=filter_blocks(n1, k1),
        w2_desc=filter_blocks(n1, k2 or k1),
        v_desc=filter_blocks(n2 or n1, k1),
        v2_desc=filter_blocks(n2 or n1, k2 or k1),
        bias_ptr=filters if bias is None else bias.contiguous(),
        y_ptr=y,
        N=n,
        P=p,
        Q=q,
        K=k,
        columns=columns,
        USEFUL_POSITIONS=c * r * s,
        HAS_BIAS=bias is not None,
        RELU=relu,
        WIDE=needs_int64(y),
        INPUT_PRECISION="ieee",
        **config,
    )
    return y


def stem_wgrad(dz: Tensor, input: Tensor, dw: Tensor, stride: int, padding: Sequence[int]) -> None:
    """:func:`wgrad` of a strided first layer."""
    n, c = input.shape[:2]
    k, _, r, s = dw.shape
    p, q = dz.shape[2:]
    fold = conv2d_stem_fold(c, s, stride)
    config = conv2d_stem_wgrad_config(input.device, n, p, q, fold, k)
    split = config.pop("SPLIT")
    m, n1, n2, images = (config[f"BLOCK_{name}"] for name in ("M", "N", "N2", "K"))
    fold_blocks = triton.cdiv(fold, m)
    cells = _cells(input, stride, padding, (p, q), (r, s))
    z = _nhwc(dz)
    partial = new_output((split, fold_blocks, 3, m, k), torch.float32, dz.device)

    def gradients(columns: int) -> TensorDescriptor:
        return TensorDescriptor(z, [p * q, n, k], [k, p * q * k, 1], [1, images, columns])

    launch(
        _conv2d_stem_wgrad_kernel,
        (fold_blocks * triton.cdiv(k, n1 + n2), split),
        x_desc=_patches(cells, fold, q, [images, m]),
        z_desc=gradients(n1),
        z2_desc=gradients(n2 or n1),
        partial_ptr=partial,
        N=n,
        P=p,
        Q=q,
        K=k,
        SPLIT=split,
        USEFUL_POSITIONS=c * r * s,
        WIDE=needs_int64(partial),
        INPUT_PRECISION="ieee",
        FOLD_BLOCKS=fold_blocks,
        **config,
    )
    block = 64
    launch(
        _unfold_filter_kernel,
        (triton.cdiv(dw.numel(), block),),
        partial_ptr=partial,
        dw_ptr=dw,
        elements=dw.numel(),
        K=k,
        SPLIT=split,
        **strides("stride_w", "kcrs", dw),
        C=c,
        R=r,
        S=s,
        STRIDE=stride,
        FOLD_BLOCKS=fold_blocks,
        BLOCK_M=m,
        WIDE=needs_int64(dw, partial),
        BLOCK_PARTS=16,
        BLOCK=block,
        num_warps=4,
    )
