"""Files that are whole or not there.

A file is written beside the one that it replaces, forced to the disk, and only then renamed over it. Whatever ends the process
or the machine in between, the old file or the new one is under the name, never half of one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


class WriteError(OSError):
    """A file that cannot be written; the message names it."""


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _refused(path: Path, error: OSError) -> WriteError:
    return WriteError(f"{path}: cannot be written, what was there stays: {error.strerror or error}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, which takes its place when the block ends; on any error it is removed.

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
    """Write ``path`` itself, and force it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # before a rename: else a power cut could leave the name on an empty file


def write_atomically(path: Path, content: bytes) -> None:
    """Make ``content`` the content of ``path``; a failure or a crash at any moment leaves what was there.

    Raises:
        WriteError: it cannot be written (no space, no permission, ...); nothing is left of the attempt.
    """
    with replacing(path) as partial:
        write(partial, content)


def check_writable(path: Path) -> None:
    """That :func:`write_atomically` can write ``path``, as far as that can be known without doing it; it is not touched.

    Its folder is made. For what takes long before there is something to write.

    Raises:
        WriteError: it cannot.
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
    """Force the folder's names to the disk: a rename is a change of the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
