"""Kernels shared by backward passes: the gradient of an epilogue (dropout, ReLU, bias) and sums over split parts.

Every sum has a fixed order (within a program, then over the parts in order), so repeated runs are bit-identical.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs.tables import MULTIPROCESSORS, apply_overrides, largest_divisor, split_count, tile_size
from .primitives import cast, compensated_add, dropout_factor, program_id, relu_grad
from .runtime.backend import INTERPRETED
from .runtime.launch import cdiv, launch, needs_int64, new_output, nothing, strides

#: At most this many rows are summed by a single program: a second launch would cost more than splitting the rows saves.
_FEW_ROWS = 512


def column_sum_split(rows: int, programs: int, blocks: int) -> int:
    """Number of parts into which ``blocks`` blocks of rows are split; unsplit, ``programs`` programs loop over all of them."""
    if rows <= _FEW_ROWS:
        return apply_overrides({"SPLIT": 1})["SPLIT"]
    return split_count(programs, max(blocks, 1), programs_per_multiprocessor=7)  # as many as fit in an SM's registers


def column_sum_config(rows: int, columns: int) -> dict[str, int]:
    """BLOCK_ROWS, BLOCK_COLUMNS and num_warps of a kernel that loops over rows and sums each column."""
    if INTERPRETED:
        # NumPy sums the rows of a tile one after the other, a GPU pairwise. Few rows keep NumPy's error as small.
        config = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": tile_size(columns, 16, 512), "num_warps": 4}
    elif rows <= _FEW_ROWS:
        # A program sums all rows of its columns. Narrow blocks (64 bytes or more) give many programs.
        config = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 32, "num_warps": 4}
    else:
        # A block that divides the columns evenly, if that has 32 or more; 16 elements per thread.
        exact = largest_divisor(columns, 128)
        block = exact if exact >= 32 else tile_size(columns, 16, 128)
        config = {"BLOCK_ROWS": 2048 // block, "BLOCK_COLUMNS": block, "num_warps": 4}
    return apply_overrides(config)


def sum_parts_config(parts: int, elements: int) -> dict[str, int]:
    """BLOCK, BLOCK_PARTS and num_warps of the sum over ``parts`` parts of ``elements`` elements.

    Few elements in many parts (a bias gradient) make few programs. Each then takes few elements and loads many parts at once,
    to overlap their latencies.
    """
    if INTERPRETED:
        config = {"BLOCK": tile_size(elements, 16, 2**17), "BLOCK_PARTS": tile_size(parts, 1, 4), "num_warps": 4}
        return apply_overrides(config)
    block = 1024
    while block > 16 and cdiv(elements, block) < 2 * MULTIPROCESSORS and parts * block > 1024:
        block //= 2
    block_parts = 1 if block == 1024 else tile_size(parts, 1, 2048 // block)
    return apply_overrides({"BLOCK": block, "BLOCK_PARTS": block_parts, "num_warps": 4})


def sum_columns_config(parts: int) -> dict[str, int]:
    """BLOCK_COLUMNS and BLOCK_COLUMN_PARTS for vectors summed over at most ``parts`` parts beside another kernel's work.

    As in :func:`sum_parts_config`, a program takes few columns and loads many parts at once.
    """
    if INTERPRETED:
        return apply_overrides({"BLOCK_COLUMNS": 512, "BLOCK_COLUMN_PARTS": tile_size(parts, 1, 4)})
    return apply_overrides({"BLOCK_COLUMNS": 16, "BLOCK_COLUMN_PARTS": tile_size(parts, 1, 128)})


def dropout_scale(p: float) -> float:
    """Dropout's factor for kept elements, 1 / (1 - p); 0 for p = 1, which keeps none."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which elements of ``dtype`` are accumulated: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_accumulator(dtype: torch.dtype) -> tl.dtype:
    """:func:`accumulator_dtype` as a Triton dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def through_epilogue(
    b_dz,  # gradient of the epilogue's output, in the accumulator's dtype
    y_ptr,  # the epilogue's output, or unused
    seed_ptr,
    o_flat,  # offset of each element in the output
    mask,
    p,
    scale,
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """The gradient before dropout and ReLU."""
    if DROPOUT:
        b_factor = dropout_factor(tl.load(seed_ptr), o_flat, p, scale)
        b_dz *= b_factor
    if RELU:
        b_y = tl.load(y_ptr + o_flat, mask=mask, other=0.0).to(b_dz.dtype)
        b_masked = relu_grad(b_dz, b_y)
        if DROPOUT:
            # A dropped output is 0 whatever the ReLU returned, so it tells nothing of the ReLU's mask. The gradient there is
            # already 0, or NaN if the incoming gradient was infinite or NaN, which must not be hidden.
            b_masked = tl.where(b_factor == 0, b_dz, b_masked)
        b_dz = b_masked
    return b_dz


@triton.jit
def _epilogue_backward_kernel(
    dy_ptr,  # gradient of the output, [N, C, P, Q] through its strides
    y_ptr,  # the epilogue's output, channels-last, or unused
    seed_ptr,  # int64 scalar, or unused
    dz_ptr,  # out: gradient before the activation, channels-last, or unused
    partial_ptr,  # out: [SPLIT, C] column sums of dz over each split's rows (with one split they are the result), or unused
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
    """dz, the gradient before dropout and ReLU of dy, and the sum of dz over pixels.

    One program owns BLOCK_COLUMNS channels and loops over one part of the rows (pixels).
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
        b_dz = through_epilogue(b_dz, y_ptr, seed_ptr, o_flat, mask, p, scale, RELU, DROPOUT)
        if WRITE_DZ:
            tl.store(dz_ptr + o_flat, cast(b_dz, dz_ptr.dtype.element_ty), mask=mask)
        if SUM_COLUMNS:
            b_sum, b_lost = compensated_add(b_sum, b_lost, b_dz)
    if SUM_COLUMNS:
        # Rows are added across threads only once, after the loop.
        b_total = tl.sum(b_sum, axis=0)
        tl.store(partial_ptr + pid_split * C + o_c, cast(b_total, partial_ptr.dtype.element_ty), mask=m_c)


@triton.jit
def sum_over_parts(
    p_partial,  # [BLOCK] pointers into the first part
    elements,  # distance from one part to the next
    SPLIT,
    m_e,  # [BLOCK]
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The sum of BLOCK elements over SPLIT parts, loading BLOCK_PARTS parts at a time."""
    b_sum = tl.zeros((BLOCK_PARTS, BLOCK), dtype=ACC)
    b_lost = tl.zeros((BLOCK_PARTS, BLOCK), dtype=ACC)
    for first_part in range(0, SPLIT, BLOCK_PARTS):
        o_part = first_part + tl.arange(0, BLOCK_PARTS)
        if WIDE:
            o_part = o_part.to(tl.int64)
        mask = (o_part < SPLIT)[:, None] & m_e[None, :]
        b_part = tl.load(p_partial[None, :] + o_part[:, None] * elements, mask=mask, other=0.0)
        b_sum, b_lost = compensated_add(b_sum, b_lost, b_part)
    return tl.sum(b_sum, axis=0)


@triton.jit
def sum_columns(
    pid,
    partial_ptrs,  # a tuple of [parts, columns] contiguous
    out_ptrs,  # out: as many [columns]
    parts,  # as many ints
    columns,  # as many ints
    first_blocks,  # as many ints: the first program that works on each vector, ascending
    ACC: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_COLUMN_PARTS: tl.constexpr,
):
    """Sums of vectors over their parts. Program ``pid`` owns BLOCK_COLUMNS elements of the vector that its id falls into."""
    for i in tl.static_range(len(partial_ptrs)):
        block = pid - first_blocks[i]
        if (block >= 0) & (block * BLOCK_COLUMNS < columns[i]):
            o_c = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            m_c = o_c < columns[i]
            p_partial = partial_ptrs[i] + o_c
            b_total = sum_over_parts(p_partial, columns[i], parts[i], m_c, False, ACC, BLOCK_COLUMNS, BLOCK_COLUMN_PARTS)
            tl.store(out_ptrs[i] + o_c, cast(b_total, out_ptrs[i].dtype.element_ty), mask=m_c)


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
    vector_partial_ptrs,  # the vectors that are summed beside it, see sum_columns; or None
    vector_out_ptrs,
    vector_parts,
    vector_columns,
    vector_first_blocks,
    HAS_VECTORS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_COLUMN_PARTS: tl.constexpr,
):
    """out = partial summed over the parts. One program owns BLOCK elements; programs beyond the last element sum vectors."""
    pid = program_id(0, WIDE)
    if pid < tl.cdiv(elements, BLOCK):
        o_e = pid * BLOCK + tl.arange(0, BLOCK)
        m_e = o_e < elements
        b_total = sum_over_parts(partial_ptr + o_e, elements, SPLIT, m_e, WIDE, ACC, BLOCK, BLOCK_PARTS)
        o_c = o_e % C
        o_s = (o_e // C) % S
        o_r = (o_e // C // S) % R
        o_k = o_e // C // S // R
        p_out = out_ptr + o_k * stride_k + o_c * stride_c + o_r * stride_r + o_s * stride_s
        tl.store(p_out, cast(b_total, out_ptr.dtype.element_ty), mask=m_e)
    elif HAS_VECTORS:
        sum_columns(
            pid, vector_partial_ptrs, vector_out_ptrs, vector_parts, vector_columns, vector_first_blocks, ACC,
            BLOCK_COLUMNS, BLOCK_COLUMN_PARTS,
        )  # fmt: skip


class ColumnSums(NamedTuple):
    """A pending sum: a vector whose sum over parts a later launch computes.

    Attributes:
        partial: (parts, columns), in the accumulator's dtype, contiguous.
        out: (columns,), uninitialised; the sum is written here.
    """

    partial: Tensor
    out: Tensor


def vector_arguments(vectors: Sequence[ColumnSums], first_block: int) -> tuple[dict[str, Any], int]:
    """A kernel's arguments for ``vectors``, and its total number of programs; ``first_block`` programs do its own work."""
    config = sum_columns_config(max((v.partial.shape[0] for v in vectors), default=1))
    blocks = [cdiv(v.out.numel(), config["BLOCK_COLUMNS"]) for v in vectors]
    values: dict[str, list[Any]] = {
        "partial_ptrs": [v.partial for v in vectors],
        "out_ptrs": [v.out for v in vectors],
        "parts": [v.partial.shape[0] for v in vectors],
        "columns": [v.out.numel() for v in vectors],
        "first_blocks": list(itertools.accumulate(blocks[:-1], initial=first_block)),
    }
    arguments: dict[str, Any] = {f"vector_{name}": tuple(value) if vectors else None for name, value in values.items()}
    return arguments | {"HAS_VECTORS": len(vectors) > 0} | config, first_block + sum(blocks)


def sum_parts(partial: Tensor, out: Tensor, vectors: Sequence[ColumnSums] = ()) -> None:
    """Sum ``partial`` (parts, K*R*S*C) over its parts, in a fixed order, into ``out`` (K, C, R, S) of any dense strides.

    The same launch computes the pending sums ``vectors``, which must have the same dtypes.
    """
    elements = out.numel()
    config = sum_parts_config(partial.shape[0], elements)
    vector_values, programs = vector_arguments(vectors, cdiv(elements, config["BLOCK"]))
    launch(
        _sum_parts_kernel,
        (programs,),
        partial_ptr=partial,
        out_ptr=out,
        elements=elements,
        SPLIT=partial.shape[0],
        C=out.shape[1],
        R=out.shape[2],
        S=out.shape[3],
        **strides("stride_", "kcrs", out),
        **vector_values,
        WIDE=needs_int64(partial, out),
        ACC=triton_accumulator(partial.dtype),
        **config,
    )


def sum_vectors(vectors: Sequence[ColumnSums]) -> None:
    """Compute pending sums in a launch of their own."""
    if vectors:
        first, *others = vectors
        sum_parts(first.partial, first.out.view(-1, 1, 1, 1), others)


def epilogue_backward(
    grad_output: Tensor,
    output: Tensor | None,
    seed: Tensor | None = None,
    p: float = 0.0,
    *,
    write_dz: bool,
    sum_columns: bool,
) -> tuple[Tensor, Tensor, list[ColumnSums]]:
    """Gradient before the epilogue and its sum over all dimensions but the channels (the bias gradient), in one pass.

    Args:
        grad_output: (N, C, P, Q), any strides.
        output: the epilogue's output, after ReLU and dropout, channels-last; None for no activation.
        seed: seed of the dropout after the activation, an int64 scalar; None for no dropout.
        p: the dropout's probability of dropping an element.
        write_dz: whether dz is wanted.
        sum_columns: whether the column sums are wanted.

    Returns:
        dz, channels-last (N, C, P, Q), and the column sums (C,), both in ``grad_output``'s dtype and empty if not wanted; and a
        list of pending sums. Where there are too many rows for one program, the list holds the column sums; they are valid only
        after :func:`sum_vectors` or another launch has computed them.
    """
    if output is not None:  # some saved-tensor hooks return tensors with other strides
        output = output.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    n, c, height, width = grad_output.shape
    rows, dtype, device = n * height * width, grad_output.dtype, grad_output.device
    step_n, step_c, step_p, step_q = grad_output.stride()
    if step_p == width * step_q and step_n == height * step_p:
        # All pixels are equally far apart across rows and images, so a pixel's index needs no division.
        height, width, step_n = 1, 1, step_q
    size = tuple(grad_output.shape) if write_dz else (0, *grad_output.shape[1:])
    dz = new_output(size, dtype, device, channels_last=True)
    column_sums = new_output((c,), dtype, device) if sum_columns else nothing(grad_output)
    config = column_sum_config(rows, c)
    row_blocks = cdiv(rows, config["BLOCK_ROWS"])
    columns = cdiv(c, config["BLOCK_COLUMNS"])
    split = column_sum_split(rows, columns, row_blocks)
    partial = new_output((split, c), accumulator_dtype(dtype), device) if sum_columns and split > 1 else column_sums
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
        blocks_per_split=cdiv(row_blocks, split),
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
    return dz, column_sums, [] if partial is column_sums else [ColumnSums(partial, column_sums)]
