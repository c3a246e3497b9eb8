"""fuse on torchvision's networks, and the ImageNet form of this project's AlexNet."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

import kernels
from alexnet_triton import AlexNet, FusedSequential, explain, fuse, reference_alexnet

from ..conftest import DEVICE

#: name: (side of a small image that the network accepts, number of fused layers, number of layers).
NETWORKS = {"alexnet": (63, 20, 21), "vgg11": (32, 28, 29), "squeezenet1_0": (33, 56, 57)}


class Pair(NamedTuple):
    """torchvision's network, its fused copy, images for both, and (number of fused layers, number of layers)."""

    net: nn.Module
    fused: nn.Module
    images: Tensor
    counts: tuple[int, int]


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request: pytest.FixtureRequest) -> Pair:
    torch.manual_seed(0)
    net = getattr(torchvision.models, request.param)(num_classes=7).to(DEVICE)
    side, *counts = NETWORKS[request.param]
    return Pair(net, fuse(copy.deepcopy(net)), torch.randn(2, 3, side, side, device=DEVICE), tuple(counts))


def test_what_is_kept_and_what_is_fused(pair: Pair) -> None:
    net, fused, _, counts = pair
    assert type(fused) is type(net)
    assert list(fused.state_dict()) == list(net.state_dict())
    assert type(net.features) is nn.Sequential
    assert type(fused.features) is type(fused.classifier) is FusedSequential
    explanation = explain(net)
    assert str(explanation) == str(explain(fused))
    assert (explanation.fused_layers, explanation.layers) == counts


@pytest.mark.thin("alexnet")
def test_inference(pair: Pair, launches: list[str]) -> None:
    net, fused, x, _ = pair
    net.eval()
    fused.eval()
    with torch.inference_mode():
        ours = fused(x)
        launched = len(launches)
        theirs = net(x)
    assert launched == len(launches) > 4  # ours runs on kernels, theirs does not
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(net(x).square().sum(), list(net.parameters())))


@pytest.mark.thin("alexnet")
def test_training(pair: Pair) -> None:
    """Gradients with dropout equal those on PyTorch's operations; gradients without dropout equal torchvision's network's."""
    net, fused, x, _ = pair
    net.train()
    fused.train()
    ours = _gradients(fused, x)
    with kernels.use_backend("torch"):
        theirs = _gradients(fused, x)
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got - wanted).norm() <= 1e-4 * wanted.norm()
    dropouts = [m for m in (*net.modules(), *fused.modules()) if isinstance(m, nn.Dropout)]
    for layer in dropouts:
        layer.eval()
    with kernels.use_backend("torch"):
        plain, reference = _gradients(net, x), _gradients(fused, x)
    for got, wanted in zip(reference, plain, strict=True):
        assert (got - wanted).norm() <= 1e-4 * wanted.norm()


def test_pretrained_weights_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file saved here under the name that torchvision downloads is read by torchvision and by a fused network."""
    weights = torchvision.models.AlexNet_Weights.DEFAULT
    file = tmp_path / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.save(torchvision.models.alexnet().state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    net = torchvision.models.alexnet(weights=weights)
    fused = fuse(torchvision.models.alexnet())
    fused.load_state_dict(torch.load(file, weights_only=True))
    for ours, theirs in zip(fused.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    x = torch.randn(1, 3, 63, 63)
    with kernels.use_backend("torch"), torch.no_grad():
        assert torch.equal(fused.eval()(x), net.eval()(x))


def test_imagenet_form() -> None:
    net, reference = AlexNet(num_classes=1000, in_channels=3), reference_alexnet(num_classes=1000, in_channels=3)
    net.load_state_dict(reference.state_dict())
    assert net[0].weight.shape == (96, 3, 11, 11)
    x = torch.randn(1, 3, 224, 224, device=DEVICE)
    net, reference = net.to(DEVICE).eval(), reference.to(DEVICE).eval()
    with torch.inference_mode():
        ours, theirs = net(x), reference(x)
    assert ours.shape == (1, 1000)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
