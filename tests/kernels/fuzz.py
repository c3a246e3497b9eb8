"""What the fuzz tests share: numbers of cases, tensors of every memory layout, the comparison with float64 PyTorch.

Tensors hold small integers, whose sums are exact in float32, so a result must equal float64's, rounded once, bit for bit.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..oracle import DTYPES, integers

Shape = tuple[int, ...]

#: Cases of each operation in CI, the same in every run: as many as fit in CI's time.
CASES = {
    "conv2d": 36,
    "conv2d_by_descriptors": 28,
    "linked_conv2d": 18,
    "conv2d_relu_max_pool2d": 32,
    "conv2d_relu_max_pool2d_by_descriptors": 18,
    "max_pool2d": 42,
    "linear": 52,
    "linear_relu_dropout": 20,
    "dropout": 24,
    "cross_entropy": 40,
    "space_to_depth": 12,
    "gather_resize": 22,
    "sgd_step": 18,
}

#: ``make fuzz``: the total number of random cases, spread as in :data:`CASES`. The same seed repeats them.
FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or 0)
FUZZ_SEED = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**32))

#: By operation: cases that ran to their end, and how many of those both PyTorch and the operation refuse.
done: collections.Counter[str] = collections.Counter()
refused: collections.Counter[str] = collections.Counter()


# ------------------------------------------------------------------------------------------------------ memory layouts


def dense(shape: Shape, order: Sequence[int] | None = None) -> list[int]:
    """Strides without gaps; ``order`` lists the axes from the outermost in memory to the innermost."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(range(len(shape)) if order is None else order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return strides


def _last_expanded(shape: Shape) -> list[int]:
    return [*dense(shape[:-1]), 0]


def _second_innermost(shape: Shape) -> list[int]:
    """Channels-last strides for (N, C, H, W); for fewer axes the first axis is innermost."""
    axes = list(range(len(shape)))
    axes.append(axes.pop(1 if len(shape) > 3 else 0))
    return dense(shape, axes)


#: Strides in elements for a shape of at least one axis, by name.
LAYOUTS: dict[str, Callable[[Shape], list[int]]] = {
    "as_it_is": dense,
    "reversed_axes": lambda shape: dense(shape, range(len(shape))[::-1]),
    "last_axis_outermost": lambda shape: dense(shape, [len(shape) - 1, *range(len(shape) - 1)]),
    "channels_last": _second_innermost,
    "every_other": lambda shape: [2 * stride for stride in dense(shape)],
    "cut_out": lambda shape: dense((*shape[:-1], shape[-1] + 3)),
    "channels_cut_out": lambda shape: dense((shape[0], *(size + 1 for size in shape[1:]))),
    "first_axis_expanded": lambda shape: [0, *dense(shape[1:])],
    "last_axis_expanded": _last_expanded,
    "one_element": lambda shape: [0] * len(shape),
    "overlapping_windows": lambda shape: [1] * len(shape),
    "overlapping_rows": lambda shape: dense((*shape[:-1], max(1, shape[-1] // 2))),
    "lazily_negated": dense,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a tensor's elements lie in memory: strides by a name of :data:`LAYOUTS` or given, after ``offset`` elements."""

    name: str | None
    strides: tuple[int, ...] = ()  # at least as many as a tensor has axes
    offset: int = 0

    def view(self, shape: Shape, memory: Callable[[int], Tensor]) -> Tensor:
        """A view of ``memory(elements)`` that ends with the memory's last element, so that reads beyond it are noticed."""
        strides: Sequence[int] = self.strides[: len(shape)] if self.name is None or not shape else LAYOUTS[self.name](shape)
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if math.prod(shape) else -1
        view = memory(self.offset + last + 1).as_strided(shape, strides, self.offset)
        # PyTorch does not negate integers lazily.
        return torch._neg_view(view) if self.name == "lazily_negated" and view.is_floating_point() else view

    def tensor(self, shape: Shape, dtype: torch.dtype, high: int = 2) -> Tensor:
        """A tensor of integers in [-high, high] with this layout."""
        return self.view(shape, lambda elements: integers(elements, dtype=dtype, high=high, grad=False))


layouts = st.builds(
    Layout,
    st.one_of(st.sampled_from(sorted(LAYOUTS)), st.none()),
    st.tuples(*[st.integers(0, 7)] * 5),
    st.integers(0, 9),
)

# --------------------------------------------------------------------------------------------------------------- cases


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an operation on tensors of ``shapes``, each with its own layout; ``wanted``: which require a gradient."""

    shapes: tuple[Shape, ...]
    arguments: dict[str, Any]
    dtype: torch.dtype
    layouts: tuple[Layout, ...]  # one for each tensor, and the last for the output gradient
    wanted: tuple[bool, ...]
    seed: int  # seed of the values

    def tensors(self, high: int = 2) -> list[Tensor]:
        """The case's tensors: leaves in the dtype under test."""
        made = (layout.tensor(s, self.dtype, high) for s, layout in zip(self.shapes, self.layouts, strict=False))
        return [t.requires_grad_(want) for t, want in zip(made, self.wanted, strict=False)]


@st.composite
def cases(
    draw: st.DrawFn,
    calls: st.SearchStrategy[tuple[tuple[Shape, ...], dict[str, Any]]],
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Case:
    """Cases of ``calls``, a strategy of shapes and other arguments."""
    shapes, arguments = draw(calls)
    tensors = len(shapes)
    placed = tuple(draw(layouts) for _ in range(tensors + 1))
    wanted = draw(st.one_of(st.just((True,) * tensors), st.tuples(*[st.booleans()] * tensors)))
    return Case(shapes, arguments, draw(st.sampled_from(dtypes)), placed, wanted, draw(st.integers(0, 2**31)))


def any_case(
    operation: str, case: st.SearchStrategy, **others: st.SearchStrategy
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on random ``case`` and ``others``: CI's number of cases or FUZZ_EXAMPLES. PyTorch's seed is the case's."""
    examples = math.ceil(FUZZ_EXAMPLES * CASES[operation] / sum(CASES.values())) if FUZZ_EXAMPLES else CASES[operation]
    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=not FUZZ_EXAMPLES,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def counted(*args: Any, case: Any, **kwargs: Any) -> None:
            torch.manual_seed(case.seed)
            test(*args, case=case, **kwargs)
            done[operation] += 1

        run = settings(hypothesis.given(case=case, **others)(counted))
        return pytest.mark.slow_under_ttsem(hypothesis.seed(FUZZ_SEED)(run) if FUZZ_EXAMPLES else run)

    return decorate


# ---------------------------------------------------------------------------------------------------------- comparison


def assert_exact(name: str, ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Check that ``ours`` equals ``exact`` rounded to ``dtype``."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == dtype, f"{name}: dtype {ours.dtype}, expected {dtype}"
    assert torch.equal(ours, exact.to(dtype)), f"{name}: differs by up to {(ours.double() - exact).abs().max()}"


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 tensor rounded as if stored in ``dtype``; its gradient is not rounded."""
    return tensor + (tensor.to(dtype).double() - tensor).detach()


def assert_as_float64(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    gradient_layout: Layout,
    launches: list[str],
    *,
    high: int = 2,
) -> list[str]:
    """Check ``ours(*tensors)`` against ``reference`` in float64: the output, and the gradient of each tensor that requires one.

    Returns:
        The kernels that the backward pass launched.
    """
    dtype = tensors[0].dtype
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    before = [t.detach().double() for t in tensors]
    output, exact = ours(*tensors), reference(*doubles)
    assert_exact("output", output, exact, dtype)
    wanted = [i for i, t in enumerate(tensors) if t.requires_grad]
    assert output.requires_grad == bool(wanted)
    launches.clear()
    if wanted:
        grad = gradient_layout.tensor(tuple(exact.shape), dtype, high)
        gradients = torch.autograd.grad(output, [tensors[i] for i in wanted], grad)
        truths = torch.autograd.grad(exact, [doubles[i] for i in wanted], grad.double())
        for i, got, truth in zip(wanted, gradients, truths, strict=True):
            assert_exact(f"gradient of tensor {i}", got, truth, dtype)
    for i, (tensor, values) in enumerate(zip(tensors, before, strict=True)):
        assert torch.equal(tensor.detach().double(), values), f"tensor {i} was written to"
    return list(launches)


def assert_launched_at_most(limit: int, launched: Sequence[str], *words: str) -> None:
    """Check that at most ``limit`` kernels with one of ``words`` in their names were launched: one for each wanted gradient."""
    names = [name for name in launched if any(word in name for word in words)]
    assert len(names) <= limit, f"{names} were launched for {limit} gradients"
