"""linear through tensor descriptors, and its split along K: every pass, and that the expected kernel runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import linear_rules
from kernels.configs import tables
from kernels.convolution import rules
from kernels.matrix_product import linear_reference
from kernels.runtime import gpu, launch

from ..conftest import DEVICE
from ..oracle import check, dtype_id, integers, randn

HALF = (torch.bfloat16, torch.float16)
#: (rows, in, out): rows of all three matrices start at multiples of 16 bytes. SMALL gives several blocks, the last ragged.
SHAPES = {
    "several_tiles": (40, 72, 56),
    "odd_rows": (37, 104, 40),
    "one_row": (1, 72, 40),
    "less_than_a_block": (5, 8, 8),
}
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32}

hopper = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="descriptors need Hopper or later"
)


@pytest.fixture(autouse=True)
def _by_matrix_products() -> Iterator[None]:
    """Use the matrix products for few outputs too, which have their own kernels (tests/kernels/test_linear_narrow.py)."""
    with tables.override(NARROW=0):
        yield


def _tensors(shape: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    rows, features, outputs = shape
    return [randn(rows, features, dtype=dtype), randn(outputs, features, dtype=dtype), randn(outputs, dtype=dtype)]


@hopper
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape: str, dtype: torch.dtype, split: int, launches: list[str]) -> None:
    with tables.override(**SMALL, SPLIT=split):
        check(
            lambda x, w, b: kernels.linear(x, w, b, activation="relu"),
            lambda x, w, b: linear_reference(x, w, b, activation="relu"),
            _tensors(SHAPES[shape], dtype),
            names="input weight bias",
        )
    assert launches.count("_matmul_descriptor_kernel") == 3
    assert "_matmul_kernel" not in launches
    # A part has at least one block, and the smallest K has only one.
    if shape == "several_tiles":
        assert launches.count("_matmul_finish_kernel") == (3 if split > 1 else 0)


@hopper
@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
def test_own_configuration(dtype: torch.dtype, launches: list[str]) -> None:
    """The rules choose the tiles; the tensors are larger than one of the widest tiles."""
    check(kernels.linear, F.linear, _tensors((280, 320, 264), dtype), names="input weight bias")
    assert launches.count("_matmul_descriptor_kernel") == 3


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
def test_dropout_is_exactly_the_mask(dtype: torch.dtype, split: int) -> None:
    """An element is dropped by its own index in every kernel, split or not."""
    seed = 2**40 + 12345
    mask = kernels.dropout_mask((37, 56), 0.5, seed, device=DEVICE)
    with tables.override(**SMALL, BLOCK=128, SPLIT=split):
        check(
            lambda x, w, b: kernels.linear_relu_dropout(x, w, b, 0.5, seed=seed),
            lambda x, w, b: F.relu(F.linear(x, w, b)) * mask * 2,
            _tensors((37, 104, 56), dtype),
            names="input weight bias",
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
def test_a_split_is_deterministic(dtype: torch.dtype) -> None:
    tensors = _tensors((37, 104, 56), dtype)

    def run() -> list[torch.Tensor]:
        with tables.override(**SMALL, SPLIT=3):
            y = kernels.linear(*tensors)
            return [y, *torch.autograd.grad(y, tensors, torch.ones_like(y))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


#: (programs, CUT) for equal shares of the passes of (37, 104, 56), which have 12, 21 and 28 tiles and 4, 2 and 2 steps of K
#: each. With 5 programs shares end inside tiles and have several tiles or less than one; 1000 is more than there are units.
SHARES = {"whole_tiles": (5, 0), "cut": (5, 1), "less_than_a_tile": (23, 1), "one_step": (1000, 1), "one_program": (1, 1)}


@hopper
@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("shares", SHARES)
def test_equal_shares(shares: str, dtype: torch.dtype, launches: list[str]) -> None:
    programs, cut = SHARES[shares]
    with tables.override(**SMALL, PROGRAMS=programs, CUT=cut, BLOCK=128):
        check(
            lambda x, w, b: kernels.linear(x, w, b, activation="relu"),
            lambda x, w, b: linear_reference(x, w, b, activation="relu"),
            _tensors((37, 104, 56), dtype),
            names="input weight bias",
        )
    assert launches.count("_matmul_shares_kernel") == 3
    assert launches.count("_matmul_shares_finish_kernel") == 3 * cut
    assert not {"_matmul_kernel", "_matmul_descriptor_kernel", "_matmul_finish_kernel"} & set(launches)


@hopper
@pytest.mark.parametrize("shares", ["whole_tiles", "cut", "less_than_a_tile"])
def test_dropout_of_equal_shares(shares: str) -> None:
    """The mask depends only on the element's index, and applies to whole and cut tiles alike."""
    programs, cut = SHARES[shares]
    x, w, b = (t.detach() for t in _tensors((37, 104, 56), torch.bfloat16))
    with tables.override(**SMALL, PROGRAMS=programs, CUT=cut, BLOCK=128):
        dropped = kernels.linear_relu_dropout(x, w, b, 0.5, seed=3)
        plain = kernels.linear(x, w, b, activation="relu")
    mask = kernels.dropout_mask((37, 56), 0.5, 3, device=DEVICE)
    assert torch.equal(dropped, torch.where(mask, 2 * plain, 0))


@hopper
def test_equal_shares_are_deterministic_and_add_whole_tiles_as_one_program_does() -> None:
    tensors = _tensors((37, 104, 56), torch.bfloat16)

    def run(**config: int) -> list[torch.Tensor]:
        with tables.override(**SMALL, **config):
            y = kernels.linear(*tensors)
            return [y, *torch.autograd.grad(y, tensors, torch.ones_like(y))]

    cut = {"PROGRAMS": 5, "CUT": 1}
    for first, second in zip(run(**cut), run(**cut), strict=True):
        assert torch.equal(first, second)
    for whole, tiles in zip(run(PROGRAMS=5, CUT=0), run(SPLIT=1), strict=True):
        assert torch.equal(whole, tiles)


#: Layouts of a matrix [rows, in], and whether a descriptor can describe them.
LAYOUTS = {
    "transposed": (lambda t: t.t().contiguous().t(), True),
    "row_stride_of_16_bytes": (lambda t: F.pad(t, (0, 8))[:, : t.shape[1]], True),
    "row_stride_of_2_bytes": (lambda t: F.pad(t, (0, 1))[:, : t.shape[1]], False),
    "starts_at_2_bytes": (lambda t: F.pad(t, (1, 7))[:, 1 : 1 + t.shape[1]], False),
    "every_other": (lambda t: t.repeat_interleave(2, dim=1)[:, ::2], False),
    "one_row_for_all": (lambda t: t[:1].expand_as(t), False),
}


@hopper
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, launches: list[str]) -> None:
    change, described = LAYOUTS[layout]
    with tables.override(**SMALL, SPLIT=2):
        check(
            lambda x, w, b: kernels.linear(change(x), change(w), b),
            lambda x, w, b: F.linear(change(x), change(w), b),
            _tensors((40, 72, 56), torch.bfloat16),
            names="input weight bias",
        )
    assert launches.count("_matmul_descriptor_kernel") == (3 if described else 0)
    assert launches.count("_matmul_kernel") == (0 if described else 3)


@pytest.mark.parametrize("capability", [80, 89, 120])
def test_elsewhere_pointers_run(capability: int, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    """GPUs before Hopper have no TMA; consumer Blackwell has TMA, but not the shared memory for these tiles."""
    monkeypatch.setattr(gpu, "capability", lambda device: capability)
    with tables.override(**SMALL, SPLIT=2):
        check(kernels.linear, F.linear, _tensors((40, 72, 56), torch.bfloat16), names="input weight bias")
    assert launches.count("_matmul_kernel") == 3
    assert "_matmul_descriptor_kernel" not in launches


def _check_tf32(operation: Callable[..., Tensor], reference: Callable[..., Tensor], shape: tuple[int, int, int]) -> None:
    """Check output and gradients on small integers: TF32 rounds none of their products on any device."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    rows, features, outputs = shape
    tensors = [integers(*size, dtype=torch.float32, high=3) for size in ((rows, features), (outputs, features), (outputs,))]
    copies = [t.detach().double().requires_grad_() for t in tensors]
    grad = integers(rows, outputs, dtype=torch.float32, high=3, grad=False)
    ours, exact = operation(*tensors), reference(*copies)
    assert torch.equal(ours.double(), exact)
    grads = torch.autograd.grad(ours, tensors, grad)
    exact_grads = torch.autograd.grad(exact, copies, grad.double())
    for name, got, truth in zip(("input", "weight", "bias"), grads, exact_grads, strict=True):
        assert torch.equal(got.double(), truth), name


@hopper
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("features", [(72, 56), (96, 36)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 5, 17, 130])
def test_tf32(rows: int, features: tuple[int, int], split: int, launches: list[str]) -> None:
    """All three passes run with features that are multiples of 16 and not, with more rows than outputs and fewer."""
    with tables.override(**SMALL, SPLIT=split):
        _check_tf32(
            lambda x, w, b: kernels.linear(x, w, b, activation="relu"),
            lambda x, w, b: linear_reference(x, w, b, activation="relu"),
            (rows, *features),
        )
    assert launches.count("_matmul_descriptor_kernel") == 3
    assert "_matmul_kernel" not in launches
    # Both operands of the weight gradient.
    assert launches.count("_row_major_kernel") == 2


@hopper
@pytest.mark.parametrize("cut", [0, 1])
def test_tf32_in_equal_shares(cut: int, launches: list[str]) -> None:
    """The input gradient's panels are tested too."""
    with tables.override(**SMALL, PROGRAMS=5, CUT=cut):
        _check_tf32(kernels.linear, F.linear, (17, 96, 36))
    assert launches.count("_matmul_shares_kernel") == 3


@hopper
def test_tf32_of_the_own_configuration(launches: list[str]) -> None:
    _check_tf32(kernels.linear, F.linear, (140, 320, 264))
    assert launches.count("_matmul_descriptor_kernel") == 3


@pytest.mark.parametrize("shape", [(5, 10, 32), (5, 32, 10)], ids=str)
def test_tf32_features_that_tma_cannot_read(shape: tuple[int, int, int], launches: list[str]) -> None:
    """Ten columns of four bytes are no multiple of 16 bytes. Ten inputs: no pass can use TMA; ten outputs: only forward."""
    _check_tf32(kernels.linear, F.linear, shape)
    assert launches.count("_matmul_kernel") == (3 if shape[1] == 10 else 2)


@hopper
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tf32_layouts(layout: str, launches: list[str]) -> None:
    change = {
        "row_stride_of_16_bytes": lambda t: F.pad(t, (0, 4))[:, : t.shape[1]],
        "starts_at_2_bytes": lambda t: F.pad(t, (1, 3))[:, 1 : 1 + t.shape[1]],  # 4 bytes here
    }.get(layout, LAYOUTS[layout][0])
    with tables.override(**SMALL, SPLIT=2):
        _check_tf32(
            lambda x, w, b: kernels.linear(change(x), change(w), b),
            lambda x, w, b: F.linear(change(x), change(w), b),
            (40, 80, 56),
        )
    assert launches.count("_matmul_descriptor_kernel") == (3 if LAYOUTS[layout][1] else 0)


def test_exact_float32_uses_no_tensor_cores(launches: list[str]) -> None:
    """PyTorch's switch decides, even where TMA could read the rows."""
    x, w, b = _tensors((40, 72, 56), torch.float32)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    check(kernels.linear, F.linear, [x, w, b], names="input weight bias")
    assert launches.count("_matmul_kernel") == 3
    assert "_matmul_descriptor_kernel" not in launches


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("swap", [1, 2])
def test_transposed_product_of_exact_float32(swap: int, split: int, launches: list[str]) -> None:
    """Weights times input instead of input times weights: bias, ReLU and mask still apply to the right elements."""
    rows, copies = 37, swap - 1
    mask = kernels.dropout_mask((rows, 56), 0.5, 7, device=DEVICE)
    with tables.override(**SMALL, SPLIT=split, SWAP=swap):
        check(
            lambda x, w, b: kernels.linear_relu_dropout(x, w, b, 0.5, seed=7),
            lambda x, w, b: F.relu(F.linear(x, w, b)) * mask * 2,
            _tensors((rows, 104, 56), torch.float32),
            names="input weight bias",
        )
        assert launches.count("_row_major_kernel") == 2 * copies  # the input and the output gradient
        tensors = _tensors((rows, 104, 56), torch.float32)
        check(
            lambda *t: kernels.linear(*t, activation="relu"),
            lambda *t: F.relu(F.linear(*t)),
            tensors,
            names="input weight bias",
        )
        launches.clear()
        x, w, _ = tensors
        transposed = x.detach().t().contiguous().t()
        assert torch.equal(kernels.linear(transposed, w), kernels.linear(x, w))
        assert launches.count("_row_major_kernel") == copies  # only the second input


def test_narrow_outputs_are_not_transposed(launches: list[str]) -> None:
    check(kernels.linear, F.linear, _tensors((37, 104, 10), torch.float32), names="input weight bias")
    assert "_row_major_kernel" not in launches


@hopper
@pytest.mark.parametrize(
    ("config", "kernel"),
    [
        ({"SPLIT": 3}, "_matmul_descriptor_kernel"),
        ({"PROGRAMS": 5, "CUT": 0}, "_matmul_shares_kernel"),
        ({"PROGRAMS": 5, "CUT": 1}, "_matmul_shares_kernel"),
    ],
    ids=["split", "whole_tiles", "cut"],
)
def test_int64_offsets(config: dict[str, int], kernel: str, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.setattr(launch, "force_int64", True)
    with tables.override(**SMALL, **config):
        check(kernels.linear, F.linear, _tensors((37, 104, 40), torch.float16), names="input weight bias")
    assert launches.count(kernel) == 3


#: (m, n, k) of AlexNet's linear passes through descriptors; 0 stands for the batch.
PASSES = [(0, 4096, 6400), (0, 4096, 4096), (0, 10, 4096), (0, 6400, 4096), (4096, 6400, 0), (4096, 4096, 0)]


@pytest.mark.parametrize("batch", [1, 2, 7, 128, 1024])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_candidates_fit(batch: int, itemsize: int) -> None:
    for sizes in PASSES:
        m, n, k = (size or batch for size in sizes)
        candidates = linear_rules.linear_candidates(m, n, k, itemsize)
        assert len({tuple(c.items()) for c in candidates}) == len(candidates) > 0
        tables.check_table({"configs": {str(i): c for i, c in enumerate(candidates)}})
        assert len({frozenset(c) for c in candidates}) == 1  # a candidate sets every value that the rule sets
        for c in candidates:
            shared = c["num_stages"] * (c["BLOCK_M"] + c["BLOCK_N"]) * c["BLOCK_K"] * itemsize
            if c["PROGRAMS"]:
                shared += 0 if c["CUT"] else c["BLOCK_M"] * c["BLOCK_N"] * itemsize
                shared *= c["PROGRAMS"] // 132
            assert shared <= 227 * 1024
            assert c["BLOCK_M"] * c["BLOCK_N"] / (32 * c["num_warps"]) <= 128
            blocks = -(-k // c["BLOCK_K"])
            assert -(-blocks // -(-blocks // c["SPLIT"])) == c["SPLIT"]  # no part is empty


#: (m, n, k) of the passes by FMAs, with forward passes as transposed products; 0 stands for the batch.
FMA_PASSES = [(4096, 0, 6400), (4096, 0, 4096), (0, 10, 4096), (0, 6400, 4096), (0, 4096, 10), (4096, 6400, 0), (10, 4096, 0)]


@pytest.mark.parametrize("batch", [1, 2, 7, 20, 128, 1024])
def test_fma_candidates_fit(batch: int) -> None:
    for sizes in FMA_PASSES:
        m, n, k = (size or batch for size in sizes)
        candidates = linear_rules.fma_candidates(m, n, k)
        assert len({tuple(c.items()) for c in candidates}) == len(candidates) > 0
        tables.check_table({"configs": {str(i): c for i, c in enumerate(candidates)}})
        for c in candidates:
            assert c["num_stages"] * (c["BLOCK_M"] + c["BLOCK_N"]) * c["BLOCK_K"] * 4 <= 227 * 1024
            assert c["BLOCK_M"] * c["BLOCK_N"] / (32 * c["num_warps"]) <= 64
            blocks = -(-k // c["BLOCK_K"])
            assert -(-blocks // -(-blocks // c["SPLIT"])) == c["SPLIT"]  # no part is empty


@pytest.mark.parametrize("size", [1, 15, 16, 17, 31, 33, 63, 65])
def test_a_small_product_has_an_fma_configuration(size: int) -> None:
    for m, n, k in ((size, size, size), (1, size, 3), (size, 1, 3), (size, 10000, 1), (10000, size, 1)):
        assert linear_rules.fma_candidates(m, n, k), (m, n, k)


@pytest.mark.parametrize("sizes", [s for s in FMA_PASSES if 10 not in s], ids=str)
def test_exact_products_of_batch_128_fill_an_h100_without_a_split(sizes: tuple[int, int, int]) -> None:
    """A split's parts are bytes written and read once more, and every SM has work without a split.

    The exception is fc1's input gradient, with 100 tiles of 64 x 128: ptxas 13.4 (Triton 3.9) spills in tiles of 64 x 64 with
    four warps.
    """
    m, n, k = (size or 128 for size in sizes)
    chosen = linear_rules._fma_rule(m, n, k, True)
    assert chosen["SPLIT"] == 1
    assert -(-m // chosen["BLOCK_M"]) * -(-n // chosen["BLOCK_N"]) >= (100 if n == 6400 else 132)


def test_float32_has_table_entries_of_its_own() -> None:
    keys = {
        linear_rules.linear_key("fprop", 128, 10, 4096, dtype, precision)
        for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"))
    }
    assert len(keys) == 3
    half = linear_rules.linear_key("fprop", 128, 10, 4096, torch.float16, "ieee")
    assert half == linear_rules.linear_key("fprop", 128, 10, 4096, torch.bfloat16, "ieee") == "linear_fprop m128 n10 k4096"


@pytest.mark.parametrize("batch", [128, 256, 1024])
@pytest.mark.parametrize("sizes", [s for s in PASSES if 10 not in s], ids=str)
def test_every_multiprocessor_of_an_h100_has_work(sizes: tuple[int, int, int], batch: int) -> None:
    m, n, k = (size or batch for size in sizes)
    chosen = linear_rules._linear_rule(m, n, k, 2)
    tiles = -(-m // chosen["BLOCK_M"]) * -(-n // chosen["BLOCK_N"])
    units = tiles * (-(-k // chosen["BLOCK_K"]) if chosen["CUT"] else chosen["SPLIT"])
    programs = chosen["PROGRAMS"] or units
    busiest = -(-programs // 132) * -(-units // programs)
    assert units / 132 >= 0.85 * busiest


def test_a_table_of_before_equal_shares_means_a_program_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table's entry without equal shares means one program per tile, even where the rule would choose equal shares."""
    monkeypatch.setattr(linear_rules, "INTERPRETED", False)
    measured = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "SPLIT": 1, "num_warps": 4, "num_stages": 2}
    args = (torch.device("meta"), "wgrad", 4096, 6400, 128, torch.bfloat16, "ieee")
    for table in ({}, measured):
        monkeypatch.setattr(linear_rules, "tuned", lambda *_, table=table: table)
        assert ("PROGRAMS" in linear_rules.linear_config(*args, descriptors=True)) == (table == {})
    assert linear_rules.linear_config(*args, descriptors=True) == measured


def test_float16_has_the_configurations_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules and tables of linear layers and convolutions agree: float16 products take the same time as bfloat16's."""
    halves = [
        linear_rules.linear_key("fprop", 128, 10, 4096, dtype, "ieee")
        + rules.conv2d_key("conv2d_fprop", 128, 12, 12, 256, 384, 3, 3, dtype)
        for dtype in HALF
    ]
    assert halves[0] == halves[1]
    monkeypatch.setattr(linear_rules, "INTERPRETED", False)
    for batch, pass_ in itertools.product((1, 128, 256, 1024), ("fprop", "dgrad", "wgrad")):
        for sizes in PASSES:
            args = [torch.device("meta"), pass_, *(size or batch for size in sizes)]
            chosen = [linear_rules.linear_config(*args, dtype, "ieee", descriptors=True) for dtype in HALF]
            assert chosen[0] == chosen[1]
