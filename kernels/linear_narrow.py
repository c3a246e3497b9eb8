"""A linear layer with few outputs, such as a classifier, in one launch forward and one backward.

Its matrix products are too small to be worth splitting. In the forward pass a program computes all outputs of one or two rows
over all of K, by FMAs and sums of its threads. With 10 outputs of 4096 features it reads 88 kB from the L2 cache, and 128 rows
make 128 programs. Tiles of 16 rows would make 8 programs that read 208 kB each. In the backward pass a program owns a block of
features and loops over the rows for its columns of both gradients. The first program also sums the small bias gradient.

For many rows or a large weight the programs would be too few or too long. :func:`kernels.linear_rules.linear_narrow_config`
decides where the matrix products of :mod:`kernels.matmul` are used instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .linear_rules import linear_narrow_config
from .matmul_finish import Epilogue, bias_relu
from .primitives import INTERPRETED, cast, compensated_add, dot, dropout_factor, program_id
from .runtime.arguments import matmul_input_precision
from .runtime.backend import dot_precision
from .runtime.launch import cdiv, launch, needs_int64, new_output, new_output_like, next_power_of_2, nothing
from .sums import dropout_scale, through_epilogue, triton_accumulator

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _linear_narrow_fprop_kernel(
    x_ptr,  # [M, K] through its strides
    w_ptr,  # [N, K] through its strides
    bias_ptr,  # [N], or unused
    seed_ptr,  # int64 scalar, or unused
    y_ptr,  # out: [M, N] contiguous
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    p,  # probability of dropping an output
    scale,  # 1 / (1 - p)
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = dropout(relu(x @ w^T + bias)). One program computes ROWS rows, all N <= BLOCK_N outputs of each."""
    o_m = program_id(0, WIDE) * ROWS + tl.arange(0, ROWS)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    if WIDE:
        o_n = o_n.to(tl.int64)
        o_k = o_k.to(tl.int64)
    m_m = o_m < M
    m_n = o_n < N
    # Each k of a block has its own sum; they are added once, after the loop.
    b_sums = tl.zeros((ROWS, BLOCK_N, BLOCK_K), dtype=ACC)
    for _ in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
        m_k = o_k < K
        p_x = x_ptr + o_m[:, None, None] * stride_xm + o_k[None, None, :] * stride_xk
        p_w = w_ptr + o_n[None, :, None] * stride_wn + o_k[None, None, :] * stride_wk
        b_x = tl.load(p_x, mask=m_m[:, None, None] & m_k[None, None, :], other=0.0)
        b_w = tl.load(p_w, mask=m_n[None, :, None] & m_k[None, None, :], other=0.0)
        b_sums += b_x.to(ACC) * b_w.to(ACC)
        o_k += BLOCK_K
    acc = bias_relu(tl.sum(b_sums, axis=2), bias_ptr, o_n[None, :], m_n[None, :], HAS_BIAS, RELU)
    o_y = o_m[:, None] * N + o_n[None, :]
    if DROPOUT:
        # Rounded to the output's dtype first, as a separate layer before the dropout would store it.
        acc = cast(acc, y_ptr.dtype.element_ty).to(ACC)
        acc *= dropout_factor(tl.load(seed_ptr), o_y, p, scale)
    tl.store(y_ptr + o_y, cast(acc, y_ptr.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _linear_narrow_backward_kernel(
    dy_ptr,  # gradient of the output, [M, N] through its strides
    y_ptr,  # the epilogue's output, [M, N] contiguous, or unused
    seed_ptr,  # int64 scalar, or unused
    x_ptr,  # [M, K] through its strides
    w_ptr,  # [N, K] through its strides
    dx_ptr,  # out: [M, K] contiguous, or unused
    dw_ptr,  # out: [N, K] through its strides, or unused
    db_ptr,  # out: [N], or unused
    M,
    N,
    K,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_dwn,
    stride_dwk,
    p,  # probability of dropping an output
    scale,  # 1 / (1 - p)
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx = dz @ w, dw = dz^T @ x and db, the sum of dz's rows, where dz is the gradient before ReLU and dropout.

    One program owns BLOCK_K columns of dx and dw and loops over the rows; the first program also writes db.
    """
    pid = program_id(0, WIDE)
    o_k = pid * BLOCK_K + tl.arange(0, BLOCK_K)
    o_n = tl.arange(0, BLOCK_N)
    o_m = tl.arange(0, BLOCK_M)
    if WIDE:
        o_n = o_n.to(tl.int64)
        o_m = o_m.to(tl.int64)
    m_k = o_k < K
    m_n = o_n < N
    m_nk = m_n[:, None] & m_k[None, :]
    if INPUT:
        b_w = tl.load(w_ptr + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk, mask=m_nk, other=0.0)
    b_dw = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    b_lost = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for _ in range(tl.cdiv(M, BLOCK_M)):
        m_m = o_m < M
        mask = m_m[:, None] & m_n[None, :]
        b_dz = tl.load(dy_ptr + o_m[:, None] * stride_dym + o_n[None, :] * stride_dyn, mask=mask, other=0.0).to(ACC)
        b_dz = through_epilogue(b_dz, y_ptr, seed_ptr, o_m[:, None] * N + o_n[None, :], mask, p, scale, RELU, DROPOUT)
        if BIAS:
            b_sum, b_lost = compensated_add(b_sum, b_lost, b_dz)
        # Rounded as a separate epilogue kernel would store dz.
        b_dz = cast(b_dz, x_ptr.dtype.element_ty)
        m_mk = m_m[:, None] & m_k[None, :]
        if WEIGHT:
            b_x = tl.load(x_ptr + o_m[:, None] * stride_xm + o_k[None, :] * stride_xk, mask=m_mk, other=0.0)
            b_dw = dot(tl.trans(b_dz), b_x, b_dw, INPUT_PRECISION)
        if INPUT:
            # Transposed: a product of less than 64 rows, which leaves no asynchronous reads of its operands behind.
            b_dx = dot(tl.trans(b_w), tl.trans(b_dz), tl.zeros((BLOCK_K, BLOCK_M), dtype=ACC), INPUT_PRECISION)
            p_dx = dx_ptr + o_m[:, None] * K + o_k[None, :]
            tl.store(p_dx, cast(tl.trans(b_dx), dx_ptr.dtype.element_ty), mask=m_mk)
        o_m += BLOCK_M
    if WEIGHT:
        p_dw = dw_ptr + o_n[:, None] * stride_dwn + o_k[None, :] * stride_dwk
        tl.store(p_dw, cast(b_dw, dw_ptr.dtype.element_ty), mask=m_nk)
    if BIAS:
        if pid == 0:
            if INTERPRETED:  # NumPy adds row after row, with a larger rounding error than a GPU's pairwise reduction
                b_sum = b_sum.to(tl.float64)
            tl.store(db_ptr + o_n, cast(tl.sum(b_sum, axis=0).to(ACC), db_ptr.dtype.element_ty), mask=m_n)


# ------------------------------------------------------------------------------------------------- launch functions


def narrow_fprop(input: Tensor, weight: Tensor, output: Tensor, epilogue: Epilogue) -> bool:
    """Write the linear layer of ``input`` (M, K) and ``weight`` (N, K), any strides, to ``output`` (M, N), contiguous.

    Returns:
        Whether this kernel ran; if not, ``output`` was not written.
    """
    (m, k), n = input.shape, weight.shape[0]
    config = linear_narrow_config(input.device, "narrow_fprop", m, n, k, input.dtype, matmul_input_precision(input.dtype))
    if not config.pop("NARROW"):
        return False
    launch(
        _linear_narrow_fprop_kernel,
        (cdiv(m, config["ROWS"]),),
        x_ptr=input,
        w_ptr=weight,
        seed_ptr=output if epilogue.seed is None else epilogue.seed,
        y_ptr=output,
        M=m,
        N=n,
        K=k,
        stride_xm=input.stride(0),
        stride_xk=input.stride(1),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        p=float(epilogue.p),
        scale=dropout_scale(epilogue.p),
        DROPOUT=epilogue.seed is not None,
        WIDE=needs_int64(input, weight, output),
        ACC=triton_accumulator(input.dtype),
        STAGES=config["num_stages"],
        BLOCK_N=next_power_of_2(n),
        **epilogue.bias_relu(True, output),
        **config,
    )
    return True


def narrow_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    seed: Tensor | None,
    p: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of input (M, K), weight (N, K), in the weight's strides, and bias (N,); unwanted gradients are empty.

    Args:
        grad_output: (M, N), any strides.
        output: the layer's output, after ReLU and dropout; None for no activation.
        seed: seed of the dropout after the activation; None for no dropout.
        p: the dropout's probability of dropping an element.
        wanted: whether the gradients of input, weight and bias are wanted; at least one of the first two is.

    Returns:
        The gradients, or None where this kernel does not run.
    """
    (m, k), n = input.shape, weight.shape[0]
    precision = matmul_input_precision(input.dtype)
    wide = needs_int64(grad_output, output, input, weight)  # the gradients are as large
    config = linear_narrow_config(input.device, "narrow_backward", m, n, k, input.dtype, precision, wide=wide)
    if not config.pop("NARROW"):
        return None
    needs_input, needs_weight, needs_bias = wanted
    output = None if output is None else output.contiguous()  # some saved-tensor hooks return tensors with other strides
    dx = new_output((m, k), input.dtype, input.device) if needs_input else nothing(grad_output)
    dw = new_output_like(weight) if needs_weight else nothing(grad_output)
    db = new_output((n,), input.dtype, input.device) if needs_bias else nothing(grad_output)
    launch(
        _linear_narrow_backward_kernel,
        (max(1, cdiv(k, config["BLOCK_K"])),),  # the bias has a gradient even if there are no features
        dy_ptr=grad_output,
        y_ptr=grad_output if output is None else output,
        seed_ptr=grad_output if seed is None else seed,
        x_ptr=input,
        w_ptr=weight,
        dx_ptr=dx,
        dw_ptr=dw,
        db_ptr=db,
        M=m,
        N=n,
        K=k,
        stride_dym=grad_output.stride(0),
        stride_dyn=grad_output.stride(1),
        stride_xm=input.stride(0),
        stride_xk=input.stride(1),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_dwn=dw.stride(0) if needs_weight else 0,
        stride_dwk=dw.stride(1) if needs_weight else 0,
        p=float(p),
        scale=dropout_scale(p),
        RELU=output is not None,
        DROPOUT=seed is not None,
        INPUT=needs_input,
        WEIGHT=needs_weight,
        BIAS=needs_bias,
        WIDE=wide,
        ACC=triton_accumulator(input.dtype),
        INPUT_PRECISION=dot_precision(input.device, precision),
        BLOCK_N=max(16, next_power_of_2(n)),  # tl.dot sums over at least 16
        **config,
    )
    return dx, dw, db
