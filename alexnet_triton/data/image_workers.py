"""Image files decoded by several processes, each of which hands its images over through a pipe of its own.

Not a ``DataLoader``, whose processes hand over through shared memory: of that a container has 64 MB if nobody says how much,
and where it is full nothing comes any more. A pipe needs none of it, nor a semaphore, and ends when its process does.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from .dataset import DataError
from .image_files import read_images

#: Images that are handed over at a time: of 3 x 224 x 224, 2.4 MB.
BATCH = 16

#: Seconds after which a process that has sent nothing is given up.
PATIENCE = 600.0

#: Of so many files the images as one tensor, the files that they are from, and the errors of the others.
Decoded = tuple[Tensor, list[Path], list[DataError]]


def default_workers() -> int:
    """Processes that decode: one for each core that may be used, torchrun's processes sharing them; 8 at most."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _work(pipe: Connection, batches: list[list[Path]], channels: int, size: int) -> None:
    """One process: decodes ``batches`` in turn, each while the one before waits to be taken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the first one ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # after a fork there are no others
    try:
        for paths in batches:
            images, readable, errors = read_images(paths, channels, size)
            pipe.send((images.numpy(), readable, errors))  # an array's bytes: a tensor would go through shared memory
    except BrokenPipeError:  # nobody takes them any more
        pass


def _receive(pipe: Connection, process: Process, paths: list[Path]) -> Decoded:
    """What ``process`` makes of ``paths``.

    Raises:
        DataError: it has ended, or sends nothing for :data:`PATIENCE`.
    """
    some = str(paths[0]) + (f" to {paths[-1]}" if len(paths) > 1 else "")
    try:
        if pipe.poll(PATIENCE):
            images, readable, errors = pipe.recv()
            return torch.from_numpy(images), readable, errors
    except (EOFError, OSError) as error:
        process.join(5)
        code = process.exitcode or 0
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGKILL:
            end += ", as the system does when memory runs out"
        raise DataError(
            f"{some}: the process that decodes them {end}: take fewer with --workers N, or none with --workers 0"
        ) from error
    raise DataError(
        f"{some}: the process that decodes them has sent nothing for {PATIENCE:.0f} s: "
        "decode without other processes, with --workers 0"
    )


def decode(paths: list[Path], channels: int, size: int, workers: int) -> Generator[Decoded, None, None]:
    """:func:`.image_files.read_images` of ``paths``, in their order, :data:`BATCH` at a time.

    Args:
        workers: processes that decode; with 0 it is done in this one. They end with the iterator: close it.

    Raises:
        DataError: a process that cannot be started, that dies, or that sends nothing any more.
    """
    batches = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
    if workers == 0:
        for batch in batches:
            yield read_images(batch, channels, size)
        return
    import torchvision.transforms.v2.functional  # noqa: F401 here, once: else each process imports it by itself

    workers = min(workers, len(batches))
    started: list[tuple[Connection, Process]] = []
    try:
        for i in range(workers):
            try:
                pipe, theirs = Pipe(duplex=False)
                process = Process(target=_work, args=(theirs, batches[i::workers], channels, size), daemon=True)
                process.start()
            except OSError as error:
                raise DataError(
                    f"process {i} of {workers} to decode images cannot be started: {error.strerror}: --workers N"
                ) from error
            theirs.close()  # so that the pipe ends with the process
            started.append((pipe, process))
        for i, batch in enumerate(batches):
            yield _receive(*started[i % workers], batch)
    finally:
        for pipe, process in started:
            pipe.close()
            process.kill()
            process.join(5)
