"""Tile sizes, splits, warps and stages of a linear layer's matrix products: the rules, from an estimate of the time.

What was measured for a GPU (:mod:`kernels.configs.tables`) comes before them.
"""

from __future__ import annotations

import functools
import itertools

import torch

from .configs.tables import MULTIPROCESSORS, SHARED_BYTES, apply_overrides, known, tile_size, tuned
from .convolution.rules import matmul_config
from .runtime.backend import INTERPRETED
from .runtime.launch import cdiv

#: Of one H100 multiprocessor, a microsecond: FLOPs on the tensor cores (what published matrix kernels reach), bytes from the L2
#: cache (assumed), and of the whole GPU bytes of memory.
_FLOPS_US, _L2_BYTES_US, _MEMORY_BYTES_US = 5.2e6, 6e4, 3.0e6
#: Of one H100 multiprocessor: 32-bit registers.
_REGISTERS = 65536
#: Microseconds from asking for a block of memory until it is there, and of starting and ending a program.
_LATENCY_US, _PROGRAM_US = 1.5, 1.7


def linear_key(pass_: str, m: int, n: int, k: int) -> str:
    """Name of a linear layer's pass in the tables; m x n outputs of k products each."""
    return f"linear_{pass_} m{m} n{n} k{k}"


def linear_candidates(m: int, n: int, k: int, itemsize: int) -> list[dict[str, int]]:
    """Configurations of the descriptor matrix kernel that are worth a measurement for M x N outputs of K products each.

    A block of K is 128 bytes of a row: what shared memory holds without bank conflicts. The tensor cores of Hopper take 64 rows
    at least.
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
            # What the stages hold, and the tile on its way out.
            if stages * (block_m + block_n) * block_k * itemsize > SHARED_BYTES - 2048:
                continue
            values = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split}
            found.append(values | {"num_warps": warps, "num_stages": stages})
    return found


def _splits(tiles: int, steps: int) -> list[int]:
    """Parts that make one to two programs a multiprocessor; a part of less than two steps is not worth its start."""
    most = max(1, min(2 * MULTIPROCESSORS // tiles, steps // 2))
    return [s for s in range(1, most + 1) if s in (1, most) or s * tiles >= MULTIPROCESSORS // 3]


def _linear_us(m: int, n: int, k: int, itemsize: int, config: dict[str, int]) -> float:
    """Estimated microseconds on an H100. It ranks candidates; only a measurement says what is fastest."""
    block_m, block_n, block_k, split = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT"))
    programs = cdiv(m, block_m) * cdiv(n, block_n) * split
    steps = cdiv(cdiv(k, block_k), split)
    threads = 32 * config["num_warps"]
    step_bytes = (block_m + block_n) * block_k * itemsize
    by_registers = _REGISTERS // (threads * (block_m * block_n // threads + 48))
    held = max(1, min(by_registers, SHARED_BYTES // (config["num_stages"] * step_bytes)))
    rounds = cdiv(programs, MULTIPROCESSORS)  # programs of the busiest multiprocessor
    step_us = max(
        2 * block_m * block_n * block_k / _FLOPS_US,
        step_bytes / _L2_BYTES_US,
        _LATENCY_US / (config["num_stages"] - 1) / min(held, rounds),
    )
    compute_us = rounds * steps * step_us + cdiv(rounds, held) * _PROGRAM_US
    moved = (m * k + k * n + m * n) * itemsize
    memory_us = moved / _MEMORY_BYTES_US / min(1.0, programs / MULTIPROCESSORS)
    # Both go on at once, not quite.
    total = max(compute_us, memory_us) + 0.25 * min(compute_us, memory_us)
    if split > 1:
        # The parts, written once and read once, mostly in the L2 cache; and one more launch.
        total += 2.0 + 2 * split * m * n * 4 / (1.5 * _MEMORY_BYTES_US)
    return total


@functools.lru_cache(maxsize=1024)
def _linear_rule(m: int, n: int, k: int, itemsize: int) -> dict[str, int]:
    def cost(config: dict[str, int]) -> tuple[float, int, int]:
        # Among equals more warps, which share the epilogue, and more stages, for memory that answers late.
        return round(_linear_us(m, n, k, itemsize, config), 1), -config["num_warps"], -config["num_stages"]

    return min(linear_candidates(m, n, k, itemsize), key=cost)


def _linear_pointer_rule(m: int, n: int, k: int, dtype: torch.dtype, precision: str) -> dict[str, int]:
    """Tiles of the pointer kernel, and a split that gives each multiprocessor one or two programs of four steps or more."""
    config = matmul_config(m, n, k, dtype, precision)
    config["BLOCK_K"] = min(config["BLOCK_K"], tile_size(k, 16, 128))
    steps = cdiv(k, config["BLOCK_K"])

    def tiles() -> int:
        return cdiv(m, config["BLOCK_M"]) * cdiv(n, config["BLOCK_N"])

    while tiles() * max(1, steps // 4) < MULTIPROCESSORS and config["BLOCK_N"] > 32:  # too short to split: smaller tiles
        config["BLOCK_N"] //= 2
    if config["BLOCK_M"] * config["BLOCK_N"] < 128 * 32 and dtype != torch.float32:
        config["num_warps"] = 4
    return config | {"SPLIT": max(1, min(2 * MULTIPROCESSORS // max(tiles(), 1), steps // 4))}


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
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, num_warps, num_stages of a linear layer's pass: M x N outputs of K products each.

    Args:
        pass_: ``"fprop"``, ``"dgrad"`` or ``"wgrad"``: its name in the tables.
        descriptors: whether it is the descriptor kernel's that is asked for, or the pointer kernel's.
    """
    if INTERPRETED:
        config = matmul_config(m, n, k, dtype, input_precision) | {"SPLIT": 1}
        if descriptors:  # the sizes that a descriptor's block can have
            config |= {"BLOCK_M": min(config["BLOCK_M"], 256), "BLOCK_N": min(config["BLOCK_N"], 256)}
    elif descriptors:
        config = dict(_linear_rule(m, n, k, dtype.itemsize))
        config |= known(config, tuned(device, linear_key(pass_, m, n, k)))
    else:
        config = _linear_pointer_rule(m, n, k, dtype, input_precision)
    return apply_overrides(config)


def matmul_finish_config(elements: int) -> dict[str, int]:
    """BLOCK and num_warps of the kernel that finishes a product: small blocks where there are few elements."""
    block = tile_size(elements, 16, 2**17) if INTERPRETED else tile_size(elements // (2 * MULTIPROCESSORS), 128, 1024)
    return apply_overrides({"BLOCK": block, "num_warps": 4})
