"""What a data set is: images and labels, on the host or on a device."""

from __future__ import annotations

import dataclasses
import math
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
class Normalization:
    """What is subtracted from pixels in [0, 1], and what they are divided by then: a number a channel each.

    Raises:
        ValueError: not 1 or 3 channels, a number that is not finite, a ``std`` that is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        channels = (len(self.mean), len(self.std))
        if channels not in ((1, 1), (3, 3)):
            raise ValueError(f"a normalization has 1 or 3 means and as many standard deviations, got {channels}")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError(f"means must be finite and standard deviations finite and above 0, got {self}")

    @classmethod
    def of(cls, images: Tensor) -> Normalization:
        """That by which the pixels of ``images``, as in a :class:`Split`, have mean 0 and standard deviation 1 in each channel.

        Computed exactly, from how often each of the 256 values occurs. Where all pixels are equal nothing is divided.
        """
        channels = images.unsqueeze(1) if images.ndim == 3 else images
        values = torch.arange(256, dtype=torch.float64, device=images.device) / 255
        means, stds = [], []
        for channel in channels.unbind(1):
            counts = torch.zeros(256, dtype=torch.int64, device=images.device)
            for few in channel.split(4096):  # bincount makes an int64 of each pixel
                counts += torch.bincount(few.flatten(), minlength=256)
            weights = counts.double() / counts.sum()
            mean = (weights * values).sum()
            std = (weights * (values - mean) ** 2).sum().sqrt().item()
            means.append(mean.item())
            stds.append(std or 1.0)
        return cls(tuple(means), tuple(stds))


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and their labels.

    Attributes:
        images: uint8, (N, H, W) of one channel or (N, 3, H, W) of three.
        labels: int64 (N,).
        normalization: what a network sees of the images; None: pixels in [0, 1].
    """

    images: Tensor
    labels: Tensor
    normalization: Normalization | None = None

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
        return self if limit is None else dataclasses.replace(self, images=self.images[:limit], labels=self.labels[:limit])

    def to(self, device: torch.device) -> Split:
        """On ``device``; itself if it is there."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))


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

    def normalized(self) -> Dataset:
        """With the :meth:`Normalization.of` the training images for both splits."""
        by = Normalization.of(self.train.images)
        train, test = (dataclasses.replace(split, normalization=by) for split in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test)
