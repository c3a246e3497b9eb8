"""The progress bar of ``train``: its contents in a terminal, and that there is none elsewhere."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from alexnet_triton.cli.screen import Bar

from ..command import run_here

pytestmark = pytest.mark.usefixtures("one_thread")


def console(terminal: bool, now: list[float]) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=150, get_time=lambda: now[0], _environ={})


def shown(of: Console) -> str:
    """The text that a console got, without cursor codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", of.file.getvalue())  # type: ignore[attr-defined]


def test_it_shows_images_loss_speed_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("alexnet_triton.cli.screen.console", terminal := console(True, now))
    bar = Bar(600, epochs=3)
    bar.progress.live.auto_refresh = False
    with bar.progress:
        assert bar.shown
        bar.begin(2)
        for second in range(1, 6):
            now[0] = float(second)
            bar.update(60 * second, 2.5 / second, 60.4)
        bar.progress.refresh()
        last = shown(terminal).splitlines()[-1]
        assert re.fullmatch(r"epoch 2/3 \S+ 300/600 loss 0\.5000  60 images/s 0:00:05", last)

        bar.begin(3)
        now[0] += 1  # the time left is computed twice a second
        bar.progress.refresh()
        assert re.match(r"epoch 3/3 \S+ +0/600 loss 0\.0000  0 images/s -:--:--", shown(terminal).splitlines()[-1])


@pytest.mark.parametrize("kind", ["no terminal", "quiet"])
def test_nothing_is_shown_and_no_loss_is_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = console(kind == "quiet", [0.0])
    silent.quiet = kind == "quiet"  # as in all processes except the leader
    monkeypatch.setattr("alexnet_triton.cli.screen.console", silent)
    bar = Bar(600, epochs=3)
    with bar.progress:
        assert not bar.shown
        bar.begin(1)
    assert shown(silent) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_shows_it_while_it_trains_and_leaves_the_epochs(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alexnet_triton.training.trainer._PROGRESS_INTERVAL", -1.0)  # at every step
    monkeypatch.setattr("alexnet_triton.cli.run.measure_speed", lambda *_: 1.0)
    screen = console(terminal, [0.0])
    for module in ("options", "run", "screen", "train"):
        monkeypatch.setattr(f"alexnet_triton.cli.{module}.console", screen)
    update, updates = Bar.update, []

    def refreshing(bar: Bar, *values: float) -> None:
        """Draw the bar at each update instead of a few times a second."""
        update(bar, *values)  # type: ignore[arg-type]
        updates.append(values)
        bar.progress.refresh()

    monkeypatch.setattr(Bar, "update", refreshing)
    result = run_here(
        "train", "--model", "lenet", "--data", "sample", "--limit", "12", "--batch-size", "4", "--epochs", "2",
        "--device", "cpu", "--backend", "torch", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    bars = re.findall(r"epoch (\d)/2 \S+ +(\d+)/12 loss (\d\.\d{4})  (\d+) images/s", shown(screen))
    steps = [(epoch, seen) for epoch, seen, loss, _ in bars if float(loss)]
    assert list(dict.fromkeys(steps)) == [(e, s) for e in "12" for s in ("4", "8", "12")] * terminal
    assert len(updates) == 6 * terminal  # elsewhere no loss is read
    assert len(re.findall(r"^(?:.*\r)?epoch   \d  loss ", shown(screen), re.MULTILINE)) == 2
