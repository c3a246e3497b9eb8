"""The module through which launch functions launch kernels, and where launches can be recorded instead of run, or observed.

A repeated call of the same kind bypasses it through its plan (:mod:`kernels.runtime.plans`), unless launches are observed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.tools.tensor_descriptor import TensorDescriptor

from . import parsing as parsing  # before the first kernel is compiled
from .gpu import launches_dependents
from .switch import Switch

#: ``(kernel, grid, arguments) -> None``, called for each launch by :func:`record_launches` and :func:`observe_launches`.
Recorder = Callable[[Any, tuple[int, ...], dict[str, Any]], None]

_recorder: Switch[Recorder | None] = Switch(None)
_records_cpu = Switch(False)
_observers: Switch[tuple[Recorder, ...]] = Switch((), combine=lambda blocks: tuple(o for block in blocks for o in block))
_without_gpu = Switch(False)

#: Triton's interpreter keeps the running program in global variables, so only one thread may launch at a time.
_interpreter = threading.Lock()


def _renew_lock() -> None:
    global _interpreter
    _interpreter = threading.Lock()


# A thread that held the lock does not exist in the child process.
os.register_at_fork(after_in_child=_renew_lock)

_INT32_MAX = 2**31 - 1


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up. ``triton.cdiv`` first unwraps its arguments, which takes microseconds hundreds of times a step."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch ``kernel`` over ``grid`` on its tensors' device. An empty grid launches nothing."""
    if 0 in grid:
        return
    if launches_dependents(_device_of(arguments)):
        arguments["launch_pdl"] = True
    recorder = _recorder.value
    if recorder is not None:
        recorder(kernel, grid, arguments)
        return
    for observer in _observers.value:
        observer(kernel, grid, arguments)
    run_launch(kernel, grid, arguments)


def tensors_of(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among a launch's arguments in order, including those in tuples and those of tensor descriptors."""
    listed = (a if isinstance(a, tuple) else (a,) for a in arguments.values())
    bases = (a.base if isinstance(a, TensorDescriptor) else a for a in itertools.chain.from_iterable(listed))
    return [a for a in bases if isinstance(a, torch.Tensor)]


def _device_of(arguments: dict[str, Any]) -> torch.device:
    """The device of the first tensor; all are on one device."""
    for value in arguments.values():
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, TensorDescriptor):
            return value.base.device
    return tensors_of(arguments)[0].device


def device_of(arguments: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Context in which the device of a launch's tensors is the current one, on which Triton launches; no-op on the CPU."""
    device = _device_of(arguments)
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def run_launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Run a launch on the current stream of its tensors' device, or in the interpreter."""
    device = _device_of(arguments)
    note = getattr(_thread, "note", None)
    given = arguments
    if note is not None:  # a recording marks floats as Number, which Triton does not accept
        given = {name: float(value) if isinstance(value, float) else value for name, value in arguments.items()}
    if _without_gpu.value:
        compiled = kernel[grid](**given)
    else:
        # Triton launches on the current device, which may differ from the tensors' device. On the CPU it interprets.
        with torch.cuda.device(device) if device.type == "cuda" else _interpreter:
            compiled = kernel[grid](**given)
    if note is not None:
        note(kernel, grid, arguments, compiled)


#: Holds the thread's callback of :func:`noting`.
_thread = threading.local()


@contextlib.contextmanager
def noting(note: Callable[[Any, tuple[int, ...], dict[str, Any], Any], None]) -> Iterator[None]:
    """Call ``note(kernel, grid, arguments, compiled kernel)`` after each launch of this thread in the block."""
    before = getattr(_thread, "note", None)
    _thread.note = note
    try:
        yield
    finally:
        _thread.note = before


def is_noted() -> bool:
    """Whether a :func:`noting` block of this thread is active."""
    return getattr(_thread, "note", None) is not None


def is_watched() -> bool:
    """Whether launches are recorded or observed, so that none may bypass :func:`launch`."""
    return _recorder.value is not None or bool(_observers.value)


def has_plans(tensor: torch.Tensor) -> bool:
    """Whether launches on ``tensor`` may be planned: on a GPU or by a stand-in driver."""
    return tensor.is_cuda or (_without_gpu.value and _recorder.value is None)


def current_stream(on_gpu: bool, index: int) -> int:
    """The current stream of GPU ``index`` as a number; 0 for the stand-in driver, which has no streams."""
    return torch._C._cuda_getCurrentRawStream(index) if on_gpu else 0


@contextlib.contextmanager
def record_launches(recorder: Recorder, *, on_cpu: bool = True) -> Iterator[None]:
    """Pass every launch in the block to ``recorder`` instead of running it; outputs stay uninitialised.

    With ``on_cpu``, operations on CPU tensors take the GPU's code path inside the block, so that its kernels can be compiled
    for any target on a machine without a GPU.
    """
    with _recorder.set(recorder), _records_cpu.set(on_cpu):
        yield


def is_recording() -> bool:
    """Whether a :func:`record_launches` block is active."""
    return _recorder.value is not None


@contextlib.contextmanager
def observe_launches(observer: Recorder) -> Iterator[None]:
    """Call ``observer`` right before every launch in the block. Nested blocks call each of their observers."""
    with _observers.set((observer,)):
        yield


@contextlib.contextmanager
def launch_without_gpu() -> Iterator[None]:
    """Launch kernels on CPU tensors through Triton's active driver, which must be a stand-in that runs nothing.

    Python does the same work as on a GPU up to the call into the driver, which allows measuring host time without a GPU.
    """
    with _without_gpu.set(True):
        yield


def cpu_counts_as_gpu() -> bool:
    """Whether operations on CPU tensors take the GPU's code path: launches are recorded or go to a stand-in driver."""
    return _records_cpu.value or _without_gpu.value


def strides(prefix: str, axes: str, tensor: torch.Tensor) -> dict[str, int]:
    """A tensor's strides as kernel arguments: ``strides("stride_x", "nchw", x)`` gives ``stride_xn``, ``stride_xc``, ..."""
    return {prefix + axis: stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


#: Set by tests to compile and run every kernel as for tensors of more than 2^31 elements.
force_int64 = False


def needs_int64(*tensors: torch.Tensor | None) -> bool:
    """Whether an element offset into any of the tensors, or their number of elements, can pass 2^31 - 1."""
    if force_int64:
        return True
    for tensor in tensors:
        # Offsets stay inside the storage, so a small storage with few elements needs no further check.
        if tensor is None or max(tensor.numel(), tensor.untyped_storage().nbytes()) < _INT32_MAX - 2**20:
            continue
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        # Masked offsets of a tile exceed the last element's by less than a tile; 2^20 is the margin for them.
        if max(last, tensor.numel()) > _INT32_MAX - 2**20:
            return True
    return False


#: Set by the test suite to fill each kernel's outputs with NaN (or the largest integer) before the launch.
poison_outputs = False


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    if not poison_outputs or tensor.numel() == 0:
        return tensor
    # The fill is not recorded as part of a plan.
    with contextlib.nullcontext() if getattr(_thread, "note", None) is None else _disable_current_modes():
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def poison(tensors: Sequence[torch.Tensor]) -> None:
    """Set all bits of memory that kernels will write: NaN in any floating-point dtype, else the largest integer or -1."""
    for tensor in tensors:
        if tensor.dtype == torch.bool:
            tensor.fill_(True)
        elif tensor.numel():
            size = tensor.untyped_storage().nbytes()
            tensor.as_strided((size // tensor.itemsize,), (1,), 0).view(torch.uint8).fill_(255)


def new_output(size: Sequence[int], dtype: torch.dtype, device: torch.device, *, channels_last: bool = False) -> torch.Tensor:
    """An uninitialised tensor for a kernel to write; ``channels_last``: shape (N, C, H, W), NHWC in memory.

    The result is not a permuted view, because autograd forbids in-place operations on a view that a Function returns. It has
    NHWC strides even where a size of 1 leaves them ambiguous.
    """
    if not channels_last:
        return _poisoned(torch.empty(size, dtype=dtype, device=device))
    n, c, h, w = size
    return _poisoned(torch.empty_strided((n, c, h, w), (h * w * c, 1, w * c, c), dtype=dtype, device=device))


def new_output_like(tensor: torch.Tensor) -> torch.Tensor:
    """``torch.empty_like`` (dense, strides kept) for a kernel to write."""
    return _poisoned(torch.empty_like(tensor))


def nothing(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The empty tensor that an operator returns for an unwanted result: an operator's schema has no optional results.

    A plan returns None in its place.
    """
    result = like.new_empty(0, dtype=dtype)
    result.not_asked_for = True  # type: ignore[attr-defined]  # tells it from an empty result that was asked for
    return result
