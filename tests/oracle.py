"""The suite's one oracle and its one tolerance rule.

A result is right when its error against the same computation in float64 is at most twice PyTorch's error in the result's dtype
on the same device, plus half a unit in the last place of the largest value (the rounding error of storing any result).

TF32 has its own rule (:func:`check` with ``tf32``). Tensor cores read the first 10 mantissa bits of float32 operands and
accumulate their products in float32. So the peer is PyTorch's computation on operands rounded to TF32, and the half unit in the
last place is TF32's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .conftest import DEVICE

#: float64 kernels only run in the interpreter.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) + ((torch.float64,) if DEVICE == "cpu" else ())


#: Half units in the last place that are always allowed. In float64 the peer is the oracle itself, so the peer's error is zero:
#: this allows for two orders of summing a few hundred products.
#: On a GPU each thread sums float32 products in one chain, where cuBLAS and cuDNN may split the sum: up to 5.5 times their
#: error was measured on an H100, in this suite, where sums are longest.
_HALF_UNITS = {torch.float32: 1 if DEVICE == "cpu" else 16, torch.float16: 1, torch.bfloat16: 1, torch.float64: 32}


def dtype_id(dtype: torch.dtype) -> str:
    """The dtype's name without ``torch.``, for test ids."""
    return str(dtype).removeprefix("torch.")


def each_with_dtypes(cases: Sequence) -> list:
    """Parameters (case, dtype): the first three cases in every dtype, the others in float32 and one other dtype in turn."""
    others = [d for d in DTYPES if d != torch.float32]
    pairs = []
    for i, case in enumerate(cases):
        chosen = DTYPES if i < 3 else (torch.float32, others[i % len(others)])
        pairs += [pytest.param(case, dtype, id=f"{case.id}-{dtype_id(dtype)}") for dtype in chosen]
    return pairs


def randn(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    """A tensor of normally distributed numbers on the suite's device."""
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


def integers(*shape: int, dtype: torch.dtype, high: int = 2, grad: bool = True) -> Tensor:
    """Integers in [-high, high]: sums of a few of their products are exact in every dtype, and ties are frequent."""
    return torch.randint(-high, high + 1, shape, device=DEVICE).to(dtype).requires_grad_(grad)


#: How many of float32's 23 mantissa bits TF32 lacks.
_TF32_DROPS = 13
TF32_EPS = 2.0**-10
#: A GPU's tensor cores truncate each sum of a few products, so sums of exact products have an error there: on an H100 up to
#: 2.1e-6 of the largest result were seen in sums of 720 products.
_TRUNCATED_SUMS = 2.0**-17


def truncate(tensor: Tensor, dropped: int = _TF32_DROPS) -> Tensor:
    """float32 without its last ``dropped`` mantissa bits: how a tensor core reads unrounded float32 as TF32.

    With ``dropped`` 16 the result is truncated to bfloat16.
    """
    return _keep_special(tensor, tensor.detach().view(torch.int32) & -(1 << dropped))


def round_to_tf32(tensor: Tensor) -> Tensor:
    """float32 rounded to the nearest TF32 number, ties away from zero: the PTX instruction ``cvt.rna.tf32.f32``."""
    bits = tensor.detach().view(torch.int32)
    return _keep_special(tensor, (bits + (1 << (_TF32_DROPS - 1))) & -(1 << _TF32_DROPS))


def _keep_special(tensor: Tensor, bits: Tensor) -> Tensor:
    return torch.where(tensor.isfinite(), bits.view(torch.float32), tensor.detach())


def tf32_numbers(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    """Normally distributed numbers that TF32 represents exactly: every implementation forms their exact products in float32."""
    return round_to_tf32(torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_(grad)


class RoundedOperands(TorchDispatchMode):
    """Applies ``rounding`` to both operands of every float32 convolution, in each of its three passes.

    All other computations, the bias gradient included, are unchanged.
    """

    def __init__(self, rounding: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._rounding = rounding

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.convolution.default:
            return func(self._rounding(args[0]), self._rounding(args[1]), *args[2:], **kwargs)
        if func is torch.ops.aten.convolution_backward.default:
            grad, input, weight, *rest, (needs_input, needs_weight, needs_bias) = args
            d_bias = func(grad, input, weight, *rest, (False, False, True))[2] if needs_bias else None
            operands = [self._rounding(t) for t in (grad, input, weight)]
            dx, dw, _ = func(*operands, *rest, (needs_input, needs_weight, False))
            return dx, dw, d_bias
        return func(*args, **kwargs)


def error(result: Tensor, exact: Tensor) -> float:
    """The largest absolute difference between ``result`` and ``exact``."""
    return (result.double() - exact).abs().max().item() if exact.numel() else 0.0


def assert_within_tolerance(
    name: str, ours: Tensor, peer: Tensor, exact: Tensor, inherent: float = 0.0, tf32: bool = False
) -> None:
    """Check ``ours`` against the tolerance rule, and its shape, its dtype and the places of NaN and infinity.

    Args:
        inherent: an error that every implementation may have; for results so few that the peer's can be exact by chance.
        tf32: whether the half unit is TF32's: truncating to TF32 shrinks an operand by half a unit on average.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == peer.dtype, f"{name}: dtype {ours.dtype}, expected {peer.dtype}"
    assert torch.equal(ours.isnan(), exact.isnan()), f"{name}: {int(ours.isnan().sum())} NaN, {int(exact.isnan().sum())} due"
    expected = exact.to(ours.dtype)
    assert torch.equal(ours.isposinf(), expected.isposinf()), f"{name}: +infinity where none is due, or none where it is"
    assert torch.equal(ours.isneginf(), expected.isneginf()), f"{name}: -infinity where none is due, or none where it is"
    ours, peer, exact = (t.detach().nan_to_num(0.0, 0.0, 0.0) for t in (ours, peer, exact))
    largest = exact.abs().max().item() if exact.numel() else 0.0
    unit = TF32_EPS if tf32 else _HALF_UNITS[ours.dtype] * torch.finfo(ours.dtype).eps
    allowed = inherent + 2 * error(peer, exact) + 0.5 * unit * largest
    got = error(ours, exact)
    assert got <= allowed, f"{name}: error {got:.3e} against float64, allowed {allowed:.3e} (largest value {largest:.3e})"


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)


def check(
    operation: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    *,
    names: str,
    tf32: bool = False,
    draw: Callable[..., Tensor] = randn,
) -> Tensor:
    """Check ``operation`` against ``reference``: the output, and the gradient of each tensor that requires one.

    Args:
        operation, reference: functions called with ``tensors`` in this order.
        tensors: inputs: leaf tensors in the dtype under test, or None.
        names: the names of ``tensors`` for messages, separated by spaces.
        tf32: check float32 results by the rule for TF32. Not for a ReLU or a pool, which can tell apart numbers that
            are equal in TF32.
        draw: draws the gradient of the output. For :func:`tf32_numbers`, on a GPU, the peer may not use tensor cores.

    Returns:
        The operation's output.
    """
    truncated = _TRUNCATED_SUMS if draw is tf32_numbers and DEVICE == "cuda" else 0.0

    def assert_close(name: str, ours: Tensor, peer: Tensor, exact: Tensor, tf32: bool) -> None:
        finite = exact.detach().nan_to_num(0.0, 0.0, 0.0)
        inherent = truncated * finite.abs().max().item() if truncated and exact.numel() else 0.0
        assert_within_tolerance(name, ours, peer, exact, inherent, tf32)

    output = operation(*tensors)
    runs = []
    grad_output = draw(*output.shape, dtype=output.dtype, grad=False)
    ways: list[tuple[torch.dtype, contextlib.AbstractContextManager]] = [
        (output.dtype, RoundedOperands(round_to_tf32) if tf32 else contextlib.nullcontext()),
        (torch.float64, contextlib.nullcontext()),
    ]
    for dtype, rounding in ways:
        copies = [None if t is None else _leaf(t, dtype) for t in tensors]
        with rounding:
            result = reference(*copies)
            wanted = [c for c in copies if c is not None and c.requires_grad]
            grads = torch.autograd.grad(result, wanted, grad_output.to(dtype)) if wanted else ()
        runs.append((result, grads))
    (peer, peer_grads), (exact, exact_grads) = runs
    assert_close("output", output, peer, exact, tf32)
    named = [(name, t) for name, t in zip(names.split(), tensors, strict=True) if t is not None and t.requires_grad]
    if named:
        grads = torch.autograd.grad(output, [t for _, t in named], grad_output)
        for (name, _), ours, own, truth in zip(named, grads, peer_grads, exact_grads, strict=True):
            assert_close(f"gradient of {name}", ours, own, truth, tf32 and name != "bias")
    return output
