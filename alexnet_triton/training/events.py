"""TensorBoard events of a run's epochs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from .metrics import EpochMetrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

#: Folder of the event files, in the folder of a run.
EVENTS = "tensorboard"


def summary_writer() -> type[SummaryWriter]:
    """PyTorch's ``SummaryWriter``, which needs the package ``tensorboard``.

    Raises:
        ImportError: the package is missing, or PyTorch cannot use its version. The message says what to install.
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
    """Context manager that writes losses, accuracies, images per second and learning rate of each epoch to ``out / EVENTS``.

    All earlier epochs are written again, and TensorBoard ignores those of older files in the folder. This is needed since a run
    may resume from an older checkpoint than its newest, a process may have ended between a checkpoint and its events, and a
    run may have begun without events.

    Args:
        out: folder of the run.
        before: metrics of the epochs so far.

    Raises:
        ImportError: as :func:`summary_writer`.
        OSError: a file cannot be written, on entering or within the block. The error names the folder.
    """

    def __init__(self, out: Path, before: Sequence[EpochMetrics]) -> None:
        self.folder, self.before = out / EVENTS, list(before)
        self.make_writer = summary_writer()

    def __enter__(self) -> EpochEvents:
        self._excepthook = threading.excepthook
        threading.excepthook = self._note_thread
        try:
            with self._naming_the_folder():
                self.writer = self.make_writer(str(self.folder), purge_step=1)
                for metrics in self.before:
                    self._add(metrics)
                self.writer.flush()
        except BaseException:
            threading.excepthook = self._excepthook
            raise
        return self

    def _note_thread(self, failed: threading.ExceptHookArgs) -> None:
        """Exception hook without a traceback for the writer's thread: the next flush raises that thread's error."""
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self._excepthook(failed)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            with self._naming_the_folder():
                self.writer.close()
        finally:
            threading.excepthook = self._excepthook

    @contextlib.contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        """Add the folder to an OSError: the error that TensorBoard's writer passes on from its thread names no file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(self.folder)) from error

    def _add(self, metrics: EpochMetrics) -> None:
        values = {
            "loss/train": metrics.loss,
            "loss/test": metrics.test_loss,
            "accuracy/train": metrics.train_acc,
            "accuracy/test": metrics.test_acc,
            "accuracy/test_top5": metrics.test_top5,
            "images_per_s": metrics.images_per_s,
            "learning_rate": metrics.lr,
        }
        for tag, value in values.items():
            if value is not None:  # epochs of older checkpoints lack some values
                self.writer.add_scalar(tag, value, metrics.epoch)

    def write(self, metrics: EpochMetrics) -> None:
        """Write the metrics of one epoch and flush them to the file."""
        with self._naming_the_folder():
            self._add(metrics)
            self.writer.flush()  # else a killed process would lose up to two minutes of epochs
