"""Kernels are compiled in parallel before a run, and no kernel is compiled twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_triton import precompile

ROOT = Path(__file__).parents[2]


def _worker(cache: Path, *scenarios: str) -> Any:
    """Results of ``scenarios``, run in a separate process, since Triton's interpreter replaces the compiler at import."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SANITIZE_IR")}
    result = subprocess.run(
        [sys.executable, "-m", "tests.alexnet_triton.precompile_worker", *scenarios],
        env=environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(cache)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=840,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cold(cache: Path) -> Any:
    return _worker(cache, "run")["run"]


@pytest.mark.slow
def test_a_run_compiles_nothing_more(cold: Any) -> None:
    """Steps and evaluations find every kernel in memory; none is even read from the disk cache."""
    assert cold["compiled"] == cold["first"]["compiled"] == cold["first"]["found"] >= 16
    assert cold["run"] == cold["first"]["found"]


def test_what_is_compiled_is_told(cold: Any) -> None:
    cores = len(os.sched_getaffinity(0))
    on_cores = f"on {cores} core{'s' * (cores > 1)}"
    begun, done = cold["lines"]
    assert begun == f"compiling up to {cold['compiled']} kernels {on_cores}"
    assert done.startswith(f"compiled {cold['compiled']} kernels {on_cores} in ")


def test_a_second_time_does_nothing(cold: Any) -> None:
    assert cold["second"] == 0
    assert cold["after"] == cold["first"]


def test_another_process_finds_them_on_the_disk(cache: Path, cold: Any) -> None:
    warm = _worker(cache, "run")["run"]
    assert (warm["compiled"], warm["lines"]) == (0, [])
    assert warm["first"] == {"found": cold["compiled"], "compiled": 0}


@pytest.mark.slow
def test_processes_of_a_machine(tmp_path: Path) -> None:
    """The first process compiles all kernels before the others begin; no collective operation of a step is called."""
    found = _worker(tmp_path, "processes")["processes"]
    assert found["compiled"] >= 16
    assert found["first"] == [found["compiled"]]
    after, before = found["second"]
    assert before == found["compiled"]
    assert after < found["compiled"] / 2  # only kernels for batch shares of another size


def test_a_kernel_that_does_not_compile_stops_nothing(tmp_path: Path) -> None:
    """A warning is given, other kernels are compiled, and a launch of the faulty kernel raises the compiler's error."""
    found = _worker(tmp_path, "failure", "interrupted")
    (warned,) = found["failure"].pop("warned")
    assert warned.startswith("1 of 2 kernels did not compile before the run: CompileTimeAssertionFailure")
    assert found["failure"] == {"compiled": 1, "again": 0, "raised": True}
    assert found["interrupted"]["raised"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, kernels are compiled")
def test_without_a_gpu_nothing_is_called() -> None:
    assert precompile(lambda: pytest.fail("called")) == 0
