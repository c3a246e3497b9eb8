"""The benchmarks' code path runs on tiny shapes, so that it stays tested where no GPU can time it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cases import (
    CASES,
    FUSED_CASES,
    IMPLEMENTATIONS,
    PLAIN_CASES,
    Case,
    passes,
    runner,
    to_channels_last,
    truth,
    unit,
    verify,
)

from ..conftest import DEVICE


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case_verifies_and_runs(case: Case, launches: list[str]) -> None:
    small = case.shrunk()
    tensors = small.tensors(2, torch.float32, DEVICE)
    verify(small, small.ours, tensors, truth(small, tensors))
    for which in passes(small):
        for implementation in IMPLEMENTATIONS:
            run = runner(small.function(implementation), which, tensors)
            launches.clear()
            result = run()
            assert bool(launches) == (implementation == "triton")
            assert isinstance(result, torch.Tensor) == (which == "forward")
            if which != "forward":
                wanted = {"backward": tensors, "dgrad": tensors[:1], "wgrad": tensors[1:2]}[which]
                assert [g.shape for g in result] == [t.shape for t in wanted]


def _verify(function: Callable[..., torch.Tensor]) -> None:
    case = PLAIN_CASES[2].shrunk()
    tensors = case.tensors(2, torch.float32, DEVICE)
    verify(case, function, tensors, truth(case, tensors))


def test_a_wrong_output_or_gradient_is_not_timed() -> None:
    right = PLAIN_CASES[2].theirs
    _verify(right)
    with pytest.raises(AssertionError, match="conv3: wrong output"):
        _verify(lambda x, w, b: right(x, w, b) * 1.01)
    with pytest.raises(AssertionError, match="conv3: wrong gradient of bias"):
        _verify(lambda x, w, b: right(x, w, b.detach()) + 0 * b.sum())


def test_tf32_is_held_to_its_own_precision() -> None:
    assert unit(torch.float32) == torch.finfo(torch.float32).eps  # the suite's setting
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert unit(torch.float32) == 2**-9
    assert unit(torch.bfloat16) == 2**-7


class _Cut(torch.autograd.Function):
    """Cut a float32 to what a tensor core reads in TF32; the gradient passes through."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return (x.view(torch.int32) & -(2**13)).view(torch.float32)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad


def test_a_fused_case_in_tf32_may_move_maxima_and_no_more() -> None:
    """PyTorch's CPU multiplies exactly, as cuDNN does with one channel, so its own error allows no maximum to move."""
    case = FUSED_CASES[0].shrunk()
    tensors = case.tensors(800, torch.float32, "cpu")
    exactly = truth(case, tensors)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    expected = truth(case, tensors, exactly.grad)

    def ours(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return case.theirs(_Cut.apply(x), _Cut.apply(w), b)

    verify(case, ours, tensors, expected)
    with pytest.raises(AssertionError, match="wrong gradient of input"):
        verify(case, ours, tensors, dataclasses.replace(expected, tf32=None))

    def without_a_row(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ours(x, torch.cat([w[:, :, :-1], torch.zeros_like(w[:, :, -1:])], 2), b)

    def with_a_wrong_image(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([ours(x[:-8], w, b), ours(x[:8], w, b)])

    for wrong in (without_a_row, with_a_wrong_image):
        with pytest.raises(AssertionError, match="wrong output"):
            verify(case, wrong, tensors, expected)
    assert exactly.tf32 is None
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert truth(case, case.tensors(1, torch.float32, "cpu")).tf32 is None
    linear = FUSED_CASES[-2].shrunk()
    assert truth(linear, linear.tensors(1, torch.float32, "cpu")).tf32 is not None


def test_channels_last_also_with_one_channel() -> None:
    x = to_channels_last(torch.randn(2, 1, 9, 9))
    assert F.conv2d(x, torch.randn(4, 1, 3, 3)).is_contiguous(memory_format=torch.channels_last)
    image, weight, _ = PLAIN_CASES[0].shrunk().tensors(2, torch.float32, DEVICE)
    assert F.conv2d(image, weight).stride(1) == 1


def test_shapes_are_alexnets() -> None:
    """Each layer's output has the shape of the next layer's input."""
    for a, b in itertools.pairwise(FUSED_CASES[:5]):
        x = torch.empty(1, *a.input, device="meta")
        weights = [torch.empty(s, device="meta") for s in (a.weight, a.weight[:1])]
        assert a.theirs(x, *weights).shape[1:] == b.input
