"""Derivatives beyond the first, and forward mode: every operation x what people do with such derivatives.

Each is held to the same use of PyTorch's own operations, in the same dtype and in float64. Dropout has the same seed in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

SEED = 5
Operation = Callable[..., Tensor]


def conv2d(**arguments) -> tuple[Operation, Operation]:
    """The operation and PyTorch's own."""

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
    """Of constant images, which cells are made of."""
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


IMAGES = torch.linspace(-2, 2, 2 * 3 * 7 * 7, device=DEVICE, dtype=torch.float64).sin().view(2, 3, 7, 7)
X, W, B = (2, 3, 5, 5), (4, 3, 3, 3), (4,)
ROWS, MATRIX = (5, 6), (4, 6)

#: Operation, PyTorch's own, sizes of the tensors.
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
    """With derivatives of every order."""
    return operation(*tensors).sin().sum()


def directions(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of the sizes of ``tensors``, never zero."""
    return tuple(torch.linspace(-1, 1, t.numel(), device=t.device).cos().view(t.shape).to(t.dtype) for t in tensors)


def every(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


def gradient_penalty(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """As of a critic: the loss and the norm of the input's gradient, in one backward pass."""
    loss = loss_of(operation, *tensors)
    (grad,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    (loss + grad.square().sum()).backward()
    return [tensor.grad for tensor in tensors]


def penalty_alone(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of all gradients, without the loss."""
    grads = torch.autograd.grad(loss_of(operation, *tensors), tensors, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)


def of_the_output_gradient(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Forward mode by two backward passes."""
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
    """The graph was made before forward mode began."""
    y, pull = torch.func.vjp(operation, *tensors)
    return torch.func.jvp(pull, (torch.ones_like(y),), directions([y]))[1]


def dual(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, directions(tensors), strict=True)]
        return forward_ad.unpack_dual(operation(*duals))


def dual_of_the_last_alone(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Forward over reverse, in one direction: the other tensors are plain ones."""
    with forward_ad.dual_level():
        *plain, last = tensors
        given = [*plain, forward_ad.make_dual(last, *directions([last]))]
        grads = torch.autograd.grad(loss_of(operation, *given), tensors)
        return [forward_ad.unpack_dual(grad).tangent for grad in grads]


def dual_output_gradient(operation: Operation, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """A graph of plain tensors, and a gradient with a tangent."""
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
    """Values in (-0.7, 0.7) far enough apart that no rounding moves a maximum."""
    count = torch.Size(size).numel()
    return ((torch.randperm(count, device=DEVICE) - count / 2 + 0.25) * (1.4 / count)).view(size).to(dtype).requires_grad_()


def assert_as(use: Callable[..., Sequence[Tensor]], ours: Operation, reference: Operation, tensors: Sequence[Tensor]) -> None:
    """The tolerance rule, of everything that ``use`` returns."""

    def results(operation: Operation, dtype: torch.dtype) -> list[Tensor]:
        found = use(operation, [t.detach().to(dtype).requires_grad_() for t in tensors])
        return [torch.zeros((), device=DEVICE, dtype=dtype) if result is None else result.detach() for result in found]

    dtype = tensors[0].dtype
    exact = results(reference, torch.float64)
    for i, (got, peer, truth) in enumerate(zip(results(ours, dtype), results(reference, dtype), exact, strict=True)):
        # Rounding of the first derivatives is part of all later ones, and the peer's may happen to cancel.
        inherent = 8 * torch.finfo(dtype).eps * truth.abs().max().item()
        assert_within_tolerance(f"{use.__name__}, result {i}", got, peer, truth, inherent=inherent)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d in (torch.float32, torch.float64)], ids=dtype_id)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("name", OPERATIONS)
def test_as_pytorchs_operations(name: str, use: Callable, dtype: torch.dtype) -> None:
    (ours, reference), sizes = OPERATIONS[name]
    assert_as(use, ours, reference, [distinct(size, dtype) for size in sizes])
