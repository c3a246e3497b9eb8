"""Worker processes that decode images into shared memory.

A ``DataLoader`` is not used. Its workers pass images through /dev/shm, which has 64 MB in a container by default, and when it
is full they hang. The anonymous memory that a process shares with its forks is in no file system.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import math
import mmap
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence, Sized
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor

from .dataset import DataError
from .sources import Source

#: Images per chunk. A worker is sent one chunk at a time.
CHUNK = 16

#: The most chunks that a worker has at a time, so that the next chunk is there when it has finished one.
_AHEAD = 2

#: Seconds without an answer after which a worker counts as hung.
PATIENCE = 600.0

#: Seconds between two checks whether to stop, while waiting for workers.
_GLANCE = 0.1

#: Errors of unreadable images, by position in the batch.
Errors = dict[int, DataError]


def default_workers() -> int:
    """The default number of workers: one per usable core, divided among torchrun's processes on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def useful_workers(batches: Sequence[Sized], workers: int) -> int:
    """The number of ``workers`` that get work: at most the number of chunks in ``batches``."""
    return min(workers, sum(math.ceil(len(batch) / CHUNK) for batch in batches))


def image_shape(channels: int, size: int) -> tuple[int, ...]:
    """The shape of an image returned by :func:`.image_files.read_image`."""
    return (size, size) if channels == 1 else (channels, size, size)


def read_into(room: Tensor, source: Source, index: Sequence[int], channels: int) -> Errors:
    """Read the images ``index`` into the first rows of ``room``, (B, H, W) or (B, 3, H, W); return the errors."""
    errors: Errors = {}
    for place, i in enumerate(index):
        try:
            room[place] = source.read(i, channels, room.shape[-1])
        except DataError as error:
            errors[place] = error
    return errors


def _end_with(parent: int) -> None:
    """Have the system kill this process when its parent ends in any way."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has ended already
        os._exit(1)


def _work(pipe: Connection, theirs: Connection, parent: int, source: Source, room: Tensor, channels: int) -> None:
    """Main loop of a worker: receive (slot, begin, index), read the images into ``room[slot, begin:]``, send the errors."""
    theirs.close()  # this fork's copy of the parent's end: with it open, the pipe would not end when the parent does
    # A terminal, a batch system or `timeout` may send these signals to all processes. The parent handles them and ends workers.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    _end_with(parent)
    gc.disable()  # the parent's garbage is not to be collected here
    torch.set_num_threads(1)  # a fork does not copy the parent's threads
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has closed the pipe
        while True:
            slot, begin, index = pipe.recv()
            pipe.send(read_into(room[slot, begin:], source, index, channels))


class _Worker:
    """A worker process, and its queue of chunks."""

    def __init__(self, number: int, count: int, source: Source, room: Tensor, channels: int) -> None:
        context = multiprocessing.get_context("fork")
        try:
            self.pipe, theirs = context.Pipe()
            given = (theirs, self.pipe, os.getpid(), source, room, channels)
            self.process: BaseProcess = context.Process(target=_work, args=given, daemon=True)
            self.process.start()
        except OSError as error:
            raise DataError(
                f"process {number} of {count} to decode images cannot be started: {error.strerror}: use fewer with --workers N"
            ) from error
        theirs.close()  # so that the pipe ends when the worker does
        self.given: deque[tuple[int, int, list[int]]] = deque()
        self.heard = time.monotonic()

    def give(self, chunk: tuple[int, int, list[int]]) -> None:
        if not self.given:
            self.heard = time.monotonic()
        self.given.append(chunk)
        with contextlib.suppress(OSError):  # the worker has ended; answer() will raise
            self.pipe.send(chunk)

    def answer(self) -> tuple[int, Errors]:
        """Receive the worker's oldest chunk: its slot, and the errors by position in the slot.

        Raises:
            EOFError, OSError: the worker has ended.
        """
        errors: Errors = self.pipe.recv()
        slot, begin, _ = self.given.popleft()
        self.heard = time.monotonic()
        return slot, {begin + place: error for place, error in errors.items()}

    def end(self) -> str:
        """Describe, for a message, how the worker ended."""
        self.process.join(5)
        code = self.process.exitcode or 0
        said = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return said + ", as the system does when memory runs out" * (code == -signal.SIGKILL)

    def close(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join(5)


class Decoders:
    """Workers that read batches of a source's images into slots of shared memory.

    :meth:`put` queues a batch for a slot. :meth:`get` waits for the batch that was queued first. The result does not depend on
    which worker reads an image. Workers are forked: they have ``source`` as it was at the fork, and nothing of it is sent. Call
    :meth:`close`, or the workers stay.

    Args:
        source: source of the images.
        channels: 1 or 3.
        size: side of the images.
        batch: the most images of a slot.
        workers: number of processes; 0: :meth:`get` reads the images in this process.

    Attributes:
        room: uint8 (slots, batch, size, size), for three channels (slots, batch, 3, size, size), in shared memory. There are at
            least three slots, and enough to keep every worker's queue full while one slot is in use.

    Raises:
        DataError: there is not enough memory, or a process cannot be started.
    """

    def __init__(self, source: Source, channels: int, size: int, batch: int, workers: int) -> None:
        self._source, self._channels = source, channels
        self.slots = 3 if workers == 0 else max(3, 2 + math.ceil(_AHEAD * workers * CHUNK / batch))
        shape = (self.slots, batch, *image_shape(channels, size))
        try:
            self.room = torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)
        except (OSError, OverflowError) as error:
            raise DataError(
                f"no memory for {self.slots} batches of {batch} images of {channels} x {size} x {size}, "
                f"{math.prod(shape) / 1e9:.1f} GB: fewer with --batch-size N or --workers N"
            ) from error
        #: Queued slots in their order; of each slot its images, the number of images still to be read, and the errors.
        self._put: deque[int] = deque()
        self._index: dict[int, list[int]] = {}
        self._missing: dict[int, int] = {}
        self._errors: dict[int, Errors] = {}
        self._chunks: deque[tuple[int, int, list[int]]] = deque()
        self._workers: list[_Worker] = []
        if workers:
            import torchvision.transforms.v2.functional  # noqa: F401 before the fork: else each worker imports it
        try:
            for i in range(workers):
                self._workers.append(_Worker(i, workers, source, self.room, channels))
        except BaseException:
            self.close()
            raise
        # This runs before multiprocessing's own exit handler, which sends SIGTERM and waits.
        atexit.register(self.close)

    def put(self, slot: int, index: Sequence[int]) -> None:
        """Queue the images ``index`` to be read into ``slot``, whose former content is no longer needed."""
        self._put.append(slot)
        self._index[slot], self._missing[slot], self._errors[slot] = list(index), len(index), {}
        if self._workers:
            self._chunks += [(slot, i, self._index[slot][i : i + CHUNK]) for i in range(0, len(index), CHUNK)]
            self._give()

    def get(self, stop: Callable[[], bool] | None = None) -> tuple[int, Errors] | None:
        """Wait for the slot that was queued first; return the slot and its errors, or None once ``stop`` returns True.

        Raises:
            DataError: a worker has died, or has sent nothing for :data:`PATIENCE` seconds.
        """
        slot = self._put[0]
        if not self._workers:
            if stop is not None and stop():
                return None
            self._errors[slot] = read_into(self.room[slot], self._source, self._index[slot], self._channels)
            self._missing[slot] = 0
        while self._missing[slot]:
            if stop is not None and stop():
                return None
            self._listen()
        self._put.popleft()
        return slot, self._errors.pop(slot)

    def _listen(self) -> None:
        """Wait up to :data:`_GLANCE` seconds for workers' answers, and send new chunks."""
        busy = {worker.pipe: worker for worker in self._workers if worker.given}
        for pipe in wait(list(busy), _GLANCE):
            worker = busy[pipe]  # type: ignore[index]  # always a Connection here
            index = worker.given[0][2]
            try:
                slot, errors = worker.answer()
            except (EOFError, OSError) as error:
                raise DataError(
                    f"{self._some(index)}: the process that decodes them {worker.end()}: take fewer with --workers N, "
                    "or none with --workers 0"
                ) from error
            self._errors[slot] |= errors
            self._missing[slot] -= len(index)
        self._give()
        for worker in self._workers:
            if worker.given and time.monotonic() - worker.heard > PATIENCE:
                raise DataError(
                    f"{self._some(worker.given[0][2])}: the process that decodes them has sent nothing for {PATIENCE:.0f} s: "
                    "decode without other processes, with --workers 0"
                )

    def _give(self) -> None:
        for ahead in range(_AHEAD):
            for worker in self._workers:
                if self._chunks and len(worker.given) == ahead:
                    worker.give(self._chunks.popleft())

    def _some(self, index: Sequence[int]) -> str:
        first, last = self._source.name(index[0]), self._source.name(index[-1])
        return str(first) + (f" to {last}" if len(index) > 1 else "")

    def close(self) -> None:
        """Kill the workers."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.close()
        self._workers = []


def decode(
    source: Source, batches: Sequence[Sequence[int]], channels: int, size: int, workers: int
) -> Generator[tuple[Tensor, Errors], None, None]:
    """Yield the images of each of ``batches`` with the errors of unreadable ones, the same whatever ``workers`` is.

    Images are uint8, (B, H, W) or (B, 3, H, W), and valid until the next batch is requested. Close the iterator to end the
    workers.

    Raises:
        DataError: as :class:`Decoders`.
    """
    if not batches:
        return
    most = max(map(len, batches))
    with contextlib.closing(Decoders(source, channels, size, most, useful_workers(batches, workers))) as decoders:
        for i, batch in enumerate(batches[: decoders.slots]):
            decoders.put(i, batch)
        for i, batch in enumerate(batches):
            found = decoders.get()
            assert found is not None  # no stop function was passed
            slot, errors = found
            yield decoders.room[slot, : len(batch)], errors
            if i + decoders.slots < len(batches):
                decoders.put(slot, batches[i + decoders.slots])
