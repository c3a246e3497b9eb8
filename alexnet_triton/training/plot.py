"""Plots of a run: training curves, confusion matrix, the images whose true class is least probable."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..data.stream import AnySplit
from .evaluation import Predictions
from .metrics import EpochMetrics

matplotlib.use("Agg")

#: The most classes that are named beside a confusion matrix, and the most for which counts are written in it: more would be
#: illegible.
MOST_NAMED, MOST_COUNTED = 50, 30

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _names_as_they_stand(plot: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate ``plot`` so that Matplotlib parses no formulas: names of classes and folders may contain dollar signs."""

    @functools.wraps(plot)
    def plain(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with matplotlib.rc_context({"text.parse_math": False}):
            return plot(*args, **kwargs)

    return plain


def _drawable(name: str) -> str:
    """``name`` with invalid characters written as escapes: the bytes of a file's name need not be UTF-8."""
    return name.encode(errors="backslashreplace").decode()


#: Colours of training loss, test loss, training accuracy and test accuracy in the curves of one run.
_CURVE_COLOURS = ("tab:red", "tab:orange", "tab:blue", "tab:green")


def plot_curves(history: Sequence[EpochMetrics], path: Path, title: str) -> None:
    """Write a PNG of training and test loss (left axis) and training and test accuracy (right axis) over epochs."""
    _plot_runs([("", history, _CURVE_COLOURS)], path, title)


def plot_comparison(histories: Mapping[str, Sequence[EpochMetrics]], path: Path, title: str) -> None:
    """Write one PNG with the curves of :func:`plot_curves` for several runs, each run in its own colour."""
    runs = [(f"{_drawable(name)}: ", history, (f"C{i}",) * 4) for i, (name, history) in enumerate(histories.items())]
    _plot_runs(runs, path, title)


@_names_as_they_stand
def _plot_runs(
    runs: Sequence[tuple[str, Sequence[EpochMetrics], Sequence[str]]],  # (prefix of the labels, metrics, four colours)
    path: Path,
    title: str,
) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    loss_axis = figure.add_subplot()
    accuracy_axis = loss_axis.twinx()
    lines = []
    for label, history, colours in runs:
        epochs = [m.epoch for m in history]
        # Older files lack test losses: the curve has no point there.
        test_loss = [math.nan if m.test_loss is None else m.test_loss for m in history]
        lines += [
            *loss_axis.plot(epochs, [m.loss for m in history], "o-", color=colours[0], label=f"{label}training loss"),
            *loss_axis.plot(epochs, test_loss, "v:", color=colours[1], label=f"{label}test loss"),
            *accuracy_axis.plot(
                epochs, [m.train_acc for m in history], "s--", color=colours[2], label=f"{label}training accuracy"
            ),
            *accuracy_axis.plot(epochs, [m.test_acc for m in history], "^-", color=colours[3], label=f"{label}test accuracy"),
        ]
    loss_axis.set(xlabel="epoch", ylabel="cross-entropy (nats)", ylim=(0, None))
    loss_axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy_axis.set(ylabel="accuracy", ylim=(0, 1))
    loss_axis.grid(alpha=0.3)
    # Matplotlib fills a legend column by column: one column for each run, or two columns for a single run.
    figure.legend(handles=lines, loc="outside lower center", ncols=len(runs) if len(runs) > 1 else 2, frameon=False)
    loss_axis.set_title(_drawable(title), fontsize=10)
    figure.savefig(path, dpi=150)


def confusion_matrix(labels: torch.Tensor, predicted: torch.Tensor, classes: int) -> torch.Tensor:
    """Number of images of each true class (rows) predicted as each class (columns): int64 (classes, classes)."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)


@_names_as_they_stand
def plot_confusion(predictions: Predictions, names: Sequence[str], path: Path, title: str) -> None:
    """Write the confusion matrix as a PNG: counts, coloured by their share of the true class.

    The picture's side grows with the number of classes up to :data:`MOST_NAMED`. More classes are not named but numbered, in
    the order of ``names``.
    """
    counts = confusion_matrix(predictions.labels, predictions.classes, len(names))
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = 2.5 + 0.5 * min(len(names), MOST_NAMED)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= MOST_NAMED:
        labels = [*map(_drawable, names)]
        axes.set_xticks(range(len(names)), labels, rotation=90)
        axes.set_yticks(range(len(names)), labels)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) <= MOST_COUNTED:
        for row, column in ((r, c) for r in range(len(names)) for c in range(len(names)) if counts[r, c]):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour, fontsize=8)
    axes.set_title(_drawable(title), fontsize=10)
    figure.savefig(path, dpi=120)


def most_wrong(predictions: Predictions, most: int) -> torch.Tensor:
    """Indices into ``predictions`` of at most ``most`` wrongly classified images, least probable true class first."""
    wrong = (predictions.classes != predictions.labels).nonzero()[:, 0]
    return wrong[predictions.true[wrong].argsort(stable=True)][:most]


@_names_as_they_stand
def plot_most_wrong(split: AnySplit, predictions: Predictions, names: Sequence[str], path: Path, title: str) -> None:
    """Write a PNG of the 25 :func:`most_wrong` images, each with its true class, its probability, and the predicted class."""
    figure = Figure(figsize=(10, 11), layout="constrained")
    indices = most_wrong(predictions, 25).tolist()
    for place, i in enumerate(indices, start=1):
        axes = figure.add_subplot(5, 5, place)
        image = split.image(int(predictions.index[i]))
        axes.imshow(image.numpy() if image.ndim == 2 else image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        true, predicted = (_drawable(names[int(label)]) for label in (predictions.labels[i], predictions.classes[i]))
        axes.set_title(f"{true} ({predictions.true[i]:.1%})\nas {predicted}", fontsize=8)
    figure.suptitle(_drawable(title) + (": no image is misclassified" if not indices else ""), fontsize=10)
    figure.savefig(path, dpi=120)
