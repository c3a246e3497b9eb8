"""Image files: find those in a folder, and decode one to a small square. Needs Pillow and torchvision."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from .dataset import DataError

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

#: Pillow's mode of 8-bit pixels, by number of channels.
_MODES = {1: "L", 3: "RGB"}

#: Pillow's formats that are not read. For PostScript Pillow runs another program, whatever the file's suffix; of the others it
#: reads only the header.
_UNREADABLE = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}

#: EXIF's orientation tag.
_ORIENTATION = 0x0112

#: Pillow's decoders that reduce 16 bits a channel to 8, and the one for DDS's half floats. "BGR;16" has 16 bits a pixel.
_DEEP_DECODER = re.compile(r"(?<!BGR);16|^SGI16$|^BC6H")

#: An image is cropped before it is resized if the resized image would have more pixels than this, and more than the original.
_MOST_RESIZED = 1 << 22

#: Markers of a JPEG's segments: those of a frame header (baseline, extended, progressive), and the least other marker that may
#: precede it.
_FRAMES, _FIRST_OTHER = (0xC0, 0xC1, 0xC2), 0xC3

#: Marker of a JPEG's EXIF and XMP segments.
_APP1 = 0xE1

#: Folders that file systems and archives leave behind. They count as hidden, like names that begin with a dot.
_LEFT_BEHIND = ("__MACOSX", "lost+found")


@functools.cache
def _formats() -> list[str]:
    """Names of the formats that Pillow decodes without another program."""
    from PIL import Image

    Image.init()
    return [name for name in Image.ID if name not in _UNREADABLE]


@functools.cache
def suffixes() -> frozenset[str]:
    """Suffixes of the files that :func:`read_image` reads, in lower case."""
    from PIL import Image

    formats = {*_formats(), "MPO"}  # MPO files are opened as JPEG, and Pillow has no opener of that name
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is ignored in a data set."""
    return name.startswith(".") or name in _LEFT_BEHIND


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether ``entry`` is a folder or a link to one. A link whose target is inaccessible is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


@dataclasses.dataclass(frozen=True)
class Listed:
    """The sorted names in a folder, without hidden ones.

    Attributes:
        path: path of the folder.
        folders: names of folders, including links to folders.
        files: names of files, including links to files and broken links.
        links: names of ``folders`` and ``files`` that are links.
    """

    path: str
    folders: list[str]
    files: list[str]
    links: list[str]


def list_folder(path: str) -> Listed:
    """List one folder with a single scan, which matters for a million names.

    Raises:
        DataError: the folder cannot be read.
    """
    found = Listed(path, [], [], [])
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if entry.is_symlink():
                    found.links.append(entry.name)
                (found.folders if _is_folder(entry) else found.files).append(entry.name)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    for names in (found.folders, found.files, found.links):
        names.sort()
    return found


def walk(folder: Path, on_unreadable: Callable[[DataError], object] | None = None) -> list[Listed]:
    """List ``folder`` and all folders below it, sorted by path. Links to folders are listed but not followed.

    If ``on_unreadable`` is given, it is called with the error for an unreadable folder, which is left out.

    Raises:
        DataError: a folder cannot be read, and ``on_unreadable`` is None.
    """
    found = []
    waiting = [str(folder)]
    while waiting:
        try:
            listed = list_folder(waiting.pop())
        except DataError as error:
            if on_unreadable is None:
                raise
            on_unreadable(error)
            continue
        found.append(listed)
        links = set(listed.links)
        waiting += [os.path.join(listed.path, name) for name in reversed(listed.folders) if name not in links]
    return sorted(found, key=lambda listed: listed.path)


def is_image(name: str) -> bool:
    """Whether a file of this name has the suffix of a format that :func:`read_image` reads."""
    return name[name.rfind(".") :].lower() in suffixes()


def find_images(folder: Path, on_unreadable: Callable[[DataError], object] | None = None) -> tuple[list[Path], list[Path]]:
    """The image files (:func:`is_image`) below ``folder`` and the other files, each sorted by folder, then by name.

    Hidden files and folders are ignored.

    Raises:
        DataError: a folder cannot be read, and ``on_unreadable`` is None as in :func:`walk`.
    """
    paths = [Path(listed.path, name) for listed in walk(folder, on_unreadable) for name in listed.files]
    return [path for path in paths if is_image(path.name)], [path for path in paths if not is_image(path.name)]


def _j2k_bits(file: BinaryIO) -> int:
    """The most bits of a channel of a JPEG 2000 file, from the SIZ segment at the begin of its codestream."""
    file.seek(0)
    data = file.read()
    file.seek(0)
    begin = data.index(b"\xff\x4f\xff\x51") + 40
    channels = int.from_bytes(data[begin : begin + 2], "big")
    return max((bits & 0x7F) + 1 for bits in data[begin + 2 : begin + 2 + 3 * channels : 3])


def _is_deep(image: Image, file: BinaryIO) -> bool:
    """Whether ``file``, opened as ``image``, has more than 8 bits a channel. Pillow may silently reduce them to 8."""
    from PIL import Jpeg2KImagePlugin, TiffImagePlugin

    if image.mode[0] in "IF":
        return True
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8
    if isinstance(image, Jpeg2KImagePlugin.Jpeg2KImageFile):
        return _j2k_bits(file) > 8
    for decoder, _, _, arguments in getattr(image, "tile", ()):
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        if any(isinstance(each, str) and _DEEP_DECODER.search(each) for each in (decoder, *arguments)):
            return True
        if decoder in ("ppm", "ppm_plain") and arguments[-1] > 255:  # the largest value
            return True
    return False


def _turn(image: Image) -> Transpose | None:
    """The transposition that turns ``image`` upright; None without a valid EXIF orientation.

    :func:`PIL.ImageOps.exif_transpose` is not used: it rewrites all EXIF tags and fails on any invalid one.
    """
    from PIL.Image import Transpose

    try:
        value = image.getexif().get(_ORIENTATION, 1)
        value = int(value[0] if isinstance(value, (bytes, tuple)) else value)
    except Exception:  # damaged EXIF does not affect the pixels
        return None
    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(value)


def _square(image: Tensor, size: int) -> Tensor:
    """Resize ``image`` (C, H, W) so that its shorter side is ``size``, and cut out the middle: (C, size, size).

    An image so narrow that the resized one would exceed :data:`_MOST_RESIZED` pixels is first cropped to the part that the
    square shows, plus at least one side of the square at either end for the filter.
    """
    from torchvision.transforms.v2.functional import center_crop, resize

    height, width = image.shape[-2:]
    short, long = min(height, width), max(height, width)
    if size * (size * long // short) > max(_MOST_RESIZED, short * long):
        kept = min(long, short * max(4, _MOST_RESIZED // size**2))
        kept -= (long - kept) % 2  # the same number of pixels is cut from either end
        image = center_crop(image, [min(height, kept), min(width, kept)])
    return center_crop(resize(image, [size], antialias=True), [size, size])


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn a RuntimeError, which PyTorch raises when memory is short, into a MemoryError."""
    try:
        yield
    except RuntimeError as error:
        raise MemoryError from error


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether ``data`` is a JPEG of three 8-bit channels, not too large, without EXIF and XMP, which could rotate it."""
    from PIL import Image

    begin = 2
    while data[begin : begin + 1] == b"\xff":
        marker, length = data[begin + 1], int.from_bytes(data[begin + 2 : begin + 4], "big")
        segment = data[begin + 4 : begin + 2 + length]
        if marker in _FRAMES:
            height, width = (int.from_bytes(segment[i : i + 2], "big") for i in (1, 3))
            return segment[0] == 8 and segment[5] == 3 and 0 < height * width <= (Image.MAX_IMAGE_PIXELS or 0)
        if marker < _FIRST_OTHER or marker == _APP1:
            return False
        begin += 2 + length
    return False


@functools.cache
def _jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    """torchvision's JPEG decoder, which 0.29 announces to remove; None where it is gone: Pillow decodes the same pixels."""
    try:
        from torchvision.io import decode_jpeg
    except ImportError:
        return None
    return decode_jpeg


def _plain_jpeg(file: BinaryIO) -> Tensor | None:
    """Decode a plain JPEG (:func:`_is_plain_jpeg`) with torchvision: uint8 (3, H, W); None for other or damaged files.

    The pixels are the same as Pillow's: both use the same library. torchvision saves a copy (benchmarks/NOTES.md, "Streams").
    For damage that still leaves an image the library writes a line to stderr.
    """
    decoder = _jpeg_decoder()
    if file.read(3) != b"\xff\xd8\xff" or decoder is None:
        file.seek(0)
        return None
    file.seek(0)
    data = file.read()
    file.seek(0)
    try:
        if _is_plain_jpeg(data):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # bytes that a tensor may not write, and that TorchCodec will do this one day
                return decoder(torch.frombuffer(data, dtype=torch.uint8))
    except (IndexError, RuntimeError):
        pass  # Pillow will raise an error with the reason
    return None


def _decode(file: BinaryIO, name: Path, channels: int, size: int) -> Tensor:
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    if channels == 3 and (pixels := _plain_jpeg(file)) is not None:
        with _memory_errors():
            return _square(pixels, size)
    with Image.open(file, formats=_formats()) as image:
        if _is_deep(image, file):
            raise DataError(
                f"{name}: pixels of more than 8 bits (Pillow's mode {image.mode}) are not supported: convert it to 8 bits"
            )
        image.load()
        turn = _turn(image)
        upright = image if turn is None else image.transpose(turn)
        with _memory_errors():
            return _square(pil_to_tensor(upright.convert(_MODES[channels])), size)


def _read(image_file: Path | bytes, name: Path, channels: int, size: int) -> Tensor:
    """:func:`read_image` of a file or of its bytes; errors name it ``name``.

    Pillow gets an open file, not a path. With a path it maps an uncompressed file into memory, and a TIFF rotated by EXIF is
    mapped with width and height exchanged, which shears its rows.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(image_file, Path):
            if image_file.exists() and not (image_file.is_file() or image_file.is_dir()):
                raise DataError(f"{name}: not a regular file")  # opening a pipe would wait for a writer
            file: BinaryIO = image_file.open("rb")
        else:
            file = io.BytesIO(image_file)
        with file, warnings.catch_warnings():
            # Pillow warns from 89 million pixels on, and refuses from twice as many on. Refuse both: no image to classify is so
            # large.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _decode(file, name, channels, size)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image, or of a format that Pillow does not know") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: too large to be decoded: {str(error).rstrip('.')}") from error
    except MemoryError as error:
        raise DataError(f"{name}: too large to be decoded: it takes more memory than there is") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error
    # What a decoder raises for damaged bytes is not documented. Any exception means a damaged file here.
    except Exception as error:
        raise DataError(f"{name}: damaged: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    return image.squeeze(0) if channels == 1 else image


def read_image(path: Path, channels: int, size: int) -> Tensor:
    """Read the image file ``path`` as in the AlexNet paper: resize its shorter side to ``size`` and cut out the middle.

    Resizing is bilinear with antialiasing, as in ``torchvision.transforms.v2.functional.resize``. The EXIF orientation is
    applied, transparency is dropped, and of an animation the first frame is used. The memory needed is a few times that of the
    file's pixels, however narrow the image is.

    Args:
        path: a file of any format that Pillow decodes without another program. EPS needs one.
        channels: 1 converts the image to grey, 3 to red, green, blue.
        size: side of the square returned.

    Returns:
        uint8 (size, size) for one channel, (3, size, size) for three.

    Raises:
        DataError: the file does not exist, is unreadable, damaged or no image, has more than 8 bits a channel (including 16-bit
            grey and 48-bit RGB, whose white is not always 65,535; only AVIF's 10 and 12 bits are reduced to 8, by its decoder),
            has more pixels than Pillow takes to be safe (89 million), or needs more memory than is left.
    """
    return _read(path, path, channels, size)


def decode_image(data: bytes, name: Path, channels: int, size: int) -> Tensor:
    """:func:`read_image` of ``data``, the bytes of a file; errors name it ``name``."""
    return _read(data, name, channels, size)


def read_images(paths: list[Path], channels: int, size: int) -> tuple[Tensor, list[Path], list[DataError]]:
    """:func:`read_image` of each of ``paths``; return one tensor of the readable images, their paths, and the other errors."""
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
