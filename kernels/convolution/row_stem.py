"""A strided first layer of few channels in TF32, one filter row at a time, reading the images without rearranging them.

The pixels under one filter row are S * C contiguous elements of an image row, [N, H, W*C]. The kernels reduce over them, and a
tile is one pixel of many images, as in :mod:`kernels.convolution.descriptor`. TMA blocks begin at multiples of 16 bytes, which
are four float32 elements. So a layer of stride 4 does not need the cells of :mod:`kernels.convolution.stem`, and saves writing
and reading them.

A second kernel also computes a 3 x 3 max-pool of stride 2, as in :mod:`kernels.convolution.stem_pool`, and writes
no unpooled output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..pooling.autograd import new_position_and_index, no_gradient
from ..pooling.problem import Window
from ..primitives import dot, program_id, relu
from ..runtime.launch import cdiv, launch, needs_int64, new_output, strides
from .by_batch import CellsCopy, copy_cells_by_batch, new_cells_by_batch
from .cells import cells_size
from .descriptor import dense_nhwc, pixel_offset, store_pixels
from .problem import Problem
from .rules import conv2d_rows_config, conv2d_rows_pool_config
from .stem import fold_filter
from .stem_pool import larger

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _conv2d_rows_kernel(
    x_desc,  # input as rows [H, N, W*C], blocks [1, BLOCK_M, BLOCK_K]
    w_desc,  # filters [R*K, POSITIONS], blocks [BLOCK_N, BLOCK_K]
    w2_desc,  # the same with BLOCK_N2 for BLOCK_N
    bias_ptr,  # [K], or unused
    y_ptr,  # out: [N, P, Q, K] contiguous; without CHANNELS_LAST [N, K, P, Q] contiguous
    N,
    H,
    P,
    Q,
    K,
    pad_h,
    first,  # elements by which the first pixel's positions begin before the row
    USEFUL_POSITIONS: tl.constexpr,  # C * R * S: used to count FLOPs
    R: tl.constexpr,
    POSITIONS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STEP: tl.constexpr,  # elements from one pixel's positions to the next pixel's
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes one pixel of BLOCK_M images x BLOCK_N + BLOCK_N2 filters."""
    pid = program_id(0, WIDE)
    blocks_k = tl.cdiv(K, BLOCK_N + BLOCK_N2)
    blocks_n = tl.cdiv(N, BLOCK_M)
    k0 = (pid % blocks_k * (BLOCK_N + BLOCK_N2)).to(tl.int32)
    pid_n = pid // blocks_k % blocks_n
    n0 = (pid_n * BLOCK_M).to(tl.int32)
    q = (pid // blocks_k // blocks_n % Q).to(tl.int32)
    p = (pid // blocks_k // blocks_n // Q).to(tl.int32)
    CHUNKS: tl.constexpr = POSITIONS // BLOCK_K
    r_low = tl.maximum(0, pad_h - p * STRIDE_H)
    r_high = tl.minimum(R, H + pad_h - p * STRIDE_H)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if BLOCK_N2 > 0:
        acc2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
    for i in range(r_low * CHUNKS, r_high * CHUNKS):
        r = i // CHUNKS
        o_j = i % CHUNKS * BLOCK_K
        b_x = x_desc.load([p * STRIDE_H - pad_h + r, n0, q * STEP - first + o_j]).reshape(BLOCK_M, BLOCK_K)
        acc = dot(b_x, w_desc.load([r * K + k0, o_j]).T, acc, INPUT_PRECISION)
        if BLOCK_N2 > 0:
            acc2 = dot(b_x, w2_desc.load([r * K + k0 + BLOCK_N, o_j]).T, acc2, INPUT_PRECISION)
    o_n = pid_n * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n = o_n < N
    o_row = pixel_offset(o_n, p, q, K, P, Q, CHANNELS_LAST)
    o_k = k0 + tl.arange(0, BLOCK_N)
    store_pixels(y_ptr, bias_ptr, acc, o_row, m_n, o_k, K, P * Q, HAS_BIAS, RELU, CHANNELS_LAST)
    if BLOCK_N2 > 0:
        o_k2 = k0 + BLOCK_N + tl.arange(0, BLOCK_N2)
        store_pixels(y_ptr, bias_ptr, acc2, o_row, m_n, o_k2, K, P * Q, HAS_BIAS, RELU, CHANNELS_LAST)


#: The bits of a non-negative float32, as an integer, are ordered by value. With 31 - position in five bits below them, the
#: first of equal values in the window has the largest key. NaN is above infinity. Of several NaNs PyTorch takes the last in the
#: window, so the last bits of their keys are the position.
_NAN_KEY = tl.constexpr(0x7FC00000 << 5)


@triton.jit
def _key(value, position, KEYS: tl.constexpr):
    """With KEYS int64 keys, of which a window points at the largest; otherwise the value itself."""
    if KEYS:
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # clears the sign that a NaN or a zero may have
        place = position.to(tl.int64)
        return tl.minimum((bits.to(tl.int64) << 5) | (31 - place), place | _NAN_KEY)
    else:
        return value


@triton.jit
def _pooled_pixel(
    window, column, acc, b_bias, i, s, complete, y_ptr, position_ptr, o_y, m_y,
    HAS_BIAS: tl.constexpr, KEYS: tl.constexpr, NO_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Update the maxima of a window and of its column with the window's pixel (i, s); store the window that it completes."""
    if HAS_BIAS:
        acc += b_bias[None, :]
    if KEYS:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    key = _key(acc, 3 * i + s, KEYS)
    column = tl.where(i == 0, key, larger(column, key, KEYS))
    if i == 2:
        best = larger(window, column, KEYS)
        if s == 2:
            if complete:
                if KEYS:
                    low = (best & 31).to(tl.int32)
                    position = tl.where(best < _NAN_KEY, 31 - low, low)
                    position = tl.where(best < 32, NO_GRADIENT, position)  # a ReLU's zero
                    tl.store(position_ptr + o_y, position.to(tl.uint8), mask=m_y)
                    tl.store(y_ptr + o_y, (best >> 5).to(tl.int32).to(tl.float32, bitcast=True), mask=m_y)
                else:
                    tl.store(y_ptr + o_y, relu(best), mask=m_y)
            # A window's last column is the next window's first: its index changes from 2 to 0.
            window = column
            if KEYS:
                window += tl.where(column < _NAN_KEY, 2, -2)
        else:
            window = best
    return window, column


@triton.jit
def _conv2d_rows_pool_kernel(
    x_desc,  # input as rows [H, N, W*C], blocks [1, BLOCK_M, BLOCK_K]
    w_desc,  # filters [R*K, POSITIONS], blocks [BLOCK_N, BLOCK_K]
    w2_desc,  # the same with BLOCK_N2 for BLOCK_N
    bias_ptr,  # [K], or unused
    y_ptr,  # out: [N, K, P, Q] through its strides
    position_ptr,  # out: uint8 window positions, as y, or unused
    x_ptr,  # for KEEP_CELLS, see copy_cells_by_batch
    cells_ptr,
    N,
    K,
    P,  # of the pool's output
    Q,
    columns,  # columns of windows of a program
    stride_yn,
    stride_yk,
    stride_yp,
    stride_yq,
    H,  # for KEEP_CELLS
    W,
    HS,
    pad_h,
    pad_w,
    ROW,
    first,  # elements by which the first pixel's positions begin before the row
    USEFUL_POSITIONS: tl.constexpr,  # C * R * S: used to count FLOPs
    CONV_SIZE: tl.constexpr,  # rows * columns of the convolution's output: used to count FLOPs
    R: tl.constexpr,
    POSITIONS: tl.constexpr,
    STEP: tl.constexpr,  # elements from one pixel's positions to the next pixel's
    HAS_BIAS: tl.constexpr,
    WRITE_POSITION: tl.constexpr,
    NO_GRADIENT: tl.constexpr,
    KEEP_CELLS: tl.constexpr,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    WS: tl.constexpr,
    COPY_IMAGES: tl.constexpr,
    COPY_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes BLOCK_M images x one row of windows x some columns of them x BLOCK_N + BLOCK_N2 filters.

    The filters stay in shared memory. A step is one pixel of the convolution. The steps go down the three rows that the windows
    read, then to the next column.
    """
    pid = program_id(0, WIDE)
    blocks_k = tl.cdiv(K, BLOCK_N + BLOCK_N2)
    strips = tl.cdiv(Q, columns)
    blocks_n = tl.cdiv(N, BLOCK_M)
    k0 = (pid % blocks_k * (BLOCK_N + BLOCK_N2)).to(tl.int32)
    pid_strip = pid // blocks_k % strips
    pid_n = pid // blocks_k // strips % blocks_n
    p = pid // blocks_k // strips // blocks_n
    n0 = (pid_n * BLOCK_M).to(tl.int32)
    row = (p * (2 * STRIDE)).to(tl.int32) - pad_h  # of the images
    left = (pid_strip * (2 * columns)).to(tl.int32)
    right = tl.minimum(left + 2 * columns, 2 * Q)
    CHUNKS: tl.constexpr = POSITIONS // BLOCK_K
    w = ()
    w2 = ()
    for j in tl.static_range(R * CHUNKS):
        o_j = j % CHUNKS * BLOCK_K
        w += (w_desc.load([j // CHUNKS * K + k0, o_j]).T,)  # type: ignore[assignment]
        if BLOCK_N2 > 0:
            w2 += (w2_desc.load([j // CHUNKS * K + k0 + BLOCK_N, o_j]).T,)  # type: ignore[assignment]
    o_n = pid_n * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = k0 + tl.arange(0, BLOCK_N)
    b_bias = tl.load(bias_ptr + o_k, mask=o_k < K, other=0.0) if HAS_BIAS else o_k
    KEY: tl.constexpr = tl.int64 if WRITE_POSITION else tl.float32
    window = tl.zeros((BLOCK_M, BLOCK_N), dtype=KEY)
    column = tl.zeros((BLOCK_M, BLOCK_N), dtype=KEY)
    if BLOCK_N2 > 0:
        o_k2 = k0 + BLOCK_N + tl.arange(0, BLOCK_N2)
        b_bias2 = tl.load(bias_ptr + o_k2, mask=o_k2 < K, other=0.0) if HAS_BIAS else o_k2
        window2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=KEY)
        column2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=KEY)
    # Without disable_licm the compiler keeps the addresses of all products in registers, beside the maxima.
    for step in tl.range(3 * left, 3 * right + 3, disable_licm=True):
        i = step % 3
        q = step // 3
        s = 2 - q % 2
        complete = q > left  # the strip's first column completes no window
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if BLOCK_N2 > 0:
            acc2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
        for j in tl.static_range(R * CHUNKS):
            o_x = q * STEP - first + j % CHUNKS * BLOCK_K
            b_x = x_desc.load([row + i * STRIDE + j // CHUNKS, n0, o_x]).reshape(BLOCK_M, BLOCK_K)
            acc = dot(b_x, w[j], acc, INPUT_PRECISION)
            if BLOCK_N2 > 0:
                acc2 = dot(b_x, w2[j], acc2, INPUT_PRECISION)
        o_row = (o_n * stride_yn + p * stride_yp + (q // 2 - 1) * stride_yq)[:, None]
        m_n = (o_n < N)[:, None]
        window, column = _pooled_pixel(
            *(window, column, acc, b_bias, i, s, complete, y_ptr, position_ptr),
            *(o_row + o_k[None, :] * stride_yk, m_n & (o_k < K)[None, :], HAS_BIAS, WRITE_POSITION, NO_GRADIENT),
        )
        if BLOCK_N2 > 0:
            window2, column2 = _pooled_pixel(
                *(window2, column2, acc2, b_bias2, i, s, complete, y_ptr, position_ptr),
                *(o_row + o_k2[None, :] * stride_yk, m_n & (o_k2 < K)[None, :], HAS_BIAS, WRITE_POSITION, NO_GRADIENT),
            )
    if KEEP_CELLS:
        copy_cells_by_batch(
            x_ptr, cells_ptr, N, H, W, HS, pad_h, pad_w, ROW, C, STRIDE, WS, WIDE, COPY_IMAGES, COPY_CHANNELS
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- launch functions


class Rows(NamedTuple):
    """Where the positions of a pixel, which the kernels reduce over, lie in a row of the images.

    Attributes:
        step: elements from one pixel's positions to the next pixel's; a multiple of 4 in problems that these kernels run.
        first: elements by which the first pixel's positions begin before the row; a multiple of 4, so that TMA and vector loads
            begin at multiples of 16 bytes.
        shift: unused positions before the first useful one.
        useful: elements under one filter row, S * C.
    """

    step: int
    first: int
    shift: int
    useful: int

    @classmethod
    def of(cls, problem: Problem) -> Rows:
        stride, padding, *_ = problem.geometry
        before = padding[1] * problem.c
        return cls(stride[1] * problem.c, cdiv(before, 4) * 4, -before % 4, problem.s * problem.c)

    @property
    def positions(self) -> int:
        """Number of positions of a filter row, rounded up to 16, the smallest reduction that every Triton version accepts."""
        return cdiv(self.shift + self.useful, 16) * 16


def dense_rows(input: Tensor) -> Tensor:
    """(N, C, H, W) as a dense (N, H, W*C rounded up to a multiple of 4): rows are padded with zeros to whole 16 bytes."""
    n, c, h, w = input.shape
    nhwc = dense_nhwc(input)
    if w * c % 4 == 0:
        return nhwc.view(n, h, w * c)
    rows = new_output((n, h, cdiv(w * c, 4) * 4), input.dtype, input.device)
    rows.zero_()
    rows[:, :, : w * c] = nhwc.view(n, h, w * c)
    return rows


def cells_copy(rows: Tensor, problem: Problem) -> CellsCopy:
    """The copy of the images' cells with the batch innermost that the weight gradient reads; not written yet."""
    n, c, _, w, _, r, s, p, q, ((stride, _), (pad_h, pad_w), *_), *_ = problem
    height, width = cells_size(stride, (p, q), (r, s))
    out = new_cells_by_batch((height, width), stride * stride * c, n, rows)
    return CellsCopy(rows, (height, width), out, (c, w), stride, (pad_h, pad_w))


def cells_of_copy(by_batch: Tensor, n: int, depth: int) -> Tensor:
    """The cells (N, rows, columns, depth) of a :class:`CellsCopy`'s ``out``, as a view."""
    height, columns, _ = by_batch.shape
    return by_batch[..., :n].view(height, columns // depth, depth, n).permute(3, 0, 1, 2)


def row_blocks(rows: Tensor, images: int, positions: int) -> TensorDescriptor:
    """Descriptor [H, N, elements of a row] over :func:`dense_rows`: a block is one piece of a row of ``images`` images."""
    n, h, row = rows.shape
    return TensorDescriptor(rows, [h, n, row], [row, h * row, 1], [1, images, positions])


def filter_rows(weight: Tensor, problem: Problem) -> Tensor:
    """Filter rows (R, K, positions), dense, with zeros in the positions that are not under the filter."""
    rows = Rows.of(problem)
    return fold_filter(weight, 1, problem.r, rows.positions, rows.shift)


def filter_blocks(filters: Tensor, columns: int, step: int) -> TensorDescriptor:
    """Descriptor [R*K, positions] over :func:`filter_rows`."""
    r, k, positions = filters.shape
    return TensorDescriptor(filters, [r * k, positions], [positions, 1], [columns, step])


def fprop(input: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, relu: bool, channels_last: bool) -> Tensor:
    """Arguments and result as :func:`.select.fprop`."""
    n, c, h, _, k, r, s, p, q, (stride, padding, *_), dtype, device, precision = problem
    rows = Rows.of(problem)
    x, filters = dense_rows(input), filter_rows(weight, problem)
    y = new_output((n, k, p, q), dtype, device, channels_last=channels_last)
    config = conv2d_rows_config(device, n, p, q, rows.positions, k, r)
    m, n1, n2, step = (config[f"BLOCK_{name}"] for name in ("M", "N", "N2", "K"))
    launch(
        _conv2d_rows_kernel,
        (p * q * cdiv(n, m) * cdiv(k, n1 + n2),),
        x_desc=row_blocks(x, m, step),
        w_desc=filter_blocks(filters, n1, step),
        w2_desc=filter_blocks(filters, n2 or n1, step),
        bias_ptr=filters if bias is None else bias.contiguous(),
        y_ptr=y,
        N=n,
        H=h,
        P=p,
        Q=q,
        K=k,
        pad_h=padding[0],
        first=rows.first,
        USEFUL_POSITIONS=c * r * s,
        R=r,
        POSITIONS=rows.positions,
        STRIDE_H=stride[0],
        STEP=rows.step,
        HAS_BIAS=bias is not None,
        RELU=relu,
        CHANNELS_LAST=channels_last,
        WIDE=needs_int64(y),
        INPUT_PRECISION=precision,
        **config,
    )
    return y


def pooled_fprop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    problem: Problem,
    window: Window,
    channels_last: bool,
    write_position: bool,
    kept: CellsCopy | None = None,
) -> tuple[Tensor, Tensor]:
    """Results and further arguments as :func:`.stem_pool.fprop`.

    Args:
        x: :func:`dense_rows` of the images.
        kept: :func:`cells_copy` of ``x``, which the launch writes; None for no copy.
    """
    n, c, _, w, k, r, s, *conv_size, (stride, padding, *_), dtype, device, precision = problem
    p, q = window.output_size
    rows = Rows.of(problem)
    filters = filter_rows(weight, problem)
    y = new_output((n, k, p, q), dtype, device, channels_last=channels_last)
    position, _ = new_position_and_index(y, (3, 3), channels_last, write_position, False)
    wide = needs_int64(y, x, None if kept is None else kept.out)
    narrow = wide or (write_position and not channels_last)
    config = conv2d_rows_pool_config(device, n, p, q, rows.positions, k, r, narrow)
    columns = config.pop("COLUMNS")
    m, n1, n2, step = (config[f"BLOCK_{name}"] for name in ("M", "N", "N2", "K"))
    launch(
        _conv2d_rows_pool_kernel,
        (p * cdiv(n, m) * cdiv(q, columns) * cdiv(k, n1 + n2),),
        x_desc=row_blocks(x, m, step),
        w_desc=filter_blocks(filters, n1, step),
        w2_desc=filter_blocks(filters, n2 or n1, step),
        bias_ptr=filters if bias is None else bias.contiguous(),
        y_ptr=y,
        position_ptr=position if write_position else y,
        N=n,
        K=k,
        P=p,
        Q=q,
        columns=columns,
        **strides("stride_y", "nkpq", y),
        first=rows.first,
        USEFUL_POSITIONS=c * r * s,
        CONV_SIZE=conv_size[0] * conv_size[1],
        R=r,
        POSITIONS=rows.positions,
        STEP=rows.step,
        HAS_BIAS=bias is not None,
        WRITE_POSITION=write_position,
        NO_GRADIENT=no_gradient(torch.uint8),
        WIDE=wide,
        INPUT_PRECISION=precision,
        KEEP_CELLS=kept is not None,
        **(kept or CellsCopy(x, (0, 0), x, (c, w), stride[0], (padding[0], 0))).arguments(),
        **config,
    )
    return y, position
