"""Triton kernels for convolutional networks, as differentiable PyTorch operations.

Each operation computes the same function as its PyTorch counterpart. One file or folder holds its kernels, launch functions,
autograd Function and public function, and a ``*_reference`` in PyTorch's own operations. :mod:`kernels.advanced` lists the
functions for building a pipeline of operations. Invalid arguments raise a ValueError or a TypeError that is also an instance of
the exception that the PyTorch counterpart raises, mostly a RuntimeError.
"""

from . import flops as _flops  # noqa: F401 (registers with PyTorch's FLOP counter)
from .convolution.autograd import conv2d, linked_conv2d
from .convolution.cells import Cells, space_to_depth
from .convolution.relu_max_pool2d import conv2d_relu_max_pool2d, reads_cells
from .dropouts import dropout, dropout_mask
from .images import Augmentation, gather_resize
from .losses import cross_entropy
from .matrix_product import linear, linear_relu_dropout
from .pooling.autograd import max_pool2d
from .runtime.backend import use_backend
from .runtime.compile_cache import tag_compiled_graphs as _tag_compiled_graphs

#: Distinguishes this package from Hugging Face's on PyPI, which is also imported as ``kernels``.
DISTRIBUTION = "alexnet-triton"

_tag_compiled_graphs()

__all__ = [
    "Augmentation",
    "Cells",
    "conv2d",
    "conv2d_relu_max_pool2d",
    "cross_entropy",
    "dropout",
    "dropout_mask",
    "gather_resize",
    "linear",
    "linear_relu_dropout",
    "linked_conv2d",
    "max_pool2d",
    "reads_cells",
    "space_to_depth",
    "use_backend",
]
