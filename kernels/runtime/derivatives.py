"""Derivatives without kernels: second and higher derivatives (``create_graph``, ``torch.func``), and forward mode.

A backward pass returns the kernels' gradients. Derivatives of these gradients, of any order, are those of a formula that
computes the same gradients in PyTorch's own operations. The formula takes a ReLU's mask, a pool's positions and a dropout's
seed from the forward pass as constants.

In forward mode the public functions run their references in PyTorch's own operations from the start. If the backward pass of a
graph of plain tensors receives a gradient with a tangent, it returns the formula's result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: ``(ctx, wanted, saved, *grads)``: the results of ``backward(ctx, saved, *grads)`` in PyTorch's own operations. ``wanted``
#: says which of the Function's inputs need a gradient; the result holds None for the others and may omit them at the end.
Formula = Callable[..., tuple[Tensor | None, ...]]


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether an operation on ``tensors`` is differentiated in forward mode; call it only inside a ``forward_ad`` level."""
    # Inside a transform a tensor does not reveal a tangent of a wrapped tensor; there the reference is always right.
    return torch._C._are_functorch_transforms_active() or any(map(is_dual, tensors))


def is_dual(tensor: Tensor | None) -> bool:
    """Whether ``tensor`` itself, not a tensor that it wraps, has a tangent."""
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def _is_mapped(grad: Tensor | None) -> bool:
    """Whether ``grad`` is a batch of ``torch.autograd.grad(..., is_grads_batched=True)``; a Function adds no graph to it."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


def differentiable_by(
    formula: Formula, *, of: Sequence[int] = (), takes_link: bool = False
) -> Callable[[Callable[..., tuple]], Callable[..., tuple]]:
    """Decorate an autograd Function's ``backward(ctx, saved_tensors, *grads)`` so that its results are differentiable.

    The saved tensors are an argument because a checkpointed graph lets each be unpacked only once.

    Args:
        formula: computes the same gradients in PyTorch's own operations.
        of: indices of the saved tensors that the gradients are differentiated with respect to; the others are constants.
        takes_link: whether the first saved tensor is the second one's link (or None).
    """

    def decorate(backward: Callable[..., tuple]) -> Callable[..., tuple]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Any) -> tuple:
            for grad in grads:
                if grad is not None:
                    break
            else:  # no gradient reached any output
                return (None,) * len(ctx.needs_input_grad)
            saved = ctx.saved_tensors
            if not torch.is_grad_enabled() and forward_ad._current_level < 0:
                return backward(ctx, saved, *grads)
            if takes_link and saved[0] is not None:
                link, input, *others = saved
                saved = (link, _LinkedInputFunction.apply(input, link), *others)
            saved = tuple(t if t is None or i in of else t.detach() for i, t in enumerate(saved))
            rule = functools.partial(formula, ctx)
            if (forward_ad._current_level >= 0 and has_tangent(*grads, *saved)) or any(map(_is_mapped, grads)):
                results = rule(ctx.needs_input_grad, saved, *grads)
                return (*results, *[None] * (len(ctx.needs_input_grad) - len(results)))
            with torch.no_grad():
                results = backward(ctx, saved, *grads)
            there = tuple(result is not None for result in results)
            computed = [result for result in results if result is not None]
            passed = iter(_GradientsFunction.apply(rule, there, len(grads), *computed, *grads, *saved))
            return tuple(next(passed) if is_there else None for is_there in there)

        return wrapper

    return decorate


class _GradientsFunction(torch.autograd.Function):
    """Returns gradients that kernels computed. Its backward pass differentiates the formula of these gradients.

    Inputs: the formula, flags of its results that are not None, the number of gradients that it takes; then the results, those
    gradients and the saved tensors.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rule: Formula, there: tuple[bool, ...], grads: int, *tensors: Any):
        return tuple(result.view_as(result) for result in tensors[: sum(there)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.rule, ctx.there, ctx.grads, *tensors = inputs
        ctx.save_for_backward(*tensors[sum(ctx.there) :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *directions: Any):
        taken = ctx.saved_tensors
        first = len(ctx.needs_input_grad) - len(taken)
        chosen = [i for i, needed in enumerate(ctx.needs_input_grad[first:]) if needed]
        given = iter(directions)
        by_input = [next(given) if is_there else None for is_there in ctx.there]
        wanted = tuple(direction is not None for direction in by_input)

        def gradients(*values: Tensor) -> tuple[Tensor, ...]:
            tensors = list(taken)
            for i, value in zip(chosen, values, strict=True):
                tensors[i] = value
            results = ctx.rule(wanted, tuple(tensors[ctx.grads :]), *tensors[: ctx.grads])
            return tuple(result for result, is_wanted in zip(results, wanted, strict=False) if is_wanted)

        results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if any(wanted):
            pulled = _pull_back(gradients, [taken[i] for i in chosen], tuple(d for d in by_input if d is not None))
            for i, result in zip(chosen, pulled, strict=True):
                results[first + i] = result
        return tuple(results)


def _pull_back(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: tuple[Tensor, ...]
) -> Sequence[Tensor | None]:
    """Vector-Jacobian product: ``grads`` of ``function(*inputs)`` to gradients of ``inputs``, differentiable in grad mode."""
    if torch._C._are_functorch_transforms_active():
        return torch.func.vjp(function, *inputs)[1](grads)
    # torch.func.vjp is not used here, because it does not allow hooks on saved tensors.
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [tensor.view_as(tensor) for tensor in inputs]
        pairs = [(y, grad) for y, grad in zip(function(*own), grads, strict=True) if y.requires_grad]
        if not pairs:
            return [None] * len(inputs)
        outputs, grads = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, own, grads, create_graph=create_graph, allow_unused=True)


class _LinkedInputFunction(torch.autograd.Function):
    """The linked input of an operation, as an identity whose backward pass applies the ReLU's mask and sums the gradient.

    A linked input's gradient is the one before the ReLU that produced it, and its link's gradient is the sum of that
    (:class:`kernels.convolution.autograd.Conv2dFunction`). Higher derivatives must follow this rule too, or an unmasked
    gradient would be taken for a masked one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input, link):
        return input.view_as(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        (input,) = ctx.saved_tensors
        dz = grad.masked_fill(input <= 0, 0)
        return dz, dz.sum((0, 2, 3))
