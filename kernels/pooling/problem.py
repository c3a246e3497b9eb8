"""The parameters of a pool and of its gradient as hashable values, which are a part of a plan's key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Window(NamedTuple):
    """A pool's windows over (height, width); pairs of ints, in elements."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    output_size: Sequence[int]


class MaxPool(NamedTuple):
    """Parameters of the operator of :func:`kernels.max_pool2d`: everything but its input.

    Attributes:
        channels_last: whether the output is NHWC in memory; False for NCHW.
        relu: whether the input is a ReLU's output. Then positions mark the windows that pass no gradient.
        write_position: whether to write the window positions that the backward pass reads.
        write_index: whether to write PyTorch's indices.
    """

    window: Window
    channels_last: bool
    relu: bool
    write_position: bool
    write_index: bool

    def flat(self) -> tuple[Any, ...]:
        """The values in the order of the operator's schema."""
        return (*self.window, *self[1:])

    @classmethod
    def of(cls, *flat: Any) -> MaxPool:
        """The inverse of :meth:`flat`."""
        return cls(Window(*flat[:5]), *flat[5:])


class MaxPoolGradient(NamedTuple):
    """Parameters of the max-pool's backward operator.

    Attributes:
        input_size: (N, C, H, W).
        channels_last: whether the gradient is NHWC in memory; False for NCHW.
        write_dx: whether to write the input gradient.
        sum_channels: whether to sum the input gradient over all dimensions but the channels.
    """

    input_size: Sequence[int]
    window: Window
    channels_last: bool
    write_dx: bool
    sum_channels: bool

    def flat(self) -> tuple[Any, ...]:
        """The values in the order of the operator's schema."""
        return (self.input_size, *self.window[:4], *self[2:])
