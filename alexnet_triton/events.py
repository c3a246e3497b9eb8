"""A run's epochs as TensorBoard shows them."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from .training import EpochMetrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

#: In the folder of a run.
EVENTS = "tensorboard"


def summary_writer() -> type[SummaryWriter]:
    """PyTorch's writer, which needs the package ``tensorboard``.

    Raises:
        ImportError: it is not there, or one that PyTorch cannot use; the message says what to install.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"--tensorboard needs the package tensorboard ({error}): pip install 'alexnet-triton[tensorboard]', "
            "or give --no-tensorboard"
        ) from error
    return SummaryWriter


class EpochEvents:
    """In its block, writes loss, accuracies, images a second and learning rate of each epoch into ``out / EVENTS``.

    Args:
        out: folder of the run.
        first: the epoch that comes next. What the folder already has of it and of later ones, TensorBoard leaves out: a run may
            go on from an older checkpoint than its newest.
        lr: learning rate of the epochs to come.

    Raises:
        ImportError: as :func:`summary_writer`.
    """

    def __init__(self, out: Path, first: int, lr: float) -> None:
        self.lr = lr
        self.writer = summary_writer()(str(out / EVENTS), purge_step=first)

    def __enter__(self) -> EpochEvents:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.writer.close()

    def write(self, metrics: EpochMetrics) -> None:
        """Write one epoch; it is in the file when this returns."""
        values = {
            "loss/train": metrics.loss,
            "accuracy/train": metrics.train_acc,
            "accuracy/test": metrics.test_acc,
            "images_per_s": metrics.images_per_s,
            "learning_rate": self.lr,
        }
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, metrics.epoch)
        self.writer.flush()  # else a killed process would take up to two minutes of epochs with it
