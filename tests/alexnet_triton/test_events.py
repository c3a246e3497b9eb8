"""``--tensorboard``: what TensorBoard reads back is ``metrics.jsonl``, each epoch once; without the package, one line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from alexnet_triton import train_command
from alexnet_triton.checkpoint import read_checkpoint, save_checkpoint
from alexnet_triton.events import EVENTS

from .command import run_here

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ("--data", "sample", "--limit", "4", "--batch-size", "2", "--device", "cpu", "--backend", "torch")
TRAIN = ("train", "--model", "lenet", *SHORT)


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_command, "measure_speed", lambda *_: 1.0)  # which takes as long as the run


def run(*arguments: str, cwd: Path) -> str:
    result = run_here(*arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def _without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)


@pytest.mark.usefixtures("_without_tensorboard")
@pytest.mark.parametrize("command", [TRAIN, ("compare", *SHORT)], ids=["train", "compare"])
def test_a_missing_package_is_said_before_anything_is_done(command: tuple[str, ...], tmp_path: Path) -> None:
    result = run_here(*command, "--tensorboard", "--out", "run", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("alexnet-triton: --tensorboard needs the package tensorboard")
    assert "pip install 'alexnet-triton[tensorboard]'" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_without_tensorboard")
def test_old_checkpoints_and_machines_without_the_package_can_go_on(tmp_path: Path) -> None:
    """An option that a checkpoint lacks is off; one that cannot be had here can be put off."""
    run(*TRAIN, "--epochs", "1", "--out", "run", cwd=tmp_path)
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint = read_checkpoint(path)
    assert checkpoint.training is not None
    options = checkpoint.training["options"]
    assert options.pop("tensorboard") is False
    save_checkpoint(path, checkpoint)
    assert "after 2 epoch(s)" in run("train", "--resume", "run", "--epochs", "2", cwd=tmp_path)

    options["tensorboard"] = True
    save_checkpoint(path, checkpoint)
    refused = run_here("train", "--resume", "run", "--epochs", "2", cwd=tmp_path)
    assert refused.returncode == 1
    assert "or give --no-tensorboard" in refused.stderr
    assert "after 2 epoch(s)" in run("train", "--resume", "run", "--epochs", "2", "--no-tensorboard", cwd=tmp_path)
    assert not (tmp_path / "run" / EVENTS).exists()


def test_events_are_the_metrics_also_of_a_resumed_run(tmp_path: Path) -> None:
    """Resumed from its second epoch when it had three: the third is there once, as it was the last time."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-not-found,unused-ignore]
        EventAccumulator,
    )

    out = tmp_path / "run"
    run(*TRAIN, "--epochs", "2", "--tensorboard", "--out", "run", cwd=tmp_path)
    shutil.copy(out / "checkpoint.pt", out / "second.pt")
    run("train", "--resume", "run", "--epochs", "3", cwd=tmp_path)
    run("train", "--resume", "run/second.pt", "--epochs", "4", "--lr", "0.25", cwd=tmp_path)

    events = EventAccumulator(str(out / EVENTS)).Reload()
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == [1, 2, 3, 4]
    expected = {
        "loss/train": [m["loss"] for m in metrics],
        "accuracy/train": [m["train_acc"] for m in metrics],
        "accuracy/test": [m["test_acc"] for m in metrics],
        "images_per_s": [m["images_per_s"] for m in metrics],
        "learning_rate": [0.9, 0.9, 0.25, 0.25],
    }
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, values in expected.items():
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(values, rel=1e-6)
