"""``train`` and ``evaluate`` on folders of any form: a part is held out, damaged files are left out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from alexnet_triton.training.checkpoint import read_checkpoint

from ..command import run_here
from ..data.test_image_folder import write_folder
from ..training.test_resume import contents

pytestmark = pytest.mark.usefixtures("one_thread")

ON_PYTORCH = ("--data", "images", "--workers", "0", "--device", "cpu", "--backend", "torch")
OPTIONS = ("--model", "lenet", *ON_PYTORCH, "--batch-size", "8")


def train(*options: str, cwd: Path) -> str:
    result = run_here("train", *OPTIONS, *options, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A folder that holds ``images``, a folder with three classes of eight images each."""
    write_folder(tmp_path / "whole", train=8)
    shutil.move(tmp_path / "whole" / "train", tmp_path / "images")
    shutil.rmtree(tmp_path / "whole")
    return tmp_path


def test_a_part_is_held_out_and_is_the_same_in_a_resumed_run_and_an_evaluation(classes: Path) -> None:
    said = train("--validation", "0.25", "--epochs", "2", "--out", "run", cwd=classes)
    assert "(18 train, 6 test, 3 classes)" in said
    train("--validation", "0.25", "--epochs", "1", "--out", "parts", cwd=classes)
    other = run_here("train", "--resume", "parts", "--validation", "0.5", "--epochs", "2", cwd=classes)
    assert other.returncode == 2
    assert "has 0.25, not 0.5" in other.stderr
    resumed = run_here("train", "--resume", "parts", "--epochs", "2", cwd=classes)
    assert resumed.returncode == 0, resumed.stderr
    assert contents(classes / "parts") == contents(classes / "run")
    # With another seed the run holds out other images.
    train("--validation", "0.25", "--seed", "5", "--epochs", "1", "--out", "other", cwd=classes)
    checksums = [read_checkpoint(classes / name / "best.pt").training for name in ("run", "other")]
    assert len({kept["configuration"]["data checksum"] for kept in checksums if kept is not None}) == 2
    last = read_checkpoint(classes / "run" / "checkpoint.pt")
    shutil.copytree(classes / "images", classes / "copy")
    for said_too in ((), ("--data", "copy"), ("--data", "images", "--validation", "0.25")):
        result = run_here("evaluate", "run/checkpoint.pt", *ON_PYTORCH[2:], *said_too, cwd=classes)
        assert result.returncode == 0, result.stderr
        assert " 6 test images" in result.stdout
        assert f"test loss {last.metrics[-1]['test_loss']:.4f}" in result.stdout
    refused = run_here("evaluate", "run", "--data", "sample", "--validation", "0.25", cwd=classes)
    assert "sample: Fashion-MNIST has test images of its own: leave out --validation" in refused.stderr
    shutil.rmtree(classes / "images")
    for command in (("evaluate", "run"), ("train", "--resume", "run", "--epochs", "3")):
        result = run_here(*command, cwd=classes)
        assert (result.returncode, f"{classes / 'images'}: no such folder" in result.stderr) == (1, True), result.stderr


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_the_test_images(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "images", name, train=2, tests=1)
    assert "(6 train, 3 test, 3 classes)" in train("--epochs", "1", cwd=tmp_path)


@pytest.mark.parametrize("part", ["0", "1"])
def test_no_part_is_an_error(part: str, classes: Path) -> None:
    result = run_here("train", *OPTIONS, "--validation", part, cwd=classes)
    assert result.returncode == 1
    assert "validation must be between 0 and 1" in result.stderr
    assert [path.name for path in classes.iterdir()] == ["images"]


def test_damaged_images_are_left_out_listed_and_left_out_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    damaged = [sorted((folder / split / name).iterdir())[0] for split, name in (("train", "sky"), ("test", "grass"))]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:40])
    refused = run_here("train", *OPTIONS, cwd=tmp_path)
    assert refused.returncode == 1
    assert str(damaged[0]) in refused.stderr
    said = train("--skip-damaged", "--epochs", "1", "--out", "run", cwd=tmp_path)
    assert said.count("skipped 1 damaged image") == 2
    lines = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(path) for path in damaged]
    assert all(line.split(": ", 1)[1] for line in lines)
    resumed = run_here("train", "--resume", "run", "--epochs", "2", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert run_here("evaluate", "run", *ON_PYTORCH, "--no-skip-damaged", cwd=tmp_path).returncode == 1
    result = run_here("evaluate", "run", *ON_PYTORCH[2:], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert " 8 test images" in result.stdout


def test_the_list_goes_where_a_resumed_run_leaves_nothing_out(tmp_path: Path) -> None:
    """The data may have changed since; the run's own images are the same."""
    folder = write_folder(tmp_path / "images", train=2, tests=1)
    damaged = folder / "train" / "sky" / "zz.png"
    damaged.write_bytes(b"")
    train("--skip-damaged", "--epochs", "1", "--out", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "skipped.txt").exists()
    damaged.unlink()
    resumed = run_here("train", "--resume", "run", "--epochs", "2", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert not (tmp_path / "run" / "skipped.txt").exists()


def test_a_run_without_damaged_images_has_no_list(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", train=2, tests=1)
    train("--skip-damaged", "--epochs", "1", "--out", "run", cwd=tmp_path)
    assert not (tmp_path / "run" / "skipped.txt").exists()
