"""Properties of the GPU that kernels run on or are compiled for."""

from __future__ import annotations

import functools
import os

import torch
import triton

#: True if ``TRITON_INTERPRET=1`` was set before this package was imported: Triton reads it when a kernel is decorated.
INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")

#: Whether a kernel may begin while the previous one ends. ``ALEXNET_TRITON_PDL=0``, set before the import, turns this off.
PROGRAMMATIC_DEPENDENT_LAUNCH: bool = not INTERPRETED and os.environ.get("ALEXNET_TRITON_PDL", "1") != "0"

#: Dtypes that the tensor cores read from shared memory in either order of rows and columns.
HALF = (torch.float16, torch.bfloat16)


def has_tma(device: torch.device) -> bool:
    """Whether kernels on ``device`` load through tensor descriptors by TMA: Hopper and data-centre Blackwell.

    False for consumer GPUs of capability 12.0, which have TMA but less than half of the shared memory, and for AMD GPUs.
    """
    return 90 <= capability(device) < 120


def capability(device: torch.device) -> int:
    """NVIDIA compute capability that kernels on ``device`` are compiled for, 90 for an H100; 0 for an AMD GPU or no GPU.

    It is the GPU's own or, while launches are recorded, that of the compilation target. In the interpreter it is Hopper's, so
    that descriptor kernels run too.
    """
    if INTERPRETED:
        return 90
    arch = _architecture(device)
    return arch if isinstance(arch, int) else 0


def launches_dependents(device: torch.device) -> bool:
    """Whether kernels on ``device`` are launched while the previous kernel ends: see :mod:`..primitives`."""
    return PROGRAMMATIC_DEPENDENT_LAUNCH and capability(device) >= 90


def dot_precision(device: torch.device, precision: str) -> str:
    """``input_precision`` of ``tl.dot`` on ``device`` where PyTorch's switch allows ``precision``, "tf32" or "ieee".

    Among AMD GPUs only gfx942 multiplies TF32. The matrix cores of the others multiply float32 exactly.
    """
    if precision == "tf32" and capability(device) == 0 and _architecture(device) not in (0, "gfx942"):
        return "ieee"
    return precision


def _architecture(device: torch.device) -> int | str:
    """Compute capability of an NVIDIA GPU (90), name of an AMD GPU's instruction set (``"gfx942"``), or 0 without a GPU."""
    if device.type == "cuda":
        try:
            return _gpu_architecture(torch.cuda.current_device() if device.index is None else device.index)
        except (RuntimeError, AssertionError):
            if torch.cuda.device_count() > 0:
                raise
            return 0  # a fake tensor on a machine without a GPU
    arch: int | str = triton.runtime.driver.active.get_current_target().arch
    return arch


@functools.cache
def _gpu_architecture(index: int) -> int | str:
    if torch.version.hip is not None:  # an MI300 reports capability (9, 4), which is not comparable with NVIDIA's
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]  # "gfx942:sramecc+:xnack-"
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
