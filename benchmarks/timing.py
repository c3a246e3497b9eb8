"""How time is taken: the median of many runs with a cold L2, from a CUDA graph where one can be captured."""

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
    """Takes the time of a function."""

    #: How it takes it; in every result, so that a result says what it is.
    name: str

    def __call__(self, function: Callable[[], object]) -> Timing: ...


class CudaTimer:
    """CUDA events around each run, the L2 cache flushed before each: Triton's ``do_bench``."""

    name = "triton.testing.do_bench: CUDA events, median, L2 flushed before each run"

    #: A run that takes long is still taken this often.
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
    """Runs the function once and says one millisecond: for tests of the code path where there is nothing to time."""

    name = "FAKE: nothing was timed"

    def __call__(self, function: Callable[[], object]) -> Timing:
        function()
        return Timing(1.0, 1.0, 1.0)


class NoGraph(RuntimeError):
    """A function cannot be captured in a CUDA graph here; the message says why."""


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run on a stream other than the default one, which cannot be captured."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def captured(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``function`` as a CUDA graph: launches without the host's overhead. Inside :func:`own_stream` only.

    Raises:
        NoGraph: not on CUDA, or the capture fails.
    """
    if device.type != "cuda":
        raise NoGraph(f"there are no CUDA graphs on {device.type}")
    try:
        for _ in range(3):
            function()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # On the stream that is current: a backward pass runs where its forward pass ran, which must be where it is captured.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
            function()
    except RuntimeError as error:
        raise NoGraph(f"capture failed: {str(error).splitlines()[0]}") from error
    return graph.replay
