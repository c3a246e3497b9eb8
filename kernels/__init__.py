"""Triton kernels for convolutional networks, as differentiable PyTorch operations.

Each operation has the meaning of its PyTorch counterpart, one file or folder with its kernels, launch functions, autograd
Function and public function, and a ``*_reference`` beside it in PyTorch's own operations. What is for whoever builds a pipeline
is in :mod:`kernels.advanced` too. What an operation refuses is a ValueError or a TypeError, and also what PyTorch's counterpart
raises for it, mostly a RuntimeError.
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

#: Tells this package from the other one on PyPI that imports as ``kernels`` (Hugging Face's).
DISTRIBUTION = "alexnet-triton"

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
