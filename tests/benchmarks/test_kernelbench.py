"""KernelBench's two networks match its problems, run on our kernels and are verified before they are timed."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from alexnet_triton import fuse
from benchmarks import kernelbench
from benchmarks.kernelbench import COMPILED, EAGER, GRAPH, NOT_TIMED, PROBLEMS, AlexNet, LeNet5, Trial, run, verify
from benchmarks.networks import OURS
from benchmarks.report import Settings
from benchmarks.timing import FakeTimer
from kernels.runtime import backend

from ..conftest import DEVICE, UNDER_TTSEM

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(UNDER_TTSEM, reason="its kernels are tested in tests/kernels")

#: LeNet-5 on a few images.
FEW = dataclasses.replace(PROBLEMS[1], batch=4, small=2)


def alexnet_layers() -> nn.Sequential:
    """Problem 5, layer by layer."""
    return nn.Sequential(
        *(nn.Conv2d(3, 96, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 256, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(256, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 384, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten()),
        *(nn.Linear(9216, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)),
    )


def lenet_layers() -> nn.Sequential:
    """Problem 4, layer by layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 20)),
    )


@pytest.mark.parametrize(
    ("problem", "layers", "batch", "image"),
    [(PROBLEMS[0], alexnet_layers, 1024, (3, 224, 224)), (PROBLEMS[1], lenet_layers, 4096, (1, 32, 32))],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_problems(problem: kernelbench.Problem, layers: Callable[[], nn.Module], batch: int, image: tuple) -> None:
    assert (problem.batch, problem.image) == (batch, image)
    net, reference = problem.make(), layers()
    assert type(net).__bases__ == (nn.Module,)
    assert net.training
    reference.load_state_dict(dict(zip(reference.state_dict(), net.state_dict().values(), strict=True)))
    images = torch.rand(2, *image)
    with torch.no_grad():
        assert torch.equal(net(images), reference(images))
    assert all(layer.p == 0 for layer in net.modules() if isinstance(layer, nn.Dropout))


#: For each kind of layer, parts of its kernels' names.
KINDS = {"conv2d": ("conv2d",), "linear": ("matmul", "linear")}


def kinds(launches: list[str]) -> list[str]:
    """The kinds of the layers whose products the launched kernels compute."""
    products = [name for name in launches if "finish" not in name]
    return [kind for name in products for kind, parts in KINDS.items() if any(part in name for part in parts)]


@pytest.mark.skipif(DEVICE == "cpu" and not backend.INTERPRETED, reason="the kernels cannot run")
def test_every_layer_of_lenet_runs_on_our_kernels(launches: list[str]) -> None:
    fused = fuse(LeNet5().to(DEVICE))
    with torch.no_grad():
        fused(torch.rand(2, 1, 32, 32, device=DEVICE))
    assert kinds(launches) == ["conv2d"] * 2 + ["linear"] * 3


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cpu" and not backend.INTERPRETED, reason="the kernels cannot run")
def test_every_layer_of_alexnet_runs_on_our_kernels(launches: list[str]) -> None:
    net = AlexNet().to(DEVICE)
    images = torch.rand(1, 3, 224, 224, device=DEVICE)
    with torch.no_grad():
        ours = fuse(copy.deepcopy(net))(images)
        assert kinds(launches) == ["conv2d"] * 5 + ["linear"] * 3
        torch.testing.assert_close(ours, net(images), rtol=1e-4, atol=1e-6)


def settings(minutes: float = 10, precisions: tuple[str, ...] = ("float32",)) -> Settings:
    """Settings that time nothing and compile nothing."""
    return Settings(torch.device(DEVICE), FakeTimer(), minutes, dtypes=precisions, compile_backend="eager")


def run_few(out: Path, timed: bool = True, **changes: object) -> tuple[bool, dict]:
    """Returns what ``run`` returned and the file it wrote."""
    path = out / "folder" / "kernelbench.json"
    right = run(settings(**changes), path, Console(quiet=True), timed, [FEW])  # type: ignore[arg-type]
    return right, json.loads(path.read_text())


def wrong(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], nn.Module]:
    """A stand-in for ``fuse``: its network's output is changed."""

    class Wrong(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = fuse(net)

        def forward(self, x: Tensor) -> Tensor:
            return change(self.net(x))

    return Wrong


def test_each_implementation_has_a_row(tmp_path: Path) -> None:
    right, content = run_few(tmp_path)
    rows = {row["impl"]: row for row in content["rows"]}
    assert list(rows) == [OURS, GRAPH, EAGER, *COMPILED]
    assert rows[EAGER]["error_over_eager"] == 1
    for name, row in rows.items():
        assert (row["case"], row["dtype"], row["batch"]) == ("level3-4-lenet5", "float32", 4)
        if name == GRAPH and DEVICE == "cpu":
            assert (row["verified"], row["ms"]) == (None, None)
            assert "no CUDA graphs on cpu" in row["note"]
        else:
            assert (row["verified"], row["ms"], row["allclose_1e-04"], row["allclose_1e-02"]) == (True, 1.0, True, True)
    assert rows[OURS]["launches"] >= 5
    assert rows[EAGER]["launches"] == 0
    assert right == (DEVICE == "cuda")  # a graph that cannot be captured counts as a failure
    assert content["environment"]["timer"].startswith("FAKE")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        lambda y: y * 1.1,
        lambda y: y.roll(1, 0),
        lambda y: y.double(),
        lambda y: y.t().contiguous().t(),
        torch.zeros_like,
        lambda y: y / 0,
    ],
    ids=["scaled", "other-images", "dtype", "strides", "zeros", "infinite"],
)
def test_a_wrong_network_gets_no_time(
    precision: str, change: Callable[[Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernelbench, "fuse", wrong(change))
    right, content = run_few(tmp_path, timed=False, precisions=(precision,))
    (row,) = content["rows"]
    assert not right
    assert (row["verified"], row["ms"]) == (False, None)
    assert row["note"].startswith("WRONG: AssertionError: ")


@pytest.mark.skipif(DEVICE == "cpu" and not backend.INTERPRETED, reason="the kernels cannot run")
def test_a_network_that_is_not_fused_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelbench, "fuse", lambda net: net)
    right, content = run_few(tmp_path, timed=False)
    (row,) = content["rows"]
    assert not right
    assert (row["verified"], row["launches"], row["ms"]) == (False, 0, None)
    assert "0 launches for 5 convolutions and linear layers: it is not fused" in row["note"]


def test_an_implementation_that_raises_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(net: nn.Module) -> nn.Module:
        raise RuntimeError("odd")

    monkeypatch.setattr(kernelbench, "fuse", raises)
    right, content = run_few(tmp_path)
    assert not right
    assert [row["verified"] for row in content["rows"]] == [None, None, True, True, True]
    assert [row["note"] for row in content["rows"][:2]] == ["RuntimeError: odd"] * 2


def test_what_there_is_no_time_for_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert not run(settings(minutes=0), None, Console(width=200), timed=True, problems=[FEW])
    assert "left out for lack of time: level3-4-lenet5 float32 ours, " in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-7)])
def test_the_rule(dtype: torch.dtype, allowed: float) -> None:
    """An error may be twice the peer's plus half a unit of the largest value."""
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    trial = Trial(False, {}, torch.empty(0), exact, (exact + torch.tensor([0, 2 * allowed])).to(dtype))
    right = trial.exact + torch.tensor([0, 5 * allowed])
    beyond = trial.exact + torch.tensor([0, 6 * allowed])
    assert verify(trial, right.to(dtype), 8) == (5 * allowed, 2 * allowed)
    with pytest.raises(AssertionError, match="against float64, allowed"):
        verify(trial, beyond.to(dtype), 8)


@pytest.mark.slow
@pytest.mark.parametrize("interpreter", [False, True])
def test_the_command_without_a_gpu(interpreter: bool, tmp_path: Path) -> None:
    """It runs the PyTorch reference, or LeNet-5 in the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    chosen = []
    if interpreter:
        environment["TRITON_INTERPRET"] = "1"
        chosen = ["--network", "level3-4-lenet5", "--precision", "float32"]
    path = tmp_path / "kernelbench.json"
    command = [sys.executable, "-m", "benchmarks.kernelbench", "--json", str(path), *chosen]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"KernelBench, {NOT_TIMED}" in result.stdout
    rows = json.loads(path.read_text())["rows"]
    precisions = ["float32"] if interpreter else ["float32", "bfloat16"] * 2
    assert [row["dtype"] for row in rows] == precisions
    assert all(row["verified"] and row["impl"] == OURS and row["ms"] is None for row in rows)
    assert all((row["launches"] >= 5) == interpreter for row in rows)


def test_the_status_of_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernelbench, "PROBLEMS", (FEW,))
    monkeypatch.setattr(kernelbench, "fuse", wrong(lambda y: y * 1.1))
    with pytest.raises(SystemExit) as ended:
        kernelbench.main(["--precision", "float32"])
    assert ended.value.code == 1
