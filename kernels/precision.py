"""How float32 products are formed: PyTorch's own TF32 switches, convolution and matrix product each by its own."""

from __future__ import annotations

from typing import Any

import torch


def _resolve(*settings: str) -> str:
    """The first setting that is not "none" (inherit); IEEE when all are."""
    chosen = next((s for s in settings if s != "none"), "ieee")
    return "tf32" if chosen == "tf32" else "ieee"


def conv_input_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot`` in a convolution: "tf32" or "ieee"; only float32 depends on the switch."""
    if dtype != torch.float32:
        return "ieee"
    backends: Any = torch.backends  # some of its attributes are made at run time
    return _resolve(backends.cudnn.conv.fp32_precision, backends.cudnn.fp32_precision, backends.fp32_precision)


def matmul_input_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot`` in a linear layer: "tf32" or "ieee"; only float32 depends on the switch."""
    if dtype != torch.float32:
        return "ieee"
    backends: Any = torch.backends  # some of its attributes are made at run time
    return _resolve(backends.cuda.matmul.fp32_precision, backends.cudnn.fp32_precision, backends.fp32_precision)
