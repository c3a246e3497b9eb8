"""The pictures of a run: what they show is computed here by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from alexnet_triton.data import Split, to_input
from alexnet_triton.evaluation import Predictions, predict_split
from alexnet_triton.plot import confusion_matrix, most_wrong, plot_confusion, plot_most_wrong

LABELS = torch.tensor([0, 0, 1, 2, 2, 2])
PREDICTIONS = Predictions(classes=torch.tensor([0, 1, 1, 0, 2, 1]), true=torch.tensor([0.9, 0.2, 0.8, 0.05, 0.7, 0.3]))


def split(channels: int) -> Split:
    size = (6, 8, 8) if channels == 1 else (6, channels, 8, 8)
    return Split(torch.randint(0, 256, size, dtype=torch.uint8), LABELS)


def test_confusion_counts_true_by_predicted() -> None:
    assert confusion_matrix(LABELS, PREDICTIONS.classes, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 1, 1]]


def test_the_most_wrong_come_first_and_the_right_ones_never() -> None:
    assert most_wrong(split(1), PREDICTIONS, 25).tolist() == [3, 1, 5]
    assert most_wrong(split(1), PREDICTIONS, 2).tolist() == [3, 1]


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_written(channels: int, tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    plot_confusion(split(channels), PREDICTIONS, names, tmp_path / "confusion.png", "title")
    plot_most_wrong(split(channels), PREDICTIONS, names, tmp_path / "wrong.png", "title")
    right = Predictions(LABELS, torch.ones(6))
    plot_most_wrong(split(channels), right, names, tmp_path / "nothing.png", "title")
    pictures = {name: imread(tmp_path / f"{name}.png") for name in ("confusion", "wrong", "nothing")}
    assert all(p.ndim == 3 and p.std() > 0.01 for p in pictures.values())
    assert (pictures["wrong"] < 0.5).mean() > (pictures["nothing"] < 0.5).mean()


def test_predictions_are_the_networks_in_eval_mode() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)).train()
    images = split(1)
    said = predict_split(net, images, batch_size=4, image_size=8, device=torch.device("cpu"))
    with torch.no_grad():
        probabilities = net.eval()(to_input(images.images, 8, torch.float32)).softmax(1)
    assert torch.equal(said.classes, probabilities.argmax(1))
    torch.testing.assert_close(said.true, probabilities[torch.arange(6), LABELS])
