"""A plan: the allocations, copies and launches of an operation's call, with the addresses left open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import guards

from . import direct, launch

# The allocation functions of Inductor's generated code, for the current device: half the cost of PyTorch's dispatcher.
_empty_strided_cpu: Callable[..., Tensor] = guards._empty_strided_cpu  # type: ignore[attr-defined]
_empty_strided_cuda: Callable[..., Tensor] = guards._empty_strided_cuda  # type: ignore[attr-defined]

#: The most tensor maps (one per address) that are cached for one tensor argument.
_MOST_MAPS = 64


class Geometry(NamedTuple):
    """The layout of a tensor relative to the tensor with index ``source`` in a plan; the offset is in elements.

    ``whole``: the layout is that of the source itself.
    """

    source: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    whole: bool = False


class Number(float):
    """A number that a function passes to its kernels unchanged; it may differ between calls of one kind."""

    index: int


class Allocation(NamedTuple):
    """A tensor that each call allocates."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Copy(NamedTuple):
    """PyTorch's ``to.copy_(source)``, or ``to.zero_()`` without a source."""

    to: Geometry
    source: Geometry | None


class Described(NamedTuple):
    """A tensor map argument: its address's slot in the pool, the function that encodes it, and maps cached by address."""

    slot: int
    encode: Callable[[int], Any]
    maps: dict[int, Any]


class Step(NamedTuple):
    """A copy, or a launch and the function that picks its arguments from the pool."""

    copy: Copy | None
    run: direct.Launcher
    values: Callable[[Sequence[Any]], tuple[Any, ...]]


class Plan:
    """The allocations, copies and launches of one kind of call. A plan holds no tensor.

    Each call builds a pool of values: the addresses of the inputs and of the allocations, addresses at an offset from one of
    these, tensor maps, constants, and the call's numbers. Each launch picks its arguments from the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.index = device.index if self.on_gpu else 0
        self.allocations: list[Allocation] = []
        self.workspace = 0  # bytes
        self.derived: list[tuple[int, int]] = []  # (slot, bytes)
        self.described: list[Described] = []
        self.constants: list[Any] = []
        self.steps: list[Step] = []
        self.hooks: tuple[list[Any], ...] = ()
        self.results: list[Any] = []  # the geometry of each result that is a tensor; other results as recorded
        # If all tensors among the results are whole allocations: (allocation's index, None), or (-1, value) for other results.
        self.whole: list[tuple[int, Any]] | None = None
        self.is_tuple = True

    def can_run(self) -> bool:
        """Whether launches may bypass Python's launch code: no recorder, observers, hooks or debugging are active."""
        return not launch.is_watched() and direct.is_possible() and not any(self.hooks)

    def run(self, inputs: Sequence[Tensor], pool: list[Any], numbers: Sequence[float] = ()) -> Any:
        """Repeat the recorded call on other tensors of the same kind and return its results.

        Args:
            inputs: the tensors, without those that are None.
            pool: the inputs' addresses; this list is modified.
            numbers: the numbers that replace those of the recorded call.
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
