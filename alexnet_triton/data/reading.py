"""How a source's images are read: all at once into a device's memory, or streamed."""

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

#: Is told what was left out, a line at a time.
Note = Callable[[str], object]

#: Images that are copied to a device at a time.
_AT_A_TIME = 64

#: Of the memory that is free, what the images of a set may take.
_PART = 0.7


def some(names: Sequence[object], separator: str = ", ") -> str:
    """Ten of ``names``, and how many more there are."""
    return separator.join(map(str, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _free_bytes(device: torch.device) -> int:
    """What a set may take of the memory that ``device`` has free: a network and its step need some, too."""
    if device.type == "cuda":
        return int(_PART * torch.cuda.mem_get_info(device)[0])
    # Of several processes of a machine each has a part: all read at the same time.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert available is not None  # Linux has it since 3.14
    return int(_PART * 1024 * int(available[1])) // processes


@dataclasses.dataclass(frozen=True)
class Reader:
    """How sources are read.

    Attributes:
        size: side of the images.
        channels: 1 or 3.
        limit: at most so many images of a source, spread evenly, so that every class has its share; None: all.
        workers: processes that decode; None: :func:`.image_workers.default_workers`.
        device: where images go that are held in memory.
        skip_damaged: leave out what cannot be read, if in memory; if streamed, see :class:`.stream.StreamedSplit`.
        stream: whether sources are streamed; None: those that do not fit the memory that ``device`` has free, which is said.
        note: is called with a line about what was skipped or is streamed.
        skipped: what was left out so far.
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
        """The images of ``source`` in its order, whatever ``workers`` is; ``what`` is how messages call it.

        Raises:
            DataError: an image cannot be read, or all of a class; more than the device holds; a process that dies.
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
        except RuntimeError as error:  # of which torch.OutOfMemoryError is one
            raise DataError(f"{size}, more than {self.device} has free: --stream, or take fewer with --limit") from error
        return self._held(source, classes, what, images, workers)

    def _held(self, source: Source, classes: Sequence[str], what: str, images: Tensor, workers: int) -> Split:
        """All of ``source``, in ``images``."""
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
