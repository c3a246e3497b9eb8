"""Files that even root may not read."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

#: Version 3 of the header of Linux's ``capget``, and the capabilities that let root ignore a file's permissions.
_VERSION = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2


def _capabilities(call: str, data: ctypes.Array) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, call)((ctypes.c_uint32 * 2)(_VERSION, 0), data):
        raise OSError(ctypes.get_errno(), call)


@contextlib.contextmanager
def permissions_hold() -> Iterator[None]:
    """In the block file permissions bind this thread, and the processes that it forks, even when root runs them."""
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
