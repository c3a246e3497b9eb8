"""Triton's C launcher gets the same arguments from a direct launch as from ``kernel[grid](...)``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from ...configurations import kernel_names

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_every_kernel_on_this_triton() -> None:
    """They compile in a separate process, since the interpreter replaces the compiler at import."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SANITIZE_IR")}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.runtime.direct_worker"],
        env=environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=840,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    compared = json.loads(result.stdout.splitlines()[-1])
    assert compared["triton"] == triton.__version__
    assert set(compared["kernels"]) == kernel_names()
