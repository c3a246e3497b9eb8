"""What is measured in each epoch of a run: values, the file ``metrics.jsonl``, and what a checkpoint keeps of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from .checkpoint import Checkpoint, CheckpointError, training_state

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
        loss: mean cross-entropy over the epoch's training images, as they were seen, in nats.
        train_acc, test_acc: fraction of images classified right; the former as they were seen, with dropout.
        images_per_s: training images a second, evaluation not counted.
        seconds: of training: from an idle device to an idle device, the data included; evaluation, compilation and the capture
            of a CUDA graph not.
        test_loss: mean cross-entropy over the test images, in nats; None where a version that did not keep it trained.
    """

    epoch: int
    loss: float
    train_acc: float
    test_acc: float
    images_per_s: float
    seconds: float
    test_loss: float | None = None

    def __post_init__(self) -> None:
        if type(self.epoch) is not int:
            raise TypeError(f"epoch is a {type(self.epoch).__name__}")
        for name, value in self.as_dict().items():
            check_number(name, value)

    def as_dict(self) -> dict[str, Any]:
        """What is known, by name: a line of the file."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "test_loss" or value is not None}


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
    """The metrics of the epochs in ``checkpoint``.

    Raises:
        CheckpointError: they are something else.
    """
    try:
        return [EpochMetrics(**metrics) for metrics in checkpoint.metrics]
    except TypeError as error:
        raise CheckpointError(f"{checkpoint.path}: damaged: its metrics are not those of epochs: {error}") from error


def learning_rates(checkpoint: Checkpoint, otherwise: float) -> list[float]:
    """The learning rate of each epoch in ``checkpoint``; in a file from before it kept them, its last one, or ``otherwise``.

    Raises:
        CheckpointError: they are something else, or there is no training state.
    """
    state = training_state(checkpoint)
    last = state["recipe"].get("lr", otherwise) if isinstance(state["recipe"], dict) else otherwise
    rates = state.get("learning_rates", [last] * len(checkpoint.metrics))
    if (
        not isinstance(rates, list)
        or len(rates) != len(checkpoint.metrics)
        or not all(isinstance(rate, int | float) for rate in rates)
    ):
        raise CheckpointError(f"{checkpoint.path}: damaged: 'learning_rates' are not those of its epochs")
    return list(rates)


def metrics_file(history: Sequence[EpochMetrics]) -> bytes:
    """The content of ``metrics.jsonl`` after ``history``, or the lines of it."""
    return "".join(json.dumps(metrics.as_dict()) + "\n" for metrics in history).encode()
