"""The one place where launch functions launch kernels, and where a launch can be recorded instead of run, or watched.

A call of a kind that was there before goes past it, by its plan (:mod:`kernels.runtime.plans`), unless somebody watches.
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

from .gpu import launches_dependents
from .switch import Switch

#: ``(kernel, grid, arguments) -> None``; what :func:`record_launches` hands each launch to.
Recorder = Callable[[Any, tuple[int, ...], dict[str, Any]], None]

_recorder: Switch[Recorder | None] = Switch(None)
_records_cpu = Switch(False)
_observers: Switch[tuple[Recorder, ...]] = Switch((), combine=lambda blocks: tuple(o for block in blocks for o in block))
_without_gpu = Switch(False)

#: Triton's interpreter keeps the program that runs in globals of its own: one launch at a time, whatever the thread.
_interpreter = threading.Lock()


def _renew_lock() -> None:
    global _interpreter
    _interpreter = threading.Lock()


# The thread that held it is not in the child.
os.register_at_fork(after_in_child=_renew_lock)

_INT32_MAX = 2**31 - 1


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up. Triton's own unwraps its arguments first: microseconds, hundreds of times a step."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch ``kernel`` over ``grid`` on the device of its tensors; an empty grid launches nothing."""
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
    """The tensors among a launch's arguments, those under tensor descriptors and in tuples too, in order."""
    listed = (a if isinstance(a, tuple) else (a,) for a in arguments.values())
    bases = (a.base if isinstance(a, TensorDescriptor) else a for a in itertools.chain.from_iterable(listed))
    return [a for a in bases if isinstance(a, torch.Tensor)]


def _device_of(arguments: dict[str, Any]) -> torch.device:
    """Of the first tensor: they are all on one."""
    for value in arguments.values():
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, TensorDescriptor):
            return value.base.device
    return tensors_of(arguments)[0].device


def device_of(arguments: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Make the device of a launch's tensors the current one, on which Triton launches; does nothing for CPU tensors."""
    device = _device_of(arguments)
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def run_launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Run a launch: on the current stream of its tensors' device, or in the interpreter."""
    device = _device_of(arguments)
    note = getattr(_thread, "note", None)
    given = arguments
    if note is not None:  # numbers may be marked, and Triton knows floats alone
        given = {name: float(value) if isinstance(value, float) else value for name, value in arguments.items()}
    if _without_gpu.value:
        compiled = kernel[grid](**given)
    else:
        # Triton launches on the current device, which need not be the tensors' own. On the CPU it interprets.
        with torch.cuda.device(device) if device.type == "cuda" else _interpreter:
            compiled = kernel[grid](**given)
    if note is not None:
        note(kernel, grid, arguments, compiled)


#: What :func:`noting` gives each launch of the thread to, with its compiled kernel.
_thread = threading.local()


@contextlib.contextmanager
def noting(note: Callable[[Any, tuple[int, ...], dict[str, Any], Any], None]) -> Iterator[None]:
    """Tell ``note`` of each launch of this thread when it has run, with the kernel that Triton compiled for it."""
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
    """Whether somebody wants to see each launch: then none may go past :func:`launch`."""
    return _recorder.value is not None or bool(_observers.value)


def has_plans(tensor: torch.Tensor) -> bool:
    """Whether launches on ``tensor`` may be planned: on a GPU, real or a stand-in."""
    return tensor.is_cuda or (_without_gpu.value and _recorder.value is None)


def current_stream(on_gpu: bool, index: int) -> int:
    """The stream of a GPU that launches go to, as a number; the stand-in driver's has none."""
    return torch._C._cuda_getCurrentRawStream(index) if on_gpu else 0


@contextlib.contextmanager
def record_launches(recorder: Recorder, *, on_cpu: bool = True) -> Iterator[None]:
    """Hand every launch in the block to ``recorder`` instead of running it; outputs stay uninitialised.

    With ``on_cpu`` CPU tensors count as able to run Triton kernels meanwhile, so that the real code path can be walked, and its
    kernels compiled for any target, on a machine without a GPU.
    """
    with _recorder.set(recorder), _records_cpu.set(on_cpu):
        yield


def is_recording() -> bool:
    """Whether a :func:`record_launches` block is active."""
    return _recorder.value is not None


@contextlib.contextmanager
def observe_launches(observer: Recorder) -> Iterator[None]:
    """Tell ``observer`` of every launch in the block, right before it runs. Blocks may be nested; each observer is told."""
    with _observers.set((observer,)):
        yield


@contextlib.contextmanager
def launch_without_gpu() -> Iterator[None]:
    """Launch kernels on CPU tensors through Triton's active driver, which is a stand-in that runs nothing.

    All that Python does up to the call into the driver is done as on a GPU: for measuring the host's time.
    """
    with _without_gpu.set(True):
        yield


def cpu_counts_as_gpu() -> bool:
    """Whether operations on CPU tensors walk the code path of a GPU: launches are recorded, or a stand-in driver takes them."""
    return _records_cpu.value or _without_gpu.value


def strides(prefix: str, axes: str, tensor: torch.Tensor) -> dict[str, int]:
    """Kernel arguments for a tensor's strides: ``strides("stride_x", "nchw", x)`` gives ``stride_xn``, ``stride_xc``, ..."""
    return {prefix + axis: stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


#: Set by tests: compile and run every kernel as for tensors of more than 2^31 elements.
force_int64 = False


def needs_int64(*tensors: torch.Tensor | None) -> bool:
    """Whether an element offset into any of the tensors, or their number of elements, can pass 2^31 - 1."""
    if force_int64:
        return True
    for tensor in tensors:
        # No offset leaves the storage: of a small one, with few elements over it, no more needs to be asked.
        if tensor is None or max(tensor.numel(), tensor.untyped_storage().nbytes()) < _INT32_MAX - 2**20:
            continue
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        # Tile offsets run past the last element by less than a tile before the mask cuts them off.
        if max(last, tensor.numel()) > _INT32_MAX - 2**20:
            return True
    return False


#: Set by the suite: fills whatever a kernel must write with NaN (or the largest integer) before the launch.
poison_outputs = False


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    if not poison_outputs or tensor.numel() == 0:
        return tensor
    # Of a launch that is noted the fill is no part.
    with contextlib.nullcontext() if getattr(_thread, "note", None) is None else _disable_current_modes():
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def poison(tensors: Sequence[torch.Tensor]) -> None:
    """Fill memory that kernels will write with bytes of ones: NaN in any floating-point dtype, else the largest or -1."""
    for tensor in tensors:
        if tensor.dtype == torch.bool:
            tensor.fill_(True)
        elif tensor.numel():
            size = tensor.untyped_storage().nbytes()
            tensor.as_strided((size // tensor.itemsize,), (1,), 0).view(torch.uint8).fill_(255)


def new_output(size: Sequence[int], dtype: torch.dtype, device: torch.device, *, channels_last: bool = False) -> torch.Tensor:
    """An uninitialised tensor that a kernel will write; ``channels_last``: (N, C, H, W) that is NHWC in memory.

    Not a permuted view: autograd forbids in-place operations on a view that a Function returns. The strides are NHWC's also
    where a size of 1 leaves them open.
    """
    if not channels_last:
        return _poisoned(torch.empty(size, dtype=dtype, device=device))
    n, c, h, w = size
    return _poisoned(torch.empty_strided((n, c, h, w), (h * w * c, 1, w * c, c), dtype=dtype, device=device))


def new_output_like(tensor: torch.Tensor) -> torch.Tensor:
    """``torch.empty_like`` (dense, strides kept) for what a kernel will write."""
    return _poisoned(torch.empty_like(tensor))


def nothing(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What an operator returns in place of a result that was not asked for: its schema has no way to leave one out.

    A plan returns None for it.
    """
    result = like.new_empty(0, dtype=dtype)
    result.not_asked_for = True  # type: ignore[attr-defined]  # an empty result that was asked for is another thing
    return result
