"""Recording an operation's launch functions, and making a plan of the recording."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import direct, launch
from .plan import Allocation, Copy, Described, Geometry, Number, Plan, Step

#: Alignment in bytes of tensors in the workspace, the same as that of PyTorch's CUDA allocator.
_ALIGNMENT = 512


class Unrepeatable(Exception):
    """A recording contains something that a plan cannot repeat."""


_ALLOCATES = frozenset(("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"))


class Recording(TorchDispatchMode):
    """Dispatch mode that notes an operator's allocations, copies and launches on ``inputs``."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.inputs = inputs
        self.obstacle: str | None = None
        self.kept: list[Tensor] = []  # allocations, kept alive so that no two of them get the same address
        self.sources: dict[int, int] = {}  # by storage: an index into the list of inputs followed by kept
        self.shared: dict[int, list[int]] = {}  # by storage: indices of the inputs in it, if there are several
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
        except Unrepeatable as error:
            self.obstacle = self.obstacle or str(error)
            return
        self.touched |= {g.source for g in step if g is not None}
        self.steps.append(step)

    def note_launch(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], compiled: Any) -> None:
        self.steps.append((kernel, grid, arguments, compiled))

    @staticmethod
    def _overlap(tensors: list[Tensor]) -> bool:
        """Whether the memory of any two tensors overlaps, from first to last element."""
        spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t.shape, t.stride()) * t.itemsize) for t in tensors)
        return any(end > begin for (_, end), (begin, _) in itertools.pairwise(spans))

    def source_of(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()._cdata
        if storage in self.shared:  # such as gradients in a bucket of DistributedDataParallel: told apart by address
            for i in self.shared[storage]:
                if self.inputs[i].data_ptr() == tensor.data_ptr():
                    return i
            raise Unrepeatable("a part of an input that shares memory with another input")
        source = self.sources.get(storage)
        if source is None:
            raise Unrepeatable("a tensor that is neither an input nor allocated by the call")
        return source

    def result(self, value: Any) -> Any:
        """A result's geometry; None for an unwanted result; a value that is not a tensor stays as it is."""
        if not isinstance(value, Tensor):
            return value
        return None if hasattr(value, "not_asked_for") else self.geometry(value)

    def tensor(self, source: int) -> Tensor:
        return self.inputs[source] if source < len(self.inputs) else self.kept[source - len(self.inputs)]

    def geometry(self, tensor: Tensor) -> Geometry:
        source = self.source_of(tensor)
        base = self.tensor(source)
        if base.dtype != tensor.dtype:
            raise Unrepeatable("a view of another dtype")
        return Geometry(source, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset() - base.storage_offset()))


class _Address(NamedTuple):
    """A slot of the pool and an offset in bytes to the address that it holds."""

    slot: int
    offset: int


def plan_of(recording: Recording, result: Any, device: torch.device) -> Plan:
    """The plan that repeats ``recording``.

    Raises:
        Unrepeatable: the recording cannot be repeated.
    """
    if recording.obstacle is not None:
        raise Unrepeatable(recording.obstacle)
    plan = Plan(device)
    places = _place_memory(plan, recording, result)
    pool = _Pool(plan, recording, places)
    for step in recording.steps:
        if isinstance(step, Copy):
            to, source = step
            copy = Copy(*[None if g is None else _seen(_placed(g, places), plan, recording) for g in (to, source)])  # type: ignore[arg-type]
            plan.steps.append(Step(copy, _run_nothing, pool.getter([])))
            continue
        kernel, grid, arguments, compiled = step
        run, values = direct.bind(kernel, compiled, grid), direct.leaves(compiled, arguments)
        if run is None or values is None:
            raise Unrepeatable(f"{kernel.fn.__name__} cannot be launched without Triton's own launch code")
        plan.steps.append(Step(None, run, pool.getter(values)))
    plan.hooks = tuple({id(step[0]): step[0].pre_run_hooks for step in recording.steps if not isinstance(step, Copy)}.values())
    pool.finish()
    return plan


def _run_nothing(stream: int, values: tuple[Any, ...]) -> None:
    raise AssertionError("a copy launches nothing")


def _placed(geometry: Geometry, places: dict[int, _Address]) -> Geometry:
    return geometry._replace(source=places[geometry.source].slot)


def _seen(geometry: Geometry, plan: Plan, recording: Recording) -> Geometry:
    """``geometry`` with its ``whole`` field set."""
    count = len(recording.inputs)
    if geometry.source < count:
        tensor = recording.inputs[geometry.source]
        size, stride = tuple(tensor.shape), tensor.stride()
    else:
        size, stride, _ = plan.allocations[geometry.source - count]
    return geometry._replace(whole=(size, stride, 0) == geometry[1:4])


def _place_memory(plan: Plan, recording: Recording, result: Any) -> dict[int, _Address]:
    """The address of each source. Results, and tensors that PyTorch copies, become allocations; others lie in the workspace."""
    plan.is_tuple = isinstance(result, tuple)
    results = [recording.result(r) for r in (result if plan.is_tuple else (result,))]
    geometries = [r for r in results if isinstance(r, Geometry)]
    count = len(recording.inputs)
    if any(g.source < count for g in geometries):
        raise Unrepeatable("a result that is an input")
    tensors = {g.source for g in geometries} | recording.touched
    places = {i: _Address(i, 0) for i in range(count)}
    of_tensors = [(source, t) for source, t in enumerate(recording.kept, start=count) if source in tensors]
    for source, tensor in of_tensors:
        places[source] = _Address(count + len(plan.allocations), 0)
        # If a single view is a source's only result, it is allocated with the view's shape and strides.
        views = list({g for g in geometries if g.source == source})
        whole = len(views) == 1 and views[0].offset == 0 and _is_dense(views[0], tensor.numel())
        size, stride = (views[0].size, views[0].stride) if whole else (tuple(tensor.shape), tensor.stride())
        plan.allocations.append(Allocation(size, stride, tensor.dtype))
    workspace = count + len(plan.allocations)
    offsets, plan.workspace = lay_out(recording, tensors)
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


def lay_out(recording: Recording, elsewhere: set[int]) -> tuple[dict[int, int], int]:
    """Offsets of tensors in the workspace, and its size in bytes; tensors whose lifetimes do not overlap may share memory.

    Tensors are placed from the largest to the smallest, each at the lowest offset that is free from its first launch to its
    last.
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
    """Number of elements from the first to the last in memory, inclusive."""
    return 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


class _Pool:
    """The pool from which launches pick their arguments, while it is built: slots of addresses, tensor maps and constants."""

    def __init__(self, plan: Plan, recording: Recording, places: dict[int, _Address]) -> None:
        self.plan, self.recording, self.places = plan, recording, places
        self.begins = len(recording.inputs) + len(plan.allocations) + bool(plan.workspace)
        self.derived: dict[_Address, int] = {}
        self.maps: list[tuple[_Address, Callable[[int], Any]]] = []
        self.constants: dict[tuple[type, Any], int] = {}
        self.picked: list[list[tuple[str, Any]]] = []

    def address(self, tensor: Tensor) -> _Address | None:
        """The address of ``tensor``; None for an empty tensor, which has none."""
        source = self.recording.source_of(tensor)
        place = self.places.get(source)
        if place is None:
            return None
        return _Address(place.slot, place.offset + tensor.data_ptr() - self.recording.tensor(source).data_ptr())

    def getter(self, values: list[Any]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """Register a launch's argument values. Returns a placeholder; :meth:`finish` makes the function that picks them."""
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
                raise Unrepeatable(f"an argument that is a {type(value).__name__}")
        self.picked.append(picked)
        return lambda pool: ()

    def _constant(self, value: Any) -> int:
        return self.constants.setdefault((type(value), value), len(self.constants))

    def finish(self) -> None:
        """Store the pool's contents in the plan, and give each step the function that picks its arguments."""
        maps = self.begins + len(self.derived)
        constants = maps + len(self.maps)
        numbers = constants + len(self.constants)
        first = {"slot": 0, "derived": self.begins, "map": maps, "constant": constants, "number": numbers}
        self.plan.derived = [(a.slot, a.offset) for a in self.derived]
        self.plan.described = [
            Described(a.slot if not a.offset else self.begins + self.derived[a], encode, {}) for a, encode in self.maps
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
