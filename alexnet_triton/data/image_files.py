"""Image files, decoded to the small square images that a network is trained on. Needs Pillow and torchvision."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .dataset import DataError

#: Pillow's name of 8-bit pixels, by number of channels.
_MODES = {1: "L", 3: "RGB"}


@functools.cache
def _formats() -> list[str]:
    """What Pillow reads by itself: for PostScript it runs another program, whatever the file is called."""
    from PIL import Image

    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def _decode(path: Path, channels: int) -> Tensor:
    """uint8 (channels, H, W), upright."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DataError(f"{path}: no regular file")  # to open a pipe would wait for a writer
        with warnings.catch_warnings():
            # From 89 million pixels on Pillow warns, from twice as many on it refuses: a picture to classify has neither.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_formats()) as image:
                if image.mode[0] in "IF":
                    raise DataError(f"{path}: pixels of more than 8 bits (Pillow's mode {image.mode}) are not supported")
                return pil_to_tensor(ImageOps.exif_transpose(image).convert(_MODES[channels]))
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not an image, or of a format that Pillow does not know") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: too large to be decoded: {str(error).rstrip('.')}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    # What damaged bytes make a decoder raise is not documented: all of it means the same here.
    except Exception as error:
        raise DataError(f"{path}: damaged: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def read_image(path: Path, channels: int, size: int) -> Tensor:
    """The image in the file ``path``, as the paper on AlexNet takes it: its shorter side made ``size``, the middle cut out.

    Resized bilinearly and smoothed before it shrinks, as by ``torchvision.transforms.v2.functional.resize``. Turned as its EXIF
    orientation says; transparency is left out; of an animation it is the first frame.

    Args:
        path: a file of any format that Pillow reads without another program, which it would run for EPS.
        channels: 1 for grey, 3 for red, green, blue: what the image is converted to.
        size: side of the square returned.

    Returns:
        uint8 (size, size) for one channel, (3, size, size) for three.

    Raises:
        DataError: no such file, unreadable, no image, a damaged one, of more than 8 bits a pixel and channel, or of more pixels
            than Pillow takes to be safe (89 million).
    """
    from torchvision.transforms.v2.functional import center_crop, resize

    image = center_crop(resize(_decode(path, channels), [size], antialias=True), [size, size])
    return image.squeeze(0) if channels == 1 else image


def read_images(paths: list[Path], channels: int, size: int) -> tuple[Tensor, list[Path], list[DataError]]:
    """:func:`read_image` of each of ``paths``: the images that can be read as one tensor, their paths, the others' errors."""
    images: list[Tensor] = []
    readable: list[Path] = []
    errors: list[DataError] = []
    for path in paths:
        try:
            images.append(read_image(path, channels, size))
            readable.append(path)
        except DataError as error:
            errors.append(error)
    return torch.stack(images) if images else torch.empty(0), readable, errors
