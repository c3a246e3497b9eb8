"""The whole training step and inference, ours and every peer's, as functions to be timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_triton import AlexNet, fuse, reference_alexnet

#: name -> (memory format, autocast over float32 parameters, torch.compile mode or None). Peers without autocast have
#: parameters in the dtype itself, as ours have: the faster choice is the peer to beat.
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
    """What is built for each implementation.

    Attributes:
        fused: makes our network.
        reference: makes the plain one that it equals.
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


def build(
    network: Network, implementation: str, dtype: torch.dtype, device: torch.device, compile_backend: str = "inductor"
) -> tuple[nn.Module, bool]:
    """The network of an implementation, and whether it runs under autocast.

    ``compile_backend`` replaces Inductor, for tests.
    """
    if implementation == OURS:
        return network.fused().to(device=device, dtype=dtype, memory_format=torch.channels_last), False  # type: ignore[call-overload]
    memory_format, autocast, mode = PEERS[implementation]
    net = network.reference().to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    if not autocast:
        net = net.to(dtype)
    if mode is not None:
        # Only Inductor has modes.
        net = torch.compile(net, backend=compile_backend, mode=mode if compile_backend == "inductor" else None)
    return net, autocast


def step_function(
    net: nn.Module, autocast: bool, dtype: torch.dtype, mode: str, images: Tensor, labels: Tensor
) -> Callable[[], object]:
    """A training step (forward, loss, backward, plain SGD) or a forward pass without gradients, on fixed tensors."""
    device = images.device.type

    def forward() -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=autocast):
            return net(images)

    if mode == "infer":
        net.eval()

        def infer() -> Tensor:
            with torch.no_grad():
                return forward()

        return infer
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, foreach=True)

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward().float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


def _without_dropout(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def _gradients(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    logits = net(images)
    names, parameters = zip(*net.named_parameters(), strict=True)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    grads = torch.autograd.grad(loss, parameters)
    return {"logits": logits.detach(), **dict(zip(names, grads, strict=True))}


def verify_network(network: Network, dtype: torch.dtype, device: torch.device, batch: int = 8) -> None:
    """Logits and every parameter gradient of ours against float64: the error's norm at most twice PyTorch's own.

    The norm, not the largest error: where two elements of a pool's window round to a tie, one gradient moves to a neighbour in
    either implementation.

    Raises:
        AssertionError: a result is wrong.
    """
    torch.manual_seed(0)
    exact = _without_dropout(network.reference()).to(device).to(torch.float64)
    peer, ours = (_without_dropout(make()).to(device).to(dtype) for make in (network.reference, network.fused))
    for net in (peer, ours):
        net.load_state_dict(exact.state_dict())
    # The parameters' rounding to dtype is not an error of either.
    exact.load_state_dict({key: value.double() for key, value in peer.state_dict().items()})
    images, labels = batch_of(network, batch, dtype, device)
    truth = _gradients(exact, images.double(), labels)
    results = [_gradients(net, images, labels) for net in (ours, peer)]
    for name, value in truth.items():
        error, peer_error = ((r[name].double() - value).norm().item() for r in results)
        allowed = 2 * peer_error + 0.5 * torch.finfo(dtype).eps * value.norm().item()
        if not error <= allowed:
            raise AssertionError(f"{name}: error {error:.3e} in norm against float64, allowed {allowed:.3e}")


def network_flops(network: Network, batch: int) -> tuple[int, int]:
    """FLOPs of a forward pass and of a training step (the image's gradient not computed), counted by PyTorch."""
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
