"""ImageNet's form in small: many classes, the paper's recipe, patches, top-5 accuracy, ten crops."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import kernels
from alexnet_triton.data.image_folder import load_test
from alexnet_triton.training.checkpoint import read_checkpoint
from alexnet_triton.training.evaluation import evaluate, top5_hits
from alexnet_triton.training.networks import load_checkpoint
from alexnet_triton.training.recipe import LEARNING_RATES, RECIPES

from ...made_images import make
from ..command import run, run_here
from ..training.test_resume import contents

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ON_PYTORCH = ("--workers", "0", "--device", "cpu", "--backend", "torch")
OF_SAMPLE = ("--model", "lenet", "--data", "sample", "--limit", "8", "--epochs", "1", *ON_PYTORCH)
CLASSES = 12
EPOCHS = ("--lr", "0.2", "--batch-size", "8", "--schedule", "constant")


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexnet_triton.cli.run.measure_speed", lambda *_: 1.0)  # the measurement takes as long as the run


def train(*options: str, cwd: Path) -> str:
    data = ("--data", "../images", "--model", "lenet", "--channels", "3", "--recipe", "paper")
    return run("train", *data, *ON_PYTORCH, *options, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder ``runs`` with a run of two epochs by the paper's recipe, beside ``images``, a set of 12 classes."""
    folder = tmp_path_factory.mktemp("imagenet")
    make(folder / "images", images=8 * CLASSES, classes=CLASSES, side=40)
    (folder / "runs").mkdir()
    train(*EPOCHS, "--epochs", "2", "--out", "run", cwd=folder / "runs")
    return folder / "runs"


def test_the_papers_recipe_trains(folder: Path) -> None:
    """Images are held at 32 x 32 for patches of 28 x 28. A resumed run is bit-identical."""
    kept = read_checkpoint(folder / "run" / "checkpoint.pt")
    assert (kept.size, kept.channels, len(kept.classes)) == (32, 3, CLASSES)
    assert kept.training is not None
    given = {"epochs": 2, "batch_size": 8, "lr": 0.2, "schedule": "constant"}
    expected = RECIPES["paper"] | given
    assert {name: kept.training["recipe"][name] for name in expected} == expected
    assert LEARNING_RATES["paper"]["alexnet"] == 0.01
    train(*EPOCHS, "--epochs", "1", "--out", "parts", cwd=folder)
    run("train", "--resume", "parts", "--epochs", "2", cwd=folder)
    assert contents(folder / "parts") == contents(folder / "run")


def test_top5_is_written_and_printed(folder: Path) -> None:
    """The metrics equal an evaluation of the middle patches."""
    last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    printed = run("evaluate", "run/checkpoint.pt", *ON_PYTORCH, cwd=folder)
    expected = f"test accuracy {last['test_acc']:.4f}  top-5 {last['test_top5']:.4f}  test loss {last['test_loss']:.4f}"
    assert expected in printed
    assert f"{CLASSES} test images" in printed
    net, kept = load_checkpoint(folder / "run" / "checkpoint.pt", CPU)
    assert kept.normalization is not None
    test = load_test(folder.parent / "images", classes=kept.classes, size=32, channels=3, workers=0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (kept.normalization.mean, kept.normalization.std))
    inputs = (test.images[..., 2:30, 2:30] / 255 - mean) / std
    with kernels.use_backend("torch"), torch.no_grad():
        logits = net.eval()(inputs)
    ranks = (logits > logits.gather(1, test.labels[:, None])).sum(1)
    assert last["test_acc"] == pytest.approx((ranks < 1).double().mean().item())
    assert last["test_top5"] == pytest.approx((ranks < 5).double().mean().item())
    assert 0 < last["test_top5"] <= 1

    probabilities = logits.softmax(1)
    files = sorted((folder.parent / "images" / "val" / "class0003").iterdir())
    said = json.loads(run("predict", "run/checkpoint.pt", str(files[0]), "--json", *ON_PYTORCH[2:], cwd=folder))
    for name, probability in said[str(files[0])].items():
        assert probability == pytest.approx(probabilities[3, kept.classes.index(name)].item(), rel=1e-4)


def test_an_epochs_line_says_it_of_many_classes(folder: Path) -> None:
    printed = train(*EPOCHS, "--epochs", "1", "--crop", "none", "--out", "none", cwd=folder)
    (metrics,) = read_checkpoint(folder / "none" / "checkpoint.pt").metrics
    assert f"test acc {metrics['test_acc']:.4f}  top-5 {metrics['test_top5']:.4f}  test loss " in printed
    few = run("train", *OF_SAMPLE, "--out", "few", cwd=folder)
    assert "top-5" not in few
    assert "test_top5" not in json.loads((folder / "few" / "metrics.jsonl").read_text())


@pytest.mark.parametrize("crop", ["patch", "none"])
def test_ten_crops_average_the_probabilities(crop: str, folder: Path) -> None:
    """A network trained on whole images does so too; its crops are cut from larger images."""
    train(*EPOCHS, "--epochs", "1", "--crop", crop, "--out", f"ten-{crop}", cwd=folder)
    path = folder / f"ten-{crop}" / "best.pt"
    net, kept = load_checkpoint(path, CPU)
    assert kept.normalization is not None
    test = load_test(folder.parent / "images", classes=kept.classes, size=32, channels=3, workers=0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (kept.normalization.mean, kept.normalization.std))
    pixels = (test.images / 255 - mean) / std
    total = torch.zeros(len(test), CLASSES, dtype=torch.float64)
    with kernels.use_backend("torch"), torch.no_grad():
        net.eval()
        for top, left in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)):
            patch = pixels[..., top : top + 28, left : left + 28]
            total += net(patch).double().softmax(1) + net(patch.flip(-1)).double().softmax(1)
        test = dataclasses.replace(test, normalization=kept.normalization)
        found = evaluate(net, test, batch_size=5, image_size=28, device=CPU, ten_crop=True)
    ranks = (total > total.gather(1, test.labels[:, None])).sum(1)
    loss = -(total / 10).gather(1, test.labels[:, None]).log().mean().item()
    expected = (loss, (ranks < 1).double().mean().item(), (ranks < 5).double().mean().item())
    assert found == pytest.approx(expected, rel=1e-5)
    printed = run("evaluate", str(path), "--ten-crop", *ON_PYTORCH, cwd=folder)
    assert f"test accuracy {expected[1]:.4f}  top-5 {expected[2]:.4f}  test loss {expected[0]:.4f}" in printed


@pytest.mark.parametrize("crop", [("--crop", "patch"), ("--recipe", "paper")], ids=" ".join)
def test_fashion_mnist_has_no_patches(crop: tuple[str, ...], tmp_path: Path) -> None:
    for model, side, held in (("alexnet", 224, 256), ("lenet", 28, 32)):
        refused = run_here("train", "--model", model, "--data", "sample", *crop, *ON_PYTORCH, cwd=tmp_path)
        expected = f"--crop patch cuts {side} x {side} pixels from {held} x {held}, the images are 28 x 28: give --crop pad"
        assert (refused.returncode, refused.stderr.strip()) == (1, f"alexnet-triton: {expected}")
    assert not list(tmp_path.rglob("*.pt"))


def test_ten_crops_need_larger_images(folder: Path, tmp_path: Path) -> None:
    run("train", *OF_SAMPLE, "--out", "run", cwd=tmp_path)
    refused = run_here("evaluate", "run", "--ten-crop", *ON_PYTORCH, cwd=tmp_path)
    assert refused.returncode == 1
    assert "--ten-crop cuts 28 x 28 from larger images, these are 28 x 28" in refused.stderr
    net, kept = load_checkpoint(folder / "run" / "best.pt", CPU)
    test = load_test(folder.parent / "images", classes=kept.classes, size=28, channels=3, workers=0)
    with pytest.raises(ValueError, match="ten crops of side 28 need larger images, got side 28"):
        evaluate(net, test, batch_size=8, image_size=28, device=CPU, ten_crop=True)


def test_a_row_with_a_nan_is_no_hit() -> None:
    logits = torch.arange(12.0).repeat(5, 1)
    logits[1, 3] = torch.nan  # in another class than the label
    logits[2, 11] = torch.nan  # in the label's class
    labels = torch.tensor([7, 11, 11, 6, 9])
    assert top5_hits(logits, labels).item() == 2
    assert top5_hits(torch.full((4, 11), torch.nan), torch.arange(4)).item() == 0
    tied = torch.zeros(11, 11)
    assert top5_hits(tied, torch.arange(11)).item() == 5  # topk takes five of the tied classes
