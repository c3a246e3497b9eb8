"""From uint8 images to the network's input: against F.interpolate and torchvision, and every argument."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv

from kernels import Augmentation, Cells, gather_resize, space_to_depth, use_backend
from kernels.images import gather_resize_reference
from kernels.runtime import launch

from ..conftest import DEVICE
from ..oracle import assert_within_tolerance, dtype_id

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: (D, H, W), N, size: Fashion-MNIST's, odd and oblong images, an unchanged size, a smaller one, a single pixel.
SHAPES = {
    "D9-28x28-N3-S224": ((9, 28, 28), 3, 224),
    "D5-28x28-N7-S28": ((5, 28, 28), 7, 28),
    "D4-13x7-N5-S31": ((4, 13, 7), 5, 31),
    "D3-28x30-N2-S11": ((3, 28, 30), 2, 11),
    "D2-1x1-N3-S5": ((2, 1, 1), 3, 5),
}


def random_images(*shape: int) -> torch.Tensor:
    """Noise, so that neighbouring pixels differ."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)


def random_index(n: int, depth: int) -> torch.Tensor:
    """Random indices: some images twice, some never."""
    return torch.randint(0, depth, (n,), device=DEVICE)


def random_augmentation(n: int, largest: int | None = None) -> Augmentation:
    """Stronger than in training: windows that keep most of the image, and factors that reach both limits.

    With ``largest`` each window has its own size up to ``largest``: single pixels, oblong windows and, if ``largest`` is large,
    windows that contain the image.
    """
    return Augmentation(
        torch.randint(-9, 10, (n, 2), dtype=torch.int32, device=DEVICE),
        torch.arange(n, device=DEVICE) % 2 == 0,
        torch.rand(n, device=DEVICE) * 2,
        torch.rand(n, device=DEVICE) * 3,
        None if largest is None else torch.randint(1, largest + 1, (n, 2), dtype=torch.int32, device=DEVICE),
    )


#: Augmentations by name: none, with windows of the image's size, with windows of other sizes.
AUGMENTED = {
    "plain": lambda n: None,
    "augmented": random_augmentation,
    "windows": lambda n: random_augmentation(n, 28),
    "large_windows": lambda n: random_augmentation(n, 100),
}


@pytest.mark.parametrize("augmented", AUGMENTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape: str, dtype: torch.dtype, augmented: str) -> None:
    (depth, height, width), n, size = SHAPES[shape]
    images, index = random_images(depth, height, width), random_index(n, depth)
    augmentation = AUGMENTED[augmented](n)
    got = gather_resize(images, index, size, mean=0.3, std=0.4, dtype=dtype, augmentation=augmentation)
    peer, exact = (
        gather_resize_reference(images, index, size, mean=0.3, std=0.4, dtype=d, augmentation=augmentation)
        for d in (dtype, torch.float64)
    )
    assert_within_tolerance("output", got, peer, exact)
    assert got.is_contiguous()
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("augmented", AUGMENTED)
def test_blocks_that_end_inside_an_image(augmented: str, launches: list[str]) -> None:
    """Tiles have 128 pixels: 13 x 13 pixels end inside the second tile, and a window is summed in several."""
    images, index = random_images(6, 28, 28), random_index(4, 6)
    augmentation = AUGMENTED[augmented](4)
    got = gather_resize(images, index, 13, augmentation=augmentation)
    assert launches == ["_gather_resize_kernel"]
    peer, exact = (
        gather_resize_reference(images, index, 13, dtype=d, augmentation=augmentation) for d in (torch.float32, torch.float64)
    )
    assert_within_tolerance("output", got, peer, exact)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_resize_is_pytorchs_and_torchvisions(backend: str) -> None:
    images, index = random_images(6, 28, 28), random_index(4, 6)
    with use_backend(backend):  # type: ignore[arg-type]
        got = gather_resize(images, index, 224)
    scaled = images[index].unsqueeze(1).float() / 255
    torch.testing.assert_close(got, F.interpolate(scaled, (224, 224), mode="bilinear"), rtol=0, atol=1e-6)
    torch.testing.assert_close(got, tv.resize(scaled, [224, 224], antialias=True), rtol=0, atol=1e-6)
    rounded = tv.resize(images[index].unsqueeze(1), [224, 224], antialias=True).float() / 255
    assert (got - rounded).abs().max() <= 1 / 255 + 1e-6  # one step of uint8, and float32's own rounding


def test_a_size_kept_is_a_division_bit_for_bit() -> None:
    images, index = random_images(6, 28, 28), random_index(4, 6)
    expected = images[index].cpu().float() / 255  # on CUDA, PyTorch multiplies by a reciprocal
    assert torch.equal(gather_resize(images, index, 28)[:, 0].cpu(), expected)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_augmentation_is_torchvisions(backend: str) -> None:
    """torchvision's functions take one image after the other with the same parameters."""
    images, index, augmentation = random_images(6, 28, 28), random_index(5, 6), random_augmentation(5)
    with use_backend(backend):  # type: ignore[arg-type]
        got = gather_resize(images, index, 56, augmentation=augmentation)
    for n in range(5):
        image = images[index[n]].unsqueeze(0).float() / 255
        image = tv.crop(image, *augmentation.offset[n].tolist(), 28, 28)
        if augmentation.flip[n]:
            image = tv.horizontal_flip(image)
        image = tv.adjust_brightness(image, augmentation.brightness[n].item())
        image = tv.adjust_contrast(image, augmentation.contrast[n].item())
        torch.testing.assert_close(got[n], tv.resize(image, [56, 56]), rtol=0, atol=1e-5)


#: Windows of 28 x 28 images, (top, left, height, width): inside, of one pixel, the whole image, over each edge, around the
#: image, far away.
WINDOWS = ((3, 5, 11, 17), (27, 0, 1, 1), (0, 0, 28, 28), (-4, 20, 9, 30), (20, -6, 25, 8), (-3, -9, 40, 50), (90, -70, 6, 5))


def windows_at(boxes: tuple[tuple[int, int, int, int], ...]) -> Augmentation:
    """An augmentation of these windows only."""
    corners = torch.tensor(boxes, dtype=torch.int32, device=DEVICE)
    return Augmentation(offset=corners[:, :2], size=corners[:, 2:])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("changes", ["crop", "crop_and_flip", "all"])
def test_windows_are_torchvisions(changes: str, backend: str) -> None:
    """torchvision's functions with the same parameters, one image after the other, enlarged to 56."""
    n = len(WINDOWS)
    images, index, augmentation = random_images(6, 28, 28), random_index(n, 6), windows_at(WINDOWS)
    if changes != "crop":
        augmentation = augmentation._replace(flip=torch.arange(n, device=DEVICE) % 2 == 0)
    if changes == "all":
        colours = random_augmentation(n)
        augmentation = augmentation._replace(brightness=colours.brightness, contrast=colours.contrast)
    with use_backend(backend):  # type: ignore[arg-type]
        got = gather_resize(images, index, 56, augmentation=augmentation)
    for number, box in enumerate(WINDOWS):
        image = images[index[number]].unsqueeze(0).float() / 255
        expected = tv.crop(image, *box)
        if changes != "crop" and number % 2 == 0:
            expected = tv.horizontal_flip(expected)
        if changes == "all":
            expected = tv.adjust_brightness(expected, augmentation.brightness[number].item())
            expected = tv.adjust_contrast(expected, augmentation.contrast[number].item())
        torch.testing.assert_close(got[number], tv.resize(expected, [56, 56]), rtol=0, atol=1e-5)
        if changes == "crop":
            torch.testing.assert_close(got[number], tv.resized_crop(image, *box, [56, 56]), rtol=0, atol=1e-5)
    assert got[-1].unique().numel() == 1  # outside of the image all is black, and so is the mean


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_window_larger_than_the_output_is_not_smoothed(backend: str) -> None:
    """F.interpolate treats a whole image so."""
    boxes = ((0, 0, 28, 28), (4, 2, 20, 25), (-5, 3, 31, 9))
    images, index = random_images(6, 28, 28), random_index(3, 6)
    with use_backend(backend):  # type: ignore[arg-type]
        got = gather_resize(images, index, 9, augmentation=windows_at(boxes))
    for number, box in enumerate(boxes):
        window = tv.crop(images[index[number]].unsqueeze(0).float() / 255, *box)
        expected = F.interpolate(window[None], (9, 9), mode="bilinear")[0]
        torch.testing.assert_close(got[number], expected, rtol=0, atol=1e-5)
        smoothed = tv.resized_crop(images[index[number]].unsqueeze(0).float() / 255, *box, [9, 9])
        assert (got[number] - smoothed).abs().max() > 0.05


def test_a_window_of_the_images_size_is_a_plain_one_bit_for_bit() -> None:
    """All parts agree except contrast, whose mean may be summed in another order."""
    images, index = random_images(6, 28, 28), random_index(4, 6)
    plain = random_augmentation(4)._replace(contrast=None)
    sized = plain._replace(size=torch.full((4, 2), 28, dtype=torch.int32, device=DEVICE))
    with use_backend("triton"):
        got, expected = (gather_resize(images, index, 56, augmentation=a) for a in (sized, plain))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_window_without_pixels_is_an_image_of_nan(backend: str) -> None:
    images, index = random_images(3, 28, 28), random_index(6, 3)
    good = random_augmentation(6, 20)
    size = torch.tensor([[5, 5], [0, 5], [5, 0], [-3, -3], [-(2**31), 7], [1, 1]], dtype=torch.int32, device=DEVICE)
    for augmentation in (good._replace(size=size), Augmentation(size=size)):
        with use_backend(backend):  # type: ignore[arg-type]
            got = gather_resize(images, index, 30, augmentation=augmentation)
        assert got.isnan().flatten(1).all(1).tolist() == [False, True, True, True, True, False]
        assert not got[[0, 5]].isnan().any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_windows_at_the_ends_of_int32_are_black(backend: str) -> None:
    """Where the sum of a position and a size wraps around, no pixel of the image may appear and no memory be accessed."""
    largest, smallest = 2**31 - 1, -(2**31)
    boxes = ((largest, 0, 28, 28), (0, largest, 5, largest), (smallest, smallest, 28, 28), (largest, largest, largest, largest))
    windows = windows_at(boxes)
    images, index = random_images(3, 28, 28), random_index(4, 3)
    for augmentation in (windows, random_augmentation(4)._replace(offset=windows.offset, size=windows.size)):
        with use_backend(backend):  # type: ignore[arg-type]
            assert gather_resize(images, index, 32, augmentation=augmentation).abs().max() == 0


PARTS = ("offset", "flip", "brightness", "contrast", "size")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_is_the_others_doing_nothing(part: str, backend: str) -> None:
    n = 5
    images, index, every = random_images(6, 28, 28), random_index(n, 6), random_augmentation(n, 28)
    ones = torch.ones(n, device=DEVICE)
    nothing = Augmentation(torch.zeros(n, 2, dtype=torch.int32, device=DEVICE), ones == 0, ones, ones)
    changes = {part: getattr(every, part)}
    with use_backend(backend):  # type: ignore[arg-type]
        got = gather_resize(images, index, 56, augmentation=Augmentation(**changes))
        expected = gather_resize(images, index, 56, augmentation=nothing._replace(**changes))
        assert not torch.equal(got, gather_resize(images, index, 56))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_an_empty_augmentation_is_none() -> None:
    images, index = random_images(6, 28, 28), random_index(4, 6)
    assert torch.equal(gather_resize(images, index, 56, augmentation=Augmentation()), gather_resize(images, index, 56))


def test_an_augmentation_that_changes_nothing() -> None:
    images, index = random_images(6, 28, 28), random_index(4, 6)
    ones = torch.ones(4, device=DEVICE)
    nothing = Augmentation(torch.zeros(4, 2, dtype=torch.int32, device=DEVICE), ones == 0, ones, ones)
    assert torch.equal(gather_resize(images, index, 56, augmentation=nothing), gather_resize(images, index, 56))


def test_a_lazily_negated_factor_has_the_sign_it_says() -> None:
    images, index, plain = random_images(6, 8, 8), random_index(4, 6), random_augmentation(4)
    plain = plain._replace(size=torch.randint(1, 9, (4, 2), dtype=torch.int32, device=DEVICE))
    negated = plain._replace(**{name: torch._neg_view(-getattr(plain, name)) for name in PARTS if name != "flip"})
    got, expected = (gather_resize(images, index, 9, augmentation=a) for a in (negated, plain))
    assert torch.equal(got, expected)


def test_any_strides() -> None:
    images = random_images(28, 6, 56).permute(1, 0, 2)[..., ::2]
    index = random_index(8, 6)[::2]
    assert torch.equal(gather_resize(images, index, 30), gather_resize(images.contiguous(), index.contiguous(), 30))


def test_offsets_of_more_than_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    images, index = random_images(6, 28, 28), random_index(3, 6)
    expected = gather_resize(images, index, 30)
    monkeypatch.setattr(launch, "force_int64", True)
    assert torch.equal(gather_resize(images, index, 30), expected)


def test_an_index_outside_is_an_image_of_nan_and_touches_no_memory() -> None:
    """The suite's memory guard would raise on such an access."""
    images = random_images(3, 28, 28)
    index = torch.tensor([0, 3, -1, 2**40, 2], device=DEVICE)
    for augmentation in (None, random_augmentation(5), random_augmentation(5, 28)):
        with use_backend("triton"):
            got = gather_resize(images, index, 30, augmentation=augmentation)
        assert got.isnan().flatten(1).all(1).tolist() == [False, True, True, True, False]
        assert not got[[0, 4]].isnan().any()


def test_no_images() -> None:
    images, index = random_images(3, 28, 28), random_index(0, 3)
    assert gather_resize(images, index, 56).shape == (0, 1, 56, 56)
    assert gather_resize(images, index, 56, cells=Cells(11, 4, 1)).shape == (0, 14, 14, 16)


#: Side of the image, and cells: AlexNet's first layer, unequal padding, more padding than a cell, pixels that no filter reads,
#: a filter as large as the image, cells of one pixel.
CELLS = {
    "K11-S4-P1": (28, Cells(11, 4, 1)),
    "K11x9-S4-P2x0": (31, Cells((11, 9), 4, (2, 0))),
    "K7-S2-P5": (13, Cells(7, 2, 5)),
    "K3-S5-P0": (29, Cells(3, 5)),
    "K19-S3-P0": (19, Cells(19, 3)),
    "K3-S1-P1": (8, Cells(3, 1, 1)),
}


def equal_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether all bits are equal, signs of zeros and payloads of NaN included."""
    integers = {4: torch.int32, 2: torch.int16}[got.element_size()]
    return got.dtype == expected.dtype and torch.equal(got.contiguous().view(integers), expected.contiguous().view(integers))


@pytest.mark.thin
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("augmented", ["plain", "augmented", "windows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", CELLS)
def test_cells_are_those_of_the_images_bit_for_bit(
    name: str, dtype: torch.dtype, augmented: str, backend: str, launches: list[str]
) -> None:
    """Padding is zero, not a black pixel. One launch makes the cells, without storing images first."""
    size, cells = CELLS[name]
    images, index = random_images(5, 28, 30), random_index(3, 5)
    change = random_augmentation(3, 40 if augmented == "windows" else None) if augmented != "plain" else None
    given = {"mean": 0.3, "std": 0.4, "dtype": dtype, "augmentation": change}
    with use_backend(backend):  # type: ignore[arg-type]
        expected = space_to_depth(gather_resize(images, index, size, **given), *cells)
        launches.clear()
        got = gather_resize(images, index, size, **given, cells=cells)
    assert launches == ["_gather_resize_kernel"] * (backend == "triton")
    assert got.is_contiguous()
    assert equal_bits(got, expected)
    padded = space_to_depth(torch.ones(3, 1, size, size, device=DEVICE), *cells) == 0
    assert bool((got[padded] == 0).all())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("n", [1, 4])
def test_cells_in_blocks_that_end_inside_a_cell(n: int) -> None:
    """A cell has 25 pixels, an image has 8 x 8 cells, and a block has 128 pixels."""
    images, index, augmentation = random_images(6, 28, 28), random_index(n, 6), random_augmentation(n)
    cells = Cells(9, 5, 2)
    for augment in (None, augmentation):
        got = gather_resize(images, index, 37, mean=0.3, augmentation=augment, cells=cells)
        assert got.shape == (n, 8, 8, 25)
        assert equal_bits(got, space_to_depth(gather_resize(images, index, 37, mean=0.3, augmentation=augment), *cells))


def test_cells_of_more_than_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    images, index = random_images(6, 28, 28), random_index(3, 6)
    expected = gather_resize(images, index, 30, cells=Cells(11, 4, 1))
    monkeypatch.setattr(launch, "force_int64", True)
    assert torch.equal(gather_resize(images, index, 30, cells=Cells(11, 4, 1)), expected)


def test_cells_of_an_index_outside_are_nan_within_their_padding() -> None:
    images, cells = random_images(3, 28, 28), Cells(11, 4, 1)
    index = torch.tensor([0, 3, -1, 2**40, 2], device=DEVICE)
    with use_backend("triton"):
        got, pixels = (gather_resize(images, index, 30, cells=of) for of in (cells, None))
    assert equal_bits(got, space_to_depth(pixels, *cells))
    assert got.isnan().flatten(1).any(1).tolist() == [False, True, True, True, False]


IMAGES, INDEX = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
ONES = torch.ones(2)


@pytest.mark.parametrize("size", [np.int64(8), np.uint8(8)], ids=lambda size: type(size).__name__)
def test_a_size_of_another_kind_of_integer(size: int) -> None:
    """Any kind of integer works, as it does for a convolution's padding and in PyTorch."""
    images, index = IMAGES.to(DEVICE), INDEX.to(DEVICE)
    assert torch.equal(gather_resize(images, index, size), gather_resize(images, index, 8))


GOOD = {"images": IMAGES, "index": INDEX, "size": 8}
SOME = Augmentation(torch.zeros(2, 2, dtype=torch.int32), ONES > 0, ONES, ONES)
BAD = {
    "images_dtype": ({"images": IMAGES.float()}, TypeError, r"images must be uint8, got torch\.float32"),
    "images_rank": ({"images": IMAGES[:, None]}, ValueError, r"images must have shape \(D, H, W\)"),
    "no_pixels": ({"images": IMAGES[:, :0]}, ValueError, "H and W at least 1"),
    "index_dtype": ({"index": INDEX.int()}, TypeError, "index must be int64"),
    "index_rank": ({"index": INDEX[:, None]}, ValueError, "index must have one dimension"),
    "size": ({"size": 0}, ValueError, "size must be at least 1, got 0"),
    "size_type": ({"size": 8.0}, TypeError, "size must be an int"),
    "size_true": ({"size": True}, TypeError, "size must be an int"),
    "std": ({"std": 0.0}, ValueError, "std finite and above 0"),
    "mean": ({"mean": float("nan")}, ValueError, "mean must be finite"),
    "dtype": ({"dtype": torch.int8}, TypeError, "dtype must be float32, float16 or bfloat16"),
    "filter": ({"cells": Cells(11, 4, 1)}, ValueError, r"images \(8, 8\) with padding \(1, 1\) are smaller than a filter of"),
    "strides": ({"cells": Cells(3, (4, 2))}, ValueError, r"cells have one stride, got \(4, 2\)"),  # type: ignore[arg-type]
    "no_stride": ({"cells": Cells(3, 0)}, ValueError, "stride must be at least 1, got 0"),
    "padding": ({"cells": Cells(3, 2, -1)}, ValueError, "padding must be at least 0, got -1"),
    "cells": ({"cells": True}, TypeError, "cells must be kernels.Cells or None, got True"),
    "offset": ({"augmentation": SOME._replace(offset=SOME.offset.long())}, TypeError, "offset must be torch.int32"),
    "window_dtype": ({"augmentation": Augmentation(size=ONES.expand(2, 2))}, TypeError, r"\.size must be torch\.int32"),
    "window_shape": (
        {"augmentation": SOME._replace(size=SOME.offset[:, :1])},
        ValueError,
        r"augmentation\.size must have shape \(2, 2\), got \(2, 1\)",
    ),
    "flip": ({"augmentation": SOME._replace(flip=SOME.flip[:1])}, ValueError, r"flip must have shape \(2,\), got \(1,\)"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(bad: str, launches: list[str]) -> None:
    arguments, error, message = BAD[bad]
    with pytest.raises(error, match=message):
        gather_resize(**(GOOD | arguments))
    assert launches == []


@pytest.mark.skipif("ttsem" in sys.modules, reason="under ttsem every tensor reports the same pretended GPU")
def test_another_device_is_named(launches: list[str]) -> None:
    with pytest.raises(ValueError, match="index must be on the device of images"):
        gather_resize(IMAGES, INDEX.to("meta"), 8)
    with pytest.raises(ValueError, match=r"augmentation\.contrast must be on the device of images"):
        gather_resize(IMAGES, INDEX, 8, augmentation=SOME._replace(contrast=ONES.to("meta")))
    assert launches == []
