"""Timers: the median of many runs with a cold L2 cache, of a CUDA graph where one can be captured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile."""

    ms: float
    p20: float
    p80: float


class Timer(Protocol):
    """Times a function."""

    #: The method of timing; every result names it.
    name: str

    def __call__(self, function: Callable[[], object]) -> Timing: ...


class CudaTimer:
    """CUDA events around each run, the L2 cache flushed before each: Triton's ``do_bench``."""

    name = "triton.testing.do_bench: CUDA events, median, L2 flushed before each run"

    #: Fewest timed runs, also if each takes long.
    least_runs = 12

    def __init__(self, warmup_ms: int = 10, measure_ms: int = 60) -> None:
        self.warmup_ms, self.measure_ms = warmup_ms, measure_ms

    def __call__(self, function: Callable[[], object]) -> Timing:
        import triton.testing

        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        measure_ms = max(self.measure_ms, int(self.least_runs * begin.elapsed_time(end)))
        ms, p20, p80 = triton.testing.do_bench(function, warmup=self.warmup_ms, rep=measure_ms, quantiles=[0.5, 0.2, 0.8])
        return Timing(ms, p20, p80)


class FakeTimer:
    """Runs the function once and returns one millisecond: for tests of the code path without a GPU."""

    name = "FAKE: nothing was timed"

    def __call__(self, function: Callable[[], object]) -> Timing:
        function()
        return Timing(1.0, 1.0, 1.0)


class NoGraph(RuntimeError):
    """A function cannot be captured in a CUDA graph; the message says why."""


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run the block on a new stream, since the default stream cannot be captured."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def captured(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Capture ``function`` as a CUDA graph and return its replay, which launches without the host's overhead.

    Call it inside :func:`own_stream`.

    Raises:
        NoGraph: ``device`` is not CUDA, or the capture fails.
    """
    if device.type != "cuda":
        raise NoGraph(f"there are no CUDA graphs on {device.type}")
    try:
        for _ in range(3):
            function()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # Capture on the current stream: a backward pass runs on its forward pass's stream, which must be the captured one.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
            function()
    except RuntimeError as error:
        raise NoGraph(f"capture failed: {str(error).splitlines()[0]}") from error
    return graph.replay
