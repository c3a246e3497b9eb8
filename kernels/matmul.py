"""Matrix products of a linear layer: the pointer kernel, and :func:`matmul`, which chooses a kernel and launches it.

A small batch has few tiles, and most of the time goes into reading the weights. K is therefore split among enough programs to
keep all SMs reading. Each program stores its part of the sum in float32; a second kernel adds the parts in order and applies
the epilogue. Without a split, bias and ReLU are applied to the accumulators in registers. Dropout always runs in the second
kernel: beside the accumulators of a large tile, the ten Philox rounds do not fit in the registers.

Where the tiles would leave SMs idle in the last round, programs take equal shares (:mod:`kernels.matmul_shares`).

In TF32 the tensor cores read shared memory only with K along the rows. The weight gradient copies both operands to that order;
the input gradient transposes each block of the weights after loading it (:class:`kernels.matmul_descriptor.Operand`). An exact
float32 product consists of FMAs on registers and wants the second operand contiguous along N. The forward pass therefore
computes the transposed product (SWAP in :func:`kernels.linear_rules.linear_config`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .linear_rules import linear_config
from .matmul_descriptor import _matmul_descriptor_kernel, operand_arguments, operands, row_major
from .matmul_finish import PLAIN, Epilogue, bias_relu, finish
from .matmul_shares import shares_matmul
from .primitives import cast, dot, program_id
from .runtime.arguments import matmul_input_precision
from .runtime.backend import dot_precision
from .runtime.launch import cdiv, launch, needs_int64, new_output
from .sums import accumulator_dtype, triton_accumulator

# ----------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def _matmul_kernel(
    a_ptr,  # [M, K] through its strides
    b_ptr,  # [K, N] through its strides
    bias_ptr,  # [N], BIAS_OF_ROWS: [M]; or unused
    c_ptr,  # out: [M, N] through its strides; or [SPLIT, M, N], the split's partial sums
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cs,  # from one part to the next
    stride_cm,
    stride_cn,
    blocks_per_split,
    HAS_BIAS: tl.constexpr,
    BIAS_OF_ROWS: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c = relu(a @ b + bias). One program computes a BLOCK_M x BLOCK_N tile of c over one part of K.

    It loads through pointers: any strides, any GPU.
    """
    pid = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid_m = pid % blocks_m  # consecutive programs share columns of b, the weights, which dominate a small batch's reads
    pid_n = pid // blocks_m
    o_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N
    first = pid_split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K))
    o_k = first * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for _ in range(first, last):
        m_k = o_k < K
        p_a = a_ptr + o_m[:, None] * stride_am + o_k[None, :] * stride_ak
        p_b = b_ptr + o_k[:, None] * stride_bk + o_n[None, :] * stride_bn
        b_a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_b = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = dot(b_a, b_b, acc, INPUT_PRECISION)
        o_k += BLOCK_K
    if BIAS_OF_ROWS:
        acc = bias_relu(acc, bias_ptr, o_m[:, None], m_m[:, None], HAS_BIAS, RELU)
    else:
        acc = bias_relu(acc, bias_ptr, o_n[None, :], m_n[None, :], HAS_BIAS, RELU)
    p_c = c_ptr + pid_split * stride_cs + o_m[:, None] * stride_cm + o_n[None, :] * stride_cn
    tl.store(p_c, cast(acc, c_ptr.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


# ------------------------------------------------------------------------------------------------- launch functions


def matmul(pass_: str, a: Tensor, b: Tensor, out: Tensor, epilogue: Epilogue = PLAIN) -> None:
    """out = dropout(relu(a @ b + bias)) for 2-D tensors of any strides; ``pass_`` is the product's name in the tables.

    With dropout ``out`` must be contiguous.
    """
    (m, k), n = a.shape, b.shape[1]
    precision = dot_precision(a.device, matmul_input_precision(a.dtype))
    rows = operands(pass_, a, b, precision)
    along_k = b.stride(0) == 1 and b.stride(1) != 1
    config = linear_config(a.device, pass_, m, n, k, a.dtype, precision, descriptors=rows is not None, along_k=along_k)
    if rows is not None and "PROGRAMS" in config:
        shares_matmul(rows, out, k, precision, config, epilogue)
        return
    swap = config.pop("SWAP") if rows is None else 0
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    blocks = max(1, cdiv(k, block_k))
    blocks_per_split = cdiv(blocks, config.pop("SPLIT"))
    split = cdiv(blocks, blocks_per_split)  # so that no part is empty
    parts = new_output((split, m, n), accumulator_dtype(a.dtype), a.device) if split > 1 else None
    target = out if parts is None else parts[0]
    if swap:
        a, b = b.t(), (row_major(a.t()) if swap == 2 and a.stride(1) == 1 else a.t())
        m, n, target = n, m, target.t()
    arguments = {
        "c_ptr": target,
        "M": m,
        "N": n,
        "K": k,
        "stride_cs": m * n,
        "stride_cm": target.stride(0),
        "stride_cn": target.stride(1),
        "blocks_per_split": blocks_per_split,
        "WIDE": needs_int64(a, b, out, parts),
        "INPUT_PRECISION": precision,
        **epilogue.bias_relu(parts is None, a),
        **config,
    }
    grid = (cdiv(m, block_m) * cdiv(n, block_n), split)
    if rows is not None:
        launch(_matmul_descriptor_kernel, grid, **operand_arguments(rows, config), **arguments)
    else:
        launch(
            _matmul_kernel,
            grid,
            a_ptr=a,
            b_ptr=b,
            stride_am=a.stride(0),
            stride_ak=a.stride(1),
            stride_bk=b.stride(0),
            stride_bn=b.stride(1),
            BIAS_OF_ROWS=swap > 0,
            ACC=triton_accumulator(a.dtype),
            **arguments,
        )
    if parts is not None or epilogue.seed is not None:
        finish(out, parts, epilogue)
