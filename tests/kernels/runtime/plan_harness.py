"""What the scenarios of ``plan_worker.py`` compare: launches as they reach Triton's C launcher, with addresses named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from alexnet_triton import fuse
from benchmarks.idle import IdleUtils, TensorMap
from kernels.runtime import launch, plan, plans

from .direct_worker import flat_arguments

Tensors = dict[str, Tensor]


class Launcher:
    """Keeps the arguments that reach the C launcher."""

    def __init__(self, utils: IdleUtils) -> None:
        self.launched: list[tuple[Any, ...]] = []
        utils.on_launch = lambda *arguments: self.launched.append(arguments)

    def of(self, call: Callable[[], Any]) -> tuple[list[tuple[Any, ...]], Any]:
        """The launches of a call and its result. No memory is freed during the call, so an address stands for one tensor."""
        self.launched = []
        with kept_memory():
            result = call()
        return self.launched, result


@contextmanager
def kept_memory() -> Iterator[None]:
    keep: list[Tensor] = []

    def keeping(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any, **options: Any) -> Tensor:
            result = function(*arguments, **options)
            keep.append(result)
            return result

        return run

    with ExitStack() as stack:
        for owner, name in ((launch, "_poisoned"), (plan, "_empty_strided_cpu"), (Tensor, "contiguous"), (Tensor, "clone")):
            stack.enter_context(mock.patch.object(owner, name, keeping(getattr(owner, name))))
        yield


#: Every address is larger than this, and no other number is.
ADDRESSES = 2**40


def named(launched: Sequence[tuple[Any, ...]], tensors: Tensors) -> list[tuple[Any, ...]]:
    """Launches with each address replaced by the name of its tensor and the offset, or by ``"temporary"``."""
    storages = {name: t.untyped_storage() for name, t in tensors.items() if t.numel()}
    spans = [(name, s.data_ptr(), s.data_ptr() + s.nbytes()) for name, s in storages.items()]

    def name(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.data_ptr()
        if isinstance(value, TensorMap):
            return ("map", *[tuple(v) if isinstance(v, (list, tuple)) else name(v) for v in value.arguments])
        if isinstance(value, int) and value > ADDRESSES:
            inside = [(of, value - begin) for of, begin, end in spans if begin <= value < end]
            return inside[0] if inside else "temporary"
        return value

    found = []
    for x, y, z, stream, function, *_, kinds, signature, arguments in launched:
        values = [name(value) for value in flat_arguments(kinds, arguments)]
        found.append((x, y, z, stream, function, bytes(signature), *values))
    return found


def is_direct(launched: tuple[Any, ...]) -> bool:
    """Whether a launch bypassed ``kernel[grid](...)``, which also passes constants."""
    *_, signature, arguments = launched
    return len(arguments) == len(signature)


class Check:
    """Makes the same call by plan and by launch functions, and compares the launches."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.calls = 0

    def __call__(self, call: Callable[[], Sequence[Tensor]], tensors: Tensors, *, name_results: bool = True) -> None:
        """``call`` returns tensors that it makes; ``tensors`` are the tensors that exist before.

        Without ``name_results`` results count as temporaries: where PyTorch's own operations run between ours, a result may get
        an address that a temporary had.
        """
        call()  # may record plans
        call()
        made = plans.made
        by_plan, results = self.launcher.of(call)
        assert plans.made == made, "a repeated call made a plan"
        ours = named(by_plan, tensors | {f"result {i}": t for i, t in enumerate(results) if name_results})
        with launch.observe_launches(lambda *_: None):
            by_hand, results = self.launcher.of(call)
        theirs = named(by_hand, tensors | {f"result {i}": t for i, t in enumerate(results) if name_results})
        assert all(map(is_direct, by_plan))
        assert not any(map(is_direct, by_hand))
        assert len(ours) == len(theirs), (len(ours), len(theirs))
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert mine == other, (i, mine, other)
        self.calls += 1


def small_net(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    layers = [
        *(nn.Conv2d(1, 96, 11, 4, 1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 16)),
    ]
    net = fuse(nn.Sequential(*layers)).to(dtype)
    assert isinstance(net, nn.Sequential)
    return net


def images(n: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(n, 1, 63, 63, dtype=dtype)


def step_of(net: nn.Module, x: Tensor) -> tuple[Callable[[], list[Tensor]], Tensors]:
    """A function that runs a network's forward and backward pass, and the network's tensors."""

    def step() -> list[Tensor]:
        leaves = [p for p in net.parameters() if p.requires_grad]
        y = net(x)
        return [y, *torch.autograd.grad(y, leaves, torch.zeros_like(y))] if leaves else [y]

    return step, {"x": x, **dict(net.named_parameters())}


Scenario = Callable[[Check], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


#: The driver's functions, set by the worker.
idle_utils: list[IdleUtils] = []
