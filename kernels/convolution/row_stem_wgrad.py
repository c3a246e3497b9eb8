"""The weight gradient of a strided first layer of few channels in TF32: see :mod:`kernels.convolution.row_stem`.

The sum runs over images, which TF32 needs to be contiguous in shared memory. So the kernel reads copies with the batch
innermost (:mod:`.by_batch`) of the images' cells and of the gradient before the activation. Behind a pool, the kernel of the
pool's gradient writes it in that order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..configs.tables import tile_size
from ..pooling.autograd import no_gradient
from ..primitives import dot, only_if, program_id
from ..runtime.backend import INTERPRETED
from ..runtime.launch import cdiv, launch, needs_int64, new_output, strides
from ..sums import ColumnSums
from .by_batch import Copy, cells_by_batch, copy, new_by_batch, rows_by_batch
from .descriptor import dense_nhwc
from .problem import Problem
from .rules import conv2d_rows_wgrad_config
from .stem import fold, unfold

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _at(position, place: tl.constexpr, b_dy):
    """What a window passes on to its pixel ``place``."""
    return tl.where(position == place, b_dy, 0.0)


@triton.jit
def _max_pool2d_dgrad_by_batch_kernel(
    dy_ptr,  # gradient of the pooled output, [N, K, POOL_P, POOL_Q] through its strides
    position_ptr,  # window positions, [N, K, POOL_P, POOL_Q] through its strides
    z_ptr,  # out: gradient before the activation, [P, Q, K, N rounded up to a multiple of 4]
    partial_ptr,  # out: [programs / blocks of filters, K] float32, sums of z
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
    NO_GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
):
    """Gradient of a 3 x 3 pool of stride 2: one program computes BLOCK_IMAGES images x BLOCK_FILTERS filters x 2 x 2 pixels.

    Window (i, j) begins at the first of the pixels. Four windows reach them: this one, and those above and to the left.
    """
    pid = program_id(0, WIDE)
    blocks_k = tl.cdiv(K, BLOCK_FILTERS)
    row = tl.cdiv(N, 4) * 4
    blocks_n = tl.cdiv(row, BLOCK_IMAGES)
    columns = tl.cdiv(Q, 2)
    part = pid // blocks_k
    i = part // blocks_n // columns
    j = part // blocks_n % columns
    o_n = part % blocks_n * BLOCK_IMAGES + tl.arange(0, BLOCK_IMAGES)
    o_k = pid % blocks_k * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
    m_k = (o_k < K)[None, :]
    inside = (o_n < N)[:, None] & m_k

    grads = ()
    positions = ()
    for u in tl.static_range(2):
        for v in tl.static_range(2):
            p, q = i - 1 + u, j - 1 + v
            mask = only_if((p >= 0) & (p < POOL_P) & (q >= 0) & (q < POOL_Q), inside)
            o_dy = p * stride_dyp + q * stride_dyq + (o_n * stride_dyn)[:, None] + (o_k * stride_dyk)[None, :]
            o_position = p * stride_pp + q * stride_pq + (o_n * stride_pn)[:, None] + (o_k * stride_pk)[None, :]
            grads += (tl.load(dy_ptr + o_dy, mask=mask, other=0.0),)  # type: ignore[assignment]
            b_position = tl.load(position_ptr + o_position, mask=mask, other=NO_GRADIENT)
            positions += (b_position.to(tl.int32),)  # type: ignore[assignment]
    above_left, above, left, own = grads  # type: ignore[misc]
    at_above_left, at_above, at_left, at_own = positions  # type: ignore[misc]

    # In the order of :mod:`kernels.pooling`, by ascending window.
    corner = _at(at_above_left, 8, above_left) + _at(at_above, 6, above)
    corner = corner + _at(at_left, 2, left) + _at(at_own, 0, own)
    right = _at(at_above, 7, above) + _at(at_own, 1, own)
    below = _at(at_left, 5, left) + _at(at_own, 3, own)
    z = (corner, right, below, _at(at_own, 4, own))
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            h, w = 2 * i + a, 2 * j + b
            p_z = z_ptr + ((h * Q + w) * K + o_k)[None, :] * row + o_n[:, None]
            # Zeros fill the elements beyond the last image.
            tl.store(p_z, z[2 * a + b], mask=only_if((h < P) & (w < Q), (o_n < row)[:, None] & m_k))
    # A gradient that a window passes on reaches exactly one pixel.
    total = tl.sum(tl.where(at_own == NO_GRADIENT, 0.0, own), axis=0)
    tl.store(partial_ptr + part * K + o_k, total, mask=o_k < K)


@triton.jit
def _conv2d_rows_wgrad_kernel(
    x_desc,  # cells of the input [HS, WS*DEPTH, N], blocks [1, BLOCK_M, BLOCK_K]
    z_desc,  # gradient before the activation [P, Q*K, N], blocks [1, BLOCK_N, BLOCK_K]
    z2_desc,  # the same with BLOCK_N2 for BLOCK_N
    partial_ptr,  # out: [SPLIT, FOLD_BLOCKS, 3, BLOCK_M, K] float32
    N,
    P,
    Q,
    K,
    SPLIT,
    USEFUL_POSITIONS: tl.constexpr,  # C * R * S: used to count FLOPs
    DEPTH: tl.constexpr,
    FOLD_BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program sums three filter rows of BLOCK_M folded positions x BLOCK_N + BLOCK_N2 filters over its split's pixels.

    A step of the sum is one pixel of BLOCK_K images. Columns beyond the last filter belong to the next pixel: they are not
    stored.
    """
    pid = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    f0 = (pid % FOLD_BLOCKS * BLOCK_M).to(tl.int32)
    k0 = (pid // FOLD_BLOCKS * (BLOCK_N + BLOCK_N2)).to(tl.int32)
    blocks_n = tl.cdiv(N, BLOCK_K)
    steps = P * Q * blocks_n
    steps_per_split = tl.cdiv(steps, SPLIT)
    begin = (pid_split * steps_per_split).to(tl.int32)
    acc_0 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_1 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if BLOCK_N2 > 0:
        acc2_0 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
        acc2_1 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
        acc2_2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
    for step in range(begin, tl.minimum(begin + steps_per_split, steps)):
        n0 = step % blocks_n * BLOCK_K
        p = step // blocks_n // Q
        q = step // blocks_n % Q
        x_0 = x_desc.load([p, q * DEPTH + f0, n0]).reshape(BLOCK_M, BLOCK_K)
        x_1 = x_desc.load([p + 1, q * DEPTH + f0, n0]).reshape(BLOCK_M, BLOCK_K)
        x_2 = x_desc.load([p + 2, q * DEPTH + f0, n0]).reshape(BLOCK_M, BLOCK_K)
        b_z = z_desc.load([p, q * K + k0, n0]).reshape(BLOCK_N, BLOCK_K).T
        acc_0 = dot(x_0, b_z, acc_0, INPUT_PRECISION)
        acc_1 = dot(x_1, b_z, acc_1, INPUT_PRECISION)
        acc_2 = dot(x_2, b_z, acc_2, INPUT_PRECISION)
        if BLOCK_N2 > 0:
            b_z2 = z2_desc.load([p, q * K + k0 + BLOCK_N, n0]).reshape(BLOCK_N2, BLOCK_K).T
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


# ------------------------------------------------------------------------------------------------ launch functions


def gradient_by_batch(dz: Tensor) -> Tensor:
    """The gradient (N, K, P, Q) before the activation, copied to (P, Q, K, N rounded up to a multiple of 4)."""
    source = dense_nhwc(dz)
    made = Copy(source, new_by_batch(source.shape, source))
    copy([made])
    return made.out


def pool_gradient_by_batch(dy: Tensor, position: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """:func:`gradient_by_batch` of a convolution with ReLU and a 3 x 3 pool of stride 2, and its sums, (parts, K) in float32.

    Args:
        dy: gradient of the pooled output, (N, K, P, Q).
        position: the pool's window positions, uint8, with the ReLU's mask.
    """
    n, _, _, _, k, _, _, p, q, *_ = problem
    z = new_by_batch((n, p, q, k), dy)
    # 32 filters are 128 bytes of a window's gradient, 64 images 256 bytes of a row of z. Four windows of such a tile take 70
    # registers of a thread of eight warps (compiled for sm_90), so three programs fit on an SM.
    images, filters = (tile_size(n, 16, 64), tile_size(k, 16, 128)) if INTERPRETED else (64 if n > 32 else 32, 32)
    parts = cdiv(p, 2) * cdiv(q, 2) * cdiv(z.shape[3], images)
    sums = new_output((parts, k), torch.float32, dy.device)
    launch(
        _max_pool2d_dgrad_by_batch_kernel,
        (parts * cdiv(k, filters),),
        dy_ptr=dy,
        position_ptr=position,
        z_ptr=z,
        partial_ptr=sums,
        N=n,
        P=p,
        Q=q,
        K=k,
        POOL_P=dy.shape[2],
        POOL_Q=dy.shape[3],
        **strides("stride_dy", "nkpq", dy),
        **strides("stride_p", "nkpq", position),
        NO_GRADIENT=no_gradient(torch.uint8),
        WIDE=needs_int64(z, dy, position, sums),
        BLOCK_IMAGES=images,
        BLOCK_FILTERS=filters,
        num_warps=8,
    )
    return z, sums


def wgrad(z: Tensor, rows: Tensor, dw: Tensor, problem: Problem, vectors: Sequence[ColumnSums] = ()) -> None:
    """Write the weight gradient to ``dw`` (K, C, R, S), any dense strides, and add up the pending sums ``vectors``.

    Args:
        z: :func:`gradient_by_batch` or :func:`pool_gradient_by_batch`.
        rows: :func:`.row_stem.dense_rows` of the input.
    """
    cells = cells_by_batch(rows, problem)
    n, c, _, _, k, r, s, p, q, ((stride, _), *_), _, device, precision = problem
    folded = fold(c, s, stride)
    config = conv2d_rows_wgrad_config(device, n, p, q, folded, k)
    split = config.pop("SPLIT")
    m, n1, n2, images = (config[f"BLOCK_{name}"] for name in ("M", "N", "N2", "K"))
    fold_blocks = cdiv(folded, m)
    height, columns, row = cells.shape
    partial = new_output((split, fold_blocks, 3, m, k), torch.float32, device)
    launch(
        _conv2d_rows_wgrad_kernel,
        (fold_blocks * cdiv(k, n1 + n2), split),
        x_desc=TensorDescriptor(cells, [height, columns, n], [columns * row, row, 1], [1, m, images]),
        z_desc=rows_by_batch(z, n, [1, n1, images]),
        z2_desc=rows_by_batch(z, n, [1, n2 or n1, images]),
        partial_ptr=partial,
        N=n,
        P=p,
        Q=q,
        K=k,
        SPLIT=split,
        USEFUL_POSITIONS=c * r * s,
        DEPTH=stride * stride * c,
        FOLD_BLOCKS=fold_blocks,
        WIDE=needs_int64(partial),
        INPUT_PRECISION=precision,
        **config,
    )
    unfold(partial, dw, stride, vectors)
