"""Images in tar files, as WebDataset writes them: of each image a member ``KEY.jpg`` and one ``KEY.cls``, its label.

Reading needs an index of all members: the shards' headers are read once, at the start, and the images are passed over. The
package ``webdataset`` expands the names of shards and divides a member's name into key and suffix. It has no index by which
an image can be read alone, and Python's ``tarfile`` makes an object of each member: the headers are read here.
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

#: Images among which the next one is drawn.
BUFFER = 10_000

#: A tar file is made of blocks of so many bytes.
_BLOCK = 512

#: Bytes that are read at a time: a label with its header, and the header of the image behind it.
_WINDOW = 4096

#: The longest member that is no image and read: a label has a few digits, JSON and a long name of the tar format may have more.
_LONGEST = 1 << 20

#: File with the names of the classes, one a line, beside the shards.
CLASSES = "classes.txt"


def _number(field: bytes) -> int:
    """A number of a tar header: octal digits, or binary where the first bit is set."""
    return int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)


def _parse(header: bytes) -> tuple[bytes, bytes, int]:
    """A member's kind, name and length.

    Raises:
        ValueError: it is no tar header, or a damaged one.
    """
    if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:  # its own eight bytes count as spaces
        raise ValueError("sum")
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return header[156:157], name, _number(header[124:136])


def _records(body: bytes) -> dict[bytes, bytes]:
    """The records of a POSIX header that belongs to the next member: each is ``LENGTH NAME=VALUE`` and a line's end.

    Raises:
        ValueError: they are damaged.
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
    """A tar file that is open as ``file``, ``size`` bytes long."""

    def __init__(self, path: Path, file: int, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._window, self._begin = b"", 0

    def read(self, begin: int, length: int) -> bytes:
        """Bytes of the file; fewer where it ends."""
        if not self._begin <= begin <= begin + length <= self._begin + len(self._window):
            self._window, self._begin = os.pread(self._file, max(length, _WINDOW), begin), begin
        return self._window[begin - self._begin : begin - self._begin + length]

    def members(self) -> Iterator[tuple[str, int, int]]:
        """Of each regular file its name, where it begins, its length.

        Raises:
            DataError: no tar file, or one that ends early.
        """
        begin, place = 0, "at its begin"
        more: dict[bytes, bytes] = {}  # what headers before a member's own say of it: a long name, a length
        while True:
            header = self.read(begin, _BLOCK)
            if len(header) < _BLOCK:
                raise DataError(f"{self._path}: the shard ends early, {place}: it has no end mark")
            if not any(header):
                return
            begin += _BLOCK
            try:
                kind, name, length = _parse(header)
                if kind in (b"L", b"x"):  # of GNU and POSIX
                    body = self.read(begin, min(length, _LONGEST))
                    more |= {b"path": body.rstrip(b"\0")} if kind == b"L" else _records(body)
                else:
                    name, length, more = more.get(b"path", name), int(more.get(b"size", length)), {}
                if length < 0:
                    raise ValueError("length")
            except ValueError as error:
                compressed = ": it is compressed, and no image can be read alone: decompress it"
                why = compressed if header.startswith(b"\x1f\x8b") else f": no header {place}"
                raise DataError(f"{self._path}: no tar file, or a damaged one{why}") from error
            member = os.fsdecode(name)
            if begin + length > self._size:
                raise DataError(f"{self._path}: {member}: the shard ends early, in this member")
            if kind in (b"0", b"\0"):
                yield member, begin, length
                place = f"behind {member}"
            begin += -(-length // _BLOCK) * _BLOCK


def _label(path: Path, member: str, text: bytes) -> int:
    """The label that a member ``text`` holds: a number, in JSON that of the name ``label``.

    Raises:
        DataError: it holds none.
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
        raise DataError(f"{path}: {member}: no label in it, a whole number from 0 on: {shown}") from error
    return label


#: Of an image its name, where it begins, its length, its label.
_Image = tuple[str, int, int, int]


def _image(path: Path, key: str, parts: dict[str, tuple[str, int, int, bytes]]) -> _Image | None:
    """The image among the members of one key, by suffix; None where they are neither image nor label.

    Raises:
        DataError: an image without a label or a label without an image, a label that cannot be read, several images.
    """
    images = [member for suffix, member in parts.items() if f".{suffix}" in suffixes()]
    label = parts.get("cls") or (parts.get("json") if images else None)
    if len(images) > 1:
        raise DataError(f"{path}: {key}: several images of one key, {images[0][0]} and {images[1][0]}")
    if not images:
        if label is not None:
            raise DataError(f"{path}: {label[0]}: a label without an image {key}.jpg, or of another suffix")
        if other := next((name for name, *_ in parts.values() if Path(name).suffix.lower() in suffixes()), None):
            raise DataError(f"{path}: {other}: an image whose name has several dots: the key ends at the first, {key}")
        return None
    if label is None:
        raise DataError(f"{path}: {images[0][0]}: an image without a label: no {key}.cls, nor {key}.json")
    name, begin, length, _ = images[0]
    return name, begin, length, _label(path, label[0], label[3])


def _index(path: Path, split: Callable[[str], tuple[str | None, str]]) -> list[_Image]:
    """The images of one shard, in its order; ``split`` makes key and suffix of a member's name.

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
            raise DataError(f"{path}: no {'regular' if path.exists() else 'such'} file")
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # else what is passed over is read, too
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
    """Of the package ``webdataset`` what expands the names of shards, and what makes key and suffix of a member's name.

    Raises:
        DataError: it is not installed.
    """
    try:
        from webdataset.shardlists import expand_urls
        from webdataset.tariterators import base_plus_ext
    except ImportError as error:
        raise DataError(f"tar shards need the package webdataset ({error}): pip install 'alexnet-triton[stream]'") from error
    return expand_urls, base_plus_ext


class Shards:
    """The images of tar files, a :class:`.sources.Source`: each is read alone, at the place that an index says.

    A member ``KEY.jpg``, or of another suffix that :func:`.image_files.suffixes` has, is an image. Its label is the number in
    ``KEY.cls`` or else that of the name ``label`` in ``KEY.json``. The key ends at the first dot. The other members are no part
    of it.

    Args:
        paths: of the shards.
        buffer: images among which :meth:`order` draws the next one.
        classes: the names of the labels; None: nobody names them.

    Attributes:
        labels: int64 (N,), on the CPU.

    Raises:
        DataError: ``webdataset`` is not installed; a shard that is not there, no tar file, compressed, without images, or that
            ends early; an image without a label or a label without an image; a label that is no number; a ``buffer`` of none.
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
        self._rows = np.arange(len(names))  # of all images, the ones of this source

    def __len__(self) -> int:
        return len(self._rows)

    def _path(self, index: int) -> Path:
        return self._paths[self._shards[self._rows[index]]]

    def key(self, index: int) -> str:
        """The member that is image ``index``: the same whichever shard has it."""
        return self._names[int(self._rows[index])]

    def name(self, index: int) -> Path:
        """As :meth:`.sources.Source.name`: the shard, a colon and the member."""
        return Path(f"{self._path(index)}: {self.key(index)}")

    def read(self, index: int, channels: int, size: int) -> Tensor:
        """As :meth:`.sources.Source.read`. The shard is opened for each image: forked processes share no file's position."""
        row, name = self._rows[index], self.name(index)
        try:
            with self._path(index).open("rb") as file:
                file.seek(self._begins[row])
                data = file.read(self._lengths[row])
        except FileNotFoundError as error:
            raise DataError(f"{name}: the shard is not there any more") from error
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror}") from error
        if len(data) < self._lengths[row]:
            raise DataError(f"{name}: the shard ends early, in this member: it has become shorter")
        return decode_image(data, name, channels, size)

    def order(self, generator: torch.Generator) -> Tensor:
        """As :meth:`.sources.Source.order`: the shards shuffled, their images, one shard behind the other, through a buffer.

        The buffer's places are filled in their order. Then each image takes a place that is drawn, and the image that was
        there is the next one. In the end those in the buffer come, shuffled.
        """
        device, count = generator.device, len(self)
        rank = torch.randperm(len(self._paths), generator=generator, device=device)
        arrivals = rank[torch.from_numpy(self._shards[self._rows]).to(device)].argsort(stable=True)
        room = min(self._buffer, count)
        drawn = torch.randint(room, (count - room,), generator=generator, device=device)
        places = torch.cat((torch.arange(room, device=device), drawn))
        by_place = places.argsort(stable=True)  # the images of a place follow each other: the later sends the earlier on
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
        """As :meth:`.sources.Source.subset`. Both have the same index."""
        part = copy.copy(self)
        part._rows, part.labels = self._rows[keep.numpy()], self.labels[keep]
        return part


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not is_hidden(path.name))


def is_shards(data: str | Path | None) -> bool:
    """Whether ``data`` names tar files, or is a folder of tar files with no folders and none of Fashion-MNIST's files in it.

    Raises:
        DataError: ``data`` begins with the home of a user that there is not.
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
    """Whether ``name`` is in the name of a shard, as in ``train-000.tar`` and ``imagenet_train_000.tar``."""
    return name in path.stem.replace("_", "-").replace(".", "-").split("-")


def _test_shards(paths: Sequence[Path]) -> list[Path]:
    return next((found for name in TESTS if (found := [path for path in paths if _is_part(path, name)])), [])


def _read_classes(path: Path) -> tuple[str, ...] | None:
    """The lines of ``path``; None where there is no such file."""
    if not path.exists():
        return None
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(set(names)) < max(len(names), 1):
        raise DataError(f"{path}: names no class, or one twice")
    return names


def find_shards(data: str | Path, buffer: int = BUFFER) -> Parts:
    """The shards that ``data`` names, to be opened by :func:`.splits.open_sources`.

    Args:
        data: shards such as ``dir/train-{000000..000127}.tar``, or ``dir/train-*.tar``, or the folder. Those that one of
            :data:`.splits.TESTS` is in the names of are for the test; without any among them, such shards beside them. Of a
            folder that has shards with ``train`` in their names, no others are trained on. The classes are called by
            the lines of ``classes.txt`` beside the shards, else by the numbers of the labels.
        buffer: that of :class:`Shards`.

    Raises:
        DataError: no shards; ``webdataset`` is not installed; a ``classes.txt`` that cannot be read.
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
        except (ValueError, AssertionError) as error:  # of braces that do not match, and of ${NAME} without such a variable
            raise DataError(f"{data}: names no shards: {error}") from error
        given = [Path(path) for name in named for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    if not given:
        raise DataError(f"{data}: no shards there")
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
