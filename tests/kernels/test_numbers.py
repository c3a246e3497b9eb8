"""The ends of each dtype's range and long sums: subnormals, overflow to infinity, NaN in gradients, 100,000 products.

Where all sums are exact in float32, a result must be the exact result rounded once, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.configs import tables
from kernels.convolution.problem import Geometry, Problem
from kernels.convolution.select import wgrad
from kernels.matrix_product import linear_epilogue_backward, linear_wgrad
from kernels.runtime.backend import INTERPRETED
from kernels.sgd import sgd_step

from ..conftest import DEVICE
from ..oracle import assert_within_tolerance, check, dtype_id, integers, randn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = DTYPES[1:]
LONG = 100_000

#: Triton 3.8's interpreter changes subnormal bfloat16 numbers when a kernel widens or stores them (100 times the smallest
#: becomes 16 times, 3 times becomes 0): it normalises the significand but sets float32's exponent to 0.
SUBNORMAL_DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.float16, id="float16"),
    pytest.param(
        torch.bfloat16,
        id="bfloat16",
        marks=pytest.mark.xfail(INTERPRETED, reason="Triton's interpreter loses subnormal bfloat16", strict=True),
    ),
]


def _smallest(dtype: torch.dtype) -> float:
    """The dtype's smallest positive subnormal number."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _subnormals(*shape: int, dtype: torch.dtype) -> Tensor:
    """Integer multiples, between -5 and 5, of the smallest subnormal number."""
    return (integers(*shape, dtype=torch.float64, high=5, grad=False) * _smallest(dtype)).to(dtype)


def _weights(*shape: int, dtype: torch.dtype) -> Tensor:
    """Integers, in half precision divided by 8: sums lie between the dtype's numbers but are exact in float32."""
    return integers(*shape, dtype=dtype, high=9, grad=False) / (1 if dtype == torch.float32 else 8)


def _assert_rounded_once(name: str, result: Tensor, exact: Tensor) -> None:
    assert torch.equal(result, exact.to(result.dtype)), name


def _assert_subnormal(exact: Tensor, dtype: torch.dtype) -> None:
    """Check that some results are subnormal, which flushing to zero would lose."""
    assert ((exact != 0) & (exact.abs() < torch.finfo(dtype).smallest_normal)).any()


OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (kernels.linear, F.linear, (5, 33), (35, 33)),
    "linear_narrow": (kernels.linear, F.linear, (5, 33), (17, 33)),
    "conv2d": (
        lambda x, w: kernels.conv2d(x, w, padding=1),
        lambda x, w: F.conv2d(x, w, padding=1),
        (2, 3, 6, 5),
        (8, 3, 3, 3),
    ),
    "conv2d_descriptor": (kernels.conv2d, F.conv2d, (2, 16, 4, 4), (16, 16, 3, 3)),
    "conv2d_relu_max_pool2d": (
        lambda x, w: kernels.conv2d_relu_max_pool2d(x, w, None, pool_kernel_size=3, pool_stride=2),
        lambda x, w: F.max_pool2d(F.relu(F.conv2d(x, w)), 3, 2),
        (2, 3, 9, 9),
        (8, 3, 3, 3),
    ),
}


@pytest.mark.parametrize("dtype", SUBNORMAL_DTYPES)
@pytest.mark.parametrize("small", ["input", "weight"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_subnormal_inputs_and_results_are_kept(name: str, small: str, dtype: torch.dtype) -> None:
    ours, meaning, *shapes = OPERATIONS[name]
    makers = (_subnormals, _weights) if small == "input" else (_weights, _subnormals)
    x, w = (make(*shape, dtype=dtype) for make, shape in zip(makers, shapes, strict=True))
    exact = meaning(x.double(), w.double())
    _assert_subnormal(exact, dtype)
    _assert_rounded_once("output", ours(x, w), exact)


@pytest.mark.parametrize("dtype", SUBNORMAL_DTYPES)
@pytest.mark.parametrize("name", ["linear", "linear_narrow", "conv2d", "conv2d_descriptor"])
def test_subnormal_gradients_are_kept(name: str, dtype: torch.dtype) -> None:
    """Gradients of input, weight and bias are right for a subnormal output gradient."""
    ours, meaning, *shapes = OPERATIONS[name]
    x, w = (_weights(*shape, dtype=dtype) for shape in shapes)
    wide = [t.double().requires_grad_() for t in (x, w)]
    output, exact_output = ours(x.requires_grad_(), w.requires_grad_()), meaning(*wide)
    grad = _subnormals(*output.shape, dtype=dtype)
    exact = torch.autograd.grad(exact_output, wide, grad.double())
    for which, got, due in zip(("input", "weight"), torch.autograd.grad(output, (x, w), grad), exact, strict=True):
        _assert_subnormal(due, dtype)
        _assert_rounded_once(which, got, due)
    rows = grad.reshape(len(grad), -1)
    _, column_sums = linear_epilogue_backward(rows, None, None, 0.0, False, True)
    _assert_rounded_once("bias", column_sums, rows.double().sum(0))


@pytest.mark.parametrize("dtype", SUBNORMAL_DTYPES)
def test_normal_factors_with_a_subnormal_product(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    scale = 2.0 ** (torch.tensor(_smallest(dtype), dtype=torch.float64).log2().item() // 2 + 1)
    x, w = (integers(*shape, dtype=dtype, high=5, grad=False) * scale for shape in ((5, 7), (6, 7)))
    assert scale >= info.smallest_normal
    exact = F.linear(x.double(), w.double())
    _assert_subnormal(exact, dtype)
    _assert_rounded_once("output", kernels.linear(x, w), exact)


@pytest.mark.parametrize("dtype", SUBNORMAL_DTYPES)
def test_max_pool2d_keeps_subnormals(dtype: torch.dtype) -> None:
    x = _subnormals(2, 3, 9, 9, dtype=dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    ours, exact = kernels.max_pool2d(x, 3, 2), F.max_pool2d(wide, 3, 2)
    _assert_subnormal(exact, dtype)
    _assert_rounded_once("output", ours, exact)
    grad = _subnormals(*ours.shape, dtype=dtype)
    (got,), (due,) = torch.autograd.grad(ours, x, grad), torch.autograd.grad(exact, wide, grad.double())
    _assert_subnormal(due, dtype)
    _assert_rounded_once("gradient", got, due)


@pytest.mark.parametrize("dtype", SUBNORMAL_DTYPES)
def test_sgd_keeps_subnormals(dtype: torch.dtype) -> None:
    """With powers of 2 for learning rate and momentum, only the rounding of a half-precision parameter is inexact."""
    param, grad = (2 * _subnormals(77, dtype=dtype) for _ in range(2))
    buffer = 2 * _subnormals(77, dtype=torch.float32 if dtype == torch.float32 else dtype).float()
    master = None if dtype == torch.float32 else param.float()
    exact_buffer = buffer.double() / 2 + grad.double()
    exact = param.double() - exact_buffer / (1 if dtype == torch.float32 else 2)
    _assert_subnormal(exact, dtype)
    lr = 1.0 if dtype == torch.float32 else 0.5
    sgd_step([param], [grad], None if master is None else [master], [buffer], lr=lr, momentum=0.5)
    _assert_rounded_once("parameter", param, exact)
    _assert_rounded_once("momentum buffer", buffer, exact_buffer)


@pytest.mark.parametrize("sign", [1, -1])
def test_float16_overflows_at_the_store_and_only_there(sign: int) -> None:
    """float16's largest number is 65504; sums from halfway to 65536 round to infinity. The float32 sums hold all of them."""
    w = torch.ones(1, 2, dtype=torch.float16, device=DEVICE)
    x = sign * torch.tensor([[65504, 15], [65504, 16], [65504, 65504], [65504, -1]], dtype=torch.float16, device=DEVICE)
    exact = F.linear(x.double(), w.double())
    assert exact.half().isinf().flatten().tolist() == [False, True, True, False]
    _assert_rounded_once("linear", kernels.linear(x, w), exact)
    _assert_rounded_once("conv2d", kernels.conv2d(x[:, :, None, None], w[:, :, None, None]), exact[:, :, None, None])
    bias = torch.tensor([-sign * 10000.0], dtype=torch.float16, device=DEVICE)  # added before the sum is rounded
    _assert_rounded_once("linear with bias", kernels.linear(x, w, bias), exact + bias.double())
    _assert_rounded_once("gradient of weight", linear_wgrad(x, torch.ones_like(x[:, :1]), w.t()), x.double().sum(0)[:, None])


def conv2d_wgrad(dz: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """The weight gradient of a convolution with stride 1 and no padding."""
    return wgrad(dz, x, w, Problem.of(x.shape, w, Geometry((1, 1), (0, 0), (1, 1), 1), dz.shape[2:]))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_float16_partial_sums_beyond_the_range(sign: int, split: int) -> None:
    """The sum rises to 6,000,000 (100 times 60000) and falls back without loss, even when partial sums are stored."""
    column = torch.tensor([sign * 60000.0] * 100 + [-sign * 60000.0] * 100 + [3.0], dtype=torch.float16, device=DEVICE)
    ones = torch.ones_like(column)
    with tables.override(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, SPLIT=split, BLOCK_ROWS=16):
        results = {
            "linear": kernels.linear(column[None], ones[None]),
            "gradient of linear's weight": linear_wgrad(column[:, None], ones[:, None], ones[None, :1]),
            "conv2d": kernels.conv2d(column[None, :, None, None], ones[None, :, None, None]),
            "gradient of conv2d's weight": conv2d_wgrad(
                column[None, None, None], ones[None, None, None], ones[:1, None, None, None]
            ),
            "gradient of bias": linear_epilogue_backward(column[:, None], None, None, 0.0, False, True)[1],
        }
    assert {name: result.item() for name, result in results.items()} == dict.fromkeys(results, 3.0)


def test_float16_overflow_of_a_pools_gradient_and_of_a_parameter() -> None:
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float16, device=DEVICE)
    x[0, 0, 2, 2] = 1.0  # in all four windows
    x.requires_grad_()
    for values, due in (([4e4, 4e4, -4e4, 1.0], 4e4), ([4e4, 4e4, 0.0, 0.0], torch.inf), ([-4e4, -4e4, 0.0, 0.0], -torch.inf)):
        grad = torch.tensor(values, dtype=torch.float16, device=DEVICE).view(1, 1, 2, 2)
        (got,) = torch.autograd.grad(kernels.max_pool2d(x, 3, 2), x, grad)
        assert got[0, 0, 2, 2] == due
    param = torch.tensor([65504.0, -65504.0], dtype=torch.float16, device=DEVICE)
    master = param.float()
    sgd_step([param], [torch.tensor([-16.0, 15.0], dtype=torch.float16, device=DEVICE)], [master], lr=1.0)
    assert master.tolist() == [65520.0, -65519.0]
    assert param.tolist() == [torch.inf, -65504.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_nan_and_infinity_reach_the_gradients(name: str, dtype: torch.dtype) -> None:
    """Output and gradients are NaN or infinite exactly where float64's are; the oracle checks both."""
    ours, meaning, *shapes = OPERATIONS[name]
    x, w = (randn(*shape, dtype=dtype, grad=False) for shape in shapes)
    x.view(-1)[7], x.view(-1)[40] = torch.nan, torch.inf
    y = check(ours, meaning, [x.requires_grad_(), w.requires_grad_()], names="input weight")
    assert y.isnan().any()
    assert y.isfinite().any()


@pytest.mark.slow_under_ttsem
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_linear_of_many_features(dtype: torch.dtype) -> None:
    x, w, b = (randn(*s, dtype=dtype, grad=False) for s in ((3, LONG), (5, LONG), (5,)))
    assert_within_tolerance("output", kernels.linear(x, w, b), F.linear(x, w, b), F.linear(x.double(), w.double(), b.double()))


@pytest.mark.thin("bfloat16")
@pytest.mark.slow_under_ttsem
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradients_over_many_rows(dtype: torch.dtype) -> None:
    x, dz = (randn(LONG, width, dtype=dtype, grad=False) for width in (5, 3))
    dw = linear_wgrad(dz, x, x.new_empty(3, 5))
    assert_within_tolerance("weight", dw, dz.t() @ x, dz.double().t() @ x.double())
    with tables.override(BLOCK_ROWS=128):
        _, column_sums = linear_epilogue_backward(dz, None, None, 0.0, False, True)
    assert_within_tolerance("bias", column_sums, dz.sum(0), dz.double().sum(0))


@pytest.mark.thin("bfloat16")
@pytest.mark.slow_under_ttsem
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradient_of_a_filter_over_many_pixels(dtype: torch.dtype) -> None:
    """It runs in half precision through descriptors, one pixel of many images at a time."""
    images, side = (1600, 8) if dtype in HALF else (1, 317)
    channels = 16 if dtype in HALF else 3
    x, dz = (randn(images, channels, side, side, dtype=dtype, grad=False) for _ in range(2))
    assert images * side**2 >= LONG
    x, dz = (t.contiguous(memory_format=torch.channels_last) for t in (x, dz))
    w = x.new_empty(channels, channels, 1, 1)
    ours = conv2d_wgrad(dz, x, w)
    peer, exact = (torch.nn.grad.conv2d_weight(x.to(d), w.shape, dz.to(d)) for d in (dtype, torch.float64))
    assert_within_tolerance("gradient of weight", ours, peer, exact)
