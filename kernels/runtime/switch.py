"""A setting of the process that ``with`` blocks change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

#: How often any switch changed: who has asked once need not ask again while this stands still.
changes = 0


def note_change() -> None:
    """Say that something changed which those that remember answers should ask for again."""
    global changes
    changes += 1


class _Block(Generic[T]):
    """A block's own value, told apart from an equal one of another block by its identity."""

    def __init__(self, value: T) -> None:
        self.value = value


class Switch(Generic[T]):
    """A value that holds outside of all blocks, and another one in :meth:`set`'s.

    Plain global state, as torch.backends' switches are, not a context variable: torch.compile can guard on it, and autograd
    runs CUDA backward passes and checkpointed forward passes in threads of its own, which must see it. Blocks in several
    threads may overlap, and end in another order than they began: each takes its own value away and leaves the others'.

    Args:
        outside: the value where no block is open.
        combine: what the values of the open blocks come to, ``outside`` first; without it the last one of them.

    Attributes:
        value: what holds now.
    """

    def __init__(self, outside: T, combine: Callable[[list[T]], T] | None = None) -> None:
        self.value = outside
        self._combine = combine
        self._open = [_Block(outside)]

    @contextlib.contextmanager
    def set(self, value: T) -> Iterator[None]:
        """Let ``value`` hold inside the block."""
        if torch.compiler.is_compiling():
            # The graph is guarded by the value alone, not by the blocks that it is called in, which are new ones at every call.
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
            self._open.remove(block)  # by its identity, for blocks have no other equality
            self._update()

    def _update(self) -> None:
        # No lock, which a fork could take along. A list's own operations are atomic, and whoever wrote last has looked
        # afterwards whether what it wrote still holds.
        while True:
            blocks = list(self._open)
            self.value = blocks[-1].value if self._combine is None else self._combine([block.value for block in blocks])
            note_change()
            if blocks == self._open:
                return
