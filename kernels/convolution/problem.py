"""The parameters of a convolution and of its gradients as hashable values, which are a part of a plan's key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pooling.problem import Window
from ..runtime.arguments import conv_input_precision
from ..runtime.backend import dot_precision


class Geometry(NamedTuple):
    """How filters move over the input. All values are ints; pairs are (vertical, horizontal).

    Attributes:
        stride: distance of neighbouring filter applications, in pixels.
        padding: zeros above and to the left. Below and to the right, the output's size determines the number of zeros.
        dilation: distance of filter elements, in pixels.
        groups: number of groups that input and output channels are cut into.
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class Problem(NamedTuple):
    """One convolution: N x C x H x W inputs, K filters of R x S, N x K x P x Q outputs. Holds no tensors.

    ``precision``: the ``input_precision`` of its ``tl.dot``, "tf32" or "ieee".
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    p: int
    q: int
    geometry: Geometry
    dtype: torch.dtype
    device: torch.device
    precision: str = "ieee"

    @classmethod
    def of(cls, input_size: Sequence[int], weight: Tensor, geometry: Geometry, output_size: Sequence[int]) -> Problem:
        """The convolution of inputs (N, C, H, W) by filters (K, C / groups, R, S) to outputs of (P, Q) rows and columns.

        For an input of cells, H and W are not the images' sizes. No kernel that reads cells uses H or W.
        """
        n, _, h, w = input_size
        k, cg, r, s = weight.shape
        p, q = output_size
        precision = dot_precision(weight.device, conv_input_precision(weight.dtype))
        return cls(n, cg * geometry.groups, h, w, k, r, s, p, q, geometry, weight.dtype, weight.device, precision)

    @property
    def is_irregular(self) -> bool:
        """Whether neighbouring pixels of a gather are apart (stride or dilation), or channels are skipped (groups)."""
        stride, _, dilation, groups = self.geometry
        return groups > 1 or max(*stride, *dilation) > 1


class Convolution(NamedTuple):
    """Parameters of the operator of :func:`kernels.conv2d`: everything but its tensors."""

    geometry: Geometry
    output_size: Sequence[int]
    relu: bool
    make_link: bool
    channels_last: bool = True

    def flat(self) -> tuple[Any, ...]:
        """The values in the order of the operator's schema."""
        return (*self.geometry, *self[1:])

    @classmethod
    def of(cls, *flat: Any) -> Convolution:
        """The inverse of :meth:`flat`."""
        return cls(Geometry(*flat[:4]), *flat[4:])


class ConvolutionGradients(NamedTuple):
    """Parameters of the convolution's backward operator.

    ``wanted``: which of the gradients of input, weight and bias to compute. ``linked``: whether the input has a link.
    """

    geometry: Geometry
    wanted: Sequence[bool]
    linked: bool

    def flat(self) -> tuple[Any, ...]:
        """The values in the order of the operator's schema."""
        return (*self.geometry, *self[1:])


class PooledConvolution(NamedTuple):
    """Parameters of the operator of :func:`kernels.conv2d_relu_max_pool2d`: everything but its tensors."""

    geometry: Geometry
    conv_size: Sequence[int]
    window: Window
    channels_last: bool
    write_position: bool
    input_is_cells: bool

    def flat(self) -> tuple[Any, ...]:
        """The values in the order of the operator's schema."""
        kernel_size, stride, padding, _, output_size = self.window
        return (*self.geometry, self.conv_size, kernel_size, stride, padding, output_size, *self[3:])

    @classmethod
    def of(cls, *flat: Any) -> PooledConvolution:
        """The inverse of :meth:`flat`."""
        kernel_size, stride, padding, output_size = flat[5:9]
        return cls(Geometry(*flat[:4]), flat[4], Window(kernel_size, stride, padding, (1, 1), output_size), *flat[9:])


class PooledConvolutionGradients(NamedTuple):
    """Parameters of the pooled convolution's backward operator: as :class:`ConvolutionGradients`, plus sizes and windows."""

    input_size: Sequence[int]
    geometry: Geometry
    conv_size: Sequence[int]
    window: Window
    wanted: Sequence[bool]
    linked: bool

    def flat(self) -> tuple[Any, ...]:
        """The values in the order of the operator's schema."""
        kernel_size, stride, padding, *_ = self.window
        return (self.input_size, *self.geometry, self.conv_size, kernel_size, stride, padding, *self[4:])
