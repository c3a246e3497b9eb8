"""Lets several threads compile kernels at once on Python before 3.11.8.

CPython 3.11 counts the recursion of ``ast.parse`` once for all threads. If another thread parses meanwhile, it raises
``SystemError: AST constructor recursion depth mismatch`` (CPython's issue 106905, mended in 3.11.8), and Triton, which parses
each kernel and each function that a kernel calls, raises ``CompilationError``.
"""

from __future__ import annotations

import ast
import functools
import os
import sys
import threading
from collections.abc import Callable

from triton.runtime.jit import JITFunction

_lock = threading.RLock()  # a finalizer that runs while its thread parses may parse too


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


def _one_at_a_time(parse: Callable[[JITFunction], ast.AST]) -> Callable[[JITFunction], ast.AST]:
    @functools.wraps(parse)
    def locked(self: JITFunction) -> ast.AST:
        with _lock:
            return parse(self)

    return locked


if sys.version_info < (3, 11, 8):
    JITFunction.parse = _one_at_a_time(JITFunction.parse)
    # A thread that held the lock does not exist in the child process.
    os.register_at_fork(after_in_child=_renew_lock)
