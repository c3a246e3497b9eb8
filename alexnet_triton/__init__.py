"""AlexNet on hand-written Triton kernels: a drop-in replacement for its ``nn.Sequential``."""

import kernels as _kernels

if getattr(_kernels, "DISTRIBUTION", None) != "alexnet-triton":
    raise ImportError(
        "alexnet_triton needs its own package `kernels` (distribution alexnet-triton), but `import kernels` found "
        f"{getattr(_kernels, '__file__', None) or list(getattr(_kernels, '__path__', []))}, most likely Hugging Face's "
        "distribution `kernels`. The two cannot be installed side by side: uninstall `kernels` and reinstall "
        "`alexnet-triton`, or use separate environments."
    )

from . import optim
from .explain import Explanation, explain
from .fused import CellImages, FusedSequential, first_layer_cells, fuse, unfuse
from .models import AlexNet, reference_alexnet, reference_lenet
from .precompile import precompile

__version__ = "0.2.0"

__all__ = [
    "AlexNet",
    "CellImages",
    "Explanation",
    "FusedSequential",
    "explain",
    "first_layer_cells",
    "fuse",
    "optim",
    "precompile",
    "reference_alexnet",
    "reference_lenet",
    "unfuse",
]
