"""Kernels of max-pooling: forward with a one-byte window position, backward as a gather.

Both passes are bound by memory bandwidth. So a tile is pixels x channels, and in a channels-last tensor each thread reads and
writes 16 contiguous bytes: channels that have the same position in their windows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives import cast, compensated_add, program_id


@triton.jit
def _tile(o_pixel, o_c, CHANNELS_LAST: tl.constexpr):
    """Pixels and channels as the two axes of a tile. Threads follow the last axis, so it is the contiguous one."""
    if CHANNELS_LAST:
        o_pixel, o_c = o_pixel[:, None], o_c[None, :]
    else:
        o_pixel, o_c = o_pixel[None, :], o_c[:, None]
    return o_pixel, o_c


@triton.jit
def _max_pool2d_fprop_kernel(
    x_ptr,  # [N, C, H, W] through its strides
    y_ptr,  # out: [N, C, P, Q], dense, NHWC or NCHW
    position_ptr,  # out: window positions, as y, or unused
    index_ptr,  # out: int64 h * W + w, as y, or unused
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yc,
    stride_yq,  # from one pixel to the next, also across the end of a row
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # the tile's order of axes, the same as in x
    RELU: tl.constexpr,
    NO_GRADIENT: tl.constexpr,
    WRITE_POSITION: tl.constexpr,
    WRITE_INDEX: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One program computes BLOCK_PIXELS outputs of one image in BLOCK_CHANNELS channels.

    A window's bounds are computed once for all channels, so that each element needs little more than the comparison.
    With RELU the input is a ReLU's output: a window whose maximum is <= 0 gets NO_GRADIENT as its position.
    """
    PIXEL_BLOCKS: tl.constexpr = (P * Q + BLOCK_PIXELS - 1) // BLOCK_PIXELS
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    pid = program_id(0, WIDE)
    n = pid // (CHANNEL_BLOCKS * PIXEL_BLOCKS)
    o_pixel = pid // CHANNEL_BLOCKS % PIXEL_BLOCKS * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    o_c = pid % CHANNEL_BLOCKS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    o_pixel, o_c = _tile(o_pixel, o_c, CHANNELS_LAST)
    mask = (o_pixel < P * Q) & (o_c < C)
    o_h = o_pixel // Q * STRIDE_H - PAD_H
    o_w = o_pixel % Q * STRIDE_W - PAD_W
    p_x = x_ptr + n * stride_xn + o_c * stride_xc

    # As in PyTorch, the position starts at the window's first element inside the image, so a window of -inf points at it.
    # No number is larger than a NaN, but a later NaN replaces an earlier one.
    first_r = tl.where(o_h < 0, (DILATION_H - 1 - o_h) // DILATION_H, 0)
    first_s = tl.where(o_w < 0, (DILATION_W - 1 - o_w) // DILATION_W, 0)
    b_position = tl.where(mask, first_r * S + first_s, 0).to(tl.int32)
    b_best = tl.full(mask.shape, float("-inf"), dtype=ACC)
    for r in range(R):
        for s in range(S):
            h = o_h + r * DILATION_H
            w = o_w + s * DILATION_W
            inside = mask & ((h >= 0) & (h < H) & (w >= 0) & (w < W))
            # Elements outside the image are -inf, never larger than the best so far, so they are never taken.
            b_x = tl.load(p_x + (h * stride_xh + w * stride_xw), mask=inside, other=float("-inf")).to(ACC)
            takes = (b_x > b_best) | (b_x != b_x)
            b_best = tl.where(takes, b_x, b_best)
            b_position = tl.where(takes, r * S + s, b_position)

    o_y = n * stride_yn + o_pixel * stride_yq + o_c * stride_yc
    tl.store(y_ptr + o_y, cast(b_best, y_ptr.dtype.element_ty), mask=mask)
    if WRITE_INDEX:
        h = o_h + b_position // S * DILATION_H
        w = o_w + b_position % S * DILATION_W
        tl.store(index_ptr + o_y, h.to(tl.int64) * W + w, mask=mask)
    if WRITE_POSITION:
        if RELU:
            b_position = tl.where(b_best <= 0, NO_GRADIENT, b_position)
        tl.store(position_ptr + o_y, b_position.to(position_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_window(
    acc,
    b_grad,
    b_position,
    H_OFFSET: tl.constexpr,
    W_OFFSET: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
):
    """``acc`` plus a window's gradient if the window points at the input at (H_OFFSET, W_OFFSET) from the window's first."""
    r: tl.constexpr = H_OFFSET // DILATION_H
    s: tl.constexpr = W_OFFSET // DILATION_W
    if r * DILATION_H == H_OFFSET and r < R and s * DILATION_W == W_OFFSET and s < S:
        acc += tl.where(b_position == r * S + s, b_grad, 0.0)
    return acc


@triton.jit
def _max_pool2d_dgrad_kernel(
    dy_ptr,  # [N, C, P, Q] through its strides
    position_ptr,  # [N, C, P, Q] through its strides
    dx_ptr,  # out: [N, C, H, W], dense, NHWC or NCHW, or unused
    partial_ptr,  # out: [SPLIT, C] sums of dx over each split's cells, or unused
    blocks,  # of cells, in all images
    blocks_per_split,
    stride_dyn,
    stride_dyc,
    stride_dyp,
    stride_dyq,
    stride_pn,
    stride_pc,
    stride_pp,
    stride_pq,
    stride_dxn,
    stride_dxc,
    stride_dxh,
    stride_dxw,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    NO_GRADIENT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # the tile's order of axes, the same as in dx
    WRITE_DX: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One program owns BLOCK_CHANNELS channels and iterates over one split's cells, BLOCK_PIXELS of them at a time.

    Cell (p, q) is the STRIDE_H x STRIDE_W inputs at which window (p, q) begins. Which windows reach a cell, relative to window
    (p, q), and at which positions they contain the cell's inputs, is the same for every cell. So these numbers are compile-time
    constants. A window's gradient is loaded once for all inputs of the cell.
    """
    CELLS_H: tl.constexpr = (H - 1 + PAD_H) // STRIDE_H + 1
    CELLS_W: tl.constexpr = (W - 1 + PAD_W) // STRIDE_W + 1
    CELL_BLOCKS: tl.constexpr = (CELLS_H * CELLS_W + BLOCK_PIXELS - 1) // BLOCK_PIXELS
    WINDOWS_H: tl.constexpr = (DILATION_H * (R - 1)) // STRIDE_H + 1  # the most windows that hold one row
    WINDOWS_W: tl.constexpr = (DILATION_W * (S - 1)) // STRIDE_W + 1
    pid_c = program_id(0, WIDE)
    pid_split = program_id(1, WIDE)
    o_cell, o_c = _tile(tl.arange(0, BLOCK_PIXELS), pid_c * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS), CHANNELS_LAST)
    m_c = o_c < C
    TILE: tl.constexpr = (BLOCK_PIXELS, BLOCK_CHANNELS) if CHANNELS_LAST else (BLOCK_CHANNELS, BLOCK_PIXELS)
    b_sum = tl.zeros(TILE, dtype=ACC)
    b_lost = tl.zeros(TILE, dtype=ACC)
    for i_block in range(pid_split * blocks_per_split, tl.minimum((pid_split + 1) * blocks_per_split, blocks)):
        n = i_block // CELL_BLOCKS
        o_here = i_block % CELL_BLOCKS * BLOCK_PIXELS + o_cell
        o_p = o_here // CELLS_W
        o_q = o_here % CELLS_W
        p_dy = dy_ptr + n * stride_dyn + o_c * stride_dyc
        p_position = position_ptr + n * stride_pn + o_c * stride_pc

        grads = ()
        positions = ()
        for i in tl.static_range(WINDOWS_H):
            for j in tl.static_range(WINDOWS_W):
                p = o_p - (WINDOWS_H - 1 - i)  # ascending: PyTorch's CPU pool adds in this order
                q = o_q - (WINDOWS_W - 1 - j)
                mask = ((p >= 0) & (p < P) & (q >= 0) & (q < Q)) & m_c
                grads += (tl.load(p_dy + (p * stride_dyp + q * stride_dyq), mask=mask, other=0.0).to(ACC),)  # type: ignore[assignment]
                o_window = p * stride_pp + q * stride_pq
                positions += (tl.load(p_position + o_window, mask=mask, other=NO_GRADIENT).to(tl.int32),)  # type: ignore[assignment]

        if WRITE_DX:
            p_dx = dx_ptr + n * stride_dxn + o_c * stride_dxc
            for a in tl.static_range(STRIDE_H):
                for b in tl.static_range(STRIDE_W):
                    acc = tl.zeros(TILE, dtype=ACC)
                    for i in tl.static_range(WINDOWS_H):
                        for j in tl.static_range(WINDOWS_W):
                            acc = _add_window(
                                acc,
                                grads[i * WINDOWS_W + j],
                                positions[i * WINDOWS_W + j],
                                a + (WINDOWS_H - 1 - i) * STRIDE_H,
                                b + (WINDOWS_W - 1 - j) * STRIDE_W,
                                R,
                                S,
                                DILATION_H,
                                DILATION_W,
                            )
                    h = o_p * STRIDE_H + (a - PAD_H)
                    w = o_q * STRIDE_W + (b - PAD_W)
                    mask = ((h >= 0) & (h < H) & (w >= 0) & (w < W)) & m_c
                    tl.store(p_dx + (h * stride_dxh + w * stride_dxw), cast(acc, dx_ptr.dtype.element_ty), mask=mask)
        if SUM_CHANNELS:
            # A gradient that a window passes on reaches exactly one input, so the sum over the windows is the sum of dx.
            OWN: tl.constexpr = WINDOWS_H * WINDOWS_W - 1
            b_own = tl.where(positions[OWN] == NO_GRADIENT, 0.0, grads[OWN])
            b_sum, b_lost = compensated_add(b_sum, b_lost, b_own)
    if SUM_CHANNELS:
        PIXEL_AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
        b_total = tl.sum(b_sum, axis=PIXEL_AXIS, keep_dims=True)
        tl.store(partial_ptr + pid_split * C + o_c, b_total, mask=m_c)


@triton.jit
def _split_index(o_e, C, H, W, CHANNELS_LAST: tl.constexpr):
    """Convert an element's index in memory order to (n, c, h, w)."""
    if CHANNELS_LAST:
        o_c = o_e % C
        o_w = (o_e // C) % W
        o_h = (o_e // C // W) % H
    else:
        o_w = o_e % W
        o_h = (o_e // W) % H
        o_c = (o_e // W // H) % C
    o_n = o_e // C // H // W
    return o_n, o_c, o_h, o_w


@triton.jit
def _max_pool2d_gather_dgrad_kernel(
    dy_ptr,  # [N, C, P, Q] through its strides
    position_ptr,  # [N, C, P, Q] through its strides
    dx_ptr,  # out: [N, C, H, W], dense, NHWC with CHANNELS_LAST, else NCHW
    elements,
    stride_dyn,
    stride_dyc,
    stride_dyp,
    stride_dyq,
    stride_pn,
    stride_pc,
    stride_pp,
    stride_pq,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Any window size: one program computes BLOCK contiguous input gradients, each from the windows that contain the input."""
    WINDOWS_H: tl.constexpr = (DILATION_H * (R - 1)) // STRIDE_H + 1  # the most windows that hold one row
    WINDOWS_W: tl.constexpr = (DILATION_W * (S - 1)) // STRIDE_W + 1
    o_e = program_id(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    o_n, o_c, o_h, o_w = _split_index(o_e, C, H, W, CHANNELS_LAST)
    p_dy = dy_ptr + o_n * stride_dyn + o_c * stride_dyc
    o_position = o_n * stride_pn + o_c * stride_pc

    acc = tl.zeros((BLOCK,), dtype=ACC)
    for i in range(WINDOWS_H):
        p = (o_h + PAD_H) // STRIDE_H - (WINDOWS_H - 1 - i)  # ascending: PyTorch's CPU pool adds in this order
        h_offset = o_h + PAD_H - p * STRIDE_H
        m_h = (p >= 0) & (p < P) & (h_offset % DILATION_H == 0) & (h_offset <= DILATION_H * (R - 1))
        for j in range(WINDOWS_W):
            q = (o_w + PAD_W) // STRIDE_W - (WINDOWS_W - 1 - j)
            w_offset = o_w + PAD_W - q * STRIDE_W
            mask = m_e & m_h & (q >= 0) & (q < Q) & (w_offset % DILATION_W == 0) & (w_offset <= DILATION_W * (S - 1))
            o_window = o_position + p * stride_pp + q * stride_pq
            b_position = tl.load(position_ptr + o_window, mask=mask, other=0).to(tl.int32)
            mask &= b_position == h_offset // DILATION_H * S + w_offset // DILATION_W
            acc += tl.load(p_dy + p * stride_dyp + q * stride_dyq, mask=mask, other=0.0).to(ACC)
    tl.store(dx_ptr + o_e, cast(acc, dx_ptr.dtype.element_ty), mask=m_e)
