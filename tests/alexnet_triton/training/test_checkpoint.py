"""Checkpoints: written atomically; damaged, foreign and hostile files are refused."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import random
import resource
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_triton.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    copy_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from alexnet_triton.training.files import WriteError, write_atomically

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(value: float = 1.0) -> Checkpoint:
    return Checkpoint("lenet", ["a", "b"], [{"epoch": 1}], {"weight": torch.full((300,), value)}, {"state": [1, 2.5, None]})


def same(a: Checkpoint, b: Checkpoint) -> bool:
    fields = [(c.model, c.classes, c.metrics, c.training) for c in (a, b)]
    return fields[0] == fields[1] and torch.equal(a.weights["weight"], b.weights["weight"])


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny(1.0))
    copy_checkpoint(path, tmp_path / "best.pt")
    save_checkpoint(path, tiny(2.0))
    assert same(read_checkpoint(path), tiny(2.0))
    assert same(read_checkpoint(tmp_path / "best.pt"), tiny(1.0))
    copy_checkpoint(path, tmp_path / "best.pt")
    assert same(read_checkpoint(tmp_path / "best.pt"), tiny(2.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "checkpoint.pt"]


def test_a_copy_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    save_checkpoint(tmp_path / "checkpoint.pt", tiny(3.0))
    copy_checkpoint(tmp_path / "checkpoint.pt", tmp_path / "best.pt")
    assert same(read_checkpoint(tmp_path / "best.pt"), tiny(3.0))
    assert not (tmp_path / "best.pt").samefile(tmp_path / "checkpoint.pt")


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        events.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve() == tmp_path.resolve() else "file")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save_checkpoint(tmp_path / "checkpoint.pt", tiny())
    assert events == ["file", "rename", "folder"]
    events.clear()
    copy_checkpoint(tmp_path / "checkpoint.pt", tmp_path / "best.pt")
    assert events == ["rename", "folder"]


@pytest.mark.slow
@pytest.mark.skipif("ttsem" in sys.modules, reason="runs no kernel")
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("checkpoint_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    result = subprocess.run(
        [sys.executable, worker, tmp_path, "20"], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("20 kills, ")


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Simulate a disk that fills up during a write: writing beyond ``limit`` bytes of a file is an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_in_the_middle_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny(1.0))
    with file_size_limit(1000), pytest.raises(CheckpointError, match=r"checkpoint\.pt: cannot be written.*: File too large"):
        save_checkpoint(path, tiny(2.0))
    assert same(read_checkpoint(path), tiny(1.0))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("first", [True, False], ids=["no file yet", "a file before"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_when_it_is_asked_to_keep(
    call: str, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    if not first:
        save_checkpoint(path, tiny(1.0))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    for write, kind in (
        (lambda: save_checkpoint(path, tiny(2.0)), CheckpointError),
        (lambda: write_atomically(path, b"2"), WriteError),
    ):
        with pytest.raises(kind, match=r"checkpoint\.pt: cannot be written.*: No space left on device"):
            write()
        assert list(tmp_path.iterdir()) == ([] if first else [path])
        assert first or same(read_checkpoint(path), tiny(1.0))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/checkpoint\.pt: cannot be written.*No such file or directory"):
        save_checkpoint(tmp_path / "nowhere" / "checkpoint.pt", tiny())


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny())
    whole = path.read_bytes()
    for length in [0, 1, 4, *range(100, len(whole), 150), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt: not a readable checkpoint, or a truncated one"):
            read_checkpoint(path)
        assert path.read_bytes() == whole[:length]


def test_a_changed_byte_is_noticed_or_means_nothing(tmp_path: Path) -> None:
    """torch.load does not check the archive's checksums; by itself it would return changed weights."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny())
    whole = path.read_bytes()
    generator = random.Random(0)
    weights = whole.index(torch.ones(300).numpy().tobytes())
    noticed = 0
    for position in [weights, weights + 1199, *generator.sample(range(len(whole)), 150)]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ generator.randrange(1, 256)]) + whole[position + 1 :])
        try:
            assert same(read_checkpoint(path), tiny()), position
        except CheckpointError as error:
            noticed += 1
            message = str(error)
        else:
            continue
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
    assert noticed > 50


class _Foreign:
    """An object that weights_only does not load."""


def _write_foreign(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("no checkpoint")
    elif kind == "state_dict":
        torch.save({"weight": torch.zeros(3)}, path)
    elif kind == "object":
        torch.save(_Foreign(), path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "a")
    elif kind == "numpy":
        with path.open("wb") as file:
            np.savez(file, a=np.zeros(3))
    elif kind == "old torch format":
        torch.save({"weight": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # opening a pipe would block forever


@pytest.mark.parametrize("kind", ["text", "state_dict", "object", "zip", "numpy", "old torch format", "folder", "pipe"])
def test_a_foreign_file_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    _write_foreign(path, kind)
    with pytest.raises(CheckpointError, match=r"foreign\.pt: not a (readable )?checkpoint") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


class _Runs:
    """An object whose pickle creates a folder when it is loaded with ``weights_only=False``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    path, ran = tmp_path / "checkpoint.pt", tmp_path / "ran"
    save_checkpoint(path, dataclasses.replace(tiny(), training={"random": _Runs(ran)}))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: not a checkpoint .*: it holds more than tensors and numbers"):
        read_checkpoint(path)
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists()  # unrestricted loading does run the code


def _repacked(path: Path, compression: int, change: Callable[[str, bytes], bytes]) -> Path:
    """A copy of a checkpoint in which ``change`` has replaced records, with valid checksums."""
    target = path.with_name("hostile.pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", compression) as archive:
        for name in source.namelist():
            archive.writestr(name, change(name, source.read(name)))
    return target


def test_a_few_bytes_that_swell_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny())
    swollen = _repacked(path, zipfile.ZIP_DEFLATED, lambda name, raw: bytes(1 << 28) if name.endswith("data/0") else raw)
    assert swollen.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"hostile\.pt: not a checkpoint .*: it is compressed"):
        read_checkpoint(swollen)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_tensor_larger_than_its_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny())
    claim = b"M\x2c\x01\x85"  # the pickled shape (300,)

    def enlarge(name: str, raw: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return raw
        assert raw.count(claim) == 1
        return raw.replace(claim, b"J\x00\x00\x00\x7f\x85")

    with pytest.raises(CheckpointError, match=r"hostile\.pt: not a readable checkpoint"):
        read_checkpoint(_repacked(path, zipfile.ZIP_STORED, enlarge))


def test_weights_without_names_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", dataclasses.replace(tiny(), weights={1: torch.ones(3), "b": torch.ones(3)}))  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=r"a\.pt: damaged: 'state_dict' does not hold names and weights"):
        read_checkpoint(tmp_path / "a.pt")
