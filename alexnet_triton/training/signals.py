"""Signals that request a run to stop, or to save and continue."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

#: Called between two steps. True ends training there with :class:`Stopped`.
Stop = Callable[[], bool]


class Stopped(Exception):
    """Training stopped on request between two steps. The message says where."""


class SaveAsked(Exception):
    """Training paused between two steps because a checkpoint was requested. The message says where."""


#: Signals that request a stop: Ctrl-C, a scheduler's, and that of a closed terminal.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Context manager that records the first signal of :data:`STOPS`, so that a run can finish its step and save.

    Each SIGUSR1 is recorded too, as a request to save and continue. A second stop signal ends the process at once, by its
    default action. SIGHUP does not: it can come twice for one reason, from a shell and from its terminal, or right after
    SIGTERM from systemd. A signal that was ignored before (``nohup``, a background job of a script) stays ignored. Enter the
    block in the main thread.

    Args:
        repeats: whether one request can come as several signals, as it does to the processes of a launcher
            (:attr:`.distributed.Processes.launched`). Then all signals after the first are ignored until the process has
            ended. They must not end it while it saves, or while other processes wait for it. The launcher can use SIGKILL.

    Attributes:
        received: the first stop signal; None if there was none.
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
        """Record SIGUSR1 in this longer block too, before and after the block for stop signals: it never ends the process."""
        before = signal.getsignal(signal.SIGUSR1)
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGUSR1, self._note_save)
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGUSR1) == self._note_save:  # __exit__ may have left it ignored until the end
                signal.signal(signal.SIGUSR1, before)

    def _note_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        # If two signals come at once, both handlers run, even if the first handler changes the second signal's action.
        self.received = self.received or signal.Signals(number)
        for each in self._before.keys() & set(STOPS):
            signal.signal(each, signal.SIG_IGN if self._repeats or each == signal.SIGHUP else signal.SIG_DFL)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        # Stopped without a signal: another process received it, and it is still to come to this process.
        ending = self._repeats and (self.received is not None or isinstance(error, Stopped))
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if ending else handler)  # type: ignore[arg-type]
        self._before = {}

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.received is not None

    def take_save(self) -> bool:
        """Whether to save and continue: True if a SIGUSR1 came since the last call."""
        asked, self._save = self._save, False
        return asked
