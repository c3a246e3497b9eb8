"""Sources of images: each image is read by its number, in this process or in a worker forked from it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .image_files import read_image


class Source(Protocol):
    """Images that are read one by one, and their labels.

    Workers get the source by a fork. Data per image should be in arrays: a list's strings would be copied into every worker
    one by one, when their reference counts change.

    Attributes:
        labels: int64 (N,), on the CPU.
    """

    labels: Tensor

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int, channels: int, size: int) -> Tensor:
        """Read image ``index`` in the form of :func:`.image_files.read_image`.

        Raises:
            DataError: the image cannot be read; the message names it.
        """

    def name(self, index: int) -> Path:
        """The name of image ``index`` in messages."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Draw the order of all images for an epoch from ``generator``: int64 (N,), on its device."""

    def checksum(self) -> int:
        """Checksum of names and labels, without reading images: a run resumes only on the data it began with."""

    def subset(self, keep: Tensor) -> Source:
        """A source of the images ``keep``, int64 (M,), in that order."""


class Names:
    """A sequence of strings stored in one bytes object and one array.

    Args:
        names: strings of any characters that Python's paths can have.
    """

    def __init__(self, names: Sequence[str]) -> None:
        text = os.fsencode("".join(f"{name}\0" for name in names))  # a path has no NUL
        ends = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == 0)
        self._ends = ends - np.arange(len(ends))
        self._text = text.replace(b"\0", b"")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        begin = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._text[begin : int(self._ends[index])])

    def checksum(self, checksum: int = 0) -> int:
        """CRC-32 of all strings, starting from ``checksum``."""
        return zlib.crc32(self._ends.tobytes(), zlib.crc32(self._text, checksum))


class Files:
    """A :class:`Source` of the image files of a folder.

    Args:
        folder: the folder.
        names: paths of the files, relative to ``folder``.
        labels: int64 (N,).
    """

    def __init__(self, folder: Path, names: Sequence[str], labels: Tensor) -> None:
        self.folder, self.labels = folder, labels
        self._names = Names(names)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> Path:
        """As :meth:`Source.name`."""
        return self.folder / self._names[index]

    def read(self, index: int, channels: int, size: int) -> Tensor:
        """As :meth:`Source.read`."""
        return read_image(self.name(index), channels, size)

    def order(self, generator: torch.Generator) -> Tensor:
        """As :meth:`Source.order`: shuffled over the whole set."""
        return torch.randperm(len(self), generator=generator, device=generator.device)

    def checksum(self) -> int:
        """As :meth:`Source.checksum`."""
        return self._names.checksum(zlib.crc32(self.labels.numpy().tobytes()))

    def subset(self, keep: Tensor) -> Files:
        """As :meth:`Source.subset`."""
        return Files(self.folder, [self._names[i] for i in keep.tolist()], self.labels[keep])


class Arrays:
    """A :class:`Source` of decoded images in host memory, such as Fashion-MNIST's.

    Args:
        folder: folder from which the images were read.
        images, labels: as in :class:`.dataset.Split`, on the CPU.
    """

    def __init__(self, folder: Path, images: Tensor, labels: Tensor) -> None:
        self.folder, self.images, self.labels = folder, images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> Path:
        """As :meth:`Source.name`."""
        return self.folder / str(index)

    def read(self, index: int, channels: int, size: int) -> Tensor:
        """As :meth:`Source.read`; ``channels`` and ``size`` are ignored."""
        return self.images[index]

    def order(self, generator: torch.Generator) -> Tensor:
        """As :meth:`Source.order`: shuffled over the whole set."""
        return torch.randperm(len(self), generator=generator, device=generator.device)

    def checksum(self) -> int:
        """As :meth:`Source.checksum`, and of the images too."""
        return zlib.crc32(self.images.numpy().tobytes(), zlib.crc32(self.labels.numpy().tobytes()))

    def subset(self, keep: Tensor) -> Arrays:
        """As :meth:`Source.subset`."""
        return Arrays(self.folder, self.images[keep], self.labels[keep])
