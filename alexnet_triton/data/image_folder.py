"""Own images, in torchvision's ``ImageFolder`` layout: a folder for each class, within ``train`` and ``test`` (or ``val``).

The files are decoded once, by the worker processes of a ``DataLoader``, to squares of uint8 that go through pinned memory to
the device and stay there: an epoch decodes nothing, and its data kernel is that of Fashion-MNIST. A set must therefore fit the
device's memory: 150,528 bytes an image of 3 x 224 x 224, 7.5 GB for 50,000.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .dataset import DataError, Dataset, Split
from .fashion_mnist import CLASSES, holds_idx, load_fashion_mnist
from .image_files import read_image

#: Folders of the training images, and of the test images: the first of these that is there.
TRAIN, TESTS = "train", ("test", "val")

#: Images that a worker decodes before it hands them over.
_BATCH = 64

_CPU = torch.device("cpu")


def is_image_folder(data: str | Path | None) -> bool:
    """Whether ``data`` (as for :func:`load_data`) is a folder of images, not one of Fashion-MNIST's files."""
    if data is None or str(data) == "sample":
        return False
    folder = Path(data).expanduser()
    return any((folder / name).is_dir() for name in (TRAIN, *TESTS)) and not holds_idx(folder)


def default_channels(data: str | Path | None) -> int:
    """Of the images of ``data``, where nobody says how many: 1 for Fashion-MNIST, 3 for a folder of images."""
    return 3 if is_image_folder(data) else 1


def default_workers() -> int:
    """Processes that decode: one for each core that may be used, torchrun's processes sharing them; 8 at most."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _list_images(folder: Path, classes: Sequence[str] | None) -> tuple[list[str], list[Path], list[int]]:
    """Names of the classes, files, and the label of each: its class's place in ``classes``, or in the sorted names."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(folder)
    except OSError as error:  # no folder in it, one without images, one that may not be read
        raise DataError(f"{folder}: {error}") from error
    names = list(found.classes if classes is None else classes)
    if unknown := [name for name in found.classes if name not in names]:
        raise DataError(f"{folder / unknown[0]}: not one of the classes that are trained on: {_some(names)}")
    return names, [Path(path) for path, _ in found.samples], [names.index(found.classes[label]) for _, label in found.samples]


def _check_tree(data: Path, folder: Path) -> None:
    """That all of ``folder``, one of ``data``'s, can be listed, and that what is in it is in ``data``.

    Else a data set from elsewhere could show any file of this machine. Nor may a link lead to a folder: one that leads to its
    own would be read again and again.

    Raises:
        DataError: a folder that cannot be read; a link that leads out of ``data``, to a folder, or nowhere.
    """

    def unreadable(error: OSError) -> None:  # which ImageFolder would pass over in silence
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

    root = os.path.realpath(data)
    links = [str(folder)] if folder.is_symlink() else []
    for parent, folders, files in os.walk(folder, onerror=unreadable):
        links += [path for name in (*folders, *files) if os.path.islink(path := os.path.join(parent, name))]
    for link in links:
        target = Path(os.path.realpath(link))
        if not target.is_relative_to(root):
            raise DataError(f"{link}: a link that leads out of {data}, to {target}: nothing outside of it is read")
        if link != str(folder) and not target.is_file():
            raise DataError(f"{link}: a link to {'a folder' if target.is_dir() else 'no file'}, {target}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


class _Files(torch.utils.data.Dataset):
    """What the workers do: decode a file. An error is handed over like an image: raised, it would arrive with a traceback."""

    def __init__(self, paths: Sequence[Path], channels: int, size: int) -> None:
        self.paths, self.channels, self.size = paths, channels, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | DataError:
        try:
            return read_image(self.paths[index], self.channels, self.size)
        except DataError as error:
            return error


def _stack(images: list[Tensor | DataError]) -> Tensor | DataError:
    """One tensor of a batch, or the first error in it."""
    return next((image for image in images if isinstance(image, DataError)), None) or torch.stack(images)  # type: ignore[arg-type]


def _room_for(count: int, channels: int, size: int, device: torch.device) -> Tensor:
    shape = (count, size, size) if channels == 1 else (count, channels, size, size)
    try:
        return torch.empty(shape, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        raise DataError(
            f"{count} images of {channels} x {size} x {size} take {count * channels * size * size / 1e9:.1f} GB, "
            f"more than {device} has free: take fewer with --limit"
        ) from error


def read_split(
    folder: Path,
    *,
    size: int,
    channels: int,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    workers: int | None = None,
    device: torch.device = _CPU,
) -> tuple[Split, list[str]]:
    """The images of a folder of class folders as :func:`.image_files.read_image` makes them, and the classes.

    Args:
        folder: of a folder for each class; files of other kinds than images are passed over.
        size: side of the images.
        channels: 1 or 3.
        classes: names in the order of the labels. None: the folders', sorted.
        limit: take so many images at most, spread evenly over the sorted files, so that every class has its share.
        workers: processes that decode; 0 decodes in this one; None: :func:`default_workers`.
        device: where the images go, a batch at a time, from pinned memory if it is a GPU.

    Returns:
        Images in the order of the sorted names of classes and files, whatever ``workers`` is.

    Raises:
        DataError: nothing to read, an image that cannot be read, a class not in ``classes``, more than ``device`` holds.
    """
    names, paths, labels = _list_images(folder, classes)
    if limit is not None and limit < len(paths):
        kept = [i * len(paths) // limit for i in range(limit)]
        paths, labels = [paths[i] for i in kept], [labels[i] for i in kept]
    try:
        images = _room_for(len(paths), channels, size, device)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error
    loader: DataLoader = DataLoader(
        _Files(paths, channels, size),
        batch_size=_BATCH,
        num_workers=default_workers() if workers is None else workers,
        collate_fn=_stack,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # not torch's own, whose state is the run's
    )
    done = 0
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        images[done : done + len(batch)].copy_(batch, non_blocking=True)
        done += len(batch)
    return Split(images, torch.tensor(labels, device=device)), names


def _test_folder(folder: Path) -> Path:
    for name in TESTS:
        if (folder / name).is_dir():
            return folder / name
    raise DataError(f"{folder}: no folder {' or '.join(TESTS)} in it")


def load_data(
    data: str | Path | None,
    *,
    size: int,
    channels: int,
    limit: int | None = None,
    workers: int | None = None,
    device: torch.device = _CPU,
) -> Dataset:
    """What to train on: a folder of images, or Fashion-MNIST.

    Args:
        data: a folder of ``train`` and ``test`` (or ``val``, where there is no ``test``), each of a folder for every class with
            its images, and no links out of it; anything else as in :func:`.fashion_mnist.load_fashion_mnist`.
        size: side of a folder's images. Fashion-MNIST's are 28 x 28.
        channels: 1 or 3; Fashion-MNIST has one.
        limit, workers, device: as in :func:`read_split`; of Fashion-MNIST, the first ``limit`` images.

    Raises:
        DataError: nothing found, a broken file, fewer than two classes, a test image of a class without training images.
    """
    if not is_image_folder(data):
        if channels != 1:
            raise DataError(f"Fashion-MNIST's images have one channel, not {channels}")
        found = load_fashion_mnist(data)
        return Dataset(found.train.limited(limit), found.test.limited(limit), found.source, found.classes, found.name)
    folder = Path(str(data)).expanduser()
    if not (folder / TRAIN).is_dir():
        raise DataError(f"{folder}: no folder {TRAIN} in it")
    test_folder = _test_folder(folder)
    for each in (folder / TRAIN, test_folder):
        _check_tree(folder, each)
    # Before anything is decoded, which can take minutes.
    classes, _, _ = _list_images(folder / TRAIN, None)
    if len(classes) < 2:
        raise DataError(f"{folder / TRAIN}: holds one class only, {classes[0]}: there must be two or more to tell apart")
    _list_images(test_folder, classes)

    def read(folder: Path) -> Split:
        return read_split(folder, size=size, channels=channels, classes=classes, limit=limit, workers=workers, device=device)[0]

    return Dataset(read(folder / TRAIN), read(test_folder), folder, tuple(classes), folder.resolve().name)


def load_test(
    data: str | Path | None,
    *,
    classes: Sequence[str],
    size: int,
    channels: int,
    limit: int | None = None,
    workers: int | None = None,
    device: torch.device = _CPU,
) -> Split:
    """The test images of ``data`` for a network that tells ``classes`` apart; the other arguments are :func:`load_data`'s.

    Raises:
        DataError: as :func:`load_data`, and where the images are not of these classes.
    """
    if is_image_folder(data):
        folder = _test_folder(Path(str(data)).expanduser())
        _check_tree(folder.parent, folder)
        return read_split(folder, size=size, channels=channels, classes=classes, limit=limit, workers=workers, device=device)[0]
    if tuple(classes) != CLASSES:
        raise DataError(
            f"the network tells {_some(classes)} apart, not the classes of Fashion-MNIST: give --data its own images"
        )
    return load_fashion_mnist(data).test.limited(limit)
