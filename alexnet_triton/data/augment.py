"""What a network is called with: images gathered, changed at random, resized and cast on the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import kernels

from ..fused import CellImages, first_layer_cells
from .dataset import Normalization

#: Side of Fashion-MNIST's images, for which :data:`SHIFT` is given.
_SIDE = 28


def network_input(
    images: Tensor,
    index: Tensor,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    augmentation: kernels.Augmentation | None = None,
    cells: kernels.Cells | None = None,
    normalization: Normalization | None = None,
) -> Tensor:
    """The images of ``index`` as :func:`kernels.gather_resize` makes them, which knows one channel: of three, each by itself.

    Args:
        images: uint8, (D, H, W) or (D, C, H, W).
        index: (N,) int64 on their device.
        size: side of the images returned.
        dtype: float32, float16 or bfloat16.
        augmentation: the same for all channels of an image.
        cells: return the images' cells in their place; of one channel only, since those of three have their channels innermost.
        normalization: of as many channels.

    Returns:
        (N, C, size, size), contiguous, in [0, 1] unless normalized; C is 1 for ``images`` of three dimensions. Or their cells,
        as :func:`kernels.gather_resize` writes them.

    Raises:
        ValueError: ``cells`` of images of three channels, or a ``normalization`` of another number of channels.
    """
    if normalization is not None and len(normalization.mean) != (1 if images.ndim == 3 else images.shape[1]):
        raise ValueError(f"images of shape {tuple(images.shape)} cannot be normalized by {normalization}")
    if images.ndim == 3:
        (mean,), (std,) = ((0.0,), (1.0,)) if normalization is None else (normalization.mean, normalization.std)
        return kernels.gather_resize(
            images, index, size, mean=mean, std=std, dtype=dtype, augmentation=augmentation, cells=cells
        )
    if cells is not None:
        raise ValueError(f"cells are made of images (D, H, W) of one channel, got shape {tuple(images.shape)}")
    channels = images.shape[1]
    planes = (index[:, None] * channels + torch.arange(channels, device=index.device)).flatten()
    if augmentation is not None:
        augmentation = kernels.Augmentation(*(t if t is None else t.repeat_interleave(channels, 0) for t in augmentation))
    output = kernels.gather_resize(images.flatten(0, 1), planes, size, dtype=dtype, augmentation=augmentation)
    output = output.view(len(index), channels, size, size)
    return output if normalization is None else _normalized(output, normalization)


def _normalized(inputs: Tensor, by: Normalization) -> Tensor:
    """``inputs`` (N, C, H, W) in [0, 1], computed in float32; in place, by Python's numbers: it can be captured."""
    for channel, mean, std in zip(inputs.unbind(1), by.mean, by.std, strict=True):
        channel.copy_((channel.float() - mean) / std)
    return inputs


def to_input(images: Tensor, image_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """All of ``images`` as :func:`network_input` makes them."""
    return network_input(images, torch.arange(len(images), device=images.device), image_size, dtype=dtype)


Crop = Literal["none", "pad", "resized", "patch"]


def patch_side(size: int) -> int:
    """Side that images are held at for patches of side ``size`` to be cut from: the paper's 256 for 224, in proportion."""
    return round(size * 256 / 224)


def _patch(images: Tensor, size: int, top: int, left: int) -> Tensor:
    """A view of ``images`` (..., side, side): (..., size, size)."""
    return images[..., top : top + size, left : left + size]


@dataclasses.dataclass(frozen=True)
class Augment:
    """What is changed at random in each training image, anew at every step; by default nothing.

    Attributes:
        flip: an image is mirrored with probability 1/2.
        crop: ``"pad"``: the image is moved by up to :data:`SHIFT` pixels of 28 along each axis, black coming in from outside.
            ``"resized"``: a box of it takes its place, enlarged: :func:`draw_boxes`. ``"patch"``, the paper's: a box of the
            network's own size, anywhere in an image that is held larger (:func:`patch_side`), pixel for pixel. ``"none"``: all
            of it, as it stands, or of an image held so the patch in its middle.
        colour: of images of one channel brightness and contrast (:data:`FACTORS`), of three the light (:func:`draw_light`).

    Raises:
        TypeError, ValueError: another type or another crop.
    """

    flip: bool = False
    crop: Crop = "none"
    colour: bool = False

    def __post_init__(self) -> None:
        for name in ("flip", "colour"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if self.crop not in get_args(Crop):
            raise ValueError(f"crop must be one of {', '.join(get_args(Crop))}, got {self.crop!r}")

    def __str__(self) -> str:
        parts = {"flip": self.flip, f"{self.crop} crop": self.crop != "none", "colour": self.colour}
        return ", ".join(name for name, on in parts.items() if on) or "nothing"


#: The plain recipe's, and the paper's.
NOTHING, EVERYTHING = Augment(), Augment(flip=True, crop="pad", colour=True)

#: Pixels of :data:`_SIDE` that an augmented image is moved by at most, and the factors of its brightness and contrast.
SHIFT, FACTORS = 2, (0.8, 1.2)

#: Of a resized crop: the part of the image's area, its width by its height, and how often both are drawn at most for a box that
#: fits. torchvision's, which are those of the Inception networks.
AREA, ASPECT, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10

#: Of the paper's change of colour: the principal components of red, green and blue in ImageNet, a row each, and their factors
#: for pixels in [0, 1], both as published with fb.resnet.torch; and the standard deviation of what multiplies them.
LIGHT = ((-0.5675, -0.5808, -0.5836), (0.7192, -0.0045, -0.6948), (0.4009, -0.8140, 0.4203))
LIGHT_FACTORS, LIGHT_STD = (0.2175, 0.0188, 0.0045), 0.1


def _uniform(shape: tuple[int, ...], device: torch.device, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.rand(shape, dtype=torch.float32, device=device) * (high - low) + low


def draw_boxes(n: int, device: torch.device, size: int) -> tuple[Tensor, Tensor]:
    """Of ``n`` images of side ``size`` a box each: (top, left) and (height, width), both (n, 2) int32.

    The distribution is that of ``torchvision.transforms.v2.RandomResizedCrop``: an area uniform in :data:`AREA` and an aspect
    ratio whose logarithm is uniform in that of :data:`ASPECT`, drawn again until the box fits, or after :data:`TRIES` times the
    whole image; its place is uniform. There a loop asks whether it fits; here all tries are drawn at once, since to ask is to
    wait for the device, and the first one that fits is taken. Drawn and capturable as by :func:`draw_augmentation`.
    """
    area = _uniform((n, TRIES), device, *AREA) * size**2
    aspect = _uniform((n, TRIES), device, *map(math.log, ASPECT)).exp()
    boxes = torch.stack([(area / aspect).sqrt().round(), (area * aspect).sqrt().round()], dim=2)  # [n, TRIES, 2]
    fits = ((boxes > 0) & (boxes <= size)).all(2)
    first = fits.int().argmax(1)[:, None, None].expand(n, 1, 2)
    box = boxes.gather(1, first)[:, 0].masked_fill(~fits.any(1)[:, None], size)
    # In float32 the product of a number below 1 and a whole one below 2^24 is below that: no corner is one too far.
    corner = (_uniform((n, 2), device) * (size - box + 1)).floor()
    return corner.int(), box.int()


def draw_augmentation(
    n: int, device: torch.device, size: int = _SIDE, augment: Augment = EVERYTHING, patch: int | None = None
) -> kernels.Augmentation:
    """The parts of ``augment`` for ``n`` images of side ``size`` and one channel; nothing is drawn for a part that is off.

    The crop ``"patch"`` needs the side of its patches, at most ``size``.

    From torch's generator on ``device``, without waiting for it; in a captured CUDA graph anew at every replay.
    """
    offset = box = None
    if augment.crop == "pad":
        shift = max(1, SHIFT * size // _SIDE)
        offset = torch.randint(-shift, shift + 1, (n, 2), dtype=torch.int32, device=device)
    elif augment.crop == "resized":
        offset, box = draw_boxes(n, device, size)
    elif augment.crop == "patch":
        assert patch is not None
        offset = torch.randint(0, size - patch + 1, (n, 2), dtype=torch.int32, device=device)
        box = torch.full((n, 2), patch, dtype=torch.int32, device=device)
    return kernels.Augmentation(
        offset=offset,
        size=box,
        flip=torch.rand(n, device=device) < 0.5 if augment.flip else None,
        brightness=_uniform((n,), device, *FACTORS) if augment.colour else None,
        contrast=_uniform((n,), device, *FACTORS) if augment.colour else None,
    )


def draw_light(n: int, device: torch.device) -> Tensor:
    """What the paper adds to the red, green and blue of ``n`` images, (n, 3) float32: light of another colour and strength."""
    # Of scalars: a captured step cannot copy a matrix of constants from the host.
    along = torch.randn((3, n), device=device) * LIGHT_STD
    first, second, third = (
        torch.stack([along[k] * (LIGHT_FACTORS[k] * component) for component in LIGHT[k]], dim=1) for k in range(3)
    )
    return first + second + third


def augmented_input(
    images: Tensor,
    index: Tensor,
    size: int,
    augment: Augment = EVERYTHING,
    dtype: torch.dtype = torch.float32,
    cells: kernels.Cells | None = None,
    normalization: Normalization | None = None,
) -> Tensor:
    """:func:`network_input` of images changed at random as ``augment`` says; the same numbers for all channels of an image.

    Of images that are held for patches (:func:`patch_side`), without a crop the middle ones.
    """
    if augment.crop == "none" and images.shape[-1] == patch_side(size) > size:
        margin = (images.shape[-1] - size) // 2
        images = _patch(images, size, margin, margin)
    grey, n = images.ndim == 3, len(index)
    # Light is added to what the kernel makes, whose changes of colour are one channel's.
    drawn = augment if grey else dataclasses.replace(augment, colour=False)
    augmentation = draw_augmentation(n, index.device, images.shape[-1], drawn, size)
    lit = drawn.colour != augment.colour
    by = None if lit else normalization
    inputs = network_input(images, index, size, dtype=dtype, augmentation=augmentation, cells=cells, normalization=by)
    if not lit:
        return inputs
    inputs = inputs + draw_light(n, index.device)[:, :, None, None].to(dtype)
    return inputs if normalization is None else _normalized(inputs, normalization)


def input_for(
    net: nn.Module,
    images: Tensor,
    index: Tensor | None,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    augment: Augment = NOTHING,
    normalization: Normalization | None = None,
) -> Tensor | CellImages:
    """What ``net`` is called with for the images of ``index``, None for all: :func:`augmented_input` of them.

    In cells where ``net`` reads those (:func:`alexnet_triton.first_layer_cells`), which changes no bit of what it computes: so
    nothing writes the images only to have them rearranged. Images of three channels stay images.
    """
    if index is None:
        index = torch.arange(len(images), device=images.device)
    cells = first_layer_cells(net, size, dtype=dtype, device=images.device) if images.ndim == 3 else None
    inputs = augmented_input(images, index, size, augment, dtype, cells, normalization)
    return inputs if cells is None else CellImages(inputs, cells)


def ten_crops(
    net: nn.Module,
    images: Tensor,
    index: Tensor,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    normalization: Normalization | None = None,
) -> Iterator[Tensor | CellImages]:
    """The ten inputs that the paper averages a network over: patches at the corners and in the middle, then each mirrored.

    Args:
        net, normalization: as of :func:`input_for`.
        images: uint8, (D, side, side) or (D, 3, side, side), ``side`` above ``size``: :func:`patch_side` of it is the paper's.
        index: (N,) int64 on their device.
        size: side of a patch.
        dtype: float32, float16 or bfloat16.

    Returns:
        Ten times (N, C, size, size), or its cells where ``net`` reads those.
    """
    cells = first_layer_cells(net, size, dtype=dtype, device=images.device) if images.ndim == 3 else None
    far = images.shape[-1] - size
    mirrored = kernels.Augmentation(flip=torch.ones(len(index), dtype=torch.bool, device=index.device))
    for top, left in ((0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2)):
        patch = _patch(images, size, top, left)
        for augmentation in (None, mirrored):
            changed: dict[str, Any] = {"augmentation": augmentation, "cells": cells, "normalization": normalization}
            inputs = network_input(patch, index, size, dtype=dtype, **changed)
            yield inputs if cells is None else CellImages(inputs, cells)
