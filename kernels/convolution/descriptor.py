"""Convolution of channels-last tensors through tensor descriptors, in half precision and TF32, for Hopper and later.

The kernels of :mod:`.general` gather each element through a pointer of its own. In the kernels here TMA copies whole tiles into
shared memory (``cp.async.bulk.tensor``), where the tensor cores read them (``wgmma``, ``tcgen05``). They need stride 1,
dilation 1, one group and channels in multiples of 16 (in TF32 of 8, from Triton 3.8 on). :mod:`kernels.convolution.stem` runs a
strided first layer of few channels.

Hopper's tensor cores read half types from shared memory in either order, but TF32 only if the reduction dimension is
contiguous. So in TF32 the input gradient reads a copy of the filters, [R, S, C, K], and the weight gradient
(:mod:`.descriptor_wgrad`) reads copies of its operands, [H, W, C, N] (:mod:`.by_batch`). The input gradient's launch writes the
latter; without an input gradient a separate launch does.

What is a tile? A product's rows are output pixels, and each filter position (r, s) must shift them together.

- *Images*: a tile is one pixel of BLOCK_M images. Seen as [H, N, W*C], the shifted tile is a plain block [1, BLOCK_M, BLOCK_K],
  and TMA fills rows and columns outside the image with zeros. Filter positions that lie outside for the whole tile are skipped:
  11% of conv3's products are with padding and are never computed. No tile has a wasted row, whatever P and Q are.
- *Rows of taps* (:mod:`.taps`): the same tile, reduced over the columns of a filter row. Forward only.
- *Box*: a tile is a box of images x rows x columns, loaded as [NB, TH, TW, BLOCK_K] and flattened. For few images.

With WARP_SPECIALIZE one group of warps only issues the loads of the next tiles. fprop and dgrad can be configured to do so.

On Hopper an operand of a product stays in shared memory only if it comes straight from a load, or if it is the second operand.
A flattened box as first operand would go through registers; Triton 3.6 let it be overwritten there while the tensor cores still
read it (wrong values on an H100). So the box kernel's first operand is the filters. With REGISTERS the first operand of the
images kernel goes through registers on purpose: two blocks of filters then read it from shared memory once, not twice. No rule
sets REGISTERS, and before ptxas 13.3 :func:`_check_register_operands` refuses it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..primitives import cast, dot, in_registers, only_if, program_id, relu, relu_grad
from ..runtime.backend import INTERPRETED, capability
from ..runtime.launch import cdiv, launch, needs_int64, new_output, nothing
from ..sums import ColumnSums
from .by_batch import Copy, copy, copy_arguments, copy_by_batch, new_by_batch
from .problem import Problem
from .rules import conv2d_box_config, conv2d_images_config, conv2d_tile

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def pixel_offset(n, p, q, K, P, Q, CHANNELS_LAST: tl.constexpr):
    """Offset of filter 0 of pixel (p, q) of image n, in [N, P, Q, K] or [N, K, P, Q]."""
    if CHANNELS_LAST:
        return ((n * P + p) * Q + q) * K
    else:
        return (n * K * P + p) * Q + q


@triton.jit
def store_pixels(
    y_ptr, bias_ptr, acc, o_row, m_row, o_k, K, pixels, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """Epilogue of [rows, filters]: bias, ReLU, cast, store; ``pixels``: pixels of an image, the stride of filters in NCHW."""
    m_k = o_k < K
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_k, mask=m_k, other=0.0).to(acc.dtype)[None, :]
    if RELU:
        acc = relu(acc)
    o_filter = o_k if CHANNELS_LAST else o_k.to(o_row.dtype) * pixels
    p_y = y_ptr + o_row[:, None] + o_filter[None, :]
    tl.store(p_y, cast(acc, y_ptr.dtype.element_ty), mask=m_row[:, None] & m_k[None, :])


@triton.jit
def mask_and_sum_pixels(acc, relu_ptr, p_sums, o_row, m_row, o_k, K):
    """Epilogue of a gradient: applies the mask of the ReLU output at ``relu_ptr``, and stores the sum over rows at ``p_sums``.

    The gradient is rounded to the output's type first, which halves its registers.
    """
    m_k = o_k < K
    b_relu = tl.load(relu_ptr + o_row[:, None] + o_k[None, :], mask=m_row[:, None] & m_k[None, :], other=0.0)
    y = cast(acc, relu_ptr.dtype.element_ty)
    y = relu_grad(y, b_relu.to(acc.dtype)).to(y.dtype)
    tl.store(p_sums + o_k, tl.sum(y.to(acc.dtype), axis=0), mask=m_k)
    return y


@triton.jit
def inner_first(i, rows, columns, edge_h, edge_w):
    """Row and column of the ``i``-th pixel in an order that puts the edges (``edge_h`` rows, ``edge_w`` columns) last.

    Pixels at the edges meet fewer filter positions. Their short programs run last and fill the SMs that finish early.
    """
    inner_rows = tl.maximum(rows - 2 * edge_h, 0)
    inner_columns = tl.maximum(columns - 2 * edge_w, 0)
    outer_columns = columns - inner_columns
    inner = inner_rows * inner_columns
    at_sides = i - inner
    below = at_sides - inner_rows * outer_columns
    if at_sides < 0:
        row = i // tl.maximum(inner_columns, 1)
        column = i % tl.maximum(inner_columns, 1)
    elif below < 0:
        row = at_sides // tl.maximum(outer_columns, 1)
        column = inner_columns + at_sides % tl.maximum(outer_columns, 1)
    else:
        row = inner_rows + below // columns
        column = below % columns
    # Rotate, so that the top edge comes after the bottom edge, and the left one after the right one.
    return (row + edge_h) % rows, (column + edge_w) % columns


@triton.jit
def _load_filters(w_desc, rs, c0, k0, C: tl.constexpr, K, DGRAD: tl.constexpr, FILTERS_BY_SUM: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of filter position ``rs``: reduced channels from ``c0`` on, output channels from ``k0`` on."""
    if FILTERS_BY_SUM:
        return w_desc.load([rs * K + k0, c0]).T
    elif DGRAD:
        return w_desc.load([c0, rs * K + k0])
    else:
        return w_desc.load([k0, rs * C + c0]).T


@triton.jit
def _add_products(a, b, acc, INPUT_PRECISION: tl.constexpr, REGISTERS: tl.constexpr):
    """``acc + a @ b``. With REGISTERS ``a`` is loaded into registers once for all products that read it.

    The sum is forced into registers too, so that the step waits for all its products at once. Otherwise ptxas 13.4 waits after
    each wgmma instruction.
    """
    if REGISTERS:
        return in_registers(dot(in_registers(a), b, acc, INPUT_PRECISION))
    else:
        return dot(a, b, acc, INPUT_PRECISION)


@triton.jit
def _conv2d_images_kernel(
    x_desc,  # input as rows [H, N, W*C], blocks [1, BLOCK_M, BLOCK_K]
    w_desc,  # filters [K, R*S*C], DGRAD [C, R*S*K], FILTERS_BY_SUM [R*S*K, C]; blocks of BLOCK_N (K) and BLOCK_K (C)
    w2_desc,  # the same with BLOCK_N2 for BLOCK_N
    bias_ptr,  # [K], or unused
    relu_ptr,  # [N, P, Q, K] contiguous: output of a ReLU whose mask is applied to y; or unused
    sums_ptr,  # out: [tiles of PIXELS, PIXELS, K] float32, the sums of y over each tile's images; or unused
    y_ptr,  # out: [N, P, Q, K] contiguous; without CHANNELS_LAST [N, K, P, Q] contiguous
    copy_ptrs,  # see copy_by_batch; or None
    copy_out_ptrs,
    copy_pixels,
    copy_channels,
    N,
    H,
    W,
    P,
    Q,
    K,
    pad_h,
    pad_w,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DGRAD: tl.constexpr,
    FILTERS_BY_SUM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    RELU_GRAD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_COPIES: tl.constexpr,
    COPY_IMAGES: tl.constexpr,
    COPY_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    REGISTERS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes PIXELS (1 or 2) neighbouring pixels of BLOCK_M images x BLOCK_N + BLOCK_N2 filters.

    Input row h meets output row p in filter row r where h = p - pad + r. With DGRAD x is the output's gradient with C channels,
    and h = p + pad - r. There are two blocks of filters because a block is a power of 2 and 96 is not; two pixels share the
    filters that they read.
    """
    pid = program_id(0, WIDE)
    blocks_k = tl.cdiv(K, BLOCK_N + BLOCK_N2)
    blocks_n = tl.cdiv(N, BLOCK_M)
    strips = tl.cdiv(Q, PIXELS)
    k0 = (pid % blocks_k * (BLOCK_N + BLOCK_N2)).to(tl.int32)
    pid_pixels = pid // blocks_k
    n0 = (pid_pixels % blocks_n * BLOCK_M).to(tl.int32)
    edge_h = tl.maximum(R - 1 - pad_h if DGRAD else pad_h, 0)
    edge_w = tl.cdiv(tl.maximum(S - 1 - pad_w if DGRAD else pad_w, 0), PIXELS)
    p, strip = inner_first((pid_pixels // blocks_n).to(tl.int32), P, strips, edge_h, edge_w)
    q = strip * PIXELS
    # Filter positions that meet the image in at least one of the pixels.
    if DGRAD:
        r_low = tl.maximum(0, p + pad_h - H + 1)
        r_high = tl.minimum(R, p + pad_h + 1)
        s_low = tl.maximum(0, q + pad_w - W + 1)
        s_high = tl.minimum(S, q + pad_w + PIXELS)
    else:
        r_low = tl.maximum(0, pad_h - p)
        r_high = tl.minimum(R, H + pad_h - p)
        s_low = tl.maximum(0, pad_w - q - (PIXELS - 1))
        s_high = tl.minimum(S, W + pad_w - q)
    rows = tl.maximum(r_high - r_low, 0)
    columns = tl.maximum(s_high - s_low, 0)
    CHUNKS: tl.constexpr = C // BLOCK_K

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if BLOCK_N2 > 0:
        acc2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
    if PIXELS == 2:
        next_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if BLOCK_N2 > 0:
            next_acc2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
    for i in tl.range(0, rows * columns * CHUNKS, warp_specialize=WARP_SPECIALIZE):
        c0 = i % CHUNKS * BLOCK_K
        s = s_low + i // CHUNKS % tl.maximum(columns, 1)
        r = r_low + i // CHUNKS // tl.maximum(columns, 1)
        if DGRAD:
            h = p + pad_h - r
            o_x = (q + pad_w - s) * C + c0
        else:
            h = p - pad_h + r
            o_x = (q - pad_w + s) * C + c0
        b_w = _load_filters(w_desc, r * S + s, c0, k0, C, K, DGRAD, FILTERS_BY_SUM)  # [BLOCK_K, BLOCK_N]
        b_x = x_desc.load([h, n0, o_x]).reshape(BLOCK_M, BLOCK_K)
        acc = _add_products(b_x, b_w, acc, INPUT_PRECISION, REGISTERS)
        if BLOCK_N2 > 0:
            b_w2 = _load_filters(w2_desc, r * S + s, c0, k0 + BLOCK_N, C, K, DGRAD, FILTERS_BY_SUM)
            acc2 = _add_products(b_x, b_w2, acc2, INPUT_PRECISION, REGISTERS)
        if PIXELS == 2:
            b_next = x_desc.load([h, n0, o_x + C]).reshape(BLOCK_M, BLOCK_K)
            next_acc = _add_products(b_next, b_w, next_acc, INPUT_PRECISION, REGISTERS)
            if BLOCK_N2 > 0:
                next_acc2 = _add_products(b_next, b_w2, next_acc2, INPUT_PRECISION, REGISTERS)

    o_n = pid_pixels % blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = pixel_offset(o_n, p, q, K, P, Q, CHANNELS_LAST)
    m_n = o_n < N
    o_k = k0 + tl.arange(0, BLOCK_N)
    p_sums = sums_ptr + pid_pixels * (PIXELS * K)
    if RELU_GRAD:
        acc = mask_and_sum_pixels(acc, relu_ptr, p_sums, o_row, m_n, o_k, K)
    store_pixels(y_ptr, bias_ptr, acc, o_row, m_n, o_k, K, P * Q, HAS_BIAS, RELU, CHANNELS_LAST)
    if BLOCK_N2 > 0:
        o_k2 = k0 + BLOCK_N + tl.arange(0, BLOCK_N2)
        if RELU_GRAD:
            acc2 = mask_and_sum_pixels(acc2, relu_ptr, p_sums, o_row, m_n, o_k2, K)
        store_pixels(y_ptr, bias_ptr, acc2, o_row, m_n, o_k2, K, P * Q, HAS_BIAS, RELU, CHANNELS_LAST)
    if PIXELS == 2:
        m_n = only_if(q + 1 < Q, m_n)
        o_row += K if CHANNELS_LAST else 1
        if RELU_GRAD:
            next_acc = mask_and_sum_pixels(next_acc, relu_ptr, p_sums + K, o_row, m_n, o_k, K)
        store_pixels(y_ptr, bias_ptr, next_acc, o_row, m_n, o_k, K, P * Q, HAS_BIAS, RELU, CHANNELS_LAST)
        if BLOCK_N2 > 0:
            if RELU_GRAD:
                next_acc2 = mask_and_sum_pixels(next_acc2, relu_ptr, p_sums + K, o_row, m_n, o_k2, K)
            store_pixels(y_ptr, bias_ptr, next_acc2, o_row, m_n, o_k2, K, P * Q, HAS_BIAS, RELU, CHANNELS_LAST)
    if HAS_COPIES:
        copy_by_batch(copy_ptrs, copy_out_ptrs, copy_pixels, copy_channels, N, WIDE, COPY_IMAGES, COPY_CHANNELS)


@triton.jit
def _conv2d_box_kernel(
    x_desc,  # input [N, H, W, C], blocks [NB, TH, TW, BLOCK_K]
    w_desc,  # filters [K, R*S*C], DGRAD [C, R*S*K], FILTERS_BY_SUM [R*S*K, C]; blocks of BLOCK_N (K) and BLOCK_K (C)
    bias_ptr,  # [K], or unused
    relu_ptr,  # [N, P, Q, K] contiguous: output of a ReLU whose mask is applied to y; or unused
    sums_ptr,  # out: [tiles, K] float32, the sums of y over each tile's pixels; or unused
    y_ptr,  # out: [N, P, Q, K] contiguous; without CHANNELS_LAST [N, K, P, Q] contiguous
    copy_ptrs,  # see copy_by_batch; or None
    copy_out_ptrs,
    copy_pixels,
    copy_channels,
    N,
    P,
    Q,
    K,
    pad_h,  # DGRAD: R - 1 - padding
    pad_w,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DGRAD: tl.constexpr,
    FILTERS_BY_SUM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    RELU_GRAD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_COPIES: tl.constexpr,
    COPY_IMAGES: tl.constexpr,
    COPY_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    NB: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes NB images x TH rows x TW columns x BLOCK_N filters; the accumulator is [filters, pixels].

    With DGRAD x is the output's gradient with C channels, and filter positions are read from the last to the first.
    """
    BLOCK_M: tl.constexpr = NB * TH * TW
    pid = program_id(0, WIDE)
    blocks_k = tl.cdiv(K, BLOCK_N)
    tiles_p = tl.cdiv(P, TH)
    tiles_q = tl.cdiv(Q, TW)
    pid_tile = pid // blocks_k
    k0 = (pid % blocks_k * BLOCK_N).to(tl.int32)
    q0 = (pid_tile % tiles_q * TW).to(tl.int32)
    p0 = (pid_tile // tiles_q % tiles_p * TH).to(tl.int32)
    n0 = (pid_tile // tiles_q // tiles_p * NB).to(tl.int32)
    CHUNKS: tl.constexpr = C // BLOCK_K

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for i in tl.range(0, R * S * CHUNKS, warp_specialize=WARP_SPECIALIZE):
        c0 = i % CHUNKS * BLOCK_K
        rs = i // CHUNKS
        b_x = x_desc.load([n0, p0 + rs // S - pad_h, q0 + rs % S - pad_w, c0]).reshape(BLOCK_M, BLOCK_K)
        b_w = _load_filters(w_desc, R * S - 1 - rs if DGRAD else rs, c0, k0, C, K, DGRAD, FILTERS_BY_SUM).T
        acc = dot(b_w, b_x.T, acc, INPUT_PRECISION)

    o_m = tl.arange(0, BLOCK_M)
    o_n = pid_tile // tiles_q // tiles_p * NB + o_m // (TH * TW)
    o_p = p0 + o_m // TW % TH
    o_q = q0 + o_m % TW
    m_m = (o_n < N) & (o_p < P) & (o_q < Q)
    o_row = pixel_offset(o_n, o_p, o_q, K, P, Q, CHANNELS_LAST)
    o_k = k0 + tl.arange(0, BLOCK_N)
    acc = acc.T
    if RELU_GRAD:
        acc = mask_and_sum_pixels(acc, relu_ptr, sums_ptr + pid_tile * K, o_row, m_m, o_k, K)
    store_pixels(y_ptr, bias_ptr, acc, o_row, m_m, o_k, K, P * Q, HAS_BIAS, RELU, CHANNELS_LAST)
    if HAS_COPIES:
        copy_by_batch(copy_ptrs, copy_out_ptrs, copy_pixels, copy_channels, N, WIDE, COPY_IMAGES, COPY_CHANNELS)


# ------------------------------------------------------------------------------------------------- launch functions


def aligned(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy if its memory is not aligned to 16 bytes, as descriptors require."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def dense_nhwc(tensor: Tensor) -> Tensor:
    """(N, C, H, W) as a dense (N, H, W, C) tensor, copied only if it is not channels-last or not aligned."""
    return aligned(tensor.permute(0, 2, 3, 1).contiguous())


def input_rows(nhwc: Tensor, images: int, columns: int) -> TensorDescriptor:
    """Descriptor [H, N, W*C] over (N, H, W, C): a block is one pixel of ``images`` images."""
    n, h, w, c = nhwc.shape
    return TensorDescriptor(nhwc, [h, n, w * c], [w * c, h * w * c, 1], [1, images, columns])


def matrix(tensor: Tensor, rows: int, block: Sequence[int]) -> TensorDescriptor:
    """Descriptor [rows, elements / rows] over a dense tensor."""
    columns = tensor.numel() // rows
    return TensorDescriptor(tensor, [rows, columns], [columns, 1], list(block))


@functools.cache
def ptxas_version(arch: int) -> tuple[int, ...]:
    """Version of the ptxas that Triton runs for ``sm_<arch>``, such as (13, 4)."""
    from triton.backends.nvidia.compiler import get_ptxas

    return tuple(int(part) for part in get_ptxas(arch).version.split("."))


def _check_register_operands(device: torch.device) -> None:
    """Check that products on ``device`` can read their first operand from registers.

    Raises:
        RuntimeError: the GPU is not a Hopper, or Triton's ptxas for it is older than 13.3.
    """
    arch = capability(device)
    version = ptxas_version(arch)
    if arch != 90 or version < (13, 3):
        raise RuntimeError(
            "REGISTERS (a first operand in registers) needs a Hopper GPU (sm_90) and ptxas 13.3 or newer: an older ptxas lets "
            f"the operand be overwritten while the tensor cores read it. Triton {triton.__version__} has ptxas "
            f"{'.'.join(map(str, version))} for sm_{arch}"
        )


def fprop(input: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, relu: bool, channels_last: bool) -> Tensor:
    """Arguments and result as :func:`.select.fprop`."""
    x, filters = dense_nhwc(input), dense_nhwc(weight)
    return _convolve(x, filters, bias, problem, relu, None, (), dgrad=False, channels_last=channels_last)[0]


def dgrad(
    dz: Tensor, weight: Tensor, problem: Problem, relu_output: Tensor | None, copies: Sequence[Copy] = ()
) -> tuple[Tensor, Tensor, list[ColumnSums]]:
    """Arguments and results as :func:`.select.dgrad`. The launch applies the ReLU's mask and sums each tile in its epilogue."""
    filters = dense_nhwc(weight)
    if problem.precision == "tf32":
        by_sum = new_by_batch(filters.shape, filters)
        copy([Copy(filters, by_sum)])
        filters = by_sum
    dx, sums = _convolve(dense_nhwc(dz), filters, None, problem, False, relu_output, copies, dgrad=True)
    if sums is None:
        return dx, nothing(dx), []
    vector = ColumnSums(sums, new_output((problem.c,), dx.dtype, dx.device))
    return dx, vector.out, [vector]


def _convolve(
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    problem: Problem,
    relu: bool,
    relu_output: Tensor | None,
    copies: Sequence[Copy],
    *,
    dgrad: bool,
    channels_last: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Launch fprop or, with ``dgrad``, the input gradient: then ``x`` is the output's gradient, and C and K are swapped.

    With ``relu_output`` the second result is the sums of each tile of the first, (tiles, K) float32; else None.

    Args:
        x: (N, H, W, C).
        filters: (K, R, S, C); for ``dgrad`` in TF32 the copy [R, S, C, K] of them (:mod:`.by_batch`).
        copies: copies that the launch writes beside its own work.
    """
    n, c, h, w, k, r, s, p, q, (_, padding, _, _), dtype, device, precision = problem
    by_sum = dgrad and precision == "tf32"
    if dgrad:
        c, h, w, k, p, q = k, p, q, c, h, w
    y = new_output((n, k, p, q), dtype, device, channels_last=channels_last)

    def new_sums(tiles: int) -> Tensor | None:
        return None if relu_output is None else new_output((tiles, k), torch.float32, device)

    def filter_blocks(columns: int, step: int) -> TensorDescriptor:
        rows = r * s * k if by_sum else filters.shape[0]
        return matrix(filters, rows, [step, columns] if dgrad and not by_sum else [columns, step])

    shared = {
        "bias_ptr": filters if bias is None else bias.contiguous(),
        "relu_ptr": filters if relu_output is None else dense_nhwc(relu_output),
        "RELU_GRAD": relu_output is not None,
        "y_ptr": y,
        "N": n,
        "P": p,
        "Q": q,
        "K": k,
        "C": c,
        "R": r,
        "S": s,
        "DGRAD": dgrad,
        "FILTERS_BY_SUM": by_sum,
        "HAS_BIAS": bias is not None,
        "RELU": relu,
        "CHANNELS_LAST": channels_last,
        "WIDE": needs_int64(y, *[tensor for each in copies for tensor in each]),
        "INPUT_PRECISION": precision,
        **copy_arguments(copies),
    }
    operation = "conv2d_dgrad" if dgrad else "conv2d_fprop"
    sizes = (n, p, q, c, k, r, s)
    if conv2d_tile(device, operation, *sizes, channels_last, dtype) == "images":
        config = conv2d_images_config(device, operation, *sizes, dtype)
        if config["REGISTERS"] and not INTERPRETED:
            _check_register_operands(device)
        n2 = config["BLOCK_N2"]
        tiles = cdiv(n, config["BLOCK_M"]) * p * cdiv(q, config["PIXELS"])
        sums = new_sums(tiles * config["PIXELS"])
        launch(
            _conv2d_images_kernel,
            (tiles * cdiv(k, config["BLOCK_N"] + n2),),
            x_desc=input_rows(x, config["BLOCK_M"], config["BLOCK_K"]),
            w_desc=filter_blocks(config["BLOCK_N"], config["BLOCK_K"]),
            w2_desc=filter_blocks(n2 or config["BLOCK_N"], config["BLOCK_K"]),
            H=h,
            W=w,
            pad_h=padding[0],
            pad_w=padding[1],
            sums_ptr=filters if sums is None else sums,
            **shared,
            **config,
        )
        return y, sums
    config = conv2d_box_config(device, operation, *sizes, narrow=not channels_last, dtype=dtype)
    tile = [config["NB"], config["TH"], config["TW"]]
    tiles = cdiv(n, tile[0]) * cdiv(p, tile[1]) * cdiv(q, tile[2])
    sums = new_sums(tiles)
    launch(
        _conv2d_box_kernel,
        (tiles * cdiv(k, config["BLOCK_N"]),),
        x_desc=TensorDescriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], [*tile, config["BLOCK_K"]]),
        w_desc=filter_blocks(config["BLOCK_N"], config["BLOCK_K"]),
        pad_h=r - 1 - padding[0] if dgrad else padding[0],
        pad_w=s - 1 - padding[1] if dgrad else padding[1],
        sums_ptr=filters if sums is None else sums,
        **shared,
        **config,
    )
    return y, sums
