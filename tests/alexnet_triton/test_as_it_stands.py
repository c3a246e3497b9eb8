"""A layer runs fused only if it computes what its class computes: any change (patch, hook, subclass, ...) takes effect."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, Replicate, distribute_module
from torch.nn.utils import parametrizations, parametrize, prune

from alexnet_triton import explain, fuse, unfuse

from ..conftest import DEVICE, own_devices


def layers() -> list[nn.Module]:
    return [
        *(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        ),
        *(nn.Linear(32, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 4)),
    ]


class Net(nn.Module):
    """The same layers, called by a ``forward``."""

    def __init__(self, *given: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(given or layers())

    def __getitem__(self, index: int) -> nn.Module:
        return self.layers[index]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


NETS: dict[str, Callable[[], Any]] = {"Sequential": lambda: nn.Sequential(*layers()), "Module": Net}


def images() -> Tensor:
    return torch.randn(2, 3, 12, 12, device=DEVICE)


class Counted(Tensor):
    """A tensor subclass that doubles the results of all layers' functions."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        layer = func in (F.conv2d, F.linear, F.relu, F.max_pool2d, torch._C._nn.linear, torch.relu)
        return (2 * result).as_subclass(Tensor) if layer and isinstance(result, Tensor) else result


def on_instance(net: Any) -> None:
    for i in (0, 1, 2, 7, 9):
        net[i].forward = lambda x, forward=net[i].forward: forward(x) + 1


def conv_forward_on_instance(net: Any) -> None:
    net[3]._conv_forward = lambda x, weight, bias: F.conv2d(x, 2 * weight, bias, padding=1)


def on_class(kind: type[nn.Module], name: str) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        original = getattr(kind, name)
        _patches.setattr(kind, name, lambda self, *args: original(self, *args) * 2 + 1)

    return change


def function(name: str) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        original = getattr(F, name)
        _patches.setattr(F, name, lambda *args, **kwargs: original(*args, **kwargs) * 2 + 1)

    return change


class Doubled(nn.Module):
    """A parametrization that doubles the weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(net: Any) -> None:
    parametrizations.weight_norm(net[0])
    parametrize.register_parametrization(net[7], "weight", Doubled())
    parametrizations.orthogonal(net[10])


def hooked_weights(net: Any) -> None:
    """The old ``weight_norm`` and pruning: a hook computes the weight, which is a plain attribute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(net[3])
    prune.l1_unstructured(net[7], "weight", amount=0.5)


def weights_that_are_attributes(net: Any) -> None:
    """Weights as plain tensor attributes, as in libraries that put views of one flat tensor there."""
    for i in (0, 7):
        weight = net[i].weight.detach() * 2
        del net[i].weight
        net[i].weight = weight


def subclass_weights(net: Any) -> None:
    for i in (0, 10):
        net[i].weight = nn.Parameter(net[i].weight.detach().as_subclass(Counted), requires_grad=False)


def int8_weights(net: Any) -> None:
    """torchao replaces the weights of linear layers by int8 tensor subclasses."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())


def circular_padding(net: Any) -> None:
    net[3].padding_mode = "circular"


#: The monkeypatch of the running test, which undoes changes of classes and functions after the test.
_patches: pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _patched() -> Iterator[None]:
    global _patches
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as _patches:
        yield


CHANGES: dict[str, Callable[[Any], None]] = {
    "forward of instances": on_instance,
    "_conv_forward of an instance": conv_forward_on_instance,
    "Conv2d.forward": on_class(nn.Conv2d, "forward"),
    "Conv2d._conv_forward": on_class(nn.Conv2d, "_conv_forward"),
    "ReLU.forward": on_class(nn.ReLU, "forward"),
    "MaxPool2d.forward": on_class(nn.MaxPool2d, "forward"),
    "Linear.forward": on_class(nn.Linear, "forward"),
    "Dropout.forward": on_class(nn.Dropout, "forward"),
    "Flatten.forward": on_class(nn.Flatten, "forward"),
    "F.relu": function("relu"),
    "F.conv2d": function("conv2d"),
    "F.linear": function("linear"),
    "F.max_pool2d": function("max_pool2d"),
    "F.dropout": function("dropout"),
    "parametrizations": parametrized,
    "hooked weights": hooked_weights,
    "weights that are attributes": weights_that_are_attributes,
    "subclass weights": subclass_weights,
    "int8 weights": int8_weights,
    "circular padding": circular_padding,
}


#: Changes that affect all layers in the process.
EVERYWHERE = [name for name in CHANGES if "." in name and "instance" not in name]


@pytest.mark.thin
@own_devices
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before fuse", "after fuse", "after a call"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", NETS)
def test_what_a_layer_computes(form: str, change: str, when: str) -> None:
    x = images()
    net, fused = NETS[form]().to(DEVICE), NETS[form]().to(DEVICE)
    fused.load_state_dict(net.state_dict())
    if when != "before fuse":
        fuse(fused)
    if when == "after a call":
        fused(x)
    CHANGES[change](fused)
    if change not in EVERYWHERE:
        CHANGES[change](net)
    if when == "before fuse":
        fuse(fused)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-5)


@own_devices
def test_explain_says_why() -> None:
    net = nn.Sequential(*layers())
    conv_forward_on_instance(net)
    subclass_weights(net)
    on_class(nn.ReLU, "forward")(net)
    notes = [run.note for run in explain(net).runs]
    assert notes[0] == "the Conv2d's weight is a Counted, which computes in its own way"
    assert explain(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())).runs[0].note == "the function of all ReLU layers was replaced"
    assert "the Conv2d's forward was replaced" in notes
    fused = fuse(Net())
    fused[0]._conv_forward = lambda *_: None
    assert explain(fused).runs[0].note == "the Conv2d's forward was replaced"


# --------------------------------------------------------------------------------------------------------- quantization


class Quantizable(nn.Module):
    """A network between a QuantStub and a DeQuantStub, as eager static quantization requires."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.net, self.dequant = (
            torch.ao.quantization.QuantStub(),
            nn.Sequential(*layers()),
            torch.ao.quantization.DeQuantStub(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.net(self.quant(x)))


on_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="PyTorch's quantized layers run on the CPU")


@on_the_cpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_eager_static_quantization(when: str) -> None:
    torch.manual_seed(0)
    plain = Quantizable().eval()
    fused = copy.deepcopy(plain)
    calibration, x = [images() for _ in range(2)], images()
    for net in (plain, fused):
        net.qconfig = torch.ao.quantization.get_default_qconfig("x86")
        if net is fused and when == "before":
            fuse(net)
        torch.ao.quantization.prepare(net, inplace=True)
        if net is fused and when == "between":
            fuse(net)
        for batch in calibration:
            net(batch)
        torch.ao.quantization.convert(net, inplace=True)
        if net is fused and when == "after":
            fuse(net)
    # In steps of the quantized output: layers that are fused while they are observed round differently.
    assert (fused(x) - plain(x)).abs().max() <= 2 * plain.net[10].scale


@on_the_cpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", NETS)
def test_fx_quantization_quantizes(form: str) -> None:
    """FX quantization of a fused network gives quantized modules; the network does not silently stay in float."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x = torch.randn(2, 3, 12, 12)
    net = NETS[form]().eval()
    fused = fuse(copy.deepcopy(net))
    outputs = []
    for each in (fused, net):
        prepared = prepare_fx(each, get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        quantized = convert_fx(prepared)
        kinds = {type(m).__module__.split(".")[2] for m in quantized.modules() if type(m).__module__.startswith("torch.ao.nn")}
        assert kinds
        outputs.append(quantized(x))
    torch.testing.assert_close(*outputs)


# -------------------------------------------------------------------------------------------------------------- inputs


@own_devices
@pytest.mark.parametrize("form", NETS)
def test_an_input_that_is_a_subclass(form: str) -> None:
    net = NETS[form]().to(DEVICE).eval()
    fused = fuse(copy.deepcopy(net))
    x = images()
    torch.testing.assert_close(fused(x.as_subclass(Counted)), net(x.as_subclass(Counted)))
    torch.testing.assert_close(fused(x), net(x))


@own_devices
def test_integers_and_other_dtypes() -> None:
    pool = nn.Sequential(nn.MaxPool2d(2), nn.Flatten())
    x = torch.randint(0, 255, (2, 3, 8, 8), device=DEVICE)
    fused = fuse(copy.deepcopy(pool))
    for dtype in (torch.int64, torch.uint8):
        assert torch.equal(fused(x.to(dtype)), pool(x.to(dtype)))


@own_devices
@pytest.mark.skipif(DEVICE != "cpu", reason="gloo's process group is on the CPU")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("form", NETS)
def test_dtensors(form: str, when: str, tmp_path: Any) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        layers = nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 4)  # not every PyTorch convolves a padded DTensor
        net = nn.Sequential(*layers) if form == "Sequential" else Net(*layers)
        fused = copy.deepcopy(net)
        if when == "after":
            fuse(fused)
        distribute_module(fused, mesh)
        if when == "before":
            fuse(fused)
        x = torch.distributed.tensor.distribute_tensor(torch.randn(3, 12), mesh, [Replicate()])
        torch.testing.assert_close(fused(x).full_tensor(), net(x.full_tensor()))
    finally:
        dist.destroy_process_group()


def test_unfuse_for_what_knows_pytorchs_layers_alone() -> None:
    net = unfuse(fuse(nn.Sequential(*layers())))
    assert type(net) is nn.Sequential
