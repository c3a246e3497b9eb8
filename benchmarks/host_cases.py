"""The cases of ``benchmarks.host``: steps of the network and single operations, ours and PyTorch's, as functions.

Ours gets the sizes of AlexNet, so that it makes the same launches as on a GPU. The peer gets tensors so tiny that almost all
of its time is the host's work.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from alexnet_triton import AlexNet, fuse, reference_alexnet
from alexnet_triton.optim import SGD

from .cases import to_channels_last

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

#: The passes that a single operation is timed in.
FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A case's two functions without arguments: each call is one measured call."""

    ours: Callable[[], object]
    peer: Callable[[], object]


@dataclasses.dataclass(frozen=True)
class HostCase:
    """One row of the measurement.

    Attributes:
        name: of the case.
        mode: ``step`` of a network, ``train`` or ``infer`` of a module, or the pass of an operation.
        batch: images of ours.
        dtype: of our tensors, by name.
        make: builds the functions on a device.
    """

    name: str
    mode: str
    batch: int
    dtype: str
    make: Callable[[HostCase, torch.device], Pair]

    @property
    def id(self) -> str:
        """Unique name of the case."""
        return f"{self.name}-{self.mode}-N{self.batch}-{self.dtype}"

    def pair(self, device: torch.device) -> Pair:
        """Both functions, on ``device``."""
        return self.make(self, device)


def tiny_alexnet() -> nn.Sequential:
    """The peer: AlexNet's 21 layers for images of 31 x 31, with four channels and eight features."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 5, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 10)),
    )


def narrow_alexnet() -> nn.Sequential:
    """AlexNet with 32 filters in every convolution.

    A drop-in user's filters are in PyTorch's default memory format, and PyTorch copies them into channels-last at every call.
    On a GPU such a copy is a launch. On the CPU its time grows with the filter: 384 filters of 3,456 weights would hide the
    host time.
    """
    net = reference_alexnet()
    net[0] = nn.Conv2d(1, 32, 11, stride=4, padding=1)
    net[3] = nn.Conv2d(32, 32, 5, padding=2)
    for index in (6, 8, 10):
        net[index] = nn.Conv2d(32, 32, 3, padding=1)
    net[14] = nn.Linear(32 * 5 * 5, 4096)
    return net


class ModuleAlexNet(nn.Module):
    """AlexNet as most people write it: a class whose ``forward`` calls its layers, and functions between them."""

    def __init__(self, layers: nn.Sequential) -> None:
        """Take the convolutions and linear layers of ``layers``, a sequential AlexNet of 21 layers."""
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4, self.conv5 = (m for m in layers if isinstance(m, nn.Conv2d))
        self.fc1, self.fc2, self.fc3 = (m for m in layers if isinstance(m, nn.Linear))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 3, 2)
        x = F.relu(self.conv3(x))
        x = F.relu(self.conv4(x))
        x = F.max_pool2d(F.relu(self.conv5(x)), 3, 2)
        x = torch.flatten(x, 1)
        x = F.dropout(F.relu(self.fc1(x)), 0.5, self.training)
        x = F.dropout(F.relu(self.fc2(x)), 0.5, self.training)
        return self.fc3(x)


class TrainingStep:
    """zero_grad, forward, backward from a given gradient of the logits, optimizer; without a loss, which PyTorch would run."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
        self.net, self.optimizer, self.images = net.train(), optimizer, images
        self.grad = torch.zeros(len(images), 10, dtype=images.dtype, device=images.device)

    def __call__(self) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.net(self.images).backward(self.grad)
        self.optimizer.step()

    def parts(self) -> dict[str, float]:
        """Run one step; return the host's microseconds of each part."""
        times = [time.perf_counter()]
        self.optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        logits = self.net(self.images)
        times.append(time.perf_counter())
        logits.backward(self.grad)
        times.append(time.perf_counter())
        self.optimizer.step()
        times.append(time.perf_counter())
        names = ("zero_grad", "forward", "backward", "optimizer")
        return {name: (end - begin) * 1e6 for name, (begin, end) in zip(names, itertools.pairwise(times), strict=True)}


def _infer(net: nn.Module, images: Tensor) -> Callable[[], object]:
    net.eval()

    def infer() -> Tensor:
        with torch.no_grad():
            return net(images)

    return infer


def _part(kind: str, net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> Callable[[], object]:
    if kind == "infer":
        return _infer(net, images)
    train = TrainingStep(net, optimizer, images)
    if kind == "train":
        return train
    train()  # makes the gradients
    return optimizer.step


def _pair(kind: str, net: nn.Module, images: Tensor, peer: nn.Module) -> Pair:
    """A part of a step of ``net`` on ``images``, and of its tiny peer."""
    peer = peer.to(images.device)
    tiny_images = torch.zeros(1, 1, 31, 31, device=images.device)
    return Pair(
        _part(kind, net, SGD(net.parameters(), lr=0.01), images),
        _part(kind, peer, torch.optim.SGD(peer.parameters(), lr=0.01), tiny_images),
    )


def _network(case: HostCase, device: torch.device) -> Pair:
    """A fused network and the tiny peer; the case's name holds the part of a step and the memory format."""
    kind, _, default_format = case.name.partition("_")
    dtype = DTYPES[case.dtype]
    images = torch.zeros(case.batch, 1, 224, 224, dtype=dtype, device=device)
    if default_format:
        net = fuse(narrow_alexnet()).to(device, dtype)
    else:
        net = AlexNet().to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = to_channels_last(images)
    return _pair(kind, net, images, tiny_alexnet())


def _module(case: HostCase, device: torch.device) -> Pair:
    """A fused class, in the default memory format, and the same class with tiny layers."""
    dtype = DTYPES[case.dtype]
    net = fuse(ModuleAlexNet(narrow_alexnet())).to(device, dtype)
    images = torch.zeros(case.batch, 1, 224, 224, dtype=dtype, device=device)
    return _pair(case.mode, net, images, ModuleAlexNet(tiny_alexnet()))


@dataclasses.dataclass(frozen=True)
class _Operation:
    """A public operation and its PyTorch counterpart.

    Attributes:
        ours: the operation of ``kernels``.
        peer: the same in PyTorch's operations.
        shapes: shapes of our tensors, the input's without its batch.
        tiny: shapes of the peer's tensors.
    """

    ours: Callable[..., Tensor]
    peer: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    tiny: tuple[tuple[int, ...], ...]


def _pool(x: Tensor) -> Tensor:
    y = kernels.max_pool2d(x, 3, 2)
    assert isinstance(y, Tensor)
    return y


@functools.cache
def _labels_of(rows: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64, device=device)


def _labels(x: Tensor) -> Tensor:
    """Class 0 for each row of ``x``; cached, so that a measured call does not create them."""
    return _labels_of(len(x), x.device)


_CONV5 = ((384, 12, 12), (256, 384, 3, 3), (256,))
_FC2 = ((4096,), (4096, 4096), (4096,))
_TINY_CONV = ((1, 4, 8, 8), (4, 4, 3, 3), (4,))
_TINY_LINEAR = ((1, 8), (8, 8), (8,))

#: Operations by name, with the sizes of AlexNet's fifth convolution, the pool after it, and its second linear layer.
OPERATIONS = {
    "conv2d": _Operation(
        lambda x, w, b: kernels.conv2d(x, w, b, padding=1), lambda x, w, b: F.conv2d(x, w, b, padding=1), _CONV5, _TINY_CONV
    ),
    "conv2d_relu_max_pool2d": _Operation(
        lambda x, w, b: kernels.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_kernel_size=3, pool_stride=2),
        lambda x, w, b: F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=1)), 3, 2),
        _CONV5,
        _TINY_CONV,
    ),
    "max_pool2d": _Operation(_pool, lambda x: F.max_pool2d(x, 3, 2), ((256, 12, 12),), _TINY_CONV[:1]),
    "linear": _Operation(kernels.linear, F.linear, _FC2, _TINY_LINEAR),
    "linear_relu_dropout": _Operation(
        kernels.linear_relu_dropout, lambda x, w, b: F.dropout(F.relu(F.linear(x, w, b))), _FC2, _TINY_LINEAR
    ),
    "dropout": _Operation(kernels.dropout, F.dropout, ((4096,),), _TINY_LINEAR[:1]),
    "cross_entropy": _Operation(
        lambda x: kernels.cross_entropy(x, _labels(x)), lambda x: F.cross_entropy(x, _labels(x)), ((10,),), _TINY_LINEAR[:1]
    ),
}


def _pass(function: Callable[..., Tensor], which: str, tensors: list[Tensor]) -> Callable[[], object]:
    if which == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*tensors)

        return forward
    leaves = [tensor.requires_grad_() for tensor in tensors]
    grad = torch.zeros_like(function(*leaves))

    def forward_backward() -> object:
        return torch.autograd.grad(function(*leaves), leaves, grad)

    return forward_backward


def _tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    tensors = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    return [to_channels_last(t) if t.dim() == 4 else t for t in tensors]


def _operation(case: HostCase, device: torch.device) -> Pair:
    operation = OPERATIONS[case.name]
    shapes = [(case.batch, *operation.shapes[0]), *operation.shapes[1:]]
    tiny = [torch.zeros(shape, device=device) for shape in operation.tiny]
    return Pair(
        _pass(operation.ours, case.mode, _tensors(shapes, DTYPES[case.dtype], device)), _pass(operation.peer, case.mode, tiny)
    )


def host_cases(batch: int = 128, dtype: str = "bfloat16") -> list[HostCase]:
    """Every case: the network with channels-last parameters, a drop-in user's network, a module, the single operations.

    A drop-in user's network is ``fuse(nn.Sequential(...))`` in the default memory format, in ``dtype`` and in float32 (see
    :func:`narrow_alexnet`). A module is the same network as a class with its own ``forward``.
    """
    networks = [HostCase(name, "step", batch, dtype, _network) for name in ("train", "infer", "optimizer")]
    drop_ins = [
        HostCase(f"{kind}_default_format", "step", batch, used, _network)
        for used in dict.fromkeys((dtype, "float32"))
        for kind in ("train", "infer")
    ]
    modules = [
        HostCase("module", mode, batch, used, _module)
        for used in dict.fromkeys((dtype, "float32"))
        for mode in ("train", "infer")
    ]
    operations = [
        HostCase(name, which, batch, dtype, _operation) for name in OPERATIONS for which in (FORWARD, FORWARD_BACKWARD)
    ]
    return networks + drop_ins + modules + operations
