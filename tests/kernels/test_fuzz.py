"""Every public operation on random shapes, arguments, dtypes, memory layouts and wanted gradients, against float64 PyTorch.

CI runs the same few hundred cases every time; ``make fuzz`` runs new random cases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels.configs import tables
from kernels.dropouts import dropout_mask_reference
from kernels.images import gather_resize_reference
from kernels.sgd import sgd_step
from kernels.sums import dropout_scale

from ..conftest import DEVICE
from ..oracle import assert_within_tolerance, integers
from . import fuzz
from .fuzz import Case, Layout, Shape, any_case, assert_as_float64, assert_exact, assert_launched_at_most, cases, dense, stored
from .test_against_functional import NAMES_AN_ARGUMENT

Call = tuple[tuple[Shape, ...], dict[str, Any]]

SINGLE_AND_HALF = (torch.float32, torch.float16, torch.bfloat16)

#: Parts of the names of kernels that compute an input gradient, a weight gradient, a matrix product.
DGRAD = ("_conv2d_dgrad_kernel", "_conv2d_images_kernel", "_conv2d_box_kernel")
WGRAD = ("wgrad",)
MATMUL = ("_matmul_kernel", "_matmul_descriptor_kernel", "_linear_narrow_backward_kernel")

small = st.integers(1, 3)
pairs = st.one_of(small, st.tuples(small, small))
dilations = st.sampled_from([1, 1, 1, 1, 2, (2, 1), (1, 3)])
batches = st.one_of(st.just(()), st.tuples(st.sampled_from([1, 2, 3, 2, 1, 0])))


def _up_to(high: int) -> st.SearchStrategy[int]:
    """Integers from 1 to ``high``, and sometimes 0."""
    return st.sampled_from([*range(1, high + 1)] * 4 + [0])


def _is_refused(operation: str, ours: Callable, reference: Callable, tensors: Sequence[Tensor]) -> bool:
    """Whether PyTorch refuses these arguments; then ours must raise and name an argument."""
    try:
        reference(*(t.detach().double() for t in tensors))
    except (RuntimeError, ValueError):
        with pytest.raises(ValueError, match=NAMES_AN_ARGUMENT):
            ours(*tensors)
        fuzz.refused[operation] += 1
        return True
    return False


# -------------------------------------------------------------------------------------------------------- convolutions


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    padding = draw(
        st.one_of(st.integers(0, 3), st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"]))
    )
    return {"stride": 1 if padding == "same" else draw(pairs), "padding": padding, "dilation": draw(dilations)}


@st.composite
def convolutions(draw: st.DrawFn) -> Call:
    groups, kg, cg = draw(small), draw(st.integers(1, 4)), draw(_up_to(5))
    image, filters = (draw(_up_to(7)), draw(st.integers(2, 7))), (draw(small), draw(st.integers(1, 4)))
    bias = draw(st.sampled_from([(), ((kg * groups,),)]))
    shapes = ((*draw(batches), cg * groups, *image), (kg * groups, cg, *filters), *bias)
    return shapes, {**draw(geometries()), "groups": groups}


@st.composite
def descriptor_convolutions(draw: st.DrawFn) -> tuple[tuple[Shape, ...], dict[str, Any]]:
    """Channels in multiples of 16, for TMA; in TF32 multiples of 8 are enough."""
    n, c, k = draw(st.integers(0, 5)), draw(st.sampled_from([16, 32, 8, 24])), draw(st.sampled_from([16, 48, 40]))
    filters = draw(st.tuples(small, small))
    shapes = ((n, c, draw(st.integers(1, 5)), draw(st.integers(1, 5))), (k, c, *filters), (k,))
    return shapes[: draw(st.sampled_from([2, 3]))], {"padding": draw(st.one_of(st.just("same"), st.tuples(small, small)))}


#: (stride, channels, filter width) whose cells make rows of 48 or 144 positions, for :mod:`kernels.convolution.stem`.
STEMS = ((4, 1, 11), (4, 3, 10), (4, 3, 3), (4, 9, 2), (3, 8, 5), (3, 16, 3), (2, 4, 6), (2, 6, 3), (2, 12, 2), (2, 12, 5))


@st.composite
def strided_first_layers(draw: st.DrawFn) -> Call:
    stride, c, width = draw(st.sampled_from(STEMS))
    r, k = 2 * stride + draw(st.integers(1, stride)), draw(st.sampled_from([8, 16]))
    n, padding = draw(st.integers(0, 3)), draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    image = (r + draw(st.integers(0, 3 * stride)), width + draw(st.integers(0, 3 * stride)))
    shapes = ((n, c, *image), (k, c, r, width), (k,))
    return shapes[: draw(st.sampled_from([2, 3]))], {"stride": stride, "padding": padding}


def _check_conv2d(operation: str, case: Case, activation: str | None, launches: list[str]) -> None:
    def ours(*tensors: Tensor) -> Tensor:
        return kernels.conv2d(*tensors, **case.arguments, activation=activation)

    def reference(*tensors: Tensor) -> Tensor:
        output = F.conv2d(*tensors, **case.arguments)
        return F.relu(output) if activation else output

    tensors = case.tensors()
    if _is_refused(operation, ours, reference, tensors):
        return
    if tensors[1].numel() == 0:  # see LIMITS in test_against_functional
        with pytest.raises(ValueError, match="no dimension of size 0"):
            ours(*tensors)
        return
    launched = assert_as_float64(ours, reference, tensors, case.layouts[-1], launches)
    assert_launched_at_most(case.wanted[0], launched, *DGRAD)
    assert_launched_at_most(case.wanted[1], launched, *WGRAD)


activations = st.sampled_from([None, "relu"])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.usefixtures("small_tiles")
@any_case("conv2d", cases(convolutions()), activation=activations)
def test_conv2d(case: Case, activation: str | None, launches: list[str]) -> None:
    _check_conv2d("conv2d", case, activation, launches)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@any_case(
    "conv2d_by_descriptors",
    cases(st.one_of(descriptor_convolutions(), strided_first_layers()), (*SINGLE_AND_HALF, torch.float32)),
    activation=activations,
    by_images=st.integers(0, 1),
    folded=st.integers(0, 1),
    stream_k=st.integers(0, 1),
    taps=st.integers(0, 1),
)
def test_conv2d_by_descriptors(
    case: Case, activation: str | None, by_images: int, folded: int, stream_k: int, taps: int, launches: list[str]
) -> None:
    """float32 runs in TF32, which represents small integers exactly."""
    torch.backends.cudnn.allow_tf32 = True
    with tables.override(IMAGES=by_images, BLOCK_M=16, FOLDED=folded, STREAM_K=stream_k, TAPS=taps):
        _check_conv2d("conv2d_by_descriptors", case, activation, launches)


@st.composite
def convolutions_in_a_row(draw: st.DrawFn) -> Call:
    """Sums of the second convolution's input gradient (over K R S) stay below 256, so they are exact in bfloat16."""
    c, k1, k2 = draw(st.sampled_from([(16, 16, 16), (1, 16, 16), (3, 16, 5), (2, 5, 3), (1, 1, 1)]))
    stride, dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)]))
    image = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    filters = draw(st.tuples(small, small)), draw(st.tuples(small, small))
    shapes = ((*draw(batches), c, *image), (k1, c, *filters[0]), (k1,), (k2, k1, *filters[1]), (k2,))
    second = draw(st.sampled_from(["conv2d", "conv2d_relu", "linked_conv2d", "pool"]))
    return shapes, {"stride": stride, "dilation": dilation, "second": second}


@any_case("linked_conv2d", cases(convolutions_in_a_row()), by_images=st.integers(0, 1), tf32=st.booleans())
def test_linked_conv2d(case: Case, by_images: int, tf32: bool, launches: list[str]) -> None:
    torch.backends.cudnn.allow_tf32 = tf32
    second = case.arguments["second"]
    geometry = {"stride": case.arguments["stride"], "dilation": case.arguments["dilation"], "padding": 2}

    def ours(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        y, link = kernels.linked_conv2d(x, w1, b1, padding=1)
        assert link is not None
        if second == "pool":
            return kernels.conv2d_relu_max_pool2d(y, w2, b2, **geometry, pool_kernel_size=2, pool_stride=1, link=link)
        if second == "linked_conv2d":
            return kernels.linked_conv2d(y, w2, b2, **geometry, link=link)[0]
        return kernels.conv2d(y, w2, b2, **geometry, activation="relu" if second == "conv2d_relu" else None, link=link)

    def reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        y = F.conv2d(stored(F.relu(F.conv2d(x, w1, b1, padding=1)), case.dtype), w2, b2, **geometry)
        y = y if second == "conv2d" else F.relu(y)
        return F.max_pool2d(stored(y, case.dtype), 2, 1) if second == "pool" else y

    with tables.override(IMAGES=by_images, BLOCK_M=16):
        launched = assert_as_float64(ours, reference, case.tensors(high=1), case.layouts[-1], launches, high=1)
    x, w1, b1, w2, _ = case.wanted
    assert_launched_at_most(x + (x or w1 or b1), launched, *DGRAD)
    assert_launched_at_most(w1 + w2, launched, *WGRAD)


# --------------------------------------------------------------------------------------------------------------- pools


def _every_window_meets_the_image(
    image: Sequence[int], kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> bool:
    """Whether no window lies in the padding alone: for such a window PyTorch's backward pass writes outside its tensor."""
    steps = kernel_size if stride is None else np.broadcast_to(stride, 2)
    for size, window, step, pad, distance in zip(image, kernel_size, steps, padding, np.broadcast_to(dilation, 2), strict=True):
        starts = range(-pad, size + pad, step)  # more than needed, also for the last windows of ceil_mode
        for start in starts[: (size + 2 * pad - distance * (window - 1) - 1) // step + 1 + ceil_mode]:
            if not any(0 <= start + distance * i < size for i in range(window)):
                return False
    return True


@st.composite
def windows(draw: st.DrawFn, image: Sequence[int]) -> dict[str, Any]:
    """Arguments of a pool whose windows are mostly no larger than ``image``."""
    window = tuple(draw(st.integers(1, min(high, max(size, 1)))) for high, size in zip((3, 5), image, strict=True))
    one_too_much = draw(st.sampled_from([0, 0, 0, 0, 0, 1]))
    return {
        "kernel_size": window,
        "stride": draw(st.one_of(st.none(), pairs)),
        "padding": draw(st.tuples(*(st.integers(0, (size + one_too_much) // 2) for size in window))),
        "dilation": draw(dilations),
        "ceil_mode": draw(st.booleans()),
    }


@st.composite
def pools(draw: st.DrawFn) -> Call:
    shape = (*draw(batches), draw(_up_to(5)), draw(_up_to(11)), draw(st.integers(1, 11)))
    arguments = draw(windows(shape[-2:]))
    hypothesis.assume(_every_window_meets_the_image(shape[-2:], **arguments))
    return (shape,), arguments


@pytest.mark.usefixtures("small_tiles")
@any_case("max_pool2d", cases(pools()), return_indices=st.booleans())
def test_max_pool2d(case: Case, return_indices: bool, launches: list[str]) -> None:
    indices: list[Tensor] = []

    def values(result: Any) -> Tensor:
        if not return_indices:
            return result
        indices.append(result[1])
        return result[0]

    def ours(x: Tensor) -> Tensor:
        return values(kernels.max_pool2d(x, **case.arguments, return_indices=return_indices))

    def reference(x: Tensor) -> Tensor:
        return values(F.max_pool2d(x, **case.arguments, return_indices=return_indices))

    tensors = case.tensors()
    if _is_refused("max_pool2d", ours, reference, tensors):
        return
    indices.clear()
    assert_as_float64(ours, reference, tensors, case.layouts[-1], launches)
    if return_indices:
        assert torch.equal(*indices)


#: Whole 3 x 3 windows at stride 2: one fused kernel with a strided first layer.
OVERLAPPING = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (0, 0), "dilation": 1, "ceil_mode": False}


@st.composite
def blocks(draw: st.DrawFn, calls: st.SearchStrategy[Call]) -> Call:
    shapes, conv = draw(calls)
    try:
        image = F.conv2d(*(torch.empty(shape, device="meta") for shape in shapes), **conv).shape[-2:]
    except RuntimeError:  # refused with any pool
        image = torch.Size((1, 1))
    fused = min(image) >= 3 and draw(st.booleans())
    pool = OVERLAPPING if fused else draw(windows(image))
    return shapes, {"conv": conv, "pool": {key: value for key, value in pool.items() if key != "dilation"}}


def _check_block(
    operation: str, case: Case, output_format: torch.memory_format | None, cells: bool, launches: list[str]
) -> None:
    conv, pool = case.arguments["conv"], case.arguments["pool"]
    of_pool = {key if key == "ceil_mode" else f"pool_{key}": value for key, value in pool.items()}

    def ours(x: Tensor, w: Tensor, *b: Tensor) -> Tensor:
        given = dict(conv)
        if cells:
            x = kernels.space_to_depth(x, w.shape[2:], given["stride"], given.pop("padding"))
        return kernels.conv2d_relu_max_pool2d(x, w, *b, **given, **of_pool, output_format=output_format, cells=cells)

    def reference(*tensors: Tensor) -> Tensor:
        unpooled = stored(F.relu(F.conv2d(*tensors, **conv)), case.dtype)
        hypothesis.assume(_every_window_meets_the_image(unpooled.shape[-2:], dilation=1, **pool))
        return F.max_pool2d(unpooled, **pool)

    tensors = case.tensors()
    if cells:
        tensors[0].requires_grad_(False)
    if tensors[1].numel() == 0:
        with pytest.raises(ValueError, match=NAMES_AN_ARGUMENT):
            ours(*tensors)
        return
    if _is_refused(operation, ours, reference, tensors):
        return
    launched = assert_as_float64(ours, reference, tensors, case.layouts[-1], launches)
    assert_launched_at_most(tensors[0].requires_grad, launched, *DGRAD)
    assert_launched_at_most(case.wanted[1], launched, *WGRAD)


formats = st.sampled_from([None, torch.channels_last, torch.contiguous_format])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.usefixtures("small_tiles")
@any_case("conv2d_relu_max_pool2d", cases(blocks(convolutions())), output_format=formats)
def test_conv2d_relu_max_pool2d(case: Case, output_format: torch.memory_format | None, launches: list[str]) -> None:
    _check_block("conv2d_relu_max_pool2d", case, output_format, False, launches)


@pytest.mark.slow
@any_case(
    "conv2d_relu_max_pool2d_by_descriptors",
    cases(blocks(strided_first_layers()), (*SINGLE_AND_HALF, torch.float32)),
    output_format=formats,
    cells=st.booleans(),
)
def test_conv2d_relu_max_pool2d_by_descriptors(
    case: Case, output_format: torch.memory_format | None, cells: bool, launches: list[str]
) -> None:
    torch.backends.cudnn.allow_tf32 = True
    with tables.override(IMAGES_WGRAD=1, BLOCK_M=16):
        _check_block("conv2d_relu_max_pool2d_by_descriptors", case, output_format, cells, launches)


@any_case("space_to_depth", cases(strided_first_layers()))
def test_space_to_depth(case: Case) -> None:
    (x, w, *_), (stride, (top, left)) = case.tensors(), case.arguments.values()
    x = x.detach()
    n, c, height, width = x.shape
    cells = kernels.space_to_depth(x, w.shape[2:], stride, (top, left))
    rows, columns = (
        (size + 2 * pad - reach) // stride + math.ceil(reach / stride)
        for size, pad, reach in zip((height, width), (top, left), w.shape[2:], strict=True)
    )
    exact = torch.zeros(n, rows, columns, stride, stride, c, dtype=torch.float64, device=DEVICE)
    for row in range(height):
        for column in range(width):
            (i, a), (j, b) = divmod(row + top, stride), divmod(column + left, stride)
            if i < rows and j < columns:
                exact[:, i, j, a, b] = x[:, :, row, column].double()
    assert_exact("cells", cells, exact.flatten(3), case.dtype)
    assert cells.is_contiguous()


# ------------------------------------------------------------------------------------------- linear layers and dropout


@st.composite
def linears(draw: st.DrawFn) -> Call:
    leading = draw(st.lists(st.integers(0, 5), max_size=3))
    # One number of features in eight gives rows of whole 16 bytes, which TMA can read.
    features = draw(st.one_of(st.integers(0, 40), st.sampled_from([8, 16, 24, 40])))
    outputs = draw(st.one_of(st.integers(0, 20), st.integers(31, 45)))  # few outputs have kernels of their own
    if draw(st.integers(0, 9)) == 0:
        return ((*leading, features), (features,)), {}
    bias = draw(st.sampled_from([(), ((outputs,),), ((1,),), ((),)]))
    return ((*leading, features), (outputs, features), *bias), {}


@pytest.mark.usefixtures("small_tiles")
@any_case("linear", cases(linears()), activation=activations)
def test_linear(case: Case, activation: str | None, launches: list[str]) -> None:
    def ours(*tensors: Tensor) -> Tensor:
        return kernels.linear(*tensors, activation=activation)

    def reference(*tensors: Tensor) -> Tensor:
        output = F.linear(*tensors)
        return F.relu(output) if activation else output

    tensors = case.tensors()
    if _is_refused("linear", ours, reference, tensors):
        return
    launched = assert_as_float64(ours, reference, tensors, case.layouts[-1], launches)
    assert_launched_at_most(sum(case.wanted[:2]), launched, *MATMUL)


seeds = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.usefixtures("small_tiles")
@any_case(
    "linear_relu_dropout",
    cases(linears()),
    p=st.sampled_from([0, 0.5, 0.75, 1.0]),  # 1 / (1 - p) is exact in every dtype
    training=st.sampled_from([True, True, False]),
    seed=seeds,
)
def test_linear_relu_dropout(case: Case, p: float, training: bool, seed: int, launches: list[str]) -> None:
    def ours(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return kernels.linear_relu_dropout(x, w, b, p, training, seed=seed)

    def reference(*tensors: Tensor) -> Tensor:
        output = stored(F.relu(F.linear(*tensors)), case.dtype)
        if not training:
            return output
        return output * kernels.dropout_mask(output.shape, p, seed, device=DEVICE) * dropout_scale(p)

    tensors = case.tensors()
    if _is_refused("linear_relu_dropout", ours, reference, tensors):
        return
    launched = assert_as_float64(ours, reference, tensors, case.layouts[-1], launches)
    assert_launched_at_most(sum(case.wanted[:2]), launched, *MATMUL)


@st.composite
def dropouts(draw: st.DrawFn) -> Call:
    p = draw(st.one_of(st.sampled_from([0, 0.5, 1]), st.floats(0, 1)))
    return (tuple(draw(st.lists(_up_to(6), max_size=4))),), {"p": p, "training": draw(st.sampled_from([True, True, False]))}


@pytest.mark.usefixtures("small_tiles")
@any_case("dropout", cases(dropouts()), seed=seeds, as_tensor=st.booleans())
def test_dropout(case: Case, seed: int, as_tensor: bool, launches: list[str]) -> None:
    p, training = case.arguments.values()
    scalar = torch.tensor([seed], device=DEVICE)
    mask = kernels.dropout_mask(case.shapes[0], p, seed, device=DEVICE)
    assert torch.equal(mask, dropout_mask_reference(case.shapes[0], p, scalar))
    scale = torch.tensor(dropout_scale(p), dtype=torch.float32, device=DEVICE).double()
    assert_as_float64(
        lambda x: kernels.dropout(x, p, training, seed=scalar if as_tensor else seed),
        lambda x: x * mask * scale if training else x * 1,
        case.tensors(),
        case.layouts[-1],
        launches,
    )


# ------------------------------------------------------------------------------------------------ images and optimizer


@dataclasses.dataclass(frozen=True)
class Gather:
    """A call of gather_resize; ``layouts`` are those of the images, the index and the augmentation's tensors (``parts``)."""

    images: Shape
    n: int
    size: int
    parts: frozenset[str]
    cells: kernels.Cells | None
    dtype: torch.dtype
    layouts: tuple[Layout, ...]
    seed: int


#: Filters no larger than an image of 1 pixel with its padding.
of_filters = st.one_of(
    st.none(),
    st.builds(
        lambda stride, below, right, filter_size: kernels.Cells(
            (min(filter_size[0], 1 + 2 * below), min(filter_size[1], 1 + 2 * right)), stride, (below, right)
        ),
        *(st.integers(1, 5), st.integers(0, 6), st.integers(0, 6), st.tuples(st.integers(1, 12), st.integers(1, 12))),
    ),
)
gathers = st.builds(
    Gather,
    images=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12)),
    n=st.integers(0, 5),
    size=st.integers(1, 17),
    parts=st.frozensets(st.sampled_from(kernels.Augmentation._fields)),
    cells=of_filters,
    dtype=st.sampled_from(SINGLE_AND_HALF),
    layouts=st.tuples(*[fuzz.layouts] * 7),
    seed=st.integers(0, 2**31),
)


@pytest.mark.usefixtures("small_tiles")
@any_case("gather_resize", gathers)
def test_gather_resize(case: Gather) -> None:
    of_images, of_index, of_offset, of_flip, of_brightness, of_contrast, of_size = case.layouts
    n, depth = case.n, case.images[0]
    images = of_images.view(case.images, lambda e: torch.randint(0, 256, (e,), dtype=torch.uint8, device=DEVICE))
    index = of_index.view((n,), lambda e: torch.randint(0, depth, (e,), device=DEVICE))
    every = kernels.Augmentation(
        of_offset.view((n, 2), lambda e: torch.randint(-5, 6, (e,), dtype=torch.int32, device=DEVICE)),
        of_flip.view((n,), lambda e: torch.randint(0, 2, (e,), device=DEVICE).bool()),
        of_brightness.view((n,), lambda e: torch.rand(e, device=DEVICE) * 2),
        of_contrast.view((n,), lambda e: torch.rand(e, device=DEVICE) * 3),
        of_size.view((n, 2), lambda e: torch.randint(1, 15, (e,), dtype=torch.int32, device=DEVICE)),
    )
    augmentation = kernels.Augmentation(**{part: getattr(every, part) for part in case.parts}) if case.parts else None
    arguments = {"mean": 0.3, "std": 0.4, "augmentation": augmentation, "cells": case.cells}
    got = kernels.gather_resize(images, index, case.size, dtype=case.dtype, **arguments)
    peer, exact = (gather_resize_reference(images, index, case.size, dtype=d, **arguments) for d in (case.dtype, torch.float64))
    # Each coordinate is rounded twice in float32, and neighbouring pixels differ by up to 1 / std.
    side = max(*case.images[1:], 14)
    assert_within_tolerance("images", got, peer, exact, inherent=2 * side * torch.finfo(torch.float32).eps / 0.4)


@st.composite
def class_logits(draw: st.DrawFn) -> Call:
    classes = draw(st.integers(1, 40))
    if draw(st.integers(0, 9)) == 0:
        return ((classes,),), {}
    return ((draw(st.integers(1, 9)), classes, *draw(st.lists(st.integers(1, 3), max_size=2))),), {}


@any_case(
    "cross_entropy",
    cases(class_logits(), SINGLE_AND_HALF),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weighted=st.booleans(),
    split=st.sampled_from([1, 3]),
)
def test_cross_entropy(case: Case, reduction: str, label_smoothing: float, weighted: bool, split: int) -> None:
    """Some labels are ignored, but never all."""
    (logits,) = case.tensors()
    (shape,) = case.shapes
    classes = shape[len(shape) > 1]
    labels = torch.randint(0, classes, (*shape[:1], *shape[2:]) if len(shape) > 1 else (), device=DEVICE)
    ignored = torch.rand(labels.shape, device=DEVICE) < 0.25
    labels = labels.masked_fill(ignored, -100) if not ignored.all() else labels
    weight = torch.linspace(0.5, 1.5, classes, device=DEVICE).to(case.dtype) if weighted else None

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        x = logits.detach().to(dtype).requires_grad_() if dtype != case.dtype else logits
        of_class = None if weight is None else weight.to(dtype)
        loss = function(x, labels, weight=of_class, label_smoothing=label_smoothing, reduction=reduction)
        if not logits.requires_grad:
            return [loss]
        grad = torch.linspace(-1, 1, loss.numel(), device=DEVICE).view(loss.shape) if loss.dim() else torch.tensor(0.5)
        return [loss, *torch.autograd.grad(loss, x, grad.to(loss.dtype).to(DEVICE))]

    with tables.override(SPLIT=split, BLOCK_ROWS=2, BLOCK_COLUMNS=16):
        found = results(kernels.cross_entropy, case.dtype)
    expected = results(F.cross_entropy, case.dtype), results(F.cross_entropy, torch.float64)
    for name, got, peer, exact in zip(("loss", "gradient"), found, *expected, strict=False):
        # Logarithms and exponentials of numbers that differ by up to 4.
        inherent = 4 * torch.finfo(case.dtype).eps if exact.numel() else 0.0
        assert_within_tolerance(name, got, peer, exact, inherent=inherent)


@dataclasses.dataclass(frozen=True)
class Step:
    """A call of sgd_step; for each tensor its shape, the memory order of its axes, and the number of elements before it."""

    tensors: tuple[tuple[Shape, tuple[int, ...], int], ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    arguments: dict[str, Any]
    first_step: bool
    lr_in_memory: bool
    negated: bool  # the gradients are lazily negated
    seed: int


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Every number is a sum of few powers of 2, so float32 rounds nothing."""
    tensors = []
    for _ in range(draw(st.one_of(st.integers(0, 4), st.just(33)))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        tensors.append((shape, tuple(draw(st.permutations(range(len(shape))))), draw(st.integers(0, 5))))
    nesterov = draw(st.booleans())
    momentum = 0.5 if nesterov else draw(st.sampled_from([0.0, 0.5]))
    arguments = {
        "lr": draw(st.sampled_from([0.0, 0.25, 1.0])),
        "momentum": momentum,
        "dampening": 0.0 if nesterov else draw(st.sampled_from([0.0, 0.5])),
        "weight_decay": draw(st.sampled_from([0.0, 0.25])),
        "nesterov": nesterov,
        "maximize": draw(st.booleans()),
    }
    dtypes = draw(st.sampled_from(SINGLE_AND_HALF)), draw(st.sampled_from(SINGLE_AND_HALF))
    first_step = momentum > 0 and draw(st.booleans())
    others = draw(st.booleans()), draw(st.sampled_from([False, False, True])), draw(st.integers(0, 2**31))
    return Step(tuple(tensors), *dtypes, arguments, first_step, *others)


@pytest.mark.usefixtures("small_tiles")
@any_case("sgd_step", steps())
def test_sgd_step(case: Step) -> None:
    """The step of torch.optim.SGD on float64 weights: masters, or parameters where the master does not round to them."""

    def make(dtype: torch.dtype) -> list[Tensor]:
        placed = []
        for shape, order, offset in case.tensors:
            memory = integers(offset + math.prod(shape), dtype=dtype, grad=False)
            placed.append(memory.as_strided(shape, dense(shape, order), offset))
        return placed

    params, grads, buffers = make(case.dtype), make(case.grad_dtype), make(torch.float32)
    grads = [torch._neg_view(g) for g in grads] if case.negated else grads
    masters = None if case.dtype == torch.float32 else make(torch.float32)
    weights = [p.double() for p in params]
    for i, (param, master) in enumerate(zip(params, masters or [], strict=False)):
        # Most masters round to the parameter; the other parameters count as set from outside.
        master.mul_(2.0**-11).add_(param)
        weights[i] = torch.where(master.to(case.dtype) == param, master.double(), param.double())
    expected = [torch.nn.Parameter(w) for w in weights]
    lr = case.arguments["lr"]
    has_momentum = case.arguments["momentum"] > 0
    optimizer = torch.optim.SGD(expected, **case.arguments, foreach=False) if expected else None
    for weight, grad, buffer in zip(expected, grads, buffers, strict=True):
        assert optimizer is not None
        weight.grad = grad.double()
        if has_momentum and not case.first_step:
            optimizer.state[weight]["momentum_buffer"] = buffer.double()
    if optimizer is not None:
        optimizer.step()
    sgd_step(
        params,
        grads,
        masters,
        buffers if has_momentum else None,
        **case.arguments | {"lr": torch.tensor([lr], device=DEVICE) if case.lr_in_memory else lr},
        first_step=case.first_step,
    )
    for i, weight in enumerate(expected):
        assert_exact(f"params[{i}]", params[i], weight, case.dtype)
        if masters is not None:
            assert_exact(f"masters[{i}]", masters[i], weight, torch.float32)
        if has_momentum:
            assert optimizer is not None
            assert_exact(f"buffers[{i}]", buffers[i], optimizer.state[weight]["momentum_buffer"], torch.float32)


def test_all_operations_are_here() -> None:
    """All public operations are tested, except those without a kernel."""
    fuzzed = {operation.removesuffix("_by_descriptors") for operation in fuzz.CASES}
    assert fuzzed == {*kernels.__all__, "sgd_step"} - {"Augmentation", "Cells", "dropout_mask", "reads_cells", "use_backend"}
