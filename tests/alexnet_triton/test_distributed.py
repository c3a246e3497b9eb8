"""DistributedDataParallel and FSDP2 over a fused network: two processes with half a batch each train as one with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.thin("ddp")
@pytest.mark.timeout(270)
@pytest.mark.parametrize("name", ["ddp_worker.py", "fsdp_worker.py"])
def test_two_processes_have_what_one_has_of_the_whole_batch(name: str, tmp_path: Path) -> None:
    """DistributedDataParallel: equal gradients, bit-identical for cells and images. FSDP2: equal weights."""
    worker = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker, tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
