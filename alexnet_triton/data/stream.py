"""Streaming: images are read while the network trains. A set may be larger than the memory of device and host.

Workers decode the images of the next batches (:mod:`.image_workers`). A batch is copied to the device during the step before
it, into one of a few fixed buffers from which a captured step reads. The rest is the same as for images that stay on the
device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .dataset import DataError, Normalization, Split
from .image_workers import Decoders, Errors, image_shape, useful_workers
from .sources import Source

#: The most unreadable images in sequence that are tried in the search for a readable one.
_TRIES = 1000

#: Batches on a GPU: one that a step reads, one that is ready, one that is being copied.
_ON_DEVICE = 3


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
    """Images that are read when they are needed, and their labels.

    Attributes:
        source: source of the images.
        size: side of an image.
        channels: 1 or 3.
        workers: number of processes that read; 0: images are read between two steps.
        normalization: as in :class:`.dataset.Split`.
        skip_damaged: whether unreadable images are no error. In training such an image is replaced by the last readable one
            before it in its batch, else by the first readable one of the batch, else by the next readable one of the set.
            Elsewhere it is left out.
        skipped: unreadable images so far, each with the reason.
    """

    source: Source
    size: int
    channels: int
    workers: int
    normalization: Normalization | None = None
    skip_damaged: bool = False
    skipped: dict[Path, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> Tensor:
        """int64 (N,), on the CPU."""
        return self.source.labels

    def limited(self, limit: int | None) -> StreamedSplit:
        """A stream of the first ``limit`` images; None: of all."""
        if limit is None or limit >= len(self):
            return self
        return dataclasses.replace(self, source=self.source.subset(torch.arange(limit)))

    def to(self, device: torch.device) -> StreamedSplit:
        """The stream itself: its images are copied to a device when they are needed."""
        return self

    def blank(self, count: int) -> Split:
        """A split of ``count`` black images of the first class, on the CPU, to compile kernels before any image is read."""
        images = torch.zeros(count, *image_shape(self.channels, self.size), dtype=torch.uint8)
        return Split(images, torch.zeros(count, dtype=torch.int64), self.normalization)

    def image(self, index: int) -> Tensor:
        """Read image ``index`` in this process; on the CPU."""
        return self.source.read(index, self.channels, self.size)

    def parts(self) -> Iterator[Tensor]:
        """All readable images, up to 256 at a time, on the CPU."""
        batches = torch.arange(len(self)).split(256)
        with contextlib.closing(Feed(self, batches, torch.device("cpu"), replace=False)) as feed:
            for part, index in feed:
                yield part.images[index]

    def note(self, index: Tensor, errors: Errors) -> None:
        """Add the images of ``index`` that have ``errors`` to :attr:`skipped`.

        Raises:
            DataError: there is an error, and :attr:`skip_damaged` is false.
        """
        if errors and not self.skip_damaged:
            raise errors[min(errors)]
        for place, error in errors.items():
            name = self.source.name(int(index[place]))
            self.skipped[name] = str(error).removeprefix(f"{name}: ")

    def mend(self, images: Tensor, index: Tensor, errors: Errors) -> Tensor:
        """Replace, in ``images``, those that have ``errors`` by others; return ``index`` with the numbers of the replacements.

        Raises:
            DataError: no image of the batch can be read, and none after its first, :data:`_TRIES` in sequence.
        """
        if not errors:
            return index
        good = [place for place in range(len(index)) if place not in errors]
        index = index.clone()
        if not good:
            index[0] = self._next_after(int(index[0]), images, errors[0])
            good, errors = [0], {place: error for place, error in errors.items() if place}
        for place in errors:
            before = max((other for other in good if other < place), default=good[0])
            images[place] = images[before]
            index[place] = index[before]
        return index

    def _next_after(self, index: int, images: Tensor, last: DataError) -> int:
        """Read the next readable image after ``index`` into ``images[0]``; return its number.

        ``last`` is the error of image ``index``.
        """
        for ahead in range(1, min(len(self), _TRIES)):
            number = (index + ahead) % len(self)
            try:
                images[0] = self.image(number)
                return number
            except DataError as error:
                last = error
        raise DataError(f"{min(len(self), _TRIES)} images one after the other cannot be read: {last}")


#: Images and labels, in memory or streamed.
AnySplit = Split | StreamedSplit


class Ring:
    """A ring buffer of batches on a GPU, in fixed memory from which a captured step reads at each replay.

    Args:
        split: the stream.
        batch: the most images of a batch.
        device: the GPU.

    Attributes:
        split: the images and labels of all slots of the ring, one batch after the other.
    """

    def __init__(self, split: StreamedSplit, batch: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        shape = (_ON_DEVICE * batch, *image_shape(split.channels, split.size))
        images = torch.zeros(shape, dtype=torch.uint8, device=device)
        labels = torch.zeros(_ON_DEVICE * batch, dtype=torch.int64, device=device)
        self.split = Split(images, labels, split.normalization)
        places = torch.arange(_ON_DEVICE * batch, device=device)
        self.places = places.split(batch)
        self.copies = torch.cuda.Stream(device)
        self.copies.wait_stream(torch.cuda.current_stream(device))  # until the buffers are zeroed
        #: Events of each slot: its last copy is complete, and the last step that reads it is complete.
        self.filled = [torch.cuda.Event(blocking=True) for _ in range(_ON_DEVICE)]
        self.read = [torch.cuda.Event() for _ in range(_ON_DEVICE)]

    def fill(self, place: int, images: Tensor, labels: Tensor) -> Tensor:
        """Copy a batch into slot ``place`` on a stream of its own; return the numbers of its images in :attr:`split`.

        The current stream waits for the copy.
        """
        begin = place * self.batch
        self.copies.wait_event(self.read[place])
        with torch.cuda.stream(self.copies):
            for to, value in ((self.split.images, images), (self.split.labels, labels)):
                to[begin : begin + len(value)].copy_(value, non_blocking=True)
        self.filled[place].record(self.copies)
        torch.cuda.current_stream(self.device).wait_event(self.filled[place])
        return self.places[place][: len(images)]


@contextlib.contextmanager
def _pinned(room: Tensor, device: torch.device) -> Iterator[None]:
    """Pin ``room`` for asynchronous copies during the block. Enter it after the workers are forked: they need no pinning."""
    runtime = torch.cuda.cudart()
    pinned = int(runtime.cudaHostRegister(room.data_ptr(), room.numel(), 0)) == 0
    if not pinned:  # copies are then synchronous. CUDA reports the error at the next call: make that call here
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)
    try:
        yield
    finally:
        if pinned:
            torch.cuda.synchronize(device)
            runtime.cudaHostUnregister(room.data_ptr())


class Feed:
    """Iterator over batches on the device, each as (split on the device, indices of the batch's images in it).

    For images that stay on the device these are the split itself and the given batch. Call :meth:`close`, which ends workers.

    Args:
        split: a split on ``device``, or a stream.
        batches: image numbers of each batch, int64.
        device: device of the yielded batches.
        ring: ring buffer on a GPU for a stream; None: the feed makes its own.
        stop: called while waiting for the next batch; if it returns True, the iterator ends.
        replace: whether unreadable images are replaced by others; if not, they are left out.

    Attributes:
        waited: seconds during which the device was idle because images were not ready.
        missing: numbers of the images that were left out.
    """

    def __init__(
        self,
        split: AnySplit,
        batches: Sequence[Tensor],
        device: torch.device,
        *,
        ring: Ring | None = None,
        stop: Callable[[], bool] | None = None,
        replace: bool = True,
    ) -> None:
        self.waited = 0.0
        self.missing: set[int] = set()
        self._batches, self._device, self._stop, self._replace = batches, device, stop, replace
        if isinstance(split, Split):
            self._parts = ((split, batch) for batch in batches)
        else:
            self._parts = self._streamed(split, ring)

    def __iter__(self) -> Iterator[tuple[Split, Tensor]]:
        return self._parts

    def close(self) -> None:
        """End the workers."""
        self._parts.close()

    def _streamed(self, split: StreamedSplit, ring: Ring | None) -> Generator[tuple[Split, Tensor], None, None]:
        batches = [batch.cpu() for batch in self._batches]
        most = max(map(len, batches), default=0)
        if most == 0:  # this process may have an empty share of every batch
            yield from ((split.blank(1).to(self._device), batch.to(self._device)) for batch in batches)
            return
        on_gpu = self._device.type == "cuda"
        if on_gpu and ring is None:
            ring = Ring(split, most, self._device)
        workers = useful_workers(batches, split.workers)
        decoders = Decoders(split.source, split.channels, split.size, most, workers)
        with contextlib.closing(decoders), _pinned(decoders.room, self._device) if on_gpu else contextlib.nullcontext():
            ahead = min(decoders.slots, len(batches))
            for slot in range(ahead):
                decoders.put(slot, batches[slot].tolist())
            for number, batch in enumerate(batches):
                found = self._get(decoders, ring, number)
                if found is None:
                    return
                slot, errors = found
                images = decoders.room[slot, : len(batch)]
                split.note(batch, errors)
                keep: Tensor | slice = slice(None)
                if self._replace:
                    batch = split.mend(images, batch, errors)
                elif errors:
                    self.missing |= {int(batch[place]) for place in errors}
                    keep = torch.tensor([place for place in range(len(batch)) if place not in errors], dtype=torch.int64)
                labels = split.labels[batch]
                if ring is None:
                    yield Split(images, labels, split.normalization), torch.arange(len(batch))[keep]
                else:
                    place = number % _ON_DEVICE
                    yield ring.split, ring.fill(place, images, labels.pin_memory())[keep]
                    ring.read[place].record(torch.cuda.current_stream(self._device))
                    ring.filled[place].synchronize()  # before the slot is refilled; this copy began before the step did
                if number + ahead < len(batches):
                    decoders.put(slot, batches[number + ahead].tolist())

    def _get(self, decoders: Decoders, ring: Ring | None, number: int) -> tuple[int, Errors] | None:
        """Wait for the next batch, and add the time to :attr:`waited` from when the GPU has finished the step before."""
        idle: float | None = None

        def glance() -> bool:
            nonlocal idle
            if idle is None and (ring is None or ring.read[(number - 1) % _ON_DEVICE].query()):
                idle = time.perf_counter()
            return self._stop is not None and self._stop()

        found = decoders.get(glance)
        if idle is not None:
            self.waited += time.perf_counter() - idle
        return found
