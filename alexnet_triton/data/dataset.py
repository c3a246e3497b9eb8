"""What a data set is: images and labels, on the host or on a device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .stream import AnySplit

AnySplitT = TypeVar("AnySplitT", bound="AnySplit")


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
    def of(cls, parts: Iterable[Tensor]) -> Normalization:
        """That by which the pixels of images have mean 0 and standard deviation 1 in each channel.

        Computed exactly, from how often each of the 256 values occurs. Where all pixels are equal nothing is divided.

        Args:
            parts: the images, as in a :class:`Split`, of which bincount makes an int64 a pixel: a few thousand at a time.
        """
        counts: list[Tensor] = []
        for images in parts:
            channels = images.unsqueeze(1) if images.ndim == 3 else images
            found = [torch.bincount(channel.flatten(), minlength=256) for channel in channels.unbind(1)]
            counts = [before + now for before, now in zip(counts, found, strict=True)] if counts else found
        means, stds = [], []
        for count in counts:
            values = torch.arange(256, dtype=torch.float64, device=count.device) / 255
            weights = count.double() / count.sum()
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
        order: draws the order of an epoch, int64 (N,), from a generator, on its device; None: :func:`torch.randperm` does.
    """

    images: Tensor
    labels: Tensor
    normalization: Normalization | None = None
    order: Callable[[torch.Generator], Tensor] | None = None

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
        if limit is None:
            return self
        return dataclasses.replace(self, images=self.images[:limit], labels=self.labels[:limit], order=None)

    def parts(self) -> Iterator[Tensor]:
        """All images, some thousand at a time."""
        return iter(self.images.split(4096))

    def image(self, index: int) -> Tensor:
        """Image ``index`` on the CPU."""
        return self.images[index].cpu()

    def to(self, device: torch.device) -> Split:
        """On ``device``; itself if it is there."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclasses.dataclass(frozen=True)
class Dataset(Generic[AnySplitT]):
    """Both splits, the folder they were read from, the names of the labels in their order, and what to call it all.

    ``skipped`` are the damaged images that were left out, each with what is wrong with it.
    """

    train: AnySplitT
    test: AnySplitT
    source: Path
    classes: tuple[str, ...]
    name: str
    skipped: tuple[tuple[Path, str], ...] = ()

    def normalized(self, by: Normalization | None = None) -> Dataset[AnySplitT]:
        """With ``by`` for both splits; None: with the :meth:`Normalization.of` the training images, which reads all of them."""
        by = by or Normalization.of(self.train.parts())
        train, test = (dataclasses.replace(split, normalization=by) for split in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test)
