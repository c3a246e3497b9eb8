"""Fashion-MNIST from its IDX files: 28 x 28 grey images of ten kinds of clothing."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch

from .dataset import DataError, Dataset, Split, expand

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

#: Names of the data set's files, without ``.gz``: (images, labels) of each split.
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

SAMPLE = Path(__file__).parent / "sample"

_SIDE = 28
#: Far above the 60,000 of the real files: a header that claims more is wrong. This limits an unpacked gzip to 784 MB.
_MOST_ITEMS = 1_000_000


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read the uint8 array of an IDX file (Y. LeCun's format: magic 0x0000 08 DD, DD big-endian int32 sizes, then bytes).

    Raises:
        DataError: the file is unreadable, no IDX file of these ``dimensions``, or shorter or longer than its header says.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions:
                raise DataError(f"{path}: truncated: {len(header)} bytes where the header alone has {4 + 4 * dimensions}")
            magic = int.from_bytes(header[:4], "big")
            if magic != 0x0800 + dimensions:
                raise DataError(f"{path}: wrong magic number 0x{magic:08x}, expected 0x{0x0800 + dimensions:08x}")
            shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4))
            size = math.prod(shape)
            if shape[0] > _MOST_ITEMS or shape[1:] != (_SIDE,) * (dimensions - 1):
                raise DataError(
                    f"{path}: header claims shape {shape}, expected at most {_MOST_ITEMS} items"
                    + (f" of {_SIDE} x {_SIDE}" if dimensions == 3 else "")
                )
            chunks: list[bytes] = []
            got = 0
            # Read in chunks, so that memory depends on the file and not on its header, and one byte more than announced.
            while got <= size and (chunk := file.read(min(1 << 20, size + 1 - got))):
                chunks.append(chunk)
                got += len(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if got != size:
        raise DataError(
            f"{path}: header announces {size} bytes of data (shape {shape}), the file has "
            + (f"only {got}: it is truncated" if got < size else "more")
        )
    return np.frombuffer(b"".join(chunks), dtype=np.uint8).reshape(shape)


def _caches() -> tuple[Path, ...]:
    """The cache folder below the home, if there is a home: a container's random user may have no $HOME and no passwd entry."""
    try:
        return (Path.home() / ".cache/alexnet-triton",)
    except RuntimeError:
        return ()


def usual_places() -> tuple[Path, ...]:
    """Folders to search for the files: torchvision's below its usual roots, and Debian's package dataset-fashion-mnist."""
    roots = (Path("data"), Path("../data"), *_caches())
    return (*(root / "FashionMNIST/raw" for root in roots), Path("/usr/share/datasets/fashion-mnist"))


def _candidate(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def holds_idx(folder: Path) -> bool:
    """Whether any of Fashion-MNIST's files is in ``folder``."""
    return any(_candidate(folder, name) is not None for names in FILES.values() for name in names)


def _find_file(folder: Path, name: str) -> Path:
    path = _candidate(folder, name)
    if path is None:
        raise DataError(f"{folder}: no file {name} or {name}.gz in it")
    return path


def _read_split(folder: Path, split: str) -> Split:
    images_path, labels_path = (_find_file(folder, name) for name in FILES[split])
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{images_path} has {len(images)} images, but {labels_path} has {len(labels)} labels")
    if len(labels) == 0:
        raise DataError(f"{labels_path}: holds no labels")
    if labels.max() >= len(CLASSES):
        raise DataError(f"{labels_path}: label {labels.max()} is outside 0..{len(CLASSES) - 1}")
    return Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)))


def check_folder(folder: Path) -> None:
    """Check that ``folder`` exists and holds any of Fashion-MNIST's files.

    Raises:
        DataError: it does not.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    if not holds_idx(folder):
        raise DataError(
            f"{folder}: holds neither Fashion-MNIST's files nor folders of images, train and test (or val, valid, "
            "validation); if it holds the class folders themselves, --validation 0.2 takes a fifth for the test"
        )


def read_folder(folder: Path) -> Dataset[Split]:
    """Read both splits from a folder of the four IDX files, gzipped or not.

    Raises:
        DataError: a file is missing or broken.
    """
    check_folder(folder)
    return Dataset(_read_split(folder, "train"), _read_split(folder, "test"), folder, CLASSES, "Fashion-MNIST")


def load_fashion_mnist(data: str | Path | None = None) -> Dataset[Split]:
    """Read Fashion-MNIST, downloading it if necessary.

    Args:
        data: a folder of the IDX files; ``"sample"`` for the small balanced sample inside this package (1,000 training and
            500 test images); None to search :func:`usual_places` and else download with torchvision.

    Raises:
        DataError: the files are not found or broken, or the download fails.
    """
    if data is not None:
        return read_folder(SAMPLE if str(data) == "sample" else expand(data))
    for folder in usual_places():
        if all(_candidate(folder, name) is not None for names in FILES.values() for name in names):
            return read_folder(folder)
    return read_folder(_download())


def _writable(root: Path) -> bool:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(root, os.W_OK | os.X_OK)


def _download() -> Path:
    """Download with torchvision below the home's cache folder, else below ``data``; return the folder of the files."""
    hint = "give the folder of its IDX files with --data PATH, or use the small sample with --data sample"
    try:
        from torchvision.datasets import FashionMNIST as Download
    except ImportError as error:
        raise DataError(f"Fashion-MNIST was not found, and downloading it needs torchvision: {hint}") from error
    roots = (*_caches(), Path("data"))
    root = next(filter(_writable, roots), None)
    if root is None:
        raise DataError(f"Fashion-MNIST was not found, and {' and '.join(map(str, roots))} cannot be written: {hint}")
    try:
        Download(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"Fashion-MNIST was not found and could not be downloaded to {root} ({error}): {hint}") from error
    return root / "FashionMNIST/raw"
