"""The interpreter's guard itself: which addresses and integers it allows and which are errors."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kernels.runtime import launch

from .conftest import DEVICE


@triton.jit
def _copy_kernel(x_ptr, y_ptr, offset, elements, BLOCK: tl.constexpr):
    """y[i] = x[i + offset]."""
    o_e = tl.arange(0, BLOCK)
    tl.store(y_ptr + o_e, tl.load(x_ptr + o_e + offset, mask=o_e < elements), mask=o_e < elements)


@pytest.mark.skipif(DEVICE != "cpu", reason="compute-sanitizer does this on a GPU")
@pytest.mark.parametrize(("offset", "elements", "what"), [(0, 16, ""), (-1, 16, "load"), (1, 16, "load"), (0, 17, "load")])
def test_an_address_outside_is_an_error(offset: int, elements: int, what: str) -> None:
    x, y = torch.randn(16), torch.empty(16)

    def run() -> None:
        launch.launch(_copy_kernel, (1,), x_ptr=x, y_ptr=y, offset=offset, elements=elements, BLOCK=32)

    if not what:
        run()
        assert torch.equal(x, y)
        return
    with pytest.raises(Exception, match=f"1 of {elements} addresses of a {what} are outside of every tensor"):
        run()


@pytest.mark.skipif(DEVICE != "cpu", reason="compute-sanitizer does this on a GPU")
def test_a_store_outside_is_an_error() -> None:
    x, y = torch.randn(32), torch.empty(16)
    with pytest.raises(Exception, match="4 of 20 addresses of a store are outside of every tensor"):
        launch.launch(_copy_kernel, (1,), x_ptr=x, y_ptr=y, offset=0, elements=20, BLOCK=32)


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, by, OPERATION: tl.constexpr, SCALAR: tl.constexpr):
    """y = x + by, x - by or x * by, of four elements or with ``SCALAR`` of the last one."""
    o_e = 3 if SCALAR else tl.arange(0, 4)
    x = tl.load(x_ptr + o_e)
    if OPERATION == "add":
        y = x + by
    elif OPERATION == "sub":
        y = x - by
    else:
        y = x * by
    tl.store(y_ptr + o_e, y)


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter's check")
@pytest.mark.parametrize(
    ("operation", "by", "fits"),
    [
        *(("add", 4, True), ("add", 5, False), ("add", -5, True), ("sub", -4, True), ("sub", -5, False)),
        *(("mul", -1, True), ("mul", 2, False), ("mul", -2, False)),
    ],
)
@pytest.mark.parametrize("scalar", [False, True], ids=["block", "scalar"])
def test_an_integer_overflow_is_an_error(scalar: bool, operation: str, by: int, fits: bool) -> None:
    x, y = torch.tensor([1, 2, 3, 2**31 - 5], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)

    def run() -> None:
        launch.launch(_arithmetic_kernel, (1,), x_ptr=x, y_ptr=y, by=by, OPERATION=operation, SCALAR=scalar)

    if not fits:
        with pytest.raises(Exception, match=f"int32 overflow detected for operation {operation}"):
            run()
        return
    run()
    computed = slice(3 if scalar else 0, 4)
    assert torch.equal(y[computed], {"add": x + by, "sub": x - by, "mul": x * by}[operation][computed])
