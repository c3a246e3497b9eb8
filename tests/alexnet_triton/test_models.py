"""AlexNet at 224 x 224 against the reference nn.Sequential."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_triton import AlexNet, FusedSequential, reference_alexnet, reference_lenet
from alexnet_triton.models import init_xavier_uniform

from ..conftest import DEVICE
from ..oracle import assert_within_tolerance

TABLE = [
    ("Conv2d", (1, 96, 54, 54)),
    ("ReLU", (1, 96, 54, 54)),
    ("MaxPool2d", (1, 96, 26, 26)),
    ("Conv2d", (1, 256, 26, 26)),
    ("ReLU", (1, 256, 26, 26)),
    ("MaxPool2d", (1, 256, 12, 12)),
    ("Conv2d", (1, 384, 12, 12)),
    ("ReLU", (1, 384, 12, 12)),
    ("Conv2d", (1, 384, 12, 12)),
    ("ReLU", (1, 384, 12, 12)),
    ("Conv2d", (1, 256, 12, 12)),
    ("ReLU", (1, 256, 12, 12)),
    ("MaxPool2d", (1, 256, 5, 5)),
    ("Flatten", (1, 6400)),
    ("Linear", (1, 4096)),
    ("ReLU", (1, 4096)),
    ("Dropout", (1, 4096)),
    ("Linear", (1, 4096)),
    ("ReLU", (1, 4096)),
    ("Dropout", (1, 4096)),
    ("Linear", (1, 10)),
]


def test_layer_table() -> None:
    x = torch.randn(1, 1, 224, 224)
    rows = []
    for layer in AlexNet():
        x = layer(x)
        rows.append((type(layer).__name__, tuple(x.shape)))
    assert rows == TABLE


def test_parameters_and_state_dict_both_ways() -> None:
    net, reference = AlexNet(), reference_alexnet()
    assert sum(p.numel() for p in net.parameters()) == 46_764_746
    assert list(net.state_dict()) == [f"{i}.{n}" for i in (0, 3, 6, 8, 10, 14, 17, 20) for n in ("weight", "bias")]
    assert type(reference) is nn.Sequential
    net.load_state_dict(reference.state_dict(), strict=True)
    reference.load_state_dict(net.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), reference.parameters(), strict=True))


def test_options_and_slices() -> None:
    net = AlexNet(num_classes=1000, in_channels=3, dropout=0.25)
    assert net[0].weight.shape == (96, 3, 11, 11)
    assert net[-1].out_features == 1000
    assert net[16].p == net[19].p == 0.25
    assert type(net[:3]) is FusedSequential
    assert [str(a) for a in net] == [str(b) for b in reference_alexnet(1000, 3, 0.25)]


def test_lenet_is_d2ls() -> None:
    net = reference_lenet()
    assert sum(p.numel() for p in net.parameters()) == 61_706
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@dataclasses.dataclass
class Step:
    """Results of one training step of a network, and the loss after the update (``next_loss``)."""

    logits: Tensor
    input_grad: Tensor
    grads: dict[str, Tensor]
    loss: float
    next_loss: float


def _step(net: nn.Sequential, x: Tensor, labels: Tensor) -> Step:
    x = x.clone().requires_grad_()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    logits = net(x)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    optimizer.step()
    with torch.no_grad():
        next_loss = F.cross_entropy(net(x), labels).item()
    return Step(logits.detach(), x.grad, grads, loss.item(), next_loss)


@pytest.fixture(scope="module")
def steps() -> tuple[Step, Step, Step]:
    """The same step (batch 2, no dropout) of AlexNet on the kernels and of nn.Sequential in float32 and in float64."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = "ieee"
    torch.manual_seed(0)
    reference = reference_alexnet(dropout=0.0).apply(init_xavier_uniform).to(DEVICE)
    exact = reference_alexnet(dropout=0.0).to(DEVICE).double()
    exact.load_state_dict(reference.state_dict())
    ours = AlexNet(dropout=0.0).to(DEVICE)
    ours.load_state_dict(reference.state_dict(), strict=True)
    x, labels = torch.rand(2, 1, 224, 224, device=DEVICE), torch.tensor([3, 7], device=DEVICE)
    result = _step(ours, x, labels), _step(reference, x, labels), _step(exact, x.double(), labels)
    conv.fp32_precision, matmul.fp32_precision = before
    return result


def test_logits_and_input_gradient(steps: tuple[Step, Step, Step]) -> None:
    ours, peer, exact = steps
    assert_within_tolerance("logits", ours.logits, peer.logits, exact.logits)
    assert_within_tolerance("input gradient", ours.input_grad, peer.input_grad, exact.input_grad)


@pytest.mark.parametrize("name", [f"{i}.{n}" for i in (0, 3, 6, 8, 10, 14, 17, 20) for n in ("weight", "bias")])
def test_parameter_gradients(name: str, steps: tuple[Step, Step, Step]) -> None:
    ours, peer, exact = steps
    assert_within_tolerance(f"gradient of {name}", ours.grads[name], peer.grads[name], exact.grads[name])


def test_losses_before_and_after_an_sgd_step(steps: tuple[Step, Step, Step]) -> None:
    ours, peer, exact = steps
    assert ours.loss == pytest.approx(peer.loss, rel=1e-6)
    assert ours.next_loss == pytest.approx(peer.next_loss, rel=1e-5)
    assert ours.next_loss == pytest.approx(exact.next_loss, rel=1e-5)
    assert ours.next_loss < ours.loss
