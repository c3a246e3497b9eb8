"""What a data set is: images and labels, on the host or on a device."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor


class DataError(ValueError):
    """A data set that is missing or broken; the message names the file or folder and what is wrong with it."""


def expand(data: str | Path) -> Path:
    """``data`` with its ``~`` or ``~user`` replaced by that home.

    Raises:
        DataError: there is no such user, or this one has no home.
    """
    try:
        return Path(data).expanduser()
    except RuntimeError as error:
        raise DataError(f"{data}: cannot be found: {str(error).rstrip('.')}") from error


@dataclasses.dataclass(frozen=True)
class Split:
    """Images as uint8, (N, H, W) of one channel or (N, 3, H, W) of three, and their labels as int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Of an image: 1 or 3."""
        return 1 if self.images.ndim == 3 else self.images.shape[1]

    @property
    def size(self) -> int:
        """Side of an image."""
        return self.images.shape[-1]

    def limited(self, limit: int | None) -> Split:
        """The first ``limit`` images, or all."""
        return self if limit is None else Split(self.images[:limit], self.labels[:limit])

    def to(self, device: torch.device) -> Split:
        """On ``device``; itself if it is there."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Both splits, the folder they were read from, the names of the labels in their order, and what to call it all.

    ``skipped`` are the damaged images that were left out, each with what is wrong with it.
    """

    train: Split
    test: Split
    source: Path
    classes: tuple[str, ...]
    name: str
    skipped: tuple[tuple[Path, str], ...] = ()
