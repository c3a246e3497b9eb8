"""A run's folder is locked: two runs never write into the same folder at the same time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alexnet_triton.training import run_folder
from alexnet_triton.training.checkpoint import read_checkpoint
from alexnet_triton.training.run_folder import claimed, held, locked

from ..command import run_here
from .test_signals import read_until, start

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif("ttsem" in sys.modules, reason="runs no kernel"),
]

SHORT = ("--model", "lenet", "--data", "sample", "--limit", "24", "--batch-size", "8", "--device", "cpu")


def no_warning(message: str) -> None:
    raise AssertionError(message)


def test_a_lock_keeps_others_out_and_goes_with_its_block(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(BlockingIOError, match="another run is writing into it"),
        locked(tmp_path, wait=False),
    ):
        pass
    with locked(tmp_path, wait=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A DataLoader worker may outlive a killed parent for a moment."""
    code = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from alexnet_triton.training.run_folder import locked\n"
        "with locked(Path(sys.argv[2])):\n"
        "    child = os.fork() or (time.sleep(60), os._exit(0))\n"
        "    print(child, flush=True); time.sleep(60)"
    )
    process = start("-c", code, str(Path(run_folder.__file__).parents[2]), str(tmp_path))
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        with pytest.raises(BlockingIOError), locked(tmp_path, wait=False):
            pass
        process.kill()
        process.wait(60)
        with locked(tmp_path, wait=False):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_that_was_replaced_before_it_was_locked_is_not_the_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "run", fcntl.flock
    folder.mkdir()

    def replaced_meanwhile(descriptor: int, how: int) -> None:
        folder.rename(tmp_path / "other")
        folder.mkdir()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", replaced_meanwhile)
    with pytest.raises(FileNotFoundError), locked(folder):
        pass


def test_what_was_made_and_stays_empty_is_removed(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for folder, kept in (
        (tmp_path / "runs" / "a", ["runs"]),
        (tmp_path / "b" / "c" / "d", ["runs"]),
        (tmp_path / "runs", ["runs"]),
    ):
        with claimed(folder, no_warning) as name:
            assert name == folder
            assert folder.is_dir()
            with pytest.raises(BlockingIOError), claimed(folder, no_warning):
                pass
            assert folder.is_dir()
        assert [each.name for each in tmp_path.iterdir()] == kept
    with claimed(tmp_path / "b" / "c", no_warning) as name:
        (name / "file").touch()
    assert (tmp_path / "b" / "c" / "file").exists()
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_default_name_gets_the_first_free_number(tmp_path: Path) -> None:
    (tmp_path / "run-2").touch()
    with (
        claimed(tmp_path / "run", no_warning, renamed=True) as first,
        claimed(tmp_path / "run", no_warning, renamed=True) as other,
    ):
        assert (first.name, other.name) == ("run", "run-3")


def test_a_folder_that_goes_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process removes its empty folder between creation and lock."""
    real, gone = run_folder.held, 0

    @contextlib.contextmanager
    def late(folder: Path, warn: Callable[[str], object]) -> Iterator[None]:
        nonlocal gone
        gone += 1
        if gone == 1:
            folder.rmdir()
        with real(folder, warn):
            if gone == 2:  # the folder is open, but its name refers to nothing any more
                folder.rmdir()
            yield

    monkeypatch.setattr(run_folder, "held", late)
    with claimed(tmp_path / "a" / "run", no_warning) as folder:
        assert gone == 3
        with pytest.raises(BlockingIOError), locked(folder, wait=False):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_said_and_other_errors_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    number = errno.ENOLCK

    def refuse(*_: object) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held(tmp_path, said.append):
        pass
    assert said == [f"{tmp_path} cannot be locked (No locks available): start no other run in it while this one is running"]
    number = errno.EIO
    with pytest.raises(OSError, match="No locks available") as error, held(tmp_path, no_warning):
        pass
    assert error.value.filename == str(tmp_path)


@pytest.mark.slow
def test_two_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    code = "import time; time.strftime = lambda *_: 'now'; from alexnet_triton.__main__ import main; main()"
    both = [
        start("-c", code, "train", *SHORT, "--epochs", "1", "--backend", "torch", "--seed", seed, cwd=tmp_path)
        for seed in (1, 2)
    ]
    for process in both:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "epoch   1 " in output
    names = {folder.name for folder in (tmp_path / "runs").iterdir()}
    assert names == {"lenet-now", "lenet-now-2"}
    seeds = set()
    for name in names:
        training = read_checkpoint(tmp_path / "runs" / name / "checkpoint.pt").training
        assert training is not None
        seeds.add(training["recipe"]["seed"])
    assert seeds == {1, 2}


@pytest.mark.slow
def test_nobody_else_gets_the_folder_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """New runs, resumed runs and comparisons are refused even before the first file is written; a kill releases the lock."""
    out = tmp_path / "lenet"
    process = start("-m", "alexnet_triton", "train", *SHORT, "--epochs", "100000", "--out", out)
    commands = {
        "new": ("train", *SHORT, "--out", str(out)),
        "resumed": ("train", "--resume", str(out)),
        "resumed from a file": ("train", "--resume", str(out / "best.pt")),
        "comparison in it": ("compare", "lenet", *SHORT[2:], "--out", str(out)),
        "comparison resumed": ("compare", "--resume", str(out)),
    }
    try:
        read_until(process, "data ")  # nothing is written yet
        for name, command in commands.items():
            result = run_here(*command)
            assert (result.returncode, result.stdout) == (1, ""), name
            assert result.stderr == f"alexnet-triton: {out}: another run is writing into it\n", name
        read_until(process, "epoch   1 ")
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    epochs = len(read_checkpoint(out / "checkpoint.pt").metrics) + 1
    result = run_here("train", "--resume", str(out), "--epochs", str(epochs))
    assert result.returncode == 0, result.stderr


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    for arguments in (("--data", "/nowhere"), ("--data", "sample", "--device", "gpu"), ("--data", "sample", "--graph")):
        for command in (("train", "--model", "lenet"), ("compare", "lenet")):
            for out in ((), ("--out", "a/b/c")):
                result = run_here(*command, "--device", "cpu", *arguments, *out, cwd=tmp_path)
                assert result.returncode in (1, 2)
                assert list(tmp_path.iterdir()) == []
