"""Links, space-to-depth images and running totals: functions for a pipeline of operations rather than a single one.

A link lets a convolution take over a part of the previous convolution's backward pass. A strided first convolution can read
images that were written in space-to-depth order (cells). :func:`add_cross_entropy` returns the gradient of a batch's logits and
adds the batch's loss and number of correct predictions to running totals; a small batch takes one launch.
"""

from .convolution.autograd import linked_conv2d
from .convolution.cells import Cells, space_to_depth
from .convolution.relu_max_pool2d import reads_cells
from .losses import add_cross_entropy

__all__ = ["Cells", "add_cross_entropy", "linked_conv2d", "reads_cells", "space_to_depth"]
