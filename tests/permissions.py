"""Files that may not be read, for root too."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

#: Linux's version 3 of ``capget``'s header, and the bits that let root pass over a file's permissions.
_VERSION = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2


def _capabilities(call: str, data: ctypes.Array) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, call)((ctypes.c_uint32 * 2)(_VERSION, 0), data):
        raise OSError(ctypes.get_errno(), call)


@contextlib.contextmanager
def permissions_hold() -> Iterator[None]:
    """In the block a file's permissions bind this thread, and what it forks, whoever runs it."""
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    _capabilities("capget", data)
    effective = data[0]
    data[0] = effective & ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    _capabilities("capset", data)
    try:
        yield
    finally:
        data[0] = effective
        _capabilities("capset", data)
