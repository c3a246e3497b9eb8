"""Fashion-MNIST from its IDX files: 28 x 28 grey images of ten kinds of clothing."""

from __future__ import annotations

import dataclasses
import gzip
import math
import zlib
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

import kernels

from ..fused import CellImages, first_layer_cells

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

#: The data set's own files, with or without ``.gz``: (images, labels) of each split.
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

SAMPLE = Path(__file__).parent / "sample"

#: Where the files usually are: torchvision's folder under its usual roots, Debian's package dataset-fashion-mnist.
USUAL_PLACES = (
    Path("data/FashionMNIST/raw"),
    Path("../data/FashionMNIST/raw"),
    Path.home() / ".cache/alexnet-triton/FashionMNIST/raw",
    Path("/usr/share/datasets/fashion-mnist"),
)

_SIDE = 28
#: Far above the 60,000 of the real files: a header that claims more is wrong. So a gzip of any size takes 784 MB at most.
_MOST_ITEMS = 1_000_000


class DataError(ValueError):
    """A data set that is missing or broken; the message names the file or folder and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Images as uint8, (N, H, W) of one channel or (N, 3, H, W) of three, and their labels as int64 (N,)."""

    images: Tensor
    labels: Tensor

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
        return self if limit is None else Split(self.images[:limit], self.labels[:limit])

    def to(self, device: torch.device) -> Split:
        """On ``device``; itself if it is there."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Both splits, the folder they were read from, the names of the labels in their order, and what to call it all."""

    train: Split
    test: Split
    source: Path
    classes: tuple[str, ...] = CLASSES
    name: str = "Fashion-MNIST"


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file (Y. LeCun's format: magic 0x0000 08 DD, DD big-endian int32 sizes, then bytes).

    Raises:
        DataError: not such a file, unreadable, shorter or longer than its header says.
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
            # In chunks, and one byte further than announced: memory follows the file, not its header.
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


def read_folder(folder: Path) -> Dataset:
    """Both splits from a folder of the four IDX files, gzipped or not.

    Raises:
        DataError: a file is missing or broken.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    if not holds_idx(folder):
        raise DataError(f"{folder}: neither Fashion-MNIST's files are in it nor folders of images, train and test (or val)")
    return Dataset(_read_split(folder, "train"), _read_split(folder, "test"), folder)


def load_fashion_mnist(data: str | Path | None = None) -> Dataset:
    """Fashion-MNIST.

    Args:
        data: a folder of the IDX files; ``"sample"`` for the small balanced sample inside this package (1,000 training and
            500 test images); None to look in :data:`USUAL_PLACES` and else download with torchvision.

    Raises:
        DataError: nothing found, or a broken file.
    """
    if data is not None:
        return read_folder(SAMPLE if str(data) == "sample" else Path(data).expanduser())
    for folder in USUAL_PLACES:
        if all(_candidate(folder, name) is not None for names in FILES.values() for name in names):
            return read_folder(folder)
    return read_folder(_download())


def _download() -> Path:
    root = Path.home() / ".cache/alexnet-triton"
    hint = "give the folder of its IDX files with --data PATH, or use the small sample with --data sample"
    try:
        from torchvision.datasets import FashionMNIST as Download
    except ImportError as error:
        raise DataError(f"Fashion-MNIST is not here, and downloading it needs torchvision: {hint}") from error
    try:
        Download(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"Fashion-MNIST is not here and could not be downloaded ({error}): {hint}") from error
    return root / "FashionMNIST/raw"


def network_input(
    images: Tensor,
    index: Tensor,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    augmentation: kernels.Augmentation | None = None,
    cells: kernels.Cells | None = None,
) -> Tensor:
    """The images of ``index`` as :func:`kernels.gather_resize` makes them, which knows one channel: of three, each by itself.

    Args:
        images: uint8, (D, H, W) or (D, C, H, W).
        index: (N,) int64 on their device.
        size: side of the images returned.
        dtype: float32, float16 or bfloat16.
        augmentation: the same for all channels of an image.
        cells: return the images' cells in their place; of one channel only, since those of three have their channels innermost.

    Returns:
        (N, C, size, size) in [0, 1], contiguous; C is 1 for ``images`` of three dimensions. Or their cells, as
        :func:`kernels.gather_resize` writes them.

    Raises:
        ValueError: ``cells`` of images of three channels.
    """
    if images.ndim == 3:
        return kernels.gather_resize(images, index, size, dtype=dtype, augmentation=augmentation, cells=cells)
    if cells is not None:
        raise ValueError(f"cells are made of images (D, H, W) of one channel, got shape {tuple(images.shape)}")
    channels = images.shape[1]
    planes = (index[:, None] * channels + torch.arange(channels, device=index.device)).flatten()
    if augmentation is not None:
        augmentation = kernels.Augmentation(*(t if t is None else t.repeat_interleave(channels, 0) for t in augmentation))
    output = kernels.gather_resize(images.flatten(0, 1), planes, size, dtype=dtype, augmentation=augmentation)
    return output.view(len(index), channels, size, size)


def to_input(images: Tensor, image_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """All of ``images`` as :func:`network_input` makes them."""
    return network_input(images, torch.arange(len(images), device=images.device), image_size, dtype=dtype)


Crop = Literal["none", "pad", "resized"]


@dataclasses.dataclass(frozen=True)
class Augment:
    """What is changed at random in each training image, anew at every step; by default nothing.

    Attributes:
        flip: an image is mirrored with probability 1/2.
        crop: ``"pad"``: the image is moved by up to :data:`SHIFT` pixels of 28 along each axis, black coming in from outside.
            ``"resized"``: a box of it takes its place, enlarged: :func:`draw_boxes`. ``"none"``: all of it, as it stands.
        colour: of images of one channel brightness and contrast (:data:`FACTORS`), of three the light (:func:`draw_light`).

    Raises:
        TypeError, ValueError: another type or another crop.
    """

    flip: bool = False
    crop: Crop = "none"
    colour: bool = False

    def __post_init__(self) -> None:
        for name in ("flip", "colour"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if self.crop not in get_args(Crop):
            raise ValueError(f"crop must be one of {', '.join(get_args(Crop))}, got {self.crop!r}")

    def __str__(self) -> str:
        parts = {"flip": self.flip, f"{self.crop} crop": self.crop != "none", "colour": self.colour}
        return ", ".join(name for name, on in parts.items() if on) or "nothing"


#: The plain recipe's, and the paper's.
NOTHING, EVERYTHING = Augment(), Augment(flip=True, crop="pad", colour=True)

#: Pixels of :data:`_SIDE` that an augmented image is moved by at most, and the factors of its brightness and contrast.
SHIFT, FACTORS = 2, (0.8, 1.2)

#: Of a resized crop: the part of the image's area, its width by its height, and how often both are drawn at most for a box that
#: fits. torchvision's, which are those of the Inception networks.
AREA, ASPECT, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10

#: Of the paper's change of colour: the principal components of red, green and blue in ImageNet, a row each, and their factors
#: for pixels in [0, 1], both as published with fb.resnet.torch; and the standard deviation of what multiplies them.
LIGHT = ((-0.5675, -0.5808, -0.5836), (0.7192, -0.0045, -0.6948), (0.4009, -0.8140, 0.4203))
LIGHT_FACTORS, LIGHT_STD = (0.2175, 0.0188, 0.0045), 0.1


def _uniform(shape: tuple[int, ...], device: torch.device, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.rand(shape, dtype=torch.float32, device=device) * (high - low) + low


def draw_boxes(n: int, device: torch.device, size: int) -> tuple[Tensor, Tensor]:
    """Of ``n`` images of side ``size`` a box each: (top, left) and (height, width), both (n, 2) int32.

    The distribution is that of ``torchvision.transforms.v2.RandomResizedCrop``: an area uniform in :data:`AREA` and an aspect
    ratio whose logarithm is uniform in that of :data:`ASPECT`, drawn again until the box fits, or after :data:`TRIES` times the
    whole image; its place is uniform. There a loop asks whether it fits; here all tries are drawn at once, since to ask is to
    wait for the device, and the first one that fits is taken. Drawn and capturable as by :func:`draw_augmentation`.
    """
    area = _uniform((n, TRIES), device, *AREA) * size**2
    aspect = _uniform((n, TRIES), device, *map(math.log, ASPECT)).exp()
    boxes = torch.stack([(area / aspect).sqrt().round(), (area * aspect).sqrt().round()], dim=2)  # [n, TRIES, 2]
    fits = ((boxes > 0) & (boxes <= size)).all(2)
    first = fits.int().argmax(1)[:, None, None].expand(n, 1, 2)
    box = boxes.gather(1, first)[:, 0].masked_fill(~fits.any(1)[:, None], size)
    # In float32 the product of a number below 1 and a whole one below 2^24 is below that: no corner is one too far.
    corner = (_uniform((n, 2), device) * (size - box + 1)).floor()
    return corner.int(), box.int()


def draw_augmentation(n: int, device: torch.device, size: int = _SIDE, augment: Augment = EVERYTHING) -> kernels.Augmentation:
    """The parts of ``augment`` for ``n`` images of side ``size`` and one channel; nothing is drawn for a part that is off.

    From torch's generator on ``device``, without waiting for it; in a captured CUDA graph anew at every replay.
    """
    offset = box = None
    if augment.crop == "pad":
        shift = max(1, SHIFT * size // _SIDE)
        offset = torch.randint(-shift, shift + 1, (n, 2), dtype=torch.int32, device=device)
    elif augment.crop == "resized":
        offset, box = draw_boxes(n, device, size)
    return kernels.Augmentation(
        offset=offset,
        size=box,
        flip=torch.rand(n, device=device) < 0.5 if augment.flip else None,
        brightness=_uniform((n,), device, *FACTORS) if augment.colour else None,
        contrast=_uniform((n,), device, *FACTORS) if augment.colour else None,
    )


def draw_light(n: int, device: torch.device) -> Tensor:
    """What the paper adds to the red, green and blue of ``n`` images, (n, 3) float32: light of another colour and strength."""
    # Of scalars: a captured step cannot copy a matrix of constants from the host.
    along = torch.randn((3, n), device=device) * LIGHT_STD
    first, second, third = (
        torch.stack([along[k] * (LIGHT_FACTORS[k] * component) for component in LIGHT[k]], dim=1) for k in range(3)
    )
    return first + second + third


def augmented_input(
    images: Tensor,
    index: Tensor,
    size: int,
    augment: Augment = EVERYTHING,
    dtype: torch.dtype = torch.float32,
    cells: kernels.Cells | None = None,
) -> Tensor:
    """:func:`network_input` of images changed at random as ``augment`` says; the same numbers for all channels of an image."""
    grey, n = images.ndim == 3, len(index)
    # Light is added to what the kernel makes, whose changes of colour are one channel's.
    drawn = augment if grey else dataclasses.replace(augment, colour=False)
    augmentation = draw_augmentation(n, index.device, images.shape[-1], drawn)
    inputs = network_input(images, index, size, dtype=dtype, augmentation=augmentation, cells=cells)
    return inputs if drawn.colour == augment.colour else inputs + draw_light(n, index.device)[:, :, None, None].to(dtype)


def input_for(
    net: nn.Module,
    images: Tensor,
    index: Tensor | None,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    augment: Augment = NOTHING,
) -> Tensor | CellImages:
    """What ``net`` is called with for the images of ``index``, None for all: :func:`augmented_input` of them.

    In cells where ``net`` reads those (:func:`alexnet_triton.first_layer_cells`), which changes no bit of what it computes: so
    nothing writes the images only to have them rearranged. Images of three channels stay images.
    """
    if index is None:
        index = torch.arange(len(images), device=images.device)
    cells = first_layer_cells(net, size, dtype=dtype, device=images.device) if images.ndim == 3 else None
    inputs = augmented_input(images, index, size, augment, dtype=dtype, cells=cells)
    return inputs if cells is None else CellImages(inputs, cells)
