"""conv2d against F.conv2d."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import kernels
from kernels.configs import tables
from kernels.convolution.autograd import conv2d_reference
from kernels.runtime import launch

from ...conftest import DEVICE, own_devices
from ...oracle import DTYPES, assert_within_tolerance, check, dtype_id, each_with_dtypes, integers, randn


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution; ``why`` says why the case is here."""

    why: str
    n: int = 2
    c: int = 6
    h: int = 9
    w: int = 7
    k: int = 8
    r: int = 3
    s: int = 3
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = True
    activation: str | None = None

    @property
    def id(self) -> str:
        return f"{self.why}-N{self.n}-C{self.c}-H{self.h}-W{self.w}-K{self.k}-R{self.r}-S{self.s}"

    def tensors(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        weight = (self.k, self.c // self.groups, self.r, self.s)
        return [
            randn(self.n, self.c, self.h, self.w, dtype=dtype),
            randn(*weight, dtype=dtype),
            randn(self.k, dtype=dtype) if self.bias else None,
        ]

    def arguments(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups


CASES = (
    Case("plain"),
    Case("same_size", padding=1, activation="relu"),
    Case("conv1", n=1, c=1, h=27, w=23, k=17, r=11, s=11, stride=4, padding=1, activation="relu"),
    Case("conv2", n=1, c=9, h=13, w=13, k=20, r=5, s=5, padding=2, activation="relu"),
    Case("no_bias", bias=False, padding=1),
    Case("one_by_one", c=19, k=21, r=1, s=1, activation="relu"),
    Case("one_by_one_strided", c=7, k=5, r=1, s=1, stride=3),
    Case("rectangular", r=2, s=5, stride=(1, 2), padding=(1, 0), activation="relu"),
    Case("stride_over_filter", r=2, s=2, stride=3, padding=1),
    Case("dilated", dilation=2, padding=2, activation="relu"),
    Case("dilated_strided_coprime", h=13, w=12, stride=2, dilation=3, padding=3),
    Case("dilated_strided_common", h=13, w=15, stride=(4, 6), dilation=(2, 4), padding=(2, 1)),
    Case("grouped", c=6, k=9, groups=3, padding=1, activation="relu"),
    Case("depthwise", c=5, k=10, groups=5, padding=1),
    Case("padding_over_filter", padding=4, activation="relu"),
    Case("filter_is_image", n=3, h=5, w=4, r=5, s=4, activation="relu"),
    Case("one_pixel", n=1, c=1, h=1, w=1, k=1, r=1, s=1),
    Case("same", padding="same", r=4, s=3, dilation=(1, 2)),
    Case("valid", padding="valid", stride=2),
)


@pytest.mark.parametrize(("case", "dtype"), each_with_dtypes(CASES))
@pytest.mark.usefixtures("small_tiles")
def test_forward_and_gradients(case: Case, dtype: torch.dtype) -> None:
    def ours(x, w, b):
        return kernels.conv2d(x, w, b, *case.arguments(), activation=case.activation)

    def reference(x, w, b):
        return conv2d_reference(x, w, b, *case.arguments(), activation=case.activation)

    output = check(ours, reference, case.tensors(dtype), names="input weight bias")
    assert output.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.slow_under_ttsem  # 37 s of processor time; AlexNet's own configurations run there
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_own_configuration(dtype: torch.dtype) -> None:
    """The rules choose the tiles; the tensors are larger than one of the widest tiles."""
    tensors = [randn(3, 70, 15, 14, dtype=dtype), randn(140, 70, 3, 3, dtype=dtype), randn(140, dtype=dtype)]
    check(
        lambda x, w, b: kernels.conv2d(x, w, b, padding=1, activation="relu"),
        lambda x, w, b: F.relu(F.conv2d(x, w, b, padding=1)),
        tensors,
        names="input weight bias",
    )


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_inside": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every_other": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "offset": lambda t: F.pad(t, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "expanded": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("small_tiles")
def test_any_strides(layout: str) -> None:
    """Inputs, weights and output gradients of equal values give right results in every memory layout."""
    change = LAYOUTS[layout]
    x, w, b = (
        randn(2, 4, 7, 9, dtype=torch.float32),
        randn(5, 4, 3, 3, dtype=torch.float32),
        randn(5, dtype=torch.float32),
    )
    grad = randn(2, 5, 7, 9, dtype=torch.float32, grad=False)

    def run(convolve, dtype):
        xs, ws, bs = (t.detach().to(dtype).requires_grad_() for t in (x, w, b))
        y = convolve(change(xs), change(ws), bs)
        return [y, *torch.autograd.grad(y, (xs, ws, bs), change(grad.to(dtype)))]

    def reference(x, w, b):
        return F.conv2d(x, w, b, padding=1)

    ours = run(lambda x, w, b: kernels.conv2d(x, w, b, padding=1), torch.float32)
    results = zip(ours, run(reference, torch.float32), run(reference, torch.float64), strict=True)
    for name, (got, peer, exact) in zip(("output", "input", "weight", "bias"), results, strict=True):
        assert_within_tolerance(name, got, peer, exact)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_weight_gradient_has_the_weights_strides(memory_format: torch.memory_format) -> None:
    weight = randn(5, 4, 3, 3, dtype=torch.float32, grad=False).contiguous(memory_format=memory_format).requires_grad_()
    y = kernels.conv2d(randn(2, 4, 7, 9, dtype=torch.float32), weight)
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert grad.stride() == weight.stride()


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 kernels run in the interpreter only")
@pytest.mark.parametrize("arguments", [(1, 1, 1, 1), (2, 1, 1, 2), ((3, 2), (0, 2), (2, 1), 1)], ids=["plain", "groups", "all"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradcheck(arguments: tuple, activation: str | None) -> None:
    tensors = [
        randn(2, 2, 5, 6, dtype=torch.float64),
        randn(4, 2 // arguments[3], 2, 3, dtype=torch.float64),
        randn(4, dtype=torch.float64),
    ]
    assert torch.autograd.gradcheck(lambda *t: kernels.conv2d(*t, *arguments, activation=activation), tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_and_infinity_propagate(dtype: torch.dtype) -> None:
    x, w, b = (t.detach() for t in Case("", padding=1).tensors(dtype))
    x[0, 1, 3, 4], x[1, 2, 5, 5], b[3] = torch.nan, torch.inf, -torch.inf
    ours = kernels.conv2d(x, w, b, padding=1, activation="relu")
    exact = F.relu(F.conv2d(x.double(), w.double(), b.double(), padding=1))
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours.isposinf(), exact.isposinf())
    assert ours.isnan().any()


@pytest.mark.parametrize("activation", [None, "relu"])
def test_empty_batch(activation: str | None) -> None:
    x, w, b = (
        randn(0, 4, 7, 9, dtype=torch.float32),
        randn(5, 4, 3, 3, dtype=torch.float32),
        randn(5, dtype=torch.float32),
    )
    y = kernels.conv2d(x, w, b, activation=activation)
    assert y.shape == (0, 5, 5, 7)
    dx, dw, db = torch.autograd.grad(y.sum(), (x, w, b))
    assert dx.shape == x.shape
    assert not dw.any()
    assert not db.any()


def test_unbatched_input() -> None:
    x, w = randn(4, 7, 9, dtype=torch.float32), randn(5, 4, 3, 3, dtype=torch.float32)
    check(kernels.conv2d, F.conv2d, [x, w, None], names="input weight bias")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    tensors = Case("", padding=1).tensors(dtype)

    def run():
        y = kernels.conv2d(*tensors, padding=1, activation="relu")
        return [y, *torch.autograd.grad(y, tensors, torch.ones_like(y))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_an_output_can_be_changed_in_place() -> None:
    x, w, b = Case("").tensors(torch.float32)
    results = []
    for convolve in (kernels.conv2d, F.conv2d):
        y = F.leaky_relu_(convolve(x, w, b).add_(1), 0.2)
        results.append(torch.autograd.grad(y.sum(), (x, w, b)))
    ours, theirs = results
    for got, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


@own_devices
def test_meta_tensors_have_the_shape() -> None:
    x, w = torch.empty(2, 6, 9, 7, device="meta"), torch.empty(8, 6, 3, 3, device="meta")
    assert kernels.conv2d(x, w).shape == (2, 8, 7, 5)


def test_numpy_integers_are_integers() -> None:
    x, w = randn(1, 2, 5, 5, dtype=torch.float32, grad=False), randn(3, 2, 3, 3, dtype=torch.float32, grad=False)
    assert torch.equal(kernels.conv2d(x, w, stride=np.int64(2)), kernels.conv2d(x, w, stride=2))


@pytest.mark.parametrize(
    ("wanted", "kernels_launched"),
    [
        ("input", ["_epilogue_backward_kernel", "_conv2d_dgrad_kernel"]),
        ("weight", ["_epilogue_backward_kernel", "_conv2d_wgrad_kernel", "_sum_parts_kernel"]),
        ("bias", ["_epilogue_backward_kernel"]),
    ],
)
def test_only_what_is_asked_for_is_launched(wanted: str, kernels_launched: list[str], launches: list[str]) -> None:
    tensors = dict(zip(("input", "weight", "bias"), Case("").tensors(torch.float32), strict=True))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    y = kernels.conv2d(**tensors, activation="relu")
    assert launches == ["_conv2d_fprop_kernel"]
    launches.clear()
    y.sum().backward()
    assert launches == kernels_launched


@pytest.mark.usefixtures("small_tiles")
def test_int64_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for tensors of more than 2^31 elements, run on small ones, are right."""
    monkeypatch.setattr(launch, "force_int64", True)
    case = Case("", c=6, k=9, groups=3, stride=2, padding=1)
    check(
        lambda *t: kernels.conv2d(*t, *case.arguments(), activation="relu"),
        lambda *t: F.relu(F.conv2d(*t, *case.arguments())),
        case.tensors(torch.float32),
        names="input weight bias",
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("split", [1, 2, 5, 100])
def test_any_split_of_the_reduction(split: int) -> None:
    """The split weight gradient is right, even with more parts than blocks; integers make the sums exact."""
    x, w = integers(2, 3, 9, 7, dtype=torch.float32), integers(4, 3, 3, 3, dtype=torch.float32)
    with tables.override(SPLIT=split):
        y = kernels.conv2d(x, w, padding=1)
        grad = torch.ones_like(y)
        (ours,) = torch.autograd.grad(y, w, grad)
    (exact,) = torch.autograd.grad(F.conv2d(x, w, padding=1), w, grad)
    assert torch.equal(ours, exact)


@own_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_autocast(dtype: torch.dtype) -> None:
    x, w, b = Case("").tensors(torch.float32)
    with torch.autocast(DEVICE, dtype=dtype):
        y = kernels.conv2d(x, w, b)
        assert y.dtype == F.conv2d(x, w, b).dtype == dtype
        with torch.autocast(DEVICE, enabled=False):
            assert kernels.conv2d(x, w, b).dtype == torch.float32
    plain = kernels.conv2d(x.to(dtype), w.to(dtype), b.to(dtype))
    assert torch.equal(y, plain)
    for grad, tensor in zip(torch.autograd.grad(y.float().sum(), (x, w, b)), (x, w, b), strict=True):
        assert grad.dtype == tensor.dtype


def test_tf32_follows_the_convolution_switch() -> None:
    from kernels.runtime.arguments import conv_input_precision, matmul_input_precision

    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert (conv_input_precision(torch.float32), matmul_input_precision(torch.float32)) == ("tf32", "ieee")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert (conv_input_precision(torch.float32), matmul_input_precision(torch.float32)) == ("ieee", "tf32")
    assert conv_input_precision(torch.bfloat16) == "ieee"


@own_devices
def test_compiles_as_one_graph() -> None:
    x, w, b = Case("").tensors(torch.float32)

    def step(x, w, b):
        return kernels.conv2d(x, w, b, padding=1, activation="relu").sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(x, w, b), (x, w, b))
    for got, exact in zip(ours, torch.autograd.grad(step(x, w, b), (x, w, b)), strict=True):
        assert torch.equal(got, exact)


def test_checkpointed_with_create_graph() -> None:
    x, w, b = Case("").tensors(torch.float32)

    def step(x):
        return kernels.conv2d(x, w, b, activation="relu")

    y = torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False)
    (ours,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.equal(ours, torch.autograd.grad(step(x).sum(), x)[0])


X, W, B = torch.zeros(2, 6, 9, 7), torch.zeros(8, 6, 3, 3), torch.zeros(8)

BAD = {
    "input_rank": (lambda: (X[0, 0], W, B), {}, ValueError, r"input must be .* got shape \(9, 7\)"),
    "weight_rank": (lambda: (X, W[0], B), {}, ValueError, "weight must be"),
    "not_a_tensor": (lambda: (X, "weight", B), {}, TypeError, "weight must be a torch.Tensor, got str"),
    "channels": (lambda: (X[:, :5], W, B), {}, ValueError, "input has 5 channels"),
    "filters_by_groups": (lambda: (X, W[:, :2], B), {"groups": 3}, ValueError, "divisible by groups=3"),
    "groups": (lambda: (X, W, B), {"groups": 0}, ValueError, "groups must be a positive int"),
    "bias_shape": (lambda: (X, W, B[:7]), {}, ValueError, r"bias must have shape \(8,\)"),
    "integer_dtype": (lambda: (X.int(), W, B), {}, TypeError, "input must be one of"),
    "mixed_dtype": (lambda: (X, W.half(), B), {}, TypeError, "weight must have the dtype of input"),
    "mixed_device": (lambda: (X, W.to("meta"), B), {}, ValueError, "weight must be on the device of input"),
    "sparse": (lambda: (X.to_sparse(), W, B), {}, TypeError, "strided"),
    "stride": (lambda: (X, W, B), {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride_type": (lambda: (X, W, B), {"stride": 1.5}, TypeError, "stride must be an int"),
    "stride_three": (lambda: (X, W, B), {"stride": (1, 1, 1)}, TypeError, "stride must be an int or two ints"),
    "padding": (lambda: (X, W, B), {"padding": -1}, ValueError, "padding must be at least 0"),
    "padding_name": (lambda: (X, W, B), {"padding": "full"}, ValueError, 'padding must be .*"same"'),
    "same_with_stride": (lambda: (X, W, B), {"padding": "same", "stride": 2}, ValueError, "needs stride 1"),
    "dilation": (lambda: (X, W, B), {"dilation": 0}, ValueError, "dilation must be at least 1"),
    "empty_output": (lambda: (X, W, B), {"dilation": 5}, ValueError, "the output would be empty"),
    "activation": (lambda: (X, W, B), {"activation": "gelu"}, ValueError, "activation must be None or"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused_before_any_launch(bad: str, launches: list[str]) -> None:
    tensors, options, kind, message = BAD[bad]
    for backend in ("auto", "torch"):
        with kernels.use_backend(backend), pytest.raises(kind, match=message):
            kernels.conv2d(*tensors(), **options)
    assert launches == []
