"""Images of a Hugging Face ``datasets`` data set written by ``save_to_disk``."""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .dataset import DataError, expand
from .image_files import decode_image
from .splits import TESTS, TRAIN, Parts

if TYPE_CHECKING:
    import datasets

#: Names of columns. ``LABELS``: columns of whole numbers that can be labels. Of several columns of images or of ``ClassLabel``
#: the first of these names is used.
LABELS, IMAGES = ("label", "labels"), ("image", "img")


def _column(found: Sequence[str], usual: Sequence[str], what: str, all_columns: Sequence[str], where: Path) -> str:
    """The only column of ``found``, or of several the first that has a ``usual`` name.

    Raises:
        DataError: there is no column, or there are several of other names.
    """
    if len(found) == 1:
        return found[0]
    if name := next((name for name in usual if name in found), None):
        return name
    raise DataError(f"{where}: {'several columns' if found else 'no column'} of {what}: {', '.join(found or all_columns)}")


class SavedDataset:
    """A :class:`.sources.Source` of the images and labels of a ``datasets.Dataset``.

    Args:
        dataset: a data set with a column of images (of several: ``image`` or ``img``) and a column of labels: a ``ClassLabel``
            (of several: ``label`` or ``labels``), or else whole numbers in a column of that name. It must hold the images'
            bytes.
        where: name of the data set in messages.

    Attributes:
        labels: int64 (N,), on the CPU.
        classes: class names of the ``ClassLabel``; None for whole numbers.

    Raises:
        DataError: the columns are missing or ambiguous, there are no images, or an image has no label.
    """

    def __init__(self, dataset: datasets.Dataset, where: Path) -> None:
        import datasets

        features, self._where = dataset.features, where
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        whole = [name for name in LABELS if name in features and "int" in str(getattr(features[name], "dtype", ""))]
        image = _column(images, IMAGES, "images", list(features), where)
        label = _column(named or whole, LABELS, "labels", list(features), where)
        self.classes = tuple(features[label].names) if named else None
        column = dataset.select_columns([label]).with_format("arrow")[:][label]
        if not len(column):
            raise DataError(f"{where}: no images in it")
        if column.null_count:
            raise DataError(f"{where}: {column.null_count} images without a label")
        self.labels = torch.from_numpy(column.to_numpy().astype(np.int64))
        self._images = dataset.select_columns([image]).with_format(None).cast_column(image, datasets.Image(decode=False))
        self._image, self._rows = image, np.arange(len(self.labels))

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """The row of image ``index`` in the whole data set, as text."""
        return str(self._rows[index])

    def name(self, index: int) -> Path:
        """As :meth:`.sources.Source.name`."""
        return Path(f"{self._where}: image {self.key(index)}")

    def read(self, index: int, channels: int, size: int) -> Tensor:
        """As :meth:`.sources.Source.read`. A row with only a file's name is an error: no file outside of the set is read."""
        name = self.name(index)
        try:
            found = self._images[int(self._rows[index])][self._image]
        except Exception as error:  # what datasets raises for damaged Arrow files is not documented
            raise DataError(f"{name}: damaged: {error}") from error
        if found is None or found["bytes"] is None:
            named = f"only the name of a file, {found['path']}" if found and found["path"] else "nothing"
            raise DataError(f"{name}: the data set holds {named}, and no image")
        return decode_image(found["bytes"], name, channels, size)

    def order(self, generator: torch.Generator) -> Tensor:
        """As :meth:`.sources.Source.order`: shuffled over the whole set."""
        return torch.randperm(len(self), generator=generator, device=generator.device)

    def checksum(self) -> int:
        """As :meth:`.sources.Source.checksum`: of the rows and labels, since images have no names."""
        return zlib.crc32(self.labels.numpy().tobytes(), zlib.crc32(self._rows.tobytes()))

    def subset(self, keep: Tensor) -> SavedDataset:
        """As :meth:`.sources.Source.subset`."""
        part = copy.copy(self)
        part._rows, part.labels = self._rows[keep.numpy()], self.labels[keep]
        return part


def is_saved_dataset(data: str | Path | None) -> bool:
    """Whether ``data`` is a folder written by ``save_to_disk``.

    Raises:
        DataError: ``data`` begins with ``~`` of an unknown user.
    """
    if data is None:
        return False
    folder = expand(data)
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def find_saved_dataset(data: str | Path) -> Parts:
    """Find the data set in the folder ``data``, to be opened by :func:`.splits.open_sources`.

    The training images are the split ``train``, or all images of a data set without splits. The test images are the first
    existing split of :data:`.splits.TESTS`.

    Raises:
        DataError: ``datasets`` is not installed, or a file of the data set is missing or damaged.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{data}: a saved data set needs the package datasets ({error}): pip install 'alexnet-triton[stream]'"
        ) from error
    folder = expand(data)
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # what datasets raises for damaged files is not documented
        raise DataError(f"{folder}: cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if isinstance(found, datasets.Dataset):
        parts = {TRAIN: functools.partial(SavedDataset, found, folder)}
    else:
        parts = {name: functools.partial(SavedDataset, split, folder / name) for name, split in found.items()}
    test = next((parts[name] for name in TESTS if name in parts), None)
    return Parts(folder, "cast its labels to ClassLabel, which names all classes", parts.get(TRAIN), test)
