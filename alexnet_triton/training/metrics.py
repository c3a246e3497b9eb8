"""What is measured in each epoch of a run: values, the file ``metrics.jsonl``, and what a checkpoint keeps of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .checkpoint import Checkpoint, CheckpointError, from_file, training_state
from .recipe import Recipe

#: In the folder of a run, beside its checkpoints: a line of JSON an epoch.
METRICS = "metrics.jsonl"


def check_number(name: str, value: object) -> None:
    """Raise a TypeError unless ``value`` is a Python number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a {type(value).__name__}")


@dataclasses.dataclass(frozen=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``.

    Attributes:
        epoch: from 1.
        loss: mean cross-entropy over the epoch's training images, as they were seen, in nats; with the label smoothing and the
            class weights of the recipe.
        train_acc, test_acc: fraction of images classified right; the former as they were seen, with dropout.
        images_per_s: training images a second, evaluation not counted.
        seconds: of training: from an idle device to an idle device, the data included; evaluation, compilation and the capture
            of a CUDA graph not.
        test_loss: mean cross-entropy over the test images, neither smoothed nor weighted; None in files from before it was
            kept.
        lr: learning rate of the epoch's last step; None as ``test_loss``.
        test_top5: fraction of test images whose class is one of the five of the largest logits; None where there are ten
            classes or fewer, and as ``test_loss``.
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
        """What is known, by its name: as files keep it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def best_test_loss(history: Sequence[EpochMetrics]) -> EpochMetrics | None:
    """The first epoch of the least test loss, of those that know theirs; None if none does. NaN is no loss at all."""
    known = [metrics for metrics in history if metrics.test_loss is not None]
    return min(known, key=lambda m: math.inf if math.isnan(m.test_loss) else m.test_loss, default=None)  # type: ignore[arg-type,return-value]


def is_finished(history: Sequence[EpochMetrics], epochs: int, early_stop: int | None) -> bool:
    """Whether a run has come to its end: all ``epochs``, or ``early_stop`` of them without a better test loss."""
    best = best_test_loss(history)
    early = early_stop is not None and best is not None and history[-1].epoch - best.epoch >= early_stop
    return early or len(history) >= epochs


def history_of(checkpoint: Checkpoint) -> list[EpochMetrics]:
    """The metrics of the epochs in ``checkpoint``, which can be resumed.

    Raises:
        CheckpointError: they are something else, or there is no training state.
    """
    try:
        history = [EpochMetrics(**metrics) for metrics in checkpoint.metrics]
    except TypeError as error:
        raise CheckpointError(f"{checkpoint.path}: damaged: its metrics are not those of epochs: {error}") from error
    if all(metrics.lr is not None for metrics in history):
        return history
    return [dataclasses.replace(m, lr=rate) for m, rate in zip(history, _old_learning_rates(checkpoint), strict=True)]


def _old_learning_rates(checkpoint: Checkpoint) -> list[float]:
    """The learning rate of each epoch in a file from before metrics had it; from before it kept them, its last one.

    Raises:
        CheckpointError: they are something else, or there is no training state.
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
    """The content of ``metrics.jsonl``, or some lines of it: epochs as :meth:`EpochMetrics.as_dict` gives them."""
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
