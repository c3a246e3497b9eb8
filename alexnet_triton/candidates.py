"""Configurations of the convolution kernels that :mod:`alexnet_triton.tune` measures.

Names are those of the kernels: n images, c channels, k filters of r rows and s columns, ``itemsize`` bytes per element.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from kernels.configs.tables import MULTIPROCESSORS, SHARED_BYTES
from kernels.convolution import rules, taps_rules
from kernels.runtime.launch import cdiv

Candidate = dict[str, int]


def _fits(bytes_a_stage: int, stages: int, accumulators: int, warps: int, most: int = 192) -> bool:
    """Whether ``stages`` fit into shared memory, and the accumulators into registers: from 32 to ``most`` per thread."""
    return stages * bytes_a_stage <= SHARED_BYTES - 1024 and 32 <= accumulators / (32 * warps) <= most


def images(n: int, c: int, k: int, itemsize: int, linked: bool = False) -> Iterator[Candidate]:
    """Configurations of the images kernel, for the forward pass or input gradient; the sum is over c channels.

    ``linked``: the epilogue applies a ReLU's gradient. With four warps, 128 accumulators per thread and the copies that a
    float32 launch makes leave no registers for that (compiled for sm_90).
    """
    if n < 64:
        return
    filters = [(64, 32), (128, 0)] if k == 96 else [(128, 0), (256, 0)] if k % 256 == 0 else [(128, 0)]
    block_k = min(c & -c, 128 // itemsize)
    for block_m, (n1, n2), pixels, warps, stages in itertools.product((64, 128), filters, (1, 2), (4, 8), (3, 4, 5)):
        stage = (block_m * pixels + n1 + n2) * block_k * itemsize
        most = 64 if linked and itemsize == 4 and warps == 4 else 128
        if _fits(stage, stages, block_m * (n1 + n2) * pixels, warps, most):
            values = {"IMAGES": 1, "BLOCK_M": block_m, "BLOCK_N": n1, "BLOCK_N2": n2, "PIXELS": pixels, "BLOCK_K": block_k}
            yield values | {"num_warps": warps, "num_stages": stages}


def boxes(n: int, size: int, c: int, k: int, itemsize: int) -> Iterator[Candidate]:
    """Configurations of the box kernel, forward or input gradient; the sum is over c, the output is ``size`` x ``size``."""
    block_k = min(c & -c, 128 // itemsize)
    small = n * size * size * k < 2**22
    for pixels, block_n, warps, stages in itertools.product((64, 128, 256), (64, 128, 256), (4, 8), (3, 4, 5, 6)):
        if (k % block_n and block_n > 128) or block_n > 2 * k or (pixels * block_n < 128 * 128 and not small):
            continue
        if _fits((pixels + block_n) * block_k * itemsize, stages, pixels * block_n, warps, 128):
            nb, th, tw = rules.conv2d_box(pixels, n, size, size)
            values = {"IMAGES": 0, "NB": nb, "TH": th, "TW": tw, "BLOCK_N": block_n, "BLOCK_K": block_k}
            yield values | {"num_warps": warps, "num_stages": stages}


def taps(n: int, c: int, k: int, s: int, itemsize: int) -> Iterator[Candidate]:
    """Configurations of the forward pass over rows of taps, for channels that are no multiple of 128 bytes."""
    block_k = 128 // itemsize
    if n < taps_rules.FEWEST_IMAGES or c % block_k == 0 or s * c < block_k:
        return
    for block_m, block_n, warps, stages in itertools.product((64, 128, 256), (128, 256), (4, 8), (3, 4, 5)):
        stage = (block_m + block_n) * block_k * itemsize
        if _fits(stage, stages, block_m * block_n, warps, 128) and block_m <= max(64, n) and block_n < 2 * k:
            yield {
                "TAPS": 1,
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
                "BLOCK_K": block_k,
                "num_warps": warps,
                "num_stages": stages,
            }


def _splits(programs: int, stage: int, stages: int) -> list[int]:
    """Numbers of parts to split a sum into: they give 0.95 and 2 times as many programs as all SMs hold at once."""
    held = min(2, SHARED_BYTES // (stages * stage))
    return sorted({max(1, round(MULTIPROCESSORS * held * share / programs)) for share in (0.95, 2.0)})


def images_wgrad(c: int, k: int, positions: int) -> Iterator[Candidate]:
    """Configurations of the weight gradient in half precision; a filter has ``positions`` positions."""
    channels = [(64, 32)] if c == 96 else [(128, 0), (256, 0)] if c % 256 == 0 else [(128, 0)]
    rows = (128, 256) if k % 256 == 0 else (128,)
    for block_m, (n1, n2), together, block_k, warps, stages in itertools.product(
        rows, channels, (1, 2), (64, 128), (4, 8), (3, 4, 5)
    ):
        stage = (block_m + (n1 + n2) * together) * block_k * 2
        if not _fits(stage, stages, block_m * (n1 + n2) * together, warps) or (stages > 3 and block_k > 64):
            continue
        programs = cdiv(k, block_m) * (c // (n1 + n2)) * cdiv(positions, together)
        values = {"STREAM_K": 0, "POSITIONS": together, "BLOCK_M": block_m, "BLOCK_N": n1, "BLOCK_N2": n2, "BLOCK_K": block_k}
        for split in _splits(programs, stage, stages):
            yield values | {"num_warps": warps, "num_stages": stages, "SPLIT": split}


def stream_k_wgrad(c: int, k: int, s: int, itemsize: int) -> Iterator[Candidate]:
    """Configurations of the weight gradient in equal shares (stream-K)."""
    rows = (128, 256) if k % 256 == 0 else (128,)
    blocks = ((256, 128), (256, 0), (128, 64), (128, 0))
    for block_m, (n1, n2), folded, block_k, warps, stages in itertools.product(
        rows, blocks, (0, 1), (128 // itemsize, 256 // itemsize), (4, 8), (3, 4, 5)
    ):
        columns = n1 + n2
        covered = cdiv(s * c, columns) * columns
        if (not folded and c % columns) or (folded and (s == 1 or 6 * s * c < 5 * covered)):
            continue
        stage = (block_m + columns) * block_k * itemsize
        if _fits(stage, stages, block_m * columns, warps, 192 if warps == 8 else 128):
            values = {"STREAM_K": 1, "FOLDED": folded, "BLOCK_M": block_m, "BLOCK_N": n1, "BLOCK_N2": n2, "BLOCK_K": block_k}
            programs = MULTIPROCESSORS * min(8 // warps, SHARED_BYTES // (stages * stage))
            yield values | {"PROGRAMS": programs, "num_warps": warps, "num_stages": stages}


def by_batch_wgrad(c: int, k: int, r: int, s: int) -> Iterator[Candidate]:
    """Configurations of the weight gradient in TF32, which reads copies with the batch innermost.

    If FOLDED, a block's columns span all filter columns of a row; at most a sixth of them may lie beyond the last one.
    """
    rows = (128, 256) if k % 256 == 0 else (128,)
    blocks = ((256, 0), (128, 64), (128, 0), (64, 32))
    for block_m, (n1, n2), folded, warps, stages in itertools.product(rows, blocks, (0, 1), (4, 8), (3, 4, 5)):
        columns = n1 + n2
        covered = cdiv(s * c, columns) * columns
        if (not folded and c % columns) or (folded and (s == 1 or 6 * s * c < 5 * covered)):
            continue
        stage = (block_m + columns) * 128
        if not _fits(stage, stages, block_m * columns, warps, 128):
            continue
        programs = cdiv(k, block_m) * r * (covered // columns if folded else s * (c // columns))
        values = {"POSITIONS": 1, "FOLDED": folded, "BLOCK_M": block_m, "BLOCK_N": n1, "BLOCK_N2": n2, "BLOCK_K": 32}
        for split in _splits(programs, stage, stages):
            yield values | {"num_warps": warps, "num_stages": stages, "SPLIT": split}


def stem_fprop(columns: int) -> Iterator[Candidate]:
    """Configurations of the forward pass of a strided first layer in half precision."""
    for (block_m, warps), (n1, n2), (k1, k2), strips, stages in itertools.product(
        ((64, 4), (128, 8)), ((64, 32), (128, 0)), ((32, 16), (64, 0)), (1, 2, 3, 6), (2, 3, 4)
    ):
        values = {"BLOCK_M": block_m, "BLOCK_N": n1, "BLOCK_N2": n2, "BLOCK_K": k1, "BLOCK_K2": k2}
        if 3 * ((n1 + n2) + stages * block_m) * (k1 + k2) * 2 < SHARED_BYTES - 2**15:
            yield values | {"COLUMNS": cdiv(columns, strips), "num_warps": warps, "num_stages": stages}


def stem_wgrad(n: int) -> Iterator[Candidate]:
    """Configurations of the weight gradient of a strided first layer in half precision."""
    for block_k, (n1, n2), warps, stages, split in itertools.product(
        (64, 128), ((64, 32), (128, 0)), (4, 8), (2, 3, 4), (MULTIPROCESSORS, 2 * MULTIPROCESSORS)
    ):
        shared = stages * (3 * 64 + n1 + n2) * block_k * 2
        if shared * (split // MULTIPROCESSORS) < SHARED_BYTES and block_k <= max(64, n):
            values = {"BLOCK_M": 64, "BLOCK_N": n1, "BLOCK_N2": n2, "BLOCK_K": block_k, "SPLIT": split}
            yield values | {"num_warps": warps, "num_stages": stages}


def stem_pool_fprop(columns: int) -> Iterator[Candidate]:
    """Configurations of a strided first layer and its pool in half precision, fused or not; ``columns`` counts pool windows."""
    yield {"FUSED": 0}
    for rows, (block_m, warps), (n1, n2), strips, stages in itertools.product(
        (1, 2), ((64, 4), (128, 8)), ((64, 32), (32, 16), (32, 0)), (3, 5, 9, 13), (1, 2, 3)
    ):
        values = {"FUSED": 1, "ROWS": rows, "BLOCK_M": block_m, "BLOCK_N": n1, "BLOCK_N2": n2, "BLOCK_K": 32, "BLOCK_K2": 16}
        if (stages * (2 * rows + 3) * block_m + 3 * (n1 + n2)) * 48 * 2 < SHARED_BYTES - 2**15:
            yield values | {"COLUMNS": cdiv(columns, strips), "num_warps": warps, "num_stages": stages}


def stem_pool_wgrad(n: int) -> Iterator[Candidate]:
    """Configurations of that layer's weight gradient and the pool's in half precision, fused or not, for 96 filters.

    Compiled for sm_90 by Triton 3.6, more than 128 images over all stages spill. 32 filters leave registers for two programs.
    """
    yield {"FUSED": 0}
    for block_k, block_n, stages, held in itertools.product((32, 64), (16, 32), (2, 3, 4), (1, 2, 3, 4)):
        shared = block_k * (64 * 8 * stages + 10 * block_n * stages)
        if block_k * stages <= 128 and held * block_n <= 64 and shared * held < SHARED_BYTES and block_k <= max(32, n):
            values = {"FUSED": 1, "BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4, "num_stages": stages}
            yield values | {"SPLIT": MULTIPROCESSORS * held // (96 // block_n)}


def rows_fprop(n: int, positions: int) -> Iterator[Candidate]:
    """Configurations of the forward pass of a strided first layer in TF32; a filter row has ``positions`` positions."""
    block_k = min(positions & -positions, 32)
    for block_m, (n1, n2), warps, stages in itertools.product((64, 128), ((64, 32), (128, 0)), (4, 8), (3, 4, 6)):
        if _fits((block_m + n1 + n2) * block_k * 4, stages, block_m * (n1 + n2), warps, 128) and block_m <= max(64, n):
            values = {"BLOCK_M": block_m, "BLOCK_N": n1, "BLOCK_N2": n2, "BLOCK_K": block_k}
            yield values | {"num_warps": warps, "num_stages": stages}


def rows_wgrad(n: int) -> Iterator[Candidate]:
    """Configurations of a strided first layer's weight gradient in TF32; a block has three filter rows of 64 positions."""
    for (n1, n2), block_k, warps, stages, held in itertools.product(
        ((64, 32), (64, 0), (32, 16)), (32, 64), (4, 8), (2, 3, 4), (1, 2)
    ):
        shared = (3 * 64 + n1 + n2) * stages * block_k * 4
        if shared * held <= SHARED_BYTES - 1024 and block_k <= max(32, n):
            values = {"BLOCK_M": 64, "BLOCK_N": n1, "BLOCK_N2": n2, "BLOCK_K": block_k}
            split = max(1, MULTIPROCESSORS * held // cdiv(96, n1 + n2))
            yield values | {"num_warps": warps, "num_stages": stages, "SPLIT": split}
