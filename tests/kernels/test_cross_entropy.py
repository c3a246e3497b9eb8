"""cross_entropy and add_cross_entropy against PyTorch's: values, gradients, ignored rows, labels that are no class."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.advanced import add_cross_entropy
from kernels.configs import tables
from kernels.losses import IGNORED, add_cross_entropy_reference
from kernels.runtime import launch

from ..conftest import DEVICE, own_devices
from ..oracle import DTYPES, assert_within_tolerance, dtype_id, randn

# The interpreter also computes the rows past the last one; NumPy warns of their values.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = float("inf"), float("nan")

#: Several blocks of rows and classes, with several blocks of rows in each program; and a single program.
TILES = {"many": {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 16, "SPLIT": 3}, "one": {"SPLIT": 1}}

#: Shapes of the logits: rows of a batch, pixels, a single row.
SHAPES = [(37, 50), (1, 10), (5, 1), (2, 21, 3, 5), (2, 3, 4), (17,)]


@pytest.fixture(params=TILES)
def _tiles(request: pytest.FixtureRequest) -> Any:
    with tables.override(**TILES[request.param]):
        yield


def labels_for(shape: tuple[int, ...], *, ignored: bool = True) -> Tensor:
    """Random classes; one row in five is ignored."""
    classes = shape[min(1, len(shape) - 1)]
    rows = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    labels = torch.randint(0, classes, rows, device=DEVICE)
    if ignored and labels.numel() > 1:
        labels.view(-1)[::5] = IGNORED
    return labels


def pair(labels: Tensor, weight: Tensor | None = None, **options: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Our operation and PyTorch's, each as a function of the logits."""

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: function(x, labels, weight=None if weight is None else weight.to(x.dtype), **options)

    return of(kernels.cross_entropy), of(F.cross_entropy)


def check(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], x: Tensor) -> None:
    """Check loss and gradient by the suite's tolerance rule.

    A loss is a sum of few numbers, and PyTorch's may be exact by chance, so a few float32 roundings are always allowed.
    """
    grad_output = torch.randn_like(ours(x))
    results = []
    for function, dtype in ((ours, x.dtype), (theirs, x.dtype), (theirs, torch.float64)):
        leaf = x.detach().to(dtype).requires_grad_()
        loss = function(leaf)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf, grad_output.to(loss.dtype))))
    for name, got, peer, exact in zip(("loss", "gradient"), *results, strict=True):
        inherent = 2 * torch.finfo(torch.float32).eps * exact.nan_to_num(0, 0, 0).abs().max().item()
        assert_within_tolerance(name, got, peer, exact, inherent=inherent if x.dtype == torch.float32 else 0.0)


def check_case(shape: tuple[int, ...], dtype: torch.dtype, weighted: bool, smoothing: float, reduction: str) -> None:
    weight = torch.rand(shape[min(1, len(shape) - 1)], device=DEVICE).to(dtype) if weighted else None
    ours, theirs = pair(labels_for(shape), weight, label_smoothing=smoothing, reduction=reduction)
    check(ours, theirs, randn(*shape, dtype=dtype))


@pytest.mark.thin
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_options(weighted: bool, smoothing: float, reduction: str, dtype: torch.dtype) -> None:
    with tables.override(**TILES["many"]):
        check_case((37, 50), dtype, weighted, smoothing, reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.1)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("_tiles")
def test_shapes(shape: tuple[int, ...], weighted: bool, smoothing: float, reduction: str) -> None:
    check_case(shape, torch.float32, weighted, smoothing, reduction)


def test_many_classes() -> None:
    ours, theirs = pair(labels_for((3, 100_000), ignored=False), label_smoothing=0.1)
    check(ours, theirs, randn(3, 100_000, dtype=torch.float32))


def test_many_rows(launches: list[str]) -> None:
    """There are so many rows that the rules give them to several programs, with any tiles."""
    kernels.cross_entropy(torch.zeros(20_000, 10, device=DEVICE), labels_for((20_000, 10)))
    assert launches == ["_cross_entropy_kernel", "_cross_entropy_sum_kernel"]
    ours, theirs = pair(labels_for((20_000, 10)))
    check(ours, theirs, randn(20_000, 10, dtype=torch.float32))


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_logits_of_any_size(scale: float) -> None:
    x = torch.randn(9, 20, device=DEVICE) * scale
    ours, theirs = pair(labels_for((9, 20)), reduction="none")
    check(ours, theirs, x)


SPECIAL = {
    "the label's is -inf": ([-INF, 1.0, 2.0], 0),
    "another is -inf": ([-INF, 1.0, 2.0], 1),
    "+inf": ([INF, 1.0, 2.0], 1),
    "nan": ([1.0, NAN, 2.0], 0),
    "all are -inf": ([-INF] * 3, 0),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.usefixtures("_tiles")
def test_special_logits(name: str, smoothing: float) -> None:
    """Special logits stand alone in a row, and before or behind finite ones: a block may hold only special logits."""
    row, label = SPECIAL[name]
    rows = torch.zeros(3, 35, device=DEVICE)
    fill = -INF if "all" in name else 0.5
    rows[0], rows[1], rows[2] = fill, fill, 1.0
    rows[0, :3], rows[1, -3:] = (torch.tensor(row, device=DEVICE),) * 2
    labels = torch.tensor([label, 32 + label, 5], device=DEVICE)
    ours, theirs = pair(labels, label_smoothing=smoothing, reduction="none")
    results = []
    for function in (ours, theirs):
        x = rows.clone().requires_grad_()
        loss = function(x)
        results.append((loss.detach(), torch.autograd.grad(loss, x, torch.ones_like(loss))[0]))
    for got, due in zip(*results, strict=True):
        torch.testing.assert_close(got, due, equal_nan=True)


def test_the_first_classes_may_all_be_impossible() -> None:
    x = torch.randn(4, 50, device=DEVICE)
    x[:, :40] = -INF
    labels = torch.full((4,), 45, device=DEVICE)
    with tables.override(BLOCK_COLUMNS=16):
        loss = kernels.cross_entropy(x, labels)
    torch.testing.assert_close(loss, F.cross_entropy(x, labels))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ["all ignored", "no rows", "weights of zero"])
def test_nothing_to_average(case: str, reduction: str) -> None:
    x = torch.randn(0 if case == "no rows" else 5, 7, device=DEVICE, requires_grad=True)
    labels = torch.full((len(x),), IGNORED if case == "all ignored" else 3, device=DEVICE)
    weight = torch.zeros(7, device=DEVICE) if case == "weights of zero" else None
    results = []
    for function in pair(labels, weight, reduction=reduction):
        loss = function(x)
        results.append((loss.detach(), torch.autograd.grad(loss, x, torch.ones_like(loss))[0]))
    for got, due in zip(*results, strict=True):
        torch.testing.assert_close(got, due, equal_nan=True)


@pytest.mark.parametrize("label", [-1, 7, 2**40, -(2**40), -99, -101])
def test_a_label_that_is_no_class_makes_its_row_nan_and_no_other(label: int) -> None:
    x = torch.randn(5, 7, device=DEVICE, requires_grad=True)
    labels = torch.tensor([0, 1, label, 3, 4], device=DEVICE)
    weight = torch.rand(7, device=DEVICE)
    loss = kernels.cross_entropy(x, labels, weight=weight, label_smoothing=0.1, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    nan = torch.tensor([False, False, True, False, False], device=DEVICE)
    assert torch.equal(loss.isnan(), nan)
    assert torch.equal(grad.isnan(), nan[:, None].expand(5, 7))
    assert kernels.cross_entropy(x, labels).isnan()


def test_labels_of_a_byte() -> None:
    x, labels = torch.randn(6, 200, device=DEVICE), torch.tensor([0, 199, 156, 5, 77, 128], device=DEVICE)
    assert torch.equal(kernels.cross_entropy(x, labels.to(torch.uint8)), kernels.cross_entropy(x, labels))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "every_other", "channels_last"])
def test_any_strides(layout: str) -> None:
    if layout == "channels_last":
        x = torch.randn(2, 5, 3, 4, device=DEVICE).to(memory_format=torch.channels_last)
    else:
        x = {
            "transposed": lambda: torch.randn(9, 6, device=DEVICE).t(),
            "expanded": lambda: torch.randn(1, 9, device=DEVICE).expand(6, 9),
            "every_other": lambda: torch.randn(12, 18, device=DEVICE)[::2, ::2],
        }[layout]()
    labels = torch.stack([labels_for(tuple(x.shape))] * 2, -1)[..., 0]
    copy = x.clone(memory_format=torch.contiguous_format)
    grads = []
    for each in (x, copy):
        leaf = each.detach().requires_grad_()
        grads.append(torch.autograd.grad(kernels.cross_entropy(leaf, labels), leaf)[0])
    assert torch.equal(*grads)


@pytest.mark.usefixtures("_tiles")
def test_int64_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = randn(11, 40, dtype=torch.float32), labels_for((11, 40))

    def results() -> list[Tensor]:
        loss = kernels.cross_entropy(x, labels, label_smoothing=0.1)
        return [loss.detach(), torch.autograd.grad(loss, x)[0]]

    narrow = results()
    monkeypatch.setattr(launch, "force_int64", True)
    assert all(map(torch.equal, results(), narrow))


def test_launches(launches: list[str]) -> None:
    x, labels = randn(12, 10, dtype=torch.float32), labels_for((12, 10))
    kernels.cross_entropy(x, labels).backward()
    assert launches == ["_cross_entropy_kernel", "_cross_entropy_dgrad_kernel"]
    launches.clear()
    with tables.override(BLOCK_ROWS=4, SPLIT=3):
        kernels.cross_entropy(x, labels)
    assert launches == ["_cross_entropy_kernel", "_cross_entropy_sum_kernel"]


def test_a_graph_that_is_kept_gives_its_gradient_again() -> None:
    x = randn(4, 6, dtype=torch.float32)
    loss = kernels.cross_entropy(x, labels_for((4, 6)))
    first, doubled, again = (torch.autograd.grad(loss * factor, x, retain_graph=True)[0] for factor in (1, 2, 1))
    assert torch.equal(first, again)
    assert torch.equal(doubled, 2 * first)


@pytest.mark.skipif(DEVICE != "cpu", reason="in float64")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_derivatives_of_the_gradient(reduction: str) -> None:
    x, labels = randn(4, 3, dtype=torch.float64), labels_for((4, 3))
    weight = torch.rand(3, dtype=torch.float64)
    ours, _ = pair(labels, weight, label_smoothing=0.25, reduction=reduction)
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(ours, x)


def test_no_gradient_was_recorded() -> None:
    operator = torch.ops.alexnet_triton.cross_entropy_fprop
    loss, *_ = operator(randn(4, 6, dtype=torch.float32), labels_for((4, 6)), None, 0.0, "mean", False, False)
    with pytest.raises(RuntimeError, match="recorded without its gradient"):
        loss.backward()


@own_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("weighted", [False, True])
def test_autocast_computes_the_loss_in_float32(dtype: torch.dtype, weighted: bool) -> None:
    if dtype == torch.float64 and DEVICE == "cuda":
        pytest.skip("float64 is for the CPU")
    x, labels = randn(9, 6, dtype=dtype), labels_for((9, 6))
    weight = torch.rand(6, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32)) if weighted else None
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours, theirs = (f(x, labels, weight=weight) for f in (kernels.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss, x)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads)


@own_devices
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return kernels.cross_entropy(x, labels, label_smoothing=0.1)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7):
        x, labels = randn(rows, 6, dtype=torch.float32), labels_for((rows, 6))
        for ours, eager in zip(
            *((f(x, labels), torch.autograd.grad(f(x, labels), x)[0]) for f in (compiled, loss)), strict=True
        ):
            assert torch.equal(ours, eager)


@own_devices
def test_vmap() -> None:
    x, labels = torch.randn(3, 5, 6, device=DEVICE), torch.randint(0, 6, (3, 5), device=DEVICE)
    together = torch.func.vmap(torch.func.grad(kernels.cross_entropy))(x, labels)
    for one, each, own in zip(together, x, labels, strict=True):
        torch.testing.assert_close(one, torch.func.grad(F.cross_entropy)(each, own))


# --------------------------------------------------------------------------------------------------------- bad arguments


BAD = {
    "probabilities": (lambda x, y: (x, x.detach()), TypeError, "torch.nn.functional.cross_entropy"),
    "int32": (lambda x, y: (x, y.int()), TypeError, "labels must be int64 or uint8, got torch.int32"),
    "no tensor": (lambda x, y: (x, [1, 2]), TypeError, "labels must be a torch.Tensor, got list"),
    "logits of ints": (lambda x, y: (y, y), TypeError, "logits must be one of"),
    "a scalar": (lambda x, y: (x.sum(), y[0]), ValueError, r"logits must have shape \(C,\) or \(N, C, ...\)"),
    "no classes": (lambda x, y: (x[:, :0], y), ValueError, "at least one class"),
    "rows": (lambda x, y: (x, y[:3]), ValueError, r"labels must have shape \(4,\) for logits \(4, 6\), got \(3,\)"),
    "labels of one row": (lambda x, y: (x[0], y[:1]), ValueError, r"labels must have shape \(\)"),
    "labels' device": (lambda x, y: (x, y.to("meta")), ValueError, "labels must be on the device of logits"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_logits_and_labels(name: str, launches: list[str]) -> None:
    make, kind, message = BAD[name]
    x, labels = torch.randn(4, 6, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(kind, match=message):
        kernels.cross_entropy(*make(x, labels))
    assert launches == []


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "weight's shape": ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \(6,\)"),
    "weight's dtype": ({"weight": torch.ones(6).half()}, TypeError, "weight must have the dtype of logits"),
    "weight's gradient": ({"weight": torch.ones(6).requires_grad_()}, ValueError, "weight must not require a gradient"),
    "no weight": ({"weight": 1.0}, TypeError, "weight must be a torch.Tensor"),
    "smoothing above 1": ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    "smoothing of nan": ({"label_smoothing": NAN}, ValueError, r"label_smoothing must be in \[0, 1\]"),
    "smoothing of a string": ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number"),
    "reduction": ({"reduction": "average"}, ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'average'"),
}


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name: str, backend: Any, launches: list[str]) -> None:
    options, kind, message = BAD_OPTIONS[name]
    options = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in options.items()}
    x, labels = torch.randn(4, 6, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with kernels.use_backend(backend), pytest.raises(kind, match=message):
        kernels.cross_entropy(x, labels, **options)
    assert launches == []


def test_numpys_numbers() -> None:
    x, labels = torch.randn(4, 6, device=DEVICE), labels_for((4, 6))
    ours = kernels.cross_entropy(x, labels, label_smoothing=np.float64(0.25))  # type: ignore[arg-type]
    assert torch.equal(ours, kernels.cross_entropy(x, labels, label_smoothing=0.25))


# ---------------------------------------------------------------------------------------------------------- running totals


def _totals() -> tuple[Tensor, Tensor]:
    return torch.tensor(2.5, device=DEVICE), torch.tensor(3.0, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("scale", [None, 0.25, 8.0])
@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.usefixtures("_tiles")
def test_totals_and_gradient_of_a_step(rows: int, scale: float | None, dtype: torch.dtype) -> None:
    x = torch.randn(rows, 50, device=DEVICE).to(dtype)
    labels = torch.randint(0, 50, (rows,), device=DEVICE)
    labels[::2] = x[::2].float().argmax(1)
    results = []
    for function in (add_cross_entropy, add_cross_entropy_reference):
        totals = _totals()
        results.append((*totals, function(x, labels, *totals, scale)))
    (loss, hits, gradient), (peer_loss, peer_hits, peer) = results
    exact = 2.5 + F.cross_entropy(x.double(), labels, reduction="sum")
    assert_within_tolerance("loss", loss, peer_loss, exact)
    assert torch.equal(hits, peer_hits)
    if scale is None:
        assert gradient is None
        return
    assert gradient is not None
    leaf = x.double().requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(leaf, labels, reduction="sum") * scale, leaf)
    assert_within_tolerance("gradient", gradient, peer, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("_tiles")
def test_totals_of_a_weighted_and_smoothed_step(weighted: bool, smoothing: float, dtype: torch.dtype) -> None:
    """Weights are float32 for logits of any dtype: weights that balance a training set are no multiples of 2^-8."""
    x = torch.randn(37, 50, device=DEVICE).to(dtype)
    labels = torch.randint(0, 50, (37,), device=DEVICE)
    weight = torch.rand(50, device=DEVICE) + 0.5 if weighted else None
    results = []
    for function in (add_cross_entropy, add_cross_entropy_reference):
        totals = _totals()
        results.append((*totals, function(x, labels, *totals, 0.25, weight=weight, label_smoothing=smoothing)))
    (loss, hits, gradient), (peer_loss, peer_hits, peer) = results
    assert torch.equal(hits, peer_hits)
    assert gradient is not None
    leaf = x.double().requires_grad_()
    exact_weight = None if weight is None else weight.double()
    exact = F.cross_entropy(leaf, labels, exact_weight, label_smoothing=smoothing, reduction="sum")
    assert_within_tolerance("loss", loss, peer_loss, 2.5 + exact.detach())
    (truth,) = torch.autograd.grad(exact * 0.25, leaf)
    assert_within_tolerance("gradient", gradient, peer, truth)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"weight": torch.ones(3)}, r"weight must have shape \(6,\)"),
    ],
)
def test_bad_options_of_a_step(options: dict[str, Any], message: str, backend: Any) -> None:
    options = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in options.items()}
    x, labels = torch.randn(4, 6, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        add_cross_entropy(x, labels, *_totals(), 1.0, **options)


@pytest.mark.usefixtures("_tiles")
def test_a_hit_is_where_argmax_is_the_label() -> None:
    """argmax takes the first of equal logits, the first NaN if there is one, and class 0 where all logits are -inf."""
    x = torch.randn(6, 40, device=DEVICE)
    x[0, [7, 30]] = 9.0
    x[1, [20, 33]] = NAN
    x[2] = -INF
    x[3, [5, 25]] = INF
    x[4, 2], x[4, 38] = INF, NAN
    x[5] = 0.0
    answers = x.argmax(1)
    for label in range(40):
        loss_sum, hits = torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE)
        add_cross_entropy(x, torch.full((6,), label, device=DEVICE), loss_sum, hits)
        assert hits.item() == (answers == label).sum().item(), label


def test_a_label_that_is_no_class_is_no_hit() -> None:
    x, labels = torch.randn(4, 6, device=DEVICE), torch.tensor([IGNORED, 0, 99, 5], device=DEVICE)
    loss_sum, hits = _totals()
    gradient = add_cross_entropy(x, labels, loss_sum, hits, 1.0)
    assert gradient is not None
    assert loss_sum.isnan()
    assert hits.item() == 3 + (x.argmax(1) == labels).sum().item()
    assert gradient.isnan().all(1).tolist() == [False, False, True, False]
    assert not gradient[0].any()


def test_a_step_is_one_launch(launches: list[str]) -> None:
    x, labels = randn(16, 10, dtype=torch.float32), labels_for((16, 10))
    x.backward(add_cross_entropy(x, labels, *_totals(), 1 / 16))
    assert launches == ["_cross_entropy_kernel"]
    assert x.grad is not None


@pytest.mark.parametrize("name", ["loss_sum", "hits"])
@pytest.mark.parametrize(
    "bad", [torch.zeros(1), torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)], ids=str
)
def test_bad_totals(name: str, bad: Tensor) -> None:
    totals = dict(zip(("loss_sum", "hits"), _totals(), strict=True)) | {name: bad.to(DEVICE)}
    message = f"{name} must be a float32 scalar on {DEVICE}.*, got {bad.dtype} {tuple(bad.shape)}"
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        add_cross_entropy(torch.randn(3, 4, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE), **totals)


def test_a_step_needs_rows_of_classes() -> None:
    with pytest.raises(ValueError, match=r"logits must have shape \(N, C\), got \(4,\)"):
        add_cross_entropy(torch.randn(4, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE), *_totals())


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_labels_of_pixels_in_bytes(backend: str) -> None:
    logits = torch.randn(2, 5, 3, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 5, (2, 3), device=DEVICE)
    with kernels.use_backend(backend):
        got, due = (kernels.cross_entropy(logits, given) for given in (labels.to(torch.uint8), labels))
    assert torch.equal(got, due)
