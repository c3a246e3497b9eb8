"""The listener of a run on the command line: printed lines, progress bar, TensorBoard events, stop signals."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..training.events import EpochEvents
from ..training.listener import Listener
from ..training.metrics import EpochMetrics
from ..training.signals import StopSignals
from .options import console


class Bar:
    """The progress bar of an epoch. It shows nothing if the output is no terminal."""

    def __init__(self, images: int, epochs: int) -> None:
        self.images = images
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} images/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=images, epoch=0, loss=0.0, speed=0.0)

    @property
    def shown(self) -> bool:
        """Whether the bar is displayed."""
        return not self.progress.disable

    def begin(self, epoch: int) -> None:
        """Reset the bar for the epoch number ``epoch``."""
        self.progress.reset(self.task, total=self.images, epoch=epoch, loss=0.0, speed=0.0)

    def update(self, seen: int, loss: float, images_per_s: float) -> None:
        """Show the values that :meth:`.listener.Listener.batch` is given."""
        self.progress.update(self.task, completed=seen, loss=loss, speed=images_per_s)


class Screen(Listener):
    """The listener of a run of the command line.

    Args:
        bar: of the run's epochs; the caller displays it.
        stops: notes the signals that ask to stop; entered in :meth:`ready`, when the run can first be saved.
        events: writes each epoch for TensorBoard; None: no events. Entered in :meth:`ready`.
        block: the stack that ``stops`` and ``events`` are entered into.
        on_ready: called at the end of :meth:`ready`.
        restart: as in :class:`Listener`.

    Attributes:
        ready_at: time of the call of :meth:`ready`, by ``time.perf_counter``.
    """

    def __init__(
        self,
        bar: Bar,
        stops: StopSignals,
        events: EpochEvents | None,
        block: contextlib.ExitStack,
        on_ready: Callable[[], object],
        restart: str,
    ) -> None:
        self.bar, self.stops, self.events, self.block = bar, stops, events, block
        self.on_ready, self.restart = on_ready, restart
        self.wants_batches = bar.shown
        self.ready_at = 0.0

    def compiling(self, line: str) -> None:
        console.print(line)

    def ready(self) -> None:
        self.ready_at = time.perf_counter()
        self.block.enter_context(self.stops)
        if self.events is not None:
            self.block.enter_context(self.events)
        self.on_ready()

    def epoch_begins(self, epoch: int) -> None:
        self.bar.begin(epoch)

    def batch(self, seen: int, loss: float, images_per_s: float) -> None:
        self.bar.update(seen, loss, images_per_s)

    def waited(self, seconds: float, of: float) -> None:
        console.print(
            f"the steps waited {seconds:.1f} of {of:.1f} s for images: decode in more processes by --workers N, up to one per "
            "core, use smaller image files, or hold the images in memory by --no-stream if they fit"
        )

    def epoch_ends(self, metrics: EpochMetrics) -> None:
        top5 = "" if metrics.test_top5 is None else f"top-5 {metrics.test_top5:.4f}  "
        console.print(
            f"epoch {metrics.epoch:3d}  loss {metrics.loss:.4f}  train acc {metrics.train_acc:.4f}  "
            f"test acc {metrics.test_acc:.4f}  {top5}test loss {metrics.test_loss:.4f}  lr {metrics.lr:.3g}  "
            f"{metrics.images_per_s:.1f} images/s  {metrics.seconds:.1f} s"
        )
        if self.events is not None:
            self.events.write(metrics)

    def stop(self) -> bool:
        return self.stops()

    def save(self) -> bool:
        return self.stops.take_save()

    def saved(self, line: str) -> None:
        console.print(line, markup=False)
