"""Find the fastest configuration of each kernel on the GPU at hand: ``alexnet-triton tune``.

Each candidate runs its operation on random tensors. Its result is compared with the same operation in float32 (for float32 in
float64), and only a correct candidate is timed. The fastest are written to ``kernels/configs/<gpu>.json``, which
:mod:`kernels.configs.tables` reads. Kernels without an entry follow their rules.
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

import kernels.pooling.autograd as pooling
from kernels import linear_rules
from kernels.configs import tables
from kernels.convolution import row_stem, rules, stem
from kernels.convolution.by_batch import copy
from kernels.convolution.problem import Geometry, Problem
from kernels.convolution.select import copies_by_batch, dgrad, fprop, input_cells, wgrad, wgrad_by_batch
from kernels.runtime import launch
from kernels.runtime.arguments import conv_input_precision, matmul_input_precision
from kernels.runtime.backend import capability

from . import candidates as of
from .candidates import Candidate
from .training.files import check_writable, write_atomically
from .training.run_folder import held

#: Values of --dtype: the tensors' dtype, and whether linear layers multiply in TF32. float32 convolutions are tuned in TF32,
#: PyTorch's default. Exact convolutions run on general kernels, which have no table.
PRECISIONS = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}


@contextlib.contextmanager
def float32_switches(linear_tf32: bool) -> Iterator[None]:
    """Set PyTorch's switches in the block: TF32 for convolutions, and for linear layers if ``linear_tf32``."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32, matmul.allow_tf32 = True, linear_tf32
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


#: Convolutions, by name: (channels, image size, filters, filter size, stride, padding).
LAYERS = {
    "conv1": (1, 224, 96, 11, 4, 1),
    "conv1_pool": (1, 224, 96, 11, 4, 1),
    "conv2": (96, 26, 256, 5, 1, 2),
    "conv3": (256, 12, 384, 3, 1, 1),
    "conv4": (384, 12, 384, 3, 1, 1),
    "conv5": (384, 12, 256, 3, 1, 1),
}

#: The first layer with its ReLU and 3 x 3 max-pool of stride 2, in one kernel or in two.
POOLED = "conv1_pool"
#: Said to who asks for that layer in float32.
NO_POOLED_JOB = f"{POOLED} has no kernels of its own in float32: its convolution's are those of conv1"

#: Convolutions right after another one's ReLU, whose mask their input gradient applies.
LINKED = ("conv4", "conv5")

#: Linear layers, by name: (in features, out features, whether ReLU follows).
LINEAR_LAYERS = {"fc1": (6400, 4096, True), "fc2": (4096, 4096, True), "fc3": (4096, 10, False)}

#: Passes of the kernels for linear layers with few outputs: forward, and all gradients together.
NARROW_PASSES = ("narrow_fprop", "narrow_backward")


@dataclasses.dataclass(frozen=True)
class Job:
    """The unit of tuning: one pass of one layer at one batch size."""

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
        return {"dgrad": (m, k, n), "wgrad": (n, k, m)}.get(self.pass_, (m, n, k))

    @property
    def key(self) -> str:
        """Key of the table's entry, for half precision."""
        return self.table_key(torch.bfloat16)

    def table_key(self, dtype: torch.dtype) -> str:
        """Key of the table's entry in ``dtype``. For float32 linear layers it includes PyTorch's switch for TF32."""
        if self.layer in LINEAR_LAYERS:
            return linear_rules.linear_key(self.pass_, *self.product, dtype, matmul_input_precision(dtype))
        c, size, k, r, stride, _ = LAYERS[self.layer]
        n, p, tf32 = self.batch, self.size, dtype == torch.float32
        if self.pass_ == "dgrad":
            return rules.conv2d_key("conv2d_dgrad", n, size, size, k, c, r, r, dtype)
        if stride == 1:
            return rules.conv2d_key(f"conv2d_{self.pass_}", n, p, p, c, k, r, r, dtype)
        operation = ("conv2d_rows_" if tf32 else "conv2d_stem_") + ("pool_" if self.layer == POOLED else "") + self.pass_
        if tf32 and self.pass_ == "fprop":
            height, reduced = r, self.positions
        else:
            height, reduced = 3, stem.fold(c, r, stride)
        if self.layer == POOLED:
            p = (p - 1) // 2
        return rules.conv2d_key(operation, n, p, p, reduced, k, height, 1, dtype)

    @property
    def needs_maxima(self) -> bool:
        """Whether the job is the weight gradient of the pooled layer, which needs the pool's maxima."""
        return self.layer == POOLED and self.pass_ == "wgrad"

    @property
    def geometry(self) -> Geometry:
        """Geometry of the convolution."""
        *_, stride, padding = LAYERS[self.layer]
        return Geometry((stride, stride), (padding, padding), (1, 1), 1)

    @property
    def positions(self) -> int:
        """Number of positions in one filter row of a strided first layer in TF32."""
        c, size, k, r, *_ = LAYERS[self.layer]
        sizes = (self.batch, c, size, size, k, r, r, self.size, self.size)
        return row_stem.Rows.of(Problem(*sizes, self.geometry, torch.float32, torch.device("meta"), "tf32")).positions

    def candidates(self, dtype: torch.dtype = torch.bfloat16) -> list[Candidate]:
        """All configurations that are measured for the job."""
        if self.layer in LINEAR_LAYERS:
            m, n, k = self.product
            if self.pass_ in NARROW_PASSES:  # NARROW=0 runs the matrix products, which have entries of their own
                return [{"NARROW": 0}, *linear_rules.linear_narrow_candidates(self.pass_, m, n, k, dtype.itemsize)]
            if dtype != torch.float32 or matmul_input_precision(dtype) == "tf32":
                return linear_rules.linear_candidates(m, n, k, dtype.itemsize)
            # A forward pass with more than 16 outputs computes the transposed product.
            return linear_rules.fma_candidates(*((n, m, k) if self.pass_ == "fprop" and n > 16 else (m, n, k)))
        c, size, k, r, stride, _ = LAYERS[self.layer]
        n, itemsize, tf32 = self.batch, dtype.itemsize, dtype == torch.float32
        if stride > 1 and self.pass_ == "wgrad":
            of_half = of.stem_pool_wgrad if self.layer == POOLED else of.stem_wgrad
            found = of.rows_wgrad(n) if tf32 else of_half(n)
        elif self.layer == POOLED:
            found = of.stem_pool_fprop((self.size - 1) // 2)
        elif stride > 1:
            found = of.rows_fprop(n, self.positions) if tf32 else of.stem_fprop(self.size)
        elif self.pass_ == "fprop":
            others = itertools.chain(of.images(n, c, k, itemsize), of.boxes(n, self.size, c, k, itemsize))
            found = itertools.chain(({"TAPS": 0, **each} for each in others), of.taps(n, c, k, r, itemsize))
        elif self.pass_ == "dgrad":
            found = itertools.chain(of.images(n, k, c, itemsize, self.layer in LINKED), of.boxes(n, size, k, c, itemsize))
        elif tf32:
            found = itertools.chain(of.by_batch_wgrad(c, k, r, r), of.stream_k_wgrad(c, k, r, itemsize))
        else:
            found = itertools.chain(of.images_wgrad(c, k, r * r), of.stream_k_wgrad(c, k, r, itemsize))
        # WARP_SPECIALIZE is left out: Triton 3.6's compiler ends the process on many of these, and 3.8 refuses all.
        return list(found)


#: Passes that are not tuned: the images need no gradient, and no tensor descriptor can describe the rows of the ten classes'
#: gradient.
_UNTUNED = {("conv1", "dgrad"), (POOLED, "dgrad"), ("fc3", "dgrad"), ("fc3", "wgrad")}


def jobs(
    batches: tuple[int, ...], layers: tuple[str, ...] = (*LAYERS, *LINEAR_LAYERS), dtype: torch.dtype = torch.bfloat16
) -> list[Job]:
    """Jobs for all passes of ``layers`` in a training step, ordered by batch size as given.

    In float32 the first layer with its pool has no job: its kernels are those of the convolution and of the pool.
    """
    return [
        Job(layer, pass_, batch)
        for batch in batches
        for layer in layers
        for pass_ in ("fprop", "dgrad", "wgrad", *(NARROW_PASSES if _is_narrow(layer, batch, dtype) else ()))
        if (layer, pass_) not in _UNTUNED and not (layer == POOLED and dtype == torch.float32)
    ]


def _is_narrow(layer: str, batch: int, dtype: torch.dtype) -> bool:
    """Whether the kernels for few outputs can run a layer."""
    if layer not in LINEAR_LAYERS:
        return False
    features, outputs, _ = LINEAR_LAYERS[layer]
    return all(linear_rules.linear_narrow_fits(pass_, batch, outputs, features, dtype.itemsize) for pass_ in NARROW_PASSES)


def sizes(layer: str, batch: int) -> list[tuple[int, ...]]:
    """Shapes of the input, weight, bias and output gradient of a layer."""
    if layer in LINEAR_LAYERS:
        features, outputs, _ = LINEAR_LAYERS[layer]
        return [(batch, features), (outputs, features), (outputs,), (batch, outputs)]
    c, size, k, r, stride, padding = LAYERS[layer]
    out = (size + 2 * padding - r) // stride + 1
    out = (out - 1) // 2 if layer == POOLED else out
    return [(batch, c, size, size), (k, c, r, r), (k,), (batch, k, out, out)]


@functools.cache
def _tensors(layer: str, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random input, weight, bias and output gradient of a layer, channels-last."""
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(shape, device="cuda", generator=generator) for shape in sizes(layer, batch)]
    tensors[1] /= tensors[1][0].numel() ** 0.5
    return tuple(channels_last(t.to(dtype)) for t in tensors)


def channels_last(tensor: Tensor) -> Tensor:
    """A 4-dimensional tensor in channels-last format; any other tensor itself."""
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


@dataclasses.dataclass(frozen=True)
class Maxima:
    """The results of a pooled layer's forward pass that its backward pass reads.

    Attributes:
        activation: the unpooled activation; the backward pass uses its signs.
        index: PyTorch's index of each maximum.
        position: position of each maximum within its window, as our kernels store it.
    """

    activation: Tensor
    index: Tensor
    position: Tensor

    @classmethod
    def of(cls, job: Job, tensors: tuple[Tensor, ...]) -> Maxima:
        """The maxima that PyTorch computes, so that all compared gradients use the same ones."""
        x, w, b, _ = tensors
        *_, stride, padding = LAYERS[job.layer]
        activation = F.relu(F.conv2d(x, w, b, stride, padding))
        pooled, index = F.max_pool2d(activation, 3, 2, return_indices=True)
        first = 2 * torch.arange(pooled.shape[2], device=x.device)
        place = 3 * (index // job.size - first[:, None]) + index % job.size - first
        position = torch.where(pooled > 0, place, pooling.no_gradient(torch.uint8)).to(torch.uint8)
        return cls(activation, index, channels_last(position))


def operation(job: Job, tensors: tuple[Tensor, ...], maxima: Maxima | None = None) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """The function to time: the job's pass on the Triton kernels, as a training step runs it.

    In TF32 the launch of an input gradient also writes the copies that the weight gradient reads, and its time includes that.
    The weight gradient is given the finished copies; conv1's makes its own.

    Args:
        maxima: maxima of the pooled layer, for its weight gradient only.
    """
    x, w, b, dz = tensors
    ops = torch.ops.alexnet_triton
    if job.layer in LINEAR_LAYERS:
        if job.pass_ == "narrow_backward":
            return lambda: ops.linear_narrow_backward(dz, x, w, None, None, 0.0, [True] * 3)
        if job.pass_ in ("fprop", "narrow_fprop"):

            def forward() -> Tensor:
                # Few outputs run the products that are tuned here only if their own kernels are off.
                with tables.override(NARROW=0) if job.pass_ == "fprop" else contextlib.nullcontext():
                    return ops.linear_fprop(x, w, b, None, 0.0, LINEAR_LAYERS[job.layer][2])

            return forward
        return (lambda: ops.linear_dgrad(dz, w)) if job.pass_ == "dgrad" else (lambda: ops.linear_wgrad(dz, x, w))
    problem = Problem.of(x.shape, w, job.geometry, (job.size, job.size))
    if job.layer == POOLED:
        return _pooled_fprop(job, tensors) if maxima is None else _pooled_wgrad(job, input_cells(x, problem), tensors, maxima)
    if job.pass_ == "fprop":
        return lambda: fprop(x, w, b, problem, True)
    by_batch = wgrad_by_batch(problem)
    if job.pass_ == "dgrad":
        linked = x if job.layer in LINKED else None
        return lambda: dgrad(dz, w, problem, linked, copies_by_batch(dz, x, problem) if by_batch else ())[0]
    copies = copies_by_batch(dz, x, problem) if by_batch else ()
    copy(copies)
    return lambda: wgrad(dz, x, w, problem, by_batch=copies)


def _pooled_arguments(job: Job) -> tuple[Any, ...]:
    """Arguments of the pooled layer's operators: geometry and output size of the convolution, and the pool's windows."""
    stride, padding, dilation, groups = job.geometry
    windows = ([3, 3], [2, 2], [0, 0])
    return (list(stride), list(padding), list(dilation), groups, [job.size] * 2, *windows)


def _pooled_fprop(job: Job, tensors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    x, w, b, _ = tensors
    flags = (True, True, False)  # channels-last, positions, cells given
    arguments = (*_pooled_arguments(job), [(job.size - 1) // 2] * 2, *flags)
    return lambda: torch.ops.alexnet_triton.conv2d_relu_max_pool2d_fprop(x, w, b, None, *arguments)[0]


def _pooled_wgrad(job: Job, cells: Tensor, tensors: tuple[Tensor, ...], maxima: Maxima) -> Callable[[], Tensor]:
    """The weight gradient, together with the pool's and the bias gradient."""
    x, w, _, dz = tensors
    arguments = (list(x.shape), *_pooled_arguments(job), [False, True, True], False)
    backward = torch.ops.alexnet_triton.conv2d_relu_max_pool2d_backward
    return lambda: backward(dz, None, cells, w, maxima.position, *arguments)[1]


def _reference(job: Job, tensors: tuple[Tensor, ...], maxima: Maxima | None = None) -> Tensor | tuple[Tensor, ...]:
    """The result of the job by PyTorch, in the dtype of ``tensors``."""
    x, w, b, dz = tensors
    if job.layer in LINEAR_LAYERS:
        if job.pass_ == "narrow_backward":
            return dz @ w, dz.t() @ x, dz.sum(0)
        if job.pass_ in ("fprop", "narrow_fprop"):
            y = F.linear(x, w, b)
            return F.relu(y) if LINEAR_LAYERS[job.layer][2] else y
        return dz @ w if job.pass_ == "dgrad" else dz.t() @ x
    *_, stride, padding = LAYERS[job.layer]
    if job.pass_ == "fprop":
        y = F.relu(F.conv2d(x, w, b, stride, padding))
        return F.max_pool2d(y, 3, 2) if job.layer == POOLED else y
    if maxima is not None:
        activation = maxima.activation.to(dz.dtype)
        window = ([3, 3], [2, 2], [0, 0], [1, 1], False)
        dz = torch.ops.aten.max_pool2d_with_indices_backward(dz, activation, *window, maxima.index)
        dz = torch.ops.aten.threshold_backward(dz, activation, 0)
    wanted = [job.pass_ == "dgrad", job.pass_ == "wgrad", maxima is not None]
    step, pad = [stride] * 2, [padding] * 2
    dx, dw, _ = torch.ops.aten.convolution_backward(dz, x, w, [w.shape[0]], step, pad, [1, 1], False, [0, 0], 1, wanted)
    if job.pass_ == "wgrad":
        return dw
    return dx * (x > 0) if job.layer in LINKED else dx


def _listed(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def _error(result: Tensor, exact: Tensor) -> float:
    return (result.to(exact.dtype) - exact).abs().max().item()


def _error_unit(job: Job, dtype: torch.dtype) -> float:
    """Distance of 1 and the next number of the type in which operands are multiplied.

    For TF32 twice that distance: tensor cores truncate both operands to TF32, where cuDNN may multiply exactly (as it does for
    one channel).
    """
    precision = matmul_input_precision(dtype) if job.layer in LINEAR_LAYERS else conv_input_precision(dtype)
    return 2.0**-9 if precision == "tf32" else torch.finfo(dtype).eps


def _milliseconds(function: Callable[[], object], milliseconds: int) -> float:
    """Median time of ``function`` with a cold L2 cache, as a CUDA graph, which excludes the host's time."""
    import triton.testing

    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return float(triton.testing.do_bench(graph.replay, warmup=2, rep=milliseconds, quantiles=[0.5]))


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The result of a job.

    Attributes:
        job: the job.
        rule_ms, best_ms, peer_ms: milliseconds of the rule's configuration, of the fastest candidate and of PyTorch.
        best: the fastest candidate.
        wrong: a line for each candidate that gave wrong results or could not run, with the reason.
        times: milliseconds of each correct candidate, fastest first; the empty candidate is the rule's configuration.
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
    """Run the block with ``candidate``, and without tables. Unfused kernels, where that is the candidate, use their tables."""
    rules = contextlib.nullcontext() if candidate in ({"FUSED": 0}, {"NARROW": 0}) else tables.untuned()
    with rules, tables.override(**candidate):
        yield


def tune_job(job: Job, dtype: torch.dtype, milliseconds: int = 12) -> Tuned:
    """Verify and time every candidate of ``job``, and measure the best three again.

    A candidate's largest error against float32 (for float32: against float64) must be at most twice PyTorch's own in ``dtype``,
    plus half a unit of the largest value.
    """
    tensors = _tensors(job.layer, job.batch, dtype)
    maxima = Maxima.of(job, tensors) if job.needs_maxima else None
    run = operation(job, tensors, maxima)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    exact = _listed(_reference(job, tuple(t.to(wide) for t in tensors), maxima))
    peer = _listed(_reference(job, tensors, maxima))
    unit = _error_unit(job, dtype)
    allowed = [2 * _error(p, e) + 0.5 * unit * e.abs().max().item() for p, e in zip(peer, exact, strict=True)]
    wrong: list[str] = []
    times: list[tuple[float, Candidate]] = []
    candidates = [{}, *job.candidates(dtype)]
    for candidate in candidates:
        with _configured(candidate):
            try:
                for _ in range(2):  # twice: a race need not show the first time
                    for result, truth, most in zip(_listed(run()), exact, allowed, strict=True):
                        if not _error(result, truth) <= most:
                            raise AssertionError(f"error {_error(result, truth):.2e}, allowed {most:.2e}")
                times.append((_milliseconds(run, milliseconds), candidate))
            except Exception as error:  # other candidates may still run
                _check_alive(candidate, error)
                wrong.append(f"{candidate}: {type(error).__name__} {str(error).splitlines()[0][:120]}")
    rule_ms = times[0][0]
    # Measure the best three again, for longer: a median over a dozen runs is too noisy.
    finalists = sorted(times[1:], key=lambda timed: timed[0])[:3]
    again = []
    for _, candidate in finalists:
        with _configured(candidate):
            again.append((_milliseconds(run, 4 * milliseconds), candidate))
    best_ms, best = min(again, key=lambda timed: timed[0])
    peer_ms = _milliseconds(lambda: _reference(job, tensors, maxima), milliseconds)
    return Tuned(job, rule_ms, best_ms, peer_ms, best, wrong, sorted(times, key=lambda timed: timed[0]))


def _check_alive(candidate: Candidate, error: Exception) -> None:
    """Check that the GPU still works: after an illegal access CUDA refuses every further call of the process.

    Raises:
        RuntimeError: the GPU is unusable for this process.
    """
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as refusal:
        raise RuntimeError(f"{candidate} left the GPU unusable for this process: {str(error).splitlines()[0]}") from refusal


def _compile_share(share: int, shares: int, work: list[Job], precision: str) -> None:
    """Compile every ``shares``-th candidate into Triton's cache on disk, launching nothing."""
    dtype, linear_tf32 = PRECISIONS[precision]

    def compile_only(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        kernel.warmup(grid=grid, **arguments)

    with float32_switches(linear_tf32), launch.record_launches(compile_only):
        every = [(job, candidate) for job in work for candidate in job.candidates(dtype)]
        for job, candidate in every[share::shares]:
            tensors = _tensors(job.layer, job.batch, dtype)
            try:
                run = operation(job, tensors, Maxima.of(job, tensors) if job.needs_maxima else None)
                with _configured(candidate):
                    run()
            except Exception:  # tune_job runs the candidate again and reports the error
                continue


def compile_all(work: list[Job], precision: str, processes: int | None = None) -> None:
    """Compile all candidates of ``work`` in ``processes`` processes, by default one per processor."""
    shares = processes or os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_compile_share, args=(i, shares, work, precision)) for i in range(shares)]
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
    """Write or update a table. Other entries of the file are kept, also those that another process writes meanwhile.

    The file is replaced atomically: a reader sees the old table or the new one.

    Raises:
        ValueError, OSError: as :func:`tune`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path.parent, warnings.warn, wait=True):
        content = _table_so_far(path)
        content["gpu"] = torch.cuda.get_device_name()
        content["versions"] = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
        content["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        for result in results:
            key = result.job.table_key(dtype)
            content["configs"][key] = result.best
            content["measured"][key] = {
                "layer": result.job.layer,
                "pass": result.job.pass_,
                "batch": result.job.batch,
                "precision": "tf32" if key.endswith(" tf32") else str(dtype).removeprefix("torch."),
                "ms": round(result.best_ms, 5),
                "rule_ms": round(result.rule_ms, 5),
                "pytorch_ms": round(result.peer_ms, 5),
                "candidates": len(result.times),
                "wrong": len(result.wrong),
            }
        write_atomically(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def tune(work: list[Job], precision: str, path: Path, report: Callable[[Tuned], None]) -> list[Tuned]:
    """Tune every job in one of :data:`PRECISIONS` and write the table to ``path`` after each.

    Raises:
        ValueError: ``path`` is a file, but no table. Nothing was tuned, and the file is not changed.
        OSError: the table cannot be written. If that is known before tuning, nothing was tuned.
    """
    # Fail before minutes of work.
    _table_so_far(path)
    check_writable(path)
    torch.backends.cudnn.benchmark = True
    # Only Hopper GPUs have kernels for the first layer with its pool.
    work = [job for job in work if job.layer != POOLED or 90 <= capability(torch.device("cuda")) < 100]
    compile_all(work, precision)
    dtype, linear_tf32 = PRECISIONS[precision]
    results = []
    for job in work:
        with float32_switches(linear_tf32):
            result = tune_job(job, dtype)
            results.append(result)
            write_table(results, dtype, path)
        report(result)
        _tensors.cache_clear()
    return results


def speedup(results: list[Tuned]) -> float:
    """Geometric mean of PyTorch's time over ours."""
    return statistics.geometric_mean(r.peer_ms / r.best_ms for r in results)
