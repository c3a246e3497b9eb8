"""Matrix products of operands that TMA can load, on Hopper and later."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .linear_rules import row_major_config
from .matmul_finish import bias_relu
from .primitives import cast, dot, program_id
from .runtime.backend import HALF, has_tma
from .runtime.launch import cdiv, launch, needs_int64, new_output

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _row_major_kernel(
    source_ptr,  # [R, C] through its strides
    out_ptr,  # out: [R, C], rows stride_out apart
    R,
    C,
    stride_r,
    stride_c,
    stride_out,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = source. One program copies a BLOCK_R x BLOCK_C tile, reading source and writing out each along its own rows."""
    pid = program_id(0, WIDE)
    blocks_r = tl.cdiv(R, BLOCK_R)
    o_r = pid % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = pid // blocks_r * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (o_r < R)[:, None] & (o_c < C)[None, :]
    b = tl.load(source_ptr + o_r[:, None] * stride_r + o_c[None, :] * stride_c, mask=mask, other=0.0)
    tl.store(out_ptr + o_r[:, None] * stride_out + o_c[None, :], b, mask=mask)


@triton.jit
def load_a(a_desc, m0, k0, TRANSPOSED: tl.constexpr):
    """Load a block of the first operand, [BLOCK_M, BLOCK_K]."""
    if TRANSPOSED:
        return a_desc.load([k0, m0]).T
    else:
        return a_desc.load([m0, k0])


@triton.jit
def load_b(b_desc, n0, k0, TRANSPOSED: tl.constexpr, PANEL: tl.constexpr):
    """Load a block of the second operand, [BLOCK_K, BLOCK_N]."""
    if TRANSPOSED:
        return b_desc.load([n0, k0]).T
    elif PANEL > 0:
        block = b_desc.load([n0 // PANEL, k0, 0])  # [BLOCK_N / PANEL, BLOCK_K, PANEL]
        return block.permute(1, 0, 2).reshape(block.shape[1], block.shape[0] * PANEL)
    else:
        return b_desc.load([k0, n0])


@triton.jit
def _matmul_descriptor_kernel(
    a_desc,  # [M, K], blocks [BLOCK_M, BLOCK_K]; A_TRANSPOSED: [K, M], blocks [BLOCK_K, BLOCK_M]
    b_desc,  # [K, N], blocks [BLOCK_K, BLOCK_N]; B_TRANSPOSED: [N, K], blocks [BLOCK_N, BLOCK_K]; B_PANEL: see Operand
    bias_ptr,  # [N], or unused
    c_ptr,  # out: [M, N] through its strides; or [SPLIT, M, N], the split's partial sums
    M,
    N,
    K,
    stride_cs,  # from one part to the next
    stride_cm,
    stride_cn,
    blocks_per_split,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    B_PANEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c = relu(a @ b + bias). One program computes a BLOCK_M x BLOCK_N tile of c over one part of K, loading by TMA.

    Blocks go from memory to shared memory to the tensor cores without passing through registers; only a transposed block of
    TF32 passes through them. TMA fills zeros outside of a matrix, so only the store needs a mask.
    """
    pid = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid_m = pid % blocks_m
    pid_n = pid // blocks_m
    m0 = (pid_m * BLOCK_M).to(tl.int32)  # a descriptor's coordinates are int32 whatever the matrix's size
    n0 = (pid_n * BLOCK_N).to(tl.int32)
    first = (pid_split * blocks_per_split).to(tl.int32)
    last = tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K))
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i_block in range(first, last):
        b_a = load_a(a_desc, m0, i_block * BLOCK_K, A_TRANSPOSED)
        b_b = load_b(b_desc, n0, i_block * BLOCK_K, B_TRANSPOSED, B_PANEL)
        acc = dot(b_a, b_b, acc, INPUT_PRECISION)
    o_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    acc = bias_relu(acc, bias_ptr, o_n[None, :], m_n[None, :], HAS_BIAS, RELU)
    p_c = c_ptr + pid_split * stride_cs + o_m[:, None] * stride_cm + o_n[None, :] * stride_cn
    tl.store(p_c, cast(acc, c_ptr.dtype.element_ty), mask=(o_m < M)[:, None] & m_n[None, :])


# ------------------------------------------------------------------------------------------------- launch functions


#: Columns of a panel of :class:`Operand`.
_PANEL = 16


class Operand(NamedTuple):
    """An operand of :func:`_matmul_descriptor_kernel`.

    Attributes:
        matrix: a matrix whose rows a tensor descriptor can describe: the operand or its transpose.
        transposed: whether ``matrix`` is the operand's transpose.
        panel: 0, or the columns of a panel: the descriptor then describes [columns / panel, rows, panel].

    Panels are for TF32's second operand with K along the columns. The compiler reads such a block from shared memory into
    registers and writes it back in the other order. With a two-dimensional block, the 32 lanes of a warp hold 2 rows x 16
    groups of 4 columns, and 8 lanes of a store hit the same bank. With panels of 16 columns, the lanes hold 8 x 4, and 2 lanes
    hit the same bank. (With panels of 8 it would be 1, but TMA would fetch rows of 32 bytes instead of 64.) By arithmetic, for
    fc1's input gradient: an SM's share of the weights is 0.8 MB, which is 6,200 cycles of shared memory at 128 bytes each, or
    3.5 us at 1.76 GHz. These stores then take 7 us (28 us without panels), and reading memory takes 35 us.
    """

    matrix: Tensor
    transposed: bool
    panel: int = 0

    def descriptor(self, block_rows: int, block_columns: int) -> TensorDescriptor:
        """The tensor descriptor for blocks of ``block_rows`` x ``block_columns`` of the operand."""
        matrix, block = self.matrix, [block_rows, block_columns]
        if self.transposed:
            block.reverse()
        if self.panel:
            (rows, columns), step = matrix.shape, matrix.stride(0)
            matrix = matrix.as_strided((columns // self.panel, rows, self.panel), (self.panel, step, 1))
            block = [block_columns // self.panel, block_rows, self.panel]
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)


def _dense_side(matrix: Tensor) -> Operand | None:
    """``matrix`` or its transpose, whichever a tensor descriptor can describe; None if neither.

    TMA needs contiguous rows that start at multiples of 16 bytes.
    """
    for candidate, transposed in ((matrix, False), (matrix.t(), True)):
        row, column = candidate.stride()
        size = candidate.element_size()
        if column == 1 and row >= candidate.shape[1] and row * size % 16 == 0 and candidate.data_ptr() % 16 == 0:
            return Operand(candidate, transposed)
    return None


def row_major(matrix: Tensor) -> Tensor:
    """A copy of ``matrix``, (R, C), with contiguous rows that start at multiples of 16 elements.

    Triton specialises on whether 16 divides a stride, and vectorises loads of 4 neighbours only if so.
    """
    rows, columns = matrix.shape
    out = new_output((rows, cdiv(columns, 16) * 16), matrix.dtype, matrix.device)
    config = row_major_config(rows, columns)
    launch(
        _row_major_kernel,
        (cdiv(rows, config["BLOCK_R"]) * cdiv(columns, config["BLOCK_C"]),),
        source_ptr=matrix,
        out_ptr=out,
        R=rows,
        C=columns,
        stride_r=matrix.stride(0),
        stride_c=matrix.stride(1),
        stride_out=out.stride(0),
        WIDE=needs_int64(matrix, out),
        **config,
    )
    return out[:, :columns]


def operands(pass_: str, a: Tensor, b: Tensor, precision: str) -> tuple[Operand, Operand] | None:
    """Both operands for :func:`_matmul_descriptor_kernel`; None where the pointer kernel has to run instead."""
    half = a.dtype in HALF
    if not (half or precision == "tf32") or a.numel() == 0 or b.numel() == 0 or not has_tma(a.device):
        return None
    a_rows, b_rows = _dense_side(a), _dense_side(b)
    if a_rows is None or b_rows is None or half:
        return None if a_rows is None or b_rows is None else (a_rows, b_rows)
    # Tensor cores read TF32 from shared memory only with K along the rows.
    if a_rows.transposed:
        a_rows = Operand(row_major(a), False)
    if not b_rows.transposed:
        # Each row of tiles transposes all of b again. A weight gradient has many rows of tiles and b is the input, so a copy
        # is cheaper. An input gradient has few and b is the weight, so a copy would move twice the bytes of the product.
        if pass_ == "wgrad":
            b_rows = Operand(row_major(b.t()), True)
        elif b.shape[1] % _PANEL == 0:
            b_rows = b_rows._replace(panel=_PANEL)
    return a_rows, b_rows


def operand_arguments(rows: tuple[Operand, Operand], config: dict[str, int]) -> dict[str, Any]:
    """A descriptor kernel's arguments for both operands."""
    a, b = rows
    return {
        "a_desc": a.descriptor(config["BLOCK_M"], config["BLOCK_K"]),
        "b_desc": b.descriptor(config["BLOCK_K"], config["BLOCK_N"]),
        "A_TRANSPOSED": a.transposed,
        "B_TRANSPOSED": b.transposed,
        "B_PANEL": b.panel,
    }
