"""Reports on a fuzz run: the seed first, the counts last."""

from __future__ import annotations

from typing import Any

from . import fuzz


def pytest_report_header() -> list[str]:
    """The seed, shown first so that an interrupted run shows it too."""
    return [f"fuzz: FUZZ_EXAMPLES={fuzz.FUZZ_EXAMPLES} FUZZ_SEED={fuzz.FUZZ_SEED}"] if fuzz.FUZZ_EXAMPLES else []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The number of cases of each operation, if this process ran them."""
    if not fuzz.done:
        return
    seed = f"FUZZ_SEED={fuzz.FUZZ_SEED}" if fuzz.FUZZ_EXAMPLES else "the same cases every time"
    terminalreporter.section(f"fuzz: {fuzz.done.total()} cases, {seed}")
    for operation, count in fuzz.done.items():
        also = f" ({fuzz.refused[operation]} refused, as by PyTorch)" if fuzz.refused[operation] else ""
        terminalreporter.write_line(f"{count:6} {operation}{also}")
