"""The suite's faster interpreter (``tests/interpreter.py``) has the results and the errors of Triton's own."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import kernels
from kernels.runtime import launch

from .conftest import DEVICE
from .oracle import randn

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="tests the interpreter")


@triton.jit
def _broadcasting_kernel(x_ptr, y_ptr, WIDTH: tl.constexpr, OTHER: tl.constexpr, DTYPE: tl.constexpr):
    """y = 2 * x + [column] + [[row]] + [[[0]]]; x has WIDTH columns, [column] and y have OTHER."""
    o_r, o_c = tl.arange(0, 4)[:, None], tl.arange(0, OTHER)[None, :]
    x = tl.load(x_ptr + o_r * OTHER + tl.arange(0, WIDTH)[None, :]).to(DTYPE)
    y = 2 * x + o_c.to(tl.float32) + o_r
    y = tl.sum(y[None, :, :] + tl.zeros([2, 1, 1], tl.float32), axis=0)
    tl.store(y_ptr + o_r * OTHER + o_c, y)


def _broadcasting(width: int, other: int, dtype: object) -> torch.Tensor:
    y = torch.empty(4, 8)
    launch.launch(
        _broadcasting_kernel, (1,), x_ptr=torch.arange(32.0).view(4, 8), y_ptr=y, WIDTH=width, OTHER=other, DTYPE=dtype
    )
    return y


@triton.jit
def _numbers_kernel(x_ptr, y_ptr, BIG: tl.constexpr, DTYPE: tl.constexpr):
    """The rows of y: sums, products, quotients and comparisons of x and numbers, zeros of both signs among them."""
    o = tl.arange(0, 8)
    x = tl.load(x_ptr + o).to(DTYPE)
    ends = 1 - x
    if DTYPE.is_floating():
        ends = x * 0.0 + ends
        tl.store(y_ptr + 8 + o, x * 0.0)
        tl.store(y_ptr + 16 + o, x * -0.0)
        tl.store(y_ptr + 24 + o, x / 3)
    else:
        tl.store(y_ptr + 8 + o, x // 3)
        tl.store(y_ptr + 16 + o, x % 3)
        tl.store(y_ptr + 24 + o, x / 3)
    tl.store(y_ptr + o, ends)
    tl.store(y_ptr + 32 + o, x + BIG)
    tl.store(y_ptr + 40 + o, x < 3)
    tl.store(y_ptr + 48 + o, x + 1.5)


def _numbers(big: int, dtype: object) -> torch.Tensor:
    y = torch.empty(7, 8)
    launch.launch(_numbers_kernel, (1,), x_ptr=torch.arange(8.0), y_ptr=y, BIG=big, DTYPE=dtype)
    return y


def _everything() -> list[torch.Tensor]:
    """Results and gradients of operations that use most of the language, with blocks of one to three dimensions."""
    torch.manual_seed(0)
    results = [_broadcasting(8, 8, dtype) for dtype in (tl.float32, tl.float16, tl.int32, tl.int8)]
    for dtype in (tl.float32, tl.float16, tl.int32, tl.int8, tl.int64):
        results += [_numbers(2, dtype), _numbers(2, dtype)]
    for dtype in (torch.float32, torch.bfloat16):
        x, w, b = (randn(*size, dtype=dtype) for size in ((2, 3, 9, 8), (5, 3, 3, 2), (5,)))
        y = kernels.conv2d_relu_max_pool2d(x, w, b, (2, 1), 1, pool_kernel_size=2)
        results += [y, *torch.autograd.grad(y.float().square().sum(), (x, w, b))]
        v = randn(7, 40, dtype=dtype)
        z = kernels.linear_relu_dropout(y.flatten(1)[:, :40], v, None, 0.5, seed=torch.tensor(3))
        results += [z, *torch.autograd.grad(z.float().sum(), (v,))]
    return [result.detach() for result in results]


def test_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = _everything()
    monkeypatch.undo()  # also undoes the suite's fixtures: Triton's own interpreter runs
    for ours, own in zip(fast, _everything(), strict=True):
        assert ours.dtype == own.dtype
        assert torch.equal(*(t.contiguous().view(torch.uint8) for t in (ours, own)))


@pytest.mark.parametrize(("width", "other", "message"), [(4, 8, "incompatible dimensions"), (6, 8, "power of 2")])
def test_the_same_errors(width: int, other: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that was valid in one tensor, and is now cached, still raises in another."""
    _broadcasting(8, 8, tl.float32)
    with pytest.raises(Exception, match=message):
        _broadcasting(width, other, tl.float32)
    monkeypatch.undo()
    with pytest.raises(Exception, match=message):
        _broadcasting(width, other, tl.float32)


def test_the_same_errors_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that was valid beside one type, and is now cached, still raises beside another."""
    for big in (300, 125):
        _numbers(big, tl.int32)
    with pytest.raises(Exception, match="overflow"):
        _numbers(125, tl.int8)
    for _ in range(2):
        with pytest.raises(Exception, match="out of range"):
            _numbers(300, tl.int8)
        monkeypatch.undo()
