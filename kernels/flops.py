"""FLOP formulas of the operators for :class:`torch.utils.flop_counter.FlopCounterMode`, by PyTorch's own conventions.

A multiply-add counts as two FLOPs; bias, activation and pooling count as none. One formula differs from PyTorch's: PyTorch
counts the weight gradient of a grouped convolution as if there were no groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import matrix_product  # noqa: F401 (defines operators)
from .convolution import autograd, relu_max_pool2d  # noqa: F401 (define operators)

_operators: Any = torch.ops.alexnet_triton


def _conv2d_flops(weight: Sequence[int], conv_output: Sequence[int]) -> int:
    """FLOPs for ``weight`` (K, C / groups, R, S) and ``conv_output`` (N, K, P, Q): C / groups * R * S products per output."""
    return 2 * math.prod(conv_output) * math.prod(weight[1:])


@register_flop_formula(_operators.conv2d_fprop)
def _(input, weight, *_, out_shape, **__) -> int:
    output, _link = out_shape
    return _conv2d_flops(weight, output)


@register_flop_formula(_operators.conv2d_relu_max_pool2d_fprop)
def _(input, weight, bias, link, stride, padding, dilation, groups, conv_size, *_, **__) -> int:
    return _conv2d_flops(weight, (input[0], weight[0], *conv_size))


@register_flop_formula(_operators.conv2d_backward)
def _(grad_output, input, weight, output, stride, padding, dilation, groups, wanted, *_, **__) -> int:
    return _conv2d_flops(weight, grad_output) * sum(wanted[:2])


@register_flop_formula(_operators.conv2d_relu_max_pool2d_backward)
def _(grad_output, input, cells, weight, position, input_size, stride, padding, dilation, groups, conv_size, *rest, **_) -> int:
    wanted = rest[3]
    return _conv2d_flops(weight, (grad_output[0], weight[0], *conv_size)) * sum(wanted[:2])


@register_flop_formula(_operators.linear_fprop)
def _(input, weight, *_, **__) -> int:
    return 2 * input[0] * math.prod(weight)


@register_flop_formula(_operators.linear_narrow_backward)
def _(grad_output, input, weight, output, seed, p, wanted, *_, **__) -> int:
    return 2 * input[0] * math.prod(weight) * sum(wanted[:2])


@register_flop_formula([_operators.linear_dgrad, _operators.linear_wgrad])
def _(dz, other, *_, **__) -> int:
    return 2 * math.prod(dz) * other[1]
