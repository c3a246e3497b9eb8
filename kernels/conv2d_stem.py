"""Where older pickles look for :class:`kernels.Cells`."""

from .convolution.cells import Cells

__all__ = ["Cells"]
