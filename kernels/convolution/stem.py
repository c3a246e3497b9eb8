"""A strided first layer of few channels, such as AlexNet's 11 x 11 with stride 4, through tensor descriptors.

A reduction over one channel would have to be padded to 16, for sixteen times the work. So cells of stride x stride pixels
become pixels of stride * stride * C channels (space-to-depth), and the convolution becomes one of stride 1 with a filter of
three cells a side. The adjacent cells under a row of this filter are contiguous. The kernels reduce over the row's positions,
48 for one channel, 144 for three. Their operand is overlapping rows of cells, which are not copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..configs.tables import elementwise_config
from ..primitives import cast, dot, program_id
from ..runtime.launch import cdiv, launch, needs_int64, new_output, strides
from ..sums import ColumnSums, sum_columns, sum_over_parts, vector_arguments
from . import descriptor
from .cells import cells_size, depth_to_space
from .descriptor import aligned, dense_nhwc, pixel_offset, store_pixels
from .problem import Geometry, Problem
from .stem_rules import conv2d_stem_config, conv2d_stem_wgrad_config


@triton.jit
def _fold_filter_kernel(
    w_ptr,  # [K, C, R, S] through its strides
    out_ptr,  # out: [rows, K, FOLD] contiguous
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
    SHIFT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes BLOCK elements of the filters in the order of :func:`.cells._space_to_depth_kernel`'s output.

    Positions outside R x S are zeros, and so are the first SHIFT positions of a row.
    """
    o_e = program_id(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    o_f = tl.maximum(o_e % FOLD - SHIFT, 0)
    o_k = o_e // FOLD % K
    o_c = o_f % C
    o_s = o_f // (STRIDE * STRIDE * C) * STRIDE + o_f // C % STRIDE
    o_r = o_e // FOLD // K * STRIDE + o_f // C // STRIDE % STRIDE
    m_w = m_e & (o_r < R) & (o_s < S) & (o_e % FOLD >= SHIFT)
    p_w = w_ptr + o_k * stride_wk + o_c * stride_wc + o_r * stride_wr + o_s * stride_ws
    tl.store(out_ptr + o_e, tl.load(p_w, mask=m_w, other=0.0), mask=m_e)


@triton.jit
def _conv2d_stem_kernel(
    x_desc,  # overlapping patches [HS, Q, N, FOLD], blocks [1, 1, BLOCK_M, BLOCK_K]
    x2_desc,  # the same with BLOCK_K2 for BLOCK_K
    w_desc,  # filters [3, K, FOLD], blocks [1, BLOCK_N, BLOCK_K]
    w2_desc,  # [1, BLOCK_N, BLOCK_K2]
    v_desc,  # [1, BLOCK_N2, BLOCK_K]
    v2_desc,  # [1, BLOCK_N2, BLOCK_K2]
    bias_ptr,  # [K], or unused
    y_ptr,  # out: [N, P, Q, K] contiguous; without CHANNELS_LAST [N, K, P, Q] contiguous
    N,
    P,
    Q,
    K,
    columns,
    USEFUL_POSITIONS: tl.constexpr,  # C * R * S before folding: used to count FLOPs
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_K2: tl.constexpr,
):
    """One program computes BLOCK_M images x some columns of one output row x BLOCK_N + BLOCK_N2 filters.

    The whole filter, three rows of FOLD positions, stays in shared memory while the program iterates over the columns.
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
        o_row = pixel_offset(o_n, p, q, K, P, Q, CHANNELS_LAST)
        store_pixels(y_ptr, bias_ptr, acc, o_row, m_n, o_k, K, P * Q, HAS_BIAS, RELU, CHANNELS_LAST)
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
            store_pixels(y_ptr, bias_ptr, acc2, o_row, m_n, o_k2, K, P * Q, HAS_BIAS, RELU, CHANNELS_LAST)


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
    USEFUL_POSITIONS: tl.constexpr,  # C * R * S before folding: used to count FLOPs
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    FOLD_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program sums three filter rows of BLOCK_M folded positions x BLOCK_N + BLOCK_N2 filters over its split's pixels.

    A step of the sum is one pixel of BLOCK_K images.
    """
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
    vector_partial_ptrs,  # pending sums that the same launch adds up, see sum_columns; or None
    vector_out_ptrs,
    vector_parts,
    vector_columns,
    vector_first_blocks,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    FOLD_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_VECTORS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_COLUMN_PARTS: tl.constexpr,
):
    """One program adds up the parts of BLOCK elements of the weight gradient, and undoes the folding of their positions.

    The programs after the last element add up the pending sums.
    """
    pid = program_id(0, WIDE)
    if pid < tl.cdiv(elements, BLOCK):
        o_e = pid * BLOCK + tl.arange(0, BLOCK)  # (r, s, c, k), k fastest, as the parts are read
        m_e = o_e < elements
        o_k = o_e % K
        o_c = o_e // K % C
        o_s = o_e // K // C % S
        o_r = o_e // K // C // S
        o_f = (o_s // STRIDE * STRIDE * STRIDE + o_r % STRIDE * STRIDE + o_s % STRIDE) * C + o_c
        p_in = partial_ptr + ((o_f // BLOCK_M * 3 + o_r // STRIDE) * BLOCK_M + o_f % BLOCK_M) * K + o_k
        part = FOLD_BLOCKS * 3 * BLOCK_M * K  # elements from one part to the next
        b_total = sum_over_parts(p_in, part, SPLIT, m_e, WIDE, tl.float32, BLOCK, BLOCK_PARTS)
        p_dw = dw_ptr + o_k * stride_wk + o_c * stride_wc + o_r * stride_wr + o_s * stride_ws
        tl.store(p_dw, cast(b_total, dw_ptr.dtype.element_ty), mask=m_e)
    elif HAS_VECTORS:
        sum_columns(
            pid, vector_partial_ptrs, vector_out_ptrs, vector_parts, vector_columns, vector_first_blocks, tl.float32,
            BLOCK_COLUMNS, BLOCK_COLUMN_PARTS,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- sizes


def fold(channels: int, filter_width: int, stride: int) -> int:
    """Number of positions of a filter row after folding: its cells of stride x stride x channels."""
    return cdiv(filter_width, stride) * stride * stride * channels


# ------------------------------------------------------------------------------------------------- launch functions


def patches(cells: Tensor, positions: int, columns: int, block: Sequence[int]) -> TensorDescriptor:
    """Descriptor [HS, Q, N, positions] over dense cells (N, HS, WS, depth); neighbours along Q overlap."""
    cells = aligned(cells)
    n, rows, width, depth = cells.shape
    image, row = rows * width * depth, width * depth
    return TensorDescriptor(cells, [rows, columns, n, positions], [row, depth, image, 1], [1, 1, *block])


def fold_filter(weight: Tensor, stride: int, rows: int = 3, folded: int | None = None, shift: int = 0) -> Tensor:
    """Filters (K, C, R, S), any strides, to dense (rows, K, folded): filters over the result of :func:`.cells.space_to_depth`.

    Args:
        rows: rows of cells in a filter.
        folded: positions of a row, filled up with zeros; :func:`fold` by default.
        shift: number of zeros at the beginning of a row.
    """
    k, c, r, s = weight.shape
    folded = fold(c, s, stride) if folded is None else folded
    filters = new_output((rows, k, folded), weight.dtype, weight.device)
    config = elementwise_config(filters.numel())
    launch(
        _fold_filter_kernel,
        (cdiv(filters.numel(), config["BLOCK"]),),
        w_ptr=weight,
        out_ptr=filters,
        elements=filters.numel(),
        K=k,
        **strides("stride_w", "kcrs", weight),
        C=c,
        R=r,
        S=s,
        STRIDE=stride,
        FOLD=folded,
        SHIFT=shift,
        WIDE=needs_int64(weight, filters),
        **config,
    )
    return filters


def fprop(cells: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, relu: bool, channels_last: bool) -> Tensor:
    """Arguments and result as :func:`.select.fprop`, with the input's cells in place of the input."""
    n, c, _, _, k, r, s, p, q, ((stride, _), *_), *_ = problem
    folded = fold(c, s, stride)
    filters = fold_filter(weight, stride)
    y = new_output((n, k, p, q), cells.dtype, cells.device, channels_last=channels_last)
    config = conv2d_stem_config(cells.device, n, p, q, folded, k, narrow=not channels_last)
    columns = config.pop("COLUMNS")
    m, n1, n2, k1, k2 = (config[f"BLOCK_{name}"] for name in ("M", "N", "N2", "K", "K2"))

    def filter_blocks(rows: int, positions: int) -> TensorDescriptor:
        return TensorDescriptor(filters, [3, k, folded], [k * folded, folded, 1], [1, rows, positions])

    launch(
        _conv2d_stem_kernel,
        (p * cdiv(n, m) * cdiv(q, columns) * cdiv(k, n1 + n2),),
        x_desc=patches(cells, folded, q, [m, k1]),
        x2_desc=patches(cells, folded, q, [m, k2 or k1]),
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
        CHANNELS_LAST=channels_last,
        WIDE=needs_int64(y),
        INPUT_PRECISION="ieee",
        **config,
    )
    return y


def dgrad(dz: Tensor, weight: Tensor, problem: Problem) -> Tensor:
    """Gradient of the input, channels-last (N, C, H, W): a convolution of stride 1 to the cells' gradient, then depth-to-space.

    Without cells, one channel would use only one of the sixteen columns of the smallest tile.
    """
    n, c, h, w, k, r, s, p, q, ((stride, _), padding, *_), *_ = problem
    rows, columns = cells_size(stride, (p, q), (r, s))
    # (3, K, columns * depth) as NHWC filters over the cells.
    filters = fold_filter(weight, stride).view(3, k, cdiv(s, stride), stride * stride * c).transpose(0, 1).contiguous()
    filters = filters.permute(0, 3, 1, 2)
    of_cells = Problem.of((n, stride * stride * c, rows, columns), filters, Geometry((1, 1), (0, 0), (1, 1), 1), (p, q))
    d_cells, *_ = descriptor.dgrad(dz, filters, of_cells, None)
    padded = depth_to_space(d_cells.permute(0, 2, 3, 1), c, stride)
    seen = padded[:, :, padding[0] : padding[0] + h, padding[1] : padding[1] + w]
    dx = new_output((n, c, h, w), dz.dtype, dz.device, channels_last=True)
    if seen.shape != dx.shape:  # filters may not reach the last pixels
        dx.zero_()
    dx[:, :, : seen.shape[2], : seen.shape[3]] = seen
    return dx


def wgrad(dz: Tensor, cells: Tensor, dw: Tensor, problem: Problem, vectors: Sequence[ColumnSums]) -> None:
    """Write the weight gradient to ``dw`` (K, C, R, S), any dense strides, and add up the pending sums ``vectors``."""
    n, c, _, _, k, r, s, p, q, ((stride, _), *_), *_ = problem
    folded = fold(c, s, stride)
    config = conv2d_stem_wgrad_config(cells.device, n, p, q, folded, k)
    split = config.pop("SPLIT")
    m, n1, n2, images = (config[f"BLOCK_{name}"] for name in ("M", "N", "N2", "K"))
    fold_blocks = cdiv(folded, m)
    z = dense_nhwc(dz)
    partial = new_output((split, fold_blocks, 3, m, k), torch.float32, dz.device)

    def gradients(columns: int) -> TensorDescriptor:
        return TensorDescriptor(z, [p * q, n, k], [k, p * q * k, 1], [1, images, columns])

    launch(
        _conv2d_stem_wgrad_kernel,
        (fold_blocks * cdiv(k, n1 + n2), split),
        x_desc=patches(cells, folded, q, [images, m]),
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
    unfold(partial, dw, stride, vectors)


def unfold(partial: Tensor, dw: Tensor, stride: int, vectors: Sequence[ColumnSums]) -> None:
    """Add up float32 ``partial`` (parts, blocks of positions, 3, positions, K) into ``dw`` (K, C, R, S), any dense strides.

    The same launch adds up the pending sums ``vectors``.
    """
    k, c, r, s = dw.shape
    split, fold_blocks, _, m, _ = partial.shape
    block = 64
    vector_values, programs = vector_arguments(vectors, cdiv(dw.numel(), block))
    launch(
        _unfold_filter_kernel,
        (programs,),
        partial_ptr=partial,
        dw_ptr=dw,
        elements=dw.numel(),
        K=k,
        SPLIT=split,
        **strides("stride_w", "kcrs", dw),
        **vector_values,
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
