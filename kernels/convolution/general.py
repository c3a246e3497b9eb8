"""2-D convolution with fused bias and ReLU: forward, input gradient, weight gradient.

All three are implicit matrix products: the patches that a matrix-product convolution would copy out (im2col) are gathered
through pointers, tile by tile, and never stored.

    forward          y[m, k]  = sum over j  x_patch[m, j] w[k, j]       m = (n, p, q)  j = (r, s, c)
    input gradient   dx[m, c] = sum over j  dz_patch[m, j] w[j, c]      m = (n, h, w)  j = (r, s, k)
    weight gradient  dw[k, j] = sum over m  dz[m, k] x_patch[m, j]      m = (n, p, q)  j = (r, s, c)

N, C, H, W: input; K, R, S: filters; P, Q: output; a C or K per group ends in G. These general kernels take any stride,
padding, dilation, groups and memory layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..configs.tables import split_count
from ..primitives import cast, dot, program_id, relu
from ..runtime.arguments import check_activation, check_tensors, conv_input_precision, pair
from ..runtime.backend import runs_triton
from ..runtime.launch import cdiv, launch, needs_int64, new_output, new_output_like, nothing, strides
from ..runtime.torch_interop import (
    OperatorFunction,
    apply_function,
    autocast_inputs,
    call_operator,
    once_differentiable,
    overridable,
    register_autograd,
)
from ..sums import (
    ColumnSums,
    accumulator_dtype,
    epilogue_backward,
    sum_parts,
    sum_vectors,
    triton_accumulator,
)
from . import descriptor, stem
from .rules import conv2d_wgrad_by_images, matmul_config

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _conv2d_fprop_kernel(
    x_ptr,  # [N, G*CG, H, W] through its strides
    w_ptr,  # [G*KG, CG, R, S] through its strides
    bias_ptr,  # [G*KG], or unused
    y_ptr,  # out: [N, P, Q, G*KG] contiguous
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
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes BLOCK_M output pixels x BLOCK_N filters of one group.

    Neighbouring programs share the pixels and differ in the filters, so that the input tile is still in L2.
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
    p_y = y_ptr + o_m[:, None] * (G * KG) + (group * KG + o_k)[None, :]
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
    # First pixel of the phase and how many it has: h = h_first, h_first + stride, ...
    phases_w = tl.minimum(STRIDE_W, W)
    h_first = pid // (blocks_n * blocks_m * G) // phases_w
    w_first = pid // (blocks_n * blocks_m * G) % phases_w
    rows = tl.cdiv(H - h_first, STRIDE_H)
    columns = tl.cdiv(W - w_first, STRIDE_W)
    phase_h = (h_first + pad_h) % STRIDE_H
    phase_w = (w_first + pad_w) % STRIDE_W
    # First filter row that meets the phase and how many do: r = r_first, r_first + STEP_R, ...; none if gcd does not divide.
    GCD_R: tl.constexpr = STRIDE_H // STEP_R
    GCD_S: tl.constexpr = STRIDE_W // STEP_S
    r_first = (phase_h // GCD_R) * INVERSE_R % STEP_R
    s_first = (phase_w // GCD_S) * INVERSE_S % STEP_S
    r_count = tl.where((phase_h % GCD_R == 0) & (r_first < R), tl.cdiv(R - r_first, STEP_R), 0)
    s_count = tl.where((phase_w % GCD_S == 0) & (s_first < S), tl.cdiv(S - s_first, STEP_S), 0)

    o_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows * columns * N
    o_w = o_m % columns * STRIDE_W + w_first
    o_h = o_m // columns % rows * STRIDE_H + h_first
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
        # Exact divisions where they matter; a negative numerator must not be rounded towards zero, so it is masked first.
        hp = (o_h + pad_h)[:, None] - (o_r * DILATION_H)[None, :]  # [BLOCK_M, BLOCK_K]
        wq = (o_w + pad_w)[:, None] - (o_s * DILATION_W)[None, :]
        p = hp // STRIDE_H
        q = wq // STRIDE_W
        m_z = m_m[:, None] & m_j[None, :] & (hp >= 0) & (p < P) & (wq >= 0) & (q < Q)
        if WIDE:
            o_k, o_r, o_s = o_k.to(tl.int64), o_r.to(tl.int64), o_s.to(tl.int64)
        p_z = dz_ptr + o_zn[:, None] + (o_k * stride_zk)[None, :] + p * stride_zp + q * stride_zq
        b_z = tl.load(p_z, mask=m_z, other=0.0)
        o_wj = (group * KG + o_k) * stride_wk + o_r * stride_wr + o_s * stride_ws
        p_w = w_ptr + o_wj[:, None] + (o_c * stride_wc)[None, :]
        b_w = tl.load(p_w, mask=m_j[:, None] & m_c[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(b_z, b_w, acc, INPUT_PRECISION)

    p_dx = dx_ptr + ((o_n * H + o_h) * W + o_w)[:, None] * (G * CG) + (group * CG + o_c)[None, :]
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
        b_z = tl.load(dz_ptr + o_z[:, None] + o_zk[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        h = (o_p * stride_h)[:, None] + o_hj[None, :]  # [BLOCK_K, BLOCK_N]
        w = (o_q * stride_w)[:, None] + o_wj[None, :]
        m_x = m_m[:, None] & m_j[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        p_x = x_ptr + (o_n * stride_xn)[:, None] + (o_c * stride_xc)[None, :] + h * stride_xh + w * stride_xw
        b_x = tl.load(p_x, mask=m_x, other=0.0)
        acc = dot(tl.trans(b_z), b_x, acc, INPUT_PRECISION)

    o_row = pid_split * (G * KG) + group * KG + o_k
    p_out = partial_ptr + o_row[:, None] * (CG * R * S) + o_j[None, :]
    tl.store(p_out, acc, mask=m_k[:, None] & m_j[None, :])


# ------------------------------------------------------------------------------------------------- launch functions


def fprop(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_size: Sequence[int],
    relu: bool,
    cells: Tensor | None = None,
) -> Tensor:
    """Convolution, bias, ReLU: (N, C, H, W) and (K, C/groups, R, S) to channels-last (N, K, P, Q).

    ``padding`` is what stands above and to the left; below and to the right it is whatever ``output_size`` reaches. ``cells``
    are :func:`kernels.stem.cells_of` the input, if they are there already.
    """
    if descriptor.takes(input, weight, stride, dilation, groups):
        return descriptor.fprop(input, weight, bias, padding, output_size, relu)
    if stem.takes(input, weight, stride, dilation, groups):
        if cells is None:
            cells = stem.cells_of(input, stride[0], padding, output_size, weight.shape[2:])
        return stem.fprop(cells, weight, bias, stride[0], output_size, relu)
    n, _, h, w = input.shape
    k, cg, r, s = weight.shape
    p, q = output_size
    y = new_output((n, k, p, q), input.dtype, input.device, channels_last=True)
    precision = conv_input_precision(input.dtype)
    config = matmul_config(
        n * p * q, k // groups, cg * r * s, input.dtype, precision, irregular_gather=_is_irregular(stride, dilation, groups)
    )
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
        WIDE=needs_int64(input, weight, y),
        ACC=triton_accumulator(input.dtype),
        INPUT_PRECISION=precision,
        **config,
    )
    return y


def dgrad(
    dz: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu_output: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[ColumnSums]]:
    """Gradient of the input, channels-last ``input_size``, from that of the output before the activation.

    With ``relu_output``, the input itself, channels-last: the gradient before the ReLU that gave it, its sum over everything
    but the channels (else empty), and what is still to be summed for that.
    """
    if descriptor.takes(dz, weight, stride, dilation, groups):
        return descriptor.dgrad(dz, weight, input_size, padding, relu_output)
    if stem.takes_dgrad(dz, weight, stride, dilation, groups):
        dx = stem.dgrad(dz, weight, input_size, stride[0], padding)
    else:
        dx = _gather_dgrad(dz, weight, input_size, stride, padding, dilation, groups)
    if relu_output is None:
        return dx, nothing(dx), []
    return epilogue_backward(dx, relu_output, write_dz=True, sum_columns=True)


def _gather_dgrad(
    dz: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of the input by the kernel that takes any convolution."""
    n, c, h, w = input_size
    k, cg, r, s = weight.shape
    _, _, p, q = dz.shape
    dx = new_output((n, c, h, w), dz.dtype, dz.device, channels_last=True)
    precision = conv_input_precision(dz.dtype)
    phase_pixels = n * cdiv(h, stride[0]) * cdiv(w, stride[1])
    config = matmul_config(
        phase_pixels, cg, k // groups * r * s, dz.dtype, precision, irregular_gather=_is_irregular(stride, dilation, groups)
    )
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
        WIDE=needs_int64(dz, weight, dx),
        ACC=triton_accumulator(dz.dtype),
        INPUT_PRECISION=precision,
        **config,
    )
    return dx


def wgrad(
    dz: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    vectors: Sequence[ColumnSums] = (),
) -> Tensor:
    """Gradient of the weight, in the weight's own shape and strides (its values are not read).

    Its last launch, which adds up parts, takes the sums of ``vectors`` along.
    """
    n, _, h, w = input.shape
    k, cg, r, s = weight.shape
    _, _, p, q = dz.shape
    dw = new_output_like(weight)
    if descriptor.takes(input, weight, stride, dilation, groups) and conv2d_wgrad_by_images(n):
        descriptor.wgrad(dz, input, dw, padding, vectors)
        return dw
    if stem.takes(input, weight, stride, dilation, groups) and conv2d_wgrad_by_images(n):
        cells = stem.cells_of(input, stride[0], padding, (p, q), (r, s))
        stem.wgrad(dz, cells, dw, stride[0], vectors)
        return dw
    precision = conv_input_precision(dz.dtype)
    pixels = n * p * q
    config = matmul_config(
        k // groups, cg * r * s, pixels, dz.dtype, precision, irregular_gather=_is_irregular(stride, dilation, groups)
    )
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
        WIDE=needs_int64(dz, input, partial),
        ACC=triton_accumulator(dz.dtype),
        INPUT_PRECISION=precision,
        **config,
    )
    sum_parts(partial, dw, vectors)
    return dw


@torch.library.custom_op("alexnet_triton::conv2d_fprop", mutates_args=())
def conv2d_fprop(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    link: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_size: list[int],
    relu: bool,
    make_link: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`fprop`, and the link of its ReLU if wanted (see :class:`Conv2dFunction`); ``link`` is that of the ReLU before."""
    return fprop(input, weight, bias, stride, padding, dilation, groups, output_size, relu), _new_link(weight, make_link)


@conv2d_fprop.register_fake
def _(input, weight, bias, link, stride, padding, dilation, groups, output_size, relu, make_link):
    size = (input.shape[0], weight.shape[0], *output_size)
    return new_output(size, input.dtype, input.device, channels_last=True), _new_link(weight, make_link)


def _new_link(weight: Tensor, make_link: bool) -> Tensor:
    return new_output((weight.shape[0] if make_link else 0,), weight.dtype, weight.device)


@torch.library.custom_op("alexnet_triton::conv2d_backward", mutates_args=())
def conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wanted: list[bool],
    linked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias (``wanted``), and of the input's link where it is ``linked``; empty what is not.

    ``output`` is the convolution's own where a ReLU gave it, and the gradient does not come through its link.
    """
    needs_input, needs_weight, needs_bias = wanted
    masked = output is not None and (needs_input or needs_weight)
    dz, d_bias = grad_output, nothing(grad_output)
    unsummed: list[ColumnSums] = []
    if masked or needs_bias:
        written, d_bias, unsummed = epilogue_backward(grad_output, output, write_dz=masked, sum_columns=needs_bias)
        dz = written if masked else dz
    geometry = (stride, padding, dilation, groups)
    dx, dw, d_link = gradients(dz, input, weight, input.shape, geometry, needs_input, needs_weight, linked, unsummed)
    return dx, dw, d_bias, d_link


@conv2d_backward.register_fake
def _(grad_output, input, weight, output, stride, padding, dilation, groups, wanted, linked):
    return new_gradients(grad_output, input.shape, weight, wanted, linked)


def new_gradients(
    grad_output: Tensor, input_size: Sequence[int], weight: Tensor, wanted: Sequence[bool], linked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised results of a convolution's backward operator."""
    dtype, device = grad_output.dtype, grad_output.device
    needs_input, needs_weight, needs_bias = wanted
    dx = new_output(input_size, dtype, device, channels_last=True) if needs_input else nothing(grad_output)
    dw = new_output_like(weight) if needs_weight else nothing(grad_output)
    d_bias = new_output((weight.shape[0] if needs_bias else 0,), dtype, device)
    return dx, dw, d_bias, new_output((input_size[1] if needs_input and linked else 0,), dtype, device)


def gradients(
    dz: Tensor,
    input: Tensor | None,
    weight: Tensor,
    input_size: Sequence[int],
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    needs_input: bool,
    needs_weight: bool,
    linked: bool,
    unsummed: Sequence[ColumnSums],
    cells: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and the input's link from that before the activation; only what is needed is launched.

    Args:
        input: None where its ``cells`` are all that is wanted of it.
        geometry: stride, padding, dilation, groups.
        linked: whether the input comes with a link.
        unsummed: what is to be summed before all is done.
        cells: :func:`kernels.stem.cells_of` the input.
    """
    dx, dw, d_link = (nothing(dz) for _ in range(3))
    if needs_input:
        dx, d_link, of_link = dgrad(dz, weight, input_size, *geometry, input if linked else None)
        unsummed = [*unsummed, *of_link]
    if not needs_weight:
        sum_vectors(unsummed)
    elif cells is not None:
        dw = new_output_like(weight)
        stem.wgrad(dz, cells, dw, geometry[0][0], unsummed)
    else:
        assert input is not None
        dw = wgrad(dz, input, weight, *geometry, unsummed)
    return dx, dw, d_link


def _is_irregular(stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    return groups > 1 or max(*stride, *dilation) > 1


def _filter_step(stride: int, dilation: int) -> tuple[int, int]:
    """Distance of the filter rows that meet one phase of the input, and the inverse that finds the first of them."""
    common = math.gcd(stride, dilation)
    step = stride // common
    return step, pow(dilation // common, -1, step) if step > 1 else 0


# ------------------------------------------------------------------------------------------------- autograd Function


class Conv2dFunction(OperatorFunction):
    """Convolution (+bias, +ReLU). Saves its input, its weight and, for a ReLU, its output, whose sign is the mask.

    Its second output, the link, holds nothing. A convolution that takes it beside the first promises to be the only one to read
    that, and does two things on the way that would each be a pass over memory here: the input's gradient that it returns is the
    one before this ReLU, and the link's gradient is the sum of that, the gradient of this bias.
    """

    @staticmethod
    def forward(input, weight, bias, link, stride, padding, dilation, groups, output_size, relu, make_link):
        return call_operator(
            conv2d_fprop, *(input, weight, bias, link, stride, padding, dilation, groups, output_size, relu, make_link)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        input, weight, _, link, *geometry, _, relu, make_link = inputs
        y, new_link = output
        ctx.save_for_backward(input, weight, y if relu else None)
        ctx.set_materialize_grads(False)  # no gradient of the link: nobody took it
        if not make_link:
            ctx.mark_non_differentiable(new_link)
        ctx.geometry = geometry
        ctx.linked = link is not None
        ctx.make_link = make_link

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, Tensor, Tensor | None], grad_output: Tensor, grad_link: Tensor | None):
        input, weight, output = saved
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Asked first what was said in the forward pass: in compiled code the gradient of what nothing took is not None.
        handed_over = ctx.make_link and grad_link is not None
        wanted = [needs_input, needs_weight, needs_bias and not handed_over]
        masks = None if handed_over else output
        dx, dw, d_bias, d_link = call_operator(
            conv2d_backward, grad_output, input, weight, masks, *ctx.geometry, wanted, ctx.linked
        )
        return (
            dx if needs_input else None,
            dw if needs_weight else None,
            (grad_link if handed_over else d_bias) if needs_bias else None,
            d_link if needs_input and ctx.linked else None,
            *[None] * 7,
        )


register_autograd(Conv2dFunction, conv2d_fprop)

# --------------------------------------------------------------------------------------------------- public function


def conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """What :func:`conv2d` means, in PyTorch's own operations."""
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return F.relu(output) if activation == "relu" else output


def conv2d_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[list[int], list[int], list[int], int, list[int]]:
    """Check the arguments of a convolution; its stride, padding (top, left), dilation, groups, output size as plain ints."""
    check_tensors(input=input, weight=weight, bias=bias)
    if input.dim() != 4:
        raise ValueError(f"input must be (N, C, H, W) or (C, H, W), got shape {tuple(input.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must be (K, C / groups, R, S), got shape {tuple(weight.shape)}")
    if isinstance(groups, bool) or not hasattr(groups, "__index__"):
        raise TypeError(f"groups must be a positive int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"groups must be a positive int, got {groups!r}")
    n, _, height, width = input.shape
    k, cg, r, s = weight.shape
    if input.shape[1] != cg * groups:
        raise ValueError(
            f"input has {input.shape[1]} channels, but weight of shape {tuple(weight.shape)} with groups={groups} wants "
            f"{cg} x {groups} = {cg * groups}"
        )
    if k == 0 or k % groups != 0:
        raise ValueError(f"weight must have a positive number of filters divisible by groups={groups}, got {k}")
    if bias is not None and bias.shape != (k,):
        raise ValueError(f"bias must have shape ({k},), one for each filter of weight, got {tuple(bias.shape)}")
    if min(height, width) < 1 and n > 0:
        raise ValueError(f"only the batch of input may be empty, got shape {tuple(input.shape)}")
    if min(cg, r, s) < 1:
        raise ValueError(f"weight must have no dimension of size 0, got shape {tuple(weight.shape)}")
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    totals, before = _padding(padding, strides, dilations, (r, s))
    sizes = []
    for name, size, total, dil, filter_size, step in zip(
        ("height", "width"), input.shape[2:], totals, dilations, (r, s), strides, strict=True
    ):
        span = dil * (filter_size - 1) + 1
        if size + total < span:
            raise ValueError(
                f"input's {name} {size} with {total} of padding is smaller than the filter's span of {span} "
                f"(weight {tuple(weight.shape)}, dilation {dilations}): the output would be empty"
            )
        sizes.append((size + total - span) // step + 1)
    return list(strides), list(before), list(dilations), int(groups), sizes


def _padding(
    padding: int | Sequence[int] | str, stride: tuple[int, int], dilation: tuple[int, int], filter_size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Total padding of each axis, and the part of it before the first element."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f'padding="same" needs stride 1, got stride {stride}')
        total = (dilation[0] * (filter_size[0] - 1), dilation[1] * (filter_size[1] - 1))
        return total, (total[0] // 2, total[1] // 2)
    if isinstance(padding, str):
        raise ValueError(f'padding must be an int, two ints, "same" or "valid", got {padding!r}')
    before = pair("padding", padding, 0)
    return (2 * before[0], 2 * before[1]), before


@overridable
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    link: Tensor | None = None,
) -> Tensor:
    """2-D convolution, bias and activation in one kernel; the meaning of :func:`torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float16 or bfloat16 (float64 on the CPU), any strides.
        weight: (K, C / groups, R, S), dtype and device of ``input``.
        bias: (K,) or None.
        stride: int or (vertical, horizontal), in pixels.
        padding: zeros on each side, int or (vertical, horizontal), or ``"same"`` or ``"valid"``.
        dilation: distance of filter elements, int or (vertical, horizontal), in pixels.
        groups: number of groups that input and output channels are cut into.
        activation: None or ``"relu"``.
        link: of ``input``, where :func:`linked_conv2d` gave both and nothing else reads ``input``.

    Returns:
        (N, K, P, Q) or (K, P, Q) with P = (H + 2 padding - dilation (R - 1) - 1) // stride + 1, in ``input``'s dtype,
        channels-last in memory. Products are summed in float32 (float64 for float64). float32 products follow
        ``torch.backends.cudnn.conv.fp32_precision`` (TF32 by PyTorch's default). Under autocast, inputs are cast as
        ``F.conv2d`` casts them.

    Raises:
        TypeError: a dtype that the kernels do not run, or dtypes that differ.
        ValueError: ranks, channels, devices, sizes or options that do not fit.
    """
    return _conv2d(input, weight, bias, stride, padding, dilation, groups, activation, link, make_link=False)[0]


@overridable
def linked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    link: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``conv2d(..., activation="relu")`` right before another convolution, which then takes the ReLU's gradient on its way.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as :func:`conv2d`.
        link: what this function returned beside ``input``, if it did.

    Returns:
        The output, and its link: (K,) without a meaning of its own, or None where no Triton kernel ran, and in compiled code,
        which does not know whether anything takes it. Both are to be handed
        to one more convolution (this function, :func:`conv2d` or :func:`kernels.conv2d_relu_max_pool2d`), and nothing else may
        read the output: its gradient, if anybody should look at it, is the one before the ReLU.

    Raises:
        TypeError, ValueError: as :func:`conv2d`; ValueError for a link of another number of channels than ``input``'s.
    """
    # Of compiled code the gradient of a link that nothing took would be zeros, not None, and so say that it was taken.
    make_link = not torch.compiler.is_compiling()
    return _conv2d(input, weight, bias, stride, padding, dilation, groups, "relu", link, make_link=make_link)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    activation: str | None,
    link: Tensor | None,
    *,
    make_link: bool,
) -> tuple[Tensor, Tensor | None]:
    fuse_relu = check_activation(activation)
    input, weight, bias = autocast_inputs(input, weight, bias)
    batched = input.unsqueeze(0) if isinstance(input, Tensor) and input.dim() == 3 else input
    *geometry, size = conv2d_arguments(batched, weight, bias, stride, padding, dilation, groups)
    check_link(link, batched)
    if not runs_triton(input):
        return conv2d_reference(input, weight, bias, stride, padding, dilation, groups, activation=activation), None
    output, new_link = apply_function(Conv2dFunction, batched, weight, bias, link, *geometry, size, fuse_relu, make_link)
    return output.squeeze(0) if input.dim() == 3 else output, new_link if make_link else None


def check_link(link: Tensor | None, input: Tensor) -> None:
    """Refuse a link that belongs to another tensor than ``input`` (N, C, H, W)."""
    if link is not None and link.shape != input.shape[1:2]:
        raise ValueError(f"link must be the one that was returned beside input, ({input.shape[1]},), got {tuple(link.shape)}")
