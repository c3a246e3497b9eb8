"""Make a network's input from uint8 images in memory in one pass: gather, augment, resize, scale, normalise, cast.

A training set of small grey images fits a GPU many times over (Fashion-MNIST: 47 MB). A batch is then a tensor of indices, and
no pixels are copied from the host. A program reads a few hundred bytes of one image, which the cache holds, so the cost of the
pass is writing its output. If the first convolution reads cells (:mod:`kernels.convolution.stem`), the pass writes cells.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .configs.tables import elementwise_config
from .convolution.cells import Cells, space_to_depth_reference
from .primitives import cast, only_if, program_id
from .runtime.arguments import integer, number
from .runtime.backend import INTERPRETED, capability, runs_triton
from .runtime.launch import cdiv, launch, needs_int64, new_output, strides

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Augmentation(NamedTuple):
    """Changes that :func:`gather_resize` makes to each of N images before resizing, in this order; None omits a change.

    Attributes:
        offset: (N, 2) int32: row and column in the image of the top left corner of the window that replaces the image. Pixels
            of the window outside of the image are black. None: (0, 0).
        flip: (N,) bool: swap left and right of the window.
        brightness: (N,) float32: factor of the pixels; the products are clamped to [0, 1].
        contrast: (N,) float32: factor of each pixel's distance from the window's mean; the results are clamped to [0, 1].
        size: (N, 2) int32, at least 1: height and width of the window. None: height and width of the image, so that the window
            is a crop from the image with a border. (The last field, but applied first, together with ``offset``.)
    """

    offset: Tensor | None = None
    flip: Tensor | None = None
    brightness: Tensor | None = None
    contrast: Tensor | None = None
    size: Tensor | None = None


Augmentation.__module__ = "kernels"  # pickles store this path, so the class may move between files


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _window_pixel(
    p_image,
    y,
    x,
    mask,
    top,
    left,
    width,
    flip,
    brightness,
    stride_ih,
    stride_iw,
    H: tl.constexpr,
    W: tl.constexpr,
    AUGMENT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Pixels (y, x) of a window of width ``width``, in [0, 255], before the change of contrast; 0 where masked out."""
    if AUGMENT:
        x = tl.where(flip, width - 1 - x, x) + left
        y = y + top
        mask = mask & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    if WIDE:
        y, x = y.to(tl.int64), x.to(tl.int64)
    b_pixel = tl.load(p_image + y * stride_ih + x * stride_iw, mask=mask, other=0).to(tl.float32)
    if AUGMENT:
        b_pixel = tl.minimum(tl.maximum(b_pixel * brightness, 0.0), 255.0)
    return b_pixel


@triton.jit
def _contrasted(b_pixel, contrast, mean, CONTRAST: tl.constexpr):
    """Pixels in [0, 255] with their distance from ``mean`` multiplied by ``contrast``."""
    if CONTRAST:
        b_pixel = tl.minimum(tl.maximum(contrast * b_pixel + (1.0 - contrast) * mean, 0.0), 255.0)
    return b_pixel


@triton.jit
def _gather_resize_kernel(
    images_ptr,  # [D, H, W] uint8, any strides
    index_ptr,  # [N] int64, contiguous
    offset_ptr,  # [N, 2] int32, contiguous; this and the next four may be None. AUGMENT: not all of them are
    flip_ptr,  # [N] bool, contiguous
    brightness_ptr,  # [N] float32, contiguous
    contrast_ptr,  # [N] float32, contiguous
    size_ptr,  # [N, 2] int32, contiguous
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
    """y[n] = (resized(images[index[n]]) / 255 - mean) / std, in cells of STRIDE x STRIDE pixels (STRIDE 1: plain images).

    One program owns BLOCK pixels of one output image.
    """
    CELL: tl.constexpr = STRIDE * STRIDE
    blocks = tl.cdiv(ROWS * COLUMNS * CELL, BLOCK)
    pid = program_id(0, WIDE)
    i_n = (pid // blocks).to(tl.int64)
    o_p = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < ROWS * COLUMNS * CELL
    o_y = o_p // CELL // COLUMNS * STRIDE + o_p // STRIDE % STRIDE - PAD_H
    o_x = o_p // CELL % COLUMNS * STRIDE + o_p % STRIDE - PAD_W
    # Pixels of cells outside of the image are the convolution's padding.
    m_image = m_p & (o_y >= 0) & (o_y < SIZE) & (o_x >= 0) & (o_x < SIZE)

    i_d = tl.load(index_ptr + i_n)
    inside = (i_d >= 0) & (i_d < D)
    p_image = images_ptr + i_d * stride_id
    # The window, in pixels of the image, and the step in those pixels for one output pixel.
    top, left, height, width = 0, 0, H, W
    step_y, step_x = H / SIZE, W / SIZE
    flip, brightness, contrast, window_mean = False, 1.0, 1.0, 0.0
    CONTRAST: tl.constexpr = contrast_ptr is not None
    if offset_ptr is not None:
        top, left = tl.load(offset_ptr + 2 * i_n), tl.load(offset_ptr + 2 * i_n + 1)
    if size_ptr is not None:
        height, width = tl.load(size_ptr + 2 * i_n), tl.load(size_ptr + 2 * i_n + 1)
        inside = inside & (height > 0) & (width > 0)
        # In int64, so that the coordinates of a huge or distant window cannot wrap around into the image.
        height, width = tl.maximum(height, 1).to(tl.int64), tl.maximum(width, 1).to(tl.int64)
        step_y, step_x = tl.div_rn(height.to(tl.float32), SIZE * 1.0), tl.div_rn(width.to(tl.float32), SIZE * 1.0)
        if offset_ptr is not None:
            top, left = tl.cast(top, tl.int64), tl.cast(left, tl.int64)
    if flip_ptr is not None:
        flip = tl.load(flip_ptr + i_n) != 0
    if brightness_ptr is not None:
        brightness = tl.load(brightness_ptr + i_n)
    if CONTRAST:
        contrast = tl.load(contrast_ptr + i_n)
        # Each program sums the whole window, which is as small as its block; this saves a second launch.
        # float64 sums pixels exactly. The compiler's order of addition depends on the layout in which the output is stored.
        b_sum = tl.zeros([BLOCK], tl.float64)
        pixels, flip_s = H * W, flip
        if size_ptr is not None:
            pixels, flip_s = height.to(tl.float32) * width.to(tl.float32), False  # a flip does not change the sum
        for start in range(0, H * W, BLOCK):
            o_s = start + tl.arange(0, BLOCK)
            m_s = only_if(inside, o_s < H * W)
            y_s, x_s = o_s // W, o_s % W
            if size_ptr is not None:
                # Loop over the image, not over the window, which may be larger: outside of the image it is black.
                y_s, x_s = y_s - top, x_s - left
                m_s = m_s & (y_s >= 0) & (y_s < height) & (x_s >= 0) & (x_s < width)
            b_pixel = _window_pixel(
                p_image, y_s, x_s, m_s, top, left, width, flip_s, brightness, stride_ih, stride_iw, H, W, AUGMENT, WIDE
            )
            b_sum += b_pixel.to(tl.float64)
        window_mean = (tl.sum(b_sum) / pixels).to(tl.float32)

    # Bilinear interpolation between pixel centres (align_corners=False); beyond the outermost centres the edge is repeated.
    b_y = tl.maximum((o_y.to(tl.float32) + 0.5) * step_y - 0.5, 0.0)
    b_x = tl.maximum((o_x.to(tl.float32) + 0.5) * step_x - 0.5, 0.0)
    y0, x0 = b_y.to(tl.int32), b_x.to(tl.int32)
    y1, x1 = tl.minimum(y0 + 1, height - 1), tl.minimum(x0 + 1, width - 1)
    b_down, b_right = b_y - y0.to(tl.float32), b_x - x0.to(tl.float32)
    m_load = only_if(inside, m_image)
    b_00 = _window_pixel(p_image, y0, x0, m_load, top, left, width, flip, brightness, stride_ih, stride_iw, H, W, AUGMENT, WIDE)
    b_01 = _window_pixel(p_image, y0, x1, m_load, top, left, width, flip, brightness, stride_ih, stride_iw, H, W, AUGMENT, WIDE)
    b_10 = _window_pixel(p_image, y1, x0, m_load, top, left, width, flip, brightness, stride_ih, stride_iw, H, W, AUGMENT, WIDE)
    b_11 = _window_pixel(p_image, y1, x1, m_load, top, left, width, flip, brightness, stride_ih, stride_iw, H, W, AUGMENT, WIDE)
    b_00 = _contrasted(b_00, contrast, window_mean, CONTRAST)
    b_01 = _contrasted(b_01, contrast, window_mean, CONTRAST)
    b_10 = _contrasted(b_10, contrast, window_mean, CONTRAST)
    b_11 = _contrasted(b_11, contrast, window_mean, CONTRAST)
    b_upper = (1.0 - b_right) * b_00 + b_right * b_01
    b_lower = (1.0 - b_right) * b_10 + b_right * b_11
    b_out = (1.0 - b_down) * b_upper + b_down * b_lower
    # Correctly rounded division, so that an image that keeps its size is bit-identical to PyTorch's ``image / 255``.
    b_out = tl.div_rn(tl.div_rn(b_out, 255.0) - mean, std)
    # A kernel cannot raise an error, so an image with an invalid index or window is NaN and not plausible pixels.
    b_out = tl.where(inside, b_out, float("nan"))
    b_out = tl.where(m_image, b_out, 0.0)
    tl.store(y_ptr + i_n * (ROWS * COLUMNS * CELL) + o_p, cast(b_out, y_ptr.dtype.element_ty), mask=m_p)


# ------------------------------------------------------------------------------------------------- launch functions

#: Cells of one pixel: plain images.
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
    # From the size of images even where cells have more pixels: the block decides the order in which a window is summed, and
    # cells must hold bit-identical pixels.
    config = elementwise_config(size * size)
    if not INTERPRETED and capability(output.device) >= 100:
        config["num_warps"] = 8  # with four, the kernel spills registers as compiled for Blackwell
    given = augmentation or Augmentation()
    launch(
        _gather_resize_kernel,
        (len(index) * cdiv(elements, config["BLOCK"]),),
        images_ptr=images,
        index_ptr=index,
        **{f"{name}_ptr": tensor for name, tensor in given._asdict().items()},
        y_ptr=output,
        D=depth,
        mean=mean,
        std=std,
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
        WIDE=needs_int64(images, output),
        # Which products the compiler fuses into FMAs depends on the constexprs; without fusion cells and images agree bitwise.
        enable_fp_fusion=False,
        **config,
    )


# --------------------------------------------------------------------------------------------------- public functions


def _augmented(pixels: Tensor, augmentation: Augmentation) -> Tensor:
    """``pixels`` (N, H, W) in [0, 1] after an :class:`Augmentation` without ``size``: windows as large as the images."""
    n, height, width = pixels.shape
    offset, flip, brightness, contrast, _ = augmentation
    device = pixels.device
    y, x = (torch.arange(length, device=device).expand(n, length) for length in (height, width))
    if flip is not None:
        x = torch.where(flip[:, None], width - 1 - x, x)
    if offset is not None:
        y, x = y + offset[:, :1], x + offset[:, 1:]
    window = _at(pixels, y, x)
    if brightness is not None:
        window = (window * brightness[:, None, None]).clamp(0, 1)
    if contrast is not None:
        window = _contrasted_reference(window, contrast, window.mean((1, 2)))
    return window


def _at(pixels: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Pixels (N, P, Q) of each image at its rows ``y`` (N, P) and columns ``x`` (N, Q); 0 outside of the image."""
    n, height, width = pixels.shape
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    image = torch.arange(n, device=pixels.device)[:, None, None]
    found = pixels[image, y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]]
    return torch.where(inside, found, 0.0)


def _contrasted_reference(pixels: Tensor, contrast: Tensor, mean: Tensor) -> Tensor:
    """``pixels`` (N, P, Q) in [0, 1] with their distance from each image's ``mean`` (N,) multiplied by ``contrast`` (N,)."""
    contrast = contrast[:, None, None]
    return (contrast * pixels + (1 - contrast) * mean[:, None, None]).clamp(0, 1)


def _resized_window(pixels: Tensor, augmentation: Augmentation, size: int) -> Tensor:
    """``pixels`` (N, H, W) in [0, 1] after an :class:`Augmentation` with ``size``, resized to (N, size, size).

    F.interpolate does not apply: each image has its own scale factor, and reading the factors would synchronise the host.
    """
    offset, flip, brightness, contrast, window = augmentation
    assert window is not None
    offset = torch.zeros_like(window, dtype=torch.int64) if offset is None else offset.to(torch.int64)
    (top, left), (height, width) = offset[..., None].unbind(1), window.to(torch.int64)[..., None].unbind(1)  # [N, 1] each
    if brightness is not None:
        pixels = (pixels * brightness[:, None, None]).clamp(0, 1)
    if contrast is not None:
        y, x = (torch.arange(length, device=pixels.device) for length in pixels.shape[1:])
        in_window = ((y >= top) & (y < top + height))[:, :, None] & ((x >= left) & (x < left + width))[:, None, :]
        mean = torch.where(in_window, pixels, 0.0).sum((1, 2)) / (height.to(pixels.dtype) * width)[:, 0]

    def corner(y: Tensor, x: Tensor) -> Tensor:
        x = x if flip is None else torch.where(flip[:, None], width - 1 - x, x)
        found = _at(pixels, y + top, x + left)
        return found if contrast is None else _contrasted_reference(found, contrast, mean)

    centres = torch.arange(size, device=pixels.device, dtype=pixels.dtype) + 0.5
    y, x = ((centres * (length.to(pixels.dtype) / size) - 0.5).clamp(min=0) for length in (height, width))
    y0, x0 = y.to(torch.int64), x.to(torch.int64)
    y1, x1 = torch.minimum(y0 + 1, height - 1), torch.minimum(x0 + 1, width - 1)
    down, right = (y - y0)[:, :, None], (x - x0)[:, None, :]
    upper, lower = ((1 - right) * corner(row, x0) + right * corner(row, x1) for row in (y0, y1))
    resized = (1 - down) * upper + down * lower
    return torch.where(((height > 0) & (width > 0))[:, :, None], resized, torch.nan)


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
    """:func:`gather_resize` in PyTorch's own operations; ``dtype`` may also be float64, which is then the dtype computed in."""
    pixels = images[index].to(torch.promote_types(dtype, torch.float32)) / 255
    if augmentation is not None and augmentation.size is not None:
        pixels = _resized_window(pixels, augmentation, size)
    elif augmentation is not None:
        pixels = _augmented(pixels, augmentation)
    scaled = pixels.unsqueeze(1)
    if pixels.shape[1:] != (size, size):
        scaled = F.interpolate(scaled, size=(size, size), mode="bilinear", align_corners=False)
    output = ((scaled - mean) / std).to(dtype)
    return output if cells is None else space_to_depth_reference(output, cells)


def _check_augmentation(augmentation: Augmentation, n: int, device: torch.device) -> None:
    pair, one = (n, 2), (n,)
    expected = {
        "offset": (pair, torch.int32),
        "flip": (one, torch.bool),
        "brightness": (one, torch.float32),
        "contrast": (one, torch.float32),
        "size": (pair, torch.int32),
    }
    for name, (shape, dtype) in expected.items():
        tensor = getattr(augmentation, name)
        if tensor is None:
            continue
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
    """Gather the images of ``index``, resize them bilinearly, scale them to [0, 1] and normalise them.

    Resizing follows ``F.interpolate(..., mode="bilinear", align_corners=False)``. For enlarging, this is also what
    ``torchvision.transforms.v2.functional.resize`` computes; for shrinking, torchvision smooths first. A window of
    ``augmentation`` is resized as if it were the whole image. This is torchvision's ``resized_crop`` where the window is no
    larger than the output; a larger window is not smoothed. Pixels are computed in float32. The call does not synchronise with
    the GPU and can be captured in a CUDA graph.

    Args:
        images: (D, H, W) uint8, any strides.
        index: (N,) int64 on the device of ``images``, from 0 to D - 1. A kernel cannot raise an error: it returns an image of
            NaN for any other index. The PyTorch reference raises an error, or counts a negative index from the end.
        size: height and width of the output images.
        mean, std: pixels in [0, 1] become (pixel - mean) / std.
        dtype: dtype of the output: float32, float16 or bfloat16.
        augmentation: changes to each image before it is resized. A window whose height or width is below 1 gives an image of
            NaN; raising an error would synchronise with the GPU.
        cells: write the images directly in the layout of :func:`kernels.space_to_depth`, bit-identical to its result.

    Returns:
        (N, 1, size, size), contiguous; with one channel this is also channels-last. It has no gradient. With ``cells``:
        (N, rows, columns, stride * stride), contiguous; the padding around an image is 0 whatever ``mean``.

    Raises:
        TypeError: other dtypes, or ``size`` or ``cells`` of another type.
        ValueError: other shapes or devices, images without pixels, ``size`` below 1, ``mean`` or ``std`` not finite, ``std``
            not above 0, or images smaller than a filter of ``cells``.
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
    size = integer("size", size)
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    mean, std = float(number("mean", mean)), float(number("std", std))
    if not math.isfinite(mean) or not 0 < std < math.inf:
        raise ValueError(f"mean must be finite and std finite and above 0, got {mean} and {std}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if augmentation is not None:
        _check_augmentation(augmentation, len(index), images.device)
        if all(tensor is None for tensor in augmentation):
            augmentation = None
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
        # resolve_neg: a kernel reads memory, in which a lazy negation has not been applied yet.
        augmentation = Augmentation(*(t if t is None else t.contiguous().resolve_neg() for t in augmentation))
    output = new_output((len(index), *shape), dtype, images.device)
    _launch_gather_resize(
        images, index.contiguous(), output, size, cells or _PIXELS, mean=mean, std=std, augmentation=augmentation
    )
    return output
