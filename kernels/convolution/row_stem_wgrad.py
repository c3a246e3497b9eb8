"""The weight gradient of a strided first layer of few channels in TF32: see :mod:`kernels.convolution.row_stem`.

The sum runs over images, which TF32 needs to be contiguous in shared memory. So the kernel reads the images' cells from a copy
(:mod:`.by_batch`), and transposes the gradient in registers, which is possible for the second operand. A first layer has few
products, so it is bound by memory. Therefore, behind a pool, the kernel computes the pool's gradient too, from the window
positions, and never writes the unpooled gradient, which is four and a half times as large.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..pooling.autograd import no_gradient
from ..primitives import cast, compensated_add, dot, only_if, program_id
from ..runtime.launch import cdiv, launch, needs_int64, new_output, strides
from ..sums import ColumnSums
from .by_batch import images_5d, others_5d, sum_of_images, turned
from .problem import Problem
from .rules import conv2d_rows_wgrad_config
from .stem import fold, unfold

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _gradient(
    dy_ptr, position_ptr, o_n, o_k, p, q, N, K, POOL_P, POOL_Q,
    stride_dyn, stride_dyk, stride_dyp, stride_dyq, stride_pn, stride_pk, stride_pp, stride_pq,
    POOLED: tl.constexpr, NO_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Gradient of pixel (p, q) before the activation; with POOLED also the gradient that window (p // 2, q // 2) passes on.

    With POOLED the pixel's gradient is the sum over the windows that point at it, in the order of :mod:`kernels.pooling`.
    """
    inside = (o_n < N) & (o_k < K)
    if POOLED:
        total = tl.zeros(inside.shape, dtype=tl.float32)
        own = total
        for u in tl.static_range(2):  # windows that begin two rows above (they reach even rows only) or in the pixel's rows
            for v in tl.static_range(2):
                i = p // 2 - 1 + u
                j = q // 2 - 1 + v
                reached = (i >= 0) & (i < POOL_P) & (j >= 0) & (j < POOL_Q)
                if u == 0:
                    reached = reached & (p % 2 == 0)
                if v == 0:
                    reached = reached & (q % 2 == 0)
                place = (p % 2 if u == 1 else 2) * 3 + (q % 2 if v == 1 else 2)
                p_dy = dy_ptr + (i * stride_dyp + j * stride_dyq) + o_n * stride_dyn + o_k * stride_dyk
                p_position = position_ptr + (i * stride_pp + j * stride_pq) + o_n * stride_pn + o_k * stride_pk
                b_dy = tl.load(p_dy, mask=only_if(reached, inside), other=0.0).to(tl.float32)
                b_position = tl.load(p_position, mask=only_if(reached, inside), other=NO_GRADIENT).to(tl.int32)
                total += tl.where(b_position == place, b_dy, 0.0)
                if u == 1 and v == 1:
                    own = tl.where(b_position == NO_GRADIENT, 0.0, b_dy)
        return total, own
    else:
        p_dy = dy_ptr + (p * stride_dyp + q * stride_dyq) + o_n * stride_dyn + o_k * stride_dyk
        total = tl.load(p_dy, mask=inside, other=0.0).to(tl.float32)
        return total, total


@triton.jit
def _conv2d_rows_wgrad_kernel(
    x_desc,  # cells of the input [HS, WS*DEPTH, N], blocks [1, BLOCK_M, BLOCK_K]
    dy_ptr,  # gradient before the activation, POOLED: of the pooled output; [N, K, P, Q] through its strides
    position_ptr,  # window positions, [N, K, POOL_P, POOL_Q] through its strides; or unused
    partial_ptr,  # out: [SPLIT, FOLD_BLOCKS, 3, BLOCK_M, K] float32
    sums_ptr,  # POOLED: out: [SPLIT, K] float32, the sums of the gradient before the activation
    N,
    P,  # of the convolution's output
    Q,
    K,
    POOL_P,
    POOL_Q,
    stride_dyn,
    stride_dyk,
    stride_dyp,
    stride_dyq,
    stride_pn,
    stride_pk,
    stride_pp,
    stride_pq,
    SPLIT,
    USEFUL_POSITIONS: tl.constexpr,  # C * R * S: used to count FLOPs
    DEPTH: tl.constexpr,
    FOLD_BLOCKS: tl.constexpr,
    POOLED: tl.constexpr,
    NO_GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
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
    begin = (pid_split * steps_per_split).to(tl.int32)
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    o_k = others_5d(k0, BLOCK_N)
    if WIDE:
        o_k = o_k.to(tl.int64)
    acc_0 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_1 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_K // 8, BLOCK_N // 16, 4, 8, 4), dtype=tl.float32)
    b_lost = tl.zeros((BLOCK_K // 8, BLOCK_N // 16, 4, 8, 4), dtype=tl.float32)
    if BLOCK_N2 > 0:
        o_k2 = others_5d(k0 + BLOCK_N, BLOCK_N2)
        if WIDE:
            o_k2 = o_k2.to(tl.int64)
        acc2_0 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
        acc2_1 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
        acc2_2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
        b_sum2 = tl.zeros((BLOCK_K // 8, BLOCK_N2 // 16, 4, 8, 4), dtype=tl.float32)
        b_lost2 = tl.zeros((BLOCK_K // 8, BLOCK_N2 // 16, 4, 8, 4), dtype=tl.float32)
    # Without disable_licm the compiler keeps the addresses of all products in registers, beside the accumulators.
    for step in tl.range(begin, tl.minimum(begin + steps_per_split, steps), disable_licm=True):
        n0 = step % blocks_n * BLOCK_K
        p = step // blocks_n // Q
        q = step // blocks_n % Q
        o_n = images_5d(n0, BLOCK_K)
        o_p, o_q = p, q
        if WIDE:
            o_n, o_p, o_q = o_n.to(tl.int64), p.to(tl.int64), q.to(tl.int64)
        x_0 = x_desc.load([p, q * DEPTH + f0, n0]).reshape(BLOCK_M, BLOCK_K)
        x_1 = x_desc.load([p + 1, q * DEPTH + f0, n0]).reshape(BLOCK_M, BLOCK_K)
        x_2 = x_desc.load([p + 2, q * DEPTH + f0, n0]).reshape(BLOCK_M, BLOCK_K)
        first = (p % 2 == 0) & (q % 2 == 0)  # the pixel at which a window begins: each window is summed once
        b_z, own = _gradient(
            *(dy_ptr, position_ptr, o_n, o_k, o_p, o_q, N, K, POOL_P, POOL_Q),
            *(stride_dyn, stride_dyk, stride_dyp, stride_dyq, stride_pn, stride_pk, stride_pp, stride_pq, POOLED, NO_GRADIENT),
        )
        if POOLED:
            b_sum, b_lost = compensated_add(b_sum, b_lost, tl.where(first, own, 0.0))
        b_z = turned(cast(b_z, DTYPE), BLOCK_K, BLOCK_N).T
        acc_0 = dot(x_0, b_z, acc_0, INPUT_PRECISION)
        acc_1 = dot(x_1, b_z, acc_1, INPUT_PRECISION)
        acc_2 = dot(x_2, b_z, acc_2, INPUT_PRECISION)
        if BLOCK_N2 > 0:
            b_z2, own2 = _gradient(
                *(dy_ptr, position_ptr, o_n, o_k2, o_p, o_q, N, K, POOL_P, POOL_Q),
                *(
                    stride_dyn,
                    stride_dyk,
                    stride_dyp,
                    stride_dyq,
                    stride_pn,
                    stride_pk,
                    stride_pp,
                    stride_pq,
                    POOLED,
                    NO_GRADIENT,
                ),
            )
            if POOLED:
                b_sum2, b_lost2 = compensated_add(b_sum2, b_lost2, tl.where(first, own2, 0.0))
            b_z2 = turned(cast(b_z2, DTYPE), BLOCK_K, BLOCK_N2).T
            acc2_0 = dot(x_0, b_z2, acc2_0, INPUT_PRECISION)
            acc2_1 = dot(x_1, b_z2, acc2_1, INPUT_PRECISION)
            acc2_2 = dot(x_2, b_z2, acc2_2, INPUT_PRECISION)
    o_m = tl.arange(0, BLOCK_M)[:, None] * K
    p_out = partial_ptr + (pid_split * FOLD_BLOCKS + pid % FOLD_BLOCKS) * (3 * BLOCK_M * K) + o_m
    o_out = k0 + tl.arange(0, BLOCK_N)[None, :]
    m_k = o_out < K
    tl.store(p_out + o_out, acc_0, mask=m_k)
    tl.store(p_out + BLOCK_M * K + o_out, acc_1, mask=m_k)
    tl.store(p_out + 2 * BLOCK_M * K + o_out, acc_2, mask=m_k)
    if BLOCK_N2 > 0:
        o_out2 = k0 + BLOCK_N + tl.arange(0, BLOCK_N2)[None, :]
        m_k2 = o_out2 < K
        tl.store(p_out + o_out2, acc2_0, mask=m_k2)
        tl.store(p_out + BLOCK_M * K + o_out2, acc2_1, mask=m_k2)
        tl.store(p_out + 2 * BLOCK_M * K + o_out2, acc2_2, mask=m_k2)
    if POOLED:
        if f0 == 0:
            p_sums = sums_ptr + pid_split * K
            o_sum = k0 + tl.arange(0, BLOCK_N)
            tl.store(p_sums + o_sum, sum_of_images(b_sum, BLOCK_N), mask=o_sum < K)
            if BLOCK_N2 > 0:
                o_sum2 = k0 + BLOCK_N + tl.arange(0, BLOCK_N2)
                tl.store(p_sums + o_sum2, sum_of_images(b_sum2, BLOCK_N2), mask=o_sum2 < K)


# ------------------------------------------------------------------------------------------------- launch function


def wgrad(
    dy: Tensor,
    cells: Tensor,
    dw: Tensor,
    problem: Problem,
    vectors: Sequence[ColumnSums] = (),
    position: Tensor | None = None,
    d_bias: Tensor | None = None,
) -> None:
    """Write the weight gradient to ``dw`` (K, C, R, S), any dense strides, and add up the pending sums ``vectors``.

    Args:
        dy: gradient before the activation (N, K, P, Q); with ``position`` the gradient of the pooled output (3 x 3, stride 2).
        cells: the input's cells with the batch innermost (:attr:`.by_batch.CellsCopy.out`).
        position: the pool's window positions, uint8; None without a pool.
        d_bias: out: the gradient of the bias (K,), with ``position`` only; None if not wanted.
    """
    n, c, _, _, k, r, s, p, q, ((stride, _), *_), _, device, precision = problem
    folded = fold(c, s, stride)
    narrow = position is not None and not dy.stride(1) == position.stride(1) == 1
    config = conv2d_rows_wgrad_config(device, n, p, q, folded, k, pooled=position is not None, narrow=narrow)
    split = config.pop("SPLIT")
    m, n1, n2, images = (config[f"BLOCK_{name}"] for name in ("M", "N", "N2", "K"))
    fold_blocks = cdiv(folded, m)
    height, columns, row = cells.shape
    partial = new_output((split, fold_blocks, 3, m, k), torch.float32, device)
    sums = partial if position is None else new_output((split, k), torch.float32, device)
    if d_bias is not None:
        vectors = [*vectors, ColumnSums(sums, d_bias)]
    launch(
        _conv2d_rows_wgrad_kernel,
        (fold_blocks * cdiv(k, n1 + n2), split),
        x_desc=TensorDescriptor(cells, [height, columns, n], [columns * row, row, 1], [1, m, images]),
        dy_ptr=dy,
        position_ptr=dy if position is None else position,
        partial_ptr=partial,
        sums_ptr=sums,
        N=n,
        P=p,
        Q=q,
        K=k,
        POOL_P=dy.shape[2],
        POOL_Q=dy.shape[3],
        **strides("stride_dy", "nkpq", dy),
        **strides("stride_p", "nkpq", dy if position is None else position),
        SPLIT=split,
        USEFUL_POSITIONS=c * r * s,
        DEPTH=stride * stride * c,
        FOLD_BLOCKS=fold_blocks,
        POOLED=position is not None,
        NO_GRADIENT=no_gradient(torch.uint8),
        WIDE=needs_int64(dy, position, partial),
        INPUT_PRECISION=precision,
        **config,
    )
    unfold(partial, dw, stride, vectors)
