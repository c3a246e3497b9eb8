"""Images read by several processes, which write them into memory that all share.

Not a ``DataLoader``, whose processes hand over through /dev/shm: of that a container has 64 MB if nobody says how much, and
where it is full nothing comes any more. Memory that a process shares with those that it forks lies in no file system.
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

#: Images that a process is given at a time.
CHUNK = 16

#: Chunks that it is given ahead: the next one waits for it.
_AHEAD = 2

#: Seconds after which a process that has sent nothing is given up.
PATIENCE = 600.0

#: Seconds between two looks at whether to stop, while there is nothing to do but to wait.
_GLANCE = 0.1

#: What could not be read, by its place in the batch.
Errors = dict[int, DataError]


def default_workers() -> int:
    """Processes that decode: one for each core that may be used, torchrun's processes sharing them."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def useful_workers(batches: Sequence[Sized], workers: int) -> int:
    """Of ``workers`` processes as many as ``batches`` have chunks: more would have nothing to read."""
    return min(workers, sum(math.ceil(len(batch) / CHUNK) for batch in batches))


def image_shape(channels: int, size: int) -> tuple[int, ...]:
    """Of an image as :func:`.image_files.read_image` returns it."""
    return (size, size) if channels == 1 else (channels, size, size)


def read_into(room: Tensor, source: Source, index: Sequence[int], channels: int) -> Errors:
    """Read the images ``index`` into the first places of ``room``, (B, H, W) or (B, 3, H, W); what cannot be read."""
    errors: Errors = {}
    for place, i in enumerate(index):
        try:
            room[place] = source.read(i, channels, room.shape[-1])
        except DataError as error:
            errors[place] = error
    return errors


def _end_with(parent: int) -> None:
    """Let this process be killed when the one that forked it ends, however that is."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _work(pipe: Connection, theirs: Connection, parent: int, source: Source, room: Tensor, channels: int) -> None:
    """One process: reads what it is told to read into the places that it is told, and says what it could not."""
    theirs.close()  # a copy of which the fork made: with it the pipe would not end where the other process does
    # A terminal, a batch system or `timeout` may send these to all processes; the first one heeds them, and ends the others.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    _end_with(parent)
    gc.disable()  # what the other process has left is none of this one's business
    torch.set_num_threads(1)  # after a fork there are no others
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # nobody wants any more
        while True:
            slot, begin, index = pipe.recv()
            pipe.send(read_into(room[slot, begin:], source, index, channels))


class _Worker:
    """A process that reads, and what it has been told to."""

    def __init__(self, number: int, count: int, source: Source, room: Tensor, channels: int) -> None:
        context = multiprocessing.get_context("fork")
        try:
            self.pipe, theirs = context.Pipe()
            given = (theirs, self.pipe, os.getpid(), source, room, channels)
            self.process: BaseProcess = context.Process(target=_work, args=given, daemon=True)
            self.process.start()
        except OSError as error:
            raise DataError(
                f"process {number} of {count} to decode images cannot be started: {error.strerror}: --workers N"
            ) from error
        theirs.close()  # so that the pipe ends with the process
        self.given: deque[tuple[int, int, list[int]]] = deque()
        self.heard = time.monotonic()

    def give(self, chunk: tuple[int, int, list[int]]) -> None:
        if not self.given:
            self.heard = time.monotonic()
        self.given.append(chunk)
        with contextlib.suppress(OSError):  # of a process that has ended, which is seen where it should answer
            self.pipe.send(chunk)

    def answer(self) -> tuple[int, Errors]:
        """The slot of what it has read, and what it could not.

        Raises:
            EOFError, OSError: the process has ended.
        """
        errors: Errors = self.pipe.recv()
        slot, begin, _ = self.given.popleft()
        self.heard = time.monotonic()
        return slot, {begin + place: error for place, error in errors.items()}

    def end(self) -> str:
        """In words, how the process ended."""
        self.process.join(5)
        code = self.process.exitcode or 0
        said = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return said + ", as the system does when memory runs out" * (code == -signal.SIGKILL)

    def close(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join(5)


class Decoders:
    """Processes that read batches of a source's images, into slots of ``batch`` places each.

    A slot is put to use by :meth:`put`; :meth:`get` waits for the one that was put first. Which process reads what changes no
    bit. The processes begin by a fork: what ``source`` is then they have, and nothing of it is sent. Close it, or they stay.

    Args:
        source: what is read.
        channels: 1 or 3.
        size: side of the images.
        batch: images of a slot, at most.
        workers: processes; with 0 the images are read in this one, in :meth:`get`.

    Attributes:
        room: uint8 (slots, batch, size, size), of three channels (slots, batch, 3, size, size), in memory that is shared. At
            least three slots, and as many that every process has chunks ahead while one slot is taken.

    Raises:
        DataError: no memory for it, or a process that cannot be started.
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
        #: Slots in the order in which they were put, each with its images, how many of them are still to come, and errors.
        self._put: deque[int] = deque()
        self._index: dict[int, list[int]] = {}
        self._missing: dict[int, int] = {}
        self._errors: dict[int, Errors] = {}
        self._chunks: deque[tuple[int, int, list[int]]] = deque()
        self._workers: list[_Worker] = []
        if workers:
            import torchvision.transforms.v2.functional  # noqa: F401 here, once: else each process imports it by itself
        try:
            for i in range(workers):
                self._workers.append(_Worker(i, workers, source, self.room, channels))
        except BaseException:
            self.close()
            raise
        # Before multiprocessing's own, which asks by SIGTERM and waits.
        atexit.register(self.close)

    def put(self, slot: int, index: Sequence[int]) -> None:
        """Let the images ``index`` be read into ``slot``, which nobody reads any more."""
        self._put.append(slot)
        self._index[slot], self._missing[slot], self._errors[slot] = list(index), len(index), {}
        if self._workers:
            self._chunks += [(slot, i, self._index[slot][i : i + CHUNK]) for i in range(0, len(index), CHUNK)]
            self._give()

    def get(self, stop: Callable[[], bool] | None = None) -> tuple[int, Errors] | None:
        """The slot that was put first, its images read, and what of it cannot be; None where ``stop`` said so meanwhile.

        Raises:
            DataError: a process has died, or has sent nothing for :data:`PATIENCE`.
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
        """Wait a moment for processes that have read something, and give them more."""
        busy = {worker.pipe: worker for worker in self._workers if worker.given}
        for pipe in wait(list(busy), _GLANCE):
            worker = busy[pipe]  # type: ignore[index]  # a Connection, as they all are
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
        """End the processes."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.close()
        self._workers = []


def decode(
    source: Source, batches: Sequence[Sequence[int]], channels: int, size: int, workers: int
) -> Generator[tuple[Tensor, Errors], None, None]:
    """The images of each of ``batches``, whatever ``workers`` is, and which of them cannot be read.

    Images are uint8, (B, H, W) or (B, 3, H, W), and hold until the next are asked for. The processes end with the iterator:
    close it.

    Raises:
        DataError: as :class:`Decoders` does.
    """
    if not batches:
        return
    most = max(map(len, batches))
    with contextlib.closing(Decoders(source, channels, size, most, useful_workers(batches, workers))) as decoders:
        for i, batch in enumerate(batches[: decoders.slots]):
            decoders.put(i, batch)
        for i, batch in enumerate(batches):
            found = decoders.get()
            assert found is not None  # nobody says stop
            slot, errors = found
            yield decoders.room[slot, : len(batch)], errors
            if i + decoders.slots < len(batches):
                decoders.put(slot, batches[i + decoders.slots])
