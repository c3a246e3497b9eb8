"""2-D convolution with fused bias and ReLU: forward, input gradient, weight gradient.

All three are implicit matrix products: the kernels gather the patches that im2col would copy, tile by tile through pointers,
and never store them.

    forward          y[m, k]  = sum over j  x_patch[m, j] w[k, j]       m = (n, p, q)  j = (r, s, c)
    input gradient   dx[m, c] = sum over j  dz_patch[m, j] w[j, c]      m = (n, h, w)  j = (r, s, k)
    weight gradient  dw[k, j] = sum over m  dz[m, k] x_patch[m, j]      m = (n, p, q)  j = (r, s, c)

N, C, H, W: input; K, R, S: filters; P, Q: output; CG and KG are C and K of one group. These general kernels take any stride,
padding, dilation, groups and memory layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..configs.tables import split_count
from ..primitives import cast, dot, program_id, relu
from ..runtime.backend import HALF
from ..runtime.launch import cdiv, launch, needs_int64, new_output, strides
from ..sums import ColumnSums, accumulator_dtype, sum_parts, triton_accumulator
from .problem import Problem
from .rules import matmul_config

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _conv2d_fprop_kernel(
    x_ptr,  # [N, G*CG, H, W] through its strides
    w_ptr,  # [G*KG, CG, R, S] through its strides
    bias_ptr,  # [G*KG], or unused
    y_ptr,  # out: [N, P, Q, G*KG] contiguous; without CHANNELS_LAST [N, G*KG, P, Q] contiguous
    M,  # N * P * Q output pixels
    G,
    CG,
    KG,
    H,
    W,
    P,
    Q,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wk,
    stride_wc,
    stride_wr,
    stride_ws,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    R: tl.constexpr,
    S: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes BLOCK_M output pixels x BLOCK_N filters of one group.

    Neighbouring programs read the same pixels for different filters, so that the input tile is still in L2.
    """
    pid = program_id(0, WIDE)
    blocks_n = tl.cdiv(KG, BLOCK_N)
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid_n = pid % blocks_n
    pid_m = (pid // blocks_n) % blocks_m
    group = pid // (blocks_n * blocks_m)

    o_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_h = (o_m // Q) % P * stride_h - pad_h  # [BLOCK_M], input row under the filter's first row
    o_w = o_m % Q * stride_w - pad_w
    o_xn = o_m // Q // P * stride_xn + group * CG * stride_xc
    o_k = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_k = o_k < KG
    o_wk = (group * KG + o_k) * stride_wk

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for i_j in range(0, CG * R * S, BLOCK_K):
        o_j = i_j + tl.arange(0, BLOCK_K)
        m_j = o_j < CG * R * S
        o_c = o_j % CG
        o_s = (o_j // CG) % S
        o_r = o_j // (CG * S)
        h = o_h[:, None] + (o_r * dilation_h)[None, :]  # [BLOCK_M, BLOCK_K]
        w = o_w[:, None] + (o_s * dilation_w)[None, :]
        m_x = m_m[:, None] & m_j[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        if WIDE:
            o_c, o_r, o_s = o_c.to(tl.int64), o_r.to(tl.int64), o_s.to(tl.int64)
        p_x = x_ptr + o_xn[:, None] + (o_c * stride_xc)[None, :] + h * stride_xh + w * stride_xw
        b_x = tl.load(p_x, mask=m_x, other=0.0)
        p_w = w_ptr + o_wk[None, :] + (o_c * stride_wc + o_r * stride_wr + o_s * stride_ws)[:, None]
        b_w = tl.load(p_w, mask=m_j[:, None] & m_k[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(b_x, b_w, acc, INPUT_PRECISION)

    if HAS_BIAS:
        b_bias = tl.load(bias_ptr + group * KG + o_k, mask=m_k, other=0.0)
        acc += b_bias.to(ACC)[None, :]
    if RELU:
        acc = relu(acc)
    if CHANNELS_LAST:
        p_y = y_ptr + o_m[:, None] * (G * KG) + (group * KG + o_k)[None, :]
    else:
        o_row = o_m // Q // P * (G * KG) * P * Q + o_m % (P * Q)
        p_y = y_ptr + o_row[:, None] + ((group * KG + o_k) * P * Q)[None, :]
    tl.store(p_y, cast(acc, y_ptr.dtype.element_ty), mask=m_m[:, None] & m_k[None, :])


@triton.jit
def _conv2d_dgrad_kernel(
    dz_ptr,  # [N, G*KG, P, Q] through its strides
    w_ptr,  # [G*KG, CG, R, S] through its strides
    dx_ptr,  # out: [N, H, W, G*CG] contiguous
    N,
    M,  # pixels of the largest phase
    G,
    CG,
    KG,
    H,
    W,
    P,
    Q,
    stride_zn,
    stride_zk,
    stride_zp,
    stride_zq,
    stride_wk,
    stride_wc,
    stride_wr,
    stride_ws,
    pad_h,
    pad_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_R: tl.constexpr,  # STRIDE_H / gcd(STRIDE_H, DILATION_H): distance of the filter rows that meet one phase
    STEP_S: tl.constexpr,
    INVERSE_R: tl.constexpr,  # of DILATION_H / gcd modulo STEP_R
    INVERSE_S: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes BLOCK_M input pixels of one phase x BLOCK_N channels of one group.

    Output row p meets input row h in filter row r where h + pad = p * stride + r * dilation. So an input row only meets
    the filter rows with r * dilation = h + pad (mod stride): every STEP_R-th. A phase holds the pixels with equal
    (h + pad) mod stride and equal (w + pad) mod stride, which all meet the same filter positions; no product with the
    zeros between strided outputs is ever formed.
    """
    pid = program_id(0, WIDE)
    blocks_n = tl.cdiv(CG, BLOCK_N)
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid_n = pid % blocks_n
    pid_m = (pid // blocks_n) % blocks_m
    group = pid // (blocks_n * blocks_m) % G
    # First row of the phase and the number of its rows: h = h_first, h_first + stride, ... Columns likewise.
    phases_w = tl.minimum(STRIDE_W, W)
    h_first = pid // (blocks_n * blocks_m * G) // phases_w
    w_first = pid // (blocks_n * blocks_m * G) % phases_w
    rows = tl.cdiv(H - h_first, STRIDE_H)
    columns = tl.cdiv(W - w_first, STRIDE_W)
    phase_h = (h_first + pad_h) % STRIDE_H
    phase_w = (w_first + pad_w) % STRIDE_W
    # First filter row that meets the phase, and their number: r = r_first, r_first + STEP_R, ...; 0 if gcd does not divide.
    GCD_R: tl.constexpr = STRIDE_H // STEP_R
    GCD_S: tl.constexpr = STRIDE_W // STEP_S
    r_first = (phase_h // GCD_R) * INVERSE_R % STEP_R
    s_first = (phase_w // GCD_S) * INVERSE_S % STEP_S
    r_count = tl.where((phase_h % GCD_R == 0) & (r_first < R), tl.cdiv(R - r_first, STEP_R), 0)
    s_count = tl.where((phase_w % GCD_S == 0) & (s_first < S), tl.cdiv(S - s_first, STEP_S), 0)

    o_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows * columns * N
    o_w = o_m % columns  # index within the phase
    o_h = o_m // columns % rows
    o_n = o_m // (rows * columns)
    o_zn = o_n * stride_zn + group * KG * stride_zk
    o_c = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c = o_c < CG

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for i_j in range(0, r_count * s_count * KG, BLOCK_K):
        o_j = i_j + tl.arange(0, BLOCK_K)
        m_j = o_j < r_count * s_count * KG
        o_k = o_j % KG
        o_s = s_first + (o_j // KG) % tl.maximum(s_count, 1) * STEP_S
        o_r = r_first + o_j // (KG * tl.maximum(s_count, 1)) * STEP_R
        # The divisions are exact: these filter positions are a multiple of the stride away from the phase's first pixel.
        p = o_h[:, None] + ((h_first + pad_h - o_r * DILATION_H) // STRIDE_H)[None, :]  # [BLOCK_M, BLOCK_K]
        q = o_w[:, None] + ((w_first + pad_w - o_s * DILATION_W) // STRIDE_W)[None, :]
        m_z = m_m[:, None] & m_j[None, :] & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        if WIDE:
            o_k, o_r, o_s = o_k.to(tl.int64), o_r.to(tl.int64), o_s.to(tl.int64)
        p_z = dz_ptr + o_zn[:, None] + (o_k * stride_zk)[None, :] + p * stride_zp + q * stride_zq
        b_z = tl.load(p_z, mask=m_z, other=0.0)
        o_wj = (group * KG + o_k) * stride_wk + o_r * stride_wr + o_s * stride_ws
        p_w = w_ptr + o_wj[:, None] + (o_c * stride_wc)[None, :]
        b_w = tl.load(p_w, mask=m_j[:, None] & m_c[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(b_z, b_w, acc, INPUT_PRECISION)

    o_pixel = (o_n * H + o_h * STRIDE_H + h_first) * W + o_w * STRIDE_W + w_first
    p_dx = dx_ptr + o_pixel[:, None] * (G * CG) + (group * CG + o_c)[None, :]
    tl.store(p_dx, cast(acc, dx_ptr.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


@triton.jit
def _conv2d_wgrad_kernel(
    dz_ptr,  # [N, G*KG, P, Q] through its strides
    x_ptr,  # [N, G*CG, H, W] through its strides
    partial_ptr,  # out: [SPLIT, G*KG, R*S*CG] contiguous, in the accumulator's type
    M,  # N * P * Q output pixels, the reduction
    G,
    CG,
    KG,
    H,
    W,
    P,
    Q,
    stride_zn,
    stride_zk,
    stride_zp,
    stride_zq,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    blocks_per_split,
    R: tl.constexpr,
    S: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program sums BLOCK_M filters x BLOCK_N positions (r, s, c) of one group over one split's share of the pixels."""
    pid = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    blocks_n = tl.cdiv(CG * R * S, BLOCK_N)
    blocks_m = tl.cdiv(KG, BLOCK_M)
    pid_n = pid % blocks_n
    pid_m = (pid // blocks_n) % blocks_m
    group = pid // (blocks_n * blocks_m)

    o_k = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_k = o_k < KG
    o_j = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_j = o_j < CG * R * S
    o_c = group * CG + o_j % CG
    o_hj = o_j // (CG * S) * dilation_h - pad_h
    o_wj = (o_j // CG) % S * dilation_w - pad_w
    o_zk = (group * KG + o_k) * stride_zk

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for i_block in range(pid_split * blocks_per_split, (pid_split + 1) * blocks_per_split):
        o_m = i_block * BLOCK_K + tl.arange(0, BLOCK_K)
        m_m = o_m < M
        o_q = o_m % Q
        o_p = (o_m // Q) % P
        o_n = o_m // Q // P
        o_z = o_n * stride_zn + o_p * stride_zp + o_q * stride_zq
        b_z = tl.load(dz_ptr + o_zk[:, None] + o_z[None, :], mask=m_k[:, None] & m_m[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        h = (o_p * stride_h)[:, None] + o_hj[None, :]  # [BLOCK_K, BLOCK_N]
        w = (o_q * stride_w)[:, None] + o_wj[None, :]
        m_x = m_m[:, None] & m_j[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        p_x = x_ptr + (o_n * stride_xn)[:, None] + (o_c * stride_xc)[None, :] + h * stride_xh + w * stride_xw
        b_x = tl.load(p_x, mask=m_x, other=0.0)
        acc = dot(b_z, b_x, acc, INPUT_PRECISION)

    o_row = pid_split * (G * KG) + group * KG + o_k
    p_out = partial_ptr + o_row[:, None] * (CG * R * S) + o_j[None, :]
    tl.store(p_out, acc, mask=m_k[:, None] & m_j[None, :])


# ------------------------------------------------------------------------------------------------- launch functions


def fprop(input: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, relu: bool, channels_last: bool) -> Tensor:
    """Arguments and result as :func:`.select.fprop`."""
    n, c, h, w, k, r, s, p, q, (stride, padding, dilation, groups), dtype, device, precision = problem
    cg = c // groups
    y = new_output((n, k, p, q), dtype, device, channels_last=channels_last)
    # If channels are not contiguous, each element needs a pointer of its own.
    irregular = problem.is_irregular or input.stride(1) != 1 or (not channels_last and dtype in HALF)
    wide = needs_int64(input, weight, y)
    sizes = n * p * q, k // groups, cg * r * s
    config = matmul_config(*sizes, input.dtype, precision, irregular_gather=irregular, whole=None if wide else True)
    grid = groups * cdiv(n * p * q, config["BLOCK_M"]) * cdiv(k // groups, config["BLOCK_N"])
    launch(
        _conv2d_fprop_kernel,
        (grid,),
        x_ptr=input,
        w_ptr=weight,
        bias_ptr=weight if bias is None else bias.contiguous(),
        y_ptr=y,
        M=n * p * q,
        G=groups,
        CG=cg,
        KG=k // groups,
        H=h,
        W=w,
        P=p,
        Q=q,
        **strides("stride_x", "nchw", input),
        **strides("stride_w", "kcrs", weight),
        stride_h=stride[0],
        stride_w=stride[1],
        pad_h=padding[0],
        pad_w=padding[1],
        dilation_h=dilation[0],
        dilation_w=dilation[1],
        R=r,
        S=s,
        HAS_BIAS=bias is not None,
        RELU=relu,
        CHANNELS_LAST=channels_last,
        WIDE=wide,
        ACC=triton_accumulator(input.dtype),
        INPUT_PRECISION=precision,
        **config,
    )
    return y


def dgrad(dz: Tensor, weight: Tensor, problem: Problem) -> Tensor:
    """Gradient of the input, the first result of :func:`.select.dgrad`."""
    n, c, h, w, k, r, s, p, q, (stride, padding, dilation, groups), dtype, device, precision = problem
    cg = c // groups
    dx = new_output((n, c, h, w), dtype, device, channels_last=True)
    phase_pixels = n * cdiv(h, stride[0]) * cdiv(w, stride[1])
    sizes = phase_pixels, cg, k // groups * r * s
    wide = needs_int64(dz, weight, dx)
    whole = None if wide else True
    irregular = problem.is_irregular or dz.stride(1) != 1
    config = matmul_config(*sizes, dz.dtype, precision, irregular_gather=irregular, whole=whole)
    phases = min(stride[0], h) * min(stride[1], w)
    grid = phases * groups * cdiv(phase_pixels, config["BLOCK_M"]) * cdiv(cg, config["BLOCK_N"])
    step_r, inverse_r = _filter_step(stride[0], dilation[0])
    step_s, inverse_s = _filter_step(stride[1], dilation[1])
    launch(
        _conv2d_dgrad_kernel,
        (grid,),
        dz_ptr=dz,
        w_ptr=weight,
        dx_ptr=dx,
        N=n,
        M=phase_pixels,
        G=groups,
        CG=cg,
        KG=k // groups,
        H=h,
        W=w,
        P=p,
        Q=q,
        **strides("stride_z", "nkpq", dz),
        **strides("stride_w", "kcrs", weight),
        pad_h=padding[0],
        pad_w=padding[1],
        R=r,
        S=s,
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        DILATION_H=dilation[0],
        DILATION_W=dilation[1],
        STEP_R=step_r,
        STEP_S=step_s,
        INVERSE_R=inverse_r,
        INVERSE_S=inverse_s,
        WIDE=wide,
        ACC=triton_accumulator(dz.dtype),
        INPUT_PRECISION=precision,
        **config,
    )
    return dx


def wgrad(dz: Tensor, input: Tensor, dw: Tensor, problem: Problem, vectors: Sequence[ColumnSums]) -> None:
    """Write the weight gradient to ``dw`` (K, C / groups, R, S), any dense strides, and add up the pending sums ``vectors``."""
    n, c, h, w, k, r, s, p, q, (stride, padding, dilation, groups), *_, precision = problem
    cg = c // groups
    pixels = n * p * q
    wide = needs_int64(dz, input, dw)
    sizes = k // groups, cg * r * s, pixels
    whole = None if wide else False
    irregular = problem.is_irregular or dz.stride(1) != 1 or input.stride(1) != 1
    config = matmul_config(*sizes, dz.dtype, precision, irregular_gather=irregular, whole=whole)
    programs = groups * cdiv(k // groups, config["BLOCK_M"]) * cdiv(cg * r * s, config["BLOCK_N"])
    blocks = cdiv(pixels, config["BLOCK_K"])
    split = split_count(programs, max(blocks, 1))
    partial = new_output((split, dw.numel()), accumulator_dtype(dz.dtype), dz.device)
    launch(
        _conv2d_wgrad_kernel,
        (programs, split),
        dz_ptr=dz,
        x_ptr=input,
        partial_ptr=partial,
        M=pixels,
        G=groups,
        CG=cg,
        KG=k // groups,
        H=h,
        W=w,
        P=p,
        Q=q,
        **strides("stride_z", "nkpq", dz),
        **strides("stride_x", "nchw", input),
        stride_h=stride[0],
        stride_w=stride[1],
        pad_h=padding[0],
        pad_w=padding[1],
        dilation_h=dilation[0],
        dilation_w=dilation[1],
        blocks_per_split=cdiv(blocks, split),
        R=r,
        S=s,
        WIDE=wide or needs_int64(partial),
        ACC=triton_accumulator(dz.dtype),
        INPUT_PRECISION=precision,
        **config,
    )
    sum_parts(partial, dw, vectors)


def _filter_step(stride: int, dilation: int) -> tuple[int, int]:
    """Distance of the filter rows that meet one phase of the input, and the modular inverse that gives the first of them."""
    common = math.gcd(stride, dilation)
    step = stride // common
    return step, pow(dilation // common, -1, step) if step > 1 else 0
