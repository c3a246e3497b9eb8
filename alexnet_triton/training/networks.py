"""Networks to train: built new or from a checkpoint, with frozen layers, dtype and precision."""

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
    """Build the fused network ``"alexnet"``, ``"lenet"`` or ``"torchvision"`` (torchvision's AlexNet).

    Raises:
        RuntimeError: torchvision is missing.
    """
    if model == "torchvision":
        return fuse(torchvision_alexnet(classes, channels))
    return AlexNet(classes, channels) if model == "alexnet" else fuse(reference_lenet(classes, channels))


def torchvision_alexnet(classes: int, channels: int) -> nn.Module:
    """``torchvision.models.alexnet`` as torchvision initialises it, with a new first layer unless ``channels`` is 3.

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
    """Freeze layers of ``net``: their parameters no longer require gradients.

    Args:
        net: the network.
        what: the ``freeze`` of a :class:`.recipe.Recipe`: ``"features"`` for the convolutions, or ``"none"``.
        layers: names of the convolutions to freeze; None: all.
    """
    if what == "features":
        for name, layer in features(net).items():
            if layers is None or name in layers:
                layer.requires_grad_(False)


def frozen_layers(net: nn.Module) -> list[str]:
    """Names of the frozen convolutions: no parameter of them requires a gradient."""
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

    The weights are Xavier-uniform, as in d2l. Those of torchvision's AlexNet are initialised by torchvision.
    """
    torch.manual_seed(seed)
    net = build_model(model, classes, channels)
    if model != "torchvision":
        net.apply(init_xavier_uniform)
    return net.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def load_checkpoint(path: Path, device: torch.device) -> tuple[nn.Module, Checkpoint]:
    """Read a checkpoint; return its network on ``device``, in float32, channels-last, and the :class:`Checkpoint`.

    Raises:
        CheckpointError: the file does not exist, or is not a checkpoint of :func:`.loop.train`.
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
    """Set PyTorch's switches for float32 products for the time of the block: TF32 for ``"tf32"``, else exact float32.

    Convolutions and linear layers get the same setting. PyTorch's default is TF32 for convolutions only.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def describe_backend(device: torch.device) -> str:
    """Name, for display, of the backend that runs operations on ``device``."""
    if not runs_triton(torch.empty(0, device=device)):
        return "PyTorch reference"
    return "Triton kernels" if device.type == "cuda" else "Triton kernels in Triton's interpreter (for checking, slow)"
