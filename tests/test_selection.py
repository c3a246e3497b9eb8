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


_COLLECT = """
import sys
import pytest

class Marks:
    def pytest_collection_finish(self, session):
        for item in session.items:
            print("selected", item.get_closest_marker("slow") is not None, item.nodeid.partition("[")[0])

sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "thin", "tests"], [Marks()]))
"""


@pytest.mark.slow
def test_every_thin_test_has_cases_in_make_test_and_leaves_some_out() -> None:
    result = subprocess.run([sys.executable, "-c", _COLLECT], cwd=ROOT, capture_output=True, text=True, check=True)
    items = [line.split(maxsplit=2)[1:] for line in result.stdout.splitlines() if line.startswith("selected ")]
    left_out, kept = ({name for slow, name in items if slow == value} for value in ("True", "False"))
    assert len(kept) > 20
    assert left_out == kept
