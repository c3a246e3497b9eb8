"""Signals that ask a run to stop, or to save and go on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

#: Asked between two steps; True ends training there with :class:`Stopped`.
Stop = Callable[[], bool]


class Stopped(Exception):
    """Training was asked to stop and did, between two steps. The message says where."""


class SaveAsked(Exception):
    """Training was asked to save and go on, and waits between two steps. The message says where."""


#: Signals that ask to stop: Ctrl-C, that of schedulers, and that of a terminal which is closed.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """In its block the first of :data:`STOPS` is noted, so that a run can finish its step and save, and each SIGUSR1 is.

    A second one to stop does what it does to any process: ends it at once. Not SIGHUP, which comes more than once for one
    reason: from a shell and from its terminal, or right after SIGTERM from systemd. A signal that was ignored before
    (``nohup``, a background job of a script) stays ignored. To be entered in the main thread.

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
        self._save = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (*STOPS, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:
                noted = self._note_save if number == signal.SIGUSR1 else self._note
                self._before[number] = signal.signal(number, noted)
        return self

    @contextlib.contextmanager
    def hearing_saves(self) -> Iterator[None]:
        """In this longer block SIGUSR1 is noted, before and after that of the others too: it never ends the process."""
        before = signal.getsignal(signal.SIGUSR1)
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGUSR1, self._note_save)
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGUSR1) == self._note_save:  # it may be ignored up to the end
                signal.signal(signal.SIGUSR1, before)

    def _note_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Of two that came at once, both handlers run, whatever the first one sets.
        self.received = self.received or signal.Signals(number)
        for each in self._before.keys() & set(STOPS):
            signal.signal(each, signal.SIG_IGN if self._repeats or each == signal.SIGHUP else signal.SIG_DFL)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        # Stopped without a signal: that came to another process, and is still to come to this one.
        ending = self._repeats and (self.received is not None or isinstance(error, Stopped))
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if ending else handler)  # type: ignore[arg-type]
        self._before = {}

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.received is not None

    def take_save(self) -> bool:
        """Whether to save and go on: once for all SIGUSR1 since it was asked last."""
        asked, self._save = self._save, False
        return asked
