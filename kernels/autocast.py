"""Autocast for operations of our own."""

from __future__ import annotations

from torch import Tensor, get_autocast_dtype, is_autocast_enabled
import torch


def autocast_inputs(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast hands them to a convolution or linear layer.

    Inside an enabled autocast region of their device, floating-point tensors (but float64, as in PyTorch) become its
    dtype; elsewhere they come back as they are.
    """
    first = next((t for t in tensors if isinstance(t, Tensor)), None)
    if first is None or not is_autocast_enabled(first.device.type):
        return tensors
    dtype = get_autocast_dtype(first.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
