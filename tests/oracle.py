"""The one oracle and the one tolerance rule of the suite.

A result is right when its error against the same computation in float64 is at most twice the error that PyTorch makes in the
result's own dtype on the same device, plus half a unit in the last place of the largest value: the rounding that storing the
result costs anyone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from .conftest import DEVICE

#: float64 kernels only run in the interpreter.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) + ((torch.float64,) if DEVICE == "cpu" else ())


#: Half units in the last place that are always allowed. In float64 the peer is the oracle itself, so its error says nothing:
#: two orders of one sum of at most a few hundred products are allowed to differ by this much.
#: On a GPU a float32 product runs as one chain of additions a thread, where cuBLAS and cuDNN may split it: 5.5 times their
#: error was seen on an H100, in this suite, where sums are longest.
_HALF_UNITS = {torch.float32: 1 if DEVICE == "cpu" else 16, torch.float16: 1, torch.bfloat16: 1, torch.float64: 32}


def dtype_id(dtype: torch.dtype) -> str:
    """For test ids."""
    return str(dtype).removeprefix("torch.")


def each_with_dtypes(cases: Sequence) -> list:
    """Parameters (case, dtype): every case in float32 and one more dtype in turn, the first three in all."""
    others = [d for d in DTYPES if d != torch.float32]
    pairs = []
    for i, case in enumerate(cases):
        chosen = DTYPES if i < 3 else (torch.float32, others[i % len(others)])
        pairs += [pytest.param(case, dtype, id=f"{case.id}-{dtype_id(dtype)}") for dtype in chosen]
    return pairs


def randn(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    """Normal numbers on the suite's device."""
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


def integers(*shape: int, dtype: torch.dtype, high: int = 2, grad: bool = True) -> Tensor:
    """Integers in [-high, high]: sums of a few products of them are exact in every dtype, and ties are many."""
    return torch.randint(-high, high + 1, shape, device=DEVICE).to(dtype).requires_grad_(grad)


def error(result: Tensor, exact: Tensor) -> float:
    """Largest absolute difference from ``exact``."""
    return (result.double() - exact).abs().max().item() if exact.numel() else 0.0


def assert_within_tolerance(name: str, ours: Tensor, peer: Tensor, exact: Tensor, inherent: float = 0.0) -> None:
    """``ours`` obeys the tolerance rule, has the peer's shape and dtype, and is NaN or infinite just where it is.

    ``inherent``: what anybody who computes so may be off by, where the peer's few results can happen to be exact.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == peer.dtype, f"{name}: dtype {ours.dtype}, expected {peer.dtype}"
    assert torch.equal(ours.isnan(), exact.isnan()), f"{name}: {int(ours.isnan().sum())} NaN, {int(exact.isnan().sum())} due"
    expected = exact.to(ours.dtype)
    assert torch.equal(ours.isposinf(), expected.isposinf()), f"{name}: +infinity where none is due, or none where it is"
    assert torch.equal(ours.isneginf(), expected.isneginf()), f"{name}: -infinity where none is due, or none where it is"
    ours, peer, exact = (t.detach().nan_to_num(0.0, 0.0, 0.0) for t in (ours, peer, exact))
    largest = exact.abs().max().item() if exact.numel() else 0.0
    allowed = inherent + 2 * error(peer, exact) + _HALF_UNITS[ours.dtype] * 0.5 * torch.finfo(ours.dtype).eps * largest
    got = error(ours, exact)
    assert got <= allowed, f"{name}: error {got:.3e} against float64, allowed {allowed:.3e} (largest value {largest:.3e})"


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)


def check(
    operation: Callable[..., Tensor], reference: Callable[..., Tensor], tensors: Sequence[Tensor | None], *, names: str
) -> Tensor:
    """Hold ``operation`` to ``reference``: output and the gradient of each tensor that asks for one.

    Args:
        operation, reference: called with ``tensors`` in this order.
        tensors: inputs; leaves in the dtype under test, or None.
        names: of the tensors, for messages, separated by spaces.

    Returns:
        The operation's output.
    """
    output = operation(*tensors)
    runs = []
    grad_output = torch.randn(output.shape, device=output.device).to(output.dtype)
    for dtype in (output.dtype, torch.float64):
        copies = [None if t is None else _leaf(t, dtype) for t in tensors]
        result = reference(*copies)
        wanted = [c for c in copies if c is not None and c.requires_grad]
        grads = torch.autograd.grad(result, wanted, grad_output.to(dtype)) if wanted else ()
        runs.append((result, grads))
    (peer, peer_grads), (exact, exact_grads) = runs
    assert_within_tolerance("output", output, peer, exact)
    named = [(name, t) for name, t in zip(names.split(), tensors, strict=True) if t is not None and t.requires_grad]
    if named:
        grads = torch.autograd.grad(output, [t for _, t in named], grad_output)
        for (name, _), ours, own, truth in zip(named, grads, peer_grads, exact_grads, strict=True):
            assert_within_tolerance(f"gradient of {name}", ours, own, truth)
    return output
