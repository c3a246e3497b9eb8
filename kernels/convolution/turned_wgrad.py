"""The weight gradient in TF32 without a copy of the output's gradient, whose blocks are transposed in registers.

:mod:`kernels.convolution.descriptor_wgrad` reads copies of both operands with the batch innermost; this kernel reads a copy of
the input only. It is for output gradients whose copy would take too much memory. The tensor cores wait longer for shared
memory here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import dot, program_id
from ..runtime.launch import cdiv, launch, needs_int64, new_output
from ..sums import ColumnSums, sum_parts
from .by_batch import images_5d, others_5d, rows_by_batch, turned
from .descriptor import dense_nhwc
from .problem import Problem
from .rules import conv2d_turned_wgrad_config


@triton.jit
def _conv2d_turned_wgrad_kernel(
    x_desc,  # input as rows [H, W*C, N], blocks [1, BLOCK_M, BLOCK_K]
    z_ptr,  # gradient before the activation [N, P, Q, K] contiguous
    partial_ptr,  # out: [SPLIT, K, R*COLUMNS] float32
    N,
    H,
    P,
    Q,
    K,
    SPLIT,
    pad_h,
    pad_w,
    C: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,  # S * C, contiguous in a row of the input
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program sums BLOCK_M columns of a filter row x BLOCK_N filters over its split.

    A step of the sum is one pixel of BLOCK_K images.
    """
    pid = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    BLOCKS_M: tl.constexpr = (COLUMNS + BLOCK_M - 1) // BLOCK_M
    j0 = (pid % BLOCKS_M * BLOCK_M).to(tl.int32)
    r = (pid // BLOCKS_M % R).to(tl.int32)
    k0 = (pid // BLOCKS_M // R * BLOCK_N).to(tl.int32)
    # Output rows whose input is inside the image.
    p_low = tl.maximum(0, pad_h - r)
    p_high = tl.minimum(P, H + pad_h - r)
    blocks_n = tl.cdiv(N, BLOCK_K)
    steps = tl.maximum(p_high - p_low, 0) * Q * blocks_n
    steps_per_split = tl.cdiv(steps, SPLIT)
    first = (pid_split * steps_per_split).to(tl.int32)
    o_k = others_5d(k0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(first, tl.minimum(first + steps_per_split, steps)):
        n0 = i % blocks_n * BLOCK_K
        q = i // blocks_n % Q
        p = p_low + i // blocks_n // Q
        o_n = images_5d(n0, BLOCK_K)
        if WIDE:
            o_n = o_n.to(tl.int64)
        b_x = x_desc.load([p + r - pad_h, (q - pad_w) * C + j0, n0]).reshape(BLOCK_M, BLOCK_K)
        b_z = tl.load(z_ptr + ((o_n * P + p) * Q + q) * K + o_k, mask=(o_n < N) & (o_k < K), other=0.0)
        acc = dot(b_x, turned(b_z, BLOCK_K, BLOCK_N).T, acc, INPUT_PRECISION)
    o_j = j0 + tl.arange(0, BLOCK_M)
    o_row = pid_split * K + k0 + tl.arange(0, BLOCK_N)
    p_out = partial_ptr + (o_row * (R * COLUMNS) + r * COLUMNS)[:, None] + o_j[None, :]
    tl.store(p_out, acc.T, mask=(k0 + tl.arange(0, BLOCK_N) < K)[:, None] & (o_j < COLUMNS)[None, :])


def wgrad(dz: Tensor, by_batch: Tensor, dw: Tensor, problem: Problem, vectors: Sequence[ColumnSums]) -> None:
    """Write the weight gradient to ``dw`` (K, C, R, S), any dense strides, and add up the pending sums ``vectors``.

    Args:
        dz: gradient before the activation, (N, K, P, Q).
        by_batch: the copy of the input with the batch innermost (:mod:`.by_batch`).
    """
    n, c, h, _, k, r, s, p, q, (_, padding, _, _), _, device, precision = problem
    config = conv2d_turned_wgrad_config(device, n, p, q, c, k, r, s)
    split = config.pop("SPLIT")
    z = dense_nhwc(dz)
    partial = new_output((split, dw.numel()), torch.float32, device)
    launch(
        _conv2d_turned_wgrad_kernel,
        (cdiv(s * c, config["BLOCK_M"]) * r * cdiv(k, config["BLOCK_N"]), split),
        x_desc=rows_by_batch(by_batch, n, [1, config["BLOCK_M"], config["BLOCK_K"]]),
        z_ptr=z,
        partial_ptr=partial,
        N=n,
        H=h,
        P=p,
        Q=q,
        K=k,
        SPLIT=split,
        pad_h=padding[0],
        pad_w=padding[1],
        C=c,
        R=r,
        COLUMNS=s * c,
        WIDE=needs_int64(z, partial),
        INPUT_PRECISION=precision,
        **config,
    )
    sum_parts(partial, dw, vectors)
