"""Reading a source's images: all into the memory of a device, or as a stream."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .dataset import DataError, Split
from .image_workers import decode, default_workers, image_shape
from .sources import Source
from .stream import AnySplit, StreamedSplit

#: Function that is called with one line of text for the user.
Note = Callable[[str], object]

#: Number of images that are copied to a device at a time.
_AT_A_TIME = 64

#: The fraction of the free memory that the images of a set may take.
_PART = 0.7


def some(names: Sequence[object], separator: str = ", ") -> str:
    """The first ten of ``names``, and the number of the others, for a message."""
    return separator.join(map(str, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _free_bytes(device: torch.device) -> int:
    """Bytes of the free memory of ``device`` that a set may take. The network and its steps need the rest."""
    if device.type == "cuda":
        return int(_PART * torch.cuda.mem_get_info(device)[0])
    # Processes of one machine share its memory: all of them read at the same time.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert available is not None  # Linux has MemAvailable since 3.14
    return int(_PART * 1024 * int(available[1])) // processes


@dataclasses.dataclass(frozen=True)
class Reader:
    """Settings for reading sources, and the damaged images met so far.

    Attributes:
        size: side of the images.
        channels: 1 or 3.
        limit: the most images of a source, spread evenly, so that every class has its share; None: all.
        workers: number of processes that decode; None: :func:`.image_workers.default_workers`.
        device: device for images that are kept in memory.
        skip_damaged: leave out unreadable images that would be kept in memory. For a stream see :class:`.stream.StreamedSplit`.
        stream: whether to stream sources; None: stream those that do not fit the free memory of ``device``, and say so.
        note: function that is called with a line about skipped images or streaming.
        skipped: the images left out so far, each with the reason.
    """

    size: int
    channels: int
    limit: int | None
    workers: int | None
    device: torch.device
    skip_damaged: bool
    stream: bool | None
    note: Note
    skipped: list[tuple[Path, str]] = dataclasses.field(default_factory=list)

    def read(self, source: Source, classes: Sequence[str], what: str) -> AnySplit:
        """Read or stream the images of ``source``, in its order, whatever ``workers`` is.

        Args:
            source: the images.
            classes: class names in the order of the labels.
            what: name of the source in messages.

        Raises:
            DataError: an image cannot be read, all images of a class are damaged, the device has not enough memory, or a worker
                process dies.
        """
        if self.limit is not None and self.limit < len(source):
            source = source.subset(torch.arange(self.limit) * len(source) // self.limit)
        needed = len(source) * self.channels * self.size**2
        size = f"{what}: {len(source)} images of {self.channels} x {self.size} x {self.size} take {needed / 1e9:.1f} GB"
        streamed = self.stream
        if streamed is None:
            free = _free_bytes(self.device)
            streamed = needed > free
            if streamed:
                self.note(f"{size}, {self.device} has {free / 1e9:.1f} GB for them: they are streamed (--no-stream forbids it)")
        workers = default_workers() if self.workers is None else self.workers
        if streamed:
            return StreamedSplit(source, self.size, self.channels, workers, skip_damaged=self.skip_damaged)
        shape = (len(source), *image_shape(self.channels, self.size))
        try:
            images = torch.empty(shape, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:  # torch.OutOfMemoryError is a subclass
            raise DataError(f"{size}, more than {self.device} has free: use --stream, or take fewer with --limit") from error
        return self._held(source, classes, what, images, workers)

    def _held(self, source: Source, classes: Sequence[str], what: str, images: Tensor, workers: int) -> Split:
        """Decode all of ``source`` into ``images`` and return them as a split, without skipped ones."""
        batches = torch.arange(len(source)).split(_AT_A_TIME)
        kept: list[Tensor] = []
        good = 0
        skipped: list[tuple[Path, str]] = []
        numbers = [batch.tolist() for batch in batches]
        with contextlib.closing(decode(source, numbers, self.channels, self.size, workers)) as decoded:
            for batch, (pixels, errors) in zip(batches, decoded, strict=True):
                if errors and not self.skip_damaged:
                    raise errors[min(errors)]
                if errors:
                    for place in sorted(errors):
                        name = source.name(int(batch[place]))
                        skipped.append((name, str(errors[place]).removeprefix(f"{name}: ")))
                    keep = [place for place in range(len(batch)) if place not in errors]
                    pixels, batch = pixels[keep], batch[keep]
                images[good : good + len(batch)].copy_(pixels)
                good += len(batch)
                kept.append(batch)
        labels = source.labels[torch.cat(kept)] if kept else source.labels[:0]
        if skipped:
            empty = set(source.labels.tolist()) - set(labels.tolist())
            if empty:
                name, reason = self._first_of(source, min(empty), dict(skipped))
                raise DataError(f"{what}: all images of class {classes[min(empty)]} are damaged: {name}: {reason}")
            self.skipped.extend(skipped)
            damaged = "1 damaged image" if len(skipped) == 1 else f"{len(skipped)} damaged images"
            reasons = [f"{str(name).removeprefix(f'{what}/')} ({reason})" for name, reason in skipped]
            self.note(f"{what}: skipped {damaged}: {some(reasons, '; ')}")
            source = source.subset(torch.cat(kept))
        return Split(images[:good], labels.to(self.device), order=source.order)

    @staticmethod
    def _first_of(source: Source, label: int, skipped: dict[Path, str]) -> tuple[Path, str]:
        index = (source.labels == label).nonzero()[0].item()
        name = source.name(int(index))
        return name, skipped[name]
