"""Cells (space-to-depth) for a strided first layer: each block of stride x stride pixels becomes one pixel of more channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import program_id
from ..runtime.arguments import check_tensors, pair
from ..runtime.backend import runs_triton
from ..runtime.launch import cdiv, launch, needs_int64, new_output, next_power_of_2, strides
from ..runtime.torch_interop import overridable

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _space_to_depth_kernel(
    x_ptr,  # [N, C, H, W] through its strides
    out_ptr,  # out: [N, HS, WS, STRIDE*STRIDE*C] contiguous
    H,
    W,
    HS,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    pad_h,
    pad_w,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    WS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes row ``i`` of the cells of image ``n``.

    out[n, i, j, (a * STRIDE + b) * C + c] = x[n, c, i * STRIDE + a - pad_h, j * STRIDE + b - pad_w]
    """
    DEPTH: tl.constexpr = STRIDE * STRIDE * C
    pid = program_id(0, WIDE)
    n = pid // HS
    i = (pid % HS).to(tl.int32)
    o_e = tl.arange(0, BLOCK)
    o_c = o_e % C
    h = i * STRIDE + o_e % DEPTH // C // STRIDE - pad_h
    w = o_e // DEPTH * STRIDE + o_e // C % STRIDE - pad_w
    m_e = o_e < WS * DEPTH
    m_x = m_e & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    if WIDE:
        o_c, h, w = o_c.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    b_x = tl.load(x_ptr + n * stride_xn + o_c * stride_xc + h * stride_xh + w * stride_xw, mask=m_x, other=0.0)
    tl.store(out_ptr + pid * (WS * DEPTH) + o_e, b_x, mask=m_e)


class Cells(NamedTuple):
    """The convolution for which :func:`space_to_depth` rearranges images into cells.

    Attributes:
        kernel_size: size of the filters, int or (rows, columns), in pixels.
        stride: stride of the convolution in both directions, in pixels: the side of a cell.
        padding: zeros on each side of the convolution's input, int or (vertical, horizontal). Below and to the right the cells
            end with the last one that a filter reaches.
    """

    kernel_size: int | Sequence[int]
    stride: int
    padding: int | Sequence[int] = 0

    def pairs(self) -> tuple[tuple[int, int], int, tuple[int, int]]:
        """``kernel_size`` and ``padding`` as pairs, ``stride`` between them.

        Raises:
            TypeError, ValueError: an attribute has the wrong type or value, or the two strides differ.
        """
        step, other = pair("stride", self.stride, 1)
        if step != other:
            raise ValueError(f"cells have one stride, got {self.stride}")
        return pair("kernel_size", self.kernel_size, 1), step, pair("padding", self.padding, 0)

    def output_size(self, input_size: Sequence[int]) -> list[int]:
        """(rows, columns) of the convolution's output for images of ``input_size`` (rows, columns).

        Raises:
            ValueError: the padded images are smaller than a filter.
        """
        filter_size, step, pads = self.pairs()
        output_size = [(i + 2 * p - f) // step + 1 for i, p, f in zip(input_size, pads, filter_size, strict=True)]
        if min(output_size) < 1:
            raise ValueError(f"images {tuple(input_size)} with padding {pads} are smaller than a filter of {filter_size}")
        return output_size

    def size(self, input_size: Sequence[int]) -> list[int]:
        """(rows, columns) of the cells of images of ``input_size`` (rows, columns); raises as :meth:`output_size`."""
        filter_size, step, _ = self.pairs()
        return cells_size(step, self.output_size(input_size), filter_size)


Cells.__module__ = "kernels"  # pickles name the public module, not this file


# ------------------------------------------------------------------------------------------------- launch functions


def _space_to_depth(input: Tensor, stride: int, padding: Sequence[int], size: Sequence[int]) -> Tensor:
    """(N, C, H, W), any strides, to dense (N, *size, stride * stride * C): each cell of stride x stride pixels is one pixel.

    A convolution of this stride over ``input`` equals one of stride 1 over the result, with a filter ``stride`` times smaller.
    """
    n, c, h, w = input.shape
    out = new_cells(input, stride, size)
    row = size[1] * stride * stride * c
    launch(
        _space_to_depth_kernel,
        (n * size[0],),
        x_ptr=input,
        out_ptr=out,
        H=h,
        W=w,
        HS=size[0],
        **strides("stride_x", "nchw", input),
        pad_h=padding[0],
        pad_w=padding[1],
        C=c,
        STRIDE=stride,
        WS=size[1],
        WIDE=needs_int64(input, out),
        BLOCK=next_power_of_2(row),
        num_warps=4,
    )
    return out


def new_cells(input: Tensor, stride: int, size: Sequence[int]) -> Tensor:
    """Allocate the result of :func:`space_to_depth`, uninitialised."""
    n, c = input.shape[:2]
    return new_output((n, *size, stride * stride * c), input.dtype, input.device)


@torch.library.custom_op("alexnet_triton::space_to_depth", mutates_args=())
def space_to_depth_cells(
    input: Tensor, stride: int, padding: list[int], output_size: list[int], filter_size: list[int]
) -> Tensor:
    """:func:`cells_of` as a registered operator."""
    return cells_of(input, stride, padding, output_size, filter_size)


@space_to_depth_cells.register_fake
def _(input, stride, padding, output_size, filter_size):
    return new_cells(input, stride, cells_size(stride, output_size, filter_size))


@overridable
def space_to_depth(input: Tensor, kernel_size: int | Sequence[int], stride: int, padding: int | Sequence[int] = 0) -> Tensor:
    """The cells (space-to-depth) of images for a strided convolution: the input of ``conv2d_relu_max_pool2d(..., cells=True)``.

    Args:
        input: (N, C, H, W); float32, float16 or bfloat16 (float64 on the CPU), any strides. It must not require a gradient.
        kernel_size: size of the filters, int or (rows, columns), in pixels.
        stride: stride of the convolution in both directions, in pixels: the side of a cell.
        padding: zeros on each side of the convolution's input, int or (vertical, horizontal). Below and to the right the cells
            end with the last one that a filter reaches.

    Returns:
        (N, rows, columns, stride * stride * C), contiguous: element ``(a * stride + b) * C + c`` of cell (i, j) is the pixel
        (i * stride + a - padding, j * stride + b - padding) of channel c.

    Raises:
        TypeError: a dtype that the kernels do not run.
        ValueError: an input that is not (N, C, H, W), that requires a gradient, or that is with its padding smaller than a
            filter.
    """
    check_tensors(input=input)
    if input.dim() != 4:
        raise ValueError(f"input must be (N, C, H, W), got shape {tuple(input.shape)}")
    if input.requires_grad:
        raise ValueError("space_to_depth takes no gradient: pass the images to the convolution if you need their gradient")
    cells = Cells(kernel_size, stride, padding)
    filter_size, step, pads = cells.pairs()
    output_size = cells.output_size(input.shape[2:])
    if runs_triton(input):
        return space_to_depth_cells(input, step, list(pads), output_size, list(filter_size))
    return space_to_depth_reference(input, cells)


def space_to_depth_reference(input: Tensor, cells: Cells) -> Tensor:
    """Reference for :func:`space_to_depth` in PyTorch operations."""
    _, step, pads = cells.pairs()
    rows, columns = cells.size(input.shape[2:])
    below, right = (n * step - p - i for n, p, i in zip((rows, columns), pads, input.shape[2:], strict=True))
    padded = F.pad(input, (pads[1], right, pads[0], below))
    n, c = input.shape[:2]
    pixels = padded.view(n, c, rows, step, columns, step).permute(0, 2, 4, 3, 5, 1)
    return pixels.reshape(n, rows, columns, step * step * c)


def depth_to_space(cells: Tensor, channels: int, stride: int) -> Tensor:
    """The images (N, C, H, W), with their padding, that :func:`space_to_depth` rearranged into ``cells``."""
    n, rows, columns, _ = cells.shape
    pixels = cells.view(n, rows, columns, stride, stride, channels).permute(0, 5, 1, 3, 2, 4)
    return pixels.reshape(n, channels, rows * stride, columns * stride)


def cells_of(
    input: Tensor, stride: int, padding: Sequence[int], output_size: Sequence[int], filter_size: Sequence[int]
) -> Tensor:
    """All the cells that a convolution's filters read, (N, rows, columns, stride * stride * C)."""
    return _space_to_depth(input, stride, padding, cells_size(stride, output_size, filter_size))


def cells_size(stride: int, output_size: Sequence[int], filter_size: Sequence[int]) -> list[int]:
    """[rows, columns] of the cells that filters of ``filter_size`` pixels read for an output of ``output_size``."""
    return [o + cdiv(f, stride) - 1 for o, f in zip(output_size, filter_size, strict=True)]
