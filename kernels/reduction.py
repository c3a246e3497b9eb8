"""What backward passes share: the gradient of an epilogue (dropout, ReLU, bias) and sums over split parts.

Every sum has a fixed order (within a program, then over the parts in order), so two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import column_sum_config, split_count, sum_parts_config
from .device import cast, compensated_add, dropout_factor, program_id, relu_grad
from .launch import launch, needs_int64, new_output, strides


def dropout_scale(p: float) -> float:
    """What dropout multiplies kept elements by, 1 / (1 - p); 0 where p = 1 keeps none."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over elements of ``dtype`` are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_accumulator(dtype: torch.dtype) -> tl.dtype:
    """:func:`accumulator_dtype` as Triton's type."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def _epilogue_backward_kernel(
    dy_ptr,  # gradient of the output, [N, C, P, Q] through its strides
    y_ptr,  # the epilogue's output, channels-last, or unused
    seed_ptr,  # int64 scalar, or unused
    dz_ptr,  # out: gradient before the activation, channels-last, or unused
    partial_ptr,  # out: [SPLIT, C] column sums of dz over each split's rows, or unused
    rows,  # N * P * Q
    C,
    P,
    Q,
    stride_dyn,
    stride_dyc,
    stride_dyp,
    stride_dyq,
    blocks_per_split,
    p,  # probability of dropping an output
    scale,  # 1 / (1 - p)
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dz = dy through dropout and ReLU, and its sum over pixels.

    One program owns BLOCK_COLUMNS channels and walks down one split's share of the rows (pixels).
    """
    pid_column = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    o_c = pid_column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    m_c = o_c < C
    b_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=ACC)
    b_lost = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=ACC)
    for i_block in range(pid_split * blocks_per_split, (pid_split + 1) * blocks_per_split):
        o_row = i_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (o_row < rows)[:, None] & m_c[None, :]
        o_q = o_row % Q
        o_p = (o_row // Q) % P
        o_n = o_row // Q // P
        o_dy = o_n * stride_dyn + o_p * stride_dyp + o_q * stride_dyq
        b_dz = tl.load(dy_ptr + o_dy[:, None] + o_c[None, :] * stride_dyc, mask=mask, other=0.0).to(ACC)
        o_flat = o_row[:, None] * C + o_c[None, :]
        if DROPOUT:
            b_factor = dropout_factor(tl.load(seed_ptr), o_flat, p, scale)
            b_dz *= b_factor
        if RELU:
            b_y = tl.load(y_ptr + o_flat, mask=mask, other=0.0).to(ACC)
            b_masked = relu_grad(b_dz, b_y)
            if DROPOUT:
                # A dropped output is 0 whatever the ReLU gave, so it is no mask. The gradient there is 0 already, or NaN
                # where infinity came in, which must not be hidden.
                b_masked = tl.where(b_factor == 0, b_dz, b_masked)
            b_dz = b_masked
        if WRITE_DZ:
            tl.store(dz_ptr + o_flat, cast(b_dz, dz_ptr.dtype.element_ty), mask=mask)
        if SUM_COLUMNS:
            b_sum, b_lost = compensated_add(b_sum, b_lost, b_dz)
    if SUM_COLUMNS:
        # Rows are only added up across threads once, after the loop.
        tl.store(partial_ptr + pid_split * C + o_c, tl.sum(b_sum, axis=0), mask=m_c)


@triton.jit
def _sum_parts_kernel(
    partial_ptr,  # [SPLIT, elements] contiguous; an element is (k, r, s, c), c fastest
    out_ptr,  # out: [K, C, R, S] through its strides
    elements,
    SPLIT,
    C,
    R,
    S,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """out = partial summed over the parts. One program owns BLOCK elements and reads BLOCK_PARTS parts of each at a time."""
    o_e = program_id(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    b_sum = tl.zeros((BLOCK_PARTS, BLOCK), dtype=ACC)
    b_lost = tl.zeros((BLOCK_PARTS, BLOCK), dtype=ACC)
    for first_part in range(0, SPLIT, BLOCK_PARTS):
        o_part = first_part + tl.arange(0, BLOCK_PARTS)
        if WIDE:
            o_part = o_part.to(tl.int64)
        mask = (o_part < SPLIT)[:, None] & m_e[None, :]
        b_part = tl.load(partial_ptr + o_part[:, None] * elements + o_e[None, :], mask=mask, other=0.0)
        b_sum, b_lost = compensated_add(b_sum, b_lost, b_part)
    b_total = tl.sum(b_sum, axis=0)
    o_c = o_e % C
    o_s = (o_e // C) % S
    o_r = (o_e // C // S) % R
    o_k = o_e // C // S // R
    p_out = out_ptr + o_k * stride_k + o_c * stride_c + o_r * stride_r + o_s * stride_s
    tl.store(p_out, cast(b_total, out_ptr.dtype.element_ty), mask=m_e)


def sum_parts(partial: Tensor, out: Tensor) -> None:
    """``out`` (K, C, R, S), any dense strides, = the sum over the parts of ``partial`` (parts, K*R*S*C), in a fixed order."""
    elements = out.numel()
    config = sum_parts_config(partial.shape[0], elements)
    launch(
        _sum_parts_kernel,
        (triton.cdiv(elements, config["BLOCK"]),),
        partial_ptr=partial,
        out_ptr=out,
        elements=elements,
        SPLIT=partial.shape[0],
        C=out.shape[1],
        R=out.shape[2],
        S=out.shape[3],
        **strides("stride_", "kcrs", out),
        WIDE=needs_int64(partial, out),
        ACC=triton_accumulator(partial.dtype),
        **config,
    )


def new_epilogue_gradients(grad_output: Tensor, write_dz: bool, sum_columns: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised results of :func:`epilogue_backward`."""
    dtype, device = grad_output.dtype, grad_output.device
    size = tuple(grad_output.shape) if write_dz else (0, *grad_output.shape[1:])
    column_sums = new_output((grad_output.shape[1] if sum_columns else 0,), dtype, device)
    return new_output(size, dtype, device, channels_last=True), column_sums


def epilogue_backward(
    grad_output: Tensor,
    output: Tensor | None,
    seed: Tensor | None = None,
    p: float = 0.0,
    *,
    write_dz: bool,
    sum_columns: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient before the epilogue, and its sum over everything but the channels (the bias gradient), in one pass.

    Args:
        grad_output: (N, C, P, Q), any strides.
        output: what the ReLU (and the dropout after it) gave, channels-last; None for no activation.
        seed: of the dropout after the activation, an int64 scalar; None for no dropout.
        p: the dropout's probability of dropping an element.
        write_dz: whether the first result is wanted.
        sum_columns: whether the second is.

    Returns:
        dz, channels-last (N, C, P, Q), and the column sums (C,), both in ``grad_output``'s dtype; what is not wanted comes
        back empty.
    """
    n, c, height, width = grad_output.shape
    rows, dtype, device = n * height * width, grad_output.dtype, grad_output.device
    step_n, step_c, step_p, step_q = grad_output.stride()
    if step_p == width * step_q and step_n == height * step_p:
        # Pixels at equal distances, whatever image or row: nothing to divide a pixel's number by.
        height, width, step_n = 1, 1, step_q
    dz, column_sums = new_epilogue_gradients(grad_output, write_dz, sum_columns)
    config = column_sum_config(rows, c)
    row_blocks = triton.cdiv(rows, config["BLOCK_ROWS"])
    columns = triton.cdiv(c, config["BLOCK_COLUMNS"])
    split = split_count(columns, max(row_blocks, 1), programs_per_multiprocessor=7)  # as many as fit by registers, at once
    partial = new_output((split if sum_columns else 0, c), accumulator_dtype(dtype), device)
    launch(
        _epilogue_backward_kernel,
        (columns, split),
        dy_ptr=grad_output,
        y_ptr=grad_output if output is None else output,
        seed_ptr=grad_output if seed is None else seed,
        dz_ptr=dz,
        partial_ptr=partial,
        rows=rows,
        C=c,
        P=height,
        Q=width,
        stride_dyn=step_n,
        stride_dyc=step_c,
        stride_dyp=step_p,
        stride_dyq=step_q,
        blocks_per_split=triton.cdiv(row_blocks, split),
        p=float(p),
        scale=dropout_scale(p),
        RELU=output is not None,
        DROPOUT=seed is not None,
        WRITE_DZ=write_dz,
        SUM_COLUMNS=sum_columns,
        WIDE=needs_int64(grad_output, output),
        ACC=triton_accumulator(dtype),
        **config,
    )
    if sum_columns:
        sum_parts(partial, column_sums.view(c, 1, 1, 1))
    return dz, column_sums
