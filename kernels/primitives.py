"""Pieces shared by the kernels, as Triton device functions."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import target_info
from triton.language.extra.cuda import gdc_wait

from .runtime.gpu import INTERPRETED as _INTERPRETED
from .runtime.gpu import PROGRAMMATIC_DEPENDENT_LAUNCH

INTERPRETED = tl.constexpr(_INTERPRETED)
_PDL = tl.constexpr(PROGRAMMATIC_DEPENDENT_LAUNCH)


@triton.jit
def wait_for_the_kernel_before():
    """From Hopper on, wait for the kernel before: "programmatic dependent launch".

    Every kernel calls it, through :func:`program_id` as a rule, before it reads or writes memory. The start of a kernel so runs
    beside the end of the one before, as soon as all programs of that end. None says earlier that the next kernel may begin: its
    programs would wait on the few multiprocessors that are free, and stay there (``benchmarks/NOTES.md``). Afterwards all that
    the kernels before it wrote is visible, and they no longer read what this one writes: each of them waited too before it
    ended. Without the launch's ``launch_pdl`` the instruction does nothing.
    """
    if _PDL:
        if target_info.cuda_capability_geq(9, 0):
            gdc_wait()


@triton.jit
def program_id(AXIS: tl.constexpr, WIDE: tl.constexpr):
    """``tl.program_id``, in int64 where offsets can pass 2^31: what is computed from it then is in int64 too.

    Of the first axis with :func:`wait_for_the_kernel_before`.
    """
    if AXIS == 0:
        wait_for_the_kernel_before()
    pid = tl.program_id(AXIS)
    if WIDE:
        pid = pid.to(tl.int64)
    return pid


@triton.jit
def only_if(condition, mask):
    """``mask`` if the scalar ``condition`` holds, else all False: ``mask & condition``.

    That is of int32 in Triton 3.9's interpreter, which loads and stores under masks of bool alone.
    """
    return tl.where(condition, mask, False)


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """``acc + a @ b``, accumulated in the type of ``acc``. Rows with equal operands give equal results, as on a GPU."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as raw uint16 and would multiply those; float32 holds both half types exactly.
        a = a.to(acc.dtype).to(tl.float64)
        b = b.to(acc.dtype).to(tl.float64)
        # NumPy's float32 product adds in another order in another row: equal pixels would not tie in a pool's window.
        # What the order changes in float64 is gone when the product is rounded.
        return acc + tl.dot(a, b, out_dtype=tl.float64).to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=acc.dtype)


@triton.jit
def in_registers(x):
    """``x``, which the compiler must have in registers here: empty assembly takes it from there and gives it back."""
    if INTERPRETED:
        return x
    PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=True, pack=PACK)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """``x`` (an accumulator) rounded to the nearest ``DTYPE``, ties to even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter truncates; round in integers first, so that its truncation is exact. NaN is left alone.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded, bits).to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def fma(scalar, x, y):
    """``scalar * x + y`` of float32, rounded once."""
    if INTERPRETED:
        # The interpreter rounds the product too. In float64 the product is exact, and rounding the sum twice changes the result
        # once in about 2^29 times.
        return (x.to(tl.float64) * scalar + y.to(tl.float64)).to(tl.float32)
    return tl.fma(scalar, x, y)


@triton.jit
def compensated_add(total, lost, value):
    """One step of Kahan's summation: the new total, and what it lost to rounding, which the next step gives back.

    A long chain of additions then errs like a single one. Once the total is infinite or NaN there is nothing to give back.
    """
    value -= lost
    new = total + value
    return new, tl.where(new - new == 0, (new - total) - value, 0.0)


@triton.jit
def relu(x):
    """ReLU as PyTorch has it: NaN stays NaN (``tl.maximum(x, 0)`` loses it) and -0.0 stays -0.0."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def relu_grad(grad, output):
    """Gradient of ReLU from its output: zero where the output is <= 0, so it passes where the output is NaN."""
    return tl.where(output <= 0, 0.0, grad)


@triton.jit
def dropout_factor(seed, index, p, scale):
    """What dropout multiplies element ``index`` (row-major, over the whole tensor) by: ``scale`` or 0.

    One Philox4x32-10 stream: key = seed, counter = index, first of the four words. The counter's high word is zero below
    2^32 whether the index is int32 or int64, so the stream does not depend on the width of the offsets.
    """
    keep = tl.rand(seed, index) >= p
    return tl.where(keep, scale, 0.0)
