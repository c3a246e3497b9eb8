"""Links and rearranged images: for whoever builds a pipeline of operations, not for a single one.

A link lets a convolution take over a part of the backward pass of the one before it. A strided first layer can read images
whose pixels were rearranged into cells when they were made.
"""

from .convolution.autograd import linked_conv2d
from .convolution.cells import Cells, space_to_depth
from .convolution.relu_max_pool2d import reads_cells

__all__ = ["Cells", "linked_conv2d", "reads_cells", "space_to_depth"]
