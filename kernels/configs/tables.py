"""Tile sizes, warps and stages of each kernel: a deterministic function of operation, shape and dtype.

Nothing is tuned at run time. On a GPU the tables below hold; in the interpreter a launch's cost is almost all Python
overhead per operation, so tiles are as large as the problem, up to a cap.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch

from ..runtime.backend import INTERPRETED, capability
from ..runtime.launch import cdiv, next_power_of_2
from ..runtime.switch import Switch

_overrides: Switch[dict[str, int]] = Switch({}, combine=lambda blocks: {k: v for block in blocks for k, v in block.items()})


@contextlib.contextmanager
def override(**values: int) -> Iterator[None]:
    """Force configuration values, e.g. ``override(BLOCK_M=16, num_warps=8)``, for every launch in the block.

    For tests and tuning: with small tiles a small shape already spans several programs with ragged edges. A value that a
    kernel does not have is ignored by it.
    """
    with _overrides.set(values):
        yield


def _apply_overrides(config: dict[str, int]) -> dict[str, int]:
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
    **dict.fromkeys(("IMAGES", "FUSED", "WARP_SPECIALIZE"), _FLAG),
    **dict.fromkeys(("SPLIT", "COLUMNS", "ROWS", "PIXELS", "POSITIONS"), _COUNT),
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
            if type(value) is not int or value not in _ALLOWED.get(name, ()):
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


_use_tables = Switch(True)


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Follow the rules alone inside the block, whatever was measured: for tuning and its tests."""
    with _use_tables.set(False):
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


def conv2d_key(operation: str, n: int, p: int, q: int, c: int, k: int, r: int, s: int) -> str:
    """Name of a convolution pass in the tables; sizes as the pass sees them: c is reduced (or read), k written."""
    return f"{operation} n{n} p{p} q{q} c{c} k{k} r{r} s{s}"


#: Of an H100 SXM.
_MULTIPROCESSORS = 132


def _tile(n: int, low: int, high: int) -> int:
    return max(low, min(high, next_power_of_2(n)))


def matmul_config(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    input_precision: str,
    *,
    irregular_gather: bool = False,
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages of a matrix kernel of M x N outputs and K products each.

    ``tl.dot`` wants at least 16 in every dimension. With ``irregular_gather`` (a strided, dilated or grouped convolution, whose
    pointers are recomputed element by element) tiles are small, so that all fits the registers.
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
    else:
        block_m = 128 if m > 64 else 64
        block_n = _tile(n, 16, 128)
        warps = 8 if block_m * block_n >= 128 * 128 else 4
        config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 32, "num_warps": warps, "num_stages": 3}
    return _apply_overrides(config)


def _largest_divisor(n: int, high: int) -> int:
    """The largest power of 2, at most ``high``, that divides ``n``."""
    return min(n & -n, high)


@functools.lru_cache(maxsize=4096)
def _two_blocks(n: int, high: int) -> tuple[int, int]:
    """Powers of 2 whose sum tiles ``n`` with the least waste: (128, 0) for 256, (64, 32) for 96; the second may be 0."""
    candidates = [(high, 0)] if n >= high else [(_tile(n, 16, high), 0)]
    if n % 96 == 0 and n % high:
        candidates.append((64, 32))
    if n % 48 == 0 and n < 96:
        candidates.append((32, 16))
    return min(candidates, key=lambda blocks: (cdiv(n, sum(blocks)) * sum(blocks), blocks[1]))


@functools.lru_cache(maxsize=4096)
def conv2d_box(pixels: int, n: int, p: int, q: int) -> tuple[int, int, int]:
    """Images x rows x columns, powers of 2 with the product ``pixels``, that waste the least; of these the squarest."""
    shapes = [(pixels // th // tw, th, tw) for th in _powers(pixels) for tw in _powers(pixels // th)]

    def cost(shape: tuple[int, int, int]) -> tuple[int, int, int]:
        covered = 1
        for size, tile in zip((n, p, q), shape, strict=True):
            covered *= cdiv(size, tile) * tile
        _, th, tw = shape
        return covered, -th * tw, abs(th - tw)

    return min(shapes, key=cost)


def _powers(high: int) -> list[int]:
    return [1 << i for i in range(high.bit_length())]


def conv2d_tile(device: torch.device, operation: str, n: int, p: int, q: int, c: int, k: int, r: int, s: int) -> str:
    """``"images"`` (a tile is one pixel of many images) or ``"box"`` (a few images x rows x columns) for a convolution pass.

    One pixel of 64 or more images wastes nothing and leaves out the padding. Channels that are no multiple of 64 make its
    loads narrow, of 64 bytes an image, where a box still reads neighbours in memory: measured faster for conv2 on an H100.
    """
    few_images = n < (3 if INTERPRETED else 48)
    narrow = c % 64 != 0 and k % 256 == 0 and not INTERPRETED
    config = {"IMAGES": int(not few_images and not narrow)}
    config |= _known(config, tuned(device, conv2d_key(operation, n, p, q, c, k, r, s)))
    return "images" if _apply_overrides(config)["IMAGES"] else "box"


def conv2d_wgrad_by_images(n: int) -> bool:
    """Whether ``n`` images are enough for a weight gradient whose steps are one pixel of 64 images."""
    return bool(_apply_overrides({"IMAGES_WGRAD": int(n >= (1 if INTERPRETED else 32))})["IMAGES_WGRAD"])


def _known(config: dict[str, int], values: dict[str, int]) -> dict[str, int]:
    return {key: value for key, value in values.items() if key in config}


def conv2d_images_config(
    device: torch.device, operation: str, n: int, p: int, q: int, c: int, k: int, r: int, s: int
) -> dict[str, int]:
    """Tiles of the images kernel: ``n`` images of p x q output pixels, c channels reduced, k written, r x s filters."""
    block_n, block_n2 = _two_blocks(k, 128)
    if INTERPRETED:
        config = {"PIXELS": 1, "BLOCK_M": _tile(n, 16, 64), "BLOCK_N": block_n, "BLOCK_N2": block_n2, "BLOCK_K": 128}
        config |= {"num_warps": 4, "num_stages": 1}
    else:
        block_m = 128 if n > 64 else 64
        # A narrow block of filters is read for two pixels at once: else the copy engine brings too little work.
        pixels = 2 if block_n + block_n2 <= 96 and block_m == 128 and q > 1 else 1
        warps = 8 if block_m * (block_n + block_n2) * pixels > 128 * 128 else 4
        config = {"PIXELS": pixels, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_N2": block_n2, "BLOCK_K": 64}
        config |= {"num_warps": warps, "num_stages": 4}
    config["WARP_SPECIALIZE"] = 0
    config |= _known(config, tuned(device, conv2d_key(operation, n, p, q, c, k, r, s)))
    config = _apply_overrides(config)
    return config | {"BLOCK_K": _largest_divisor(c, config["BLOCK_K"])}


def conv2d_box_config(
    device: torch.device, operation: str, n: int, p: int, q: int, c: int, k: int, r: int, s: int
) -> dict[str, int]:
    """Tiles of the box kernel, as :func:`conv2d_images_config`: so small that every multiprocessor has some."""
    if INTERPRETED:
        pixels, config = 64, {"BLOCK_N": _tile(k, 16, 128), "BLOCK_K": 128, "num_warps": 4, "num_stages": 1}
    else:
        choices = [(128, 256, 8, 5)] if k % 256 == 0 and c % 64 != 0 else []
        choices += [(256, 128, 8, 4), (128, 128, 8, 4), (128, 64, 4, 4), (64, 64, 4, 5)]
        for pixels, block_n, warps, stages in choices:  # noqa: B007
            nb, th, tw = conv2d_box(pixels, n, p, q)
            programs = cdiv(n, nb) * cdiv(p, th) * cdiv(q, tw) * cdiv(k, block_n)
            if programs >= _MULTIPROCESSORS:
                break
        config = {"BLOCK_N": block_n, "BLOCK_K": 64, "num_warps": warps, "num_stages": stages}
    nb, th, tw = conv2d_box(pixels, n, p, q)
    config = {"NB": nb, "TH": th, "TW": tw, "WARP_SPECIALIZE": 0} | config
    config |= _known(config, tuned(device, conv2d_key(operation, n, p, q, c, k, r, s)))
    config = _apply_overrides(config)
    return config | {"BLOCK_K": _largest_divisor(c, config["BLOCK_K"])}


def conv2d_images_wgrad_config(device: torch.device, n: int, p: int, q: int, c: int, k: int, r: int, s: int) -> dict[str, int]:
    """Tiles of the images kernel's weight gradient: BLOCK_M filters x (BLOCK_N + BLOCK_N2) channels, BLOCK_K images a step."""
    block_m, positions = 128, 1
    block_n, block_n2 = _largest_divisor(c, 256 if k % 128 == 0 else 128), 0
    if c % 96 == 0 and block_n < 64:
        block_n, block_n2 = 64, 32
    if block_n + block_n2 < 128:
        positions = 2
        block_m = 256 if k % 256 == 0 else 128
    area = block_m * (block_n + block_n2) * positions
    config = {"POSITIONS": positions, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_N2": block_n2}
    config |= {"BLOCK_K": _tile(n, 16, 64), "num_warps": 8 if area > 128 * 128 else 4, "num_stages": 3}
    if INTERPRETED:
        config |= {"BLOCK_M": _tile(k, 16, 128), "num_stages": 1}
    measured = tuned(device, conv2d_key("conv2d_wgrad", n, p, q, c, k, r, s))
    config = _apply_overrides(config | _known(config, measured))
    if c % (config["BLOCK_N"] + config["BLOCK_N2"]):
        config |= {"BLOCK_N": _largest_divisor(c, config["BLOCK_N"]), "BLOCK_N2": 0}
    programs = cdiv(k, config["BLOCK_M"]) * cdiv(r * s, config["POSITIONS"])
    programs *= c // (config["BLOCK_N"] + config["BLOCK_N2"])
    at_once = _MULTIPROCESSORS * (2 if config["num_warps"] == 4 else 1)
    steps = p * q * cdiv(n, config["BLOCK_K"])
    wanted = 2 if INTERPRETED else at_once // programs
    return config | _apply_overrides({"SPLIT": measured.get("SPLIT", max(1, min(wanted, steps)))})


def conv2d_stem_config(device: torch.device, n: int, p: int, q: int, fold: int, k: int) -> dict[str, int]:
    """Tiles of a strided first layer: BLOCK_M images x COLUMNS pixels of a row x (BLOCK_N + BLOCK_N2) filters."""
    block_n, block_n2 = _two_blocks(k, 64 if k % 96 else 128)
    block_k, block_k2 = (32, 16) if fold == 48 else (128, 16)
    config = {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_N2": block_n2, "BLOCK_K": block_k, "BLOCK_K2": block_k2}
    config |= {"COLUMNS": cdiv(q, 2), "num_warps": 4, "num_stages": 3 if fold == 48 else 2}
    if INTERPRETED:
        config |= {"BLOCK_M": _tile(n, 16, 64), "num_stages": 1}
    config |= _known(config, tuned(device, conv2d_key("conv2d_stem_fprop", n, p, q, fold, k, 3, 1)))
    applied = _apply_overrides(config)
    return applied | {"BLOCK_K": block_k, "BLOCK_K2": block_k2} if applied["BLOCK_K"] + applied["BLOCK_K2"] < fold else applied


def conv2d_stem_pool_fused(device: torch.device, n: int, p: int, q: int, fold: int, k: int) -> bool:
    """Whether such a layer and its 3 x 3 pool run as one kernel; p x q windows.

    With three channels the cells of a column fill shared memory, and none are left to load the next meanwhile.
    """
    config = {"FUSED": int(fold == 48)}
    config |= _known(config, tuned(device, conv2d_key("conv2d_stem_pool_fprop", n, p, q, fold, k, 3, 1)))
    return bool(_apply_overrides(config)["FUSED"])


def conv2d_stem_pool_config(
    device: torch.device, n: int, p: int, q: int, fold: int, k: int, narrow: bool = False
) -> dict[str, int]:
    """Tiles of such a layer with its pool: BLOCK_M images x ROWS rows of COLUMNS windows x (BLOCK_N + BLOCK_N2) filters.

    p x q windows. ``narrow``: with offsets that take registers (int64, or filters that are no neighbours in memory).
    """
    block_n, block_n2 = _two_blocks(k, 64)
    if narrow and not INTERPRETED:
        block_n, block_n2 = (32, 16) if k % 48 == 0 else (32, 0)
    block_k, block_k2 = (32, 16) if fold == 48 else (128, 16)
    config = {"ROWS": 1, "BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_N2": block_n2, "BLOCK_K": block_k, "BLOCK_K2": block_k2}
    config |= {"num_warps": 4, "num_stages": 2 if fold == 48 else 1}
    if INTERPRETED:
        config |= {"BLOCK_M": _tile(n, 16, 64), "num_stages": 1}
    measured = {} if narrow else tuned(device, conv2d_key("conv2d_stem_pool_fprop", n, p, q, fold, k, 3, 1))
    config = _apply_overrides(config | _known(config, measured))
    if config["BLOCK_K"] + config["BLOCK_K2"] < fold:
        config |= {"BLOCK_K": block_k, "BLOCK_K2": block_k2}
    programs = cdiv(p, config["ROWS"]) * cdiv(n, config["BLOCK_M"])
    programs *= cdiv(k, config["BLOCK_N"] + config["BLOCK_N2"])

    def columns_one_after_another(strips: int) -> int:
        # Two programs run on a multiprocessor at once; neighbouring strips share a column of the convolution.
        return cdiv(programs * strips, 2 * _MULTIPROCESSORS) * (2 * cdiv(q, strips) + 1)

    strips = min(range(1, min(q, 16) + 1), key=columns_one_after_another)
    return config | _apply_overrides({"COLUMNS": measured.get("COLUMNS", cdiv(q, strips))})


def conv2d_stem_wgrad_config(device: torch.device, n: int, p: int, q: int, fold: int, k: int) -> dict[str, int]:
    """Tiles of its weight gradient: BLOCK_M folded positions x (BLOCK_N + BLOCK_N2) filters, BLOCK_K images a step."""
    block_n, block_n2 = _two_blocks(k, 64 if k % 96 else 128)
    # Blackwell's compiler spills with four warps.
    warps = 4 if capability(device) < 100 else 8
    config = {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_N2": block_n2, "BLOCK_K": 128 if n > 64 else 64, "num_warps": warps}
    config |= {"num_stages": 3}
    if INTERPRETED:
        config |= {"BLOCK_K": _tile(n, 16, 64), "num_stages": 1}
    measured = tuned(device, conv2d_key("conv2d_stem_wgrad", n, p, q, fold, k, 3, 1))
    config = _apply_overrides(config | _known(config, measured))
    programs = cdiv(fold, config["BLOCK_M"]) * cdiv(k, config["BLOCK_N"] + config["BLOCK_N2"])
    steps = p * q * cdiv(n, config["BLOCK_K"])
    wanted = 2 if INTERPRETED else max(1, _MULTIPROCESSORS // programs)
    return config | _apply_overrides({"SPLIT": measured.get("SPLIT", min(wanted, steps))})


#: Of one H100 multiprocessor, a microsecond: FLOPs on the tensor cores (what published matrix kernels reach), bytes from the L2
#: cache (assumed), and of the whole GPU bytes of memory.
_FLOPS_US, _L2_BYTES_US, _MEMORY_BYTES_US = 5.2e6, 6e4, 3.0e6
#: Of one H100 multiprocessor: bytes of shared memory that programs may use, 32-bit registers.
SHARED_BYTES, _REGISTERS = 227 * 1024, 65536
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
    most = max(1, min(2 * _MULTIPROCESSORS // tiles, steps // 2))
    return [s for s in range(1, most + 1) if s in (1, most) or s * tiles >= _MULTIPROCESSORS // 3]


def _linear_us(m: int, n: int, k: int, itemsize: int, config: dict[str, int]) -> float:
    """Estimated microseconds on an H100. It ranks candidates; only a measurement says what is fastest."""
    block_m, block_n, block_k, split = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT"))
    programs = cdiv(m, block_m) * cdiv(n, block_n) * split
    steps = cdiv(cdiv(k, block_k), split)
    threads = 32 * config["num_warps"]
    step_bytes = (block_m + block_n) * block_k * itemsize
    by_registers = _REGISTERS // (threads * (block_m * block_n // threads + 48))
    held = max(1, min(by_registers, SHARED_BYTES // (config["num_stages"] * step_bytes)))
    rounds = cdiv(programs, _MULTIPROCESSORS)  # programs of the busiest multiprocessor
    step_us = max(
        2 * block_m * block_n * block_k / _FLOPS_US,
        step_bytes / _L2_BYTES_US,
        _LATENCY_US / (config["num_stages"] - 1) / min(held, rounds),
    )
    compute_us = rounds * steps * step_us + cdiv(rounds, held) * _PROGRAM_US
    moved = (m * k + k * n + m * n) * itemsize
    memory_us = moved / _MEMORY_BYTES_US / min(1.0, programs / _MULTIPROCESSORS)
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
    config["BLOCK_K"] = min(config["BLOCK_K"], _tile(k, 16, 128))
    steps = cdiv(k, config["BLOCK_K"])

    def tiles() -> int:
        return cdiv(m, config["BLOCK_M"]) * cdiv(n, config["BLOCK_N"])

    while tiles() * max(1, steps // 4) < _MULTIPROCESSORS and config["BLOCK_N"] > 32:  # too short to split: smaller tiles
        config["BLOCK_N"] //= 2
    if config["BLOCK_M"] * config["BLOCK_N"] < 128 * 32 and dtype != torch.float32:
        config["num_warps"] = 4
    return config | {"SPLIT": max(1, min(2 * _MULTIPROCESSORS // max(tiles(), 1), steps // 4))}


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
        config |= _known(config, tuned(device, linear_key(pass_, m, n, k)))
    else:
        config = _linear_pointer_rule(m, n, k, dtype, input_precision)
    return _apply_overrides(config)


def matmul_finish_config(elements: int) -> dict[str, int]:
    """BLOCK and num_warps of the kernel that finishes a product: small blocks where there are few elements."""
    block = _tile(elements, 16, 2**17) if INTERPRETED else _tile(elements // (2 * _MULTIPROCESSORS), 128, 1024)
    return _apply_overrides({"BLOCK": block, "num_warps": 4})


def elementwise_config(elements: int, wide: bool = False) -> dict[str, int]:
    """BLOCK and num_warps of a kernel over a flat range of elements; ``wide``: with int64 offsets, twice the registers."""
    block = 512 if wide else 1024
    return _apply_overrides({"BLOCK": _tile(elements, 16, 2**17) if INTERPRETED else block, "num_warps": 4})


def pool_config(pixels: int, channels: int, channels_last: bool, wide: bool = False) -> dict[str, int]:
    """BLOCK_PIXELS, BLOCK_CHANNELS and num_warps of a kernel over tiles of an image's pixels and channels.

    The axis that is contiguous in memory comes first: blocks of channels that divide them, where there are such, else of
    pixels. Eight elements a thread are 16 bytes of a half type; four where pixels' offsets, or int64 ones (``wide``),
    take the registers.
    """
    if INTERPRETED:
        config = {"BLOCK_PIXELS": _tile(pixels, 1, 512), "BLOCK_CHANNELS": _tile(channels, 1, 128), "num_warps": 4}
        return _apply_overrides(config)
    elements = 1024 if channels_last and not wide else 512
    if channels_last:
        exact = _largest_divisor(channels, 64)
        block_channels = exact if exact >= 16 else _tile(channels, 1, 32)
        block_pixels = _tile(pixels, 1, elements // block_channels)
    else:
        block_pixels = _tile(pixels, 1, 256)
        block_channels = _tile(channels, 1, elements // block_pixels)
    return _apply_overrides({"BLOCK_PIXELS": block_pixels, "BLOCK_CHANNELS": block_channels, "num_warps": 4})


def sgd_config(elements: int) -> dict[str, int]:
    """BLOCK and num_warps of the optimizer's kernel; ``elements``: of the largest tensor.

    Sixteen elements a thread: enough loads under way at once, and few programs that look for their tensor.
    """
    return _apply_overrides({"BLOCK": _tile(elements, 16, 2**17) if INTERPRETED else 4096, "num_warps": 8})


#: Rows that one program walks down at once: a second launch would take longer than the steps that it saves.
_FEW_ROWS = 512


def column_sum_split(rows: int, programs: int, blocks: int) -> int:
    """Parts into which the ``blocks`` blocks of rows are split where ``programs`` programs would walk down all of them."""
    if rows <= _FEW_ROWS:
        return _apply_overrides({"SPLIT": 1})["SPLIT"]
    return split_count(programs, max(blocks, 1), programs_per_multiprocessor=7)  # as many as fit by registers, at once


def column_sum_config(rows: int, columns: int) -> dict[str, int]:
    """BLOCK_ROWS, BLOCK_COLUMNS and num_warps of a kernel that walks down rows and sums each column."""
    if INTERPRETED:
        # NumPy sums the rows of a tile one after the other, where a GPU halves them: few rows, so that it errs no more.
        config = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": _tile(columns, 16, 512), "num_warps": 4}
    elif rows <= _FEW_ROWS:
        # One program for all rows of its columns, so narrow ones, of 64 bytes and more, for many programs.
        config = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 32, "num_warps": 4}
    else:
        # Columns that a block divides evenly where there is one of 32 or more; 16 elements for each thread.
        exact = _largest_divisor(columns, 128)
        block = exact if exact >= 32 else _tile(columns, 16, 128)
        config = {"BLOCK_ROWS": 2048 // block, "BLOCK_COLUMNS": block, "num_warps": 4}
    return _apply_overrides(config)


def sum_parts_config(parts: int, elements: int) -> dict[str, int]:
    """BLOCK, BLOCK_PARTS and num_warps of the sum over ``parts`` parts of ``elements`` elements.

    Few elements of many parts (the gradient of a bias) leave few programs: each takes few elements and reads many parts at
    once, so that it does not wait for one after the other.
    """
    if INTERPRETED:
        config = {"BLOCK": _tile(elements, 16, 2**17), "BLOCK_PARTS": _tile(parts, 1, 4), "num_warps": 4}
        return _apply_overrides(config)
    block = 1024
    while block > 16 and cdiv(elements, block) < 2 * _MULTIPROCESSORS and parts * block > 1024:
        block //= 2
    block_parts = 1 if block == 1024 else _tile(parts, 1, 2048 // block)
    return _apply_overrides({"BLOCK": block, "BLOCK_PARTS": block_parts, "num_warps": 4})


def sum_columns_config(parts: int) -> dict[str, int]:
    """BLOCK_COLUMNS and BLOCK_COLUMN_PARTS of vectors summed over at most ``parts`` parts beside another sum.

    As in :func:`sum_parts_config` few columns a program, and many parts at once.
    """
    if INTERPRETED:
        return _apply_overrides({"BLOCK_COLUMNS": 512, "BLOCK_COLUMN_PARTS": _tile(parts, 1, 4)})
    return _apply_overrides({"BLOCK_COLUMNS": 16, "BLOCK_COLUMN_PARTS": _tile(parts, 1, 128)})


def split_count(programs: int, blocks: int, *, programs_per_multiprocessor: int = 4) -> int:
    """Into how many parts to split a reduction of ``blocks`` blocks that ``programs`` programs would walk whole.

    A function of the shape alone, never of the device or its load, so that the order of summation is the same everywhere.
    """
    wanted = 2 if INTERPRETED else max(1, programs_per_multiprocessor * _MULTIPROCESSORS // max(programs, 1))
    return _apply_overrides({"SPLIT": max(1, min(wanted, blocks))})["SPLIT"]
