"""Autocast for operations of our own."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_inputs(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors as autocast hands them to a convolution or linear layer.

    Inside an enabled autocast region of the input's device, floating-point tensors (but float64, as in PyTorch) become its
    dtype; elsewhere they come back as they are.
    """
    if not isinstance(input, Tensor):
        return input, weight, bias
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast, and asking it raises
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        castable = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if castable else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)
