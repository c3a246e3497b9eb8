"""Images that are read while a network trains on them: a set may be larger than the device, and than the host.

Processes decode the images of the next batches (:mod:`.image_workers`). A batch goes to the device beside the step before it,
into one of a few places that are always the same, from which a captured step reads. All after that is as for images that live
there.
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

#: Images one after the other that cannot be read, before it is given up to look for one that can.
_TRIES = 1000

#: Batches on a GPU: one that a step reads, one that is ready, one that is on its way.
_ON_DEVICE = 3


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
    """Images that are read as they are needed, and their labels.

    Attributes:
        source: what reads them.
        size: side of an image.
        channels: 1 or 3.
        workers: processes that read; 0: it is done between two steps.
        normalization: as in :class:`.dataset.Split`.
        skip_damaged: whether an image that cannot be read is no error. In training the one before it in its batch takes its
            place, or the first that can be read; where none can, the next image of the set that can. Else it is left out.
        skipped: images that could not be read so far, each with what is wrong with it.
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
        """The first ``limit`` images, or all."""
        if limit is None or limit >= len(self):
            return self
        return dataclasses.replace(self, source=self.source.subset(torch.arange(limit)))

    def to(self, device: torch.device) -> StreamedSplit:
        """Itself: its images go to a device when they are needed."""
        return self

    def blank(self, count: int) -> Split:
        """So many black images of the first class, on the CPU: for what is compiled before there are others."""
        images = torch.zeros(count, *image_shape(self.channels, self.size), dtype=torch.uint8)
        return Split(images, torch.zeros(count, dtype=torch.int64), self.normalization)

    def image(self, index: int) -> Tensor:
        """Image ``index``, now, on the CPU."""
        return self.source.read(index, self.channels, self.size)

    def parts(self) -> Iterator[Tensor]:
        """All images that can be read, some hundred at a time, on the CPU."""
        batches = torch.arange(len(self)).split(256)
        with contextlib.closing(Feed(self, batches, torch.device("cpu"), replace=False)) as feed:
            for part, index in feed:
                yield part.images[index]

    def note(self, index: Tensor, errors: Errors) -> None:
        """Add to :attr:`skipped` those of the images ``index`` that cannot be read.

        Raises:
            DataError: there is one, and such are not skipped.
        """
        if errors and not self.skip_damaged:
            raise errors[min(errors)]
        for place, error in errors.items():
            name = self.source.name(int(index[place]))
            self.skipped[name] = str(error).removeprefix(f"{name}: ")

    def mend(self, images: Tensor, index: Tensor, errors: Errors) -> Tensor:
        """Which images are where those of ``index`` were asked for, once those of ``errors`` have been replaced.

        Raises:
            DataError: none of very many can be read.
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
        """The next image that can be read after ``index``, which cannot; it is then the first of ``images``."""
        for ahead in range(1, min(len(self), _TRIES)):
            number = (index + ahead) % len(self)
            try:
                images[0] = self.image(number)
                return number
            except DataError as error:
                last = error
        raise DataError(f"{min(len(self), _TRIES)} images one after the other cannot be read: {last}")


#: What a network trains on or is tested with.
AnySplit = Split | StreamedSplit


class Ring:
    """The places of batches on a GPU: a captured step reads the same memory at each replay.

    Args:
        split: whose batches.
        batch: images of one, at most.
        device: the GPU.

    Attributes:
        split: the images of all places, one batch after the other.
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
        self.copies.wait_stream(torch.cuda.current_stream(device))  # for the zeros
        #: Of each place, when it was last filled, and when a step had last read it.
        self.filled = [torch.cuda.Event(blocking=True) for _ in range(_ON_DEVICE)]
        self.read = [torch.cuda.Event() for _ in range(_ON_DEVICE)]

    def fill(self, place: int, images: Tensor, labels: Tensor) -> Tensor:
        """Copy a batch to ``place``, beside what the current stream does, which then waits for it; where its images are."""
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
    """Let the GPU copy from ``room`` by itself. After the fork of the processes that write it: they need no part in it."""
    runtime = torch.cuda.cudart()
    pinned = int(runtime.cudaHostRegister(room.data_ptr(), room.numel(), 0)) == 0
    if not pinned:  # so copies wait. CUDA keeps the error for whoever asks next: nobody else may get it
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)
    try:
        yield
    finally:
        if pinned:
            torch.cuda.synchronize(device)
            runtime.cudaHostUnregister(room.data_ptr())


class Feed:
    """The batches of a set on the device, one after the other: each as a split there, and where in it the batch is.

    Of images that live on the device that is the split itself and the batch. Close it: processes may read for it.

    Args:
        split: on ``device``, or streamed.
        batches: int64, each the images of a batch.
        device: where they are wanted.
        ring: of a GPU, for a streamed split; None: one for these batches.
        stop: asked while the next batch is waited for; where it says yes, the iterator ends.
        replace: whether other images take the places of those that cannot be read; if not, these are left out.

    Attributes:
        waited: seconds in which there was nothing to compute for want of images.
        missing: images that were left out.
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
        """End the processes that read for it."""
        self._parts.close()

    def _streamed(self, split: StreamedSplit, ring: Ring | None) -> Generator[tuple[Split, Tensor], None, None]:
        batches = [batch.cpu() for batch in self._batches]
        most = max(map(len, batches), default=0)
        if most == 0:  # a process may have no share of any batch
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
                    ring.filled[place].synchronize()  # a copy that began before the step did
                if number + ahead < len(batches):
                    decoders.put(slot, batches[number + ahead].tolist())

    def _get(self, decoders: Decoders, ring: Ring | None, number: int) -> tuple[int, Errors] | None:
        """The next batch, and the time from when there was nothing more to compute: a GPU may still be at the step before."""
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
