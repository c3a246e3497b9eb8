"""The strided first layer with its ReLU and 3 x 3 max-pool of stride 2 in one kernel, which writes no unpooled output.

AlexNet's conv1 has the largest output of the network, four and a half times as large as the pooled output. A program iterates
over the columns of the convolution's output that ROWS rows of windows read, and keeps maxima in registers until a window is
complete. Neighbouring windows share a row: with ROWS = 1, three rows are computed for every two rows of the convolution's
output. The products, and their order, are the same as in :mod:`kernels.convolution.stem`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..pooling.autograd import new_position_and_index, no_gradient
from ..pooling.problem import Window
from ..primitives import cast, dot, only_if, program_id, relu
from ..runtime.launch import cdiv, launch, needs_int64, new_output, strides
from . import stem
from .problem import Problem
from .stem_rules import conv2d_stem_pool_config

# ---------------------------------------------------------------------------------------------------------- kernels

#: A non-negative half-precision number converted to float32 has its last five bits free. With 31 - position in these bits, the
#: float32's bits are an integer key: keys are ordered by value, and of equal values the first in the window is the largest. NaN
#: is above infinity. Of several NaNs PyTorch takes the last in the window, so the last bits of their keys are the position.
_NAN_KEY = tl.constexpr(0x7FC00000)


@triton.jit
def _rank(value, position):
    """Integer keys; a window points at its largest key. ``value``: float32 that a half type can represent, or NaN."""
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # clears the sign that a NaN or a zero may have
    return tl.minimum(bits | (31 - position), position | _NAN_KEY)


@triton.jit
def _pixel(
    x,  # rows of cells, [BLOCK_M, BLOCK_K] each
    x2,
    w,  # rows of the filter, [BLOCK_K, filters] each
    w2,
    acc,
    b_bias,
    ROW: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEYS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One pixel of the convolution plus bias, in float32; with KEYS after the ReLU and rounded to DTYPE."""
    for j in tl.static_range(len(w)):
        acc = dot(x[ROW + j], w[j], acc, INPUT_PRECISION)
    for j in tl.static_range(len(w2)):
        acc = dot(x2[ROW + j], w2[j], acc, INPUT_PRECISION)
    if HAS_BIAS:
        acc += b_bias[None, :]
    if KEYS:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        acc = cast(acc, DTYPE).to(tl.float32)
    return acc


@triton.jit
def larger(a, b, KEYS: tl.constexpr):
    """Elementwise maximum of keys, or of values with NaN above everything."""
    if KEYS:
        return tl.maximum(a, b)
    else:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _key(value, position, KEYS: tl.constexpr):
    if KEYS:
        return _rank(value, position)
    else:
        return value


@triton.jit
def _add_pixel(
    windows,  # ROWS maxima so far, [BLOCK_M, filters] each
    column,  # the maximum so far of this column of a window
    x,
    x2,
    w,
    w2,
    b_bias,
    zero,
    s,  # the column's index in its window, 1 or 2
    complete,  # whether this column completes windows, which are then stored
    y_ptr,
    position_ptr,
    n0,  # where the block of windows begins
    k0,
    p0,
    q,
    N,
    K,
    P,
    stride_yn,
    stride_yk,
    stride_yp,
    stride_yq,
    ROW: tl.constexpr,  # row of the convolution, counted from the program's first
    HAS_BIAS: tl.constexpr,
    KEYS: tl.constexpr,
    NO_GRADIENT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Update the maxima with one more pixel of the convolution, and store the window that the pixel completes.

    A window's last row and last column are also the next window's first. There the maximum restarts with that row or column
    alone.
    """
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    i: tl.constexpr = ROW // 2 - 1
    if ROW > 0:
        # Always zero, but the compiler cannot know that. Otherwise it computes the products of all pixels before the first
        # maximum, and all of them occupy registers.
        acc = (column.to(tl.int32, bitcast=True) & zero).to(tl.float32, bitcast=True)
    else:
        acc = tl.zeros(windows[0].shape, dtype=tl.float32)
    b_pixel = _pixel(x, x2, w, w2, acc, b_bias, ROW, DTYPE, HAS_BIAS, KEYS, INPUT_PRECISION)
    if ROW == 0:
        column = _key(b_pixel, s, KEYS)
    elif ROW % 2 == 1:
        column = larger(column, _key(b_pixel, 3 + s, KEYS), KEYS)
    else:
        column = larger(column, _key(b_pixel, 6 + s, KEYS), KEYS)
        best = larger(windows[0], column, KEYS)
        if complete:
            o_n = n0 + tl.arange(0, column.shape[0])
            o_k = k0 + tl.arange(0, column.shape[1])
            o_y = (o_n * stride_yn + (p0 + i) * stride_yp + q * stride_yq)[:, None] + o_k[None, :] * stride_yk
            m_y = only_if(p0 + i < P, o_n < N)[:, None] & (o_k < K)[None, :]
            if KEYS:
                low = best & 31
                position = tl.where(best < _NAN_KEY, 31 - low, low)
                position = tl.where(best < 32, NO_GRADIENT, position)  # a ReLU's zero
                tl.store(position_ptr + o_y, position.to(tl.uint8), mask=m_y)
                value = (best & -32).to(tl.float32, bitcast=True)
            else:
                value = relu(best)
            tl.store(y_ptr + o_y, cast(value, DTYPE), mask=m_y)
        if KEYS:
            column += tl.where(column < _NAN_KEY, 2, -2)  # from index 2 to index 0
        # Rotate, so that the next row's window comes first.
        windows = windows[1:] + (tl.where(s == 2, column, best),)  # noqa: RUF005  # Triton has no star in a tuple
        column = _key(b_pixel, s, KEYS)
    return windows, column


@triton.jit(do_not_specialize=["N"])  # for N = 1 the compiler would know that N >> 31 is zero
def _conv2d_stem_pool_kernel(
    x_desc,  # overlapping patches [HS, Q, N, FOLD], blocks [1, 1, BLOCK_M, BLOCK_K]
    x2_desc,  # the same with BLOCK_K2 for BLOCK_K
    w_desc,  # filters [3, K, FOLD], blocks [1, BLOCK_N, BLOCK_K]
    w2_desc,  # [1, BLOCK_N, BLOCK_K2]
    v_desc,  # [1, BLOCK_N2, BLOCK_K]
    v2_desc,  # [1, BLOCK_N2, BLOCK_K2]
    bias_ptr,  # [K], or unused
    y_ptr,  # out: [N, K, P, Q] through its strides
    position_ptr,  # out: uint8 window positions, as y, or unused
    N,
    K,
    P,  # of the pool's output
    Q,
    columns,  # columns of windows of a program
    stride_yn,
    stride_yk,
    stride_yp,
    stride_yq,
    USEFUL_POSITIONS: tl.constexpr,  # C * R * S before folding: used to count FLOPs
    CONV_SIZE: tl.constexpr,  # rows * columns of the convolution's output: used to count FLOPs
    HAS_BIAS: tl.constexpr,
    WRITE_POSITION: tl.constexpr,
    NO_GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_K2: tl.constexpr,
):
    """One program computes BLOCK_M images x ROWS rows of windows x some columns of them x BLOCK_N + BLOCK_N2 filters.

    The whole filter stays in shared memory while the program iterates over the convolution's columns. In each column a row of
    cells is loaded once for up to three rows of the convolution.
    """
    pid = program_id(0, WIDE)
    blocks_k = tl.cdiv(K, BLOCK_N + BLOCK_N2)
    strips = tl.cdiv(Q, columns)
    blocks_n = tl.cdiv(N, BLOCK_M)
    pid_k = pid % blocks_k
    pid_strip = pid // blocks_k % strips
    pid_n = pid // blocks_k // strips % blocks_n
    pid_p = pid // blocks_k // strips // blocks_n
    k0 = (pid_k * (BLOCK_N + BLOCK_N2)).to(tl.int32)
    n0 = (pid_n * BLOCK_M).to(tl.int32)
    row = (pid_p * (2 * ROWS)).to(tl.int32)  # of the convolution
    first = (pid_strip * (2 * columns)).to(tl.int32)
    last = tl.minimum(first + 2 * columns, 2 * Q)
    w = ()
    w2 = ()
    v = ()
    v2 = ()
    for j in tl.static_range(3):
        w += (w_desc.load([j, k0, 0]).reshape(BLOCK_N, BLOCK_K).T,)  # type: ignore[assignment]
        if BLOCK_K2 > 0:
            w2 += (w2_desc.load([j, k0, BLOCK_K]).reshape(BLOCK_N, BLOCK_K2).T,)  # type: ignore[assignment]
        if BLOCK_N2 > 0:
            v += (v_desc.load([j, k0 + BLOCK_N, 0]).reshape(BLOCK_N2, BLOCK_K).T,)  # type: ignore[assignment]
            if BLOCK_K2 > 0:
                v2 += (v2_desc.load([j, k0 + BLOCK_N, BLOCK_K]).reshape(BLOCK_N2, BLOCK_K2).T,)  # type: ignore[assignment]
    o_k = k0 + tl.arange(0, BLOCK_N)
    m_k = o_k < K
    b_bias = tl.load(bias_ptr + o_k, mask=m_k, other=0.0).to(tl.float32) if HAS_BIAS else o_k
    KEY: tl.constexpr = tl.int32 if WRITE_POSITION else tl.float32
    windows = ()
    for _ in tl.static_range(ROWS):
        windows += (tl.zeros((BLOCK_M, BLOCK_N), dtype=KEY),)  # type: ignore[assignment]
    if BLOCK_N2 > 0:
        o_k2 = k0 + BLOCK_N + tl.arange(0, BLOCK_N2)
        m_k2 = o_k2 < K
        b_bias2 = tl.load(bias_ptr + o_k2, mask=m_k2, other=0.0).to(tl.float32) if HAS_BIAS else o_k2
        windows2 = ()
        for _ in tl.static_range(ROWS):
            windows2 += (tl.zeros((BLOCK_M, BLOCK_N2), dtype=KEY),)  # type: ignore[assignment]
    zero = N >> 31

    for column in range(first, last + 1):
        s = 2 - column % 2
        complete = (s == 2) & (column > first)
        # The compiler cannot know that these are the same for every column, so it keeps no offsets in registers between stores.
        o_n0 = pid_n * BLOCK_M + (column & zero)
        o_k0 = pid_k * (BLOCK_N + BLOCK_N2) + (column & zero)
        x = ()
        x2 = ()
        so_far = windows[0]  # type: ignore[misc]
        if BLOCK_N2 > 0:
            so_far2 = windows2[0]  # type: ignore[misc]
        for j in tl.static_range(2 * ROWS + 3):
            x += (x_desc.load([row + j, column, n0, 0]).reshape(BLOCK_M, BLOCK_K),)  # type: ignore[assignment]
            if BLOCK_K2 > 0:
                x2 += (x2_desc.load([row + j, column, n0, BLOCK_K]).reshape(BLOCK_M, BLOCK_K2),)  # type: ignore[assignment]
        for i in tl.static_range(2 * ROWS + 1):
            windows, so_far = _add_pixel(
                *(windows, so_far, x, x2, w, w2, b_bias, zero, s, complete, y_ptr, position_ptr),
                *(o_n0, o_k0, pid_p * ROWS, column // 2 - 1, N, K, P, stride_yn, stride_yk, stride_yp, stride_yq),
                *(i, HAS_BIAS, WRITE_POSITION, NO_GRADIENT, INPUT_PRECISION),
            )
        if BLOCK_N2 > 0:
            for i in tl.static_range(2 * ROWS + 1):
                windows2, so_far2 = _add_pixel(
                    *(windows2, so_far2, x, x2, v, v2, b_bias2, zero, s, complete, y_ptr, position_ptr),
                    *(o_n0, o_k0 + BLOCK_N, pid_p * ROWS, column // 2 - 1, N, K, P),
                    *(stride_yn, stride_yk, stride_yp, stride_yq),
                    *(i, HAS_BIAS, WRITE_POSITION, NO_GRADIENT, INPUT_PRECISION),
                )


# ------------------------------------------------------------------------------------------------- launch function


def fprop(
    cells: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    problem: Problem,
    window: Window,
    channels_last: bool,
    write_position: bool,
) -> tuple[Tensor, Tensor]:
    """Convolution, bias, ReLU and pool; returns pooled values and uint8 window positions, each (N, K, P, Q).

    Args:
        cells: :func:`.cells.cells_of` the input.
        problem: the convolution, whose output is not written.
        channels_last: whether both results are NHWC in memory; False for NCHW.
        write_position: whether to write the positions; otherwise the second result is empty.
    """
    n, c, _, _, k, r, s, *conv_size, ((stride, _), *_), _, _, _ = problem
    p, q = window.output_size
    folded = stem.fold(c, s, stride)
    filters = stem.fold_filter(weight, stride)
    y = new_output((n, k, p, q), cells.dtype, cells.device, channels_last=channels_last)
    position, _ = new_position_and_index(y, (3, 3), channels_last, write_position, False)
    wide = needs_int64(y)
    config = conv2d_stem_pool_config(cells.device, n, p, q, folded, k, narrow=wide or not channels_last)
    columns = config.pop("COLUMNS")
    m, n1, n2, k1, k2 = (config[f"BLOCK_{name}"] for name in ("M", "N", "N2", "K", "K2"))

    def patches(positions: int) -> TensorDescriptor:
        return stem.patches(cells, folded, conv_size[1], [m, positions])

    def filter_blocks(rows: int, positions: int) -> TensorDescriptor:
        return TensorDescriptor(filters, [3, k, folded], [k * folded, folded, 1], [1, rows, positions])

    launch(
        _conv2d_stem_pool_kernel,
        (cdiv(p, config["ROWS"]) * cdiv(n, m) * cdiv(q, columns) * cdiv(k, n1 + n2),),
        x_desc=patches(k1),
        x2_desc=patches(k2 or k1),
        w_desc=filter_blocks(n1, k1),
        w2_desc=filter_blocks(n1, k2 or k1),
        v_desc=filter_blocks(n2 or n1, k1),
        v2_desc=filter_blocks(n2 or n1, k2 or k1),
        bias_ptr=filters if bias is None else bias.contiguous(),
        y_ptr=y,
        position_ptr=position if write_position else y,
        N=n,
        K=k,
        P=p,
        Q=q,
        columns=columns,
        **strides("stride_y", "nkpq", y),
        USEFUL_POSITIONS=c * r * s,
        CONV_SIZE=conv_size[0] * conv_size[1],
        HAS_BIAS=bias is not None,
        WRITE_POSITION=write_position,
        NO_GRADIENT=no_gradient(torch.uint8),
        WIDE=wide,
        INPUT_PRECISION="ieee",
        **config,
    )
    return y, position
