"""Rules for tile sizes, warps and stages of the convolution kernels, and of matrix products of any strides.

Measured entries of a GPU's table (:mod:`kernels.configs.tables`) override the rules.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ..configs.tables import MULTIPROCESSORS, SHARED_BYTES, apply_overrides, known, largest_divisor, tile_size, tuned
from ..runtime.backend import INTERPRETED, capability
from ..runtime.launch import cdiv


def conv2d_key(
    operation: str, n: int, p: int, q: int, c: int, k: int, r: int, s: int, dtype: torch.dtype = torch.bfloat16
) -> str:
    """Key of a convolution pass in the tables. Sizes are as the pass sees them: c is reduced (or read), k is written.

    bfloat16 and float16 share their entries.
    """
    return f"{operation} n{n} p{p} q{q} c{c} k{k} r{r} s{s}" + (" tf32" if dtype == torch.float32 else "")


def _row(dtype: torch.dtype) -> int:
    """Number of elements in 128 bytes, the widest block row that TMA loads at once and that has no bank conflicts."""
    return 128 // dtype.itemsize


#: Tiles of the pointer kernels: BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages. Accumulators and pointers fit the registers
#: (``benchmarks.offline --check`` compiles them). The stages fit a consumer GPU's 99 KiB of shared memory and an MI300's 64.
_HALF_TILES = ((128, 128, 32, 8, 3), (128, 64, 32, 4, 3), (64, 128, 32, 4, 3), (64, 64, 32, 8, 3), (64, 32, 32, 8, 3))
_TF32_TILES = ((128, 128, 32, 8, 3), (64, 64, 32, 8, 3), (64, 32, 32, 8, 3))
_FMA_TILES = ((128, 128, 16, 8, 2), (64, 64, 16, 4, 3), (64, 32, 16, 8, 2))
_FMA_SPLIT_TILES = ((128, 128, 16, 8, 2), (64, 32, 16, 8, 2))
#: For a linear layer, and for a convolution with int64 offsets, which take twice the registers.
_FMA_SMALL_TILES = ((64, 64, 16, 8, 3),)
#: For gathers in which every element has a pointer of its own.
_SCATTERED_HALF_TILES = ((64, 64, 32, 8, 3), (64, 32, 32, 8, 3))
_SCATTERED_TF32_TILES = ((64, 32, 16, 8, 2),)
_SCATTERED_FMA_TILES = ((64, 32, 16, 4, 3),)

#: Throughput of one SM per clock cycle: multiply-adds in half precision and in TF32 (both an A100's) and in exact float32 on
#: registers; 32-bit words from shared memory to a warp's lanes; bytes from the L2 cache (assumed).
_HALF_PRODUCTS, _TF32_PRODUCTS, _FMA_PRODUCTS, _SHARED_WORDS, _L2_BYTES = 1024, 512, 128, 64, 32


def _tile_cycles(m: int, n: int, tile: tuple[int, ...], itemsize: int, products: int, whole: bool | None) -> float:
    """Estimated cycles of M x N outputs in tiles of ``tile``, per product of an output. Only good for ranking tiles."""
    block_m, block_n, _, warps, _ = tile
    block_n = tile_size(n, 16, block_n)
    accumulators = block_m * block_n // (32 * warps)
    math = block_m * block_n / products
    # In Triton's layout a thread reads four rows, and a quarter as many columns as it has accumulators.
    shared = 32 * warps * (4 + accumulators / 4) / _SHARED_WORDS if products == _FMA_PRODUCTS else 0.0
    l2 = (block_m + block_n) * itemsize / _L2_BYTES
    programs = cdiv(m, block_m) * cdiv(n, block_n)
    rounds = cdiv(programs, MULTIPROCESSORS) if whole else programs / MULTIPROCESSORS
    slowest = max(math, shared, l2)
    # The three overlap, but not completely: a quarter of the shorter ones is added.
    return rounds * (slowest + (math + shared + l2 - slowest) / 4)


@functools.lru_cache(maxsize=4096)
def _pointer_tile(m: int, n: int, dtype: torch.dtype, exact: bool, irregular: bool, whole: bool | None) -> tuple[int, ...]:
    tiles: tuple[tuple[int, ...], ...]
    if dtype != torch.float32:
        tiles, products = (_SCATTERED_HALF_TILES if irregular else _HALF_TILES), _HALF_PRODUCTS
    elif exact:
        regular = _FMA_SMALL_TILES if whole is None else _FMA_TILES if whole else _FMA_SPLIT_TILES
        tiles, products = (_SCATTERED_FMA_TILES if irregular else regular), _FMA_PRODUCTS
    else:
        tiles, products = (_SCATTERED_TF32_TILES if irregular else _TF32_TILES), _TF32_PRODUCTS
    return min(tiles, key=lambda tile: (_tile_cycles(m, n, tile, dtype.itemsize, products, whole), tile[3]))


def matmul_config(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    input_precision: str,
    *,
    irregular_gather: bool = False,
    whole: bool | None = None,
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages of a pointer kernel of M x N outputs with K products each.

    ``tl.dot`` needs at least 16 in every dimension. With ``irregular_gather`` (a convolution that is strided, dilated or
    grouped, whose pointers are recomputed for each element, or one from or to NCHW) tiles are small, so that all fits the
    registers. ``whole``: True for a convolution whose programs sum all K products, so that only smaller tiles occupy more SMs;
    False if splitting the sum occupies them; None for other products, and for convolutions with int64 offsets.
    """
    if INTERPRETED:
        config = {
            "BLOCK_M": tile_size(m, 16, 512),
            "BLOCK_N": tile_size(n, 16, 512),
            "BLOCK_K": tile_size(k, 16, 256),
            "num_warps": 4,
            "num_stages": 1,
        }
    else:
        exact = dtype == torch.float32 and input_precision == "ieee"
        block_m, block_n, block_k, warps, stages = _pointer_tile(m, n, dtype, exact, irregular_gather, whole)
        config = {"BLOCK_M": block_m, "BLOCK_N": tile_size(n, 16, block_n), "BLOCK_K": block_k}
        config |= {"num_warps": warps, "num_stages": stages}
    return apply_overrides(config)


@functools.lru_cache(maxsize=4096)
def two_blocks(n: int, high: int) -> tuple[int, int]:
    """Two powers of 2, at most ``high``, whose sum tiles ``n`` with the least waste: (128, 0) for 256, (64, 32) for 96."""
    candidates = [(high, 0)] if n >= high else [(tile_size(n, 16, high), 0)]
    if n % 96 == 0 and n % high:
        candidates.append((64, 32))
    if n % 48 == 0 and n < 96:
        candidates.append((32, 16))
    return min(candidates, key=lambda blocks: (cdiv(n, sum(blocks)) * sum(blocks), blocks[1]))


@functools.lru_cache(maxsize=4096)
def conv2d_box(pixels: int, n: int, p: int, q: int) -> tuple[int, int, int]:
    """(images, rows, columns), powers of 2 with the product ``pixels``, that waste the least; of these the most square."""
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


def conv2d_tile(
    device: torch.device,
    operation: str,
    n: int,
    p: int,
    q: int,
    c: int,
    k: int,
    r: int,
    s: int,
    channels_last: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """The tile of a convolution pass: ``"images"`` (one pixel of many images) or ``"box"`` (a few images x rows x columns).

    One pixel of 64 or more images wastes nothing and skips the padding. If the channels are not a multiple of 128 bytes, its
    loads are narrow, 64 bytes an image, while a box still reads contiguous memory: measured faster for conv2 on an H100.
    NCHW outputs are written by boxes, whose pixels are contiguous in NCHW; one pixel of each image is not.
    """
    few_images = n < (3 if INTERPRETED else 48)
    narrow = c % _row(dtype) != 0 and k % 256 == 0 and not INTERPRETED
    config = {"IMAGES": int(channels_last and not few_images and not narrow)}
    if channels_last:
        config |= known(config, tuned(device, conv2d_key(operation, n, p, q, c, k, r, s, dtype)))
    return "images" if apply_overrides(config)["IMAGES"] else "box"


def conv2d_wgrad_by_images(n: int) -> bool:
    """Whether ``n`` images are enough for a weight gradient whose step is one pixel of 64 images."""
    return bool(apply_overrides({"IMAGES_WGRAD": int(n >= (1 if INTERPRETED else 32))})["IMAGES_WGRAD"])


def conv2d_images_config(
    device: torch.device,
    operation: str,
    n: int,
    p: int,
    q: int,
    c: int,
    k: int,
    r: int,
    s: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, int]:
    """Tiles of the images kernel for ``n`` images of p x q output pixels, c channels reduced, k written, r x s filters."""
    # On Blackwell, 256 columns of float32 spill registers.
    wide = dtype == torch.float32 and k % 256 == 0 and not INTERPRETED and capability(device) < 100
    block_n, block_n2 = two_blocks(k, 256 if wide else 128)
    if INTERPRETED:
        config = {"PIXELS": 1, "BLOCK_M": tile_size(n, 16, 64), "BLOCK_N": block_n, "BLOCK_N2": block_n2, "BLOCK_K": 128}
        config |= {"num_warps": 4, "num_stages": 1}
    else:
        block_m = 128 if n > 64 else 64
        # Two pixels share a narrow block of filters. Otherwise there are too few products for each TMA load.
        pixels = 2 if block_n + block_n2 <= 96 and block_m == 128 and q > 1 else 1
        area = block_m * (block_n + block_n2) * pixels
        warps = 8 if area > 128 * 128 or (dtype == torch.float32 and area == 128 * 128) else 4
        # With three stages of float32 two programs fit an SM: one computes products while the other stores.
        stages = 3 if dtype == torch.float32 and area <= 128 * 128 else 4
        config = {"PIXELS": pixels, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_N2": block_n2, "BLOCK_K": _row(dtype)}
        config |= {"num_warps": warps, "num_stages": stages}
    config |= {"WARP_SPECIALIZE": 0, "REGISTERS": 0}
    config |= known(config, tuned(device, conv2d_key(operation, n, p, q, c, k, r, s, dtype)))
    config = apply_overrides(config)
    return config | {"BLOCK_K": largest_divisor(c, config["BLOCK_K"])}


def conv2d_box_config(
    device: torch.device,
    operation: str,
    n: int,
    p: int,
    q: int,
    c: int,
    k: int,
    r: int,
    s: int,
    narrow: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, int]:
    """Tiles of the box kernel, so small that every SM gets some. Arguments as :func:`conv2d_images_config`.

    ``narrow``: the output's filters are not contiguous (NCHW), so that their offsets take registers.
    """
    if INTERPRETED:
        pixels, config = 64, {"BLOCK_N": tile_size(k, 16, 128), "BLOCK_K": 128, "num_warps": 4, "num_stages": 1}
    else:
        choices = [(128, 256, 8, 5)] if k % 256 == 0 and c % _row(dtype) != 0 else []
        choices += [] if narrow else [(256, 128, 8, 4)]
        choices += [(128, 128, 8, 4), (128, 64, 4, 4), (64, 64, 4, 5)]
        for pixels, block_n, warps, stages in choices:  # noqa: B007
            nb, th, tw = conv2d_box(pixels, n, p, q)
            programs = cdiv(n, nb) * cdiv(p, th) * cdiv(q, tw) * cdiv(k, block_n)
            if programs >= MULTIPROCESSORS:
                break
        config = {"BLOCK_N": block_n, "BLOCK_K": _row(dtype), "num_warps": warps, "num_stages": stages}
    nb, th, tw = conv2d_box(pixels, n, p, q)
    config = {"NB": nb, "TH": th, "TW": tw, "WARP_SPECIALIZE": 0} | config
    if not narrow:
        config |= known(config, tuned(device, conv2d_key(operation, n, p, q, c, k, r, s, dtype)))
    config = apply_overrides(config)
    return config | {"BLOCK_K": largest_divisor(c, config["BLOCK_K"])}


#: Estimates for an H100: clock cycles a microsecond, bytes of memory a microsecond, microseconds to start and end a program.
_CYCLES_US, _MEMORY_BYTES_US, _PROGRAM_US = 1700, 3.0e6, 2.0


def _row_cycles(block_m: int, block_n: int) -> float:
    """Fewest cycles in which one SM computes block_m x block_n sums of 128 bytes of products (TF32: 32, half precision: 64).

    The tensor cores take n / 2 cycles for 64 x n sums of 32 bytes. Shared memory moves 128 bytes a cycle: both operands of each
    such product are read from it, and the loaded blocks are written to it.
    """
    products = block_m * block_n / 32
    moved = block_m / 64 * (64 + block_n) + block_m + block_n
    return max(products, moved)


@functools.lru_cache(maxsize=1024)
def _by_batch_wgrad_rule(n: int, p: int, q: int, c: int, k: int, r: int, s: int) -> dict[str, int]:
    """Tiles and SPLIT of a weight gradient in TF32: the fewest parts within 5% of the shortest estimated time."""
    steps = p * q * cdiv(n, 32)

    def microseconds(config: dict[str, int]) -> float:
        columns = config["BLOCK_N"] + config["BLOCK_N2"]
        blocks = r * cdiv(s * c, columns) if config["FOLDED"] else r * s * (c // columns)
        rounds = cdiv(cdiv(k, config["BLOCK_M"]) * blocks * config["SPLIT"], MULTIPROCESSORS)
        step = _row_cycles(config["BLOCK_M"], columns) / _CYCLES_US
        parts = (2 * config["SPLIT"] + 1) * 4 * k * c * r * s  # parts are written and read; the sum is written
        return rounds * (cdiv(steps, config["SPLIT"]) * step + _PROGRAM_US) + parts / _MEMORY_BYTES_US

    candidates = []
    for block_m in (128, 256) if k % 256 == 0 else (128,):
        for block_n, block_n2 in ((256, 0), (128, 64), (128, 0), (64, 32), (64, 0), (32, 16), (32, 0), (16, 0), (8, 0)):
            for folded in (0, 1):
                columns = block_n + block_n2
                if (
                    block_m * columns > 128 * 256
                    or (not folded and c % columns)
                    or (folded and (s == 1 or columns > 2 * s * c))
                ):
                    continue
                tiles = {"POSITIONS": 1, "FOLDED": folded, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_N2": block_n2}
                stages = min(4, SHARED_BYTES * 9 // 10 // ((block_m + columns) * 128))
                tiles |= {"BLOCK_K": 32, "num_warps": 8, "num_stages": stages}
                candidates += [tiles | {"SPLIT": split} for split in range(1, min(24, steps) + 1)]
    limit = 1.05 * min(map(microseconds, candidates))
    close = [each for each in candidates if microseconds(each) <= limit]
    return min(close, key=lambda each: (each["SPLIT"], microseconds(each)))


def conv2d_by_batch_wgrad_config(
    device: torch.device, n: int, p: int, q: int, c: int, k: int, r: int, s: int
) -> dict[str, int]:
    """As :func:`conv2d_images_wgrad_config` for TF32, plus FOLDED: whether a block may span several columns of a filter row.

    The channels of all columns of a filter row are contiguous in a row of the images.
    """
    if INTERPRETED:
        config = conv2d_images_wgrad_config(device, n, p, q, c, k, r, s, torch.float32)
        config |= apply_overrides({"FOLDED": 0})
    else:
        config = dict(_by_batch_wgrad_rule(n, p, q, c, k, r, s))
        config |= known(config, _measured_wgrad(False, device, conv2d_key("conv2d_wgrad", n, p, q, c, k, r, s, torch.float32)))
        config = apply_overrides(config)
    if config["FOLDED"]:
        config["POSITIONS"] = 1
    elif c % (config["BLOCK_N"] + config["BLOCK_N2"]):
        config |= {"BLOCK_N": largest_divisor(c, config["BLOCK_N"]), "BLOCK_N2": 0}
    return config


def _half_step(config: dict[str, int], blocks: Sequence[int]) -> float:
    """Estimated microseconds of one step of a weight gradient in half precision, with columns in ``blocks``.

    As :func:`_row_cycles`, but each block of columns reads the first operand again, which dominates below 64 columns.
    """
    block_m, rows = config["BLOCK_M"], config["BLOCK_M"] / 16
    products = rows * sum(max(n / 2, 16 + n / 4) for n in blocks)
    moved = rows * sum(16 + n / 4 for n in blocks) + block_m + sum(blocks)
    return config["BLOCK_K"] / 64 * max(products, moved) / _CYCLES_US


@functools.lru_cache(maxsize=1024)
def _stream_k_rule(n: int, p: int, q: int, c: int, k: int, r: int, s: int) -> dict[str, int]:
    """Tiles of a weight gradient in equal shares: the ones with the shortest estimated time in half precision."""

    def microseconds(config: dict[str, int]) -> float:
        block_m, programs, blocks = config["BLOCK_M"], config["PROGRAMS"], _blocks(config)
        columns = sum(blocks)
        tiles = cdiv(k, block_m) * (r * cdiv(s * c, columns) if config["FOLDED"] else r * s * cdiv(c, columns))
        # Rows without input are skipped, and columns unless FOLDED: r / 4 a filter row on average if a layer keeps its size.
        inside = max(1 - r / 4 / p, 1 / r) * (1 if config["FOLDED"] else max(1 - s / 4 / q, 1 / s))
        busy = tiles * inside * p * q * cdiv(n, config["BLOCK_K"]) * _half_step(config, blocks) / MULTIPROCESSORS
        parts = 8 * (programs + tiles) * block_m * columns + 4 * k * c * r * s
        return busy + programs / MULTIPROCESSORS * _PROGRAM_US + parts / _MEMORY_BYTES_US

    candidates = []
    tiles = ((128, 256, 128), (128, 256, 0), (128, 128, 0), (128, 64, 0), (128, 32, 0), (128, 16, 0))
    for block_m, block_n, block_n2 in tiles:
        for folded in (0, 1) if s > 1 else (0,):
            warps = 8 if block_m * block_n > 128 * 128 else 4
            config = {"FOLDED": folded, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_N2": block_n2}
            config |= {"BLOCK_K": tile_size(n, 16, 64), "PROGRAMS": MULTIPROCESSORS * (8 // warps)}
            candidates.append(config | {"num_warps": warps, "num_stages": 3 if warps == 8 else 4})
    return min(candidates, key=microseconds)


def _blocks(config: dict[str, int]) -> list[int]:
    """Widths of a program's blocks of columns."""
    return [config[name] for name in ("BLOCK_N", "BLOCK_N2") if config[name]]


def conv2d_wgrad_streams(
    device: torch.device, n: int, p: int, q: int, c: int, k: int, r: int, s: int, *, dtype: torch.dtype
) -> bool:
    """Whether a weight gradient runs in equal shares (:mod:`.stream_k_wgrad`), not in the same number of parts for each tile.

    Only a table's entry turns this on: on an H100 at batch 128 equal shares took 5% less time for conv2 and 11 to 22% more for
    conv3, conv4 and conv5 (``benchmarks/NOTES.md``).
    """
    measured = tuned(device, conv2d_key("conv2d_wgrad", n, p, q, c, k, r, s, dtype))
    return bool(apply_overrides({"STREAM_K": measured.get("STREAM_K", 0)})["STREAM_K"])


def conv2d_stream_k_wgrad_config(
    device: torch.device, n: int, p: int, q: int, c: int, k: int, r: int, s: int, dtype: torch.dtype
) -> dict[str, int]:
    """PROGRAMS, FOLDED and tiles of :mod:`.stream_k_wgrad`: BLOCK_M filters x (BLOCK_N + BLOCK_N2) channels.

    A step is BLOCK_K images. With FOLDED a tile spans the columns of a filter row, not only channels of one filter position.
    """
    config = dict(_stream_k_rule(n, p, q, c, k, r, s))
    if dtype == torch.float32:
        config["BLOCK_K"] = tile_size(n, 16, 32)
    if INTERPRETED:
        config |= {"BLOCK_M": tile_size(k, 16, 128), "BLOCK_K": tile_size(n, 16, 64), "PROGRAMS": 3, "num_stages": 1}
    measured = _measured_wgrad(True, device, conv2d_key("conv2d_wgrad", n, p, q, c, k, r, s, dtype))
    return apply_overrides(config | known(config, measured))


def _measured_wgrad(streams: bool, device: torch.device, key: str) -> dict[str, int]:
    """A weight gradient's entry in the table if the entry's STREAM_K equals ``streams``, else no values."""
    measured = tuned(device, key)
    return measured if bool(measured.get("STREAM_K")) == streams else {}


def conv2d_images_wgrad_config(
    device: torch.device, n: int, p: int, q: int, c: int, k: int, r: int, s: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, int]:
    """Tiles of :mod:`.descriptor_wgrad`: BLOCK_M filters x (BLOCK_N + BLOCK_N2) channels, BLOCK_K images a step."""
    block_m, positions = 128, 1
    block_n, block_n2 = largest_divisor(c, 256 if k % 128 == 0 else 128), 0
    if c % 96 == 0 and block_n < 64:
        block_n, block_n2 = 64, 32
    if block_n + block_n2 < 128:
        positions = 2
        block_m = 256 if k % 256 == 0 else 128
    area = block_m * (block_n + block_n2) * positions
    config = {"POSITIONS": positions, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_N2": block_n2}
    config |= {"BLOCK_K": tile_size(n, 16, _row(dtype)), "num_warps": 8 if area > 128 * 128 else 4, "num_stages": 3}
    if INTERPRETED:
        config |= {"BLOCK_M": tile_size(k, 16, 128), "num_stages": 1}
    measured = _measured_wgrad(False, device, conv2d_key("conv2d_wgrad", n, p, q, c, k, r, s, dtype))
    config = apply_overrides(config | known(config, measured))
    if c % (config["BLOCK_N"] + config["BLOCK_N2"]):
        config |= {"BLOCK_N": largest_divisor(c, config["BLOCK_N"]), "BLOCK_N2": 0}
    programs = cdiv(k, config["BLOCK_M"]) * cdiv(r * s, config["POSITIONS"])
    programs *= c // (config["BLOCK_N"] + config["BLOCK_N2"])
    at_once = MULTIPROCESSORS * (2 if config["num_warps"] == 4 else 1)
    steps = p * q * cdiv(n, config["BLOCK_K"])
    wanted = 2 if INTERPRETED else at_once // programs
    return config | apply_overrides({"SPLIT": measured.get("SPLIT", max(1, min(wanted, steps)))})


def conv2d_rows_config(device: torch.device, n: int, p: int, q: int, positions: int, k: int, r: int) -> dict[str, int]:
    """Tiles of a TF32 first layer: one pixel of BLOCK_M images x (BLOCK_N + BLOCK_N2) filters, BLOCK_K positions a step."""
    block_n, block_n2 = two_blocks(k, 128)
    block_m = 128 if n > 64 else 64
    config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_N2": block_n2, "BLOCK_K": 32}
    config |= {"num_warps": 8 if block_m == 128 else 4, "num_stages": 4}
    if INTERPRETED:
        config |= {"BLOCK_M": tile_size(n, 16, 64), "num_stages": 1}
    config |= known(config, tuned(device, conv2d_key("conv2d_rows_fprop", n, p, q, positions, k, r, 1, torch.float32)))
    config = apply_overrides(config)
    return config | {"BLOCK_K": largest_divisor(positions, config["BLOCK_K"])}


def strips_of(q: int, programs: int, programs_per_multiprocessor: int) -> int:
    """Number of strips for ``q`` columns of windows, chosen so that the busiest SM computes the fewest columns.

    Neighbouring strips both compute the column of the convolution that they share.
    """

    def columns_one_after_another(strips: int) -> int:
        return cdiv(programs * strips, programs_per_multiprocessor * MULTIPROCESSORS) * (2 * cdiv(q, strips) + 1)

    return min(range(1, min(q, 16) + 1), key=columns_one_after_another)


def conv2d_rows_wgrad_config(device: torch.device, n: int, p: int, q: int, fold: int, k: int) -> dict[str, int]:
    """Tiles of a TF32 first layer's weight gradient: BLOCK_M positions x (BLOCK_N + BLOCK_N2) filters, BLOCK_K images a step.

    The convolution's output has p x q pixels.
    """
    block_n, block_n2 = two_blocks(k, 64)
    config = {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_N2": block_n2, "BLOCK_K": 32, "num_stages": 3}
    # Compiled for Blackwell by Triton 3.8, four warps spill.
    config |= {"num_warps": 4 if capability(device) < 100 else 8}
    if INTERPRETED:
        config |= {"BLOCK_K": tile_size(n, 16, 32), "num_stages": 1}
    measured = tuned(device, conv2d_key("conv2d_rows_wgrad", n, p, q, fold, k, 3, 1, torch.float32))
    config = apply_overrides(config | known(config, measured))
    programs = cdiv(fold, config["BLOCK_M"]) * cdiv(k, config["BLOCK_N"] + config["BLOCK_N2"])
    steps = p * q * cdiv(n, config["BLOCK_K"])
    wanted = 2 if INTERPRETED else max(1, 2 * MULTIPROCESSORS // programs)  # two programs fit into one SM
    return config | apply_overrides({"SPLIT": measured.get("SPLIT", max(1, min(wanted, steps)))})
