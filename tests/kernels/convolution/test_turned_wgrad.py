"""The TF32 weight gradient that transposes the output gradient in registers, and when it is chosen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.configs import tables
from kernels.convolution import rules

from ...conftest import DEVICE
from ...oracle import check, tf32_numbers
from .conftest import hopper

pytestmark = [hopper, pytest.mark.usefixtures("tf32")]

#: n, c, h, w, k, r, s, padding, tiles
CASES = {
    "one_image": (1, 16, 5, 4, 16, 3, 3, 1, {}),
    "ragged_images": (19, 16, 4, 3, 32, 3, 3, 1, {"BLOCK_K": 16}),
    "no_multiple_of_4_images": (33, 32, 3, 4, 16, 2, 3, 1, {}),
    "ragged_columns": (3, 48, 4, 5, 16, 3, 3, 1, {"BLOCK_M": 64}),
    "ragged_filters": (3, 16, 4, 5, 48, 3, 2, 1, {"BLOCK_N": 32}),
    "several_splits": (5, 16, 6, 5, 16, 3, 3, 1, {"SPLIT": 5}),
    "split_beyond_steps": (2, 16, 2, 2, 16, 1, 1, 0, {"SPLIT": 7}),
    "no_padding": (3, 16, 5, 4, 16, 3, 2, 0, {}),
    "padding_over_filter": (2, 16, 3, 4, 16, 2, 3, 4, {}),
    "one_row": (3, 16, 5, 3, 32, 1, 3, (0, 2), {}),
    "wide_filter": (2, 96, 6, 7, 32, 5, 5, 2, {}),
}


def ours(padding):
    return lambda x, w, b: kernels.conv2d(x, w, b, padding=padding, activation="relu")


def reference(padding):
    return lambda x, w, b: F.relu(F.conv2d(x, w, b, padding=padding))


@pytest.mark.thin
@pytest.mark.parametrize("input_grad", [True, False], ids=["all", "weight_alone"])
@pytest.mark.parametrize("case", CASES)
def test_values(case: str, input_grad: bool, launches: list[str]) -> None:
    n, c, h, w, k, r, s, padding, tiles = CASES[case]
    x = tf32_numbers(n, c, h, w, grad=False).to(memory_format=torch.channels_last).requires_grad_(input_grad)
    tensors = [x, tf32_numbers(k, c, r, s), tf32_numbers(k)]
    with tables.override(IMAGES_WGRAD=1, TURNED=1, **tiles):
        check(ours(padding), reference(padding), tensors, names="input weight bias", draw=tf32_numbers)
    assert "_conv2d_turned_wgrad_kernel" in launches
    assert not {"_conv2d_images_wgrad_kernel", "_conv2d_wgrad_kernel"} & set(launches)


def test_infinity_and_nan_reach_what_they_should() -> None:
    """An infinity at the image's edge is multiplied only with gradients of outputs that read it."""
    x = tf32_numbers(3, 16, 4, 4, grad=False).to(memory_format=torch.channels_last)
    x[0, 3, 0, 3], x[1, 5, 3, 0] = torch.inf, torch.nan
    tensors = [x.requires_grad_(), tf32_numbers(16, 16, 3, 3), tf32_numbers(16)]
    with tables.override(IMAGES_WGRAD=1, TURNED=1):
        check(
            lambda x, w, b: kernels.conv2d(x, w, b, padding=1),
            lambda x, w, b: F.conv2d(x, w, b, padding=1),
            tensors,
            names="input weight bias",
            draw=tf32_numbers,
        )


def test_same_bits_twice() -> None:
    x = tf32_numbers(5, 16, 6, 5, grad=False)
    w = tf32_numbers(32, 16, 3, 3)
    with tables.override(IMAGES_WGRAD=1, TURNED=1, SPLIT=3):
        first, second = (torch.autograd.grad(kernels.conv2d(x, w, padding=1).square().sum(), w)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_large_gradient_is_turned_and_a_small_one_copied() -> None:
    """The output gradient of AlexNet's conv2 at batch 128 is 89 MB, that of conv4 28 MB."""
    device = torch.device(DEVICE)
    with tables.untuned():
        assert rules.conv2d_wgrad_turns(device, 128, 26, 26, 96, 256, 5, 5)
        assert not rules.conv2d_wgrad_turns(device, 128, 12, 12, 384, 384, 3, 3)
