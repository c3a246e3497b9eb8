"""Chooses the file of kernels for each pass of a convolution.

Which function computes the weight gradient of conv1 (stride 4, one channel) on an H100? Of the convolution alone
:func:`wgrad_kernels` decides: in half precision ``Kernels.STEM``, so :func:`.stem.wgrad`; in TF32 ``Kernels.ROW_STEM``, so
:func:`.row_stem_wgrad.wgrad`. With its pool :func:`fuses_pool_wgrad` decides. The functions under "passes" call the launch
functions of the chosen file.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..pooling.problem import Window
from ..runtime.backend import HALF, capability, has_tma
from ..runtime.launch import cdiv, new_output_like, nothing
from ..sums import ColumnSums, epilogue_backward
from . import descriptor, descriptor_wgrad, general, row_stem, row_stem_wgrad, stem, stream_k_wgrad, taps
from .by_batch import Copy, copy, new_by_batch
from .cells import cells_of
from .problem import Problem
from .rules import conv2d_wgrad_by_images, conv2d_wgrad_streams
from .stem_rules import conv2d_stem_pool_fused, conv2d_stem_pool_wgrad_fused
from .taps_rules import conv2d_by_taps

#: Whether ``tl.dot`` accepts a reduction of 8 in TF32: Triton before 3.8 needs at least 16.
_SUMS_OF_8 = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


class Kernels(enum.Enum):
    """A file of kernels; the value is the module's name."""

    GENERAL = "general"
    DESCRIPTOR = "descriptor"
    STEM = "stem"
    ROW_STEM = "row_stem"


def fprop_kernels(problem: Problem) -> Kernels:
    """The kernels of the forward pass."""
    if _takes_descriptors(problem):
        return Kernels.DESCRIPTOR
    if _is_row_stem(problem):
        return Kernels.ROW_STEM
    return Kernels.STEM if reads_cells(problem) else Kernels.GENERAL


def dgrad_kernels(problem: Problem) -> Kernels:
    """The kernels of the input gradient."""
    if _takes_descriptors(problem):
        return Kernels.DESCRIPTOR
    # The gradient of the cells is a convolution of the cells' channels through descriptors.
    cells = problem.c * problem.geometry.stride[0] ** 2
    return Kernels.STEM if _has_cells(problem) and problem.k % 16 == 0 and cells % 16 == 0 else Kernels.GENERAL


def wgrad_kernels(problem: Problem) -> Kernels:
    """The kernels of the weight gradient: general ones for few images. A step of the others sums one pixel of many images."""
    return fprop_kernels(problem) if conv2d_wgrad_by_images(problem.n) else Kernels.GENERAL


def reads_cells(problem: Problem) -> bool:
    """Whether the forward pass reads the input's cells. Then the weight gradient can read them too, for any batch size."""
    return problem.dtype in HALF and _has_cells(problem)


def fuses_pool(problem: Problem, window: Window) -> bool:
    """Whether one kernel of :mod:`.stem_pool` computes convolution, ReLU and pool."""
    return (
        reads_cells(problem)
        and _pools_whole_windows(problem, window)
        # For Blackwell, Triton 3.8 pipelines such a loop with a stage for each product, then generates empty code.
        and capability(problem.device) < 100
        and conv2d_stem_pool_fused(*_stem_sizes(problem, window))
    )


def fuses_pool_wgrad(problem: Problem, window: Window) -> bool:
    """Whether :mod:`.row_stem_wgrad` or :mod:`.stem_pool_wgrad` computes the pool's gradient and the weight's.

    In TF32: for whole windows, and for batches whose weight gradient :mod:`.row_stem_wgrad` computes. In half precision: on
    Hopper alone, if blocks of 2 x 2 pixels cover the convolution's output and the number of filters is a multiple of 16, since
    TMA loads positions in units of 16 bytes.
    """
    if _is_row_stem(problem):
        return _pools_whole_windows(problem, window) and wgrad_kernels(problem) == Kernels.ROW_STEM
    return (
        reads_cells(problem)
        and _pools_whole_windows(problem, window)
        and capability(problem.device) < 100
        and problem.k % 16 == 0
        and problem.p % 2 == problem.q % 2 == 0
        and conv2d_stem_pool_wgrad_fused(*_stem_sizes(problem, window))
    )


def _pools_whole_windows(problem: Problem, window: Window) -> bool:
    """Whether the windows are 3 x 3 of stride 2, none of them partial."""
    kernel_size, stride, padding, _, (p, q) = window
    return (
        tuple(kernel_size) == (3, 3)
        and tuple(stride) == (2, 2)
        and max(padding) == 0
        and 2 * p + 1 <= problem.p
        and 2 * q + 1 <= problem.q
    )


def _stem_sizes(problem: Problem, window: Window) -> tuple[torch.device, int, int, int, int, int]:
    """Arguments of the rules for a strided first layer with its pool: device, n, p, q of the pool, fold, k."""
    p, q = window.output_size
    folded = stem.fold(problem.c, problem.s, problem.geometry.stride[0])
    return problem.device, problem.n, p, q, folded, problem.k


def _takes_descriptors(problem: Problem) -> bool:
    """Whether the kernels of :mod:`.descriptor` can run ``problem``: stride and dilation 1, one group, sm_90 and later.

    Channels and filters must be multiples of 16, in TF32 of 8 from Triton 3.8 on.
    """
    multiple = 8 if problem.dtype == torch.float32 and _SUMS_OF_8 else 16
    return (
        _by_tensor_cores(problem)
        and not problem.is_irregular
        and problem.c % multiple == 0
        and problem.k % multiple == 0
        and problem.n > 0
    )


def _by_tensor_cores(problem: Problem) -> bool:
    """Whether precision and GPU suit kernels over tensor descriptors: half precision or TF32, sm_90 and later."""
    return (problem.dtype in HALF or problem.precision == "tf32") and has_tma(problem.device)


def _is_row_stem(problem: Problem) -> bool:
    """Whether :mod:`.row_stem` runs ``problem``: TF32, :func:`_has_cells`, and pixels a multiple of 16 bytes apart."""
    return problem.precision == "tf32" and _has_cells(problem) and row_stem.Rows.of(problem).step % 4 == 0


def _has_cells(problem: Problem) -> bool:
    """Whether cells turn this strided convolution into one of three filter rows of 48 or 144 positions for descriptors."""
    (step, other), _, dilation, groups = problem.geometry
    return (
        _by_tensor_cores(problem)
        and groups == 1
        and max(dilation) == 1
        and other == step
        and step > 1
        and cdiv(problem.r, step) == 3
        and problem.c * step * step * problem.dtype.itemsize % 16 == 0
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
    """Convolution, bias and ReLU: (N, C, H, W) and (K, C / groups, R, S) to (N, K, P, Q).

    Args:
        cells: :func:`.cells.cells_of` the input, if the caller has them already.
        channels_last: whether the result is NHWC in memory; False for NCHW.
    """
    kernels = fprop_kernels(problem)
    if kernels == Kernels.DESCRIPTOR:
        by_taps = conv2d_by_taps(problem.device, *_sizes(problem), channels_last=channels_last, dtype=problem.dtype)
        return (taps if by_taps else descriptor).fprop(input, weight, bias, problem, relu, channels_last)
    if kernels == Kernels.ROW_STEM:
        return row_stem.fprop(input, weight, bias, problem, relu, channels_last)
    if kernels == Kernels.STEM:
        cells = input_cells(input, problem) if cells is None else cells
        return stem.fprop(cells, weight, bias, problem, relu, channels_last)
    return general.fprop(input, weight, bias, problem, relu, channels_last)


def input_cells(input: Tensor, problem: Problem) -> Tensor:
    """:func:`.cells.cells_of` the input of a problem for which :func:`reads_cells` is true."""
    stride, padding, *_ = problem.geometry
    return cells_of(input, stride[0], padding, (problem.p, problem.q), (problem.r, problem.s))


def dgrad(
    dz: Tensor, weight: Tensor, problem: Problem, relu_output: Tensor | None = None, copies: Sequence[Copy] = ()
) -> tuple[Tensor, Tensor, list[ColumnSums]]:
    """Gradient of the input, channels-last (N, C, H, W).

    Args:
        dz: gradient of the output before the activation, (N, K, P, Q).
        relu_output: the input itself, channels-last, if it is a ReLU's output and the gradient before that ReLU is wanted.
        copies: copies to write as well.

    Returns:
        The gradient; its sum over all dimensions but the channels (empty without ``relu_output``); the pending sums that will
        fill that vector.
    """
    kernels = dgrad_kernels(problem)
    if kernels == Kernels.DESCRIPTOR:
        return descriptor.dgrad(dz, weight, problem, relu_output, copies)
    copy(copies)
    dx = stem.dgrad(dz, weight, problem) if kernels == Kernels.STEM else general.dgrad(dz, weight, problem)
    if relu_output is None:
        return dx, nothing(dx), []
    return epilogue_backward(dx, relu_output, write_dz=True, sum_columns=True)


def wgrad_by_batch(problem: Problem) -> bool:
    """Whether the weight gradient reads :func:`copies_by_batch`."""
    return problem.dtype == torch.float32 and wgrad_kernels(problem) == Kernels.DESCRIPTOR


def copies_by_batch(dz: Tensor, input: Tensor, problem: Problem) -> list[Copy]:
    """Copies of the input and of ``dz`` with the batch innermost, not written yet."""
    sources = [descriptor.dense_nhwc(each) for each in (input, dz)]
    return [Copy(source, new_by_batch(source.shape, source)) for source in sources]


def _sizes(problem: Problem) -> tuple[int, ...]:
    n, c, _, _, k, r, s, p, q, *_ = problem
    return n, p, q, c, k, r, s


def wgrad(
    dz: Tensor,
    input: Tensor | None,
    weight: Tensor,
    problem: Problem,
    vectors: Sequence[ColumnSums] = (),
    cells: Tensor | None = None,
    by_batch: Sequence[Copy] = (),
) -> Tensor:
    """Gradient of the weight, with the weight's shape and strides (the weight's values are not read).

    Args:
        input: the input; None if only its ``cells`` exist.
        vectors: pending sums, which the last launch adds up beside the parts of the weight gradient.
        by_batch: :func:`copies_by_batch` if they are written already. Otherwise this function writes them if it needs them.
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
    if kernels == Kernels.ROW_STEM:
        z = row_stem_wgrad.gradient_by_batch(dz)
        row_stem_wgrad.wgrad(z, row_stem.dense_rows(input), dw, problem, vectors)
    elif kernels == Kernels.GENERAL:
        general.wgrad(dz, input, dw, problem, vectors)
    elif wgrad_by_batch(problem):
        if not by_batch:
            by_batch = copies_by_batch(dz, input, problem)
            copy(by_batch)
        x, z = (each.out for each in by_batch)
        _by_descriptors(z, x, dw, problem, vectors, by_batch=True)
    else:
        _by_descriptors(dz, input, dw, problem, vectors, by_batch=False)
    return dw


def _by_descriptors(
    dz: Tensor, input: Tensor, dw: Tensor, problem: Problem, vectors: Sequence[ColumnSums], by_batch: bool
) -> None:
    streams = conv2d_wgrad_streams(problem.device, *_sizes(problem), dtype=problem.dtype)
    (stream_k_wgrad if streams else descriptor_wgrad).wgrad(dz, input, dw, problem, vectors, by_batch)
