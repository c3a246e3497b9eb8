"""The weight gradient of a strided first layer with its ReLU and 3 x 3 max-pool of stride 2, in half precision.

The kernel also computes the pool's gradient. The unpooled gradient, four and a half times as large, is neither written nor
read. A step of a program is 2 x 2 pixels of the convolution's output: four windows reach them, at nine of their positions. The
program iterates along a row, so two of these windows also belong to the previous step, and their gradients are in registers.

Two neighbouring pixels together read four cells of a row, each pixel three. One tile of these four cells is multiplied with the
gradients of both pixels, side by side. A pixel's products with the cell that it does not read are not stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..pooling.autograd import no_gradient
from ..primitives import cast, dot, program_id
from ..runtime.launch import cdiv, launch, needs_int64, new_output
from ..sums import ColumnSums
from .descriptor import dense_nhwc
from .problem import Problem
from .stem import fold, patches, unfold
from .stem_rules import conv2d_stem_pool_wgrad_config

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _load_window(dy_desc, position_desc, i, j, n0, k0, SHAPE: tl.constexpr):
    """Load gradient and position of window (i, j), [images, filters]; zeros for a window outside the output."""
    b_dy = dy_desc.load([i, j, n0, k0]).reshape(SHAPE)
    return b_dy.to(tl.float32), position_desc.load([i, j, n0, k0]).reshape(SHAPE).to(tl.int32)


@triton.jit
def _passed(b_dy, b_position, PLACE: tl.constexpr):
    """The gradient that a window passes on to the pixel at its position PLACE."""
    return tl.where(b_position == PLACE, b_dy, 0.0)


@triton.jit
def _side_by_side(first, second, DTYPE: tl.constexpr):
    """Two tensors [rows, columns], rounded to DTYPE and with interleaved columns: [rows, 2 * columns]."""
    both = tl.join(cast(first, DTYPE), cast(second, DTYPE))
    return both.reshape(first.shape[0], 2 * first.shape[1])


@triton.jit
def _store_part(p_part, acc, o_m, o_k, K, FOLD: tl.constexpr, DEPTH: tl.constexpr):
    """Store one filter row's sums: even columns in this part, odd columns (filters begin a cell later) in the next part."""
    even, odd = acc.reshape(acc.shape[0], acc.shape[1] // 2, 2).split()
    o_out = o_m[:, None] * K + o_k[None, :]
    m_k = (o_k < K)[None, :]
    tl.store(p_part + o_out, even, mask=(o_m < FOLD)[:, None] & m_k)
    tl.store(p_part + (3 * FOLD - DEPTH) * K + o_out, odd, mask=((o_m >= DEPTH) & (o_m < FOLD + DEPTH))[:, None] & m_k)


@triton.jit
def _conv2d_stem_pool_wgrad_kernel(
    x_desc,  # overlapping patches [HS, columns, N, FOLD + DEPTH], blocks [1, 1, BLOCK_K, BLOCK_M]
    dy_desc,  # gradient of the pooled output [P, Q, N, K], blocks [1, 1, BLOCK_K, BLOCK_N]
    position_desc,  # window positions, uint8, [P, Q, N, K], the same blocks
    partial_ptr,  # out: [SPLIT, 2, 3, FOLD, K] float32
    sums_ptr,  # out: [SPLIT, K] float32, the sums of the gradient before the activation
    N,
    P,  # of the pool's output
    Q,
    K,
    SPLIT,
    USEFUL_POSITIONS: tl.constexpr,  # C * R * S before folding: used to count FLOPs
    CONV_SIZE: tl.constexpr,  # rows * columns of the convolution's output: used to count FLOPs
    FOLD: tl.constexpr,
    DEPTH: tl.constexpr,  # positions of a cell
    NO_GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program sums three filter rows of BLOCK_M positions of two columns x BLOCK_N filters over its split's steps.

    A step is the first 2 x 2 pixels of window (i, j) of BLOCK_K images.
    """
    FOLD_BLOCKS: tl.constexpr = (FOLD + DEPTH + BLOCK_M - 1) // BLOCK_M
    DTYPE: tl.constexpr = dy_desc.dtype
    TILE: tl.constexpr = (BLOCK_K, BLOCK_N)
    pid = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    f0 = (pid % FOLD_BLOCKS * BLOCK_M).to(tl.int32)
    k0 = (pid // FOLD_BLOCKS * BLOCK_N).to(tl.int32)
    steps = (P + 1) * (Q + 1) * tl.cdiv(N, BLOCK_K)
    steps_per_split = tl.cdiv(steps, SPLIT)
    begin = pid_split * steps_per_split
    j = (begin % (Q + 1)).to(tl.int32)
    i = (begin // (Q + 1) % (P + 1)).to(tl.int32)
    n0 = (begin // (Q + 1) // (P + 1) * BLOCK_K).to(tl.int32)
    acc_0 = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
    acc_1 = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
    acc_2 = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
    b_sum = tl.zeros(TILE, dtype=tl.float32)  # as exact as the products' sums, which have as many terms
    # Gradients from the windows on the left, carried from step to step. They are zeros after the end of a row.
    b_dy, b_position = _load_window(dy_desc, position_desc, i - 1, j - 1, n0, k0, TILE)
    left_8 = _passed(b_dy, b_position, 8)
    b_dy, b_position = _load_window(dy_desc, position_desc, i, j - 1, n0, k0, TILE)
    left_2 = _passed(b_dy, b_position, 2)
    left_5 = _passed(b_dy, b_position, 5)
    # Without disable_licm the compiler keeps the addresses of all products in registers, beside the accumulators.
    for _ in tl.range(begin.to(tl.int32), tl.minimum(begin + steps_per_split, steps).to(tl.int32), disable_licm=True):
        x_0 = x_desc.load([2 * i, 2 * j, n0, f0]).reshape(BLOCK_K, BLOCK_M).T
        x_1 = x_desc.load([2 * i + 1, 2 * j, n0, f0]).reshape(BLOCK_K, BLOCK_M).T
        x_2 = x_desc.load([2 * i + 2, 2 * j, n0, f0]).reshape(BLOCK_K, BLOCK_M).T
        x_3 = x_desc.load([2 * i + 3, 2 * j, n0, f0]).reshape(BLOCK_K, BLOCK_M).T
        b_above, above = _load_window(dy_desc, position_desc, i - 1, j, n0, k0, TILE)
        b_dy, b_position = _load_window(dy_desc, position_desc, i, j, n0, k0, TILE)
        b_sum += tl.where(b_position == NO_GRADIENT, 0.0, b_dy)
        # Windows are added in the order of :mod:`kernels.pooling`.
        z_00 = left_8 + _passed(b_above, above, 6) + left_2 + _passed(b_dy, b_position, 0)
        z_01 = _passed(b_above, above, 7) + _passed(b_dy, b_position, 1)
        z_0 = _side_by_side(z_00, z_01, DTYPE)
        left_8 = _passed(b_above, above, 8)
        left_2 = _passed(b_dy, b_position, 2)
        acc_0 = dot(x_0, z_0, acc_0, INPUT_PRECISION)
        acc_1 = dot(x_1, z_0, acc_1, INPUT_PRECISION)
        acc_2 = dot(x_2, z_0, acc_2, INPUT_PRECISION)
        z_1 = _side_by_side(left_5 + _passed(b_dy, b_position, 3), _passed(b_dy, b_position, 4), DTYPE)
        left_5 = _passed(b_dy, b_position, 5)
        acc_0 = dot(x_1, z_1, acc_0, INPUT_PRECISION)
        acc_1 = dot(x_2, z_1, acc_1, INPUT_PRECISION)
        acc_2 = dot(x_3, z_1, acc_2, INPUT_PRECISION)
        # No branches here: they would keep the compiler from prefetching the next step.
        i += tl.where(j == Q, 1, 0)
        j = tl.where(j == Q, 0, j + 1)
        n0 += tl.where(i > P, BLOCK_K, 0)
        i = tl.where(i > P, 0, i)
    o_m = f0 + tl.arange(0, BLOCK_M)
    o_k = k0 + tl.arange(0, BLOCK_N)
    p_part = partial_ptr + pid_split * (6 * FOLD * K)
    _store_part(p_part, acc_0, o_m, o_k, K, FOLD, DEPTH)
    _store_part(p_part + FOLD * K, acc_1, o_m, o_k, K, FOLD, DEPTH)
    _store_part(p_part + 2 * FOLD * K, acc_2, o_m, o_k, K, FOLD, DEPTH)
    if f0 == 0:
        tl.store(sums_ptr + pid_split * K + o_k, tl.sum(b_sum, axis=0), mask=o_k < K)


# ------------------------------------------------------------------------------------------------- launch function


def wgrad(dy: Tensor, cells: Tensor, dw: Tensor, problem: Problem, position: Tensor, d_bias: Tensor | None) -> None:
    """Write the weight gradient to ``dw`` (K, C, R, S), any dense strides, and the bias's gradient to ``d_bias``.

    Args:
        dy: gradient of the pooled output (N, K, P, Q).
        cells: :func:`.cells.cells_of` the input.
        problem: the convolution, whose output has 2 * P + 2 rows and 2 * Q + 2 columns.
        position: the pool's window positions, uint8.
        d_bias: out: the gradient of the bias (K,); None if not wanted.
    """
    n, c, _, _, k, r, s, rows, columns, ((stride, _), *_), _, device, _ = problem
    p, q = dy.shape[2:]
    folded, depth = fold(c, s, stride), stride * stride * c
    config = conv2d_stem_pool_wgrad_config(device, n, p, q, folded, k, depth)
    split = config.pop("SPLIT")
    m, filters, images = (config[f"BLOCK_{name}"] for name in ("M", "N", "K"))
    partial = new_output((2 * split, 1, 3, folded, k), torch.float32, device)
    sums = new_output((split, k), torch.float32, device)

    def windows(tensor: Tensor) -> TensorDescriptor:
        return TensorDescriptor(dense_nhwc(tensor), [p, q, n, k], [q * k, k, p * q * k, 1], [1, 1, images, filters])

    launch(
        _conv2d_stem_pool_wgrad_kernel,
        (cdiv(folded + depth, m) * cdiv(k, filters), split),
        x_desc=patches(cells, folded + depth, columns - 1, [images, m]),
        dy_desc=windows(dy),
        position_desc=windows(position),
        partial_ptr=partial,
        sums_ptr=sums,
        N=n,
        P=p,
        Q=q,
        K=k,
        SPLIT=split,
        USEFUL_POSITIONS=c * r * s,
        CONV_SIZE=rows * columns,
        FOLD=folded,
        DEPTH=depth,
        NO_GRADIENT=no_gradient(torch.uint8),
        WIDE=needs_int64(partial),
        INPUT_PRECISION="ieee",
        **config,
    )
    unfold(partial, dw, stride, [] if d_bias is None else [ColumnSums(sums, d_bias)])
