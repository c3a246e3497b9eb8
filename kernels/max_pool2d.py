"""2-D max-pooling: forward with a one-byte window position, backward as a gather.

The forward pass stores, beside each maximum, where in its window it was found (r * S + s). The backward pass asks, for each
input element, the few windows that hold it whether they point at it: no scatter, no atomics, a fixed order of addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .backend import runs_triton
from .checks import check_tensors, pair
from .config import elementwise_config, pool_backward_config, pool_config
from .device import cast, program_id
from .differentiation import OperatorFunction, once_differentiable, register_autograd, wants_grad
from .launch import launch, needs_int64, new_output, strides
from .overrides import overridable
from .reduction import accumulator_dtype, epilogue_backward, sum_parts, triton_accumulator

# ---------------------------------------------------------------------------------------------------------- kernels


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
def _max_pool2d_fprop_kernel(
    x_ptr,  # [N, C, H, W] through its strides
    y_ptr,  # out: [N, C, P, Q], dense in the order CHANNELS_LAST says
    position_ptr,  # out: window positions, as y, or unused
    index_ptr,  # out: int64 h * W + w, as y, or unused
    elements,
    C,
    H,
    W,
    P,
    Q,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RELU: tl.constexpr,
    NO_GRADIENT: tl.constexpr,
    WRITE_POSITION: tl.constexpr,
    WRITE_INDEX: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program computes BLOCK outputs, neighbours in memory.

    With RELU, the input is a ReLU's output: a window whose maximum is <= 0 gets NO_GRADIENT for its position.
    """
    o_e = program_id(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    o_n, o_c, o_p, o_q = _split_index(o_e, C, P, Q, CHANNELS_LAST)
    o_h = o_p * STRIDE_H - PAD_H
    o_w = o_q * STRIDE_W - PAD_W
    p_x = x_ptr + o_n * stride_xn + o_c * stride_xc

    # The first element of the window inside the image stands until something larger comes, as in PyTorch: a window of
    # -inf points at it. After a NaN nothing is larger, but a later NaN takes over.
    first_r = tl.where(o_h < 0, (DILATION_H - 1 - o_h) // DILATION_H, 0)
    first_s = tl.where(o_w < 0, (DILATION_W - 1 - o_w) // DILATION_W, 0)
    b_best = tl.full((BLOCK,), float("-inf"), dtype=ACC)
    b_position = first_r * S + first_s
    for r in range(R):
        for s in range(S):
            h = o_h + r * DILATION_H
            w = o_w + s * DILATION_W
            inside = m_e & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            b_x = tl.load(p_x + h * stride_xh + w * stride_xw, mask=inside, other=0.0).to(ACC)
            takes = inside & ((b_x > b_best) | (b_x != b_x))
            b_best = tl.where(takes, b_x, b_best)
            b_position = tl.where(takes, r * S + s, b_position)

    tl.store(y_ptr + o_e, cast(b_best, y_ptr.dtype.element_ty), mask=m_e)
    if WRITE_INDEX:
        h = o_h + b_position // S * DILATION_H
        w = o_w + b_position % S * DILATION_W
        tl.store(index_ptr + o_e, h.to(tl.int64) * W + w, mask=m_e)
    if WRITE_POSITION:
        if RELU:
            b_position = tl.where(b_best <= 0, NO_GRADIENT, b_position)
        tl.store(position_ptr + o_e, b_position.to(position_ptr.dtype.element_ty), mask=m_e)


@triton.jit
def _max_pool2d_dgrad_kernel(
    dy_ptr,  # [N, C, P, Q] through its strides
    position_ptr,  # [N, C, P, Q] through its strides
    dx_ptr,  # out: [N, C, H, W], dense in the order CHANNELS_LAST says
    elements,
    C,
    H,
    W,
    P,
    Q,
    stride_dyn,
    stride_dyc,
    stride_dyp,
    stride_dyq,
    stride_pn,
    stride_pc,
    stride_pp,
    stride_pq,
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
    """One program computes BLOCK input gradients, neighbours in memory, each from the windows that hold it."""
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


@triton.jit
def _max_pool2d_rows_fprop_kernel(
    x_ptr,  # [N, H, W, C] contiguous
    y_ptr,  # out: [N, P, Q, C] contiguous
    position_ptr,  # out: window positions, as y, or unused
    C,
    H,
    W,
    P,
    Q,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    RELU: tl.constexpr,
    NO_GRADIENT: tl.constexpr,
    WRITE_POSITION: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_W outputs of one row x BLOCK_C channels.

    Positions are worked out once a pixel, not once an element, and eight channels of a pixel are one load. Values and
    positions as in :func:`_max_pool2d_fprop_kernel`.
    """
    pid = program_id(0, WIDE)
    n = pid // P
    p = (pid % P).to(tl.int32)
    o_q = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    o_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_q = o_q < Q
    m_c = o_c < C
    h_first = p * STRIDE_H - PAD_H
    o_w = o_q * STRIDE_W - PAD_W
    p_x = x_ptr + n * H * W * C
    b_best = tl.full((BLOCK_W, BLOCK_C), float("-inf"), dtype=ACC)
    first = tl.maximum(-h_first, 0) * S + tl.maximum(-o_w, 0)  # [BLOCK_W], of the first element inside the image
    b_position = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.int32) + first[:, None]
    for r in tl.static_range(R):
        h = h_first + r
        for s in tl.static_range(S):
            w = o_w + s
            m_x = m_q & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            p_window = p_x + ((h * W + w) * C)[:, None] + o_c[None, :]
            # -inf takes no window's place, so what is outside needs no mask of its own.
            b_x = tl.load(p_window, mask=m_x[:, None] & m_c[None, :], other=float("-inf")).to(ACC)
            takes = (b_x > b_best) | (b_x != b_x)
            b_best = tl.where(takes, b_x, b_best)
            b_position = tl.where(takes, r * S + s, b_position)
    o_y = ((n * P + p) * Q + o_q)[:, None] * C + o_c[None, :]
    mask = m_q[:, None] & m_c[None, :]
    tl.store(y_ptr + o_y, cast(b_best, y_ptr.dtype.element_ty), mask=mask)
    if WRITE_POSITION:
        if RELU:
            b_position = tl.where(b_best <= 0, NO_GRADIENT, b_position)
        tl.store(position_ptr + o_y, b_position.to(position_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _max_pool2d_rows_dgrad_kernel(
    dy_ptr,  # [N, C, P, Q] through its strides
    position_ptr,  # [N, P, Q, C] contiguous, uint8
    dx_ptr,  # out: [N, H, W, C] contiguous
    partial_ptr,  # out: [N * groups of rows, C] sums of dx over each program's pixels, or unused
    C,
    H,
    W,
    P,
    Q,
    stride_dyn,
    stride_dyc,
    stride_dyp,
    stride_dyq,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    NO_GRADIENT: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_H rows of one image x BLOCK_C channels, each from the windows that hold it.

    With SUM_CHANNELS it adds them up as well: dx is then the gradient before a convolution's ReLU, and its sum the bias's.
    """
    WINDOWS_H: tl.constexpr = (R - 1) // STRIDE_H + 1  # the most windows that hold one row
    WINDOWS_W: tl.constexpr = (S - 1) // STRIDE_W + 1
    pid = program_id(0, WIDE)
    groups = tl.cdiv(H, BLOCK_H)
    n = pid // groups
    h_first = (pid % groups * BLOCK_H).to(tl.int32)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_dy = dy_ptr + n * stride_dyn + (o_c * stride_dyc)[None, :]
    p_position = position_ptr + n * P * Q * C + o_c[None, :]
    p_dx = dx_ptr + n * H * W * C + o_c[None, :]
    b_sum = tl.zeros((BLOCK_W, BLOCK_C), dtype=ACC)
    for h in range(h_first, tl.minimum(h_first + BLOCK_H, H)):
        for w_first in range(0, W, BLOCK_W):
            o_w = w_first + tl.arange(0, BLOCK_W)
            acc = tl.zeros((BLOCK_W, BLOCK_C), dtype=ACC)
            for i in tl.static_range(WINDOWS_H):
                p = (h + PAD_H) // STRIDE_H - (WINDOWS_H - 1 - i)  # ascending, the order in which PyTorch's CPU pool adds
                r = h + PAD_H - p * STRIDE_H
                m_h = (p >= 0) & (p < P) & (r < R)
                for j in tl.static_range(WINDOWS_W):
                    q = (o_w + PAD_W) // STRIDE_W - (WINDOWS_W - 1 - j)
                    s = o_w + PAD_W - q * STRIDE_W
                    m_w = m_h & (q >= 0) & (q < Q) & (s < S) & (o_w < W)
                    mask = m_w[:, None] & m_c[None, :]
                    o_pixel = (p * Q + q) * C
                    b_position = tl.load(p_position + o_pixel[:, None], mask=mask, other=NO_GRADIENT).to(tl.int32)
                    b_dy = tl.load(p_dy + (p * stride_dyp + q * stride_dyq)[:, None], mask=mask, other=0.0).to(ACC)
                    acc += tl.where(b_position == (r * S + s)[:, None], b_dy, 0.0)
            mask = (o_w < W)[:, None] & m_c[None, :]
            tl.store(p_dx + ((h * W + o_w) * C)[:, None], cast(acc, dx_ptr.dtype.element_ty), mask=mask)
            if SUM_CHANNELS:
                b_sum += acc
    if SUM_CHANNELS:
        tl.store(partial_ptr + pid * C + o_c, tl.sum(b_sum, axis=0), mask=m_c)


# ------------------------------------------------------------------------------------------------- launch functions


def _by_rows(channels_last: bool, kernel_size: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether a pool suits the kernels for rows of channels-last pixels: an ordinary window, small enough to be unrolled."""
    return channels_last and max(dilation) == 1 and kernel_size[0] * kernel_size[1] <= 16


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
    n, c, h, w = input.shape
    p, q = output_size
    y = new_output((n, c, p, q), input.dtype, input.device, channels_last=channels_last)
    position, index = new_position_and_index(y, kernel_size, channels_last, write_position, write_index)
    wide = needs_int64(input, y)
    by_rows = _by_rows(channels_last, kernel_size, dilation) and not write_index
    if by_rows and input.permute(0, 2, 3, 1).is_contiguous():
        window = _window(kernel_size, stride, padding, dilation)
        config = pool_config(q, c)
        launch(
            _max_pool2d_rows_fprop_kernel,
            (n * p, triton.cdiv(q, config["BLOCK_W"]), triton.cdiv(c, config["BLOCK_C"])),
            x_ptr=input,
            y_ptr=y,
            position_ptr=position,
            C=c,
            H=h,
            W=w,
            P=p,
            Q=q,
            **{name: value for name, value in window.items() if not name.startswith("DILATION")},
            RELU=relu,
            NO_GRADIENT=no_gradient(torch.uint8),
            WRITE_POSITION=write_position,
            WIDE=wide,
            ACC=triton_accumulator(input.dtype),
            **config,
        )
        return y, position, index
    config = elementwise_config(y.numel(), wide)
    launch(
        _max_pool2d_fprop_kernel,
        (triton.cdiv(y.numel(), config["BLOCK"]),),
        x_ptr=input,
        y_ptr=y,
        position_ptr=position,
        index_ptr=index,
        elements=y.numel(),
        C=c,
        H=h,
        W=w,
        P=p,
        Q=q,
        **strides("stride_x", "nchw", input),
        **_window(kernel_size, stride, padding, dilation),
        CHANNELS_LAST=channels_last,
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
    sum_channels: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the pool's input, or of the ReLU's input before it where the positions were made with ``relu``.

    And its sum over all but the channels, in ``grad_output``'s dtype; empty without ``sum_channels``.
    """
    n, c, h, w = input_size
    dx, sums = _new_input_gradient(grad_output, input_size, channels_last, sum_channels)
    _, _, p, q = position.shape
    wide = needs_int64(dx, grad_output, position)
    geometry = {"C": c, "H": h, "W": w, "P": p, "Q": q, **strides("stride_dy", "ncpq", grad_output)}
    window = _window(kernel_size, stride, padding, dilation)
    if _by_rows(channels_last, kernel_size, dilation) and position.permute(0, 2, 3, 1).is_contiguous():
        config = pool_backward_config(h, w, c)
        groups = triton.cdiv(h, config["BLOCK_H"])
        partial = new_output((n * groups if sum_channels else 0, c), accumulator_dtype(dx.dtype), dx.device)
        launch(
            _max_pool2d_rows_dgrad_kernel,
            (n * groups, triton.cdiv(c, config["BLOCK_C"])),
            dy_ptr=grad_output,
            position_ptr=position,
            dx_ptr=dx,
            partial_ptr=partial,
            **geometry,
            **{name: value for name, value in window.items() if not name.startswith("DILATION")},
            NO_GRADIENT=no_gradient(torch.uint8),
            SUM_CHANNELS=sum_channels,
            WIDE=wide,
            ACC=triton_accumulator(dx.dtype),
            **config,
        )
        if sum_channels:
            sum_parts(partial, sums.view(c, 1, 1, 1))
        return dx, sums
    config = elementwise_config(dx.numel(), wide)
    launch(
        _max_pool2d_dgrad_kernel,
        (triton.cdiv(dx.numel(), config["BLOCK"]),),
        dy_ptr=grad_output,
        position_ptr=position,
        dx_ptr=dx,
        elements=dx.numel(),
        **geometry,
        **strides("stride_p", "ncpq", position),
        **window,
        CHANNELS_LAST=channels_last,
        WIDE=wide,
        ACC=triton_accumulator(dx.dtype),
        **config,
    )
    if sum_channels:
        _, sums = epilogue_backward(dx, None, write_dz=False, sum_columns=True)
    return dx, sums


def _new_input_gradient(
    grad_output: Tensor, input_size: Sequence[int], channels_last: bool, sum_channels: bool
) -> tuple[Tensor, Tensor]:
    """Uninitialised results of :func:`max_pool2d_dgrad`."""
    dtype, device = grad_output.dtype, grad_output.device
    dx = new_output(input_size, dtype, device, channels_last=channels_last)
    return dx, new_output((input_size[1] if sum_channels else 0,), dtype, device)


@max_pool2d_dgrad.register_fake
def _(grad_output, position, input_size, kernel_size, stride, padding, dilation, channels_last, sum_channels):
    return _new_input_gradient(grad_output, input_size, channels_last, sum_channels)


def _window(
    kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> dict[str, int]:
    (r, s), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w) = kernel_size, stride, padding, dilation
    return {
        "R": r,
        "S": s,
        "STRIDE_H": stride_h,
        "STRIDE_W": stride_w,
        "PAD_H": pad_h,
        "PAD_W": pad_w,
        "DILATION_H": dilation_h,
        "DILATION_W": dilation_w,
    }


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
        return max_pool2d_fprop(
            input, kernel_size, stride, padding, dilation, output_size, channels_last, relu, write_position, write_index
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
        dx, _ = max_pool2d_dgrad(grad_output, position, ctx.input_size, *ctx.window, False)
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
    y, _, index = MaxPool2dFunction.apply(batched, *window, is_channels_last(batched), False, wants_grad(input), return_indices)
    if input.dim() == 3:
        y, index = y.squeeze(0), index.squeeze(0) if return_indices else index
    return (y, index) if return_indices else y
