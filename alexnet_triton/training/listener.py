"""The callbacks of a run."""

from __future__ import annotations

from .metrics import EpochMetrics


class Listener:
    """Callbacks of a run, which do nothing here. A subclass prints, draws, or asks the run to stop.

    Attributes:
        wants_batches: whether to call :meth:`batch`. Its loss is read from the device, for which the host waits.
        restart: advice in the error message if a loss is not finite and there is no checkpoint yet. The message continues with
            "with a smaller --lr".
    """

    wants_batches: bool = False
    restart: str = "start again"

    def compiling(self, line: str) -> None:
        """Called while kernels are compiled, with a line of progress."""

    def ready(self) -> None:
        """Called once, when everything is compiled and captured and the first epoch begins. From then on a run can be saved."""

    def epoch_begins(self, epoch: int) -> None:
        """Called when training of ``epoch`` (from 1) begins, or of the rest of one that was stopped."""

    def batch(self, seen: int, loss: float, images_per_s: float) -> None:
        """Called a few times a second and at the end of an epoch, with the progress of the epoch.

        Args:
            seen: images of the epoch so far, over all processes.
            loss: mean loss of this process's images among them.
            images_per_s: images per second over all processes.
        """

    def waited(self, seconds: float, of: float) -> None:
        """Called if training waited for images for a large part of an epoch: ``seconds`` out of the epoch's ``of`` seconds."""

    def epoch_ends(self, metrics: EpochMetrics) -> None:
        """Called when an epoch has been trained, evaluated and saved."""

    def stop(self) -> bool:
        """Whether the run is to save and end. Called before each step and before each batch of an evaluation."""
        return False

    def save(self) -> bool:
        """Whether the run is to save and continue. Called before each step; return True once for each request."""
        return False

    def saved(self, line: str) -> None:
        """Called with a line for the user: about a requested checkpoint, or about images that cannot be read."""


#: A listener that ignores everything.
SILENT = Listener()
