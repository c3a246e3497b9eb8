"""The module path under which older pickles look up :class:`kernels.Cells`."""

from .convolution.cells import Cells

__all__ = ["Cells"]
