"""fuse changes a module in place: references to parts of the network stay valid."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint_sequential

from alexnet_triton import AlexNet, FusedSequential, fuse, unfuse

from ..conftest import DEVICE, own_devices
from .test_fused import images, small_layers


class Net(nn.Module):
    """``forward`` walks its containers through a plain list; a bound method is a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.parts = [self.first, self.second]
        self.seen: list[tuple[int, ...]] = []
        self.second.register_forward_hook(self.note)

    def note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        assert module is self.second
        self.seen.append(tuple(output.shape))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


@pytest.fixture
def net() -> Net:
    return Net().to(DEVICE)


def test_containers_in_a_plain_list_and_a_bound_method_as_hook(net: Net, launches: list[str]) -> None:
    x = images()
    expected = net(x)
    assert fuse(net) is net
    torch.testing.assert_close(net(x), expected)
    assert launches == ["_conv2d_fprop_kernel", "_conv2d_fprop_kernel", "_max_pool2d_fprop_kernel"]
    assert net.seen == [(4, 4, 7, 7)] * 2


def test_copies_bind_to_themselves(net: Net) -> None:
    fuse(net)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        copied(images())
        assert copied.parts[1] is copied.second
        assert type(copied.second) is FusedSequential
        assert (copied.seen, net.seen) == ([(4, 4, 7, 7)], [])


def test_handles_taken_before_are_removed_after(net: Net) -> None:
    seen = []
    handle = net.first[0].register_forward_hook(lambda *_: seen.append("layer"))
    other = net.first.register_forward_pre_hook(lambda *_: seen.append("container"))
    fuse(net)
    net(images())
    handle.remove()
    other.remove()
    net(images())
    assert seen == ["container", "layer"]


def test_state_dict_hooks_on_a_container(net: Net) -> None:
    """A module can rename keys of old checkpoints by such a hook."""

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        assert module is net.first
        state[f"{prefix}0.weight"] = state.pop(f"{prefix}old")

    net.first.register_load_state_dict_pre_hook(rename)
    net.first.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({f"{prefix}note": module}))
    fuse(net)
    state = net.state_dict()
    assert state.pop("first.note") is net.first
    state["first.old"] = torch.zeros_like(state.pop("first.0.weight"))
    net.load_state_dict(state)
    assert not net.first[0].weight.any()


def _compile_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="aot_eager")
    return module


@own_devices
@pytest.mark.parametrize(
    "how", [_compile_in_place, lambda m: torch.compile(m, backend="aot_eager")], ids=["compile()", "compile"]
)
def test_compiled_before_and_a_layer_replaced_after(how: Callable[[nn.Module], nn.Module]) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(*small_layers(0.0)).to(DEVICE)
    twin = copy.deepcopy(net)
    compiled = how(net)
    fuse(net)
    x = images()
    torch.testing.assert_close(compiled(x), twin(x))
    for each in (net, twin):
        each[1] = nn.Tanh()
    torch.testing.assert_close(compiled(x), twin(x))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@own_devices
def test_ddp_and_an_optimizer_made_before(process_group: None, launches: list[str]) -> None:
    net = nn.Sequential(*small_layers(0.0)).to(DEVICE)
    twin = copy.deepcopy(net)
    parallel, optimizer = DistributedDataParallel(net), torch.optim.SGD(net.parameters(), lr=0.1)
    fuse(net)
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    x = images()
    for module, sgd in ((parallel, optimizer), (twin, other)):
        for _ in range(2):
            sgd.zero_grad()
            module(x).square().sum().backward()
            sgd.step()
    assert len(launches) > 30
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Normalising(nn.Sequential):
    """A subclass that overrides methods of FusedSequential and adds one."""

    def __init__(self, *layers: nn.Module, scale: float = 2.0) -> None:
        super().__init__(*layers)
        self.scale = scale

    def __getitem__(self, index: Any) -> Any:
        return "mine" if index == "mine" else super().__getitem__(index)

    def __add__(self, other: Any) -> Any:
        return "added"

    def normalised(self, x: Tensor) -> Tensor:
        return self(x / self.scale)


def test_a_subclass_keeps_its_methods(launches: list[str]) -> None:
    net = fuse(Normalising(nn.Conv2d(3, 4, 3), nn.ReLU()).to(DEVICE))
    x = images()
    torch.testing.assert_close(net.normalised(x), F.relu(F.conv2d(x / 2, net[0].weight, net[0].bias)))
    assert (net["mine"], net + net, type(net[0]), launches) == ("mine", "added", nn.Conv2d, ["_conv2d_fprop_kernel"])
    copied = pickle.loads(pickle.dumps(net))
    assert (copied.scale, isinstance(copied, Normalising), type(copied) is type(net)) == (2.0, True, True)


class Reducing(nn.Module):
    """Defines how it is pickled, and what is kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.width, self.scratch = nn.Conv2d(3, width, 3), width, "scratch"

    def __reduce__(self) -> Any:
        return Reducing, (self.width,), self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


def test_a_module_that_says_how_it_is_pickled(launches: list[str]) -> None:
    net = fuse(Reducing(4).to(DEVICE))
    copied = pickle.loads(pickle.dumps(net))
    assert type(copied) is type(net) is not Reducing
    x = images()
    torch.testing.assert_close(copied.to(DEVICE)(x), net(x))
    assert len(launches) == 2


def test_unfuse(launches: list[str]) -> None:
    for net, kind in (
        (Net(), Net),
        (Normalising(nn.ReLU()), Normalising),
        (nn.Sequential(), nn.Sequential),
        (Reducing(2), Reducing),
    ):
        assert unfuse(fuse(net)) is net
        assert type(net) is kind
    assert type(unfuse(FusedSequential())) is type(unfuse(AlexNet())) is nn.Sequential
    net = unfuse(fuse(Net().to(DEVICE)))
    net(images())
    assert launches == []
    fuse(net)(images())
    assert launches != []


@own_devices
def test_compiled_code_walks_the_children() -> None:
    net = FusedSequential(nn.Linear(4, 3), nn.ReLU()).to(DEVICE)

    def walk(x: Tensor) -> Tensor:
        for child in net.children():
            x = child(x)
        return x

    x = torch.randn(2, 4, device=DEVICE)
    torch.testing.assert_close(torch.compile(walk, fullgraph=True, backend="eager")(x), walk(x))


@pytest.mark.parametrize("segments", [1, 3, 4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_sequential_runs_its_segments_fused(segments: int, reentrant: bool, launches: list[str]) -> None:
    net = FusedSequential(*small_layers(0.0)).to(DEVICE)
    x = images().requires_grad_()
    expected = net(x)
    assert [type(child) for child in net.children()] == [type(layer) for layer in net]
    whole = len(launches)
    launches.clear()
    y = checkpoint_sequential(net, segments, x, use_reentrant=reentrant)
    torch.testing.assert_close(y, expected)
    # A run that a segment's border cuts becomes two: with three segments, Conv2d, ReLU | MaxPool2d.
    assert whole <= len(launches) <= whole + 2
    grads = []
    for output in (y, expected):
        net.zero_grad()
        output.square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
