"""A fused network's outputs have the unfused network's strides, and so do tensors between its parts."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from alexnet_triton import fuse
from kernels.runtime import launch

from ..conftest import DEVICE, UNDER_TTSEM

pytestmark = pytest.mark.skipif(UNDER_TTSEM, reason="its kernels are tested in tests/kernels")


class View(nn.Module):
    """A view, as people write it who do not know Flatten."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


class Pointwise(nn.Module):
    """A custom layer that reads strides."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_strided(x, x.shape, x.stride()) * (1 + x.stride(1))


NETWORKS: dict[str, list[nn.Module]] = {
    "conv": [nn.Conv2d(3, 4, 3)],
    "conv-relu": [nn.Conv2d(3, 4, 3), nn.ReLU()],
    "conv-relu-pool": [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)],
    "conv-relu-conv": [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)],
    "conv-pool": [nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2)],
    "pool": [nn.MaxPool2d(2)],
    "pool-conv": [nn.MaxPool2d(2), nn.Conv2d(3, 2, 1)],
    "one filter": [nn.Conv2d(3, 1, 3), nn.ReLU()],
    "one pixel": [nn.Conv2d(3, 4, 9)],
    "one row": [nn.Conv2d(3, 4, (9, 1)), nn.ReLU(), nn.MaxPool2d((1, 2))],
    "pointwise": [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)],
    "strided": [nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
    "grouped": [nn.Conv2d(3, 6, 3, groups=3)],
    "indices": [nn.Conv2d(3, 4, 2), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)],
    "dropout": [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.0)],
    "own layer": [nn.Conv2d(3, 4, 3), nn.ReLU(), Pointwise(), nn.Conv2d(4, 4, 3), Pointwise()],
    "batch norm": [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)],
    "average": [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2)],
    "containers": [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2))],
    "flatten": [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()],
    "flatten of a conv": [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(196, 3)],
}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def assert_same(ours: Tensor | tuple[Tensor, ...], theirs: Tensor | tuple[Tensor, ...]) -> None:
    """Check values, and strides except those of dimensions of size 1."""
    for got, wanted in zip(*((t,) if isinstance(t, Tensor) else t for t in (ours, theirs)), strict=True):
        if not got.is_floating_point():
            assert torch.equal(got, wanted)
        else:  # by norm, since single elements may cancel
            assert (got - wanted).norm() <= 1e-5 * wanted.norm()
        strides = zip(got.shape, got.stride(), wanted.stride(), strict=True)
        assert all(size == 1 or mine == its for size, mine, its in strides), (got.shape, got.stride(), wanted.stride())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("of_images", "of_weights"), itertools.product(FORMATS, FORMATS))
def test_strides(name: str, batch: int, of_images: str, of_weights: str) -> None:
    net = nn.Sequential(*copy.deepcopy(NETWORKS[name])).to(DEVICE).to(memory_format=FORMATS[of_weights])
    fused = fuse(copy.deepcopy(net))
    x = torch.randn(batch, 3, 9, 9, device=DEVICE).contiguous(memory_format=FORMATS[of_images])
    assert_same(fused(x), net(x))
    with torch.no_grad():
        assert_same(fused(x), net(x))


@pytest.mark.parametrize("name", ["conv", "conv-relu", "conv-relu-pool", "conv-relu-conv", "pool", "dropout"])
def test_images_without_a_batch_and_from_a_crop(name: str) -> None:
    net = nn.Sequential(*copy.deepcopy(NETWORKS[name])).to(DEVICE)
    fused = fuse(copy.deepcopy(net))
    whole = torch.randn(2, 3, 12, 14, device=DEVICE)
    for x in (whole[0], whole[:, :, 2:, 1:11], whole.transpose(2, 3), whole[:, :, ::2]):
        assert_same(fused(x), net(x))


@pytest.mark.parametrize("training", [False, True])
def test_a_view_after_a_container(training: bool) -> None:
    """The view is ``x.view(x.size(0), 256 * 6 * 6)`` after ``self.features(x)``."""
    net = nn.Sequential(*copy.deepcopy(NETWORKS["conv-relu-pool"]), View(), nn.Linear(36, 5)).to(DEVICE).train(training)
    fused = fuse(copy.deepcopy(net))
    x = torch.randn(2, 3, 9, 9, device=DEVICE)
    torch.testing.assert_close(fused(x), net(x))


def test_no_launch_is_added() -> None:
    """The last operation writes NCHW itself: the launches are those of a channels-last network."""
    found = []
    for memory_format in FORMATS.values():
        net = fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()).to(DEVICE))
        names: list[str] = []
        with torch.no_grad(), launch.observe_launches(lambda kernel, *_, names=names: names.append(kernel.fn.__name__)):
            y = net(torch.randn(2, 3, 9, 9, device=DEVICE).contiguous(memory_format=memory_format))
        assert y.is_contiguous(memory_format=memory_format)
        found.append(names)
    assert found[0] == found[1] == ["_conv2d_fprop_kernel"] * 2


@pytest.mark.parametrize("of_images", FORMATS)
@pytest.mark.parametrize(
    "name", ["conv", "conv-relu-pool", "conv-relu-conv", "pool-conv", "strided", "containers", "own layer"]
)
def test_the_gradient_of_the_images(name: str, of_images: str) -> None:
    """A gradient penalty views this gradient: ``gradient.view(len(x), -1)``."""
    net = nn.Sequential(*copy.deepcopy(NETWORKS[name])).to(DEVICE)
    x = torch.randn(2, 3, 9, 9, device=DEVICE).contiguous(memory_format=FORMATS[of_images])
    gradients = []
    for each in (fuse(copy.deepcopy(net)), net):
        given = (x.clone().requires_grad_() * 1).contiguous(memory_format=FORMATS[of_images])
        gradients.append(torch.autograd.grad(each(given).square().sum(), given)[0])
    ours, theirs = gradients
    assert ours.stride() == theirs.stride()
    # By norm: each element is a sum over all outputs, whose terms may cancel.
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
