"""The operators under the autograd Functions pass PyTorch's opcheck: schema, fake implementation, dynamic shapes."""

from __future__ import annotations

import re

import pytest
import torch

import kernels
from kernels import dropouts as drop
from kernels import losses
from kernels import matrix_product as lin
from kernels.convolution import autograd as conv
from kernels.convolution import cells
from kernels.convolution import relu_max_pool2d as block
from kernels.pooling import autograd as pool

from ..conftest import DEVICE, own_devices


def _randn(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, requires_grad=grad)


def _channels_last(*shape: int) -> torch.Tensor:
    return _randn(*shape).to(memory_format=torch.channels_last)


def _half(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).half().requires_grad_(grad)


#: AlexNet's first layer on small images: weight, bias, link, stride, padding, dilation, groups, sizes and windows.
STRIDED = (
    *(_half(16, 1, 11, 11, grad=True), _half(16, grad=True), None, [4, 4], [1, 1], [1, 1], 1, [8, 9]),
    *([3, 3], [2, 2], [0, 0], [3, 4]),
)
GEOMETRY = ([2, 1], [1, 0], [1, 2], 2)


def _labels() -> torch.Tensor:
    return torch.tensor([0, 2, losses.IGNORED, 1, 2], device=DEVICE)


def _pooled() -> tuple[torch.Tensor, torch.Tensor]:
    y, position, _ = pool.max_pool2d_fprop(_randn(2, 4, 7, 9), [3, 3], [2, 2], [0, 0], [1, 1], [3, 4], True, True, True, False)
    return y, position


SAMPLES = {
    "conv2d_fprop": lambda: (
        conv.conv2d_fprop,
        (
            _randn(2, 4, 7, 9, grad=True),
            _randn(6, 2, 3, 3, grad=True),
            _randn(6, grad=True),
            None,
            *GEOMETRY,
            [4, 5],
            True,
            False,
        ),
    ),
    "conv2d_fprop_without_a_gradient": lambda: (
        conv.conv2d_fprop,
        (_randn(2, 4, 7, 9), _randn(6, 2, 3, 3), None, None, *GEOMETRY, [4, 5], False, False),
    ),
    "conv2d_relu_max_pool2d_fprop": lambda: (
        block.conv2d_relu_max_pool2d_fprop,
        (
            *(_randn(2, 4, 7, 9, grad=True), _randn(6, 2, 3, 3, grad=True), _randn(6, grad=True), None, *GEOMETRY, [4, 5]),
            *([3, 3], [2, 2], [1, 1], [2, 3], True, True, False),
        ),
    ),
    "conv2d_fprop_of_a_linked_input": lambda: (
        conv.conv2d_fprop,
        (
            *(_randn(2, 4, 7, 9, grad=True), _randn(6, 2, 3, 3, grad=True), _randn(6, grad=True), _randn(4, grad=True)),
            *(*GEOMETRY, [4, 5], True, True),
        ),
    ),
    "conv2d_backward": lambda: (
        conv.conv2d_backward,
        (
            _randn(2, 6, 4, 5),
            _channels_last(2, 4, 7, 9),
            _randn(6, 2, 3, 3),
            _channels_last(2, 6, 4, 5),
            *GEOMETRY,
            [True] * 3,
            True,
        ),
    ),
    "conv2d_backward_of_the_weight_alone": lambda: (
        conv.conv2d_backward,
        (_randn(2, 6, 4, 5), _randn(2, 4, 7, 9), _randn(6, 2, 3, 3), None, *GEOMETRY, [False, True, False], False),
    ),
    "conv2d_relu_max_pool2d_backward": lambda: (
        block.conv2d_relu_max_pool2d_backward,
        (
            *(_randn(2, 4, 3, 4), _channels_last(2, 2, 9, 11), None, _randn(4, 2, 3, 3), _pooled()[1], [2, 2, 9, 11]),
            *([1, 1], [0, 0], [1, 1], 1, [7, 9], [3, 3], [2, 2], [0, 0], [True] * 3, True),
        ),
    ),
    "conv2d_fprop_of_half_precision": lambda: (
        conv.conv2d_fprop,
        (
            *(_half(2, 16, 5, 6, grad=True), _half(32, 16, 3, 3, grad=True), _half(32, grad=True), _half(16, grad=True)),
            *([1, 1], [1, 1], [1, 1], 1, [5, 6], True, True),
        ),
    ),
    "conv2d_backward_of_half_precision": lambda: (
        conv.conv2d_backward,
        (
            *(_half(2, 32, 5, 6), _half(2, 16, 5, 6).to(memory_format=torch.channels_last), _half(32, 16, 3, 3)),
            *(_half(2, 32, 5, 6).to(memory_format=torch.channels_last), [1, 1], [1, 1], [1, 1], 1, [True] * 3, True),
        ),
    ),
    "conv2d_relu_max_pool2d_fprop_of_half_images": lambda: (
        block.conv2d_relu_max_pool2d_fprop,
        (_half(2, 1, 39, 43, grad=True), *STRIDED, True, True, False),
    ),
    "conv2d_relu_max_pool2d_fprop_of_cells": lambda: (
        block.conv2d_relu_max_pool2d_fprop,
        (_half(2, 10, 11, 16), *STRIDED[:4], [0, 0], *STRIDED[5:], True, True, True),
    ),
    "conv2d_relu_max_pool2d_backward_of_cells": lambda: (
        block.conv2d_relu_max_pool2d_backward,
        (
            *(_half(2, 16, 3, 4), None, _half(2, 10, 11, 16), _half(16, 1, 11, 11)),
            torch.randint(0, 9, (2, 16, 3, 4), dtype=torch.uint8, device=DEVICE).to(memory_format=torch.channels_last),
            *([2, 1, 39, 43], *STRIDED[3:7], STRIDED[7], *STRIDED[8:11], [False, True, True], False),
        ),
    ),
    "space_to_depth_cells": lambda: (cells.space_to_depth_cells, (_randn(2, 1, 27, 23), 4, [1, 1], [5, 4], [11, 11])),
    "max_pool2d_fprop": lambda: (
        pool.max_pool2d_fprop,
        (_randn(2, 4, 7, 9, grad=True), [3, 3], [2, 2], [0, 0], [1, 1], [3, 4], False, False, True, True),
    ),
    "max_pool2d_dgrad": lambda: (
        pool.max_pool2d_dgrad,
        (*_pooled(), [2, 4, 7, 9], [3, 3], [2, 2], [0, 0], [1, 1], True, True, True),
    ),
    "max_pool2d_dgrad_of_the_bias_alone": lambda: (
        pool.max_pool2d_dgrad,
        (*_pooled(), [2, 4, 7, 9], [3, 3], [2, 2], [0, 0], [1, 1], True, False, True),
    ),
    "linear_fprop": lambda: (
        lin.linear_fprop,
        (
            *(_randn(5, 7, grad=True), _randn(3, 7, grad=True), _randn(3, grad=True)),
            *(torch.tensor(5, device=DEVICE), 0.5, True),
        ),
    ),
    "linear_dgrad": lambda: (lin.linear_dgrad, (_randn(5, 3), _randn(3, 7))),
    "linear_wgrad": lambda: (lin.linear_wgrad, (_randn(5, 3), _randn(5, 7), _randn(3, 7))),
    "linear_epilogue_backward": lambda: (
        lin.linear_epilogue_backward,
        (_randn(5, 3), _randn(5, 3), torch.tensor(5, device=DEVICE), 0.5, True, True),
    ),
    "linear_narrow_backward": lambda: (
        lin.linear_narrow_backward,
        (
            *(_randn(5, 3), _randn(5, 7), _randn(3, 7), _randn(5, 3)),
            *(torch.tensor(5, device=DEVICE), 0.5, [True, True, True]),
        ),
    ),
    "linear_narrow_backward_of_the_weight_alone": lambda: (
        lin.linear_narrow_backward,
        (_half(5, 3), _half(5, 7), _half(3, 7), None, None, 0.0, [False, True, False]),
    ),
    "cross_entropy_fprop": lambda: (
        losses.cross_entropy_fprop,
        (_randn(5, 3, grad=True), _labels(), torch.rand(3, device=DEVICE), 0.1, "mean", False, True),
    ),
    "cross_entropy_fprop_without_a_gradient": lambda: (
        losses.cross_entropy_fprop,
        (_half(5, 3), _labels(), None, 0.0, "none", True, False),
    ),
    "cross_entropy_dgrad": lambda: (
        losses.cross_entropy_dgrad,
        (_randn(), _randn(5, 3), _labels(), torch.tensor(3.0, device=DEVICE), "mean"),
    ),
    "dropout_apply": lambda: (drop.dropout_apply, (_randn(5, 3, grad=True), torch.tensor(5, device=DEVICE), 0.5)),
    "dropout_keep_mask": lambda: (drop.dropout_keep_mask, ([5, 3], torch.tensor(5, device=DEVICE), 0.5)),
}


def test_every_operator_has_a_sample() -> None:
    modules = (conv, block, cells, drop, lin, losses, pool)
    operators = {n for m in modules for n, v in vars(m).items() if isinstance(v, torch.library.CustomOpDef)}
    assert operators == {re.split("_of_|_without_", name)[0] for name in SAMPLES}


@pytest.mark.slow
@own_devices
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A link holds no data, and opcheck cannot compare uninitialized memory.
    monkeypatch.setattr(conv, "_new_link", lambda weight, make_link: weight.new_zeros(weight.shape[0] if make_link else 0))
    operator, arguments = SAMPLES[name]()
    torch.library.opcheck(operator, arguments)


@pytest.mark.thin("False")
@own_devices
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_network_compiles_as_one_graph_for_any_batch(dynamic: bool) -> None:
    """Forward and backward with every kind of run; the compiled gradients equal the eager ones."""
    from alexnet_triton import FusedSequential

    from ..alexnet_triton.test_fused import small_layers

    net = FusedSequential(*small_layers(dropout=0.0)).to(DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3, 5):
        x = _randn(batch, 3, 18, 18)
        results = [torch.autograd.grad(f(x).square().sum(), list(net.parameters())) for f in (compiled, net)]
        for ours, eager in zip(*results, strict=True):
            assert torch.equal(ours, eager)


def _linear(x: torch.Tensor) -> torch.Tensor:
    return kernels.linear(x, torch.arange(64.0, device=DEVICE).view(4, 16) / 64, activation="relu")


def _negated() -> torch.Tensor:
    """A tensor that is lazily negated: PyTorch shows the negative of the numbers in memory."""
    x = torch.randn(3, 16, dtype=torch.complex64, device=DEVICE).conj().imag
    assert x.is_neg()
    return x


@own_devices
def test_a_lazily_negated_tensor_has_the_sign_it_says() -> None:
    x = _negated()
    torch.testing.assert_close(_linear(x), _linear(x.resolve_neg().clone()))
    image = x.view(1, 3, 4, 4)
    weight = torch.randn(2, 3, 3, 3, device=DEVICE)
    copy = image.resolve_neg().clone()
    torch.testing.assert_close(kernels.conv2d(image, weight), kernels.conv2d(copy, weight))
    assert torch.equal(kernels.max_pool2d(image, 2), kernels.max_pool2d(copy, 2))


@own_devices
def test_so_has_a_lazily_negated_gradient() -> None:
    x = torch.randn(3, 4, 4, 16, device=DEVICE)[:, 0, 0].requires_grad_()
    grad = _negated()[:, :4]
    ours, expected = (torch.autograd.grad(_linear(x), x, g)[0] for g in (grad, grad.resolve_neg().clone()))
    assert torch.equal(ours, expected)


@own_devices
def test_a_tensor_of_zeros_without_memory() -> None:
    zeros = torch._efficientzerotensor((3, 16), device=DEVICE)
    assert torch.equal(_linear(zeros), _linear(torch.zeros(3, 16, device=DEVICE)))


@own_devices
def test_batched_gradients() -> None:
    x = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    y = _linear(x)
    grads = torch.randn(2, *y.shape, device=DEVICE)
    (together,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    for one, grad in zip(together, grads, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(y, x, grad, retain_graph=True)[0])


@own_devices
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_trace_of_real_tensors(pre_dispatch: bool) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(3, 16, device=DEVICE)
    graph = make_fx(_linear, pre_dispatch=pre_dispatch, tracing_mode="real")(x)
    other = torch.randn(3, 16, device=DEVICE)
    assert torch.equal(graph(other), _linear(other))


@own_devices
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_jit_trace() -> None:
    traced = torch.jit.trace(_linear, torch.randn(3, 16, device=DEVICE))
    other = torch.randn(3, 16, device=DEVICE)
    assert torch.equal(traced(other), _linear(other))


@own_devices
def test_plain_eager_code_does_without_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls through the dispatcher would only cost host time, which no other test sees."""

    def refuse(self: object, *_: object) -> None:
        raise AssertionError("called through the dispatcher")

    x = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(2, 3, 3, 3, device=DEVICE))
    monkeypatch.setattr(torch.library.CustomOpDef, "__call__", refuse)
    _linear(x).sum().backward()
    kernels.conv2d(torch.randn(1, 3, 4, 4, device=DEVICE), weight).sum().backward()
    with torch.inference_mode():
        _linear(x)
    with pytest.raises(AssertionError, match="through the dispatcher"):
        _linear(_negated())
