"""linear through tensor descriptors, and its split along K: every pass, and that it is the kernel that runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import linear_rules
from kernels.configs import tables
from kernels.matrix_product import linear_reference
from kernels.runtime import backend, launch

from ..conftest import DEVICE
from ..oracle import check, dtype_id, randn

HALF = (torch.bfloat16, torch.float16)
#: (rows, in, out): rows of all three matrices start at multiples of 16 bytes. With SMALL blocks several, the last ragged.
SHAPES = {
    "several_tiles": (40, 72, 56),
    "odd_rows": (37, 104, 40),
    "one_row": (1, 72, 40),
    "less_than_a_block": (5, 8, 8),
}
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32}

hopper = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="descriptors are Hopper's and later"
)


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
    # A part of a split is at least a block: the shortest K has but one.
    if shape == "several_tiles":
        assert launches.count("_matmul_finish_kernel") == (3 if split > 1 else 0)


@hopper
@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
def test_own_configuration(dtype: torch.dtype, launches: list[str]) -> None:
    """The tiles that the configuration itself picks, over more than one of the widest."""
    check(kernels.linear, F.linear, _tensors((280, 320, 264), dtype), names="input weight bias")
    assert launches.count("_matmul_descriptor_kernel") == 3


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
def test_dropout_is_exactly_the_mask(dtype: torch.dtype, split: int) -> None:
    """Whichever kernel multiplies, split or not, an element is dropped by its own index."""
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


#: What changes a matrix [rows, in], and whether a descriptor can still describe it.
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
    """Before Hopper there is no copy engine; consumer Blackwell has one, but not the shared memory for these tiles."""
    monkeypatch.setattr(backend, "capability", lambda device: capability)
    with tables.override(**SMALL, SPLIT=2):
        check(kernels.linear, F.linear, _tensors((40, 72, 56), torch.bfloat16), names="input weight bias")
    assert launches.count("_matmul_kernel") == 3
    assert "_matmul_descriptor_kernel" not in launches


@hopper
def test_float32_on_tensor_cores(launches: list[str]) -> None:
    """TF32 operands stay in shared memory only with K along the rows, as in the forward pass; IEEE has none of it."""
    x, w, b = _tensors((40, 72, 56), torch.float32)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with tables.override(**SMALL, SPLIT=2):
        y = kernels.linear(x, w, b)
        y.backward(torch.ones_like(y))
    assert launches[0] == "_matmul_descriptor_kernel"
    assert launches.count("_matmul_kernel") == 2
    exact = F.linear(x.double(), w.double(), b.double())
    assert (y - exact).abs().max() <= 2.0**-9 * exact.abs().max()
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    launches.clear()
    kernels.linear(x, w, b)
    assert launches == ["_matmul_kernel"]


@hopper
def test_int64_offsets(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.setattr(launch, "force_int64", True)
    with tables.override(**SMALL, SPLIT=3):
        check(kernels.linear, F.linear, _tensors((37, 104, 40), torch.float16), names="input weight bias")
    assert launches.count("_matmul_descriptor_kernel") == 3


#: (m, n, k) of AlexNet's linear passes that descriptors run, at a batch.
PASSES = [(0, 4096, 6400), (0, 4096, 4096), (0, 10, 4096), (0, 6400, 4096), (4096, 6400, 0), (4096, 4096, 0)]


@pytest.mark.parametrize("batch", [1, 2, 7, 128, 1024])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_candidates_fit(batch: int, itemsize: int) -> None:
    for sizes in PASSES:
        m, n, k = (size or batch for size in sizes)
        candidates = linear_rules.linear_candidates(m, n, k, itemsize)
        assert len({tuple(c.items()) for c in candidates}) == len(candidates) > 0
        for c in candidates:
            stage = (c["BLOCK_M"] + c["BLOCK_N"]) * c["BLOCK_K"] * itemsize
            assert c["num_stages"] * stage <= 227 * 1024
            assert c["BLOCK_M"] * c["BLOCK_N"] / (32 * c["num_warps"]) <= 128
            blocks = -(-k // c["BLOCK_K"])
            assert -(-blocks // -(-blocks // c["SPLIT"])) == c["SPLIT"]  # no part is empty


@pytest.mark.parametrize("sizes", [s for s in PASSES if 10 not in s], ids=str)
def test_every_multiprocessor_of_an_h100_has_work_at_batch_128(sizes: tuple[int, int, int]) -> None:
    m, n, k = (size or 128 for size in sizes)
    chosen = linear_rules._linear_rule(m, n, k, 2)
    programs = -(-m // chosen["BLOCK_M"]) * -(-n // chosen["BLOCK_N"]) * chosen["SPLIT"]
    assert programs >= 0.9 * 132
