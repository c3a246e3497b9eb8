"""Linear layer with fused bias, ReLU and dropout: forward, input gradient, weight gradient.

The order is Linear -> ReLU -> Dropout, as in d2l's AlexNet; the name ``linear_relu_dropout`` says it. All three passes are
one matrix product over different strides:

    forward          y[m, n]  = sum over k  x[m, k] w[n, k]      M = batch  N = out  K = in
    input gradient   dx[m, n] = sum over k  dz[m, k] w[k, n]     M = batch  N = in   K = out
    weight gradient  dw[m, n] = sum over k  dz[k, m] x[k, n]     M = out    N = in   K = batch

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

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad
from triton.tools.tensor_descriptor import TensorDescriptor

from .dropouts import draw_seed, dropout_reference, seed_of_reference
from .linear_rules import linear_config, matmul_finish_config, row_major_config
from .primitives import cast, dot, dropout_factor, program_id, relu
from .runtime.arguments import (
    ArgumentValueError,
    check_activation,
    check_probability,
    check_tensors,
    flag,
    matmul_input_precision,
)
from .runtime.backend import HALF, dot_precision, has_copy_engine, runs_triton
from .runtime.derivatives import differentiable_by, has_tangent
from .runtime.launch import cdiv, launch, needs_int64, new_output, new_output_like
from .runtime.torch_interop import Operator, OperatorFunction, apply_function, autocast_inputs, call_planned, over, overridable
from .sums import accumulator_dtype, dropout_scale, epilogue_backward, sum_vectors, triton_accumulator

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


def _matmul(
    pass_: str,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    fuse_relu: bool = False,
) -> None:
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
    bias_relu = {"bias_ptr": a if bias is None else bias.contiguous(), "HAS_BIAS": bias is not None, "RELU": fuse_relu}
    unchanged = {"bias_ptr": a, "HAS_BIAS": False, "RELU": False}
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
        **(bias_relu if parts is None else unchanged),
        **config,
    }
    grid = (cdiv(m, block_m) * cdiv(n, block_n), split)
    if rows is not None:
        a_rows, b_rows = rows
        launch(
            _matmul_descriptor_kernel,
            grid,
            a_desc=a_rows.descriptor(block_m, block_k),
            b_desc=b_rows.descriptor(block_k, block_n),
            A_TRANSPOSED=a_rows.transposed,
            B_TRANSPOSED=b_rows.transposed,
            B_PANEL=b_rows.panel,
            **arguments,
        )
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
    if parts is None and seed is None:
        return
    config = matmul_finish_config(m * n)
    launch(
        _matmul_finish_kernel,
        (cdiv(m * n, config["BLOCK"]),),
        part_ptr=out if parts is None else parts,
        seed_ptr=a if seed is None else seed,
        c_ptr=out,
        elements=m * n,
        N=out.shape[1],
        stride_cm=out.stride(0),
        stride_cn=out.stride(1),
        p=float(p),
        scale=dropout_scale(p),
        SPLIT=split,
        DROPOUT=seed is not None,
        WIDE=needs_int64(out, parts),
        ACC=triton_accumulator(a.dtype),
        **(unchanged if parts is None else bias_relu),
        **config,
    )


class Linear(NamedTuple):
    """What a linear layer's operator is told beside its tensors.

    Attributes:
        p: probability of dropping an output, where there is a seed.
        relu: whether a ReLU comes before that.
    """

    p: float
    relu: bool

    def flat(self) -> tuple[Any, ...]:
        """As the operator's schema lists it."""
        return tuple(self)


class LinearGradients(NamedTuple):
    """What its backward pass is told: the dropout's probability, and which gradients (input, weight, bias) are wanted."""

    p: float
    wanted: Sequence[bool]


def _run_fprop(input: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, problem: Linear) -> Tensor:
    output = new_output((input.shape[0], weight.shape[0]), input.dtype, input.device)
    _matmul("fprop", input, weight.t(), output, bias, seed, problem.p, problem.relu)
    return output


@torch.library.custom_op("alexnet_triton::linear_fprop", mutates_args=())
def linear_fprop(input: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, relu: bool) -> Tensor:
    """(M, in) and (out, in) to (M, out): product, bias, ReLU, then dropout where a seed is given."""
    return _run_fprop(input, weight, bias, seed, Linear(p, relu))


@linear_fprop.register_fake
def _(input, weight, bias, seed, p, relu):
    return input.new_empty(input.shape[0], weight.shape[0])


@torch.library.custom_op("alexnet_triton::linear_dgrad", mutates_args=())
def linear_dgrad(dz: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the input, (M, in)."""
    dx = new_output((dz.shape[0], weight.shape[1]), dz.dtype, dz.device)
    _matmul("dgrad", dz, weight, dx)
    return dx


@linear_dgrad.register_fake
def _(dz, weight):
    return dz.new_empty(dz.shape[0], weight.shape[1])


@torch.library.custom_op("alexnet_triton::linear_wgrad", mutates_args=())
def linear_wgrad(dz: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weight, in the weight's own shape and strides (its values are not read)."""
    dw = new_output_like(weight)
    _matmul("wgrad", dz.t(), input, dw)
    return dw


@linear_wgrad.register_fake
def _(dz, input, weight):
    return torch.empty_like(weight)


@torch.library.custom_op("alexnet_triton::linear_epilogue_backward", mutates_args=())
def linear_epilogue_backward(
    grad_output: Tensor, output: Tensor | None, seed: Tensor | None, p: float, write_dz: bool, sum_columns: bool
) -> tuple[Tensor, Tensor]:
    """:func:`kernels.sums.epilogue_backward` of a linear layer: (M, out) gradient before the epilogue, bias gradient."""
    m, n = grad_output.shape
    grad_output = grad_output.view(m, n, 1, 1)
    output = None if output is None else output.view(m, n, 1, 1)
    dz, column_sums, unsummed = epilogue_backward(grad_output, output, seed, p, write_dz=write_dz, sum_columns=sum_columns)
    sum_vectors(unsummed)
    return dz.view(dz.shape[0], n), column_sums


def _backward(
    operators: _BackwardOperators,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    seed: Tensor | None,
    problem: LinearGradients,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias; None what is not wanted."""
    p, (needs_input, needs_weight, needs_bias) = problem
    epilogue, dgrad, wgrad = operators
    dz, dx, dw, d_bias = grad_output, None, None, None
    changed = (output is not None or seed is not None) and (needs_input or needs_weight)
    if changed or needs_bias:
        written, column_sums = epilogue(grad_output, output, seed, p, changed, needs_bias)
        dz = written if changed else dz
        d_bias = column_sums if needs_bias else None
    if needs_input:
        dx = dgrad(dz, weight)
    if needs_weight:
        dw = wgrad(dz, input, weight)
    return dx, dw, d_bias


class _BackwardOperators(NamedTuple):
    epilogue: Any
    dgrad: Any
    wgrad: Any


@linear_epilogue_backward.register_fake
def _(grad_output, output, seed, p, write_dz, sum_columns):
    m, n = grad_output.shape
    return grad_output.new_empty(m if write_dz else 0, n), grad_output.new_empty(n if sum_columns else 0)


# ------------------------------------------------------------------------------------------------- autograd Function


_fprop_operator = Operator(linear_fprop, _run_fprop)
_registered = _BackwardOperators(linear_epilogue_backward, linear_dgrad, linear_wgrad)
_dispatch_backward = functools.partial(_backward, _registered)
_run_backward = functools.partial(_backward, _BackwardOperators(*(operator._init_fn for operator in _registered)))


def _formula(ctx: Any, wanted: Sequence[bool], saved: tuple[Any, ...], grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output, seed = saved
    dz = grad_output if seed is None else dropout_reference(grad_output, ctx.p, seed)
    if output is not None:
        dz = dz.masked_fill(output <= 0, 0)
    dx = dz @ weight if wanted[0] else None
    dw = dz.t() @ input if wanted[1] else None
    return dx, dw, dz.sum(0) if wanted[2] else None


@over(_fprop_operator)
class LinearFunction(OperatorFunction):
    """Linear (+bias, +ReLU, +dropout). Saves input, weight, the output of a ReLU and the seed of a dropout."""

    @staticmethod
    def forward(input, weight, bias, seed, problem):
        return _fprop_operator((input, weight, bias, seed), problem)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, _, seed, problem = inputs
        ctx.save_for_backward(input, weight, output if problem.relu else None, seed)
        ctx.p = problem.p

    @staticmethod
    @differentiable_by(_formula, of=(0, 1))
    def backward(ctx: Any, saved: tuple[Tensor, Tensor, Tensor | None, Tensor | None], grad_output: Tensor):
        tensors = (grad_output, *saved)
        problem = LinearGradients(ctx.p, ctx.needs_input_grad[:3])
        gradients = call_planned(_run_backward, tensors, problem, _dispatch_backward)
        return (*gradients, None, None)


_fprop_operator.register_autograd(LinearFunction, Linear, tensors=4)

# --------------------------------------------------------------------------------------------------- public functions


def linear_reference(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """What :func:`linear` means, in PyTorch's own operations."""
    output = F.linear(input, weight, bias)
    return F.relu(output) if activation == "relu" else output


def linear_relu_dropout_reference(input: Tensor, weight: Tensor, bias: Tensor | None, p: float, seed: Tensor | None) -> Tensor:
    """What :func:`linear_relu_dropout` in training means, in PyTorch's own operations."""
    return dropout_reference(linear_reference(input, weight, bias, activation="relu"), p, seed)


def _check_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensors(input=input, weight=weight, bias=bias)
    if input.dim() < 1:
        raise ArgumentValueError("input must be (..., in_features), got a scalar")
    if weight.dim() not in (1, 2):
        raise ArgumentValueError(
            f"weight must be (out_features, in_features) or (in_features,), got shape {tuple(weight.shape)}"
        )
    if input.shape[-1] != weight.shape[-1]:
        raise ArgumentValueError(
            f"input has {input.shape[-1]} features in its last dimension, but weight of shape {tuple(weight.shape)} wants "
            f"{weight.shape[-1]}"
        )
    if bias is None:
        return
    if weight.dim() == 1:
        raise ArgumentValueError(f"bias must be None with a weight of shape (in_features,), got shape {tuple(bias.shape)}")
    features = weight.shape[0]
    if bias.dim() > 2 or bias.numel() not in (1, features) or (bias.dim() > 0 and bias.shape[-1] != bias.numel()):
        raise ArgumentValueError(f"bias must have shape ({features},), or (1,) or () for one value, got {tuple(bias.shape)}")


def prepare_linear(tensors: Sequence[Tensor | None], options: tuple[float, bool], needs_grad: bool) -> Linear:
    """The problem of :class:`LinearFunction` in a sequence; options: the dropout's probability, whether there is a ReLU."""
    input, weight, bias, _ = tensors
    _check_linear(input, weight, bias)  # type: ignore[arg-type]
    return Linear(*options)


def _apply_linear(input: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, fuse_relu: bool) -> Tensor:
    if weight.dim() == 1:
        return _apply_linear(input, weight.unsqueeze(0), bias, seed, p, fuse_relu).squeeze(-1)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        bias = bias.reshape(-1).expand(weight.shape[0])
    problem = Linear(p, fuse_relu)
    if input.dim() == 2:
        return apply_function(LinearFunction, (input, weight, bias, seed), problem)
    # math.prod, not Size.numel(): that would pin a dynamic batch size to what it was while tracing.
    rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    output = apply_function(LinearFunction, (rows, weight, bias, seed), problem)
    return output.view(*input.shape[:-1], weight.shape[0])


@overridable
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """Linear layer, bias and activation in one kernel; the meaning of :func:`torch.nn.functional.linear`.

    Args:
        input: (..., in_features); float32, float16 or bfloat16 (float64 on the CPU), any strides.
        weight: (out_features, in_features), dtype and device of ``input``; or (in_features,), without a bias.
        bias: (out_features,), one value as (1,) or (), or None.
        activation: None or ``"relu"``.

    Returns:
        (..., out_features), or (...) for a 1-D weight, in ``input``'s dtype. Products are summed in float32 (float64 for
        float64). float32 products follow ``torch.backends.cuda.matmul.fp32_precision`` (IEEE by PyTorch's default). Under
        autocast, inputs are cast as ``F.linear`` casts them.

    Raises:
        TypeError: a dtype that the kernels do not run, or dtypes that differ.
        ValueError: ranks, features, devices or options that do not fit.
    """
    fuse_relu = check_activation(activation)
    input, weight, bias = autocast_inputs(input, weight, bias)
    _check_linear(input, weight, bias)
    if not runs_triton(input) or (forward_ad._current_level >= 0 and has_tangent(input, weight, bias)):
        return linear_reference(input, weight, bias, activation=activation)
    return _apply_linear(input, weight, bias, None, 0.0, fuse_relu)


@overridable
def linear_relu_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Linear layer, bias, ReLU and dropout, in this order, in one kernel.

    Args:
        input, weight, bias: as :func:`kernels.linear`.
        p, training, seed: as :func:`kernels.dropout`; the mask is that of ``dropout_mask(output.shape, p, seed)``.

    Returns:
        (..., out_features) in ``input``'s dtype. Without ``training``, or with a ``p`` of 0, it is ``linear(...,
        activation="relu")``, and nothing is drawn.

    Raises:
        TypeError, ValueError: as :func:`kernels.linear` and :func:`kernels.dropout`.
    """
    p = check_probability(p)
    if type(training) is not bool:
        training = flag("training", training)
    if not training or p == 0:
        return linear(input, weight, bias, activation="relu")
    input, weight, bias = autocast_inputs(input, weight, bias)
    _check_linear(input, weight, bias)
    use_triton = runs_triton(input) and not (forward_ad._current_level >= 0 and has_tangent(input, weight, bias))
    if not use_triton:
        return linear_relu_dropout_reference(input, weight, bias, p, seed_of_reference(input, seed))
    return _apply_linear(input, weight, bias, draw_seed(input.device, seed), p, True)
