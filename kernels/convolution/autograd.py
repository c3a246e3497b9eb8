"""2-D convolution with fused bias and ReLU: the registered operators, their autograd Function and the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..pooling.autograd import in_format, is_channels_last
from ..runtime.arguments import ArgumentValueError, check_activation, check_output_format, check_tensors, checked, integer, pair
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
)
from ..sums import ColumnSums, epilogue_backward, sum_vectors
from .by_batch import Copy
from .descriptor import dense_nhwc
from .problem import Convolution, ConvolutionGradients, Geometry, Problem
from .select import copies_by_batch, dgrad, fprop, wgrad, wgrad_by_batch


def _run_fprop(
    input: Tensor, weight: Tensor, bias: Tensor | None, link: Tensor | None, problem: Convolution
) -> tuple[Tensor, Tensor]:
    convolution = Problem.of(input.shape, weight, problem.geometry, problem.output_size)
    output = fprop(input, weight, bias, convolution, problem.relu, channels_last=problem.channels_last)
    return output, _new_link(weight, problem.make_link)


@torch.library.custom_op("alexnet_triton::conv2d_fprop", mutates_args=())
def conv2d_fprop(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    link: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_size: list[int],
    relu: bool,
    make_link: bool,
    channels_last: bool = True,
) -> tuple[Tensor, Tensor]:
    """The output of :func:`.select.fprop`, and with ``make_link`` the link of its ReLU (:class:`Conv2dFunction`), else empty.

    ``link``: the link of the ReLU that produced ``input``, or None.
    """
    problem = Convolution.of(stride, padding, dilation, groups, output_size, relu, make_link, channels_last)
    return _run_fprop(input, weight, bias, link, problem)


@conv2d_fprop.register_fake
def _(input, weight, bias, link, stride, padding, dilation, groups, output_size, relu, make_link, channels_last=True):
    size = (input.shape[0], weight.shape[0], *output_size)
    return new_output(size, input.dtype, input.device, channels_last=channels_last), _new_link(weight, make_link)


def _new_link(weight: Tensor, make_link: bool) -> Tensor:
    return new_output((weight.shape[0],), weight.dtype, weight.device) if make_link else nothing(weight)


@torch.library.custom_op("alexnet_triton::conv2d_backward", mutates_args=())
def conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wanted: list[bool],
    linked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, each empty unless ``wanted``, and of the input's link, empty unless ``linked``.

    ``output``: the forward output if this pass must apply the ReLU's mask; None without a ReLU, or if the consumer of the
    output's link has applied the mask already.
    """
    problem = ConvolutionGradients(Geometry(stride, padding, dilation, groups), wanted, linked)
    return _run_backward(grad_output, input, weight, output, problem)


def _run_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, output: Tensor | None, problem: ConvolutionGradients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_input, needs_weight, needs_bias = problem.wanted
    masked = output is not None and (needs_input or needs_weight)
    dz, d_bias = grad_output, nothing(grad_output)
    unsummed: list[ColumnSums] = []
    if masked or needs_bias:
        written, d_bias, unsummed = epilogue_backward(grad_output, output, write_dz=masked, sum_columns=needs_bias)
        dz = written if masked else dz
    convolution = Problem.of(input.shape, weight, problem.geometry, grad_output.shape[2:])
    dx, dw, d_link = gradients(dz, input, weight, convolution, needs_input, needs_weight, problem.linked, unsummed)
    return dx, dw, d_bias, d_link


@conv2d_backward.register_fake
def _(grad_output, input, weight, output, stride, padding, dilation, groups, wanted, linked):
    return new_gradients(grad_output, input.shape, weight, wanted, linked)


def new_gradients(
    grad_output: Tensor, input_size: Sequence[int], weight: Tensor, wanted: Sequence[bool], linked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the four results of :func:`conv2d_backward`, uninitialised; a result that is not wanted is empty."""
    dtype, device = grad_output.dtype, grad_output.device
    needs_input, needs_weight, needs_bias = wanted
    dx = new_output(input_size, dtype, device, channels_last=True) if needs_input else nothing(grad_output)
    dw = new_output_like(weight) if needs_weight else nothing(grad_output)
    d_bias = new_output((weight.shape[0] if needs_bias else 0,), dtype, device)
    return dx, dw, d_bias, new_output((input_size[1] if needs_input and linked else 0,), dtype, device)


def gradients(
    dz: Tensor,
    input: Tensor | None,
    weight: Tensor,
    problem: Problem,
    needs_input: bool,
    needs_weight: bool,
    linked: bool,
    unsummed: Sequence[ColumnSums],
    cells: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the input's link. Only the kernels of the gradients that are needed are launched.

    Args:
        dz: gradient before the activation, (N, K, P, Q).
        input: the input; None if ``cells`` replaces it.
        linked: whether the input has a link.
        unsummed: pending sums, which this function's last launch adds up.
        cells: :func:`.cells.cells_of` the input.
    """
    dx, dw, d_link = (nothing(dz) for _ in range(3))
    copies: Sequence[Copy] = ()
    if needs_input and needs_weight and cells is None and wgrad_by_batch(problem):
        # The input gradient's launch reads ``dz`` anyway, so that launch writes the copies too.
        assert input is not None
        dz = dense_nhwc(dz).permute(0, 3, 1, 2)
        copies = copies_by_batch(dz, input, problem)
    if needs_input:
        dx, d_link, of_link = dgrad(dz, weight, problem, input if linked else None, copies)
        unsummed = [*unsummed, *of_link]
    if needs_weight:
        dw = wgrad(dz, input, weight, problem, unsummed, cells, copies)
    else:
        sum_vectors(unsummed)
    return dx, dw, d_link


def gradients_reference(
    dz: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool], link: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Reference for :func:`gradients` in PyTorch operations: gradients of input, weight, bias and link, None if not wanted.

    Args:
        dz: gradient before the activation.
        wanted: which gradients to compute, in the order input, weight, bias, link.
        link: the link of ``input``, or None.
    """
    stride, padding, dilation, groups = geometry
    needed = [
        (outputs - 1) * step + distance * (filter_size - 1) + 1 - size - 2 * before
        for outputs, step, distance, filter_size, size, before in zip(
            dz.shape[2:], stride, dilation, weight.shape[2:], input.shape[2:], padding, strict=True
        )
    ]
    below, right = (max(0, rows) for rows in needed)  # padding="same" may pad one more below and right
    padded = F.pad(input, (0, right, 0, below)) if below or right else input
    mask = [wanted[0] or wanted[3], wanted[1], wanted[2]]
    dx, dw, d_bias = torch.ops.aten.convolution_backward(
        dz, padded, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, mask
    )
    d_link = None
    if dx is not None:
        if padded is not input:
            dx = dx[:, :, : input.shape[2], : input.shape[3]]
        if link is not None:
            dx = dx.masked_fill(input <= 0, 0)
            d_link = dx.sum((0, 2, 3))
    return dx, dw, d_bias, d_link


conv2d_fprop_operator = Operator(conv2d_fprop, _run_fprop)
conv2d_backward_operator = Operator(conv2d_backward, _run_backward)

# ------------------------------------------------------------------------------------------------- autograd Function


def _formula(
    ctx: Any,
    wanted: Sequence[bool],
    saved: tuple[Tensor | None, Tensor, Tensor, Tensor | None],
    grad_output: Tensor,
    grad_link: Tensor | None,
) -> tuple[Tensor | None, ...]:
    link, input, weight, output = saved
    handed_over = ctx.problem.make_link and grad_link is not None
    dz = grad_output if handed_over or output is None else grad_output.masked_fill(output <= 0, 0)
    dx, dw, d_bias, d_link = gradients_reference(dz, input, weight, ctx.problem.geometry, wanted, link)
    return dx, dw, grad_link if handed_over else d_bias, d_link


@over(conv2d_fprop_operator)
class Conv2dFunction(OperatorFunction):
    """Convolution (+bias, +ReLU). Saves its input, weight and link, and with a ReLU its output, whose sign is the mask.

    The second output, the link, carries no data. The convolution that takes the link must be the output's only reader: its
    backward pass applies this ReLU's mask and sums this bias's gradient, which saves two passes over memory. So the gradient
    of a linked output is already the gradient before this ReLU, and the link's gradient is this bias's gradient.
    """

    takes_link = gives_link = True

    @staticmethod
    def forward(input, weight, bias, link, problem):
        return conv2d_fprop_operator((input, weight, bias, link), problem)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor | None]) -> None:
        input, weight, _, link, problem = inputs
        y, new_link = output
        ctx.save_for_backward(link, input, weight, y if problem.relu else None)
        ctx.set_materialize_grads(False)  # the gradient of a link that no convolution took is None
        if not problem.make_link and new_link is not None:
            ctx.mark_non_differentiable(new_link)
        ctx.problem = problem
        ctx.linked = link is not None
        ctx.input_is_nchw = not is_channels_last(input)

    @staticmethod
    @differentiable_by(_formula, of=(1, 2), takes_link=True)
    def backward(ctx: Any, saved: tuple[Tensor | None, ...], grad_output: Tensor, grad_link: Tensor | None):
        _, input, weight, output = saved
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        # Check make_link first: under torch.compile an unused output's gradient is zeros, not None.
        handed_over = ctx.problem.make_link and grad_link is not None
        masks = None if handed_over else output
        wanted = (needs_input, needs_weight, needs_bias and not handed_over)
        problem = ConvolutionGradients(ctx.problem.geometry, wanted, ctx.linked)
        dx, dw, d_bias, d_link = conv2d_backward_operator((grad_output, input, weight, masks), problem)
        return (
            (dx.contiguous() if ctx.input_is_nchw else dx) if needs_input else None,  # NCHW like the input
            dw if needs_weight else None,
            (grad_link if handed_over else d_bias) if needs_bias else None,
            d_link if needs_input and ctx.linked else None,
            None,
        )


conv2d_fprop_operator.register_autograd(Conv2dFunction, Convolution.of, tensors=4)

# --------------------------------------------------------------------------------------------------- public function


def conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    output_format: torch.memory_format | None = None,
) -> Tensor:
    """Reference for :func:`conv2d` in PyTorch operations. Without ``output_format`` PyTorch chooses the memory format."""
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return in_format(F.relu(output) if activation == "relu" else output, output_format)


def conv2d_arguments(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    bias_size: Sequence[int] | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Geometry, tuple[int, int]]:
    """Check a convolution's arguments; return its geometry and its output size (P, Q) as plain ints.

    Raises:
        TypeError: ``groups`` is not an int, or ``stride``, ``padding`` or ``dilation`` is not one or two ints.
        ArgumentValueError: a value that is too small, or sizes that do not fit each other.
    """
    if len(input_size) != 4:
        raise ArgumentValueError(f"input must be (N, C, H, W) or (C, H, W), got shape {tuple(input_size)}")
    if len(weight_size) != 4:
        raise ArgumentValueError(f"weight must be (K, C / groups, R, S), got shape {tuple(weight_size)}")
    groups = integer("groups", groups)
    if groups < 1:
        raise ArgumentValueError(f"groups must be a positive int, got {groups!r}")
    n, channels, height, width = input_size
    k, cg, r, s = weight_size
    if channels != cg * groups:
        raise ArgumentValueError(
            f"input has {channels} channels, but weight of shape {tuple(weight_size)} with groups={groups} expects "
            f"{cg} x {groups} = {cg * groups}"
        )
    if k == 0 or k % groups != 0:
        raise ArgumentValueError(f"weight must have a positive number of filters divisible by groups={groups}, got {k}")
    if bias_size is not None and tuple(bias_size) != (k,):
        raise ArgumentValueError(f"bias must have shape ({k},), one for each filter of weight, got {tuple(bias_size)}")
    if min(height, width) < 1 and n > 0:
        raise ArgumentValueError(f"only the batch of input may be empty, got shape {tuple(input_size)}")
    if min(cg, r, s) < 1:
        raise ArgumentValueError(f"weight must have no dimension of size 0, got shape {tuple(weight_size)}")
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    totals, before = _padding(padding, strides, dilations, (r, s))
    sizes = []
    for name, size, total, dil, filter_size, step in zip(
        ("height", "width"), (height, width), totals, dilations, (r, s), strides, strict=True
    ):
        span = dil * (filter_size - 1) + 1
        if size + total < span:
            raise ArgumentValueError(
                f"input's {name} {size} with {total} of padding is smaller than the filter's span of {span} "
                f"(weight {tuple(weight_size)}, dilation {dilations}): the output would be empty"
            )
        sizes.append((size + total - span) // step + 1)
    return Geometry(strides, before, dilations, groups), (sizes[0], sizes[1])


def _padding(
    padding: int | Sequence[int] | str, stride: tuple[int, int], dilation: tuple[int, int], filter_size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Total padding of (height, width), and the part before the first element of each."""
    if not isinstance(padding, str):
        before = pair("padding", padding, 0)
        return (2 * before[0], 2 * before[1]), before
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise ArgumentValueError(f'padding="same" needs stride 1, got stride {stride}')
        total = (dilation[0] * (filter_size[0] - 1), dilation[1] * (filter_size[1] - 1))
        return total, (total[0] // 2, total[1] // 2)
    raise ArgumentValueError(f'padding must be an int, two ints, "same" or "valid", got {padding!r}')


@overridable
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    output_format: torch.memory_format | None = None,
    link: Tensor | None = None,
) -> Tensor:
    """2-D convolution, bias and activation in one kernel, with the semantics of :func:`torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float16 or bfloat16 (float64 on the CPU), any strides.
        weight: (K, C / groups, R, S), dtype and device of ``input``.
        bias: (K,) or None.
        stride: int or (vertical, horizontal), in pixels.
        padding: zeros on each side, int or (vertical, horizontal), or ``"same"`` or ``"valid"``.
        dilation: distance of filter elements, int or (vertical, horizontal), in pixels.
        groups: number of groups that input and output channels are cut into.
        activation: None or ``"relu"``.
        output_format: ``torch.contiguous_format`` for an output that is NCHW in memory, which the kernel writes directly;
            ``torch.channels_last`` or None for NHWC.
        link: the link that :func:`linked_conv2d` returned beside ``input``, if this call is the only reader of ``input``.

    Returns:
        (N, K, P, Q) or (K, P, Q) with P = (H + 2 padding - dilation (R - 1) - 1) // stride + 1, in ``input``'s dtype,
        channels-last in memory unless ``output_format`` says NCHW. Products are summed in float32 (float64 for float64).
        float32 products follow ``torch.backends.cudnn.conv.fp32_precision`` (TF32 by PyTorch's default). Under autocast,
        inputs are cast as ``F.conv2d`` casts them.

    Raises:
        TypeError: a dtype that the kernels do not run, or dtypes that differ.
        ValueError: ranks, channels, devices, sizes or options that do not fit.
    """
    options = (stride, padding, dilation, groups, activation, output_format)
    return _conv2d(input, weight, bias, *options, link, make_link=False)[0]


@overridable
def linked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    link: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``conv2d(..., activation="relu")`` whose ReLU gradient is computed by the next convolution's backward pass.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as :func:`conv2d`.
        link: the link that this function returned beside ``input``, or None.

    Returns:
        The output and its link, a (K,) tensor without data. The link is None if no Triton kernel ran, and in compiled code,
        where the backward pass cannot see whether a convolution took the link. Pass both to exactly one more convolution
        (this function, :func:`conv2d` or :func:`kernels.conv2d_relu_max_pool2d`). Nothing else may read the output: the
        output's gradient is the gradient before the ReLU.

    Raises:
        TypeError, ValueError: as :func:`conv2d`; ValueError if the link and ``input`` differ in the number of channels.
    """
    # In compiled code the gradient of an unused link is zeros, not None, as if a convolution had taken the link.
    make_link = not torch.compiler.is_compiling()
    return _conv2d(input, weight, bias, stride, padding, dilation, groups, "relu", None, link, make_link=make_link)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    activation: str | None,
    output_format: torch.memory_format | None,
    link: Tensor | None,
    *,
    make_link: bool,
) -> tuple[Tensor, Tensor | None]:
    fuse_relu = check_activation(activation)
    channels_last = output_format is None or check_output_format(output_format)
    input, weight, bias = autocast_inputs(input, weight, bias)
    batched = input.unsqueeze(0) if isinstance(input, Tensor) and input.dim() == 3 else input
    geometry, size = _checked_arguments(batched, weight, bias, stride, padding, dilation, groups)
    check_link(link, batched)
    if not runs_triton(input) or (forward_ad._current_level >= 0 and has_tangent(input, weight, bias)):
        output = conv2d_reference(
            *(input, weight, bias, stride, padding, dilation, groups), activation=activation, output_format=output_format
        )
        return output, None
    problem = Convolution(geometry, size, fuse_relu, make_link, channels_last)
    output, new_link = apply_function(Conv2dFunction, (batched, weight, bias, link), problem)
    return output.squeeze(0) if input.dim() == 3 else output, new_link if make_link else None


def prepare_conv2d(tensors: Sequence[Tensor | None], options: tuple[Any, ...], needs_grad: bool) -> Convolution:
    """The problem that :class:`Conv2dFunction` takes when it runs as part of a sequence (:mod:`kernels.sequence`).

    Options: stride, padding, dilation, groups, whether to apply a ReLU, whether to make a link, whether the output is NHWC.
    """
    *geometry, fuse_relu, make_link, channels_last = options
    convolution, size = _checked_arguments(*tensors[:3], *geometry)  # type: ignore[arg-type]
    return Convolution(convolution, size, fuse_relu, make_link and needs_grad, channels_last)


def _checked_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Geometry, tuple[int, int]]:
    check_tensors(input=input, weight=weight, bias=bias)
    bias_size = None if bias is None else bias.shape
    return checked(conv2d_arguments, input.shape, weight.shape, bias_size, stride, padding, dilation, groups)


def check_link(link: Tensor | None, input: Tensor) -> None:
    """Raise ValueError unless ``link`` is None or has one element for each channel of ``input`` (N, C, H, W)."""
    if link is not None and link.shape != input.shape[1:2]:
        raise ValueError(f"link must be the one that was returned beside input, ({input.shape[1]},), got {tuple(link.shape)}")
