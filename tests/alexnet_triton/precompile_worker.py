"""Scenarios of test_precompile, run by name without TRITON_INTERPRET on a pretended GPU; prints their findings as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn
from triton import knobs

from alexnet_triton import FusedSequential, precompile
from alexnet_triton.data.dataset import Split
from alexnet_triton.training.distributed import ALONE, Processes
from alexnet_triton.training.evaluation import evaluate
from alexnet_triton.training.listener import Listener
from alexnet_triton.training.recipe import Recipe, Where
from alexnet_triton.training.trainer import Trainer
from benchmarks.idle import idle_gpu
from kernels.runtime import launch

CPU = torch.device("cpu")


def images(count: int) -> Split:
    return Split(torch.zeros(count, 28, 28, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))


def new_trainer(processes: Processes = ALONE, tell: Callable[[str], object] | None = None) -> Trainer:
    """A trainer whose steps have 16 and 9 images, and whose evaluations have 16 and 5."""
    net = FusedSequential(nn.Conv2d(1, 8, 5, stride=3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    net += FusedSequential(nn.Linear(128, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))
    net.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    recipe = Recipe("lenet", batch_size=16, lr=0.1, momentum=0.9)
    listener = Listener()
    listener.compiling = tell or listener.compiling  # type: ignore[method-assign]
    return Trainer(net, images(41), recipe, Where(CPU, processes=processes), evaluated=images(21), listener=listener)


@dataclasses.dataclass
class Compilations:
    """Counts kernels that Triton does not find in a kernel's own cache, and how many of these it compiles."""

    found: int = 0
    compiled: int = 0

    def __post_init__(self) -> None:
        knobs.compilation.listener = self.listen

    def listen(self, *, cache_hit: bool, **_: Any) -> None:
        self.found += 1
        self.compiled += not cache_hit


def run() -> dict[str, Any]:
    """Precompile, then train and evaluate."""
    counted, lines = Compilations(), []
    trainer = new_trainer(tell=lines.append)
    compiled = trainer.precompile()
    first, second = dataclasses.asdict(counted), trainer.precompile()
    after = dataclasses.asdict(counted)
    trainer.net.train()
    for size in (16, 16, 9):
        trainer.step(trainer.index[:size])
    evaluate(trainer.net, images(21), batch_size=16, image_size=28, device=CPU)
    counts = {"first": first, "after": after, "run": counted.found}
    return {"compiled": compiled, "second": second, "lines": lines, **counts}


class _Refusing(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Any) -> Any:
        assert len(inputs) == 0, "a collective operation while kernels are compiled"
        return next(self.net.parameters())[:0]


@dataclasses.dataclass(frozen=True)
class Second(Processes):
    """One of two processes, of which the other does not exist; notes what has been compiled at each wait."""

    counted: Any = None
    waits: Any = dataclasses.field(default_factory=list)

    def wait(self) -> None:
        self.waits.append(self.counted.compiled)

    def parallel(self, net: nn.Module, device: torch.device) -> nn.Module:
        return _Refusing(net)


def processes() -> dict[str, Any]:
    """The first process of a machine compiles before it waits for the others; the second one compiles afterwards."""
    counted = Compilations()
    first = Second(0, 2, 0, counted=counted)
    compiled = new_trainer(first).precompile()
    second = Second(1, 2, 1, counted=counted)
    return {"compiled": compiled, "first": first.waits, "second": [new_trainer(second).precompile(), *second.waits]}


@triton.jit
def _broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 1, "a block of none")


@triton.jit
def _sound_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


def _launch_both(x: torch.Tensor) -> None:
    launch.launch(_broken_kernel, (1,), x_ptr=x, BLOCK=16)
    launch.launch(_sound_kernel, (1,), x_ptr=x, BLOCK=16)


def failure() -> dict[str, Any]:
    """One of two kernels does not compile."""
    counted, x = Compilations(), torch.zeros(16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = precompile(lambda: _launch_both(x))
    found = counted.found
    launch.launch(_sound_kernel, (1,), x_ptr=x, BLOCK=16)
    try:
        launch.launch(_broken_kernel, (1,), x_ptr=x, BLOCK=16)
    except triton.CompilationError as error:
        raised = "a block of none" in str(error)
    else:
        raised = False
    warned = [str(w.message) for w in caught if w.category is RuntimeWarning]
    return {"compiled": compiled, "warned": warned, "again": counted.found - found, "raised": raised}


def interrupted() -> dict[str, Any]:
    """The walk raises: the error reaches the caller, and kernels that were launched before still launch."""
    x = torch.zeros(16)

    def walk() -> None:
        launch.launch(_sound_kernel, (1,), x_ptr=x, BLOCK=16)
        raise KeyboardInterrupt

    try:
        precompile(walk)
    except KeyboardInterrupt:
        launch.launch(_sound_kernel, (1,), x_ptr=x, BLOCK=16)
        return {"raised": True}
    return {"raised": False}


if __name__ == "__main__":
    with idle_gpu():
        print(json.dumps({name: globals()[name]() for name in sys.argv[1:]}))
