"""Every argument of F.conv2d, F.max_pool2d and F.linear: ours accept what PyTorch accepts, and refuse what PyTorch refuses.

Tensors hold small integers, whose sums are exact in float32, so a result must equal float64's, rounded once, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

from ..conftest import DEVICE
from ..oracle import integers
from .fuzz import assert_exact

X, W, B = (2, 4, 7, 6), (6, 4, 3, 2), (6,)
ROWS, MATRIX, VECTOR = (5, 7), (3, 7), (3,)

Call = tuple[str, tuple, dict[str, Any]]

#: id -> (operation, shapes of its tensors, other arguments).
TAKEN: dict[str, Call] = {
    "conv_defaults": ("conv2d", (X, W), {}),
    "conv_bias": ("conv2d", (X, W, B), {}),
    "conv_unbatched": ("conv2d", (X[1:], W, B), {}),
    "conv_unbatched_same": ("conv2d", (X[1:], W, B), {"padding": "same"}),
    "conv_ints": ("conv2d", (X, W), {"stride": 2, "padding": 1, "dilation": 2}),
    "conv_pairs": ("conv2d", (X, W), {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)}),
    "conv_lists": ("conv2d", (X, W), {"stride": [2, 1], "padding": [0, 3], "dilation": [1, 2]}),
    "conv_lists_of_one": ("conv2d", (X, W), {"stride": [2], "padding": [1], "dilation": [2]}),
    "conv_size": ("conv2d", (X, W), {"stride": torch.Size((2, 1))}),
    "conv_numpy_ints": ("conv2d", (X, W), {"stride": np.int64(2), "padding": (np.int32(1), np.int64(0))}),
    "conv_same": ("conv2d", (X, W, B), {"padding": "same"}),
    "conv_same_dilated": ("conv2d", (X, W, B), {"padding": "same", "dilation": (3, 2)}),
    "conv_valid": ("conv2d", (X, W), {"padding": "valid", "stride": 2}),
    "conv_groups": ("conv2d", (X, (6, 2, 3, 2), B), {"groups": 2}),
    "conv_numpy_groups": ("conv2d", (X, (6, 2, 3, 2)), {"groups": np.int64(2)}),
    "conv_depthwise": ("conv2d", (X, (4, 1, 3, 2)), {"groups": 4}),
    "conv_depthwise_multiplier": ("conv2d", (X, (8, 1, 3, 2), (8,)), {"groups": 4, "stride": 2}),
    "conv_padding_over_filter": ("conv2d", (X, W), {"padding": 9}),
    "conv_stride_over_image": ("conv2d", (X, W), {"stride": 9}),
    "conv_stride_far_over_image": ("conv2d", (X, W), {"stride": (50, 1000)}),
    "conv_filter_is_image": ("conv2d", (X, (6, 4, 7, 6)), {}),
    "conv_one_pixel": ("conv2d", ((1, 1, 1, 1), (1, 1, 1, 1), (1,)), {}),
    "conv_empty_batch": ("conv2d", ((0, 4, 7, 6), W, B), {"padding": 1}),
    "conv_empty_batch_of_nothing": ("conv2d", ((0, 4, 0, 6), W), {"padding": 2}),
    "pool_defaults": ("max_pool2d", (X,), {"kernel_size": 2}),
    "pool_unbatched": ("max_pool2d", (X[1:],), {"kernel_size": (3, 2), "stride": 1}),
    "pool_pairs": ("max_pool2d", (X,), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "pool_lists_of_one": ("max_pool2d", (X,), {"kernel_size": [2], "stride": [1], "padding": [1], "dilation": [2]}),
    "pool_no_stride": ("max_pool2d", (X,), {"kernel_size": 3, "stride": None}),
    "pool_empty_stride": ("max_pool2d", (X,), {"kernel_size": 3, "stride": []}),
    "pool_bool_in_second_place": ("max_pool2d", (X,), {"kernel_size": (2, True)}),
    "pool_ceil": ("max_pool2d", (X,), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    "pool_ceil_drops_a_window_in_the_padding": (
        "max_pool2d",
        ((1, 2, 5, 5),),
        {"kernel_size": 2, "stride": 2, "padding": 1, "ceil_mode": True},
    ),
    "pool_overlapping": ("max_pool2d", (X,), {"kernel_size": 4, "stride": 1, "padding": 2}),
    "pool_stride_over_window": ("max_pool2d", (X,), {"kernel_size": 1, "stride": 3}),
    "pool_is_image": ("max_pool2d", (X,), {"kernel_size": (7, 6)}),
    "pool_window_over_image": ("max_pool2d", ((1, 2, 3, 3),), {"kernel_size": 5, "padding": 2}),
    "pool_many_positions": ("max_pool2d", ((1, 1, 20, 19),), {"kernel_size": (18, 17), "stride": 1}),
    "pool_empty_batch": ("max_pool2d", ((0, 4, 7, 6),), {"kernel_size": 2}),
    "linear_defaults": ("linear", (ROWS, MATRIX), {}),
    "linear_bias": ("linear", (ROWS, MATRIX, VECTOR), {}),
    "linear_one_row": ("linear", (ROWS[1:], MATRIX, VECTOR), {}),
    "linear_leading": ("linear", ((2, 1, 3, 7), MATRIX, VECTOR), {}),
    "linear_empty_batch": ("linear", ((0, 7), MATRIX, VECTOR), {}),
    "linear_empty_leading": ("linear", ((2, 0, 7), MATRIX, VECTOR), {}),
    "linear_no_features": ("linear", ((5, 0), (3, 0), VECTOR), {}),
    "linear_no_features_no_bias": ("linear", ((5, 0), (3, 0)), {}),
    "linear_no_outputs": ("linear", (ROWS, (0, 7), (0,)), {}),
    "linear_vector_weight": ("linear", (ROWS, (7,)), {}),
    "linear_vector_weight_one_row": ("linear", ((7,), (7,)), {}),
    "linear_vector_weight_leading": ("linear", ((2, 3, 7), (7,)), {}),
    "linear_one_bias": ("linear", (ROWS, MATRIX, (1,)), {}),
    "linear_scalar_bias": ("linear", (ROWS, MATRIX, ()), {}),
    "linear_one_row_row_bias": ("linear", (ROWS[1:], MATRIX, (1, 3)), {}),
    "linear_row_bias": ("linear", (ROWS, MATRIX, (1, 3)), {}),
}

FLAT, EMPTY_CHANNELS = (9, 7), (2, 0, 7, 6)

REFUSED: dict[str, Call] = {
    "conv_rank": ("conv2d", (FLAT, W), {}),
    "conv_five": ("conv2d", ((1, *X), W), {}),
    "conv_weight_rank": ("conv2d", (X, W[1:]), {}),
    "conv_channels": ("conv2d", ((2, 5, 7, 6), W), {}),
    "conv_no_filters": ("conv2d", (X, (0, 4, 3, 2)), {}),
    "conv_empty_filter": ("conv2d", (X, (6, 4, 0, 2)), {}),
    "conv_empty_image": ("conv2d", ((2, 4, 0, 6), W), {"padding": 2}),
    "conv_too_small": ("conv2d", (X, (6, 4, 8, 2)), {}),
    "conv_too_small_dilated": ("conv2d", (X, W), {"dilation": 4}),
    "conv_bias_length": ("conv2d", (X, W, (5,)), {}),
    "conv_bias_of_one": ("conv2d", (X, W, (1,)), {}),
    "conv_bias_matrix": ("conv2d", (X, W, (1, 6)), {}),
    "conv_zero_groups": ("conv2d", (X, W), {"groups": 0}),
    "conv_groups_of_filters": ("conv2d", (X, (6, 1, 3, 2)), {"groups": 4}),
    "conv_groups_of_channels": ("conv2d", (X, (6, 2, 3, 2)), {"groups": 3}),
    "conv_float_groups": ("conv2d", (X, W), {"groups": 1.0}),
    "conv_zero_stride": ("conv2d", (X, W), {"stride": 0}),
    "conv_float_stride": ("conv2d", (X, W), {"stride": 1.0}),
    "conv_bool_stride": ("conv2d", (X, W), {"stride": True}),
    "conv_no_stride": ("conv2d", (X, W), {"stride": None}),
    "conv_empty_stride": ("conv2d", (X, W), {"stride": []}),
    "conv_three_strides": ("conv2d", (X, W), {"stride": (1, 1, 1)}),
    "conv_negative_padding": ("conv2d", (X, W), {"padding": -1}),
    "conv_padding_name": ("conv2d", (X, W), {"padding": "SAME"}),
    "conv_same_strided": ("conv2d", (X, W), {"padding": "same", "stride": 2}),
    "conv_zero_dilation": ("conv2d", (X, W), {"dilation": 0}),
    "pool_rank": ("max_pool2d", (FLAT,), {"kernel_size": 2}),
    "pool_five": ("max_pool2d", ((1, *X),), {"kernel_size": 2}),
    "pool_no_channels": ("max_pool2d", (EMPTY_CHANNELS,), {"kernel_size": 2}),
    "pool_no_channels_unbatched": ("max_pool2d", (EMPTY_CHANNELS[1:],), {"kernel_size": 2}),
    "pool_empty_image": ("max_pool2d", ((2, 4, 0, 6),), {"kernel_size": 2}),
    "pool_too_small": ("max_pool2d", (X,), {"kernel_size": 8}),
    "pool_zero_window": ("max_pool2d", (X,), {"kernel_size": 0}),
    "pool_float_window": ("max_pool2d", (X,), {"kernel_size": 2.0}),
    "pool_three_windows": ("max_pool2d", (X,), {"kernel_size": (2, 2, 2)}),
    "pool_zero_stride": ("max_pool2d", (X,), {"kernel_size": 2, "stride": 0}),
    "pool_negative_padding": ("max_pool2d", (X,), {"kernel_size": 2, "padding": -1}),
    "pool_padding_over_half": ("max_pool2d", (X,), {"kernel_size": 3, "padding": 2}),
    "pool_padding_over_half_dilated": ("max_pool2d", (X,), {"kernel_size": 3, "padding": 2, "dilation": 2}),
    "pool_zero_dilation": ("max_pool2d", (X,), {"kernel_size": 2, "dilation": 0}),
    "linear_scalar": ("linear", ((), MATRIX), {}),
    "linear_scalar_times_one": ("linear", ((), (3, 1)), {}),
    "linear_weight_rank": ("linear", (ROWS, (1, *MATRIX)), {}),
    "linear_features": ("linear", ((5, 6), MATRIX), {}),
    "linear_bias_length": ("linear", (ROWS, MATRIX, (2,)), {}),
    "linear_bias_column": ("linear", ((2, 5, 7), MATRIX, (5, 1)), {}),
    "linear_bias_over_output": ("linear", (ROWS, MATRIX, (1, 1, 3)), {}),
    "linear_bias_over_matrix": ("linear", ((2, 5, 7), MATRIX, (1, 1, 3)), {}),
    "linear_vector_weight_bias": ("linear", (ROWS, (7,), ()), {}),
}

#: Our messages begin with the argument's name; PyTorch's own messages do not.
NAMES_AN_ARGUMENT = (
    r"^(only the batch of input|the pool's input|(input|weight|bias|(pool_)?(stride|padding|kernel_size)|dilation|groups)\b)"
)

#: Calls that PyTorch accepts and the kernels cannot run: they raise this type with these words.
LIMITS: dict[str, tuple[Call, torch.dtype, type[Exception], str]] = {
    "conv_no_channels": (("conv2d", (EMPTY_CHANNELS, (6, 0, 3, 2)), {}), torch.float32, ValueError, "no dimension of size 0"),
    "conv_int": (("conv2d", (X, W), {}), torch.int64, TypeError, "input must be one of float16, bfloat16, float32"),
    "conv_complex": (("conv2d", (X, W), {}), torch.complex64, TypeError, "got torch.complex64"),
    "pool_int": (("max_pool2d", (X,), {"kernel_size": 2}), torch.int32, TypeError, "got torch.int32"),
    "linear_int": (("linear", (ROWS, MATRIX), {}), torch.int64, TypeError, "got torch.int64"),
    "linear_bias_matrix": (("linear", (ROWS, MATRIX, (5, 3)), {}), torch.float32, ValueError, r"bias must have shape \(3,\)"),
}


def _tensors(shapes: tuple, dtype: torch.dtype, grad: bool = True) -> list[Tensor]:
    return [integers(*shape, dtype=dtype, grad=grad) for shape in shapes]


def _assert_same(operation: str, tensors: list[Tensor], arguments: dict[str, Any]) -> None:
    """Check that output and gradients equal PyTorch's in float64, rounded once."""
    dtype = tensors[0].dtype
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    ours, exact = getattr(kernels, operation)(*tensors, **arguments), getattr(F, operation)(*doubles, **arguments)
    assert_exact("output", ours, exact, dtype)
    grad = integers(*exact.shape, dtype=dtype, grad=False)
    gradients = torch.autograd.grad(ours, tensors, grad), torch.autograd.grad(exact, doubles, grad.double())
    for name, got, truth in zip(("input", "weight", "bias"), *gradients, strict=False):
        assert_exact(f"gradient of {name}", got, truth, dtype)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", TAKEN)
def test_what_pytorch_takes_means_the_same(name: str, backend: Any) -> None:
    operation, shapes, arguments = TAKEN[name]
    with kernels.use_backend(backend):
        _assert_same(operation, _tensors(shapes, torch.float32), arguments)


@pytest.mark.parametrize("name", REFUSED)
def test_what_pytorch_refuses_is_refused(name: str, launches: list[str]) -> None:
    operation, shapes, arguments = REFUSED[name]
    tensors = _tensors(shapes, torch.float32)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        getattr(F, operation)(*tensors, **arguments)
    for backend in ("auto", "torch"):
        with kernels.use_backend(backend), pytest.raises((TypeError, ValueError), match=NAMES_AN_ARGUMENT):
            getattr(kernels, operation)(*tensors, **arguments)
    assert launches == []


@pytest.mark.parametrize("name", LIMITS)
def test_what_the_kernels_cannot_run_is_a_clear_error(name: str, launches: list[str]) -> None:
    (operation, shapes, arguments), dtype, kind, words = LIMITS[name]
    tensors = [torch.ones(shape, dtype=dtype, device=DEVICE) for shape in shapes]
    if DEVICE == "cpu":  # CUDA has no integer convolution
        getattr(F, operation)(*tensors, **arguments)
    with pytest.raises(kind, match=words):
        getattr(kernels, operation)(*tensors, **arguments)
    assert launches == []


def test_positional_arguments_stand_where_pytorch_has_them() -> None:
    x, w, b = _tensors((X, (6, 2, 3, 2), B), torch.float32, grad=False)
    conv, pool = (x, w, b, 2, 1, 2, 2), (x, 3, 1, 1, 2, True, True)
    assert torch.equal(kernels.conv2d(*conv), F.conv2d(*conv))
    for ours, theirs in zip(kernels.max_pool2d(*pool), F.max_pool2d(*pool), strict=True):
        assert torch.equal(ours, theirs)
    rows, matrix, vector = _tensors((ROWS, MATRIX, VECTOR), torch.float32, grad=False)
    assert torch.equal(kernels.linear(rows, matrix, vector), F.linear(rows, matrix, vector))


def test_signed_zeros_are_pytorchs() -> None:
    zeros = torch.tensor([-0.0, 0.0, -0.0, 1.0], device=DEVICE)
    x, w = zeros.view(1, 1, 2, 2), torch.tensor([[[[-1.0]]]], device=DEVICE)
    for ours, theirs in (
        (kernels.conv2d(x, w), F.conv2d(x, w)),
        (kernels.conv2d(x, w, activation="relu"), F.relu(F.conv2d(x, w))),
        (kernels.linear(zeros[:, None], w[0, 0]), F.linear(zeros[:, None], w[0, 0])),
        (kernels.max_pool2d(x, 1), x),
    ):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours.signbit(), theirs.signbit())


def test_indices_unpool_as_pytorchs() -> None:
    (x,) = _tensors((X,), torch.float32, grad=False)
    y, index = kernels.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(F.max_unpool2d(y, index, 2), F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_window_in_the_padding_alone(rows: int, launches: list[str]) -> None:
    """Columns -1 and 2 of an image two wide are padding: the maximum is -inf, and no gradient flows.

    PyTorch has the same value; its backward pass writes to the element after the row, for the last row outside the tensor.
    """
    (x,) = _tensors(((1, rows, 2),), torch.float32)
    arguments = {"kernel_size": (1, 2), "padding": (0, 1), "dilation": 3}
    y = kernels.max_pool2d(x, **arguments)
    assert torch.equal(y, F.max_pool2d(x.detach(), **arguments))
    assert y.isneginf().all()
    assert not torch.autograd.grad(y, x, torch.ones_like(y))[0].any()
    assert launches == ["_max_pool2d_fprop_kernel", "_max_pool2d_dgrad_kernel"]
