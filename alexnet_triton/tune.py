"""Find the fastest configuration of each kernel on the GPU at hand: ``alexnet-triton tune``.

Each candidate runs its operation on random tensors, is held to the same operation in float32, and only then is timed. The
winners are written to ``kernels/configs/<gpu>.json``, which :mod:`kernels.configs.tables` reads; what was not measured follows
its rules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels import linear_rules
from kernels.configs import tables
from kernels.convolution import rules, stem
from kernels.convolution.problem import Geometry, Problem
from kernels.convolution.select import dgrad, fprop, wgrad
from kernels.runtime import launch
from kernels.runtime.arguments import matmul_input_precision
from kernels.runtime.launch import cdiv

from .files import check_writable, write_atomically
from .folders import held
from .training import float32_products

Candidate = dict[str, int]

#: Convolutions. name: channels, image size, filters, filter size, stride, padding
LAYERS = {
    "conv1": (1, 224, 96, 11, 4, 1),
    "conv1_pool": (1, 224, 96, 11, 4, 1),
    "conv2": (96, 26, 256, 5, 1, 2),
    "conv3": (256, 12, 384, 3, 1, 1),
    "conv4": (384, 12, 384, 3, 1, 1),
    "conv5": (384, 12, 256, 3, 1, 1),
}

#: The first layer with its ReLU and 3 x 3 pool of stride 2, in one kernel or in two.
POOLED = "conv1_pool"

#: Convolutions right after another one's ReLU, whose gradient they take on the way.
LINKED = ("conv4", "conv5")

#: Linear layers. name: in features, out features, whether ReLU follows
LINEAR_LAYERS = {"fc1": (6400, 4096, True), "fc2": (4096, 4096, True), "fc3": (4096, 10, False)}


@dataclasses.dataclass(frozen=True)
class Job:
    """One pass of one layer at one batch size: what is tuned."""

    layer: str
    pass_: str
    batch: int

    @property
    def size(self) -> int:
        """Height and width of the convolution's output."""
        _, size, _, r, stride, padding = LAYERS[self.layer]
        return (size + 2 * padding - r) // stride + 1

    @property
    def product(self) -> tuple[int, int, int]:
        """M, N, K of the linear layer's matrix product."""
        features, outputs, _ = LINEAR_LAYERS[self.layer]
        m, n, k = self.batch, outputs, features
        return {"fprop": (m, n, k), "dgrad": (m, k, n), "wgrad": (n, k, m)}[self.pass_]

    @property
    def key(self) -> str:
        """Its name in the table, for half precision."""
        return self.table_key(torch.bfloat16)

    def table_key(self, dtype: torch.dtype) -> str:
        """Its name in the table; of a linear layer in float32 PyTorch's switch for TF32 is a part."""
        if self.layer in LINEAR_LAYERS:
            return linear_rules.linear_key(self.pass_, *self.product, dtype, matmul_input_precision(dtype))
        c, size, k, r, stride, _ = LAYERS[self.layer]
        if self.layer == POOLED:
            fold, pooled = stem.fold(c, r, stride), (self.size - 1) // 2
            return rules.conv2d_key("conv2d_stem_pool_fprop", self.batch, pooled, pooled, fold, k, 3, 1)
        if stride > 1:
            fold = stem.fold(c, r, stride)
            return rules.conv2d_key(f"conv2d_stem_{self.pass_}", self.batch, self.size, self.size, fold, k, 3, 1)
        if self.pass_ == "dgrad":
            return rules.conv2d_key("conv2d_dgrad", self.batch, size, size, k, c, r, r)
        return rules.conv2d_key(f"conv2d_{self.pass_}", self.batch, self.size, self.size, c, k, r, r)

    def candidates(self, dtype: torch.dtype = torch.bfloat16) -> list[Candidate]:
        """All that are worth a measurement."""
        if self.layer in LINEAR_LAYERS:
            m, n, k = self.product
            if dtype != torch.float32 or matmul_input_precision(dtype) == "tf32":
                return linear_rules.linear_candidates(m, n, k, dtype.itemsize)
            # A forward pass with more than 16 outputs computes the transposed product.
            return linear_rules.fma_candidates(*((n, m, k) if self.pass_ == "fprop" and n > 16 else (m, n, k)))
        c, size, k, r, stride, _ = LAYERS[self.layer]
        if self.layer == POOLED:
            found = _stem_pool_fprop((self.size - 1) // 2)
        elif stride > 1:
            found = _stem_fprop(self.size) if self.pass_ == "fprop" else _stem_wgrad(self.batch)
        elif self.pass_ == "fprop":
            found = itertools.chain(_images(self.batch, c, k), _boxes(self.batch, self.size, c, k))
        elif self.pass_ == "dgrad":
            found = itertools.chain(_images(self.batch, k, c), _boxes(self.batch, size, k, c))
        else:
            found = _images_wgrad(c, k, r * r)
        # Not with WARP_SPECIALIZE: of many of these Triton 3.6's compiler ends the process, and 3.8 refuses all.
        return list(found)


#: Passes without a configuration of their own: no gradient of the images is wanted, conv1's pool is in one kernel with
#: it forward alone, and the ten classes' gradient has rows that no descriptor can describe.
_UNTUNED = {("conv1", "dgrad"), (POOLED, "dgrad"), (POOLED, "wgrad"), ("fc3", "dgrad"), ("fc3", "wgrad")}


def jobs(batches: tuple[int, ...], layers: tuple[str, ...] = (*LAYERS, *LINEAR_LAYERS)) -> list[Job]:
    """All passes of ``layers`` that a training step runs, the first batch first."""
    return [
        Job(layer, pass_, batch)
        for batch in batches
        for layer in layers
        for pass_ in ("fprop", "dgrad", "wgrad")
        if (layer, pass_) not in _UNTUNED
    ]


def _fits(elements: int, stages: int, accumulators: int, warps: int) -> bool:
    """Whether ``stages`` of so many half-precision elements fit shared memory, and the accumulators the registers."""
    return stages * elements * 2 <= tables.SHARED_BYTES - 1024 and 32 <= accumulators / (32 * warps) <= 192


def _images(n: int, c: int, k: int) -> Iterator[Candidate]:
    if n < 64:
        return
    filters = [(64, 32), (128, 0)] if k == 96 else [(128, 0), (256, 0)] if k % 256 == 0 else [(128, 0)]
    block_k = min(c & -c, 64)
    for block_m, (n1, n2), pixels, warps, stages in itertools.product((64, 128), filters, (1, 2), (4, 8), (3, 4, 5)):
        accumulators = block_m * (n1 + n2) * pixels
        if _fits((block_m * pixels + n1 + n2) * block_k, stages, accumulators, warps) and accumulators / (32 * warps) <= 128:
            values = {"IMAGES": 1, "BLOCK_M": block_m, "BLOCK_N": n1, "BLOCK_N2": n2, "PIXELS": pixels, "BLOCK_K": block_k}
            yield values | {"num_warps": warps, "num_stages": stages}


def _boxes(n: int, size: int, c: int, k: int) -> Iterator[Candidate]:
    block_k = min(c & -c, 64)
    small = n * size * size * k < 2**22
    for pixels, block_n, warps, stages in itertools.product((64, 128, 256), (64, 128, 256), (4, 8), (3, 4, 5, 6)):
        if (k % block_n and block_n > 128) or block_n > 2 * k or (pixels * block_n < 128 * 128 and not small):
            continue
        accumulators = pixels * block_n
        if _fits((pixels + block_n) * block_k, stages, accumulators, warps) and accumulators / (32 * warps) <= 128:
            nb, th, tw = rules.conv2d_box(pixels, n, size, size)
            values = {"IMAGES": 0, "NB": nb, "TH": th, "TW": tw, "BLOCK_N": block_n, "BLOCK_K": block_k}
            yield values | {"num_warps": warps, "num_stages": stages}


def _images_wgrad(c: int, k: int, positions: int) -> Iterator[Candidate]:
    channels = [(64, 32)] if c == 96 else [(128, 0), (256, 0)] if c % 256 == 0 else [(128, 0)]
    rows = (128, 256) if k % 256 == 0 else (128,)
    for block_m, (n1, n2), together, block_k, warps, stages in itertools.product(
        rows, channels, (1, 2), (64, 128), (4, 8), (3, 4, 5)
    ):
        accumulators = block_m * (n1 + n2) * together
        elements = (block_m + (n1 + n2) * together) * block_k
        if not _fits(elements, stages, accumulators, warps) or (stages > 3 and block_k > 64):
            continue
        programs = cdiv(k, block_m) * (c // (n1 + n2)) * cdiv(positions, together)
        values = {"POSITIONS": together, "BLOCK_M": block_m, "BLOCK_N": n1, "BLOCK_N2": n2, "BLOCK_K": block_k}
        # How many programs one multiprocessor holds at once, and a little more and less than that.
        held = min(2, tables.SHARED_BYTES // (stages * elements * 2))
        for split in sorted({max(1, round(132 * held * share / programs)) for share in (0.95, 2.0)}):
            yield values | {"num_warps": warps, "num_stages": stages, "SPLIT": split}


def _stem_fprop(columns: int) -> Iterator[Candidate]:
    for (block_m, warps), (n1, n2), (k1, k2), strips, stages in itertools.product(
        ((64, 4), (128, 8)), ((64, 32), (128, 0)), ((32, 16), (64, 0)), (1, 2, 3, 6), (2, 3, 4)
    ):
        values = {"BLOCK_M": block_m, "BLOCK_N": n1, "BLOCK_N2": n2, "BLOCK_K": k1, "BLOCK_K2": k2}
        if 3 * ((n1 + n2) + stages * block_m) * (k1 + k2) * 2 < tables.SHARED_BYTES - 2**15:
            yield values | {"COLUMNS": cdiv(columns, strips), "num_warps": warps, "num_stages": stages}


def _stem_wgrad(n: int) -> Iterator[Candidate]:
    for block_k, (n1, n2), warps, stages, split in itertools.product(
        (64, 128), ((64, 32), (128, 0)), (4, 8), (2, 3, 4), (132, 264)
    ):
        shared = stages * (3 * 64 + n1 + n2) * block_k * 2
        if shared * (split // 132) < tables.SHARED_BYTES and block_k <= max(64, n):
            values = {"BLOCK_M": 64, "BLOCK_N": n1, "BLOCK_N2": n2, "BLOCK_K": block_k, "SPLIT": split}
            yield values | {"num_warps": warps, "num_stages": stages}


def _stem_pool_fprop(columns: int) -> Iterator[Candidate]:
    yield {"FUSED": 0}
    for rows, (block_m, warps), (n1, n2), strips, stages in itertools.product(
        (1, 2), ((64, 4), (128, 8)), ((64, 32), (32, 16), (32, 0)), (3, 5, 9, 13), (1, 2, 3)
    ):
        values = {"FUSED": 1, "ROWS": rows, "BLOCK_M": block_m, "BLOCK_N": n1, "BLOCK_N2": n2, "BLOCK_K": 32, "BLOCK_K2": 16}
        if (stages * (2 * rows + 3) * block_m + 3 * (n1 + n2)) * 48 * 2 < tables.SHARED_BYTES - 2**15:
            yield values | {"COLUMNS": cdiv(columns, strips), "num_warps": warps, "num_stages": stages}


@functools.cache
def _tensors(layer: str, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random input, weight, bias and output gradient of a layer, channels-last."""
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    if layer in LINEAR_LAYERS:
        features, outputs, _ = LINEAR_LAYERS[layer]
        return randn(batch, features), randn(outputs, features) / features**0.5, randn(outputs), randn(batch, outputs)
    c, size, k, r, stride, padding = LAYERS[layer]
    out = (size + 2 * padding - r) // stride + 1
    out = (out - 1) // 2 if layer == POOLED else out
    x, w, dz = randn(batch, c, size, size), randn(k, c, r, r) / (c * r * r) ** 0.5, randn(batch, k, out, out)
    x, w, dz = (t.to(memory_format=torch.channels_last) for t in (x, w, dz))
    return x, w, randn(k), dz


def _pooled(job: Job, tensors: tuple[Tensor, ...]) -> Tensor:
    """The first layer with its pool, by the Triton kernels, positions written."""
    x, w, b, _ = tensors
    *_, stride, padding = LAYERS[job.layer]
    window = ([3, 3], [2, 2], [0, 0], [(job.size - 1) // 2] * 2)
    return torch.ops.alexnet_triton.conv2d_relu_max_pool2d_fprop(
        *(x, w, b, None, [stride] * 2, [padding] * 2, [1, 1], 1, [job.size] * 2), *window, True, True, False
    )[0]


def _run(job: Job, tensors: tuple[Tensor, ...]) -> Tensor:
    """The operation itself."""
    x, w, b, dz = tensors
    ops = torch.ops.alexnet_triton
    if job.layer == POOLED:
        return _pooled(job, tensors)
    if job.layer in LINEAR_LAYERS:
        if job.pass_ == "fprop":
            return ops.linear_fprop(x, w, b, None, 0.0, LINEAR_LAYERS[job.layer][2])
        return ops.linear_dgrad(dz, w) if job.pass_ == "dgrad" else ops.linear_wgrad(dz, x, w)
    *_, stride, padding = LAYERS[job.layer]
    geometry = Geometry((stride, stride), (padding, padding), (1, 1), 1)
    problem = Problem.of(x.shape, w, geometry, (job.size, job.size))
    if job.pass_ == "fprop":
        return fprop(x, w, b, problem, True)
    if job.pass_ == "dgrad":
        return dgrad(dz, w, problem, x if job.layer in LINKED else None)[0]
    return wgrad(dz, x, w, problem)


def _reference(job: Job, tensors: tuple[Tensor, ...]) -> Tensor:
    """The same by PyTorch, in the dtype of ``tensors``."""
    x, w, b, dz = tensors
    if job.layer in LINEAR_LAYERS:
        if job.pass_ == "fprop":
            y = F.linear(x, w, b)
            return F.relu(y) if LINEAR_LAYERS[job.layer][2] else y
        return dz @ w if job.pass_ == "dgrad" else dz.t() @ x
    *_, stride, padding = LAYERS[job.layer]
    if job.layer == POOLED:
        return F.max_pool2d(F.relu(F.conv2d(x, w, b, stride, padding)), 3, 2)
    if job.pass_ == "fprop":
        return F.relu(F.conv2d(x, w, b, stride, padding))
    wanted = [job.pass_ == "dgrad", job.pass_ == "wgrad", False]
    step, pad = [stride] * 2, [padding] * 2
    dx, dw, _ = torch.ops.aten.convolution_backward(dz, x, w, None, step, pad, [1, 1], False, [0, 0], 1, wanted)
    if job.pass_ == "wgrad":
        return dw
    return dx * (x > 0) if job.layer in LINKED else dx


def _milliseconds(function: Callable[[], object], milliseconds: int) -> float:
    """Median time of ``function`` as a CUDA graph, with a cold L2 cache: the host's part is not what is tuned."""
    import triton.testing

    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return float(triton.testing.do_bench(graph.replay, warmup=2, rep=milliseconds, quantiles=[0.5]))


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What came out of a job.

    Attributes:
        rule_ms, best_ms, peer_ms: milliseconds of the rule's configuration, of the fastest candidate and of PyTorch.
        best: the fastest candidate.
        wrong: the candidates that gave wrong results or could not run, and why.
        times: milliseconds of each right candidate, fastest first; the empty one is the rule's.
    """

    job: Job
    rule_ms: float
    best_ms: float
    peer_ms: float
    best: Candidate
    wrong: list[str]
    times: list[tuple[float, Candidate]]


@contextlib.contextmanager
def _configured(candidate: Candidate) -> Iterator[None]:
    """Run the block as ``candidate`` says and else by the rules. Two kernels in place of one: as the tables have each."""
    rules = contextlib.nullcontext() if candidate == {"FUSED": 0} else tables.untuned()
    with rules, tables.override(**candidate):
        yield


def tune_job(job: Job, dtype: torch.dtype, milliseconds: int = 12) -> Tuned:
    """Verify and time every candidate of ``job``.

    A candidate's largest error against float32 (of float32: against float64) must be at most twice PyTorch's own in ``dtype``,
    plus half a unit.
    """
    tensors = _tensors(job.layer, job.batch, dtype)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    exact = _reference(job, tuple(t.to(wide) for t in tensors))
    peer = _reference(job, tensors)
    peer_error = (peer.to(wide) - exact).abs().max().item()
    allowed = 2 * peer_error + 0.5 * torch.finfo(dtype).eps * exact.abs().max().item()
    wrong: list[str] = []
    times: list[tuple[float, Candidate]] = []
    candidates = [{}, *job.candidates(dtype)]
    for candidate in candidates:
        with _configured(candidate):
            try:
                for _ in range(2):  # twice: what a race spoils need not be spoiled the first time
                    error = (_run(job, tensors).to(wide) - exact).abs().max().item()
                    if not error <= allowed:
                        raise AssertionError(f"error {error:.2e}, allowed {allowed:.2e}")
                times.append((_milliseconds(lambda: _run(job, tensors), milliseconds), candidate))
            except Exception as error:  # whatever a candidate cannot do, another may
                _check_alive(candidate, error)
                wrong.append(f"{candidate}: {type(error).__name__} {str(error).splitlines()[0][:120]}")
    rule_ms = times[0][0]
    # The best few again, longer: a median over a dozen runs is not sure enough.
    finalists = sorted(times[1:], key=lambda timed: timed[0])[:3]
    again = []
    for _, candidate in finalists:
        with _configured(candidate):
            again.append((_milliseconds(lambda: _run(job, tensors), 4 * milliseconds), candidate))
    best_ms, best = min(again, key=lambda timed: timed[0])
    peer_ms = _milliseconds(lambda: _reference(job, tensors), milliseconds)
    return Tuned(job, rule_ms, best_ms, peer_ms, best, wrong, sorted(times, key=lambda timed: timed[0]))


def _check_alive(candidate: Candidate, error: Exception) -> None:
    """After an illegal access CUDA refuses this process whatever it asks for: nothing more can be measured.

    Raises:
        RuntimeError: it does.
    """
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as refusal:
        raise RuntimeError(f"{candidate} left the GPU unusable for this process: {str(error).splitlines()[0]}") from refusal


def _compile_share(share: int, shares: int, work: list[Job], dtype: torch.dtype) -> None:
    """Compile every ``shares``-th candidate into Triton's cache on disk, launching nothing."""

    def compile_only(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        kernel.warmup(grid=grid, **arguments)

    every = [(job, candidate) for job in work for candidate in job.candidates(dtype)]
    with launch.record_launches(compile_only):
        for job, candidate in every[share::shares]:
            with _configured(candidate):
                try:
                    _run(job, _tensors(job.layer, job.batch, dtype))
                except Exception:  # it fails again, and is reported, when it is its turn
                    continue


def compile_all(work: list[Job], dtype: torch.dtype, processes: int | None = None) -> None:
    """Compile all candidates, with as many processes as there are processors."""
    shares = processes or os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_compile_share, args=(i, shares, work, dtype)) for i in range(shares)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _table_so_far(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"configs": {}, "measured": {}}
    content = tables.load_table(path)
    if not isinstance(content.get("measured"), dict):
        raise ValueError(f"{path}: not a table of tuned configurations: it does not say what was measured")
    return content


def write_table(results: list[Tuned], dtype: torch.dtype, path: Path) -> None:
    """Write or update a table; other entries of the file stay, those that another process writes meanwhile too.

    A reader sees the old file or the new one.

    Raises:
        ValueError, OSError: as :func:`tune`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path.parent, warnings.warn, wait=True):
        content = _table_so_far(path)
        content["gpu"] = torch.cuda.get_device_name()
        content["versions"] = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
        content["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        content["dtype"] = str(dtype).removeprefix("torch.")
        for result in results:
            key = result.job.table_key(dtype)
            content["configs"][key] = result.best
            content["measured"][key] = {
                "layer": result.job.layer,
                "pass": result.job.pass_,
                "batch": result.job.batch,
                "ms": round(result.best_ms, 5),
                "rule_ms": round(result.rule_ms, 5),
                "pytorch_ms": round(result.peer_ms, 5),
                "candidates": len(result.times),
                "wrong": len(result.wrong),
            }
        write_atomically(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def tune(work: list[Job], dtype: torch.dtype, path: Path, report: Callable[[Tuned], None]) -> list[Tuned]:
    """Tune every job and write the table to ``path`` after each.

    Raises:
        ValueError: ``path`` is another file than a table; nothing was tuned, and it stays what it is.
        OSError: the table cannot be written. Where that can be known, nothing was tuned.
    """
    # Before minutes of work.
    _table_so_far(path)
    check_writable(path)
    torch.backends.cudnn.benchmark = True
    compile_all(work, dtype)
    results = []
    for job in work:
        with float32_products("float32"):
            result = tune_job(job, dtype)
            results.append(result)
            write_table(results, dtype, path)
        report(result)
        _tensors.cache_clear()
    return results


def speedup(results: list[Tuned]) -> float:
    """Geometric mean of PyTorch's time over ours."""
    return statistics.geometric_mean(r.peer_ms / r.best_ms for r in results)
