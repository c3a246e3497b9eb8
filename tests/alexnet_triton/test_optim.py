"""The SGD optimizer against torch.optim.SGD: schedulers, gradient scalers, checkpoints, loaded weights, memory layouts."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alexnet_triton
import kernels
from alexnet_triton import FusedSequential
from alexnet_triton.optim import SGD
from kernels.runtime.backend import INTERPRETED
from kernels.sgd import memory_order

from ..conftest import DEVICE, UNDER_TTSEM

ROOT = Path(__file__).parents[2]
HALF = [torch.bfloat16, torch.float16]


def small_net(dtype: torch.dtype = torch.float32) -> FusedSequential:
    net = FusedSequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3))
    return net.to(device=DEVICE, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 2, 6, 6, device=DEVICE, dtype=dtype), torch.randint(3, (4,), device=DEVICE)


def backward(net: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    net.zero_grad()
    loss = F.cross_entropy(net(data[0]).float(), data[1])
    loss.backward()
    return loss


def same(net: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def twins(**options: Any) -> tuple[nn.Module, SGD, nn.Module, torch.optim.SGD]:
    """Two equal networks, one with our optimizer and one with PyTorch's."""
    net = small_net()
    other = copy.deepcopy(net)
    theirs = torch.optim.SGD(other.parameters(), **options, foreach=False)
    return net, SGD(net.parameters(), **options), other, theirs


def step_both(net: nn.Module, ours: SGD, other: nn.Module, theirs: torch.optim.SGD, steps: int = 1) -> None:
    for _ in range(steps):
        data = batch()
        for module, optimizer in ((net, ours), (other, theirs)):
            backward(module, data)
            optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_training_is_that_of_torch_sgd(backend: Any) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
    net, ours, other, theirs = twins(**options)
    with kernels.use_backend(backend):
        step_both(net, ours, other, theirs, steps=3)
    assert same(net, other)


def test_all_parameters_of_a_group_are_one_launch(launches: list[str]) -> None:
    net = small_net(torch.bfloat16)
    layers = [{"params": net[0].parameters()}, {"params": net[3].parameters(), "lr": 0.5}]
    optimizer = SGD(layers, lr=0.1, momentum=0.9)
    backward(net, batch(torch.bfloat16))
    launches.clear()
    optimizer.step()
    assert launches == ["_sgd_kernel"] * 2


def test_groups_have_their_own_settings() -> None:
    net = small_net()
    other = copy.deepcopy(net)

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        first, last = module[0], module[3]  # type: ignore[index]
        return [{"params": first.parameters(), "momentum": 0.9}, {"params": last.parameters(), "lr": 0.5, "maximize": True}]

    step_both(net, SGD(groups(net), lr=0.1), other, torch.optim.SGD(groups(other), lr=0.1, foreach=False), steps=2)
    assert same(net, other)


def test_parameters_without_a_gradient_stay_and_join_later() -> None:
    net, ours, other, theirs = twins(lr=0.1, momentum=0.9, dampening=0.5)
    for module in (net, other):
        module[0].requires_grad_(False)  # type: ignore[index]
    before = [p.clone() for p in net[0].parameters()]  # type: ignore[index]
    step_both(net, ours, other, theirs)
    assert all(map(torch.equal, before, net[0].parameters()))  # type: ignore[index]
    for module in (net, other):
        module[0].requires_grad_(True)  # type: ignore[index]
    # Now some parameters make their first step, in which dampening is not applied, and some their second.
    step_both(net, ours, other, theirs, steps=2)
    assert same(net, other)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_master_keeps_updates_too_small_for_the_parameter(dtype: torch.dtype, backend: Any) -> None:
    """Two steps of a third of a unit in the last place: plain half-precision SGD loses both; the master's sum rounds to one."""
    net = FusedSequential(nn.Linear(16, 4)).to(DEVICE, dtype)
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    plain = copy.deepcopy(net)
    ours, theirs = SGD(net.parameters(), lr=1.0), torch.optim.SGD(plain.parameters(), lr=1.0)
    x = torch.full((1, 16), torch.finfo(dtype).eps / 3, device=DEVICE, dtype=dtype)
    with kernels.use_backend(backend):
        for _ in range(2):
            for module, optimizer in ((net, ours), (plain, theirs)):
                module.zero_grad()
                module(x).sum().neg().backward()
                optimizer.step()
    assert torch.equal(plain[0].weight, torch.ones_like(plain[0].weight))
    assert torch.equal(net[0].weight, torch.full_like(net[0].weight, 1.0 + torch.finfo(dtype).eps))
    master = ours.master(net[0].weight)
    assert master is not None
    assert master.dtype == torch.float32
    assert torch.equal(master, 1 + 2 * x.float().expand(4, 16))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_weights_loaded_later_are_not_reverted(dtype: torch.dtype, backend: Any) -> None:
    net, other = small_net(dtype), small_net(dtype)
    optimizer = SGD(net.parameters(), lr=0.01, momentum=0.9)
    with kernels.use_backend(backend):
        for _ in range(2):
            backward(net, batch(dtype))
            optimizer.step()
        net.load_state_dict(other.state_dict())
        with torch.no_grad():
            net[0].weight.data.clamp_(-0.1, 0.1)  # changes no version counter
        expected = [p.detach().clone() for p in net.parameters()]
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:
            group["momentum"] = 0.0
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), expected))
    master = optimizer.master(net[0].weight)
    assert torch.equal(master.to(dtype), expected[0])
    # For a bfloat16 weight, the master's low 16 bits are kept.
    assert torch.equal(master, expected[0].float()) == (dtype == torch.float16)


@pytest.mark.parametrize("change", ["parameter", "gradient", "size-1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(change: str, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 1 if change == "size-1" else 3, 4, 5, device=DEVICE).to(dtype)
    weight = nn.Parameter(weight.to(memory_format=torch.channels_last))
    plain = nn.Parameter(weight.detach().float().contiguous())
    ours = SGD([weight], lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD([plain], lr=0.1, momentum=0.9, foreach=False)
    for step in range(3):
        grad = torch.randn(weight.shape, device=DEVICE).to(dtype)
        weight.grad = grad.contiguous() if change == "gradient" else grad.contiguous(memory_format=torch.channels_last)
        plain.grad = grad.float()
        if change == "parameter" and step == 1:  # as net.to(memory_format=...) does
            weight.data = weight.data.contiguous()
        ours.step()
        theirs.step()
    assert torch.equal(weight, plain.to(dtype))
    assert torch.equal(ours.state[weight]["momentum_buffer"], theirs.state[plain]["momentum_buffer"])
    assert memory_order(ours.state[weight]["momentum_buffer"]) == memory_order(weight)


def test_a_gradient_in_the_memory_order_of_its_parameter_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """AlexNet's first filters have one channel; the stride of a dimension of size 1 must not matter."""
    seen: list[torch.Tensor] = []

    def looking(params: Any, grads: Any, *_: Any, **__: Any) -> None:
        seen.extend(grads)

    monkeypatch.setattr(alexnet_triton.optim, "sgd_step", looking)
    weight = nn.Parameter(torch.randn(6, 1, 4, 5, device=DEVICE).to(memory_format=torch.channels_last))
    weight.grad = torch.empty_like(weight).as_strided(weight.shape, (20, 20, 5, 1))
    assert weight.grad.stride() != weight.stride()
    SGD([weight], lr=0.1).step()
    assert seen[0] is weight.grad


@pytest.mark.parametrize("in_memory", [False, True], ids=["lr-number", "lr-tensor"])
def test_schedulers(in_memory: bool) -> None:
    net, _, other, _ = twins(lr=0.1)
    lr = torch.tensor(0.1, device=DEVICE) if in_memory else 0.1
    ours = SGD(net.parameters(), lr=lr, momentum=0.9)
    theirs = torch.optim.SGD(other.parameters(), lr=lr.clone() if in_memory else lr, momentum=0.9, foreach=False)  # type: ignore[union-attr]
    ours_schedule = torch.optim.lr_scheduler.ExponentialLR(ours, 0.5)
    theirs_schedule = torch.optim.lr_scheduler.ExponentialLR(theirs, 0.5)
    for _ in range(3):
        step_both(net, ours, other, theirs)
        ours_schedule.step()
        theirs_schedule.step()
    assert same(net, other)
    assert float(ours.param_groups[0]["lr"]) == pytest.approx(0.0125)
    if in_memory:
        assert ours.param_groups[0]["lr"] is lr  # a captured graph reads this very tensor


def test_a_schedule_of_momentum() -> None:
    net, ours, other, theirs = twins(lr=0.1, momentum=0.9)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=5) for o in (ours, theirs)]
    for _ in range(3):
        step_both(net, ours, other, theirs)
        for schedule in schedules:
            schedule.step()
    assert ours.param_groups[0]["momentum"] == theirs.param_groups[0]["momentum"] != 0.9
    assert same(net, other)


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler_and_clipping(overflow: bool) -> None:
    net, ours, other, theirs = twins(lr=0.1, momentum=0.9)
    before = copy.deepcopy(net)
    data = batch()
    for module, optimizer in ((net, ours), (other, theirs)):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
        scaler.scale(F.cross_entropy(module(data[0]), data[1])).backward()
        if overflow:
            next(module.parameters()).grad[0] = torch.inf  # type: ignore[index]
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.01)
        assert overflow or norm > 0.01
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (512.0 if overflow else 1024.0)
    assert same(net, other)
    assert same(net, before) == overflow


def test_clipping_half_precision() -> None:
    net = small_net(torch.bfloat16)
    optimizer = SGD(net.parameters(), lr=1.0)
    before = [p.detach().float() for p in net.parameters()]
    backward(net, batch(torch.bfloat16))
    nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    optimizer.step()
    moved = [optimizer.master(p) - b for p, b in zip(net.parameters(), before, strict=True)]
    assert float(torch.stack([m.square().sum() for m in moved]).sum().sqrt()) == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("ours_first", [True, False])
def test_states_load_into_each_other(ours_first: bool) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 1e-3}
    net, ours, other, theirs = twins(**options)
    step_both(net, ours, other, theirs, steps=2)
    state = (ours if ours_first else theirs).state_dict()
    new_ours, new_theirs = SGD(net.parameters(), lr=7.0), torch.optim.SGD(other.parameters(), lr=7.0)
    (new_theirs if ours_first else new_ours).load_state_dict(state)
    (new_ours if ours_first else new_theirs).load_state_dict(state)
    assert new_ours.param_groups[0]["lr"] == 0.1
    step_both(net, new_ours, other, new_theirs, steps=2)
    assert same(net, other)
    assert {key for entry in new_ours.state.values() for key in entry} == {"momentum_buffer"}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("how", ["state_dict", "file", "deepcopy", "pickle"])
def test_a_restored_optimizer_goes_on_with_the_same_bits(dtype: torch.dtype, how: str) -> None:
    net = small_net(dtype)
    optimizer = SGD(net.parameters(), lr=1e-3, momentum=0.9)
    data = [batch(dtype) for _ in range(3)]
    for each in data[:2]:
        backward(net, each)
        optimizer.step()
    if how == "deepcopy":
        resumed, restored = copy.deepcopy((net, optimizer))
    elif how == "pickle":
        resumed, restored = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        resumed = copy.deepcopy(net)
        restored = SGD(resumed.parameters(), lr=5.0)
        state = optimizer.state_dict()
        if how == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        restored.load_state_dict(state)
    for module, each in ((net, optimizer), (resumed, restored)):
        backward(module, data[2])
        each.step()
    assert same(net, resumed)
    for p, q in zip(net.parameters(), resumed.parameters(), strict=True):
        masters = {"master"} if dtype == torch.float16 else {"master_bits", "master_ties"}
        assert restored.state[q].keys() == masters | {"momentum_buffer"}
        for key, value in optimizer.state[p].items():
            assert restored.state[q][key].dtype == value.dtype
            assert key == "master_ties" or torch.equal(restored.state[q][key], value)
            assert restored.state[q][key].data_ptr() != value.data_ptr()
        assert torch.equal(restored.master(q), optimizer.master(p))
        assert not torch.equal(optimizer.master(p), p.float())  # the master holds bits that rounding would lose


def test_loading_heeds_the_hooks_of_others() -> None:
    net = small_net(torch.bfloat16)
    optimizer = SGD(net.parameters(), lr=0.1)
    backward(net, batch(torch.bfloat16))
    optimizer.step()

    def doubled(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state_dict)
        for entry in changed["state"].values():
            entry["master"] *= 2
        return changed

    seen: list[torch.dtype] = []
    optimizer.register_load_state_dict_pre_hook(doubled)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.extend(s["master"].dtype for s in o.state.values()))
    masters = [optimizer.master(p) for p in net.parameters()]
    for times in (2, 4):
        optimizer.load_state_dict(optimizer.state_dict())
        for master, entry in zip(masters, optimizer.state.values(), strict=True):
            assert torch.equal(entry["master"], times * master)
    assert seen == [torch.float32] * 2 * len(masters)


def stepped(dtype: torch.dtype, steps: int = 2) -> tuple[nn.Module, SGD]:
    net = small_net(dtype)
    optimizer = SGD(net.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(steps):
        backward(net, batch(dtype))
        optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_state_dict_holds_float32(dtype: torch.dtype) -> None:
    net, optimizer = stepped(dtype)
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda _, made: seen.extend(map(set, made["state"].values())), prepend=True)
    state = optimizer.state_dict()["state"]
    half = dtype != torch.float32
    for index, param in enumerate(net.parameters()):
        assert list(state[index]) == ["master"] * half + ["momentum_buffer"]
        assert {value.dtype for value in state[index].values()} == {torch.float32}
        assert state[index]["momentum_buffer"] is optimizer.state[param]["momentum_buffer"]
        if half:
            assert torch.equal(state[index]["master"].to(dtype), param)
            assert memory_order(state[index]["master"]) == memory_order(param)
    assert seen == [set(entry) for entry in state.values()]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("net_first", [True, False])
def test_a_network_is_loaded_before_its_optimizer_or_after(dtype: torch.dtype, net_first: bool) -> None:
    net, optimizer = stepped(dtype)
    resumed, restored = stepped(dtype)
    loads = [lambda: resumed.load_state_dict(net.state_dict()), lambda: restored.load_state_dict(optimizer.state_dict())]
    for load in loads if net_first else reversed(loads):
        load()
    data = batch(dtype)
    for module, each in ((net, optimizer), (resumed, restored)):
        backward(module, data)
        each.step()
    assert same(net, resumed)
    for p, q in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(optimizer.master(p), restored.master(q))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_master_is_set_in_the_tensors_that_are_there(dtype: torch.dtype, steps: int) -> None:
    net, optimizer = stepped(dtype, steps)
    before = [optimizer.state[p].copy() for p in net.parameters()]
    values = [torch.randn(p.shape) for p in net.parameters()]
    for param, value, old in zip(net.parameters(), values, before, strict=True):
        optimizer.set_master(param, value)
        assert torch.equal(param, value.to(DEVICE, dtype))
        assert all(optimizer.state[param][key] is tensor for key, tensor in old.items())
        master = optimizer.master(param)
        if dtype == torch.float32:
            assert master is None
        else:
            assert torch.equal(master, value.to(DEVICE))
        param.grad = torch.zeros_like(param)
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
    optimizer.step()
    for param, value in zip(net.parameters(), values, strict=True):
        assert torch.equal(param if dtype == torch.float32 else optimizer.master(param), value.to(DEVICE))


def test_a_parameter_that_becomes_another_dtype_keeps_its_master() -> None:
    """From bfloat16 to float32 and back, as long as the parameter still equals its rounded master."""
    net, optimizer = stepped(torch.bfloat16)
    masters = [optimizer.master(p) for p in net.parameters()]
    net.float()
    state = optimizer.state_dict()["state"].values()
    assert all(map(torch.equal, [entry["master"] for entry in state], masters))
    net.bfloat16()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
    optimizer.step()
    assert all(map(torch.equal, map(optimizer.master, net.parameters()), masters))
    net.float()
    backward(net, batch(torch.float32))
    optimizer.step()
    assert [optimizer.master(p) for p in net.parameters()] == [None] * len(masters)
    assert all("master" not in entry for entry in optimizer.state_dict()["state"].values())
    net.half()
    backward(net, batch(torch.float16))
    optimizer.step()
    for p, entry in zip(net.parameters(), optimizer.state_dict()["state"].values(), strict=True):
        assert torch.equal(entry["master"].half(), p)
        assert entry.keys() == {"master", "momentum_buffer"}


def test_a_loaded_master_counts_only_where_the_weight_is_still_its_rounded_one() -> None:
    net, optimizer = stepped(torch.bfloat16)
    optimizer.load_state_dict(optimizer.state_dict())
    changed = next(net.parameters())
    with torch.no_grad():
        changed.zero_()
    assert not optimizer.master(changed).any()


@pytest.mark.parametrize("repeated", [False, True])
def test_a_master_that_was_put_into_the_state_counts(repeated: bool) -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=DEVICE))
    param.grad = torch.zeros_like(param)
    optimizer = SGD([param], lr=0.1)
    for _ in range(2 if repeated else 0):
        optimizer.step()
    value = torch.tensor([1.001, 1.002, 2.0], device=DEVICE)
    optimizer.state[param]["master"] = value
    optimizer.step()
    assert torch.equal(optimizer.master(param), torch.tensor([1.001, 1.002, 1.0], device=DEVICE))


def test_a_state_of_another_shape_is_refused() -> None:
    net = small_net(torch.bfloat16)
    optimizer = SGD(net.parameters(), lr=0.1)
    backward(net, batch(torch.bfloat16))
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][1]["master"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"master of parameter 1 must have its shape \(4,\), got \(3,\)"):
        optimizer.load_state_dict(state)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_training_step() -> None:
    net, ours, other, theirs = twins(lr=0.1, momentum=0.9)
    torch._dynamo.reset()

    def step(x: torch.Tensor, labels: torch.Tensor) -> None:
        ours.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        ours.step()

    compiled = torch.compile(step, backend="eager")
    for _ in range(2):
        data = batch()
        compiled(*data)
        backward(other, data)
        theirs.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_closure_is_called_with_gradients() -> None:
    net, ours, other, theirs = twins(lr=0.1)
    data = batch()
    losses = [optimizer.step(lambda m=module: backward(m, data)) for module, optimizer in ((net, ours), (other, theirs))]
    assert torch.equal(losses[0], losses[1])  # type: ignore[arg-type]
    assert same(net, other)


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is for the CPU")
def test_float64_on_the_cpu() -> None:
    net, _, other, _ = twins(lr=0.1)
    net, other = net.double(), other.double()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    ours, theirs = SGD(net.parameters(), **options), torch.optim.SGD(other.parameters(), **options, foreach=False)
    for _ in range(2):
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert same(net, other)
    if INTERPRETED:
        with kernels.use_backend("triton"), pytest.raises(TypeError, match=r"params must be float32.*got torch\.float64"):
            ours.step()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": torch.ones(2)},
        {"momentum": -0.1},
        {"weight_decay": -0.1},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    ],
    ids=str,
)
def test_what_torch_sgd_refuses(options: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(ValueError) as theirs:  # noqa: PT011  # the message is compared below
        torch.optim.SGD(params, **options)
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        SGD(params, **options)
    assert str(ours.value) == str(theirs.value)


def test_what_no_kernel_takes() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        SGD([])
    with pytest.raises(TypeError, match="momentum must be a number"):
        SGD([nn.Parameter(torch.zeros(3))], momentum=torch.tensor(0.9))  # type: ignore[arg-type]
    complex_parameter = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"parameters must be float32.*got torch\.complex64"):
        SGD([complex_parameter])
    optimizer = SGD([nn.Parameter(torch.zeros(3, device=DEVICE))])
    with pytest.raises(TypeError, match="parameters must be float32"):
        optimizer.add_param_group({"params": [complex_parameter]})
    assert len(optimizer.param_groups) == 1

    table = nn.Embedding(5, 3, sparse=True, device=DEVICE)
    table(torch.tensor([1, 2], device=DEVICE)).sum().backward()
    with pytest.raises(RuntimeError, match="SGD takes dense gradients only"):
        SGD(table.parameters()).step()

    gaps = nn.Parameter(torch.zeros(4, 4, device=DEVICE)[:, ::2])
    gaps.grad = torch.ones_like(gaps)
    with pytest.raises(ValueError, match="parameters must be dense in memory"):
        SGD([gaps]).step()


def test_a_first_step_in_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would create the masters from the parameters again at every replay. (On the CPU, a capture is simulated.)"""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16, device=DEVICE))
    optimizer = SGD([param])
    if DEVICE == "cpu":
        param = type("OnCuda", (), {"is_cuda": True})()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        optimizer._make_state(param, "master")


@pytest.mark.skipif(DEVICE != "cuda" or UNDER_TTSEM, reason="needs a GPU")
def test_a_captured_step_follows_learning_rate_and_loaded_weights() -> None:
    param = nn.Parameter(torch.ones(5000, device=DEVICE, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    lr = torch.tensor(0.25, device=DEVICE)
    optimizer = SGD([param], lr=lr)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    assert torch.equal(param, torch.full_like(param, 0.75))  # the capture itself executes no kernel
    graph.replay()
    assert torch.equal(param, torch.full_like(param, 0.5))
    lr.fill_(0.125)
    graph.replay()
    assert torch.equal(param, torch.full_like(param, 0.375))
    with torch.no_grad():
        param.fill_(2.0)
    graph.replay()
    assert torch.equal(param, torch.full_like(param, 1.875))


#: Compiles AlexNet's optimizer step for sm_90; prints per launch tensors, grid, BLOCK, warps, 16-byte loads and stores, spills.
COMPILE = """
import json, re, torch
from benchmarks.offline import _resource_usage, offline_target
from alexnet_triton import AlexNet
from alexnet_triton.optim import SGD
from kernels.runtime import launch

found = []
def compile(kernel, grid, arguments):
    compiled = kernel.warmup(grid=grid, **arguments)
    usage = _resource_usage(compiled.asm["cubin"])
    accesses = re.findall(r"(?:ld|st)\\.global\\S*", compiled.asm["ptx"])
    found.append([len(arguments["param_ptrs"]), grid[0], arguments["BLOCK"], compiled.metadata.num_warps,
                  accesses.count("ld.global.v4.b32"), accesses.count("st.global.v4.b32"), usage["STACK"] + usage["LOCAL"]])

net = AlexNet().to(dtype=torch.DTYPE, memory_format=torch.channels_last)
optimizer = SGD(net.parameters(), momentum=0.9)
for p in net.parameters():
    p.grad = torch.zeros_like(p)
with offline_target(90), launch.record_launches(lambda *_: None):
    optimizer.step()
with offline_target(90), launch.record_launches(compile):
    optimizer.step()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_alexnet_compiled_for_a_gpu_is_one_launch_of_16_byte_accesses(dtype: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE.replace("torch.DTYPE", f"torch.{dtype}")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    ((tensors, grid, block, warps, loads, stores, spills),) = json.loads(result.stdout)
    parameters = [p.numel() for p in alexnet_triton.AlexNet().parameters()]
    assert tensors == len(parameters) == 16
    assert grid == sum(-(-n // block) for n in parameters)
    # Bytes per element that a thread reads and writes: gradient, weight and momentum buffer. A bfloat16 weight is stored as the
    # parameter (2 bytes) and the master's low bits (2 bytes).
    elements = block // (32 * warps)
    half = dtype != "float32"
    read, written = (2 + 2 + 2 + 4, 2 + 2 + 4) if half else (4 + 4 + 4, 4 + 4)
    assert loads == elements * read // 16
    assert stores == elements * written // 16
    assert spills == 0
