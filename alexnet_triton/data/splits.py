"""Training and test images of tar shards and saved data sets: opening the sources, holding out a part, naming the classes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .dataset import DataError
from .sources import Source

#: Name of the training images, and names of the test images, of which the first that exists is used.
TRAIN, TESTS = "train", ("test", "val", "valid", "validation")


class Keyed(Source, Protocol):
    """A source whose images have stable keys, which do not change when images are added, and which may name its classes.

    Attributes:
        classes: class names in the order of the labels; None: there are no names.
    """

    classes: tuple[str, ...] | None

    def key(self, index: int) -> str:
        """The key of image ``index``."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a data set that can be opened.

    Attributes:
        folder: folder of the data set, which gives its name, also in messages.
        how_to_name: advice in a message on how to name the classes.
        train, test: function that opens the source; None: there are no such images.
    """

    folder: Path
    how_to_name: str
    train: Callable[[], Keyed] | None
    test: Callable[[], Keyed] | None


class Sources(NamedTuple):
    """Training and test images, class names in the order of the labels, the folder and the name of the data set."""

    train: Source
    test: Source
    classes: tuple[str, ...]
    folder: Path
    name: str


def _check_labels(source: Source, count: int) -> None:
    """Check that all labels of ``source`` are from 0 to ``count - 1``.

    Raises:
        DataError: a label is not.
    """
    wrong = ((source.labels < 0) | (source.labels >= count)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise DataError(f"{source.name(first)}: its label is {int(source.labels[first])}: there are {count} classes, from 0 on")


def _name_classes(source: Keyed, parts: Parts) -> tuple[str, ...]:
    """Class names of the training images ``source``; if it has no names, the numbers from 0 to the largest label.

    Raises:
        DataError: there are fewer than two classes, a label is out of range, or, without names, a number below the largest
            label has no image.
    """
    found = source.labels.unique()
    count = len(found) if source.classes is None else len(source.classes)
    if source.classes is None and found[0] >= 0 and found[-1] >= count:
        missing = int((found != torch.arange(count)).nonzero()[0])
        raise DataError(
            f"{parts.folder}: no training image of class {missing}, but one of class {int(found[-1])}: {parts.how_to_name}"
        )
    _check_labels(source, count)
    if count < 2:
        raise DataError(f"{parts.folder}: holds one class only: there must be two or more to tell apart")
    return source.classes or tuple(map(str, range(count)))


def _check_classes(source: Keyed, classes: tuple[str, ...], folder: Path) -> None:
    """Check that the class names and labels of ``source`` are those of ``classes``.

    Raises:
        DataError: they are not.
    """
    if source.classes not in (None, classes):
        few = ", ".join(classes[:10]) + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
        raise DataError(f"{folder}: its test images are not of the classes that are trained on: {few}")
    _check_labels(source, len(classes))


def hold_out(source: Keyed, part: float, seed: int, folder: Path) -> tuple[Tensor, Tensor]:
    """Hold out the fraction ``part`` of each class for the test: at least one image, and not all.

    A hash of seed and key decides. So the choice is the same on every machine, and additional images change it little.

    Args:
        source: images with labels from 0 on.
        part: the fraction, between 0 and 1.
        seed: seed of the choice.
        folder: folder named in messages.

    Returns:
        (training images, test images): int64 image numbers, ascending.

    Raises:
        DataError: ``part`` is not between 0 and 1, or a class has only one image.
    """
    if not 0 < part < 1:
        raise DataError(f"validation must be between 0 and 1, got {part}")
    labels = source.labels.numpy()
    keys = (os.fsencode(source.key(i)) for i in range(len(source)))
    hashes = np.array([hashlib.sha256(b"%d/%s" % (seed, key)).digest() for key in keys])
    counts = np.bincount(labels)
    if (counts == 1).any():
        only = int((labels == counts.tolist().index(1)).nonzero()[0][0])
        raise DataError(
            f"{folder}: one image of class {labels[only]}, {source.name(only)}: --validation needs two or more of each class"
        )
    held = np.clip(np.rint(counts * part), 1, np.maximum(counts - 1, 1))
    order = np.lexsort((hashes, labels))
    place = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]  # position of an image within its class
    is_held = np.empty(len(labels), dtype=bool)
    is_held[order] = place < held[labels[order]]
    return torch.from_numpy(np.flatnonzero(~is_held)), torch.from_numpy(np.flatnonzero(is_held))


def _open(parts: Parts, validation: float | None, *, train: bool) -> Keyed:
    """Open the training images (``train``), or the source of the test images: with ``validation`` they are held out of it.

    Raises:
        DataError: the images do not exist, or ``validation`` is given although there are test images.
    """
    if parts.train is None and (train or validation is not None):
        raise DataError(f"{parts.folder}: no training images in it")
    if parts.test is None and validation is None:
        raise DataError(f"{parts.folder}: no test images in it; --validation 0.2 takes a fifth of the training images")
    if parts.test is not None and validation is not None:
        raise DataError(f"{parts.folder}: the test images are there already: leave out --validation")
    opener = parts.train if train or validation is not None else parts.test
    assert opener is not None
    return opener()


def open_sources(parts: Parts, validation: float | None = None, seed: int = 0) -> Sources:
    """Open the training and test images of ``parts``. ``validation`` and ``seed`` are as for :func:`.image_folder.load_data`.

    Raises:
        DataError: images do not exist or cannot be listed; a label is out of range; there are fewer than two classes;
            ``validation`` is given although there are test images, or a class has only one image for it.
    """
    whole = _open(parts, validation, train=True)
    classes = _name_classes(whole, parts)
    train: Source = whole
    if validation is None:
        test = open_test(parts, classes)
    else:
        rest, held = hold_out(whole, validation, seed, parts.folder)
        train, test = whole.subset(rest), whole.subset(held)
    return Sources(train, test, classes, parts.folder, parts.folder.resolve().name)


def open_test(parts: Parts, classes: tuple[str, ...], validation: float | None = None, seed: int = 0) -> Source:
    """Open only the test images of ``parts``, for a network with ``classes``.

    Raises:
        DataError: as for :func:`open_sources`, or the images are of other classes.
    """
    found = _open(parts, validation, train=False)
    _check_classes(found, classes, parts.folder)
    return found if validation is None else found.subset(hold_out(found, validation, seed, parts.folder)[1])
