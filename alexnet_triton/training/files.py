"""Atomic file writes.

A new file is written beside the one that it replaces, synced to the disk, and only then renamed over it. If the process or the
machine dies in between, the name has the old file or the new one, never a part of one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


class WriteError(OSError):
    """A file cannot be written; the message names it."""


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _refused(path: Path, error: OSError) -> WriteError:
    return WriteError(f"{path}: cannot be written and is unchanged: {error.strerror or error}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file beside ``path``, which replaces ``path`` when the block ends.

    The block must write the file. On any error in the block it is removed.

    Raises:
        WriteError: as :func:`write_atomically`.
    """
    partial = _partial(path)
    try:
        try:
            yield partial
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise _refused(path, error) from error


def write(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` itself, not atomically, and sync it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # before the rename: else a power cut could leave an empty file under the final name


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the content of ``path`` by ``content``. A failure or a crash at any moment leaves the old file.

    Raises:
        WriteError: the file cannot be written (no space, no permission, ...). The temporary file is removed.
    """
    with replacing(path) as partial:
        write(partial, content)


def check_writable(path: Path) -> None:
    """Check that :func:`write_atomically` can write ``path``, as far as possible without touching ``path``.

    Creates the folder of ``path``. Call this before long work whose result is to be written.

    Raises:
        WriteError: ``path`` cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "Is a directory")
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise _refused(path, error) from error


def _sync_folder(folder: Path) -> None:
    """Sync ``folder`` to the disk: a rename changes the folder, not the file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
