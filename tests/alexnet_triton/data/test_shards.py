"""Tar shards: a folder's images, read from shards that WebDataset wrote; their order; all errors."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from alexnet_triton.data import splits
from alexnet_triton.data.dataset import DataError
from alexnet_triton.data.image_files import decode_image, read_image
from alexnet_triton.data.image_folder import _list_halves
from alexnet_triton.data.shards import Shards, find_shards, is_shards
from alexnet_triton.data.sources import Source
from alexnet_triton.data.splits import open_sources, open_test

from .test_image_folder import COLOURS, write_folder

Members = Sequence[tuple[str, bytes]]


def picture(value: int = 0, side: int = 4) -> bytes:
    """A PNG file whose pixels all are ``value``."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value, value, value)).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, members: Members, form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_plain(path: Path, labels: Sequence[int], first: int = 0) -> Path:
    """Write a shard with one image per label; the pixels of an image are its number, counted from ``first``, modulo 256."""
    members = []
    for i, label in enumerate(labels, first):
        members += [(f"k{i:04}.cls", b"%d" % label), (f"k{i:04}.png", picture(i % 256))]
    return write_tar(path, members)


def shards_of(folder: Path, out: Path, count: int = 3) -> list[Path]:
    """Write the images of a folder of classes by WebDataset; image i of the sorted paths is in shard i % ``count``."""
    webdataset = pytest.importorskip("webdataset")
    paths = sorted(folder.glob("*/*"))
    classes = sorted(COLOURS)
    out.mkdir(exist_ok=True)
    shards = [out / f"{folder.name}-{i:03}.tar" for i in range(count)]
    for i, shard in enumerate(shards):
        with webdataset.TarWriter(str(shard)) as writer:
            for path in paths[i::count]:
                key = f"{path.parent.name}/{path.stem}"
                writer.write({"__key__": key, "png": path.read_bytes(), "cls": classes.index(path.parent.name)})
    (out / "classes.txt").write_text("\n".join(classes) + "\n")
    return shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    """A folder of shards with the images of ``folder``."""
    out = folder.parent / "shards"
    shards_of(folder / "train", out)
    shards_of(folder / "test", out, 2)
    return out


def assert_same(source: Source, folder: Path) -> None:
    """Assert that ``source`` holds the images and labels of a folder of classes, in any order."""
    classes = sorted(COLOURS)
    members = [str(source.name(i)).partition(": ")[2] for i in range(len(source))]
    assert sorted(members) == sorted(str(path.relative_to(folder)) for path in folder.glob("*/*"))
    for i, member in enumerate(members):
        assert torch.equal(source.read(i, 3, 20), read_image(folder / member, 3, 20))
        assert torch.equal(source.read(i, 1, 20), read_image(folder / member, 1, 20))
        assert classes[int(source.labels[i])] == member.partition("/")[0]


@pytest.mark.parametrize("data", ["", "train-{000..002}.tar", "train-*.tar", "{train,test}-00{0..1}.tar"])
def test_the_images_of_a_folder(data: str, folder: Path, shards: Path) -> None:
    assert is_shards(shards / data)
    found = open_sources(find_shards(shards / data))
    assert (found.classes, found.folder, found.name) == (tuple(sorted(COLOURS)), shards, "shards")
    assert_same(found.test, folder / "test")
    if data.startswith("{train,test}"):
        assert len(found.train) == 16  # two of three shards, 16 of 24 images
    else:
        assert_same(found.train, folder / "train")
    assert found.train.name(0) == Path(f"{shards}/train-000.tar: brick/00.png")
    assert_same(open_test(find_shards(shards / data), found.classes), folder / "test")
    assert_same(open_test(find_shards(shards / "test-{000..001}.tar"), found.classes), folder / "test")


def test_validation_takes_what_it_takes_of_a_folder(folder: Path, tmp_path: Path) -> None:
    shards_of(folder / "train", tmp_path)
    _, test, classes, *_ = found = open_sources(find_shards(tmp_path), 0.25, seed=3)
    for source, listing in zip(found[:2], _list_halves(_only_train(folder, tmp_path), None, 0.25, 3, print), strict=True):
        keys = {str(source.name(i)).partition(": ")[2] for i in range(len(source))}
        assert keys == set(listing.names)
    again = open_test(find_shards(tmp_path), classes, 0.25, seed=3)
    assert again.checksum() == test.checksum() != open_test(find_shards(tmp_path), classes, 0.25, seed=4).checksum()


def _only_train(folder: Path, out: Path) -> Path:
    (out / "link").mkdir()
    os.symlink(folder / "train", out / "link" / "colours")
    return out / "link" / "colours"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_forms_of_tar(form: int, tmp_path: Path) -> None:
    long = "a/" * 70 + "b" * 90
    names = [long, "Grüße", "./d.ir/c"]
    members = [member for i, name in enumerate(names) for member in ((f"{name}.PNG", picture(i)), (f"{name}.cls", b"%d\n" % i))]
    others = [("README", b"x" * 5000), ("c.txt", b"no part"), ("._c.png", b"nor this")]
    path = write_tar(tmp_path / "a.tar", [*others[:1], *members, *others[1:]], form)
    with tarfile.open(path, "a", format=form) as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("other.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    source = Shards([path])
    assert source.labels.tolist() == [0, 1, 2]
    for i, name in enumerate(names):
        assert source.key(i) == f"{name}.PNG"
        assert (source.read(i, 1, 4) == i).all()


def test_a_label_is_in_cls_or_else_in_json(tmp_path: Path) -> None:
    text = json.dumps({"label": 7, "url": "u" * 9000}).encode()
    members = [("a.jpg", b""), ("a.json", text), ("b.cls", b"3"), ("b.jpg", b""), ("b.json", text), ("c.json", b"{}")]
    assert Shards([write_tar(tmp_path / "a.tar", members)]).labels.tolist() == [7, 3]


def test_bytes_are_decoded_as_their_file_is(tmp_path: Path) -> None:
    for suffix, mode in (("jpg", "RGB"), ("webp", "RGB"), ("jp2", "RGB"), ("tif", "L"), ("png", "RGBA"), ("gif", "P")):
        path = tmp_path / f"a.{suffix}"
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.linear_gradient("L").resize((30, 20)).convert(mode).save(path, **({} if suffix == "gif" else {"exif": exif}))
        for channels in (1, 3):
            assert torch.equal(decode_image(path.read_bytes(), path, channels, 16), read_image(path, channels, 16))
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.jp2")
    with pytest.raises(DataError, match=r"^x: y: pixels of more than 8 bits"):
        decode_image((tmp_path / "deep.jp2").read_bytes(), Path("x: y"), 1, 8)


def test_order_is_a_permutation_by_shards_and_a_buffer(tmp_path: Path) -> None:
    paths = [write_plain(tmp_path / f"{i}.tar", [0, 1] * 20, 40 * i) for i in range(5)]

    def order(buffer: int, seed: int = 1) -> torch.Tensor:
        return Shards(paths, buffer).order(torch.Generator().manual_seed(seed))

    for buffer in (1, 2, 7, 64, 199, 200, 10_000):
        assert order(buffer).sort().values.tolist() == list(range(200)), buffer
        assert torch.equal(order(buffer), order(buffer))
        assert not torch.equal(order(buffer), order(buffer, 2))
    by_shard = order(1).view(5, 40)
    assert torch.equal(by_shard.diff(dim=1), torch.ones(5, 39, dtype=torch.int64))  # a buffer of 1 keeps a shard's order
    assert sorted(by_shard[:, 0].tolist()) == list(range(0, 200, 40)) != by_shard[:, 0].tolist()
    ranks = torch.empty(200, dtype=torch.int64)
    ranks[by_shard.flatten()] = torch.arange(200)
    for buffer in (7, 64):  # an image cannot come before it is in the buffer
        early = ranks[order(buffer)] - torch.arange(200)
        assert early.max() == buffer - 1
        assert (early < -buffer).any()  # some images stay long in the buffer
    assert len(set((order(64) // 40)[:40].tolist())) > 1  # shards mix


def test_order_is_that_of_a_buffer_filled_step_by_step(tmp_path: Path) -> None:
    source = Shards([write_plain(tmp_path / f"{i}.tar", [0, 1] * 15, 30 * i) for i in range(3)], buffer=16)
    generator = torch.Generator().manual_seed(5)
    rank = torch.randperm(3, generator=generator)
    arrivals = sorted(range(90), key=lambda i: int(rank[i // 30]))
    places, expected = arrivals[:16], []
    for image, place in zip(arrivals[16:], torch.randint(16, (74,), generator=generator).tolist(), strict=True):
        expected.append(places[place])
        places[place] = image
    expected += [places[i] for i in torch.randperm(16, generator=generator).tolist()]
    assert source.order(torch.Generator().manual_seed(5)).tolist() == expected


def test_a_subset_keeps_its_order(tmp_path: Path) -> None:
    source = Shards([write_plain(tmp_path / f"{i}.tar", [0, 1] * 5, 10 * i) for i in range(3)])
    part = source.subset(torch.tensor([25, 3, 14, 8])).subset(torch.tensor([0, 1, 2]))
    assert [int(part.read(i, 1, 4)[0, 0]) for i in range(3)] == [25, 3, 14]
    assert part.labels.tolist() == [1, 1, 0]
    assert part.name(1) == source.name(3)
    assert sorted(part.order(torch.Generator().manual_seed(1)).tolist()) == [0, 1, 2]
    assert part.checksum() != source.checksum() == Shards([tmp_path / f"{i}.tar" for i in range(3)]).checksum()


def read_in_processes(source: Source, count: int = 4) -> None:
    """Assert that forked processes can read all images at the same time, each in another order."""
    expected = torch.stack([source.read(i, 3, 8) for i in range(len(source))])

    def work(offset: int) -> None:
        numbers = [(i + 7 * offset) % len(source) for i in range(len(source))] * 3
        os._exit(not all(torch.equal(source.read(i, 3, 8), expected[i]) for i in numbers))

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(i,)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count


def test_forked_processes_read_the_same_shard(tmp_path: Path) -> None:
    read_in_processes(Shards([write_plain(tmp_path / "a.tar", [0, 1] * 20)]))


NO_LABEL = "holds no label, a whole number from 0 on"
GOOD: Members = (("a.cls", b"0"), ("a.png", picture(1)), ("b.cls", b"1"), ("b.png", picture(2)))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((*GOOD, ("c.png", b"")), "c.png: an image without a label: no c.cls, nor c.json"),
        ((("a.cls", b"0"), ("b.png", b""), ("a.png", b"")), "a.cls: a label without an image a.jpg, or with another suffix"),
        ((*GOOD, ("c.cls", b"cat"), ("c.png", b"")), f"c.cls: {NO_LABEL}: b'cat'"),
        ((*GOOD, ("c.cls", b"-1"), ("c.png", b"")), f"c.cls: {NO_LABEL}: b'-1'"),
        ((*GOOD, ("c.cls", b"7" * 30), ("c.png", b"")), f"c.cls: {NO_LABEL}: {b'7' * 20!r}..."),
        ((*GOOD, ("c.json", b'{"label": 1.5}'), ("c.png", b"")), f"c.json: {NO_LABEL}: b'{{\"label\": 1.5}}'"),
        ((*GOOD, ("c.json", b'{"cls": 1}'), ("c.png", b"")), f"c.json: {NO_LABEL}: b'{{\"cls\": 1}}'"),
        ((*GOOD, ("c.json", b"[" * 100_000), ("c.png", b"")), f"c.json: {NO_LABEL}: {b'[' * 20!r}..."),
        ((*GOOD, ("c.cls", b"0"), ("c.png", b""), ("c.jpg", b"")), "c: several images of one key, c.png and c.jpg"),
        ((*GOOD, ("c.cls", b"0"), ("c.png", b""), ("c.PNG", b"")), "c.PNG: twice in one shard"),
        ((*GOOD, ("my.dog.png", b"")), "my.dog.png: an image whose name has several dots: the key ends at the first, my"),
        ((("a.txt", b""),), "no image in it: WebDataset writes KEY.jpg and, with its label, KEY.cls"),
    ],
)  # fmt: skip
def test_a_shard_without_what_belongs_to_an_image(members: Members, message: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a-000003.tar", members)
    with pytest.raises(DataError) as caught:
        Shards([path])
    assert str(caught.value) == f"{path}: {message}"


def test_a_shard_that_ends_early(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [("a.cls", b"0"), ("a.png", b"x" * 1000), ("b.cls", b"1"), ("b.png", b"y")])
    data, path = whole.read_bytes(), tmp_path / "a.tar"
    ends = {
        0: "the shard ends early, at its beginning: it has no end mark",
        512: "a.cls: the shard ends early, in this member",
        1024: "the shard ends early, behind a.cls: it has no end mark",
        1100: "the shard ends early, behind a.cls: it has no end mark",  # within a header
        2000: "a.png: the shard ends early, in this member",
        2560: "the shard ends early, behind a.png: it has no end mark",
        4608: "the shard ends early, behind b.png: it has no end mark",
    }
    for length, message in ends.items():
        path.write_bytes(data[:length])
        with pytest.raises(DataError) as caught:
            Shards([path])
        assert str(caught.value) == f"{path}: {message}", length
    path.write_bytes(data[:5120])
    assert len(Shards([path])) == 2


def test_what_is_no_tar_file(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", GOOD)
    data = bytearray(path.read_bytes())
    zipped = "not a tar file, or a damaged one: it is compressed, and no image can be read alone: decompress it"
    damaged = "not a tar file, or a damaged one: no header behind a.cls"
    for content, message in (
        (b"no tar" * 1000, "not a tar file, or a damaged one: no header at its beginning"),
        (gzip.compress(os.urandom(4000)), zipped),
        (data[:1024] + b"\1" + data[1025:], damaged),  # a changed byte of the name
        (data[:1024] + _header("a.png", -1024), damaged),  # a negative size would make the reader go back forever
        (data[:1024] + _pax(b"99 path=b\n"), damaged),
        (data[:1024] + _pax(b"12 size=-99\n") + data[1024:], damaged),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            Shards([path])
        assert str(caught.value) == f"{path}: {message}"
    os.mkfifo(tmp_path / "pipe.tar")
    for name, message in (("pipe.tar", "not a regular file"), ("not-there.tar", "no such file")):
        with pytest.raises(DataError) as caught:
            Shards([tmp_path / name])
        assert str(caught.value) == f"{tmp_path / name}: {message}"


def _pax(body: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body.ljust(512, b"\0")


def test_a_shard_that_changes_while_one_trains(tmp_path: Path) -> None:
    paths = [write_plain(tmp_path / f"{i}.tar", [0, 1]) for i in range(3)]
    source = Shards(paths)
    paths[1].unlink()
    os.truncate(paths[2], 2000)
    assert source.read(1, 3, 4).shape == (3, 4, 4)
    for index, message in (
        (2, "1.tar: k0000.png: the shard no longer exists"),
        (5, "2.tar: k0001.png: the shard ends early, in this member: it has become shorter"),
    ):
        with pytest.raises(DataError) as caught:
            source.read(index, 3, 4)
        assert str(caught.value) == f"{tmp_path}/{message}"


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*GOOD, ("c.cls", b"1"), ("c.jpg", b"no image")])
    source = Shards([path])
    with pytest.raises(DataError) as caught:
        source.read(2, 3, 8)
    assert str(caught.value) == f"{path}: c.jpg: not an image, or of a format that Pillow does not know"


def test_what_is_shards(folder: Path, shards: Path, tmp_path: Path) -> None:
    assert not any(map(is_shards, (None, "sample", folder, tmp_path, tmp_path / "none")))
    assert is_shards("s-{0..9}.tar")
    write_tar(tmp_path / "download.tar", GOOD)
    assert is_shards(tmp_path)
    (tmp_path / "cat").mkdir()  # a class: the tar file is the archive that it was unpacked from
    assert not is_shards(tmp_path)


def test_classes_without_names_are_numbers(tmp_path: Path) -> None:
    write_plain(tmp_path / "train-0.tar", [0, 2, 1, 2])
    test = write_plain(tmp_path / "imagenet-validation-0.tar", [2, 0])
    parts = find_shards(tmp_path / "train-{0..0}.tar")
    assert open_sources(parts).classes == ("0", "1", "2")
    write_plain(test, [2, 3])
    with pytest.raises(DataError, match=r"validation-0.tar: k0001.png: its label is 3: there are 3 classes, from 0 on$"):
        open_sources(parts)
    with pytest.raises(DataError, match=r"its label is 3: there are 3 classes"):
        open_test(parts, ("a", "b", "c"))
    assert open_test(parts, ("a", "b", "c", "d")).labels.tolist() == [2, 3]
    write_plain(tmp_path / "train-0.tar", [1, 2, 3])
    with pytest.raises(DataError) as caught:
        open_sources(parts)
    names = f"name all classes, one a line, in {tmp_path}/classes.txt"
    assert str(caught.value) == f"{tmp_path}: no training image of class 0, but one of class 3: {names}"
    (tmp_path / "classes.txt").write_text("w\nx\ny\n\nz \n")
    assert open_sources(find_shards(tmp_path)).classes == ("w", "x", "y", "z")
    with pytest.raises(DataError, match=r"its test images are not of the classes that are trained on: a, b, c, d$"):
        open_test(find_shards(tmp_path), ("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["train-0"], {}, "no test images in it; --validation 0.2 takes a fifth of the training images"),
        (["test-0"], {}, "no training images in it"),
        (["test-0"], {"validation": 0.5}, "no training images in it"),
        (["train-0", "val-0"], {"validation": 0.5}, "the test images are there already: leave out --validation"),
    ],
)
def test_parts_that_are_not_there(names: list[str], options: dict[str, float], message: str, tmp_path: Path) -> None:
    for name in names:
        write_plain(tmp_path / f"{name}.tar", [0, 1])
    with pytest.raises(DataError) as caught:
        open_sources(find_shards(tmp_path), **options)
    assert str(caught.value) == f"{tmp_path}: {message}"


def test_validation_of_few_images(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "train-0.tar", [0, 1, 0])
    with pytest.raises(
        DataError, match=r": one image of class 1, .*: k0001.png: --validation needs two or more of each class$"
    ):
        open_sources(find_shards(tmp_path), 0.5)
    with pytest.raises(DataError, match=r"^validation must be between 0 and 1, got 1.0$"):
        open_sources(find_shards(tmp_path), 1.0)
    write_plain(path, [0, 0, 0])
    with pytest.raises(DataError, match="holds one class only"):
        open_sources(find_shards(tmp_path), 0.5)


def test_shards_that_cannot_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for data, message in (
        (tmp_path / "a-*.tar", "there are no such shards"),
        ("a-{0..3.tar", "names no shards: Unbalanced braces: 'a-{0..3.tar'"),
        ("a-${NO_SUCH}.tar", "names no shards: missing environment variable wds_WDS_NO_SUCH"),
        ("https://example.org/a-{0..3}.tar", "shards are read from a disk: download them first"),
        ("pipe:cat a.tar", "shards are read from a disk: download them first"),
    ):
        with pytest.raises(DataError) as caught:
            find_shards(data)
        assert str(caught.value) == f"{data}: {message}"
    for content in (b"a\nb\na\n", b"\n", b"\xff\n"):
        write_tar(tmp_path / "train-0.tar", GOOD)
        (tmp_path / "classes.txt").write_bytes(content)
        with pytest.raises(DataError, match=r"classes.txt: (names no class, or names one twice|cannot be read)"):
            find_shards(tmp_path)
    with pytest.raises(DataError, match=r"the buffer of shards must hold 1 image or more, got 0$"):
        Shards([tmp_path / "train-0.tar"], buffer=0)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(DataError, match=r"need the package webdataset .*: pip install 'alexnet-triton\[stream\]'$"):
        find_shards(tmp_path)


def _header(name: str, length: int) -> bytes:
    """A tar header, made faster than by :mod:`tarfile`."""
    header = name.encode().ljust(124, b"\0") + b"%011o\0" % length + bytes(12) + b" " * 8 + b"0".ljust(356, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def test_large_sets_are_listed_in_seconds(tmp_path: Path) -> None:
    """Listing 200,000 members of 100,000 images, and ordering 1,300,000 images, take less than 10 s each."""
    paths = []
    for shard in range(10):
        blocks = []
        for i in range(10_000):
            key = f"n{shard:08}_{i}"
            blocks += [_header(f"{key}.jpg", 0), _header(f"{key}.cls", 4), (b"%04d" % (i % 1000)).ljust(512, b"\0")]
        paths.append(tmp_path / f"a-{shard}.tar")
        paths[-1].write_bytes(b"".join(blocks) + bytes(1024))
    begin = time.perf_counter()
    source = Shards(paths)
    assert time.perf_counter() - begin < 10
    assert len(source) == 100_000
    assert source.name(54_321) == Path(f"{paths[5]}: n00000005_4321.jpg")
    assert int(source.labels[54_321]) == 321
    begin = time.perf_counter()
    large = source.subset(torch.arange(100_000).repeat(13))
    order = large.order(torch.Generator().manual_seed(1))
    assert time.perf_counter() - begin < 10
    assert torch.equal(order.sort().values, torch.arange(1_300_000))
    begin = time.perf_counter()
    rest, held = splits.hold_out(source, 0.1, 0, tmp_path)
    assert time.perf_counter() - begin < 10
    assert torch.equal(source.labels[held].bincount(), torch.full((1000,), 10))
    assert torch.equal(torch.cat((rest, held)).sort().values, torch.arange(100_000))
