"""``--tensorboard``: TensorBoard reads the metrics of ``metrics.jsonl``, each epoch once; one line without the package."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from pathlib import Path

import pytest

from alexnet_triton.training.checkpoint import read_checkpoint, save_checkpoint
from alexnet_triton.training.events import EVENTS, EpochEvents
from alexnet_triton.training.metrics import EpochMetrics

from ..command import run, run_here
from .test_checkpoint import file_size_limit

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ("--data", "sample", "--limit", "4", "--batch-size", "2", "--device", "cpu", "--backend", "torch")
TRAIN = ("train", "--model", "lenet", *SHORT)


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexnet_triton.cli.run.measure_speed", lambda *_: 1.0)  # the measurement takes as long as the run


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
    """An option that a checkpoint lacks is off; an option that this machine cannot have can be turned off."""
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
    """A run of three epochs resumed from its second, as from a backup, has the third once, with its latest values."""
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    run(*TRAIN, "--epochs", "2", "--tensorboard", "--out", "run", cwd=tmp_path)
    shutil.copy(out / "checkpoint.pt", out / "second.pt")
    run("train", "--resume", "run", "--epochs", "3", cwd=tmp_path)
    shutil.move(out / "second.pt", out / "checkpoint.pt")
    run("train", "--resume", "run", "--epochs", "4", "--lr", "0.25", cwd=tmp_path)

    check_events(out, [0.9, 0.9, 0.25, 0.25])


def check_events(out: Path, rates: list[float]) -> None:
    """Check that TensorBoard reads the metrics of the run in ``out`` and these learning rates, each epoch once."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-not-found,unused-ignore]
        EventAccumulator,
    )

    events = EventAccumulator(str(out / EVENTS)).Reload()
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epochs = [m["epoch"] for m in metrics]
    assert epochs == list(range(1, len(rates) + 1))
    expected = {
        "loss/train": [m["loss"] for m in metrics],
        "loss/test": [m["test_loss"] for m in metrics],
        "accuracy/train": [m["train_acc"] for m in metrics],
        "accuracy/test": [m["test_acc"] for m in metrics],
        "images_per_s": [m["images_per_s"] for m in metrics],
        "learning_rate": rates,
    }
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, values in expected.items():
        assert [event.step for event in events.Scalars(tag)] == epochs
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(values, rel=1e-6)


def test_epochs_from_before_are_written_when_tensorboard_is_asked_for_later(tmp_path: Path) -> None:
    """These are epochs of a run without events, and of a process that ended between a checkpoint and its events."""
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    run(*TRAIN, "--epochs", "2", "--out", "run", cwd=tmp_path)
    run("train", "--resume", "run", "--epochs", "3", "--tensorboard", "--lr", "0.5", cwd=tmp_path)
    check_events(out, [0.9, 0.9, 0.5])

    for file in (out / EVENTS).iterdir():
        file.unlink()
    path = out / "checkpoint.pt"
    checkpoint = read_checkpoint(path)
    assert checkpoint.training is not None
    assert [metrics.pop("lr") for metrics in checkpoint.metrics] == [0.9, 0.9, 0.5]  # as in files without learning rates
    save_checkpoint(path, checkpoint)
    run("train", "--resume", "run", "--epochs", "4", cwd=tmp_path)
    check_events(out, [0.5] * 4)

    checkpoint = read_checkpoint(path)
    assert checkpoint.training is not None
    for metrics in checkpoint.metrics:
        del metrics["lr"]
    checkpoint.training["learning_rates"] = [0.9, 0.9, 0.5, 0.25]  # a file from before metrics had learning rates
    save_checkpoint(path, checkpoint)
    run("train", "--resume", "run", "--epochs", "5", cwd=tmp_path)
    check_events(out, [0.9, 0.9, 0.5, 0.25, 0.5])

    for damaged in (3, [0.5], ["fast"] * 4):
        checkpoint.training["learning_rates"] = damaged
        save_checkpoint(path, checkpoint)
        refused = run_here("train", "--resume", "run", "--epochs", "5", cwd=tmp_path)
        assert refused.returncode == 1
        assert refused.stderr == ("alexnet-triton: run/checkpoint.pt: damaged: 'learning_rates' are not those of its epochs\n")


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_from_the_start_is_said_with_the_folder(tmp_path: Path) -> None:
    """A resumed run writes all epochs so far; the writer's thread leaves nothing behind."""
    pytest.importorskip("tensorboard")
    hook = threading.excepthook
    epochs = [EpochMetrics(i, 1.0, 0.5, 0.5, 100.0, 1.0) for i in (1, 2, 3)]
    with (
        pytest.raises(OSError, match=r"File too large: .*tensorboard"),
        file_size_limit(10),
        EpochEvents(tmp_path, epochs),
    ):
        pass
    assert threading.excepthook is hook


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_said_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's own error names no file. The epoch's checkpoint is still written."""
    pytest.importorskip("tensorboard")
    real = EpochEvents.write

    def write(events: EpochEvents, metrics: EpochMetrics) -> None:
        size = max(file.stat().st_size for file in (tmp_path / "run" / EVENTS).iterdir())
        with file_size_limit(size + 10):
            real(events, metrics)

    monkeypatch.setattr(EpochEvents, "write", write)
    result = run_here(*TRAIN, "--epochs", "2", "--tensorboard", "--out", "run", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, "alexnet-triton: run/tensorboard: File too large\n")
    assert len(read_checkpoint(tmp_path / "run" / "checkpoint.pt").metrics) == 1
    monkeypatch.setattr(EpochEvents, "write", real)
    run("train", "--resume", "run", cwd=tmp_path)
    check_events(tmp_path / "run", [0.9, 0.9])
