"""Load a user's images in torchvision's ``ImageFolder`` layout: a folder per class, within ``train`` and one of :data:`TESTS`.

If the images fit the device's memory (150,528 bytes for one of 3 x 224 x 224, 7.5 GB for 50,000), several processes decode
them once to uint8 squares that stay on the device. Epochs then decode nothing, and use the same data kernel as Fashion-MNIST.
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
    """The parts of tar shards or of a saved data set; None if ``data`` is neither."""
    if is_shards(data):
        return find_shards(str(data), buffer)
    return find_saved_dataset(str(data)) if is_saved_dataset(data) else None


def is_own(data: str | Path | None, validation: float | None = None) -> bool:
    """Whether ``data`` holds the user's own images (shards, saved data set or image folder) and not Fashion-MNIST."""
    return is_shards(data) or is_saved_dataset(data) or is_image_folder(data, validation)


def is_image_folder(data: str | Path | None, validation: float | None = None) -> bool:
    """Whether ``data`` (as for :func:`load_data`) is a folder of images, not one of Fashion-MNIST's files.

    Raises:
        DataError: ``data`` begins with ``~`` of an unknown user.
    """
    if data is None or str(data) == "sample":
        return False
    folder = expand(data)
    known = any((folder / name).is_dir() for name in (TRAIN, *TESTS)) or (validation is not None and folder.is_dir())
    return known and not holds_idx(folder)


def default_channels(data: str | Path | None, validation: float | None = None) -> int:
    """The default number of channels for ``data``: 1 for Fashion-MNIST, 3 for the user's own images."""
    return 3 if is_own(data, validation) else 1


def lacks_test(data: str | Path | None) -> bool:
    """Whether ``data`` exists and holds images but no test images, so that ``validation`` must divide it."""
    if (parts := _parts(data, BUFFER)) is not None:
        return parts.test is None
    return data is not None and is_image_folder(data, 0.5) and _test_folder(expand(data)) is None


def _check_fashion_mnist(data: str | Path | None, validation: float | None) -> None:
    """Check that ``data``, which is no image folder, holds Fashion-MNIST, and that there is no ``validation``.

    Raises:
        DataError: ``data`` does not hold Fashion-MNIST, or ``validation`` is given.
    """
    if data is not None and str(data) != "sample":
        check_folder(expand(data))
    if validation is not None:
        raise DataError(f"{data or 'data'}: Fashion-MNIST has test images of its own: leave out --validation")


def _check_links(data: Path, folder: Path, walked: Sequence[Listed]) -> None:
    """Check the links in ``folder``, a folder of ``data``, as listed in ``walked``.

    Links must not leave ``data``: else a data set from elsewhere could show any file of this machine. Links must not lead to
    folders: a link to its own folder would be read endlessly.

    Raises:
        DataError: a link leaves ``data``, or leads to a folder or nowhere.
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
    """The image files of ``folder``, sorted by class and name.

    ``names`` are paths relative to ``folder``. ``labels`` are indices into ``classes``.
    """

    folder: Path
    classes: tuple[str, ...]
    names: list[str]
    labels: list[int]

    def subset(self, keep: Sequence[int]) -> _Listing:
        return dataclasses.replace(self, names=[self.names[i] for i in keep], labels=[self.labels[i] for i in keep])

    def source(self) -> Files:
        """The images as a source for a reader."""
        return Files(self.folder, self.names, torch.tensor(self.labels))

    def halves(self, validation: float, seed: int) -> tuple[_Listing, _Listing]:
        """Split off the fraction ``validation`` of each class, at least one image; return (the rest, the images split off).

        A hash of seed and name decides. So the choice is the same on every machine, and additional files change it little.

        Raises:
            DataError: a class has only one image.
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
    """List the images in the class folders of ``folder``, a folder of ``data``.

    The classes are the sorted names of the class folders, unless ``classes`` are given.

    Raises:
        DataError: a link is not allowed, there is no class folder, a class is unknown or has no image, or a folder is
            unreadable.
    """
    top, *below = walk(folder)
    _check_links(data, folder, (top, *below))
    if not top.folders:
        raise DataError(f"{folder}: holds no class folder")
    names = tuple(top.folders if classes is None else classes)
    if unknown := [name for name in top.folders if name not in names]:
        raise DataError(f"{folder / unknown[0]}: not one of the classes that are trained on: {some(names)}")
    # The folders below each class folder, each with its path relative to ``folder``, the prefix of its files' names.
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
        note(f"{folder}: ignored {files} of a class: {some(passed_over)}")
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
    """Whether ``train`` is the folder of the training images: it exists and is not the folder of a class of that name.

    Raises:
        DataError: ``train`` holds images, as a class folder does, and folders too.
    """
    if not train.is_dir():
        return False
    listed = list_folder(str(train))
    images = list(filter(is_image, listed.files))
    if listed.folders and images:
        raise DataError(
            f"{train}: holds folders, like a folder of training images, and images, such as {images[0]}, like the folder of a "
            f"class: move the images away, or, if {train.name} is a class, give its folder another name"
        )
    return not images


def _list_halves(
    folder: Path, classes: Sequence[str] | None, validation: float, seed: int, note: Note
) -> tuple[_Listing, _Listing]:
    """Training and test images of a data set without test images: :meth:`_Listing.halves` of its one folder."""
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
    """Load training and test images: the user's own, or Fashion-MNIST.

    Args:
        data: a folder with ``train`` and ``test`` (or another of :data:`TESTS`), each with a folder of images per class and no
            links that leave ``data``; tar shards (:func:`.shards.find_shards`); a saved data set
            (:func:`.hub.find_saved_dataset`); else as for :func:`.fashion_mnist.load_fashion_mnist`. Images are files with a
            suffix of a format that :func:`.image_files.read_image` reads. Hidden files and folders are ignored.
        size: side of the images. Fashion-MNIST's are 28 x 28 whatever this says.
        channels: 1 or 3. Fashion-MNIST has one.
        limit: the most images of each split, spread evenly over the sorted files, so that every class has its share. Of
            Fashion-MNIST the first images are taken.
        workers: number of processes that decode; 0: decode in this process; None: :func:`.image_workers.default_workers`.
        device: device to which the images are copied, in batches.
        validation: fraction of each class's images, between 0 and 1, that is held out as test images. ``data`` must then have
            no test images: it holds only ``train``, or the class folders themselves.
        seed: decides which images ``validation`` holds out. The choice is the same in every run, and changes little if files
            are added.
        skip_damaged: leave out unreadable images and list them in :attr:`.dataset.Dataset.skipped`. For a stream see
            :class:`.stream.StreamedSplit`.
        stream: whether to read images during training instead of all in advance; None: if they do not fit ``device``.
        buffer: size of the shuffle buffer for tar shards, in images.
        on_note: function that is called with a line about ignored files that are no images, skipped images or streaming.

    Returns:
        The data set. Images of a folder are in the order of the sorted names of classes and files, whatever ``workers`` is.

    Raises:
        DataError: nothing is found, a file is broken, a class has no image or only damaged ones, there are fewer than two
            classes, a test image is of a class without training images, a class has too few images for ``validation``, the
            images need more memory than ``device`` has free, or a worker process dies.
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
    # List all files first, so that errors appear before decoding, which can take minutes.
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
    """A split of Fashion-MNIST, as a stream only if ``stream`` is True: it fits any memory."""
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
    """Load the test images of ``data`` for a network with ``classes``. The other arguments are those of :func:`load_data`.

    Raises:
        DataError: as for :func:`load_data`, or the images are of other classes.
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
        raise DataError(f"the network has the classes {some(classes)}, not those of Fashion-MNIST: give --data its own images")
    found = load_fashion_mnist(data)
    return _fashion_mnist(found.test.limited(limit), found.source, stream, workers)
