"""What has changed since it was measured (in code, not in text), and which tests a change needs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from alexnet_triton import tune
from benchmarks import stale
from benchmarks.stale import Code, Measured, changed

KERNEL = '''
from .primitives import fma

TILE = tl.constexpr(16)


@triton.jit
def _half(x):
    """Half of it."""
    return x * 0.5


@triton.jit
def _a_kernel(x):
    """A kernel."""
    y = _half(x)  # first half
    return fma(y, TILE, x)


def a_config(n):
    return _rule(n)


def _rule(n):
    return {"BLOCK": min(n, 128)}
'''
PRIMITIVES = """
@triton.jit
def fma(a, b, c):
    return a * b + c


@triton.jit
def _half(x):
    return x / 2


def min(a, b):
    return a
"""


def code(edit: Callable[[str], str] = str, edit_primitives: Callable[[str], str] = str) -> Code:
    return Code({"kernels/a.py": edit(KERNEL), "kernels/primitives.py": edit_primitives(PRIMITIVES)})


@pytest.mark.parametrize(
    ("old", "new", "stale_names"),
    [
        ("A kernel.", "Another text.", []),
        ("  # first half", "", []),
        ("x * 0.5", "x * 0.25", ["_a_kernel"]),
        ("constexpr(16)", "constexpr(32)", ["_a_kernel"]),
        ("_half(x)  #", "_half(x + 1)  #", ["_a_kernel"]),
        ("128", "256", ["a_config"]),
    ],
)
def test_a_kernel_changes_with_what_it_reaches(old: str, new: str, stale_names: list[str]) -> None:
    after = code(lambda text: text.replace(old, new))
    assert changed(code(), after, ["_a_kernel", "a_config"]) == stale_names


def test_of_other_modules_jitted_functions_count() -> None:
    names = ["_a_kernel", "a_config"]
    assert changed(code(), code(edit_primitives=lambda t: t.replace("a * b", "b * a")), names) == ["_a_kernel"]
    assert changed(code(), code(edit_primitives=lambda t: t.replace("x / 2", "x / 3")), names) == []  # a.py has its own _half
    assert changed(code(), code(edit_primitives=lambda t: t.replace("return a\n", "return b\n")), names) == []


def test_of_other_modules_of_rules_every_function_counts() -> None:
    def rules(returned: int) -> Code:
        user = "from ..rules import two as pair\n\ndef a_config(n):\n    return pair(n)\n"
        other = f"def two(n):\n    return _three(n)\n\ndef _three(n):\n    return {returned}\n"
        return Code(
            {"kernels/b/stem_rules.py": user, "kernels/rules.py": other, "kernels/two.py": "def two(n):\n    return 1\n"}
        )

    assert changed(rules(3), rules(4), ["a_config"]) == ["a_config"]
    assert changed(rules(3), rules(3), ["a_config"]) == []


@pytest.mark.thin("two_blocks")
@pytest.mark.parametrize(
    ("name", "operations"),
    [
        ("two_blocks", {"conv2d_stem_fprop", "conv2d_stem_pool_fprop", "conv2d_stem_wgrad"}),
        ("strips_of", {"conv2d_stem_pool_fprop"}),
        ("conv2d_key", {"conv2d_stem_fprop", "conv2d_stem_wgrad", "conv2d_fprop"}),
        ("_row_cycles", {"conv2d_fprop"}),
    ],
)
def test_a_rule_that_others_share_makes_their_entries_stale(name: str, operations: set[str]) -> None:
    path = "kernels/convolution/rules.py"
    sources = {str(p.relative_to(stale.ROOT)): p.read_text() for p in (stale.ROOT / "kernels").rglob("*.py")}
    edited = re.sub(rf"^(def {name}\(.*?\) -> .*?:\n)", r"\1    pass\n", sources[path], count=1, flags=re.DOTALL | re.MULTILINE)
    assert edited != sources[path]
    before, after = Code(sources), Code(sources | {path: edited})
    marked = {operation for operation, (rules, _) in stale.OPERATIONS.items() if changed(before, after, rules)}
    assert operations <= marked
    assert not {"linear_fprop", "linear_narrow_fprop"} & marked


def test_a_kernel_that_moves_is_the_same_and_a_new_one_has_changed() -> None:
    moved = Code({"kernels/elsewhere/b.py": KERNEL, "kernels/primitives.py": PRIMITIVES})
    assert moved.kernels == {"_a_kernel": "kernels/elsewhere/b.py"}
    assert changed(code(), moved, moved.kernels) == []
    assert changed(Code({}), moved, moved.kernels) == ["_a_kernel"]


@pytest.mark.parametrize("precision", tune.PRECISIONS)
def test_every_tuned_operation_has_its_rules_and_kernels(precision: str) -> None:
    dtype, linear_tf32 = tune.PRECISIONS[precision]
    with tune.float32_switches(linear_tf32):
        operations = {job.table_key(dtype).split()[0] for job in tune.jobs((1, 128, 1024), dtype=dtype)}
    assert operations <= stale.OPERATIONS.keys()
    here = stale.code_at(None)
    for rules, kernels in map(stale.OPERATIONS.__getitem__, operations):
        assert all(here.meaning(name) for name in rules)
        assert set(kernels) <= here.kernels.keys()


def test_what_stale_says(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code(lambda text: text.replace("128", "64").replace("0.5", "0.25"))
    monkeypatch.setattr(stale, "is_here", lambda commit: commit is not None)
    monkeypatch.setattr(stale, "code_at", lambda commit: code() if commit is None else before)
    monkeypatch.setattr(stale, "OPERATIONS", {"op": (("a_config",), ()), "same": ((), ("_other_kernel",))})
    said = stale.describe(Measured("results/x.json", "c" * 40, True))
    assert said == f"results/x.json (commit {'c' * 10}): 1 of 1 kernels have changed\n  kernels/a.py: _a_kernel"
    table = stale.describe(Measured("configs/x.json", "c" * 40, False, ("op n128", "same n1")))
    assert table.endswith("1 of 1 kernels have changed\n  op n128: a_config")
    assert "the file names none" in table
    assert "unknown, which is not here" in stale.describe(Measured("results/y.json", None, False))


@pytest.mark.slow
def test_everything_in_the_repository_is_named(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["stale"])
    stale.main()
    printed = capsys.readouterr().out
    assert "kernels/configs/h100-80gb-hbm3.json" in printed
    assert "benchmarks/results/h100-80gb-hbm3.json" in printed
    assert "benchmarks/results/profile/h100-80gb-hbm3.json ours-bfloat16-N128-train" in printed
    assert "results/before" not in printed


def test_the_tests_of_a_change() -> None:
    everything = stale.all_tests()
    assert everything[0].startswith("tests/kernels/")
    assert everything[-1].startswith("tests/benchmarks/")
    of_pooling = stale.tests_of(["kernels/pooling/kernels.py"])
    assert {"tests/kernels/pooling/test_max_pool2d.py"} <= set(of_pooling) < set(everything)
    assert stale.tests_of(["tests/test_guard.py"]) == ["tests/test_guard.py"]
    assert "tests/kernels/test_linear.py" in stale.tests_of(["tests/oracle.py"])
    assert stale.tests_of(["README.md", "benchmarks/results/x.json", "pyproject.toml"]) == []
    assert "tests/alexnet_triton/test_tune.py" in stale.tests_of(["kernels/configs/h200.json"])
    assert stale.tests_of(["tests/conftest.py"]) == everything
    assert stale.tests_of(None) == everything


def test_of_a_commit_that_is_not_here_nothing_is_known() -> None:
    assert not stale.is_here("0" * 40)
    assert stale.changed_files("0" * 40) is None
    assert stale.changed_files(None) is None
