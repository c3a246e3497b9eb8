"""2-D max-pooling: forward with a one-byte window position, backward as a gather.

The forward pass stores, beside each maximum, where in its window it was found (r * S + s). The backward pass asks, for each
input element, the few windows that hold it whether they point at it: no scatter, no atomics, a fixed order of addition.

Both passes are bound by memory, so their tiles are pixels x channels with the channels of a channels-last tensor side by side:
each thread reads and writes 16 bytes of neighbours, which all lie in windows at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..configs.tables import apply_overrides, elementwise_config, largest_divisor, split_count, tile_size
from ..primitives import cast, compensated_add, program_id
from ..runtime.arguments import check_tensors, pair
from ..runtime.backend import INTERPRETED, runs_triton
from ..runtime.launch import cdiv, launch, needs_int64, new_output, strides
from ..runtime.torch_interop import (
    OperatorFunction,
    apply_function,
    call_operator,
    once_differentiable,
    overridable,
    register_autograd,
    wants_grad,
)
from ..sums import ColumnSums, accumulator_dtype, epilogue_backward, sum_vectors, triton_accumulator


def pool_config(pixels: int, channels: int, channels_last: bool, wide: bool = False) -> dict[str, int]:
    """BLOCK_PIXELS, BLOCK_CHANNELS and num_warps of a kernel over tiles of an image's pixels and channels.

    The axis that is contiguous in memory comes first: blocks of channels that divide them, where there are such, else of
    pixels. Eight elements a thread are 16 bytes of a half type; four where pixels' offsets, or int64 ones (``wide``),
    take the registers.
    """
    if INTERPRETED:
        config = {"BLOCK_PIXELS": tile_size(pixels, 1, 512), "BLOCK_CHANNELS": tile_size(channels, 1, 128), "num_warps": 4}
        return apply_overrides(config)
    elements = 1024 if channels_last and not wide else 512
    if channels_last:
        exact = largest_divisor(channels, 64)
        block_channels = exact if exact >= 16 else tile_size(channels, 1, 32)
        block_pixels = tile_size(pixels, 1, elements // block_channels)
    else:
        block_pixels = tile_size(pixels, 1, 256)
        block_channels = tile_size(channels, 1, elements // block_pixels)
    return apply_overrides({"BLOCK_PIXELS": block_pixels, "BLOCK_CHANNELS": block_channels, "num_warps": 4})


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _tile(o_pixel, o_c, CHANNELS_LAST: tl.constexpr):
    """Pixels and channels as the two axes of a tile, neighbours in memory along the last: there threads follow each other."""
    if CHANNELS_LAST:
        o_pixel, o_c = o_pixel[:, None], o_c[None, :]
    else:
        o_pixel, o_c = o_pixel[None, :], o_c[:, None]
    return o_pixel, o_c


@triton.jit
def _max_pool2d_fprop_kernel(
    x_ptr,  # [N, C, H, W] through its strides
    y_ptr,  # out: [N, C, P, Q], dense, NHWC or NCHW
    position_ptr,  # out: window positions, as y, or unused
    index_ptr,  # out: int64 h * W + w, as y, or unused
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yc,
    stride_yq,  # from a pixel to the next, from the end of a row too
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # of the tile: as x has it
    RELU: tl.constexpr,
    NO_GRADIENT: tl.constexpr,
    WRITE_POSITION: tl.constexpr,
    WRITE_INDEX: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One program computes BLOCK_PIXELS outputs of one image in BLOCK_CHANNELS channels.

    Where a window lies is worked out once for all its channels, so that little but the maxima is left to do for each element.
    With RELU, the input is a ReLU's output: a window whose maximum is <= 0 gets NO_GRADIENT for its position.
    """
    PIXEL_BLOCKS: tl.constexpr = (P * Q + BLOCK_PIXELS - 1) // BLOCK_PIXELS
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    pid = program_id(0, WIDE)
    n = pid // (CHANNEL_BLOCKS * PIXEL_BLOCKS)
    o_pixel = pid // CHANNEL_BLOCKS % PIXEL_BLOCKS * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    o_c = pid % CHANNEL_BLOCKS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    o_pixel, o_c = _tile(o_pixel, o_c, CHANNELS_LAST)
    mask = (o_pixel < P * Q) & (o_c < C)
    o_h = o_pixel // Q * STRIDE_H - PAD_H
    o_w = o_pixel % Q * STRIDE_W - PAD_W
    p_x = x_ptr + n * stride_xn + o_c * stride_xc

    # The first element of the window inside the image stands until something larger comes, as in PyTorch: a window of
    # -inf points at it. After a NaN nothing is larger, but a later NaN takes over.
    first_r = tl.where(o_h < 0, (DILATION_H - 1 - o_h) // DILATION_H, 0)
    first_s = tl.where(o_w < 0, (DILATION_W - 1 - o_w) // DILATION_W, 0)
    b_position = tl.where(mask, first_r * S + first_s, 0).to(tl.int32)
    b_best = tl.full(mask.shape, float("-inf"), dtype=ACC)
    for r in range(R):
        for s in range(S):
            h = o_h + r * DILATION_H
            w = o_w + s * DILATION_W
            inside = mask & ((h >= 0) & (h < H) & (w >= 0) & (w < W))
            # What is not inside is never taken: -inf is larger than nothing.
            b_x = tl.load(p_x + (h * stride_xh + w * stride_xw), mask=inside, other=float("-inf")).to(ACC)
            takes = (b_x > b_best) | (b_x != b_x)
            b_best = tl.where(takes, b_x, b_best)
            b_position = tl.where(takes, r * S + s, b_position)

    o_y = n * stride_yn + o_pixel * stride_yq + o_c * stride_yc
    tl.store(y_ptr + o_y, cast(b_best, y_ptr.dtype.element_ty), mask=mask)
    if WRITE_INDEX:
        h = o_h + b_position // S * DILATION_H
        w = o_w + b_position % S * DILATION_W
        tl.store(index_ptr + o_y, h.to(tl.int64) * W + w, mask=mask)
    if WRITE_POSITION:
        if RELU:
            b_position = tl.where(b_best <= 0, NO_GRADIENT, b_position)
        tl.store(position_ptr + o_y, b_position.to(position_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_window(
    acc,
    b_grad,
    b_position,
    H_OFFSET: tl.constexpr,
    W_OFFSET: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
):
    """``acc`` plus a window's gradient where it points at its input H_OFFSET below and W_OFFSET right of where it begins."""
    r: tl.constexpr = H_OFFSET // DILATION_H
    s: tl.constexpr = W_OFFSET // DILATION_W
    if r * DILATION_H == H_OFFSET and r < R and s * DILATION_W == W_OFFSET and s < S:
        acc += tl.where(b_position == r * S + s, b_grad, 0.0)
    return acc


@triton.jit
def _max_pool2d_dgrad_kernel(
    dy_ptr,  # [N, C, P, Q] through its strides
    position_ptr,  # [N, C, P, Q] through its strides
    dx_ptr,  # out: [N, C, H, W], dense, NHWC or NCHW, or unused
    partial_ptr,  # out: [SPLIT, C] sums of dx over each split's cells, or unused
    blocks,  # of cells, in all images
    blocks_per_split,
    stride_dyn,
    stride_dyc,
    stride_dyp,
    stride_dyq,
    stride_pn,
    stride_pc,
    stride_pp,
    stride_pq,
    stride_dxn,
    stride_dxc,
    stride_dxh,
    stride_dxw,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    NO_GRADIENT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # of the tile: as dx has it
    WRITE_DX: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One program owns BLOCK_CHANNELS channels and walks over one split's share of the cells, BLOCK_PIXELS of them at a time.

    Cell (p, q) is the STRIDE_H x STRIDE_W inputs at which window (p, q) begins. The windows that reach a cell are the same few
    for every cell, counted from its own, and so are the positions at which they see each of its inputs: constants, all of
    them. A window's gradient is loaded once and handed to all the inputs of the cell.
    """
    CELLS_H: tl.constexpr = (H - 1 + PAD_H) // STRIDE_H + 1
    CELLS_W: tl.constexpr = (W - 1 + PAD_W) // STRIDE_W + 1
    CELL_BLOCKS: tl.constexpr = (CELLS_H * CELLS_W + BLOCK_PIXELS - 1) // BLOCK_PIXELS
    WINDOWS_H: tl.constexpr = (DILATION_H * (R - 1)) // STRIDE_H + 1  # the most windows that hold one row
    WINDOWS_W: tl.constexpr = (DILATION_W * (S - 1)) // STRIDE_W + 1
    pid_c = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    o_cell, o_c = _tile(tl.arange(0, BLOCK_PIXELS), pid_c * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS), CHANNELS_LAST)
    m_c = o_c < C
    TILE: tl.constexpr = (BLOCK_PIXELS, BLOCK_CHANNELS) if CHANNELS_LAST else (BLOCK_CHANNELS, BLOCK_PIXELS)
    b_sum = tl.zeros(TILE, dtype=ACC)
    b_lost = tl.zeros(TILE, dtype=ACC)
    for i_block in range(pid_split * blocks_per_split, tl.minimum((pid_split + 1) * blocks_per_split, blocks)):
        n = i_block // CELL_BLOCKS
        o_here = i_block % CELL_BLOCKS * BLOCK_PIXELS + o_cell
        o_p = o_here // CELLS_W
        o_q = o_here % CELLS_W
        p_dy = dy_ptr + n * stride_dyn + o_c * stride_dyc
        p_position = position_ptr + n * stride_pn + o_c * stride_pc

        grads = ()
        positions = ()
        for i in tl.static_range(WINDOWS_H):
            for j in tl.static_range(WINDOWS_W):
                p = o_p - (WINDOWS_H - 1 - i)  # ascending, the order in which PyTorch's CPU pool adds
                q = o_q - (WINDOWS_W - 1 - j)
                mask = ((p >= 0) & (p < P) & (q >= 0) & (q < Q)) & m_c
                grads += (tl.load(p_dy + (p * stride_dyp + q * stride_dyq), mask=mask, other=0.0).to(ACC),)  # type: ignore[assignment]
                o_window = p * stride_pp + q * stride_pq
                positions += (tl.load(p_position + o_window, mask=mask, other=NO_GRADIENT).to(tl.int32),)  # type: ignore[assignment]

        if WRITE_DX:
            p_dx = dx_ptr + n * stride_dxn + o_c * stride_dxc
            for a in tl.static_range(STRIDE_H):
                for b in tl.static_range(STRIDE_W):
                    acc = tl.zeros(TILE, dtype=ACC)
                    for i in tl.static_range(WINDOWS_H):
                        for j in tl.static_range(WINDOWS_W):
                            acc = _add_window(
                                acc,
                                grads[i * WINDOWS_W + j],
                                positions[i * WINDOWS_W + j],
                                a + (WINDOWS_H - 1 - i) * STRIDE_H,
                                b + (WINDOWS_W - 1 - j) * STRIDE_W,
                                R,
                                S,
                                DILATION_H,
                                DILATION_W,
                            )
                    h = o_p * STRIDE_H + (a - PAD_H)
                    w = o_q * STRIDE_W + (b - PAD_W)
                    mask = ((h >= 0) & (h < H) & (w >= 0) & (w < W)) & m_c
                    tl.store(p_dx + (h * stride_dxh + w * stride_dxw), cast(acc, dx_ptr.dtype.element_ty), mask=mask)
        if SUM_CHANNELS:
            # Every gradient that a window passes on reaches exactly one input, so the sum over the windows is the sum of dx.
            OWN: tl.constexpr = WINDOWS_H * WINDOWS_W - 1
            b_own = tl.where(positions[OWN] == NO_GRADIENT, 0.0, grads[OWN])
            b_sum, b_lost = compensated_add(b_sum, b_lost, b_own)
    if SUM_CHANNELS:
        PIXEL_AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
        b_total = tl.sum(b_sum, axis=PIXEL_AXIS, keep_dims=True)
        tl.store(partial_ptr + pid_split * C + o_c, b_total, mask=m_c)


@triton.jit
def _split_index(o_e, C, H, W, CHANNELS_LAST: tl.constexpr):
    """Element number in memory order to (n, c, h, w)."""
    if CHANNELS_LAST:
        o_c = o_e % C
        o_w = (o_e // C) % W
        o_h = (o_e // C // W) % H
    else:
        o_w = o_e % W
        o_h = (o_e // W) % H
        o_c = (o_e // W // H) % C
    o_n = o_e // C // H // W
    return o_n, o_c, o_h, o_w


@triton.jit
def _max_pool2d_gather_dgrad_kernel(
    dy_ptr,  # [N, C, P, Q] through its strides
    position_ptr,  # [N, C, P, Q] through its strides
    dx_ptr,  # out: [N, C, H, W], dense in the order CHANNELS_LAST says
    elements,
    stride_dyn,
    stride_dyc,
    stride_dyp,
    stride_dyq,
    stride_pn,
    stride_pc,
    stride_pp,
    stride_pq,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Any window: one program computes BLOCK input gradients, neighbours in memory, each from the windows that hold it."""
    WINDOWS_H: tl.constexpr = (DILATION_H * (R - 1)) // STRIDE_H + 1  # the most windows that hold one row
    WINDOWS_W: tl.constexpr = (DILATION_W * (S - 1)) // STRIDE_W + 1
    o_e = program_id(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    o_n, o_c, o_h, o_w = _split_index(o_e, C, H, W, CHANNELS_LAST)
    p_dy = dy_ptr + o_n * stride_dyn + o_c * stride_dyc
    o_position = o_n * stride_pn + o_c * stride_pc

    acc = tl.zeros((BLOCK,), dtype=ACC)
    for i in range(WINDOWS_H):
        p = (o_h + PAD_H) // STRIDE_H - (WINDOWS_H - 1 - i)  # ascending, the order in which PyTorch's CPU pool adds
        h_offset = o_h + PAD_H - p * STRIDE_H
        m_h = (p >= 0) & (p < P) & (h_offset % DILATION_H == 0) & (h_offset <= DILATION_H * (R - 1))
        for j in range(WINDOWS_W):
            q = (o_w + PAD_W) // STRIDE_W - (WINDOWS_W - 1 - j)
            w_offset = o_w + PAD_W - q * STRIDE_W
            mask = m_e & m_h & (q >= 0) & (q < Q) & (w_offset % DILATION_W == 0) & (w_offset <= DILATION_W * (S - 1))
            o_window = o_position + p * stride_pp + q * stride_pq
            b_position = tl.load(position_ptr + o_window, mask=mask, other=0).to(tl.int32)
            mask &= b_position == h_offset // DILATION_H * S + w_offset // DILATION_W
            acc += tl.load(p_dy + p * stride_dyp + q * stride_dyq, mask=mask, other=0.0).to(ACC)
    tl.store(dx_ptr + o_e, cast(acc, dx_ptr.dtype.element_ty), mask=m_e)


# ------------------------------------------------------------------------------------------------- launch functions


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a 4-D tensor is NHWC in memory, so that what is made from it should be too.

    By its strides: inside ``torch.func.vmap`` a tensor does not answer for its memory format.
    """
    _, c, h, w = tensor.shape

    def has(wanted: tuple[int, ...]) -> bool:
        return all(n == 1 or is_ == want for n, is_, want in zip(tensor.shape, tensor.stride(), wanted, strict=True))

    return has((h * w * c, 1, w * c, c)) and not has((c * h * w, h * w, w, 1))


def position_dtype(kernel_size: Sequence[int]) -> torch.dtype:
    """uint8 where the window's positions and the mark for no gradient fit a byte (up to 255 elements), else int32."""
    return torch.uint8 if kernel_size[0] * kernel_size[1] <= 255 else torch.int32


def no_gradient(dtype: torch.dtype) -> int:
    """In place of a position of ``dtype``: this window's maximum is a ReLU's zero, which no gradient passes."""
    return torch.iinfo(dtype).max


@torch.library.custom_op("alexnet_triton::max_pool2d_fprop", mutates_args=())
def max_pool2d_fprop(
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_size: list[int],
    channels_last: bool,
    relu: bool,
    write_position: bool,
    write_index: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled values, window positions, int64 indices (h * W + w), each (N, C, P, Q); empty where not wanted.

    With ``relu``, the input is a ReLU's output and positions say :func:`no_gradient` where it lets none pass.
    """
    n, c = input.shape[:2]
    p, q = output_size
    y = new_output((n, c, p, q), input.dtype, input.device, channels_last=channels_last)
    position, index = new_position_and_index(y, kernel_size, channels_last, write_position, write_index)
    wide = needs_int64(input, y)
    in_channels_last = is_channels_last(input)
    config = pool_config(p * q, c, in_channels_last, wide)
    blocks = cdiv(p * q, config["BLOCK_PIXELS"]) * cdiv(c, config["BLOCK_CHANNELS"])
    launch(
        _max_pool2d_fprop_kernel,
        (n * blocks,),
        x_ptr=input,
        y_ptr=y,
        position_ptr=position,
        index_ptr=index,
        **strides("stride_x", "nchw", input),
        stride_yn=y.stride(0),
        stride_yc=y.stride(1),
        stride_yq=y.stride(3),
        **_geometry(input.shape, output_size, kernel_size, stride, padding, dilation),
        CHANNELS_LAST=in_channels_last,
        RELU=relu,
        NO_GRADIENT=no_gradient(position_dtype(kernel_size)),
        WRITE_POSITION=write_position,
        WRITE_INDEX=write_index,
        WIDE=wide,
        ACC=triton_accumulator(input.dtype),
        **config,
    )
    return y, position, index


def new_position_and_index(
    y: Tensor, kernel_size: Sequence[int], channels_last: bool, write_position: bool, write_index: bool
) -> tuple[Tensor, Tensor]:
    """Uninitialised window positions and int64 indices for the outputs ``y``; empty where not wanted."""
    nothing = y.new_empty(0, dtype=torch.uint8)
    dtype = position_dtype(kernel_size)
    position = new_output(y.shape, dtype, y.device, channels_last=channels_last) if write_position else nothing
    index = new_output(y.shape, torch.int64, y.device, channels_last=channels_last) if write_index else nothing.long()
    return position, index


@max_pool2d_fprop.register_fake
def _(input, kernel_size, stride, padding, dilation, output_size, channels_last, relu, write_position, write_index):
    y = new_output((*input.shape[:2], *output_size), input.dtype, input.device, channels_last=channels_last)
    return y, *new_position_and_index(y, kernel_size, channels_last, write_position, write_index)


#: The most positions of a window, or inputs of a cell, that are written out in the code of a kernel.
_WRITTEN_OUT = 16


@torch.library.custom_op("alexnet_triton::max_pool2d_dgrad", mutates_args=())
def max_pool2d_dgrad(
    grad_output: Tensor,
    position: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    channels_last: bool,
    write_dx: bool,
    sum_channels: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the pool's input, or of the ReLU's input before it where the positions were made with ``relu``.

    And its sum over everything but the channels, (C,), which is the gradient of a bias before that ReLU. Both in
    ``grad_output``'s dtype; empty what is not wanted.
    """
    dx, sums, unsummed = pool_backward(
        grad_output, position, input_size, kernel_size, stride, padding, dilation, channels_last, write_dx, sum_channels
    )
    sum_vectors(unsummed)
    return dx, sums


def pool_backward(
    grad_output: Tensor,
    position: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    write_dx: bool,
    sum_channels: bool,
) -> tuple[Tensor, Tensor, list[ColumnSums]]:
    """What :func:`max_pool2d_dgrad` returns, and what is still to be summed for the second result."""
    if max(kernel_size[0] * kernel_size[1], stride[0] * stride[1]) > _WRITTEN_OUT:
        dx = _gather_dgrad(grad_output, position, input_size, kernel_size, stride, padding, dilation, channels_last)
        no_dx, sums = _new_dgrad(grad_output, input_size, channels_last, False, False)
        unsummed: list[ColumnSums] = []
        if sum_channels:
            _, sums, unsummed = epilogue_backward(dx, None, write_dz=False, sum_columns=True)
        return dx if write_dx else no_dx, sums, unsummed
    n, c, h, w = input_size
    dx, sums = _new_dgrad(grad_output, input_size, channels_last, write_dx, sum_channels)
    wide = needs_int64(dx, grad_output, position)
    cells = ((h - 1 + padding[0]) // stride[0] + 1) * ((w - 1 + padding[1]) // stride[1] + 1)
    config = pool_config(cells, c, channels_last, wide)
    blocks = n * cdiv(cells, config["BLOCK_PIXELS"])
    columns = cdiv(c, config["BLOCK_CHANNELS"])
    split = split_count(columns, max(blocks, 1), programs_per_multiprocessor=5)  # as many as fit by registers, at once
    partial = new_output((split if sum_channels else 0, c), accumulator_dtype(dx.dtype), dx.device)
    launch(
        _max_pool2d_dgrad_kernel,
        (columns, split),
        dy_ptr=grad_output,
        position_ptr=position,
        dx_ptr=dx,
        partial_ptr=partial,
        blocks=blocks,
        blocks_per_split=cdiv(blocks, split),
        **strides("stride_dy", "ncpq", grad_output),
        **strides("stride_p", "ncpq", position),
        **strides("stride_dx", "nchw", dx),
        **_geometry(input_size, position.shape[2:], kernel_size, stride, padding, dilation),
        NO_GRADIENT=no_gradient(position.dtype),
        CHANNELS_LAST=channels_last,
        WRITE_DX=write_dx,
        SUM_CHANNELS=sum_channels,
        WIDE=wide,
        ACC=triton_accumulator(dx.dtype),
        **config,
    )
    return dx, sums, [ColumnSums(partial, sums)] if sum_channels else []


def _new_dgrad(
    grad_output: Tensor, input_size: Sequence[int], channels_last: bool, write_dx: bool, sum_channels: bool
) -> tuple[Tensor, Tensor]:
    """Uninitialised results of :func:`max_pool2d_dgrad`."""
    dtype, device = grad_output.dtype, grad_output.device
    dx = new_output((input_size[0] if write_dx else 0, *input_size[1:]), dtype, device, channels_last=channels_last)
    return dx, new_output((input_size[1] if sum_channels else 0,), dtype, device)


@max_pool2d_dgrad.register_fake
def _(grad_output, position, input_size, kernel_size, stride, padding, dilation, channels_last, write_dx, sum_channels):
    return _new_dgrad(grad_output, input_size, channels_last, write_dx, sum_channels)


def _gather_dgrad(
    grad_output: Tensor,
    position: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """The gradient by the kernel that takes windows of any size."""
    dx, _ = _new_dgrad(grad_output, input_size, channels_last, True, False)
    wide = needs_int64(dx, grad_output, position)
    config = elementwise_config(dx.numel(), wide=True)  # each window's offsets take registers, int64 or not
    launch(
        _max_pool2d_gather_dgrad_kernel,
        (cdiv(dx.numel(), config["BLOCK"]),),
        dy_ptr=grad_output,
        position_ptr=position,
        dx_ptr=dx,
        elements=dx.numel(),
        **strides("stride_dy", "ncpq", grad_output),
        **strides("stride_p", "ncpq", position),
        **_geometry(input_size, position.shape[2:], kernel_size, stride, padding, dilation),
        CHANNELS_LAST=channels_last,
        WIDE=wide,
        ACC=triton_accumulator(dx.dtype),
        **config,
    )
    return dx


def _geometry(
    input_size: Sequence[int],
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> dict[str, int]:
    """The constants of a pool's kernels: all sizes but the batch's."""
    (_, c, h, w), (p, q), (r, s) = input_size, output_size, kernel_size
    constants = {"C": c, "H": h, "W": w, "P": p, "Q": q, "R": r, "S": s}
    for name, (vertical, horizontal) in (("STRIDE", stride), ("PAD", padding), ("DILATION", dilation)):
        constants |= {f"{name}_H": vertical, f"{name}_W": horizontal}
    return constants


# ------------------------------------------------------------------------------------------------- autograd Function


def check_positions_written(written: bool) -> None:
    """Refuse the backward pass of a pool whose forward pass was not asked for positions."""
    if not written:
        raise RuntimeError(
            "this max-pool was recorded without the window positions that its gradient needs: its graph was made under "
            "torch.no_grad() or from tensors that require no gradient"
        )


class MaxPool2dFunction(OperatorFunction):
    """Max-pool. Saves one byte an output: the position in its window."""

    @staticmethod
    def forward(input, kernel_size, stride, padding, dilation, output_size, channels_last, relu, write_position, write_index):
        return call_operator(
            max_pool2d_fprop,
            input,
            kernel_size,
            stride,
            padding,
            dilation,
            output_size,
            channels_last,
            relu,
            write_position,
            write_index,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, *window, _, channels_last, _, write_position, _ = inputs
        _, position, index = output
        ctx.save_for_backward(position)
        ctx.mark_non_differentiable(position, index)
        ctx.set_materialize_grads(False)  # no zeros for the gradient of the positions, which have none
        ctx.window = (*window, channels_last)
        ctx.input_size = list(input.shape)
        ctx.write_position = write_position

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor], grad_output: Tensor, *_: Any):
        check_positions_written(ctx.write_position)
        (position,) = saved
        dx, _ = call_operator(max_pool2d_dgrad, grad_output, position, ctx.input_size, *ctx.window, True, False)
        return dx, *[None] * 9


register_autograd(MaxPool2dFunction, max_pool2d_fprop)


# --------------------------------------------------------------------------------------------------- public function


def max_pool2d_reference(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What :func:`max_pool2d` means, in PyTorch's own operation."""
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)  # type: ignore[call-overload]


def pool_arguments(
    size: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
    prefix: str = "",
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Check the arguments of a pool over (height, width) = ``size``; its window, stride, padding, dilation, output size."""
    window = pair(f"{prefix}kernel_size", kernel_size, 1)
    no_stride = stride is None or (isinstance(stride, Sequence) and len(stride) == 0)
    steps = window if no_stride else pair(f"{prefix}stride", stride, 1)  # type: ignore[arg-type]
    pads = pair(f"{prefix}padding", padding, 0)
    dilations = pair(f"{prefix}dilation", dilation, 1)
    output = []
    for axis, name in enumerate(("height", "width")):
        if pads[axis] > window[axis] // 2:
            raise ValueError(
                f"{prefix}padding must be at most half of {prefix}kernel_size: {pads} with {prefix}kernel_size {window}"
            )
        span = dilations[axis] * (window[axis] - 1) + 1
        free = size[axis] + 2 * pads[axis] - span
        count = (-(-free // steps[axis]) if ceil_mode else free // steps[axis]) + 1
        # A window that would start beyond the image and its left padding is dropped.
        if ceil_mode and (count - 1) * steps[axis] >= size[axis] + pads[axis]:
            count -= 1
        if count < 1:
            raise ValueError(
                f"the pool's input {name} {size[axis]} with padding {pads[axis]} is smaller than the window's span of "
                f"{span} ({prefix}kernel_size {window}, {prefix}dilation {dilations}): the output would be empty"
            )
        output.append(count)
    return list(window), list(steps), list(pads), list(dilations), output


@overridable
def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """2-D max-pooling; the meaning of :func:`torch.nn.functional.max_pool2d`, ties and NaN included.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float16 or bfloat16 (float64 on the CPU), any strides.
        kernel_size: int or (rows, columns) of the window, in elements.
        stride: int or two ints, in elements; ``kernel_size`` by default.
        padding: of -inf on each side, at most half of ``kernel_size``.
        dilation: distance of window elements.
        ceil_mode: count the last, partial window too.
        return_indices: return PyTorch's int64 indices (h * W + w in the input's plane) as well.

    Returns:
        (N, C, P, Q) or (C, P, Q) in ``input``'s dtype and memory format (NHWC or NCHW); a pair with the indices if asked.
        The gradient needs one byte an output (four for windows of more than 255 elements).

    Raises:
        TypeError: a dtype that the kernels do not run.
        ValueError: ranks, sizes or options that do not fit.
    """
    check_tensors(input=input)
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be (N, C, H, W) or (C, H, W), got shape {tuple(input.shape)}")
    if input.shape[-3] == 0:
        raise ValueError(f"only the batch of input may be empty, got shape {tuple(input.shape)}")
    window = pool_arguments(input.shape[-2:], kernel_size, stride, padding, dilation, ceil_mode)
    if not runs_triton(input):
        return max_pool2d_reference(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    y, _, index = apply_function(
        MaxPool2dFunction, batched, *window, is_channels_last(batched), False, wants_grad(input), return_indices
    )
    if input.dim() == 3:
        y, index = y.squeeze(0), index.squeeze(0) if return_indices else index
    return (y, index) if return_indices else y
