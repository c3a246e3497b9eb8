"""Images of a data set of Hugging Face's package ``datasets`` that its ``save_to_disk`` has written."""

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

#: Columns of labels without names; of several columns of images, or of named labels, the first of these that is there.
LABELS, IMAGES = ("label", "labels"), ("image", "img")


def _column(found: Sequence[str], usual: Sequence[str], what: str, all_columns: Sequence[str], where: Path) -> str:
    """The one of the columns ``found``, or of several the ``usual`` one.

    Raises:
        DataError: none, or several of other names.
    """
    if len(found) == 1:
        return found[0]
    if name := next((name for name in usual if name in found), None):
        return name
    raise DataError(f"{where}: {'several columns' if found else 'no column'} of {what}: {', '.join(found or all_columns)}")


class SavedDataset:
    """The images and labels of a ``datasets.Dataset``, a :class:`.sources.Source`.

    Args:
        dataset: with one column of images (of several: ``image`` or ``img``) and one of labels: a ``ClassLabel`` (of several:
            ``label`` or ``labels``), or whole numbers called so. It must hold the images' bytes.
        where: what messages call it.

    Attributes:
        labels: int64 (N,), on the CPU.
        classes: the names that the ``ClassLabel`` has; None for whole numbers.

    Raises:
        DataError: no such columns, no images, an image without a label.
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
        """The place of image ``index`` in the whole data set."""
        return str(self._rows[index])

    def name(self, index: int) -> Path:
        """As :meth:`.sources.Source.name`."""
        return Path(f"{self._where}: image {self.key(index)}")

    def read(self, index: int, channels: int, size: int) -> Tensor:
        """As :meth:`.sources.Source.read`. Nothing outside of the data set is read: of a file's name alone it does not."""
        name = self.name(index)
        try:
            found = self._images[int(self._rows[index])][self._image]
        except Exception as error:  # what damaged files of Arrow make it raise is not documented
            raise DataError(f"{name}: damaged: {error}") from error
        if found is None or found["bytes"] is None:
            named = f"the name of a file alone, {found['path']}" if found and found["path"] else "nothing"
            raise DataError(f"{name}: the data set holds {named}, and no image")
        return decode_image(found["bytes"], name, channels, size)

    def order(self, generator: torch.Generator) -> Tensor:
        """As :meth:`.sources.Source.order`: shuffled over the whole set."""
        return torch.randperm(len(self), generator=generator, device=generator.device)

    def checksum(self) -> int:
        """As :meth:`.sources.Source.checksum`: of the images' places and labels, since they have no names."""
        return zlib.crc32(self.labels.numpy().tobytes(), zlib.crc32(self._rows.tobytes()))

    def subset(self, keep: Tensor) -> SavedDataset:
        """As :meth:`.sources.Source.subset`."""
        part = copy.copy(self)
        part._rows, part.labels = self._rows[keep.numpy()], self.labels[keep]
        return part


def is_saved_dataset(data: str | Path | None) -> bool:
    """Whether ``data`` is a folder that ``save_to_disk`` has written.

    Raises:
        DataError: ``data`` begins with the home of a user that there is not.
    """
    if data is None:
        return False
    folder = expand(data)
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def find_saved_dataset(data: str | Path) -> Parts:
    """The data set in the folder ``data``, to be opened by :func:`.splits.open_sources`.

    Of several splits ``train`` is trained on, and the first of :data:`.splits.TESTS` that is there is for the test. A data set
    of no splits is trained on.

    Raises:
        DataError: ``datasets`` is not installed; a file of the data set that is missing or damaged.
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
    except Exception as error:  # what damaged files make it raise is not documented
        raise DataError(f"{folder}: cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if isinstance(found, datasets.Dataset):
        parts = {TRAIN: functools.partial(SavedDataset, found, folder)}
    else:
        parts = {name: functools.partial(SavedDataset, split, folder / name) for name, split in found.items()}
    test = next((parts[name] for name in TESTS if name in parts), None)
    return Parts(folder, "cast its labels to ClassLabel, which names all classes", parts.get(TRAIN), test)
