"""Higher derivatives and forward mode: every operation in every common use of such derivatives.

Each is compared with the same use of PyTorch's operations in the same dtype and in float64, with equal dropout seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import kernels
from kernels.dropouts import dropout_reference
from kernels.matrix_product import linear_relu_dropout_reference

from ..conftest import DEVICE
from ..oracle import DTYPES, assert_within_tolerance, dtype_id

#: Other tests run the same kernels under ttsem.
pytestmark = pytest.mark.slow_under_ttsem

SEED = 5
Operation = Callable[..., Tensor]


def conv2d(**arguments) -> tuple[Operation, Operation]:
    """Our operation with ``arguments``, and PyTorch's."""

    def reference(*tensors: Tensor) -> Tensor:
        y = F.conv2d(*tensors, **{k: v for k, v in arguments.items() if k != "activation"})
        return F.relu(y) if "activation" in arguments else y

    return lambda *tensors: kernels.conv2d(*tensors, **arguments), reference


def block(pool: dict, output_format: torch.memory_format | None = None, **arguments) -> tuple[Operation, Operation]:
    named = {f"pool_{name}": value for name, value in pool.items() if name != "ceil_mode"}
    if "ceil_mode" in pool:
        named["ceil_mode"] = pool["ceil_mode"]

    def ours(*tensors: Tensor) -> Tensor:
        return kernels.conv2d_relu_max_pool2d(*tensors, **arguments, **named, output_format=output_format)

    return ours, lambda *tensors: F.max_pool2d(F.relu(F.conv2d(*tensors, **arguments)), **pool)


def max_pool2d(**arguments) -> tuple[Operation, Operation]:
    return lambda x: kernels.max_pool2d(x, **arguments), lambda x: F.max_pool2d(x, **arguments)


def cells(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """A block on cells made of constant images, times ``x``."""
    made = kernels.space_to_depth(IMAGES.to(w), w.shape[2:], 2, 1)
    return kernels.conv2d_relu_max_pool2d(made, w, b, stride=2, pool_kernel_size=2, cells=True) * x


def cells_reference(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(IMAGES.to(w), w, b, stride=2, padding=1)), 2) * x


def linked(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor) -> Tensor:
    y, link = kernels.linked_conv2d(x, w1, b1)
    assert link is not None or forward_ad._current_level >= 0
    y, link = kernels.linked_conv2d(y, w2, b2, padding=1, link=link)
    return kernels.conv2d(y, w3, link=link)


def linked_reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor) -> Tensor:
    return F.conv2d(F.relu(F.conv2d(F.relu(F.conv2d(x, w1, b1)), w2, b2, padding=1)), w3)


def linked_block(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    y, link = kernels.linked_conv2d(x, w1, b1)
    return kernels.conv2d_relu_max_pool2d(y, w2, b2, padding=1, pool_kernel_size=2, link=link)


def linked_block_reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(F.relu(F.conv2d(x, w1, b1)), w2, b2, padding=1)), 2)


def cross_entropy(*, weight: bool = False, **options: Any) -> tuple[Operation, Operation]:
    """Our operation and PyTorch's with six classes; one row in four is ignored."""

    def of(function: Callable[..., Tensor]) -> Operation:
        def loss(x: Tensor) -> Tensor:
            labels = (torch.arange(x.numel() // 6, device=x.device) * 5 % 6).view(x.shape[:1] + x.shape[2:])
            labels = torch.where(labels % 4 == 3, -100, labels)
            weights = torch.linspace(0.5, 1.5, 6, dtype=x.dtype, device=x.device) if weight else None
            return function(x, labels, weight=weights, **options)

        return loss

    return of(kernels.cross_entropy), of(F.cross_entropy)


IMAGES = torch.linspace(-2, 2, 2 * 3 * 7 * 7, device=DEVICE, dtype=torch.float64).sin().view(2, 3, 7, 7)
X, W, B = (2, 3, 5, 5), (4, 3, 3, 3), (4,)
ROWS, MATRIX = (5, 6), (4, 6)

#: (our operation, PyTorch's), sizes of the tensors.
OPERATIONS: dict[str, tuple[tuple[Operation, Operation], tuple[tuple[int, ...], ...]]] = {
    "conv2d": (conv2d(), (X, W, B)),
    "conv2d_relu": (conv2d(activation="relu", padding=1), (X, W, B)),
    "conv2d_no_bias": (conv2d(activation="relu", stride=2, padding=(1, 0)), (X, W)),
    "conv2d_rows_left_over": (conv2d(stride=3), (X, W, B)),
    "conv2d_same": (conv2d(padding="same"), (X, (4, 3, 2, 4), B)),
    "conv2d_same_dilated": (conv2d(padding="same", dilation=(1, 3), activation="relu"), (X, (4, 3, 4, 2), B)),
    "conv2d_groups": (conv2d(groups=3, dilation=2, padding=2, activation="relu"), (X, (6, 1, 3, 3), (6,))),
    "conv2d_one_image": (conv2d(activation="relu"), ((3, 5, 5), W, B)),
    "linked": (
        (linked, linked_reference),
        (X, W, B, (3, 4, 3, 3), (3,), (2, 3, 1, 1)),
    ),
    "linked_block": ((linked_block, linked_block_reference), (X, W, B, (3, 4, 3, 3), (3,))),
    "block": (block({"kernel_size": 2}, padding=1), (X, W, B)),
    "block_overlapping": (
        block({"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}, torch.contiguous_format, padding="same"),
        (X, (4, 3, 2, 3), B),
    ),
    "block_one_image": (block({"kernel_size": 2}, stride=2, padding=2, groups=3), ((3, 5, 5), (6, 1, 3, 3))),
    "block_cells": ((cells, cells_reference), ((2, 4, 2, 2), (4, 3, 3, 3), B)),
    "max_pool2d": (max_pool2d(kernel_size=3, stride=2, padding=1, ceil_mode=True), (X,)),
    "max_pool2d_dilated": (max_pool2d(kernel_size=2, stride=1, dilation=2), ((3, 5, 5),)),
    "max_pool2d_indices": (
        (lambda x: kernels.max_pool2d(x, 2, return_indices=True)[0], lambda x: F.max_pool2d(x, 2)),
        (X,),
    ),
    "linear": ((kernels.linear, F.linear), (ROWS, MATRIX, B)),
    "linear_relu": (
        (lambda *t: kernels.linear(*t, activation="relu"), lambda *t: F.relu(F.linear(*t))),
        ((2, 3, 6), MATRIX, B),
    ),
    "linear_vector": ((kernels.linear, F.linear), (ROWS, (6,))),
    "linear_one_bias": ((kernels.linear, F.linear), (ROWS, MATRIX, (1,))),
    "linear_relu_dropout": (
        (
            lambda *t: kernels.linear_relu_dropout(*t, seed=SEED),
            lambda *t: linear_relu_dropout_reference(*t, 0.5, torch.tensor(SEED, device=DEVICE)),
        ),
        (ROWS, MATRIX, B),
    ),
    "cross_entropy": (cross_entropy(weight=True, reduction="none"), (ROWS,)),
    "cross_entropy_of_pixels": (cross_entropy(reduction="none"), ((2, 6, 3),)),
    "dropout": (
        (
            lambda x: kernels.dropout(x, seed=SEED),
            lambda x: dropout_reference(x, 0.5, torch.tensor(SEED, device=DEVICE)),
        ),
        (ROWS,),
    ),
}


# ----------------------------------------------------------------------------------------- what people do with them


def loss_of(operation: Operation, *tensors: Tensor) -> Tensor:
    """A scalar with nonzero derivatives of every order."""
    return operation(*tensors).sin().sum()


def directions(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tangents of the sizes of ``tensors``, without zeros."""
    return tuple(torch.linspace(-1, 1, t.numel(), device=t.device).cos().view(t.shape).to(t.dtype) for t in tensors)


def every(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


def gradient_penalty(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """As for a critic: loss and squared norm of the input's gradient in one backward pass."""
    loss = loss_of(operation, *tensors)
    (grad,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    (loss + grad.square().sum()).backward()
    return [tensor.grad for tensor in tensors]


def penalty_alone(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The squared norm of all gradients, without the loss."""
    grads = torch.autograd.grad(loss_of(operation, *tensors), tensors, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)


def of_the_output_gradient(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Forward mode as two backward passes."""
    y = operation(*tensors)
    cotangent = torch.zeros_like(y, requires_grad=True)
    grads = torch.autograd.grad(y, tensors, cotangent, create_graph=True)
    return torch.autograd.grad(grads, cotangent, directions(tensors))


def third_order(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    grads = torch.autograd.grad(loss_of(operation, *tensors), tensors, create_graph=True)
    grads = torch.autograd.grad(grads, tensors, directions(tensors), create_graph=True)
    return torch.autograd.grad(grads, tensors, directions(tensors))


def meta_learning(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradient through two inner steps."""
    fast = tensors
    for _ in range(2):
        grads = torch.autograd.grad(loss_of(operation, *fast), fast, create_graph=True)
        fast = [tensor - 0.01 * grad for tensor, grad in zip(fast, grads, strict=True)]
    return torch.autograd.grad(loss_of(operation, *fast), tensors)


def saved_on_the_host(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    with torch.autograd.graph.save_on_cpu():
        return penalty_alone(operation, tensors)


def functional_hvp(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.functional.hvp(lambda *t: loss_of(operation, *t), tuple(tensors), directions(tensors))[1]


def batched_gradients(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """As ``torch.autograd.functional.jacobian(..., create_graph=True, vectorize=True)`` does."""
    y = operation(*tensors)
    several = torch.stack([torch.ones_like(y), *directions([y])])
    grads = torch.autograd.grad(y.sin(), tensors, several, is_grads_batched=True, create_graph=True)
    return [*grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)]


def func_grad_of_grad(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    def inner(*given: Tensor) -> Tensor:
        grads = torch.func.grad(lambda *t: loss_of(operation, *t), every(tensors))(*given)
        return sum(grad.square().sum() for grad in grads)

    return torch.func.grad(inner, every(tensors))(*tensors)


def func_jvp(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.func.jvp(operation, tuple(tensors), directions(tensors))


def func_jvp_of_grad(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Forward over reverse."""
    grad = torch.func.grad(lambda *t: loss_of(operation, *t), every(tensors))
    return torch.func.jvp(grad, tuple(tensors), directions(tensors))[1]


def func_grad_of_jvp(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Reverse over forward."""

    def derivative(*given: Tensor) -> Tensor:
        return torch.func.jvp(lambda *t: loss_of(operation, *t), given, directions(given))[1]

    return torch.func.grad(derivative, every(tensors))(*tensors)


def func_jvp_of_vjp(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The graph is recorded before forward mode begins."""
    y, pull = torch.func.vjp(operation, *tensors)
    return torch.func.jvp(pull, (torch.ones_like(y),), directions([y]))[1]


def dual(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, directions(tensors), strict=True)]
        return forward_ad.unpack_dual(operation(*duals))


def dual_of_the_last_alone(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Forward over reverse in one direction: only the last tensor has a tangent."""
    with forward_ad.dual_level():
        *plain, last = tensors
        given = [*plain, forward_ad.make_dual(last, *directions([last]))]
        grads = torch.autograd.grad(loss_of(operation, *given), tensors)
        return [forward_ad.unpack_dual(grad).tangent for grad in grads]


def dual_output_gradient(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The output gradient has a tangent; the graph was recorded without."""
    y = operation(*tensors)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(y, tensors, forward_ad.make_dual(torch.ones_like(y), *directions([y])))
        return [part for grad in grads for part in forward_ad.unpack_dual(grad)]


USES = [
    gradient_penalty,
    penalty_alone,
    of_the_output_gradient,
    third_order,
    meta_learning,
    saved_on_the_host,
    functional_hvp,
    batched_gradients,
    func_grad_of_grad,
    func_jvp,
    func_jvp_of_grad,
    func_grad_of_jvp,
    func_jvp_of_vjp,
    dual,
    dual_of_the_last_alone,
    dual_output_gradient,
]


def distinct(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values in (-0.7, 0.7), far enough apart that rounding moves no maximum."""
    count = max(1, torch.Size(size).numel())
    values = (torch.randperm(count, device=DEVICE) - count / 2 + 0.25) * (1.4 / count)
    return values[: torch.Size(size).numel()].view(size).to(dtype).requires_grad_()


def assert_as(use: Callable[..., Sequence[Tensor]], ours: Operation, reference: Operation, tensors: Sequence[Tensor]) -> None:
    """Check everything that ``use`` returns by the tolerance rule."""

    def results(operation: Operation, dtype: torch.dtype) -> list[Tensor]:
        found = use(operation, [t.detach().to(dtype).requires_grad_() for t in tensors])
        return [torch.zeros((), device=DEVICE, dtype=dtype) if result is None else result.detach() for result in found]

    dtype = tensors[0].dtype
    exact = results(reference, torch.float64)
    for i, (got, peer, truth) in enumerate(zip(results(ours, dtype), results(reference, dtype), exact, strict=True)):
        # Errors of the first derivatives enter all later ones, and the peer's may cancel by chance.
        inherent = 16 * torch.finfo(dtype).eps * truth.abs().max().item()
        assert_within_tolerance(f"{use.__name__}, result {i}", got, peer, truth, inherent=inherent)


@pytest.mark.thin
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d in (torch.float32, torch.float64)], ids=dtype_id)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("name", OPERATIONS)
def test_as_pytorchs_operations(name: str, use: Callable, dtype: torch.dtype) -> None:
    (ours, reference), sizes = OPERATIONS[name]
    assert_as(use, ours, reference, [distinct(size, dtype) for size in sizes])


# --------------------------------------------------------------------------------------------------- special cases


def integers(*size: int, dtype: torch.dtype) -> Tensor:
    """-1, 0 and 1: a convolution's sums of such products are exact in every dtype."""
    return torch.randint(-1, 2, size, device=DEVICE).to(dtype).requires_grad_()


def _stem(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return kernels.conv2d_relu_max_pool2d(x, w, b, stride=4, padding=2, pool_kernel_size=3, pool_stride=2)


def _stem_of_cells(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    made = kernels.space_to_depth(x.detach(), 11, 4, 2)
    return kernels.conv2d_relu_max_pool2d(made, w, b, stride=4, pool_kernel_size=3, pool_stride=2, cells=True)


def _stem_reference(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, w, b, stride=4, padding=2)), 3, 2)


@pytest.mark.parametrize("func", [False, True], ids=["autograd", "func"])
@pytest.mark.parametrize("ours", [_stem, _stem_of_cells], ids=["images", "cells"])
def test_a_first_layer_that_reads_cells(ours: Operation, func: bool) -> None:
    """The weight's gradient is differentiable in the images, although the cells made of them were saved."""
    tensors = [integers(*size, dtype=torch.float16) for size in ((2, 1, 35, 31), (16, 1, 11, 11), (16,))]
    if DEVICE == "cpu":
        assert kernels.reads_cells(tensors[0], tensors[1], 4)
    images = 0 if ours is _stem else 1  # no gradient reaches the images through cells

    def penalty(operation: Operation, given: Sequence[Tensor]) -> Sequence[Tensor]:
        def of(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            if func:
                grads = torch.func.grad(lambda w, b: operation(x, w, b).square().sum(), (0, 1))(w, b)
            else:
                grads = torch.autograd.grad(operation(x, w, b).square().sum(), (w, b), create_graph=True)
            return sum(grad.float().square().mean() for grad in grads)

        if func:
            return torch.func.grad(of, (0, 1, 2))(*given)[images:]
        return torch.autograd.grad(of(*given), given[images:])

    assert_as(penalty, ours, _stem_reference, tensors)


@pytest.mark.parametrize("use", [penalty_alone, func_grad_of_grad, func_jvp_of_grad], ids=lambda use: use.__name__)
@pytest.mark.parametrize("name", ["conv2d_relu", "block", "max_pool2d", "linear_relu", "dropout"])
def test_an_empty_batch(name: str, use: Callable) -> None:
    (ours, reference), (size, *others) = OPERATIONS[name]
    tensors = [distinct(s, torch.float32) for s in ((0, *size[1:]), *others)]
    for got, due in zip(use(ours, tensors), use(reference, tensors), strict=True):
        assert torch.equal(got, due)


def test_a_window_that_lets_nothing_pass() -> None:
    """Every value is below zero, or a window lies in the padding alone."""
    x = -distinct((1, 2, 6, 6), torch.float32).detach().abs() - 1
    tensors = [x.requires_grad_(), torch.eye(2, device=DEVICE).view(2, 2, 1, 1).requires_grad_()]
    assert_as(penalty_alone, *block({"kernel_size": 2}), tensors)
    assert all(not grad.any() for grad in penalty_alone(block({"kernel_size": 2})[0], tensors))
    pixel = distinct((1, 2, 1, 1), torch.float32)
    for result in of_the_output_gradient(max_pool2d(kernel_size=2, padding=1, dilation=2)[0], [pixel]):
        assert not result.any()


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_gradients_are_those_of_the_kernels(name: str) -> None:
    """Gradients are bit-identical, recorded for differentiation or not."""
    (ours, _), sizes = OPERATIONS[name]
    tensors = [distinct(size, torch.float32) for size in sizes]
    expected = torch.autograd.grad(loss_of(ours, *tensors), tensors)
    differentiable = torch.autograd.grad(loss_of(ours, *tensors), tensors, create_graph=True)
    func = torch.func.grad(lambda *t: loss_of(ours, *t), every(tensors))(*tensors)
    for due, *got in zip(expected, differentiable, func, strict=True):
        assert all(torch.equal(due, g) for g in got)


def test_a_plain_tensor_beside_a_dual_one_runs_the_kernel(launches: list[str]) -> None:
    x, other = torch.randn(4, 6, device=DEVICE), torch.randn(4, 6, device=DEVICE)
    with forward_ad.dual_level():
        forward_ad.make_dual(other, other)
        kernels.dropout(x)
        assert launches == ["_dropout_kernel"]
        kernels.dropout(forward_ad.make_dual(other, other))
    assert launches == ["_dropout_kernel"]


@pytest.mark.parametrize("level", ["func", "dual"])
def test_an_operator_by_itself_refuses_forward_mode(level: str) -> None:
    """PyTorch would drop the tangent, as in a graph exported by ``torch.export``."""
    x, w = torch.randn(1, 1, 4, 4, device=DEVICE), torch.randn(1, 1, 1, 1, device=DEVICE)

    def operator(x: Tensor) -> Tensor:
        return torch.ops.alexnet_triton.conv2d_fprop(x, w, None, None, [1, 1], [0, 0], [1, 1], 1, [4, 4], False, False)[0]

    def differentiate() -> None:
        if level == "func":
            torch.func.jvp(operator, (x,), (x,))
        else:
            with forward_ad.dual_level():
                operator(forward_ad.make_dual(x, x))

    with pytest.raises(NotImplementedError, match="conv2d_fprop has no forward-mode derivative"):
        differentiate()
