"""A matrix product's epilogue (bias, ReLU, dropout), and the sum of its parts where K was split among programs."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .linear_rules import matmul_finish_config
from .primitives import cast, dropout_factor, program_id, relu
from .runtime.launch import cdiv, launch, needs_int64
from .sums import dropout_scale, triton_accumulator

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def bias_relu(acc, bias_ptr, o_n, m_n, HAS_BIAS: tl.constexpr, RELU: tl.constexpr):
    """relu(acc + bias); ``o_n`` holds the column indices of ``acc``, in a shape that broadcasts to that of ``acc``."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(acc.dtype)
    if RELU:
        acc = relu(acc)
    return acc


@triton.jit
def _matmul_finish_kernel(
    part_ptr,  # [SPLIT, M, N] partial sums in the accumulator's dtype, contiguous; with a SPLIT of 1 it may be c itself
    bias_ptr,  # [N], or unused
    seed_ptr,  # int64 scalar, or unused
    c_ptr,  # out: [M, N] through its strides
    elements,  # M * N
    N,
    stride_cm,
    stride_cn,
    p,  # probability of dropping an output
    scale,  # 1 / (1 - p)
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """c = dropout(relu(the sum of the parts, first to last, + bias)). One program owns BLOCK elements."""
    o_e = program_id(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    acc = tl.load(part_ptr + o_e, mask=m_e, other=0.0).to(ACC)
    for _ in tl.static_range(1, SPLIT):  # unrolled, so that all loads are issued before the first addition
        part_ptr += elements
        acc += tl.load(part_ptr + o_e, mask=m_e, other=0.0)
    o_n = o_e % N
    acc = bias_relu(acc, bias_ptr, o_n, m_e, HAS_BIAS, RELU)
    if DROPOUT:
        # Rounded to the output's dtype first, as a separate layer before the dropout would store it.
        acc = cast(acc, c_ptr.dtype.element_ty).to(ACC)
        acc *= dropout_factor(tl.load(seed_ptr), o_e, p, scale)
    tl.store(c_ptr + o_e // N * stride_cm + o_n * stride_cn, cast(acc, c_ptr.dtype.element_ty), mask=m_e)


# ------------------------------------------------------------------------------------------------- launch functions


class Epilogue(NamedTuple):
    """The epilogue of a product: dropout(relu(product + bias)), each of the three optional.

    Attributes:
        bias: (N,), or None.
        relu: whether to apply a ReLU.
        seed: seed of the dropout, an int64 scalar; None for no dropout.
        p: the dropout's probability of dropping an output.
    """

    bias: Tensor | None = None
    relu: bool = False
    seed: Tensor | None = None
    p: float = 0.0

    def bias_relu(self, applied: bool, unused: Tensor) -> dict[str, Any]:
        """A kernel's arguments for bias and ReLU, if it applies them; ``unused`` is passed in place of a missing bias."""
        bias = self.bias if applied else None
        return {
            "bias_ptr": unused if bias is None else bias.contiguous(),
            "HAS_BIAS": bias is not None,
            "RELU": self.relu and applied,
        }


PLAIN = Epilogue()


def finish(out: Tensor, parts: Tensor | None, epilogue: Epilogue) -> None:
    """Write the epilogue of the sum of ``parts`` (SPLIT, M, N) to ``out``; without parts, apply dropout to ``out`` itself."""
    config = matmul_finish_config(out.numel())
    launch(
        _matmul_finish_kernel,
        (cdiv(out.numel(), config["BLOCK"]),),
        part_ptr=out if parts is None else parts,
        seed_ptr=out if epilogue.seed is None else epilogue.seed,
        c_ptr=out,
        elements=out.numel(),
        N=out.shape[1],
        stride_cm=out.stride(0),
        stride_cn=out.stride(1),
        p=float(epilogue.p),
        scale=dropout_scale(epilogue.p),
        SPLIT=1 if parts is None else parts.shape[0],
        DROPOUT=epilogue.seed is not None,
        WIDE=needs_int64(out, parts),
        ACC=triton_accumulator(out.dtype),
        **epilogue.bias_relu(parts is not None, out),
        **config,
    )
