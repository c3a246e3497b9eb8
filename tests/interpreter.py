"""Makes Triton's interpreter faster with the same checks: results of repeated work are cached, or NumPy computes them."""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.semantic import TritonSemantic

_slow_check_overflow = TritonSemantic.binary_op_sanitize_overflow_impl
_EXACTLY = {"add": (np.add, operator.add), "sub": (np.subtract, operator.sub), "mul": (np.multiply, operator.mul)}
#: The smallest and the largest value of a type, by its name; for types of up to 32 bits.
_bounds: dict[str, tuple[int, int]] = {}


def _check_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    """Raise AssertionError where an integer sum, difference or product overflows, as the interpreter's own check does.

    The interpreter computes the result again through all of Triton's semantics, which takes half of the suite's time. Here the
    check is one NumPy operation in 64 bits.
    """
    kind = lhs.dtype
    if kind.int_bitwidth not in (8, 16, 32) or binary_op.__name__ not in _EXACTLY:
        _slow_check_overflow(self, lhs, rhs, binary_op)
        return
    if kind.name not in _bounds:
        _bounds[kind.name] = kind.get_int_min_value(), kind.get_int_max_value()
    least, most = _bounds[kind.name]
    of_arrays, of_numbers = _EXACTLY[binary_op.__name__]
    left, right = lhs.handle.data, rhs.handle.data
    if left.size == right.size == 1:
        overflows = not least <= of_numbers(left.item(), right.item()) <= most
    else:
        exact = of_arrays(left, right, dtype=np.int64, casting="unsafe")
        overflows = exact.size > 0 and (exact.max() > most or exact.min() < least)
    if overflows:
        raise AssertionError(f"int{kind.int_bitwidth} overflow detected for operation {binary_op.__name__}")


def _of_interpreter(member: Any) -> Any:
    """A function of ``triton.language`` with the interpreter's semantics, without the check that it has any."""
    function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

    def of_interpreter(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    return of_interpreter


@functools.cache
def _builtins(owner: Any) -> list[tuple[str, Any]]:
    """The functions of a module or class for which the interpreter has its own, by name."""
    members = [(name, member) for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]
    return [(name, _of_interpreter(member)) for name, member in members]


def _patch_builtin(owner: Any, builder: object, scope: Any) -> None:
    for name, function in _builtins(owner):
        scope.set_attr(owner, name, function)


@functools.cache
def _languages(function: Any) -> set[str]:
    """Names of Triton's language modules among a function's globals."""
    return {lang.__name__ for lang in (tl, tl.core) if any(value is lang for value in function.__globals__.values())}


def _patch_once(monkeypatch: Any) -> None:
    """Put the interpreter's functions into ``triton.language`` once per launch, not at every call of a device function."""
    patch_lang, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()  # modules patched in the current launch
    nothing = interpreter._LangPatchScope()

    def patch(function: Any) -> Any:
        languages = _languages(function)
        if languages and languages <= patched:
            return nothing
        patched.update(languages)
        return patch_lang(function)

    def run(*args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return execute(*args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang", patch)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)


_slow_block_type, _slow_tensor = tl.block_type.__init__, tl.tensor.__init__
_slow_equal, _slow_broadcast = tl.dtype.__eq__, TritonSemantic.broadcast_impl_value

#: Shape -> attributes of a block type and of its tensors. Cached, so that equal shapes are one object.
_shapes: dict[tuple[int, ...], dict[str, Any]] = {}
_names: dict[tuple[tuple[int, ...], str], str] = {}
_of_scalars: list[Any] = []


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """``tl.block_type.__init__`` that caches what it computes for each shape."""
    sizes = tuple([s.value if type(s) is tl.constexpr else s for s in shape])
    known = _shapes.get(sizes)
    if known is None:
        _slow_block_type(self, element_ty, shape)
        tensor = tl.tensor.__new__(tl.tensor)
        _slow_tensor(tensor, None, self)
        _shapes[sizes] = {"shape": self.shape, "numel": self.numel, "of_tensors": (tensor.shape, tensor.numel)}
        return
    self.element_ty, self.shape, self.numel = element_ty, known["shape"], known["numel"]
    name = _names.get((sizes, element_ty.name))
    if name is None:
        name = _names[sizes, element_ty.name] = f"<{self.shape}, {element_ty}>"
    self.name, self._of_tensors = name, known["of_tensors"]


def _tensor(self: Any, handle: Any, type: Any) -> None:
    """``tl.tensor.__init__`` that takes shape and number of elements from a cache, a scalar's too."""
    of_tensors = getattr(type, "_of_tensors", None) or (None if type.is_block() else _of_scalars)
    if not of_tensors:
        _slow_tensor(self, handle, type)
        if not type.is_block():
            _of_scalars[:] = self.shape, self.numel
        return
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = of_tensors


def _equal(self: Any, other: Any) -> bool:
    """``tl.dtype.__eq__`` that compares identity first: Triton's usual types are singletons."""
    return self is other or _slow_equal(self, other)


def _broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
    """The interpreter's broadcast of two values, which returns tensors of one shape unchanged."""
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
        return lhs, rhs
    return _slow_broadcast(self, lhs, rhs)


_slow_operands = TritonSemantic.binary_op_type_checking_impl
#: Types that a binary operation does not promote if both operands have them.
_KEPT = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "fp32", "fp64"}
_numbers: dict[tuple[Any, ...], Any] = {}
#: Types of two tensors -> type and NumPy shape of each as operands; None where a value changes its element type.
_broadcasts: dict[tuple[Any, ...], Any] = {}


def _handle(data: Any, kind: Any) -> Any:
    """A ``TensorHandle`` of an array that is known to fit its type."""
    handle = interpreter.TensorHandle.__new__(interpreter.TensorHandle)
    handle.data, handle.dtype, handle.attr = data, kind, {}
    return handle


def _broadcast_to(value: Any, kind: Any, shape: tuple[int, ...]) -> Any:
    if value.type.name == kind.name:
        return value
    data = np.empty(shape, value.handle.data.dtype)
    data[...] = value.handle.data
    return tl.tensor(_handle(data, value.handle.dtype.scalar), kind)


def _tensors(self: Any, lhs: Any, rhs: Any, *args: bool, **kwargs: bool) -> tuple[Any, Any]:
    """Two tensors as operands. Triton's own rules give the types, once for each two types."""
    key = (lhs.type.name, rhs.type.name, *args, *kwargs.items())
    if key not in _broadcasts:
        left, right = _slow_operands(self, lhs, rhs, *args, **kwargs)
        kept = left.dtype == lhs.dtype and right.dtype == rhs.dtype
        _broadcasts[key] = [(t.type, t.handle.data.shape) for t in (left, right)] if kept else None
        return left, right
    known = _broadcasts[key]
    if known is None:
        return _slow_operands(self, lhs, rhs, *args, **kwargs)
    return _broadcast_to(lhs, *known[0]), _broadcast_to(rhs, *known[1])


def _operands(self: Any, lhs: Any, rhs: Any, *args: bool, **kwargs: bool) -> tuple[Any, Any]:
    """The operands of a binary operation, promoted and broadcast. A number becomes a tensor once for each type beside it."""
    if type(lhs) is tl.tensor:
        if type(rhs) is tl.tensor:
            kind = lhs.dtype
            if kind is rhs.dtype and kind.name in _KEPT and lhs.shape is rhs.shape:
                return lhs, rhs
            return _tensors(self, lhs, rhs, *args, **kwargs)
        if type(rhs) is int or (type(rhs) is float and rhs != 0):  # 0.0 and -0.0 are equal
            key = (lhs.type.name, type(rhs), rhs, *args, *kwargs.items())
            number = _numbers.get(key)
            if number is not None:
                return lhs, number
            left, number = _slow_operands(self, lhs, rhs, *args, **kwargs)
            if left is lhs:
                number.handle.data.flags.writeable = False
                if len(_numbers) == 2000:  # a block's number has the block's size
                    _numbers.clear()
                _numbers[key] = number
            return left, number
    return _slow_operands(self, lhs, rhs, *args, **kwargs)


_slow_binary_op = interpreter.InterpreterBuilder.binary_op


def _binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    """The interpreter's binary operation, without checks of a result that is no wider than an operand."""
    if lhs.data.dtype == np.bool_:
        return _slow_binary_op(self, lhs, rhs, op)
    data = op(lhs.data, rhs.data)
    if data.itemsize > lhs.data.itemsize:
        return _slow_binary_op(self, lhs, rhs, op)
    return _handle(data, lhs.dtype.scalar)


def _expand_dims(self: Any, arg: Any, axis: int) -> Any:
    shape = arg.data.shape
    return _handle(arg.data.reshape(*shape[:axis], 1, *shape[axis:]), arg.dtype.scalar)


_slow_np_dtype = interpreter._get_np_dtype
_np_dtypes: dict[str, Any] = {}


def _np_dtype(kind: Any) -> Any:
    """The interpreter's NumPy dtype of a Triton type, cached: the interpreter builds a table of all types at each call."""
    found = _np_dtypes.get(kind.name)
    if found is None:
        found = _np_dtypes[kind.name] = _slow_np_dtype(kind)
    return found


def speed_up(monkeypatch: Any) -> None:
    """Make the interpreter faster for the rest of the test, with the same results and the same errors."""
    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", _check_overflow)
    monkeypatch.setattr(TritonSemantic, "binary_op_type_checking_impl", _operands)
    monkeypatch.setattr(TritonSemantic, "broadcast_impl_value", _broadcast)
    monkeypatch.setattr(tl.block_type, "__init__", _block_type)
    monkeypatch.setattr(tl.tensor, "__init__", _tensor)
    monkeypatch.setattr(tl.dtype, "__eq__", _equal)
    monkeypatch.setattr(interpreter, "_get_np_dtype", _np_dtype)
    monkeypatch.setattr(interpreter, "_patch_builtin", _patch_builtin)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "binary_op", _binary_op)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_expand_dims", _expand_dims)
    _patch_once(monkeypatch)
