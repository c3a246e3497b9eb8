"""The metrics of each epoch of a run: their type, the file ``metrics.jsonl``, and their form in a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .checkpoint import Checkpoint, CheckpointError, from_file, training_state
from .recipe import Recipe

#: File in the folder of a run, beside its checkpoints: one line of JSON per epoch.
METRICS = "metrics.jsonl"


def check_number(name: str, value: object) -> None:
    """Raise a TypeError unless ``value`` is a Python number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a {type(value).__name__}")


@dataclasses.dataclass(frozen=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``.

    Attributes:
        epoch: number of the epoch, from 1.
        loss: mean cross-entropy in nats over the epoch's training images, measured during training, with the label smoothing
            and the class weights of the recipe.
        train_acc, test_acc: fraction of images classified right; the former measured during training, with dropout.
        images_per_s: training images per second, without evaluation.
        seconds: seconds of training, from an idle device to an idle device. They include reading the data, and exclude
            evaluation, compilation and the capture of a CUDA graph.
        test_loss: mean cross-entropy over the test images, neither smoothed nor weighted; None in older files.
        lr: learning rate of the epoch's last step; None in older files.
        test_top5: fraction of test images whose class is one of the five with the largest logits; None for ten classes or
            fewer, and in older files.
    """

    epoch: int
    loss: float
    train_acc: float
    test_acc: float
    images_per_s: float
    seconds: float
    test_loss: float | None = None
    lr: float | None = None
    test_top5: float | None = None

    def __post_init__(self) -> None:
        if type(self.epoch) is not int:
            raise TypeError(f"epoch is a {type(self.epoch).__name__}")
        for name, value in dataclasses.asdict(self).items():
            if value is not None or name not in ("test_loss", "lr", "test_top5"):
                check_number(name, value)

    def as_dict(self) -> dict[str, Any]:
        """The values that are not None, by name, as in a line of ``metrics.jsonl``."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def best_test_loss(history: Sequence[EpochMetrics]) -> EpochMetrics | None:
    """The first epoch with the least test loss, or None if no epoch has a test loss. NaN counts as infinite."""
    known = [metrics for metrics in history if metrics.test_loss is not None]
    return min(known, key=lambda m: math.inf if math.isnan(m.test_loss) else m.test_loss, default=None)  # type: ignore[arg-type,return-value]


def is_finished(history: Sequence[EpochMetrics], epochs: int, early_stop: int | None) -> bool:
    """Whether a run is finished: it has all ``epochs``, or ``early_stop`` epochs have passed without a better test loss."""
    best = best_test_loss(history)
    early = early_stop is not None and best is not None and history[-1].epoch - best.epoch >= early_stop
    return early or len(history) >= epochs


def history_of(checkpoint: Checkpoint) -> list[EpochMetrics]:
    """The metrics of the epochs in ``checkpoint``. An older checkpoint lacks learning rates: its training state has them.

    Raises:
        CheckpointError: the checkpoint's metrics are damaged, or a training state is needed and missing.
    """
    try:
        history = [EpochMetrics(**metrics) for metrics in checkpoint.metrics]
    except TypeError as error:
        raise CheckpointError(f"{checkpoint.path}: damaged: its metrics are not valid: {error}") from error
    if all(metrics.lr is not None for metrics in history):
        return history
    return [dataclasses.replace(m, lr=rate) for m, rate in zip(history, _old_learning_rates(checkpoint), strict=True)]


def _old_learning_rates(checkpoint: Checkpoint) -> list[float]:
    """The learning rate of each epoch in an older file whose metrics lack them; if it kept only the last, that for all.

    Raises:
        CheckpointError: the learning rates are damaged, or there is no training state.
    """
    state = training_state(checkpoint)
    last = from_file(Recipe, state["recipe"], checkpoint.path).lr
    rates = state.get("learning_rates", [last] * len(checkpoint.metrics))
    if (
        not isinstance(rates, list)
        or len(rates) != len(checkpoint.metrics)
        or not all(isinstance(rate, int | float) for rate in rates)
    ):
        raise CheckpointError(f"{checkpoint.path}: damaged: 'learning_rates' are not those of its epochs")
    return rates


def metrics_file(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """Encode epochs, in the form of :meth:`EpochMetrics.as_dict`, as lines of ``metrics.jsonl``."""
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
