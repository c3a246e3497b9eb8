"""Prints digests of training runs for another process to compare, bit for bit: ``python -m tests.determinism``.

A run is ten training steps of a network with every kind of layer of AlexNet: in each dtype, and in TF32 beside exact float32.
It runs under ``torch.use_deterministic_algorithms``, which makes PyTorch raise at its own nondeterministic operations.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_triton import fuse
from alexnet_triton.optim import SGD
from kernels.configs import tables
from kernels.runtime.arguments import conv_input_precision, matmul_input_precision
from kernels.runtime.backend import INTERPRETED

from .configurations import precision_of_float32
from .conftest import DEVICE
from .interpreter import speed_up

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: (dtype, precision of float32 products).
PRECISIONS = (*((dtype, "ieee") for dtype in DTYPES), (torch.float32, "tf32"))
#: Those of whole training runs: float16 runs the kernels of bfloat16.
TRAINED = tuple(each for each in PRECISIONS if each[0] != torch.float16)
STEPS = 10


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of all bits of ``tensors``, including the sign of a zero and the payload of a NaN."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Make PyTorch raise, in the block, at an operation that it knows to be nondeterministic."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def network(dtype: torch.dtype) -> nn.Module:
    """AlexNet's layers in small: convolutions with stride and pool, with a pool and linked, two linear layers, dropout."""
    torch.manual_seed(0)
    return fuse(
        nn.Sequential(
            nn.Conv2d(1, 16, 11, stride=4, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 40),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(40, 10),
        ).to(DEVICE, dtype)
    )


def trained(dtype: torch.dtype, steps: int = STEPS, precision: str = "ieee") -> str:
    """The digest of every output, gradient, parameter and momentum of ``steps`` steps, and the precision of products."""
    seen: list[Tensor] = []
    with deterministic(), tables.override(SPLIT=2), precision_of_float32(precision):
        net = network(dtype)
        optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            images = torch.randn((2, 1, 31, 31), generator=generator).to(DEVICE, dtype)
            labels = torch.randint(0, 10, (2,), generator=generator).to(DEVICE)
            output = net(images)
            optimizer.zero_grad()
            F.cross_entropy(output.float(), labels).backward()
            optimizer.step()
            seen += [output, *(p.grad.clone() for p in net.parameters()), *(p.detach().clone() for p in net.parameters())]
        for state in optimizer.state.values():
            seen += [value for value in state.values() if isinstance(value, Tensor)]
        return f"{digest(seen)} conv {conv_input_precision(dtype)} matmul {matmul_input_precision(dtype)}"


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            speed_up(patch)
        print(json.dumps({f"{dtype} {precision}": trained(dtype, precision=precision) for dtype, precision in TRAINED}))
