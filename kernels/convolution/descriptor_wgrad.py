"""The weight gradient of a convolution through tensor descriptors: see :mod:`kernels.convolution.descriptor`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..primitives import dot, only_if, program_id
from ..runtime.launch import cdiv, launch, needs_int64, new_output
from ..sums import ColumnSums, sum_parts
from .by_batch import rows_by_batch
from .descriptor import dense_nhwc, input_rows, matrix
from .problem import Problem
from .rules import conv2d_by_batch_wgrad_config, conv2d_images_wgrad_config

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def load_images(x_desc, h, n0, o_x, BY_BATCH: tl.constexpr):
    """Load [images, columns] of row ``h``, from image ``n0`` and column ``o_x`` on."""
    if BY_BATCH:
        block = x_desc.load([h, o_x, n0])
        return block.reshape(block.shape[1], block.shape[2]).T
    else:
        block = x_desc.load([h, n0, o_x])
        return block.reshape(block.shape[1], block.shape[2])


@triton.jit
def _conv2d_images_wgrad_kernel(
    z_desc,  # gradient before the activation [N, P*Q*K], blocks [BLOCK_K, BLOCK_M]; BY_BATCH: [P*Q*K, N], transposed blocks
    x_desc,  # input as rows [H, N, W*C], blocks [1, BLOCK_K, BLOCK_N]; BY_BATCH: [H, W*C, N], blocks [1, BLOCK_N, BLOCK_K]
    x2_desc,  # the same with BLOCK_N2 for BLOCK_N
    partial_ptr,  # out: [SPLIT, K, R*S*C] float32
    N,
    H,
    W,
    P,
    Q,
    K,
    SPLIT,
    pad_h,
    pad_w,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    BY_BATCH: tl.constexpr,
    X_CHANNELS: tl.constexpr,  # the input's C
    FOLDED: tl.constexpr,  # C is filter width * X_CHANNELS, and S is 1: a filter row is contiguous in a row of the input
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program sums BLOCK_M filters x BLOCK_N + BLOCK_N2 channels of POSITIONS (1 or 2) filter positions over its split.

    A step of the sum is one pixel of BLOCK_K images. Pixels whose input lies in the padding are skipped. Two positions share
    the gradient's tile.
    """
    pid = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    blocks_m = tl.cdiv(K, BLOCK_M)
    CHUNKS: tl.constexpr = (C + BLOCK_N + BLOCK_N2 - 1) // (BLOCK_N + BLOCK_N2)
    k0 = (pid % blocks_m * BLOCK_M).to(tl.int32)
    c0 = (pid // blocks_m % CHUNKS * (BLOCK_N + BLOCK_N2)).to(tl.int32)
    rs = (pid // blocks_m // CHUNKS * POSITIONS).to(tl.int32)
    r = rs // S
    s = rs % S
    # Output rows and columns whose input is inside the image for one of the positions.
    p_low = tl.maximum(0, pad_h - r)
    p_high = tl.minimum(P, H + pad_h - r)
    q_low = tl.maximum(0, pad_w - s)
    q_high = tl.minimum(Q, W + pad_w - s)
    if FOLDED:  # TMA fills columns outside the image with zeros
        q_low = q_low * 0
        q_high = Q
    if POSITIONS == 2:
        r2 = (rs + 1) // S
        s2 = (rs + 1) % S
        p_low = tl.minimum(p_low, tl.maximum(0, pad_h - r2))
        p_high = tl.maximum(p_high, tl.minimum(P, H + pad_h - r2))
        q_low = tl.minimum(q_low, tl.maximum(0, pad_w - s2))
        q_high = tl.maximum(q_high, tl.minimum(Q, W + pad_w - s2))
    columns = tl.maximum(q_high - q_low, 0)
    blocks_n = tl.cdiv(N, BLOCK_K)
    steps = tl.maximum(p_high - p_low, 0) * columns * blocks_n
    steps_per_split = tl.cdiv(steps, SPLIT)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if BLOCK_N2 > 0:
        acc2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
    if POSITIONS == 2:
        next_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if BLOCK_N2 > 0:
            next_acc2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
    first = (pid_split * steps_per_split).to(tl.int32)
    last = tl.minimum(first + steps_per_split, steps)
    for i in range(first, last):
        n0 = i % blocks_n * BLOCK_K
        q = q_low + i // blocks_n % tl.maximum(columns, 1)
        p = p_low + i // blocks_n // tl.maximum(columns, 1)
        o_z = (p * Q + q) * K + k0
        b_z = z_desc.load([o_z, n0]) if BY_BATCH else z_desc.load([n0, o_z]).T  # [BLOCK_M, BLOCK_K]
        h = p + r - pad_h
        o_x = (q + s - pad_w) * X_CHANNELS + c0
        acc = dot(b_z, load_images(x_desc, h, n0, o_x, BY_BATCH), acc, INPUT_PRECISION)
        if BLOCK_N2 > 0:
            acc2 = dot(b_z, load_images(x2_desc, h, n0, o_x + BLOCK_N, BY_BATCH), acc2, INPUT_PRECISION)
        if POSITIONS == 2:
            h2 = p + r2 - pad_h
            o_x2 = (q + s2 - pad_w) * X_CHANNELS + c0
            next_acc = dot(b_z, load_images(x_desc, h2, n0, o_x2, BY_BATCH), next_acc, INPUT_PRECISION)
            if BLOCK_N2 > 0:
                b_x2 = load_images(x2_desc, h2, n0, o_x2 + BLOCK_N, BY_BATCH)
                next_acc2 = dot(b_z, b_x2, next_acc2, INPUT_PRECISION)

    o_k = pid % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    p_out = partial_ptr + ((pid_split * K + o_k) * (R * S * C) + rs * C + c0)[:, None]
    m_k = (o_k < K)[:, None]
    o_c = tl.arange(0, BLOCK_N)[None, :]
    tl.store(p_out + o_c, acc, mask=m_k & (c0 + o_c < C) if FOLDED else m_k)
    if BLOCK_N2 > 0:
        o_c2 = BLOCK_N + tl.arange(0, BLOCK_N2)[None, :]
        tl.store(p_out + o_c2, acc2, mask=m_k & (c0 + o_c2 < C) if FOLDED else m_k)
    if POSITIONS == 2:
        m_k = only_if(rs + 1 < R * S, m_k)
        tl.store(p_out + C + o_c, next_acc, mask=m_k)
        if BLOCK_N2 > 0:
            tl.store(p_out + C + o_c2, next_acc2, mask=m_k)


# ------------------------------------------------------------------------------------------------- launch function


def operands(
    dz: Tensor, input: Tensor, problem: Problem, by_batch: bool, images: int, filters: int, columns: Sequence[int]
) -> tuple[TensorDescriptor, list[TensorDescriptor]]:
    """Descriptors of the gradient, in blocks of ``images`` x ``filters``, and of the input for each width in ``columns``."""
    n, p, q, k = problem.n, problem.p, problem.q, problem.k
    if by_batch:
        z_desc = TensorDescriptor(dz, [p * q * k, n], [dz.shape[3], 1], [filters, images])
        return z_desc, [rows_by_batch(input, n, [1, width, images]) for width in columns]
    x = dense_nhwc(input)
    return matrix(dense_nhwc(dz), n, [images, filters]), [input_rows(x, images, width) for width in columns]


def wgrad(dz: Tensor, input: Tensor, dw: Tensor, problem: Problem, vectors: Sequence[ColumnSums], by_batch: bool) -> None:
    """Write the weight gradient to ``dw`` (K, C, R, S), any dense strides, and add up the pending sums ``vectors``.

    Args:
        by_batch: whether ``dz`` and ``input`` are copies with the batch innermost (:mod:`.by_batch`), which TF32 needs.
    """
    n, c, h, w, k, r, s, p, q, (_, padding, _, _), dtype, device, precision = problem
    sizes = (n, p, q, c, k, r, s)
    if by_batch:
        config = conv2d_by_batch_wgrad_config(device, *sizes)
    else:
        config = conv2d_images_wgrad_config(device, *sizes, dtype) | {"FOLDED": 0}
    split = config.pop("SPLIT")
    n2 = config["BLOCK_N2"]
    m, images = config["BLOCK_M"], config["BLOCK_K"]
    partial = new_output((split, dw.numel()), torch.float32, device)
    wide = needs_int64(partial)
    if wide:
        config["POSITIONS"] = 1  # int64 offsets and the accumulators of two positions exceed the registers
    folded = s if config["FOLDED"] else 1  # filter columns that are treated as channels
    positions = cdiv(r * s // folded, config["POSITIONS"]) * cdiv(c * folded, config["BLOCK_N"] + n2)
    z_desc, (x_desc, x2_desc) = operands(dz, input, problem, by_batch, images, m, [config["BLOCK_N"], n2 or config["BLOCK_N"]])
    launch(
        _conv2d_images_wgrad_kernel,
        (cdiv(k, m) * positions, split),
        z_desc=z_desc,
        x_desc=x_desc,
        x2_desc=x2_desc,
        partial_ptr=partial,
        N=n,
        H=h,
        W=w,
        P=p,
        Q=q,
        K=k,
        SPLIT=split,
        pad_h=padding[0],
        pad_w=padding[1],
        C=c * folded,
        R=r,
        S=s // folded,
        BY_BATCH=by_batch,
        X_CHANNELS=c,
        WIDE=wide,
        INPUT_PRECISION=precision,
        **config,
    )
    sum_parts(partial, dw, vectors)
