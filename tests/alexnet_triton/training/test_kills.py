"""``train``, killed by SIGKILL at random moments and resumed each time, is bit-identical to an uninterrupted run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from alexnet_triton.training.checkpoint import read_checkpoint

from .test_resume import flat
from .test_signals import start


@pytest.mark.slow
@pytest.mark.skipif("ttsem" in sys.modules, reason="runs no kernel")
def test_a_run_that_is_killed_again_and_again_has_the_same_bits(tmp_path: Path) -> None:
    process = start(Path(__file__).with_name("kill_worker.py"), tmp_path, 6)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    found = re.fullmatch(r"(\d+) kills, (\d+) while it trained\n", output)
    assert found, output
    assert int(found[1]) >= int(found[2]) >= 3
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    states = []
    for out in (whole, killed):
        kept = [read_checkpoint(out / name) for name in ("checkpoint.pt", "best.pt")]
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert lines == kept[0].metrics
        states.append(flat([[c.metrics, c.weights, c.training] for c in kept] + [lines]))
    assert states[0] == states[1]
    # A partial file that a kill left behind is replaced by the next write to that name.
    names = [{p.name for p in out.iterdir() if not p.name.endswith(".partial")} for out in (whole, killed)]
    assert (
        names[0]
        == names[1]
        == {*("metrics.jsonl", "curves.png", "confusion.png", "most_wrong.png", "checkpoint.pt", "best.pt")}
    )
    for name in ("curves.png", "confusion.png", "most_wrong.png"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
