"""Makes out-of-bounds accesses of interpreted kernels errors: Triton's interpreter would corrupt the heap silently."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.runtime.interpreter as interpreter

from kernels.runtime import launch


class GuardedMemory(threading.local):
    """Wraps the interpreter's loads and stores: allows only addresses inside the tensors of the thread's launch."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.first, self.end = np.empty(0, np.uint64), np.empty(0, np.uint64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def watch(self, tensors: list[torch.Tensor]) -> None:
        """Allow only addresses in the storages of ``tensors``."""
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors) if s.nbytes()}
        self.first = np.array(sorted(storages), dtype=np.uint64)
        self.end = np.array([start + storages[start] for start in sorted(storages)], dtype=np.uint64)

    def _check(self, what: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        # A descriptor load passes the mask as a plain buffer.
        used = pointers[np.asarray(mask).astype(bool)].astype(np.uint64)
        if not used.size:
            return
        inside = np.searchsorted(self.first, used, side="right")
        bad = inside == 0
        bad |= used + np.uint64(itemsize) > self.end[np.maximum(inside, 1) - 1] if self.first.size else True
        if np.any(bad):
            raise IndexError(f"{int(np.sum(bad))} of {used.size} addresses of a {what} are outside of every tensor")

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> Any:
        """The interpreter's load, after a check of its addresses."""
        self._check("load", pointers, mask, np.dtype(dtype).itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        """The interpreter's store, after a check of its addresses."""
        self._check("store", pointers, mask, value.dtype.itemsize)
        return self.memory.store(pointers, value, mask)


@contextlib.contextmanager
def guard_memory(monkeypatch: Any) -> Iterator[None]:
    """Check, inside the block, every address that a kernel of this package loads or stores."""
    guarded = GuardedMemory(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", guarded)
    with launch.observe_launches(lambda kernel, grid, arguments: guarded.watch(launch.tensors_of(arguments))):
        yield
