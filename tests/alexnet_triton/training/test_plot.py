"""The pictures of a run, against values computed by hand."""

from __future__ import annotations

import os
import time
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from alexnet_triton.data.augment import to_input
from alexnet_triton.data.dataset import Split
from alexnet_triton.training.evaluation import Predictions, predict_split
from alexnet_triton.training.metrics import EpochMetrics
from alexnet_triton.training.plot import (
    MOST_NAMED,
    confusion_matrix,
    most_wrong,
    plot_comparison,
    plot_confusion,
    plot_curves,
    plot_most_wrong,
)

LABELS = torch.tensor([0, 0, 1, 2, 2, 2])
PREDICTIONS = Predictions(
    torch.tensor([0, 1, 1, 0, 2, 1]), LABELS, torch.tensor([0.9, 0.2, 0.8, 0.05, 0.7, 0.3]), torch.arange(6)
)


def split(channels: int) -> Split:
    size = (6, 8, 8) if channels == 1 else (6, channels, 8, 8)
    return Split(torch.randint(0, 256, size, dtype=torch.uint8), LABELS)


def test_confusion_counts_true_by_predicted() -> None:
    assert confusion_matrix(LABELS, PREDICTIONS.classes, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 1, 1]]


def test_the_most_wrong_come_first_and_the_right_ones_never() -> None:
    assert most_wrong(PREDICTIONS, 25).tolist() == [3, 1, 5]
    assert most_wrong(PREDICTIONS, 2).tolist() == [3, 1]


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_written(channels: int, tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    plot_confusion(PREDICTIONS, names, tmp_path / "confusion.png", "title")
    plot_most_wrong(split(channels), PREDICTIONS, names, tmp_path / "wrong.png", "title")
    right = Predictions(LABELS, LABELS, torch.ones(6), torch.arange(6))
    plot_most_wrong(split(channels), right, names, tmp_path / "nothing.png", "title")
    pictures = {name: imread(tmp_path / f"{name}.png") for name in ("confusion", "wrong", "nothing")}
    assert all(p.ndim == 3 and p.std() > 0.01 for p in pictures.values())
    assert (pictures["wrong"] < 0.5).mean() > (pictures["nothing"] < 0.5).mean()


def confusion_of(classes: int, path: Path) -> None:
    """A picture for one test image of each class, of which one in seven is predicted as the next class."""
    labels = torch.arange(classes)
    predicted = torch.where(labels % 7 == 0, (labels + 1) % classes, labels)
    names = [f"class {i}" for i in range(classes)]
    plot_confusion(Predictions(predicted, labels, torch.ones(classes), labels), names, path, "title")


def test_many_classes_are_a_picture_of_bounded_size(tmp_path: Path) -> None:
    """1,000 classes at half an inch each would be 3.6 billion pixels, and drawing names and ticks takes time."""
    begin = time.process_time()
    confusion_of(MOST_NAMED, tmp_path / "named.png")
    between = time.process_time()
    confusion_of(300, tmp_path / "many.png")
    assert time.process_time() - between < 2 * (between - begin)
    named, many = imread(tmp_path / "named.png"), imread(tmp_path / "many.png")
    assert named.shape == many.shape
    red, green, blue = many[..., 0], many[..., 1], many[..., 2]
    assert ((red < 0.2) & (green < 0.4) & (blue > 0.3)).any()  # dark blue: a class that is always predicted correctly


#: Names that are hard to draw: two formulas, the second with an unknown command; bytes that are not UTF-8.
NAMES = {"dollars": r"price $\in$ $\eur$", "not_utf_8": os.fsdecode(b"caf\xe9")}


@pytest.mark.parametrize("kind", NAMES)
def test_any_name_can_be_drawn(kind: str, tmp_path: Path) -> None:
    name = NAMES[kind]
    before = matplotlib.rcParams["text.parse_math"]
    names = [name, "b", "$"]
    history = [EpochMetrics(1, 1.0, 0.5, 0.5, 10.0, 1.0)]
    plot_curves(history, tmp_path / "curves.png", name)
    plot_comparison({name: history, "b": history}, tmp_path / "comparison.png", name)
    plot_confusion(PREDICTIONS, names, tmp_path / "confusion.png", name)
    plot_most_wrong(split(1), PREDICTIONS, names, tmp_path / "wrong.png", name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["comparison.png", "confusion.png", "curves.png", "wrong.png"]
    assert matplotlib.rcParams["text.parse_math"] == before  # other code may draw in this process


def test_predictions_are_the_networks_in_eval_mode() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)).train()
    images = split(1)
    said = predict_split(net, images, batch_size=4, image_size=8, device=torch.device("cpu"))
    with torch.no_grad():
        probabilities = net.eval()(to_input(images.images, 8, torch.float32)).softmax(1)
    assert torch.equal(said.classes, probabilities.argmax(1))
    torch.testing.assert_close(said.true, probabilities[torch.arange(6), LABELS])
