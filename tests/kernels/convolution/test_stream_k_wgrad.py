"""The weight gradient in equal shares of the steps, for every way in which shares meet tiles; half precision and TF32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.configs import tables
from kernels.convolution import rules

from ...oracle import check, dtype_id, randn, tf32_numbers
from .conftest import hopper

pytestmark = [hopper, pytest.mark.usefixtures("tf32")]

DRAW = {torch.float16: randn, torch.bfloat16: randn, torch.float32: tf32_numbers}
KERNEL = "_conv2d_stream_k_wgrad_kernel"

#: n, c, h, w, k, r, s, padding, tiles
CASES = {
    "one_image": (1, 16, 5, 4, 16, 3, 3, 1, {}),
    "ragged_images": (19, 16, 4, 3, 32, 3, 3, 1, {"BLOCK_K": 16}),
    "one_program": (3, 16, 4, 5, 16, 3, 3, 1, {"PROGRAMS": 1}),
    "a_share_of_several_tiles": (3, 32, 4, 5, 32, 3, 3, 1, {"PROGRAMS": 4, "BLOCK_M": 16, "BLOCK_N": 16}),
    "a_tile_of_several_shares": (3, 16, 6, 5, 16, 2, 1, 1, {"PROGRAMS": 9}),
    "shares_of_one_step": (2, 16, 3, 3, 16, 2, 2, 0, {"PROGRAMS": 1000}),
    "ragged_filters": (3, 16, 4, 5, 48, 3, 2, 1, {"BLOCK_M": 32, "PROGRAMS": 5}),
    "ragged_channels": (3, 48, 4, 5, 16, 3, 2, 1, {"BLOCK_N": 32, "PROGRAMS": 5}),
    "two_blocks": (3, 48, 4, 5, 32, 3, 2, 1, {"BLOCK_N": 32, "BLOCK_N2": 16, "PROGRAMS": 5}),
    "two_blocks_of_rows_of_taps": (3, 16, 4, 5, 32, 3, 3, 1, {"BLOCK_N": 32, "BLOCK_N2": 16, "FOLDED": 1, "PROGRAMS": 4}),
    "rows_of_taps": (3, 16, 4, 5, 16, 3, 3, 1, {"FOLDED": 1, "BLOCK_N": 32, "PROGRAMS": 7}),
    "rows_of_taps_of_96": (2, 96, 6, 7, 32, 5, 5, 2, {"FOLDED": 1, "BLOCK_N": 128, "PROGRAMS": 11}),
    "rows_of_one_tap": (3, 16, 4, 5, 16, 3, 1, (1, 0), {"FOLDED": 1, "BLOCK_N": 16}),
    "rows_of_taps_without_padding": (3, 32, 5, 6, 16, 2, 3, 0, {"FOLDED": 1, "BLOCK_N": 64, "PROGRAMS": 4}),
    "no_padding": (3, 16, 5, 4, 16, 3, 2, 0, {}),
    "padding_over_filter": (2, 16, 3, 4, 16, 2, 3, 4, {"PROGRAMS": 6}),
    "padding_over_filter_in_rows": (2, 16, 3, 4, 16, 2, 3, 4, {"PROGRAMS": 6, "FOLDED": 1, "BLOCK_N": 16}),
    # The outer filter rows meet only padding: their tiles have no step, so no part of them is written.
    "taps_in_the_padding": (2, 16, 1, 3, 16, 5, 3, (2, 1), {"PROGRAMS": 2}),
    "one_row": (3, 16, 5, 3, 32, 1, 3, (0, 2), {"PROGRAMS": 4}),
}


@pytest.mark.thin
@pytest.mark.parametrize("dtype", list(DRAW), ids=dtype_id)
@pytest.mark.parametrize("case", CASES)
def test_values(case: str, dtype: torch.dtype, launches: list[str]) -> None:
    n, c, h, w, k, r, s, padding, tiles = CASES[case]
    draw = DRAW[dtype]
    x = draw(n, c, h, w, dtype=dtype).to(memory_format=torch.channels_last).detach().requires_grad_()
    tensors = [x, draw(k, c, r, s, dtype=dtype), draw(k, dtype=dtype)]
    with tables.override(IMAGES_WGRAD=1, STREAM_K=1, **({"FOLDED": 0} | tiles)):
        check(
            lambda x, w, b: kernels.conv2d(x, w, b, padding=padding, activation="relu"),
            lambda x, w, b: F.relu(F.conv2d(x, w, b, padding=padding)),
            tensors,
            names="input weight bias",
            draw=draw,
        )
    assert KERNEL in launches
    assert not {"_conv2d_images_wgrad_kernel", "_conv2d_wgrad_kernel"} & set(launches)


@pytest.mark.parametrize("dtype", list(DRAW), ids=dtype_id)
def test_int64_offsets(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.setattr(kernels.runtime.launch, "force_int64", True)
    tensors = [DRAW[dtype](3, 16, 4, 5, dtype=dtype), DRAW[dtype](16, 16, 3, 3, dtype=dtype)]
    with tables.override(IMAGES_WGRAD=1, STREAM_K=1, PROGRAMS=5, FOLDED=0):
        check(
            lambda x, w: kernels.conv2d(x, w, padding=1),
            lambda x, w: F.conv2d(x, w, padding=1),
            tensors,
            names="input weight",
            draw=DRAW[dtype],
        )
    assert KERNEL in launches


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_the_gradient_has_the_weights_strides(channels_last: bool) -> None:
    x = randn(3, 16, 4, 5, dtype=torch.float16)
    w = randn(16, 16, 3, 3, dtype=torch.float16, grad=False)
    w = w.to(memory_format=torch.channels_last) if channels_last else w
    with tables.override(IMAGES_WGRAD=1, STREAM_K=1, PROGRAMS=5, FOLDED=1, BLOCK_N=32):
        check(
            lambda x, w: kernels.conv2d(x, w, padding=1),
            lambda x, w: F.conv2d(x, w, padding=1),
            [x, w.requires_grad_()],
            names="input weight",
        )
        (dw,) = torch.autograd.grad(kernels.conv2d(x, w, padding=1).sum(), w)
    assert dw.stride() == w.stride()


def test_same_bits_twice() -> None:
    x, w = randn(5, 16, 6, 5, dtype=torch.float16), randn(32, 16, 3, 3, dtype=torch.float16)
    with tables.override(IMAGES_WGRAD=1, STREAM_K=1, PROGRAMS=7):
        first, second = (torch.autograd.grad(kernels.conv2d(x, w, padding=1).square().sum(), w)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_shares_are_equal_where_a_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a table's entry chooses equal shares. For AlexNet's conv2 at batch 128 the rules fold a filter row in two blocks."""
    monkeypatch.setattr(rules, "INTERPRETED", False)
    monkeypatch.setattr(tables, "INTERPRETED", False)
    device, conv2 = torch.device("meta"), (128, 26, 26, 96, 256, 5, 5)
    for dtype in (torch.bfloat16, torch.float32):
        assert not rules.conv2d_wgrad_streams(device, *conv2, dtype=dtype)
    config = rules.conv2d_stream_k_wgrad_config(device, *conv2, torch.bfloat16)
    assert (config["FOLDED"], config["BLOCK_N"]) == (1, 256)
    monkeypatch.setattr(rules, "tuned", lambda *_: {"STREAM_K": 1, "BLOCK_N": 128})
    assert rules.conv2d_wgrad_streams(device, *conv2, dtype=torch.bfloat16)
    assert rules.conv2d_stream_k_wgrad_config(device, *conv2, torch.bfloat16)["BLOCK_N"] == 128
    with tables.override(STREAM_K=0):
        assert not rules.conv2d_wgrad_streams(device, *conv2, dtype=torch.bfloat16)
