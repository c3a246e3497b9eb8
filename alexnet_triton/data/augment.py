"""Network inputs: images gathered, augmented, resized, normalized and cast on the device."""

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

#: Side of Fashion-MNIST's images. :data:`SHIFT` is in pixels of such an image.
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
    """Gather the images ``index`` and resize them to ``size`` by :func:`kernels.gather_resize`.

    That function takes images of one channel. Each channel of a colour image is passed to it as an image.

    Args:
        images: uint8, (D, H, W) or (D, C, H, W).
        index: (N,) int64 on the device of ``images``.
        size: side of the images returned.
        dtype: float32, float16 or bfloat16.
        augmentation: augmentation of each image, the same for all its channels.
        cells: return cells in place of images. One channel only: cells of colour images have their channels innermost.
        normalization: normalization with as many channels as the images.

    Returns:
        (N, C, size, size), contiguous, in [0, 1] unless normalized; C is 1 for ``images`` of three dimensions. With ``cells``
        the cells that :func:`kernels.gather_resize` writes.

    Raises:
        ValueError: ``cells`` is given for images (D, C, H, W), or ``normalization`` has another number of channels.
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
    """Normalize ``inputs`` (N, C, H, W) in place, computing in float32. Python scalars make it capturable in a CUDA graph."""
    for channel, mean, std in zip(inputs.unbind(1), by.mean, by.std, strict=True):
        channel.copy_((channel.float() - mean) / std)
    return inputs


def to_input(images: Tensor, image_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """:func:`network_input` of all ``images``, without augmentation."""
    return network_input(images, torch.arange(len(images), device=images.device), image_size, dtype=dtype)


Crop = Literal["none", "pad", "resized", "patch"]


def patch_side(size: int) -> int:
    """Side of the stored images from which patches of side ``size`` are cut: in the paper's proportion of 256 to 224."""
    return round(size * 256 / 224)


def _patch(images: Tensor, size: int, top: int, left: int) -> Tensor:
    """A view of ``images`` (..., side, side), cropped to (..., size, size) from ``top`` and ``left``."""
    return images[..., top : top + size, left : left + size]


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random augmentation of training images, drawn anew at every step; by default none.

    Attributes:
        flip: mirror an image with probability 1/2.
        crop: ``"pad"``: shift the image by up to :data:`SHIFT` pixels of 28 along each axis, with black outside.
            ``"resized"``: replace the image by a random box of it, resized (:func:`draw_boxes`). ``"patch"``, the paper's: cut
            a patch of the network's input size anywhere from a larger stored image (:func:`patch_side`), without resizing.
            ``"none"``: use the whole image, or the middle patch of an image stored for patches.
        colour: change brightness and contrast of grey images (:data:`FACTORS`), the light of colour images
            (:func:`draw_light`).

    Raises:
        TypeError, ValueError: a flag is no bool, or the crop is unknown.
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


#: No augmentation, and every part of it with the crop ``"pad"``.
NOTHING, EVERYTHING = Augment(), Augment(flip=True, crop="pad", colour=True)

#: The largest shift of an image, in pixels of a side of :data:`_SIDE`, and the range of brightness and contrast factors.
SHIFT, FACTORS = 2, (0.8, 1.2)

#: A resized crop: the range of its fraction of the image's area, the range of width over height, and the most tries to draw a
#: box that fits. The values are torchvision's, which are those of the Inception networks.
AREA, ASPECT, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10

#: The paper's colour augmentation: the principal components of red, green and blue in ImageNet, one per row, and their factors
#: for pixels in [0, 1], both as published with fb.resnet.torch; and the standard deviation of the random multipliers.
LIGHT = ((-0.5675, -0.5808, -0.5836), (0.7192, -0.0045, -0.6948), (0.4009, -0.8140, 0.4203))
LIGHT_FACTORS, LIGHT_STD = (0.2175, 0.0188, 0.0045), 0.1


def _uniform(shape: tuple[int, ...], device: torch.device, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.rand(shape, dtype=torch.float32, device=device) * (high - low) + low


def draw_boxes(n: int, device: torch.device, size: int) -> tuple[Tensor, Tensor]:
    """Draw a random box in each of ``n`` images of side ``size``: (top, left) and (height, width), both (n, 2) int32.

    The distribution is that of ``torchvision.transforms.v2.RandomResizedCrop``. The area is uniform in :data:`AREA` and the
    logarithm of the aspect ratio is uniform in that of :data:`ASPECT`. Both are drawn again until the box fits; after
    :data:`TRIES` failures the box is the whole image. The box's position is uniform. torchvision loops until a box fits. That
    would wait for the device, so here all tries are drawn at once and the first that fits is used. The generator and CUDA graph
    capture are as for :func:`draw_augmentation`.
    """
    area = _uniform((n, TRIES), device, *AREA) * size**2
    aspect = _uniform((n, TRIES), device, *map(math.log, ASPECT)).exp()
    boxes = torch.stack([(area / aspect).sqrt().round(), (area * aspect).sqrt().round()], dim=2)  # [n, TRIES, 2]
    fits = ((boxes > 0) & (boxes <= size)).all(2)
    first = fits.int().argmax(1)[:, None, None].expand(n, 1, 2)
    box = boxes.gather(1, first)[:, 0].masked_fill(~fits.any(1)[:, None], size)
    # In float32 the product of a number below 1 and an integer below 2^24 is below that integer: no corner is out of range.
    corner = (_uniform((n, 2), device) * (size - box + 1)).floor()
    return corner.int(), box.int()


def draw_augmentation(
    n: int, device: torch.device, size: int = _SIDE, augment: Augment = EVERYTHING, patch: int | None = None
) -> kernels.Augmentation:
    """Draw the parameters of ``augment`` for ``n`` images of side ``size`` and one channel; None for a part that is off.

    The crop ``"patch"`` needs ``patch``, the side of its patches, at most ``size``.

    Numbers come from torch's generator on ``device``, and the host does not wait for the device. A captured CUDA graph draws
    new numbers at every replay.
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
    """Draw what the paper adds to red, green and blue of ``n`` images for another colour of light: (n, 3) float32."""
    # Use Python scalars: a captured step cannot copy a matrix of constants from the host.
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
    """:func:`network_input` of images with the random augmentation ``augment``, the same for all channels of an image.

    Without a crop, images stored for patches (:func:`patch_side`) give the patch in their middle.
    """
    if augment.crop == "none" and images.shape[-1] == patch_side(size) > size:
        margin = (images.shape[-1] - size) // 2
        images = _patch(images, size, margin, margin)
    grey, n = images.ndim == 3, len(index)
    # The kernel changes brightness and contrast of single channels. The light of colour images is added to its output.
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
    """The input of ``net`` for the images ``index`` (None: all): :func:`augmented_input`, as images or cells.

    Grey images become cells if ``net`` reads cells (:func:`alexnet_triton.first_layer_cells`). The network's result is
    bit-identical, and no kernel writes images that another one rearranges. Colour images stay images.
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
    """Yield the ten inputs over which the paper averages: the corner patches and the middle patch, each also mirrored.

    Args:
        net, normalization: as for :func:`input_for`.
        images: uint8, (D, side, side) or (D, 3, side, side), with ``side`` above ``size`` (in the paper
            ``patch_side(size)``).
        index: (N,) int64 on the device of ``images``.
        size: side of a patch.
        dtype: float32, float16 or bfloat16.

    Returns:
        An iterator of ten inputs (N, C, size, size), or of their cells if ``net`` reads cells.
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
