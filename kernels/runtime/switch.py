"""Process-wide settings that ``with`` blocks change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

#: Number of changes of any switch. Values derived from switches may be cached while this number stays the same.
changes = 0


def note_change() -> None:
    """Invalidate values that were cached under the current number of :data:`changes`."""
    global changes
    changes += 1


class _Block(Generic[T]):
    """A block's value, distinguished by identity from an equal value of another block."""

    def __init__(self, value: T) -> None:
        self.value = value


class Switch(Generic[T]):
    """A setting with a default value and with other values inside :meth:`set` blocks.

    A switch is plain global state like torch.backends' switches, not a context variable: torch.compile can guard on it, and
    autograd's own threads, which run CUDA backward passes and checkpointed forward passes, must see it. Blocks of several
    threads may overlap and end in any order; each block removes only its own value.

    Args:
        outside: the value while no block is open.
        combine: computes the current value from ``outside`` and the open blocks' values, in this order. By default the value of
            the last open block is used.

    Attributes:
        value: the current value.
    """

    def __init__(self, outside: T, combine: Callable[[list[T]], T] | None = None) -> None:
        self.value = outside
        self._combine = combine
        self._open = [_Block(outside)]

    @contextlib.contextmanager
    def set(self, value: T) -> Iterator[None]:
        """Set the switch to ``value`` inside the block."""
        if torch.compiler.is_compiling():
            # The graph must be guarded by the value alone, not by the list of open blocks, which are new objects at every call.
            before, self.value = self.value, value
            try:
                yield
            finally:
                self.value = before
            return
        block = _Block(value)
        self._open.append(block)
        self._update()
        try:
            yield
        finally:
            self._open.remove(block)  # by identity, since _Block defines no other equality
            self._update()

    def _update(self) -> None:
        # No lock, since a fork could copy it while it is held. List operations are atomic, and every thread checks after
        # writing the value that the open blocks have not changed, so the last write is correct.
        while True:
            blocks = list(self._open)
            self.value = blocks[-1].value if self._combine is None else self._combine([block.value for block in blocks])
            note_change()
            if blocks == self._open:
                return
