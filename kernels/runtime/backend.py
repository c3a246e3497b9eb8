"""Which implementation runs: the Triton kernels or the PyTorch reference."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Literal

import torch
import triton

from . import launch
from .switch import Switch

Backend = Literal["auto", "triton", "torch"]

#: True when ``TRITON_INTERPRET=1`` was set before this package was imported: Triton decides at decoration time.
INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")

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


#: What TMA brings to the tensor cores in either order of rows and columns.
HALF = (torch.float16, torch.bfloat16)


def has_copy_engine(device: torch.device) -> bool:
    """Whether kernels on ``device`` may load through tensor descriptors: Hopper and data-centre Blackwell.

    Not the consumer GPUs of capability 12.0, which have the engine but less than half of the shared memory; nor any of AMD's.
    """
    return 90 <= capability(device) < 120


def capability(device: torch.device) -> int:
    """NVIDIA compute capability that kernels on ``device`` are made for, 90 for an H100; 0 for a GPU of another maker, or none.

    Of the GPU; while launches are recorded, of the target they are compiled for; in the interpreter Hopper's, whose descriptors
    it runs.
    """
    if INTERPRETED:
        return 90
    arch = _architecture(device)
    return arch if isinstance(arch, int) else 0


def dot_precision(device: torch.device, precision: str) -> str:
    """``input_precision`` of ``tl.dot`` on ``device`` where PyTorch's switch allows ``precision``, "tf32" or "ieee".

    Of AMD's GPUs only gfx942 multiplies TF32. The others' matrix cores multiply float32 exactly.
    """
    if precision == "tf32" and capability(device) == 0 and _architecture(device) not in (0, "gfx942"):
        return "ieee"
    return precision


def _architecture(device: torch.device) -> int | str:
    """Compute capability of an NVIDIA GPU, 90; name of an AMD GPU's instruction set, ``"gfx942"``; 0 where there is no GPU."""
    if device.type == "cuda":
        try:
            return _gpu_architecture(torch.cuda.current_device() if device.index is None else device.index)
        except (RuntimeError, AssertionError):
            if torch.cuda.device_count() > 0:
                raise
            return 0  # of fake tensors
    arch: int | str = triton.runtime.driver.active.get_current_target().arch
    return arch


@functools.cache
def _gpu_architecture(index: int) -> int | str:
    if torch.version.hip is not None:  # its capability is (9, 4) on an MI300, which says nothing of NVIDIA's
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]  # "gfx942:sramecc+:xnack-"
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
