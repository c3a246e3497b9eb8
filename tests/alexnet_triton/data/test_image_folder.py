"""Folders of the user's images: files and classes that are read; train, evaluate, predict and resume; errors."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

import kernels
from alexnet_triton.data import fashion_mnist as data
from alexnet_triton.data.augment import (
    EVERYTHING,
    LIGHT,
    LIGHT_FACTORS,
    NOTHING,
    Augment,
    augmented_input,
    draw_augmentation,
    draw_light,
    network_input,
)
from alexnet_triton.data.dataset import DataError, Dataset, Split
from alexnet_triton.data.image_files import read_image
from alexnet_triton.data.image_folder import (
    default_channels,
    is_image_folder,
    load_data,
    load_test,
)
from alexnet_triton.data.image_workers import default_workers
from alexnet_triton.training.checkpoint import read_checkpoint
from alexnet_triton.training.networks import new_model
from alexnet_triton.training.recipe import Recipe, Where
from alexnet_triton.training.trainer import Trainer

from ..command import run_here

CPU = torch.device("cpu")
ON_PYTORCH = ("--device", "cpu", "--backend", "torch")

#: Class -> the colour of its images; not in alphabetical order.
COLOURS = {"sky": (20, 90, 230), "brick": (220, 60, 40), "grass": (60, 200, 30)}


def write_images(folder: Path, counts: Mapping[str, int], side: int = 28) -> None:
    """Write ``counts[class]`` noisy images of each class; some are not square."""
    generator = torch.Generator().manual_seed(len(folder.name))
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise = torch.randint(-20, 20, (side + i % 3, side + i % 2, 3), generator=generator)
            pixels = (noise + torch.tensor(COLOURS.get(name, (90, 90, 90)))).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i:02}.png")


def write_folder(folder: Path, test: str = "test", train: int = 8, tests: int = 3) -> Path:
    write_images(folder / "train", dict.fromkeys(COLOURS, train))
    write_images(folder / test, dict.fromkeys(COLOURS, tests))
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 8 training and 3 test images; tests must not change the folder."""
    return write_folder(tmp_path_factory.mktemp("data") / "colours")


def load(folder: Path, channels: int = 3, **options: int) -> Dataset:
    return load_data(folder, size=20, channels=channels, **{"workers": 0} | options)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_file_is_an_image_of_its_folders_class(channels: int, colours: Path) -> None:
    found = load(colours, channels)
    assert found.classes == ("brick", "grass", "sky")
    assert (found.source, found.name) == (colours, "colours")
    for split, folder, count in ((found.train, "train", 8), (found.test, "test", 3)):
        assert (split.channels, split.size, len(split)) == (channels, 20, 3 * count)
        assert split.labels.tolist() == sorted([0, 1, 2] * count)
        assert split.images.dtype == torch.uint8
        paths = [colours / folder / name / f"{i:02}.png" for name in found.classes for i in range(count)]
        assert torch.equal(split.images, torch.stack([read_image(path, channels, 20) for path in paths]))


def test_workers_change_nothing_but_time(colours: Path) -> None:
    state = torch.get_rng_state()
    here, there = load(colours), load(colours, workers=2)
    assert torch.equal(here.train.images, there.train.images)
    assert torch.equal(state, torch.get_rng_state())


def test_workers_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    assert default_workers() == 12
    for processes, expected in ((2, 6), (4, 3), (100, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default_workers() == expected


def test_val_stands_in_for_test(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", test="val", train=2, tests=2)
    assert len(load(folder).test) == 6
    write_images(folder / "test", {"sky": 1})
    assert load(folder).test.labels.tolist() == [2]  # numbered as the training images' classes


def test_a_limit_leaves_some_of_every_class(colours: Path) -> None:
    found, all_of_it = load(colours, limit=6), load(colours)
    assert found.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(found.train.images, all_of_it.train.images[::4])
    assert len(load(colours, limit=1000).train) == 24


def test_what_is_a_folder_of_images(colours: Path, tmp_path: Path) -> None:
    assert is_image_folder(colours)
    assert default_channels(str(colours)) == 3
    for other in (None, "sample", data.SAMPLE, tmp_path, tmp_path / "nowhere"):
        assert not is_image_folder(other)
        assert default_channels(other) == 1
    assert load_data("sample", size=224, channels=1, limit=4).train.images.shape == (4, 28, 28)
    with pytest.raises(DataError, match="images have one channel, not 3"):
        load_data("sample", size=28, channels=3)
    with pytest.raises(DataError, match=r"holds neither Fashion-MNIST's files nor folders of images, train and test"):
        load_data(tmp_path, size=28, channels=1)


def _without(*names: str):
    return lambda folder: [shutil.rmtree(folder / name) for name in names]


FAULTS = {
    "one_class": (_without("train/sky", "train/grass"), r"train: holds one class only, brick: there must be two or more"),
    "no_train": (_without("train"), "no folder train in it"),
    "no_test": (_without("test"), "no folder test, val, valid or validation in it; --validation 0.2 takes a fifth"),
    "no_class": (_without(*(f"train/{name}" for name in COLOURS)), "train: holds no class folder"),
    "empty_class": (lambda folder: (folder / "train" / "water").mkdir(), "train/water: no image in it"),
    "class_without_training_images": (
        lambda folder: write_images(folder / "test", {"water": 1}),
        r"test/water: not one of the classes that are trained on: brick, grass, sky",
    ),
    "no_image": (lambda folder: (folder / "test" / "sky" / "01.png").write_text("?"), r"test/sky/01\.png: not an image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, tmp_path: Path) -> None:
    damage, message = FAULTS[fault]
    folder = write_folder(tmp_path / "a", train=1, tests=2)
    damage(folder)
    with pytest.raises(DataError, match=message) as error:
        load(folder)
    assert str(error.value).startswith(str(folder))
    if fault == "no_image":  # also from a worker
        result = run_here("train", "--data", str(folder), "--workers", "1", *ON_PYTORCH, cwd=tmp_path)
        assert result.returncode == 1
        assert result.stderr == f"alexnet-triton: {error.value}\n"
        assert not (tmp_path / "runs").exists()


def test_more_images_than_the_device_holds(colours: Path) -> None:
    message = r"train: 24 images of 3 x 1000000000 x 1000000000 take .* GB, more than cpu has free: use --stream, or take fewer"
    with pytest.raises(DataError, match=message):
        load_data(colours, size=10**9, channels=3, workers=0, stream=False)


def test_three_channels_are_made_an_input_each_by_itself() -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    index = torch.tensor([4, 0, 4])
    for change in (None, draw_augmentation(3, CPU, 8), draw_augmentation(3, CPU, 8, Augment(crop="resized"))):
        ours = network_input(images, index, 12, augmentation=change)
        assert ours.shape == (3, 3, 12, 12)
        for channel in range(3):
            alone = kernels.gather_resize(images[:, channel], index, 12, augmentation=change)
            assert torch.equal(ours[:, channel], alone[:, 0])


def test_the_light_of_the_paper() -> None:
    """The draws have the covariance of the paper's components, and all pixels of an image change by the same colour."""
    light = draw_light(20_000, CPU).double()
    components = torch.tensor(LIGHT, dtype=torch.float64).T * (0.1 * torch.tensor(LIGHT_FACTORS, dtype=torch.float64))
    torch.testing.assert_close(light.T @ light / len(light), components @ components.T, rtol=0.05, atol=2e-6)
    assert light.mean(0).abs().max() < 5e-4

    images = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8)
    torch.manual_seed(3)
    ours = augmented_input(images, torch.arange(4), 56)
    torch.manual_seed(3)
    augmentation = draw_augmentation(4, CPU, 56, Augment(flip=True, crop="pad"))
    assert augmentation.brightness is augmentation.contrast is None
    change = ours - network_input(images, torch.arange(4), 56, augmentation=augmentation)
    torch.testing.assert_close(change, draw_light(4, CPU)[:, :, None, None].expand_as(change), rtol=0, atol=1e-6)
    assert len(change[:, 0, 0, 0].unique()) == 4
    # The crop's largest offset is proportional to the side: 2 pixels at 28, 4 at 56.
    assert set(draw_augmentation(500, CPU, 56).offset.flatten().tolist()) == set(range(-4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_augmented_colours_differ_at_every_step(dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (6, 3, 28, 28), dtype=torch.uint8)
    split = Split(images, torch.arange(6) % 2)
    # With light alone, two losses may round to the same bfloat16 number.
    for augment in (NOTHING, EVERYTHING, Augment(colour=True))[: 3 if dtype == torch.float32 else 2]:
        net = new_model("lenet", 0, CPU, dtype, classes=2, channels=3)
        with kernels.use_backend("torch"):
            trainer = Trainer(net, split, Recipe("lenet", batch_size=6, lr=0.0, **dataclasses.asdict(augment)), Where(CPU))
            losses = {trainer.epoch(torch.Generator().manual_seed(0))[0] for _ in range(3)}
        assert len(losses) == (1 if augment == NOTHING else 3)


@pytest.fixture
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexnet_triton.cli.run.measure_speed", lambda *_: 1.0)  # measuring would take as long as the run


@pytest.mark.usefixtures("one_thread", "_no_speed")
def test_train_evaluate_predict_and_resume(colours: Path, tmp_path: Path) -> None:
    """Train on three classes, evaluate and predict; a resumed run is bit-identical to an uninterrupted one."""
    options = ("--model", "lenet", "--data", str(colours), "--batch-size", "8", "--lr", "0.5", "--augment", *ON_PYTORCH)
    trained = run_here("train", *options, "--epochs", "12", "--workers", "0", "--out", "whole", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert f"data {colours} (24 train, 9 test, 3 classes)" in trained.stdout
    path = tmp_path / "whole" / "checkpoint.pt"
    whole = read_checkpoint(path)
    assert (whole.classes, whole.channels, whole.size) == (["brick", "grass", "sky"], 3, 28)

    evaluated = run_here("evaluate", str(path), "--data", str(colours), "--workers", "0", *ON_PYTORCH)
    assert f"test accuracy {whole.metrics[-1]['test_acc']:.4f}" in evaluated.stdout, evaluated.stderr
    assert whole.metrics[-1]["loss"] < whole.metrics[0]["loss"]

    files = [str(colours / "test" / name / "00.png") for name in whole.classes]
    predicted = json.loads(run_here("predict", str(path), *files, "--json", *ON_PYTORCH).stdout)
    assert all(set(row) == set(whole.classes) for row in predicted.values())

    elsewhere = run_here("evaluate", str(path), "--data", "sample", *ON_PYTORCH)
    assert elsewhere.returncode == 1
    assert "the network has the classes brick, grass, sky, not those of Fashion-MNIST" in elsewhere.stderr

    parts = run_here("train", *options, "--epochs", "1", "--workers", "0", "--out", "parts", cwd=tmp_path)
    assert parts.returncode == 0, parts.stderr
    moved = shutil.copytree(colours, tmp_path / "moved")
    grey = run_here("train", "--resume", "parts", "--epochs", "12", "--channels", "1", cwd=tmp_path)
    assert grey.returncode == 2
    assert "has 3, not 1" in grey.stderr
    resumed = run_here("train", "--resume", "parts", "--epochs", "12", "--data", "moved", "--workers", "1", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    found = read_checkpoint(tmp_path / "parts" / "checkpoint.pt")
    assert all(torch.equal(whole.weights[key], weight) for key, weight in found.weights.items())
    (moved / "train" / "sky" / "00.png").unlink()
    changed = run_here("train", "--resume", "parts", "--epochs", "13", cwd=tmp_path)
    assert changed.returncode == 1
    assert "was trained with training images 24, this run has 23" in changed.stderr


def test_a_network_is_tested_on_its_own_classes(colours: Path) -> None:
    reordered = load_test(colours, classes=["sky", "grass", "brick", "water"], size=20, channels=1, workers=0)
    assert reordered.labels.tolist() == sorted([0, 1, 2] * 3, reverse=True)
    with pytest.raises(DataError, match="test/brick: not one of the classes that are trained on: a, b"):
        load_test(colours, classes=["a", "b"], size=20, channels=1, workers=0)
    assert len(load_test("sample", classes=data.CLASSES, size=28, channels=1, limit=7)) == 7


@pytest.mark.parametrize(
    ("option", "message"),
    [("--channels=2", "must be 1 (grey) or 3"), ("--workers=-1", "--workers")],
    ids=["channels", "workers"],
)
def test_bad_options(option: str, message: str, tmp_path: Path) -> None:
    result = run_here("train", option, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
