"""What an operation allocates and launches, worked out once for each kind of call and then only repeated.

The first call of a kind runs the operation's launch functions as they are written. A :class:`_Recording` notes what they do:
which memory they ask PyTorch for, which kernels they launch on what, which tensors PyTorch copies. From the notes comes a
:class:`Plan`: the addresses are left open, all else is decided. A later call of the same kind looks the plan up, asks for
memory, fills in the addresses and calls Triton's C launcher (:mod:`kernels.runtime.direct`).

Two calls are of one kind if all is equal that launch functions decide by: the operator, the problem, each tensor's shape,
strides, dtype and alignment, the device, and the switches of :func:`_switches`. Launch functions do not read tensors' values. A
recording that sees something it cannot repeat makes no plan: calls of that kind go on running launch functions.
"""

from __future__ import annotations

import functools
import itertools
import operator
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._C._dynamo import guards
from torch.utils._python_dispatch import TorchDispatchMode

from . import direct, launch, switch
from .arguments import conv_input_precision, matmul_input_precision

# As Inductor's own code allocates, on the current device: half the way through PyTorch's dispatcher.
_empty_strided_cpu: Callable[..., Tensor] = guards._empty_strided_cpu  # type: ignore[attr-defined]
_empty_strided_cuda: Callable[..., Tensor] = guards._empty_strided_cuda  # type: ignore[attr-defined]

#: Kinds of calls that are remembered; of more the oldest are forgotten.
MOST_PLANS = 4096
#: Addresses of one tensor argument whose tensor maps are remembered.
_MOST_MAPS = 64
#: Workspace begins at multiples of so many bytes, as PyTorch's CUDA allocator's memory does.
_ALIGNMENT = 512

#: Plans made so far: for tests and benchmarks.
made = 0

_plans: dict[Hashable, Plan | None] = {}
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


# The thread that held it is not in the child.
os.register_at_fork(after_in_child=_renew_lock)


class Geometry(NamedTuple):
    """Where a tensor's elements lie in memory that begins at a plan's ``source``; the offset is in elements.

    ``whole``: just as the source's own do.
    """

    source: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    whole: bool = False


class Number(float):
    """A number that a function hands to its kernels as it is: it may be another one at each call of a kind."""

    index: int


class Allocation(NamedTuple):
    """A tensor that is made anew at each call."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Copy(NamedTuple):
    """PyTorch's ``to.copy_(source)``, or ``to.zero_()`` without a source."""

    to: Geometry
    source: Geometry | None


class _Described(NamedTuple):
    """An address in the pool, and its tensor maps by address."""

    slot: int
    encode: Callable[[int], Any]
    maps: dict[int, Any]


class _Step(NamedTuple):
    """A copy, or a launch with the values that it picks out of the pool."""

    copy: Copy | None
    run: direct.Launcher
    values: Callable[[Sequence[Any]], tuple[Any, ...]]


class Plan:
    """One kind of call, ready to be repeated. It holds no tensor.

    A pool of values is built at each call: the inputs' addresses, those of what is allocated, addresses with an offset to
    one of these, tensor maps, and then the numbers that are always the same. Each launch picks its arguments out of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.index = device.index if self.on_gpu else 0
        self.allocations: list[Allocation] = []
        self.workspace = 0  # bytes
        self.derived: list[tuple[int, int]] = []  # (slot, bytes)
        self.described: list[_Described] = []
        self.constants: list[Any] = []
        self.steps: list[_Step] = []
        self.hooks: tuple[list[Any], ...] = ()
        self.results: list[Any] = []  # where each tensor lies; what is no tensor, as it was
        self.whole: list[tuple[int, Any]] | None = None  # of results that are whole allocations: which one, or -1 and a value
        self.is_tuple = True

    def can_run(self) -> bool:
        """Whether all that is to be done for a launch is to launch it."""
        return not launch.is_watched() and direct.is_possible() and not any(self.hooks)

    def run(self, inputs: Sequence[Tensor], pool: list[Any], numbers: Sequence[float] = ()) -> Any:
        """What the operator returned at the recorded call, for other tensors of the same kind.

        Args:
            pool: the inputs' addresses; it is used up.
            numbers: in place of those of the recorded call.
        """
        if self.on_gpu and torch._C._cuda_getDevice() != self.index:
            with torch.cuda.device(self.index):
                return self.run(inputs, pool, numbers)
        empty_strided = _empty_strided_cuda if self.on_gpu else _empty_strided_cpu
        made = [empty_strided(*allocation) for allocation in self.allocations]
        for tensor in made:
            pool.append(tensor.data_ptr())
        if self.workspace:
            workspace = empty_strided((self.workspace,), (1,), torch.uint8)
            pool.append(workspace.data_ptr())
        if launch.poison_outputs:
            launch.poison([*made, workspace] if self.workspace else made)
        for slot, offset in self.derived:
            pool.append(pool[slot] + offset)
        for slot, encode, maps in self.described:
            address = pool[slot]
            tensor_map = maps.get(address)
            if tensor_map is None:
                if len(maps) >= _MOST_MAPS:
                    maps.clear()
                tensor_map = maps[address] = encode(address)
            pool.append(tensor_map)
        pool += self.constants
        pool += numbers
        stream = launch.current_stream(self.on_gpu, self.index)
        for copy, run, values in self.steps:
            if copy is None:
                run(stream, values(pool))
            else:
                _copy(copy, [*inputs, *made])
        if self.whole is not None:
            results = [value if i < 0 else made[i] for i, value in self.whole]
        else:
            tensors = [*inputs, *made]
            results = [_view(r, tensors) if isinstance(r, Geometry) else r for r in self.results]
        return tuple(results) if self.is_tuple else results[0]


def _view(geometry: Geometry, tensors: Sequence[Tensor]) -> Tensor:
    source, size, stride, offset, whole = geometry
    tensor = tensors[source]
    return tensor if whole else tensor.as_strided(size, stride, tensor.storage_offset() + offset)


def _copy(copy: Copy, tensors: Sequence[Tensor]) -> None:
    to = _view(copy.to, tensors)
    if copy.source is None:
        to.zero_()
    else:
        to.copy_(_view(copy.source, tensors))


# ------------------------------------------------------------------------------------------------------- making plans


class _Unrepeatable(Exception):
    """A recording has something that a plan cannot repeat."""


_ALLOCATES = frozenset(("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"))


class _Recording(TorchDispatchMode):
    """Notes what an operator does on ``inputs``: memory, copies, launches."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.inputs = inputs
        self.obstacle: str | None = None
        self.kept: list[Tensor] = []  # so that no two of a recording have one address
        self.sources: dict[int, int] = {}  # by storage: an index into inputs, and then kept
        self.shared: dict[int, list[int]] = {}  # by storage: the inputs that lie in it, if there are several
        for i, tensor in enumerate(inputs):
            storage = tensor.untyped_storage()._cdata
            first = self.sources.setdefault(storage, i)
            if first != i:
                self.shared.setdefault(storage, [first]).append(i)
        if any(self._overlap([inputs[i] for i in together]) for together in self.shared.values()):
            self.obstacle = "two inputs share memory"
        self.touched: set[int] = set()  # sources that PyTorch reads or writes
        self.steps: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name in _ALLOCATES:
            self._note_allocation(result)
        elif name == "aten::clone":
            self._note_allocation(result)
            self._note_copy(result, args[0])
        elif name == "aten::copy_":
            self._note_copy(args[0], args[1])
        elif name == "aten::zero_":
            self._note_copy(args[0], None)
        elif not function.is_view and name not in ("aten::_unsafe_view", "aten::_reshape_alias"):
            self.obstacle = self.obstacle or name
        return result

    def _note_allocation(self, tensor: Tensor) -> None:
        self.sources[tensor.untyped_storage()._cdata] = len(self.inputs) + len(self.kept)
        self.kept.append(tensor)

    def _note_copy(self, to: Tensor, source: Tensor | None) -> None:
        try:
            step = Copy(self.geometry(to), None if source is None else self.geometry(source))
        except _Unrepeatable as error:
            self.obstacle = self.obstacle or str(error)
            return
        self.touched |= {g.source for g in step if g is not None}
        self.steps.append(step)

    def note_launch(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], compiled: Any) -> None:
        self.steps.append((kernel, grid, arguments, compiled))

    @staticmethod
    def _overlap(tensors: list[Tensor]) -> bool:
        """Whether any two reach into each other's memory, from first to last element."""
        spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t.shape, t.stride()) * t.itemsize) for t in tensors)
        return any(end > begin for (_, end), (begin, _) in itertools.pairwise(spans))

    def source_of(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()._cdata
        if storage in self.shared:  # gradients in a bucket of DistributedDataParallel: which of them it is, its address says
            for i in self.shared[storage]:
                if self.inputs[i].data_ptr() == tensor.data_ptr():
                    return i
            raise _Unrepeatable("a part of an input that shares its memory with another")
        source = self.sources.get(storage)
        if source is None:
            raise _Unrepeatable("memory that is neither an input's nor was made here")
        return source

    def result(self, value: Any) -> Any:
        """Where a result lies; what is no tensor is the same each time. A vector of no elements is one not asked for."""
        if isinstance(value, Tensor):
            return None if value.shape == (0,) else self.geometry(value)
        return value

    def tensor(self, source: int) -> Tensor:
        return self.inputs[source] if source < len(self.inputs) else self.kept[source - len(self.inputs)]

    def geometry(self, tensor: Tensor) -> Geometry:
        source = self.source_of(tensor)
        base = self.tensor(source)
        if base.dtype != tensor.dtype:
            raise _Unrepeatable("a view of another dtype")
        return Geometry(source, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset() - base.storage_offset()))


class _Address(NamedTuple):
    """An offset in bytes to what a slot of the pool holds."""

    slot: int
    offset: int


def _plan_of(recording: _Recording, result: Any, device: torch.device) -> Plan:
    """The plan that repeats ``recording``.

    Raises:
        _Unrepeatable: it cannot be repeated.
    """
    if recording.obstacle is not None:
        raise _Unrepeatable(recording.obstacle)
    plan = Plan(device)
    places = _place_memory(plan, recording, result)
    pool = _Pool(plan, recording, places)
    for step in recording.steps:
        if isinstance(step, Copy):
            to, source = step
            copy = Copy(*[None if g is None else _seen(_placed(g, places), plan, recording) for g in (to, source)])  # type: ignore[arg-type]
            plan.steps.append(_Step(copy, _run_nothing, pool.getter([])))
            continue
        kernel, grid, arguments, compiled = step
        run, values = direct.bind(kernel, compiled, grid), direct.leaves(compiled, arguments)
        if run is None or values is None:
            raise _Unrepeatable(f"{kernel.fn.__name__} is not launched directly")
        plan.steps.append(_Step(None, run, pool.getter(values)))
    plan.hooks = tuple({id(step[0]): step[0].pre_run_hooks for step in recording.steps if not isinstance(step, Copy)}.values())
    pool.finish()
    return plan


def _run_nothing(stream: int, values: tuple[Any, ...]) -> None:
    raise AssertionError("a copy launches nothing")


def _placed(geometry: Geometry, places: dict[int, _Address]) -> Geometry:
    return geometry._replace(source=places[geometry.source].slot)


def _seen(geometry: Geometry, plan: Plan, recording: _Recording) -> Geometry:
    """``geometry``, which says whether it is all of its tensor."""
    count = len(recording.inputs)
    if geometry.source < count:
        tensor = recording.inputs[geometry.source]
        size, stride = tuple(tensor.shape), tensor.stride()
    else:
        size, stride, _ = plan.allocations[geometry.source - count]
    return geometry._replace(whole=(size, stride, 0) == geometry[1:4])


def _place_memory(plan: Plan, recording: _Recording, result: Any) -> dict[int, _Address]:
    """Where each of the recording's sources is: results, and what PyTorch copies, are tensors; the rest is in the workspace."""
    plan.is_tuple = isinstance(result, tuple)
    results = [recording.result(r) for r in (result if plan.is_tuple else (result,))]
    geometries = [r for r in results if isinstance(r, Geometry)]
    count = len(recording.inputs)
    if any(g.source < count for g in geometries):
        raise _Unrepeatable("a result that is an input")
    tensors = {g.source for g in geometries} | recording.touched
    places = {i: _Address(i, 0) for i in range(count)}
    of_tensors = [(source, t) for source, t in enumerate(recording.kept, start=count) if source in tensors]
    for source, tensor in of_tensors:
        places[source] = _Address(count + len(plan.allocations), 0)
        # A view as the only result is allocated as it is.
        views = list({g for g in geometries if g.source == source})
        whole = len(views) == 1 and views[0].offset == 0 and _is_dense(views[0], tensor.numel())
        size, stride = (views[0].size, views[0].stride) if whole else (tuple(tensor.shape), tensor.stride())
        plan.allocations.append(Allocation(size, stride, tensor.dtype))
    workspace = count + len(plan.allocations)
    offsets, plan.workspace = _lay_out(recording, tensors)
    places |= {source: _Address(workspace, offset) for source, offset in offsets.items()}
    plan.results = [_placed(r, places) if isinstance(r, Geometry) else r for r in results]
    plan.whole = []
    for r in plan.results:
        if not isinstance(r, Geometry):
            plan.whole.append((-1, r))
        elif plan.allocations[r.source - count][:2] == (r.size, r.stride) and not r.offset:
            plan.whole.append((r.source - count, None))
        else:
            plan.whole = None
            break
    return places


def _lay_out(recording: _Recording, elsewhere: set[int]) -> tuple[dict[int, int], int]:
    """Offsets of what is in the workspace, and how large that is: who is never needed at the same time may lie in one place.

    The largest first, each at the lowest offset that is free for all of its life, from its first to its last launch.
    """
    lives: dict[int, tuple[int, int]] = {}
    for i, step in enumerate(recording.steps):
        if not isinstance(step, Copy):
            for source in {recording.source_of(tensor) for tensor in launch.tensors_of(step[2])}:
                lives[source] = (lives.get(source, (i, i))[0], i)
    sizes = {
        source: -(-recording.tensor(source).untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        for source in lives
        if source >= len(recording.inputs) and source not in elsewhere
    }
    offsets: dict[int, int] = {}
    for source in sorted(sizes, key=lambda source: (-sizes[source], source)):
        if sizes[source] == 0:
            continue
        first, last = lives[source]
        taken = sorted((offsets[o], sizes[o]) for o in offsets if lives[o][0] <= last and first <= lives[o][1])
        offset = 0
        for begin, size in taken:
            if begin >= offset + sizes[source]:
                break
            offset = max(offset, begin + size)
        offsets[source] = offset
    return offsets, max((offsets[o] + sizes[o] for o in offsets), default=0)


def _is_dense(geometry: Geometry, elements: int) -> bool:
    return elements > 0 and torch.Size(geometry.size).numel() == elements == _extent(geometry.size, geometry.stride)


def _extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last, both counted."""
    return 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


class _Pool:
    """What launches pick their arguments from, while it grows: addresses, tensor maps and constants by their slots."""

    def __init__(self, plan: Plan, recording: _Recording, places: dict[int, _Address]) -> None:
        self.plan, self.recording, self.places = plan, recording, places
        self.begins = len(recording.inputs) + len(plan.allocations) + bool(plan.workspace)
        self.derived: dict[_Address, int] = {}
        self.maps: list[tuple[_Address, Callable[[int], Any]]] = []
        self.constants: dict[tuple[type, Any], int] = {}
        self.picked: list[list[tuple[str, Any]]] = []

    def address(self, tensor: Tensor) -> _Address | None:
        """None for memory of no bytes, which has no address."""
        source = self.recording.source_of(tensor)
        place = self.places.get(source)
        if place is None:
            return None
        return _Address(place.slot, place.offset + tensor.data_ptr() - self.recording.tensor(source).data_ptr())

    def getter(self, values: list[Any]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """To be called with the finished pool. Its indices are known when all launches are."""
        picked: list[tuple[str, Any]] = []
        for value in values:
            if isinstance(value, direct.Described):
                address = self.address(value.base)
                assert address is not None
                if address.offset:
                    self.derived.setdefault(address, len(self.derived))
                picked.append(("map", len(self.maps)))
                self.maps.append((address, value.encode))
            elif isinstance(value, Tensor):
                address = self.address(value)
                if address is None:
                    picked.append(("constant", self._constant(0)))
                elif address.offset == 0:
                    picked.append(("slot", address.slot))
                else:
                    picked.append(("derived", self.derived.setdefault(address, len(self.derived))))
            elif isinstance(value, Number):
                picked.append(("number", value.index))
            elif value is None or isinstance(value, (bool, int, float)):
                picked.append(("constant", self._constant(value)))
            else:
                raise _Unrepeatable(f"an argument that is a {type(value).__name__}")
        self.picked.append(picked)
        return lambda pool: ()

    def _constant(self, value: Any) -> int:
        return self.constants.setdefault((type(value), value), len(self.constants))

    def finish(self) -> None:
        """Give the plan its pool, and its launches their places in it."""
        maps = self.begins + len(self.derived)
        constants = maps + len(self.maps)
        numbers = constants + len(self.constants)
        first = {"slot": 0, "derived": self.begins, "map": maps, "constant": constants, "number": numbers}
        self.plan.derived = [(a.slot, a.offset) for a in self.derived]
        self.plan.described = [
            _Described(a.slot if not a.offset else self.begins + self.derived[a], encode, {}) for a, encode in self.maps
        ]
        self.plan.constants = [value for _, value in self.constants]
        self.plan.steps = [
            step._replace(values=_picker([first[kind] + i for kind, i in picked]))
            for step, picked in zip(self.plan.steps, self.picked, strict=True)
        ]


def _picker(indices: list[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda pool: tuple(pool[i] for i in indices)


# -------------------------------------------------------------------------------------------------------------- calls


#: Functions whose values are part of every kind.
_deciders: list[Callable[[], Hashable]] = []


def decided_by(function: Callable[[], Hashable]) -> Callable[[], Hashable]:
    """Say that launch functions ask what ``function`` returns: calls with different values are of different kinds."""
    _deciders.append(function)
    return function


def _switches(first: Tensor) -> Hashable:
    """All that launch functions ask beside their arguments."""
    return (
        *[decider() for decider in _deciders],
        launch.force_int64,
        _precision(first.dtype),
        first.device if first.is_cuda else triton.runtime.driver.active.get_current_device(),
    )


def _precision(dtype: torch.dtype) -> tuple[str, str] | None:
    """How products of ``dtype`` are formed, where PyTorch's switches say."""
    return (conv_input_precision(dtype), matmul_input_precision(dtype)) if dtype == torch.float32 else None


class _Recent:
    """A kind of call with a plan, to be recognised in a microsecond."""

    def __init__(self, plan: Plan, tensors: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> None:
        self.plan = plan
        self.missing = [tensor is None for tensor in tensors] if len(inputs) < len(tensors) else None
        # What Dynamo's compiled code asks of its inputs: type, dtype, device, sizes, strides, and the dispatch keys, in which
        # any mode, transform, subclass or lazy negation shows. One call for all; it holds no tensor.
        self.check = guards.TensorGuards(*inputs, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        self.changes = switch.changes
        self.force_int64 = launch.force_int64
        self.precision = _precision(inputs[0].dtype)


#: By function and problem the last few, as many as layers of a network may share both.
_recent: dict[tuple[Any, Hashable], list[_Recent]] = {}
_MOST_RECENT = 4


def find(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], problem: Hashable
) -> tuple[Plan, list[Tensor], list[int]] | None:
    """The plan of a call like one of the last of this function and problem, and what to run it with; None if it is another.

    Where there is an answer, all tensors are plain ones, and no mode or transform is active.
    """
    candidates = _recent.get((function, problem))
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


def _remember(function: Callable[..., Any], problem: Hashable, new: _Recent) -> None:
    with _lock:
        if len(_recent) >= MOST_PLANS:
            _recent.clear()
        others = [recent for recent in _recent.get((function, problem), ()) if recent.changes == switch.changes]
        # A list of its own: another thread may be looking through the one that was there.
        _recent[function, problem] = [new, *others[: _MOST_RECENT - 1]]


def call(
    function: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    problem: Hashable,
    numbers: Sequence[float] = (),
    *,
    fresh: int = 0,
) -> Any:
    """``function(*tensors, problem, *numbers)``, by its plan where there is one.

    Args:
        function: allocates and launches, and returns new tensors, views of them or None: one or a tuple.
        tensors: plain ones on one device, at least one.
        problem: all else that the function is told.
        numbers: that it hands to its kernels, and does nothing else with.
        fresh: how many of the tensors, the last ones, were made for this call: :func:`find` is not asked about these.
    """
    inputs = [tensor for tensor in tensors if tensor is not None]
    first = inputs[0]
    if not launch.has_plans(first):
        return function(*tensors, problem, *numbers)
    addresses = [tensor.data_ptr() for tensor in inputs]
    described = [None if t is None else _describe(t) for t in tensors]
    kind = (function, problem, _switches(first), *described, *[address & 15 for address in addresses])
    plan = _plans.get(kind, _UNKNOWN)
    if plan is _UNKNOWN:
        return _record(kind, inputs, functools.partial(function, *tensors, problem), numbers)
    if plan is None or not plan.can_run():
        return function(*tensors, problem, *numbers)
    if not functools.reduce(operator.or_, addresses) & 15:
        _remember(function, problem, _Recent(plan, tensors[: len(tensors) - fresh], inputs[: len(inputs) - fresh]))
    return plan.run(inputs, addresses, numbers)


def _describe(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad


_UNKNOWN: Any = object()


def is_recording() -> bool:
    """Whether a plan is being made in this thread: then what is called inside runs its launch functions."""
    return launch.is_noted()


def _record(kind: Hashable, inputs: list[Tensor], function: functools.partial, numbers: Sequence[float]) -> Any:
    global made
    if launch.is_watched() or not direct.is_possible():
        return function(*numbers)
    marked = [Number(number) for number in numbers]
    for i, number in enumerate(marked):
        number.index = i
    recording = _Recording(inputs)
    with recording, launch.noting(recording.note_launch):
        result = function(*marked)
    try:
        plan: Plan | None = _plan_of(recording, result, inputs[0].device)
    except _Unrepeatable as error:
        plan, unrepeatable[getattr(function.func, "__qualname__", repr(function.func))] = None, str(error)
    with _lock:
        while len(_plans) >= MOST_PLANS:
            del _plans[next(iter(_plans))]
        _plans[kind] = plan
        made += 1
    return result


#: Why the last call of a function that has no plan has none: for tests and whoever looks for lost time.
unrepeatable: dict[str, str] = {}


def forget() -> None:
    """Forget all plans."""
    with _lock:
        _plans.clear()
        _recent.clear()
