"""2-D max-pooling: forward with a one-byte window position, backward as a gather.

The forward pass stores, beside each maximum, its position in the window (r * S + s). For each input element, the backward pass
adds the gradients of the few windows that contain the element and point at it. So the backward pass needs no scatter and no
atomics, and its order of addition is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..configs.tables import apply_overrides, elementwise_config, largest_divisor, split_count, tile_size
from ..runtime.arguments import ArgumentValueError, check_output_format, check_tensors, checked, flag, pair
from ..runtime.backend import INTERPRETED, runs_triton
from ..runtime.derivatives import differentiable_by, has_tangent
from ..runtime.launch import cdiv, launch, needs_int64, new_output, nothing, strides
from ..runtime.torch_interop import (
    Operator,
    OperatorFunction,
    apply_function,
    over,
    overridable,
    wants_grad,
)
from ..sums import ColumnSums, accumulator_dtype, epilogue_backward, sum_vectors, triton_accumulator
from .kernels import _max_pool2d_dgrad_kernel, _max_pool2d_fprop_kernel, _max_pool2d_gather_dgrad_kernel
from .problem import MaxPool, MaxPoolGradient, Window


def pool_config(pixels: int, channels: int, channels_last: bool, wide: bool = False, scattered: bool = False) -> dict[str, int]:
    """BLOCK_PIXELS, BLOCK_CHANNELS and num_warps of a kernel over tiles of an image's pixels and channels.

    The block of the axis that is contiguous in memory is chosen first. A block of channels divides the channels if it can.
    A thread has eight elements, 16 bytes of a half type. It has four in NCHW or with int64 offsets (``wide``), whose offsets
    take registers. It has two with int64 offsets in float32 gradients whose channels are not contiguous (``scattered``).
    """
    if INTERPRETED:
        config = {"BLOCK_PIXELS": tile_size(pixels, 1, 512), "BLOCK_CHANNELS": tile_size(channels, 1, 128), "num_warps": 4}
        return apply_overrides(config)
    elements = 256 if wide and scattered else 512 if wide or not channels_last else 1024
    if channels_last:
        exact = largest_divisor(channels, 64)
        block_channels = exact if exact >= 16 else tile_size(channels, 1, 32)
        block_pixels = tile_size(pixels, 1, elements // block_channels)
    else:
        block_pixels = tile_size(pixels, 1, 256)
        block_channels = tile_size(channels, 1, elements // block_pixels)
    return apply_overrides({"BLOCK_PIXELS": block_pixels, "BLOCK_CHANNELS": block_channels, "num_warps": 4})


# ------------------------------------------------------------------------------------------------- launch functions


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a 4-D tensor is NHWC in memory, so that results computed from it should be NHWC too.

    Checks the strides: inside ``torch.func.vmap`` a tensor cannot be asked for its memory format.
    """
    (n, c, h, w), (step_n, step_c, step_h, step_w) = tensor.shape, tensor.stride()
    # The stride of a dimension of size 1 is arbitrary.
    batch = n == 1 or step_n == c * h * w
    last = (c == 1 or step_c == 1) and (w == 1 or step_w == c) and (h == 1 or step_h == w * c)
    first = (w == 1 or step_w == 1) and (h == 1 or step_h == w) and (c == 1 or step_c == h * w)
    return batch and last and not first


def in_format(output: Tensor, output_format: torch.memory_format | None) -> Tensor:
    """``output`` (N, C, H, W) or (C, H, W) in ``output_format``, copied if needed; None keeps the format as it is."""
    if output_format is None:
        return output
    if output.dim() == 3:
        return output.unsqueeze(0).contiguous(memory_format=output_format).squeeze(0)
    return output.contiguous(memory_format=output_format)


def position_dtype(kernel_size: Sequence[int]) -> torch.dtype:
    """uint8 if the window's positions and :func:`no_gradient` fit a byte (windows of up to 255 elements), else int32."""
    return torch.uint8 if kernel_size[0] * kernel_size[1] <= 255 else torch.int32


def no_gradient(dtype: torch.dtype) -> int:
    """The value stored in place of a position if the window's maximum is a ReLU's zero, which passes no gradient."""
    return torch.iinfo(dtype).max


def run_max_pool2d_fprop(input: Tensor, problem: MaxPool) -> tuple[Tensor, Tensor, Tensor]:
    """The implementation of the operator :func:`max_pool2d_fprop`."""
    window, channels_last, relu, write_position, write_index = problem
    n, c = input.shape[:2]
    kernel_size, _, _, _, output_size = window
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
        **_geometry(input.shape, window),
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
    """Pooled values, window positions and int64 indices (h * W + w), each (N, C, P, Q); empty if not wanted.

    With ``relu`` the input is a ReLU's output: a window whose maximum is zero gets :func:`no_gradient` as its position.
    """
    problem = MaxPool.of(kernel_size, stride, padding, dilation, output_size, channels_last, relu, write_position, write_index)
    return run_max_pool2d_fprop(input, problem)


def new_position_and_index(
    y: Tensor, kernel_size: Sequence[int], channels_last: bool, write_position: bool, write_index: bool
) -> tuple[Tensor, Tensor]:
    """Allocate window positions and int64 indices for the outputs ``y``, uninitialised; empty if not wanted."""
    dtype = position_dtype(kernel_size)
    position = new_output(y.shape, dtype, y.device, channels_last=channels_last) if write_position else nothing(y, torch.uint8)
    index = new_output(y.shape, torch.int64, y.device, channels_last=channels_last) if write_index else nothing(y, torch.int64)
    return position, index


@max_pool2d_fprop.register_fake
def _(input, kernel_size, stride, padding, dilation, output_size, channels_last, relu, write_position, write_index):
    y = new_output((*input.shape[:2], *output_size), input.dtype, input.device, channels_last=channels_last)
    return y, *new_position_and_index(y, kernel_size, channels_last, write_position, write_index)


#: The most positions of a window, or inputs of a cell, that a kernel unrolls.
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
    """Gradient of the pool's input, or of the preceding ReLU's input if the positions were written with ``relu``.

    The second result is that gradient's sum over all dimensions but the channels, (C,): the gradient of a bias before the ReLU.
    Both have ``grad_output``'s dtype; a result that is not wanted is empty.
    """
    window = Window(kernel_size, stride, padding, dilation, grad_output.shape[2:])
    return _run_dgrad(grad_output, position, MaxPoolGradient(input_size, window, channels_last, write_dx, sum_channels))


def _run_dgrad(grad_output: Tensor, position: Tensor, problem: MaxPoolGradient) -> tuple[Tensor, Tensor]:
    dx, sums, unsummed = pool_backward(grad_output, position, problem)
    sum_vectors(unsummed)
    return dx, sums


def pool_backward(grad_output: Tensor, position: Tensor, problem: MaxPoolGradient) -> tuple[Tensor, Tensor, list[ColumnSums]]:
    """The results of :func:`max_pool2d_dgrad`, and the pending sums that will fill the second result."""
    input_size, window, channels_last, write_dx, sum_channels = problem
    kernel_size, stride, padding, *_ = window
    if max(kernel_size[0] * kernel_size[1], stride[0] * stride[1]) > _WRITTEN_OUT:
        dx = _gather_dgrad(grad_output, position, problem)
        no_dx, sums = _new_dgrad(grad_output, input_size, channels_last, False, False)
        unsummed: list[ColumnSums] = []
        if sum_channels:
            _, sums, unsummed = epilogue_backward(dx, None, write_dz=False, sum_columns=True)
        return dx if write_dx else no_dx, sums, unsummed
    n, c, h, w = input_size
    dx, sums = _new_dgrad(grad_output, input_size, channels_last, write_dx, sum_channels)
    wide = needs_int64(dx, grad_output, position)
    cells = ((h - 1 + padding[0]) // stride[0] + 1) * ((w - 1 + padding[1]) // stride[1] + 1)
    scattered = channels_last and grad_output.stride(1) != 1 and grad_output.dtype == torch.float32
    config = pool_config(cells, c, channels_last, wide, scattered)
    blocks = n * cdiv(cells, config["BLOCK_PIXELS"])
    columns = cdiv(c, config["BLOCK_CHANNELS"])
    split = split_count(columns, max(blocks, 1), programs_per_multiprocessor=5)  # registers let five programs run at once
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
        **_geometry(input_size, window),
        NO_GRADIENT=no_gradient(position.dtype),
        CHANNELS_LAST=channels_last,
        WRITE_DX=write_dx,
        SUM_CHANNELS=sum_channels,
        WIDE=wide,
        ACC=triton_accumulator(dx.dtype),
        **config,
    )
    return dx, sums, [ColumnSums(partial, sums)] if sum_channels else []


def pool_backward_reference(grad_output: Tensor, position: Tensor, input_size: Sequence[int], window: Window) -> Tensor:
    """Reference for the first result of :func:`pool_backward` in PyTorch operations."""
    (_, s), stride, padding, dilation, (p, q) = window
    n, c, h, w = input_size
    place = position.long()
    rows = torch.arange(p, device=place.device)[:, None] * stride[0] - padding[0] + place // s * dilation[0]
    columns = torch.arange(q, device=place.device) * stride[1] - padding[1] + place % s * dilation[1]
    # A window may lie in the padding alone.
    outside = (rows < 0) | (rows >= h) | (columns < 0) | (columns >= w)
    stopped = outside | (position == no_gradient(position.dtype))
    index = (rows * w + columns).masked_fill(stopped, 0)
    passed = grad_output.masked_fill(stopped, 0)
    plane = grad_output.new_zeros(n, c, h * w)
    return plane.scatter_add(2, index.reshape(n, c, p * q), passed.reshape(n, c, p * q)).view(n, c, h, w)


def _new_dgrad(
    grad_output: Tensor, input_size: Sequence[int], channels_last: bool, write_dx: bool, sum_channels: bool
) -> tuple[Tensor, Tensor]:
    """Allocate the results of :func:`max_pool2d_dgrad`, uninitialised."""
    dtype, device = grad_output.dtype, grad_output.device
    dx = new_output((input_size[0] if write_dx else 0, *input_size[1:]), dtype, device, channels_last=channels_last)
    return dx, new_output((input_size[1],), dtype, device) if sum_channels else nothing(grad_output)


@max_pool2d_dgrad.register_fake
def _(grad_output, position, input_size, kernel_size, stride, padding, dilation, channels_last, write_dx, sum_channels):
    return _new_dgrad(grad_output, input_size, channels_last, write_dx, sum_channels)


def _gather_dgrad(grad_output: Tensor, position: Tensor, problem: MaxPoolGradient) -> Tensor:
    """The input gradient by the kernel that takes windows of any size."""
    input_size, window, channels_last, *_ = problem
    dx, _ = _new_dgrad(grad_output, input_size, channels_last, True, False)
    wide = needs_int64(dx, grad_output, position)
    config = elementwise_config(dx.numel(), wide=True)  # each window's offsets take registers, in int32 too
    launch(
        _max_pool2d_gather_dgrad_kernel,
        (cdiv(dx.numel(), config["BLOCK"]),),
        dy_ptr=grad_output,
        position_ptr=position,
        dx_ptr=dx,
        elements=dx.numel(),
        **strides("stride_dy", "ncpq", grad_output),
        **strides("stride_p", "ncpq", position),
        **_geometry(input_size, window),
        CHANNELS_LAST=channels_last,
        WIDE=wide,
        ACC=triton_accumulator(dx.dtype),
        **config,
    )
    return dx


def _geometry(input_size: Sequence[int], window: Window) -> dict[str, int]:
    """The compile-time constants of a pool's kernels: all sizes but the batch size."""
    (r, s), stride, padding, dilation, (p, q) = window
    _, c, h, w = input_size
    constants = {"C": c, "H": h, "W": w, "P": p, "Q": q, "R": r, "S": s}
    for name, (vertical, horizontal) in (("STRIDE", stride), ("PAD", padding), ("DILATION", dilation)):
        constants |= {f"{name}_H": vertical, f"{name}_W": horizontal}
    return constants


# ------------------------------------------------------------------------------------------------- autograd Function


def check_positions_written(written: bool) -> None:
    """Raise RuntimeError if the forward pass of a pool did not write the positions that its backward pass needs."""
    if not written:
        raise RuntimeError(
            "this max-pool was recorded without the window positions that its gradient needs: its graph was made under "
            "torch.no_grad() or from tensors that require no gradient"
        )


_fprop_operator = Operator(max_pool2d_fprop, run_max_pool2d_fprop)
_dgrad_operator = Operator(max_pool2d_dgrad, _run_dgrad)


def _formula(ctx: Any, wanted: Sequence[bool], saved: tuple[Tensor], grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (pool_backward_reference(grad_output, saved[0], ctx.input_size, ctx.problem.window),)


@over(_fprop_operator)
class MaxPool2dFunction(OperatorFunction):
    """Max-pool. Saves one byte for each output: the maximum's position in its window."""

    internal = (1,)

    @staticmethod
    def forward(input, problem):
        return _fprop_operator((input,), problem)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        input, problem = inputs
        _, position, index = output
        ctx.save_for_backward(position)
        if index is None:
            ctx.mark_non_differentiable(position)
        else:
            ctx.mark_non_differentiable(position, index)
        ctx.set_materialize_grads(False)  # allocate no zeros as the gradient of the positions
        ctx.problem = problem
        ctx.input_size = input.shape
        ctx.channels_last = is_channels_last(input)

    @staticmethod
    @differentiable_by(_formula)
    def backward(ctx: Any, saved: tuple[Tensor], grad_output: Tensor, *_: Any):
        window, _, _, write_position, _ = ctx.problem
        check_positions_written(write_position)
        (position,) = saved
        problem = MaxPoolGradient(ctx.input_size, window, ctx.channels_last, True, False)
        dx, _ = _dgrad_operator((grad_output, position), problem)
        return dx, None


_fprop_operator.register_autograd(MaxPool2dFunction, MaxPool.of, tensors=1)


# --------------------------------------------------------------------------------------------------- public function


def max_pool2d_reference(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    output_format: torch.memory_format | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference for :func:`max_pool2d`: PyTorch's own operation."""
    options = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    result = F.max_pool2d(input, *options)  # type: ignore[call-overload]
    if return_indices:
        return in_format(result[0], output_format), in_format(result[1], output_format)
    return in_format(result, output_format)


def pool_arguments(
    size: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
    prefix: str = "",
) -> Window:
    """Check the arguments of a pool over (height, width) = ``size``; return its windows as plain ints.

    Raises:
        TypeError: ``kernel_size``, ``stride``, ``padding`` or ``dilation`` is not one or two ints, or ``ceil_mode`` is no bool.
        ArgumentValueError: a value that is too small, padding larger than half a window, or an empty output.
    """
    window = pair(f"{prefix}kernel_size", kernel_size, 1)
    no_stride = stride is None or (isinstance(stride, Sequence) and len(stride) == 0)
    steps = window if no_stride else pair(f"{prefix}stride", stride, 1)  # type: ignore[arg-type]
    pads = pair(f"{prefix}padding", padding, 0)
    dilations = pair(f"{prefix}dilation", dilation, 1)
    ceil_mode = flag("ceil_mode", ceil_mode)
    output = []
    for axis, name in enumerate(("height", "width")):
        if pads[axis] > window[axis] // 2:
            raise ArgumentValueError(
                f"{prefix}padding must be at most half of {prefix}kernel_size: {pads} with {prefix}kernel_size {window}"
            )
        span = dilations[axis] * (window[axis] - 1) + 1
        free = size[axis] + 2 * pads[axis] - span
        count = (-(-free // steps[axis]) if ceil_mode else free // steps[axis]) + 1
        # A window that would start beyond the image and its left padding is dropped.
        if ceil_mode and (count - 1) * steps[axis] >= size[axis] + pads[axis]:
            count -= 1
        if count < 1:
            raise ArgumentValueError(
                f"the pool's input {name} {size[axis]} with padding {pads[axis]} is smaller than the window's span of "
                f"{span} ({prefix}kernel_size {window}, {prefix}dilation {dilations}): the output would be empty"
            )
        output.append(count)
    return Window(window, steps, pads, dilations, (output[0], output[1]))


def prepare_max_pool2d(tensors: Sequence[Tensor | None], options: tuple[Any, ...], needs_grad: bool) -> MaxPool:
    """The problem that :class:`MaxPool2dFunction` takes when it runs as part of a sequence (:mod:`kernels.sequence`).

    Options: kernel_size, stride, padding, dilation, ceil_mode, output_format.
    """
    (input,) = tensors
    check_tensors(input=input)
    assert input is not None
    *of_window, output_format = options
    window = checked(pool_arguments, input.shape[-2:], *of_window)
    channels_last = is_channels_last(input) if output_format is None else check_output_format(output_format)
    return MaxPool(window, channels_last, False, needs_grad, False)


@overridable
def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    output_format: torch.memory_format | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """2-D max-pooling with the semantics of :func:`torch.nn.functional.max_pool2d`, ties and NaN included.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float16 or bfloat16 (float64 on the CPU), any strides.
        kernel_size: int or (rows, columns) of the window, in elements.
        stride: int or two ints, in elements; ``kernel_size`` by default.
        padding: elements of -inf on each side, at most half of ``kernel_size``; int or two ints.
        dilation: distance of window elements, int or two ints.
        ceil_mode: count the last, partial window too.
        return_indices: return PyTorch's int64 indices (h * W + w in the input's plane) as well.
        output_format: ``torch.contiguous_format`` for results that are NCHW in memory, ``torch.channels_last`` for NHWC, None
            for NHWC if ``input`` is channels-last, else NCHW.

    Returns:
        (N, C, P, Q) or (C, P, Q) in ``input``'s dtype; with ``return_indices`` a pair of the output and the indices. For the
        backward pass one byte is kept for each output (four for windows of more than 255 elements).

    Raises:
        TypeError: a dtype that the kernels do not run.
        ValueError: ranks, sizes or options that do not fit.
    """
    return_indices = bool(return_indices)
    channels_last = output_format is not None and check_output_format(output_format)
    check_tensors(input=input)
    if input.dim() not in (3, 4):
        raise ArgumentValueError(f"input must be (N, C, H, W) or (C, H, W), got shape {tuple(input.shape)}")
    if input.shape[-3] == 0:
        raise ArgumentValueError(f"only the batch of input may be empty, got shape {tuple(input.shape)}")
    window = checked(pool_arguments, input.shape[-2:], kernel_size, stride, padding, dilation, ceil_mode)
    if not runs_triton(input) or (forward_ad._current_level >= 0 and has_tangent(input)):
        options = (kernel_size, stride, padding, dilation, bool(ceil_mode), return_indices, output_format)
        return max_pool2d_reference(input, *options)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    if output_format is None:
        channels_last = is_channels_last(batched)
    problem = MaxPool(window, channels_last, False, wants_grad(input), return_indices)
    y, _, index = apply_function(MaxPool2dFunction, (batched,), problem)
    if input.dim() == 3:
        y, index = y.squeeze(0), index.squeeze(0) if return_indices else index
    return (y, index) if return_indices else y
