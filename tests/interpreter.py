"""Triton's interpreter with the same checks in less time: what it does again and again is done once, or by NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.semantic import TritonSemantic

_slow_check_overflow = TritonSemantic.binary_op_sanitize_overflow_impl
_EXACTLY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _check_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    """As the interpreter's own check of an integer sum, difference or product, which takes half of the suite's time.

    That one computes the result once more through all of Triton's semantics; here it is one NumPy operation in 64 bits.
    """
    kind = lhs.type.scalar
    if kind.int_bitwidth not in (8, 16, 32) or binary_op.__name__ not in _EXACTLY:
        _slow_check_overflow(self, lhs, rhs, binary_op)
        return
    exact = _EXACTLY[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64, casting="unsafe")
    if exact.size and (exact.max() > kind.get_int_max_value() or exact.min() < kind.get_int_min_value()):
        raise AssertionError(f"int{kind.int_bitwidth} overflow detected for operation {binary_op.__name__}")


def _patch_once(monkeypatch: Any) -> None:
    """Put the interpreter's functions into ``triton.language`` once a launch, not at every call of a device function."""
    patch_lang, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()  # modules, by the launch that is running
    nothing = interpreter._LangPatchScope()

    def patch(function: Any) -> Any:
        languages = {lang.__name__ for lang in (tl, tl.core) if any(value is lang for value in function.__globals__.values())}
        if languages and languages <= patched:
            return nothing
        patched.update(languages)
        return patch_lang(function)

    def run(*args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return execute(*args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang", patch)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)


def speed_up(monkeypatch: Any) -> None:
    """Run kernels faster from here on, to the same results and the same errors."""
    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", _check_overflow)
    _patch_once(monkeypatch)
