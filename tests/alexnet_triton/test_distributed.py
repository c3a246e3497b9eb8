"""DistributedDataParallel over a fused network: two processes, half a batch each, give the whole batch's gradients.

And on the cells of its first layer those of the images, bit for bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_two_processes_give_the_whole_batchs_gradients(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("ddp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker, tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
