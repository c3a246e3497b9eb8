"""The training step and inference of the network, ours and every peer's, as functions to be timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_triton import AlexNet, fuse, reference_alexnet

from .cases import TF32_BITS, cut, to_channels_last, unit

#: name -> (memory format, autocast over float32 parameters, torch.compile mode or None). Peers without autocast have
#: parameters in the dtype itself, as ours does; both forms are timed, since the faster one is the peer to beat.
PEERS: dict[str, tuple[torch.memory_format, bool, str | None]] = {
    "eager_nchw": (torch.contiguous_format, True, None),
    "eager_channels_last_autocast": (torch.channels_last, True, None),
    "eager_channels_last": (torch.channels_last, False, None),
    "compile_default": (torch.channels_last, False, "default"),
    "compile_max_autotune": (torch.channels_last, False, "max-autotune-no-cudagraphs"),
}

OURS = "ours"
#: The peer whose compilation takes minutes.
TUNED = "compile_max_autotune"


@dataclasses.dataclass(frozen=True)
class Network:
    """The network of a benchmark.

    Attributes:
        fused: makes our network.
        reference: makes the equal network of plain PyTorch layers.
        input: shape of an image.
        classes: number of labels.
    """

    fused: Callable[[], nn.Module]
    reference: Callable[[], nn.Module]
    input: tuple[int, int, int]
    classes: int = 10


ALEXNET = Network(AlexNet, reference_alexnet, (1, 224, 224))


def _tiny() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)
    )


#: For tests of the code path.
TINY = Network(lambda: fuse(_tiny()), _tiny, (1, 10, 10))


def batch_of(network: Network, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images in ``dtype`` and labels."""
    images = torch.rand(batch, *network.input, device=device).to(dtype)
    return images, torch.randint(network.classes, (batch,), device=device)


@dataclasses.dataclass(frozen=True)
class Built:
    """A network to be timed.

    Attributes:
        net: the callable, compiled if the implementation says so.
        module: the module that ``net`` runs.
        autocast: whether it runs under autocast, with float32 parameters.
        images: the memory format of its images.
    """

    net: Callable[[Tensor], Tensor]
    module: nn.Module
    autocast: bool
    images: torch.memory_format


def build(
    network: Network, implementation: str, dtype: torch.dtype, device: torch.device, compile_backend: str = "inductor"
) -> Built:
    """Build the network of an implementation. ``compile_backend`` replaces Inductor, for tests."""
    if implementation == OURS:
        module = network.fused().to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Built(module, module, False, torch.channels_last)
    memory_format, autocast, mode = PEERS[implementation]
    module = network.reference().to(device)
    if not autocast:
        module = module.to(dtype)
    if memory_format == torch.channels_last:
        for parameter in module.parameters():
            if parameter.dim() == 4:
                parameter.data = to_channels_last(parameter.data)
    net: Callable[[Tensor], Tensor] = module
    if mode is not None:
        # Only Inductor has modes.
        net = torch.compile(module, backend=compile_backend, mode=mode if compile_backend == "inductor" else None)
    return Built(net, module, autocast, memory_format)


def prepare(
    network: Network,
    implementation: str,
    dtype: torch.dtype,
    batch: int,
    device: torch.device,
    compile_backend: str = "inductor",
) -> tuple[Built, Tensor, Tensor]:
    """An implementation of :func:`build`, with images and labels of :func:`batch_of` in its dtype and memory format."""
    built = build(network, implementation, dtype, device, compile_backend)
    images, labels = batch_of(network, batch, torch.float32 if built.autocast else dtype, device)
    return built, to_channels_last(images) if built.images == torch.channels_last else images, labels


def step_function(built: Built, dtype: torch.dtype, mode: str, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """A training step (forward, loss, backward, plain SGD) or a forward pass without gradients, on fixed tensors."""

    def forward() -> Tensor:
        with torch.autocast(images.device.type, dtype=dtype, enabled=built.autocast):
            return built.net(images)

    if mode == "infer":
        built.module.eval()

        def infer() -> Tensor:
            with torch.no_grad():
                return forward()

        return infer
    built.module.train()
    optimizer = torch.optim.SGD(built.module.parameters(), lr=1e-3, fused=True)  # the fastest of PyTorch's, for everybody

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward().float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Set p = 0 in every dropout layer: the same kernels run and drop nothing."""
    layers = [m for m in module.modules() if isinstance(m, nn.Dropout)]
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p


def _results(
    net: Callable[[Tensor], Tensor], module: nn.Module, mode: str, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Logits, and for training the loss's gradient of every parameter."""
    module.train(mode == "train")
    if mode == "infer":
        with torch.no_grad():
            return {"logits": net(images)}
    with _without_dropout(module):
        logits = net(images)
        names, parameters = zip(*module.named_parameters(), strict=True)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
        grads = torch.autograd.grad(loss, parameters)
    return {"logits": logits.detach(), **dict(zip(names, grads, strict=True))}


class _CutProduct(torch.autograd.Function):
    """A product of two operands and the products of its gradients, all with operands that are cut first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor], bits: int) -> Tensor:
        operands = [cut(operand, bits).to(operand.dtype) for operand in (x, weight)]
        ctx.save_for_backward(*operands)
        ctx.product, ctx.bits = product, bits
        return product(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        operands = [operand.detach().requires_grad_() for operand in ctx.saved_tensors]
        with torch.enable_grad():
            output = ctx.product(*operands)
        dx, dw = torch.autograd.grad(output, operands, cut(grad, ctx.bits).to(grad.dtype))
        return dx, dw, None, None


def cut_products(module: nn.Module, bits: int = TF32_BITS) -> nn.Module:
    """Let the convolutions and linear layers of ``module`` multiply operands without their last ``bits`` bits; return it."""

    def forward_of(layer: nn.Conv2d | nn.Linear) -> Callable[[Tensor], Tensor]:
        def product(x: Tensor, weight: Tensor) -> Tensor:
            if isinstance(layer, nn.Linear):
                return F.linear(x, weight)
            return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)

        def forward(x: Tensor) -> Tensor:
            assert layer.bias is not None
            bias = layer.bias if isinstance(layer, nn.Linear) else layer.bias[:, None, None]
            return _CutProduct.apply(x, layer.weight, product, bits) + bias

        return forward

    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.forward = forward_of(layer)  # type: ignore[assignment, method-assign]
    return module


def verify_network(network: Network, built: Built, dtype: torch.dtype, mode: str, images: Tensor, labels: Tensor) -> None:
    """Compare a network with float64 on the batch of the timing: the error's norm may be at most twice PyTorch's own.

    The logits are compared. For a training step of a network that is not compiled, every parameter's gradient is compared too,
    without dropout (a compiled network would have to be compiled again for that). The norm is used, not the largest error: if
    two elements of a pool's window round to a tie, a gradient moves to a neighbour in either implementation. Where TF32 is
    allowed PyTorch may still multiply exactly, so its error counts as at least that of float64 sums of products of operands cut
    to TF32.

    Raises:
        AssertionError: a result is wrong.
    """
    compared = mode if built.net is built.module else "infer"
    weights = built.module.state_dict()
    exact, peer, in_tf32 = (
        network.reference().to(device=images.device, dtype=t) for t in (torch.float64, dtype, torch.float64)
    )
    for other in (exact, peer, in_tf32):
        other.load_state_dict(weights)
    with torch.autocast(images.device.type, dtype=dtype, enabled=built.autocast):
        ours = _results(built.net, built.module, compared, images, labels)
    truth = _results(exact, exact, compared, images.double(), labels)
    peers = [_results(peer, peer, compared, images.to(dtype), labels)]
    if unit(dtype) > torch.finfo(dtype).eps:
        cut_products(in_tf32)
        peers.append(_results(in_tf32, in_tf32, compared, images.double(), labels))
    for name, value in truth.items():
        error, *peer_errors = ((r[name].double() - value).norm().item() for r in (ours, *peers))
        allowed = 2 * max(peer_errors) + 0.5 * unit(dtype) * value.norm().item()
        if not error <= allowed:
            raise AssertionError(f"{name}: error {error:.3e} in norm against float64, allowed {allowed:.3e}")


def network_flops(network: Network, batch: int) -> tuple[int, int]:
    """FLOPs of a forward pass and of a training step (without the images' gradient), counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(train: bool) -> int:
        net: Any = network.reference().to("meta")
        images = torch.empty(batch, *network.input, device="meta")
        with FlopCounterMode(display=False) as counter:
            logits = net(images)
            if train:
                logits.sum().backward()
        return int(counter.get_total_flops())

    return count(False), count(True)
