"""Run by each process of test_distributed: its share of a batch by DistributedDataParallel, as images and as cells."""

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
from alexnet_triton import CellImages, FusedSequential
from alexnet_triton.data.augment import input_for, network_input
from alexnet_triton.training.distributed import leave
from kernels.runtime.backend import has_tma

backend = kernels.use_backend("triton")
backend.__enter__()  # for the rest of the script: raises an error where the kernels cannot run
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
# Gradients of a batch as cells and as images are bit-identical; the shares are of two images and one, then of one and none.
if has_tma(torch.device(device)):
    first = (nn.Conv2d(1, 8, 11, stride=4, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten())
    net = FusedSequential(*first, nn.Linear(32, 3)).to(device, torch.bfloat16)
    parallel = DistributedDataParallel(net, device_ids=[device] if device == "cuda" else None)
    pixels = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8, device=device)
    for batch in ([4, 0, 2], [3]):
        index = torch.tensor(batch, device=device).tensor_split(2)[rank]
        as_cells = input_for(net, pixels, index, 28, dtype=torch.bfloat16)
        assert isinstance(as_cells, CellImages)
        grads = []
        for given in (as_cells, network_input(pixels, index, 28, dtype=torch.bfloat16)):
            net.zero_grad(set_to_none=True)
            parallel(given).float().square().sum().backward()
            grads.append([p.grad.clone() for p in net.parameters()])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))
        assert all(bool(grad.any()) for grad in grads[0])


del parallel  # DistributedDataParallel holds a reference to the process group
leave()
(Path(sys.argv[1]) / str(rank)).touch()
