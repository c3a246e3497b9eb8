"""Rules for tile sizes, warps and stages of a strided first layer in half precision, with and without its pool."""

from __future__ import annotations

import torch

from ..configs.tables import MULTIPROCESSORS, apply_overrides, known, tile_size, tuned
from ..runtime.backend import INTERPRETED, capability
from ..runtime.launch import cdiv
from .rules import conv2d_key, strips_of, two_blocks


def conv2d_stem_config(device: torch.device, n: int, p: int, q: int, fold: int, k: int, narrow: bool = False) -> dict[str, int]:
    """Tiles of a strided first layer: BLOCK_M images x COLUMNS pixels of a row x (BLOCK_N + BLOCK_N2) filters.

    ``narrow``: the output's filters are not contiguous (NCHW), so that their offsets take registers.
    """
    block_n, block_n2 = two_blocks(k, 64 if k % 96 else 128)
    if narrow and not INTERPRETED:
        block_n, block_n2 = (32, 16) if k % 48 == 0 else (32, 0)
    block_k, block_k2 = (32, 16) if fold == 48 else (128, 16)
    config = {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_N2": block_n2, "BLOCK_K": block_k, "BLOCK_K2": block_k2}
    config |= {"COLUMNS": cdiv(q, 2), "num_warps": 4, "num_stages": 3 if fold == 48 else 2}
    if INTERPRETED:
        config |= {"BLOCK_M": tile_size(n, 16, 64), "num_stages": 1}
    if not narrow:
        config |= known(config, tuned(device, conv2d_key("conv2d_stem_fprop", n, p, q, fold, k, 3, 1)))
    applied = apply_overrides(config)
    return applied | {"BLOCK_K": block_k, "BLOCK_K2": block_k2} if applied["BLOCK_K"] + applied["BLOCK_K2"] < fold else applied


def conv2d_stem_pool_fused(device: torch.device, n: int, p: int, q: int, fold: int, k: int) -> bool:
    """Whether a strided first layer and its 3 x 3 pool of p x q windows run as one kernel.

    With three channels the cells of a column fill shared memory, so the next column cannot be loaded at the same time.
    """
    config = {"FUSED": int(fold == 48)}
    config |= known(config, tuned(device, conv2d_key("conv2d_stem_pool_fprop", n, p, q, fold, k, 3, 1)))
    return bool(apply_overrides(config)["FUSED"])


def conv2d_stem_pool_config(
    device: torch.device, n: int, p: int, q: int, fold: int, k: int, narrow: bool = False
) -> dict[str, int]:
    """Tiles of the layer with its pool: BLOCK_M images x ROWS rows of COLUMNS windows x (BLOCK_N + BLOCK_N2) filters.

    There are p x q windows. ``narrow``: offsets take registers, because they are int64 or filters are not contiguous.
    """
    block_n, block_n2 = two_blocks(k, 64)
    if narrow and not INTERPRETED:
        block_n, block_n2 = (32, 16) if k % 48 == 0 else (32, 0)
    block_k, block_k2 = (32, 16) if fold == 48 else (128, 16)
    config = {"ROWS": 1, "BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_N2": block_n2, "BLOCK_K": block_k, "BLOCK_K2": block_k2}
    config |= {"num_warps": 4, "num_stages": 2 if fold == 48 else 1}
    if INTERPRETED:
        config |= {"BLOCK_M": tile_size(n, 16, 64), "num_stages": 1}
    measured = {} if narrow else tuned(device, conv2d_key("conv2d_stem_pool_fprop", n, p, q, fold, k, 3, 1))
    config = apply_overrides(config | known(config, measured))
    if config["BLOCK_K"] + config["BLOCK_K2"] < fold:
        config |= {"BLOCK_K": block_k, "BLOCK_K2": block_k2}
    programs = cdiv(p, config["ROWS"]) * cdiv(n, config["BLOCK_M"])
    programs *= cdiv(k, config["BLOCK_N"] + config["BLOCK_N2"])
    strips = strips_of(q, programs, 2)  # an SM runs two programs at once
    return config | apply_overrides({"COLUMNS": measured.get("COLUMNS", cdiv(q, strips))})


def conv2d_stem_wgrad_config(device: torch.device, n: int, p: int, q: int, fold: int, k: int) -> dict[str, int]:
    """Tiles of the layer's weight gradient: BLOCK_M positions x (BLOCK_N + BLOCK_N2) filters, BLOCK_K images a step."""
    block_n, block_n2 = two_blocks(k, 64 if k % 96 else 128)
    # On Blackwell, four warps spill registers.
    warps = 4 if capability(device) < 100 else 8
    config = {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_N2": block_n2, "BLOCK_K": 128 if n > 64 else 64, "num_warps": warps}
    config |= {"num_stages": 3}
    if INTERPRETED:
        config |= {"BLOCK_K": tile_size(n, 16, 64), "num_stages": 1}
    measured = tuned(device, conv2d_key("conv2d_stem_wgrad", n, p, q, fold, k, 3, 1))
    config = apply_overrides(config | known(config, measured))
    programs = cdiv(fold, config["BLOCK_M"]) * cdiv(k, config["BLOCK_N"] + config["BLOCK_N2"])
    steps = p * q * cdiv(n, config["BLOCK_K"])
    wanted = 2 if INTERPRETED else max(1, MULTIPROCESSORS // programs)
    return config | apply_overrides({"SPLIT": measured.get("SPLIT", min(wanted, steps))})


def conv2d_stem_pool_wgrad_fused(device: torch.device, n: int, p: int, q: int, fold: int, k: int) -> bool:
    """Whether the layer's weight gradient also computes the gradient of its pool of p x q windows."""
    measured = tuned(device, conv2d_key("conv2d_stem_pool_wgrad", n, p, q, fold, k, 3, 1))
    return bool(apply_overrides({"FUSED": measured.get("FUSED", 1)})["FUSED"])


def conv2d_stem_pool_wgrad_config(
    device: torch.device, n: int, p: int, q: int, fold: int, k: int, depth: int
) -> dict[str, int]:
    """Tiles of the weight gradient with the pool: BLOCK_M positions x BLOCK_N filters, 2 x 2 pixels of BLOCK_K images a step.

    There are p x q windows. ``depth``: positions of a cell; the kernel reads one cell more than a filter row has.
    """
    config = {"BLOCK_M": 64, "BLOCK_N": tile_size(k, 16, 32), "BLOCK_K": tile_size(n, 16, 64)}
    config |= {"num_warps": 4, "num_stages": 1 if INTERPRETED else 2}
    measured = tuned(device, conv2d_key("conv2d_stem_pool_wgrad", n, p, q, fold, k, 3, 1))
    config = apply_overrides(config | known(config, measured))
    programs = cdiv(fold + depth, config["BLOCK_M"]) * cdiv(k, config["BLOCK_N"])
    steps = (p + 1) * (q + 1) * cdiv(n, config["BLOCK_K"])
    wanted = 2 if INTERPRETED else max(1, 2 * MULTIPROCESSORS // programs)  # an SM runs two programs at once
    return config | apply_overrides({"SPLIT": measured.get("SPLIT", min(wanted, steps))})
