"""The gradient of the weight of a strided first layer of few channels in TF32: see :mod:`kernels.convolution.row_stem`.

The sum runs over images, which must be neighbours in shared memory in TF32. So the images' cells are read from a copy (:mod:`.by_batch`), and
the gradient is turned on its way through registers: as the second operand it may take that way. Small as a first layer's
products are, memory decides: so the pool's gradient is taken on the same way, from its windows' positions, and the unpooled
gradient, four and a half times as large, is never written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..pooling.autograd import no_gradient
from ..primitives import cast, compensated_add, dot, program_id
from ..runtime.launch import cdiv, launch, needs_int64, new_output, strides
from ..sums import ColumnSums
from .problem import Problem
from .rules import conv2d_rows_wgrad_config
from .stem import fold, unfold

# ---------------------------------------------------------------------------------------------------------- kernels


#: A block that is to be turned is loaded as [images / 8, others / 16, 4, 8, 4]: four numbers a thread, eight images and four times
#: four neighbours a warp. So it reads 64 bytes of each image at once, and writes eight images beside each other.


@triton.jit
def _images_5d(n0, IMAGES: tl.constexpr):
    """Numbers of images, for a block that is to be turned."""
    o_high = tl.arange(0, IMAGES // 8)[:, None, None, None, None]
    return n0 + o_high * 8 + tl.arange(0, 8)[None, None, None, :, None]


@triton.jit
def _others_5d(first, COUNT: tl.constexpr):
    """Numbers of the other dimension, for a block that is to be turned."""
    o_high = tl.arange(0, COUNT // 16)[None, :, None, None, None]
    o_middle = tl.arange(0, 4)[None, None, :, None, None]
    return first + o_high * 16 + o_middle * 4 + tl.arange(0, 4)[None, None, None, None, :]


@triton.jit
def _turned(block, IMAGES: tl.constexpr, COUNT: tl.constexpr):
    """Such a block as [COUNT, IMAGES]."""
    return tl.permute(block, (1, 2, 4, 0, 3)).reshape(COUNT, IMAGES)


@triton.jit
def _windows(
    dy_ptr,
    position_ptr,
    o_n,
    o_k,
    i,
    j,
    N,
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
    NO_GRADIENT: tl.constexpr,
):
    """Gradients and positions of the four windows that reach the 2 x 2 pixels at which window (i, j) begins."""
    grads = ()
    positions = ()
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            p = i - 1 + a
            q = j - 1 + b
            mask = (o_n < N) & (o_k < K) & (p >= 0) & (p < POOL_P) & (q >= 0) & (q < POOL_Q)
            p_dy = dy_ptr + (p * stride_dyp + q * stride_dyq) + o_n * stride_dyn + o_k * stride_dyk
            p_position = position_ptr + (p * stride_pp + q * stride_pq) + o_n * stride_pn + o_k * stride_pk
            grads += (tl.load(p_dy, mask=mask, other=0.0),)  # type: ignore[assignment]
            positions += (tl.load(p_position, mask=mask, other=NO_GRADIENT),)  # type: ignore[assignment]
    return grads, positions


@triton.jit
def _pixel_gradient(grads, positions, a: tl.constexpr, b: tl.constexpr):
    """Of pixel (a, b) of the 2 x 2: the sum over the windows that point at it, in the order of :mod:`kernels.pooling`."""
    total = tl.zeros(grads[0].shape, dtype=tl.float32)
    for u in tl.static_range(2):  # windows (i - 1, .) see row 0 as their row 2, windows (i, .) both rows as their own
        for v in tl.static_range(2):
            if (u == 1 or a == 0) and (v == 1 or b == 0):
                points = positions[2 * u + v] == (a if u == 1 else 2) * 3 + (b if v == 1 else 2)
                total += tl.where(points, grads[2 * u + v].to(tl.float32), 0.0)
    return total


@triton.jit
def _add_products(
    accs, x_desc, b_z, n0, f0, p, q, HS, P, Q,
    DEPTH: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``accs``, [BLOCK_M, filters] each, with the products of one pixel; ``b_z``: gradients [filters, BLOCK_K] in the type of x."""
    # A pixel outside of the convolution's output, at the edge of the 2 x 2, has no gradient: nor may it see an infinity.
    row = tl.where((p < P) & (q < Q), p, HS)
    added = ()
    for j in tl.static_range(3):
        b_x = x_desc.load([row + j, q * DEPTH + f0, n0]).reshape(BLOCK_M, BLOCK_K)
        added += (dot(b_x, b_z.T, accs[j], INPUT_PRECISION),)  # type: ignore[assignment]
    return added


@triton.jit
def _conv2d_rows_wgrad_kernel(
    x_desc,  # cells of the input [HS, WS*DEPTH, N], blocks [1, BLOCK_M, BLOCK_K]
    dy_ptr,  # POOLED: gradient of the pooled output; else that before the activation; [N, K, P, Q] through its strides
    position_ptr,  # window positions, [N, K, POOL_P, POOL_Q] through its strides; or unused
    partial_ptr,  # out: [SPLIT, FOLD_BLOCKS, 3, BLOCK_M, K] float32
    sums_ptr,  # POOLED: out: [SPLIT, K] float32, the sums of the gradient before the activation
    N,
    HS,
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
    USEFUL_POSITIONS: tl.constexpr,  # C * R * S: for whoever counts FLOPs
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

    A step is one pixel of BLOCK_K images, POOLED the 2 x 2 at which a window begins: they share the windows that reach them.
    """
    pid = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    f0 = (pid % FOLD_BLOCKS * BLOCK_M).to(tl.int32)
    k0 = (pid // FOLD_BLOCKS * (BLOCK_N + BLOCK_N2)).to(tl.int32)
    SIDE: tl.constexpr = 2 if POOLED else 1
    rows = tl.cdiv(P, SIDE)
    columns = tl.cdiv(Q, SIDE)
    blocks_n = tl.cdiv(N, BLOCK_K)
    steps = rows * columns * blocks_n
    steps_per_split = tl.cdiv(steps, SPLIT)
    begin = (pid_split * steps_per_split).to(tl.int32)
    o_k = _others_5d(k0, BLOCK_N)
    o_k2 = o_k
    accs = ()
    accs2 = ()
    for _ in tl.static_range(3):
        accs += (tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),)  # type: ignore[assignment]
    if BLOCK_N2 > 0:
        o_k2 = _others_5d(k0 + BLOCK_N, BLOCK_N2)
        for _ in tl.static_range(3):
            accs2 += (tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32),)  # type: ignore[assignment]
    if POOLED:
        b_sum = tl.zeros((BLOCK_K // 8, BLOCK_N // 16, 4, 8, 4), dtype=tl.float32)
        b_lost = tl.zeros((BLOCK_K // 8, BLOCK_N // 16, 4, 8, 4), dtype=tl.float32)
        if BLOCK_N2 > 0:
            b_sum2 = tl.zeros((BLOCK_K // 8, BLOCK_N2 // 16, 4, 8, 4), dtype=tl.float32)
            b_lost2 = tl.zeros((BLOCK_K // 8, BLOCK_N2 // 16, 4, 8, 4), dtype=tl.float32)
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    # The compiler keeps each product's addresses in registers, beside the accumulators, if it may.
    for step in tl.range(begin, tl.minimum(begin + steps_per_split, steps), disable_licm=True):
        i = step // blocks_n // columns
        j = step // blocks_n % columns
        n0 = step % blocks_n * BLOCK_K
        o_n = _images_5d(n0, BLOCK_K)
        if WIDE:
            o_n = o_n.to(tl.int64)
        if POOLED:
            grads, positions = _windows(
                *(dy_ptr, position_ptr, o_n, o_k, i, j, N, K, POOL_P, POOL_Q),
                *(stride_dyn, stride_dyk, stride_dyp, stride_dyq, stride_pn, stride_pk, stride_pp, stride_pq, NO_GRADIENT),
            )
            # Every gradient that a window passes on reaches one pixel: the sum over the windows is that over the pixels.
            b_own = tl.where(positions[3] == NO_GRADIENT, 0.0, grads[3].to(tl.float32))
            b_sum, b_lost = compensated_add(b_sum, b_lost, b_own)
            for a in tl.static_range(2):
                for b in tl.static_range(2):
                    b_z = _turned(cast(_pixel_gradient(grads, positions, a, b), DTYPE), BLOCK_K, BLOCK_N)
                    accs = _add_products(
                        *(accs, x_desc, b_z, n0, f0, 2 * i + a, 2 * j + b, HS, P, Q),
                        *(DEPTH, INPUT_PRECISION, BLOCK_M, BLOCK_K),
                    )
            if BLOCK_N2 > 0:
                grads, positions = _windows(
                    *(dy_ptr, position_ptr, o_n, o_k2, i, j, N, K, POOL_P, POOL_Q),
                    *(stride_dyn, stride_dyk, stride_dyp, stride_dyq, stride_pn, stride_pk, stride_pp, stride_pq, NO_GRADIENT),
                )
                b_own2 = tl.where(positions[3] == NO_GRADIENT, 0.0, grads[3].to(tl.float32))
                b_sum2, b_lost2 = compensated_add(b_sum2, b_lost2, b_own2)
                for a in tl.static_range(2):
                    for b in tl.static_range(2):
                        b_z2 = _turned(cast(_pixel_gradient(grads, positions, a, b), DTYPE), BLOCK_K, BLOCK_N2)
                        accs2 = _add_products(
                            *(accs2, x_desc, b_z2, n0, f0, 2 * i + a, 2 * j + b, HS, P, Q),
                            *(DEPTH, INPUT_PRECISION, BLOCK_M, BLOCK_K),
                        )
        else:
            p_z = dy_ptr + (i * stride_dyp + j * stride_dyq) + o_n * stride_dyn
            b_z = tl.load(p_z + o_k * stride_dyk, mask=(o_n < N) & (o_k < K), other=0.0)
            accs = _add_products(
                *(accs, x_desc, _turned(b_z, BLOCK_K, BLOCK_N), n0, f0, i, j, HS, P, Q),
                *(DEPTH, INPUT_PRECISION, BLOCK_M, BLOCK_K),
            )
            if BLOCK_N2 > 0:
                b_z2 = tl.load(p_z + o_k2 * stride_dyk, mask=(o_n < N) & (o_k2 < K), other=0.0)
                accs2 = _add_products(
                    *(accs2, x_desc, _turned(b_z2, BLOCK_K, BLOCK_N2), n0, f0, i, j, HS, P, Q),
                    *(DEPTH, INPUT_PRECISION, BLOCK_M, BLOCK_K),
                )
    o_m = tl.arange(0, BLOCK_M)[:, None] * K
    p_out = partial_ptr + (pid_split * FOLD_BLOCKS + pid % FOLD_BLOCKS) * (3 * BLOCK_M * K) + o_m
    o_out = k0 + tl.arange(0, BLOCK_N)[None, :]
    for j in tl.static_range(3):
        tl.store(p_out + j * BLOCK_M * K + o_out, accs[j], mask=o_out < K)
    if BLOCK_N2 > 0:
        o_out2 = k0 + BLOCK_N + tl.arange(0, BLOCK_N2)[None, :]
        for j in tl.static_range(3):
            tl.store(p_out + j * BLOCK_M * K + o_out2, accs2[j], mask=o_out2 < K)
    if POOLED:
        if f0 == 0:
            p_sums = sums_ptr + pid_split * K
            o_sum = k0 + tl.arange(0, BLOCK_N)
            tl.store(p_sums + o_sum, tl.sum(_turned(b_sum, BLOCK_K, BLOCK_N), axis=1), mask=o_sum < K)
            if BLOCK_N2 > 0:
                o_sum2 = k0 + BLOCK_N + tl.arange(0, BLOCK_N2)
                tl.store(p_sums + o_sum2, tl.sum(_turned(b_sum2, BLOCK_K, BLOCK_N2), axis=1), mask=o_sum2 < K)


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
    """Gradient of the weight into ``dw`` (K, C, R, S), any dense strides; and the sums of ``vectors``.

    Args:
        dy: gradient before the activation (N, K, P, Q); with ``position`` that of the output's pool, 3 x 3 of stride 2.
        cells: the input's, with the batch innermost (:class:`.by_batch.CellsCopy`).
        position: the pool's, uint8.
        d_bias: out: with ``position`` the gradient of the bias (K,), if wanted.
    """
    n, c, _, _, k, r, s, p, q, ((stride, _), *_), _, device, precision = problem
    folded = fold(c, s, stride)
    config = conv2d_rows_wgrad_config(device, n, p, q, folded, k, pooled=position is not None)
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
        HS=height,
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
