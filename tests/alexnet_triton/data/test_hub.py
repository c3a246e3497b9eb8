"""Data sets saved by Hugging Face's ``datasets``: a folder's images, read from a saved data set; all errors."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from alexnet_triton.data.dataset import DataError
from alexnet_triton.data.hub import SavedDataset, find_saved_dataset, is_saved_dataset
from alexnet_triton.data.image_files import read_image
from alexnet_triton.data.splits import open_sources, open_test

from .test_image_folder import COLOURS, write_folder
from .test_shards import picture, read_in_processes

CLASSES = sorted(COLOURS)


def of_folder(folder: Path) -> datasets.Dataset:
    """A data set of the images of a folder of classes, in the order of their sorted paths."""
    paths = sorted(folder.glob("*/*"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    columns = {"image": list(map(str, paths)), "label": [path.parent.name for path in paths]}
    return datasets.Dataset.from_dict(columns, features)


def small(columns: dict[str, list[Any]], **features: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "colours")


@pytest.mark.parametrize("test", ["test", "validation"])
def test_the_images_of_a_folder(test: str, folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied")
    saved = datasets.DatasetDict({"train": of_folder(copied / "train"), test: of_folder(copied / "test")})
    saved.save_to_disk(tmp_path / "saved")
    shutil.rmtree(copied)  # the data set holds the images
    assert is_saved_dataset(tmp_path / "saved")
    found = open_sources(find_saved_dataset(tmp_path / "saved"))
    assert found[2:] == (tuple(CLASSES), tmp_path / "saved", "saved")
    tested = open_test(find_saved_dataset(tmp_path / "saved"), found.classes)
    for source, part in ((found.train, "train"), (found.test, "test"), (tested, "test")):
        paths = sorted((folder / part).glob("*/*"))
        assert len(source) == len(paths)
        assert source.labels.tolist() == [CLASSES.index(path.parent.name) for path in paths]
        for channels in (1, 3):
            for i, path in enumerate(paths):
                assert torch.equal(source.read(i, channels, 20), read_image(path, channels, 20))
    assert found.train.name(3) == Path(f"{tmp_path}/saved/train: image 3")
    with pytest.raises(DataError, match=r"its test images are not of the classes that are trained on: a, b$"):
        open_test(find_saved_dataset(tmp_path / "saved"), ("a", "b"))


def test_one_data_set_is_divided(folder: Path, tmp_path: Path) -> None:
    of_folder(folder / "train").save_to_disk(tmp_path)
    parts = find_saved_dataset(tmp_path)
    train, test, *_ = open_sources(parts, 0.25, seed=1)
    assert (len(train), len(test)) == (18, 6)
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    names = [source.name(i) for source in (train, test) for i in range(len(source))]
    assert sorted(names) == sorted(Path(f"{tmp_path}: image {i}") for i in range(24))
    paths = sorted((folder / "train").glob("*/*"))
    for i in range(len(test)):
        number = int(str(test.name(i)).rpartition(" ")[2])
        assert torch.equal(test.read(i, 3, 20), read_image(paths[number], 3, 20))
    assert open_test(parts, tuple(CLASSES), 0.25, seed=1).checksum() == test.checksum() != train.checksum()
    with pytest.raises(DataError, match=r": no test images in it; --validation 0.2 takes a fifth"):
        open_sources(parts)
    order = train.order(torch.Generator().manual_seed(1))
    assert sorted(order.tolist()) == list(range(18)) != order.tolist()


def test_forked_processes_read_the_same_data_set(folder: Path, tmp_path: Path) -> None:
    of_folder(folder / "train").save_to_disk(tmp_path, num_shards=3)
    train, _, *_ = open_sources(find_saved_dataset(tmp_path), 0.1)
    read_in_processes(train)


def test_whole_numbers_are_labels_without_names(tmp_path: Path) -> None:
    image, number = datasets.Image(), datasets.Value("uint8")
    columns = {"img": [{"bytes": picture(i)} for i in range(4)], "labels": [1, 0, 2, 1], "id": [7, 7, 7, 7]}
    source = SavedDataset(small(columns, img=image, labels=number, id=number), tmp_path)
    assert source.classes is None
    assert source.labels.tolist() == [1, 0, 2, 1]
    assert source.labels.dtype == torch.int64
    assert [int(source.read(i, 1, 4)[0, 0]) for i in range(4)] == [0, 1, 2, 3]


IMAGE, NAMES, NUMBER = datasets.Image(), datasets.ClassLabel(names=["a", "b"]), datasets.Value("int64")


@pytest.mark.parametrize(
    ("columns", "features", "message"),
    [
        ({"a": [1]}, {"a": NUMBER}, "no column of images: a"),
        ({"image": [None], "kind": [1]}, {"image": IMAGE, "kind": NUMBER}, "no column of labels: image, kind"),
        (
            {"a": [None], "b": [None], "label": [1]},
            {"a": IMAGE, "b": IMAGE, "label": NUMBER},
            "several columns of images: a, b",
        ),
        ({"image": [None], "a": [1], "b": [0]}, {"image": IMAGE, "a": NAMES, "b": NAMES}, "several columns of labels: a, b"),
        ({"image": [], "label": []}, {"image": IMAGE, "label": NAMES}, "no images in it"),
        ({"image": [None, None], "label": [1, None]}, {"image": IMAGE, "label": NAMES}, "1 images without a label"),
    ],
)
def test_columns_that_are_not_there(
    columns: dict[str, list[Any]], features: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        SavedDataset(small(columns, **features), tmp_path)
    assert str(caught.value) == f"{tmp_path}: {message}"


def test_a_test_set_without_labels(tmp_path: Path) -> None:
    train = small({"image": [{"bytes": picture()}] * 2, "label": [0, 1]}, image=IMAGE, label=NAMES)
    test = small({"image": [{"bytes": picture()}] * 2, "label": [0, -1]}, image=IMAGE, label=NAMES)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path)
    with pytest.raises(DataError, match=r"/test: image 1: its label is -1: there are 2 classes, from 0 on$"):
        open_sources(find_saved_dataset(tmp_path))
    test.save_to_disk(tmp_path / "alone")
    with pytest.raises(DataError, match=r"/alone: image 1: its label is -1: there are 2 classes, from 0 on$"):
        open_sources(find_saved_dataset(tmp_path / "alone"), 0.5)


def test_an_image_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    images = [None, {"bytes": None, "path": "/etc/passwd"}, {"bytes": b"no image", "path": None}]
    source = SavedDataset(small({"image": images, "label": [0, 1, 1]}, image=IMAGE, label=NAMES), tmp_path)
    for index, message in enumerate(
        (
            "the data set holds nothing, and no image",
            "the data set holds only the name of a file, /etc/passwd, and no image",
            "not an image, or of a format that Pillow does not know",
        )
    ):
        with pytest.raises(DataError) as caught:
            source.read(index, 3, 8)
        assert str(caught.value) == f"{tmp_path}: image {index}: {message}"


def test_a_damaged_data_set(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_folder(folder / "train").save_to_disk(tmp_path / "whole")
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        for length in (None, 0, 100, (tmp_path / "whole" / name).stat().st_size // 2):
            damaged = tmp_path / f"{name}{length}"
            shutil.copytree(tmp_path / "whole", damaged)
            if length is None:
                (damaged / name).unlink()
            else:
                os.truncate(damaged / name, length)
            with pytest.raises(DataError, match=rf"^{damaged}: cannot be read: ."):
                find_saved_dataset(damaged)
    assert not any(map(is_saved_dataset, (None, "sample", folder, tmp_path, tmp_path / "none")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package datasets .*: pip install 'alexnet-triton\[stream\]'$"):
        find_saved_dataset(tmp_path / "whole")
