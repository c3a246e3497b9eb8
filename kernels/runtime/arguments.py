"""Argument checks, and the precision of float32 products.

A check raises before any kernel is launched. Its message names the argument, the given value and the allowed values. Numbers
and flags may be NumPy's. A check returns Python's types, which problems and launches need because Triton does not compile for
others. float32 products follow PyTorch's own TF32 switches, one for convolutions and one for matrix products.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from .backend import INTERPRETED

T = TypeVar("T")

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class ArgumentValueError(ValueError, RuntimeError):
    """An invalid shape, size, device or number. PyTorch's operations raise a RuntimeError for most of these."""


class ArgumentTypeError(TypeError, NotImplementedError):
    """An invalid dtype, layout or number of values. PyTorch's operations raise a RuntimeError for these too.

    Some raise NotImplementedError, a subclass of RuntimeError. A value that is not a tensor or not an int raises a plain
    TypeError, as in PyTorch.
    """


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensors(**tensors: Tensor | None) -> None:
    """Check that all are strided tensors on one device, of one dtype that the kernels support; ``bias`` may be None.

    Raises:
        TypeError: not a tensor, an unsupported dtype or layout, or dtypes that differ.
        ValueError: devices that differ.
    """
    dtype, device = None, None
    for name, tensor in tensors.items():  # fast path for valid arguments
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            break
        if dtype is None:
            dtype, device = tensor.dtype, tensor.device
            if dtype not in _KERNEL_DTYPES:
                break
        elif tensor.dtype is not dtype or tensor.device != device:
            break
    else:
        return
    _check_each(tensors)


def _check_each(tensors: dict[str, Tensor | None]) -> None:
    given = {name: t for name, t in tensors.items() if t is not None or name != "bias"}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    (first_name, first), *rest = cast("dict[str, Tensor]", given).items()
    allowed = (*_KERNEL_DTYPES, torch.float64) if INTERPRETED or first.device.type != "cuda" else _KERNEL_DTYPES
    for name, tensor in [(first_name, first), *rest]:
        if tensor.dtype not in allowed:
            extra = "" if torch.float64 in allowed else " (float64 runs on the CPU: in the interpreter or the reference)"
            raise ArgumentTypeError(f"{name} must be one of {_names(allowed)} on {tensor.device}, got {tensor.dtype}{extra}")
        if tensor.layout != torch.strided:
            raise ArgumentTypeError(f"{name} must be a strided tensor, got layout {tensor.layout}")
    for name, tensor in rest:
        if tensor.device != first.device:
            raise ArgumentValueError(
                f"{name} must be on the device of {first_name}: {first_name} is on {first.device}, {name} on {tensor.device}"
            )
        if tensor.dtype != first.dtype:
            raise ArgumentTypeError(
                f"{name} must have the dtype of {first_name}: {first_name} is {first.dtype}, {name} is {tensor.dtype}"
            )


#: Cached results of :func:`checked`, each with the types of its arguments.
_checked: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
_MOST_CHECKED = 4096


def checked(check: Callable[..., T], *arguments: Any) -> T:
    """``check(*arguments)``, cached by the arguments' values and types; ``check`` must depend on sizes and options alone.

    Calls with unhashable arguments (lists) are not cached.
    """
    if torch.compiler.is_compiling():
        return check(*arguments)
    try:
        known = _checked.get((check, arguments))
    except TypeError:
        return check(*arguments)
    # Types are compared too: a float, bool or NumPy number may equal an int and yet be invalid.
    types = tuple(map(type, arguments))
    if tuple in types:
        types += tuple([type(inner) for argument in arguments if type(argument) is tuple for inner in argument])
    if known is not None and known[1] == types:
        return known[0]
    answer = check(*arguments)
    if len(_checked) >= _MOST_CHECKED:
        _checked.clear()
    _checked[check, arguments] = answer, types
    return answer


def pair(name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """``value``, one or two ints, as two ints, each at least ``minimum``."""
    given = tuple(value) if isinstance(value, Sequence) else (value,)
    try:
        # PyTorch rejects a Python bool only as the first of a pair. Before NumPy 2, operator.index accepts NumPy's bool.
        if isinstance(given[0] if given else None, bool) or any(isinstance(each, np.bool_) for each in given):
            raise TypeError
        values = [operator.index(v) for v in given]
    except TypeError:
        raise TypeError(f"{name} must be an int or two ints, got {value!r}") from None
    if len(values) not in (1, 2):
        raise ArgumentTypeError(f"{name} must be an int or two ints, got {value!r}")
    if min(values) < minimum:
        raise ArgumentValueError(f"{name} must be at least {minimum}, got {value!r}")
    if max(values) >= 2**63:
        raise ArgumentValueError(f"{name} must be an int64, got {value!r}")
    return values[0], values[-1]


def integer(name: str, value: object) -> int:
    """``value`` as an int. NumPy's integers are accepted; booleans raise a TypeError."""
    try:
        if isinstance(value, (bool, np.bool_)):  # before NumPy 2, operator.index accepts NumPy's bool
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]  # raises a TypeError for other types
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None


def flag(name: str, value: object) -> bool:
    """``value`` as a bool. NumPy's booleans are accepted; numbers raise a TypeError."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return bool(value)


def number(name: str, value: object) -> float:
    """``value`` as a Python int or float. NumPy's numbers are converted: Triton and safe unpickling accept Python's only.

    Raises:
        TypeError: ``value`` is not a real number; the message begins with ``name``.
    """
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        value = float(value) if isinstance(value, np.longdouble) else value.item()
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def check_activation(activation: str | None) -> bool:
    """Whether the activation is ReLU; raises a ValueError for anything but None and "relu"."""
    if activation not in (None, "relu"):
        raise ValueError(f'activation must be None or "relu", got {activation!r}')
    return activation == "relu"


def check_output_format(output_format: torch.memory_format) -> bool:
    """Whether the output is channels-last (NHWC); raises a ValueError for formats other than channels-last and contiguous."""
    if output_format not in (torch.channels_last, torch.contiguous_format):
        raise ValueError(f"output_format must be None, torch.channels_last or torch.contiguous_format, got {output_format!r}")
    return output_format == torch.channels_last


def check_probability(p: float) -> float:
    """``p`` as a float; raises a ValueError outside of [0, 1]."""
    if type(p) is not float:
        p = float(number("p (the probability of dropping an element)", p))
    if not 0.0 <= p <= 1.0:
        raise ArgumentValueError(f"p (the probability of dropping an element) must be in [0, 1], got {p!r}")
    return p


def _resolve(*settings: str) -> str:
    """The first setting that is not "none" (inherit); "ieee" if all are."""
    chosen = next((s for s in settings if s != "none"), "ieee")
    return "tf32" if chosen == "tf32" else "ieee"


def conv_input_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot`` in a convolution: "tf32" or "ieee"; only float32 depends on the switch."""
    if dtype != torch.float32:
        return "ieee"
    backends: Any = torch.backends  # Any, since some of its attributes are created at run time
    return _resolve(backends.cudnn.conv.fp32_precision, backends.cudnn.fp32_precision, backends.fp32_precision)


def matmul_input_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot`` in a linear layer: "tf32" or "ieee"; only float32 depends on the switch."""
    if dtype != torch.float32:
        return "ieee"
    backends: Any = torch.backends  # Any, since some of its attributes are created at run time
    return _resolve(backends.cuda.matmul.fp32_precision, backends.cudnn.fp32_precision, backends.fp32_precision)
