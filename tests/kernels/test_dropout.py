"""dropout and dropout_mask: exact agreement with the mask, the rate, independence, the seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels
from kernels.dropouts import philox_uniform_reference
from kernels.runtime import launch

from ..conftest import DEVICE
from ..oracle import DTYPES, dtype_id, randn


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.usefixtures("small_tiles")
def test_exact_against_the_mask(dtype: torch.dtype) -> None:
    x = randn(3, 7, 11, dtype=dtype)
    mask = kernels.dropout_mask(x.shape, 0.5, 99, device=DEVICE)
    y = kernels.dropout(x, 0.5, seed=99)
    assert torch.equal(y, x * mask * 2)
    grad = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], grad * mask * 2)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32, 2**62 + 12345, -1])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_kernel_and_reference_draw_the_same_mask(seed: int, p: float) -> None:
    ours = kernels.dropout_mask((5, 1000), p, seed, device=DEVICE)
    with kernels.use_backend("torch"):
        theirs = kernels.dropout_mask((5, 1000), p, seed, device=DEVICE)
    assert torch.equal(ours, theirs)


def test_known_answers() -> None:
    """The first word of Philox4x32-10 in Random123's known-answer file (kat_vectors): counter 0, key 0 -> 6627e8d5."""
    uniform = philox_uniform_reference(torch.tensor(0), 1)
    assert uniform.item() == pytest.approx(0x6627E8D5 / 2**31, rel=1e-6)


def _agreement(a: Tensor, b: Tensor) -> float:
    """By how many standard deviations the fraction of equal elements of two masks differs from that of independent masks."""
    p = 0.5
    expected = p * p + (1 - p) * (1 - p)
    return abs((a == b).double().mean().item() - expected) / math.sqrt(expected * (1 - expected) / a.numel())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    mask = kernels.dropout_mask((200_000,), p, 5, device=DEVICE)
    deviation = abs(mask.double().mean().item() - (1 - p)) / math.sqrt(p * (1 - p) / mask.numel())
    assert deviation < 4


def test_neighbouring_seeds_and_elements_are_independent() -> None:
    masks = [kernels.dropout_mask((100_000,), 0.5, seed, device=DEVICE) for seed in (5, 6, 5 + 2**32)]
    assert _agreement(masks[0], masks[1]) < 4
    assert _agreement(masks[0], masks[2]) < 4
    assert _agreement(masks[0][1:], masks[0][:-1]) < 4


def test_calls_are_independent_and_manual_seed_governs_them() -> None:
    x = torch.ones(100_000, device=DEVICE)

    def two() -> list[Tensor]:
        torch.manual_seed(3)
        return [kernels.dropout(x) for _ in range(2)]

    first, second = two(), two()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert _agreement(first[0] > 0, first[1] > 0) < 4


def test_off_and_certain() -> None:
    x = randn(5, 7, dtype=torch.float32)
    assert kernels.dropout(x, 0.5, training=False) is x
    assert torch.equal(kernels.dropout(x, 0.0), x)
    assert not kernels.dropout(x, 1.0).any()


def test_dropped_nan_stays_nan_as_in_pytorch() -> None:
    x = torch.full((64,), torch.nan, device=DEVICE)
    assert kernels.dropout(x, 0.5).isnan().all()
    assert torch.nn.functional.dropout(x, 0.5).isnan().all()


def test_seed_tensor_and_strides() -> None:
    x = randn(6, 10, dtype=torch.float32)
    seed = torch.tensor([17], device=DEVICE)
    expected = x * kernels.dropout_mask(x.shape, 0.5, seed) * 2
    assert torch.equal(kernels.dropout(x, seed=seed), expected)
    assert torch.equal(kernels.dropout(x.t().contiguous().t(), seed=seed), expected)


def test_no_mask_is_stored() -> None:
    y = kernels.dropout(randn(100, dtype=torch.float32))
    saved = y.grad_fn.saved_tensors
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.int64, 1)]


def test_empty() -> None:
    assert kernels.dropout(torch.empty(0, 3, device=DEVICE)).shape == (0, 3)
    assert kernels.dropout_mask((0, 3), 0.5, 1, device=DEVICE).shape == (0, 3)


def test_int64_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = kernels.dropout_mask((999,), 0.5, 4, device=DEVICE)
    monkeypatch.setattr(launch, "force_int64", True)
    assert torch.equal(kernels.dropout_mask((999,), 0.5, 4, device=DEVICE), narrow)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_bad_probability_is_refused(p: float, launches: list[str]) -> None:
    for call in (lambda: kernels.dropout(torch.ones(3), p), lambda: kernels.dropout_mask((3,), p, 1)):
        with pytest.raises(ValueError, match=r"p .* must be in \[0, 1\]"):
            call()
    assert launches == []


def test_bad_types_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"p .* must be a number"):
        kernels.dropout(torch.ones(3), "half")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="shape must be a sequence of ints, got 5"):
        kernels.dropout_mask(5, 0.5, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [np.int64(7), np.uint8(7), torch.tensor(7)], ids=lambda seed: type(seed).__name__)
def test_a_seed_of_another_kind_of_integer(seed: int) -> None:
    x = torch.ones(50, device=DEVICE)
    assert torch.equal(kernels.dropout(x, 0.5, seed=seed), kernels.dropout(x, 0.5, seed=7))
    assert torch.equal(kernels.dropout_mask((50,), 0.5, seed), kernels.dropout_mask((50,), 0.5, 7))


@pytest.mark.parametrize(
    "seed",
    [2**63, np.uint64(2**63), 1.5, np.float64(1), np.bool_(True), True, torch.tensor([1, 2]), torch.tensor(1.0)],
    ids=str,
)
def test_bad_seed_is_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="seed must be an int"):
        kernels.dropout(torch.ones(3), seed=seed)
