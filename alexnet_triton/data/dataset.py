"""Data sets: images and labels, on the host or on a device."""

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
    """A data set is missing or broken; the message names the file or folder and the reason."""


def expand(data: str | Path) -> Path:
    """``data`` with a leading ``~`` or ``~user`` replaced by the home folder.

    Raises:
        DataError: there is no such user, or the current user has no home.
    """
    try:
        return Path(data).expanduser()
    except RuntimeError as error:
        raise DataError(f"{data}: cannot be found: {str(error).rstrip('.')}") from error


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel: a pixel in [0, 1] becomes ``(pixel - mean) / std``.

    Raises:
        ValueError: there are not 1 or 3 channels, a number is not finite, or a ``std`` is not above 0.
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
        """The normalization by which the pixels of all images have mean 0 and standard deviation 1 in each channel.

        It is computed from exact counts of the 256 pixel values. A channel whose pixels are all equal has ``std`` 1.

        Args:
            parts: the images, as in a :class:`Split`, a few thousand at a time: bincount makes an int64 of each pixel.
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
        images: uint8, (N, H, W) for one channel or (N, 3, H, W) for three.
        labels: int64 (N,).
        normalization: how images are normalized for the network; None: pixels in [0, 1].
        order: function that draws the order of an epoch, int64 (N,), from a generator, on its device; None:
            :func:`torch.randperm`.
    """

    images: Tensor
    labels: Tensor
    normalization: Normalization | None = None
    order: Callable[[torch.Generator], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Channels of an image: 1 or 3."""
        return 1 if self.images.ndim == 3 else self.images.shape[1]

    @property
    def size(self) -> int:
        """Side of an image."""
        return self.images.shape[-1]

    def limited(self, limit: int | None) -> Split:
        """A split of the first ``limit`` images; None: of all."""
        if limit is None:
            return self
        return dataclasses.replace(self, images=self.images[:limit], labels=self.labels[:limit], order=None)

    def parts(self) -> Iterator[Tensor]:
        """All images, 4,096 at a time."""
        return iter(self.images.split(4096))

    def image(self, index: int) -> Tensor:
        """Image ``index`` on the CPU."""
        return self.images[index].cpu()

    def to(self, device: torch.device) -> Split:
        """The split on ``device``. Tensors that are there already are not copied."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclasses.dataclass(frozen=True)
class Dataset(Generic[AnySplitT]):
    """A data set of a training and a test split.

    Attributes:
        train, test: the splits.
        source: folder from which the data set was read.
        classes: class names in the order of the labels.
        name: name of the data set, for display.
        skipped: damaged images that were left out, each with the reason.
    """

    train: AnySplitT
    test: AnySplitT
    source: Path
    classes: tuple[str, ...]
    name: str
    skipped: tuple[tuple[Path, str], ...] = ()

    def normalized(self, by: Normalization | None = None) -> Dataset[AnySplitT]:
        """The data set with the normalization ``by``; None: with that of the training images, for which all are read."""
        by = by or Normalization.of(self.train.parts())
        train, test = (dataclasses.replace(split, normalization=by) for split in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test)
