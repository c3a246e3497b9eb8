"""A backward pass that refuses to be differentiated itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class _RefuseFunction(torch.autograd.Function):
    """Passes a gradient through, hanging in the graph on all that it was computed from; differentiating it raises."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient, *computed_from):
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any):
        raise RuntimeError(
            f"{ctx.name} cannot be differentiated twice (its backward pass is a Triton kernel): for a gradient of a gradient "
            'use the PyTorch operation, or kernels.use_backend("torch")'
        )


def once_differentiable(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """For the ``backward(ctx, saved_tensors, *grads)`` of an autograd Function: a double backward is a clear error.

    The saved tensors are handed over because a checkpointed graph lets each be unpacked only once.

    PyTorch's own decorator of this name only notices when the incoming gradient requires a gradient; for the common
    ``grad(loss, x, create_graph=True)`` it does not, and the second derivative silently lacks this term.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> tuple:
        saved = ctx.saved_tensors
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return results
        computed_from = [t for t in (*grads, *saved) if isinstance(t, torch.Tensor) and t.requires_grad]
        name = type(ctx).__name__.removesuffix("FunctionBackward")
        return tuple(r if r is None else _RefuseFunction.apply(name, r, *computed_from) for r in results)

    return wrapper
