"""The kernels of :mod:`.losses` and their tile sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs.tables import MULTIPROCESSORS, apply_overrides, tile_size
from .primitives import cast, program_id, wait_for_the_kernel_before
from .runtime.backend import INTERPRETED, capability
from .runtime.launch import cdiv

#: At most this many logits are left to a single program: the second launch would cost more than further programs save.
_FEW_LOGITS = 2**14


def cross_entropy_config(rows: int, classes: int, device: torch.device) -> tuple[dict[str, int], int]:
    """BLOCK_ROWS, BLOCK_COLUMNS (classes) and num_warps, 2 logits per thread; and the number of forward programs.

    With few classes, the values kept per row take as many registers as the logits. On NVIDIA GPUs maxnreg grants each thread
    the most registers that 16 warps can have: ptxas would rather spill a few than keep a second program off the SM.
    """
    columns = tile_size(classes, 16, 2**15 if INTERPRETED else 2048)
    block_rows = tile_size(rows, 1, max(1, (2**17 if INTERPRETED else 1024) // columns))
    config = apply_overrides({"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": columns, "num_warps": 16})
    if capability(device) > 0:
        config["maxnreg"] = 128
    # At most as many programs as the single program of the second launch can sum in one block.
    programs = 1 if rows * columns <= _FEW_LOGITS else 8 * MULTIPROCESSORS
    programs = apply_overrides({"SPLIT": programs})["SPLIT"]
    return config, max(1, min(programs, cdiv(rows, config["BLOCK_ROWS"])))


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _store_sums(loss, weights, hits, loss_ptr, weights_ptr, hits_ptr, REDUCTION: tl.constexpr):
    """Store the reduced loss of the sums over all rows, or add the sums to running totals ("accumulate")."""
    if REDUCTION == "accumulate":
        tl.store(loss_ptr, tl.load(loss_ptr) + loss)
        tl.store(hits_ptr, tl.load(hits_ptr) + hits)
    else:
        if REDUCTION == "mean":
            tl.store(weights_ptr, weights)
            loss = loss / weights
        tl.store(loss_ptr, cast(loss, loss_ptr.dtype.element_ty))


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # [N, C, D] through its strides
    labels_ptr,  # [N, D] int64 or uint8, through its strides
    weight_ptr,  # [C], contiguous, or None
    loss_ptr,  # out: [N, D] contiguous for "none"; else a scalar, which "accumulate" adds to
    weights_ptr,  # out: for "mean" the sum of the rows' weights, a scalar
    hits_ptr,  # in and out: for "accumulate" the number of rows whose largest logit is the label's, a scalar
    gradient_ptr,  # out: [N, C, D] contiguous, of each row's own loss times grad_scale, or None
    partial_ptr,  # out: [3, programs] sums of losses, weights and hits, or None where one program sums all
    rows,  # N * D
    C,
    D,
    grad_scale,
    stride_xn,
    stride_xc,
    stride_xd,
    stride_yn,
    stride_yd,
    SMOOTHING: tl.constexpr,
    REDUCTION: tl.constexpr,
    IGNORED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Losses, gradients and hits of rows. One program owns blocks of BLOCK_ROWS rows, ``programs`` blocks apart."""
    pid = program_id(0, WIDE)
    programs = tl.num_programs(0)
    o_c = tl.arange(0, BLOCK_COLUMNS)
    if WIDE:
        o_c = o_c.to(tl.int64)
    infinity = float("inf")
    b_losses = tl.zeros([BLOCK_ROWS], ACC)
    b_weights = tl.zeros([BLOCK_ROWS], ACC)
    b_hits = tl.zeros([BLOCK_ROWS], ACC)
    # Weights in the smoothed target: of the label's class, and added to every class.
    keep = tl.full([], 1.0 - SMOOTHING, ACC)
    spread = tl.full([], SMOOTHING, ACC) / C
    class_weights = tl.full([], 1.0, ACC) * C
    if SMOOTHING != 0.0 and weight_ptr is not None:
        b_of_classes = tl.zeros([BLOCK_COLUMNS], ACC)
        for start in range(0, C, BLOCK_COLUMNS):
            b_of_classes += tl.load(weight_ptr + start + o_c, mask=start + o_c < C, other=0.0).to(ACC)
        class_weights = tl.sum(b_of_classes)

    for first in range(pid * BLOCK_ROWS, rows, programs * BLOCK_ROWS):
        o_r = first + tl.arange(0, BLOCK_ROWS)
        m_r = o_r < rows
        i_n, i_d = o_r // D, o_r % D
        b_label = tl.load(labels_ptr + i_n * stride_yn + i_d * stride_yd, mask=m_r, other=0).to(tl.int64)
        b_ignored = (b_label == IGNORED) | (o_r >= rows)
        m_label = (b_label >= 0) & (b_label < C) & m_r
        p_row = logits_ptr + i_n * stride_xn + i_d * stride_xd

        b_max = tl.full([BLOCK_ROWS], -infinity, ACC)
        b_sum = tl.zeros([BLOCK_ROWS], ACC)
        b_best = tl.zeros([BLOCK_ROWS], o_c.dtype)  # the first class with the largest logit
        b_nan = tl.zeros([BLOCK_ROWS], o_c.dtype) + C  # the first class whose logit is NaN: PyTorch's argmax returns that
        for start in range(0, C, BLOCK_COLUMNS):
            i_c = start + o_c
            mask = m_r[:, None] & (i_c < C)[None, :]
            b_x = tl.load(p_row[:, None] + (i_c * stride_xc)[None, :], mask=mask, other=0.0).to(ACC)
            b_x = tl.where(mask, b_x, -infinity)
            b_top = tl.max(b_x, 1)
            if REDUCTION == "accumulate":
                b_here = tl.min(tl.where(b_x == b_top[:, None], i_c[None, :], C), 1)
                b_best = tl.where(b_top > b_max, b_here, b_best)
                b_nan = tl.minimum(b_nan, tl.min(tl.where(b_x != b_x, i_c[None, :], C), 1))
            b_top = tl.maximum(b_max, b_top)
            # All of a row's classes so far may be -inf: a shift of 0 makes their exponentials 0 and not NaN.
            b_shift = tl.where(b_top == -infinity, 0.0, b_top)
            b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_x - b_shift[:, None]), 1)
            b_max = b_top

        b_log_sum = tl.log(b_sum)
        b_target = tl.load(p_row + b_label * stride_xc, mask=m_label, other=0.0).to(ACC)
        b_weight = tl.where(m_label, 1.0, float("nan")).to(ACC)  # a label that is not a class makes its row NaN
        if weight_ptr is not None:
            b_weight *= tl.load(weight_ptr + b_label, mask=m_label, other=0.0).to(ACC)
        b_weight = tl.where(b_ignored, 0.0, b_weight)
        b_loss = (b_log_sum - (b_target - b_max)) * b_weight
        if SMOOTHING != 0.0 or gradient_ptr is not None:
            b_loss *= keep
            b_share = keep * b_weight
            if SMOOTHING != 0.0:
                b_share += spread * class_weights
            b_other = tl.zeros([BLOCK_ROWS], ACC)
            for start in range(0, C, BLOCK_COLUMNS):
                i_c = start + o_c
                mask = m_r[:, None] & (i_c < C)[None, :]
                b_x = tl.load(p_row[:, None] + (i_c * stride_xc)[None, :], mask=mask, other=0.0).to(ACC)
                b_log = b_x - b_max[:, None] - b_log_sum[:, None]
                b_class = tl.full([BLOCK_COLUMNS], 1.0, ACC)
                if SMOOTHING != 0.0 and weight_ptr is not None:
                    b_class = tl.load(weight_ptr + i_c, mask=i_c < C, other=0.0).to(ACC)
                if SMOOTHING != 0.0:
                    b_other += tl.sum(tl.where(mask, b_log * b_class[None, :], 0.0), 1)
                if gradient_ptr is not None:
                    b_due = tl.where(i_c[None, :] == b_label[:, None], (keep * b_weight)[:, None], 0.0)
                    if SMOOTHING != 0.0:
                        b_due += spread * b_class[None, :]
                    b_gradient = (tl.exp(b_log) * b_share[:, None] - b_due) * grad_scale
                    b_gradient = tl.where(b_ignored[:, None], 0.0, b_gradient)
                    o_g = (i_n * C * D + i_d)[:, None] + (i_c * D)[None, :]
                    tl.store(gradient_ptr + o_g, cast(b_gradient, gradient_ptr.dtype.element_ty), mask=mask)
            b_loss -= spread * b_other
        b_loss = tl.where(b_ignored, 0.0, b_loss)
        if REDUCTION == "none":
            tl.store(loss_ptr + o_r, cast(b_loss, loss_ptr.dtype.element_ty), mask=m_r)
        b_losses += b_loss
        b_weights += b_weight
        if REDUCTION == "accumulate":
            b_answer = tl.where(b_nan < C, b_nan, b_best)
            b_hits += tl.where((b_answer == b_label) & m_r, 1.0, 0.0)

    if REDUCTION != "none":
        loss, weights, hits = tl.sum(b_losses), tl.sum(b_weights), tl.sum(b_hits)
        if partial_ptr is None:
            _store_sums(loss, weights, hits, loss_ptr, weights_ptr, hits_ptr, REDUCTION)
        else:
            tl.store(partial_ptr + pid, loss)
            tl.store(partial_ptr + programs + pid, weights)
            tl.store(partial_ptr + 2 * programs + pid, hits)


@triton.jit
def _cross_entropy_sum_kernel(
    partial_ptr,  # [3, parts] sums of losses, weights and hits
    loss_ptr,  # this and the next two: as in _cross_entropy_kernel
    weights_ptr,
    hits_ptr,
    parts,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums over all rows, from the partial sums of at most BLOCK programs. A single program computes them."""
    wait_for_the_kernel_before()
    o_p = tl.arange(0, BLOCK)
    m_p = o_p < parts
    loss = tl.sum(tl.load(partial_ptr + o_p, mask=m_p, other=0.0))
    weights = tl.sum(tl.load(partial_ptr + parts + o_p, mask=m_p, other=0.0))
    hits = tl.sum(tl.load(partial_ptr + 2 * parts + o_p, mask=m_p, other=0.0))
    _store_sums(loss, weights, hits, loss_ptr, weights_ptr, hits_ptr, REDUCTION)


@triton.jit
def _cross_entropy_dgrad_kernel(
    dy_ptr,  # gradient of the losses, [N, D] through its strides; a scalar has strides of 0
    gradient_ptr,  # [N, C, D] contiguous: of each row's own loss
    labels_ptr,  # [N, D] int64 or uint8, through its strides
    weights_ptr,  # the divisor of a mean, a scalar, or None
    dx_ptr,  # out: [N, C, D] contiguous
    rows,  # N * D
    C,
    D,
    stride_dyn,
    stride_dyd,
    stride_yn,
    stride_yd,
    IGNORED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Gradient of the logits. One program owns BLOCK_ROWS rows and BLOCK_COLUMNS classes."""
    column_blocks = tl.cdiv(C, BLOCK_COLUMNS)
    pid = program_id(0, WIDE)
    o_r = pid // column_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_c = pid % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    m_r = o_r < rows
    mask = m_r[:, None] & (o_c < C)[None, :]
    i_n, i_d = o_r // D, o_r % D
    b_dy = tl.load(dy_ptr + i_n * stride_dyn + i_d * stride_dyd, mask=m_r, other=0.0).to(ACC)
    b_label = tl.load(labels_ptr + i_n * stride_yn + i_d * stride_yd, mask=m_r, other=0).to(tl.int64)
    o_x = (i_n * C * D + i_d)[:, None] + (o_c * D)[None, :]
    b_dx = tl.load(gradient_ptr + o_x, mask=mask, other=0.0).to(ACC) * b_dy[:, None]
    if weights_ptr is not None:
        b_dx = b_dx / tl.load(weights_ptr)
    # Selected, not multiplied: where all rows are ignored, the factor is not finite and 0 times it would be NaN.
    b_dx = tl.where((b_label == IGNORED)[:, None], 0.0, b_dx)
    tl.store(dx_ptr + o_x, cast(b_dx, dx_ptr.dtype.element_ty), mask=mask)
