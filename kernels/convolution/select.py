"""Which kernels run a convolution's passes: the one place where that is decided.

Where is the gradient of conv1's weight computed on an H100? :func:`wgrad_kernels` says: in half precision, of stride 4 and one
channel, by ``Kernels.STEM``, which is :func:`.stem.wgrad`. The launch functions of each file run what is chosen here.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from torch import Tensor

from ..pooling.problem import Window
from ..runtime.backend import HALF, capability, has_copy_engine
from ..runtime.launch import cdiv, new_output_like, nothing
from ..sums import ColumnSums, epilogue_backward
from . import descriptor, general, stem
from .cells import cells_of
from .problem import Problem
from .rules import conv2d_stem_pool_fused, conv2d_wgrad_by_images


class Kernels(enum.Enum):
    """A file of kernels, by its name."""

    GENERAL = "general"
    DESCRIPTOR = "descriptor"
    STEM = "stem"


def fprop_kernels(problem: Problem) -> Kernels:
    """The forward pass's."""
    if _takes_descriptors(problem):
        return Kernels.DESCRIPTOR
    return Kernels.STEM if _is_stem(problem) else Kernels.GENERAL


def dgrad_kernels(problem: Problem) -> Kernels:
    """The gradient of the input's."""
    if _takes_descriptors(problem):
        return Kernels.DESCRIPTOR
    # The cells' gradient is a convolution by descriptors, of the cells' channels.
    cells = problem.c * problem.geometry.stride[0] ** 2
    return Kernels.STEM if _is_stem(problem) and problem.k % 16 == 0 and cells % 16 == 0 else Kernels.GENERAL


def wgrad_kernels(problem: Problem) -> Kernels:
    """The gradient of the weight's. A step of the fast ones' sum is one pixel of many images."""
    return fprop_kernels(problem) if conv2d_wgrad_by_images(problem.n) else Kernels.GENERAL


def reads_cells(problem: Problem) -> bool:
    """Whether the forward pass reads its input's cells, and so may the gradient of the weight, whatever the batch."""
    return _is_stem(problem)


def fuses_pool(problem: Problem, window: Window) -> bool:
    """Whether :mod:`.stem_pool` runs convolution, ReLU and pool: windows 3 x 3, 2 apart, all of them whole.

    On Hopper alone: of its loop Triton 3.8 makes a pipeline with a stage for each product for Blackwell, and then empty code.
    """
    kernel_size, stride, padding, _, (p, q) = window
    folded = stem.fold(problem.c, problem.s, problem.geometry.stride[0])
    return (
        _is_stem(problem)
        and capability(problem.device) < 100
        and tuple(kernel_size) == (3, 3)
        and tuple(stride) == (2, 2)
        and max(padding) == 0
        and 2 * p + 1 <= problem.p
        and 2 * q + 1 <= problem.q
        and conv2d_stem_pool_fused(problem.device, problem.n, p, q, folded, problem.k)
    )


def _takes_descriptors(problem: Problem) -> bool:
    """Half precision, stride and dilation 1, one group, channels and filters in multiples of 16, sm_90 and later."""
    return (
        problem.dtype in HALF
        and has_copy_engine(problem.device)
        and not problem.is_irregular
        and problem.c % 16 == 0
        and problem.k % 16 == 0
        and problem.n > 0
    )


def _is_stem(problem: Problem) -> bool:
    """Whether cells make this strided convolution one of three rows of 48 or 144 positions, for descriptors."""
    (step, other), _, dilation, groups = problem.geometry
    return (
        problem.dtype in HALF
        and has_copy_engine(problem.device)
        and groups == 1
        and max(dilation) == 1
        and other == step
        and step > 1
        and cdiv(problem.r, step) == 3
        and problem.c * step * step % 8 == 0
        and stem.fold(problem.c, problem.s, step) in (48, 144)
        and problem.k % 8 == 0
        and problem.n > 0
    )


# -------------------------------------------------------------------------------------------------------------- passes


def fprop(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    problem: Problem,
    relu: bool,
    cells: Tensor | None = None,
    channels_last: bool = True,
) -> Tensor:
    """Convolution, bias, ReLU: (N, C, H, W) and (K, C / groups, R, S) to (N, K, P, Q).

    Args:
        cells: :func:`.cells.cells_of` the input, if they are there already.
        channels_last: whether the result is NHWC in memory, or NCHW.
    """
    kernels = fprop_kernels(problem)
    if kernels == Kernels.DESCRIPTOR:
        return descriptor.fprop(input, weight, bias, problem, relu, channels_last)
    if kernels == Kernels.STEM:
        cells = input_cells(input, problem) if cells is None else cells
        return stem.fprop(cells, weight, bias, problem, relu, channels_last)
    return general.fprop(input, weight, bias, problem, relu, channels_last)


def input_cells(input: Tensor, problem: Problem) -> Tensor:
    """The cells that a problem of :func:`reads_cells` reads."""
    stride, padding, *_ = problem.geometry
    return cells_of(input, stride[0], padding, (problem.p, problem.q), (problem.r, problem.s))


def dgrad(
    dz: Tensor, weight: Tensor, problem: Problem, relu_output: Tensor | None = None
) -> tuple[Tensor, Tensor, list[ColumnSums]]:
    """Gradient of the input, channels-last (N, C, H, W), from that of the output before the activation.

    With ``relu_output``, the input itself, channels-last: the gradient before the ReLU that gave it, its sum over everything
    but the channels (else empty), and what is still to be summed for that.
    """
    kernels = dgrad_kernels(problem)
    if kernels == Kernels.DESCRIPTOR:
        return descriptor.dgrad(dz, weight, problem, relu_output)
    dx = stem.dgrad(dz, weight, problem) if kernels == Kernels.STEM else general.dgrad(dz, weight, problem)
    if relu_output is None:
        return dx, nothing(dx), []
    return epilogue_backward(dx, relu_output, write_dz=True, sum_columns=True)


def wgrad(
    dz: Tensor,
    input: Tensor | None,
    weight: Tensor,
    problem: Problem,
    vectors: Sequence[ColumnSums] = (),
    cells: Tensor | None = None,
) -> Tensor:
    """Gradient of the weight, in the weight's own shape and strides (its values are not read).

    Its last launch, which adds up parts, takes the sums of ``vectors`` along.

    Args:
        input: None where its ``cells`` are all that is there of it.
    """
    dw = new_output_like(weight)
    kernels = Kernels.STEM if cells is not None else wgrad_kernels(problem)
    if kernels == Kernels.STEM:
        if cells is None:
            assert input is not None
            cells = input_cells(input, problem)
        stem.wgrad(dz, cells, dw, problem, vectors)
        return dw
    assert input is not None
    launch = descriptor.wgrad if kernels == Kernels.DESCRIPTOR else general.wgrad
    launch(dz, input, dw, problem, vectors)
    return dw
