"""Listeners for the tests' runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alexnet_triton.training.listener import Listener


class Asked(Listener):
    """Asks to stop when ``stop`` returns True."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop  # type: ignore[method-assign]


class Watching(Listener):
    """Calls ``batch`` after each batch with the images so far, their loss, and their speed."""

    wants_batches = True

    def __init__(self, batch: Callable[[int, float, float], Any]) -> None:
        self.batch = batch  # type: ignore[method-assign]
