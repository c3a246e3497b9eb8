"""Worker processes that decode images: without shared memory, and when a worker dies or hangs."""

from __future__ import annotations

import contextlib
import multiprocessing
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
from alexnet_triton.data.image_workers import Decoders, decode
from alexnet_triton.data.sources import Files

from ..command import run_here
from .test_image_folder import write_folder, write_images

TRAIN = ("train", "--model", "lenet", "--device", "cpu", "--backend", "torch", "--epochs", "1", "--workers", "2")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """70 images, of which the 41st is damaged."""
    write_images(tmp_path, {"a": 70})
    (tmp_path / "a" / "40.png").write_text("?")
    return Files(tmp_path, sorted(f"a/{path.name}" for path in (tmp_path / "a").iterdir()), torch.zeros(70, dtype=torch.int64))


def batches(count: int, size: int) -> list[list[int]]:
    return [each.tolist() for each in torch.arange(count).split(size)]


@pytest.mark.parametrize("size", [1, 3, 16, 70])
@pytest.mark.parametrize("workers", [0, 1, 3, 8])
def test_the_order_is_that_of_the_batches(workers: int, size: int, files: Files) -> None:
    paths = [files.name(i) for i in range(70)]
    expected, _, (error,) = read_images(paths, 3, 20)
    images, errors = [], {}
    for number, (found, wrong) in enumerate(decode(files, batches(70, size), 3, 20, workers)):
        images.append(found.clone())
        errors |= {number * size + place: str(each) for place, each in wrong.items()}
    together = torch.cat(images)
    assert torch.equal(torch.cat([together[:40], together[41:]]), expected)
    assert errors == {40: str(error)}
    assert list(decode(files, [], 3, 20, workers)) == []


def _can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64m", "none", "/dev/shm"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("room", ["size=64m", "size=4k", "ro"])
def test_no_shared_memory_is_needed(room: str, tmp_path: Path) -> None:
    """200 MB of images are decoded with 64 MB of /dev/shm, as in containers, with one page, and with a read-only one."""
    if not _can_mount():
        pytest.skip("mounting a file system is not permitted here")
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
        (3, "ended with exit code 3"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", ["--no-stream", "--stream"])
def test_a_process_that_dies_is_one_line(
    stream: str, how: signal.Signals | int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "a", train=8, tests=1)
    monkeypatch.setattr(image_workers, "read_into", _end(how))
    result = run_here(*TRAIN, stream, "--data", str(folder), "--out", str(tmp_path / "out"))
    some = result.stderr.removeprefix("alexnet-triton: ").split(": the process")[0]  # the chunk of the worker that ended first
    assert some.count(str(folder / "train")) == 2
    message = f"{some}: the process that decodes them {said}: take fewer with --workers N, or none with --workers 0"
    if stream == "--stream":
        message += f"; the steps of epoch 1 so far are saved: resume with --resume {tmp_path / 'out'}"
    assert (result.returncode, result.stderr) == (1, f"alexnet-triton: {message}\n")


def test_a_process_that_is_killed_while_others_read(files: Files) -> None:
    with contextlib.closing(Decoders(files, 3, 224, 16, 2)) as decoders:
        for slot in range(3):
            decoders.put(slot, range(16 * slot, 16 * slot + 16))
        first = decoders._workers[0]
        os.kill(first.process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"\.png to .*\.png: the process that decodes them was killed by SIGKILL"):
            all(decoders.get() for _ in range(3))


def test_a_process_that_sends_nothing_is_given_up(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_workers, "PATIENCE", 1.0)
    monkeypatch.setattr(image_workers, "read_into", lambda *_: time.sleep(60))
    begin = time.monotonic()
    message = r"00\.png to .*15\.png: the process that decodes them has sent nothing for 1 s: .*--workers 0"
    with pytest.raises(DataError, match=message):
        list(decode(files, batches(70, 16), 3, 20, 2))
    assert time.monotonic() - begin < 20


@pytest.mark.slow
def test_a_slow_disk_is_waited_for(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk takes long (0.7 s), but none takes as long as ``PATIENCE``."""
    monkeypatch.setattr(image_workers, "PATIENCE", 2.0)
    read_into = image_workers.read_into
    monkeypatch.setattr(image_workers, "read_into", lambda *given: (time.sleep(0.7), read_into(*given))[1])
    assert len(list(decode(files, batches(64, 16), 3, 20, 1))) == 4


def test_no_process_is_left(files: Files) -> None:
    before = set(multiprocessing.active_children())
    decoded = decode(files, batches(70, 4), 3, 20, 3)
    next(decoded)
    assert len(set(multiprocessing.active_children()) - before) == 3
    decoded.close()
    assert set(multiprocessing.active_children()) == before


def test_a_process_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "a", train=8, tests=1)

    def full(*_: object) -> int:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    with pytest.raises(DataError, match=r"process 0 of 2 to decode images cannot be started: Resource temporarily unavailable"):
        load_data(folder, size=20, channels=3, workers=2)


def test_memory_that_there_is_not(files: Files) -> None:
    with pytest.raises(
        DataError, match=r"no memory for 3 batches of 70 images of 3 x 10000000 x 10000000, 63000000.* GB: fewer"
    ):
        Decoders(files, 3, 10**7, 70, 0)


@pytest.mark.slow
def test_processes_end_with_the_one_that_forked_them(files: Files, tmp_path: Path) -> None:
    """Workers end even if their parent is killed by SIGKILL, which it cannot announce."""
    script = f"""
import os, signal
from alexnet_triton.data.image_workers import Decoders
from alexnet_triton.data.sources import Files
from pathlib import Path
import torch
files = Files(Path({str(tmp_path)!r}), ["a/00.png"], torch.zeros(1, dtype=torch.int64))
decoders = Decoders(files, 3, 20, 1, 3)
print(*(worker.process.pid for worker in decoders._workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    end = time.monotonic() + 20
    alive = [int(pid) for pid in done.stdout.split()]
    assert len(alive) == 3
    while alive and time.monotonic() < end:
        status = {pid: Path(f"/proc/{pid}/status") for pid in alive}
        alive = [pid for pid, path in status.items() if path.exists() and "State:\tZ" not in path.read_text()]
        time.sleep(0.05)
    assert not alive
