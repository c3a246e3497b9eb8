"""Listeners for training runs in tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alexnet_triton.training.listener import Listener


class Asked(Listener):
    """Asks the run to stop when ``stop()`` is true."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop  # type: ignore[method-assign]


class Watching(Listener):
    """Calls ``batch(images so far, their loss, images/s)`` for each batch."""

    wants_batches = True

    def __init__(self, batch: Callable[[int, float, float], Any]) -> None:
        self.batch = batch  # type: ignore[method-assign]
