"""``--recipe`` sets the values of other options; an option given beside it wins, and a resumed run keeps its recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_triton.training.checkpoint import read_checkpoint, save_checkpoint
from alexnet_triton.training.recipe import LEARNING_RATES, RECIPES

from ..command import run, run_here

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ("--data", "sample", "--limit", "8", "--batch-size", "4", "--device", "cpu", "--backend", "torch")
TRAIN = ("train", "--model", "lenet", *SHORT)


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexnet_triton.cli.run.measure_speed", lambda *_: 1.0)  # measuring would take as long as the run


def kept(folder: Path) -> dict[str, Any]:
    """The fields of the recipe in a run's checkpoint, and ``recipe``, the value of ``--recipe``."""
    training = read_checkpoint(folder / "checkpoint.pt").training
    assert training is not None
    return training["recipe"] | {"recipe": training["options"]["recipe"]}


#: Options given beside ``--recipe modern`` -> the recipe's fields that they change.
GIVEN: dict[str, dict[str, Any]] = {
    "": {},
    "--lr 0.5": {"lr": 0.5},
    "--schedule cosine --warmup 1": {"schedule": "cosine", "warmup": 1.0},
    "--momentum 0": {"momentum": 0.0, "nesterov": False},
    "--momentum 0 --no-nesterov": {"momentum": 0.0, "nesterov": False},
    "--label-smoothing 0 --class-weights balanced": {"label_smoothing": 0.0, "class_weights": "balanced"},
    "--no-normalize --no-flip --crop none": {"normalize": False, "flip": False, "crop": "none"},
    "--weight-decay 0.25 --augment": {"weight_decay": 0.25, "colour": True},
}


@pytest.mark.parametrize("said", GIVEN)
def test_an_option_given_beside_a_recipe_wins(said: str, tmp_path: Path) -> None:
    printed = run(*TRAIN, "--recipe", "modern", "--epochs", "1", *said.split(), "--out", "run", cwd=tmp_path)
    expected = RECIPES["modern"] | {"epochs": 1, "batch_size": 4, "lr": LEARNING_RATES["modern"]["lenet"]} | GIVEN[said]
    found = kept(tmp_path / "run")
    assert {name: found[name] for name in expected} == expected
    assert found["recipe"] == "modern"
    assert "recipe modern, batch 4, " in printed
    assert (read_checkpoint(tmp_path / "run" / "checkpoint.pt").normalization is not None) == expected["normalize"]


def test_without_a_recipe_it_is_d2ls(tmp_path: Path) -> None:
    run(*TRAIN, "--epochs", "1", "--out", "run", cwd=tmp_path)
    expected = RECIPES["d2l"] | {"epochs": 1, "batch_size": 4, "lr": 0.9, "recipe": "d2l"}
    found = kept(tmp_path / "run")
    assert {name: found[name] for name in expected} == expected


def test_a_resumed_run_keeps_its_recipe(tmp_path: Path) -> None:
    """Resumed with or without ``--recipe``, a run is bit-identical; another recipe or other values of it are refused."""
    options = (*TRAIN, "--recipe", "modern", "--epochs", "2", "--class-weights", "balanced")
    run(*options, "--out", "whole", cwd=tmp_path)
    whole = read_checkpoint(tmp_path / "whole" / "checkpoint.pt")
    for name, again in (("told", ("--recipe", "modern", "--schedule", "onecycle")), ("untold", ())):
        run(*options, "--out", name, cwd=tmp_path)
        # best.pt is of the first or of the last epoch; the run is resumed from it.
        (tmp_path / name / "checkpoint.pt").unlink()
        best = read_checkpoint(tmp_path / name / "best.pt")
        printed = run("train", "--resume", name, *again, cwd=tmp_path)
        assert f"{name}/best.pt after {len(best.metrics)}" in printed or len(best.metrics) == 2
        found = read_checkpoint(tmp_path / name / "checkpoint.pt")
        assert all(torch.equal(weight, found.weights[key]) for key, weight in whole.weights.items())
        assert kept(tmp_path / name) == kept(tmp_path / "whole")
    for again, message in (
        (("--recipe", "d2l"), "has modern, not d2l"),
        (("--schedule", "constant"), "has onecycle, not constant"),
        (("--no-nesterov",), "has True, not False"),
        (("--label-smoothing", "0.2"), "has 0.1, not 0.2"),
        (("--warmup", "1"), "has 0.0, not 1.0"),
        (("--class-weights", "none"), "has balanced, not none"),
        (("--no-normalize",), "has True, not False"),
    ):
        refused = run_here("train", "--resume", "whole", "--epochs", "3", *again, cwd=tmp_path)
        assert refused.returncode == 2
        assert message in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--warmup", "3", "--epochs", "2"), "--warmup of 3 epochs does not fit into a run of 2"),
        (("--nesterov",), "--nesterov needs a --momentum above 0"),
        (("--label-smoothing", "1.5"), "--label-smoothing"),
        (("--schedule", "linear"), "--schedule"),
        (("--recipe", "ancient"), "--recipe"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_what_cannot_be_is_said_before_anything_is_done(
    command: str, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = run_here(command, *SHORT, *options, cwd=tmp_path)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.rglob("*.pt"))


def test_a_comparison_by_a_recipe(tmp_path: Path) -> None:
    """The recipe gives each network its own learning rate, which a resumed comparison keeps."""
    run("compare", "lenet", *SHORT, "--recipe", "modern", "--epochs", "1", "--out", "both", cwd=tmp_path)
    first = kept(tmp_path / "both" / "lenet")
    assert (first["lr"], first["recipe"], first["schedule"]) == (LEARNING_RATES["modern"]["lenet"], "modern", "onecycle")
    written = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert written["options"]["recipe"] == "modern"
    assert written["models"]["lenet"]["label_smoothing"] == 0.1
    printed = run("compare", "--resume", "both", "--epochs", "2", cwd=tmp_path)
    assert "label smoothing 0.1" in printed
    assert kept(tmp_path / "both" / "lenet") == first | {"epochs": 2}


def test_a_finished_run_of_an_older_version_is_complete(tmp_path: Path) -> None:
    """Metrics of an older version lack learning rate and test loss; a finished run is not trained or drawn again."""
    run(*TRAIN, "--epochs", "1", "--out", "run", cwd=tmp_path)
    path = tmp_path / "run" / "checkpoint.pt"
    old = read_checkpoint(path)
    for metrics in old.metrics:
        del metrics["lr"], metrics["test_loss"]
    save_checkpoint(path, old)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(metrics) + "\n" for metrics in old.metrics))
    files = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert "all 1 epochs are done; to train longer: --resume" in run("train", "--resume", "run", cwd=tmp_path)
    assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir()} == files
    run("train", "--resume", "run", "--epochs", "2", cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [0.9, 0.9]
    assert ["test_loss" in line for line in lines] == [False, True]


def test_the_line_of_an_epoch(tmp_path: Path) -> None:
    printed = run(*TRAIN, "--epochs", "1", "--out", "run", cwd=tmp_path)
    (metrics,) = read_checkpoint(tmp_path / "run" / "checkpoint.pt").metrics
    assert f"epoch   1  loss {metrics['loss']:.4f}  train acc" in printed
    assert f"test acc {metrics['test_acc']:.4f}  test loss {metrics['test_loss']:.4f}  lr 0.9  " in printed
