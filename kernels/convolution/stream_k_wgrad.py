"""The weight gradient of a convolution in equal shares ("stream-K"), so that no SM is idle.

A weight has few tiles: 384 filters of 256 x 3 x 3 have 27 tiles of 128 x 256, and an H100 has 132 SMs. Splitting each tile into
the same number of parts (:mod:`.descriptor_wgrad`) leaves SMs idle. Here the steps of all tiles form one sequence, and each
program takes an equal share of the sequence. A tile has one more part for each share that ends inside it. A second launch adds
up a tile's parts from first to last, so results are bit-identical from run to run. Published as stream-K by Osama, Merrill,
Cecka, Garland and Owens, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import cast, dot, program_id
from ..runtime.launch import cdiv, launch, needs_int64, new_output, strides
from ..sums import ColumnSums, sum_columns, sum_over_parts, sum_parts_config, vector_arguments
from .descriptor_wgrad import load_images, operands
from .problem import Problem
from .rules import conv2d_stream_k_wgrad_config

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _meeting(r, P, H, pad, ALL: tl.constexpr):
    """First output row, and number of output rows, for which filter row ``r`` meets the input; with ALL all output rows."""
    low = tl.maximum(0, pad - r)
    count = tl.maximum(tl.minimum(P, H + pad - r) - low, 0)
    if ALL:
        low *= 0
        count = count * 0 + P
    return low, count


@triton.jit
def _steps_of(rs, P, H, pad_h, Q, W, pad_w, blocks_n, S: tl.constexpr, FOLDED: tl.constexpr):
    """First output row, first output column, number of columns and number of steps of a tile at filter position ``rs``."""
    p_low, rows = _meeting(rs // S, P, H, pad_h, False)
    q_low, columns = _meeting(rs % S, Q, W, pad_w, FOLDED)
    return p_low, q_low, columns, rows * columns * blocks_n


@triton.jit
def _first_step(rs_end, tiles, zero, P, H, pad_h, Q, W, pad_w, blocks_n, S: tl.constexpr, FOLDED: tl.constexpr):
    """Number of steps of the filter positions before ``rs_end``, each with ``tiles`` tiles."""
    total = zero
    for rs in range(rs_end):
        total += _steps_of(rs, P, H, pad_h, Q, W, pad_w, blocks_n, S, FOLDED)[3] * tiles
    return total


@triton.jit
def _tile_at(step, tiles, zero, P, H, pad_h, Q, W, pad_w, blocks_n, R: tl.constexpr, S: tl.constexpr, FOLDED: tl.constexpr):
    """Index of the tile to which ``step`` of the sequence of all steps belongs."""
    tile = zero
    start = zero
    for rs in range(R * S):
        steps = _steps_of(rs, P, H, pad_h, Q, W, pad_w, blocks_n, S, FOLDED)[3]
        end = start + steps * tiles
        tile = tl.where((step >= start) & (step < end), rs * tiles + (step - start) // tl.maximum(steps, 1), tile)
        start = end
    return tile


@triton.jit
def _conv2d_stream_k_wgrad_kernel(
    z_desc,  # gradient before the activation [N, P*Q*K], blocks [BLOCK_K, BLOCK_M]; BY_BATCH: [P*Q*K, N], transposed blocks
    x_desc,  # input as rows [H, N, W*C], blocks [1, BLOCK_K, BLOCK_N]; BY_BATCH: [H, W*C, N], blocks [1, BLOCK_N, BLOCK_K]
    x2_desc,  # the same with BLOCK_N2 for BLOCK_N
    # out: [programs + tiles - 1, BLOCK_M, BLOCK_N + BLOCK_N2] float32. A program's part of a tile has index program + tile. The
    # index is unique: from one part to the next in the sequence of steps, the program, the tile or both grow by one.
    partial_ptr,
    N,
    H,
    W,
    P,
    Q,
    K,
    SHARE,  # steps of one program
    STEPS,  # steps of all tiles
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes SHARE steps of tiles of BLOCK_M filters x (BLOCK_N + BLOCK_N2) channels.

    They may be the end of one tile, whole tiles and the start of another. A step of the sum is one pixel of BLOCK_K images.
    Pixels whose input lies in the padding are skipped.
    """
    pid = program_id(0, WIDE)
    blocks_m = tl.cdiv(K, BLOCK_M)
    COLUMNS: tl.constexpr = BLOCK_N + BLOCK_N2
    CHUNKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    tiles = blocks_m * CHUNKS
    blocks_n = tl.cdiv(N, BLOCK_K)
    zero = pid * 0
    first = pid * SHARE
    last = tl.minimum(first + SHARE, STEPS)
    first_tile = _tile_at(first, tiles, zero, P, H, pad_h, Q, W, pad_w, blocks_n, R, S, FOLDED)
    last_tile = _tile_at(last - 1, tiles, zero, P, H, pad_h, Q, W, pad_w, blocks_n, R, S, FOLDED)
    o_tile = tl.arange(0, BLOCK_M)[:, None] * COLUMNS + tl.arange(0, BLOCK_N)[None, :]
    if BLOCK_N2 > 0:
        o_tile2 = tl.arange(0, BLOCK_M)[:, None] * COLUMNS + BLOCK_N + tl.arange(0, BLOCK_N2)[None, :]
    for tile in range(first_tile, last_tile + 1):
        rs = tile // tiles
        r = (rs // S).to(tl.int32)
        s = (rs % S).to(tl.int32)
        k0 = (tile % blocks_m * BLOCK_M).to(tl.int32)
        c0 = (tile // blocks_m % CHUNKS * COLUMNS).to(tl.int32)
        p_low, q_low, columns, steps = _steps_of(rs, P, H, pad_h, Q, W, pad_w, blocks_n, S, FOLDED)
        start = _first_step(rs, tiles, zero, P, H, pad_h, Q, W, pad_w, blocks_n, S, FOLDED) + tile % tiles * steps
        low = tl.maximum(first - start, 0).to(tl.int32)
        high = tl.minimum(last - start, steps).to(tl.int32)
        p_low = p_low.to(tl.int32)
        q_low = q_low.to(tl.int32)
        columns = tl.maximum(columns, 1).to(tl.int32)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if BLOCK_N2 > 0:
            acc2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
        for i in range(low, high):
            n0 = i % blocks_n * BLOCK_K
            q = q_low + i // blocks_n % columns
            p = p_low + i // blocks_n // columns
            o_z = (p * Q + q) * K + k0
            b_z = z_desc.load([o_z, n0]) if BY_BATCH else z_desc.load([n0, o_z]).T  # [BLOCK_M, BLOCK_K]
            h = p + r - pad_h
            o_x = (q + s - pad_w) * X_CHANNELS + c0
            acc = dot(b_z, load_images(x_desc, h, n0, o_x, BY_BATCH), acc, INPUT_PRECISION)
            if BLOCK_N2 > 0:
                acc2 = dot(b_z, load_images(x2_desc, h, n0, o_x + BLOCK_N, BY_BATCH), acc2, INPUT_PRECISION)
        p_part = partial_ptr + (pid + tile) * (BLOCK_M * COLUMNS)
        tl.store(p_part + o_tile, acc)
        if BLOCK_N2 > 0:
            tl.store(p_part + o_tile2, acc2)


@triton.jit
def _sum_stream_k_kernel(
    partial_ptr,  # as _conv2d_stream_k_wgrad_kernel writes it
    out_ptr,  # out: [K, X_CHANNELS, R, S * (C / X_CHANNELS)] through its strides
    N,
    H,
    W,
    P,
    Q,
    K,
    SHARE,
    pad_h,
    pad_w,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    vector_partial_ptrs,  # pending sums that the same launch adds up, see sum_columns; or None
    vector_out_ptrs,
    vector_parts,
    vector_columns,
    vector_first_blocks,
    HAS_VECTORS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    X_CHANNELS: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,  # BLOCK_N + BLOCK_N2
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_COLUMN_PARTS: tl.constexpr,
):
    """One program adds up the parts of BLOCK elements of one tile; programs after the last tile add up the pending sums."""
    pid = program_id(0, WIDE)
    TILE: tl.constexpr = BLOCK_M * COLUMNS
    blocks_m = tl.cdiv(K, BLOCK_M)
    CHUNKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    tiles = blocks_m * CHUNKS
    if pid < R * S * tiles * (TILE // BLOCK):
        blocks_n = tl.cdiv(N, BLOCK_K)
        tile = pid // (TILE // BLOCK)
        rs = tile // tiles
        steps = _steps_of(rs, P, H, pad_h, Q, W, pad_w, blocks_n, S, FOLDED)[3]
        start = _first_step(rs, tiles, pid * 0, P, H, pad_h, Q, W, pad_w, blocks_n, S, FOLDED) + tile % tiles * steps
        # A filter position that only meets padding has no steps and no parts.
        parts = tl.where(steps > 0, (start + steps - 1) // SHARE - start // SHARE + 1, 0)
        o_e = pid % (TILE // BLOCK) * BLOCK + tl.arange(0, BLOCK)
        o_k = tile % blocks_m * BLOCK_M + o_e // COLUMNS
        o_c = tile // blocks_m % CHUNKS * COLUMNS + o_e % COLUMNS
        m_e = (o_k < K) & (o_c < C)
        p_partial = partial_ptr + (start // SHARE + tile) * TILE + o_e
        b_total = sum_over_parts(p_partial, TILE, parts, m_e, WIDE, tl.float32, BLOCK, BLOCK_PARTS)
        o_s = rs % S + o_c // X_CHANNELS
        p_out = out_ptr + o_k * stride_k + o_c % X_CHANNELS * stride_c + rs // S * stride_r + o_s * stride_s
        tl.store(p_out, cast(b_total, out_ptr.dtype.element_ty), mask=m_e)
    elif HAS_VECTORS:
        sum_columns(
            pid, vector_partial_ptrs, vector_out_ptrs, vector_parts, vector_columns, vector_first_blocks, tl.float32,
            BLOCK_COLUMNS, BLOCK_COLUMN_PARTS,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- launch function


def wgrad(dz: Tensor, input: Tensor, dw: Tensor, problem: Problem, vectors: Sequence[ColumnSums], by_batch: bool) -> None:
    """Arguments as :func:`.descriptor_wgrad.wgrad`."""
    n, c, h, w, k, r, s, p, q, (_, (pad_h, pad_w), _, _), dtype, device, precision = problem
    config = conv2d_stream_k_wgrad_config(device, n, p, q, c, k, r, s, dtype)
    programs = config.pop("PROGRAMS")
    block_m, block_n, block_n2, images = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_N2"], config["BLOCK_K"]
    folded = s if config["FOLDED"] else 1  # filter columns that are treated as channels
    tiles = cdiv(k, block_m) * cdiv(c * folded, block_n + block_n2)  # at one filter position
    rows = [_meets(i, p, h, pad_h) for i in range(r)]
    columns = [q] if config["FOLDED"] else [_meets(i, q, w, pad_w) for i in range(s)]
    steps = sum(rows) * sum(columns) * cdiv(n, images) * tiles
    share = max(1, cdiv(steps, programs))
    programs = max(1, cdiv(steps, share))
    tiles *= r * (s // folded)
    z_desc, (x_desc, x2_desc) = operands(dz, input, problem, by_batch, images, block_m, [block_n, block_n2 or block_n])
    partial = new_output((programs + tiles - 1, block_m, block_n + block_n2), torch.float32, device)
    shared = {
        "partial_ptr": partial,
        "N": n,
        "H": h,
        "W": w,
        "P": p,
        "Q": q,
        "K": k,
        "SHARE": share,
        "pad_h": pad_h,
        "pad_w": pad_w,
        "C": c * folded,
        "R": r,
        "S": s // folded,
        "X_CHANNELS": c,
        "WIDE": needs_int64(partial, dw) or steps + share >= 2**31,
    }
    launch(
        _conv2d_stream_k_wgrad_kernel,
        (programs,),
        z_desc=z_desc,
        x_desc=x_desc,
        x2_desc=x2_desc,
        STEPS=steps,
        BY_BATCH=by_batch,
        INPUT_PRECISION=precision,
        **shared,
        **config,
    )
    elements = tiles * block_m * (block_n + block_n2)
    sums = sum_parts_config(cdiv(programs, tiles) + 1, elements)
    sums["BLOCK"] = min(sums["BLOCK"], block_m * (block_n2 or block_n))  # a power of 2, which divides a tile
    vector_values, blocks = vector_arguments(vectors, elements // sums["BLOCK"])
    launch(
        _sum_stream_k_kernel,
        (blocks,),
        out_ptr=dw,
        **strides("stride_", "kcrs", dw),
        **shared,
        FOLDED=config["FOLDED"],
        BLOCK_M=block_m,
        COLUMNS=block_n + block_n2,
        BLOCK_K=images,
        **vector_values,
        **sums,
    )


def _meets(r: int, p: int, h: int, pad: int) -> int:
    """Number of the ``p`` output rows for which filter row ``r`` meets one of the ``h`` rows of the input."""
    return max(0, min(p, h + pad - r) - max(0, pad - r))
