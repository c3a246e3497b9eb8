"""torch.compile(anything, backend=BACKEND): which calls are recorded and fused, and which are left unchanged."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import kernels
from alexnet_triton import FusedSequential, fuse, graphs

from ..conftest import BACKEND, DEVICE, own_devices
from .forms import FORMS
from .test_forms import assert_trains_alike, images

pytestmark = own_devices


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


def operations(function: Callable[..., object], *inputs: object) -> list[str]:
    """Names of the fused segments in the graphs of a compiled function."""
    found: list[str] = []

    def backend(graph: fx.GraphModule, example_inputs: list) -> Callable[..., object]:
        run = graphs.backend(graph, example_inputs)
        found.extend(node.target.__name__ for node in graph.graph.nodes if isinstance(node.target, graphs.GraphSegment))
        return run

    backend.wants_layers = True  # type: ignore[attr-defined]
    torch.compile(function, backend=backend)(*inputs)
    return found


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(4, 3, 3, 3, device=DEVICE)


@pytest.fixture
def matrix() -> Tensor:
    return torch.randn(12, 12, device=DEVICE)


@pytest.mark.skipif(not isinstance(BACKEND, str), reason="the package is not installed, so that PyTorch cannot know its name")
def test_entry_point() -> None:
    """PyTorch finds the backend by name in a process that has not imported this package."""
    code = (
        "import torch\n"
        "from torch import nn\n"
        "net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
        "x = torch.randn(1, 3, 6, 6)\n"
        "compiled = torch.compile(net, backend='alexnet_triton', fullgraph=True)\n"
        "torch.testing.assert_close(compiled(x), net(x))\n"
        "import sys; assert 'alexnet_triton.graphs' in sys.modules\n"
        "assert 'alexnet_triton' in torch.compiler.list_backends(exclude_tags=())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_options() -> None:
    torch._dynamo.reset()  # after many networks in a process it compiles no ReLU any more
    with pytest.raises(Exception, match='has the option rest, "eager" or "inductor"'):
        torch.compile(nn.ReLU(), backend=BACKEND, options={"rest": "tvm"})(torch.ones(1, device=DEVICE))


@pytest.mark.thin("Functional")
@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler")
@pytest.mark.parametrize("form", ["Functional", "Residual"])
def test_the_rest_by_inductor(form: str, launches: list[str]) -> None:
    net = FORMS[form]().to(DEVICE)
    compiled = torch.compile(copy.deepcopy(net), backend=BACKEND, options={"rest": "inductor"})
    x = images()
    ours = compiled(x)
    assert len(launches) > 3
    assert_trains_alike(compiled, net, ours, net(x))


def test_a_function_of_any_size(weight: Tensor, launches: list[str]) -> None:
    def blur(x: Tensor) -> Tensor:
        return F.max_pool2d(torch.conv2d(x, weight, padding="same").relu(), (2, 1)).mean((2, 3))

    compiled = torch.compile(blur, backend=BACKEND, dynamic=True, fullgraph=True)
    for n, side in ((1, 8), (3, 8), (2, 11)):
        x = torch.randn(n, 3, side, side, device=DEVICE)
        torch.testing.assert_close(compiled(x), blur(x), rtol=1e-4, atol=1e-5)
    assert len(launches) == 6


def test_a_fused_network_is_recorded_as_pytorchs_layers() -> None:
    net = FusedSequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).to(DEVICE)
    assert operations(lambda x: net(x) + 1, images()) == ["conv2d_relu_max_pool2d"]
    assert operations(lambda x: kernels.conv2d(x, net[0].weight), images()) == []


def runs(function: Callable[..., object], *inputs: object) -> list[str]:
    return [run for segment in operations(function, *inputs) for run in segment.split("__")]


def test_what_is_a_run(weight: Tensor, matrix: Tensor) -> None:
    """Layers called as functions and as methods, with positional and keyword arguments, are recognized as fused runs."""
    x, rows = images(), torch.randn(2, 12, device=DEVICE)
    conv = lambda x: F.conv2d(x, weight)  # noqa: E731
    same = {
        "relu": lambda x: F.relu(conv(x)),
        "relu in place": lambda x: F.relu(conv(x), inplace=True),
        "relu in place by position": lambda x: F.relu(conv(x), True),
        "torch.relu": lambda x: torch.relu(input=conv(x)),
        "torch.relu_": lambda x: torch.relu_(conv(x)),
        "method": lambda x: conv(x).relu(),
        "method in place": lambda x: conv(x).relu_(),
    }
    for name, function in same.items():
        assert runs(function, x) == ["conv2d"], name
    assert runs(lambda x: F.max_pool2d(F.relu(conv(x)), kernel_size=2, stride=2), x) == ["conv2d_relu_max_pool2d"]
    assert runs(lambda x: F.max_pool2d(F.relu(conv(x)), 2, dilation=2), x) == ["conv2d", "max_pool2d"]
    assert runs(lambda x: F.max_pool2d(conv(x), 2, return_indices=True), x) == ["conv2d", "max_pool2d"]
    assert runs(lambda x: F.linear(F.dropout(F.linear(x, matrix).relu(), 0.5), matrix), rows) == [
        "linear_relu_dropout",
        "linear",
    ]
    assert runs(lambda x: F.linear(x, matrix) @ matrix, rows) == ["linear"]
    assert runs(lambda x: F.relu(x), x) == []
    if DEVICE == "cpu":  # PyTorch pools no integers on a GPU
        assert runs(lambda x: F.max_pool2d(x.long(), 2), x) == []
    assert runs(lambda x: F.dropout(x, 0.5, inplace=True), x) == []
    assert runs(lambda x: F.conv2d(x, weight, stride=x.shape[0]), x) == ["conv2d"]


def check(function: Callable[[Tensor], object], x: Tensor) -> None:
    """Assert that a compiled function gives PyTorch's outputs, input after the call, and input gradient (if it has one)."""
    found = []
    for run in (function, torch.compile(function, backend=BACKEND)):
        leaf = x.clone().requires_grad_("input" not in function.__name__)
        given = leaf * 1
        outputs = run(given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if leaf.requires_grad:
            sum((y * torch.linspace(1, 2, y.numel(), device=y.device).view(y.shape)).sum() for y in outputs).backward()
        found.append([*outputs, given, leaf.grad if leaf.requires_grad else given])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_changes_in_place(weight: Tensor) -> None:
    """A call is fused and moved only if in-place changes cannot make a difference."""
    x = images()

    def input_changed_between(x: Tensor) -> Tensor:
        y = F.conv2d(x, weight)
        x.mul_(0)
        return F.relu(y) + x[:, :1, :10, :10]

    def between_two_convolutions(x: Tensor) -> Tensor:
        scale = torch.ones(1, device=x.device)
        y = F.relu(F.conv2d(x.detach(), weight)) * 1
        z = F.relu(F.conv2d(x, weight * scale))
        scale.add_(1)
        return y + F.conv2d(z, weight.new_ones(4, 4, 1, 1) * scale)

    def relu_of_what_a_view_reads(x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv2d(x, weight)
        flat = y.flatten(1)
        y.relu_()
        return flat, F.max_pool2d(y, 2)

    def read_before_the_relu(x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv2d(x, weight)
        before = y + 0
        F.relu(y, inplace=True)
        return before, y

    def returned_and_reused(x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv2d(x, weight)
        return y, F.relu(y)

    def output_changed(x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(F.conv2d(x, weight)), 2)
        y += 1
        y[:, 0] = 3
        return y

    def added_into(x: Tensor) -> Tensor:
        y = F.conv2d(x, weight)
        y += F.conv2d(x, weight).relu_()
        return F.relu(y)

    def a_list_of_branches(x: Tensor) -> Tensor:
        branches = [F.conv2d(x, weight * i) for i in (1, 2, 3)]
        return torch.cat([F.relu(b) for b in branches], 1)

    def out_of_gradients(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.conv2d(x, weight)
        z = F.conv2d(x, weight)
        with torch.no_grad():
            z = F.relu(z)
        return F.relu(y) + z + x[:, :1, :10, :10]

    def operator_methods(x: Tensor) -> Tensor:
        y = F.conv2d(x, weight)
        z = x[:, :1, :10, :10] * 1
        z.__imul__(3)
        return F.relu(y) + z

    def by_itself(x: Tensor) -> Tensor:
        rows = F.linear(x.flatten(1)[:, :9], weight.view(12, 9))
        return F.linear(rows, rows) + F.relu(rows)[:, :2]

    for function in (
        *(
            operator_methods,
            by_itself,
            input_changed_between,
            between_two_convolutions,
            relu_of_what_a_view_reads,
            read_before_the_relu,
        ),
        *(returned_and_reused, output_changed, added_into, a_list_of_branches, out_of_gradients),
    ):
        check(function, x)


def test_dropout_that_the_caller_changes(matrix: Tensor) -> None:
    """The caller may change dropout's output in place: PyTorch's dropout does not save its output."""

    def hidden(x: Tensor) -> Tensor:
        return F.dropout(F.relu(F.linear(x, matrix)), 0.5)

    x = torch.randn(3, 12, device=DEVICE, requires_grad=True)
    y = torch.compile(hidden, backend=BACKEND)(x)
    y.mul_(2)
    y.sum().backward()
    assert x.grad is not None


def test_many_instances_of_a_class_and_sizes(launches: list[str]) -> None:
    """More than the eight variants that the compiler keeps for one function: each module has its own cache."""
    x = images(1)
    for i in range(12):
        net = fuse(FORMS["Functional"]().to(DEVICE)).train(i % 2 == 0)
        launches.clear()
        net(x)
        assert launches
    for n in range(1, 12):
        launches.clear()
        with torch.set_grad_enabled(n % 2 == 0):
            net(images(n))
        assert launches, n


def test_an_embedding_that_renormalizes_its_weight() -> None:
    """The embedding writes in place to the weight that a linear layer has read before."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(1)
        table = nn.Embedding(10, 12, max_norm=0.5).to(DEVICE)

        def tied(x: Tensor, ids: Tensor, table: nn.Embedding = table) -> Tensor:
            y = F.linear(x, table.weight)
            return F.relu(y) + table(ids).sum()

        x, ids = torch.randn(2, 12, device=DEVICE), torch.arange(10, device=DEVICE)
        run = torch.compile(tied, backend=BACKEND) if compiled else tied
        with torch.no_grad():
            found.append(run(x, ids))
    torch.testing.assert_close(*found)
