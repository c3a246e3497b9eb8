"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType

#: Asked between two steps; True ends training there with :class:`Stopped`.
Stop = Callable[[], bool]


class Stopped(Exception):
    """Training was asked to stop and did, between two steps. The message says where."""


class StopSignals:
    """In its block the first SIGINT (Ctrl-C) or SIGTERM is noted, so that a run can finish its step and save.

    A second one does what it does to any process: ends it at once. A signal that was ignored before (``nohup``, a background
    job of a script) stays ignored. To be entered in the main thread.

    Attributes:
        received: the signal; None as long as there was none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.received is not None
