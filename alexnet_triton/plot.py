"""Training curves as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .training import EpochMetrics

matplotlib.use("Agg")


def plot_curves(history: Sequence[EpochMetrics], path: Path, title: str) -> None:
    """Write loss (left axis) and both accuracies (right axis) over epochs as a PNG."""
    epochs = [m.epoch for m in history]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    loss_axis = figure.add_subplot()
    accuracy_axis = loss_axis.twinx()
    lines = [
        *loss_axis.plot(epochs, [m.loss for m in history], "o-", color="tab:red", label="training loss"),
        *accuracy_axis.plot(epochs, [m.train_acc for m in history], "s--", color="tab:blue", label="training accuracy"),
        *accuracy_axis.plot(epochs, [m.test_acc for m in history], "^-", color="tab:green", label="test accuracy"),
    ]
    loss_axis.set(xlabel="epoch", ylabel="cross-entropy (nats)", ylim=(0, None))
    loss_axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy_axis.set(ylabel="accuracy", ylim=(0, 1))
    loss_axis.grid(alpha=0.3)
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
    loss_axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
