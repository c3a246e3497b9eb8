"""Plans: the allocations and launches of an operation, recorded once for each kind of call and then repeated.

The first call of a kind runs the operation's launch functions as written. A :class:`.recording.Recording` notes the memory that
they allocate, the kernels that they launch with their arguments, and the tensors that PyTorch copies. A :class:`.plan.Plan` is
made of these notes; only the addresses are left open. A later call of the same kind looks up the plan, allocates the memory,
fills in the addresses and calls Triton's C launcher (:mod:`kernels.runtime.direct`).

Two calls are of one kind if everything is equal on which launch functions depend: the operator, the problem, each tensor's
shape, strides, dtype and alignment, the device, and the switches of :func:`_switches`. Launch functions do not read tensors'
values. If a recording contains something that cannot be repeated, there is no plan: calls of that kind run launch functions.
"""

from __future__ import annotations

import functools
import operator
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch._C._dynamo import guards

from . import direct, launch, switch
from .arguments import conv_input_precision, matmul_input_precision
from .plan import Number, Plan
from .recording import Recording, Unrepeatable, plan_of

#: The most kinds of calls that are cached; beyond that the oldest are dropped.
MOST_PLANS = 4096

#: Number of recordings made so far, for tests and benchmarks.
made = 0

_plans: dict[Hashable, Plan | None] = {}
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


# A thread that held the lock does not exist in the child process.
os.register_at_fork(after_in_child=_renew_lock)


#: Functions whose return values are part of every kind.
_deciders: list[Callable[[], Hashable]] = []


def decided_by(function: Callable[[], Hashable]) -> Callable[[], Hashable]:
    """Register ``function``, whose value launch functions depend on: calls with different values are of different kinds."""
    _deciders.append(function)
    return function


def _switches(first: Tensor) -> Hashable:
    """Everything besides their arguments that launch functions depend on."""
    return (
        *[decider() for decider in _deciders],
        launch.force_int64,
        _precision(first.dtype),
        first.device if first.is_cuda else triton.runtime.driver.active.get_current_device(),
    )


def _precision(dtype: torch.dtype) -> tuple[str, str] | None:
    """Input precision of (convolutions, matrix products) for float32; None for dtypes that PyTorch's switches do not affect."""
    return (conv_input_precision(dtype), matmul_input_precision(dtype)) if dtype == torch.float32 else None


class _Recent:
    """A recent kind of call and its plan, recognised within about a microsecond."""

    def __init__(self, plan: Plan, tensors: Sequence[Tensor | None], inputs: Sequence[Tensor], changes: int) -> None:
        self.plan = plan
        self.missing = [tensor is None for tensor in tensors] if len(inputs) < len(tensors) else None
        # Dynamo's guards on inputs: type, dtype, device, sizes, strides, and the dispatch keys, which reveal any mode,
        # transform, subclass or lazy negation. One call checks all inputs. The guards hold no tensor.
        self.check = guards.TensorGuards(*inputs, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        self.changes = changes
        self.force_int64 = launch.force_int64
        self.precision = _precision(inputs[0].dtype)


#: The last few kinds by function, problem and the first tensor's shape. A few layers of a network may share all three.
_recent: dict[Hashable, list[_Recent]] = {}
_MOST_RECENT = 4


def find(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], problem: Hashable
) -> tuple[Plan, list[Tensor], list[int]] | None:
    """(plan, inputs, their addresses) if a recent call of this function and problem was of the same kind; else None.

    A result other than None implies that all tensors are plain and that no mode or transform is active.
    """
    first = tensors[0]
    candidates = _recent.get((function, problem, None if first is None else first.shape))
    if candidates is None or not direct.is_possible():
        return None
    inputs = [tensor for tensor in tensors if tensor is not None]
    missing = None if len(inputs) == len(tensors) else [tensor is None for tensor in tensors]
    for recent in candidates:
        if recent.missing == missing and recent.check(*inputs):
            break
    else:
        return None
    addresses = [tensor.data_ptr() for tensor in inputs]
    if (
        recent.changes != switch.changes
        or recent.force_int64 != launch.force_int64
        or functools.reduce(operator.or_, addresses) & 15
        or (recent.precision is not None and recent.precision != _precision(inputs[0].dtype))
        or any(recent.plan.hooks)
    ):
        return None
    return recent.plan, inputs, addresses


def _remember(key: Hashable, new: _Recent) -> None:
    with _lock:
        if len(_recent) >= MOST_PLANS:
            _recent.clear()
        others = [recent for recent in _recent.get(key, ()) if recent.changes == switch.changes]
        # A new list, because another thread may be iterating over the old one.
        _recent[key] = [new, *others[: _MOST_RECENT - 1]]


def call(
    function: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    problem: Hashable,
    numbers: Sequence[float] = (),
    *,
    fresh: int = 0,
) -> Any:
    """``function(*tensors, problem, *numbers)``, through its plan if there is one.

    Args:
        function: allocates and launches; returns new tensors, views of them or None, as a single value or a tuple.
        tensors: at least one plain tensor, all on one device.
        problem: the function's other arguments, as one hashable value.
        numbers: numbers that the function only passes to its kernels.
        fresh: the last ``fresh`` tensors were made for this call, and :func:`find` is called without them.
    """
    changes = switch.changes  # read before any switch, since another thread may set one in the meantime
    inputs = [tensor for tensor in tensors if tensor is not None]
    first = inputs[0]
    if not launch.has_plans(first):
        return function(*tensors, problem, *numbers)
    addresses = [tensor.data_ptr() for tensor in inputs]
    described = [None if t is None else _describe(t) for t in tensors]
    storages = [tensor.untyped_storage()._cdata for tensor in inputs]
    shared = None if len(set(storages)) == len(storages) else tuple([storages.index(storage) for storage in storages])
    kind = (function, problem, _switches(first), shared, *described, *[address & 15 for address in addresses])
    plan = _plans.get(kind, _UNKNOWN)
    if plan is _UNKNOWN:
        return _record(kind, inputs, functools.partial(function, *tensors, problem), numbers)
    if plan is None or not plan.can_run():
        return function(*tensors, problem, *numbers)
    if not functools.reduce(operator.or_, addresses) & 15:
        known = len(tensors) - fresh
        recent = _Recent(plan, tensors[:known], inputs[: len(inputs) - fresh], changes)
        _remember((function, problem, first.shape), recent)
    return plan.run(inputs, addresses, numbers)


def _describe(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad


_UNKNOWN: Any = object()


def is_recording() -> bool:
    """Whether this thread is recording a plan, so that calls inside must run their launch functions."""
    return launch.is_noted()


def _record(kind: Hashable, inputs: list[Tensor], function: functools.partial, numbers: Sequence[float]) -> Any:
    global made
    if launch.is_watched() or not direct.is_possible():
        return function(*numbers)
    marked = [Number(number) for number in numbers]
    for i, number in enumerate(marked):
        number.index = i
    recording = Recording(inputs)
    with recording, launch.noting(recording.note_launch):
        result = function(*marked)
    try:
        plan: Plan | None = plan_of(recording, result, inputs[0].device)
    except Unrepeatable as error:
        plan, unrepeatable[getattr(function.func, "__qualname__", repr(function.func))] = None, str(error)
    with _lock:
        while len(_plans) >= MOST_PLANS:
            del _plans[next(iter(_plans))]
        _plans[kind] = plan
        made += 1
    return result


#: By function, the reason why its last recording could not become a plan; for tests and for finding lost host time.
unrepeatable: dict[str, str] = {}


def forget() -> None:
    """Forget all plans."""
    with _lock:
        _plans.clear()
        _recent.clear()
        unrepeatable.clear()
