"""Processes that decode: without shared memory, and when one of them dies or stops."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from alexnet_triton.data import image_workers
from alexnet_triton.data.dataset import DataError
from alexnet_triton.data.image_files import read_images
from alexnet_triton.data.image_folder import load_data
from alexnet_triton.data.image_workers import decode

from ..command import run_here
from .test_image_folder import write_folder, write_images

TRAIN = ("train", "--model", "lenet", "--device", "cpu", "--backend", "torch", "--epochs", "1", "--workers", "2")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    write_images(tmp_path, {"a": 70})
    (tmp_path / "a" / "40.png").write_text("?")
    return sorted((tmp_path / "a").iterdir())


@pytest.mark.parametrize("workers", [0, 1, 3, 8])
def test_the_order_is_that_of_the_files(workers: int, paths: list[Path]) -> None:
    expected, readable, errors = read_images(paths, 3, 20)
    found = list(decode(paths, 3, 20, workers))
    assert torch.equal(torch.cat([images for images, _, _ in found]), expected)
    assert [path for _, each, _ in found for path in each] == readable
    assert [str(error) for _, _, each in found for error in each] == [str(error) for error in errors]
    assert list(decode([], 3, 20, workers)) == []


def _can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64m", "none", "/dev/shm"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("room", ["size=64m", "size=4k", "ro"])
def test_no_shared_memory_is_needed(room: str, tmp_path: Path) -> None:
    """200 MB of images through what containers give, through one page, and where nothing can be written."""
    if not _can_mount():
        pytest.skip("a file system of one's own may not be mounted here")
    folder = write_folder(tmp_path / "a", train=60, tests=1)
    script = f"""
from alexnet_triton.data.image_folder import load_data
print(len(load_data({str(folder)!r}, size=620, channels=3, workers=8).train))
"""
    mount = f"mount -t tmpfs -o {room} none /dev/shm && exec {sys.executable} -c '{script.replace(chr(39), chr(34))}'"
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True, timeout=200, check=False)
    assert (done.stdout, done.returncode) == ("180\n", 0), done.stderr


def _end(how: signal.Signals | int):
    def end(*_: object) -> None:
        if isinstance(how, signal.Signals):
            os.kill(os.getpid(), how)
            time.sleep(60)
        os._exit(how)

    return end


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (signal.SIGKILL, "was killed by SIGKILL, as the system does when memory runs out"),
        (signal.SIGXCPU, "was killed by SIGXCPU"),
        (signal.SIGTERM, "was killed by SIGTERM"),
        (3, "ended with exit code 3"),
    ],
    ids=str,
)
def test_a_process_that_dies_is_one_line(
    how: signal.Signals | int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "a", train=8, tests=1)
    monkeypatch.setattr(image_workers, "read_images", _end(how))
    result = run_here(*TRAIN, "--data", str(folder), "--out", str(tmp_path / "out"))
    first, last = folder / "train" / "brick" / "00.png", folder / "train" / "grass" / "07.png"
    message = f"{first} to {last}: the process that decodes them {said}: take fewer with --workers N, or none with --workers 0"
    assert (result.returncode, result.stderr) == (1, f"alexnet-triton: {message}\n")
    assert not (tmp_path / "out").exists()


def test_a_process_that_is_killed_while_it_sends(paths: list[Path]) -> None:
    """Half of a batch is in the pipe."""
    decoded = decode(paths, 3, 224, 1)
    next(decoded)
    started = decoded.gi_frame.f_locals["started"]
    time.sleep(1)  # until the pipe is full of the second batch
    os.kill(started[0][1].pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"16\.png to .*31\.png: the process that decodes them was killed by SIGKILL"):
        next(decoded)


def test_a_process_that_sends_nothing_is_given_up(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_workers, "PATIENCE", 1.0)
    monkeypatch.setattr(image_workers, "read_images", lambda *_: time.sleep(60))
    begin = time.monotonic()
    message = r"00\.png to .*15\.png: the process that decodes them has sent nothing for 1 s: .*--workers 0"
    with pytest.raises(DataError, match=message):
        list(decode(paths, 3, 20, 2))
    assert time.monotonic() - begin < 20


def test_no_process_is_left(paths: list[Path]) -> None:
    decoded = decode(paths, 3, 20, 3)
    next(decoded)
    processes = [process for _, process in decoded.gi_frame.f_locals["started"]]
    assert any(process.is_alive() for process in processes)
    decoded.close()
    assert not any(process.is_alive() for process in processes)


def test_a_process_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "a", train=8, tests=1)

    def full(*_: object) -> int:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    with pytest.raises(DataError, match=r"process 0 of 2 to decode images cannot be started: Resource temporarily unavailable"):
        load_data(folder, size=20, channels=3, workers=2)
