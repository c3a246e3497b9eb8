"""What ``make test`` runs of the tests that are marked ``thin``."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from .selection import covering

ROOT = Path(__file__).parents[1]


def test_the_cases_hold_every_part_of_the_ids() -> None:
    ids = ["-".join(parts) for parts in itertools.product(("conv", "pool", "linear"), ("float16", "float32"), ("relu", "none"))]
    kept = covering(ids)
    assert kept <= set(ids)
    assert {part for name in kept for part in name.split("-")} == {part for name in ids for part in name.split("-")}
    assert len(kept) == 3
    assert covering(["a", "b"]) == {"a", "b"}
    assert covering(ids) == kept


def _functions(selected: str) -> set[str]:
    """The tests of which ``-m selected`` runs a case."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", selected, "tests"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {line.partition("[")[0] for line in result.stdout.splitlines() if line.startswith("tests/") and "::" in line}


@pytest.mark.slow
def test_every_thin_test_has_cases_in_make_test_and_leaves_some_out() -> None:
    thin = _functions("thin")
    assert len(thin) > 20
    assert _functions("thin and not slow") == thin
    assert _functions("thin and slow") == thin
