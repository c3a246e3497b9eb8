"""What each process of test_distributed runs: its half of a batch through DistributedDataParallel, against the whole batch."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    import os

    os.environ["TRITON_INTERPRET"] = "1"

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kernels
from alexnet_triton import FusedSequential

backend = kernels.use_backend("triton")
backend.__enter__()  # for all that follows: an error where the kernels cannot run
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
net = FusedSequential(
    *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))
).to(device)
x, labels = torch.randn(4, 3, 8, 8, device=device), torch.tensor([0, 1, 2, 0], device=device)
alone = copy.deepcopy(net)
nn.functional.cross_entropy(alone(x), labels).backward()

dist.init_process_group("gloo")
rank = dist.get_rank()
parallel = DistributedDataParallel(net)
half = slice(2 * rank, 2 * rank + 2)
nn.functional.cross_entropy(parallel(x[half]), labels[half]).backward()
for ours, whole in zip(net.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(ours.grad, whole.grad)
del parallel  # it holds the group, which else would go with the interpreter
dist.barrier()  # nobody closes a connection that the other one still waits at
dist.destroy_process_group()
(Path(sys.argv[1]) / str(rank)).touch()
