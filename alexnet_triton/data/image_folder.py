"""Own images, in torchvision's ``ImageFolder`` layout: a folder for each class, within ``train`` and one of :data:`TESTS`.

Where they fit the device's memory (150,528 bytes an image of 3 x 224 x 224, 7.5 GB for 50,000), the files are decoded once, by
several processes, to squares of uint8 that stay there: an epoch decodes nothing, and its data kernel is that of Fashion-MNIST.
Larger sets are streamed (:mod:`.stream`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .dataset import DataError, Dataset, Split, expand
from .fashion_mnist import CLASSES, check_folder, holds_idx, load_fashion_mnist
from .hub import find_saved_dataset, is_saved_dataset
from .image_files import Listed, is_image, list_folder, walk
from .image_workers import default_workers
from .reading import Note, Reader, some
from .shards import BUFFER, find_shards, is_shards
from .sources import Arrays, Files
from .splits import TESTS, TRAIN, Parts, open_sources, open_test
from .stream import AnySplit, StreamedSplit

_CPU = torch.device("cpu")


def _parts(data: str | Path | None, buffer: int) -> Parts | None:
    """What there is of tar shards or of a saved data set; None: ``data`` is neither."""
    if is_shards(data):
        return find_shards(str(data), buffer)
    return find_saved_dataset(str(data)) if is_saved_dataset(data) else None


def is_own(data: str | Path | None, validation: float | None = None) -> bool:
    """Whether ``data`` holds images of one's own, in whatever form, and not Fashion-MNIST."""
    return is_shards(data) or is_saved_dataset(data) or is_image_folder(data, validation)


def is_image_folder(data: str | Path | None, validation: float | None = None) -> bool:
    """Whether ``data`` (as for :func:`load_data`) is a folder of images, not one of Fashion-MNIST's files.

    Raises:
        DataError: ``data`` begins with the home of a user that there is not.
    """
    if data is None or str(data) == "sample":
        return False
    folder = expand(data)
    known = any((folder / name).is_dir() for name in (TRAIN, *TESTS)) or (validation is not None and folder.is_dir())
    return known and not holds_idx(folder)


def default_channels(data: str | Path | None, validation: float | None = None) -> int:
    """Of the images of ``data``, where nobody says how many: 1 for Fashion-MNIST, 3 for one's own images."""
    return 3 if is_own(data, validation) else 1


def lacks_test(data: str | Path | None) -> bool:
    """Whether ``data`` is there and can be images of which none are for the test: ``validation`` divides it."""
    if (parts := _parts(data, BUFFER)) is not None:
        return parts.test is None
    return data is not None and is_image_folder(data, 0.5) and _test_folder(expand(data)) is None


def _check_fashion_mnist(data: str | Path | None, validation: float | None) -> None:
    """That ``data``, no folder of images, is there and holds Fashion-MNIST, which ``validation`` does not divide.

    Raises:
        DataError: it does not, or there is a ``validation``.
    """
    if data is not None and str(data) != "sample":
        check_folder(expand(data))
    if validation is not None:
        raise DataError(f"{data or 'data'}: Fashion-MNIST has test images of its own: leave out --validation")


def _check_links(data: Path, folder: Path, walked: Sequence[Listed]) -> None:
    """That what is in ``folder``, one of ``data``'s, is in ``data``; ``walked``: all below it.

    Else a data set from elsewhere could show any file of this machine. Nor may a link lead to a folder: one that leads to its
    own would be read again and again.

    Raises:
        DataError: a link that leads out of ``data``, to a folder, or nowhere.
    """
    root = os.path.realpath(data)
    links = [folder] if folder.is_symlink() else []
    links += [Path(listed.path, name) for listed in walked for name in listed.links]
    for link in links:
        target = Path(os.path.realpath(link))
        if not target.is_relative_to(root):
            raise DataError(f"{link}: a link that leads out of {data}, to {target}: nothing outside of it is read")
        if link != folder and not target.is_file():
            raise DataError(f"{link}: a link to {'a folder' if target.is_dir() else 'no file'}, {target}")


@dataclasses.dataclass(frozen=True)
class _Listing:
    """The image files of ``folder``, sorted by class and name; the label of each is its class's place in ``classes``.

    ``names`` are paths below ``folder``.
    """

    folder: Path
    classes: tuple[str, ...]
    names: list[str]
    labels: list[int]

    def subset(self, keep: Sequence[int]) -> _Listing:
        return dataclasses.replace(self, names=[self.names[i] for i in keep], labels=[self.labels[i] for i in keep])

    def source(self) -> Files:
        """The images, to be read."""
        return Files(self.folder, self.names, torch.tensor(self.labels))

    def halves(self, validation: float, seed: int) -> tuple[_Listing, _Listing]:
        """Of each class the part ``validation`` by itself, one image at least, and the rest before it.

        Which ones is decided by a hash of seed and name: the same on every machine, and another file changes little.
        """
        held: set[int] = set()
        for label, images in itertools.groupby(range(len(self.labels)), key=self.labels.__getitem__):
            own = list(images)
            if len(own) == 1:
                path = self.folder / self.classes[label]
                raise DataError(f"{path}: holds one image: --validation needs two or more of each class")
            count = min(max(1, round(len(own) * validation)), len(own) - 1)
            held |= set(sorted(own, key=lambda i: self._hash(self.names[i], seed))[:count])
        rest = [i for i in range(len(self.names)) if i not in held]
        return self.subset(rest), self.subset(sorted(held))

    def _hash(self, name: str, seed: int) -> bytes:
        return hashlib.sha256(b"%d/%s" % (seed, os.fsencode(name))).digest()


def _list_images(data: Path, folder: Path, classes: Sequence[str] | None, note: Note) -> _Listing:
    """The images of ``data``'s ``folder`` of class folders, whose sorted names are the classes unless ``classes`` are given."""
    top, *below = walk(folder)
    _check_links(data, folder, (top, *below))
    if not top.folders:
        raise DataError(f"{folder}: no folder of a class in it")
    names = tuple(top.folders if classes is None else classes)
    if unknown := [name for name in top.folders if name not in names]:
        raise DataError(f"{folder / unknown[0]}: not one of the classes that are trained on: {some(names)}")
    # The folders of each class, each with the part of its path that its files' names begin with.
    parts: dict[str, list[tuple[str, Listed]]] = {name: [] for name in top.folders}
    for listed in below:
        prefix = os.path.relpath(listed.path, folder) + "/"
        parts[prefix[: prefix.index("/")]].append((prefix, listed))
    images: list[str] = []
    labels: list[int] = []
    passed_over = list(top.files)
    for name in top.folders:
        own = [prefix + file for prefix, listed in parts[name] for file in listed.files]
        found = list(filter(is_image, own))
        others = [path for path in own if not is_image(path)] if len(found) < len(own) else []
        if not found:
            only = f", only {some([os.path.basename(path) for path in others])}" if others else ""
            raise DataError(f"{folder / name}: no image in it{only}")
        images += found
        labels += [names.index(name)] * len(found)
        passed_over += others
    if passed_over:
        files = "1 file that is no image" if len(passed_over) == 1 else f"{len(passed_over)} files that are no images"
        note(f"{folder}: passed over {files} of a class: {some(passed_over)}")
    return _Listing(folder, names, images, labels)


def _test_folder(folder: Path) -> Path | None:
    return next((folder / name for name in TESTS if (folder / name).is_dir()), None)


def _list_test(folder: Path, classes: Sequence[str] | None, note: Note) -> _Listing:
    test = _test_folder(folder)
    if test is None:
        names = f"{', '.join(TESTS[:-1])} or {TESTS[-1]}"
        raise DataError(f"{folder}: no folder {names} in it; --validation 0.2 takes a fifth of the training images")
    return _list_images(folder, test, classes, note)


def _list_training(data: Path, folder: Path, classes: Sequence[str] | None, note: Note) -> _Listing:
    listing = _list_images(data, folder, classes, note)
    if len(listing.classes) < 2:
        raise DataError(f"{folder}: holds one class only, {listing.classes[0]}: there must be two or more to tell apart")
    return listing


def _holds_classes(train: Path) -> bool:
    """Whether ``train`` is the folder of the training images, not that of a class of this name or none.

    Raises:
        DataError: it holds images as a class does, and folders too.
    """
    if not train.is_dir():
        return False
    listed = list_folder(str(train))
    images = list(filter(is_image, listed.files))
    if listed.folders and images:
        raise DataError(
            f"{train}: holds folders, as training images do, and images, such as {images[0]}, as a class does: move these "
            f"away, or, if {train.name} is a class, give its folder another name"
        )
    return not images


def _list_halves(
    folder: Path, classes: Sequence[str] | None, validation: float, seed: int, note: Note
) -> tuple[_Listing, _Listing]:
    """Images to train on and to test with, where there are none for the test: :meth:`_Listing.halves` of one folder's."""
    if not 0 < validation < 1:
        raise DataError(f"validation must be between 0 and 1, got {validation}")
    if (test := _test_folder(folder)) is not None:
        raise DataError(
            f"{test}: the test images are there already: leave out --validation; if {test.name} is a class, give its folder "
            "another name"
        )
    whole = folder / TRAIN if _holds_classes(folder / TRAIN) else folder
    return _list_training(folder, whole, classes, note).halves(validation, seed)


def _say_nothing(line: str) -> None:
    pass


def load_data(
    data: str | Path | None,
    *,
    size: int,
    channels: int,
    limit: int | None = None,
    workers: int | None = None,
    device: torch.device = _CPU,
    validation: float | None = None,
    seed: int = 0,
    skip_damaged: bool = False,
    stream: bool | None = None,
    buffer: int = BUFFER,
    on_note: Note = _say_nothing,
) -> Dataset[Any]:
    """What to train on: images of one's own, or Fashion-MNIST.

    Args:
        data: a folder of ``train`` and ``test`` (or the next of :data:`TESTS`), each of a folder for every class with its
            images, and no links out of it; tar shards (:func:`.shards.find_shards`); a saved data set
            (:func:`.hub.find_saved_dataset`); anything else as in :func:`.fashion_mnist.load_fashion_mnist`. An image is what
            has the suffix of a format that :func:`.image_files.read_image` reads; hidden files and folders are no part of it.
        size: side of a folder's images. Fashion-MNIST's are 28 x 28.
        channels: 1 or 3; Fashion-MNIST has one.
        limit: take so many images of each split at most, spread evenly over the sorted files, so that every class has its
            share; of Fashion-MNIST the first ones.
        workers: processes that decode; 0 decodes in this one; None: :func:`.image_workers.default_workers`.
        device: where the images go, some at a time.
        validation: part of each class's images, between 0 and 1, that are the test images. Then ``data`` has none itself: it
            holds ``train`` alone, or the folders of the classes themselves.
        seed: which images ``validation`` takes. The same ones in every run, and nearly so if files are added.
        skip_damaged: leave out what cannot be read: :attr:`.dataset.Dataset.skipped`; of streamed images see
            :class:`.stream.StreamedSplit`.
        stream: whether images are read while one trains, not all before; None: where they do not fit ``device``.
        buffer: of tar shards, among how many images that follow each other an epoch's order is drawn.
        on_note: is called with a line about files that were passed over since they are no images, and one about skipped ones.

    Returns:
        Images in the order of the sorted names of classes and files, whatever ``workers`` is.

    Raises:
        DataError: nothing found, a broken file, a class without images or with damaged ones only, fewer than two classes, a
            test image of a class without training images, a class of one image for ``validation``, more than ``device``
            holds, a process that dies while it decodes.
    """
    reader = Reader(size, channels, limit, workers, device, skip_damaged, stream, on_note)
    if (parts := _parts(data, buffer)) is not None:
        found = open_sources(parts, validation, seed)
        train, test = (reader.read(source, found.classes, str(found.folder)) for source in (found.train, found.test))
        return Dataset(train, test, found.folder, found.classes, found.name, tuple(reader.skipped))
    if not is_image_folder(data, validation):
        _check_fashion_mnist(data, validation)
        if channels != 1:
            raise DataError(f"Fashion-MNIST's images have one channel, not {channels}")
        whole = load_fashion_mnist(data)
        splits = (split.limited(limit) for split in (whole.train, whole.test))
        train, test = (_fashion_mnist(split, whole.source, stream, workers) for split in splits)
        return Dataset(train, test, whole.source, whole.classes, whole.name)
    folder = expand(str(data))
    # All is listed before anything is decoded, which can take minutes.
    if validation is not None:
        training, tests = _list_halves(folder, None, validation, seed, on_note)
    elif (folder / TRAIN).is_dir():
        training = _list_training(folder, folder / TRAIN, None, on_note)
        tests = _list_test(folder, training.classes, on_note)
    else:
        raise DataError(f"{folder}: no folder {TRAIN} in it")
    train, test = (reader.read(part.source(), part.classes, str(part.folder)) for part in (training, tests))
    return Dataset(train, test, folder, training.classes, folder.resolve().name, tuple(reader.skipped))


def _fashion_mnist(split: Split, folder: Path, stream: bool | None, workers: int | None) -> AnySplit:
    """A split of Fashion-MNIST, which fits any memory; streamed if that is asked for."""
    if not stream:
        return split
    count = default_workers() if workers is None else workers
    return StreamedSplit(Arrays(folder, split.images, split.labels), split.size, split.channels, count)


def load_test(
    data: str | Path | None,
    *,
    classes: Sequence[str],
    size: int,
    channels: int,
    limit: int | None = None,
    workers: int | None = None,
    device: torch.device = _CPU,
    validation: float | None = None,
    seed: int = 0,
    skip_damaged: bool = False,
    stream: bool | None = None,
    buffer: int = BUFFER,
    on_note: Note = _say_nothing,
) -> AnySplit:
    """The test images of ``data`` for a network that tells ``classes`` apart; the other arguments are :func:`load_data`'s.

    Raises:
        DataError: as :func:`load_data`, and where the images are not of these classes.
    """
    reader = Reader(size, channels, limit, workers, device, skip_damaged, stream, on_note)
    if (parts := _parts(data, buffer)) is not None:
        return reader.read(open_test(parts, tuple(classes), validation, seed), classes, str(parts.folder))
    if is_image_folder(data, validation):
        folder = expand(str(data))
        if validation is None:
            listing = _list_test(folder, classes, on_note)
        else:
            _, listing = _list_halves(folder, classes, validation, seed, on_note)
        return reader.read(listing.source(), classes, str(listing.folder))
    _check_fashion_mnist(data, validation)
    if tuple(classes) != CLASSES:
        raise DataError(
            f"the network tells {some(classes)} apart, not the classes of Fashion-MNIST: give --data its own images"
        )
    found = load_fashion_mnist(data)
    return _fashion_mnist(found.test.limited(limit), found.source, stream, workers)
