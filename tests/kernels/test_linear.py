"""linear and linear_relu_dropout against F.linear, F.relu and the mask that dropout_mask returns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.configs import tables
from kernels.matrix_product import linear_reference
from kernels.runtime import launch

from ..conftest import DEVICE, own_devices
from ..oracle import DTYPES, check, dtype_id, randn


@pytest.fixture(autouse=True)
def _by_matrix_products() -> Iterator[None]:
    """Use the matrix products for few outputs too, which have their own kernels (tests/kernels/test_linear_narrow.py)."""
    with tables.override(NARROW=0):
        yield


#: Why a shape is here -> (rows, in, out).
SHAPES = {
    "one_tile": (5, 7, 11),
    "several_tiles": (37, 50, 45),
    "one_row": (1, 40, 33),
    "one_feature": (19, 1, 1),
    "classifier": (18, 65, 10),
}


def _tensors(shape: tuple[int, int, int], dtype: torch.dtype, bias: bool = True) -> list[torch.Tensor | None]:
    rows, features, outputs = shape
    return [
        randn(rows, features, dtype=dtype),
        randn(outputs, features, dtype=dtype),
        randn(outputs, dtype=dtype) if bias else None,
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_tiles")
def test_forward_and_gradients(shape: str, activation: str | None, dtype: torch.dtype) -> None:
    check(
        lambda x, w, b: kernels.linear(x, w, b, activation=activation),
        lambda x, w, b: linear_reference(x, w, b, activation=activation),
        _tensors(SHAPES[shape], dtype, bias=shape != "one_row"),
        names="input weight bias",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_own_configuration(dtype: torch.dtype) -> None:
    """The rules choose the tiles; the tensors are larger than one of the widest tiles."""
    check(kernels.linear, F.linear, _tensors((140, 300, 530), dtype), names="input weight bias")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.usefixtures("small_tiles")
def test_dropout_is_exactly_the_mask(dtype: torch.dtype) -> None:
    seed = 2**40 + 12345
    mask = kernels.dropout_mask((37, 45), 0.5, seed, device=DEVICE)
    assert 0 < mask.sum() < mask.numel()
    check(
        lambda x, w, b: kernels.linear_relu_dropout(x, w, b, 0.5, seed=seed),
        lambda x, w, b: F.relu(F.linear(x, w, b)) * mask * 2,
        _tensors((37, 50, 45), dtype),
        names="input weight bias",
    )


def test_an_infinite_gradient_is_not_hidden_by_dropout() -> None:
    """Ours is NaN or infinite where PyTorch's is: a gradient scaler looks for such values."""
    x, w, b = _tensors((9, 7, 33), torch.float32)
    y = kernels.linear_relu_dropout(x, w, b, 0.5, seed=7)
    mask = kernels.dropout_mask(y.shape, 0.5, 7, device=DEVICE)
    theirs = F.relu(F.linear(x, w, b)) * mask * 2
    grad = torch.full_like(y, torch.inf)
    (ours,), (exact,) = (torch.autograd.grad(out, b, grad) for out in (y, theirs))
    assert exact.isnan().any()
    assert not ours[~exact.isfinite()].isfinite().any()


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_give_the_same_bits() -> None:
    tensors = _tensors((37, 50, 45), torch.bfloat16)

    def run():
        y = kernels.linear_relu_dropout(*tensors, 0.5, seed=1)
        return [y, *torch.autograd.grad(y, tensors, torch.ones_like(y))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.usefixtures("small_tiles")
def test_dropout_probabilities(p: float) -> None:
    mask = kernels.dropout_mask((19, 33), p, 7, device=DEVICE)
    scale = 0.0 if p == 1 else 1 / (1 - p)
    check(
        lambda x, w, b: kernels.linear_relu_dropout(x, w, b, p, seed=7),
        lambda x, w, b: F.relu(F.linear(x, w, b)) * mask * scale,
        _tensors((19, 20, 33), torch.float32),
        names="input weight bias",
    )


def test_dropout_off() -> None:
    tensors = _tensors((5, 7, 11), torch.float32)
    y = kernels.linear_relu_dropout(*tensors, 0.5, training=False)
    assert torch.equal(y, kernels.linear(*tensors, activation="relu"))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    x, w, b = randn(*leading, 7, dtype=torch.float32), *_tensors((1, 7, 11), torch.float32)[1:]
    check(kernels.linear, F.linear, [x, w, b], names="input weight bias")


STRIDED = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every_other": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.usefixtures("small_tiles")
def test_any_strides(layout: str) -> None:
    change = STRIDED[layout]
    check(
        lambda x, w, b: kernels.linear(change(x), change(w), b),
        lambda x, w, b: F.linear(change(x), change(w), b),
        _tensors((20, 18, 35), torch.float32),
        names="input weight bias",
    )


def test_gradient_of_an_expanded_sum() -> None:
    """``sum().backward()`` passes an output gradient whose strides are all zero."""
    x, w, b = _tensors((5, 7, 11), torch.float32)
    ours = torch.autograd.grad(kernels.linear(x, w, b).sum(), (x, w, b))
    for got, exact in zip(ours, torch.autograd.grad(F.linear(x, w, b).sum(), (x, w, b)), strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 kernels run in the interpreter only")
def test_gradcheck() -> None:
    tensors = _tensors((4, 5, 6), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: kernels.linear(*t, activation="relu"), tensors, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *t: kernels.linear_relu_dropout(*t, 0.3, seed=3), tensors, fast_mode=True)


def test_nan_propagates() -> None:
    x, w, b = _tensors((5, 7, 11), torch.float32)
    x = x.detach()
    x[2, 3] = torch.nan
    y = kernels.linear(x, w, b, activation="relu")
    assert torch.equal(y.isnan(), F.relu(F.linear(x, w, b)).isnan())
    assert y.isnan().any()


@pytest.mark.parametrize(
    ("wanted", "kernels_launched"),
    [
        ("input", ["_epilogue_backward_kernel", "_matmul_kernel"]),
        ("weight", ["_epilogue_backward_kernel", "_matmul_kernel"]),
        ("bias", ["_epilogue_backward_kernel"]),
    ],
)
def test_only_what_is_asked_for_is_launched(wanted: str, kernels_launched: list[str], launches: list[str]) -> None:
    tensors = dict(zip(("input", "weight", "bias"), _tensors((5, 7, 11), torch.float32), strict=True))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    y = kernels.linear(**tensors, activation="relu")
    launches.clear()
    y.sum().backward()
    assert launches == kernels_launched


@pytest.mark.usefixtures("small_tiles")
def test_int64_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "force_int64", True)
    mask = kernels.dropout_mask((37, 45), 0.5, 11, device=DEVICE)
    check(
        lambda x, w, b: kernels.linear_relu_dropout(x, w, b, 0.5, seed=11),
        lambda x, w, b: F.relu(F.linear(x, w, b)) * mask * 2,
        _tensors((37, 50, 45), torch.float32),
        names="input weight bias",
    )


@own_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_autocast(dtype: torch.dtype) -> None:
    x, w, b = _tensors((5, 7, 11), torch.float32)
    with torch.autocast(DEVICE, dtype=dtype):
        assert kernels.linear(x, w, b).dtype == F.linear(x, w, b).dtype == dtype
        assert kernels.linear_relu_dropout(x, w, b).dtype == dtype


@own_devices
def test_compiles_as_one_graph() -> None:
    tensors = _tensors((5, 7, 11), torch.float32)

    def step(x, w, b):
        return kernels.linear_relu_dropout(x, w, b, 0.5, seed=5).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*tensors), tensors)
    for got, exact in zip(ours, torch.autograd.grad(step(*tensors), tensors), strict=True):
        assert torch.equal(got, exact)


X, W, B = torch.zeros(5, 7), torch.zeros(11, 7), torch.zeros(11)
BAD = {
    "scalar": ((torch.tensor(1.0), W, B), {}, ValueError, "input must be"),
    "weight_rank": ((X, W[None], B), {}, ValueError, "weight must be"),
    "bias_of_a_vector": ((X, W[0], B[0]), {}, ValueError, "bias must be None with a weight of shape"),
    "bias_matrix": ((X, W, B.expand(5, 11)), {}, ValueError, r"bias must have shape \(11,\)"),
    "features": ((X[:, :6], W, B), {}, ValueError, "input has 6 features"),
    "bias": ((X, W, B[:5]), {}, ValueError, r"bias must have shape \(11,\)"),
    "dtype": ((X, W.half(), B), {}, TypeError, "weight must have the dtype of input"),
    "device": ((X, W, B.to("meta")), {}, ValueError, "bias must be on the device of input"),
    "activation": ((X, W, B), {"activation": "tanh"}, ValueError, "activation must be"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused_before_any_launch(bad: str, launches: list[str]) -> None:
    tensors, options, kind, message = BAD[bad]
    for backend in ("auto", "torch"):
        with kernels.use_backend(backend), pytest.raises(kind, match=message):
            kernels.linear(*tensors, **options)
    assert launches == []


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_bad_probability_is_refused(p: float, launches: list[str]) -> None:
    with pytest.raises(ValueError, match=r"p .* must be in \[0, 1\]"):
        kernels.linear_relu_dropout(X, W, B, p)
    assert launches == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("split", [1, 3, 50])
@pytest.mark.parametrize(("m", "n", "k"), [(33, 40, 72), (1, 16, 200), (70, 8, 64)], ids=str)
def test_through_descriptors(m: int, n: int, k: int, split: int, dtype: torch.dtype, launches: list[str]) -> None:
    """All three passes use TMA, ragged in every direction, with and without a split along K."""
    tensors = [randn(m, k, dtype=dtype), randn(n, k, dtype=dtype), randn(n, dtype=dtype)]
    with tables.override(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, SPLIT=split):
        check(
            lambda x, w, b: kernels.linear(x, w, b, activation="relu"),
            lambda x, w, b: F.relu(F.linear(x, w, b)),
            tensors,
            names="input weight bias",
        )
    assert launches.count("_matmul_descriptor_kernel") == 3
    assert ("_matmul_finish_kernel" in launches) == (split > 1)


@pytest.mark.parametrize("split", [1, 4])
def test_dropout_of_a_split_product(split: int) -> None:
    """The mask depends only on the element's index, not on the kernel that adds its parts."""
    x, w = randn(20, 64, dtype=torch.bfloat16, grad=False), randn(48, 64, dtype=torch.bfloat16, grad=False)
    with tables.override(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, SPLIT=split):
        y = kernels.linear_relu_dropout(x, w, None, 0.5, seed=3)
        kept = kernels.dropout_mask((20, 48), 0.5, 3).to(DEVICE)
        plain = kernels.linear(x, w, activation="relu")
    assert torch.equal(y, torch.where(kept, 2 * plain, 0))


def test_rows_that_tma_cannot_read(launches: list[str]) -> None:
    """Ten columns of two bytes are no multiple of 16 bytes, so the kernel loads through pointers."""
    tensors = [randn(5, 10, dtype=torch.float16), randn(32, 10, dtype=torch.float16)]
    check(kernels.linear, F.linear, tensors, names="input weight")
    assert launches.count("_matmul_kernel") >= 1
