"""What a pool is asked to do, as values that can be compared and hashed: plans are looked up by them."""

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
    """What :func:`kernels.max_pool2d`'s operator is told beside its input.

    Attributes:
        channels_last: whether the output is NHWC in memory, or NCHW.
        relu: whether the input is a ReLU's output; then positions say where it lets no gradient pass.
        write_position: whether the backward pass's window positions are wanted.
        write_index: whether PyTorch's indices are.
    """

    window: Window
    channels_last: bool
    relu: bool
    write_position: bool
    write_index: bool

    def flat(self) -> tuple[Any, ...]:
        """As the operator's schema lists it."""
        return (*self.window, *self[1:])

    @classmethod
    def of(cls, *flat: Any) -> MaxPool:
        """From what :meth:`flat` returns."""
        return cls(Window(*flat[:5]), *flat[5:])


class MaxPoolGradient(NamedTuple):
    """What the operator of its gradient is told.

    Attributes:
        input_size: (N, C, H, W).
        channels_last: whether the gradient is NHWC in memory, or NCHW.
        write_dx: whether the gradient is wanted.
        sum_channels: whether its sum over everything but the channels is.
    """

    input_size: Sequence[int]
    window: Window
    channels_last: bool
    write_dx: bool
    sum_channels: bool

    def flat(self) -> tuple[Any, ...]:
        """As the operator's schema lists it."""
        return (self.input_size, *self.window[:4], *self[2:])
