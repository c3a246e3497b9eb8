"""A plan: what a call of an operation allocates, copies and launches, with the addresses left open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import guards

from . import direct, launch

# As Inductor's own code allocates, on the current device: half the way through PyTorch's dispatcher.
_empty_strided_cpu: Callable[..., Tensor] = guards._empty_strided_cpu  # type: ignore[attr-defined]
_empty_strided_cuda: Callable[..., Tensor] = guards._empty_strided_cuda  # type: ignore[attr-defined]

#: Addresses of one tensor argument whose tensor maps are remembered.
_MOST_MAPS = 64


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


class Described(NamedTuple):
    """An address in the pool, and its tensor maps by address."""

    slot: int
    encode: Callable[[int], Any]
    maps: dict[int, Any]


class Step(NamedTuple):
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
        self.described: list[Described] = []
        self.constants: list[Any] = []
        self.steps: list[Step] = []
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
