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

from .autocast import autocast_inputs
from .backend import runs_triton
from .conv2d import (
    conv2d_arguments,
    conv2d_epilogue_backward,
    conv2d_fprop,
    conv2d_gradients,
    conv2d_reference,
)
from .differentiation import once_differentiable
from .max_pool2d import max_pool2d_dgrad, max_pool2d_fprop, max_pool2d_reference, pool_arguments


class Conv2dReLUMaxPool2dFunction(torch.autograd.Function):
    """Convolution (+bias), ReLU, max-pool. Saves input, weight and window positions."""

    @staticmethod
    def forward(ctx: Any, input, weight, bias, stride, padding, dilation, groups, conv_size, window, pool_size, want_grad):
        unpooled = conv2d_fprop(input, weight, bias, stride, padding, dilation, groups, conv_size, True)
        pooled, position, _ = max_pool2d_fprop(unpooled, *window, pool_size, True, True, want_grad, False)
        ctx.save_for_backward(input, weight, position)
        ctx.geometry = (stride, padding, dilation, groups)
        ctx.window = window
        ctx.unpooled_size = list(unpooled.shape)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, Tensor, Tensor], grad_output: Tensor):
        input, weight, position = saved
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = d_bias = None
        if needs_bias:
            # Every pooled gradient reaches exactly one unpooled element, so the sum over either is the same.
            _, d_bias = conv2d_epilogue_backward(grad_output, position, False, True)
        if needs_input or needs_weight:
            dz = max_pool2d_dgrad(grad_output, position, ctx.unpooled_size, *ctx.window, True)
            dx, dw = conv2d_gradients(dz, input, weight, ctx.geometry, needs_input, needs_weight)
        return dx, dw, d_bias, None, None, None, None, None, None, None, None


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
) -> Tensor:
    """What :func:`conv2d_relu_max_pool2d` means, in PyTorch's own operations."""
    activation = conv2d_reference(input, weight, bias, stride, padding, dilation, groups, activation="relu")
    pooled = max_pool2d_reference(activation, pool_kernel_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    assert isinstance(pooled, Tensor)
    return pooled


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
) -> Tensor:
    """``max_pool2d(relu(conv2d(...)))`` that keeps only its input and one byte an output.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as :func:`kernels.conv2d`.
        pool_kernel_size, pool_stride, pool_padding, ceil_mode: as :func:`kernels.max_pool2d`.

    Returns:
        (N, K, P, Q) or (K, P, Q), pooled, in ``input``'s dtype, channels-last in memory.

    Raises:
        TypeError, ValueError: as :func:`kernels.conv2d` and :func:`kernels.max_pool2d`.
    """
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
        )
    want_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))
    pooled = Conv2dReLUMaxPool2dFunction.apply(
        batched, weight, bias, strides, before, dilations, groups, conv_size, window, pool_size, want_grad
    )
    return pooled.squeeze(0) if input.dim() == 3 else pooled
