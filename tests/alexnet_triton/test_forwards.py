"""A fused module's own forward: changes the compiler does not see, code it cannot record, effects that must happen once."""

from __future__ import annotations

import copy
import io
import logging
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alexnet_triton import explain, fuse, unfuse

from ..conftest import DEVICE, own_devices
from .test_forms import gradients, images

pytestmark = own_devices


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


class Net(nn.Module):
    """A convolution with a helper method, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.mode, self.calls = nn.Conv2d(3, 4, 3), nn.Linear(400, 5), "a", 0

    def helper(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))

    def forward(self, x: Any) -> Tensor:
        self.calls += 1
        x = self.helper(x)
        if self.mode == "print":
            print(end="")
        return self.fc(x.flatten(1))


@pytest.fixture
def net() -> Net:
    return fuse(Net().to(DEVICE))


def test_a_helper_method_replaced_on_the_class(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    net(x)
    monkeypatch.setattr(Net, "helper", lambda self, x: F.relu(self.conv(x)) * 2)
    expected = F.linear(2 * F.relu(net.conv(x)).flatten(1), net.fc.weight, net.fc.bias)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


class Holding(nn.Module):
    """Calls a network that it has not registered, as perceptual losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.held = [nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).to(DEVICE)]

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](self.conv(x))


def test_a_hook_on_a_module_that_is_not_registered() -> None:
    net = fuse(Holding().to(DEVICE))
    x, seen = images(), []
    net(x)
    net.held[0][1].register_forward_hook(lambda *_: seen.append(1))
    net(x)
    assert seen == [1]


def test_an_error_after_a_part_that_ran(net: Net) -> None:
    """The part before the error ran once; the error is PyTorch's."""
    net.mode = "print"
    for batch in (images(), images(3)):
        net(batch)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        net(torch.randn(2, 3, 9, 9, device=DEVICE))
    assert net.calls == 3


def test_the_log_has_one_line_for_what_cannot_be_recorded(net: Net) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._subclasses")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with pytest.raises(RuntimeError):
            net(torch.randn(2, 4, 9, 9, device=DEVICE))
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert len(stream.getvalue().splitlines()) <= 2
    assert "a part of Net.forward runs as it stands" in stream.getvalue()


def test_more_variants_than_the_compiler_keeps_by_itself(net: Net, launches: list[str]) -> None:
    x = images()
    for i in range(12):
        net.mode = f"variant {i}"
        for _ in range(3):
            launches.clear()
            net(x)
            assert launches, i


def test_numbers_that_a_module_counts_are_not_recorded_anew(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    from alexnet_triton import graphs

    recorded = []
    rewrite = graphs.rewrite
    monkeypatch.setattr(graphs, "rewrite", lambda graph: recorded.append(1) or rewrite(graph))
    for _ in range(8):
        net(images())
    assert len(recorded) <= 2
    assert net.calls == 8


class Checkpointing(nn.Module):
    """Parts of its forward are checkpoints: one with batch normalization, one with dropout, one a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(400, 30)
        self.part = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 2))

    def first(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))

    def second(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.fc(x.flatten(1))), 0.0)

    def forward(self, x: Tensor, reentrant: bool) -> Tensor:
        for part in (self.first, self.second, self.part):
            x = checkpoint(part, x, use_reentrant=reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_in_a_forward(reentrant: bool) -> None:
    net = Checkpointing().to(DEVICE)
    fused = fuse(copy.deepcopy(net))
    x = images()
    for _ in range(2):
        for each in (fused, net):
            each.zero_grad()
            each(x.clone().requires_grad_(), reentrant).square().sum().backward()
        for ours, theirs in zip(fused.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    assert fused.norm.num_batches_tracked == net.norm.num_batches_tracked == 4


def test_the_mask_of_a_checkpointed_dropout() -> None:
    class Dropped(nn.Module):
        """Only dropout, after a linear layer that changes nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64, bias=False)
            nn.init.eye_(self.fc.weight)

        def part(self, x: Tensor) -> Tensor:
            return F.dropout(F.relu(self.fc(x)), 0.5)

        def forward(self, x: Tensor, reentrant: bool) -> Tensor:
            return checkpoint(self.part, x, use_reentrant=reentrant)

    net = fuse(Dropped().to(DEVICE))
    for reentrant in (False, True):
        x = torch.ones(8, 64, device=DEVICE, requires_grad=True)
        y = net(x, reentrant)
        y.sum().backward()
        assert torch.equal(x.grad, y.detach())


class Named(nn.Module):
    """A base class that takes a name from every subclass and keeps a register of the names."""

    register: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls, *, name: str, **others: Any) -> None:
        super().__init_subclass__(**others)
        cls.register.append(name)


class Word(Named, name="word"):
    """A subclass of :class:`Named`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_a_class_that_registers_its_subclasses(launches: list[str]) -> None:
    net = fuse(Word().to(DEVICE))
    net(torch.randn(2, 3, device=DEVICE))
    assert launches
    assert Named.register == ["word"]


def test_unfuse_leaves_nothing_behind(net: Net) -> None:
    names = set(vars(Net()))
    other = fuse(nn.Sequential(nn.ReLU()))
    net(images())
    other(images())
    assert set(vars(unfuse(net))) == names
    assert set(vars(unfuse(other))) == set(vars(nn.Sequential()))


def test_arrays_of_numpy_are_refused_as_before(net: Net) -> None:
    with pytest.raises(TypeError):
        net(np.zeros((1, 3, 12, 12), np.float32))


def test_threads(net: Net, launches: list[str]) -> None:
    x = images()
    expected = unfuse(copy.deepcopy(net))(x)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(net(x))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for y in found:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


class Penalised(nn.Module):
    """Containers beside layers; a pool and dropout at the start of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3))
        self.fc = nn.Linear(36, 8)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.softplus(self.fc(self.features(x).flatten(1))))


@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_penalty(training: bool) -> None:
    """In a class that holds containers no term of the penalty's gradient is lost."""
    net = Penalised().to(DEVICE)
    net.head[0].p = 0.0
    fused = fuse(copy.deepcopy(net))
    x = images(4)
    found = []
    for each in (fused, net):
        each.train(training)
        given = x.clone().requires_grad_()
        y = each(given)
        (gradient,) = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        found.append(gradients(each, [y, gradient.view(len(x), -1).norm(dim=1)]))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-5
    assert explain(fused).fused_layers > 0
