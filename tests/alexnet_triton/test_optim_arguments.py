"""The optimizer's arguments: torch.optim.SGD's, NumPy's numbers, and options that raise."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import kernels
from alexnet_triton.optim import SGD
from kernels.runtime import launch

from ..conftest import DEVICE, own_devices
from .test_optim import backward, batch, same, small_net, step_both, twins


def test_the_arguments_are_those_of_torch_sgd() -> None:
    ours, theirs = inspect.signature(SGD).parameters, inspect.signature(torch.optim.SGD).parameters
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [(p.name, p.default, p.kind) for p in theirs.values()]
    params = [nn.Parameter(torch.zeros(3))]
    assert SGD(params).state_dict() == torch.optim.SGD(params).state_dict()
    assert repr(SGD(params)) == repr(torch.optim.SGD(params))


IMPLEMENTATIONS: list[dict[str, Any]] = [
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"fused": False},
    {"foreach": False, "fused": True},
    {"foreach": True, "fused": False},
    {"differentiable": False},
]


@pytest.mark.parametrize("choice", IMPLEMENTATIONS, ids=str)
def test_the_choice_of_an_implementation_changes_no_number(choice: dict[str, Any]) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    net, _, other, theirs = twins(**options)
    ours = SGD(net.parameters(), **options, **choice)
    step_both(net, ours, other, theirs, steps=2)
    assert same(net, other)
    new_theirs, new_ours = torch.optim.SGD(other.parameters()), SGD(net.parameters())
    new_theirs.load_state_dict(ours.state_dict())
    new_ours.load_state_dict(new_theirs.state_dict())
    assert new_ours.state_dict()["param_groups"] == new_theirs.state_dict()["param_groups"] == ours.state_dict()["param_groups"]
    assert choice.items() <= new_ours.param_groups[0].items()


def test_a_scaler_works_beside_fused() -> None:
    """PyTorch's own fused optimizer unscales and skips steps itself; ours leaves that to the scaler."""
    net, _, other, theirs = twins(lr=0.1)
    ours = SGD(net.parameters(), lr=0.1, fused=True)
    for overflow in (False, True):
        data = batch()
        for module, optimizer in ((net, ours), (other, theirs)):
            scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(module(data[0]), data[1])).backward()
            if overflow:
                next(module.parameters()).grad[0] = torch.inf  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == (512.0 if overflow else 1024.0)
        assert same(net, other)


PLACES = ["constructor", "group", "added", "assigned", "loaded"]


def with_options(params: list[nn.Parameter], options: dict[str, Any], place: str) -> SGD:
    """An optimizer that gets ``options`` in one of the places where options can be set."""
    if place == "constructor":
        return SGD(params, **options)
    if place == "group":
        return SGD([{"params": params, **options}])
    optimizer = SGD(params)
    if place == "added":
        optimizer = SGD([nn.Parameter(torch.zeros(3))])
        optimizer.add_param_group({"params": params, **options})
    if place == "assigned":
        optimizer.param_groups[0].update(options)
    if place == "loaded":
        state = optimizer.state_dict()
        state["param_groups"][0].update(options)
        optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"differentiable": True}, "SGD does not support differentiable=True"),
        ({"differentiable": np.True_}, "SGD does not support differentiable=True"),
        ({"foreach": True, "fused": True}, "`fused` and `foreach` cannot be `True` together"),
        ({"momentum": torch.tensor(0.9)}, "momentum must be a number, got tensor"),
        ({"momentum": "0.9"}, "momentum must be a number, got '0.9'"),
        ({"dampening": None}, "dampening must be a number, got None"),
        ({"weight_decay": torch.zeros(2)}, "weight_decay must be a number, got tensor"),
        ({"weight_decay": np.zeros(2)}, "weight_decay must be a number, got array"),
        ({"lr": "0.1"}, "lr must be a number, got '0.1'"),
        ({"lr": np.complex64(1)}, "lr must be a number, got "),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_it_cannot_do_is_an_error_wherever_it_is_asked(options: dict[str, Any], match: str, place: str) -> None:
    param = nn.Parameter(torch.ones(3, device=DEVICE))
    param.grad = torch.ones_like(param)
    error = TypeError if "must be" in match else RuntimeError
    with pytest.raises(error, match=match):  # noqa: PT012  # assigned options are read by the step
        optimizer = with_options([param], options, place)
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param))


def test_what_is_refused_leaves_the_optimizer_as_it_was() -> None:
    net = small_net(torch.bfloat16)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    backward(net, batch(torch.bfloat16))
    optimizer.step()
    with pytest.raises(NotImplementedError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "differentiable": True})
    before = copy.deepcopy(optimizer.state_dict())
    for change in ({"differentiable": True}, {"lr": "0.1"}):
        state = copy.deepcopy(before)
        state["param_groups"][0].update(change | {"momentum": 0.5})
        with pytest.raises((NotImplementedError, TypeError)):
            optimizer.load_state_dict(state)
    state = copy.deepcopy(before)
    state["state"][1]["master"] = torch.zeros(7)
    with pytest.raises(ValueError, match="master of parameter 1"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for entry, old in zip(after["state"].values(), before["state"].values(), strict=True):
        assert entry.keys() == old.keys()
        assert all(entry[key].dtype == torch.float32 and torch.equal(entry[key], old[key]) for key in old)


def test_a_first_step_that_is_refused_leaves_no_momentum() -> None:
    net, ours, other, theirs = twins(lr=0.1, momentum=0.9)
    data = batch()
    for module in (net, other):
        backward(module, data)
    sparse, grad = list(net.parameters())[-1], list(net.parameters())[-1].grad
    sparse.grad = grad.to_sparse()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="dense gradients only"):
        ours.step()
    sparse.grad = grad
    ours.param_groups[0]["lr"] = torch.ones(2)
    with pytest.raises(ValueError, match="lr must be a number or a tensor of one element"):
        ours.step()
    assert not any(ours.state.values())
    ours.param_groups[0]["lr"] = 0.1
    ours.step()
    theirs.step()
    step_both(net, ours, other, theirs)
    assert same(net, other)


def test_an_old_file_lacks_options() -> None:
    net, ours, other, theirs = twins(lr=0.1, momentum=0.9)
    step_both(net, ours, other, theirs)
    state = ours.state_dict()
    for group in state["param_groups"]:
        for name in ("nesterov", "maximize", "foreach", "differentiable", "fused"):
            del group[name]
    restored = SGD(net.parameters(), lr=7.0)
    restored.load_state_dict(state)
    assert restored.param_groups[0].keys() == ours.param_groups[0].keys()
    step_both(net, restored, other, theirs)
    assert same(net, other)


def pythons(value: Any) -> bool:
    """Whether ``value`` contains only tensors and Python's numbers."""
    if isinstance(value, tuple):
        return all(map(pythons, value))
    return isinstance(value, torch.Tensor) or type(value) in (int, float, bool, type(None))


NUMPYS: list[dict[str, Any]] = [
    {"lr": np.float32(0.1)},
    {"lr": np.array(0.1), "weight_decay": np.array(1e-3, np.float32)},
    {"lr": np.float64(0.1), "momentum": np.float32(0.9), "nesterov": np.True_, "maximize": np.True_},
    {"lr": np.float16(0.1), "momentum": np.float64(0.9), "nesterov": np.False_, "weight_decay": np.float32(1e-3)},
    {"lr": np.int64(1), "momentum": np.float32(0.9), "dampening": np.float32(0.6), "weight_decay": np.int32(0)},
    {"lr": np.longdouble(0.1), "momentum": np.uint8(1), "maximize": np.int64(1)},
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", NUMPYS, ids=str)
def test_numpys_numbers_are_pythons(options: dict[str, Any], dtype: torch.dtype, place: str) -> None:
    """NumPy's flags would reach the kernel; Triton cannot compile them, and the interpreter would accept them."""
    python = {k: bool(v) if k in ("nesterov", "maximize") else float(v) for k, v in options.items()}
    param = nn.Parameter(torch.randn(100, device=DEVICE).to(dtype))
    twin = copy.deepcopy(param)
    ours, expected = with_options([param], options, place), SGD([twin], **python)
    arguments: list[Any] = []
    with launch.observe_launches(lambda _, grid, given: arguments.append((grid, *given.values()))):
        for _ in range(3):
            param.grad = torch.randn_like(param)
            twin.grad = param.grad.clone()
            ours.step()
            expected.step()
    assert len(arguments) == 6
    assert all(map(pythons, arguments))
    assert torch.equal(param, twin)
    if place != "assigned":  # assigned values stay as they were assigned
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)  # refuses NumPy's numbers
        assert all(map(pythons, (value for k, value in ours.param_groups[-1].items() if k != "params")))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_numpys_numbers_are_those_of_torch_sgd(backend: Any) -> None:
    options = {
        "lr": np.float32(0.1),
        "momentum": np.float32(0.9),
        "dampening": np.float32(0.6),
        "weight_decay": np.float64(1e-3),
    }
    net, ours, other, theirs = twins(**options)
    with kernels.use_backend(backend):
        step_both(net, ours, other, theirs, steps=2)
        for optimizer in (ours, theirs):
            optimizer.param_groups[0].update(lr=np.float64(0.05), momentum=np.float32(0.5), nesterov=np.True_)
        step_both(net, ours, other, theirs, steps=2)
    assert same(net, other)


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is for the CPU")
def test_numpys_numbers_in_float64() -> None:
    params = [nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2)]
    options = {"lr": np.float32(0.1), "momentum": np.array(0.9), "weight_decay": np.float32(0.1), "maximize": np.True_}
    python = {"lr": float(np.float32(0.1)), "momentum": 0.9, "weight_decay": float(np.float32(0.1)), "maximize": True}
    optimizers = [SGD([params[0]]), torch.optim.SGD([params[1]], **python)]
    optimizers[0].param_groups[0].update(options)
    for _ in range(2):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.arange(5.0, dtype=torch.float64)
            optimizer.step()
    assert torch.equal(*params)


def test_a_schedule_in_numpys_numbers() -> None:
    net, ours, other, theirs = twins(lr=0.1, momentum=0.9)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: np.float32(0.3) ** step) for o in (ours, theirs)]
    for _ in range(3):
        step_both(net, ours, other, theirs)
        for schedule in schedules:
            schedule.step()
    assert isinstance(ours.param_groups[0]["lr"], np.generic)
    assert same(net, other)


@pytest.mark.parametrize("place", ["constructor", "group", "assigned"])
def test_weight_decay_in_a_tensor(place: str) -> None:
    """As in ``torch.optim.SGD``, each step reads the tensor."""
    params = [nn.Parameter(torch.randn(100, device=DEVICE))]
    params.append(copy.deepcopy(params[0]))
    decay = torch.tensor(0.1)
    optimizers = [with_options(params[:1], {"lr": 0.1, "weight_decay": decay}, place)]
    optimizers.append(torch.optim.SGD(params[1:], lr=0.1, weight_decay=decay, foreach=False))  # type: ignore[arg-type]
    for value in (0.1, 0.2, 0.0):
        decay.fill_(value)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.ones_like(param)
            optimizer.step()
        assert torch.equal(*params)


@own_devices
def test_a_gradient_that_a_collective_is_still_to_bring(launches: list[str]) -> None:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    param = nn.Parameter(torch.zeros(3, device=DEVICE))
    param.grad = AsyncCollectiveTensor(torch.ones(3, device=DEVICE))
    SGD([param], lr=0.5).step()
    assert torch.equal(param, torch.full_like(param, -0.5))
    assert launches == ["_sgd_kernel"]


@own_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_with_a_dispatch_of_their_own_are_stepped_by_torch(dtype: torch.dtype, launches: list[str]) -> None:
    """A tensor subclass of two tensors without memory of its own: a kernel would read a null pointer."""
    parts = [torch.randn(4, 5, device=DEVICE).to(dtype) for _ in range(2)]
    param = nn.Parameter(TwoTensor(*[part.clone() for part in parts]))
    plain = [nn.Parameter(part.clone()) for part in parts]
    optimizers = [SGD([param], lr=0.1, momentum=0.9), SGD(plain, lr=0.1, momentum=0.9)]
    for _ in range(3):
        for part in plain:
            part.grad = torch.randn_like(part)
        param.grad = TwoTensor(*[part.grad.clone() for part in plain])
        launches.clear()
        optimizers[0].step()
        assert launches == []
        optimizers[1].step()
    assert torch.equal(param.a, plain[0])
    assert torch.equal(param.b, plain[1])
