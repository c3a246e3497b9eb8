"""FLOPs of the operators for :class:`torch.utils.flop_counter.FlopCounterMode`, counted as it counts PyTorch's own.

A multiply and an add are two; bias, activation and pool count nothing. One difference: the weight gradient of a grouped
convolution, which PyTorch counts as if there were no groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import conv2d, conv2d_relu_max_pool2d, linear  # noqa: F401 (define the operators)

_operators: Any = torch.ops.alexnet_triton


def _conv2d_flops(weight: Sequence[int], conv_output: Sequence[int]) -> int:
    """``weight`` (K, C / groups, R, S), ``conv_output`` (N, K, P, Q): every output element is a sum of C / groups * R * S."""
    return 2 * math.prod(conv_output) * math.prod(weight[1:])


@register_flop_formula(_operators.conv2d_fprop)
def _(input, weight, bias, stride, padding, dilation, groups, output_size, relu, *, out_shape, **_) -> int:
    return _conv2d_flops(weight, out_shape)


@register_flop_formula(_operators.conv2d_relu_max_pool2d_fprop)
def _(input, weight, bias, stride, padding, dilation, groups, conv_size, *_, **__) -> int:
    return _conv2d_flops(weight, (input[0], weight[0], *conv_size))


@register_flop_formula(_operators.conv2d_dgrad)
def _(dz, weight, *_, **__) -> int:
    return _conv2d_flops(weight, dz)


@register_flop_formula(_operators.conv2d_wgrad)
def _(dz, input, weight, *_, **__) -> int:
    return _conv2d_flops(weight, dz)


@register_flop_formula(_operators.linear_fprop)
def _(input, weight, *_, **__) -> int:
    return 2 * input[0] * math.prod(weight)


@register_flop_formula([_operators.linear_dgrad, _operators.linear_wgrad])
def _(dz, other, *_, **__) -> int:
    return 2 * math.prod(dz) * other[1]
