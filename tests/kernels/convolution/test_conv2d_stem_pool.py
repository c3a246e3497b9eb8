"""The first layer's convolution, ReLU and pool, against the kernels of other convolutions and pools and against PyTorch.

In half precision one kernel computes all three from cells (space-to-depth). In TF32 convolution and pool are two kernels, and
the pool's gradient has a kernel that writes it with the batch innermost.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

import kernels
from kernels.configs import tables
from kernels.convolution import rules, select, stem_rules
from kernels.convolution.relu_max_pool2d import conv2d_relu_max_pool2d_reference
from kernels.pooling.autograd import no_gradient
from kernels.runtime import launch
from kernels.runtime.backend import INTERPRETED

from ...conftest import DEVICE
from ...oracle import check, dtype_id, integers, randn, tf32_numbers
from .conftest import hopper

pytestmark = [hopper, pytest.mark.usefixtures("tf32")]

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32)
POOL = {"pool_kernel_size": 3, "pool_stride": 2}
#: The kernels that run: the forward pass, the convolution alone, the weight gradient.
OF_HALF = ["_space_to_depth_kernel", "_fold_filter_kernel", "_conv2d_stem_pool_kernel"]
OF_TF32 = ["_fold_filter_kernel", "_conv2d_rows_kernel", "_max_pool2d_fprop_kernel"]
FPROP = {torch.float16: OF_HALF, torch.bfloat16: OF_HALF, torch.float32: OF_TF32}
CONVOLUTION = {d: "_conv2d_rows_kernel" if d == torch.float32 else "_conv2d_stem_kernel" for d in DTYPES}
WGRAD = {d: "_conv2d_rows_wgrad_kernel" if d == torch.float32 else "_conv2d_stem_wgrad_kernel" for d in DTYPES}
#: The kernel of the pool's gradient, in half precision that of the weight's too.
POOL_WGRAD = dict.fromkeys(HALF, "_conv2d_stem_pool_wgrad_kernel") | {torch.float32: "_max_pool2d_dgrad_by_batch_kernel"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A block with 11 x 11 filters at stride 4, and configuration values forced for it; ``why`` says what the case tests."""

    why: str
    n: int
    c: int
    h: int
    w: int
    k: int
    padding: int = 1
    bias: bool = True
    tiles: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.why}-N{self.n}-C{self.c}-H{self.h}-W{self.w}-K{self.k}"

    @property
    def arguments(self) -> dict[str, int]:
        return {"stride": 4, "padding": self.padding, **POOL}

    def fuses_wgrad(self, dtype: torch.dtype) -> bool:
        """Whether a kernel of the first layer computes the pool's gradient: in half precision for even rows and columns."""
        rows, columns = ((size + 2 * self.padding - 11) // 4 + 1 for size in (self.h, self.w))
        return dtype == torch.float32 or (rows % 2 == columns % 2 == 0 and self.k % 16 == 0)

    def tensors(self, make, dtype: torch.dtype) -> list[Tensor | None]:
        """Input, weight and bias (or None), drawn by ``make``."""
        x = make(self.n, self.c, self.h, self.w, dtype=dtype, grad=False)
        return [x, make(self.k, self.c, 11, 11, dtype=dtype), make(self.k, dtype=dtype) if self.bias else None]


# With padding 1, images of 4 * i - 1 rows give i - 2 rows of convolution output.
CASES = (
    Case("one_image", 1, 1, 31, 27, 16),
    Case("one_window", 2, 1, 17, 17, 16, padding=1),
    Case("ragged_images", 18, 1, 31, 35, 32, tiles={"BLOCK_M": 16, "BLOCK_K": 16, "BLOCK_K2": 32, "SPLIT": 3}),
    Case("strips", 3, 1, 23, 47, 16, tiles={"COLUMNS": 2}),
    Case("two_filter_blocks", 2, 1, 31, 27, 96, tiles={"BLOCK_N": 64, "BLOCK_N2": 32, "SPLIT": 5}),
    Case("ragged_filters", 2, 1, 31, 27, 80, tiles={"BLOCK_N": 32, "BLOCK_N2": 16}),
    Case("eight_filters", 2, 1, 31, 27, 8),
    Case("two_rows", 3, 1, 39, 27, 32, tiles={"ROWS": 2, "COLUMNS": 1}),
    Case("two_rows_last_alone", 2, 1, 47, 27, 32, tiles={"ROWS": 2}),
    Case("odd_rows", 2, 1, 35, 31, 16),
    Case("odd_columns", 2, 1, 31, 35, 16),
    Case("pairs_of_one_window", 2, 1, 23, 23, 16),
    Case("pairs_ragged_images", 21, 1, 31, 39, 48, tiles={"BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_K2": 32, "SPLIT": 7}),
    Case("pairs_more_parts_than_steps", 1, 1, 23, 31, 96, tiles={"SPLIT": 11}),
    Case("pairs_ragged_filters", 2, 1, 31, 31, 80, tiles={"BLOCK_N": 32}),
    Case("pairs_three_channels", 2, 3, 31, 23, 16, tiles={"FUSED": 1}),
    Case("pairs_padding_3", 33, 1, 27, 35, 32, padding=3, tiles={"SPLIT": 3}),
    Case("no_padding", 2, 1, 33, 30, 16, padding=0, bias=False),
    Case("no_bias", 3, 1, 31, 31, 48, bias=False, tiles={"SPLIT": 3}),
    Case("three_channels", 2, 3, 31, 27, 16, tiles={"FUSED": 1}),
    Case("rows_of_whole_16_bytes", 5, 1, 31, 32, 16, padding=0),
    Case("padding_2", 2, 1, 29, 30, 24, padding=2),
    Case("padding_3", 3, 1, 27, 33, 40, padding=3, tiles={"BLOCK_N": 32, "BLOCK_N2": 16}),
    Case("batch_33", 33, 1, 17, 19, 8, tiles={"SPLIT": 4}),
    Case("last_pixels_unseen", 2, 1, 36, 34, 72),
)
#: A case whose pool's gradient the first layer's own kernels compute in every dtype.
PAIRS = next(case for case in CASES if case.why == "pairs_ragged_images")


def in_turn(first: int, make: Callable[..., Tensor] | None = None, dtypes: Sequence[torch.dtype] = DTYPES) -> list:
    """Each case with one dtype, in turn from ``dtypes[first]`` on, after ``make`` if given."""
    params = []
    for i, case in enumerate(CASES, first):
        dtype = dtypes[i % len(dtypes)]
        id = f"{case.id}-{dtype_id(dtype)}"
        params.append(pytest.param(make, case, dtype, id=f"{make.__name__}-{id}") if make else pytest.param(case, dtype, id=id))
    return params


#: Configuration values for the fused kernel and for separate kernels; both use the weight gradient over images for any batch.
FUSED, SEPARATE = {"IMAGES_WGRAD": 1}, {"IMAGES_WGRAD": 1, "FUSED": 0}


@contextlib.contextmanager
def configured(case: Case, way: dict[str, int]) -> Iterator[None]:
    """Use the case's configuration in one of the two ways (:data:`FUSED`, :data:`SEPARATE`), inside the block."""
    with tables.override(**case.tiles | way), pytest.MonkeyPatch.context() as patch:
        if way is SEPARATE:
            patch.setattr(select, "_pools_whole_windows", lambda *_: False)
        yield


def run(case: Case, tensors: list[Tensor | None], way: dict[str, int], **arguments) -> Tensor:
    """The block's output, fused or by separate kernels."""
    with configured(case, way):
        return kernels.conv2d_relu_max_pool2d(*tensors, **case.arguments, **arguments)


def gradients(case: Case, output: Tensor, leaves: list[Tensor], grad: Tensor, way: dict[str, int]) -> tuple[Tensor, ...]:
    """The gradients of ``leaves``, fused or by separate kernels."""
    with configured(case, way):
        return torch.autograd.grad(output, leaves, grad)


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have equal values, strides and dtype; NaN equals NaN, and -0.0 equals 0.0."""
    equal = torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(0.0), theirs.nan_to_num(0.0))
    return equal and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype


def positions(output: Tensor) -> Tensor:
    """The window positions that a block saved for its backward pass."""
    return output.grad_fn.saved_tensors[-1]


@pytest.mark.thin
@pytest.mark.parametrize(("make", "case", "dtype"), in_turn(0, randn, HALF) + in_turn(1, integers, HALF))
def test_values_and_positions_are_those_of_two_kernels(make, case: Case, dtype: torch.dtype, launches: list[str]) -> None:
    """They are bit-identical in both memory formats. Integers make ties, and then every third filter is dead."""
    tensors = case.tensors(make, dtype)
    if make is integers and case.bias:
        with torch.no_grad():
            tensors[2][::3] = -1000
    for output_format in (torch.channels_last, torch.contiguous_format):
        theirs = run(case, tensors, SEPARATE, output_format=output_format)
        assert CONVOLUTION[dtype] in launches
        launches.clear()
        ours = run(case, tensors, FUSED, output_format=output_format)
        assert launches == FPROP[dtype]
        assert same_bits(ours, theirs)
        assert torch.equal(positions(ours), positions(theirs))
        assert positions(ours).stride() == ours.stride()
        if make is integers and case.bias:
            assert (positions(ours)[:, ::3] == no_gradient(torch.uint8)).all()


@pytest.mark.parametrize(("case", "dtype"), in_turn(2))
def test_gradients_are_exact_on_integers(case: Case, dtype: torch.dtype, launches: list[str]) -> None:
    """Sums of small integers are exact in any order, so the gradients must equal the reference's bit for bit."""
    x, w, b = case.tensors(lambda *s, **o: integers(*s, high=1, **o), dtype)
    leaves = [t for t in (w, b) if t is not None]
    results = []
    for way in (FUSED, SEPARATE):
        y = run(case, [x, w, b], way)
        grad = (torch.arange(y.numel(), device=DEVICE) % 3 - 1).view(y.shape).to(dtype)
        launches.clear()
        results.append([y, *gradients(case, y, leaves, grad, way)])
        fused = way is FUSED and case.fuses_wgrad(dtype)
        assert (POOL_WGRAD if fused else WGRAD)[dtype] in launches
        assert ("_max_pool2d_dgrad_kernel" in launches) == (not fused)
    y = conv2d_relu_max_pool2d_reference(x, w, b, **case.arguments)
    results.append([y, *torch.autograd.grad(y, leaves, grad)])
    for name, ours, *others in zip(("output", "weight", "bias"), *results, strict=False):
        for theirs in others:
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (17, 20), (18, 25), (30, 38)])
def test_the_gradient_on_the_way_has_the_bits_of_the_pools(row: int, column: int, dtype: torch.dtype) -> None:
    """The image is one pixel of value 1, so each element of the weight gradient is the gradient of one convolution output."""
    case = Case("", 1, 1, 31, 39, 32)
    x = torch.zeros(1, 1, 31, 39, dtype=dtype, device=DEVICE)
    x[0, 0, row, column] = 1
    weight, grad = randn(32, 1, 11, 11, dtype=dtype, grad=False), randn(1, 32, 2, 3, dtype=dtype, grad=False)
    grad[0, 0, 0, 0], grad[0, 1, 1, 2] = torch.inf, torch.nan
    positions = [0, 1, 2, 3, 4, 5, 6, 7, 8, no_gradient(torch.uint8)]
    drawn = torch.randint(0, 10, grad.shape, generator=torch.Generator().manual_seed(row))
    position = torch.tensor(positions, dtype=torch.uint8)[drawn].to(DEVICE)
    geometry = ([1, 1, 31, 39], [4, 4], [1, 1], [1, 1], 1, [6, 8], [3, 3], [2, 2], [0, 0])
    results = []
    for way in (FUSED, SEPARATE):
        with configured(case, way):
            backward = torch.ops.alexnet_triton.conv2d_relu_max_pool2d_backward
            results.append(backward(grad, x, None, weight, position, *geometry, [False, True, True], False))
    (_, weight_1, bias_1, _), (_, weight_2, bias_2, _) = results
    assert same_bits(weight_1, weight_2)
    assert weight_1.count_nonzero() > 20
    assert torch.allclose(bias_1, bias_2, rtol=2 * torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), in_turn(0))
def test_gradients_against_float64(case: Case, dtype: torch.dtype) -> None:
    """The reference's windows take the pixels that ours took: a tie that is due to rounding is none in float64."""
    draw = tf32_numbers if dtype == torch.float32 else randn
    x, w, b = case.tensors(draw, dtype)
    y = run(case, [x, w, b], FUSED)
    where = positions(y).long()
    _, _, p, q = y.shape
    windows_p = 2 * torch.arange(p, device=DEVICE)[:, None]
    windows_q = 2 * torch.arange(q, device=DEVICE)[None, :]

    def block(w: Tensor, b: Tensor | None) -> Tensor:
        """The block as PyTorch computes it."""
        z = torch.nn.functional.conv2d(x.to(w.dtype), w, b, 4, case.padding)
        taken = (where % 9 // 3 + windows_p) * z.shape[3] + where % 3 + windows_q
        values = z.flatten(2).gather(2, taken.flatten(2)).view(y.shape)
        return torch.where(where == no_gradient(torch.uint8), torch.zeros_like(values), values)

    # Where windows overlap, a pixel's gradient is a sum, which TF32 may not hold exactly.
    rounded = dtype == torch.float32 and not INTERPRETED
    with configured(case, FUSED):
        check(lambda w, b: run(case, [x, w, b], FUSED), block, [w, b], names="weight bias", tf32=rounded, draw=draw)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_and_infinity(dtype: torch.dtype, launches: list[str]) -> None:
    """NaN reaches every window that contains it, and the saved position is that of the window's last NaN, as in PyTorch.

    In TF32 such a pixel also reaches a few neighbouring outputs, fused or not: see test_conv2d_rows.py. So in TF32
    only an image with a whole row of NaN is compared with PyTorch.
    """
    case = Case("", 3, 1, 39, 31, 16)
    x, w, b = case.tensors(randn, dtype)
    x[0, 0, 20, 13], x[1, 0, 9, 9], x[2, 0, 0, 30], x[2, 0, 25, 3] = torch.nan, torch.inf, torch.nan, -torch.inf
    if dtype == torch.float32:
        x[0, 0, 20] = torch.nan
    with torch.no_grad():
        b[3], b[5] = torch.nan, torch.inf
    ours, theirs = run(case, [x, w, b], FUSED), run(case, [x, w, b], SEPARATE)
    assert FPROP[dtype][-1] in launches
    assert CONVOLUTION[dtype] in launches
    assert ours.isnan().any()
    assert ours.isinf().any()
    assert same_bits(ours, theirs)
    assert torch.equal(positions(ours), positions(theirs))
    z = torch.nn.functional.conv2d(x.double(), w.double(), b.double(), 4, 1).relu()
    _, index = torch.nn.functional.max_pool2d(z, 3, 2, return_indices=True)
    row, column = index // z.shape[3], index % z.shape[3]
    expected = (row - 2 * torch.arange(ours.shape[2], device=DEVICE)[:, None]) * 3
    expected = expected + column - 2 * torch.arange(ours.shape[3], device=DEVICE)
    compared = slice(1) if dtype == torch.float32 else slice(None)
    is_nan = ours[compared].isnan()
    assert torch.equal(positions(ours)[compared][is_nan].long(), expected[compared][is_nan])
    with torch.no_grad():
        assert same_bits(run(case, [x, w, b], FUSED), theirs)
    grads = [gradients(case, y, [w, b], torch.ones_like(y), way) for y, way in ((ours, FUSED), (theirs, SEPARATE))]
    for mine, other in zip(*grads, strict=True):
        assert torch.equal(mine.isnan(), other.isnan())


@pytest.mark.thin
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES[2:5], ids=lambda case: case.id)
def test_without_gradients_no_position_is_written(case: Case, dtype: torch.dtype, launches: list[str]) -> None:
    written = []

    def note(kernel, grid, arguments):
        if "WRITE_POSITION" in arguments:
            written.append(arguments["WRITE_POSITION"])

    tensors = case.tensors(randn, dtype)
    theirs = run(case, tensors, SEPARATE)
    launches.clear()
    with torch.no_grad(), launch.observe_launches(note):
        ours = run(case, tensors, FUSED)
    assert launches == FPROP[dtype]
    assert written == [False]
    assert same_bits(ours, theirs)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "expanded": lambda t: t[:1, :1, :1, :1].expand_as(t),
    "every_other": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_the_gradient(layout: str, dtype: torch.dtype, launches: list[str]) -> None:
    """The output gradient has any layout, with the positions and cells that the forward pass saved; exact on integers."""
    case = Case("", 3, 1, 31, 39, 16)
    x, w, b = case.tensors(lambda *s, **o: integers(*s, high=1, **o), dtype)
    ours, theirs = run(case, [x, w, b], FUSED), conv2d_relu_max_pool2d_reference(x, w, b, **case.arguments)
    grad = LAYOUTS[layout](integers(*ours.shape, dtype=dtype, high=1, grad=False))
    for mine, other in zip(*(torch.autograd.grad(y, (w, b), grad) for y in (ours, theirs)), strict=True):
        assert torch.equal(mine, other)
    assert POOL_WGRAD[dtype] in launches


@pytest.mark.thin
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize(
    "wanted", ["input", "weight", "bias", "weight and bias", "input and weight", "input and bias", "input and weight and bias"]
)
def test_only_the_gradients_that_are_wanted(wanted: str, dtype: torch.dtype, launches: list[str]) -> None:
    case = PAIRS
    x, w, b = (t.detach() for t in case.tensors(lambda *s, **o: integers(*s, high=1, **o), dtype))
    named = {"input": x, "weight": w, "bias": b}
    leaves = [t.requires_grad_() for name, t in named.items() if name in wanted]
    ours, theirs = run(case, [x, w, b], FUSED), conv2d_relu_max_pool2d_reference(x, w, b, **case.arguments)
    assert FPROP[dtype][-1] in launches
    launches.clear()
    grad = integers(*ours.shape, dtype=dtype, high=1, grad=False)
    for mine, other in zip(*(torch.autograd.grad(y, leaves, grad) for y in (ours, theirs)), strict=True):
        assert torch.equal(mine, other)
    # In half precision the unpooled gradient is computed where the input's gradient needs it; the weight's gradient then reads
    # it.
    fused = "weight" in wanted and (dtype == torch.float32 or "input" not in wanted)
    assert (POOL_WGRAD[dtype] in launches) == fused
    assert ("_max_pool2d_dgrad_kernel" in launches) == ("input" in wanted or wanted == "bias")
    assert bool({"_conv2d_images_kernel", "_conv2d_box_kernel"} & set(launches)) == ("input" in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_id)
def test_offsets_in_int64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.setattr(launch, "force_int64", True)
    case = PAIRS
    x, w, b = case.tensors(lambda *s, **o: integers(*s, high=1, **o), dtype)
    for output_format in (torch.channels_last, torch.contiguous_format):
        ours, theirs = (run(case, [x, w, b], way, output_format=output_format) for way in (FUSED, SEPARATE))
        assert same_bits(ours, theirs)
        assert launches.count(FPROP[dtype][-1]) == launches.count(CONVOLUTION[dtype]) > 0
        theirs = conv2d_relu_max_pool2d_reference(x, w, b, **case.arguments)
        grad = integers(*ours.shape, dtype=dtype, high=1, grad=False)
        for mine, other in zip(*(torch.autograd.grad(y, (w, b), grad) for y in (ours, theirs)), strict=True):
            assert torch.equal(mine, other)
    assert POOL_WGRAD[dtype] in launches


NOT_TAKEN = {
    "padded_pool": {"pool_padding": 1},
    "pool_of_two": {"pool_kernel_size": 2},
    "pool_stride_three": {"pool_stride": 3},
    "partial_windows": {"ceil_mode": True},
    "stride_of_the_filter": {"stride": 2},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("changed", NOT_TAKEN)
def test_other_blocks_run_as_before(changed: str, dtype: torch.dtype, launches: list[str]) -> None:
    x, w = randn(2, 1, 31, 31, dtype=dtype), randn(16, 1, 11, 11, dtype=dtype)
    arguments = {"stride": 4, "padding": 1, **POOL} | NOT_TAKEN[changed]
    kernels.conv2d_relu_max_pool2d(x, w, **arguments).sum().backward()
    assert "_max_pool2d_fprop_kernel" in launches
    assert not {"_conv2d_stem_pool_kernel", "_max_pool2d_dgrad_by_batch_kernel"} & set(launches)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    case = CASES[2]
    tensors = case.tensors(randn, dtype)

    def step() -> list[Tensor]:
        y = run(case, tensors, FUSED)
        return [y, *gradients(case, y, tensors[1:], torch.ones_like(y), FUSED)]

    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("batch", [1, 2, 64, 128, 1024])
@pytest.mark.parametrize("k", [16, 48, 64, 96, 128, 192])
@pytest.mark.parametrize("fold", [48, 144])
def test_configurations_fit(fold: int, k: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations fit on one SM of an H100; with one channel two programs fit, so that they overlap."""
    for module in (rules, stem_rules):
        monkeypatch.setattr(module, "INTERPRETED", False)
        monkeypatch.setattr(module, "tuned", lambda device, key: {})
    device = torch.device(DEVICE)
    for narrow in (False, True):
        tiles = stem_rules.conv2d_stem_pool_config(device, batch, 26, 26, fold, k, narrow)
        assert tiles["BLOCK_K"] + tiles["BLOCK_K2"] >= fold
        assert 1 <= tiles["COLUMNS"] <= 26
        filters = tiles["BLOCK_N"] + tiles["BLOCK_N2"]
        cells = (2 * tiles["ROWS"] + 3) * tiles["BLOCK_M"] * tiles["num_stages"]
        held = 2 if fold == 48 else 1
        assert held * 2 * fold * (3 * filters + cells) < tables.SHARED_BYTES
        assert tiles["BLOCK_M"] * filters * (tiles["ROWS"] + 1) / (32 * tiles["num_warps"]) <= 96, "maxima in registers"
    tiles = stem_rules.conv2d_stem_pool_wgrad_config(device, batch, 26, 26, fold, k, fold // 3)
    stage = tiles["BLOCK_K"] * (4 * tiles["BLOCK_M"] + 3 * tiles["BLOCK_N"]) * 2
    assert 2 * tiles["num_stages"] * stage < tables.SHARED_BYTES
    assert 3 * tiles["BLOCK_M"] * 2 * tiles["BLOCK_N"] / (32 * tiles["num_warps"]) <= 96, "sums in registers"
    assert 1 <= tiles["SPLIT"] <= 2 * tables.MULTIPROCESSORS


@pytest.mark.parametrize("batch", [1, 2, 64, 128, 1024])
@pytest.mark.parametrize("k", [16, 48, 64, 96, 128, 192])
def test_configurations_of_the_weight_gradient_in_tf32_fit(k: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs fit on one SM, and their sums into registers."""
    monkeypatch.setattr(rules, "INTERPRETED", False)
    monkeypatch.setattr(rules, "tuned", lambda device, key: {})
    device = torch.device(DEVICE)
    tiles = rules.conv2d_rows_wgrad_config(device, batch, 54, 54, 48, k)
    filters = tiles["BLOCK_N"] + tiles["BLOCK_N2"]
    assert 2 * tiles["num_stages"] * (3 * tiles["BLOCK_M"] + filters) * tiles["BLOCK_K"] * 4 < tables.SHARED_BYTES
    assert 3 * tiles["BLOCK_M"] * filters / (32 * tiles["num_warps"]) <= 144
