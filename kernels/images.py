"""From a set of uint8 images in memory to a network's input, in one pass: gather, augment, resize, scale, normalise, cast.

A training set of small grey images fits a GPU many times over (Fashion-MNIST: 47 MB), so a batch is an index and nothing is
copied from the host. A program needs no more than a few hundred bytes of one image, which its cache holds: what the pass costs
is writing the input: to the network's first convolution as it reads it, if that is in cells (:mod:`kernels.conv2d_stem`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .backend import runs_triton
from .config import elementwise_config
from .conv2d_stem import Cells, space_to_depth_reference
from .device import cast, program_id
from .launch import cdiv, launch, needs_int64, new_output, strides

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Augmentation(NamedTuple):
    """What :func:`gather_resize` changes in each of N images before it resizes them, in this order.

    Attributes:
        offset: (N, 2) int32: row and column of the image where the window begins that takes its place; what lies outside of the
            image is black. A crop of the size of the image from the image with a border.
        flip: (N,) bool: left and right are swapped.
        brightness: (N,) float32: factor of the pixels, then limited to [0, 1].
        contrast: (N,) float32, of the distance of the pixels from their mean over the window, then limited to [0, 1].
    """

    offset: Tensor
    flip: Tensor
    brightness: Tensor
    contrast: Tensor


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _window_pixel(
    p_image,
    y,
    x,
    mask,
    top,
    left,
    flip,
    brightness,
    stride_ih,
    stride_iw,
    H: tl.constexpr,
    W: tl.constexpr,
    AUGMENT: tl.constexpr,
):
    """The window's pixels (y, x) in [0, 255], before contrast; 0 where masked."""
    if AUGMENT:
        x = tl.where(flip, W - 1 - x, x) + left
        y = y + top
        mask = mask & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    b_pixel = tl.load(p_image + y * stride_ih + x * stride_iw, mask=mask, other=0).to(tl.float32)
    if AUGMENT:
        b_pixel = tl.minimum(tl.maximum(b_pixel * brightness, 0.0), 255.0)
    return b_pixel


@triton.jit
def _contrasted(b_pixel, contrast, mean, AUGMENT: tl.constexpr):
    """Pixels in [0, 255] moved away from ``mean``, or towards it."""
    if AUGMENT:
        b_pixel = tl.minimum(tl.maximum(contrast * b_pixel + (1.0 - contrast) * mean, 0.0), 255.0)
    return b_pixel


@triton.jit
def _gather_resize_kernel(
    images_ptr,  # [D, H, W] uint8, any strides
    index_ptr,  # [N] int64, contiguous
    offset_ptr,  # [N, 2] int32, contiguous; with AUGMENT, as the next three
    flip_ptr,  # [N] bool, contiguous
    brightness_ptr,  # [N] float32, contiguous
    contrast_ptr,  # [N] float32, contiguous
    y_ptr,  # out: [N, ROWS, COLUMNS, STRIDE, STRIDE], contiguous
    D,
    mean,
    std,
    stride_id,
    stride_ih,
    stride_iw,
    H: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    AUGMENT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[n] = (resized(images[index[n]]) / 255 - mean) / std, in cells of STRIDE x STRIDE pixels; images are cells of one pixel.

    One program owns BLOCK pixels of one image of the output.
    """
    CELL: tl.constexpr = STRIDE * STRIDE
    blocks = tl.cdiv(ROWS * COLUMNS * CELL, BLOCK)
    pid = program_id(0, WIDE)
    i_n = (pid // blocks).to(tl.int64)
    o_p = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < ROWS * COLUMNS * CELL
    o_y = o_p // CELL // COLUMNS * STRIDE + o_p // STRIDE % STRIDE - PAD_H
    o_x = o_p // CELL % COLUMNS * STRIDE + o_p % STRIDE - PAD_W
    # What is not in it is the convolution's padding.
    m_image = m_p & (o_y >= 0) & (o_y < SIZE) & (o_x >= 0) & (o_x < SIZE)

    i_d = tl.load(index_ptr + i_n)
    inside = (i_d >= 0) & (i_d < D)
    p_image = images_ptr + i_d * stride_id
    top, left, flip, brightness, contrast, window_mean = 0, 0, False, 1.0, 1.0, 0.0
    if AUGMENT:
        top, left = tl.load(offset_ptr + 2 * i_n), tl.load(offset_ptr + 2 * i_n + 1)
        flip = tl.load(flip_ptr + i_n) != 0
        brightness, contrast = tl.load(brightness_ptr + i_n), tl.load(contrast_ptr + i_n)
        # Each program sums the whole window: it is as small as the block, and no second launch is needed.
        b_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(0, H * W, BLOCK):
            o_s = start + tl.arange(0, BLOCK)
            m_s = inside & (o_s < H * W)
            b_sum += _window_pixel(
                p_image, o_s // W, o_s % W, m_s, top, left, flip, brightness, stride_ih, stride_iw, H, W, AUGMENT
            )
        window_mean = tl.sum(b_sum) / (H * W)

    # Centres of pixels lie on centres (align_corners=False); beyond the outermost ones the edge goes on.
    b_y = tl.maximum((o_y.to(tl.float32) + 0.5) * (H / SIZE) - 0.5, 0.0)
    b_x = tl.maximum((o_x.to(tl.float32) + 0.5) * (W / SIZE) - 0.5, 0.0)
    y0, x0 = b_y.to(tl.int32), b_x.to(tl.int32)
    y1, x1 = tl.minimum(y0 + 1, H - 1), tl.minimum(x0 + 1, W - 1)
    b_down, b_right = b_y - y0.to(tl.float32), b_x - x0.to(tl.float32)
    m_load = m_image & inside
    b_00 = _window_pixel(p_image, y0, x0, m_load, top, left, flip, brightness, stride_ih, stride_iw, H, W, AUGMENT)
    b_01 = _window_pixel(p_image, y0, x1, m_load, top, left, flip, brightness, stride_ih, stride_iw, H, W, AUGMENT)
    b_10 = _window_pixel(p_image, y1, x0, m_load, top, left, flip, brightness, stride_ih, stride_iw, H, W, AUGMENT)
    b_11 = _window_pixel(p_image, y1, x1, m_load, top, left, flip, brightness, stride_ih, stride_iw, H, W, AUGMENT)
    b_00 = _contrasted(b_00, contrast, window_mean, AUGMENT)
    b_01 = _contrasted(b_01, contrast, window_mean, AUGMENT)
    b_10 = _contrasted(b_10, contrast, window_mean, AUGMENT)
    b_11 = _contrasted(b_11, contrast, window_mean, AUGMENT)
    b_upper = (1.0 - b_right) * b_00 + b_right * b_01
    b_lower = (1.0 - b_right) * b_10 + b_right * b_11
    b_out = (1.0 - b_down) * b_upper + b_down * b_lower
    # Divided exactly, so that an image that keeps its size is PyTorch's ``image / 255`` bit for bit.
    b_out = tl.div_rn(tl.div_rn(b_out, 255.0) - mean, std)
    # Nobody can raise an error here: an image that is not there must not look like one.
    b_out = tl.where(inside, b_out, float("nan"))
    b_out = tl.where(m_image, b_out, 0.0)
    tl.store(y_ptr + i_n * (ROWS * COLUMNS * CELL) + o_p, cast(b_out, y_ptr.dtype.element_ty), mask=m_p)


# ------------------------------------------------------------------------------------------------- launch functions

#: Images themselves: the cells of a convolution that leaves them as they are.
_PIXELS = Cells(kernel_size=1, stride=1)


def _launch_gather_resize(
    images: Tensor,
    index: Tensor,
    output: Tensor,
    size: int,
    cells: Cells,
    *,
    mean: float,
    std: float,
    augmentation: Augmentation | None,
) -> None:
    depth, height, width = images.shape
    _, stride, (pad_h, pad_w) = cells.pairs()
    rows, columns = cells.size((size, size))
    elements = rows * columns * stride * stride
    # Of images, also where cells have more pixels: the block is the order in which a window is summed, and cells the same bits.
    config = elementwise_config(size * size)
    offset, flip, brightness, contrast = augmentation if augmentation is not None else (None, None, None, None)
    launch(
        _gather_resize_kernel,
        (len(index) * cdiv(elements, config["BLOCK"]),),
        images_ptr=images,
        index_ptr=index,
        offset_ptr=offset,
        flip_ptr=flip,
        brightness_ptr=brightness,
        contrast_ptr=contrast,
        y_ptr=output,
        D=depth,
        mean=float(mean),
        std=float(std),
        **strides("stride_i", "dhw", images),
        H=height,
        W=width,
        SIZE=size,
        ROWS=rows,
        COLUMNS=columns,
        STRIDE=stride,
        PAD_H=pad_h,
        PAD_W=pad_w,
        AUGMENT=augmentation is not None,
        WIDE=needs_int64(output),
        **config,
    )


# --------------------------------------------------------------------------------------------------- public functions


def _augmented(pixels: Tensor, augmentation: Augmentation) -> Tensor:
    """``pixels`` (N, H, W) in [0, 1] after :class:`Augmentation`."""
    n, height, width = pixels.shape
    offset, flip, brightness, contrast = augmentation
    device = pixels.device
    y = offset[:, :1] + torch.arange(height, device=device)  # [N, H]
    x = torch.arange(width, device=device).expand(n, width)
    x = offset[:, 1:] + torch.where(flip[:, None], width - 1 - x, x)  # [N, W]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    image = torch.arange(n, device=device)[:, None, None]
    window = pixels[image, y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]]
    window = (torch.where(inside, window, 0.0) * brightness[:, None, None]).clamp(0, 1)
    mean = window.mean((1, 2), keepdim=True)
    return (contrast[:, None, None] * window + (1 - contrast[:, None, None]) * mean).clamp(0, 1)


def gather_resize_reference(
    images: Tensor,
    index: Tensor,
    size: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    augmentation: Augmentation | None = None,
    cells: Cells | None = None,
) -> Tensor:
    """What :func:`gather_resize` means, in PyTorch's own operations; dtype may be float64, which it then computes in."""
    pixels = images[index].to(torch.promote_types(dtype, torch.float32)) / 255
    if augmentation is not None:
        pixels = _augmented(pixels, augmentation)
    scaled = pixels.unsqueeze(1)
    if images.shape[1:] != (size, size):
        scaled = F.interpolate(scaled, size=(size, size), mode="bilinear", align_corners=False)
    output = ((scaled - mean) / std).to(dtype)
    return output if cells is None else space_to_depth_reference(output, cells)


def _check_augmentation(augmentation: Augmentation, n: int, device: torch.device) -> None:
    expected = Augmentation(((n, 2), torch.int32), ((n,), torch.bool), ((n,), torch.float32), ((n,), torch.float32))  # type: ignore[arg-type]
    for name, tensor, (shape, dtype) in zip(Augmentation._fields, augmentation, expected, strict=True):
        if tensor.dtype != dtype:
            raise TypeError(f"augmentation.{name} must be {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"augmentation.{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"augmentation.{name} must be on the device of images, {device}, got {tensor.device}")


@torch.no_grad()
def gather_resize(
    images: Tensor,
    index: Tensor,
    size: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    augmentation: Augmentation | None = None,
    cells: Cells | None = None,
) -> Tensor:
    """The images of ``index`` as a network's input: resized bilinearly, scaled to [0, 1], normalised.

    Resizing has the meaning of ``F.interpolate(..., mode="bilinear", align_corners=False)``; where it enlarges that is
    ``torchvision.transforms.v2.functional.resize`` too (which smooths before it shrinks). Computed in float32. Never waits for
    the GPU, and can be captured in a CUDA graph.

    Args:
        images: (D, H, W) uint8, any strides.
        index: (N,) int64 on the device of ``images``; from 0 to D - 1. The kernel cannot raise: for any other value it returns
            an image of NaN. In PyTorch's operations it is an error, or counts from the end, as in ``images[index]``.
        size: side of the images returned.
        mean, std: subtracted from pixels in [0, 1]; what they are divided by then.
        dtype: of the result: float32, float16 or bfloat16.
        augmentation: changes of each image before it is resized.
        cells: write what :func:`kernels.space_to_depth` would make of the images, the same bits, and no images before it.

    Returns:
        (N, 1, size, size) contiguous; with one channel that is channels-last in memory too. Without a gradient. With ``cells``
        (N, rows, columns, stride * stride) contiguous; the padding around an image is 0, whatever ``mean``.

    Raises:
        TypeError: dtypes other than these, ``size`` or ``cells`` of another type.
        ValueError: shapes or devices other than these, an image without pixels, ``size`` below 1, ``std`` not above 0, images
            smaller than a filter of ``cells``.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 3 or 0 in images.shape[1:]:
        raise ValueError(f"images must have shape (D, H, W) with H and W at least 1, got {tuple(images.shape)}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    if index.ndim != 1:
        raise ValueError(f"index must have one dimension, got shape {tuple(index.shape)}")
    if index.device != images.device:
        raise ValueError(f"index must be on the device of images, {images.device}, got {index.device}")
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size must be an int, got {size!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not math.isfinite(mean) or not 0 < std < math.inf:
        raise ValueError(f"mean must be finite and std finite and above 0, got {mean} and {std}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if augmentation is not None:
        _check_augmentation(augmentation, len(index), images.device)
    shape: tuple[int, ...] = (1, size, size)
    if cells is not None:
        if not isinstance(cells, Cells):
            raise TypeError(f"cells must be kernels.Cells or None, got {cells!r}")
        _, stride, _ = cells.pairs()
        shape = (*cells.size((size, size)), stride * stride)
    if not runs_triton(images):
        return gather_resize_reference(
            images, index, size, mean=mean, std=std, dtype=dtype, augmentation=augmentation, cells=cells
        )
    if augmentation is not None:
        # resolve_neg: a kernel sees memory, not the minus that PyTorch still owes it.
        augmentation = Augmentation(*(t.contiguous().resolve_neg() for t in augmentation))
    output = new_output((len(index), *shape), dtype, images.device)
    _launch_gather_resize(
        images, index.contiguous(), output, size, cells or _PIXELS, mean=mean, std=std, augmentation=augmentation
    )
    return output
