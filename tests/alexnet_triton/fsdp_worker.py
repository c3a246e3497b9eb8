"""Each process of test_distributed: a fused network sharded by FSDP2 trains as in one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import kernels
from alexnet_triton import AlexNet, FusedSequential
from alexnet_triton.optim import SGD
from kernels.runtime import launch

Sharding = Callable[[nn.Module, DeviceMesh], object]


def small_net() -> FusedSequential:
    """A container of convolutions and one of linear layers."""
    features = FusedSequential(
        *(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten())
    )
    return FusedSequential(features, FusedSequential(nn.Linear(144, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 10)))


def whole(net: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(net, mesh=mesh)


def blocks(net: nn.Module, mesh: DeviceMesh) -> None:
    for block in net:  # type: ignore[attr-defined]
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def layers(net: nn.Module, mesh: DeviceMesh) -> None:
    for layer in [each for each in net.modules() if isinstance(each, nn.Conv2d | nn.Linear)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)


def trains_as_alone(
    make: Callable[[], nn.Module], shard: Sharding, mesh: DeviceMesh, side: int, steps: int
) -> tuple[list[str], list[str]]:
    """Train with half of every batch of four in each process; check that the weights are those of one process.

    Returns:
        The names of the launched kernels, of one process and sharded.
    """
    launched: tuple[list[str], list[str]] = ([], [])
    nets: list[nn.Module] = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(make())
    alone, sharded = nets
    shard(sharded, mesh)
    optimizers = [SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for _ in range(steps):
        x, labels = torch.randn(4, 1, side, side), torch.randint(0, 10, (4,))
        for net, optimizer, part, names in zip(nets, optimizers, (slice(4), half), launched, strict=True):
            optimizer.zero_grad()
            with launch.observe_launches(lambda kernel, *_, names=names: names.append(kernel.__name__)):
                F.cross_entropy(net(x[part]), labels[part]).backward()
            optimizer.step()
    for ours, theirs in zip(sharded.parameters(), alone.parameters(), strict=True):
        assert isinstance(ours, DTensor)
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-4, atol=1e-5)
    return launched


def alexnet() -> nn.Module:
    """AlexNet without dropout, which each process would draw for itself."""
    net = AlexNet()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


if __name__ == "__main__":
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    with kernels.use_backend("triton"):
        for shard in (whole, blocks, layers):
            alone, sharded = trains_as_alone(small_net, shard, mesh, side=16, steps=2)
            # A layer that is sharded by itself has its own hooks and runs unfused; all others run fused.
            assert (len(sharded) == len(alone)) == (shard is not layers), (shard, alone, sharded)
    with kernels.use_backend("torch"):
        trains_as_alone(alexnet, whole, mesh, side=224, steps=1)
    (Path(sys.argv[1]) / str(dist.get_rank())).touch()
    dist.barrier()
    dist.destroy_process_group()
