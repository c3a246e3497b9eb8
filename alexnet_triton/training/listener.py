"""Who is told what happens in a run."""

from __future__ import annotations

from .metrics import EpochMetrics


class Listener:
    """What a run tells, and what it asks. Here nothing comes of it: a subclass prints, draws, asks the run to stop.

    Attributes:
        wants_batches: whether :meth:`batch` is to be called: what it is told is read from the device, for which the host waits.
        restart: what its user can do with a smaller learning rate where a loss is not finite and there is no checkpoint yet.
    """

    wants_batches: bool = False
    restart: str = "start again"

    def compiling(self, line: str) -> None:
        """Kernels are compiled: a line about that."""

    def ready(self) -> None:
        """Everything is compiled and captured, and the first epoch begins. Called once; from here on a run can be saved."""

    def epoch_begins(self, epoch: int) -> None:
        """An epoch, counted from 1, is trained, or the rest of one that was stopped."""

    def batch(self, seen: int, loss: float, images_per_s: float) -> None:
        """A few times a second and at the end of an epoch, how far it is.

        Args:
            seen: images so far, of all processes.
            loss: their mean loss, of this process's images.
            images_per_s: of all processes.
        """

    def waited(self, seconds: float, of: float) -> None:
        """So many ``seconds`` of an epoch, which took ``of`` of them, were without images to compute on."""

    def epoch_ends(self, metrics: EpochMetrics) -> None:
        """An epoch is trained, evaluated and saved."""

    def stop(self) -> bool:
        """Asked before each step and each batch of an evaluation: whether the run is to save and end."""
        return False

    def save(self) -> bool:
        """Asked before each step: whether the run is to save and go on. To be answered by True once for each such wish."""
        return False

    def saved(self, line: str) -> None:
        """The run was asked to save, and has: a line about that."""


#: Tells nobody.
SILENT = Listener()
