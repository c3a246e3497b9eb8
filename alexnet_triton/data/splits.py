"""Training and test images of sources that are opened one by one: which are for the test, and what the classes are called."""

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

#: What the training images are called, and the test images: the first of these that is there.
TRAIN, TESTS = "train", ("test", "val", "valid", "validation")


class Keyed(Source, Protocol):
    """A source whose images have names that do not change when others are added, and that may name its classes.

    Attributes:
        classes: in the order of the labels; None: nothing names them.
    """

    classes: tuple[str, ...] | None

    def key(self, index: int) -> str:
        """The name of image ``index``."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What there is to open; None for images that there are not.

    Attributes:
        folder: which messages name, and after which the data set is called.
        how_to_name: says in a message where classes get their names.
    """

    folder: Path
    how_to_name: str
    train: Callable[[], Keyed] | None
    test: Callable[[], Keyed] | None


class Sources(NamedTuple):
    """Training and test images, the names of the classes in the order of the labels, the folder and what to call it all."""

    train: Source
    test: Source
    classes: tuple[str, ...]
    folder: Path
    name: str


def _check_labels(source: Source, count: int) -> None:
    """That all labels are of ``count`` classes.

    Raises:
        DataError: one is not.
    """
    wrong = ((source.labels < 0) | (source.labels >= count)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise DataError(f"{source.name(first)}: its label is {int(source.labels[first])}: there are {count} classes, from 0 on")


def _name_classes(source: Keyed, parts: Parts) -> tuple[str, ...]:
    """The classes of the training images ``source``: without names, the numbers from 0 to the largest label.

    Raises:
        DataError: fewer than two classes, a label of none, or, without names, a number below the largest that no image has.
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
    """That the images of ``source`` are of ``classes``.

    Raises:
        DataError: they are of others.
    """
    if source.classes not in (None, classes):
        few = ", ".join(classes[:10]) + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
        raise DataError(f"{folder}: its test images are not of the classes that are trained on: {few}")
    _check_labels(source, len(classes))


def hold_out(source: Keyed, part: float, seed: int, folder: Path) -> tuple[Tensor, Tensor]:
    """Of each class the images to train on, and the part ``part`` that is for the test: one image at least, and not all.

    Which ones is decided by a hash of seed and key: the same on every machine, and another image changes little.

    Args:
        source: whose labels are from 0 on.
        folder: which messages name.

    Returns:
        int64 numbers of images, in their order.

    Raises:
        DataError: a ``part`` that is not between 0 and 1; a class of one image.
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
    place = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]  # of an image among those of its class
    is_held = np.empty(len(labels), dtype=bool)
    is_held[order] = place < held[labels[order]]
    return torch.from_numpy(np.flatnonzero(~is_held)), torch.from_numpy(np.flatnonzero(is_held))


def _open(parts: Parts, validation: float | None, *, train: bool) -> Keyed:
    """The training images, or else what the test images are or are held out of."""
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
    """The training and test images of ``parts``; ``validation`` and ``seed`` are those of :func:`.image_folder.load_data`.

    Raises:
        DataError: images that are not there or cannot be listed; labels of no class; fewer than two classes; a ``validation``
            where there are test images, or where a class has one image.
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
    """The test images alone, for a network that tells ``classes`` apart.

    Raises:
        DataError: as :func:`open_sources`, and where the images are not of these classes.
    """
    found = _open(parts, validation, train=False)
    _check_classes(found, classes, parts.folder)
    return found if validation is None else found.subset(hold_out(found, validation, seed, parts.folder)[1])
