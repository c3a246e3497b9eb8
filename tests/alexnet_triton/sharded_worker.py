"""Each of the two processes of test_sharded_optim: the optimizer on DTensor parameters.

Each process writes a file with the error of each scenario, empty where the scenario passed.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor

import kernels
from alexnet_triton.optim import SGD
from kernels.runtime import launch

FOLDER = Path(sys.argv[1])

Scenario = Callable[[DeviceMesh], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


#: Options of the optimizer that the scenarios share.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 1e-3, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 1e-3, "maximize": True},
]


def small_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Sizes that two processes share unevenly (5 filters) or that leave the second process nothing (1 output)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4 * 4, 3), nn.ReLU(), nn.Linear(3, 1))
    return net.to(dtype)


def backward(net: nn.Module, step: int) -> None:
    """Compute gradients for a batch that differs between the processes."""
    net.zero_grad()
    torch.manual_seed(100 * step + dist.get_rank())
    net(torch.randn(4, 2, 6, 6).to(next(net.parameters()))).float().square().sum().backward()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[int]) -> None:
    for step in steps:
        backward(net, step)
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(net: nn.Module, other: nn.Module) -> None:
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(p), whole(q))


def assert_states(optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer, *keys: str) -> None:
    """Check that saved states are DTensors, placed as their parameters and equal to the other optimizer's."""
    assert len(optimizer.state) == len(other.state) > 0
    saved, others = (each.state_dict()["state"].values() for each in (optimizer, other))
    for param, ours, theirs in zip(optimizer.state, saved, others, strict=True):
        assert set(ours) == set(keys)
        for key in keys:
            assert isinstance(ours[key], DTensor)
            assert ours[key].placements == param.placements
            assert ours[key].shape == param.shape
            assert ours[key].dtype == torch.float32
            assert torch.equal(whole(ours[key]), whole(theirs[key]))


def sharded(mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    net = small_net(dtype)
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    assert [len(p.to_local()) for p in net[5].parameters()] == [1 - dist.get_rank()] * 2
    return net


@scenario
def fully_sharded_is_torch_sgd(mesh: DeviceMesh) -> None:
    for backend in ("auto", "torch"):
        for options in OPTIONS:
            net, other = sharded(mesh), sharded(mesh)
            ours, theirs = SGD(net.parameters(), lr=0.1, **options), torch.optim.SGD(other.parameters(), lr=0.1, **options)
            with kernels.use_backend(backend):  # type: ignore[arg-type]
                train(net, ours, range(3))
            train(other, theirs, range(3))
            assert_same(net, other)
            if options:
                assert_states(ours, theirs, "momentum_buffer")


@scenario
def replicated_and_sharded(mesh: DeviceMesh) -> None:
    for shape in ((2, 1), (1, 2)):
        two = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        nets = [small_net(), small_net()]
        for net in nets:
            fully_shard(net, mesh=two)
        optimizers = [
            cls(net.parameters(), lr=0.1, momentum=0.9) for cls, net in zip((SGD, torch.optim.SGD), nets, strict=True)
        ]
        for net, optimizer in zip(nets, optimizers, strict=True):
            train(net, optimizer, range(2))
        assert_same(*nets)
        assert_states(*optimizers, "momentum_buffer")


@scenario
def half_precision_is_one_process(mesh: DeviceMesh) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for options in OPTIONS:
            net, alone = sharded(mesh, dtype), small_net(dtype)
            ours, single = SGD(net.parameters(), lr=0.01, **options), SGD(alone.parameters(), lr=0.01, **options)
            for step in range(3):
                backward(net, step)
                for p, q in zip(net.parameters(), alone.parameters(), strict=True):
                    q.grad = whole(p.grad)  # type: ignore[arg-type]
                ours.step()
                single.step()
            assert_same(net, alone)
            assert_states(ours, single, "master", *(["momentum_buffer"] if options else []))
            masters = [whole(ours.master(p)) for p in net.parameters()]
            assert not torch.equal(masters[0], masters[0].to(dtype).float())  # the masters have bits that rounding would lose


@scenario
def weights_set_from_outside_are_obeyed(mesh: DeviceMesh) -> None:
    net = sharded(mesh, torch.bfloat16)
    optimizer = SGD(net.parameters(), lr=0.01)
    train(net, optimizer, range(2))
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.5)
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in net.parameters():
        assert torch.equal(whole(p), torch.full_like(whole(p), 0.5))
        assert torch.equal(whole(optimizer.master(p)).bfloat16(), whole(p))


@scenario
def clipping_and_schedules(mesh: DeviceMesh) -> None:
    for in_memory in (False, True):
        nets = [sharded(mesh), sharded(mesh)]
        for cls, net in zip((SGD, torch.optim.SGD), nets, strict=True):
            lr = torch.tensor(0.1) if in_memory else 0.1
            optimizer = cls(net.parameters(), lr=lr, momentum=0.9)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            for step in range(3):
                backward(net, step)
                nn.utils.clip_grad_norm_(net.parameters(), 0.01)
                optimizer.step()
                schedule.step()
        assert_same(*nets)


@scenario
def a_learning_rate_that_is_a_dtensor(mesh: DeviceMesh) -> None:
    nets = [sharded(mesh), sharded(mesh)]
    lr = torch.tensor(0.1)
    for net, rate in zip(nets, (distribute_tensor(lr, mesh, [Replicate()]), lr), strict=True):
        train(net, SGD(net.parameters(), lr=rate), range(2))
    assert_same(*nets)


@scenario
def distributed_checkpoints(mesh: DeviceMesh) -> None:
    """Our state loads into a new optimizer and into PyTorch's, and PyTorch's into ours; training continues bit-identically."""
    for option in ("full_state_dict", "flatten_optimizer_state_dict", "cpu_offload"):
        how = StateDictOptions(**{option: True})
        for old, new in ((SGD, SGD), (SGD, torch.optim.SGD), (torch.optim.SGD, SGD)):
            net, resumed = sharded(mesh), sharded(mesh)
            optimizer = old(net.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
            train(net, optimizer, range(2))
            state = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=how))
            resumed.load_state_dict(net.state_dict())
            restored = new(resumed.parameters(), lr=5.0, momentum=0.1)
            set_optimizer_state_dict(resumed, restored, state, options=how)
            train(net, optimizer, [2])
            train(resumed, restored, [2])
            assert_same(net, resumed)
            assert_states(restored, optimizer, "momentum_buffer")


@scenario
def a_checkpoint_in_files_keeps_masters(mesh: DeviceMesh) -> None:
    net, resumed = sharded(mesh, torch.bfloat16), sharded(mesh, torch.bfloat16)
    optimizer = SGD(net.parameters(), lr=1e-3, momentum=0.9)
    train(net, optimizer, range(2))
    dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=FOLDER / "checkpoint")
    resumed.load_state_dict(net.state_dict())
    restored = SGD(resumed.parameters(), lr=5.0, momentum=0.1)
    state = {"optimizer": get_optimizer_state_dict(resumed, restored)}
    dcp.load(state, checkpoint_id=FOLDER / "checkpoint")
    set_optimizer_state_dict(resumed, restored, state["optimizer"])
    assert_states(restored, optimizer, "master", "momentum_buffer")
    train(net, optimizer, [2])
    train(resumed, restored, [2])
    assert_same(net, resumed)
    for p, q in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(whole(optimizer.master(p)), whole(restored.master(q)))


def given(mesh: DeviceMesh, placement: Placement, shape: tuple[int, ...] = (5, 4)) -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [placement]))


@scenario
def sharded_and_plain_parameters_in_one_group(mesh: DeviceMesh) -> None:
    """One launch for both kinds, and none where this process has no element."""
    params = [given(mesh, Shard(0)), nn.Parameter(torch.randn(3)), given(mesh, Shard(0), (1, 4))]
    others = [nn.Parameter(whole(p).detach().clone()) for p in params]
    optimizer, other = SGD(params, lr=0.1, momentum=0.9), torch.optim.SGD(others, lr=0.1, momentum=0.9)
    launched: list[Any] = []
    for step in range(3):
        for p, q in zip(params, others, strict=True):
            torch.manual_seed(step)
            q.grad = torch.randn(q.shape)
            p.grad = distribute_tensor(q.grad, mesh, p.placements) if isinstance(p, DTensor) else q.grad.clone()
        with launch.observe_launches(lambda *launch: launched.append(launch)):
            optimizer.step()
        other.step()
    assert len(launched) == 3
    assert type(optimizer.state[params[1]]["momentum_buffer"]) is Tensor
    for p, q in zip(params, others, strict=True):
        assert torch.equal(whole(p), q)
    empty = given(mesh, Shard(0), (1, 4))
    empty.grad = torch.ones_like(empty)
    launched.clear()
    with launch.observe_launches(lambda *launch: launched.append(launch)):
        SGD([empty], lr=0.1).step()
    assert len(launched) == 1 - dist.get_rank()


@scenario
def tensor_parallel_layers(mesh: DeviceMesh) -> None:
    """The first layer is split by outputs, the second by inputs: shards of rows, of columns, and a replicated bias."""

    def share(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, param in list(module.named_parameters(recurse=False)):
            placement: Placement = Shard(0) if name == "0" else Shard(1) if key == "weight" else Replicate()
            module.register_parameter(key, nn.Parameter(distribute_tensor(param, mesh, [placement])))

    nets = []
    for cls in (SGD, torch.optim.SGD):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
        net = distribute_module(net, mesh, share)
        assert {p.placements for p in net.parameters()} == {(Shard(0),), (Shard(1),), (Replicate(),)}
        optimizer = cls(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        for step in range(3):
            optimizer.zero_grad()
            torch.manual_seed(step)
            x = distribute_tensor(torch.randn(4, 6), mesh, [Replicate()])
            net(x).square().sum().backward()
            optimizer.step()
        nets.append(net)
    assert_same(*nets)


@scenario
def gradients_that_are_placed_otherwise(mesh: DeviceMesh) -> None:
    """A pending sum, other shards, and the result of a collective that is still running."""
    torch.manual_seed(5 + dist.get_rank())
    part = torch.randn(5, 4)
    pending = DTensor.from_local(part, mesh, [Partial()])
    total = whole(pending)
    late = DTensor.from_local(part, mesh, [Partial()]).redistribute(placements=[Replicate()], async_op=True)
    assert isinstance(late._local_tensor, AsyncCollectiveTensor)
    for placement in (Shard(0), Shard(1), Replicate()):
        for grad in (pending, distribute_tensor(total, mesh, [Shard(0)]), distribute_tensor(total, mesh, [Replicate()]), late):
            param = given(mesh, placement)
            expected = whole(param).detach().sub(total, alpha=0.1)
            param.grad = grad.detach()
            SGD([param], lr=0.1, momentum=0.9).step()
            assert torch.equal(whole(param), expected)


@scenario
def what_does_not_fit_is_refused(mesh: DeviceMesh) -> None:
    param = given(mesh, Replicate())
    param.grad = torch.ones_like(param)
    optimizer = SGD([param], lr=0.1, momentum=0.9)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["momentum_buffer"] = torch.zeros(5, 4)
    with pytest.raises(ValueError, match="momentum_buffer of parameter 0 must be a DTensor exactly if the parameter is one"):
        optimizer.load_state_dict(state)
    plain = nn.Parameter(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="momentum_buffer of parameter 0 must be a DTensor exactly if the parameter is one"):
        SGD([plain], momentum=0.9).load_state_dict(optimizer.state_dict())
    param.grad = None
    param.grad = torch.ones(5, 4)
    with pytest.raises(TypeError, match="a gradient must be a DTensor exactly if its parameter is one, got a Tensor"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"params\[0\] must be a plain tensor, got a"):
        kernels.sgd.sgd_step([param], [param], lr=0.1)
    with pytest.raises(TypeError, match="lr must be a number or a plain tensor, got a DTensor"):
        kernels.sgd.sgd_step([plain], [plain], lr=distribute_tensor(torch.tensor(0.1), mesh, [Replicate()]))


@scenario
def a_saved_parameter_is_known_to_have_changed(mesh: DeviceMesh) -> None:
    weight = given(mesh, Replicate())
    x = distribute_tensor(torch.randn(2, 4), mesh, [Replicate()]).requires_grad_()
    y = F.linear(x, weight).sum()
    weight.grad = torch.ones_like(weight)
    SGD([weight], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    mesh = init_device_mesh("cpu", (2,))
    outcomes: dict[str, str] = {}
    for name, run in SCENARIOS.items():
        try:
            run(mesh)
            outcomes[name] = ""
        except BaseException:  # pytest's Failed is not an Exception
            outcomes[name] = traceback.format_exc()
    (FOLDER / f"{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()
