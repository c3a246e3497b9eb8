"""The mutation check itself: each fault's text is still in the source, and verdicts tell caught faults from survivors."""

from __future__ import annotations

import ast
import re

import pytest

from .mutation import FAULTS, ROOT, Fault, judge

IDS = [re.sub(r"\W+", "_", fault.name) for fault in FAULTS]


@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
def test_a_fault_fits_the_source_and_its_tests_exist(fault: Fault) -> None:
    source = (ROOT / fault.path).read_text(encoding="utf-8")
    assert source.count(fault.old) == 1
    planted = fault.planted(source)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source))
    assert fault.tests
    for test in fault.tests:
        path, _, function = test.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_faults_are_many_and_each_another() -> None:
    assert len(FAULTS) >= 10
    assert len({(fault.path, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


def test_text_that_is_gone_or_there_twice_is_an_error() -> None:
    fault = Fault("a fault", "a.py", "x < y", "x <= y", ())
    assert fault.planted("if x < y:") == "if x <= y:"
    for source in ("if x > y:", "x < y and x < y"):
        with pytest.raises(ValueError, match=r"a\.py: the text of 'a fault' occurs [02] times"):
            fault.planted(source)


@pytest.mark.parametrize(
    ("returncode", "output", "verdict", "by"),
    [
        (0, "7 passed in 1.00s", "SURVIVED", ""),
        (
            1,
            "FAILED tests/kernels/test_a.py::test_b[c-d] - AssertionError: wrong\n",
            "caught",
            "test_a.py::test_b[c-d]: Assert",
        ),
        (1, "FAILED tests/test_a.py::test_b - NameError: no x\n1 failed", "BROKEN", "test_a.py::test_b: NameError"),
        (4, "ERROR: not found: tests/test_a.py::test_b\n\nno tests ran", "BROKEN", "no tests ran"),
        (1, "", "BROKEN", "no output"),
    ],
)
def test_verdicts(returncode: int, output: str, verdict: str, by: str) -> None:
    outcome = judge(returncode, output)
    assert outcome.verdict == verdict
    assert outcome.by.startswith(by)
