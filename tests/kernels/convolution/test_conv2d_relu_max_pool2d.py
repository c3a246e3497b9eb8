"""conv2d_relu_max_pool2d against the three PyTorch operations."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kernels
from kernels.convolution.relu_max_pool2d import conv2d_relu_max_pool2d_reference

from ...conftest import DEVICE
from ...oracle import DTYPES, assert_within_tolerance, check, dtype_id, each_with_dtypes, integers, randn


@dataclasses.dataclass(frozen=True)
class Case:
    """A block; ``why`` says why the case is here."""

    why: str
    x: tuple[int, int, int, int] = (2, 3, 13, 11)
    w: tuple[int, int, int, int] = (4, 3, 3, 3)
    bias: bool = True
    conv: tuple = (1, 1)
    pool: dict = dataclasses.field(default_factory=lambda: {"pool_kernel_size": 3, "pool_stride": 2})

    @property
    def id(self) -> str:
        return f"{self.why}-{'x'.join(map(str, self.x))}-{'x'.join(map(str, self.w))}"


CASES = (
    Case("alexnet"),
    Case("conv1", x=(1, 1, 27, 23), w=(9, 1, 11, 11), conv=(4, 1)),
    Case("no_bias", bias=False),
    Case("grouped", x=(2, 4, 9, 8), w=(6, 2, 3, 3), conv=(1, 1, 1, 2)),
    Case("padded_pool", pool={"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}),
    Case("ceil", x=(1, 3, 12, 12), pool={"pool_kernel_size": 3, "pool_stride": 2, "ceil_mode": True}),
    Case("own_stride", pool={"pool_kernel_size": (2, 3)}),
    Case("filter_is_image", x=(2, 3, 5, 4), w=(4, 3, 5, 4), conv=(1, 0), pool={"pool_kernel_size": 1}),
    Case("one_pixel", x=(1, 1, 1, 1), w=(1, 1, 1, 1), conv=(1, 0), pool={"pool_kernel_size": 1}),
)


@pytest.mark.parametrize(("case", "dtype"), each_with_dtypes(CASES))
@pytest.mark.usefixtures("small_tiles")
def test_exact_on_integers(case: Case, dtype: torch.dtype) -> None:
    """Sums of small integers are exact in every dtype and ties are frequent, so results must be equal bit for bit.

    Inputs and filters lie in [-1, 1], so sums stay below 256, up to which bfloat16 holds every integer.
    """
    x = integers(*case.x, dtype=dtype, high=1)
    w = integers(*case.w, dtype=dtype, high=1)
    b = integers(case.w[0], dtype=dtype) if case.bias else None
    leaves = [t for t in (x, w, b) if t is not None]
    results = []
    for operation in (kernels.conv2d_relu_max_pool2d, conv2d_relu_max_pool2d_reference):
        y = operation(x, w, b, *case.conv, **case.pool)
        grad = (torch.arange(y.numel(), device=DEVICE) % 3 - 1).view(y.shape).to(dtype)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    for name, ours, theirs in zip(("output", "input", "weight", "bias"), *results, strict=False):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize >= 4], ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
@pytest.mark.usefixtures("small_tiles")
def test_forward_and_gradients(case: Case, dtype: torch.dtype) -> None:
    """Dtypes are float32 and float64: where half precision rounds to a tie, float64 has none and takes another position."""
    tensors = [
        randn(*case.x, dtype=dtype),
        randn(*case.w, dtype=dtype),
        randn(case.w[0], dtype=dtype) if case.bias else None,
    ]
    output = check(
        lambda x, w, b: kernels.conv2d_relu_max_pool2d(x, w, b, *case.conv, **case.pool),
        lambda x, w, b: conv2d_relu_max_pool2d_reference(x, w, b, *case.conv, **case.pool),
        tensors,
        names="input weight bias",
    )
    assert output.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 kernels run in the interpreter only")
def test_gradcheck() -> None:
    tensors = [
        randn(1, 2, 6, 5, dtype=torch.float64),
        randn(2, 2, 3, 3, dtype=torch.float64),
        randn(2, dtype=torch.float64),
    ]
    assert torch.autograd.gradcheck(
        lambda *t: kernels.conv2d_relu_max_pool2d(*t, padding=1, pool_kernel_size=3, pool_stride=2),
        tensors,
        fast_mode=True,
    )


def test_the_unpooled_activation_is_not_kept() -> None:
    x, w = randn(2, 3, 13, 11, dtype=torch.float32), randn(4, 3, 3, 3, dtype=torch.float32)
    y = kernels.conv2d_relu_max_pool2d(x, w, padding=1, pool_kernel_size=3, pool_stride=2)
    saved = y.grad_fn.saved_tensors
    assert [(t.shape, t.dtype) for t in saved if t is not None] == [
        (x.shape, x.dtype),
        (w.shape, w.dtype),
        (y.shape, torch.uint8),
    ]


def test_an_output_can_be_changed_in_place() -> None:
    """The backward pass does not read the output, as in PyTorch."""
    x, w = integers(2, 3, 9, 9, dtype=torch.float32), integers(4, 3, 3, 3, dtype=torch.float32)
    ours, theirs = (
        torch.autograd.grad(block(x, w, pool_kernel_size=3, pool_stride=2).mul_(3).sum(), (x, w))
        for block in (kernels.conv2d_relu_max_pool2d, conv2d_relu_max_pool2d_reference)
    )
    for got, exact in zip(ours, theirs, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.usefixtures("small_tiles")
def test_output_format(dtype: torch.dtype) -> None:
    """Both memory formats have the same bits, for any format of the gradient; positions have the output's format."""
    x, w, b = (integers(*shape, dtype=dtype, high=1) for shape in ((2, 3, 13, 11), (6, 3, 3, 3), (6,)))
    results = []
    for output_format in (None, torch.channels_last, torch.contiguous_format):
        y = kernels.conv2d_relu_max_pool2d(x, w, b, pool_kernel_size=3, pool_stride=2, output_format=output_format)
        assert y.is_contiguous(memory_format=output_format or torch.channels_last)
        assert y.grad_fn.saved_tensors[-1].stride() == y.stride()
        grad = (torch.arange(y.numel(), device=DEVICE) % 3 - 1).view(y.shape).to(dtype)
        results.append([y, *torch.autograd.grad(y, (x, w, b), grad)])
    for channels_last in results[:2]:
        for got, exact in zip(results[2], channels_last, strict=True):
            assert torch.equal(got, exact)
    unbatched = kernels.conv2d_relu_max_pool2d(
        x[0], w, b, pool_kernel_size=3, pool_stride=2, output_format=torch.contiguous_format
    )
    assert unbatched.is_contiguous()
    with kernels.use_backend("torch"):
        reference = kernels.conv2d_relu_max_pool2d(
            x, w, b, pool_kernel_size=3, pool_stride=2, output_format=torch.contiguous_format
        )
    assert reference.is_contiguous()
    assert torch.equal(reference, results[2][0])


GRADIENTS = {
    "input": ["_max_pool2d_dgrad_kernel", "_conv2d_dgrad_kernel"],
    "weight": ["_max_pool2d_dgrad_kernel", "_conv2d_wgrad_kernel", "_sum_parts_kernel"],
    "bias": ["_max_pool2d_dgrad_kernel", "_sum_parts_kernel"],
    # The launch that sums the parts of the weight gradient also sums the bias gradient.
    "all": ["_max_pool2d_dgrad_kernel", "_conv2d_dgrad_kernel", "_conv2d_wgrad_kernel", "_sum_parts_kernel"],
}


@pytest.mark.parametrize("wanted", GRADIENTS)
def test_only_what_is_asked_for_is_launched(wanted: str, launches: list[str]) -> None:
    """The pool's kernel computes the gradient before the ReLU and the bias's partial sums in one pass."""
    shapes = {"input": (2, 3, 9, 9), "weight": (4, 3, 3, 3), "bias": (4,)}
    tensors = {name: randn(*shape, dtype=torch.float32, grad=wanted in (name, "all")) for name, shape in shapes.items()}
    y = kernels.conv2d_relu_max_pool2d(**tensors, pool_kernel_size=3, pool_stride=2)
    assert launches == ["_conv2d_fprop_kernel", "_max_pool2d_fprop_kernel"]
    launches.clear()
    y.sum().backward()
    assert launches == GRADIENTS[wanted]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("pool", [{"pool_kernel_size": 3, "pool_stride": 2}, {"pool_kernel_size": 5, "pool_stride": 2}])
def test_the_bias_gradient_is_the_sum_of_what_reaches_the_relu(pool: dict) -> None:
    """The kernel with unrolled windows computes it, and so does the one for larger windows."""
    x, w = integers(3, 1, 17, 15, dtype=torch.float16, high=1), integers(5, 1, 3, 3, dtype=torch.float16, high=1)
    b = torch.zeros(5, dtype=torch.float16, device=DEVICE, requires_grad=True)
    z = torch.nn.functional.conv2d(x, w, b)
    pooled = torch.nn.functional.max_pool2d(z.relu(), pool["pool_kernel_size"], pool["pool_stride"])
    grad = torch.randn(pooled.shape, device=DEVICE).half()
    exact = (grad.double() * (pooled > 0)).sum(dim=(0, 2, 3))
    y = kernels.conv2d_relu_max_pool2d(x, w, b, **pool)
    ours, peer = (torch.autograd.grad(output, b, grad)[0] for output in (y, pooled))
    assert_within_tolerance("gradient of bias", ours, peer, exact)


@pytest.mark.parametrize("kernel_size", [15, 16])
def test_windows_of_more_positions_than_a_byte_tells(kernel_size: int) -> None:
    x, w = integers(1, 1, 18, 17, dtype=torch.float32), integers(2, 1, 1, 1, dtype=torch.float32)
    b = torch.tensor([0.0, -9.0], device=DEVICE).requires_grad_()  # the second channel is dead
    results = []
    for block in (kernels.conv2d_relu_max_pool2d, conv2d_relu_max_pool2d_reference):
        y = block(x, w, b, pool_kernel_size=kernel_size, pool_stride=1)
        results.append([y, *torch.autograd.grad(y.sum(), (x, w, b))])
    for got, exact in zip(*results, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_give_the_same_bits() -> None:
    x, w, b = (randn(*s, dtype=torch.bfloat16) for s in ((2, 3, 13, 11), (4, 3, 3, 3), (4,)))

    def run():
        y = kernels.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_kernel_size=3, pool_stride=2)
        return [y, *torch.autograd.grad(y, (x, w, b), torch.ones_like(y))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_nan_propagates() -> None:
    x, w = randn(1, 2, 9, 9, dtype=torch.float32, grad=False), randn(3, 2, 3, 3, dtype=torch.float32, grad=False)
    x[0, 1, 4, 4] = torch.nan
    pool = {"pool_kernel_size": 3, "pool_stride": 2}
    ours, theirs = (f(x, w, **pool) for f in (kernels.conv2d_relu_max_pool2d, conv2d_relu_max_pool2d_reference))
    assert ours.isnan().any()
    assert torch.equal(ours.isnan(), theirs.isnan())


def test_empty_batch_and_unbatched() -> None:
    w = randn(4, 3, 3, 3, dtype=torch.float32)
    x = randn(3, 13, 11, dtype=torch.float32)
    pool = {"pool_kernel_size": 3, "pool_stride": 2}
    assert kernels.conv2d_relu_max_pool2d(x.new_empty(0, 3, 13, 11), w, **pool).shape == (0, 4, 5, 4)
    y = kernels.conv2d_relu_max_pool2d(x, w, **pool)
    assert torch.equal(y, kernels.conv2d_relu_max_pool2d(x[None], w, **pool)[0])


X, W = torch.zeros(2, 3, 13, 11), torch.zeros(4, 3, 3, 3)
BAD = {
    "channels": ({"input": X[:, :2]}, ValueError, "input has 2 channels"),
    "pool_kernel_size": ({"pool_kernel_size": 0}, ValueError, "pool_kernel_size must be at least 1"),
    "pool_padding": ({"pool_padding": 2}, ValueError, "pool_padding must be at most half of pool_kernel_size"),
    "pool_stride": ({"pool_stride": 0}, ValueError, "pool_stride must be at least 1"),
    "output_format": ({"output_format": torch.preserve_format}, ValueError, "output_format must be None"),
    "empty_output": ({"pool_kernel_size": 12}, ValueError, "the output would be empty"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused_before_any_launch(bad: str, launches: list[str]) -> None:
    changed, kind, message = BAD[bad]
    arguments = {"input": X, "weight": W, "pool_kernel_size": 3} | changed
    for backend in ("auto", "torch"):
        with kernels.use_backend(backend), pytest.raises(kind, match=message):
            kernels.conv2d_relu_max_pool2d(**arguments)
    assert launches == []
