"""The forward pass over rows of taps: with any rest of a filter row after whole chunks, at every edge of the image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kernels
from alexnet_triton import candidates
from kernels.configs import tables
from kernels.convolution import rules, taps_rules
from kernels.convolution.select import _SUMS_OF_8
from kernels.runtime import launch

from ...conftest import DEVICE
from ...oracle import check, dtype_id, randn, tf32_numbers
from .conftest import hopper

pytestmark = [hopper, pytest.mark.usefixtures("tf32")]

DRAW = {torch.float16: randn, torch.bfloat16: randn, torch.float32: tf32_numbers}
HALF = (torch.float16, torch.bfloat16)
KERNEL = "_conv2d_taps_kernel"

#: n, c, h, w, k, r, s, padding, tiles
CASES = {
    "alexnets_conv2": (3, 96, 6, 7, 32, 5, 5, 2, {"BLOCK_N": 32}),
    "ragged_images": (19, 96, 3, 4, 16, 3, 3, 1, {"BLOCK_M": 16}),
    "ragged_filters": (2, 48, 4, 5, 80, 3, 3, 1, {"BLOCK_N": 32}),
    "no_rest": (2, 64, 4, 3, 16, 3, 2, 1, {}),
    "a_rest_of_three_chunks": (2, 48, 5, 4, 16, 3, 5, 2, {}),
    "a_rest_of_one_chunk": (2, 80, 4, 5, 16, 2, 3, 1, {}),
    "odd_sixteens": (2, 112, 4, 5, 16, 2, 3, 1, {}),
    "a_row_smaller_than_a_chunk": (3, 16, 4, 5, 16, 3, 3, 1, {}),
    "seven_taps": (2, 48, 8, 9, 16, 7, 7, 3, {}),
    "no_padding": (3, 48, 7, 6, 16, 5, 5, 0, {}),
    "full_padding": (2, 48, 3, 4, 16, 3, 5, (2, 4), {}),
    "padding_over_filter": (2, 48, 3, 4, 16, 2, 3, 4, {}),
    "filter_over_image": (2, 48, 3, 2, 16, 5, 7, (2, 3), {}),
    "one_tap": (3, 80, 4, 5, 16, 1, 1, 0, {}),
    "one_row": (2, 48, 5, 3, 32, 1, 3, (0, 2), {}),
    "one_column": (2, 48, 5, 3, 32, 3, 1, (2, 0), {}),
    "same_of_even_filter": (2, 48, 5, 4, 16, 4, 2, "same", {}),
    "smaller_chunks": (2, 96, 4, 5, 16, 3, 3, 1, {"BLOCK_K": 32}),
}


def run(case: str, dtype: torch.dtype, output_format: torch.memory_format | None = None) -> torch.Tensor:
    n, c, h, w, k, r, s, padding, tiles = CASES[case]
    draw = DRAW[dtype]
    x = draw(n, c, h, w, dtype=dtype).to(memory_format=torch.channels_last).detach().requires_grad_()
    with tables.override(TAPS=1, **tiles):
        return check(
            lambda x, w, b: kernels.conv2d(x, w, b, padding=padding, activation="relu", output_format=output_format),
            lambda x, w, b: F.relu(F.conv2d(x, w, b, padding=padding)),
            [x, draw(k, c, r, s, dtype=dtype), draw(k, dtype=dtype)],
            names="input weight bias",
            draw=draw,
        )


@pytest.mark.thin
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("case", "dtype"),
    # TF32 has its own copies; the half-precision types, which differ in rounding only, take turns.
    [pytest.param(case, d, id=f"{case}-{dtype_id(d)}") for i, case in enumerate(CASES) for d in (HALF[i % 2], torch.float32)],
)
def test_values(case: str, dtype: torch.dtype, launches: list[str]) -> None:
    y = run(case, dtype)
    assert y.permute(0, 2, 3, 1).is_contiguous()
    assert launches.count(KERNEL) == 1


@pytest.mark.parametrize("dtype", list(DRAW), ids=dtype_id)
def test_output_in_nchw(dtype: torch.dtype, launches: list[str]) -> None:
    assert run("ragged_filters", dtype, torch.contiguous_format).is_contiguous()
    assert KERNEL in launches


@pytest.mark.parametrize("dtype", list(DRAW), ids=dtype_id)
def test_int64_offsets(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.setattr(launch, "force_int64", True)
    run("ragged_images", dtype)
    assert KERNEL in launches


@pytest.mark.skipif(not _SUMS_OF_8, reason="before Triton 3.8 other kernels run these channels")
@pytest.mark.parametrize("c", [8, 24, 40])
def test_channels_in_eights_in_tf32(c: int, launches: list[str]) -> None:
    x, w = tf32_numbers(3, c, 4, 5, dtype=torch.float32), tf32_numbers(24, c, 3, 3, dtype=torch.float32)
    with tables.override(TAPS=1):
        check(
            lambda x, w: kernels.conv2d(x, w, padding=1),
            lambda x, w: F.conv2d(x, w, padding=1),
            [x, w],
            names="input weight",
            draw=tf32_numbers,
        )
    assert KERNEL in launches


@pytest.mark.parametrize("dtype", list(DRAW), ids=dtype_id)
@pytest.mark.parametrize("c", [48, 96])
def test_nan_and_infinity_stay_where_they_belong(c: int, dtype: torch.dtype, launches: list[str]) -> None:
    """The pixel after a filter row's last is not multiplied, not even by zero, where 3 C is no multiple of a chunk."""
    draw = DRAW[dtype]
    x = draw(2, c, 4, 6, dtype=dtype, grad=False).to(memory_format=torch.channels_last)
    x[0, 3, 0, 5], x[0, 5, 2, 0], x[1, 7, 3, 3] = torch.inf, torch.nan, -torch.inf
    with tables.override(TAPS=1):
        y = check(
            lambda x, w: kernels.conv2d(x, w, padding=1),
            lambda x, w: F.conv2d(x, w, padding=1),
            [x, draw(16, c, 3, 3, dtype=dtype, grad=False)],
            names="input weight",
            draw=draw,
        )
    assert torch.isfinite(y[0, :, 0, :4]).all()
    assert KERNEL in launches


def test_where_channels_are_no_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """AlexNet's conv2 uses them without a table; conv3, few images, 130 (two tiles), 1 tap, a table's entry, NCHW do not."""
    for module in (rules, taps_rules, tables):
        monkeypatch.setattr(module, "INTERPRETED", False)
    device = torch.device("meta")

    def chosen(*sizes: int, channels_last: bool = True, dtype: torch.dtype = torch.bfloat16) -> bool:
        return taps_rules.conv2d_by_taps(device, *sizes, channels_last=channels_last, dtype=dtype)

    def tiles() -> dict[str, int]:
        return taps_rules.conv2d_taps_config(device, 128, *conv2, channels_last=True, dtype=torch.bfloat16)

    conv2 = (26, 26, 96, 256, 5, 5)
    with tables.untuned():
        assert chosen(128, *conv2)
        assert chosen(1024, *conv2)
        for n in (47, 48):  # neither the rule nor tuning takes fewer than 48
            assert chosen(n, 5, 5, 96, 128, 3, 3) == bool(list(candidates.taps(n, 96, 128, 3, 2))) == (n == 48)
        assert chosen(128, 26, 26, 48, 128, 5, 5)
        for sizes in ((16, *conv2), (130, *conv2), (128, 12, 12, 256, 384, 3, 3), (128, 26, 26, 96, 256, 1, 1)):
            assert not chosen(*sizes), sizes
        assert not chosen(128, *conv2, channels_last=False)
        assert not chosen(128, *conv2, dtype=torch.float32)
    entry = {"IMAGES": 0, "BLOCK_N": 64, "num_stages": 6}
    monkeypatch.setattr(taps_rules, "tuned", lambda *_: entry)
    assert not chosen(128, *conv2)
    assert tiles()["BLOCK_N"] == 256
    entry["TAPS"] = 1
    assert chosen(128, *conv2)
    assert [tiles()[name] for name in ("BLOCK_N", "num_stages", "BLOCK_K", "BLOCK_K2")] == [64, 6, 64, 32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("batch", [7, 48, 128, 1024])
@pytest.mark.parametrize("k", [16, 128, 256, 384])
@pytest.mark.parametrize("s", [1, 3, 5])
@pytest.mark.parametrize("c", [16, 48, 80, 96, 256])
def test_configurations_fit(c: int, s: int, k: int, batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks add up to exactly one filter row; stages and accumulators fit on one SM of an H100."""
    monkeypatch.setattr(taps_rules, "INTERPRETED", False)
    monkeypatch.setattr(taps_rules, "tuned", lambda *_: {})
    sizes = (batch, 12, 12, c, k, 3, s)
    tiles = taps_rules.conv2d_taps_config(torch.device(DEVICE), *sizes, channels_last=True, dtype=dtype)
    assert s * c % tiles["BLOCK_K"] % tiles["BLOCK_K2"] == 0
    assert s * c >= tiles["BLOCK_K"] >= tiles["BLOCK_K2"] >= 16
    stage = (tiles["BLOCK_M"] + tiles["BLOCK_N"]) * tiles["BLOCK_K"] * dtype.itemsize
    assert tiles["num_stages"] * stage < 227 * 1024
    assert tiles["BLOCK_M"] * tiles["BLOCK_N"] / (32 * tiles["num_warps"]) <= 128
