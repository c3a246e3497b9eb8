"""Matrix products of a linear layer: the kernels, and :func:`matmul`, which chooses one and launches it.

A small batch has few tiles, and the time goes into reading the weights. So K is split among as many programs as keep all
multiprocessors reading; each stores its part of the sum in float32, and a second kernel adds the parts in order and applies the
epilogue. Without a split bias and ReLU are applied to the accumulators before they leave the registers. Dropout is the second
kernel's in any case: beside the accumulators of a large tile, the ten rounds of its random numbers do not fit the registers.

In TF32 the tensor cores read shared memory only with K along the rows. The weight gradient gets copies of both operands in that
order; the input gradient transposes each block of the weights on its way (:class:`_Operand`). An exact float32 product is FMAs
on registers, where the second operand's neighbours should lie along N: the forward pass computes the transposed product
(SWAP in :func:`kernels.linear_rules.linear_config`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .linear_rules import linear_config, matmul_finish_config, row_major_config
from .primitives import cast, dot, dropout_factor, program_id, relu
from .runtime.arguments import matmul_input_precision
from .runtime.backend import HALF, dot_precision, has_copy_engine
from .runtime.launch import cdiv, launch, needs_int64, new_output
from .sums import accumulator_dtype, dropout_scale, triton_accumulator

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
    """out = source. One program copies a BLOCK_R x BLOCK_C tile, read and written along the rows of either."""
    pid = program_id(0, WIDE)
    blocks_r = tl.cdiv(R, BLOCK_R)
    o_r = pid % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = pid // blocks_r * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (o_r < R)[:, None] & (o_c < C)[None, :]
    b = tl.load(source_ptr + o_r[:, None] * stride_r + o_c[None, :] * stride_c, mask=mask, other=0.0)
    tl.store(out_ptr + o_r[:, None] * stride_out + o_c[None, :], b, mask=mask)


@triton.jit
def _bias_relu(acc, bias_ptr, o_n, m_n, HAS_BIAS: tl.constexpr, RELU: tl.constexpr):
    """relu(acc + bias); ``o_n`` are the columns of ``acc``, in a shape that broadcasts to its."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(acc.dtype)
    if RELU:
        acc = relu(acc)
    return acc


@triton.jit
def _matmul_kernel(
    a_ptr,  # [M, K] through its strides
    b_ptr,  # [K, N] through its strides
    bias_ptr,  # [N], BIAS_OF_ROWS: [M]; or unused
    c_ptr,  # out: [M, N] through its strides; or [SPLIT, M, N], the parts of each split
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cs,  # from one split's part to the next
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
    """c = relu(a @ b + bias). One program computes a BLOCK_M x BLOCK_N tile of c over one split's share of K.

    Through pointers: any strides, any GPU.
    """
    pid = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid_m = pid % blocks_m  # neighbours share the columns of b, the weights, which are what a small batch has to read
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
        acc = _bias_relu(acc, bias_ptr, o_m[:, None], m_m[:, None], HAS_BIAS, RELU)
    else:
        acc = _bias_relu(acc, bias_ptr, o_n[None, :], m_n[None, :], HAS_BIAS, RELU)
    p_c = c_ptr + pid_split * stride_cs + o_m[:, None] * stride_cm + o_n[None, :] * stride_cn
    tl.store(p_c, cast(acc, c_ptr.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _matmul_descriptor_kernel(
    a_desc,  # [M, K], blocks [BLOCK_M, BLOCK_K]; A_TRANSPOSED: [K, M], blocks [BLOCK_K, BLOCK_M]
    b_desc,  # [K, N], blocks [BLOCK_K, BLOCK_N]; B_TRANSPOSED: [N, K], blocks [BLOCK_N, BLOCK_K]; B_PANEL: see _Operand
    bias_ptr,  # [N], or unused
    c_ptr,  # out: [M, N] through its strides; or [SPLIT, M, N], the parts of each split
    M,
    N,
    K,
    stride_cs,  # from one split's part to the next
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
    """As :func:`_matmul_kernel`, for matrices that TMA can read: Hopper and later.

    Blocks go from memory to shared memory to the tensor cores. No register sees them, but for a block of TF32 that is
    transposed on its way. What lies outside of a matrix comes as zeros, so that nothing is masked but the store.
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
        k0 = i_block * BLOCK_K
        if A_TRANSPOSED:
            b_a = a_desc.load([k0, m0]).T
        else:
            b_a = a_desc.load([m0, k0])
        if B_TRANSPOSED:
            b_b = b_desc.load([n0, k0]).T
        elif B_PANEL > 0:
            b_b = b_desc.load([n0 // B_PANEL, k0, 0])  # [BLOCK_N / B_PANEL, BLOCK_K, B_PANEL]
            b_b = tl.reshape(tl.permute(b_b, (1, 0, 2)), (BLOCK_K, BLOCK_N))
        else:
            b_b = b_desc.load([k0, n0])
        acc = dot(b_a, b_b, acc, INPUT_PRECISION)
    o_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    acc = _bias_relu(acc, bias_ptr, o_n[None, :], m_n[None, :], HAS_BIAS, RELU)
    p_c = c_ptr + pid_split * stride_cs + o_m[:, None] * stride_cm + o_n[None, :] * stride_cn
    tl.store(p_c, cast(acc, c_ptr.dtype.element_ty), mask=(o_m < M)[:, None] & m_n[None, :])


@triton.jit
def _matmul_finish_kernel(
    part_ptr,  # [SPLIT, M, N]: sums in the accumulator's type, contiguous; or with a SPLIT of 1 the output so far, c itself
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
    for _ in tl.static_range(1, SPLIT):  # unrolled: all loads are under way before the first addition
        part_ptr += elements
        acc += tl.load(part_ptr + o_e, mask=m_e, other=0.0)
    o_n = o_e % N
    acc = _bias_relu(acc, bias_ptr, o_n, m_e, HAS_BIAS, RELU)
    if DROPOUT:
        # Rounded to the output's type first, as the layer before the dropout would store it.
        acc = cast(acc, c_ptr.dtype.element_ty).to(ACC)
        acc *= dropout_factor(tl.load(seed_ptr), o_e, p, scale)
    tl.store(c_ptr + o_e // N * stride_cm + o_n * stride_cn, cast(acc, c_ptr.dtype.element_ty), mask=m_e)


# ------------------------------------------------------------------------------------------------- launch functions


#: Columns of a panel of :class:`_Operand`.
_PANEL = 16


class _Operand(NamedTuple):
    """An operand of :func:`_matmul_descriptor_kernel`.

    Attributes:
        matrix: rows that a tensor descriptor can describe.
        transposed: whether they are the operand's columns.
        panel: 0; or the columns of a panel: the descriptor then describes [columns / panel, rows, panel].

    Panels are for TF32's second operand with K along the columns, which the compiler reads from shared memory into registers
    and writes back in the other order. With a block of two dimensions the 32 lanes of a warp hold 2 rows x 16 groups of 4
    columns, and a store has 8 lanes to a bank; with panels of 16 they hold 8 x 4, and it has 2. (Panels of 8: 1, but TMA would
    fetch rows of 32 bytes, where these are of 64.) By arithmetic, fc1's input gradient: a multiprocessor's share of the weights
    is 0.8 MB, 6,200 cycles of shared memory at 128 bytes each, 3.5 us at 1.76 GHz. So these stores take 7 us (28 without
    panels), and memory 35 us.
    """

    matrix: Tensor
    transposed: bool
    panel: int = 0

    def descriptor(self, block_rows: int, block_columns: int) -> TensorDescriptor:
        """For blocks of so many rows and columns of the operand."""
        matrix, block = self.matrix, [block_rows, block_columns]
        if self.transposed:
            block.reverse()
        if self.panel:
            (rows, columns), step = matrix.shape, matrix.stride(0)
            matrix = matrix.as_strided((columns // self.panel, rows, self.panel), (self.panel, step, 1))
            block = [block_columns // self.panel, block_rows, self.panel]
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)


def _dense_side(matrix: Tensor) -> _Operand | None:
    """``matrix`` or its transpose, whichever a tensor descriptor can describe; else None.

    TMA wants neighbours in a row, and rows that start at multiples of 16 bytes.
    """
    for candidate, transposed in ((matrix, False), (matrix.t(), True)):
        row, column = candidate.stride()
        size = candidate.element_size()
        if column == 1 and row >= candidate.shape[1] and row * size % 16 == 0 and candidate.data_ptr() % 16 == 0:
            return _Operand(candidate, transposed)
    return None


def _row_major(matrix: Tensor) -> Tensor:
    """A copy of ``matrix``, (R, C), with neighbours in a row, and rows that start at multiples of 16 elements.

    Of a stride Triton knows whether 16 divides it, and only then are pointers to 4 neighbours read at once.
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


def _descriptors(pass_: str, a: Tensor, b: Tensor, precision: str) -> tuple[_Operand, _Operand] | None:
    """Both operands for :func:`_matmul_descriptor_kernel`; None where it does not run: then the pointers do."""
    half = a.dtype in HALF
    if not (half or precision == "tf32") or a.numel() == 0 or b.numel() == 0 or not has_copy_engine(a.device):
        return None
    a_rows, b_rows = _dense_side(a), _dense_side(b)
    if a_rows is None or b_rows is None or half:
        return None if a_rows is None or b_rows is None else (a_rows, b_rows)
    # Tensor cores read TF32 from shared memory only with K along the rows.
    if a_rows.transposed:
        a_rows = _Operand(_row_major(a), False)
    if not b_rows.transposed:
        # Each row of tiles transposes all of b anew. A weight gradient has many rows of tiles, and b is the input: a copy is
        # cheaper. An input gradient has few, and b are the weights: a copy moves twice the bytes that the product does.
        if pass_ == "wgrad":
            b_rows = _Operand(_row_major(b.t()), True)
        elif b.shape[1] % _PANEL == 0:
            b_rows = b_rows._replace(panel=_PANEL)
    return a_rows, b_rows


class Epilogue(NamedTuple):
    """What comes after a product: dropout(relu(product + bias)), each where it is asked for.

    Attributes:
        bias: (N,), or None.
        relu: whether there is a ReLU.
        seed: int64 scalar of the dropout, or None.
        p: its probability of dropping an output.
    """

    bias: Tensor | None = None
    relu: bool = False
    seed: Tensor | None = None
    p: float = 0.0

    def bias_relu(self, applied: bool, unused: Tensor) -> dict[str, Any]:
        """A kernel's arguments: bias and ReLU, if it is the one that applies them; ``unused`` is the pointer of no bias."""
        bias = self.bias if applied else None
        return {
            "bias_ptr": unused if bias is None else bias.contiguous(),
            "HAS_BIAS": bias is not None,
            "RELU": self.relu and applied,
        }


_PLAIN = Epilogue()


def matmul(pass_: str, a: Tensor, b: Tensor, out: Tensor, epilogue: Epilogue = _PLAIN) -> None:
    """out = dropout(relu(a @ b + bias)) for 2-D tensors of any strides; ``pass_`` names it in the tables.

    With dropout ``out`` is contiguous.
    """
    (m, k), n = a.shape, b.shape[1]
    precision = dot_precision(a.device, matmul_input_precision(a.dtype))
    rows = _descriptors(pass_, a, b, precision)
    along_k = b.stride(0) == 1 and b.stride(1) != 1
    config = linear_config(a.device, pass_, m, n, k, a.dtype, precision, descriptors=rows is not None, along_k=along_k)
    swap = config.pop("SWAP") if rows is None else 0
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    blocks = max(1, cdiv(k, block_k))
    blocks_per_split = cdiv(blocks, config.pop("SPLIT"))
    split = cdiv(blocks, blocks_per_split)  # none of them is empty
    parts = new_output((split, m, n), accumulator_dtype(a.dtype), a.device) if split > 1 else None
    target = out if parts is None else parts[0]
    if swap:
        a, b = b.t(), (_row_major(a.t()) if swap == 2 and a.stride(1) == 1 else a.t())
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
        launch(_matmul_descriptor_kernel, grid, **_operands(rows, config), **arguments)
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
        _finish(out, parts, epilogue)


def _operands(rows: tuple[_Operand, _Operand], config: dict[str, int]) -> dict[str, Any]:
    """Both operands' arguments of a descriptor kernel."""
    a, b = rows
    return {
        "a_desc": a.descriptor(config["BLOCK_M"], config["BLOCK_K"]),
        "b_desc": b.descriptor(config["BLOCK_K"], config["BLOCK_N"]),
        "A_TRANSPOSED": a.transposed,
        "B_TRANSPOSED": b.transposed,
        "B_PANEL": b.panel,
    }


def _finish(out: Tensor, parts: Tensor | None, epilogue: Epilogue) -> None:
    """The sum of ``parts`` (SPLIT, M, N) and its epilogue into ``out``; without parts, the dropout of what ``out`` holds."""
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
