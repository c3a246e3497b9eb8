"""fuse on torchvision's and timm's networks, which are classes of their own: fused networks equal unfused ones.

On the CPU in float64, where a network of fifty layers and its gradients are accurate to 1e-8 in any order of summation. Images
are small, and so are networks that offer a size.
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

pytestmark = pytest.mark.skipif(UNDER_TTSEM, reason="its kernels are tested in tests/kernels")

#: Kernels run float64 only in the interpreter.
DTYPE = torch.float64 if DEVICE == "cpu" else torch.float32
#: Allowed error, relative to a result's own norm and to the norm of all gradients together. In float32, what fifty layers may
#: make of the rounding of the first layer.
OWN, ALL = (1e-8, 1e-10) if DEVICE == "cpu" else (1e-2, 1e-4)


@dataclasses.dataclass(frozen=True)
class Model:
    """A network of torchvision or timm.

    Attributes:
        library: torchvision or timm.
        name: the function or model name that creates the network.
        options: keyword arguments.
    """

    library: str
    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make(self) -> nn.Module:
        """The network with random weights and without dropout, which would draw other numbers when fused.

        Scales and biases are random too: some are initialized to zero and would switch a block off.
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

#: timm's networks without their heads, so that they return feature maps.
MAPS = tuple(
    dataclasses.replace(model, options=model.options | {"num_classes": 0, "global_pool": ""})
    for model in MODELS
    if model.library == "timm" and not model.name.startswith("vit")
)


def images(memory_format: torch.memory_format = torch.contiguous_format, batch: int = 4, side: int = 32) -> Tensor:
    """Four images by default: every network reduces them to one pixel each, so batch normalization averages four numbers."""
    return torch.randn(batch, 3, side, side, device=DEVICE, dtype=DTYPE).contiguous(memory_format=memory_format)


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of a network that returns one tensor or several."""
    result = net(x)
    return [result] if isinstance(result, Tensor) else list(result)


def assert_same(name: str, ours: Tensor, theirs: Tensor, floor: float = 0.0) -> None:
    """Check values up to rounding or an error of ``floor``, and shape, dtype and strides exactly."""
    assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride()), name
    error, allowed = (ours.double() - theirs.double()).norm().item(), OWN * theirs.double().norm().item() + floor
    assert error <= allowed, f"{name}: error {error:.3e} in norm, allowed {allowed:.3e}"


class Pair(NamedTuple):
    """A network and a fused copy."""

    net: nn.Module
    fused: nn.Module


def id_of(model: Model) -> str:
    """The test id of a model."""
    return f"{model.library}-{model.name}"


@pytest.fixture(scope="module", params=MODELS, ids=id_of)
def pair(request: pytest.FixtureRequest) -> Pair:
    net = request.param.make()
    return Pair(net, fuse(copy.deepcopy(net)))


BOTH_FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


@BOTH_FORMATS
def test_inference(pair: Pair, memory_format: torch.memory_format, launches: list[str]) -> None:
    net, fused = pair.net.eval(), pair.fused.eval()
    x = images(memory_format)
    with torch.no_grad():
        ours = outputs(fused, x)
        launched = len(launches)
        theirs = outputs(net, x)
    if backend.runs_triton(x):
        assert launched > 0
    assert launched == len(launches)  # the plain network does not run on kernels
    for got, wanted in zip(ours, theirs, strict=True):
        assert_same("output", got, wanted)


@BOTH_FORMATS
@pytest.mark.parametrize("pair", MAPS, ids=id_of, indirect=True)
def test_feature_maps(pair: Pair, memory_format: torch.memory_format) -> None:
    """The maps have four pixels: the strides of a single pixel do not tell its format."""
    net, fused = pair.net.eval(), pair.fused.eval()
    x = images(memory_format, batch=1, side=64)
    with torch.no_grad():
        assert_same("output", fused(x), net(x))


def test_training(pair: Pair) -> None:
    """Outputs, gradients of parameters and images, and batch normalization's buffers are compared."""
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
