"""The benchmarks' code path on tiny shapes, so that it never rots where there is no GPU to time."""

from __future__ import annotations

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


def test_channels_last_also_with_one_channel() -> None:
    x = to_channels_last(torch.randn(2, 1, 9, 9))
    assert F.conv2d(x, torch.randn(4, 1, 3, 3)).is_contiguous(memory_format=torch.channels_last)
    image, weight, _ = PLAIN_CASES[0].shrunk().tensors(2, torch.float32, DEVICE)
    assert F.conv2d(image, weight).stride(1) == 1


def test_shapes_are_alexnets() -> None:
    """What a layer puts out is what the next takes in."""
    for a, b in itertools.pairwise(FUSED_CASES[:5]):
        x = torch.empty(1, *a.input, device="meta")
        weights = [torch.empty(s, device="meta") for s in (a.weight, a.weight[:1])]
        assert a.theirs(x, *weights).shape[1:] == b.input
