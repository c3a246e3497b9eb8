"""Hostile or damaged files and names: the error is one line with exit code 1 or 2, and nothing is written.

How each parser handles damaged content is tested in test_data, test_image_folder, test_predict and test_checkpoint.
"""

from __future__ import annotations

import gzip
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alexnet_triton.data import fashion_mnist as data
from alexnet_triton.data.dataset import DataError
from alexnet_triton.data.fashion_mnist import read_folder, read_idx
from alexnet_triton.data.image_folder import load_data, load_test
from alexnet_triton.data.reading import Reader
from alexnet_triton.training.checkpoint import CheckpointError, read_checkpoint

from ...permissions import permissions_hold
from ..cli.test_predict import _bomb, _png, checkpoint_of
from ..command import run_here
from . import test_data
from .test_image_folder import COLOURS, write_folder, write_images

ON_PYTORCH = ("--device", "cpu", "--backend", "torch")
TRAIN = ("train", "--model", "lenet", *ON_PYTORCH, "--epochs", "1", "--limit", "8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipe, a link to itself, a file, an unreadable folder, a valid checkpoint and a valid image."""
    place = tmp_path_factory.mktemp("place")
    os.mkfifo(place / "pipe")
    (place / "circle").symlink_to("circle")
    (place / "file").write_text("x")
    write_folder(place / "closed" / "images", train=1, tests=1)
    checkpoint_of(place / "closed")
    (place / "closed").chmod(0)
    checkpoint_of(place, channels=3, classes=tuple(sorted(COLOURS)))
    (place / "good.png").write_bytes(_png())
    yield place
    (place / "closed").chmod(0o700)  # so that pytest can remove the folder


LONG = "a" * 300
#: Commands with a path, relative to ``place``, that cannot be used.
NAMES = {
    "data_too_long": (*TRAIN, "--data", LONG),
    "data_pipe": (*TRAIN, "--data", "pipe"),
    "data_device": (*TRAIN, "--data", "/dev/zero"),
    "data_file": (*TRAIN, "--data", "file"),
    "data_circle": (*TRAIN, "--data", "circle"),
    "data_circle_of_known_channels": (*TRAIN, "--data", "circle", "--channels", "3"),
    "data_zero_byte": (*TRAIN, "--data", "a\0b"),
    "data_nobodys_home": (*TRAIN, "--data", "~nobody-of-this-name/x"),
    "data_closed": (*TRAIN, "--data", "closed/images"),
    "out_too_long": (*TRAIN, "--data", "sample", "--out", LONG),
    "out_file": (*TRAIN, "--data", "sample", "--out", "file"),
    "out_under_a_file": (*TRAIN, "--data", "sample", "--out", "file/out"),
    "out_circle": (*TRAIN, "--data", "sample", "--out", "circle"),
    "out_closed": (*TRAIN, "--data", "sample", "--out", "closed/out"),
    "out_zero_byte": (*TRAIN, "--data", "sample", "--out", "a\0b"),
    "data_closed_itself": (*TRAIN, "--data", "closed"),
    "data_closed_limit_of_known_channels": (*TRAIN, "--data", "closed/images", "--channels", "3"),
    "resume_too_long": ("train", "--resume", LONG),
    "resume_pipe": ("train", "--resume", "pipe"),
    "resume_device": ("train", "--resume", "/dev/zero"),
    "resume_closed": ("train", "--resume", "closed/lenet1.pt"),
    "resume_closed_folder": ("train", "--resume", "closed"),
    "resume_circle": ("train", "--resume", "circle"),
    "resume_zero_byte": ("train", "--resume", "a\0b"),
    "resume_under_a_file": ("train", "--resume", "file/x"),
    "resume_out_closed": ("train", "--resume=", "--out", "closed/out"),
    "resume_out_circle": ("train", "--resume", "lenet3.pt", "--out", "circle"),
    "resume_out_too_long": ("train", "--resume", "lenet3.pt", "--out", LONG),
    "compare_data_nobodys_home": ("compare", "lenet", *ON_PYTORCH, "--data", "~nobody-of-this-name/x"),
    "compare_data_closed": ("compare", "lenet", *ON_PYTORCH, "--data", "closed/images"),
    "compare_out_closed": ("compare", "lenet", *ON_PYTORCH, "--data", "sample", "--out", "closed/out"),
    "compare_out_circle": ("compare", "lenet", *ON_PYTORCH, "--data", "sample", "--out", "circle"),
    "compare_out_file": ("compare", "lenet", *ON_PYTORCH, "--data", "sample", "--limit", "8", "--out", "file"),
    "compare_data_too_long": ("compare", "lenet", *ON_PYTORCH, "--data", LONG),
    "compare_out_too_long": ("compare", "lenet", *ON_PYTORCH, "--data", "sample", "--out", LONG),
    "evaluate_too_long": ("evaluate", LONG, *ON_PYTORCH),
    "evaluate_pipe": ("evaluate", "pipe", *ON_PYTORCH),
    "evaluate_circle": ("evaluate", "circle", *ON_PYTORCH),
    "evaluate_folder": ("evaluate", ".", *ON_PYTORCH),
    "evaluate_closed": ("evaluate", "closed/lenet1.pt", *ON_PYTORCH),
    "evaluate_closed_data": ("evaluate", "lenet3.pt", "--data", "closed/images", *ON_PYTORCH),
    "evaluate_data_zero_byte": ("evaluate", "lenet3.pt", "--data", "a\0b", *ON_PYTORCH),
    "evaluate_zero_byte": ("evaluate", "a\0b", *ON_PYTORCH),
    "evaluate_data_nobodys_home": ("evaluate", "lenet3.pt", "--data", "~nobody-of-this-name/x", *ON_PYTORCH),
    "evaluate_data_too_long": ("evaluate", "lenet3.pt", "--data", LONG, *ON_PYTORCH),
    "evaluate_data_circle": ("evaluate", "lenet3.pt", "--data", "circle", *ON_PYTORCH),
    "predict_zero_byte": ("predict", "lenet3.pt", "a\0b", *ON_PYTORCH),
    "predict_checkpoint_closed": ("predict", "closed/lenet1.pt", "good.png", *ON_PYTORCH),
    "predict_too_long": ("predict", "lenet3.pt", LONG, *ON_PYTORCH),
    "predict_device": ("predict", "lenet3.pt", "/dev/zero", *ON_PYTORCH),
    "predict_closed": ("predict", "lenet3.pt", "closed/x.png", *ON_PYTORCH),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_leads_nowhere_good_is_one_line(name: str, place: Path) -> None:
    arguments = NAMES[name]
    before = sorted(place.iterdir())
    if name.startswith(("data", "compare_data")):
        arguments += ("--out", "out")
    with permissions_hold():
        result = run_here(*arguments, cwd=place)
    lines = result.stderr.splitlines()
    if result.returncode == 2:  # Click's usage comes before the line
        assert lines[0].startswith("Usage: ")
        assert "Invalid value for " in lines[-1]
    else:
        assert result.returncode == 1
        assert len(lines) == 1
        assert lines[0].startswith("alexnet-triton: ")
    assert "Errno" not in result.stderr
    assert sorted(place.iterdir()) == before


@pytest.mark.slow
def test_names_that_the_output_cannot_write_are_escaped(tmp_path: Path) -> None:
    """In a separate process with ASCII output: names of other characters, and a file name that is not valid UTF-8."""
    file = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png")
    Path(file).write_bytes(_png())
    arguments = ("predict", str(checkpoint_of(tmp_path, classes=("\u5929\u7a7a", "b"))), file, str(tmp_path / "\u5730.png"))
    result = subprocess.run(
        [sys.executable, "-m", "alexnet_triton", *arguments, *ON_PYTORCH],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    first, *classes = result.stdout.splitlines()
    assert first == f"{tmp_path}/caf\\udce9.png"
    assert sorted(line.split()[0] for line in classes) == ["\\u5929\\u7a7a", "b"]
    assert (result.returncode, result.stderr) == (1, f"alexnet-triton: {tmp_path}/\\u5730.png: no such file\n")


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("seed", [10**20 - 1, 2**63, -(2**63) - 1])
def test_a_seed_that_no_generator_takes_is_one_line(seed: int, command: str, tmp_path: Path) -> None:
    result = run_here(command, *ON_PYTORCH, "--data", "sample", "--seed", str(seed), cwd=tmp_path)
    assert result.returncode == 2
    assert "Invalid value for '--seed'" in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)])
def test_the_largest_and_the_smallest_seed(seed: int, tmp_path: Path) -> None:
    result = run_here(*TRAIN, "--data", "sample", "--seed", str(seed), "--out", str(tmp_path / "out"))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [(("train", "--resume", LONG), OSError), (("evaluate", "pipe"), CheckpointError), ((*TRAIN, "--data", "pipe"), DataError)],
    ids=["train", "evaluate", "data"],
)
def test_with_debug_there_is_a_traceback(arguments: tuple[str, ...], kind: type[Exception], place: Path) -> None:
    with pytest.raises(kind):
        run_here("--debug", *arguments, cwd=place)


def test_one_image_that_may_not_be_read_does_not_keep_the_others_from_being_classified(place: Path) -> None:
    with permissions_hold():
        result = run_here("predict", "lenet3.pt", "closed/x.png", "good.png", *ON_PYTORCH, cwd=place)
    assert (result.returncode, result.stderr) == (1, "alexnet-triton: closed/x.png: cannot be read: Permission denied\n")
    assert result.stdout.splitlines()[0] == "good.png"


# ------------------------------------------------------------------------------------------------------------------ links

Trap = Callable[[Path], object]


def _link(name: str, target: str) -> Trap:
    return lambda folder: (folder / name).symlink_to(target)


def _folder_elsewhere(folder: Path) -> None:
    shutil.move(folder / "train" / "sky", folder.parent / "elsewhere")
    (folder / "train" / "sky").symlink_to(folder.parent / "elsewhere")


def _train_elsewhere(folder: Path) -> None:
    shutil.move(folder / "train", folder.parent / "elsewhere")
    (folder / "train").symlink_to(folder.parent / "elsewhere")


#: (function that creates a link below the folder, the error's message).
LINKS: dict[str, tuple[Trap, str]] = {
    "file_outside": (_link("test/sky/x.png", "../../../good.png"), r"sky/x\.png: a link that leads out of "),
    "absolute": (_link("train/sky/x.png", "/etc/passwd"), r"sky/x\.png: a link that leads out of .*, to /etc/passwd"),
    "of_no_image": (_link("train/sky/notes.txt", "/etc/passwd"), r"notes\.txt: a link that leads out of "),
    "device": (_link("train/sky/x.png", "/dev/zero"), r"x\.png: a link that leads out of .*, to /dev/zero"),
    "class_elsewhere": (_folder_elsewhere, r"train/sky: a link that leads out of "),
    "train_elsewhere": (_train_elsewhere, r"train: a link that leads out of "),
    "to_the_folder_itself": (_link("train/sky/again", "."), r"sky/again: a link to a folder, "),
    "to_the_root": (_link("train/again", ".."), r"train/again: a link to a folder, "),
    "broken": (_link("train/sky/x.png", "gone.png"), r"x\.png: a link to no file, "),
    "circle": (_link("train/sky/x.png", "x.png"), r"x\.png: a link to no file, "),
}


@pytest.mark.parametrize("name", LINKS)
def test_links_out_of_the_folder_and_to_folders_are_refused(name: str, tmp_path: Path) -> None:
    trap, message = LINKS[name]
    (tmp_path / "good.png").write_bytes(_png())
    folder = write_folder(tmp_path / "a", train=1, tests=1)
    trap(folder)
    with pytest.raises(DataError, match=message) as error:
        load_data(folder, size=20, channels=3, workers=0)
    result = run_here(*TRAIN, "--data", str(folder), "--workers", "0", "--out", str(tmp_path / "out"))
    assert (result.returncode, result.stderr) == (1, f"alexnet-triton: {error.value}\n")
    assert not (tmp_path / "out").exists()
    if name == "file_outside":
        with pytest.raises(DataError, match=message):
            load_test(folder, classes=sorted(COLOURS), size=20, channels=3, workers=0)


def test_links_inside_of_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", train=1, tests=1)
    (folder / "train" / "sky" / "x.png").symlink_to("../../test/sky/00.png")
    shutil.move(folder / "test", folder / "kept")
    (folder / "test").symlink_to("kept")
    (folder / "train" / "sky" / "x.png").unlink()
    (folder / "train" / "sky" / "x.png").symlink_to(folder / "kept" / "sky" / "00.png")
    (tmp_path / "link").symlink_to("a")
    found = load_data(tmp_path / "link", size=20, channels=3, workers=0)
    assert (len(found.train), len(found.test)) == (4, 3)
    assert (found.train.images[-1] == found.test.images[-1]).all()


# --------------------------------------------------------------------------------------------------- traps among the images


def _pipe(file: Path) -> None:
    os.mkfifo(file)  # opening a pipe would block forever


TRAPS: dict[str, tuple[Trap, str]] = {
    "pipe": (_pipe, "not a regular file"),
    "bomb": (lambda file: file.write_bytes(_bomb(20_000)), "too large to be decoded: "),
    "cut_short": (lambda file: file.write_bytes(_png()[:400]), "cannot be read: image file is truncated"),
    "closed": (lambda file: (file.write_bytes(_png()), file.chmod(0)), "cannot be read: Permission denied"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_among_the_images_is_named_and_nothing_is_written(name: str, workers: int, tmp_path: Path) -> None:
    trap, message = TRAPS[name]
    folder = write_folder(tmp_path / "a", train=2, tests=1)
    file = folder / "train" / "sky" / "01.png"
    file.unlink()
    trap(file)
    with permissions_hold():
        result = run_here(*TRAIN, "--data", str(folder), "--workers", str(workers), "--out", str(tmp_path / "out"))
    assert result.returncode == 1
    assert result.stderr.startswith(f"alexnet-triton: {file}: {message}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("closed", ["train", "train/sky", "train/sky/more"])
def test_a_folder_that_may_not_be_read_is_not_passed_over(closed: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", train=1, tests=1)
    write_images(folder / "train" / "sky", {"more": 1})
    (folder / closed).chmod(0)
    with permissions_hold(), pytest.raises(DataError, match=rf"{closed}: cannot be read: Permission denied"):
        load_data(folder, size=20, channels=3, workers=0)
    (folder / closed).chmod(0o700)
    assert len(load_data(folder, size=20, channels=3, workers=0).train) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_after_the_folder_was_listed_is_named(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "a", train=2, tests=1)
    read = Reader.read

    def vanish(*arguments: Any) -> object:
        (folder / "train" / "sky" / "00.png").unlink(missing_ok=True)
        return read(*arguments)

    monkeypatch.setattr(Reader, "read", vanish)
    with pytest.raises(DataError, match=r"train/sky/00\.png: no such file"):
        load_data(folder, size=20, channels=3, workers=workers)


# ------------------------------------------------------------------------------------------------ IDX files and checkpoints


@pytest.mark.parametrize("kind", ["pipe", "folder", "circle", "device"])
def test_an_idx_file_that_is_no_file_is_not_opened(kind: str, tmp_path: Path) -> None:
    folder = test_data.write_folder(tmp_path / "a")
    path = folder / f"{test_data.LABELS}.gz"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"circle": path.name, "device": "/dev/zero"}[kind])
    with pytest.raises(DataError, match=f"no file {test_data.LABELS}"):
        read_folder(folder)


def test_idx_files_may_be_links(tmp_path: Path) -> None:
    """Links are allowed here: only the four known names are read, and a file that is not an IDX file is refused."""
    folder = test_data.write_folder(tmp_path / "a")
    path = folder / f"{test_data.LABELS}.gz"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert len(read_folder(folder).train) == 20
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(DataError, match=r"gz: cannot be read: Not a gzipped file"):
        read_folder(folder)


def test_idx_files_without_permission(tmp_path: Path) -> None:
    folder = test_data.write_folder(tmp_path / "a")
    (folder / f"{test_data.LABELS}.gz").chmod(0)
    with permissions_hold(), pytest.raises(DataError, match=r"gz: cannot be read: .*Permission denied"):
        read_folder(folder)


def test_a_gzip_bomb_is_not_unpacked_further_than_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    header = b"\0\0\x08\x03" + (1).to_bytes(4, "big") + 2 * b"\0\0\0\x1c"
    path.write_bytes(gzip.compress(header + bytes(64 << 20), 1))
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(DataError, match=r"header announces 784 bytes of data .*, the file has more"):
        read_idx(path, 3)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_flipped_bit_in_a_gzipped_file_is_noticed_or_means_nothing(tmp_path: Path) -> None:
    """The checksum at the file's end detects a flipped bit, except in the header's time stamp, which is not read."""
    path = test_data.write_folder(tmp_path / "a") / f"{test_data.IMAGES}.gz"
    whole, expected = path.read_bytes(), read_idx(path, 3)
    generator = random.Random(0)
    messages = []
    for position in (0, len(whole) - 1, len(whole) - 5, *generator.sample(range(len(whole)), 60)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << generator.randrange(8)]) + whole[position + 1 :])
        try:
            assert (read_idx(path, 3) == expected).all(), position
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)


def test_a_checkpoint_without_permission_or_in_a_closed_folder(place: Path, tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path)
    path.chmod(0)
    for each in (path, place / "closed" / "lenet1.pt"):
        with permissions_hold(), pytest.raises(CheckpointError, match=rf"{each.name}: cannot be read: Permission denied"):
            read_checkpoint(each)


def test_the_usual_places_may_be_closed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command fails with one line; it does not silently use the data set of the next usual place."""
    monkeypatch.setattr(data, "usual_places", lambda: (place / "closed",))
    with permissions_hold():
        result = run_here(*TRAIN, "--out", str(tmp_path / "out"))
    assert result.returncode == 1
    assert result.stderr.startswith(f"alexnet-triton: {place}/closed/")
    assert result.stderr.endswith(": Permission denied\n")
    assert not (tmp_path / "out").exists()
