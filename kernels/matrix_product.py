"""Linear layer with fused bias, ReLU and dropout: forward, input gradient, weight gradient.

The order is Linear -> ReLU -> Dropout, as in d2l's AlexNet and as the name ``linear_relu_dropout`` says. All three passes are
one matrix product over different strides:

    forward          y[m, n]  = sum over k  x[m, k] w[n, k]      M = batch  N = out  K = in
    input gradient   dx[m, n] = sum over k  dz[m, k] w[k, n]     M = batch  N = in   K = out
    weight gradient  dw[m, n] = sum over k  dz[k, m] x[k, n]     M = out    N = in   K = batch

:mod:`kernels.matmul` computes the product.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .dropouts import draw_seed, dropout_reference, seed_of_reference
from .linear_narrow import narrow_backward, narrow_fprop
from .linear_rules import NARROW_OUTPUTS
from .matmul import matmul
from .matmul_finish import Epilogue
from .runtime.arguments import ArgumentValueError, check_activation, check_probability, check_tensors, flag
from .runtime.backend import runs_triton
from .runtime.derivatives import differentiable_by, has_tangent
from .runtime.launch import new_output, new_output_like, nothing
from .runtime.torch_interop import Operator, OperatorFunction, apply_function, autocast_inputs, call_planned, over, overridable
from .sums import epilogue_backward, sum_vectors

# -------------------------------------------------------------------------------------------------------- operators


class Linear(NamedTuple):
    """The forward operator's problem: its arguments besides tensors.

    Attributes:
        p: probability of dropping an output; used only with a seed.
        relu: whether a ReLU is applied before the dropout.
    """

    p: float
    relu: bool

    def flat(self) -> tuple[Any, ...]:
        """The fields in the order of the operator's schema."""
        return tuple(self)


class LinearGradients(NamedTuple):
    """The backward pass's problem: the dropout's probability, and which gradients (input, weight, bias) are wanted."""

    p: float
    wanted: Sequence[bool]


def _run_fprop(input: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, problem: Linear) -> Tensor:
    output = new_output((input.shape[0], weight.shape[0]), input.dtype, input.device)
    epilogue = Epilogue(bias, problem.relu, seed, problem.p)
    if not (weight.shape[0] <= NARROW_OUTPUTS and narrow_fprop(input, weight, output, epilogue)):
        matmul("fprop", input, weight.t(), output, epilogue)
    return output


@torch.library.custom_op("alexnet_triton::linear_fprop", mutates_args=())
def linear_fprop(input: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, relu: bool) -> Tensor:
    """Output (M, out) of ``input`` (M, in) and ``weight`` (out, in): product, bias, ReLU, then dropout if a seed is given."""
    return _run_fprop(input, weight, bias, seed, Linear(p, relu))


@linear_fprop.register_fake
def _(input, weight, bias, seed, p, relu):
    return input.new_empty(input.shape[0], weight.shape[0])


@torch.library.custom_op("alexnet_triton::linear_dgrad", mutates_args=())
def linear_dgrad(dz: Tensor, weight: Tensor) -> Tensor:
    """Input gradient, (M, in)."""
    dx = new_output((dz.shape[0], weight.shape[1]), dz.dtype, dz.device)
    matmul("dgrad", dz, weight, dx)
    return dx


@linear_dgrad.register_fake
def _(dz, weight):
    return dz.new_empty(dz.shape[0], weight.shape[1])


@torch.library.custom_op("alexnet_triton::linear_wgrad", mutates_args=())
def linear_wgrad(dz: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """Weight gradient, in the shape and strides of ``weight`` (whose values are not read)."""
    dw = new_output_like(weight)
    matmul("wgrad", dz.t(), input, dw)
    return dw


@linear_wgrad.register_fake
def _(dz, input, weight):
    return torch.empty_like(weight)


@torch.library.custom_op("alexnet_triton::linear_epilogue_backward", mutates_args=())
def linear_epilogue_backward(
    grad_output: Tensor, output: Tensor | None, seed: Tensor | None, p: float, write_dz: bool, sum_columns: bool
) -> tuple[Tensor, Tensor]:
    """Gradient before the epilogue, (M, out), and bias gradient, by :func:`kernels.sums.epilogue_backward`."""
    m, n = grad_output.shape
    grad_output = grad_output.view(m, n, 1, 1)
    output = None if output is None else output.view(m, n, 1, 1)
    dz, column_sums, unsummed = epilogue_backward(grad_output, output, seed, p, write_dz=write_dz, sum_columns=sum_columns)
    sum_vectors(unsummed)
    return dz.view(dz.shape[0], n), column_sums


def _backward(
    operators: _BackwardOperators,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    seed: Tensor | None,
    problem: LinearGradients,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias; None for those that are not wanted."""
    p, (needs_input, needs_weight, needs_bias) = problem
    dz, dx, dw, d_bias = grad_output, None, None, None
    if operators.narrow is not None and weight.shape[0] <= NARROW_OUTPUTS and (needs_input or needs_weight):
        gradients = operators.narrow(grad_output, input, weight, output, seed, p, problem.wanted)
        dx, dw, d_bias = (gradient if needed else None for gradient, needed in zip(gradients, problem.wanted, strict=True))
        return dx, dw, d_bias
    changed = (output is not None or seed is not None) and (needs_input or needs_weight)
    if changed or needs_bias:
        written, column_sums = operators.epilogue(grad_output, output, seed, p, changed, needs_bias)
        dz = written if changed else dz
        d_bias = column_sums if needs_bias else None
    if needs_input:
        dx = operators.dgrad(dz, weight)
    if needs_weight:
        dw = operators.wgrad(dz, input, weight)
    return dx, dw, d_bias


class _BackwardOperators(NamedTuple):
    epilogue: Any
    dgrad: Any
    wgrad: Any
    narrow: Any = None


@linear_epilogue_backward.register_fake
def _(grad_output, output, seed, p, write_dz, sum_columns):
    m, n = grad_output.shape
    return grad_output.new_empty(m if write_dz else 0, n), grad_output.new_empty(n if sum_columns else 0)


@torch.library.custom_op("alexnet_triton::linear_narrow_backward", mutates_args=())
def linear_narrow_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    seed: Tensor | None,
    p: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients of a layer with few outputs, in one launch unless it is too large; unwanted gradients are empty.

    The rule that decides this needs the batch size. It runs here, inside the operator, since traced code may have a dynamic
    batch size.
    """
    gradients = narrow_backward(grad_output, input, weight, output, seed, p, wanted)
    if gradients is not None:
        return gradients
    dx, dw, d_bias = _backward(_separately, grad_output, input, weight, output, seed, LinearGradients(p, wanted))
    dx, dw, d_bias = (nothing(grad_output) if gradient is None else gradient for gradient in (dx, dw, d_bias))
    return dx, dw, d_bias


@linear_narrow_backward.register_fake
def _(grad_output, input, weight, output, seed, p, wanted):
    shapes = (tuple(input.shape), None, (weight.shape[0],))
    empty = [torch.empty_like(weight) if shape is None else grad_output.new_empty(shape) for shape in shapes]
    return tuple(new if needed else grad_output.new_empty(0) for new, needed in zip(empty, wanted, strict=True))


# ------------------------------------------------------------------------------------------------- autograd Function


_fprop_operator = Operator(linear_fprop, _run_fprop)
_registered = _BackwardOperators(linear_epilogue_backward, linear_dgrad, linear_wgrad, linear_narrow_backward)
_called = _BackwardOperators(*(operator._init_fn for operator in _registered))
_separately = _called._replace(narrow=None)
_dispatch_backward = functools.partial(_backward, _registered)
_run_backward = functools.partial(_backward, _called)


def _formula(ctx: Any, wanted: Sequence[bool], saved: tuple[Any, ...], grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output, seed = saved
    dz = grad_output if seed is None else dropout_reference(grad_output, ctx.p, seed)
    if output is not None:
        dz = dz.masked_fill(output <= 0, 0)
    dx = dz @ weight if wanted[0] else None
    dw = dz.t() @ input if wanted[1] else None
    return dx, dw, dz.sum(0) if wanted[2] else None


@over(_fprop_operator)
class LinearFunction(OperatorFunction):
    """Linear (+bias, +ReLU, +dropout). Saves input, weight, the output if there is a ReLU, and the seed of a dropout."""

    @staticmethod
    def forward(input, weight, bias, seed, problem):
        return _fprop_operator((input, weight, bias, seed), problem)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, _, seed, problem = inputs
        ctx.save_for_backward(input, weight, output if problem.relu else None, seed)
        ctx.p = problem.p

    @staticmethod
    @differentiable_by(_formula, of=(0, 1))
    def backward(ctx: Any, saved: tuple[Tensor, Tensor, Tensor | None, Tensor | None], grad_output: Tensor):
        tensors = (grad_output, *saved)
        problem = LinearGradients(ctx.p, ctx.needs_input_grad[:3])
        gradients = call_planned(_run_backward, tensors, problem, _dispatch_backward)
        return (*gradients, None, None)


_fprop_operator.register_autograd(LinearFunction, Linear, tensors=4)

# --------------------------------------------------------------------------------------------------- public functions


def linear_reference(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """:func:`linear` in PyTorch's own operations."""
    output = F.linear(input, weight, bias)
    return F.relu(output) if activation == "relu" else output


def linear_relu_dropout_reference(input: Tensor, weight: Tensor, bias: Tensor | None, p: float, seed: Tensor | None) -> Tensor:
    """:func:`linear_relu_dropout` in training, in PyTorch's own operations."""
    return dropout_reference(linear_reference(input, weight, bias, activation="relu"), p, seed)


def _check_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensors(input=input, weight=weight, bias=bias)
    if input.dim() < 1:
        raise ArgumentValueError("input must be (..., in_features), got a scalar")
    if weight.dim() not in (1, 2):
        raise ArgumentValueError(
            f"weight must be (out_features, in_features) or (in_features,), got shape {tuple(weight.shape)}"
        )
    if input.shape[-1] != weight.shape[-1]:
        raise ArgumentValueError(
            f"input has {input.shape[-1]} features in its last dimension, but weight of shape {tuple(weight.shape)} expects "
            f"{weight.shape[-1]}"
        )
    if bias is None:
        return
    if weight.dim() == 1:
        raise ArgumentValueError(f"bias must be None with a weight of shape (in_features,), got shape {tuple(bias.shape)}")
    features = weight.shape[0]
    if bias.dim() > 2 or bias.numel() not in (1, features) or (bias.dim() > 0 and bias.shape[-1] != bias.numel()):
        raise ArgumentValueError(f"bias must have shape ({features},), or (1,) or () for one value, got {tuple(bias.shape)}")


def prepare_linear(tensors: Sequence[Tensor | None], options: tuple[float, bool], needs_grad: bool) -> Linear:
    """The problem of :class:`LinearFunction` for a stage of a sequence; ``options``: (dropout probability, ReLU or not)."""
    input, weight, bias, _ = tensors
    _check_linear(input, weight, bias)  # type: ignore[arg-type]
    return Linear(*options)


def _apply_linear(input: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, fuse_relu: bool) -> Tensor:
    if weight.dim() == 1:
        return _apply_linear(input, weight.unsqueeze(0), bias, seed, p, fuse_relu).squeeze(-1)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        bias = bias.reshape(-1).expand(weight.shape[0])
    problem = Linear(p, fuse_relu)
    if input.dim() == 2:
        return apply_function(LinearFunction, (input, weight, bias, seed), problem)
    # math.prod, because Size.numel() would specialise a dynamic batch size to its value while tracing.
    rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    output = apply_function(LinearFunction, (rows, weight, bias, seed), problem)
    return output.view(*input.shape[:-1], weight.shape[0])


@overridable
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """Linear layer, as :func:`torch.nn.functional.linear`, with bias and activation fused into it.

    Args:
        input: (..., in_features); float32, float16 or bfloat16 (float64 on the CPU), any strides.
        weight: (out_features, in_features), dtype and device of ``input``; or (in_features,), without a bias.
        bias: (out_features,), one value as (1,) or (), or None.
        activation: None or ``"relu"``.

    Returns:
        (..., out_features), or (...) for a 1-D weight, in ``input``'s dtype. Products are summed in float32 (float64 for
        float64). float32 products follow ``torch.backends.cuda.matmul.fp32_precision`` (IEEE by PyTorch's default). Under
        autocast, inputs are cast as ``F.linear`` casts them.

    Raises:
        TypeError: a dtype that the kernels do not support, or dtypes that differ.
        ValueError: ranks, numbers of features or devices that do not match, or an unknown ``activation``.
    """
    fuse_relu = check_activation(activation)
    input, weight, bias = autocast_inputs(input, weight, bias)
    _check_linear(input, weight, bias)
    if not runs_triton(input) or (forward_ad._current_level >= 0 and has_tangent(input, weight, bias)):
        return linear_reference(input, weight, bias, activation=activation)
    return _apply_linear(input, weight, bias, None, 0.0, fuse_relu)


@overridable
def linear_relu_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Fused linear layer, bias, ReLU and dropout, in this order.

    Args:
        input, weight, bias: as in :func:`kernels.linear`.
        p, training, seed: as in :func:`kernels.dropout`; the mask is ``dropout_mask(output.shape, p, seed)``.

    Returns:
        (..., out_features) in ``input``'s dtype. Without ``training``, or with a ``p`` of 0, the result is ``linear(...,
        activation="relu")``, and no seed is drawn.

    Raises:
        TypeError, ValueError: as :func:`kernels.linear` and :func:`kernels.dropout`.
    """
    p = check_probability(p)
    if type(training) is not bool:
        training = flag("training", training)
    if not training or p == 0:
        return linear(input, weight, bias, activation="relu")
    input, weight, bias = autocast_inputs(input, weight, bias)
    _check_linear(input, weight, bias)
    use_triton = runs_triton(input) and not (forward_ad._current_level >= 0 and has_tangent(input, weight, bias))
    if not use_triton:
        return linear_relu_dropout_reference(input, weight, bias, p, seed_of_reference(input, seed))
    return _apply_linear(input, weight, bias, draw_seed(input.device, seed), p, True)
