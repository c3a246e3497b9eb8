"""Compares what reaches Triton's C launcher by plan and by launch functions, after every kind of change between two calls.

``test_plans.py`` runs ``python -m tests.kernels.runtime.plan_worker`` without TRITON_INTERPRET; it prints each scenario's
outcome as JSON. Kernels are compiled for an H100 but not executed, so their arguments are compared, not their results: each
address as its tensor, each tensor map as what it was made of (``plan_harness.py``).
"""

from __future__ import annotations

import copy
import gc
import io
import json
import traceback
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kernels
from alexnet_triton import AlexNet, fuse
from alexnet_triton.optim import SGD
from benchmarks.idle import TensorMap, idle_gpu
from kernels.runtime import direct, launch, plans, recording

from . import plan_surroundings as plan_surroundings  # registers its scenarios
from .direct_worker import flat_arguments
from .plan_harness import (
    ADDRESSES,
    SCENARIOS,
    Check,
    Launcher,
    Tensors,
    idle_utils,
    images,
    is_direct,
    scenario,
    small_net,
    step_of,
)


@scenario
def nothing_grows(check: Check) -> None:
    """10,000 calls with 50 batch sizes: no plan after the first rounds, no leftover objects, no tensor kept alive."""
    idle_utils[0].on_launch = None
    # PyTorch's tracing leaves graphs with tensors that are collected later. Kept alive here, they change no count.
    others = _tensors()
    net = fuse(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 8)))
    inputs = [torch.zeros(n, 32) for n in range(1, 51)]

    def step(x: Tensor) -> None:
        net(x).sum().backward()
        net.zero_grad()

    for x in inputs * 2:
        step(x)
    made, kinds = plans.made, len(plans._plans)
    gc.collect()
    objects = len(gc.get_objects())
    for i in range(5000):  # a forward and a backward call each
        step(inputs[i * 7 % 50])
    gc.collect()
    assert (plans.made, len(plans._plans)) == (made, kinds)
    assert len(gc.get_objects()) - objects < 200, len(gc.get_objects()) - objects
    before = len(_tensors())
    plans.forget()
    assert len(_tensors()) == before
    del others


def _tensors() -> list[Tensor]:
    gc.collect()
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]  # isinstance would dereference weak proxies


@scenario
def alexnet(check: Check) -> None:
    for memory_format in (torch.channels_last, torch.contiguous_format):
        net = AlexNet().to(torch.bfloat16, memory_format=memory_format)  # type: ignore[call-overload]
        check(*step_of(net, torch.zeros(64, 1, 224, 224, dtype=torch.bfloat16)))


@scenario
def parameters_change(check: Check) -> None:
    net = small_net()
    check(*step_of(net, images()))
    with torch.no_grad():
        net[0].weight.mul_(2)
    check(*step_of(net, images()))
    net[0].weight = nn.Parameter(torch.zeros_like(net[0].weight))
    check(*step_of(net, images()))
    net[3].weight.data = net[3].weight.data.clone()
    check(*step_of(net, images()))
    net[3].weight.data = net[3].weight.data.contiguous(memory_format=torch.channels_last)
    check(*step_of(net, images()))
    net[3].bias = None
    check(*step_of(net, images()))
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    check(*step_of(net, images()))
    for dtype in (torch.float16, torch.float32):
        net.to(dtype)
        check(*step_of(net, images(dtype=dtype)))


@scenario
def the_tf32_switch_changes(check: Check) -> None:
    """Other kernels and copies, also when TF32 changes between forward and backward, and with a frozen first layer."""
    cudnn, net = torch.backends.cudnn, small_net(torch.float32)
    x = images(dtype=torch.float32)
    seen = set()
    try:
        for tf32 in (True, False, True):
            cudnn.allow_tf32 = tf32
            check(*step_of(net, x))
            seen.add(tuple(launched[4] for launched in check.launcher.of(step_of(net, x)[0])[0]))  # the kernels
        assert len(seen) == 2

        def other_way_back() -> list[Tensor]:
            cudnn.allow_tf32 = True
            y = net(x)
            cudnn.allow_tf32 = False
            return [y, *torch.autograd.grad(y, list(net.parameters()), torch.zeros_like(y))]

        other_way_back()
        other_way_back()
        assert not plans.unrepeatable
        cudnn.allow_tf32 = True
        for frozen in ([net[0].weight], [net[0].bias], [net[0].weight, net[0].bias]):
            for p in net[0].parameters():
                p.requires_grad_(all(p is not other for other in frozen))
            check(*step_of(net, x))
    finally:
        cudnn.allow_tf32 = True


@scenario
def float32_operations(check: Check) -> None:
    """The step runs in TF32, PyTorch's default for convolutions."""

    def leaf(*shape: int) -> Tensor:
        return torch.zeros(shape, requires_grad=True)

    def of(run: Callable[..., Tensor], **tensors: Tensor) -> None:
        def call() -> list[Tensor]:
            y = run(*tensors.values())
            leaves = [t for t in tensors.values() if t.requires_grad]
            return [y, *torch.autograd.grad(y, leaves, torch.zeros_like(y))]

        check(call, tensors)

    for n, c, k in ((64, 64, 96), (33, 24, 40), (2, 16, 32), (5, 12, 20)):
        conv = {"x": leaf(n, c, 9, 9), "w": leaf(k, c, 3, 3), "b": leaf(k)}
        of(lambda x, w, b: kernels.conv2d(x, w, b, padding=1, activation="relu"), **conv)
        of(lambda x, w: kernels.conv2d(x, w, padding=1), x=conv["x"].detach(), w=conv["w"])
        of(lambda x, w: kernels.conv2d(x, w, padding=1), x=conv["x"], w=conv["w"].detach())
    first = {"x": leaf(64, 1, 63, 64).detach(), "w": leaf(96, 1, 11, 11), "b": leaf(96)}
    of(lambda x, w, b: kernels.conv2d(x, w, b, 4, 1), **first)
    for x in (first["x"], leaf(33, 1, 39, 43).detach(), leaf(64, 1, 63, 63)):
        of(lambda x, w, b: kernels.conv2d_relu_max_pool2d(x, w, b, 4, 1, pool_kernel_size=3, pool_stride=2), **first | {"x": x})


@scenario
def batches_in_turn(check: Check) -> None:
    net = small_net()
    for n in (64, 1, 33, 64, 2, 33, 128, 1):
        check(*step_of(net, images(n)))


@scenario
def strides_and_alignment(check: Check) -> None:
    weight, bias = torch.zeros(72, 200, dtype=torch.bfloat16), torch.zeros(72, dtype=torch.bfloat16)
    base = torch.zeros(40 * 400, dtype=torch.bfloat16)
    for offset, stride in ((0, 200), (1, 200), (8, 208), (3, 201), (0, 200), (16, 400)):
        x = base.as_strided((37, 200), (stride, 1), offset)

        def call(x: Tensor = x) -> list[Tensor]:
            with torch.no_grad():
                return [kernels.linear(x, weight, bias)]

        check(call, {"x": x, "weight": weight, "bias": bias})


@scenario
def modules_change(check: Check) -> None:
    net = small_net()
    check(*step_of(net, images()))
    seen: list[int] = []
    for index in (0, 1, 6, 9):
        handle = net[index].register_forward_hook(lambda *_: seen.append(1))
        check(*step_of(net, images()), name_results=False)
        assert seen
        handle.remove()
        check(*step_of(net, images()))
        seen.clear()
    net.eval()
    check(*step_of(net, images()))
    net.train()
    net[11].p = 0.25
    check(*step_of(net, images()))
    net[2] = nn.MaxPool2d(2)
    net[9] = nn.Linear(32 * 3 * 3, 64).bfloat16()
    check(*step_of(net, images()))
    net[0].stride = (5, 5)
    net[9] = nn.Linear(32 * 2 * 2, 64).bfloat16()
    check(*step_of(net, images()))


@scenario
def a_hook_that_was_there_is_forgotten(check: Check) -> None:
    """After the hooks are removed the layers run fused again; lists changed in place take effect."""
    net, x = small_net(), images()
    whole = len(check.launcher.of(lambda: net(x))[0])
    handles = [layer.register_forward_hook(lambda *_: None) for layer in net]
    assert len(check.launcher.of(lambda: net(x))[0]) == 0
    for handle in handles:
        handle.remove()
    assert len(check.launcher.of(lambda: net(x))[0]) == whole
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert len(check.launcher.of(lambda: net(x))[0]) == 0
    handle.remove()
    assert len(check.launcher.of(lambda: net(x))[0]) == whole
    net[9].forward = lambda given: given.new_zeros(len(given), 64)
    assert len(check.launcher.of(lambda: net(x))[0]) < whole
    del net[9].forward
    assert len(check.launcher.of(lambda: net(x))[0]) == whole
    net[3].stride = [1, 1]
    assert net[:4](x).shape[2:] == (6, 6)
    net[3].stride[0] = 2
    assert net[:4](x).shape[2:] == (3, 6)


@scenario
def frozen_layers_launch_nothing(check: Check) -> None:
    net, x = small_net(), images()
    whole = len(check.launcher.of(step_of(net, x)[0])[0])
    for p in net[:8].parameters():
        p.requires_grad_(False)
    check(*step_of(net, x))
    some = len(check.launcher.of(step_of(net, x)[0])[0])
    for p in net.parameters():
        p.requires_grad_(False)
    step, tensors = step_of(net, x)
    check(step, tensors)
    none = len(check.launcher.of(step)[0])
    with torch.no_grad():
        assert none == len(check.launcher.of(step)[0]) < some < whole


def optimizer_of(net: nn.Module, **options: Any) -> tuple[SGD, Callable[[], list[Tensor]], Callable[[], Tensors]]:
    """An optimizer whose parameters have gradients, its step, and the tensors that the step reads and writes."""
    optimizer = SGD(net.parameters(), **options)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)

    def step() -> list[Tensor]:
        optimizer.step()
        return []

    def tensors() -> Tensors:
        found = {}
        for name, p in net.named_parameters():
            found |= {name: p, f"{name}.grad": p.grad}
            found |= {f"{name}.{key}": value for key, value in optimizer.state[p].items()}
        return found  # type: ignore[return-value]

    return optimizer, step, tensors


@scenario
def the_optimizers_numpy_options(check: Check) -> None:
    """Options that no scenario uses as Python numbers: a kernel compiled for those would hide NumPy's."""
    optimizer, step, tensors = optimizer_of(
        small_net(torch.float16), lr=np.float32(0.1), momentum=np.float64(0.9), nesterov=np.True_, maximize=np.True_
    )
    step()
    group = optimizer.param_groups[0]

    def change(**options: Any) -> None:
        """Change options between steps that run by plan."""
        step()
        step()
        group.update(options)
        check(step, tensors())

    for options in ({}, {"lr": np.float32(0.05)}, {"momentum": np.float32(0.5)}, {"weight_decay": np.float32(0.1)}):
        change(**options)
    change(dampening=0.6)
    change(dampening=np.float32(0.6))  # equal in NumPy, but 1 minus this is another float32
    decay = torch.tensor(0.2)
    for value in (0.2, 0.3):
        step()
        step()
        group["weight_decay"] = decay.fill_(value)
    check(step, tensors())
    for options in ({"nesterov": np.False_}, {"maximize": np.False_}, {"weight_decay": np.int64(0)}):
        change(**options)
    for refused in ({"differentiable": True}, {"foreach": True, "fused": True}, {"momentum": "0.5"}):
        before = dict(group)
        step()
        step()
        group.update(refused)
        with pytest.raises((RuntimeError, TypeError)):
            step()
        group.update(before)


@scenario
def the_optimizers_options(check: Check) -> None:
    net = small_net()
    optimizer, step, tensors = optimizer_of(net, lr=0.1, momentum=0.9)
    step()
    group = optimizer.param_groups[0]
    for options in ({}, {"lr": 0.05}, {"momentum": 0.5}, {"weight_decay": 0.1}, {"nesterov": True}, {"maximize": True}):
        group.update(options)
        check(step, tensors())
    group["lr"] = torch.tensor(0.1)
    check(step, tensors() | {"lr": group["lr"]})
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    check(step, tensors() | {"lr": group["lr"]})
    net[0].weight.grad = None
    check(step, {k: v for k, v in tensors().items() if v is not None} | {"lr": group["lr"]})
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    group = optimizer.param_groups[0]
    check(step, {k: v for k, v in tensors().items() if v is not None} | {"lr": group["lr"]})
    net[3].weight.data = net[3].weight.data.clone()
    check(step, {k: v for k, v in tensors().items() if v is not None} | {"lr": group["lr"]})
    bucket = torch.zeros(sum(p.numel() for p in net.parameters()), dtype=torch.bfloat16)  # as DistributedDataParallel's
    offset = 0
    for p in net.parameters():
        p.grad = bucket[offset : offset + p.numel()].view_as(p)
        offset += p.numel()
    everything = {k: v for k, v in tensors().items() if v is not None and not k.endswith(".grad")}
    check(step, everything | {"bucket": bucket, "lr": group["lr"]})
    saved = [p._version for p in net.parameters()]
    step()
    assert all(p._version > before for p, before in zip(net.parameters(), saved, strict=True))


@scenario
def single_operations(check: Check) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)

    def of(run: Callable[..., Tensor], **tensors: Tensor) -> None:
        def call() -> list[Tensor]:
            y = run(*tensors.values())
            return [y, *torch.autograd.grad(y, list(tensors.values()), torch.zeros_like(y))]

        check(call, tensors)

    conv = {"x": leaf(64, 64, 9, 9), "w": leaf(96, 64, 3, 3), "b": leaf(96)}
    of(lambda x, w, b: kernels.conv2d(x, w, b, padding=1, activation="relu"), **conv)
    of(lambda x, w, b: kernels.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_kernel_size=3, pool_stride=2), **conv)
    of(lambda x, w: kernels.conv2d(x, w, None, 2, 1, 2, 2), x=leaf(3, 6, 19, 17), w=leaf(8, 3, 3, 3))
    of(lambda x, w: kernels.conv2d(x, w, None, 4, 1), x=leaf(64, 1, 63, 63), w=leaf(96, 1, 11, 11))
    of(lambda x: kernels.max_pool2d(x, 3, 2), x=leaf(3, 17, 19, 17))
    of(lambda x: kernels.max_pool2d(x, 5, 2), x=leaf(3, 17, 19, 17))
    of(kernels.linear, x=leaf(37, 200), w=leaf(72, 200), b=leaf(72))
    of(kernels.linear, x=leaf(5, 4, 21), w=leaf(10, 21), b=leaf(1))


@scenario
def gradients_of_some(check: Check) -> None:
    """Gradients of a few weights, of the input, and of a weight that is used twice."""
    net, x = small_net(), images().requires_grad_()
    step, tensors = step_of(net, x)
    check(step, tensors)
    for leaves in ([net[3].weight], [net[0].bias], [net[9].weight, net[12].bias], [x]):

        def some(leaves: list[Tensor] = leaves) -> list[Tensor]:
            y = net(x)
            return [y, *torch.autograd.grad(y, leaves, torch.zeros_like(y))]

        check(some, tensors)
    tied = fuse(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)))
    check(*step_of(tied, torch.zeros(5, 32)))
    tied[2].weight = tied[0].weight  # two inputs share memory: no plan
    launched, results = check.launcher.of(step_of(tied, torch.zeros(5, 32))[0])
    assert not any(map(is_direct, launched))
    assert len(results) == len(list(tied.parameters())) + 1
    assert set(plans.unrepeatable.values()) == {"two inputs share memory"}
    plans.unrepeatable.clear()
    tied[2].weight = nn.Parameter(torch.zeros(32, 32))
    check(*step_of(tied, torch.zeros(5, 32)))


@scenario
def empty_results(check: Check) -> None:
    """An empty batch, and an output without features."""
    net = small_net()
    check(*step_of(net, images(64)))
    check(*step_of(net, images(0)))
    weight, x = torch.zeros(0, 32, requires_grad=True), torch.zeros(5, 32, requires_grad=True)

    def call() -> list[Tensor]:
        y = kernels.linear(x, weight)
        return [y, *torch.autograd.grad(y, [x, weight], torch.zeros_like(y))]

    check(call, {"x": x, "weight": weight})
    assert [result.shape for result in call()] == [(5, 0), (5, 32), (0, 32)]
    check(*step_of(net, images(64)))


@scenario
def copies_and_pickles(check: Check) -> None:
    net = small_net()
    check(*step_of(net, images()))
    for other in (copy.deepcopy(net), copy.copy(net)):
        check(*step_of(other, images()))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    check(*step_of(loaded, images()))
    check(*step_of(net, images()))


@scenario
def the_cache_is_bounded(check: Check) -> None:
    most, plans.MOST_PLANS = plans.MOST_PLANS, 10
    try:
        weight = torch.zeros(16, 32)
        with torch.no_grad():
            for n in range(1, 40):
                kernels.linear(torch.zeros(n, 32), weight)
        assert len(plans._plans) == 10
        assert len(plans._recent) <= 10
    finally:
        plans.MOST_PLANS = most


@scenario
def weights_are_described_once(check: Check) -> None:
    net = AlexNet().to(torch.bfloat16, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    x = torch.zeros(64, 1, 224, 224, dtype=torch.bfloat16)
    described: list[int] = []
    with torch.no_grad():
        for _ in range(3):
            net(x)
        idle_utils[0].on_descriptor = lambda address, *_: described.append(address)
        for _ in range(10):
            net(x)
    idle_utils[0].on_descriptor = None
    storages = [(p.data_ptr(), p.data_ptr() + p.untyped_storage().nbytes()) for p in net.parameters()]
    assert not [a for a in described if any(begin <= a < end for begin, end in storages)]


@scenario
def temporaries(check: Check) -> None:
    """With a separate place for each temporary, every launch gets the same ones as by its launch function."""
    of_half = AlexNet().to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    of_float = AlexNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plans.forget()
    with mock.patch.object(recording, "lay_out", _apart):
        for net, x in (
            (of_half, torch.zeros(64, 1, 224, 224, dtype=torch.bfloat16)),
            (of_float, torch.zeros(2, 1, 224, 224)),
        ):
            step, tensors = step_of(net, x)
            for _ in range(2):
                step()
            ours = _numbered(*check.launcher.of(step), tensors)
            with launch.observe_launches(lambda *_: None):
                theirs = _numbered(*check.launcher.of(step), tensors)
            assert len(ours) == len(theirs)
            for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
                assert mine == other, (i, mine, other)
    plans.forget()


def _apart(seen: Any, elsewhere: set[int]) -> tuple[dict[int, int], int]:
    """A workspace layout in which no two tensors share memory."""
    offsets, end = {}, 0
    for source, tensor in enumerate(seen.kept, start=len(seen.inputs)):
        nbytes = tensor.untyped_storage().nbytes()
        if source not in elsewhere and nbytes:
            offsets[source] = end
            end += -(-nbytes // 512) * 512
    return offsets, end


def named_by_address(launched: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """The arguments of launches, with tensors and tensor maps as addresses."""
    found = []
    for *_, kinds, _, arguments in launched:
        values = [v.data_ptr() if isinstance(v, Tensor) else v for v in flat_arguments(kinds, arguments)]
        found.append([v.arguments[0] if isinstance(v, TensorMap) else v for v in values])
    return found


def _numbered(launched: Sequence[tuple[Any, ...]], results: Sequence[Tensor], tensors: Tensors) -> list[list[Any]]:
    """The arguments with unknown addresses numbered by first appearance, and addresses of known tensors as names."""
    names: dict[int, Any] = {t.data_ptr(): name for name, t in tensors.items()}
    names |= {t.data_ptr(): i for i, t in enumerate(results)}
    numbers: dict[int, str] = {}

    def name(value: Any) -> Any:
        if not isinstance(value, int) or value <= ADDRESSES:
            return value
        return names[value] if value in names else numbers.setdefault(value, f"temporary {len(numbers)}")

    return [[name(value) for value in arguments] for arguments in named_by_address(launched)]


def main() -> None:
    """Run every scenario and print the outcomes."""
    assert direct.VERSION >= (3, 7)
    found: dict[str, str] = {}
    torch.set_num_threads(1)
    with idle_gpu() as utils:
        idle_utils.append(utils)
        for name, run in SCENARIOS.items():
            plans.forget()
            check = Check(Launcher(utils))
            try:
                run(check)
                assert not plans.unrepeatable, plans.unrepeatable
                found[name] = "right"
            except BaseException:
                found[name] = traceback.format_exc()[-3000:]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
