"""Images in tar shards as WebDataset writes them: for each image a member ``KEY.jpg`` and its label, a member ``KEY.cls``.

At the start the headers of all shards are read once, without the images, to build an index of all members. The package
``webdataset`` expands the names of shards and splits a member's name into key and suffix. It has no index for reading single
images, and Python's ``tarfile`` creates an object for each member. So this module parses the headers itself.
"""

from __future__ import annotations

import copy
import functools
import glob
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .dataset import DataError, expand
from .fashion_mnist import holds_idx
from .image_files import decode_image, is_hidden, suffixes
from .sources import Names
from .splits import TESTS, TRAIN, Parts

#: Default size of the shuffle buffer, in images.
BUFFER = 10_000

#: Bytes of a block of a tar file.
_BLOCK = 512

#: Bytes per read of headers: enough for a label with its header and the header of the next image.
_WINDOW = 4096

#: The most bytes that are read of a member other than an image. A label has a few digits; JSON and long names may have more.
_LONGEST = 1 << 20

#: File beside the shards with the class names, one per line.
CLASSES = "classes.txt"


def _number(field: bytes) -> int:
    """Decode a number of a tar header: octal digits, or binary if the first bit is set."""
    return int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)


def _parse(header: bytes) -> tuple[bytes, bytes, int]:
    """Parse a tar header; return the member's type flag, name and length.

    Raises:
        ValueError: ``header`` is no tar header, or a damaged one.
    """
    if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:  # the checksum's own bytes count as spaces
        raise ValueError("sum")
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return header[156:157], name, _number(header[124:136])


def _records(body: bytes) -> dict[bytes, bytes]:
    """Parse the records of a POSIX extended header, each of the form ``LENGTH NAME=VALUE`` and a newline.

    Raises:
        ValueError: the records are damaged.
    """
    found = {}
    while body:
        length = int(body.partition(b" ")[0])
        if not 0 < length <= len(body):
            raise ValueError("length")
        name, _, value = body[:length].partition(b" ")[2].removesuffix(b"\n").partition(b"=")
        found[name], body = value, body[length:]
    return found


class _Tar:
    """A tar file of ``size`` bytes, open as the file descriptor ``file``."""

    def __init__(self, path: Path, file: int, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._window, self._begin = b"", 0

    def read(self, begin: int, length: int) -> bytes:
        """Read ``length`` bytes from ``begin``, or fewer at the end of the file."""
        if not self._begin <= begin <= begin + length <= self._begin + len(self._window):
            self._window, self._begin = os.pread(self._file, max(length, _WINDOW), begin), begin
        return self._window[begin - self._begin : begin - self._begin + length]

    def members(self) -> Iterator[tuple[str, int, int]]:
        """Yield (name, offset, length) of each member that is a regular file.

        Raises:
            DataError: the file is no tar file, or ends early.
        """
        begin, place = 0, "at its beginning"
        more: dict[bytes, bytes] = {}  # a long name or a length, from extended headers before the member's own
        while True:
            header = self.read(begin, _BLOCK)
            if len(header) < _BLOCK:
                raise DataError(f"{self._path}: the shard ends early, {place}: it has no end mark")
            if not any(header):
                return
            begin += _BLOCK
            try:
                kind, name, length = _parse(header)
                if kind in (b"L", b"x"):  # extended headers of GNU and POSIX
                    body = self.read(begin, min(length, _LONGEST))
                    more |= {b"path": body.rstrip(b"\0")} if kind == b"L" else _records(body)
                else:
                    name, length, more = more.get(b"path", name), int(more.get(b"size", length)), {}
                if length < 0:
                    raise ValueError("length")
            except ValueError as error:
                compressed = ": it is compressed, and no image can be read alone: decompress it"
                why = compressed if header.startswith(b"\x1f\x8b") else f": no header {place}"
                raise DataError(f"{self._path}: not a tar file, or a damaged one{why}") from error
            member = os.fsdecode(name)
            if begin + length > self._size:
                raise DataError(f"{self._path}: {member}: the shard ends early, in this member")
            if kind in (b"0", b"\0"):
                yield member, begin, length
                place = f"behind {member}"
            begin += -(-length // _BLOCK) * _BLOCK


def _label(path: Path, member: str, text: bytes) -> int:
    """Parse the label in ``text``, the content of ``member``: a number, or in JSON the value of ``label``.

    Raises:
        DataError: there is no such label.
    """
    try:
        if member.lower().endswith(".json"):
            label = json.loads(text)["label"]
            if type(label) is not int:
                raise ValueError("type")
        else:
            label = int(text)
        if not 0 <= label < 1 << 31:
            raise ValueError("range")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        shown = f"{text[:20]!r}{'...' * (len(text) > 20)}"
        raise DataError(f"{path}: {member}: holds no label, a whole number from 0 on: {shown}") from error
    return label


#: An image of a shard: (name, offset, length, label).
_Image = tuple[str, int, int, int]


def _image(path: Path, key: str, parts: dict[str, tuple[str, int, int, bytes]]) -> _Image | None:
    """The image among ``parts``, the members of one key by suffix; None if they are neither image nor label.

    Raises:
        DataError: an image has no label or a label no image, a label cannot be read, or there are several images.
    """
    images = [member for suffix, member in parts.items() if f".{suffix}" in suffixes()]
    label = parts.get("cls") or (parts.get("json") if images else None)
    if len(images) > 1:
        raise DataError(f"{path}: {key}: several images of one key, {images[0][0]} and {images[1][0]}")
    if not images:
        if label is not None:
            raise DataError(f"{path}: {label[0]}: a label without an image {key}.jpg, or with another suffix")
        if other := next((name for name, *_ in parts.values() if Path(name).suffix.lower() in suffixes()), None):
            raise DataError(f"{path}: {other}: an image whose name has several dots: the key ends at the first, {key}")
        return None
    if label is None:
        raise DataError(f"{path}: {images[0][0]}: an image without a label: no {key}.cls, nor {key}.json")
    name, begin, length, _ = images[0]
    return name, begin, length, _label(path, label[0], label[3])


def _index(path: Path, split: Callable[[str], tuple[str | None, str]]) -> list[_Image]:
    """The images of the shard ``path``, in its order; ``split`` splits a member's name into key and suffix.

    Raises:
        DataError: as :class:`Shards`.
    """

    def members(tar: _Tar) -> Iterator[tuple[str, str, tuple[str, int, int, bytes]]]:
        for name, begin, length in tar.members():
            key, suffix = split(name)
            if key is not None:
                suffix = suffix.lower()
                text = tar.read(begin, min(length, _LONGEST)) if suffix in ("cls", "json") else b""
                yield key, suffix, (name, begin, length, text)

    try:
        if not path.is_file():
            raise DataError(f"{path}: {'not a regular' if path.exists() else 'no such'} file")
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead: it would read the skipped images
            tar = _Tar(path, file.fileno(), os.fstat(file.fileno()).st_size)
            images = []
            for key, group in itertools.groupby(members(tar), key=lambda member: member[0]):
                parts: dict[str, tuple[str, int, int, bytes]] = {}
                for _, suffix, member in group:
                    if suffix in parts:
                        raise DataError(f"{path}: {member[0]}: twice in one shard")
                    parts[suffix] = member
                if image := _image(path, key, parts):
                    images.append(image)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not images:
        raise DataError(f"{path}: no image in it: WebDataset writes KEY.jpg and, with its label, KEY.cls")
    return images


def _webdataset() -> tuple[Callable[[str], list[str]], Callable[[str], tuple[str | None, str]]]:
    """Two functions of the package ``webdataset``: to expand names of shards, and to split a name into key and suffix.

    Raises:
        DataError: the package is not installed.
    """
    try:
        from webdataset.shardlists import expand_urls
        from webdataset.tariterators import base_plus_ext
    except ImportError as error:
        raise DataError(f"tar shards need the package webdataset ({error}): pip install 'alexnet-triton[stream]'") from error
    return expand_urls, base_plus_ext


class Shards:
    """A :class:`.sources.Source` of the images of tar shards. Each image is read by itself, at the offset in an index.

    A member ``KEY.jpg``, or with another suffix of :func:`.image_files.suffixes`, is an image. Its label is the number in
    ``KEY.cls``, or else the value of ``label`` in ``KEY.json``. The key ends at the first dot. Other members are ignored.

    Args:
        paths: paths of the shards.
        buffer: size of the shuffle buffer of :meth:`order`, in images.
        classes: class names in the order of the labels; None: there are no names.

    Attributes:
        labels: int64 (N,), on the CPU.

    Raises:
        DataError: ``webdataset`` is not installed; a shard does not exist, is no tar file, is compressed, has no images or ends
            early; an image has no label or a label no image; a label is no number; ``buffer`` is less than 1.
    """

    def __init__(self, paths: Sequence[Path], buffer: int = BUFFER, classes: tuple[str, ...] | None = None) -> None:
        if buffer < 1:
            raise DataError(f"the buffer of shards must hold 1 image or more, got {buffer}")
        self.classes, self._paths, self._buffer = classes, list(paths), buffer
        _, split = _webdataset()
        names: list[str] = []
        places: list[np.ndarray] = []
        for shard, path in enumerate(self._paths):
            found = _index(path, split)
            names += [name for name, *_ in found]
            places.append(np.array([(shard, *place) for _, *place in found], dtype=np.int64))
        self._names = Names(names)
        self._shards, self._begins, self._lengths, labels = np.concatenate(places).T.copy()
        self.labels = torch.from_numpy(labels)
        self._rows = np.arange(len(names))  # this source's images, as rows of the index

    def __len__(self) -> int:
        return len(self._rows)

    def _path(self, index: int) -> Path:
        return self._paths[self._shards[self._rows[index]]]

    def key(self, index: int) -> str:
        """The member's name of image ``index``, which does not depend on the shard that holds it."""
        return self._names[int(self._rows[index])]

    def name(self, index: int) -> Path:
        """As :meth:`.sources.Source.name`: the shard, a colon and the member."""
        return Path(f"{self._path(index)}: {self.key(index)}")

    def read(self, index: int, channels: int, size: int) -> Tensor:
        """As :meth:`.sources.Source.read`. The shard is opened for each image: forks would share an open file's position."""
        row, name = self._rows[index], self.name(index)
        try:
            with self._path(index).open("rb") as file:
                file.seek(self._begins[row])
                data = file.read(self._lengths[row])
        except FileNotFoundError as error:
            raise DataError(f"{name}: the shard no longer exists") from error
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror}") from error
        if len(data) < self._lengths[row]:
            raise DataError(f"{name}: the shard ends early, in this member: it has become shorter")
        return decode_image(data, name, channels, size)

    def order(self, generator: torch.Generator) -> Tensor:
        """As :meth:`.sources.Source.order`: the shards are shuffled, and their images pass through a shuffle buffer.

        The first images fill the buffer. Each further image replaces the one at a random place of the buffer, which comes next
        in the order. The images left in the buffer come last, shuffled.
        """
        device, count = generator.device, len(self)
        rank = torch.randperm(len(self._paths), generator=generator, device=device)
        arrivals = rank[torch.from_numpy(self._shards[self._rows]).to(device)].argsort(stable=True)
        room = min(self._buffer, count)
        drawn = torch.randint(room, (count - room,), generator=generator, device=device)
        places = torch.cat((torch.arange(room, device=device), drawn))
        by_place = places.argsort(stable=True)  # groups the images of a place; each image releases the one before it
        follows = torch.cat((places[by_place].diff() == 0, torch.zeros(1, dtype=torch.bool, device=device)))
        order = torch.empty(count, dtype=torch.int64, device=device)
        order[by_place[1:][follows[:-1]] - room] = by_place[follows]
        order[count - room :] = by_place[~follows][torch.randperm(room, generator=generator, device=device)]
        return arrivals[order]

    def checksum(self) -> int:
        """As :meth:`.sources.Source.checksum`."""
        checksum = zlib.crc32("\n".join(path.name for path in self._paths).encode(errors="surrogateescape"))
        for numbers in (self._rows, self._shards, self.labels.numpy()):
            checksum = zlib.crc32(numbers.tobytes(), checksum)
        return self._names.checksum(checksum)

    def subset(self, keep: Tensor) -> Shards:
        """As :meth:`.sources.Source.subset`. Both sources share one index."""
        part = copy.copy(self)
        part._rows, part.labels = self._rows[keep.numpy()], self.labels[keep]
        return part


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not is_hidden(path.name))


def is_shards(data: str | Path | None) -> bool:
    """Whether ``data`` names tar files, or is a folder with tar files, no folders and none of Fashion-MNIST's files.

    Raises:
        DataError: ``data`` begins with ``~`` of an unknown user.
    """
    if data is None:
        return False
    if str(data).endswith(".tar"):
        return True
    folder = expand(data)
    if not folder.is_dir() or not _tars(folder) or holds_idx(folder):
        return False
    return not any(path.is_dir() and not is_hidden(path.name) for path in folder.iterdir())


def _is_part(path: Path, name: str) -> bool:
    """Whether ``name`` is a word of a shard's name, as ``train`` is in ``train-000.tar`` and ``imagenet_train_000.tar``."""
    return name in path.stem.replace("_", "-").replace(".", "-").split("-")


def _test_shards(paths: Sequence[Path]) -> list[Path]:
    return next((found for name in TESTS if (found := [path for path in paths if _is_part(path, name)])), [])


def _read_classes(path: Path) -> tuple[str, ...] | None:
    """The class names in the file ``path``, one per line; None if there is no such file.

    Raises:
        DataError: the file cannot be read, names no class, or names one twice.
    """
    if not path.exists():
        return None
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(set(names)) < max(len(names), 1):
        raise DataError(f"{path}: names no class, or names one twice")
    return names


def find_shards(data: str | Path, buffer: int = BUFFER) -> Parts:
    """Find the shards that ``data`` names, to be opened by :func:`.splits.open_sources`.

    Args:
        data: shards such as ``dir/train-{000000..000127}.tar`` or ``dir/train-*.tar``, or their folder. Shards with a word of
            :data:`.splits.TESTS` in their names are test images. If ``data`` names no such shards, those beside the named ones
            are the test images. If ``data`` is a folder with shards that have ``train`` in their names, only these are
            training images. The class names are the lines of ``classes.txt`` beside the shards, else the label numbers.
        buffer: as for :class:`Shards`.

    Raises:
        DataError: there are no shards, ``webdataset`` is not installed, or ``classes.txt`` cannot be read.
    """
    expand_urls, _ = _webdataset()
    if "://" in str(data) or str(data).startswith("pipe:"):
        raise DataError(f"{data}: shards are read from a disk: download them first")
    found = expand(data)
    if found.is_dir():
        given = _tars(found)
    else:
        try:
            named = expand_urls(str(found))
        except (ValueError, AssertionError) as error:  # unbalanced braces, and ${NAME} of an unset variable
            raise DataError(f"{data}: names no shards: {error}") from error
        given = [Path(path) for name in named for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    if not given:
        raise DataError(f"{data}: there are no such shards")
    folder = given[0].parent
    train = [path for path in given if not any(_is_part(path, name) for name in TESTS)]
    if found.is_dir() and any(_is_part(path, TRAIN) for path in train):
        train = [path for path in train if _is_part(path, TRAIN)]
    test = _test_shards(given) or _test_shards(_tars(folder))
    classes = _read_classes(folder / CLASSES)
    return Parts(
        folder,
        f"name all classes, one a line, in {folder / CLASSES}",
        functools.partial(Shards, train, buffer, classes) if train else None,
        functools.partial(Shards, test, buffer, classes) if test else None,
    )
