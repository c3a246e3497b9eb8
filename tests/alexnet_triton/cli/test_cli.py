"""The command line, end to end: partly in separate processes, and in this process where starting one would be slow."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import triton
from typer.main import get_command

import alexnet_triton.__main__ as program
from alexnet_triton import __version__
from alexnet_triton.cli.app import app

from ...conftest import DEVICE
from ..command import run_here


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python -m alexnet_triton ARGUMENTS`` without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[3]
    environment |= {"PYTHONPATH": str(root), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "alexnet_triton", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd or root,
    )


SHORT = ("--data", "sample", "--limit", "48", "--batch-size", "16", "--epochs", "2", "--device", "cpu")


def test_train_evaluate_lenet(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("train", "--model", "lenet", *SHORT, "--out", str(out))
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert first.startswith("lenet on PyTorch reference on the CPU")
    assert "an epoch of 48 images" in first
    assert result.stdout.count("test acc ") == 2
    assert str(out / "curves.png") in result.stdout
    assert result.stdout.splitlines()[-1] == f"classify images with: alexnet-triton predict {out} IMAGE"
    assert {p.name for p in out.iterdir()} == {
        *("metrics.jsonl", "curves.png", "confusion.png", "most_wrong.png", "checkpoint.pt", "best.pt")
    }
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    again = run("evaluate", str(out / "checkpoint.pt"), "--data", "sample", "--limit", "48", "--device", "cpu")
    assert again.returncode == 0, again.stderr
    assert f"test accuracy {last['test_acc']:.4f}" in again.stdout

    overwrite = run("train", "--model", "lenet", *SHORT, "--out", str(out))
    assert overwrite.returncode == 2
    assert "already holds a run" in overwrite.stderr


def test_train_in_bfloat16_on_augmented_images(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("train", "--model", "lenet", *SHORT, "--dtype", "bfloat16", "--augment", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert ", bfloat16: about " in result.stdout.splitlines()[0]
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("training "))
    seconds, speed, setup, total = map(float, re.findall(r"([\d.]+) (?:s|images/s)\b", line))
    metrics = [json.loads(each) for each in (out / "metrics.jsonl").read_text().splitlines()]
    assert seconds == pytest.approx(sum(m["seconds"] for m in metrics), abs=0.051)
    assert speed == pytest.approx(96 / sum(m["seconds"] for m in metrics), rel=0.01)
    assert seconds + setup <= total + 0.11
    weights = torch.load(out / "checkpoint.pt", weights_only=True)["state_dict"]
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_train_alexnet(tmp_path: Path) -> None:
    out = tmp_path / "run"
    short = ("--data", "sample", "--limit", "16", "--batch-size", "8", "--epochs", "1", "--device", "cpu")
    result = run("train", *short, "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("alexnet on PyTorch reference on the CPU")
    weights = torch.load(out / "checkpoint.pt", weights_only=True)["state_dict"]
    assert sum(w.numel() for w in weights.values()) == 46_764_746


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA the kernels run without the interpreter")
def test_training_on_the_kernels_equals_training_on_pytorch(tmp_path: Path) -> None:
    """The same run on both backends, with the kernels in the interpreter, gives the same losses."""
    losses = {}
    for backend in ("triton", "torch"):
        out = tmp_path / backend
        limits = ("--data", "sample", "--limit", "16", "--batch-size", "8", "--epochs", "1")
        result = run_here("train", "--model", "lenet", "--backend", backend, *limits, "--out", str(out))
        assert result.returncode == 0, result.stderr
        assert ("Triton kernels in Triton's interpreter" in result.stdout) == (backend == "triton")
        losses[backend] = json.loads((out / "metrics.jsonl").read_text())["loss"]
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-5)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
@pytest.mark.parametrize("model", ["alexnet", "lenet"])
def test_train_on_the_gpu(model: str, tmp_path: Path) -> None:
    result = run("train", "--model", model, "--data", "sample", "--epochs", "1", "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{model} on Triton kernels on ")


@pytest.mark.slow
def test_default_out_folder(tmp_path: Path) -> None:
    result = run("train", "--model", "lenet", *SHORT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("lenet-")


def test_summary() -> None:
    result = run_here("summary", "--json")
    rows = json.loads(result.stdout)
    assert len(rows) == 21
    assert sum(r["parameters"] for r in rows) == 46_764_746
    assert rows[0]["output"] == [1, 96, 54, 54]
    assert rows[0]["flops"] == 2 * 54 * 54 * 96 * 121
    assert rows[17]["flops"] == 2 * 4096 * 4096
    table = run_here("summary", "--model", "lenet").stdout
    assert "Conv2d(6, 16" in table
    assert "61,706" in table


BAD = {
    "no_folder": (["train", "--data", "/nowhere"], 1, "/nowhere: no such folder"),
    "device": (["train", "--data", "sample", "--device", "gpu"], 2, "'gpu' is no usable device"),
    "model": (["train", "--model", "vgg"], 2, "vgg"),
    "batch_size": (["train", "--batch-size", "0"], 2, "--batch-size"),
    "dtype": (["train", "--dtype", "float64"], 2, "float64"),
    "limit": (["train", "--limit", "0"], 2, "--limit"),
    "checkpoint": (["evaluate", "/nowhere.pt"], 1, "/nowhere.pt: no such file"),
}


@pytest.mark.parametrize("bad", BAD)
def test_errors_are_one_line_and_no_traceback(bad: str, tmp_path: Path) -> None:
    arguments, code, message = BAD[bad]
    result = (run if bad == "no_folder" else run_here)(*arguments, cwd=tmp_path)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(DEVICE != "cpu", reason="needs a machine without a GPU")
def test_triton_backend_without_a_gpu_says_what_to_do(tmp_path: Path) -> None:
    result = run("train", "--backend", "triton", "--data", "sample", "--model", "lenet", cwd=tmp_path)
    assert result.returncode == 1
    assert "TRITON_INTERPRET=1" in result.stderr
    assert "Traceback" not in result.stderr


def test_version() -> None:
    expected = f"alexnet-triton {__version__}, torch {torch.__version__}, Triton {triton.__version__}, Python "
    result = run_here("--version")
    assert result.returncode == 0
    assert result.stdout.startswith(expected)
    assert result.stdout.count("\n") == 1


COMMANDS = ("train", "compare", "evaluate", "predict", "export", "check", "summary", "explain", "tune")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str) -> None:
    """``-h`` prints the same text as ``--help``. In a pipe there are no boxes and no colours."""
    arguments = [command] if command else []
    result = run_here(*arguments, "-h")
    assert result.returncode == 0
    assert result.stdout == run_here(*arguments, "--help").stdout
    assert result.stdout.isascii()
    assert "-h, --help" in result.stdout
    assert all(each in result.stdout for each in COMMANDS) == (not command)


def test_options_stand_in_panels() -> None:
    text = run_here("export", "-h").stdout
    parts = dict(re.findall(r"^(\w[\w ]*):\n((?:  .*\n)+)", text, re.MULTILINE))
    assert list(parts) == ["Arguments", "Output", "Other options"]
    assert [name for name in ("--format", "--out", "--dtype", "--help") if name in parts["Output"]] == [
        "--format",
        "--out",
        "--dtype",
    ]


def test_every_option_of_training_is_a_sentence_in_a_panel() -> None:
    """Every option except --help has a panel and a whole sentence as its help text."""
    for command in ("train", "compare", "evaluate"):
        options = [p for p in get_command(app).commands[command].params if p.param_type_name == "option"]  # type: ignore[attr-defined]
        shown = [option for option in options if not option.hidden]
        panels = {"Data", "Recipe", "Augmentation", "Hardware", "Output"}
        assert {option.rich_help_panel for option in shown} <= panels
        for option in shown:
            assert re.fullmatch(r"[A-Z][a-z-]+\b.*[.)]", option.help or ""), option.name
    text = run_here("train", "-h").stdout
    parts = dict(re.findall(r"^(\w[\w ]*):\n((?:  .*\n|\n)+)", text, re.MULTILINE))
    assert list(parts)[-6:] == ["Data", "Recipe", "Augmentation", "Hardware", "Output", "Other options"]
    assert "--early-stop N" in parts["Recipe"]
    assert "--validation" in parts["Data"]
    assert "--check " not in text


def test_a_batch_that_no_computer_holds_is_one_error() -> None:
    result = run_here("summary", "--batch-size", str(10**18))
    assert result.returncode == 2
    assert "are too many" in result.stderr


WITHOUT_A_HOME = {
    "version": ("--version",),
    "summary": ("summary", "--model", "lenet"),
    "explain": ("explain", "lenet"),
    "train": ("train", "--model", "lenet", *SHORT[:4], "--epochs", "1", *SHORT[-2:], "--out", "run"),
    "kernels": ("train", "--model", "lenet", *SHORT[:2], "--limit", "4", "--batch-size", "4", "--epochs", "1", "--out", "run"),
}


@pytest.mark.thin("/dev/null")
@pytest.mark.parametrize(("home", "command"), [*((None, command) for command in WITHOUT_A_HOME), ("/dev/null", "train")])
def test_without_a_home_and_without_an_entry_for_the_user(home: str | None, command: str, tmp_path: Path) -> None:
    """A container's user id may have no entry. Nothing, such as a folder called ~, is created in the working directory."""
    code = (
        "import os, pwd, runpy, sys, tempfile\n"
        "def nobody(user): raise KeyError(f'getpwuid(): uid not found: {user}')\n"
        "pwd.getpwuid = nobody\n"
        "sys.argv = ['alexnet-triton', *sys.argv[1:]]\n"
        "runpy.run_module('alexnet_triton', run_name='__main__')\n"
    )
    root, place, temporary = Path(__file__).parents[3], tmp_path / "place", tmp_path / "temporary"
    place.mkdir()
    temporary.mkdir()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(root), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    environment |= {"HOME": home} if home else {}
    environment |= {"TRITON_INTERPRET": "1"} if command == "kernels" else {}
    result = subprocess.run(
        [sys.executable, "-c", code, *WITHOUT_A_HOME[command]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert {path.name for path in place.iterdir()} == ({"run"} if "run" in WITHOUT_A_HOME[command] else set())
    (folder,) = temporary.glob("alexnet-triton-*")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_caches_go_nowhere_that_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user who creates the cache folder's name first must not decide which kernels run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    theirs = tmp_path / f"alexnet-triton-{os.getuid()}"
    theirs.mkdir()
    theirs.chmod(0o777)
    taken = program._own_temporary_folder()
    assert taken != theirs
    assert taken.stat().st_mode & 0o777 == 0o700
    theirs.rmdir()
    theirs.symlink_to("/")
    assert program._own_temporary_folder() != theirs
    theirs.unlink()
    assert program._own_temporary_folder() == program._own_temporary_folder() == theirs
