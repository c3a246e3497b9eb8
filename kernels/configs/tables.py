"""Tables of measured configurations: reading, checking and overriding them, and helpers that the rules share.

Tile sizes, warps and stages of each kernel are a deterministic function of operation, shape and dtype. Nothing is tuned at run
time. On a GPU the table's entry is used, or the rule beside the kernel where there is none. In the interpreter a launch's cost
is almost all Python overhead per operation, so tiles are as large as the problem, up to a cap.
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

    For tests and tuning: with small tiles, even a small shape spans several programs with ragged edges. A kernel ignores values
    that it does not have.
    """
    with _overrides.set(values):
        yield


@plans.decided_by
def _decisions() -> Hashable:
    """All state that configurations depend on besides a launch's shape; equal values give equal configurations."""
    overrides = _overrides.value
    return (tuple(sorted(overrides.items())) if overrides else None, _use_tables.value, _tables_forgotten)


def apply_overrides(config: dict[str, int]) -> dict[str, int]:
    overrides = _overrides.value
    return {key: overrides.get(key, value) for key, value in config.items()}


#: The folder to which ``alexnet-triton tune`` writes ``<gpu>.json``.
TABLES = Path(__file__).parent


def gpu_slug(name: str) -> str:
    """A GPU's name as a file name, such as ``h100-80gb-hbm3``."""
    return name.lower().replace("nvidia ", "").replace(" ", "-").replace("/", "-")


@functools.cache
def _table_name(index: int) -> str:
    return gpu_slug(torch.cuda.get_device_name(index))


_POWERS_OF_2 = frozenset(1 << i for i in range(11))
_BLOCKS = _POWERS_OF_2 - {1, 2, 4, 8}  # sides of a product's tile
_FLAG = frozenset((0, 1))
_COUNT = range(1, 2**16)  # CUDA's limit on a grid's second axis

#: Values that a table may contain: those that a kernel can be compiled for, though not for every shape.
_ALLOWED: dict[str, Container[int]] = {
    **dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_K"), _BLOCKS),
    **dict.fromkeys(("BLOCK_N2", "BLOCK_K2"), _BLOCKS | {0}),
    **dict.fromkeys(("NB", "TH", "TW"), _POWERS_OF_2),
    **dict.fromkeys(("IMAGES", "FUSED", "FOLDED", "TAPS", "STREAM_K", "WARP_SPECIALIZE", "REGISTERS", "CUT", "NARROW"), _FLAG),
    **dict.fromkeys(("SPLIT", "COLUMNS", "ROWS", "PIXELS", "POSITIONS"), _COUNT),
    "PROGRAMS": range(2**16),
    "num_warps": frozenset((1, 2, 4, 8, 16)),
    "num_stages": range(1, 11),
}

#: In bytes; far above what tuning writes: a hundred entries take 60 kB.
_LARGEST_TABLE = 2**24


def check_table(content: object) -> None:
    """Check that ``content``, parsed from JSON, is a table.

    Raises:
        ValueError: the structure is not that of ``alexnet-triton tune``, or a value is one that no kernel can have.
    """
    configs = content.get("configs") if isinstance(content, dict) else None
    if not isinstance(configs, dict) or not all(isinstance(config, dict) for config in configs.values()):
        raise ValueError("it has no 'configs' object with an entry for each operation and shape")
    for key, config in configs.items():
        for name, value in config.items():
            # ROWS of this kernel is a side of a program's block, not a count.
            block = name == "ROWS" and key.startswith("linear_narrow_fprop")
            if type(value) is not int or value not in (_POWERS_OF_2 if block else _ALLOWED.get(name, ())):
                raise ValueError(f"no kernel has {name!r} = {str(value)[:50]} ({key!r})")


def load_table(path: Path) -> dict[str, Any]:
    """The content of a table's JSON file, checked by :func:`check_table`. The content is only parsed, never executed.

    Raises:
        ValueError: as :func:`check_table`, or the file is too large or not JSON; the message names the file.
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
    """The tuned configurations of a GPU, keyed by operation and shape; empty if there is no file.

    Raises:
        ValueError: as :func:`load_table`.
    """
    path = TABLES / f"{name}.json"
    return load_table(path)["configs"] if path.is_file() else {}


#: Number of calls of :func:`forget_tables`.
_tables_forgotten = 0


def forget_tables() -> None:
    """Clear the cache of tables after one was written, so that they are read again."""
    global _tables_forgotten
    read_table.cache_clear()
    _tables_forgotten += 1
    note_change()


_use_tables = Switch(True)


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Use the rules alone inside the block and ignore the tables, for tuning and its tests."""
    with _use_tables.set(_tables_kept.value):
        yield


_tables_kept = Switch(False)


@contextlib.contextmanager
def keep_tables() -> Iterator[None]:
    """Keep the tables on inside the block, even in an inner :func:`untuned` block, for experiments."""
    with _tables_kept.set(True):
        yield


def tuned(device: torch.device, key: str) -> dict[str, int]:
    """The configuration measured to be fastest on this GPU for ``key`` (operation and shape); empty if none was measured.

    For CPU tensors whose launches are recorded for a Hopper target, it is the H100's table.
    """
    if INTERPRETED or not _use_tables.value:
        return {}
    if device.type == "cuda":
        name = _table_name(torch.cuda.current_device() if device.index is None else device.index)
    else:
        name = "h100-80gb-hbm3" if capability(device) == 90 else ""
    return read_table(name).get(key, {})


#: Number of SMs of an H100 SXM.
MULTIPROCESSORS = 132


def tile_size(n: int, low: int, high: int) -> int:
    return max(low, min(high, next_power_of_2(n)))


def largest_divisor(n: int, high: int) -> int:
    """The largest power of 2, at most ``high``, that divides ``n``."""
    return min(n & -n, high)


def known(config: dict[str, int], values: dict[str, int]) -> dict[str, int]:
    return {key: value for key, value in values.items() if key in config}


#: Bytes of shared memory that programs may use on one H100 SM.
SHARED_BYTES = 227 * 1024


def elementwise_config(elements: int, wide: bool = False) -> dict[str, int]:
    """BLOCK and num_warps of an elementwise kernel; ``wide``: int64 offsets, which take twice the registers."""
    block = 512 if wide else 1024
    return apply_overrides({"BLOCK": tile_size(elements, 16, 2**17) if INTERPRETED else block, "num_warps": 4})


def split_count(programs: int, blocks: int, *, programs_per_multiprocessor: int = 4) -> int:
    """Number of parts into which to split a reduction over ``blocks`` blocks that has ``programs`` programs when unsplit.

    Depends on the shape alone, not on the device or its load, so that the order of summation is the same everywhere.
    """
    wanted = 2 if INTERPRETED else max(1, programs_per_multiprocessor * MULTIPROCESSORS // max(programs, 1))
    return apply_overrides({"SPLIT": max(1, min(wanted, blocks))})["SPLIT"]
