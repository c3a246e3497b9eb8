"""Dropout from a counter-based random stream. No mask is stored; the backward pass draws the same numbers again.

Element i (row-major) of a call with seed s is kept when u(s, i) >= p, where u is the first word of Philox4x32-10 (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with key s and counter i, as a float32 in [0, 1). The stream depends
on seed and index alone, so every device, the kernels and the PyTorch reference draw the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad

from .configs.tables import elementwise_config
from .primitives import cast, dropout_factor, program_id
from .runtime.arguments import check_probability, check_tensors, flag, integer
from .runtime.backend import can_run_triton, runs_triton
from .runtime.derivatives import differentiable_by, has_tangent
from .runtime.launch import cdiv, launch, needs_int64, new_output
from .runtime.torch_interop import (
    Operator,
    OperatorFunction,
    apply_function,
    over,
    overridable,
)
from .sums import dropout_scale, triton_accumulator

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _dropout_kernel(
    x_ptr,  # [elements] contiguous, or unused
    seed_ptr,  # int64 scalar
    y_ptr,  # out: [elements] contiguous; bool when only the mask is wanted
    elements,
    p,
    scale,
    MASK_ONLY: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = x * (scale or 0), or the keep-mask. One program owns BLOCK elements. With x = dy it is also the backward pass."""
    o_e = program_id(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    b_factor = dropout_factor(tl.load(seed_ptr), o_e, p, scale)
    if MASK_ONLY:
        b_y = b_factor != 0.0
    else:
        # A product instead of a tl.where: a dropped NaN or infinity gives NaN, as in PyTorch.
        b_y = tl.load(x_ptr + o_e, mask=m_e, other=0.0).to(ACC) * b_factor
    tl.store(y_ptr + o_e, cast(b_y, y_ptr.dtype.element_ty), mask=m_e)


# ------------------------------------------------------------------------------------------------- launch functions


def draw_seed(device: torch.device, seed: int | Tensor | None) -> Tensor:
    """The seed as an int64 scalar on ``device``; without a ``seed``, drawn from that device's torch generator.

    Drawing does not synchronise with the host. A captured CUDA graph draws a new seed at every replay.
    """
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(f"seed must be an int or an int64 tensor of one element, got {seed.dtype} {tuple(seed.shape)}")
        return seed.to(device).reshape(())
    try:
        value = integer("seed", seed)
        if not -(2**63) <= value < 2**63:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"seed must be an int64 integer or an int64 tensor of one element, got {seed!r}") from None
    return torch.full((), value, dtype=torch.int64, device=device)


class Dropout(NamedTuple):
    """The dropout operator's problem, its arguments besides tensors: the probability of dropping an element."""

    p: float

    def flat(self) -> tuple[float]:
        """The fields in the order of the operator's schema."""
        return (self.p,)


def _run_dropout(input: Tensor, seed: Tensor, problem: Dropout) -> Tensor:
    input = input.contiguous()
    output = new_output(input.shape, input.dtype, input.device)
    _launch_dropout(input, seed, output, problem.p, mask_only=False)
    return output


@torch.library.custom_op("alexnet_triton::dropout_apply", mutates_args=())
def dropout_apply(input: Tensor, seed: Tensor, p: float) -> Tensor:
    """``input`` times 1 / (1 - p) where kept and times 0 where dropped, as a contiguous tensor."""
    return _run_dropout(input, seed, Dropout(p))


@dropout_apply.register_fake
def _(input, seed, p):
    return input.new_empty(input.shape)


@torch.library.custom_op("alexnet_triton::dropout_keep_mask", mutates_args=())
def dropout_keep_mask(size: list[int], seed: Tensor, p: float) -> Tensor:
    """The keep-mask as a bool tensor of shape ``size``."""
    mask = new_output(size, torch.bool, seed.device)
    _launch_dropout(mask, seed, mask, p, mask_only=True)
    return mask


@dropout_keep_mask.register_fake
def _(size, seed, p):
    return torch.empty(size, dtype=torch.bool, device=seed.device)


def _launch_dropout(x: Tensor, seed: Tensor, y: Tensor, p: float, *, mask_only: bool) -> None:
    config = elementwise_config(y.numel())
    launch(
        _dropout_kernel,
        (cdiv(y.numel(), config["BLOCK"]),),
        x_ptr=x,
        seed_ptr=seed,
        y_ptr=y,
        elements=y.numel(),
        p=p,
        scale=1.0 if mask_only else dropout_scale(p),
        MASK_ONLY=mask_only,
        WIDE=needs_int64(y),
        ACC=triton_accumulator(x.dtype),
        **config,
    )


# ------------------------------------------------------------------------------------------------- autograd Function


_operator = Operator(dropout_apply, _run_dropout)


def _formula(ctx: Any, wanted: Sequence[bool], saved: tuple[Tensor], grad_output: Tensor) -> tuple[Tensor]:
    return (dropout_reference(grad_output, ctx.problem.p, saved[0]),)


@over(_operator)
class DropoutFunction(OperatorFunction):
    """Dropout. Saves only the seed; the backward pass applies the same product to the output's gradient."""

    @staticmethod
    def forward(input, seed, problem):
        return _operator((input, seed), problem)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, seed, ctx.problem = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    @differentiable_by(_formula)
    def backward(ctx: Any, saved: tuple[Tensor], grad_output: Tensor):
        (seed,) = saved
        return _operator((grad_output, seed), ctx.problem), None, None


_operator.register_autograd(DropoutFunction, Dropout, tensors=2)


# --------------------------------------------------------------------------------------------------- public functions


def philox_uniform_reference(seed: Tensor, count: int, first: int = 0) -> Tensor:
    """Numbers ``first`` to ``first + count - 1`` of the float32 stream of ``seed``, computed by PyTorch's integer operations.

    Words are kept as int64 in [0, 2^32), since PyTorch lacks a full set of uint32 operations.
    """
    low = 0xFFFFFFFF
    counter = torch.arange(first, first + count, dtype=torch.int64, device=seed.device)
    c0, c1 = counter & low, counter >> 32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        high_a, low_a = _multiply_32(0xD2511F53, c0)
        high_b, low_b = _multiply_32(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    # Like tl.rand: take the word as int32, mirror negative values to non-negative ones, divide by 2^31.
    signed = torch.where(c0 > 0x7FFFFFFF, low - c0, c0)
    return signed.to(torch.float32) * 4.6566127342e-10


def _multiply_32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product, formed from 16-bit halves because int64 is signed."""
    product_low = a * (b & 0xFFFF)  # < 2^48
    product_high = a * (b >> 16) + (product_low >> 16)  # < 2^49
    return product_high >> 16, ((product_high & 0xFFFF) << 16) | (product_low & 0xFFFF)


def dropout_mask_reference(shape: Sequence[int], p: float, seed: Tensor) -> Tensor:
    """:func:`dropout_mask` in PyTorch's own operations."""
    size = torch.Size(shape)
    return (philox_uniform_reference(seed, size.numel()) >= torch.tensor(p, dtype=torch.float32)).view(size)


def dropout_reference(input: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """:func:`dropout` in training, in PyTorch's own operations; without a seed, ``F.dropout`` with PyTorch's own stream."""
    if seed is None:
        return F.dropout(input, p)
    keep = dropout_mask_reference(input.shape, p, seed)
    return input * keep.to(input.dtype) * dropout_scale(p)


def seed_of_reference(input: Tensor, seed: int | Tensor | None) -> Tensor | None:
    """The seed for :func:`dropout_reference`; None if none was given and no kernel could run on ``input``.

    In that case no kernel's mask has to be matched, and Philox in PyTorch's integer operations takes many times as long as
    PyTorch's own dropout.
    """
    return draw_seed(input.device, seed) if seed is not None or can_run_triton(input) else None


def prepare_dropout(tensors: Sequence[Tensor | None], options: float, needs_grad: bool) -> Dropout:
    """The problem of :class:`DropoutFunction` for a stage of a sequence; ``options`` is the probability."""
    check_tensors(input=tensors[0])
    return Dropout(options)


def dropout_mask(shape: Sequence[int], p: float, seed: int | Tensor, *, device: torch.device | str | None = None) -> Tensor:
    """The keep-mask that :func:`dropout` and :func:`linear_relu_dropout` use for an output of ``shape``.

    Args:
        shape: shape of the tensor that dropout is applied to. Elements are counted row-major whatever the tensor's strides.
        p: probability of dropping an element, in [0, 1].
        seed: int, or int64 tensor of one element.
        device: device of the mask; by default the seed tensor's device, or the CPU for an int seed.

    Returns:
        A bool tensor, True where the element is kept.

    Raises:
        TypeError: ``shape`` is not a sequence of ints, or ``p`` is not a number.
        ValueError: ``p`` is outside [0, 1], or ``seed`` is neither an int64 integer nor an int64 tensor of one element.
    """
    p = check_probability(p)
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be a sequence of ints, got {shape!r}")
    size = [integer("shape", length) for length in shape]
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    seed = draw_seed(torch.device(device), seed)
    if runs_triton(seed):
        return dropout_keep_mask(size, seed, p)
    return dropout_mask_reference(size, p, seed)


@overridable
def dropout(input: Tensor, p: float = 0.5, training: bool = True, *, seed: int | Tensor | None = None) -> Tensor:
    """Dropout, as :func:`torch.nn.functional.dropout`, with the mask ``dropout_mask(input.shape, p, seed)``.

    Args:
        input: any shape and strides; float32, float16 or bfloat16 (float64 on the CPU).
        p: probability of dropping an element, in [0, 1].
        training: False returns ``input`` itself. So does a ``p`` of 0, which draws no seed.
        seed: int, or int64 tensor of one element. By default drawn from torch's generator on ``input``'s device, so that
            ``torch.manual_seed`` determines it. If no seed is given and no kernel can run on ``input``, PyTorch's own dropout
            runs.

    Returns:
        ``input`` / (1 - p) where kept and 0 where dropped, contiguous, in ``input``'s dtype. The kernels round 1 / (1 - p) to
        float32, for float64 inputs too.

    Raises:
        TypeError: ``input`` is not a tensor or has a dtype that the kernels do not support, ``p`` is not a number, or
            ``training`` is not a bool.
        ValueError: ``p`` is outside [0, 1], or ``seed`` is neither an int64 integer nor an int64 tensor of one element.
    """
    check_tensors(input=input)
    p = check_probability(p)
    if type(training) is not bool:
        training = flag("training", training)
    if not training or p == 0:
        return input
    use_triton = runs_triton(input) and not (forward_ad._current_level >= 0 and has_tangent(input))
    if not use_triton:
        return dropout_reference(input, p, seed_of_reference(input, seed))
    return apply_function(DropoutFunction, (input, draw_seed(input.device, seed)), Dropout(p))
