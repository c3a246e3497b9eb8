"""The benchmarks' code path on tiny shapes, so that it never rots where there is no GPU to time."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from benchmarks.cases import CASES, FUSED_CASES, IMPLEMENTATIONS, PLAIN_CASES, Case, passes, runner, verify

from ..conftest import DEVICE


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case_verifies_and_runs(case: Case, launches: list[str]) -> None:
    small = case.shrunk()
    tensors = small.tensors(2, torch.float32, DEVICE)
    verify(small, tensors)
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


def test_a_wrong_output_is_not_timed() -> None:
    case = dataclasses.replace(PLAIN_CASES[2].shrunk(), ours=lambda x, w, b: PLAIN_CASES[2].theirs(x, w, b) * 1.01)
    with pytest.raises(AssertionError, match="conv3: wrong output"):
        verify(case, case.tensors(2, torch.float32, DEVICE))


def test_a_wrong_gradient_is_not_timed() -> None:
    right = PLAIN_CASES[2].shrunk()
    case = dataclasses.replace(right, ours=lambda x, w, b: right.theirs(x, w, b.detach()) + 0 * b.sum())
    with pytest.raises(AssertionError, match="conv3: wrong gradient of bias"):
        verify(case, case.tensors(2, torch.float32, DEVICE))


def test_shapes_are_alexnets() -> None:
    """What a layer puts out is what the next takes in."""
    for a, b in itertools.pairwise(FUSED_CASES[:5]):
        x = torch.empty(1, *a.input, device="meta")
        weights = [torch.empty(s, device="meta") for s in (a.weight, a.weight[:1])]
        assert a.theirs(x, *weights).shape[1:] == b.input
