"""max_pool2d has exactly the values, indices and gradients of F.max_pool2d."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.pooling.autograd import position_dtype
from kernels.runtime import launch

from ...conftest import DEVICE
from ...oracle import DTYPES, check, dtype_id, each_with_dtypes, integers, randn


@dataclasses.dataclass(frozen=True)
class Case:
    """A pool; ``why`` says why the case is here."""

    why: str
    shape: tuple[int, ...] = (2, 5, 13, 11)
    kernel_size: int | tuple[int, int] = 3
    stride: int | tuple[int, int] | None = 2
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    ceil_mode: bool = False

    @property
    def id(self) -> str:
        return self.why + "-" + "x".join(map(str, self.shape))

    def arguments(self) -> tuple:
        return self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode


CASES = (
    Case("alexnet"),
    Case("alexnet_last", shape=(1, 3, 12, 12)),
    Case("own_stride", kernel_size=2, stride=None),
    Case("stride_1", stride=1),
    Case("stride_over_window", kernel_size=2, stride=3),
    Case("padded", padding=1),
    Case("ceil", shape=(2, 5, 14, 12), ceil_mode=True),
    Case("ceil_padded", shape=(2, 5, 14, 12), padding=1, ceil_mode=True),
    Case("ceil_drops_a_window", shape=(1, 2, 5, 5), kernel_size=2, stride=3, padding=1, ceil_mode=True),
    Case("rectangular", kernel_size=(2, 4), stride=(1, 3), padding=(1, 2)),
    Case("dilated", dilation=2, padding=1),
    Case("dilated_rectangular", kernel_size=(2, 3), stride=(1, 2), dilation=(3, 2)),
    Case("window_is_image", shape=(3, 2, 4, 5), kernel_size=(4, 5)),
    Case("one_pixel", shape=(1, 1, 1, 1), kernel_size=1, stride=1),
    Case("over_255_positions", shape=(1, 1, 18, 18), kernel_size=17, stride=1),
    Case("unbatched", shape=(5, 13, 11)),
)


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("case", "dtype"), each_with_dtypes(CASES))
@pytest.mark.usefixtures("small_tiles")
def test_values_indices_and_gradient(case: Case, dtype: torch.dtype) -> None:
    """With integers ties are frequent, and sums of gradients are exact in any order and dtype."""
    x = integers(*case.shape, dtype=dtype)
    ours, index = kernels.max_pool2d(x, *case.arguments(), True)
    theirs, their_index = F.max_pool2d(x, *case.arguments(), True)
    _same(ours, theirs)
    assert torch.equal(index, their_index)
    grad = integers(*ours.shape, dtype=dtype, high=5, grad=False)
    _same(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, theirs)))


def test_the_last_of_more_than_255_positions() -> None:
    """In a 17 x 17 window of rising values the maximum is at position 288, which does not fit a byte."""
    x = torch.arange(18.0 * 18, device=DEVICE).view(1, 1, 18, 18).requires_grad_()
    ours, theirs = kernels.max_pool2d(x, 17, 1), F.max_pool2d(x, 17, 1)
    _same(ours, theirs)
    _same(*(torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (ours, theirs)))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_memory_format_is_kept(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x = randn(2, 5, 13, 11, dtype=dtype, grad=False).contiguous(memory_format=memory_format).requires_grad_()
    y = check(lambda t: kernels.max_pool2d(t, 3, 2), lambda t: F.max_pool2d(t, 3, 2), [x], names="input")
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_infinity_and_signed_zero(dtype: torch.dtype) -> None:
    x = integers(2, 4, 9, 9, dtype=dtype, grad=False)
    x[0, 0, 2, 3] = x[0, 0, 2, 4] = x[0, 0, 6, 6] = torch.nan
    x[0, 1] = -torch.inf
    x[0, 2, 4, 4] = torch.inf
    x[1, 0] = 0.0
    x[1, 0, ::2] = -0.0
    for padding in (0, 1):
        ours, index = kernels.max_pool2d(x, 3, 2, padding, return_indices=True)
        theirs, their_index = F.max_pool2d(x, 3, 2, padding, return_indices=True)
        _same(ours, theirs)
        assert torch.equal(ours.signbit(), theirs.signbit())
        assert torch.equal(index, their_index)


STRIDED = {
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every_other": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", STRIDED)
def test_any_strides(layout: str) -> None:
    x = integers(2, 4, 9, 7, dtype=torch.float32)
    grad = integers(2, 4, 4, 3, dtype=torch.float32, grad=False)
    results = []
    for pool in (kernels.max_pool2d, F.max_pool2d):
        y = pool(STRIDED[layout](x), 3, 2)
        results.append((y, torch.autograd.grad(y, x, STRIDED[layout](grad))[0]))
    for ours, theirs in zip(*results, strict=True):
        _same(ours, theirs)


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_give_the_same_bits() -> None:
    x = randn(2, 5, 13, 11, dtype=torch.bfloat16)

    def run():
        y = kernels.max_pool2d(x, 3, 2)
        return y, torch.autograd.grad(y, x, torch.ones_like(y))[0]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_an_output_can_be_changed_in_place() -> None:
    x = randn(2, 5, 13, 11, dtype=torch.float32, grad=False).contiguous(memory_format=torch.channels_last).requires_grad_()
    ours, theirs = (torch.autograd.grad(pool(x, 3, 2).mul_(2).sum(), x)[0] for pool in (kernels.max_pool2d, F.max_pool2d))
    _same(ours, theirs)


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 kernels run in the interpreter only")
def test_gradcheck() -> None:
    x = torch.randperm(2 * 2 * 6 * 5).double().view(2, 2, 6, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: kernels.max_pool2d(t, 3, 2, 1), x, fast_mode=True)


def test_what_is_saved_is_a_byte_an_output() -> None:
    y = kernels.max_pool2d(randn(2, 5, 13, 11, dtype=torch.float32), 3, 2)
    saved = y.grad_fn.saved_tensors
    assert [t.dtype for t in saved] == [torch.uint8]
    assert saved[0].shape == y.shape


def test_positions_that_do_not_fit_a_byte_are_not_squeezed_into_one() -> None:
    assert position_dtype((15, 17)) == torch.uint8  # 255 positions, and one value for "no position"
    assert position_dtype((16, 16)) == torch.int32


def test_no_positions_without_a_gradient(launches: list[str]) -> None:
    with torch.no_grad():
        y = kernels.max_pool2d(randn(2, 5, 13, 11, dtype=torch.float32), 3, 2)
    assert y.grad_fn is None
    assert launches == ["_max_pool2d_fprop_kernel"]


def test_empty_batch() -> None:
    x = randn(0, 5, 13, 11, dtype=torch.float32)
    y = kernels.max_pool2d(x, 3, 2)
    assert y.shape == (0, 5, 6, 5)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.usefixtures("small_tiles")
def test_int64_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "force_int64", True)
    x = integers(2, 5, 13, 11, dtype=torch.float32)
    ours, theirs = (pool(x, 3, 2, 1) for pool in (kernels.max_pool2d, F.max_pool2d))
    _same(ours, theirs)
    _same(*(torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (ours, theirs)))


X = torch.zeros(2, 5, 13, 11)
BAD = {
    "rank": ((X[0, 0], 3), ValueError, "input must be"),
    "dtype": ((X.int(), 3), TypeError, "input must be one of"),
    "kernel_size": ((X, 0), ValueError, "kernel_size must be at least 1"),
    "stride_type": ((X, 3, 1.5), TypeError, "stride must be an int"),
    "stride": ((X, 3, 0), ValueError, "stride must be at least 1"),
    "padding": ((X, 3, 2, 2), ValueError, "padding must be at most half of kernel_size"),
    "dilation": ((X, 3, 2, 0, 0), ValueError, "dilation must be at least 1"),
    "empty_output": ((X, 14), ValueError, "the output would be empty"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused_before_any_launch(bad: str, launches: list[str]) -> None:
    arguments, kind, message = BAD[bad]
    for backend in ("auto", "torch"):
        with kernels.use_backend(backend), pytest.raises(kind, match=message):
            kernels.max_pool2d(*arguments)
    assert launches == []
