"""Which implementation runs: the Triton kernels or the PyTorch reference."""

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
from .gpu import has_copy_engine as has_copy_engine
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

    The choice is the process's, not the thread's, and holds for the forward call; a backward pass runs what its forward
    recorded. In forward mode every operation runs the reference, and so do derivatives of gradients, whatever was chosen. Where
    blocks of several threads overlap, that one holds which was entered last and has not ended.

    Raises:
        ValueError: ``backend`` is none of the three.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")
    with _current.set(backend):
        yield


def current_backend() -> str:
    """The name that the innermost :func:`use_backend` gave, ``"auto"`` outside of any."""
    return _current.value


def can_run_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels can run on ``tensor`` at all: on a GPU, and on the CPU in Triton's interpreter."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and (INTERPRETED or launch.cpu_counts_as_gpu()))


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether an operation on ``tensor`` runs the Triton kernels under the current backend.

    Raises:
        RuntimeError: the backend is ``"triton"`` and the tensor is where no Triton kernel can run.
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
