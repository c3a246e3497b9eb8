"""On the CPU without the interpreter, a fused network calls the operators that PyTorch's layers call.

``python -m tests.alexnet_triton.plain_cpu_worker --batch 64`` also times a training step of AlexNet against ``nn.Sequential``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from alexnet_triton import AlexNet, fuse, reference_alexnet

from .forms import FORMS, tensors_of


class Operators(TorchDispatchMode):
    """Notes the name of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def step(net: nn.Module, x: Tensor) -> tuple[list[Tensor], list[str]]:
    """The outputs and gradients of a training step with dropout, and the names of its operators."""
    torch.manual_seed(5)
    net.zero_grad()
    with Operators() as operators:
        outputs = tensors_of(net(x))
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
    return [*outputs, *[p.grad for p in net.parameters() if p.grad is not None]], operators.names


def same_step(net: nn.Module, x: Tensor) -> bool:
    """Whether the fused network's step has the network's operators and bits."""
    (theirs, wanted), (ours, got) = step(net, x), step(fuse(copy.deepcopy(net)), x)
    return got == wanted and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def dropouts() -> dict[str, bool]:
    """Whether functions draw PyTorch's numbers without a seed, and their own stream with a seed."""
    x, weight = torch.randn(50, 20), torch.randn(30, 20)
    torch.manual_seed(1)
    theirs = F.dropout(x, 0.3), F.dropout(F.relu(F.linear(x, weight)), 0.3)
    torch.manual_seed(1)
    ours = kernels.dropout(x, 0.3), kernels.linear_relu_dropout(x, weight, p=0.3)
    seeded = kernels.dropout(x, 0.3, seed=7) != 0
    return {
        "without a seed": all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)),
        "with a seed": torch.equal(seeded, kernels.dropout_mask(x.shape, 0.3, 7)),
    }


def ratio(batch: int, repeats: int) -> float:
    """Time of a training step of AlexNet divided by ``nn.Sequential``'s: the median of adjacent pairs."""
    fused, net = AlexNet(), reference_alexnet()
    x, labels = torch.rand(batch, 1, 224, 224), torch.randint(0, 10, (batch,))
    ratios = []
    for i in range(repeats + 1):
        seconds = {}
        for each in (fused, net) if i % 2 else (net, fused):
            start = time.perf_counter()
            F.cross_entropy(each(x), labels).backward()
            seconds[each] = time.perf_counter() - start
        ratios.append(seconds[fused] / seconds[net])
    return statistics.median(ratios[1:])


def main() -> None:
    """Print the findings as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=0, help="also time AlexNet with this batch size")
    parser.add_argument("--repeats", type=int, default=8, help="number of timed pairs of steps")
    arguments = parser.parse_args()
    x = torch.randn(2, 3, 12, 12)
    for form in FORMS.values():
        fuse(form())(x)
    imported = "torch._dynamo" in sys.modules  # a dispatch mode imports it later
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.4), nn.Flatten(), nn.Linear(800, 9), nn.ReLU(), nn.Dropout(0.5)]
    found: dict[str, Any] = {
        "steps": {
            "FusedSequential": same_step(nn.Sequential(*layers), x),
            **{n: same_step(form(), x) for n, form in FORMS.items()},
        },
        "dropouts": dropouts(),
        "the compiler was imported": imported,
    }
    if arguments.batch:
        found["ratio"] = ratio(arguments.batch, arguments.repeats)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
