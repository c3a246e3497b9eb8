"""``alexnet-triton check`` compares the kernels with PyTorch on a trained network, here lenet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alexnet_triton.cli import check
from kernels.runtime.backend import INTERPRETED

from ..command import run_here

SHORT = ("--data", "sample", "--limit", "16", "--batch-size", "8", "--epochs", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of lenet."""
    out = tmp_path_factory.mktemp("runs") / "run"
    result = run_here("train", "--model", "lenet", *SHORT, "--backend", "torch", "--out", str(out))
    assert result.returncode == 0, result.stderr
    return out


needs_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="the kernels run on a GPU")


@needs_the_interpreter
def test_the_kernels_are_within_the_rule(run: Path, launches: list[str]) -> None:
    result = run_here("check", str(run), "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("lenet on Triton kernels in Triton's interpreter")
    for name in ("logits", *(f"gradient of {layer}.{part}" for layer in (0, 3, 7, 9, 11) for part in ("weight", "bias"))):
        assert f" {name} " in result.stdout
    kernels = (
        "_gather_resize_kernel",
        "_conv2d_fprop_kernel",
        "_conv2d_wgrad_kernel",
        "_conv2d_dgrad_kernel",
        "_matmul_kernel",
    )
    assert all(name in launches and name in result.stdout for name in kernels)
    assert f"{len(launches)} launches of Triton kernels" in result.stdout
    assert "all 11 results are within twice PyTorch's own error" in result.stdout


@needs_the_interpreter
def test_a_wrong_gradient_is_named_and_an_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of the kernels is wrong by one part in 100,000; PyTorch's own error is a few parts in ten million."""
    right, calls = check.results_of, iter(range(3))

    def wrong(*arguments: object) -> dict[str, torch.Tensor]:
        results = right(*arguments)  # type: ignore[arg-type]
        if next(calls) == 0:
            results["7.weight"] *= 1 + 1e-5
        return results

    monkeypatch.setattr(check, "results_of", wrong)
    result = run_here("check", str(run / "checkpoint.pt"), "--device", "cpu")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith("more than twice PyTorch's plus the allowance for rounding: 7.weight")


@pytest.mark.skipif("ttsem" in sys.modules, reason="the process started here would not run under ttsem")
def test_without_the_interpreter_it_starts_itself_anew_in_it(run: Path, tmp_path: Path) -> None:
    """The check runs at the end of a training, as in ``make train``."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "alexnet_triton", "train", "--model", "lenet", *SHORT, "--check", "--out", "run"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "epoch   1 " in result.stdout
    assert "all 11 results are within" in result.stdout.splitlines()[-1]


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    result = run_here("check", str(tmp_path), "--device", "cpu")
    if INTERPRETED:
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
