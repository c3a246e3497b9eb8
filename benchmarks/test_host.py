"""``pytest benchmarks``: host time of each case of ``python -m benchmarks.host``, ours and PyTorch's, by pytest-benchmark.

Without a GPU a stand-in accepts the launches (:mod:`benchmarks.idle`). A real GPU is idle before each timed call. Compare runs
with pytest-benchmark's own options: ``--benchmark-json=FILE``, ``--benchmark-compare``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kernels.runtime import backend

from .host_cases import HostCase, Pair, host_cases
from .idle import NEEDS_COMPILER, idle_gpu

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason=NEEDS_COMPILER)

ON_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module", autouse=True)
def _device_and_threads() -> Iterator[None]:
    """One thread for PyTorch's operators, and the idle GPU if there is no real one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.nullcontext() if ON_GPU or backend.INTERPRETED else idle_gpu():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=host_cases(batch=1 if ON_GPU else 128), ids=lambda case: case.id)
def built(request: pytest.FixtureRequest) -> tuple[HostCase, Pair]:
    """A case and its two functions, built once for both tests."""
    case: HostCase = request.param
    return case, case.pair(torch.device("cuda" if ON_GPU else "cpu"))


@pytest.mark.parametrize("implementation", ["ours", "peer"])
def test_host_time(built: tuple[HostCase, Pair], implementation: str, benchmark: Any) -> None:
    case, pair = built
    benchmark.group = f"host-{case.id}"
    function = getattr(pair, implementation)
    for _ in range(5):
        function()
    if ON_GPU:
        benchmark.pedantic(function, setup=torch.cuda.synchronize, rounds=200)
    else:
        benchmark(function)
