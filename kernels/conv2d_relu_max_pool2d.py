"""Convolution, bias, ReLU and max-pool as one operation that keeps no unpooled activation for its backward pass.

The forward pass runs the convolution kernel (bias and ReLU in its epilogue) and the pool kernel, and lets the unpooled
output go. What it saves is its input and one byte of window position an output. That is enough: the gradient only reaches the
element that a window points at, and where the ReLU stopped that element too the position says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import conv2d_stem_pool
from .autocast import autocast_inputs
from .backend import runs_triton
from .conv2d import (
    conv2d_arguments,
    conv2d_fprop,
    conv2d_gradients,
    conv2d_reference,
)
from .differentiation import OperatorFunction, once_differentiable, register_autograd, wants_grad
from .launch import new_output
from .max_pool2d import (
    check_positions_written,
    max_pool2d_dgrad,
    max_pool2d_fprop,
    max_pool2d_reference,
    new_position_and_index,
    pool_arguments,
)
from .overrides import overridable


@torch.library.custom_op("alexnet_triton::conv2d_relu_max_pool2d_fprop", mutates_args=())
def conv2d_relu_max_pool2d_fprop(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    conv_size: list[int],
    kernel_size: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
    pool_size: list[int],
    channels_last: bool,
    write_position: bool,
) -> tuple[Tensor, Tensor]:
    """Pooled values and window positions, each (N, K, P, Q), NHWC or NCHW; positions empty where not wanted."""
    window = (conv_size, kernel_size, pool_stride, pool_padding, pool_size)
    if conv2d_stem_pool.takes("fprop", input, weight, stride, dilation, groups, *window):
        return conv2d_stem_pool.fprop(
            input, weight, bias, stride[0], padding, conv_size, pool_size, channels_last, write_position
        )
    unpooled = conv2d_fprop(input, weight, bias, stride, padding, dilation, groups, conv_size, True)
    pooled, position, _ = max_pool2d_fprop(
        unpooled, kernel_size, pool_stride, pool_padding, [1, 1], pool_size, channels_last, True, write_position, False
    )
    return pooled, position


@conv2d_relu_max_pool2d_fprop.register_fake
def _(input, weight, *arguments):
    *_, kernel_size, _, _, pool_size, channels_last, write_position = arguments
    size = (input.shape[0], weight.shape[0], *pool_size)
    pooled = new_output(size, input.dtype, input.device, channels_last=channels_last)
    position, _ = new_position_and_index(pooled, kernel_size, channels_last, write_position, False)
    return pooled, position


class Conv2dReLUMaxPool2dFunction(OperatorFunction):
    """Convolution (+bias), ReLU, max-pool. Saves input, weight and window positions."""

    @staticmethod
    def forward(*inputs):
        return conv2d_relu_max_pool2d_fprop(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        input, weight, _, stride, padding, dilation, groups, conv_size, *window, _, _, write_position = inputs
        position = output[1]
        ctx.save_for_backward(input, weight, position)
        ctx.mark_non_differentiable(position)
        ctx.set_materialize_grads(False)  # no zeros for the gradient of the positions, which have none
        ctx.geometry = (stride, padding, dilation, groups)
        ctx.window = (*window, [1, 1])
        ctx.unpooled_size = [input.shape[0], weight.shape[0], *conv_size]
        ctx.write_position = write_position

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, Tensor, Tensor], grad_output: Tensor, _: Any):
        check_positions_written(ctx.write_position)
        input, weight, position = saved
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = None
        # One pass: the gradient before the ReLU, which the positions know of too, and its sums, the bias's gradient.
        dz, d_bias = max_pool2d_dgrad(
            grad_output, position, ctx.unpooled_size, *ctx.window, True, needs_input or needs_weight, needs_bias
        )
        if needs_input or needs_weight:
            dx, dw = conv2d_gradients(dz, input, weight, ctx.geometry, needs_input, needs_weight)
        return dx, dw, d_bias if needs_bias else None, *[None] * 11


register_autograd(Conv2dReLUMaxPool2dFunction, conv2d_relu_max_pool2d_fprop)


def conv2d_relu_max_pool2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    pool_kernel_size: int | Sequence[int],
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    output_format: torch.memory_format | None = None,
) -> Tensor:
    """What :func:`conv2d_relu_max_pool2d` means, in PyTorch's own operations."""
    activation = conv2d_reference(input, weight, bias, stride, padding, dilation, groups, activation="relu")
    pooled = max_pool2d_reference(activation, pool_kernel_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    assert isinstance(pooled, Tensor)
    return pooled.contiguous() if output_format == torch.contiguous_format else pooled


@overridable
def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    pool_kernel_size: int | Sequence[int],
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    output_format: torch.memory_format | None = None,
) -> Tensor:
    """``max_pool2d(relu(conv2d(...)))`` that keeps only its input and one byte an output.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as :func:`kernels.conv2d`.
        pool_kernel_size, pool_stride, pool_padding, ceil_mode: as :func:`kernels.max_pool2d`.
        output_format: ``torch.contiguous_format`` for an output that is NCHW in memory, so that flattening it is a view;
            ``torch.channels_last`` or None for NHWC.

    Returns:
        (N, K, P, Q) or (K, P, Q), pooled, in ``input``'s dtype, channels-last in memory unless ``output_format`` says NCHW.

    Raises:
        TypeError, ValueError: as :func:`kernels.conv2d` and :func:`kernels.max_pool2d`; ValueError for another
            ``output_format``.
    """
    if output_format not in (None, torch.channels_last, torch.contiguous_format):
        raise ValueError(f"output_format must be None, torch.channels_last or torch.contiguous_format, got {output_format!r}")
    input, weight, bias = autocast_inputs(input, weight, bias)
    batched = input.unsqueeze(0) if isinstance(input, Tensor) and input.dim() == 3 else input
    strides, before, dilations, conv_size = conv2d_arguments(batched, weight, bias, stride, padding, dilation, groups)
    *window, pool_size = pool_arguments(conv_size, pool_kernel_size, pool_stride, pool_padding, 1, ceil_mode, "pool_")
    if not runs_triton(input):
        return conv2d_relu_max_pool2d_reference(
            input,
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            pool_kernel_size=pool_kernel_size,
            pool_stride=pool_stride,
            pool_padding=pool_padding,
            ceil_mode=ceil_mode,
            output_format=output_format,
        )
    kernel_size, steps, pads, _ = window
    pooled, _ = Conv2dReLUMaxPool2dFunction.apply(
        batched,
        weight,
        bias,
        strides,
        before,
        dilations,
        groups,
        conv_size,
        kernel_size,
        steps,
        pads,
        pool_size,
        output_format != torch.contiguous_format,
        wants_grad(input, weight, bias),
    )
    return pooled.squeeze(0) if input.dim() == 3 else pooled
