"""Rules for tile sizes, splits, warps and stages of a linear layer's matrix products, based on estimated times.

A configuration measured on the GPU (:mod:`kernels.configs.tables`) takes precedence over the rules.
"""

from __future__ import annotations

import functools
import itertools

import torch

from .configs.tables import MULTIPROCESSORS, SHARED_BYTES, apply_overrides, known, tile_size, tuned
from .convolution.rules import matmul_config
from .runtime.backend import INTERPRETED, capability
from .runtime.launch import cdiv, next_power_of_2

#: Per microsecond: an H100 SM's FLOPs on the tensor cores (what published matrix kernels reach), its bytes from the L2 cache
#: (assumed), and the whole GPU's bytes from memory.
_FLOPS_US, _L2_BYTES_US, _MEMORY_BYTES_US = 5.2e6, 6e4, 3.0e6
#: 32-bit registers of an H100 SM.
_REGISTERS = 65536
#: Cycles of an H100 SM per microsecond, and cycles (assumed) that a step of an FMA product waits for its operands.
_CYCLES_US, _STEP_CYCLES = 1755, 150
#: Microseconds from requesting a block of memory to its arrival, and for starting and ending a program.
_LATENCY_US, _PROGRAM_US = 1.5, 1.7


#: One program per tile and part of a split; no equal shares.
_TILES = {"PROGRAMS": 0, "CUT": 0}


def linear_key(pass_: str, m: int, n: int, k: int, dtype: torch.dtype, input_precision: str) -> str:
    """Key of a linear layer's pass in the tables: m x n outputs of k products each. Both half types share one key."""
    precision = {"tf32": " tf32", "ieee": " float32"}[input_precision] if dtype == torch.float32 else ""
    return f"linear_{pass_} m{m} n{n} k{k}{precision}"


def linear_candidates(m: int, n: int, k: int, itemsize: int) -> list[dict[str, int]]:
    """Configurations of the descriptor kernel that are worth measuring for M x N outputs of K products each.

    A block of K is 128 bytes of a row, the most that shared memory holds without bank conflicts. Hopper's tensor cores need at
    least 64 rows.
    """
    block_k = 128 // itemsize
    steps = cdiv(k, block_k)
    found = []
    for block_m, block_n in itertools.product((64, 128, 256), (16, 32, 64, 128, 256)):
        if (block_m > 64 and block_m >= 2 * m) or (block_n > 16 and block_n >= 2 * n):
            continue
        if block_n < 64 and block_n < n:  # narrow blocks are for narrow matrices
            continue
        tiles = cdiv(m, block_m) * cdiv(n, block_n)
        splits = {cdiv(steps, cdiv(steps, s)) for s in _splits(tiles, steps)}
        for warps, stages, split in itertools.product((4, 8), (2, 3, 4, 5, 6), sorted(splits)):
            accumulators = block_m * block_n // (32 * warps)
            if accumulators > 128 or block_m < 16 * warps or stages > max(2, cdiv(steps, split)):
                continue
            # Shared memory for the stages, with a margin of 2 KiB.
            if stages * (block_m + block_n) * block_k * itemsize > SHARED_BYTES - 2048:
                continue
            values = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split}
            found.append(values | _TILES | {"num_warps": warps, "num_stages": stages})
    return found + _shares_candidates(m, n, k, itemsize)


def _shares_candidates(m: int, n: int, k: int, itemsize: int) -> list[dict[str, int]]:
    """Candidates with equal shares, for one or two programs per SM, with as many stages as shared memory holds.

    In the loop over whole tiles, the tile being stored has its own shared memory. A block of K of two 128-byte rows is for a K
    that fits into one such block. Whole tiles are for at least two tiles per program, cut tiles for at least four steps per
    program.
    """
    row = 128 // itemsize
    found = []
    for (block_m, block_n), block_k, held, cut in itertools.product(
        ((128, 64), (128, 128), (128, 256), (256, 128)), (row, 2 * row), (1, 2), (0, 1)
    ):
        tiles, steps, programs = cdiv(m, block_m) * cdiv(n, block_n), cdiv(k, block_k), held * MULTIPROCESSORS
        if block_m >= 2 * m or block_n >= 2 * n or (block_k > row and (cut or k > block_k)):
            continue
        if tiles * steps < 4 * programs if cut else tiles < 2 * programs:
            continue
        tile = block_m * block_n * itemsize
        stages = min(6, (SHARED_BYTES // held - 2048 - (0 if cut else tile)) // ((block_m + block_n) * block_k * itemsize))
        if itemsize == 4:
            # Exclude the TF32 configurations of which some spilled registers as compiled for a B200.
            stages = min(stages, 5)
            if cut and block_m * block_n > 128 * 64:
                continue
        # With TF32's smallest tile, whole tiles and a single step, eight warps spill as compiled by Triton 3.9 for a B200.
        four = itemsize == 4 and not cut and steps == 1 and block_m * block_n == 128 * 64
        for warps in (4,) if four else (4, 8):
            threads = 32 * warps
            if stages < 2 or block_m * block_n > 128 * threads or held * _registers(block_m * block_n, threads) > _REGISTERS:
                continue
            values = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": 1}
            found.append(values | {"PROGRAMS": programs, "CUT": cut, "num_warps": warps, "num_stages": stages})
    return found


def _registers(accumulators: int, threads: int) -> int:
    """Approximate number of registers of a descriptor kernel's program."""
    return accumulators + 48 * threads


def _splits(tiles: int, steps: int) -> list[int]:
    """Splits that give up to two programs per SM; a part of less than two steps is not worth starting a program."""
    most = max(1, min(2 * MULTIPROCESSORS // tiles, steps // 2))
    return [s for s in range(1, most + 1) if s in (1, most) or s * tiles >= MULTIPROCESSORS // 3]


def _linear_us(m: int, n: int, k: int, itemsize: int, config: dict[str, int]) -> float:
    """Estimated microseconds on an H100. The estimate ranks candidates; only a measurement tells which is fastest."""
    block_m, block_n, block_k = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    split, shares, cut = config["SPLIT"], config["PROGRAMS"], config["CUT"]
    tiles, steps = cdiv(m, block_m) * cdiv(n, block_n), cdiv(cdiv(k, block_k), split)
    threads = 32 * config["num_warps"]
    step_bytes = (block_m + block_n) * block_k * itemsize
    by_registers = _REGISTERS // _registers(block_m * block_n, threads)
    held = max(1, min(by_registers, SHARED_BYTES // (config["num_stages"] * step_bytes)))
    programs = shares or tiles * split
    rounds = cdiv(programs, MULTIPROCESSORS)  # programs of the busiest SM
    at_once = min(held, rounds)
    step_us = max(
        block_m * block_n * block_k * itemsize / _FLOPS_US,  # TF32 has half the rate of the half types
        step_bytes / _L2_BYTES_US,
        _LATENCY_US / (config["num_stages"] - 1) / at_once,
    )
    store_us = block_m * block_n * itemsize / _L2_BYTES_US
    # Steps of the busiest SM, and its number of tiles whose start and end do not overlap with another tile's steps.
    if cut:
        share = cdiv(tiles * steps, shares)
        busiest, exposed = rounds * share, share / steps + 1
    elif shares:
        step_us = max(step_us, store_us / steps)
        busiest, exposed = rounds * cdiv(tiles, shares) * steps, 1.0
    else:
        busiest, exposed = rounds * steps, float(cdiv(rounds, held))
    compute_us = busiest * step_us + exposed * (_PROGRAM_US + store_us)
    moved = (m * k + k * n + m * n) * itemsize
    memory_us = moved / _MEMORY_BYTES_US / min(1.0, programs / MULTIPROCESSORS)
    # Compute and memory traffic overlap, but not completely.
    return max(compute_us, memory_us) + 0.25 * min(compute_us, memory_us) + _parts_us(_parts(m, n, config))


def _parts(m: int, n: int, config: dict[str, int]) -> int:
    """Number of elements in all parts that a second kernel adds."""
    if config.get("CUT"):
        block_m, block_n, shares = config["BLOCK_M"], config["BLOCK_N"], config["PROGRAMS"]
        # Two parts per share boundary; where shares are shorter than tiles, one part per share and one per tile.
        return (shares + min(cdiv(m, block_m) * cdiv(n, block_n), shares)) * block_m * block_n
    return config["SPLIT"] * m * n if config["SPLIT"] > 1 else 0


def _parts_us(parts: int) -> float:
    """Microseconds to write and read ``parts`` float32 elements, mostly in the L2 cache, and for one more launch."""
    return 2.0 + 2 * parts * 4 / (1.5 * _MEMORY_BYTES_US) if parts else 0.0


def _parts_factor(m: int, n: int, k: int, parts: int) -> float:
    """Factor on the less certain estimate of a float32 product: 1 percent more bytes must save 1 percent of the time."""
    return 1 + 2 * parts / (m * k + k * n + m * n)


@functools.lru_cache(maxsize=1024)
def _linear_rule(m: int, n: int, k: int, itemsize: int) -> dict[str, int]:
    def cost(config: dict[str, int]) -> tuple[float, int, int]:
        # Among equals prefer more warps, which share the epilogue, and more stages, which hide the latency of memory.
        us = _linear_us(m, n, k, itemsize, config)
        if itemsize == 4:
            us *= _parts_factor(m, n, k, _parts(m, n, config))
        return round(us, 1), -config["num_warps"], -config["num_stages"]

    return min(linear_candidates(m, n, k, itemsize), key=cost)


def _fma_layout(block_m: int, block_n: int, warps: int) -> tuple[int, int, int, int]:
    """(lanes of a warp along N, along M, columns of a thread, its rows): how Triton distributes an FMA product's tile.

    A thread has blocks of 4 x 4 elements, repeated until the tile is covered (2 x 2 in a tile of less than 16 elements per
    thread). Lanes, then warps, are placed along N first.
    """
    width = 4 if block_m * block_n >= 16 * 32 * warps else 2
    lanes_n = min(32, block_n // width)
    lanes_m = 32 // lanes_n
    warps_n = min(warps, max(1, block_n // (width * lanes_n)))
    columns, rows = block_n // (lanes_n * warps_n), block_m // (lanes_m * (warps // warps_n))
    return lanes_n, lanes_m, max(width, columns), max(width, rows)


def fma_candidates(m: int, n: int, k: int) -> list[dict[str, int]]:
    """Configurations of the pointer kernel that are worth measuring for an exact float32 product, M x N x K.

    A thread keeps 16 to 64 sums: with fewer, reads of shared memory outnumber multiplications; more do not fit in registers. 4
    sums are enough for a narrow product, which is bound by memory. Excluded are tiles of which some spilled registers as
    compiled for an A100, H100 or B200: more than 16 sums with 2 warps or in steps of 16; more rows than columns; 16 sums with 8
    warps or in a single step of 32; 32 sums with 4 warps (on a B200, and with Triton 3.9 on an H100).
    """
    found = []
    for block_m, block_n, warps in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (2, 4, 8)):
        sums = block_m * block_n // (32 * warps)
        *_, columns, rows = _fma_layout(block_m, block_n, warps)
        if (block_m > 16 and block_m >= 2 * m) or (block_n > 16 and block_n >= 2 * n) or columns * rows != sums:
            continue
        if not (4 if min(m, n) <= 16 else 16) <= sums <= (64 if warps > 2 else 16) or (sums > 8 and block_m > block_n):
            continue
        if (warps == 8 and sums <= 16) or (warps == 4 and sums == 32):
            continue
        tiles = cdiv(m, block_m) * cdiv(n, block_n)
        for block_k, stages in itertools.product((16, 32), (3, 4)):
            if stages * (block_m + block_n) * block_k * 4 > 96 * 1024 or (block_k > 16 and block_k >= 2 * k):
                continue
            steps = cdiv(k, block_k)
            if (sums > 16 and block_k == 16) or (sums == 16 and block_k > 16 and steps == 1) or (stages > 3 and steps < stages):
                continue
            for split in sorted({cdiv(steps, cdiv(steps, s)) for s in _splits(tiles, steps)}):
                values = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split}
                found.append(values | {"num_warps": warps, "num_stages": stages})
    return found


def _fma_us(m: int, n: int, k: int, rows_along_k: bool, config: dict[str, int]) -> float:
    """Estimated microseconds of an exact float32 product on an H100; ``rows_along_k``: whether K runs along the rows of a.

    Per cycle an SM multiplies 128 pairs and reads 128 bytes of shared memory. In a step of K, one warp reads its rows of a and
    its columns of b in groups of 4 floats. Along the columns, a group is 4 columns of one k, and 8 lanes read at once. Along
    the rows, a group is 4 k of one row; lanes with different rows conflict, because their rows lie in the same bank.
    """
    block_m, block_n, block_k, split = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT"))
    warps = config["num_warps"]
    lanes_n, lanes_m, columns, rows = _fma_layout(block_m, block_n, warps)
    reads = warps * (rows / 4 * (lanes_m if rows_along_k else cdiv(lanes_m, 8)) + columns / 4 * cdiv(lanes_n, 8))
    programs = cdiv(m, block_m) * cdiv(n, block_n) * split
    steps = cdiv(cdiv(k, block_k), split)
    rounds = cdiv(programs, MULTIPROCESSORS)
    registers = 48 + 2 * rows * columns  # approximately, as compiled
    step_bytes = (block_m + block_n) * block_k * 4
    held = min(
        _REGISTERS // (32 * warps * registers), SHARED_BYTES // (config["num_stages"] * step_bytes), 2048 // (32 * warps)
    )
    at_once = min(held, rounds)
    # Each of an SM's four schedulers issues one instruction per cycle: FMAs and reads.
    issued = (rows * columns + rows / 4 + columns / 4) * max(warps / 4, 1 / at_once)
    busy = block_k * max(block_m * block_n / 128, reads, issued)
    from_l2 = step_bytes / _L2_BYTES_US * _CYCLES_US
    # While a step waits for its operands, the SM's other programs multiply. Compute and L2 reads overlap, but not completely.
    step = max(busy, from_l2, (busy + _STEP_CYCLES) / at_once) + 0.25 * min(busy, from_l2)
    compute_us = rounds * steps * step / _CYCLES_US + cdiv(rounds, held) * _PROGRAM_US
    memory_us = (m * k + k * n + m * n) * 4 / _MEMORY_BYTES_US / min(1.0, programs / MULTIPROCESSORS)
    return max(compute_us, memory_us) + 0.25 * min(compute_us, memory_us) + _parts_us(_parts(m, n, config))


@functools.lru_cache(maxsize=1024)
def _fma_rule(m: int, n: int, k: int, rows_along_k: bool) -> dict[str, int]:
    def cost(config: dict[str, int]) -> tuple[float, int, int, int]:
        us = _fma_us(m, n, k, rows_along_k, config) * _parts_factor(m, n, k, _parts(m, n, config))
        # Among equals prefer fewer parts, longer steps, which wait less often, and more stages.
        return round(us, 1), config["SPLIT"], -config["BLOCK_K"], -config["num_stages"]

    return min(fma_candidates(m, n, k), key=cost)


def _linear_pointer_rule(m: int, n: int, k: int, dtype: torch.dtype, precision: str) -> dict[str, int]:
    """Tiles of the pointer kernel on tensor cores, and a split for one or two programs per SM of at least four steps each."""
    if dtype == torch.float32:
        config = {"BLOCK_M": 64, "BLOCK_N": tile_size(n, 16, 64), "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
    else:
        config = matmul_config(m, n, k, dtype, precision)
    config["BLOCK_K"] = min(config["BLOCK_K"], tile_size(k, 16, 128))
    steps = cdiv(k, config["BLOCK_K"])

    def tiles() -> int:
        return cdiv(m, config["BLOCK_M"]) * cdiv(n, config["BLOCK_N"])

    while tiles() * max(1, steps // 4) < MULTIPROCESSORS and config["BLOCK_N"] > 32:  # K is too short to split: smaller tiles
        config["BLOCK_N"] //= 2
    if config["BLOCK_M"] * config["BLOCK_N"] < 128 * 32 and dtype != torch.float32:
        config["num_warps"] = 4
    return config | {"SPLIT": max(1, min(2 * MULTIPROCESSORS // max(tiles(), 1), steps // 4))}


#: The most outputs and rows of a layer that the kernels for few outputs take. The limit on rows is that of a bias gradient
#: summed by one program (:func:`kernels.sums.column_sum_split`); more rows are left to the programs of a matrix product.
NARROW_OUTPUTS, _NARROW_ROWS = 32, 512
#: The most bytes that a program of the forward pass reads: 4.4 us from the L2 cache, the cost of a second launch and its parts.
_NARROW_BYTES = 2**18


def linear_narrow_fits(pass_: str, m: int, n: int, k: int, itemsize: int) -> bool:
    """Whether the kernels for few outputs take a linear layer's pass."""
    few = 0 < n <= NARROW_OUTPUTS and m <= _NARROW_ROWS
    # Triton assumes no alignment of rows whose length is not a multiple of 16. A two-byte element is then too small for
    # cp.async, so that every block is waited for; a quarter of the bytes in the same time is assumed.
    most = _NARROW_BYTES // 4 if itemsize == 2 and k % 16 else _NARROW_BYTES
    return few and (pass_ != "narrow_fprop" or (_narrow_rows(m) + n) * k * itemsize <= most)


def _narrow_rows(m: int) -> int:
    """Rows of a forward program: one, until every SM has two programs, then two."""
    return 1 if m <= 2 * MULTIPROCESSORS else 2


def linear_narrow_candidates(pass_: str, m: int, n: int, k: int, itemsize: int) -> list[dict[str, int]]:
    """Configurations of the kernels for few outputs (:mod:`kernels.linear_narrow`) that are worth measuring.

    In the forward pass a thread keeps 16 to 64 sums, or fewer where K is too small for 16. In the backward pass no block has 64
    columns: from 64 on, a product would still be reading its operands when the next one begins.
    """
    found = []
    if pass_ == "narrow_fprop":
        outputs = next_power_of_2(n)
        blocks = [b for b in (128, 256, 512, 1024) if b < 2 * k] or [tile_size(k, 16, 64)]
        most = tile_size(m, 1, 4) * outputs * blocks[-1] // 128
        for rows, block_k, warps, stages in itertools.product((1, 2, 4), blocks, (4, 8, 16), (2, 3, 4, 5, 6)):
            sums = rows * outputs * block_k // (32 * warps)
            shared = stages * (rows + outputs) * block_k * itemsize
            if rows < 2 * m and min(16, most) <= sums <= 64 and shared <= SHARED_BYTES // 2:
                values = {"NARROW": 1, "ROWS": rows, "BLOCK_K": block_k}
                found.append(values | {"num_warps": warps, "num_stages": stages})
        return found
    for block_m, block_k, warps in itertools.product((16, 32, 64, 128), (16, 32), (2, 4, 8)):
        if (block_m == 16 or block_m < 2 * m) and block_m * itemsize <= min(256, 64 * warps):  # larger blocks spill
            found.append({"NARROW": 1, "BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": warps, "num_stages": 2})
    return found


def linear_narrow_config(
    device: torch.device, pass_: str, m: int, n: int, k: int, dtype: torch.dtype, input_precision: str, *, wide: bool = False
) -> dict[str, int]:
    """Configuration of a kernel for few outputs; NARROW in it says whether that kernel is to run.

    Args:
        pass_: the pass's name in the tables: ``"narrow_fprop"``, or ``"narrow_backward"`` for all gradients together.
        m, n, k: rows, outputs, features.
        wide: whether offsets are in int64.
    """
    fits = linear_narrow_fits(pass_, m, n, k, dtype.itemsize)
    if pass_ == "narrow_fprop":
        rows, outputs = _narrow_rows(m), next_power_of_2(max(n, 1))
        # At most 32 sums per thread (16 for more than 10 outputs of a half type as compiled for a B200), and 1 KiB of a row.
        # Many stages, since an SM has one program.
        sums = 4096 if n > 10 and dtype.itemsize == 2 and capability(device) >= 100 else 8192
        block_k = tile_size(k, 16, tile_size(sums // (rows * outputs), 16, 1024 // dtype.itemsize))
        shared = 2**17 if capability(device) else 2**16  # AMD GPUs have 64 KiB
        stages = min(5, shared // ((rows + outputs) * block_k * dtype.itemsize))
        config = {"ROWS": rows, "BLOCK_K": block_k, "num_warps": 8, "num_stages": stages}
    else:
        # A block has 32 columns, or 16 where 32 would give less than one program per SM. It has as many rows as fit in the
        # registers of eight warps. Fewer fit for an exact float32 product, which keeps its operands in registers, and for a
        # half type with more than 16 outputs, with rows of K of unknown alignment, or with int64 offsets.
        half = 128 if n <= 16 and k % 16 == 0 and not wide else 64
        if wide and k % 16 and (n > 16 or k > 16 * MULTIPROCESSORS):
            half = 32
        rows = half if dtype.itemsize == 2 else 32 if input_precision == "ieee" else 64
        config = {"BLOCK_M": tile_size(m, 16, rows), "BLOCK_K": 32 if k > 16 * MULTIPROCESSORS else 16}
        config |= {"num_warps": 8 if m > 32 else 4, "num_stages": 2}
    if INTERPRETED:
        config |= {"ROWS" if pass_ == "narrow_fprop" else "BLOCK_M": 16, "BLOCK_K": tile_size(k, 16, 512)}
    config["NARROW"] = int(fits)
    if fits and (measured := tuned(device, linear_key(pass_, m, n, k, dtype, input_precision))):
        config |= known(config, measured)
    config = apply_overrides(config)
    # A measurement or a test may turn NARROW off, but not on for a layer that the kernels cannot take.
    return config if fits else config | {"NARROW": 0}


def linear_config(
    device: torch.device,
    pass_: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    input_precision: str,
    *,
    descriptors: bool,
    along_k: bool = False,
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, num_warps, num_stages of a linear layer's pass: M x N outputs of K products each.

    With equal shares (:mod:`kernels.matmul_shares`), PROGRAMS and CUT replace SPLIT. The pointer kernel also has SWAP: 1 if it
    computes the transposed product, 2 if it does so from a column-major copy of the first operand. The tile sizes are then
    those of the transposed product. In the interpreter SWAP is 0, since no value depends on it.

    Args:
        pass_: the pass's name in the tables: ``"fprop"``, ``"dgrad"`` or ``"wgrad"``.
        descriptors: whether the configuration is for the descriptor kernel or for the pointer kernel.
        along_k: whether the second operand is contiguous along K.
    """
    exact = dtype == torch.float32 and input_precision == "ieee"
    swap = 0
    if INTERPRETED:
        largest = 256 if descriptors else 512  # a side of a descriptor's block is at most 256
        config = {"BLOCK_M": tile_size(m, 16, largest), "BLOCK_N": tile_size(n, 16, largest), "BLOCK_K": tile_size(k, 16, 256)}
        config |= {"SPLIT": 1, "num_warps": 4, "num_stages": 1} | (_TILES if descriptors else {})
    elif descriptors:
        config = dict(_linear_rule(m, n, k, dtype.itemsize))
        if measured := tuned(device, linear_key(pass_, m, n, k, dtype, input_precision)):
            config |= _TILES | known(config, measured)
    elif exact:
        # A warp of an FMA product reads 16 columns of the second operand, 4 apart, and 2 rows of the first from shared memory.
        # If the second operand is contiguous along K, as in a forward pass, all 16 lie in one bank; as the first operand, only
        # 2 do. A narrow second operand has no 16 columns, and for a narrow first operand a copy is not worth its launch.
        swap = (2 if m > 16 else 1) if along_k and n > 16 else 0
        rows, columns, products = (max(size, 1) for size in ((n, m, k) if swap else (m, n, k)))  # a batch may be empty
        config = dict(_fma_rule(rows, columns, products, pass_ != "wgrad"))
        if capability(device) == 0:  # AMD GPUs: 64 KiB of shared memory hold all stages but the one in registers
            step = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * 4
            config["num_stages"] = min(config["num_stages"], 1 + max(1, 2**16 // step))
        config |= known(config, tuned(device, linear_key(pass_, m, n, k, dtype, input_precision)))
    else:
        config = _linear_pointer_rule(m, n, k, dtype, input_precision)
    if not descriptors:
        return apply_overrides(config | {"SWAP": swap})
    config = apply_overrides(config)
    unused = {"SPLIT"} if config["PROGRAMS"] else set(_TILES)
    return {key: value for key, value in config.items() if key not in unused}


def matmul_finish_config(elements: int) -> dict[str, int]:
    """BLOCK and num_warps of the kernels that finish a product; few elements get small blocks."""
    block = tile_size(elements, 16, 2**17) if INTERPRETED else tile_size(elements // (2 * MULTIPROCESSORS), 128, 1024)
    return apply_overrides({"BLOCK": block, "num_warps": 4})


def row_major_config(rows: int, columns: int) -> dict[str, int]:
    """BLOCK_R, BLOCK_C and num_warps of the kernel that copies a matrix to row-major order."""
    if INTERPRETED:
        return apply_overrides({"BLOCK_R": tile_size(rows, 16, 512), "BLOCK_C": tile_size(columns, 16, 512), "num_warps": 4})
    return apply_overrides({"BLOCK_R": 32, "BLOCK_C": 64, "num_warps": 4})
