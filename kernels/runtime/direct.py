"""Launching a compiled kernel without ``kernel[grid](...)``: the only module that knows the arguments of Triton's launchers.

At every launch, ``kernel[grid](...)`` binds arguments, builds a key of their specialisations, looks up the compiled kernel and
encodes tensor maps for TMA. Where all of this is known from an earlier launch of the same kind, only the call of Triton's own C
launcher is left. The launcher's arguments differ between versions:

- 3.6 compiles a launcher for each signature. The launcher takes the kernel's arguments one by one, a tuple as a tuple, and any
  value in the place of a constant.
- 3.7 to 3.9 have one launcher. It takes the kernel's arguments as one tuple, and annotations that mark constants and nested
  tuples. This module passes a flat tuple that contains neither.

For another version, or a launch that this module does not support (scratch memory, another back end), :func:`bind` returns None
and the launch goes through ``kernel[grid](...)``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

VERSION = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])

#: ``(stream, values) -> None``: launches with the values of :func:`leaves`, with tensors replaced by their addresses.
Launcher = Callable[[int, tuple[Any, ...]], None]

_SUPPORTED = ((3, 6), (3, 7), (3, 8), (3, 9))

_runtime, _compilation = knobs.runtime, knobs.compilation
#: None if a tool has replaced ``JITFunction.run`` by its own function.
_run = JITFunction.run if JITFunction.run.__module__ == "triton.runtime.jit" else None


class Described(NamedTuple):
    """A tensor descriptor's properties that do not depend on the tensor's address.

    Attributes:
        base: the tensor that the descriptor was made for.
        encode: makes the tensor map for a tensor's address.
    """

    base: torch.Tensor
    encode: Callable[[int], Any]


def is_possible() -> bool:
    """Whether launches may bypass ``kernel[grid](...)``: no launch hooks, debugging or instrumentation are active."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return (
        JITFunction.run is _run
        and (enter is None or not getattr(enter, "calls", True))
        and (leave is None or not getattr(leave, "calls", True))
        and _runtime.add_stages_inspection_hook is None
        and not _runtime.debug
        and not _compilation.instrumentation_mode
    )


def leaves(compiled: Any, arguments: dict[str, Any]) -> list[Any] | None:
    """The values from ``arguments`` that a launcher of :func:`bind` takes; None if the launch is not supported.

    Numbers are passed as they are, and None in place of values that are not read. The caller replaces a tensor by its address
    and a :class:`Described` by its tensor map.
    """
    metadata = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    found: list[Any] = []
    try:
        for name, kind in _signature(compiled).items():
            found.extend(_leaves(kind, arguments.get(name), metadata))
    except _NotKnown:
        return None
    return found


class _NotKnown(Exception):
    """The launch has an argument that this module does not support."""


def _signature(compiled: Any) -> dict[str, Any]:
    """The type of each of the kernel's arguments, in order; ``"constexpr"`` for compile-time constants."""
    return dict(compiled.src.signature)


def _leaves(kind: Any, value: Any, metadata: Iterator[Any]) -> Iterator[Any]:
    if isinstance(kind, tuple):
        for inner_kind, inner in zip(kind, value, strict=True):
            yield from _leaves(inner_kind, inner, metadata)
    elif kind == "constexpr":
        if VERSION == (3, 6):
            yield None
    elif kind.startswith("tensordesc"):
        described = next(metadata, None)
        if described is None or not isinstance(value, TensorDescriptor):
            raise _NotKnown
        yield Described(value.base, _encoder(value, described))
        yield from value.shape
        yield from value.strides
    else:
        yield value


class _Address(NamedTuple):
    """Stands in for a tensor where only ``data_ptr()`` is called."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class _Layout(NamedTuple):
    """A tensor descriptor without its tensor."""

    base: _Address
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    padding: str
    round_f32_to_tf32: bool


def _encoder(descriptor: TensorDescriptor, metadata: Any) -> Callable[[int], Any]:
    from triton.backends.nvidia import driver

    shape, strides, block_shape = (list(v) for v in (descriptor.shape, descriptor.strides, descriptor.block_shape))
    further = (descriptor.padding, getattr(descriptor, "round_f32_to_tf32", False))
    base_args = (None,) if VERSION >= (3, 8) else ()

    def encode(address: int) -> Any:
        layout = _Layout(_Address(address), shape, strides, block_shape, *further)
        return driver.make_tensordesc_arg(layout, metadata, *base_args)[0]

    return encode


def bind(kernel: Any, compiled: Any, grid: tuple[int, ...]) -> Launcher | None:
    """A function that launches ``compiled`` over ``grid`` with the values of :func:`leaves`; None if that is not supported.

    The function keeps ``compiled`` alive, since the machine code is unloaded when ``compiled`` is freed.
    """
    launcher = compiled.run
    if (
        VERSION not in _SUPPORTED
        or not isinstance(kernel, JITFunction)
        or type(launcher).__module__ != "triton.backends.nvidia.driver"
        or launcher.global_scratch_size > 0
        or launcher.profile_scratch_size > 0
        or getattr(launcher, "gsan_enabled", False)
    ):
        return None
    x, y, z = (*grid, 1, 1)[:3]
    function, packed = compiled.function, compiled.packed_metadata
    cooperative, pdl = launcher.launch_cooperative_grid, launcher.launch_pdl
    if VERSION == (3, 6):
        return _bind_3_6(compiled, (x, y, z), (function, cooperative, pdl, None, None, packed, None, None, None))
    from triton.backends.nvidia import driver

    launch = triton.runtime.driver.active.utils.launch
    signature = launcher.kernel_signature
    annotations = driver.annotate_arguments(["value"] * len(signature))

    def launch_direct(stream: int, values: tuple[Any, ...], _keep: Any = compiled) -> None:
        launch(
            x, y, z, stream, function, cooperative, pdl, packed, None, None, None, None, None, annotations, signature, values
        )  # fmt: skip

    return launch_direct


def _count(kind: Any) -> int:
    """Number of :func:`leaves` of an argument of type ``kind``; a descriptor has its tensor map, sizes and strides."""
    if isinstance(kind, tuple):
        return sum(map(_count, kind))
    if not kind.startswith("tensordesc"):
        return 1
    return 1 + 2 * (kind[kind.index("[") + 1 : kind.index("]")].count(",") + 1)


def _bind_3_6(compiled: Any, grid: tuple[int, int, int], fixed: tuple[Any, ...]) -> Launcher:
    launch = compiled.run.launch
    if getattr(launch, "__closure__", None):  # a Python wrapper that encodes tensor maps encloses the C function
        launch = launch.__closure__[launch.__code__.co_freevars.index("launcher")].cell_contents
    kinds = tuple(_signature(compiled).values())
    if not any(isinstance(kind, tuple) for kind in kinds):

        def launch_direct(stream: int, values: tuple[Any, ...], _keep: Any = compiled) -> None:
            launch(*grid, stream, *fixed, *values)

        return launch_direct

    # A tuple is a single argument of the C function; a tensor descriptor's values are separate arguments.
    places: list[int | slice] = []
    end = 0
    for kind in kinds:
        begin, end = end, end + _count(kind)
        places += [slice(begin, end)] if isinstance(kind, tuple) else range(begin, end)
    nested = operator.itemgetter(*places)

    def launch_nested(stream: int, values: tuple[Any, ...], _keep: Any = compiled) -> None:
        launch(*grid, stream, *fixed, *nested(values))

    return launch_nested
