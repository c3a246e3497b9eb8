"""The choice of implementation: the Triton kernels or the PyTorch reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

from . import launch
from .gpu import HALF as HALF
from .gpu import INTERPRETED as INTERPRETED
from .gpu import capability as capability
from .gpu import dot_precision as dot_precision
from .gpu import has_tma as has_tma
from .switch import Switch

Backend = Literal["auto", "triton", "torch"]

_BACKENDS = ("auto", "triton", "torch")
_current: Switch[str] = Switch("auto")


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Choose the implementation of every operation of this package inside a ``with`` block.

    Args:
        backend: ``"auto"``: CUDA tensors run the Triton kernels; CPU tensors run the PyTorch reference, or the Triton
            kernels in Triton's interpreter when ``TRITON_INTERPRET=1`` was set before the import.
            ``"triton"``: the Triton kernels, or a ``RuntimeError`` where they cannot run.
            ``"torch"``: the PyTorch reference, on any device.

    The choice applies to the whole process, not to one thread, and to the forward call: a backward pass runs the implementation
    that its forward pass recorded. Forward-mode differentiation and derivatives of gradients always run the reference. Where
    blocks of several threads overlap, the open block that was entered last decides.

    Raises:
        ValueError: ``backend`` is not one of these three names.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")
    with _current.set(backend):
        yield


def current_backend() -> str:
    """The name given to the innermost :func:`use_backend` block; ``"auto"`` outside of any block."""
    return _current.value


def can_run_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels can run on ``tensor``: on a GPU, or on the CPU in Triton's interpreter."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and (INTERPRETED or launch.cpu_counts_as_gpu()))


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether an operation on ``tensor`` runs the Triton kernels under the current backend.

    Raises:
        RuntimeError: the backend is ``"triton"`` and no Triton kernel can run on the tensor's device.
    """
    if _current.value == "torch":
        return False
    can_run = can_run_triton(tensor)
    if _current.value == "triton" and not can_run:
        raise RuntimeError(
            f"the Triton kernels cannot run on a tensor on {tensor.device}: move it to a CUDA device, "
            "or set TRITON_INTERPRET=1 before importing kernels to run them on the CPU in Triton's interpreter"
        )
    return can_run
