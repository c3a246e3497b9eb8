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

    Args:
        repeats: whether one request comes as several signals, as to the processes of a launcher
            (:attr:`.distributed.Processes.launched`). Then all after the first are ignored, until the process has
            ended: they must not end it while it still saves, or while others wait for it to leave with them. The launcher has
            SIGKILL for one that does not end.

    Attributes:
        received: the signal; None as long as there was none.
    """

    def __init__(self, *, repeats: bool = False) -> None:
        self.received: signal.Signals | None = None
        self._repeats = repeats
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Of two that came at once, both handlers run, whatever the first one sets.
        self.received = self.received or signal.Signals(number)
        for each in self._before:
            signal.signal(each, signal.SIG_IGN if self._repeats else signal.SIG_DFL)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        # Stopped without a signal: that came to another process, and is still to come to this one.
        ending = self._repeats and (self.received is not None or isinstance(error, Stopped))
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if ending else handler)  # type: ignore[arg-type]
        self._before = {}

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.received is not None
