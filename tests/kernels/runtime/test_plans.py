"""Plans: after any change between two calls the launcher gets what launch functions give it (``plan_worker.py``)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kernels
from kernels.runtime import direct, recording

from . import plan_worker

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """The outcome of each scenario, from a process without Triton's interpreter, which replaces the compiler at import."""
    ours = ("TRITON_INTERPRET", "SANITIZE_IR", "ALEXNET_TRITON_PDL")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.runtime.plan_worker"],
        env=environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=840,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(direct.VERSION < (3, 7), reason="Triton 3.6's launcher gets constants too, by position")
@pytest.mark.parametrize("scenario", plan_worker.SCENARIOS)
def test_the_launcher_gets_what_launch_functions_give(scenario: str, found: dict[str, str]) -> None:
    assert found[scenario] == "right", found[scenario]


class _Recorded:
    """The part of a recording that the workspace's layout reads."""

    def __init__(self, sizes: list[int], steps: list[list[int]]) -> None:
        self.inputs: list[Any] = []
        self.kept = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        self.steps = [(None, (1,), {str(i): self.kept[source] for i, source in enumerate(used)}, None) for used in steps]

    def tensor(self, source: int) -> torch.Tensor:
        return self.kept[source]

    def source_of(self, tensor: torch.Tensor) -> int:
        return next(i for i, kept in enumerate(self.kept) if kept is tensor)


def test_a_workspace_is_shared_by_those_that_never_meet() -> None:
    """Random temporaries and launches: temporaries that are live at the same time never overlap, and memory is saved."""
    drawn = random.Random(1)
    saved = 0
    for _ in range(100):
        count = drawn.randint(1, 12)
        sizes = [drawn.choice([0, 1, 511, 512, 3000, 10000]) for _ in range(count)]
        steps = [drawn.sample(range(count), drawn.randint(1, min(3, count))) for _ in range(drawn.randint(1, 15))]
        elsewhere = {i for i in range(count) if drawn.random() < 0.2}
        offsets, size = recording.lay_out(_Recorded(sizes, steps), elsewhere)  # type: ignore[arg-type]
        lives = {i: [s for s, used in enumerate(steps) if i in used] for i in range(count)}
        used = {i for i in range(count) if lives[i] and sizes[i] and i not in elsewhere}
        assert set(offsets) == used
        for i in used:
            assert offsets[i] % 512 == 0
            assert offsets[i] + sizes[i] <= size
            for j in used - {i}:
                meet = lives[i][0] <= lives[j][-1] and lives[j][0] <= lives[i][-1]
                apart = offsets[i] + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= offsets[i]
                assert apart or not meet
        saved += sum(-(-sizes[i] // 512) * 512 for i in used) - size
    assert saved > 0


def test_what_a_recording_cannot_repeat_makes_no_plan() -> None:
    """A PyTorch operation that is neither a copy nor an allocation makes no plan; the call still succeeds."""

    def function(x: torch.Tensor, problem: None) -> torch.Tensor:
        return x + 1

    seen = recording.Recording([x := torch.ones(3)])
    with seen:
        function(x, None)
    assert seen.obstacle == "aten::add"
    with pytest.raises(recording.Unrepeatable, match="aten::add"):
        recording.plan_of(seen, x, torch.device("cpu"))


def test_inputs_that_overlap_make_no_plan() -> None:
    base = torch.zeros(10)
    assert recording.Recording([base[:6], base[4:]]).obstacle == "two inputs share memory"
    assert recording.Recording([base[:4], base[4:]]).obstacle is None
    assert recording.Recording([base, base]).obstacle == "two inputs share memory"


def test_an_equal_argument_of_another_type_is_not_the_one_that_passed() -> None:
    """Checked arguments are looked up by value, and 1, 1.0 and True are equal."""
    x, w = torch.ones(1, 2, 6, 6), torch.ones(2, 2, 1, 1)
    kernels.max_pool2d(x, 2, 1)
    kernels.conv2d(x, w, stride=1, padding=(1, 1))
    for kernel_size, stride in ((2.0, 1), (2, 1.0), (2, True), ((2, 2.0), 1)):
        with pytest.raises(TypeError, match=r"kernel_size|stride"):
            kernels.max_pool2d(x, kernel_size, stride)  # type: ignore[arg-type]
    for options in ({"stride": True}, {"padding": (1.0, 1)}, {"groups": 1.0}, {"dilation": 1.0}):
        with pytest.raises(TypeError, match="must be"):
            kernels.conv2d(x, w, **{"stride": 1, "padding": (1, 1), **options})  # type: ignore[arg-type]
    assert kernels.max_pool2d(x, [2, 2], [1]).shape == (1, 2, 5, 5)  # type: ignore[union-attr]


def test_nothing_is_planned_where_nothing_is_launched_directly() -> None:
    """The interpreter and tensors on the CPU get no plan."""
    assert direct.bind(SimpleNamespace(), SimpleNamespace(run=SimpleNamespace()), (1,)) is None
