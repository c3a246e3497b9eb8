"""Patches of images that are held larger than the network's input: the crop ``patch``, the middle patch, ten crops."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import kernels
from alexnet_triton.data.augment import (
    NOTHING,
    Augment,
    augmented_input,
    draw_augmentation,
    patch_side,
    ten_crops,
)
from alexnet_triton.data.dataset import DataError, Normalization
from alexnet_triton.training.recipe import RECIPES, Recipe

from ...conftest import DEVICE
from .test_data import NOT_CAPTURABLE, Operations

PATCH = Augment(crop="patch")

#: Side of a patch, and of the images that patches are cut from.
SIZE = 28
SIDE = patch_side(SIZE)


def held(n: int, channels: int, side: int = SIDE) -> Tensor:
    shape = (n, side, side) if channels == 1 else (n, channels, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def test_the_papers_sides() -> None:
    assert (patch_side(224), SIDE) == (256, 32)
    assert (Recipe(crop="patch").image_side, Recipe(crop="pad").image_side, Recipe("lenet", crop="patch").image_side) == (
        256,
        224,
        32,
    )
    assert Recipe(**RECIPES["paper"]).image_side == 256
    Recipe(crop="patch").check_side(256)
    Recipe(crop="resized").check_side(28)
    with pytest.raises(DataError, match=r"cuts 28 x 28 pixels from 32 x 32, the images are 28 x 28: give --crop pad"):
        Recipe("lenet", crop="patch").check_side(28)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_patch_is_the_pixels_themselves(backend: str, channels: int) -> None:
    """Bit-identical pixels, mirrored where drawn; every possible place of a patch occurs."""
    images, n = held(5, channels), 200
    index = torch.arange(n, device=DEVICE) % 5
    augment = dataclasses.replace(PATCH, flip=True)
    torch.manual_seed(1)
    with kernels.use_backend(backend):  # type: ignore[arg-type]
        found = augmented_input(images, index, SIZE, augment)
    torch.manual_seed(1)
    drawn = draw_augmentation(n, index.device, SIDE, augment, SIZE)
    assert drawn.offset is not None
    assert drawn.flip is not None
    for i, ((top, left), flip) in enumerate(zip(drawn.offset.tolist(), drawn.flip.tolist(), strict=True)):
        expected = images[index[i]].view(channels, SIDE, SIDE)[:, top : top + SIZE, left : left + SIZE]
        assert torch.equal(found[i], (expected.flip(-1) if flip else expected) / 255)
    assert [set(places.tolist()) for places in drawn.offset.T] == [set(range(SIDE - SIZE + 1))] * 2
    assert 0.35 < drawn.flip.float().mean() < 0.65


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_without_a_crop_it_is_the_middle_patch(backend: str, channels: int) -> None:
    """This also holds with other changes. Images of any other side are resized."""
    images, index = held(4, channels), torch.tensor([2, 0], device=DEVICE)
    middle = images[..., 2:30, 2:30].contiguous()
    for augment in (NOTHING, Augment(flip=True, colour=True)):
        found = []
        for pixels in (images, middle):
            torch.manual_seed(2)
            with kernels.use_backend(backend):  # type: ignore[arg-type]
                found.append(augmented_input(pixels, index, SIZE, augment))
        assert torch.equal(*found)
    with kernels.use_backend(backend):  # type: ignore[arg-type]
        resized = augmented_input(held(4, channels, SIDE + 1), index, SIZE, NOTHING)
    assert not torch.equal(resized, held(4, channels, SIDE + 1)[index, ..., 2:30, 2:30].view(resized.shape) / 255)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_ten_crops_are_the_papers(backend: str, channels: int) -> None:
    images, index = held(4, channels), torch.tensor([3, 1], device=DEVICE)
    by = Normalization((0.5,) * channels, (0.25,) * channels)
    with kernels.use_backend(backend):  # type: ignore[arg-type]
        found = list(ten_crops(nn.Flatten(), images, index, SIZE, normalization=by))
    pixels = (images[index].view(2, channels, SIDE, SIDE) / 255 - 0.5) / 0.25
    corners = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
    patches = [pixels[..., top : top + SIZE, left : left + SIZE] for top, left in corners]
    expected = [each for patch in patches for each in (patch, patch.flip(-1))]
    assert len(found) == 10
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [PATCH, NOTHING], ids=str)
def test_no_patch_waits_for_the_device_or_copies_to_it(augment: Augment, channels: int) -> None:
    images, index = held(3, channels).cpu(), torch.tensor([2, 0])
    with Operations() as seen, kernels.use_backend("torch"):
        augmented_input(images, index, SIZE, augment)
    assert ("randint" in seen.names) == (augment == PATCH)
    assert not seen.names & NOT_CAPTURABLE
