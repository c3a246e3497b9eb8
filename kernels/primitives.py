"""Triton device functions shared by the kernels."""

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
    """On Hopper and later, wait until the previous kernel has ended ("programmatic dependent launch").

    Every kernel calls this before it accesses memory, as a rule through :func:`program_id`. A kernel may then start when all
    programs of the previous kernel have exited, before that kernel has completed. No kernel lets the next one start earlier:
    the next one's programs would occupy the few free SMs while they wait (``benchmarks/NOTES.md``). After the wait, everything
    that earlier kernels wrote is visible and none of them still reads memory that this kernel writes, since each of them waited
    for its own predecessor. Without ``launch_pdl`` at the launch the instruction does nothing.
    """
    if _PDL:
        if target_info.cuda_capability_geq(9, 0):
            gdc_wait()


@triton.jit
def program_id(AXIS: tl.constexpr, WIDE: tl.constexpr):
    """``tl.program_id``; with WIDE in int64, so that offsets computed from it, which may pass 2^31, are int64 too.

    For the first axis it calls :func:`wait_for_the_kernel_before`.
    """
    if AXIS == 0:
        wait_for_the_kernel_before()
    pid = tl.program_id(AXIS)
    if WIDE:
        pid = pid.to(tl.int64)
    return pid


@triton.jit
def only_if(condition, mask):
    """``mask & condition`` for a scalar ``condition``: ``mask`` if the condition holds, else all False.

    In Triton 3.9's interpreter ``mask & condition`` is int32, but loads and stores accept only bool masks.
    """
    return tl.where(condition, mask, False)


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """``acc + a @ b``, accumulated in the dtype of ``acc``. Equal rows of ``a`` give equal results, as on a GPU."""
    if INTERPRETED:
        # The interpreter stores bfloat16 as raw uint16 and would multiply these; float32 holds both half types exactly.
        a = a.to(acc.dtype).to(tl.float64)
        b = b.to(acc.dtype).to(tl.float64)
        # NumPy's float32 product sums in an order that differs between rows, so equal pixels would not tie in a pool's window.
        # In float64 the order's effect vanishes when the product is rounded to float32.
        return acc + tl.dot(a, b, out_dtype=tl.float64).to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=acc.dtype)


@triton.jit
def in_registers(x):
    """``x``, forced into registers at this point: an empty inline assembly takes it as a register operand and returns it."""
    if INTERPRETED:
        return x
    PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=True, pack=PACK)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """``x`` (an accumulator) rounded to the nearest ``DTYPE``, ties to even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter truncates. Rounding in integers first makes its truncation exact. NaN is left as it is.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded, bits).to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def fma(scalar, x, y):
    """``scalar * x + y`` in float32, rounded once."""
    if INTERPRETED:
        # In float32 the interpreter would round the product too. In float64 the product is exact, and rounding the sum twice
        # changes about one result in 2^29.
        return (x.to(tl.float64) * scalar + y.to(tl.float64)).to(tl.float32)
    return tl.fma(scalar, x, y)


@triton.jit
def compensated_add(total, lost, value):
    """One step of Kahan summation: the new total and its rounding error, which the next step subtracts from its value.

    The error of a long sum is then about that of a single addition. The compensation is 0 once the total is infinite or NaN.
    """
    value -= lost
    new = total + value
    return new, tl.where(new - new == 0, (new - total) - value, 0.0)


@triton.jit
def relu(x):
    """ReLU as in PyTorch: NaN stays NaN (``tl.maximum(x, 0)`` gives 0) and -0.0 stays -0.0."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def relu_grad(grad, output):
    """Gradient of ReLU from its output: 0 where the output is <= 0, else ``grad``, also where the output is NaN."""
    return tl.where(output <= 0, 0.0, grad)


@triton.jit
def dropout_factor(seed, index, p, scale):
    """Dropout's factor for element ``index`` (row-major over the whole tensor): ``scale`` if kept, else 0.

    Philox4x32-10 with key = seed and counter = index; the first of its four words is used. The counter's high word is zero
    below 2^32 for int32 and int64 indices alike, so the stream does not depend on the width of the offsets.
    """
    keep = tl.rand(seed, index) >= p
    return tl.where(keep, scale, 0.0)
