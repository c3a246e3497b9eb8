"""fuse on networks of torchvision and timm that are written as classes: each equals the unfused network.

On the CPU the tests run in float64: there, a network of fifty layers and its gradients are accurate to 1e-8 for any order of
the sums. Images are small, and so are the networks where the library offers a size.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

from alexnet_triton import fuse
from kernels.runtime import backend

from ..conftest import DEVICE, UNDER_TTSEM

pytestmark = pytest.mark.skipif(UNDER_TTSEM, reason="the kernels launched here are tested in tests/kernels")

#: Kernels run in float64 in the interpreter only.
DTYPE = torch.float64 if DEVICE == "cpu" else torch.float32
#: Allowed error relative to the result's own norm, and relative to the norm of all gradients together. In float32, fifty layers
#: may enlarge the rounding error of the first.
OWN, ALL = (1e-8, 1e-10) if DEVICE == "cpu" else (1e-2, 1e-4)


@dataclasses.dataclass(frozen=True)
class Model:
    """A network of a library.

    Attributes:
        library: torchvision or timm.
        name: name of the function that makes the network.
        options: keyword arguments of that function.
    """

    library: str
    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make(self) -> nn.Module:
        """The network with random weights and without dropout, for which a fused network draws other random numbers.

        Scales and biases are random too: some are initialized to zero, which would switch a block off.
        """
        torch.manual_seed(0)
        options = {"num_classes": 5} | self.options
        if self.library == "timm":
            net = pytest.importorskip("timm").create_model(self.name, drop_rate=0.0, **options)
        else:
            net = getattr(torchvision.models, self.name)(**options)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
        return net.to(DEVICE, DTYPE)


MODELS = (
    Model("torchvision", "resnet18"),
    Model("torchvision", "resnet50"),
    Model("torchvision", "mobilenet_v2", {"width_mult": 0.25}),
    Model("torchvision", "mobilenet_v3_small", {"width_mult": 0.25}),
    Model("torchvision", "googlenet", {"init_weights": False}),  # has two more outputs in training
    Model("timm", "resnet10t"),
    Model("timm", "mobilenetv3_small_050"),
    Model("timm", "test_efficientnet"),
    Model("timm", "regnetx_002"),
    Model("timm", "convnext_atto", {"depths": (1, 1, 2, 1)}),
    Model("timm", "lcnet_035"),
    Model("timm", "dla46_c"),
    Model("timm", "densenet121", {"block_config": (2, 2, 4, 2)}),
    Model("timm", "vit_tiny_patch16_224", {"img_size": 32, "depth": 4}),
    Model("timm", "test_byobnet"),
)

#: timm's convolutional networks without their heads, which return feature maps.
MAPS = tuple(
    dataclasses.replace(model, options=model.options | {"num_classes": 0, "global_pool": ""})
    for model in MODELS
    if model.library == "timm" and not model.name.startswith("vit")
)

#: One of each kind: residual blocks, depthwise convolutions, several outputs, GELU, concatenation, attention.
TRAINED = tuple(
    model
    for model in MODELS
    if model.name in {"resnet18", "mobilenet_v2", "googlenet", "convnext_atto", "densenet121", "vit_tiny_patch16_224"}
)


def images(memory_format: torch.memory_format = torch.contiguous_format, batch: int = 4, side: int = 32) -> Tensor:
    """Random images; by default 4: every network reduces each to one pixel, so batch normalization has four values."""
    return torch.randn(batch, 3, side, side, device=DEVICE, dtype=DTYPE).contiguous(memory_format=memory_format)


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of a network that returns one tensor or several."""
    result = net(x)
    return [result] if isinstance(result, Tensor) else list(result)


def assert_same(name: str, ours: Tensor, theirs: Tensor, floor: float = 0.0) -> None:
    """Assert equal shape, dtype and strides, and an error in norm of at most ``OWN`` times that of ``theirs`` + ``floor``."""
    assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride()), name
    error, allowed = (ours.double() - theirs.double()).norm().item(), OWN * theirs.double().norm().item() + floor
    assert error <= allowed, f"{name}: error {error:.3e} in norm, allowed {allowed:.3e}"


class Pair(NamedTuple):
    """A network and its fused copy."""

    net: nn.Module
    fused: nn.Module


def id_of(model: Model) -> str:
    """The test id of a model."""
    return f"{model.library}-{model.name}"


@pytest.fixture(scope="module", params=MODELS, ids=id_of)
def pair(request: pytest.FixtureRequest) -> Pair:
    net = request.param.make()
    return Pair(net, fuse(copy.deepcopy(net)))


@pytest.mark.thin("resnet18")
def test_inference(pair: Pair, launches: list[str]) -> None:
    net, fused = pair.net.eval(), pair.fused.eval()
    x = images(batch=2)
    with torch.no_grad():
        ours = outputs(fused, x)
        launched = len(launches)
        theirs = outputs(net, x)
    if backend.runs_triton(x):
        assert launched > 0
    assert launched == len(launches)  # the plain network does not run on kernels
    for got, wanted in zip(ours, theirs, strict=True):
        assert_same("output", got, wanted)


@pytest.mark.thin("resnet10t")
@pytest.mark.parametrize("pair", MAPS, ids=id_of, indirect=True)
def test_feature_maps(pair: Pair) -> None:
    """The feature maps have four pixels: one pixel's strides do not determine its memory format."""
    net, fused = pair.net.eval(), pair.fused.eval()
    x = images(torch.channels_last, batch=1, side=64)
    with torch.no_grad():
        assert_same("output", fused(x), net(x))


@pytest.mark.thin("resnet18")
@pytest.mark.parametrize("pair", TRAINED, ids=id_of, indirect=True)
def test_training(pair: Pair) -> None:
    """Outputs, gradients of parameters and images, and the buffers of batch normalization."""
    x = images()
    results, gradients = [], []
    for module in pair:
        module.train().zero_grad()
        given = x.clone().requires_grad_()
        found = outputs(module, given)
        torch.manual_seed(1)
        torch.autograd.backward(found, [torch.randn_like(y) for y in found])
        results.append({f"output {i}": y.detach() for i, y in enumerate(found)} | dict(module.named_buffers()))
        gradients.append({name: t.grad for name, t in [("images", given), *module.named_parameters()] if t.grad is not None})
    for name, wanted in results[0].items():
        assert_same(name, results[1][name], wanted)
    assert list(gradients[0]) == list(gradients[1])
    whole = sum(t.double().square().sum().item() for t in gradients[0].values()) ** 0.5
    for name, wanted in gradients[0].items():
        assert_same(f"gradient of {name}", gradients[1][name], wanted, ALL * whole)
