"""``alexnet-triton compare`` in this process: the table, its files, what it refuses, its end by a signal."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import nn

from alexnet_triton import models
from alexnet_triton.cli.compare import compared, comparison_table
from alexnet_triton.cli.options import console
from alexnet_triton.cli.run import FinishedRun
from alexnet_triton.fused import fuse
from alexnet_triton.training.checkpoint import read_checkpoint
from alexnet_triton.training.evaluation import evaluate, predict_split
from alexnet_triton.training.metrics import EpochMetrics
from alexnet_triton.training.plot import plot_comparison
from alexnet_triton.training.recipe import LEARNING_RATES, Recipe
from alexnet_triton.training.trainer import Trainer

from ..command import run_here
from ..training.test_resume import flat
from ..training.test_training import small_net

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ("--data", "sample", "--limit", "4", "--batch-size", "2", "--device", "cpu", "--backend", "torch")
RUN_FILES = {"metrics.jsonl", "curves.png", "confusion.png", "most_wrong.png", "checkpoint.pt", "best.pt"}


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexnet_triton.cli.run.measure_speed", lambda *_: 1.0)  # which takes as long as the run


def cells(output: str) -> dict[str, list[str]]:
    """The printed table: label and cells of each row."""
    rows = ([cell.strip() for cell in line.strip("│┃").split("│")] for line in output.splitlines() if line.startswith("│"))
    return {row[0]: row[1:] for row in rows}


def test_both_networks_are_trained_and_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The starting document's table, from the modules, and beside it what the two runs measured."""
    monkeypatch.setattr(console, "_width", 60)  # no cell is broken where no terminal is
    result = run_here("compare", *SHORT, "--epochs", "1", "--augment", "--no-flip", "--out", "both", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "both"
    assert {p.name for p in out.iterdir()} == {"lenet", "alexnet", "comparison.json", "comparison.png"}
    assert all({p.name for p in (out / model).iterdir()} == RUN_FILES for model in ("lenet", "alexnet"))
    assert re.findall(r"^(\w+) on PyTorch reference on the CPU", result.stdout, re.MULTILINE) == ["lenet", "alexnet"]

    measured = [json.loads((out / model / "metrics.jsonl").read_text()) for model in ("lenet", "alexnet")]
    assert cells(result.stdout) == {
        "depth": ["5 layers: 2 convolutional, 3 linear", "8 layers: 5 convolutional, 3 linear"],
        "channels": ["at most 16", "at most 384"],
        "activation": ["Sigmoid", "ReLU"],
        "regularisation": ["augmentation (pad crop, colour)", "dropout 0.5, augmentation (pad crop, colour)"],
        "input": ["1 x 28 x 28", "1 x 224 x 224"],
        "parameters": ["61,706", "46,764,746"],
        "training loss": [f"{m['loss']:.4f}" for m in measured],
        "train accuracy": [f"{m['train_acc']:.4f}" for m in measured],
        "test accuracy": [f"{m['test_acc']:.4f}" for m in measured],
        "images/s": [f"{m['images_per_s']:,.1f}" for m in measured],  # one epoch: the mean is its own
    }
    written = json.loads((out / "comparison.json").read_text())
    assert list(written["models"]) == ["lenet", "alexnet"]
    for column, expected in zip(written["models"].values(), measured, strict=True):
        assert {key: column[key] for key in ("loss", "train_acc", "test_acc")} == {
            key: expected[key] for key in ("loss", "train_acc", "test_acc")
        }
        assert column["images_per_s"] == pytest.approx(expected["images_per_s"])
    assert written["models"]["alexnet"]["parameters"] == 46_764_746
    # Each by its own learning rate, kept for whoever resumes the run.
    rates = {}
    for model in ("lenet", "alexnet"):
        training_state = read_checkpoint(out / model / "checkpoint.pt").training
        assert training_state is not None
        rates[model] = training_state["recipe"]["lr"]
    assert rates == {name: LEARNING_RATES["d2l"][name] for name in rates}


def test_a_run_of_a_comparison_is_that_of_train(tmp_path: Path) -> None:
    """Bit for bit, and it goes on like one."""
    options = (*SHORT, "--seed", "3", "--epochs", "2")
    for arguments in (
        ("compare", "lenet", *options, "--out", "both"),
        ("train", "--model", "lenet", *options, "--out", "alone"),
    ):
        result = run_here(*arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    ours, alone = (read_checkpoint(tmp_path / path / "checkpoint.pt") for path in ("both/lenet", "alone"))
    assert all(torch.equal(alone.weights[key], weight) for key, weight in ours.weights.items())
    assert ours.training is not None
    assert alone.training is not None
    assert [ours.training[s] for s in ("recipe", "options")] == [alone.training[s] for s in ("recipe", "options")]
    images_per_s = json.loads((tmp_path / "both" / "comparison.json").read_text())["models"]["lenet"]["images_per_s"]
    assert images_per_s == pytest.approx(2 * 4 / sum(m["seconds"] for m in ours.metrics))
    resumed = run_here("train", "--resume", "both/lenet", "--epochs", "3", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "after 3 epoch(s)" in resumed.stdout


def small_alexnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network under AlexNet's name: what matters is that it comes second."""
    monkeypatch.setitem(models.IMAGE_SIZE, "alexnet", 28)
    monkeypatch.setattr("alexnet_triton.training.networks.AlexNet", lambda *arguments: fuse(models.reference_lenet(*arguments)))


def test_the_second_run_of_a_comparison_is_that_of_train_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the first one is left in it: not in the random states, of which its dropout and augmentation draw."""
    small_alexnet(monkeypatch)
    monkeypatch.setattr("alexnet_triton.training.networks.AlexNet", lambda *_: small_net(0.5))
    options = (*SHORT, "--seed", "3", "--epochs", "2", "--augment")
    for arguments in (
        ("compare", "lenet", "alexnet", *options, "--out", "both"),
        ("train", "--model", "alexnet", *options, "--out", "alone"),
    ):
        result = run_here(*arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    ours, alone = (read_checkpoint(tmp_path / path / "checkpoint.pt") for path in ("both/alexnet", "alone"))
    assert flat([ours.weights, ours.metrics, ours.training]) == flat([alone.weights, alone.metrics, alone.training])


def same_results(ours: Path, theirs: Path) -> None:
    """Weights, metrics and the table's values, but for what a clock measured; and all files."""
    columns = []
    for out in (ours, theirs):
        assert {p.name for p in out.iterdir()} == {"lenet", "alexnet", "comparison.json", "comparison.png"}
        assert all({p.name for p in (out / model).iterdir()} == RUN_FILES for model in ("lenet", "alexnet"))
        columns.append(flat(json.loads((out / "comparison.json").read_text())))
    assert columns[0] == columns[1]
    for model in ("lenet", "alexnet"):
        kept = [read_checkpoint(out / model / "checkpoint.pt") for out in (ours, theirs)]
        assert flat([kept[0].weights, kept[0].metrics]) == flat([kept[1].weights, kept[1].metrics])


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["while it trains", "when its training is over"])
def test_a_signal_ends_it_and_the_run_can_go_on(late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal too late for one run stops the next one, before its first step."""
    small_alexnet(monkeypatch)
    name = "alexnet_triton.cli.run.predict_split" if late else "alexnet_triton.training.loop.evaluate"
    real = predict_split if late else evaluate

    def signalling(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(name, signalling)
        stopped = run_here("compare", *SHORT, "--epochs", "1", "--out", "both", cwd=tmp_path)
    assert stopped.returncode == 128 + signal.SIGTERM
    where = "before alexnet began" if late else "in epoch 1 before its evaluation"
    last = stopped.stdout.splitlines()[-1]
    assert last == f"SIGTERM: stopped {where}; resume with: alexnet-triton compare --resume both"
    assert ("test accuracy" in cells(stopped.stdout)) == late  # the table of the finished runs
    assert re.findall(r"^(\w+) on PyTorch", stopped.stdout, re.MULTILINE) == ["lenet"]  # nothing of the second one was loaded
    assert not (tmp_path / "both" / "alexnet").exists()

    resumed = run_here("compare", "--resume", "both", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    whole = run_here("compare", *SHORT, "--epochs", "1", "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    same_results(tmp_path / "both", tmp_path / "whole")


def test_a_comparison_whose_second_run_fails_keeps_the_first_and_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice is what compare can do; the first run is not trained again."""
    small_alexnet(monkeypatch)
    options = (*SHORT, "--epochs", "2", "--momentum", "0.5", "--weight-decay", "0.01", "--seed", "7")
    epoch, networks = Trainer.epoch, []

    def diverging(trainer: Trainer, *arguments: Any) -> Any:
        networks.append(trainer)
        if len(networks) == 3:  # the second run's first epoch
            raise FloatingPointError("the loss of step 1 of 2 is not finite")
        return epoch(trainer, *arguments)

    monkeypatch.setattr(Trainer, "epoch", diverging)
    failed = run_here("compare", *options, "--out", "both", cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr == (
        "alexnet-triton: epoch 1: the loss of step 1 of 2 is not finite; there is no checkpoint yet: train it by itself "
        "(alexnet-triton train --model alexnet) with a smaller --lr\n"
    )
    assert cells(failed.stdout)["regularisation"] == ["weight decay 0.01"]
    assert failed.stdout.splitlines()[-1] == "resume with: alexnet-triton compare --resume both"
    written = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert written["networks"] == ["lenet", "alexnet"]
    assert list(written["models"]) == ["lenet"]
    assert written["models"]["lenet"]["lr"] == 0.9
    assert {name: written["options"][name] for name in ("seed", "batch_size", "momentum", "weight_decay", "epochs")} == {
        "seed": 7, "batch_size": 2, "momentum": 0.5, "weight_decay": 0.01, "epochs": 2,
    }  # fmt: skip

    refused = run_here("compare", *options, "--out", "both", cwd=tmp_path)
    assert refused.returncode == 2
    assert "by --resume both" in refused.stderr
    trained = len(networks)
    resumed = run_here("compare", "--resume", "--out", "both", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert len(networks) == trained + 2  # the second run's two epochs
    assert cells(resumed.stdout)["regularisation"] == ["weight decay 0.01"] * 2
    whole = run_here("compare", *options, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    same_results(tmp_path / "both", tmp_path / "whole")


def test_a_comparison_in_the_middle_of_a_run_goes_on_with_its_own_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a path the newest one; to more epochs too; with a run that was resumed by itself to another learning rate."""
    small_alexnet(monkeypatch)
    folder = tmp_path / "runs" / "compare-1"
    step, steps = Trainer.step, []

    def signalling(trainer: Trainer, index: torch.Tensor, count: int | None = None) -> None:
        steps.append(index)
        if len(steps) in (1, 3):  # the first step of either run
            os.kill(os.getpid(), signal.SIGTERM)
        step(trainer, index, count)

    options = ("--epochs", "1", "--batch-size", "2", *SHORT, "--crop", "pad", "--dtype", "bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalling)
        first = run_here("compare", *options, "--out", "runs/compare-1", cwd=tmp_path)
        assert first.stdout.splitlines()[-1].startswith("SIGTERM: stopped in epoch 1 after step 1 of 2; resume with: ")
        assert json.loads((folder / "comparison.json").read_text())["models"] == {}
        for option, value in (("--batch-size", "4"), ("--crop", "none"), ("--weight-decay", "0.1"), ("--momentum", "0.1")):
            refused = run_here("compare", "--resume", "runs/compare-1", option, value, cwd=tmp_path)
            assert refused.returncode == 2, refused.stderr
            assert option in refused.stderr
        for wrong in (("lenet",), ("--out", "elsewhere")):
            refused = run_here("compare", *wrong, "--resume", "runs/compare-1", cwd=tmp_path)
            assert refused.returncode == 2, refused.stderr
        assert not (tmp_path / "elsewhere").exists()
        second = run_here("compare", "--resume", cwd=tmp_path)
        assert second.stdout.splitlines()[-1].startswith("SIGTERM: stopped in epoch 1 after step 1 of 2; resume with: ")
        assert list(cells(second.stdout)["parameters"]) == ["61,706"]  # the first run's alone
    alone = run_here("train", "--resume", "runs/compare-1/alexnet", "--lr", "0.125", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    last = run_here("compare", "--resume", "runs/compare-1", "--epochs", "2", cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    columns = json.loads((folder / "comparison.json").read_text())["models"]
    assert {name: (c["lr"], c["epochs"]) for name, c in columns.items()} == {"lenet": (0.9, 2), "alexnet": (0.125, 2)}
    lenet = run_here("train", "--model", "lenet", *options, "--epochs", "2", "--out", "alone", cwd=tmp_path)
    assert lenet.returncode == 0, lenet.stderr
    kept = [read_checkpoint(out / "checkpoint.pt") for out in (folder / "lenet", tmp_path / "alone")]
    assert flat([kept[0].weights, kept[0].metrics]) == flat([kept[1].weights, kept[1].metrics])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "comparison.json: No such file or directory"),
        ("{", "comparison.json: not a comparison that can be resumed"),
        ('{"models": {}}', "comparison.json: not a comparison that can be resumed"),
        ('{"networks": ["vgg"], "options": {}}', "comparison.json: not a comparison that can be resumed"),
        ('{"networks": ["lenet"], "options": {"telepathy": 1}}', "comparison.json: made by another version of this program"),
    ],
    ids=["missing", "cut short", "old", "unknown network", "newer"],
)
def test_what_is_no_comparison_is_not_resumed(content: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    if content is not None:
        (tmp_path / "out" / "comparison.json").write_text(content)
    result = run_here("compare", "--resume", "out", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"alexnet-triton: out/{message}")
    assert result.stderr.count("\n") == 1
    nothing = run_here("compare", "--resume", cwd=tmp_path)
    assert nothing.returncode == 2
    assert "no folder in runs/ holds a comparison" in nothing.stderr


@pytest.mark.parametrize("held", ["metrics.jsonl", "lenet/checkpoint.pt", "alexnet/best.pt", "comparison.json"])
def test_a_folder_that_holds_results_is_refused_and_stays(held: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / held
    path.parent.mkdir(parents=True)
    path.write_text("held")
    result = run_here("compare", *SHORT, "--out", "out", cwd=tmp_path)
    assert result.returncode == 2
    assert "already holds a" in result.stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "held"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["lenet", "lenet"], 2, "a network is given twice"),
        (["vgg"], 2, "vgg"),
        (["--data", "/nowhere"], 1, "alexnet-triton: /nowhere: no such folder"),
        (["--graph", "--device", "cpu"], 2, "a CUDA graph needs a CUDA device"),
        (["--device", "gpu"], 2, "'gpu' is no usable device"),
    ],
    ids=["twice", "unknown", "data", "graph", "device"],
)
def test_user_errors(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = run_here("compare", *arguments, cwd=tmp_path)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def metrics(epoch: int, loss: float) -> EpochMetrics:
    return EpochMetrics(epoch, loss, train_acc=0.5, test_acc=0.25, images_per_s=10.0, seconds=1.0)


def test_a_column_is_read_off_the_modules() -> None:
    """Of a network that is neither of the two: layers inside of others, several activations and rates of dropout."""
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 7, 3), nn.Tanh(), nn.Conv2d(7, 5, 3, bias=False), nn.GELU()),
        nn.Dropout(0.1), nn.Flatten(), nn.Linear(5, 2), nn.Tanh(), nn.Dropout(0.3), nn.Dropout(0.1),
    )  # fmt: skip
    recipe = Recipe("lenet", channels=3, epochs=2, batch_size=1, lr=0.1, weight_decay=0.01)
    column = compared(FinishedRun(net, [metrics(1, 3.0), metrics(2, 2.0)], 12.5, "data", "place"), recipe)
    assert (column.convolutional, column.linear, column.conv_channels) == (2, 1, 7)
    assert column.activations == ["Tanh", "GELU"]
    assert column.dropout == [0.1, 0.3]
    assert column.input == (3, 28, 28)
    assert column.parameters == (3 * 9 + 1) * 7 + 7 * 9 * 5 + (5 + 1) * 2
    assert (column.epochs, column.loss, column.train_acc, column.test_acc) == (2, 2.0, 0.5, 0.25)
    assert column.images_per_s == 12.5
    console = Console(file=io.StringIO(), width=120)
    console.print(comparison_table({"a": column}, "title"))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert cells(printed)["regularisation"] == ["dropout 0.1, dropout 0.3, weight decay 0.01"]
    assert cells(printed)["activation"] == ["Tanh, GELU"]


def test_the_picture_shows_every_run(tmp_path: Path) -> None:
    falling, flat = ([metrics(epoch, loss) for epoch, loss in enumerate(losses, start=1)] for losses in ((3, 2, 1), (2, 2, 2)))
    pictures = []
    for name, runs in (("one", {"a": falling}), ("both", {"a": falling, "b": flat})):
        plot_comparison(runs, tmp_path / f"{name}.png", "title")
        pictures.append(imread(tmp_path / f"{name}.png"))
    orange = [((p[..., 0] > 0.9) & (p[..., 1] < 0.6) & (p[..., 2] < 0.2)).any() for p in pictures]  # the second run's colour
    assert orange == [False, True]


def test_a_resumed_comparison_refuses_a_run_that_went_further_and_keeps_its_columns(tmp_path: Path) -> None:
    """Networks that were trained for different lengths do not stand side by side as equals."""
    out = tmp_path / "both"
    for command in (
        ("compare", "lenet", *SHORT, "--epochs", "1", "--out", "both"),
        ("train", "--resume", "both/lenet", "--epochs", "2"),
    ):
        result = run_here(*command, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    before = (out / "comparison.json").read_bytes()
    refused = run_here("compare", "--resume", "both", cwd=tmp_path)
    assert refused.returncode == 1
    assert "both/lenet/checkpoint.pt: trained for 2 epochs, more than the 1 of this comparison; --epochs 2" in refused.stderr
    assert (out / "comparison.json").read_bytes() == before
    longer = run_here("compare", "--resume", "both", "--epochs", "2", cwd=tmp_path)
    assert longer.returncode == 0, longer.stderr
    assert json.loads((out / "comparison.json").read_text())["options"]["epochs"] == 2
