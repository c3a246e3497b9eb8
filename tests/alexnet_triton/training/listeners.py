"""Listeners of the tests' runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alexnet_triton.training.listener import Listener


class Asked(Listener):
    """Asks to stop when ``stop`` says so."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop  # type: ignore[method-assign]


class Watching(Listener):
    """Keeps, or hands on, what it is told of each batch: images so far, their loss, their speed."""

    wants_batches = True

    def __init__(self, batch: Callable[[int, float, float], Any]) -> None:
        self.batch = batch  # type: ignore[method-assign]
