"""The networks that are trained: made, read from a checkpoint, and what they compute in."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import nn

from kernels.runtime.backend import runs_triton

from ..data.fashion_mnist import CLASSES
from ..fused import fuse
from ..models import IMAGE_SIZE, AlexNet, init_xavier_uniform, reference_lenet
from .checkpoint import Checkpoint, CheckpointError, check_weights, read_checkpoint


def build_model(model: str, classes: int = len(CLASSES), channels: int = 1) -> nn.Module:
    """``"alexnet"``, ``"lenet"`` or ``"torchvision"``, torchvision's AlexNet: fused, for so many channels and classes.

    Raises:
        RuntimeError: torchvision is missing.
    """
    if model == "torchvision":
        return fuse(torchvision_alexnet(classes, channels))
    return AlexNet(classes, channels) if model == "alexnet" else fuse(reference_lenet(classes, channels))


def torchvision_alexnet(classes: int, channels: int) -> nn.Module:
    """``torchvision.models.alexnet`` as torchvision initialises it; of its three channels as many as are asked for.

    Raises:
        RuntimeError: torchvision is missing.
    """
    try:
        from torchvision.models import alexnet
    except ImportError as error:
        raise RuntimeError(f"the model torchvision needs torchvision ({error}): pip install torchvision") from error
    net = alexnet(num_classes=classes)
    if channels != 3:
        first = net.features[0]
        net.features[0] = nn.Conv2d(channels, first.out_channels, first.kernel_size, first.stride, first.padding)
    return net


def features(net: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of ``net`` by their names."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)}


def freeze(net: nn.Module, what: str, layers: Collection[str] | None = None) -> None:
    """Let no parameter of the layers of ``what``, as in :class:`.recipe.Recipe`, require a gradient.

    Args:
        layers: of these names, and no others; None: all of them.
    """
    if what == "features":
        for name, layer in features(net).items():
            if layers is None or name in layers:
                layer.requires_grad_(False)


def frozen_layers(net: nn.Module) -> list[str]:
    """Names of the convolutions of which no parameter requires a gradient."""
    return [name for name, layer in features(net).items() if not any(each.requires_grad for each in layer.parameters())]


def new_model(
    model: str,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    classes: int = len(CLASSES),
    channels: int = 1,
) -> nn.Module:
    """:func:`build_model` with weights drawn from ``seed``, channels-last, on ``device``, in ``dtype``.

    The weights are Xavier-uniform, as d2l has them, torchvision's AlexNet's as torchvision has them.
    """
    torch.manual_seed(seed)
    net = build_model(model, classes, channels)
    if model != "torchvision":
        net.apply(init_xavier_uniform)
    return net.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def load_checkpoint(path: Path, device: torch.device) -> tuple[nn.Module, Checkpoint]:
    """The network of a checkpoint on ``device``, in float32, and what else the file holds.

    Raises:
        CheckpointError: no such file, or not a checkpoint of :func:`train`.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.model not in IMAGE_SIZE:
        raise CheckpointError(f"{path}: holds an unknown model {checkpoint.model!r}, known are {', '.join(IMAGE_SIZE)}")
    if len(checkpoint.classes) < 2:
        raise CheckpointError(f"{path}: damaged: it names fewer than two classes")
    net = build_model(checkpoint.model, len(checkpoint.classes), checkpoint.channels)
    check_weights(net, checkpoint)
    net.load_state_dict(checkpoint.weights, strict=True)
    net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net, checkpoint


def default_precision(device: torch.device) -> str:
    """``"bfloat16"`` on a GPU that computes in it, ``"float32"`` elsewhere."""
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """PyTorch's switches for float32 products inside the block: in TF32 for ``"tf32"``, else exact.

    Of convolutions and of linear layers alike, where PyTorch's default is TF32 for convolutions alone.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def describe_backend(device: torch.device) -> str:
    """In words, what the operations run on under the current backend."""
    if not runs_triton(torch.empty(0, device=device)):
        return "PyTorch reference"
    return "Triton kernels" if device.type == "cuda" else "Triton kernels in Triton's interpreter (for checking, slow)"
