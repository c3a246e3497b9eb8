"""Folders that one process at a time works in."""

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

#: In a run's folder, where damaged images were left out: a line for each, its file and what is wrong with it.
SKIPPED = "skipped.txt"

#: What a file system answers that has no such locks, or none on folders (NFS: EBADF).
_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def list_skipped(folder: Path, found: Mapping[str, str], *, more: bool = False) -> None:
    """Write :data:`SKIPPED`: images and what is wrong with each; ``more``: beside what is there. Without any there is no file.

    Raises:
        WriteError: it cannot be written.
    """
    path = folder / SKIPPED
    before = path.read_text(errors="surrogateescape").splitlines() if more and path.exists() else []
    lines = dict.fromkeys([*before, *(f"{image}: {reason}" for image, reason in found.items())])
    if lines:
        write_atomically(path, "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    else:
        path.unlink(missing_ok=True)


#: Descriptors of the folders that this process has locked.
_locked: set[int] = set()


def _forget_locks() -> None:
    for descriptor in _locked:
        os.close(descriptor)
    _locked.clear()


# A forked child shares its parent's locks: it would keep them when the parent has gone.
os.register_at_fork(after_in_child=_forget_locks)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """No two processes are in such a block of ``folder`` at a time; the lock goes when its process ends, however that is.

    The folder itself is locked, so that no file is left in it.

    Raises:
        BlockingIOError: another process is in one, and ``wait`` is false.
        FileNotFoundError: it is not there, or was replaced by another one before it was locked.
        OSError: ``folder`` cannot be opened, or its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    _locked.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            reason = "another run goes on in it" if isinstance(error, BlockingIOError) else error.strerror
            raise OSError(error.errno, reason, str(folder)) from error  # the errno makes it a BlockingIOError again
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield
    finally:
        if descriptor in _locked:  # not in a child
            _locked.remove(descriptor)
            os.close(descriptor)


@contextlib.contextmanager
def held(folder: Path, warn: Callable[[str], object], *, wait: bool = False) -> Iterator[None]:
    """:func:`locked` for the time of a run; where folders cannot be locked, ``warn`` is told so, and the block runs.

    Raises:
        BlockingIOError, OSError: as :func:`locked`.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=wait))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warn(f"{folder} cannot be locked ({error.strerror}): start no other run in it while this one goes on")
        yield


def _make(folder: Path, *, exist_ok: bool) -> list[Path]:
    """Make ``folder`` and its parents; those that were not there, innermost first."""
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    folder.mkdir(parents=True, exist_ok=exist_ok)
    return missing


@contextlib.contextmanager
def claimed(folder: Path, warn: Callable[[str], object], *, renamed: bool = False) -> Iterator[Path]:
    """In the block ``folder`` is there and :func:`held`. What was made for it and is empty at the end is removed.

    Args:
        renamed: where there is a ``folder`` already, make one of the same name with the first free number after it.

    Returns:
        The folder.

    Raises:
        BlockingIOError, OSError: as :func:`held`; or it cannot be made.
    """
    names = itertools.chain([folder], (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2)))
    name = next(names)
    made: list[Path] = []
    with contextlib.ExitStack() as stack:
        # Another process may remove its empty folder between the making and the locking of this one; not again and again.
        for attempts_left in (2, 1, 0):
            try:
                while True:
                    try:
                        made = sorted({*made, *_make(name, exist_ok=not renamed)}, reverse=True)  # a parent is less
                        break
                    except FileExistsError:
                        if not renamed:
                            raise
                        name = next(names)
                with contextlib.ExitStack() as attempt:
                    attempt.enter_context(held(name, warn))
                    if not name.exists():  # where nothing can be locked
                        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(name))
                    stack.push(attempt.pop_all())
                break
            except FileNotFoundError:
                if not attempts_left:
                    raise
        try:
            yield name
        finally:
            with contextlib.suppress(OSError):  # not empty: it and those that it is in stay
                for each in made:
                    each.rmdir()


def holds_run(out: Path) -> bool:
    """Whether a run has written into the folder ``out``: another one must not overwrite it."""
    return any((out / name).exists() for name in (METRICS, LAST, BEST))


def weights_file(path: Path) -> Path:
    """The file that ``path`` means to whoever wants a network: itself, or of a run's folder the best checkpoint, else the last.

    Raises:
        CheckpointError: a folder without either.
    """
    if not os.path.isdir(path):  # Path.is_dir raises where a folder above may not be entered
        return path
    for name in (BEST, LAST):
        if (path / name).exists():
            return path / name
    raise CheckpointError(f"{path}: no run's folder: neither {BEST} nor {LAST} is in it")
