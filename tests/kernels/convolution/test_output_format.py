"""NCHW outputs written by the kernels: strides, values and gradients of conv2d and max_pool2d in both memory formats."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.configs import tables
from kernels.convolution import autograd as conv
from kernels.pooling import autograd as pooling
from kernels.runtime import launch

from ...conftest import DEVICE, own_devices
from ...oracle import DTYPES, check, dtype_id, integers, randn

HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Family:
    """A convolution, its configuration values, and the last kernel of its forward pass."""

    id: str
    runs: str
    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    tiles: dict[str, int] = dataclasses.field(default_factory=dict)

    def tensors(self, make: Any, dtype: torch.dtype) -> list[Tensor]:
        groups = self.options.get("groups", 1)
        sizes = ((self.n, self.c, self.h, self.w), (self.k, self.c // groups, self.r, self.r), (self.k,))
        return [make(*size, dtype=dtype) for size in sizes]


SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32}
FAMILIES = (
    Family("general", "_conv2d_fprop_kernel", 2, 3, 7, 9, 20, 3, {"padding": 1}, SMALL),
    Family("general_grouped", "_conv2d_fprop_kernel", 3, 6, 9, 7, 42, 3, {"stride": 2, "padding": (0, 2), "groups": 2}, SMALL),
    Family("images", "_conv2d_images_kernel", 19, 16, 4, 5, 48, 3, {"padding": 1}, {"IMAGES": 1, "BLOCK_M": 16}),
    Family(
        "images_two_pixels_two_blocks", "_conv2d_images_kernel", 18, 32, 4, 5, 80, 3, {"padding": 1},
        {"IMAGES": 1, "PIXELS": 2, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_N2": 16},
    ),
    Family("taps", "_conv2d_taps_kernel", 19, 48, 4, 5, 48, 3, {"padding": 1}, {"TAPS": 1, "BLOCK_M": 16}),
    Family("box", "_conv2d_box_kernel", 3, 16, 5, 7, 48, 3, {}, {"IMAGES": 0, "NB": 2, "TH": 2, "TW": 4, "BLOCK_N": 16}),
    Family(
        "stem", "_conv2d_stem_kernel", 18, 1, 23, 27, 48, 11, {"stride": 4, "padding": 1},
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_N2": 16, "COLUMNS": 2},
    ),
    Family("stem_three_channels", "_conv2d_stem_kernel", 2, 3, 23, 19, 16, 11, {"stride": 4}),
)  # fmt: skip
EACH = [
    pytest.param(family, dtype, id=f"{family.id}-{dtype_id(dtype)}")
    for family in FAMILIES
    for dtype in (DTYPES if family.runs == "_conv2d_fprop_kernel" else HALF)
    if DEVICE == "cpu" or family.runs == "_conv2d_fprop_kernel" or torch.cuda.get_device_capability()[0] in (9, 10)
]


def dense(size: tuple[int, ...], output_format: torch.memory_format | None) -> tuple[int, ...]:
    """The strides of a dense (N, C, H, W) or (C, H, W) tensor in ``output_format``; None means NHWC."""
    *_, c, h, w = size
    strides = (c * h * w, h * w, w, 1) if output_format == torch.contiguous_format else (c * h * w, 1, w * c, c)
    return strides[-len(size) :]


@pytest.mark.thin
@pytest.mark.parametrize(
    ("output_format", "activation"),
    [(torch.contiguous_format, "relu"), (torch.channels_last, None), (None, "relu")],
    ids=["nchw-relu", "nhwc", "none-relu"],
)
@pytest.mark.parametrize(("family", "dtype"), EACH)
def test_strides_and_bits(
    family: Family, dtype: torch.dtype, output_format: torch.memory_format | None, activation: str | None, launches: list[str]
) -> None:
    """Every format has the same bits and the same number of launches."""
    tensors = family.tensors(integers, dtype)
    with tables.override(**family.tiles):
        due = kernels.conv2d(*tensors, **family.options, activation=activation)
        usual = launches.copy()
        launches.clear()
        y = kernels.conv2d(*tensors, **family.options, activation=activation, output_format=output_format)
    assert y.stride() == dense(y.shape, output_format)
    assert torch.equal(y, due)
    assert launches == usual
    assert launches[-1] == family.runs


@pytest.mark.thin
@pytest.mark.parametrize(("family", "dtype"), EACH)
def test_values_and_gradients(family: Family, dtype: torch.dtype) -> None:
    options = family.options

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return kernels.conv2d(x, w, b, **options, activation="relu", output_format=torch.contiguous_format)

    def reference(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, w, b, **options))

    with tables.override(**family.tiles):
        y = check(ours, reference, family.tensors(randn, dtype), names="input weight bias")
    assert y.is_contiguous()


def test_boxes_write_nchw_where_nothing_is_said(launches: list[str]) -> None:
    """A box's pixels are neighbours in NCHW memory; one pixel of many images is not."""
    x, w = randn(5, 16, 6, 6, dtype=torch.float16), randn(16, 16, 3, 3, dtype=torch.float16)
    if DEVICE != "cpu" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("no tensor descriptors")
    with tables.override(IMAGES=1):
        kernels.conv2d(x, w, output_format=torch.contiguous_format)
    kernels.conv2d(x, w, output_format=torch.contiguous_format)
    assert launches == ["_conv2d_images_kernel", "_conv2d_box_kernel"]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["input_nhwc", "input_nchw"])
@pytest.mark.parametrize("output_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dims", [3, 4])
def test_every_operation_that_is_asked_for_a_format(
    dims: int, output_format: torch.memory_format, channels_last: bool, backend: Any
) -> None:
    """Each takes either input format, a batch or one image, on our kernels and on PyTorch's operations."""
    (x, w, b) = FAMILIES[0].tensors(randn, torch.float32)
    x = x.detach().contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    x = (x[0] if dims == 3 else x).requires_grad_()
    with kernels.use_backend(backend):
        y = kernels.conv2d(x, w, b, padding=1, output_format=output_format)
        pooled, indices = kernels.max_pool2d(x, 3, 2, return_indices=True, output_format=output_format)
        block = kernels.conv2d_relu_max_pool2d(x, w, b, pool_kernel_size=2, output_format=output_format)
        (dx,) = torch.autograd.grad(pooled, x, torch.ones_like(pooled))
    for each in (y, pooled, indices, block):
        assert each.stride() == dense(each.shape, output_format)
    theirs, at = F.max_pool2d(x, 3, 2, return_indices=True)
    assert torch.equal(pooled, theirs)
    assert torch.equal(indices, at)
    assert torch.equal(dx, torch.autograd.grad(theirs, x, torch.ones_like(theirs))[0])
    if backend == "auto":  # PyTorch's gradient of one image is NCHW
        assert dx.stride() == x.stride()


def test_a_pool_gives_its_inputs_format_where_none_is_asked_for() -> None:
    x = randn(2, 5, 9, 8, dtype=torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert kernels.max_pool2d(x.contiguous(memory_format=memory_format), 2).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("output_format", [torch.preserve_format, torch.channels_last_3d, "NCHW", True])
def test_other_formats_are_refused(output_format: Any, launches: list[str]) -> None:
    x, w = randn(2, 3, 9, 8, dtype=torch.float32), randn(4, 3, 3, 3, dtype=torch.float32)
    for call in (
        lambda: kernels.conv2d(x, w, output_format=output_format),
        lambda: kernels.max_pool2d(x, 2, output_format=output_format),
        lambda: kernels.conv2d_relu_max_pool2d(x, w, pool_kernel_size=2, output_format=output_format),
    ):
        with pytest.raises(ValueError, match="output_format must be None"):
            call()
    assert launches == []


def test_a_linked_input_and_an_output_in_nchw() -> None:
    """The second of two linked convolutions can write NCHW; a linked output itself is always NHWC."""
    x, w, w2 = (randn(*size, dtype=torch.float32) for size in ((2, 3, 8, 7), (6, 3, 3, 3), (5, 6, 3, 3)))

    def ours(x: Tensor, w: Tensor, w2: Tensor) -> Tensor:
        y, link = kernels.linked_conv2d(x, w, padding=1)
        assert y.stride() == dense(y.shape, None)
        return kernels.conv2d(y, w2, activation="relu", link=link, output_format=torch.contiguous_format)

    y = check(ours, lambda x, w, w2: F.conv2d(F.conv2d(x, w, padding=1).relu(), w2).relu(), [x, w, w2], names="x w w2")
    assert y.is_contiguous()


def test_offsets_in_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "force_int64", True)
    for family in FAMILIES:
        if family.runs != "_conv2d_fprop_kernel" and DEVICE != "cpu" and torch.cuda.get_device_capability()[0] not in (9, 10):
            continue
        tensors = family.tensors(integers, torch.float16)
        with tables.override(**family.tiles):
            y = kernels.conv2d(*tensors, **family.options, output_format=torch.contiguous_format)
        assert torch.equal(y, F.conv2d(*(t.double() for t in tensors), **family.options).half())


@pytest.mark.slow
@own_devices
@pytest.mark.parametrize("output_format", [torch.contiguous_format, torch.channels_last, None])
def test_compiled_code_knows_the_strides(output_format: torch.memory_format | None) -> None:
    """Forward and backward run with a dynamic batch: later operations are compiled for the fake tensors' strides."""
    x, w, b = FAMILIES[0].tensors(randn, torch.float32)

    def network(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        y = kernels.conv2d(x, w, b, padding=1, activation="relu", output_format=output_format)
        pooled = kernels.max_pool2d(y, 2, output_format=output_format)
        assert isinstance(pooled, Tensor)
        if output_format == torch.contiguous_format:
            return y.view(y.shape[0], -1), pooled.view(pooled.shape[0], -1)
        return y.flatten(1), pooled.flatten(1)

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        images = torch.cat([x, x])[:batch].detach().requires_grad_()
        results = []
        for each in (network, compiled):
            outputs = each(images, w, b)
            grads = torch.autograd.grad([o.square().sum() for o in outputs], (images, w, b))
            results.append([*outputs, *grads])
        for eager, graph in zip(*results, strict=True):
            assert torch.equal(eager, graph)


@own_devices
def test_the_operator_takes_the_format_last_and_has_a_default() -> None:
    """So programs that were exported before the argument existed can be loaded."""
    schema = torch.ops.alexnet_triton.conv2d_fprop.default._schema
    assert schema.arguments[-1].name == "channels_last"
    assert schema.arguments[-1].default_value is True
    x, w, b = FAMILIES[0].tensors(randn, torch.float32)
    flat = ([1, 1], [1, 1], [1, 1], 1, [7, 9], True, False)
    without, _ = conv.conv2d_fprop(x, w, b, None, *flat)
    nchw, _ = conv.conv2d_fprop(x, w, b, None, *flat, False)
    assert (without.stride(), nchw.stride()) == (dense(without.shape, None), dense(without.shape, torch.contiguous_format))
    assert torch.equal(without, nchw)
    torch.library.opcheck(conv.conv2d_fprop, (x, w, b, None, *flat, False))
    y = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(pooling.max_pool2d_fprop, (y, [2, 2], [2, 2], [0, 0], [1, 1], [3, 4], False, False, True, False))
