"""Which cases ``make test`` runs of a test marked ``thin``; ``make test-all`` runs all of them.

Without arguments the mark keeps as few cases as hold every part of the ids: of ``[conv-float16]``, ``[conv-float32]``,
``[pool-float16]`` and ``[pool-float32]``, the first and the last. With arguments it keeps the cases whose ids contain one of
them: ``thin("resnet18")``.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def covering(ids: Iterable[str]) -> set[str]:
    """As few of ``ids`` as hold every part: next comes the id with the most parts that none before it has."""
    parts = {name: set(name.split("-")) for name in ids}
    missing = set().union(*parts.values())
    kept = set()
    while missing:
        best = max(parts, key=lambda name: len(parts[name] & missing))
        kept.add(best)
        missing -= parts[best]
    return kept


def mark_slow_cases(items: Iterable[pytest.Item]) -> None:
    """Mark the cases of ``thin`` tests that ``make test`` leaves out as ``slow``."""
    cases: dict[tuple[pytest.Item | None, str], dict[str, pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("thin"):
            cases.setdefault((item.parent, item.originalname), {})[item.callspec.id] = item
    for of_test in cases.values():
        words = next(iter(of_test.values())).get_closest_marker("thin").args  # type: ignore[union-attr]
        kept = {name for name in of_test if any(word in name for word in words)} if words else covering(of_test)
        for name, item in of_test.items():
            if name not in kept:
                item.add_marker(pytest.mark.slow)
