"""Cross-entropy with class labels: the loss and the gradient of the logits from one forward kernel.

The forward kernel computes each row's maximum and sum of exponentials block by block of classes (Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018), and then writes the row's loss and the gradient of that row's own loss. The
backward kernel multiplies this gradient by the output's gradient and divides a mean's by the sum of weights. Losses of rows are
added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .configs.tables import tile_size
from .loss_kernels import (
    _cross_entropy_dgrad_kernel,
    _cross_entropy_kernel,
    _cross_entropy_sum_kernel,
    cross_entropy_config,
)
from .runtime import plans
from .runtime.arguments import ArgumentTypeError, ArgumentValueError, check_tensors, number
from .runtime.backend import runs_triton
from .runtime.derivatives import differentiable_by, has_tangent
from .runtime.launch import cdiv, launch, needs_int64, new_output, nothing
from .runtime.torch_interop import (
    Operator,
    OperatorFunction,
    apply_function,
    is_plain,
    over,
    overridable,
    wants_grad,
)
from .sums import accumulator_dtype, triton_accumulator

#: The label of ignored rows: the default ``ignore_index`` of ``F.cross_entropy``.
IGNORED = -100

REDUCTIONS = ("none", "mean", "sum")

# ------------------------------------------------------------------------------------------------- launch functions


class CrossEntropy(NamedTuple):
    """The forward operator's problem: its arguments besides tensors.

    Attributes:
        label_smoothing: in [0, 1].
        reduction: "none", "mean" or "sum".
        float32_loss: whether the loss of half-precision logits is float32, as under autocast.
        write_gradient: whether to write the gradient for the backward pass.
    """

    label_smoothing: float
    reduction: str
    float32_loss: bool
    write_gradient: bool

    def flat(self) -> tuple[Any, ...]:
        """The fields in the order of the operator's schema."""
        return tuple(self)


class CrossEntropyGradient(NamedTuple):
    """The backward operator's problem: the reduction."""

    reduction: str

    def flat(self) -> tuple[str]:
        """The fields in the order of the operator's schema."""
        return (self.reduction,)


def _launch_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    loss: Tensor,
    gradient: Tensor | None,
    sums: dict[str, Tensor | None],
    **constants: Any,
) -> None:
    """Launch the forward kernel and, where it has several programs, the sum over them; ``sums``: weights_ptr, hits_ptr."""
    n, c = logits.shape[:2]
    rows = labels.numel()
    x, y = logits.reshape(n, c, rows // max(n, 1)), labels.reshape(n, rows // max(n, 1))
    config, programs = cross_entropy_config(rows, c, logits.device)
    several = programs > 1 and constants["REDUCTION"] != "none"
    partial = new_output((3, programs), accumulator_dtype(logits.dtype), logits.device) if several else None
    launch(
        _cross_entropy_kernel,
        (programs,),
        logits_ptr=x,
        labels_ptr=y,
        weight_ptr=None if weight is None else weight.contiguous(),
        loss_ptr=loss,
        **sums,
        gradient_ptr=gradient,
        partial_ptr=partial,
        rows=rows,
        C=c,
        D=x.shape[2],
        stride_xn=x.stride(0),
        stride_xc=x.stride(1),
        stride_xd=x.stride(2),
        stride_yn=y.stride(0),
        stride_yd=y.stride(1),
        **constants,
        IGNORED=IGNORED,
        WIDE=needs_int64(x, y, gradient),
        ACC=triton_accumulator(logits.dtype),
        **config,
    )
    if partial is not None:
        launch(
            _cross_entropy_sum_kernel,
            (1,),
            partial_ptr=partial,
            loss_ptr=loss,
            **sums,
            parts=programs,
            REDUCTION=constants["REDUCTION"],
            BLOCK=tile_size(programs, 1, 2**20),
            num_warps=4,
        )


def _new_results(logits: Tensor, labels: Tensor, problem: CrossEntropy) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised loss, gradient of each row's loss, and sum of the rows' weights; unwanted results are empty."""
    accumulator = accumulator_dtype(logits.dtype)
    dtype = accumulator if problem.float32_loss else logits.dtype
    loss = new_output(labels.shape if problem.reduction == "none" else (), dtype, logits.device)
    gradient = new_output(logits.shape, logits.dtype, logits.device) if problem.write_gradient else nothing(logits)
    weights = new_output((), accumulator, logits.device) if problem.reduction == "mean" else nothing(logits, accumulator)
    return loss, gradient, weights


def _run_cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor | None, problem: CrossEntropy
) -> tuple[Tensor, Tensor, Tensor]:
    loss, gradient, weights = _new_results(logits, labels, problem)
    _launch_cross_entropy(
        logits,
        labels,
        weight,
        loss,
        gradient if problem.write_gradient else None,
        {"weights_ptr": weights if problem.reduction == "mean" else None, "hits_ptr": None},
        grad_scale=1.0,
        SMOOTHING=problem.label_smoothing,
        REDUCTION=problem.reduction,
    )
    return loss, gradient, weights


@torch.library.custom_op("alexnet_triton::cross_entropy_fprop", mutates_args=())
def cross_entropy_fprop(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    float32_loss: bool,
    write_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of ``logits`` (N, C, ...), gradient of each row's own loss, and the sum of the rows' weights, a mean's divisor.

    A result that was not asked for is empty.
    """
    return _run_cross_entropy(logits, labels, weight, CrossEntropy(label_smoothing, reduction, float32_loss, write_gradient))


@cross_entropy_fprop.register_fake
def _(logits, labels, weight, label_smoothing, reduction, float32_loss, write_gradient):
    return _new_results(logits, labels, CrossEntropy(label_smoothing, reduction, float32_loss, write_gradient))


@torch.library.custom_op("alexnet_triton::cross_entropy_dgrad", mutates_args=())
def cross_entropy_dgrad(
    grad_output: Tensor, gradient: Tensor, labels: Tensor, weights: Tensor | None, reduction: str
) -> Tensor:
    """Gradient of the logits, contiguous, from the loss's gradient and the results of :func:`cross_entropy_fprop`."""
    return _run_dgrad(grad_output, gradient, labels, weights, CrossEntropyGradient(reduction))


@cross_entropy_dgrad.register_fake
def _(grad_output, gradient, labels, weights, reduction):
    return gradient.new_empty(gradient.shape)


def _run_dgrad(
    grad_output: Tensor, gradient: Tensor, labels: Tensor, weights: Tensor | None, problem: CrossEntropyGradient
) -> Tensor:
    dx = new_output(gradient.shape, gradient.dtype, gradient.device)
    if gradient.numel() == 0:
        return dx
    n, c = gradient.shape[:2]
    d = labels.numel() // n
    dy, y = grad_output.expand(labels.shape).reshape(n, d), labels.reshape(n, d)
    config, _ = cross_entropy_config(labels.numel(), c, labels.device)
    launch(
        _cross_entropy_dgrad_kernel,
        (cdiv(labels.numel(), config["BLOCK_ROWS"]) * cdiv(c, config["BLOCK_COLUMNS"]),),
        dy_ptr=dy,
        gradient_ptr=gradient,
        labels_ptr=y,
        weights_ptr=weights if problem.reduction == "mean" else None,
        dx_ptr=dx,
        rows=labels.numel(),
        C=c,
        D=d,
        stride_dyn=dy.stride(0),
        stride_dyd=dy.stride(1),
        stride_yn=y.stride(0),
        stride_yd=y.stride(1),
        IGNORED=IGNORED,
        WIDE=needs_int64(dx, dy, y),
        ACC=triton_accumulator(dx.dtype),
        **config,
    )
    return dx


# ------------------------------------------------------------------------------------------------- autograd Function


_fprop_operator = Operator(cross_entropy_fprop, _run_cross_entropy)
_dgrad_operator = Operator(cross_entropy_dgrad, _run_dgrad)


def _formula(ctx: Any, wanted: Sequence[bool], saved: tuple[Any, ...], grad_output: Tensor, *_: Any) -> tuple[Tensor]:
    logits, labels, weight = saved[2:]
    classes, smoothing = logits.shape[1], ctx.problem.label_smoothing
    probabilities = logits.to(accumulator_dtype(logits.dtype)).softmax(1)
    of_class = probabilities.new_ones(classes) if weight is None else weight.to(probabilities.dtype)
    ignored, index = labels == IGNORED, labels.long().clamp(0, classes - 1)
    of_row = torch.where(index == labels, of_class[index], torch.nan).masked_fill(ignored, 0)
    target = torch.zeros_like(probabilities).scatter(1, index.unsqueeze(1), 1)
    kept = (1 - smoothing) * of_row.unsqueeze(1)
    spread = smoothing / classes * of_class.view(-1, *[1] * (logits.dim() - 2))
    rows = (kept + spread.sum()) * probabilities - kept * target - spread
    factor = grad_output / of_row.sum() if ctx.problem.reduction == "mean" else grad_output
    gradient = rows * factor.expand(labels.shape).unsqueeze(1)
    return (gradient.masked_fill(ignored.unsqueeze(1), 0).to(logits.dtype),)


@over(_fprop_operator)
class CrossEntropyFunction(OperatorFunction):
    """Cross-entropy. Saves the gradient of each row's own loss, and the logits for second derivatives."""

    internal = (1, 2)

    @staticmethod
    def forward(logits, labels, weight, problem):
        return _fprop_operator((logits, labels, weight), problem)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        logits, labels, weight, ctx.problem = inputs
        _, gradient, weights = output
        ctx.mark_non_differentiable(*[made for made in (gradient, weights) if made is not None])
        ctx.set_materialize_grads(False)  # no tensors of zeros for outputs without a gradient
        ctx.save_for_backward(gradient, weights, logits, labels, weight)

    @staticmethod
    @differentiable_by(_formula, of=(2,))
    def backward(ctx: Any, saved: tuple[Any, ...], grad_output: Tensor, *_: Any):
        if not ctx.problem.write_gradient:
            raise RuntimeError(
                "this cross_entropy was recorded without its gradient: its graph was made under torch.no_grad() or from "
                "tensors that do not require a gradient"
            )
        gradient, weights, labels = saved[0], saved[1], saved[3]
        problem = CrossEntropyGradient(ctx.problem.reduction)
        return _dgrad_operator((grad_output, gradient, labels, weights), problem), None, None, None


_fprop_operator.register_autograd(CrossEntropyFunction, CrossEntropy, tensors=3)


# --------------------------------------------------------------------------------------------------- public functions


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    """Check that ``labels`` holds one class label for each row of ``logits``, (C,) or (N, C, ...)."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.is_floating_point():
        raise TypeError(
            f"labels must be class labels, int64 or uint8, got {labels.dtype}: for probabilities of classes call "
            "torch.nn.functional.cross_entropy"
        )
    if labels.dtype not in (torch.int64, torch.uint8):
        raise ArgumentTypeError(f"labels must be int64 or uint8, got {labels.dtype}")
    if logits.dim() == 0 or logits.shape[min(1, logits.dim() - 1)] == 0:
        raise ArgumentValueError(
            f"logits must have shape (C,) or (N, C, ...) with at least one class, got {tuple(logits.shape)}"
        )
    expected = (*logits.shape[:1], *logits.shape[2:]) if logits.dim() > 1 else ()
    if labels.shape != expected:
        raise ArgumentValueError(
            f"labels must have shape {tuple(expected)} for logits {tuple(logits.shape)}, got {tuple(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ArgumentValueError(
            f"labels must be on the device of logits: logits is on {logits.device}, labels on {labels.device}"
        )


def _check_weight(logits: Tensor, weight: Tensor, any_dtype: bool) -> None:
    """Check that ``weight`` is (C,), requires no gradient, and has the dtype of ``logits`` unless ``any_dtype``."""
    if any_dtype and isinstance(weight, Tensor):
        check_tensors(weight=weight)
        check_tensors(logits=logits, weight=weight.new_empty(0, dtype=logits.dtype))  # an empty tensor stands for a cast copy
    else:
        check_tensors(logits=logits, weight=weight)
    classes = logits.shape[min(1, logits.dim() - 1)]
    if weight.shape != (classes,):
        raise ArgumentValueError(f"weight must have shape ({classes},), one for each class, got {tuple(weight.shape)}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ArgumentValueError("weight must not require a gradient: cross_entropy computes none for it")


def _checked_smoothing(label_smoothing: float) -> float:
    label_smoothing = float(number("label_smoothing", label_smoothing))
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
    return label_smoothing


@overridable
def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy as :func:`torch.nn.functional.cross_entropy` for class labels, computed in float32.

    A row with the label -100 (PyTorch's default ``ignore_index``) is ignored: its loss and gradient are 0, and a mean does not
    count it. A kernel cannot raise an error: any other label that is not a class makes its row's loss and gradient NaN, and the
    kernel reads no memory outside of ``logits``. The PyTorch reference raises an error for such a label.

    Args:
        logits: (N, C), (N, C, d1, ...) or (C,); any strides; float32, float16 or bfloat16 (float64 on the CPU).
        labels: (N,), (N, d1, ...) or (): the class of each row, int64 or uint8.
        weight: (C,), the weight of each class's loss, in the dtype of ``logits``; it must not require a gradient.
        label_smoothing: in [0, 1], the part of a label that is spread over all classes.
        reduction: ``"mean"`` (weighted by the rows' weights), ``"sum"`` or ``"none"``.

    Returns:
        The loss in the dtype of ``logits`` (under autocast in float32, as in PyTorch): a scalar, or for ``"none"`` a tensor of
        the shape of ``labels``.

    Raises:
        TypeError: other dtypes; floating-point labels, which PyTorch takes for probabilities of classes.
        ValueError: shapes or devices that do not match, an invalid ``label_smoothing`` or ``reduction``, or a weight that
            requires a gradient.
    """
    check_tensors(logits=logits)
    _check_labels(logits, labels)
    device = logits.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device) and logits.dtype != torch.float64
    if weight is not None:
        _check_weight(logits, weight, autocast)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    label_smoothing = _checked_smoothing(label_smoothing)
    use_triton = runs_triton(logits) and not (forward_ad._current_level >= 0 and has_tangent(logits))
    if not use_triton:
        return F.cross_entropy(logits, labels.long(), weight, label_smoothing=label_smoothing, reduction=reduction)
    if logits.dim() == 1:
        logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
        reduction = "sum" if reduction == "none" else reduction
    problem = CrossEntropy(label_smoothing, reduction, autocast, wants_grad(logits))
    return apply_function(CrossEntropyFunction, (logits, labels, weight), problem)[0]


# -------------------------------------------------------------------------------------------- one step of a training loop


def _run_add_cross_entropy(*arguments: Any) -> Tensor:
    """Run :func:`add_cross_entropy`: its tensors, then (whether a gradient is wanted, label smoothing), then ``grad_scale``."""
    logits, labels, loss_sum, hits, weight, (write_gradient, label_smoothing), grad_scale = arguments
    gradient = new_output(logits.shape, logits.dtype, logits.device) if write_gradient else nothing(logits)
    _launch_cross_entropy(
        logits,
        labels,
        weight,
        loss_sum,
        gradient if write_gradient else None,
        {"weights_ptr": None, "hits_ptr": hits},
        grad_scale=grad_scale,
        SMOOTHING=label_smoothing,
        REDUCTION="accumulate",
    )
    return gradient


def add_cross_entropy_reference(
    logits: Tensor,
    labels: Tensor,
    loss_sum: Tensor,
    hits: Tensor,
    grad_scale: float | None = None,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """:func:`add_cross_entropy` in PyTorch's own operations."""
    with torch.enable_grad():
        values = logits.detach().float().requires_grad_(grad_scale is not None)
        weight = None if weight is None else weight.float()
        loss = F.cross_entropy(values, labels.long(), weight, label_smoothing=label_smoothing, reduction="sum")
        gradient = None if grad_scale is None else torch.autograd.grad(loss * grad_scale, values)[0].to(logits.dtype)
    loss_sum += loss.detach()
    hits += (values.detach().argmax(1) == labels).sum()
    return gradient


@torch.no_grad()
def add_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    loss_sum: Tensor,
    hits: Tensor,
    grad_scale: float | None = None,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Add a batch's losses and number of correct predictions to running totals; return the logits' gradient.

    For a training loop: ``logits.backward(add_cross_entropy(logits, labels, loss_sum, hits, 1 / len(logits)))``. A small batch
    takes one launch, many rows or classes two. The call does not synchronise with the device and can be captured in a CUDA
    graph.

    Args:
        logits: (N, C), any strides; float32, float16 or bfloat16.
        labels: (N,) int64 or uint8. A label that is not a class is treated as in :func:`kernels.cross_entropy`; it is no hit.
        loss_sum: float32 scalar on the device of ``logits``; the sum of the rows' losses is added to it in float32.
        hits: float32 scalar on the device of ``logits``; the number of rows whose ``argmax`` is the label is added to it.
        grad_scale: factor of the gradient of the summed losses; None for no gradient.
        weight, label_smoothing: as in :func:`kernels.cross_entropy`, but ``weight`` may have any floating-point dtype. The sum
            is not divided by the weights of its rows.

    Returns:
        The gradient (N, C), contiguous, in the dtype of ``logits``; None without ``grad_scale``.

    Raises:
        TypeError, ValueError: other dtypes, shapes or devices.
    """
    check_tensors(logits=logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (N, C), got {tuple(logits.shape)}")
    _check_labels(logits, labels)
    for name, total in (("loss_sum", loss_sum), ("hits", hits)):
        if total.dtype != torch.float32 or total.dim() != 0 or total.device != logits.device:
            raise ValueError(f"{name} must be a float32 scalar on {logits.device}, got {total.dtype} {tuple(total.shape)}")
    if weight is not None:
        _check_weight(logits, weight, any_dtype=True)
    label_smoothing = _checked_smoothing(label_smoothing)
    if not runs_triton(logits):
        return add_cross_entropy_reference(
            logits, labels, loss_sum, hits, grad_scale, weight=weight, label_smoothing=label_smoothing
        )
    tensors, wanted = (logits, labels, loss_sum, hits, weight), grad_scale is not None
    problem = (wanted, label_smoothing)
    numbers = (1.0 if grad_scale is None else float(number("grad_scale", grad_scale)),)
    if is_plain(tensors):
        gradient = plans.call(_run_add_cross_entropy, tensors, problem, numbers)
    else:
        gradient = _run_add_cross_entropy(*tensors, problem, *numbers)
    return gradient if wanted else None
