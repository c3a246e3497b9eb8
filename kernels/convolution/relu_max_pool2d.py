"""Convolution, bias, ReLU and max-pool as one operation that saves no unpooled activation for its backward pass.

The forward pass runs the convolution kernel (bias and ReLU in its epilogue) and the pool kernel, and frees the unpooled
output. For a strided first layer in half precision one kernel can do both (:mod:`.stem_pool`). The forward pass saves its input
and a one-byte window position for each output. That is enough for the backward pass: the gradient only reaches the element that
a window points at, and a special position marks a window whose gradient the ReLU stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..pooling.autograd import (
    check_positions_written,
    in_format,
    is_channels_last,
    max_pool2d_reference,
    new_position_and_index,
    pool_arguments,
    pool_backward,
    pool_backward_reference,
    run_max_pool2d_fprop,
)
from ..pooling.problem import MaxPool, MaxPoolGradient, Window
from ..runtime.arguments import check_output_format, check_tensors, checked, integer, pair
from ..runtime.backend import runs_triton
from ..runtime.derivatives import differentiable_by, has_tangent
from ..runtime.launch import new_output, new_output_like, nothing
from ..runtime.torch_interop import (
    Operator,
    OperatorFunction,
    apply_function,
    autocast_inputs,
    over,
    overridable,
    wants_grad,
)
from ..sums import ColumnSums
from . import row_stem, row_stem_wgrad, select, stem_pool, stem_pool_wgrad
from .autograd import check_link, conv2d_arguments, conv2d_reference, gradients, gradients_reference, new_gradients
from .cells import cells_size, depth_to_space, new_cells
from .problem import Geometry, PooledConvolution, PooledConvolutionGradients, Problem


def _run_fprop(
    input: Tensor, weight: Tensor, bias: Tensor | None, link: Tensor | None, problem: PooledConvolution
) -> tuple[Tensor, Tensor, Tensor]:
    geometry, conv_size, window, channels_last, write_position, input_is_cells = problem
    convolution = Problem.of(input.shape, weight, geometry, conv_size)
    keep_cells = not input_is_cells and write_position and link is None and select.reads_cells(convolution)
    made = select.input_cells(input, convolution) if keep_cells else None
    cells = input if input_is_cells else made
    if not select.fuses_pool(convolution, window):
        unpooled = select.fprop(input, weight, bias, convolution, True, cells)
        pooled, position, _ = run_max_pool2d_fprop(unpooled, MaxPool(window, channels_last, True, write_position, False))
    else:
        patches = select.input_cells(input, convolution) if cells is None else cells
        pooled, position = stem_pool.fprop(patches, weight, bias, convolution, window, channels_last, write_position)
    return pooled, position, nothing(input) if made is None else made


@torch.library.custom_op("alexnet_triton::conv2d_relu_max_pool2d_fprop", mutates_args=())
def conv2d_relu_max_pool2d_fprop(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    link: Tensor | None,
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
    input_is_cells: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled values and window positions, each (N, K, P, Q), NHWC or NCHW; the positions are empty if not wanted.

    The third result is what the backward pass of a strided first layer in half precision reads in place of ``input``: the cells
    of ``input``. It is empty where the backward pass reads ``input`` itself.
    ``link``: the link of ``input``, see :class:`.autograd.Conv2dFunction`.
    """
    window = (kernel_size, pool_stride, pool_padding, pool_size)
    problem = PooledConvolution.of(
        *(stride, padding, dilation, groups, conv_size),
        *window,
        channels_last,
        write_position,
        input_is_cells,
    )
    return _run_fprop(input, weight, bias, link, problem)


@conv2d_relu_max_pool2d_fprop.register_fake
def _(input, weight, bias, link, *flat):
    problem = PooledConvolution.of(*flat)
    geometry, conv_size, window, channels_last, write_position, input_is_cells = problem
    size = (input.shape[0], weight.shape[0], *window.output_size)
    pooled = new_output(size, input.dtype, input.device, channels_last=channels_last)
    position, _ = new_position_and_index(pooled, window.kernel_size, channels_last, write_position, False)
    cells = nothing(input)
    keeps_cells = not input_is_cells and write_position and link is None
    if keeps_cells and select.reads_cells(Problem.of(input.shape, weight, geometry, conv_size)):
        step = geometry.stride[0]
        cells = new_cells(input, step, cells_size(step, conv_size, weight.shape[2:]))
    return pooled, position, cells


def _run_backward(
    grad_output: Tensor,
    input: Tensor | None,
    cells: Tensor | None,
    weight: Tensor,
    position: Tensor,
    problem: PooledConvolutionGradients,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    input_size, geometry, conv_size, window, (needs_input, needs_weight, needs_bias), linked = problem
    convolution = Problem.of(input_size, weight, geometry, conv_size)
    unpooled_size = (input_size[0], weight.shape[0], *conv_size)
    d_weight, pooled_bias = nothing(weight), None
    # In half precision the input gradient reads the unpooled gradient, so the weight gradient reads it too. In TF32 the two
    # read it in different orders, and the pool writes each of them: a copy of one would read that one once more.
    apart = needs_input and select.reads_cells(convolution)
    if needs_weight and not apart and select.fuses_pool_wgrad(convolution, window):
        d_weight, pooled_bias = _pooled_wgrad(grad_output, input, cells, weight, position, convolution, needs_bias)
        if not needs_input:
            return nothing(weight), d_weight, pooled_bias, nothing(weight)
        needs_weight, needs_bias, cells = False, False, None
    # One pass writes the gradient before the ReLU (positions carry the ReLU's mask) and sums it to the bias's gradient.
    of_pool = MaxPoolGradient(unpooled_size, window, True, needs_input or needs_weight, needs_bias)
    dz, d_bias, unsummed = pool_backward(grad_output, position, of_pool)
    dx, dw, d_link = gradients(dz, input, weight, convolution, needs_input, needs_weight, linked, unsummed, cells)
    return dx, dw if needs_weight else d_weight, d_bias if pooled_bias is None else pooled_bias, d_link


def _pooled_wgrad(
    grad_output: Tensor,
    input: Tensor | None,
    cells: Tensor | None,
    weight: Tensor,
    position: Tensor,
    convolution: Problem,
    needs_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias (empty if not wanted) from the pooled output's gradient.

    In half precision no unpooled gradient is written; in TF32 it is written with the batch innermost.

    Args:
        input, cells: the images or, in half precision, their cells.
    """
    d_weight = new_output_like(weight)
    d_bias = new_output((weight.shape[0],), weight.dtype, weight.device) if needs_bias else None
    if not select.reads_cells(convolution):
        assert input is not None
        dz, sums = row_stem_wgrad.pool_gradient_by_batch(grad_output, position, convolution)
        vectors = [] if d_bias is None else [ColumnSums(sums, d_bias)]
        row_stem_wgrad.wgrad(dz, row_stem.dense_rows(input), d_weight, convolution, vectors)
    else:
        if cells is None:
            assert input is not None
            cells = select.input_cells(input, convolution)
        stem_pool_wgrad.wgrad(grad_output, cells, d_weight, convolution, position=position, d_bias=d_bias)
    return d_weight, nothing(weight) if d_bias is None else d_bias


@torch.library.custom_op("alexnet_triton::conv2d_relu_max_pool2d_backward", mutates_args=())
def conv2d_relu_max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor | None,
    cells: Tensor | None,
    weight: Tensor,
    position: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    conv_size: list[int],
    kernel_size: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
    wanted: list[bool],
    linked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, each empty unless ``wanted``, and of the input's link, empty unless ``linked``.

    Pass either ``input`` or its ``cells``.
    """
    window = Window(kernel_size, pool_stride, pool_padding, (1, 1), grad_output.shape[2:])
    geometry = Geometry(stride, padding, dilation, groups)
    problem = PooledConvolutionGradients(input_size, geometry, conv_size, window, wanted, linked)
    return _run_backward(grad_output, input, cells, weight, position, problem)


@conv2d_relu_max_pool2d_backward.register_fake
def _(grad_output, input, cells, weight, position, input_size, *arguments):
    wanted, linked = arguments[8:10]
    return new_gradients(grad_output, input_size, weight, wanted, linked)


_fprop_operator = Operator(conv2d_relu_max_pool2d_fprop, _run_fprop)
_backward_operator = Operator(conv2d_relu_max_pool2d_backward, _run_backward)


def _formula(
    ctx: Any, wanted: Sequence[bool], saved: tuple[Tensor | None, ...], grad_output: Tensor, *_: Any
) -> tuple[Tensor | None, ...]:
    link, input, cells, weight, position = saved
    assert weight is not None
    assert position is not None
    geometry, conv_size, window = ctx.problem[:3]
    if input is None:
        assert cells is not None
        input = depth_to_space(cells, weight.shape[1], geometry.stride[0])
        geometry = geometry._replace(padding=(0, 0))  # the cells contain the padding
    unpooled_size = (grad_output.shape[0], weight.shape[0], *conv_size)
    dz = pool_backward_reference(grad_output, position, unpooled_size, window)
    return gradients_reference(dz, input, weight, geometry, wanted, link)


@over(_fprop_operator)
class Conv2dReLUMaxPool2dFunction(OperatorFunction):
    """Convolution (+bias), ReLU, max-pool. Saves weight, positions, link and the input.

    A strided first layer in half precision saves the input's cells instead of the input.
    """

    takes_link = True
    internal = (1, 2)

    @staticmethod
    def forward(input, weight, bias, link, problem):
        return _fprop_operator((input, weight, bias, link), problem)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        input, weight, _, link, problem = inputs
        _, position, made = output
        ctx.mark_non_differentiable(*[saved for saved in (position, made) if saved is not None])
        cells = input if problem.input_is_cells else made
        has_cells = cells is not None and cells.dim() == 4
        # A double backward differentiates with respect to the images, not to the cells that this pass made of them.
        leads_on = input.requires_grad or torch._C._are_functorch_transforms_active()
        saved = None if has_cells and (problem.input_is_cells or not leads_on) else input
        ctx.save_for_backward(link, saved, cells if has_cells else None, weight, position)
        ctx.set_materialize_grads(False)  # allocate no zeros as the gradient of the positions
        ctx.input_size = input.shape
        ctx.problem = problem
        ctx.input_is_nchw = not is_channels_last(input)
        ctx.linked = link is not None

    @staticmethod
    @differentiable_by(_formula, of=(1, 3), takes_link=True)
    def backward(ctx: Any, saved: tuple[Tensor | None, ...], grad_output: Tensor, *_: Any):
        input, cells, weight, position = saved[1:]
        geometry, conv_size, window, _, write_position, _ = ctx.problem
        check_positions_written(write_position)
        wanted = ctx.needs_input_grad[:3]
        problem = PooledConvolutionGradients(ctx.input_size, geometry, conv_size, window, wanted, ctx.linked)
        tensors = (grad_output, input if cells is None else None, cells, weight, position)
        dx, dw, d_bias, d_link = _backward_operator(tensors, problem)
        return (
            (dx.contiguous() if ctx.input_is_nchw else dx) if wanted[0] else None,
            dw if wanted[1] else None,
            d_bias if wanted[2] else None,
            d_link if ctx.linked and wanted[0] else None,
            None,
        )


_fprop_operator.register_autograd(Conv2dReLUMaxPool2dFunction, PooledConvolution.of, tensors=4)


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
    """Reference for :func:`conv2d_relu_max_pool2d` in PyTorch operations."""
    activation = conv2d_reference(input, weight, bias, stride, padding, dilation, groups, activation="relu")
    pooled = max_pool2d_reference(activation, pool_kernel_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    assert isinstance(pooled, Tensor)
    return in_format(pooled, output_format)


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
    link: Tensor | None = None,
    cells: bool = False,
) -> Tensor:
    """``max_pool2d(relu(conv2d(...)))`` that saves only its input and one byte for each output for the backward pass.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as :func:`kernels.conv2d`.
        pool_kernel_size, pool_stride, pool_padding, ceil_mode: as :func:`kernels.max_pool2d`.
        output_format: ``torch.contiguous_format`` for an output that is NCHW in memory, so that flattening it is a view;
            ``torch.channels_last`` or None for NHWC.
        link: the link that :func:`kernels.linked_conv2d` returned beside ``input``, if this call is the only reader of
            ``input``.
        cells: whether ``input`` is the result of :func:`kernels.space_to_depth`, (N, rows, columns, stride * stride * C),
            which contains the padding. Then ``padding`` must be 0, ``link`` None, and ``input`` must not
            require a gradient (ValueError).

    Returns:
        Pooled values (N, K, P, Q) or (K, P, Q) in ``input``'s dtype, channels-last in memory unless ``output_format`` is NCHW.

    Raises:
        TypeError, ValueError: as :func:`kernels.linked_conv2d` and :func:`kernels.max_pool2d`; ValueError for any other
            ``output_format``.
    """
    channels_last = output_format is None or check_output_format(output_format)
    cells = bool(cells)
    input, weight, bias = autocast_inputs(input, weight, bias)
    check_tensors(input=input, weight=weight, bias=bias)
    use_triton = runs_triton(input) and not (forward_ad._current_level >= 0 and has_tangent(input, weight, bias))
    if cells:
        images = _check_cells(input, weight, stride, padding, groups, link)
        steps = pair("stride", stride, 1)
        if not (use_triton and reads_cells(input, weight, steps, dilation, groups)):
            input, cells = depth_to_space(input, images[1], steps[0]), False
    batched = input.unsqueeze(0) if input.dim() == 3 else input
    geometry, conv_size = checked(
        conv2d_arguments,
        *(images if cells else batched.shape, weight.shape, None if bias is None else bias.shape),
        *(stride, padding, dilation, groups),
    )
    window = checked(pool_arguments, conv_size, pool_kernel_size, pool_stride, pool_padding, 1, ceil_mode, "pool_")
    check_link(link, batched)
    if not use_triton:
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
            ceil_mode=bool(ceil_mode),
            output_format=output_format,
        )
    needs_grad = wants_grad(input, weight, bias)
    problem = PooledConvolution(geometry, conv_size, window, channels_last, needs_grad, cells)
    pooled, *_ = apply_function(Conv2dReLUMaxPool2dFunction, (batched, weight, bias, link), problem)
    return pooled.squeeze(0) if input.dim() == 3 else pooled


def prepare_conv2d_relu_max_pool2d(
    tensors: Sequence[Tensor | None], options: tuple[Any, ...], needs_grad: bool
) -> PooledConvolution:
    """The problem that :class:`Conv2dReLUMaxPool2dFunction` takes when it runs as part of a sequence (:mod:`kernels.sequence`).

    Options: stride, padding, dilation, groups; the pool's kernel_size, stride, padding and ceil_mode; whether the output is
    NHWC; whether the input is cells.
    """
    *geometry, kernel_size, pool_stride, pool_padding, ceil_mode, channels_last, cells = options
    input, weight, bias, link = tensors
    check_tensors(input=input, weight=weight, bias=bias)
    assert input is not None
    assert weight is not None
    size: Sequence[int] = input.shape
    if cells:
        stride, padding, _, groups = geometry
        size = _check_cells(input, weight, stride, padding, groups, link)
    bias_size = None if bias is None else bias.shape
    convolution, conv_size = checked(conv2d_arguments, tuple(size), weight.shape, bias_size, *geometry)
    window = checked(pool_arguments, conv_size, kernel_size, pool_stride, pool_padding, 1, ceil_mode, "pool_")
    return PooledConvolution(convolution, conv_size, window, channels_last, needs_grad, cells)


def reads_cells(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> bool:
    """Whether :func:`conv2d_relu_max_pool2d` first rearranges ``input`` into cells, a step that ``cells=True`` skips.

    True if a strided first layer of few channels runs through tensor descriptors with the current backend: in half precision,
    on Hopper and data-centre Blackwell.

    Args:
        input: the images (N, C, H, W) or their cells; only the dtype, the device and whether the tensor is empty matter.
        weight, stride, dilation, groups: as :func:`kernels.conv2d`.
    """
    if not runs_triton(input):
        return False
    geometry = Geometry(pair("stride", stride, 1), (0, 0), pair("dilation", dilation, 1), integer("groups", groups))
    size = (input.shape[0] if input.numel() else 0, 0, 1, 1)
    return select.reads_cells(Problem.of(size, weight, geometry, (1, 1))._replace(dtype=input.dtype, device=input.device))


def _check_cells(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    groups: int,
    link: Tensor | None,
) -> tuple[int, int, int, int]:
    """The size (N, C, H, W) of the padded images that the cells ``input`` contain.

    Raises:
        ValueError: ``input`` cannot be a result of :func:`kernels.space_to_depth`, or an option does not fit cells.
    """
    check_tensors(input=input, weight=weight)
    if weight.dim() != 4 or groups != 1:
        raise ValueError(f"cells need one group of filters (K, C, R, S), got weight {tuple(weight.shape)}, groups={groups}")
    step, other = pair("stride", stride, 1)
    if step != other or padding not in (0, (0, 0), [0, 0], "valid") or link is not None:
        raise ValueError(f"cells have one stride, need padding 0 and take no link; got stride {stride}, padding {padding}")
    if input.requires_grad:
        raise ValueError("cells take no gradient: pass the images themselves if you need their gradient")
    depth = step * step * weight.shape[1]
    if input.dim() != 4 or input.shape[3] != depth or not input.is_contiguous():
        raise ValueError(f"cells must be contiguous (N, rows, columns, {depth}), got {tuple(input.shape)}")
    return input.shape[0], weight.shape[1], input.shape[1] * step, input.shape[2] * step
