"""Tables of measured configurations, how they are read, checked and overridden, and what the rules share.

Tile sizes, warps and stages of each kernel are a deterministic function of operation, shape and dtype. Nothing is tuned at run
time. On a GPU the tables hold, and where they say nothing the rules beside the kernels; in the interpreter a launch's cost is
almost all Python overhead per operation, so tiles are as large as the problem, up to a cap.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Container, Hashable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..runtime import plans
from ..runtime.backend import INTERPRETED, capability
from ..runtime.launch import next_power_of_2
from ..runtime.switch import Switch, note_change

_overrides: Switch[dict[str, int]] = Switch({}, combine=lambda blocks: {k: v for block in blocks for k, v in block.items()})


@contextlib.contextmanager
def override(**values: int) -> Iterator[None]:
    """Force configuration values, e.g. ``override(BLOCK_M=16, num_warps=8)``, for every launch in the block.

    For tests and tuning: with small tiles a small shape already spans several programs with ragged edges. A value that a
    kernel does not have is ignored by it.
    """
    with _overrides.set(values):
        yield


@plans.decided_by
def _decisions() -> Hashable:
    """All that may change what configuration a launch of one shape gets: two calls with equal ones get the same."""
    overrides = _overrides.value
    return (tuple(sorted(overrides.items())) if overrides else None, _use_tables.value, _tables_forgotten)


def apply_overrides(config: dict[str, int]) -> dict[str, int]:
    overrides = _overrides.value
    return {key: overrides.get(key, value) for key, value in config.items()}


#: Where ``alexnet-triton tune`` writes ``<gpu>.json``.
TABLES = Path(__file__).parent


def gpu_slug(name: str) -> str:
    """A GPU's name as a file name: ``h100-80gb-hbm3``."""
    return name.lower().replace("nvidia ", "").replace(" ", "-").replace("/", "-")


@functools.cache
def _table_name(index: int) -> str:
    return gpu_slug(torch.cuda.get_device_name(index))


_POWERS_OF_2 = frozenset(1 << i for i in range(11))
_BLOCKS = _POWERS_OF_2 - {1, 2, 4, 8}  # a product's tiles
_FLAG = frozenset((0, 1))
_COUNT = range(1, 2**16)  # as many programs as CUDA takes along a grid's second axis

#: What a table may say: the values that a kernel can be compiled for, if not for every shape.
_ALLOWED: dict[str, Container[int]] = {
    **dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_K"), _BLOCKS),
    **dict.fromkeys(("BLOCK_N2", "BLOCK_K2"), _BLOCKS | {0}),
    **dict.fromkeys(("NB", "TH", "TW"), _POWERS_OF_2),
    **dict.fromkeys(
        ("IMAGES", "FUSED", "FOLDED", "TURNED", "TAPS", "STREAM_K", "WARP_SPECIALIZE", "REGISTERS", "CUT", "NARROW"), _FLAG
    ),
    **dict.fromkeys(("SPLIT", "COLUMNS", "ROWS", "PIXELS", "POSITIONS"), _COUNT),
    "PROGRAMS": range(2**16),
    "num_warps": frozenset((1, 2, 4, 8, 16)),
    "num_stages": range(1, 11),
}

#: Far above what tuning writes: a hundred entries take 60 kB.
_LARGEST_TABLE = 2**24


def check_table(content: object) -> None:
    """That ``content`` is a table as JSON has it.

    Raises:
        ValueError: not what ``alexnet-triton tune`` writes, or a value that no kernel can have.
    """
    configs = content.get("configs") if isinstance(content, dict) else None
    if not isinstance(configs, dict) or not all(isinstance(config, dict) for config in configs.values()):
        raise ValueError("it has no 'configs' by operation and shape")
    for key, config in configs.items():
        for name, value in config.items():
            # A row of few outputs is a row of a program's block.
            block = name == "ROWS" and key.startswith("linear_narrow_fprop")
            if type(value) is not int or value not in (_POWERS_OF_2 if block else _ALLOWED.get(name, ())):
                raise ValueError(f"no kernel has {name!r} = {str(value)[:50]} ({key!r})")


def load_table(path: Path) -> dict[str, Any]:
    """The JSON of a table, checked by :func:`check_table`; no more than read, whatever it says.

    Raises:
        ValueError: as :func:`check_table`, or no JSON; the message names the file.
    """
    try:
        if path.stat().st_size > _LARGEST_TABLE:
            raise ValueError(f"larger than {_LARGEST_TABLE >> 20} MB")
        content: dict[str, Any] = json.loads(path.read_text())
        check_table(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a table of tuned configurations: {error}") from error
    return content


@functools.cache
def read_table(name: str) -> dict[str, dict[str, int]]:
    """The tuned configurations of a GPU, operation and shape -> values; empty if there is no file.

    Raises:
        ValueError: as :func:`load_table`.
    """
    path = TABLES / f"{name}.json"
    return load_table(path)["configs"] if path.is_file() else {}


#: How often :func:`forget_tables` was called.
_tables_forgotten = 0


def forget_tables() -> None:
    """Read the tables anew from now on: one was written."""
    global _tables_forgotten
    read_table.cache_clear()
    _tables_forgotten += 1
    note_change()


_use_tables = Switch(True)


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Follow the rules alone inside the block, whatever was measured: for tuning and its tests."""
    with _use_tables.set(_tables_kept.value):
        yield


_tables_kept = Switch(False)


@contextlib.contextmanager
def keep_tables() -> Iterator[None]:
    """Let no :func:`untuned` inside the block turn the tables off: for experiments beside them."""
    with _tables_kept.set(True):
        yield


def tuned(device: torch.device, key: str) -> dict[str, int]:
    """What was measured to be fastest on this GPU for an operation and shape; nothing where nothing was measured.

    While launches are recorded for a Hopper GPU that is not there, it is an H100.
    """
    if INTERPRETED or not _use_tables.value:
        return {}
    if device.type == "cuda":
        name = _table_name(torch.cuda.current_device() if device.index is None else device.index)
    else:
        name = "h100-80gb-hbm3" if capability(device) == 90 else ""
    return read_table(name).get(key, {})


#: Of an H100 SXM.
MULTIPROCESSORS = 132


def tile_size(n: int, low: int, high: int) -> int:
    return max(low, min(high, next_power_of_2(n)))


def largest_divisor(n: int, high: int) -> int:
    """The largest power of 2, at most ``high``, that divides ``n``."""
    return min(n & -n, high)


def known(config: dict[str, int], values: dict[str, int]) -> dict[str, int]:
    return {key: value for key, value in values.items() if key in config}


#: Of one H100 multiprocessor: bytes of shared memory that programs may use.
SHARED_BYTES = 227 * 1024


def elementwise_config(elements: int, wide: bool = False) -> dict[str, int]:
    """BLOCK and num_warps of a kernel over a flat range of elements; ``wide``: with int64 offsets, twice the registers."""
    block = 512 if wide else 1024
    return apply_overrides({"BLOCK": tile_size(elements, 16, 2**17) if INTERPRETED else block, "num_warps": 4})


def split_count(programs: int, blocks: int, *, programs_per_multiprocessor: int = 4) -> int:
    """Into how many parts to split a reduction of ``blocks`` blocks that ``programs`` programs would walk whole.

    A function of the shape alone, never of the device or its load, so that the order of summation is the same everywhere.
    """
    wanted = 2 if INTERPRETED else max(1, programs_per_multiprocessor * MULTIPROCESSORS // max(programs, 1))
    return apply_overrides({"SPLIT": max(1, min(wanted, blocks))})["SPLIT"]
