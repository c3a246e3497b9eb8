"""``precompile``: compile the kernels of a piece of code on all cores before it runs."""

from __future__ import annotations

import contextlib
import contextvars
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
import triton
from triton import knobs

from kernels.runtime import backend, launch


def precompile(walk: Callable[[], object], *, tell: Callable[[str], object] | None = None, threads: int | None = None) -> int:
    """Compile in parallel the Triton kernels that ``walk()`` launches and that are not yet in Triton's cache on disk.

    ``walk`` is called once. Its launches are recorded, not run, so tensors that kernels would write stay uninitialised.
    PyTorch's own operators run, and autograd accumulates gradients, on these meaningless values. For a training step:
    ``alexnet_triton.precompile(lambda: net(images).sum().backward())``, then ``net.zero_grad()``. No other thread may launch
    this package's kernels meanwhile.

    In Triton's interpreter, and without a GPU, this does nothing and does not call ``walk``.

    Args:
        walk: calls operations on tensors of the dtypes, shapes and strides of the run to come.
        tell: called with a line after the first kernel is compiled and with one when all are, or never if none is compiled.
        threads: number of compiling threads; by default one for each core of this process. Processes are not needed: Triton's
            compiler releases the GIL while it optimises and assembles, and holds it only to read a kernel's Python source.

    Returns:
        The number of kernels compiled.

    Warns:
        RuntimeWarning: a kernel does not compile. Its first launch raises the error.
    """
    if backend.INTERPRETED or not (torch.cuda.is_available() or launch.cpu_counts_as_gpu()):
        return 0
    begin, threads = time.perf_counter(), threads or len(os.sched_getaffinity(0))
    on_cores = f"on {threads} core{'s' * (threads > 1)}"
    launched: set[Any] = set()
    pool = ThreadPoolExecutor(threads)
    mode = triton.AsyncCompileMode(pool, ignore_errors=True)
    # Triton reads the mode from a context variable. Autograd runs CUDA backward passes in a thread that has another context.
    context = contextvars.Context()

    def compile_launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        launched.add(kernel)
        with launch.device_of(arguments):
            context.run(kernel.warmup, grid=grid, **arguments)

    with _cache_hits() as hits:
        context.run(mode.__enter__)
        try:
            with launch.record_launches(compile_launch, on_cpu=False):
                walk()
            told = tell is None
            futures = list(mode.raw_futures)  # Triton 3.9 clears the list when the mode ends
            for _ in as_completed(futures):
                if not told and False in hits and tell is not None:
                    tell(f"compiling up to {len(futures) - hits.count(True)} kernels {on_cores}")
                    told = True
        finally:
            pool.shutdown(cancel_futures=True)
            context.run(mode.__exit__, None, None, None)
            _settle(launched)
    compiled = hits.count(False)
    if compiled and tell is not None:
        tell(f"compiled {compiled} kernels {on_cores} in {time.perf_counter() - begin:.1f} s")
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        message = f"{type(errors[0]).__name__}: {errors[0]}".splitlines()[0]
        some = f"{len(errors)} of {len(futures)} kernels"
        warnings.warn(f"{some} did not compile before the run: {message}", RuntimeWarning, stacklevel=2)
    return compiled


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[bool]]:
    """A list that grows by one bool per kernel that Triton loads or compiles in the block: whether the disk cache had it."""
    hits: list[bool] = []
    before = knobs.compilation.listener

    def listen(**compilation: Any) -> None:
        hits.append(compilation["cache_hit"])
        if before is not None:
            before(**compilation)

    knobs.compilation.listener = listen
    try:
        yield hits
    finally:
        knobs.compilation.listener = before


def _settle(kernels: set[Any]) -> None:
    """Replace the futures in the caches of ``kernels`` by compiled kernels, and remove those that did not compile."""
    for kernel in kernels:
        for compiled, *_ in kernel.device_caches.values():
            for key, value in list(compiled.items()):
                if isinstance(value, triton.FutureKernel):
                    del compiled[key]
                    if value.kernel is not None:
                        compiled[key] = value.kernel
