"""Folders of images as users have them: other names, hidden files, no test images, damaged images, no home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alexnet_triton.data import fashion_mnist
from alexnet_triton.data.dataset import DataError, Dataset
from alexnet_triton.data.fashion_mnist import load_fashion_mnist, usual_places
from alexnet_triton.data.image_folder import default_channels, is_image_folder, load_data, load_test

from ...permissions import permissions_hold
from .test_data import write_folder as write_idx_folder
from .test_image_folder import COLOURS, write_folder, write_images

CLASSES = sorted(COLOURS)


def load(folder: Path, **options: object) -> tuple[Dataset, list[str]]:
    notes: list[str] = []
    return load_data(folder, size=20, channels=3, workers=0, on_note=notes.append, **options), notes  # type: ignore[arg-type]


def test_hidden_folders_and_files_are_no_part_of_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / ".hidden" / "a", train=2, tests=1)
    expected, _ = load(folder)
    for name in (".ipynb_checkpoints", "__MACOSX", "lost+found", ".Trash"):
        for place in (folder, folder / "train", folder / "test", folder / "train" / "sky"):
            shutil.copytree(folder / "test" / "sky", place / name)
    (folder / "train" / "sky" / "._00.png").write_text("?")
    (folder / "train" / ".DS_Store").write_text("?")
    (folder / "train" / "lost+found").chmod(0)
    with permissions_hold():
        found, notes = load(folder)
    (folder / "train" / "lost+found").chmod(0o700)
    assert (found.classes, notes) == (tuple(CLASSES), [])
    assert torch.equal(found.train.images, expected.train.images)


def test_what_is_passed_over_is_said(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", train=2, tests=1)
    shutil.copy(folder / "test" / "sky" / "00.png", folder / "train" / "in_no_class.png")
    for name in ("train/sky/a.txt", "train/brick/Thumbs.db", "test/sky/b.csv"):
        (folder / name).write_text("?")
    found, notes = load(folder)
    assert notes == [
        f"{folder}/train: ignored 3 files that are no images of a class: in_no_class.png, brick/Thumbs.db, sky/a.txt",
        f"{folder}/test: ignored 1 file that is no image of a class: sky/b.csv",
    ]
    assert len(found.train) == 6
    notes.clear()
    load_test(folder, classes=CLASSES, size=20, channels=3, workers=0, on_note=notes.append)
    assert notes == [f"{folder}/test: ignored 1 file that is no image of a class: sky/b.csv"]
    shutil.rmtree(folder / "train" / "grass")
    (folder / "train" / "grass").mkdir()
    (folder / "train" / "grass" / "a.heic").touch()
    with pytest.raises(DataError, match=r"train/grass: no image in it, only a\.heic$"):
        load(folder)


@pytest.mark.parametrize("suffix", [".gif", ".jfif", ".avif", ".webp", ".tga"])
def test_an_image_of_any_suffix_is_one_of_its_class(suffix: str, tmp_path: Path) -> None:
    from PIL import Image

    folder = write_folder(tmp_path / "a", train=2, tests=1)
    Image.open(folder / "test" / "sky" / "00.png").save(folder / "train" / "sky" / f"x{suffix}")
    found, notes = load(folder)
    assert (found.train.labels.tolist(), notes) == ([0, 0, 1, 1, 2, 2, 2], [])


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_names_of_the_test_folder(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", test=name, train=2, tests=1)
    found, _ = load(folder)
    assert (len(found.train), len(found.test)) == (6, 3)
    shutil.rmtree(folder / "train")
    assert is_image_folder(folder)
    assert len(load_test(folder, classes=CLASSES, size=20, channels=3, workers=0)) == 3


# ---------------------------------------------------------------------------------------------------------- no test images


@pytest.mark.parametrize("below", [".", "train"])
def test_a_part_of_each_class_is_held_out(below: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_images(folder / below, {"sky": 10, "brick": 2, "grass": 7})
    assert default_channels(folder, 0.2) == 3
    found, _ = load(folder, validation=0.2, seed=4)
    assert found.classes == tuple(CLASSES)
    assert found.train.labels.bincount().tolist() == [1, 6, 8]
    assert found.test.labels.bincount().tolist() == [1, 1, 2]
    everything = torch.cat([found.train.images, found.test.images]).flatten(1)
    assert len(everything.unique(dim=0)) == 19
    again, _ = load(shutil.copytree(folder, tmp_path / "elsewhere"), validation=0.2, seed=4)
    assert torch.equal(again.test.images, found.test.images)
    same = load_test(folder, classes=CLASSES, size=20, channels=3, workers=0, validation=0.2, seed=4)
    assert torch.equal(same.images, found.test.images)
    others = [load(folder, validation=0.2, seed=seed)[0].test.images for seed in range(3)]
    assert not all(torch.equal(each, found.test.images) for each in others)
    # A new file leaves the others in their split, except for at most one.
    write_images(tmp_path / "more", {"sky": 1})
    shutil.copy(tmp_path / "more" / "sky" / "00.png", folder / below / "sky" / "z.png")
    more, _ = load(folder, validation=0.2, seed=4)
    kept = sum(any(torch.equal(a, b) for b in more.test.images) for a in found.test.images)
    assert kept >= len(found.test) - 1


def test_half_of_two_classes_and_nearly_all(tmp_path: Path) -> None:
    write_images(tmp_path / "a", {"sky": 4, "brick": 2})
    for validation, expected in ((0.5, [1, 2]), (0.99, [1, 3]), (0.01, [1, 1])):
        assert load(tmp_path / "a", validation=validation)[0].test.labels.bincount().tolist() == expected


def test_what_cannot_be_divided(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", test="valid", train=2, tests=1)
    with pytest.raises(DataError, match=r"a/valid: the test images are there already: leave out --validation"):
        load(folder, validation=0.2)
    shutil.rmtree(folder / "valid")
    with pytest.raises(DataError, match=r"a: no folder test, val, .*--validation 0\.2"):
        load(folder)
    (folder / "train" / "sky" / "00.png").unlink()
    with pytest.raises(DataError, match=r"train/sky: holds one image: --validation needs two or more of each class"):
        load(folder, validation=0.2)
    shutil.rmtree(folder / "train" / "sky")
    shutil.rmtree(folder / "train" / "grass")
    with pytest.raises(DataError, match=r"train: holds one class only, brick"):
        load(folder, validation=0.2)
    with pytest.raises(DataError, match=r"train: holds neither Fashion-MNIST's files .*--validation 0\.2"):
        load_data(folder / "train", size=20, channels=1)
    for wrong in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(DataError, match="validation must be between 0 and 1"):
            load(folder, validation=wrong)
    with pytest.raises(DataError, match="Fashion-MNIST has test images of its own"):
        load_data("sample", size=28, channels=1, validation=0.2)
    idx = write_idx_folder(tmp_path / "idx")
    assert not is_image_folder(idx, 0.2)


def test_a_class_has_the_name_of_a_split(tmp_path: Path) -> None:
    write_images(tmp_path / "a", {"sky": 4, "brick": 4})
    shutil.copytree(tmp_path / "a" / "sky", tmp_path / "a" / "train")
    found, _ = load(tmp_path / "a", validation=0.25)
    assert (found.classes, len(found.train), len(found.test)) == (("brick", "sky", "train"), 9, 3)
    shutil.copytree(tmp_path / "a" / "sky", tmp_path / "a" / "train" / "sky")
    with pytest.raises(DataError, match=r"a/train: holds folders, .* if train is a class, give its folder another name"):
        load(tmp_path / "a", validation=0.25)
    (tmp_path / "a" / "train").rename(tmp_path / "a" / "valid")
    with pytest.raises(DataError, match=r"a/valid: .* if valid is a class, give its folder another name"):
        load(tmp_path / "a", validation=0.25)


def test_a_folder_that_is_missing_or_has_no_test_is_the_first_thing_said(tmp_path: Path) -> None:
    write_images(tmp_path / "a", {"sky": 2, "brick": 2})
    for folder, said in ((tmp_path / "b", "b: no such folder"), (tmp_path / "a", r"a: holds neither .*--validation 0\.2")):
        with pytest.raises(DataError, match=said):
            load_data(folder, size=20, channels=3)
        with pytest.raises(DataError, match=said):
            load_test(folder, classes=CLASSES, size=20, channels=3)


# ---------------------------------------------------------------------------------------------------------- damaged images


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_skipped_on_demand(workers: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", train=20, tests=2)
    expected, _ = load(folder)
    damaged = [folder / "train" / "brick" / "00.png", folder / "train" / "sky" / "19.png", folder / "test" / "grass" / "01.png"]
    for path in damaged:
        path.write_text("?")
    with pytest.raises(DataError, match=r"train/brick/00\.png: not an image"):
        load(folder)
    notes: list[str] = []
    found = load_data(folder, size=20, channels=3, workers=workers, skip_damaged=True, on_note=notes.append)
    reason = "not an image, or of a format that Pillow does not know"
    assert found.skipped == tuple((path, reason) for path in damaged)
    assert torch.equal(found.train.images, expected.train.images[1:-1])
    assert torch.equal(found.train.labels, expected.train.labels[1:-1])
    assert found.test.labels.tolist() == [0, 0, 1, 2, 2]
    assert notes == [
        f"{folder}/train: skipped 2 damaged images: brick/00.png ({reason}); sky/19.png ({reason})",
        f"{folder}/test: skipped 1 damaged image: grass/01.png ({reason})",
    ]
    (folder / "test" / "grass" / "00.png").write_text("?")
    with pytest.raises(DataError, match=r"test: all images of class grass are damaged: .*00\.png: not an image"):
        load(folder, skip_damaged=True)


# ----------------------------------------------------------------------------------------------------------------- no home


def test_without_a_home_its_places_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_home = usual_places()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.chdir(tmp_path)
    assert len(usual_places()) == len(with_home) - 1
    assert set(usual_places()) < set(with_home)
    targets: list[str] = []
    monkeypatch.setattr(fashion_mnist, "usual_places", lambda: ())
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", lambda root, download: targets.append(root))
    with pytest.raises(DataError, match=r"data/FashionMNIST/raw: no such folder"):
        load_fashion_mnist()
    assert targets == ["data"]


@pytest.mark.parametrize("home", ["home", "file", "file/home"])
def test_the_download_goes_where_it_can_be_written(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / home))
    monkeypatch.setattr(fashion_mnist, "usual_places", lambda: ())
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", lambda root, download: write_idx_folder(_made(root)))
    expected = tmp_path / "home/.cache/alexnet-triton" if home == "home" else Path("data")
    assert load_fashion_mnist().source == expected / "FashionMNIST/raw"
    if home != "home":
        shutil.rmtree("data")
        Path("data").touch()
        with pytest.raises(DataError, match=r"/\.cache/alexnet-triton and data cannot be written: .*--data sample"):
            load_fashion_mnist()


def _made(root: str) -> Path:
    folder = Path(root) / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    return folder


def test_no_such_users_home_is_an_error_of_the_data() -> None:
    for call in (is_image_folder, default_channels, load_fashion_mnist):
        with pytest.raises(DataError, match=r"~nobody-of-this-name/x: cannot be found: "):
            call("~nobody-of-this-name/x")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["train --help", "predict /nowhere.pt a.png"])
def test_a_user_without_home_or_entry(arguments: str, tmp_path: Path) -> None:
    """A container's random user has no $HOME and no line in /etc/passwd. (``test_cli.py`` has more commands.)"""
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | {"MPLCONFIGDIR": str(tmp_path)}
    script = """
import pwd, runpy
def no_entry(user): raise KeyError(f"getpwuid(): uid not found: {user}")
pwd.getpwuid = no_entry
runpy.run_module("alexnet_triton", run_name="__main__")
"""
    command = [sys.executable, "-c", script, *arguments.split()]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    if arguments.startswith("predict"):
        assert done.stderr == "alexnet-triton: /nowhere.pt: no such file\n"
    else:
        assert (done.returncode, done.stderr) == (0, "")
