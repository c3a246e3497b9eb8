"""Equal pixels give equal results: flat regions of an image tie in a pool's window, and the gradient goes where PyTorch's goes.

Real images are flat in places. Where a kernel rounds a pixel otherwise than an equal neighbour, the pool passes the gradient
to another pixel than PyTorch's does, and the input gradient is wrong by its full size.

Factors are numbers that float16 holds. Sums of their products are exact in float64, so the reference keeps all ties in any
order of summation; in float32 the sums are not exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from alexnet_triton import AlexNet
from alexnet_triton.data.fashion_mnist import load_fashion_mnist
from kernels.configs import tables

from .conftest import DEVICE
from .oracle import DTYPES, assert_within_tolerance, check, dtype_id, integers, randn

HALF = (torch.float16, torch.bfloat16)


def short(numbers: Tensor) -> Tensor:
    """``numbers`` rounded to float16, in their own dtype."""
    return numbers.half().to(numbers.dtype)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of kernels: a convolution that it runs, configuration values that choose it, and its forward kernel."""

    id: str
    runs: str  # kernels other than the general one run float32 in TF32
    n: int
    c: int
    side: int
    k: int
    r: int
    stride: int = 1
    groups: int = 1
    tiles: dict[str, int] = dataclasses.field(default_factory=dict)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Images with one color in each channel, filters, a bias."""
        colors = short(randn(1, self.c, 1, 1, dtype=dtype, grad=False)).expand(self.n, -1, self.side, self.side)
        w = short(randn(self.k, self.c // self.groups, self.r, self.r, dtype=dtype, grad=False))
        return (
            colors.contiguous().requires_grad_(),
            w.requires_grad_(),
            short(randn(self.k, dtype=dtype, grad=False)).requires_grad_(),
        )

    @property
    def geometry(self) -> dict[str, int]:
        return {"stride": self.stride, "groups": self.groups}


FAMILIES = (
    Family("general", "_conv2d_fprop_kernel", 2, 3, 17, 20, 5),
    Family("general_strided", "_conv2d_fprop_kernel", 2, 3, 33, 24, 5, stride=2),
    Family("general_grouped", "_conv2d_fprop_kernel", 2, 8, 14, 12, 3, groups=2),
    Family("general_small_tiles", "_conv2d_fprop_kernel", 3, 5, 15, 40, 3, tiles={"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32}),
    Family("general_one_channel", "_conv2d_fprop_kernel", 2, 1, 31, 24, 7, stride=3),
    Family("images", "_conv2d_images_kernel", 18, 16, 7, 48, 3, tiles={"IMAGES": 1, "BLOCK_M": 16}),
    Family("images_two_pixels", "_conv2d_images_kernel", 3, 32, 8, 48, 3, tiles={"IMAGES": 1, "PIXELS": 2}),
    Family("taps", "_conv2d_taps_kernel", 18, 48, 7, 48, 3, tiles={"TAPS": 1, "BLOCK_M": 16}),
    Family("box", "_conv2d_box_kernel", 2, 32, 11, 48, 3, tiles={"IMAGES": 0, "NB": 1, "TH": 4, "TW": 4}),
    Family("stem", "_conv2d_stem_kernel", 3, 1, 47, 32, 11, stride=4, tiles={"FUSED": 0}),
    Family("stem_three_channels", "_conv2d_stem_kernel", 2, 3, 47, 32, 11, stride=4, tiles={"FUSED": 0}),
    Family("stem_pool", "_conv2d_stem_pool_kernel", 3, 1, 47, 96, 11, stride=4, tiles={"FUSED": 1}),
    Family("rows", "_conv2d_rows_kernel", 2, 3, 47, 32, 11, stride=4),
)
POOLED = ("_conv2d_stem_pool_kernel",)


def _dtypes(family: Family) -> tuple[torch.dtype, ...]:
    if family.runs == "_conv2d_fprop_kernel":
        return DTYPES
    if DEVICE != "cpu" and torch.cuda.get_device_capability()[0] not in (9, 10):
        return ()
    of_half = () if "_rows_" in family.runs else HALF
    return of_half if "_stem_" in family.runs else (*of_half, torch.float32)


EACH = [pytest.param(family, dtype, id=f"{family.id}-{dtype_id(dtype)}") for family in FAMILIES for dtype in _dtypes(family)]


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> None:
    """TF32 for families that support it: on numbers and gradients that float16 holds, TF32 rounds nothing."""
    family: Family = request.getfixturevalue("family")
    torch.backends.cudnn.allow_tf32 = family.runs != "_conv2d_fprop_kernel"


def _gradients(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Draws the output gradient: in float32, numbers whose sums over overlapping windows TF32 holds exactly."""
    return integers if dtype == torch.float32 else randn


def assert_equal_pixels(name: str, pixels: Tensor) -> None:
    """Check that each channel of each image of (N, C, rows, columns) is one color, bit for bit."""
    assert pixels.shape[-1] > 1
    assert torch.equal(pixels, pixels[:, :, :1, :1].expand_as(pixels)), name


@pytest.mark.thin
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("family", "dtype"), EACH)
def test_a_flat_image_gives_a_flat_output_and_flat_gradients(family: Family, dtype: torch.dtype, launches: list[str]) -> None:
    """Without padding all output pixels read equal pixels; so do all filter positions, and input pixels away from the edge."""
    x, w, b = family.tensors(dtype)
    with tables.override(**family.tiles):
        if family.runs in POOLED:
            y = kernels.conv2d_relu_max_pool2d(x, w, b, **family.geometry, pool_kernel_size=3, pool_stride=2)
        else:
            y = kernels.conv2d(x, w, b, **family.geometry, activation="relu")
        assert family.runs in launches
        assert_equal_pixels("output", y)
        assert torch.equal(y, y[:1].expand_as(y)), "images"
        if family.runs not in POOLED:
            flat = short(randn(1, family.k, 1, 1, dtype=dtype, grad=False)).expand_as(y)
            dx, dw = torch.autograd.grad(y, (x, w), flat)
            assert_equal_pixels("gradient of weight", dw)
            edge = family.r - 1
            for row in range(family.stride):  # pixels a stride apart get equal gradients
                inner = dx[:, :, edge + row : -edge : family.stride, edge + row : -edge : family.stride]
                assert_equal_pixels("gradient of input", inner)


@pytest.mark.thin("general-", "images-", "stem_pool-")
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("family", "dtype"), EACH[::2])
def test_a_flat_image_ties_in_a_pool_as_in_pytorch(family: Family, dtype: torch.dtype) -> None:
    """The first of equal maxima is taken, and the gradient arrives where float64's does."""
    x, w, b = family.tensors(dtype)
    pool: dict[str, Any] = {"pool_kernel_size": 3, "pool_stride": 2}
    with tables.override(**family.tiles):
        y = kernels.conv2d_relu_max_pool2d(x, w, b, **family.geometry, **pool)
        (position,) = [t for t in y.grad_fn.saved_tensors if t is not None and t.shape == y.shape]
        assert set(position.unique().tolist()) <= {0, 255}  # the first position, or none where the ReLU's output is zero
        assert (position == 0).any()
        unpooled = kernels.conv2d(x, w, b, **family.geometry, activation="relu")
        pooled, at = kernels.max_pool2d(unpooled, 3, 2, return_indices=True)
        theirs, indices = F.max_pool2d(unpooled, 3, 2, return_indices=True)
        assert torch.equal(pooled, theirs)
        assert torch.equal(at, indices)

        def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return kernels.conv2d_relu_max_pool2d(x, w, b, **family.geometry, **pool)

        def reference(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.max_pool2d(F.conv2d(x, w, b, **family.geometry).relu(), 3, 2)

        check(ours, reference, [x, w, b], names="input weight bias", draw=_gradients(dtype))


def fashion(count: int, side: int) -> Tensor:
    """The sample's ``count`` flattest images as float32, enlarged to ``side`` as for training."""
    images = load_fashion_mnist("sample").train.images.view(-1, 1, 28, 28).float()
    highest, lowest = F.max_pool2d(images, 3, 1), -F.max_pool2d(-images, 3, 1)
    flatness = ((highest == lowest) & (highest > 0)).sum((1, 2, 3))  # black pixels give the bias in any order of summation
    flattest = images[flatness.argsort(descending=True, stable=True)[:count]] / 255
    return short(F.interpolate(flattest, size=(side, side), mode="bilinear")).to(DEVICE)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("family", "dtype"), [p for p in EACH if p.values[0].c == 1 and p.values[1] != torch.float64])
def test_gradients_on_images_that_are_flat_in_places(family: Family, dtype: torch.dtype) -> None:
    images = fashion(2, 64).to(dtype).requires_grad_()
    _, w, b = family.tensors(dtype)
    with tables.override(**family.tiles):
        check(
            lambda x, w, b: kernels.conv2d_relu_max_pool2d(x, w, b, family.stride, 1, pool_kernel_size=3, pool_stride=2),
            lambda x, w, b: F.max_pool2d(F.conv2d(x, w, b, family.stride, 1).relu(), 3, 2),
            [images, w, b],
            names="input weight bias",
            draw=_gradients(dtype),
        )


@pytest.mark.parametrize("kind", ["flat", "fashion"])
def test_the_networks_first_block(kind: str) -> None:
    """The gradient of the images is checked at 224 x 224 in float32."""
    block = AlexNet()[:3].to(DEVICE)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(short(p))
    images = short(torch.full((1, 1, 224, 224), 0.3, device=DEVICE)) if kind == "flat" else fashion(1, 224)
    grad: Tensor | None = None
    results = []
    for run, dtype in (("ours", torch.float32), ("own", torch.float32), ("exact", torch.float64)):
        x = images.to(dtype).requires_grad_()
        w, b = (p.detach().to(dtype) for p in block[0].parameters())
        y = block(x) if run == "ours" else F.max_pool2d(F.conv2d(x, w, b, 4, 1).relu(), 3, 2)
        grad = torch.randn_like(y) if grad is None else grad
        results.append(torch.autograd.grad(y, x, grad.to(dtype))[0])
    assert_within_tolerance("gradient of input", *results)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_equal_rows_of_a_linear_layer(dtype: torch.dtype) -> None:
    """Equal rows of the input have equal outputs and gradients; equal features have equal weight gradients."""
    x = randn(1, 1, dtype=dtype, grad=False).expand(70, 150).contiguous().requires_grad_()
    w, b = randn(90, 150, dtype=dtype), randn(90, dtype=dtype)
    y = kernels.linear(x, w, b, activation="relu")
    dx, dw = torch.autograd.grad(y, (x, w), randn(1, 90, dtype=dtype, grad=False).expand_as(y))
    assert torch.equal(y, y[:1].expand_as(y))
    assert torch.equal(dx, dx[:1].expand_as(dx))
    assert torch.equal(dw, dw[:, :1].expand_as(dw))
