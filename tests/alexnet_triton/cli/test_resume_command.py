"""``alexnet-triton train --resume`` in this process: options taken from the checkpoint, options and files refused."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from alexnet_triton.cli import app as cli
from alexnet_triton.data.augment import EVERYTHING, Augment
from alexnet_triton.training.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from alexnet_triton.training.evaluation import Evaluation
from alexnet_triton.training.recipe import Recipe, allowed_of
from alexnet_triton.training.trainer import Trainer

from ..training.test_resume import before_recipes, flat, with_one_flag_of_augmentation

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ("--model", "lenet", "--limit", "24", "--batch-size", "8", "--device", "cpu", "--backend", "torch")
SHORT = (*OPTIONS, "--data", "sample", "--momentum", "0.5", "--weight-decay", "0.01", "--seed", "3", "--augment", "--lr", "0.1")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("alexnet_triton.cli.run.measure_speed", lambda *_: 1.0)  # measuring would take as long as the run


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, cli._with_values([str(a) for a in arguments]))


def test_a_run_goes_on_with_its_own_options(tmp_path: Path) -> None:
    whole = command("train", *SHORT, "--dtype", "bfloat16", "--epochs", "2", "--out", "whole")
    assert whole.exit_code == 0, whole.output
    assert command("train", *SHORT, "--dtype", "bfloat16", "--epochs", "1", "--out", "parts").exit_code == 0
    resumed = command("train", "--resume", "parts", "--epochs", "2")
    assert resumed.exit_code == 0, resumed.output
    assert "resumed from parts/checkpoint.pt after 1 whole epoch(s)" in resumed.output
    assert " images/s, all sessions), setup " in resumed.output
    expected, found = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert all(torch.equal(expected.weights[key], weight) for key, weight in found.weights.items())
    assert expected.training is not None
    assert found.training is not None
    assert [found.training[s] for s in ("recipe", "options")] == [expected.training[s] for s in ("recipe", "options")]
    assert expected.training["recipe"]["momentum"] == 0.5
    assert len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) == 2
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {
        *("metrics.jsonl", "curves.png", "confusion.png", "most_wrong.png", "checkpoint.pt", "best.pt")
    }

    # Without a path, the newest run is taken; it has no epoch left.
    (tmp_path / "runs").mkdir()
    for number, name in enumerate(("whole", "parts")):
        (tmp_path / name).rename(tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "checkpoint.pt", (number, number))
    done = command("train", "--resume")
    assert done.exit_code == 0
    assert done.output == "runs/parts: all 2 epochs are done; to train longer: --resume runs/parts --epochs N\n"
    assert "runs/whole: all 2 epochs" in command("train", "--resume", "--out", "runs/whole").output

    for option, value, message in (
        ("--batch-size", 4, "has 8, not 4"),
        ("--dtype", "float32", "has bfloat16, not float32"),
        ("--seed", 4, "has 3, not 4"),
        ("--limit", 5, "has 24, not 5"),
        ("--momentum", 0.9, "has 0.5, not 0.9"),
        ("--crop", "resized", "has pad, not resized"),
        ("--out", "elsewhere", "a run is resumed in its own folder"),
    ):
        refused = command("train", "--resume", "runs/parts", "--epochs", "3", option, value)
        assert refused.exit_code == 2, refused.output
        assert message in refused.output
        assert option in refused.output
    refused = command("train", "--resume", "runs/parts", "--epochs", "3", "--no-flip")
    assert refused.exit_code == 2
    assert "has True, not False" in refused.output
    assert "--flip" in refused.output
    assert not (tmp_path / "elsewhere").exists()


#: Options of the augmentation -> the run's augmentation.
AUGMENTED = {
    "": Augment(),
    "--augment": EVERYTHING,
    "--augment --no-colour": Augment(flip=True, crop="pad"),
    "--augment --crop resized": Augment(flip=True, crop="resized", colour=True),
    "--augment --crop none --no-flip": Augment(colour=True),
    "--flip --crop resized": Augment(flip=True, crop="resized"),
    "--crop pad": Augment(crop="pad"),
    "--colour --no-flip": Augment(colour=True),
}


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("said", AUGMENTED)
def test_each_part_of_the_augmentation_is_an_option(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The augmentation reaches the trainer and the checkpoint; a resumed run keeps it, and another one is refused."""
    trained: list[Augment] = []

    def noted(*arguments: Any, **options: Any) -> Trainer:
        trainer = Trainer(*arguments, **options)
        trained.append(trainer.augment)
        return trainer

    monkeypatch.setattr("alexnet_triton.training.loop.Trainer", noted)
    expected, options = AUGMENTED[said], said.split()
    first = command("train", *OPTIONS, "--data", "sample", "--epochs", "1", "--out", "run", *options)
    assert first.exit_code == 0, first.output
    for epochs, again in ((2, []), (3, options)):
        resumed = command("train", "--resume", "run", "--epochs", epochs, *again)
        assert resumed.exit_code == 0, resumed.output
    assert trained == [expected] * 3
    kept = read_checkpoint(tmp_path / "run" / "checkpoint.pt").training
    assert kept is not None
    parts = {"flip": expected.flip, "crop": expected.crop, "colour": expected.colour}
    assert {name: value for name, value in kept["recipe"].items() if name in ("augment", *parts)} == parts
    if expected != EVERYTHING:
        refused = command("train", "--resume", "run", "--epochs", "4", "--augment")
        assert refused.exit_code == 2
        assert re.search(r"the run in run/checkpoint\.pt has \w+, not \w+", refused.output)
    assert len(trained) == 3


def test_a_run_from_before_the_parts_of_the_augmentation_were_options_goes_on(tmp_path: Path) -> None:
    assert command("train", *SHORT, "--epochs", "2", "--out", "whole").exit_code == 0
    assert command("train", *SHORT, "--epochs", "1", "--out", "parts").exit_code == 0
    path = tmp_path / "parts" / "checkpoint.pt"
    checkpoint = read_checkpoint(path)
    assert checkpoint.training is not None
    old = before_recipes(checkpoint.training)
    for settings in ("configuration", "options"):
        with_one_flag_of_augmentation(old[settings])
        assert old[settings]["augment"] is True
    save_checkpoint(path, dataclasses.replace(checkpoint, training=old))
    refused = command("train", "--resume", "parts", "--epochs", "2", "--no-colour")
    assert refused.exit_code == 2
    assert "has True, not False" in refused.output
    resumed = command("train", "--resume", "parts", "--epochs", "2")
    assert resumed.exit_code == 0, resumed.output
    expected, found = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert all(torch.equal(expected.weights[key], weight) for key, weight in found.weights.items())
    assert expected.training is not None
    assert found.training is not None
    settings = ("recipe", "configuration", "options")
    assert [found.training[s] for s in settings] == [expected.training[s] for s in settings]


@pytest.mark.parametrize("name", ["train", "compare"])
@pytest.mark.parametrize(
    ("options", "said"),
    [(["--crop", "centre"], "--crop"), (["--crop"], "--crop"), (["--no-crop"], "--no-crop"), (["--flip", "yes"], "yes")],
)
def test_no_such_augmentation(name: str, options: list[str], said: str) -> None:
    result = command(name, *options)
    assert result.exit_code == 2
    assert said in result.output


def test_nothing_to_resume() -> None:
    result = command("train", "--resume")
    assert result.exit_code == 2
    assert "no folder in runs/ holds a checkpoint" in result.output


PICTURES = ("curves.png", "confusion.png", "most_wrong.png")


class Killed(BaseException):
    """Simulates SIGKILL: no code catches this exception."""


def dies(*_: object, **__: object) -> None:
    raise Killed


def killed(*arguments: object) -> None:
    with pytest.raises(Killed):
        CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["predict_split", "plot_curves", "plot_confusion", "plot_most_wrong"])
def test_a_run_that_ended_before_its_pictures_is_completed(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(f"alexnet_triton.cli.run.{where}", dies)
        killed("train", *SHORT, "--epochs", "2", "--out", "run")
    drawn = {"plot_confusion": 1, "plot_most_wrong": 2}.get(where, 0)
    assert {p.name for p in out.iterdir()} == {"metrics.jsonl", "checkpoint.pt", "best.pt", *PICTURES[:drawn]}
    lines, checkpoint = (out / "metrics.jsonl").read_text(), (out / "checkpoint.pt").read_bytes()
    (out / "metrics.jsonl").write_text(lines.splitlines()[0] + '\n{"epoch": 2, "lo')  # as a crash of the machine may leave it

    result = command("train", "--resume", "run")
    assert result.exit_code == 0, result.output
    assert "run: all 2 epochs are done, but some files are missing: they are written now\n" in result.output
    assert "after 2 epoch(s)" in result.output
    assert "an epoch of" not in result.output
    assert {p.name for p in out.iterdir()} == {"metrics.jsonl", "checkpoint.pt", "best.pt", *PICTURES}
    assert ((out / "metrics.jsonl").read_text(), (out / "checkpoint.pt").read_bytes()) == (lines, checkpoint)

    whole = command("train", *SHORT, "--epochs", "2", "--out", "whole")
    assert whole.exit_code == 0, whole.output
    for name in PICTURES:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    done = command("train", "--resume", "run")
    assert (done.exit_code, done.output) == (0, "run: all 2 epochs are done; to train longer: --resume run --epochs N\n")


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the pictures, which take longer than the run, by empty files."""
    for picture in ("plot_curves", "plot_confusion", "plot_most_wrong"):
        touch = lambda *arguments: [a.touch() for a in arguments if isinstance(a, Path)]  # noqa: E731
        monkeypatch.setattr(f"alexnet_triton.cli.run.{picture}", touch)


@pytest.mark.usefixtures("_no_pictures")
def test_missing_metrics_of_a_finished_run_are_written(tmp_path: Path) -> None:
    assert command("train", *SHORT, "--epochs", "1", "--out", "run").exit_code == 0
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_bytes()
    path.unlink()
    result = command("train", "--resume", "run")
    assert result.exit_code == 0, result.output
    assert path.read_bytes() == before


@pytest.mark.usefixtures("_no_pictures")
def test_an_older_checkpoint_does_not_cut_a_run_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming from an older best.pt is refused if a newer checkpoint.pt would be lost, and allowed otherwise."""
    accuracies = iter([0.5, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr("alexnet_triton.training.loop.evaluate", lambda *_, **__: Evaluation(1.0, next(accuracies), None))
    assert command("train", *SHORT, "--epochs", "1", "--out", "run").exit_code == 0
    shutil.copytree("run", "stopped")
    assert command("train", "--resume", "run", "--epochs", "3").exit_code == 0
    before = {p.name: p.read_bytes() for p in Path("run").iterdir()}
    assert len(read_checkpoint(Path("run/best.pt")).metrics) == 1
    for options in ((), ("--epochs", "2"), ("--epochs", "5"), ("--lr", "0.01")):
        refused = command("train", "--resume", "run/best.pt", *options)
        assert refused.exit_code == 1
        assert refused.output == (
            "alexnet-triton: run/best.pt has 1 whole epoch(s), but run/checkpoint.pt is further (3) and would be "
            "lost: give --resume run, or copy best.pt into another folder as checkpoint.pt and resume that folder\n"
        )
        assert {p.name: p.read_bytes() for p in Path("run").iterdir()} == before
    Path("other").mkdir()
    shutil.copy("run/best.pt", "other/checkpoint.pt")
    assert "after 2 epoch(s)" in command("train", "--resume", "other", "--epochs", "2").output  # the message's advice

    stopped = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), stopped(*a)))
        assert "in epoch 2 after step 1 of 3" in command("train", "--resume", "stopped", "--epochs", "2").output
    refused = command("train", "--resume", "stopped/best.pt", "--epochs", "2")
    assert "has 1 whole epoch(s), but stopped/checkpoint.pt is further (1)" in refused.output
    Path("stopped/checkpoint.pt").write_bytes(b"damaged")
    assert "after 2 epoch(s)" in command("train", "--resume", "stopped/best.pt", "--epochs", "2").output


@pytest.mark.usefixtures("_no_pictures")
def test_without_a_path_a_run_of_a_comparison_is_found_too(tmp_path: Path) -> None:
    for number, folder in enumerate(("runs/lenet-1", "runs/compare-1/lenet")):
        assert command("train", *SHORT, "--epochs", "1", "--out", folder).exit_code == 0
        os.utime(tmp_path / folder / "checkpoint.pt", (number, number))
        os.utime(tmp_path / folder / "best.pt", (number, number))
    assert command("train", "--resume").output.startswith("runs/compare-1/lenet: all 1 epochs are done")
    os.utime("runs/lenet-1/checkpoint.pt", (9, 9))
    assert command("train", "--resume").output.startswith("runs/lenet-1: all 1 epochs are done")


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("how", [("--resume", "runs/x"), ("--resume", "--out", "runs/x"), ("--resume",)], ids=" ".join)
def test_a_run_that_died_between_its_first_two_checkpoints_goes_on(
    epochs: int, how: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a run has best.pt but no checkpoint.pt yet."""
    with monkeypatch.context() as patch:
        patch.setattr("alexnet_triton.training.loop.copy_checkpoint", dies)
        killed("train", *SHORT, "--epochs", epochs, "--out", "runs/x")
    assert {p.name for p in (tmp_path / "runs" / "x").iterdir()} == {"best.pt"}
    refused = command("train", *SHORT, "--epochs", epochs, "--out", "runs/x")
    assert "already holds a run" in refused.output
    resumed = command("train", *how)
    assert resumed.exit_code == 0, resumed.output
    assert command("train", *SHORT, "--epochs", epochs, "--out", "whole").exit_code == 0
    ours, expected = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("runs/x", "whole"))
    assert flat([ours.weights, ours.metrics]) == flat([expected.weights, expected.metrics])
    assert len((tmp_path / "runs" / "x" / "metrics.jsonl").read_text().splitlines()) == epochs
    assert (tmp_path / "runs" / "x" / "curves.png").exists()


@pytest.mark.parametrize("kind", ["damaged", "foreign", "missing", "weights alone", "newer", "newer recipe", "newer crop"])
def test_a_checkpoint_that_cannot_be_resumed_is_one_line_and_stays(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    if kind == "weights alone":
        save_checkpoint(path, Checkpoint("lenet", [], [], {}))
    elif kind == "newer":
        save_checkpoint(path, Checkpoint("lenet", [], [], {}, {"options": {"telepathy": True}}))
    elif kind == "newer recipe":
        save_checkpoint(path, Checkpoint("lenet", [], [], {}, {"recipe": {"telepathy": True}}))
    elif kind == "newer crop":
        save_checkpoint(path, Checkpoint("lenet", [], [], {}, {"options": {"crop": "elastic"}}))
    elif kind != "missing":
        save_checkpoint(path, Checkpoint("lenet", [], [], {"weight": torch.ones(300)}, {}))
        content = bytearray(path.read_bytes())
        content[content.index(torch.ones(300).numpy().tobytes())] ^= 1
        path.write_bytes(bytes(content) if kind == "damaged" else b"foreign")
    before = path.read_bytes() if path.exists() else None
    result = command("train", "--resume", path)
    assert result.exit_code == 1
    assert result.output.startswith(f"alexnet-triton: {path}: ")
    assert result.output.count("\n") == 1
    assert isinstance(result.exception, SystemExit)
    if before is not None:
        assert path.read_bytes() == before
        again = command("train", *SHORT, "--epochs", "1", "--out", tmp_path)
        assert again.exit_code == 2
        assert "already holds a run" in again.output
        assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == (before is not None)
    debugged = command("--debug", "train", "--resume", path)
    assert type(debugged.exception).__name__ == "CheckpointError"


#: Options that no command line could have given, and values that are not options at all.
CRAFTED: dict[str, Any] = {
    "epochs_string": {"epochs": "x"},
    "epochs_none": {"epochs": None},
    "epochs_fraction": {"epochs": 1.5},
    "epochs_zero": {"epochs": 0},
    "batch_size_list": {"batch_size": []},
    "batch_size_negative": {"batch_size": -8},
    "lr_string": {"lr": "fast"},
    "seed_too_large": {"seed": 2**80},
    "model": {"model": "resnet"},
    "model_tensor": {"model": torch.zeros(2)},
    "dtype": {"dtype": "int4"},
    "backend": {"backend": 3},
    "device_number": {"device": 3},
    "device_list": {"device": ["cpu"]},
    "data_number": {"data": 3},
    "channels": {"channels": 2},
    "lr_nan": {"lr": float("nan")},
    "graph_none": {"graph": None},
    "graph": {"graph": "perhaps"},
    "limit": {"limit": "all"},
    "no_dict": 3,
    "a_list": [["epochs", 1]],
}


@pytest.mark.parametrize("version", ["today's", "before recipes"])
@pytest.mark.parametrize("name", CRAFTED)
def test_options_that_no_command_line_could_have_given_are_one_line(name: str, version: str, tmp_path: Path) -> None:
    path, crafted = tmp_path / "checkpoint.pt", CRAFTED[name]
    state = {"options": crafted}
    if version == "today's" and isinstance(crafted, dict):
        ((field, value),) = crafted.items()
        state = {"recipe": {}, "options": {}}
        state["recipe" if field in allowed_of(Recipe) else "options"][field] = value
    elif version == "today's":
        state = {"recipe": crafted}
    save_checkpoint(path, Checkpoint("lenet", [], [], {}, state))
    before = path.read_bytes()
    result = command("train", "--resume", path)
    assert result.exit_code == 1
    assert re.fullmatch(rf"alexnet-triton: {path}: damaged: (--[a-z-]+ cannot be .*|its options are a \w+)\n", result.output)
    assert isinstance(result.exception, SystemExit)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--resume"], ["train", "--resume="]),
        (["train", "--resume", "--epochs", "3"], ["train", "--resume=", "--epochs", "3"]),
        (["train", "--resume", "runs/a", "--epochs", "3"], ["train", "--resume", "runs/a", "--epochs", "3"]),
        (["train", "--resume=runs/a"], ["train", "--resume=runs/a"]),
        ([], []),
    ],
)
def test_resume_without_a_path(arguments: list[str], expected: list[str]) -> None:
    assert cli._with_values(arguments) == expected
