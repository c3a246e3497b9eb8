"""On SIGTERM, SIGHUP or Ctrl-C a run finishes its step, saves and prints how to resume; a second signal ends it at once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from alexnet_triton.cli import run as cli_run
from alexnet_triton.training import signals
from alexnet_triton.training.checkpoint import read_checkpoint
from alexnet_triton.training.listener import Listener
from alexnet_triton.training.signals import STOPS, Stopped, StopSignals
from alexnet_triton.training.trainer import Trainer

from ..command import run_here
from .test_resume import CASES, contents, resume, run

pytestmark = pytest.mark.usefixtures("one_thread")

EACH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
NOTED = (*STOPS, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    """Restore default handlers: a suite started in the background by a shell ignores SIGINT, and so would its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


def _default_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(*command: object, start_new_session: bool = False, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start ``python COMMAND`` with default signal handlers, even if this process runs in the background of a script."""
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
        cwd=cwd,
        preexec_fn=_default_signals,
    )


def read_until(process: subprocess.Popen[str], beginning: str, timeout: float = 120) -> None:
    """Read lines of the process's output up to one that begins with ``beginning``."""
    assert process.stdout is not None
    end = time.monotonic() + timeout
    while select.select([process.stdout], [], [], max(0, end - time.monotonic()))[0]:
        line = process.stdout.readline()
        if line.startswith(beginning):
            return
        assert line, process.communicate()
    process.kill()
    raise AssertionError(f"no line {beginning!r} within {timeout} s: {process.communicate()}")


@EACH
def test_the_first_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(s) for s in NOTED]
    with StopSignals() as stops:
        assert not stops()
        os.kill(os.getpid(), number)
        assert stops()
        assert stops.received is number
        assert [signal.getsignal(s) for s in STOPS] == [signal.SIG_DFL, signal.SIG_DFL, signal.SIG_IGN]
        os.kill(os.getpid(), signal.SIGUSR1)  # must not end the process while it saves
    assert [signal.getsignal(s) for s in NOTED] == before


def test_sigusr1_is_noted_until_it_is_asked_for_and_stops_nothing() -> None:
    with StopSignals() as stops:
        assert not stops.take_save()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert [stops.take_save(), stops.take_save(), stops()] == [True, False, False]


def test_sigusr1_before_the_first_step_and_after_the_last_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal while data are read makes the run save before its first step; one while pictures are drawn has no effect."""

    def signalling(function: Callable[..., object]) -> Callable[..., object]:
        def signalled(*args: Any, **kwargs: Any) -> object:
            os.kill(os.getpid(), signal.SIGUSR1)
            return function(*args, **kwargs)

        return signalled

    for name in ("load_data", "plot_curves"):
        monkeypatch.setattr(cli_run, name, signalling(getattr(cli_run, name)))
    before = signal.getsignal(signal.SIGUSR1)
    options = ("--model", "lenet", "--data", "sample", "--limit", "24", "--batch-size", "8", "--device", "cpu", "--epochs", "1")
    result = run_here("train", *options, "--backend", "torch", "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert "saved in epoch 1 after step 0 of 3: " in result.stdout
    assert (tmp_path / "run" / "curves.png").exists()
    assert signal.getsignal(signal.SIGUSR1) == before


@EACH
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
def test_a_launchers_signals_after_the_first_are_ignored_to_the_end(elsewhere: bool, number: signal.Signals) -> None:
    """Any later signal is ignored, also if the first one reached another process, which stopped this one too."""
    before = [signal.getsignal(s) for s in NOTED]
    try:
        with contextlib.suppress(Stopped), StopSignals(repeats=True) as stops:
            if not elsewhere:
                for each in (number, *STOPS):
                    os.kill(os.getpid(), each)
                assert stops.received is number
            raise Stopped("after step 1")
        assert [signal.getsignal(s) for s in NOTED] == [signal.SIG_IGN] * 4
    finally:
        for each, handler in zip(NOTED, before, strict=True):
            signal.signal(each, handler)
    with StopSignals(repeats=True):
        pass
    assert [signal.getsignal(s) for s in NOTED] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1], ids=lambda s: s.name)
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    """SIGHUP is ignored in a process that nohup started."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as stops:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert not stops()
            assert not stops.take_save()
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@EACH
def test_a_second_signal_ends_the_process(number: signal.Signals) -> None:
    """Runs ``signals.py`` alone, without torch."""
    code = (
        "import runpy, time; stops = runpy.run_path('" + signals.__file__ + "')['StopSignals']()\n"
        "stops.__enter__(); print('ready', flush=True)\n"
        "while not stops(): time.sleep(0.01)\n"
        "print('noted', flush=True); time.sleep(100)"
    )
    process = start("-c", code)
    read_until(process, "ready")
    process.send_signal(number)
    read_until(process, "noted")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    assert process.communicate() == ("", "")


def signal_in_the_second_step(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, graph: bool) -> list[torch.Tensor]:
    """Send signal ``number`` to this process in its second step; with ``graph``, steps replace replays. The steps' indices."""
    step, prepare = Trainer.step, Trainer.__init__
    steps: list[torch.Tensor] = []

    def signalling(trainer: Trainer, index: torch.Tensor, count: int | None = None) -> None:
        steps.append(index)
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        step(trainer, index, count)

    def with_replay(trainer: Trainer, *arguments: object, **options: object) -> None:
        prepare(trainer, *arguments, **options)  # type: ignore[arg-type]
        trainer.replay = lambda: trainer.step(trainer.index)

    monkeypatch.setattr(Trainer, "step", signalling)
    if graph:
        monkeypatch.setattr(Trainer, "__init__", with_replay)
    return steps


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_the_step_that_runs_is_finished_and_saved(graph: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes in the second step; with a graph, in its replay (here replaced by the step)."""
    case = CASES["bfloat16-all"]
    run(case, tmp_path / "whole")
    steps = signal_in_the_second_step(monkeypatch, signal.SIGTERM, graph)
    with StopSignals() as stops, pytest.raises(Stopped, match=r"^in epoch 1 after step 2 of 3$"):
        run(case, tmp_path / "parts", stop=stops)
    assert len(steps) == 2
    resume(case, tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.thin("SIGTERM")
@pytest.mark.skipif("ttsem" in sys.modules, reason="runs no kernel")
@EACH
def test_a_training_process_saves_and_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    options = ("--model", "lenet", "--data", "sample", "--limit", "24", "--batch-size", "8", "--device", "cpu")
    process = start("-m", "alexnet_triton", "train", *options, "--epochs", "100000", "--out", out)
    read_until(process, "epoch   1 ")
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert errors == ""
    last = output.splitlines()[-1]
    assert last.startswith(f"{number.name}: stopped in epoch ")
    assert last.endswith(f"; resume with: alexnet-triton train --resume '{out}'")
    checkpoint = read_checkpoint(out / "checkpoint.pt")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == checkpoint.metrics
    assert f"in epoch {len(lines) + 1} " in last


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_checkpoint_that_is_asked_for_changes_no_bit(graph: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGUSR1 in the second step, both the run and one resumed from its checkpoint equal an uninterrupted run."""
    case = CASES["bfloat16-all"]
    run(case, tmp_path / "whole")
    signal_in_the_second_step(monkeypatch, signal.SIGUSR1, graph)

    class Saves(Listener):
        lines: ClassVar[list[str]] = []

        def save(self) -> bool:
            return stops.take_save()

        def saved(self, line: str) -> None:
            self.lines.append(line)
            (tmp_path / "saved").mkdir()
            shutil.copy(tmp_path / "parts" / "checkpoint.pt", tmp_path / "saved")

    with StopSignals() as stops:
        run(case, tmp_path / "parts", listener=Saves())
    assert Saves.lines == [f"saved in epoch 1 after step 2 of 3: {tmp_path / 'parts' / 'checkpoint.pt'}"]
    Saves.lines.clear()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    resume(case, tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif("ttsem" in sys.modules, reason="runs no kernel")
def test_sigusr1_saves_and_says_so_and_a_closed_terminal_loses_nothing(tmp_path: Path) -> None:
    """The process leads a session on its own terminal. Once the terminal is closed, printing is an error."""
    parent, child = os.openpty()
    options = ("--model", "lenet", "--data", "sample", "--limit", "24", "--batch-size", "8", "--device", "cpu")
    command = (sys.executable, "-m", "alexnet_triton", "train", *options, "--epochs", "100000", "--out", str(tmp_path / "run"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    environment.pop("TRITON_INTERPRET", None)

    def own_terminal() -> None:
        _default_signals()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command, env=environment, stdin=child, stdout=child, stderr=child, start_new_session=True, preexec_fn=own_terminal
    )
    os.close(child)

    def read_terminal_until(text: bytes) -> None:
        seen, end = b"", time.monotonic() + 120
        while text not in seen:
            assert select.select([parent], [], [], max(0, end - time.monotonic()))[0], seen
            seen += os.read(parent, 4096)

    read_terminal_until(b"epoch   1 ")
    process.send_signal(signal.SIGUSR1)
    read_terminal_until(b"saved in epoch ")
    read_terminal_until(b"test acc")
    os.close(parent)
    assert process.wait(120) == 128 + signal.SIGHUP
    training = read_checkpoint(tmp_path / "run" / "checkpoint.pt").training
    assert training is not None
    assert training["trainer"]["order"] is not None or training["trained"] is not None  # in an epoch, not at its end
