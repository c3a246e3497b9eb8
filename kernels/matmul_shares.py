"""Matrix products by programs that take equal shares of the work ("stream-K"), on Hopper and later.

With one program per tile, 200 tiles keep 132 SMs busy for two rounds, the second of them half empty. Here each of PROGRAMS
programs takes the same number of units, to within one. A unit is a whole tile, or with CUT a step of K of a tile. With CUT a
share may begin and end inside a tile. Sums of such tiles go to memory as float32 parts, which a second kernel adds in the order
of the programs. Shares and order depend on the shape and the configuration alone.

Whole tiles are for products with few steps of K, such as the weight gradient of a small batch. The loop runs over the steps of
all of a program's tiles, so that the next tile's blocks are loading while a tile is stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_rules import matmul_finish_config
from .matmul_descriptor import Operand, load_a, load_b, operand_arguments
from .matmul_finish import Epilogue, bias_relu, finish
from .primitives import cast, dot, dropout_factor, only_if, program_id
from .runtime.launch import cdiv, launch, needs_int64, new_output
from .sums import dropout_scale

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _store_tile(acc, bias_ptr, c_ptr, m0, n0, M, N, stride_cm, stride_cn, HAS_BIAS: tl.constexpr, RELU: tl.constexpr):
    """Apply bias and ReLU to a whole tile and store it."""
    o_m = m0 + tl.arange(0, acc.shape[0])
    o_n = n0 + tl.arange(0, acc.shape[1])
    m_n = (o_n < N)[None, :]
    acc = bias_relu(acc, bias_ptr, o_n[None, :], m_n, HAS_BIAS, RELU)
    p_c = c_ptr + o_m[:, None] * stride_cm + o_n[None, :] * stride_cn
    tl.store(p_c, cast(acc, c_ptr.dtype.element_ty), mask=(o_m < M)[:, None] & m_n)


@triton.jit
def _matmul_shares_kernel(
    a_desc,  # both descriptors: as in _matmul_descriptor_kernel
    b_desc,
    bias_ptr,  # [N], or unused
    c_ptr,  # out: [M, N] through its strides
    part_ptr,  # out: [parts, BLOCK_M, BLOCK_N] float32: a part per share that begins inside a tile, then tiles' first parts
    M,
    N,
    stride_cm,
    stride_cn,
    steps,  # steps of K in a tile
    share,  # units of each program
    longer,  # the first ``longer`` programs have one unit more
    CUT: tl.constexpr,
    FIRST_BY_TILE: tl.constexpr,  # a cut tile's first part is stored at the tile's index, else at its program's
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    B_PANEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c = relu(a @ b + bias). One program computes a share of the BLOCK_M x BLOCK_N tiles or, with CUT, of their K steps."""
    pid = program_id(0, WIDE)
    blocks_m = tl.cdiv(M, BLOCK_M)
    first = pid * share + tl.minimum(pid, longer)
    last = first + share + (pid < longer).to(tl.int32)
    if CUT:
        for tile in range(first // steps, tl.cdiv(last, steps)):
            m0 = tile % blocks_m * BLOCK_M
            n0 = tile // blocks_m * BLOCK_N
            low = tl.maximum(first - tile * steps, 0).to(tl.int32)
            high = tl.minimum(last - tile * steps, steps).to(tl.int32)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for i in range(low, high):
                b_a = load_a(a_desc, m0.to(tl.int32), i * BLOCK_K, A_TRANSPOSED)
                b_b = load_b(b_desc, n0.to(tl.int32), i * BLOCK_K, B_TRANSPOSED, B_PANEL)
                acc = dot(b_a, b_b, acc, INPUT_PRECISION)
            if high - low == steps:
                _store_tile(acc, bias_ptr, c_ptr, m0, n0, M, N, stride_cm, stride_cn, HAS_BIAS, RELU)
            else:
                part = tl.where(low > 0, pid, tl.num_programs(0) + (tile if FIRST_BY_TILE else pid))
                o_e = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
                tl.store(part_ptr + part * (BLOCK_M * BLOCK_N) + o_e, acc)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for i in range(first * steps, last * steps):
            tile = i // steps
            k0 = (i % steps * BLOCK_K).to(tl.int32)
            m0 = tile % blocks_m * BLOCK_M
            n0 = tile // blocks_m * BLOCK_N
            b_a = load_a(a_desc, m0.to(tl.int32), k0, A_TRANSPOSED)
            b_b = load_b(b_desc, n0.to(tl.int32), k0, B_TRANSPOSED, B_PANEL)
            acc = dot(b_a, b_b, acc, INPUT_PRECISION)
            if i % steps == steps - 1:
                _store_tile(acc, bias_ptr, c_ptr, m0, n0, M, N, stride_cm, stride_cn, HAS_BIAS, RELU)
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)


@triton.jit
def _owner(step, share, longer):
    """The program whose share contains ``step``."""
    return tl.where(step < longer * (share + 1), step // (share + 1), (step - longer) // share)


@triton.jit
def _matmul_shares_finish_kernel(
    part_ptr,  # as _matmul_shares_kernel stores them
    bias_ptr,  # [N], or unused
    seed_ptr,  # int64 scalar, or unused
    c_ptr,  # out: [M, N] through its strides; it already holds the whole tiles
    M,
    N,
    stride_cm,
    stride_cn,
    p,  # probability of dropping an output
    scale,  # 1 / (1 - p)
    steps,
    share,
    longer,
    programs,  # of _matmul_shares_kernel
    FIRST_BY_TILE: tl.constexpr,
    PARTS: tl.constexpr,  # the most programs that share one tile
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,  # only with EVERY_TILE
    EVERY_TILE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """c = dropout(relu(the sum of a tile's parts, first to last, + bias)). One program owns BLOCK elements of one tile.

    With EVERY_TILE the programs cover all tiles. Otherwise each share's programs own the tile in which that share ends, if the
    tile also begins in that share, so that each cut tile is owned once.
    """
    pid = program_id(0, WIDE)
    TILE: tl.constexpr = BLOCK_M * BLOCK_N
    CHUNKS: tl.constexpr = TILE // BLOCK
    blocks_m = tl.cdiv(M, BLOCK_M)
    tile = pid // CHUNKS
    if not EVERY_TILE:
        program = pid // CHUNKS
        tile = ((program + 1) * share + tl.minimum(program + 1, longer) - 1) // steps
    o_e = pid % CHUNKS * BLOCK + tl.arange(0, BLOCK)
    o_m = tile % blocks_m * BLOCK_M + o_e // BLOCK_N
    o_n = tile // blocks_m * BLOCK_N + o_e % BLOCK_N
    m_e = (o_m < M) & (o_n < N)
    first = _owner(tile * steps, share, longer)
    last = _owner(tile * steps + steps - 1, share, longer)
    is_cut = first < last
    if not EVERY_TILE:
        is_cut = is_cut & (first == program)
    m_c = only_if(is_cut, m_e)
    # The first program's share ends inside this tile; the other programs' shares begin inside it.
    acc = tl.load(part_ptr + (programs + (tile if FIRST_BY_TILE else first)) * TILE + o_e, mask=m_c, other=0.0)
    for i in tl.static_range(1, PARTS):  # unrolled, so that all loads are issued before the first addition
        acc += tl.load(part_ptr + (first + i) * TILE + o_e, mask=only_if(first + i <= last, m_c), other=0.0)
    acc = bias_relu(acc, bias_ptr, o_n, m_e, HAS_BIAS, RELU)
    p_c = c_ptr + o_m * stride_cm + o_n * stride_cn
    if DROPOUT:
        # Rounded to the output's dtype first, as a separate layer before the dropout would store it and as whole tiles are.
        whole = tl.load(p_c, mask=only_if(first == last, m_e), other=0.0).to(tl.float32)
        acc = tl.where(is_cut, cast(acc, c_ptr.dtype.element_ty).to(tl.float32), whole)
        acc *= dropout_factor(tl.load(seed_ptr), o_m * N + o_n, p, scale)
        m_c = m_e
    tl.store(p_c, cast(acc, c_ptr.dtype.element_ty), mask=m_c)


# ------------------------------------------------------------------------------------------------- launch function


def shares_matmul(
    rows: tuple[Operand, Operand], out: Tensor, products: int, precision: str, config: dict[str, int], epilogue: Epilogue
) -> None:
    """out = dropout(relu(a @ b + bias)) by equal shares.

    Args:
        rows: the operands a and b.
        products: products that are summed for each element, K.
        config: PROGRAMS, CUT, BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages.
    """
    (m, n), block_m, block_n, cut = out.shape, config["BLOCK_M"], config["BLOCK_N"], config["CUT"]
    tiles, steps = cdiv(m, block_m) * cdiv(n, block_n), cdiv(products, config["BLOCK_K"])
    units = tiles * steps if cut else tiles
    programs = min(config.pop("PROGRAMS"), units)
    share, longer = divmod(units, programs)
    # One part for each share that begins inside a tile, and one for each cut tile's first part: a share contains the beginning
    # of at most one tile whose end it does not contain.
    parts = new_output((programs + min(tiles, programs), block_m, block_n), torch.float32, out.device) if cut else None
    shared: dict[str, Any] = {
        "c_ptr": out,
        "part_ptr": out if parts is None else parts,
        "M": m,
        "N": n,
        "stride_cm": out.stride(0),
        "stride_cn": out.stride(1),
        "steps": steps,
        "share": share,
        "longer": longer,
        "FIRST_BY_TILE": bool(cut) and tiles <= programs,
        "WIDE": needs_int64(*(operand.matrix for operand in rows), out, parts),
    }
    launch(
        _matmul_shares_kernel,
        (programs,),
        **operand_arguments(rows, config),
        INPUT_PRECISION=precision,
        **epilogue.bias_relu(True, out),
        **shared,
        **config,
    )
    if parts is None:
        if epilogue.seed is not None:
            finish(out, None, epilogue)
        return
    tile = block_m * block_n
    every_tile = tiles <= programs or epilogue.seed is not None
    finish_config = matmul_finish_config(out.numel())
    finish_config["BLOCK"] = min(finish_config["BLOCK"], tile)
    launch(
        _matmul_shares_finish_kernel,
        ((tiles if every_tile else programs) * (tile // finish_config["BLOCK"]),),
        seed_ptr=out if epilogue.seed is None else epilogue.seed,
        p=float(epilogue.p),
        scale=dropout_scale(epilogue.p),
        programs=programs,
        PARTS=min(cdiv(steps - 1, share) + 1, programs),
        DROPOUT=epilogue.seed is not None,
        EVERY_TILE=every_tile,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        **epilogue.bias_relu(True, out),
        **shared,
        **finish_config,
    )
