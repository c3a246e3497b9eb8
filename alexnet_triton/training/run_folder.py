"""The folder of a run: locked, so that one run at a time writes into it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from .checkpoint import BEST, LAST, CheckpointError
from .files import write_atomically
from .metrics import METRICS

#: File in a run's folder that lists skipped damaged images: a line for each, with its file and the reason.
SKIPPED = "skipped.txt"

#: Errors of a file system that has no such locks, or none on folders (NFS: EBADF).
_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def list_skipped(folder: Path, found: Mapping[str, str], *, more: bool = False) -> None:
    """Write the images ``found``, each with its reason, into :data:`SKIPPED` in ``folder``; without any, remove the file.

    Args:
        folder: folder of the run.
        found: the reason for each image.
        more: whether to keep the lines that the file already has.

    Raises:
        WriteError: the file cannot be written.
    """
    path = folder / SKIPPED
    before = path.read_text(errors="surrogateescape").splitlines() if more and path.exists() else []
    lines = dict.fromkeys([*before, *(f"{image}: {reason}" for image, reason in found.items())])
    if lines:
        write_atomically(path, "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    else:
        path.unlink(missing_ok=True)


#: File descriptors of the folders that this process has locked.
_locked: set[int] = set()


def _forget_locks() -> None:
    for descriptor in _locked:
        os.close(descriptor)
    _locked.clear()


# A forked child shares its parent's locks, and would hold them after the parent has ended.
os.register_at_fork(after_in_child=_forget_locks)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on ``folder`` during the block. The system releases the lock when the process ends in any way.

    The folder itself is locked, so no lock file is left in it.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is false.
        FileNotFoundError: ``folder`` does not exist, or was replaced before it was locked.
        OSError: ``folder`` cannot be opened, or its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    _locked.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            reason = "another run is writing into it" if isinstance(error, BlockingIOError) else error.strerror
            raise OSError(error.errno, reason, str(folder)) from error  # the errno makes it a BlockingIOError again
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield
    finally:
        if descriptor in _locked:  # a forked child has closed it already
            _locked.remove(descriptor)
            os.close(descriptor)


@contextlib.contextmanager
def held(folder: Path, warn: Callable[[str], object], *, wait: bool = False) -> Iterator[None]:
    """:func:`locked` for a run. If the file system cannot lock folders, call ``warn`` with a message and run the block.

    Raises:
        BlockingIOError, OSError: as :func:`locked`.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=wait))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warn(f"{folder} cannot be locked ({error.strerror}): start no other run in it while this one is running")
        yield


def _make(folder: Path, *, exist_ok: bool) -> list[Path]:
    """Create ``folder`` and its parents; return those that did not exist before, innermost first."""
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    folder.mkdir(parents=True, exist_ok=exist_ok)
    return missing


@contextlib.contextmanager
def claimed(folder: Path, warn: Callable[[str], object], *, renamed: bool = False) -> Iterator[Path]:
    """Create ``folder`` if needed and hold it (:func:`held`) during the block; yield its path.

    Folders that this created and that are empty at the end are removed.

    Args:
        folder: the folder.
        warn: as for :func:`held`.
        renamed: if ``folder`` exists, create a new one with the same name and the first free number, from 2.

    Raises:
        BlockingIOError, OSError: as :func:`held`, or the folder cannot be created.
    """
    names = itertools.chain([folder], (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2)))
    name = next(names)
    made: list[Path] = []
    with contextlib.ExitStack() as stack:
        # Another process that held the folder may remove it, empty, between this process's mkdir and its lock. Try three times.
        for attempts_left in (2, 1, 0):
            try:
                while True:
                    try:
                        made = sorted({*made, *_make(name, exist_ok=not renamed)}, reverse=True)  # parents sort first
                        break
                    except FileExistsError:
                        if not renamed:
                            raise
                        name = next(names)
                with contextlib.ExitStack() as attempt:
                    attempt.enter_context(held(name, warn))
                    if not name.exists():  # possible if folders cannot be locked
                        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(name))
                    stack.push(attempt.pop_all())
                break
            except FileNotFoundError:
                if not attempts_left:
                    raise
        try:
            yield name
        finally:
            with contextlib.suppress(OSError):  # a folder that is not empty stays, with its parents
                for each in made:
                    each.rmdir()


def holds_run(out: Path) -> bool:
    """Whether ``out`` holds files of a run, which another run must not overwrite."""
    return any((out / name).exists() for name in (METRICS, LAST, BEST))


def weights_file(path: Path) -> Path:
    """The checkpoint file for ``path``: ``path`` itself, or in the folder of a run its best checkpoint, else its last.

    Raises:
        CheckpointError: ``path`` is a folder without either.
    """
    if not os.path.isdir(path):  # Path.is_dir raises if a parent folder may not be entered
        return path
    for name in (BEST, LAST):
        if (path / name).exists():
            return path / name
    raise CheckpointError(f"{path}: not the folder of a run: it has neither {BEST} nor {LAST}")
