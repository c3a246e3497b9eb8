"""The rules that decide when a forward convolution reduces over rows of taps (:mod:`.taps`), and with which tiles."""

from __future__ import annotations

import functools

import torch

from ..configs.tables import apply_overrides, known, largest_divisor, tile_size, tuned
from ..runtime.backend import INTERPRETED
from ..runtime.launch import cdiv
from .rules import _row, _row_cycles, conv2d_box, conv2d_key

#: Fewest images for rows of taps: with fewer, most of a tile is wasted.
FEWEST_IMAGES = 48


@functools.lru_cache(maxsize=1024)
def _taps_pay(n: int, p: int, q: int, c: int, k: int, r: int, s: int, row: int) -> bool:
    """Whether rows of taps take fewer cycles than boxes, by an estimate; ``row``: number of elements in 128 bytes.

    Rows of taps gain nothing if the channels fill whole rows of 128 bytes. With few images they waste most of a tile.
    """
    if n < FEWEST_IMAGES or k % 128 or c % row == 0 or s == 1 or s * c < row:
        return False
    block_m, block_n = _tile(n, k)
    inside = max(1 - r / 4 / p, 1 / r)  # share of the filter rows that meet the input, as in rules._stream_k_rule
    taps = cdiv(n, block_m) * p * q * (k // block_n) * inside * _row_cycles(block_m, block_n)
    nb, th, tw = conv2d_box(128, n, p, q)
    filters = 256 if k % 256 == 0 else 128
    box = cdiv(n, nb) * cdiv(p, th) * cdiv(q, tw) * (k // filters) * _row_cycles(filters, 128)
    return taps < box


def _tile(n: int, k: int) -> tuple[int, int]:
    """(images, filters) of a program."""
    return (128, 256 if k % 256 == 0 else 128) if n > 64 else (64, 128)


def conv2d_by_taps(
    device: torch.device,
    n: int,
    p: int,
    q: int,
    c: int,
    k: int,
    r: int,
    s: int,
    *,
    channels_last: bool,
    dtype: torch.dtype,
) -> bool:
    """Whether a forward pass reduces over rows of taps.

    A table's entry without TAPS means that other kernels were faster, or that only other kernels were measured. Boxes write
    NCHW outputs (:func:`.rules.conv2d_tile`).
    """
    measured = tuned(device, conv2d_key("conv2d_fprop", n, p, q, c, k, r, s, dtype)) if channels_last else {}
    config = {"TAPS": measured.get("TAPS", 0)}
    if channels_last and not measured and not INTERPRETED:
        config["TAPS"] = int(_taps_pay(n, p, q, c, k, r, s, _row(dtype)))
    return bool(apply_overrides(config)["TAPS"])


def conv2d_taps_config(
    device: torch.device,
    n: int,
    p: int,
    q: int,
    c: int,
    k: int,
    r: int,
    s: int,
    *,
    channels_last: bool,
    dtype: torch.dtype,
) -> dict[str, int]:
    """Tiles of BLOCK_M images x BLOCK_N filters; BLOCK_K columns of a filter row a step, BLOCK_K2 in the rest of the row.

    An NCHW output gets smaller tiles: its filters are not contiguous, and their offsets take registers.
    """
    if INTERPRETED:
        config = {"BLOCK_M": tile_size(n, 16, 64), "BLOCK_N": tile_size(k, 16, 128), "num_warps": 4, "num_stages": 1}
    else:
        block_m, block_n = _tile(n, k) if channels_last else (64, 64)
        large = block_m * block_n > 128 * 128
        # With three stages of a smaller tile two programs fit an SM.
        config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 8 if large else 4, "num_stages": 4 if large else 3}
    config["BLOCK_K"] = _row(dtype)
    measured = tuned(device, conv2d_key("conv2d_fprop", n, p, q, c, k, r, s, dtype))
    if channels_last and measured.get("TAPS"):
        config |= known(config, measured)
    config = apply_overrides(config)
    columns = s * c
    block_k = min(config["BLOCK_K"], 1 << columns.bit_length() - 1)
    return config | {"BLOCK_K": block_k, "BLOCK_K2": largest_divisor(columns % block_k or block_k, block_k)}
