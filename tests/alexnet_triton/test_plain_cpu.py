"""On the CPU without the interpreter, a fused network makes the calls that PyTorch's network makes, so it costs the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")
def test_a_fused_network_calls_pytorchs_operators() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SANITIZE_IR")}
    command = [sys.executable, "-m", "tests.alexnet_triton.plain_cpu_worker"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    found = json.loads(result.stdout)
    assert len(found["steps"]) > 10
    assert all(found["steps"].values()), found["steps"]
    assert found["dropouts"] == {"without a seed": True, "with a seed": True}
    assert not found["the compiler was imported"]
