"""Links, rearranged images and running totals: for whoever builds a pipeline of operations, not for a single one.

A link lets a convolution take over a part of the backward pass of the one before it. A strided first layer can read images
whose pixels were rearranged into cells when they were made. A training loop gets the loss, its gradient and the hits of a batch
from one launch.
"""

from .convolution.autograd import linked_conv2d
from .convolution.cells import Cells, space_to_depth
from .convolution.relu_max_pool2d import reads_cells
from .losses import add_cross_entropy

__all__ = ["Cells", "add_cross_entropy", "linked_conv2d", "reads_cells", "space_to_depth"]
