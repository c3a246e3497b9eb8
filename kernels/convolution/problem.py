"""What a convolution is asked to do, as values that can be compared and hashed: plans are looked up by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pooling.problem import Window
from ..runtime.arguments import conv_input_precision
from ..runtime.backend import dot_precision


class Geometry(NamedTuple):
    """How filters move over the input: ints, pairs are (vertical, horizontal).

    Attributes:
        stride: in pixels.
        padding: zeros above and to the left; below and to the right it is whatever the output's size reaches.
        dilation: distance of filter elements, in pixels.
        groups: that input and output channels are cut into.
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class Problem(NamedTuple):
    """One convolution: N x C x H x W inputs, K filters of R x S, N x K x P x Q outputs. Of its tensors only what they are.

    ``precision``: of its products, ``input_precision`` of ``tl.dot``: "tf32" or "ieee".
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
        """The convolution of (N, C, H, W) by (K, C / groups, R, S) to (P, Q) rows and columns.

        Of an input that is there as cells, H and W are not the images'; nothing that reads cells asks.
        """
        n, _, h, w = input_size
        k, cg, r, s = weight.shape
        p, q = output_size
        precision = dot_precision(weight.device, conv_input_precision(weight.dtype))
        return cls(n, cg * geometry.groups, h, w, k, r, s, p, q, geometry, weight.dtype, weight.device, precision)

    @property
    def is_irregular(self) -> bool:
        """Whether pixels that a filter sees side by side may be apart, or channels left out."""
        stride, _, dilation, groups = self.geometry
        return groups > 1 or max(*stride, *dilation) > 1


class Convolution(NamedTuple):
    """What :func:`kernels.conv2d`'s operator is told beside its tensors."""

    geometry: Geometry
    output_size: Sequence[int]
    relu: bool
    make_link: bool
    channels_last: bool = True

    def flat(self) -> tuple[Any, ...]:
        """As the operator's schema lists it."""
        return (*self.geometry, *self[1:])

    @classmethod
    def of(cls, *flat: Any) -> Convolution:
        """From what :meth:`flat` returns."""
        return cls(Geometry(*flat[:4]), *flat[4:])


class ConvolutionGradients(NamedTuple):
    """What the operator of its gradients is told: of which of input, weight and bias, and whether the input has a link."""

    geometry: Geometry
    wanted: Sequence[bool]
    linked: bool

    def flat(self) -> tuple[Any, ...]:
        """As the operator's schema lists it."""
        return (*self.geometry, *self[1:])


class PooledConvolution(NamedTuple):
    """What :func:`kernels.conv2d_relu_max_pool2d`'s operator is told beside its tensors.

    ``keeps_cells_by_batch``: whether the backward pass is to read cells with the batch innermost in place of the images.
    """

    geometry: Geometry
    conv_size: Sequence[int]
    window: Window
    channels_last: bool
    write_position: bool
    input_is_cells: bool
    keeps_cells_by_batch: bool = False

    def flat(self) -> tuple[Any, ...]:
        """As the operator's schema lists it."""
        kernel_size, stride, padding, _, output_size = self.window
        return (*self.geometry, self.conv_size, kernel_size, stride, padding, output_size, *self[3:])

    @classmethod
    def of(cls, *flat: Any) -> PooledConvolution:
        """From what :meth:`flat` returns."""
        kernel_size, stride, padding, output_size = flat[5:9]
        return cls(Geometry(*flat[:4]), flat[4], Window(kernel_size, stride, padding, (1, 1), output_size), *flat[9:])


class PooledConvolutionGradients(NamedTuple):
    """What the operator of its gradients is told: as :class:`ConvolutionGradients`, and the size of the images.

    ``kept_by_batch``: whether the cells that are there in place of the images have the batch innermost.
    """

    input_size: Sequence[int]
    geometry: Geometry
    conv_size: Sequence[int]
    window: Window
    wanted: Sequence[bool]
    linked: bool
    kept_by_batch: bool = False

    def flat(self) -> tuple[Any, ...]:
        """As the operator's schema lists it."""
        kernel_size, stride, padding, *_ = self.window
        return (self.input_size, *self.geometry, self.conv_size, kernel_size, stride, padding, *self[4:])
