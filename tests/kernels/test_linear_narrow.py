"""Linear layers with few outputs: one kernel forward, one backward, and the limits beyond which matrix products run."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import linear_rules
from kernels.configs import tables
from kernels.linear_rules import linear_narrow_candidates, linear_narrow_config
from kernels.matrix_product import linear_reference
from kernels.runtime import launch

from ..configurations import pretend_gpu
from ..conftest import DEVICE, own_devices
from ..oracle import DTYPES, check, dtype_id, integers, randn

FORWARD, BACKWARD = "_linear_narrow_fprop_kernel", "_linear_narrow_backward_kernel"
#: (rows, in, out): blocks of 16 rows and 32 features give several programs and steps, of which the last is ragged.
SHAPES = {
    "classifier": (37, 100, 10),
    "one_row": (1, 40, 3),
    "one_output": (19, 33, 1),
    "one_feature": (5, 1, 1),
    "most_outputs": (20, 70, 32),
    "seventeen": (33, 64, 17),
}
SMALL = {"ROWS": 2, "BLOCK_M": 16, "BLOCK_K": 32}


def _tensors(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    rows, features, outputs = shape
    return [randn(rows, features, dtype=dtype), randn(outputs, features, dtype=dtype), randn(outputs, dtype=dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape: str, activation: str | None, dtype: torch.dtype, launches: list[str]) -> None:
    with tables.override(**SMALL):
        check(
            lambda x, w, b: kernels.linear(x, w, b, activation=activation),
            lambda x, w, b: linear_reference(x, w, b, activation=activation),
            _tensors(SHAPES[shape], dtype),
            names="input weight bias",
        )
    assert launches == [FORWARD, BACKWARD]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_own_configuration(dtype: torch.dtype, launches: list[str]) -> None:
    check(kernels.linear, F.linear, _tensors((140, 1100, 10), dtype), names="input weight bias")
    assert launches == [FORWARD, BACKWARD]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropout_is_exactly_the_mask(p: float, dtype: torch.dtype, launches: list[str]) -> None:
    seed = 2**40 + 12345
    mask = kernels.dropout_mask((37, 10), p, seed, device=DEVICE)
    launches.clear()
    with tables.override(**SMALL):
        check(
            lambda x, w, b: kernels.linear_relu_dropout(x, w, b, p, seed=seed),
            lambda x, w, b: F.relu(F.linear(x, w, b)) * mask * (2 if p == 0.5 else 0),
            _tensors((37, 100, 10), dtype),
            names="input weight bias",
        )
    assert launches == [FORWARD, BACKWARD]


def test_an_infinite_gradient_is_not_hidden_by_dropout() -> None:
    x, w, b = _tensors((9, 7, 10), torch.float32)
    y = kernels.linear_relu_dropout(x, w, b, 0.5, seed=7)
    theirs = F.relu(F.linear(x, w, b)) * kernels.dropout_mask(y.shape, 0.5, 7, device=DEVICE) * 2
    grad = torch.full_like(y, torch.inf)
    (ours,), (exact,) = (torch.autograd.grad(out, b, grad) for out in (y, theirs))
    assert exact.isnan().any()
    assert not ours[~exact.isfinite()].isfinite().any()


STRIDED = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every_other": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize("layout", STRIDED)
def test_any_strides(layout: str, wide: bool, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.setattr(launch, "force_int64", wide)
    change = STRIDED[layout]
    with tables.override(**SMALL):
        check(
            lambda x, w, b: kernels.linear(change(x), change(w), b, activation="relu"),
            lambda x, w, b: F.relu(F.linear(change(x), change(w), b)),
            _tensors((20, 70, 10), torch.float32),
            names="input weight bias",
        )
    assert launches == [FORWARD, BACKWARD]


def test_a_gradient_of_any_strides() -> None:
    """Gradients have strides of zero, as ``sum().backward()`` passes them, or transposed memory."""
    tensors = _tensors((20, 70, 10), torch.float32)
    for grad in (torch.ones(1, 1, device=DEVICE).expand(20, 10), randn(10, 20, dtype=torch.float32, grad=False).t()):
        ours = torch.autograd.grad(kernels.linear(*tensors), tensors, grad)
        for got, exact in zip(ours, torch.autograd.grad(F.linear(*tensors), tensors, grad), strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", ["vector", "transposed"])
def test_the_weights_shape_and_strides_are_its_gradients(weight: str) -> None:
    x = randn(2, 3, 7, dtype=torch.float32)
    w = randn(7, dtype=torch.float32) if weight == "vector" else randn(7, 3, dtype=torch.float32).detach().t().requires_grad_()
    y = kernels.linear(x, w)
    assert y.shape == F.linear(x, w).shape
    got, exact = (torch.autograd.grad(out.sum(), w)[0] for out in (y, F.linear(x, w)))
    assert got.stride() == w.stride()
    torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 2), (1, 2), (0, 1)], ids=str)
def test_only_what_is_asked_for(wanted: tuple[int, ...], launches: list[str]) -> None:
    tensors = _tensors((37, 100, 10), torch.float32)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in wanted)
    with tables.override(**SMALL):
        check(kernels.linear, F.linear, tensors, names="input weight bias")
    assert launches == [FORWARD, BACKWARD]


def test_the_bias_alone_is_a_sum(launches: list[str]) -> None:
    x, w, b = _tensors((37, 100, 10), torch.float32)
    check(kernels.linear, F.linear, [x.detach(), w.detach(), b], names="input weight bias")
    assert launches == [FORWARD, "_epilogue_backward_kernel"]


@pytest.mark.parametrize(("rows", "features"), [(0, 7), (5, 0)])
def test_nothing_to_sum(rows: int, features: int) -> None:
    check(kernels.linear, F.linear, _tensors((rows, features, 10), torch.float32), names="input weight bias")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
def test_with_exact_sums_both_forms_give_the_same_bits(dtype: torch.dtype) -> None:
    tensors = [integers(*shape, dtype=dtype, high=2) for shape in ((37, 60), (10, 60), (10,))]

    def run(narrow: int) -> list[Tensor]:
        with tables.override(**SMALL, NARROW=narrow):
            y = kernels.linear_relu_dropout(*tensors, 0.5, seed=1)
            return [y, *torch.autograd.grad(y, tensors, torch.ones_like(y))]

    for narrow, products in zip(run(1), run(0), strict=True):
        assert torch.equal(narrow, products)


def test_two_runs_give_the_same_bits() -> None:
    tensors = _tensors((37, 100, 10), torch.bfloat16)

    def run() -> list[Tensor]:
        with tables.override(**SMALL):
            y = kernels.linear(*tensors)
            return [y, *torch.autograd.grad(y, tensors, torch.ones_like(y))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@own_devices
def test_compiled_it_is_one_graph_whose_gradients_are_the_same() -> None:
    tensors = _tensors((5, 7, 10), torch.float32)

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return kernels.linear_relu_dropout(x, w, b, 0.5, seed=5).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 600):  # 600 rows are too many for one program
        x = randn(rows, 7, dtype=torch.float32)
        ours = torch.autograd.grad(compiled(x, *tensors[1:]), (x, *tensors[1:]))
        for got, exact in zip(ours, torch.autograd.grad(step(x, *tensors[1:]), (x, *tensors[1:])), strict=True):
            assert torch.equal(got, exact)


def _narrow(pass_: str, m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> int:
    return linear_narrow_config(torch.empty(0, device=DEVICE).device, pass_, m, n, k, dtype, "ieee")["NARROW"]


def test_what_is_too_large_goes_to_the_matrix_products(launches: list[str]) -> None:
    for pass_ in ("narrow_fprop", "narrow_backward"):
        assert _narrow(pass_, 128, 10, 4096) == 1
        assert _narrow(pass_, 512, 32, 100) == 1
        assert _narrow(pass_, 513, 32, 100) == _narrow(pass_, 512, 33, 100) == _narrow(pass_, 5, 0, 7) == 0
    assert _narrow("narrow_fprop", 1, 10, 10000) == 1
    assert _narrow("narrow_fprop", 1, 10, 20000) == _narrow("narrow_fprop", 1, 10, 10000, torch.float32) == 0
    assert _narrow("narrow_fprop", 1, 10, 2978) == 1  # 11 rows in half precision, which cp.async cannot load: 64 KiB
    assert _narrow("narrow_fprop", 1, 10, 2990) == 0
    assert _narrow("narrow_backward", 1, 10, 10**6) == 1
    check(kernels.linear, F.linear, _tensors((513, 7, 10), torch.float32), names="input weight bias")
    assert not {FORWARD, BACKWARD} & set(launches)


def test_a_table_decides_but_not_beyond_what_the_kernels_can_do() -> None:
    off = {f"linear_{pass_} m{m} n10 k4096": {"NARROW": 0} for pass_ in ("narrow_fprop", "narrow_backward") for m in (128,)}
    on = {f"linear_{pass_} m5 n33 k40": {"NARROW": 1} for pass_ in ("narrow_fprop", "narrow_backward")}
    with pretend_gpu(90, interpreted=False), mock.patch.object(linear_rules, "tuned", lambda _, key: (off | on).get(key, {})):
        for pass_ in ("narrow_fprop", "narrow_backward"):
            assert _narrow(pass_, 128, 10, 4096) == 0
            assert _narrow(pass_, 7, 10, 4096) == 1
            assert _narrow(pass_, 5, 33, 40) == 0
    with tables.override(NARROW=1):
        assert _narrow("narrow_fprop", 5, 33, 40) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
def test_candidates_are_what_a_table_may_say(dtype: torch.dtype) -> None:
    shapes = ((128, 10, 4096), (1, 10, 4096), (100, 32, 84), (1, 1, 4096), (128, 10, 40), (500, 32, 1), (1, 1, 1))
    for (m, n, k), pass_ in itertools.product(shapes, ("narrow_fprop", "narrow_backward")):
        found = linear_narrow_candidates(pass_, m, n, k, dtype.itemsize)
        assert found
        tables.check_table({"configs": {str(i): candidate for i, candidate in enumerate(found)}})


def test_rows_at_once_of_a_half_type() -> None:
    """These rows fit in registers: fewer where K's alignment is unknown, with many outputs, and with int64 offsets."""

    def rows(n: int, k: int, wide: bool = False) -> int:
        config = linear_narrow_config(torch.device("cpu"), "narrow_backward", 128, n, k, torch.float16, "ieee", wide=wide)
        return config["BLOCK_M"]

    with pretend_gpu(90, interpreted=False), tables.untuned():
        assert rows(10, 4096) == 128
        assert rows(10, 84) == rows(17, 4096) == rows(10, 4096, wide=True) == 64
        assert rows(17, 84, wide=True) == rows(10, 2500, wide=True) == 32
