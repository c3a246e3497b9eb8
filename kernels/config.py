"""Tile sizes, warps and stages of each kernel: a deterministic function of operation, shape and dtype.

Nothing is tuned at run time. On a GPU the tables below hold; in the interpreter a launch's cost is almost all Python
overhead per operation, so tiles are as large as the problem, up to a cap.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton

from .backend import INTERPRETED

# A plain global, not a context variable: autograd launches a CUDA backward pass from threads of its own.
_overrides: dict[str, int] = {}


@contextlib.contextmanager
def override(**values: int) -> Iterator[None]:
    """Force configuration values, e.g. ``override(BLOCK_M=16, num_warps=8)``, for every launch in the block.

    For tests and tuning: with small tiles a small shape already spans several programs with ragged edges. A value that a
    kernel does not have is ignored by it.
    """
    global _overrides
    previous, _overrides = _overrides, {**_overrides, **values}
    try:
        yield
    finally:
        _overrides = previous


def _apply_overrides(config: dict[str, int]) -> dict[str, int]:
    return {key: _overrides.get(key, value) for key, value in config.items()}


def _tile(n: int, low: int, high: int) -> int:
    return max(low, min(high, triton.next_power_of_2(n)))


def matmul_config(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    input_precision: str,
    *,
    random_epilogue: bool = False,
    irregular_gather: bool = False,
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages of a matrix kernel of M x N outputs and K products each.

    ``tl.dot`` wants at least 16 in every dimension. With ``random_epilogue`` (Philox draws on the accumulators) the tile is
    64 x 64: beside the accumulators of a larger one, the ten rounds' state does not fit the registers. With
    ``irregular_gather`` (a strided, dilated or grouped convolution, whose pointers are recomputed element by element) tiles
    are small for the same reason.
    """
    if INTERPRETED:
        config = {
            "BLOCK_M": _tile(m, 16, 512),
            "BLOCK_N": _tile(n, 16, 512),
            "BLOCK_K": _tile(k, 16, 256),
            "num_warps": 4,
            "num_stages": 1,
        }
    elif dtype == torch.float32 and irregular_gather:
        config = {"BLOCK_M": 64, "BLOCK_N": _tile(n, 16, 32), "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    elif irregular_gather:
        config = {"BLOCK_M": 64, "BLOCK_N": _tile(n, 16, 64), "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
    elif dtype == torch.float32 and input_precision == "ieee":
        # No tensor core multiplies float32 exactly: FMA on registers, so the tile is what registers hold.
        config = {"BLOCK_M": 64, "BLOCK_N": _tile(n, 16, 64), "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    elif dtype == torch.float32:
        config = {"BLOCK_M": 64, "BLOCK_N": _tile(n, 16, 64), "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
    elif random_epilogue:
        config = {"BLOCK_M": 64, "BLOCK_N": _tile(n, 16, 64), "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
    else:
        block_m = 128 if m > 64 else 64
        block_n = _tile(n, 16, 128)
        warps = 8 if block_m * block_n >= 128 * 128 else 4
        config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 32, "num_warps": warps, "num_stages": 3}
    return _apply_overrides(config)


def elementwise_config(elements: int, wide: bool = False) -> dict[str, int]:
    """BLOCK and num_warps of a kernel over a flat range of elements; ``wide``: with int64 offsets, twice the registers."""
    block = 512 if wide else 1024
    return _apply_overrides({"BLOCK": _tile(elements, 16, 2**17) if INTERPRETED else block, "num_warps": 4})


def column_sum_config(rows: int, columns: int) -> dict[str, int]:
    """BLOCK_ROWS, BLOCK_COLUMNS and num_warps of a kernel that walks down rows and sums each column."""
    if INTERPRETED:
        # NumPy sums the rows of a tile one after the other, where a GPU halves them: few rows, so that it errs no more.
        config = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": _tile(columns, 16, 512), "num_warps": 4}
    else:
        config = {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": _tile(columns, 16, 128), "num_warps": 4}
    return _apply_overrides(config)


#: Programs that a split reduction aims at: about four for each of an H100's 132 multiprocessors.
_TARGET_PROGRAMS = 528


def split_count(programs: int, blocks: int) -> int:
    """Into how many parts to split a reduction of ``blocks`` blocks that ``programs`` programs would walk whole.

    A function of the shape alone, never of the device or its load, so that the order of summation is the same everywhere.
    """
    wanted = 2 if INTERPRETED else max(1, _TARGET_PROGRAMS // max(programs, 1))
    return _apply_overrides({"SPLIT": max(1, min(wanted, blocks))})["SPLIT"]
