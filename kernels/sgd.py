"""One step of stochastic gradient descent over many tensors in one launch, with float32 masters for half-precision weights.

The formulas follow :class:`torch.optim.SGD` operation by operation and rounding by rounding. Where PyTorch writes
``a.add(b, alpha=c)``, its CPU and CUDA code both round once, so the kernel uses ``fma``. Where PyTorch multiplies first
(``buffer.mul_(momentum)``), the kernel rounds twice. No multiply-add is left for a compiler to contract, so float32 results are
bit-identical to PyTorch's on GPU and CPU.

A bfloat16 parameter is its float32 master rounded to the upper 16 bits. The lower 16 bits tell whether the rounding went up, so
parameter and lower half together give the master. One case is ambiguous: a lower half of 0x8000 is a tie, which rounds to the
even neighbor from above or from below. One more byte, accessed only for a tie, stores which. A step therefore moves 10 bytes
per parameter (parameter and lower half twice, gradient once); with a float32 master it moves 14.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs.tables import apply_overrides, tile_size
from .primitives import cast, fma, program_id
from .runtime import plans
from .runtime.arguments import number
from .runtime.backend import INTERPRETED, runs_triton
from .runtime.launch import cdiv, launch, needs_int64
from .runtime.torch_interop import is_plain

#: Most tensors in one launch. Every program searches the list for its tensor, and CUDA limits kernel arguments to 4 KiB.
MAX_TENSORS = 32

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def sgd_config(elements: int) -> dict[str, int]:
    """BLOCK and num_warps of the optimizer's kernel; ``elements``: number of elements of the largest tensor.

    Sixteen elements per thread keep enough loads in flight and the number of programs that search for their tensor small.
    """
    return apply_overrides({"BLOCK": tile_size(elements, 16, 2**17) if INTERPRETED else 4096, "num_warps": 8})


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _sgd_update(
    p_param,
    p_grad,
    p_master,
    p_tie,
    p_buffer,
    o,  # [BLOCK] offsets
    mask,  # [BLOCK] or None
    lr,
    momentum,
    grad_factor,
    weight_decay,
    HAS_MASTER: tl.constexpr,
    HAS_TIES: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """Apply the step to one block of one tensor."""
    b_param = tl.load(p_param + o, mask=mask)
    b_weight = b_param.to(tl.float32)
    if HAS_MASTER:
        b_master = tl.load(p_master + o, mask=mask)
        if HAS_TIES:
            is_tie = b_master == -0x8000
            b_up = tl.load(p_tie + o, mask=is_tie if mask is None else is_tie & mask, other=0)
            went_up = tl.where(is_tie, b_up, (b_master < 0).to(tl.int8)).to(tl.int32)
            b_upper = (b_weight.to(tl.int32, bitcast=True) >> 16) - went_up
            b_master = (b_upper << 16 | (b_master.to(tl.int32) & 0xFFFF)).to(tl.float32, bitcast=True)
            b_master = tl.where(b_master == b_master, b_master, b_weight)
        # A weight that differs from its rounded master was changed outside of this kernel (loaded, clipped, pruned): use it.
        rounded = cast(b_master, p_param.dtype.element_ty).to(tl.float32)
        b_weight = tl.where(rounded == b_weight, b_master, b_weight)
    b_grad = tl.load(p_grad + o, mask=mask).to(tl.float32)
    if MAXIMIZE:
        b_grad *= -1.0  # Triton's unary minus is 0 - x, which gives 0 for 0 where PyTorch gives -0
    if WEIGHT_DECAY:
        b_grad = fma(weight_decay, b_weight, b_grad)
    if MOMENTUM:
        if FIRST_STEP:
            b_buffer = b_grad
        else:
            b_buffer = fma(grad_factor, b_grad, tl.load(p_buffer + o, mask=mask) * momentum)
        tl.store(p_buffer + o, b_buffer, mask=mask)
        if NESTEROV:
            b_grad = fma(momentum, b_buffer, b_grad)
        else:
            b_grad = b_buffer
    b_weight = fma(lr * -1.0, b_grad, b_weight)
    if HAS_TIES:
        b_bits = b_weight.to(tl.int32, bitcast=True)
        is_tie = (b_bits & 0xFFFF) == 0x8000
        tl.store(p_master + o, b_bits.to(tl.int16), mask=mask)
        b_up = ((b_bits >> 16) & 1).to(tl.int8)
        tl.store(p_tie + o, b_up, mask=is_tie if mask is None else is_tie & mask)
    elif HAS_MASTER:
        tl.store(p_master + o, b_weight, mask=mask)
    tl.store(p_param + o, cast(b_weight, p_param.dtype.element_ty), mask=mask)


@triton.jit
def _sgd_kernel(
    param_ptrs,  # in and out: a tuple of pointers, one for each tensor
    grad_ptrs,  # as many
    master_ptrs,  # in and out: as many, float32; or int16, the masters' lower halves; or None
    tie_ptrs,  # in and out: as many, int8, whether a tie was rounded up; only with int16 masters, else None
    buffer_ptrs,  # in and out (out at FIRST_STEP): as many, float32; or None
    elements,  # as many ints: elements of each tensor
    first_blocks,  # as many ints: the first program of each tensor, ascending
    lr,  # float, or a pointer to one element
    momentum,
    grad_factor,  # 1 - dampening
    weight_decay,
    LR_IN_MEMORY: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_TIES: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """SGD on a list of tensors. One program owns BLOCK elements, in memory order, of the tensor that its id falls into."""
    pid = program_id(0, WIDE)
    p_param, p_grad = param_ptrs[0], grad_ptrs[0]
    # p_param stands in for absent pointers, which are never dereferenced.
    p_master = master_ptrs[0] if HAS_MASTER else p_param
    p_tie = tie_ptrs[0] if HAS_TIES else p_param
    p_buffer = buffer_ptrs[0] if MOMENTUM else p_param
    size, first_block = elements[0], first_blocks[0]
    # Selected instead of branched: all tensors share one piece of code, and the compiler still knows the pointers' alignment.
    for i in tl.static_range(1, len(param_ptrs)):
        reached = pid >= first_blocks[i]
        p_param = tl.where(reached, param_ptrs[i], p_param)
        p_grad = tl.where(reached, grad_ptrs[i], p_grad)
        if HAS_MASTER:
            p_master = tl.where(reached, master_ptrs[i], p_master)
        if HAS_TIES:
            p_tie = tl.where(reached, tie_ptrs[i], p_tie)
        if MOMENTUM:
            p_buffer = tl.where(reached, buffer_ptrs[i], p_buffer)
        size = tl.where(reached, elements[i], size)
        first_block = tl.where(reached, first_blocks[i], first_block)

    if LR_IN_MEMORY:
        lr = tl.load(lr).to(tl.float32)
    start = (pid - first_block) * BLOCK
    p_param += start
    p_grad += start
    p_master += start
    p_tie += start
    p_buffer += start
    # Eight contiguous offsets are 16 bytes of bfloat16. With 16, the compiler would give every thread 16 contiguous elements
    # to suit the ties, which are bytes, and a warp's accesses to the wider tensors would be spread out.
    o = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), 8), 8)
    # A mask whose bound is not a multiple of 4 splits every access into single elements, so only the last block is masked.
    if start + BLOCK <= size:
        _sgd_update(
            p_param, p_grad, p_master, p_tie, p_buffer, o, None, lr, momentum, grad_factor, weight_decay,
            HAS_MASTER, HAS_TIES, MOMENTUM, FIRST_STEP, WEIGHT_DECAY, NESTEROV, MAXIMIZE,
        )  # fmt: skip
    else:
        _sgd_update(
            p_param, p_grad, p_master, p_tie, p_buffer, o, o < size - start, lr, momentum, grad_factor, weight_decay,
            HAS_MASTER, HAS_TIES, MOMENTUM, FIRST_STEP, WEIGHT_DECAY, NESTEROV, MAXIMIZE,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- launch functions


def _as_float32(value: float) -> float:
    """``value`` rounded to float32, as a compiled kernel receives a Python float; the interpreter would use float64."""
    return ctypes.c_float(value).value


class SGDProblem(NamedTuple):
    """A step's arguments besides tensors and numbers. The tensors are params, grads, masters, ties, buffers, learning rate.

    Attributes:
        params: number of params. Grads, and each other list that is present, have as many.
        masters: whether there are masters.
        ties: whether the masters are int16 lower halves with ties.
        buffers: whether there are momentum buffers.
        lr_in_memory: whether the learning rate is a tensor.
        first_step: whether the buffers are only written.
        weight_decay: whether the weight decay is not 0.
    """

    params: int
    masters: bool
    ties: bool
    buffers: bool
    lr_in_memory: bool
    first_step: bool
    weight_decay: bool
    nesterov: bool
    maximize: bool


def _run_step(*arguments: Any) -> None:
    """Launch a step. Arguments: the tensors, the problem, the numbers of :func:`step_numbers`."""
    *tensors, problem, lr, momentum, grad_factor, weight_decay = arguments
    if problem.lr_in_memory:
        lr = tensors.pop()
    lists = [tensors[i : i + problem.params] for i in range(0, len(tensors), problem.params)]
    params, grads = lists[:2]
    masters = lists[2] if problem.masters else None
    ties = lists[3] if problem.ties else None
    buffers = lists[-1] if problem.buffers else None
    for start in range(0, len(params), MAX_TENSORS):
        part = slice(start, start + MAX_TENSORS)
        elements = tuple(p.numel() for p in params[part])
        config = sgd_config(max(elements))
        blocks = [cdiv(count, config["BLOCK"]) for count in elements]
        launch(
            _sgd_kernel,
            (sum(blocks),),
            param_ptrs=tuple(params[part]),
            grad_ptrs=tuple(grads[part]),
            master_ptrs=tuple(masters[part]) if masters is not None else None,
            tie_ptrs=tuple(ties[part]) if ties is not None else None,
            buffer_ptrs=tuple(buffers[part]) if buffers is not None else None,
            elements=elements,
            first_blocks=tuple(sum(blocks[:i]) for i in range(len(blocks))),
            lr=lr,
            momentum=momentum,
            grad_factor=grad_factor,
            weight_decay=weight_decay,
            LR_IN_MEMORY=problem.lr_in_memory,
            HAS_MASTER=masters is not None,
            HAS_TIES=ties is not None,
            MOMENTUM=buffers is not None,
            FIRST_STEP=problem.first_step,
            WEIGHT_DECAY=problem.weight_decay,
            NESTEROV=problem.nesterov,
            MAXIMIZE=problem.maximize,
            WIDE=needs_int64(*params[part]),
            **config,
        )


def step_numbers(lr: float, momentum: float, dampening: float, weight_decay: float) -> tuple[float, float, float, float]:
    """(lr, momentum, 1 - dampening, weight_decay) rounded to float32, from Python or NumPy numbers."""
    return _as_float32(lr), _as_float32(momentum), _as_float32(1 - float(dampening)), _as_float32(weight_decay)


def repeat_step(tensors: Sequence[Tensor], problem: SGDProblem, numbers: Sequence[float]) -> bool:
    """Repeat a step by the plan of an earlier :func:`sgd_step` on tensors of the same kinds; False if there is no such plan.

    The arguments are not checked again: tensors of the same kinds passed :func:`sgd_step`'s checks before.
    """
    found = plans.find(_run_step, tensors, problem)
    if found is None:
        return False
    plan, inputs, addresses = found
    plan.run(inputs, addresses, numbers)
    torch.autograd.graph.increment_version(tensors[: problem.params])
    return True


# --------------------------------------------------------------------------------------------------- public functions


def has_own_dispatch(tensor: Tensor) -> bool:
    """Whether a ``__torch_dispatch__`` handles operations on ``tensor``, so that its memory may not be directly accessible."""
    return torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions longer than 1. Dense tensors of one shape have equal ones exactly if their order is equal."""
    if tensor.numel() == 0:
        return ()
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def join_master(param: Tensor, bits: Tensor, ties: Tensor) -> Tensor:
    """The float32 master of a bfloat16 ``param``, or ``param`` itself where no master with these bits rounds to it.

    Args:
        param: bfloat16.
        bits: int16, in the shape of ``param``: the lower halves of the masters.
        ties: int8, in the shape of ``param``: the lowest bits of the masters' upper halves. Used only where the lower half is
            0x8000.
    """
    wide = param.float()
    went_up = torch.where(bits == -0x8000, ties, bits < 0)
    upper = (wide.view(torch.int32) >> 16) - went_up
    master = (upper << 16 | bits.int() & 0xFFFF).view(torch.float32)
    return torch.where(master.to(param.dtype) == param, master, wide)


def split_master(master: Tensor, bits: Tensor, ties: Tensor) -> None:
    """Write the ``bits`` and ``ties`` that :func:`join_master` needs besides ``master.bfloat16()``. A NaN loses its payload.

    Args:
        master: float32.
        bits: int16, in the shape of ``master``; overwritten with the lower halves.
        ties: int8, in the shape of ``master``; overwritten with the lowest bits of the upper halves.
    """
    wide = master.view(torch.int32)
    bits.copy_(wide)
    ties.copy_((wide >> 16) & 1)


def sgd_step_reference(
    param: Tensor,
    grad: Tensor,
    master: Tensor | None,
    buffer: Tensor | None,
    ties: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
) -> None:
    """The step of :func:`sgd_step` on one tensor in PyTorch's own operations, for any floating-point dtype and strides.

    Numbers and flags must be Python's own.
    """
    weight, bits = param, master
    if master is not None:
        if ties is not None:
            master = join_master(param, master, ties)
        master.copy_(torch.where(master.to(param.dtype) == param, master, param.to(master.dtype)))
        weight = master
    grad = grad.to(weight.dtype)
    if maximize:
        grad = -grad
    if weight_decay != 0:
        grad = grad.add(weight, alpha=weight_decay)
    if buffer is not None:
        if first_step:
            buffer.copy_(grad)
        else:
            buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
        grad = grad.add(buffer, alpha=momentum) if nesterov else buffer
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        weight.addcmul_(
            grad, lr.to(weight.dtype).reshape(()), value=-1
        )  # read on the device: no synchronisation, and CUDA graphs see later changes of lr
    else:
        weight.add_(grad, alpha=-float(lr))
    if master is not None:
        param.copy_(master)
        if bits is not None and ties is not None:
            split_master(master, bits, ties)


def _check(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor], dtype: torch.dtype) -> None:
    if len(tensors) != len(params):
        raise ValueError(f"{name} must have one tensor for each of the {len(params)} params, got {len(tensors)}")
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        if name != "grads" and tensor.is_neg():
            raise ValueError(f"{name}[{i}] must not be lazily negated: it is changed in place")
        if has_own_dispatch(tensor):
            raise TypeError(f"{name}[{i}] must be a plain tensor, got a {type(tensor).__name__}")
        if tensor.device != params[0].device:
            raise ValueError(f"{name}[{i}] must be on the device of params[0], {params[0].device}, got {tensor.device}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}[{i}] must be {dtype}, got {tensor.dtype}")
        if tensor.shape != param.shape or memory_order(tensor) != memory_order(param):
            raise ValueError(
                f"{name}[{i}] must have the shape and strides of params[{i}], {tuple(param.shape)} {param.stride()}, "
                f"got {tuple(tensor.shape)} {tensor.stride()}"
            )


def _check_all(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor] | None,
    momentum_buffers: Sequence[Tensor] | None,
    ties: Sequence[Tensor] | None,
) -> None:
    """Raise a TypeError or ValueError for tensors that :func:`sgd_step` does not accept."""
    dtype = params[0].dtype
    if dtype not in _DTYPES:
        raise TypeError(f"params must be float32, float16 or bfloat16, got {dtype}")
    if grads and grads[0].dtype not in _DTYPES:
        raise TypeError(f"grads must be float32, float16 or bfloat16, got {grads[0].dtype}")
    if (masters is None) != (dtype == torch.float32):
        raise TypeError("masters must be given if and only if params are float16 or bfloat16")
    _check("params", params, params, dtype)
    _check("grads", grads, params, grads[0].dtype if grads else dtype)
    if ties is not None:
        if dtype != torch.bfloat16:
            raise TypeError(f"ties must be given for bfloat16 params only, got {dtype}")
        _check("ties", ties, params, torch.int8)
    if masters is not None:
        _check("masters", masters, params, torch.float32 if ties is None else torch.int16)
    if momentum_buffers is not None:
        _check("momentum_buffers", momentum_buffers, params, torch.float32)
    for i, param in enumerate(params):
        if not is_dense(param):
            raise ValueError(
                f"params[{i}] must be dense in memory, got shape {tuple(param.shape)} and strides {param.stride()}"
            )


def _checked_lr(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """The learning rate as a Python number, or as a tensor on ``device``."""
    if not isinstance(lr, Tensor):
        return number("lr", lr)
    if lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(lr.shape)}")
    if has_own_dispatch(lr):
        raise TypeError(f"lr must be a number or a plain tensor, got a {type(lr).__name__}")
    lr = lr.resolve_neg()
    if lr.device.type == "cpu" and device.type != "cpu":
        return float(lr)
    if lr.device != device:
        raise ValueError(f"lr must be on the device of params, {device}, or on the CPU, got {lr.device}")
    return lr


@torch.no_grad()
def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor] | None = None,
    momentum_buffers: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    ties: Sequence[Tensor] | None = None,
) -> None:
    """Update ``params`` in place by one step of SGD, up to :data:`MAX_TENSORS` of them per launch.

    Args:
        params: tensors of any shapes, all of one dtype (float32, float16, bfloat16) and on one device, dense in memory in any
            order of dimensions.
        grads: one gradient for each param, with its shape and strides; all of one of these dtypes.
        masters: float32 weights for half-precision ``params``, with the same shapes and strides, updated in place; ``params``
            become the rounded masters. Where a param differs from its rounded master at the beginning of the step, the param's
            value is used. With ``ties``: int16, the lower halves of bfloat16 ``params``' masters.
        momentum_buffers: float32, with the same shapes and strides, updated in place; None for no momentum.
        lr: a number, or a tensor of one element on the device of ``params``. The kernel reads the tensor, so a CUDA graph uses
            later changes of it. A CPU tensor beside GPU ``params`` is read as a number.
        momentum, dampening, weight_decay, nesterov, maximize: as in :class:`torch.optim.SGD`; NumPy numbers are accepted.
        first_step: the buffers are overwritten with the gradient instead of being read.
        ties: int8, with the same shapes and strides, updated in place. ``masters`` then holds the lower halves of float32
            masters; :func:`split_master` writes both. The results are those of float32 ``masters``, except that a param changed
            between steps keeps its lower half: its master is then within half a unit in the param's last place.

    Raises:
        TypeError: other dtypes; tensors of a class with its own ``__torch_dispatch__``; arguments that are not numbers where
            numbers are expected.
        ValueError: lists of different lengths; device, shape or strides other than those of ``params``; gaps in memory; a
            lazily negated tensor (``Tensor.is_neg``) other than ``grads`` and ``lr``.
    """
    if not params:
        return
    momentum, dampening = number("momentum", momentum), number("dampening", dampening)
    weight_decay = number("weight_decay", weight_decay)
    nesterov, maximize, first_step = bool(nesterov), bool(maximize), bool(first_step)
    if (momentum_buffers is None) != (momentum == 0):
        raise ValueError("momentum_buffers must be given if and only if momentum is not 0")
    _check_all(params, grads, masters, momentum_buffers, ties)
    # A kernel reads memory, in which a lazy negation has not been applied yet.
    grads = [grad.resolve_neg() for grad in grads]
    lr = _checked_lr(lr, params[0].device)
    if not runs_triton(params[0]):
        nothing = [None] * len(params)
        states = (masters or nothing, momentum_buffers or nothing, ties or nothing)
        for each in zip(params, grads, *states, strict=True):
            sgd_step_reference(
                *each,
                lr=lr,
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=nesterov,
                maximize=maximize,
                first_step=first_step,
            )
        return
    in_memory = isinstance(lr, Tensor)
    problem = SGDProblem(
        *(len(params), masters is not None, ties is not None, momentum_buffers is not None, in_memory),
        *(first_step, weight_decay != 0, nesterov, maximize),
    )
    listed = (*params, *grads, *(masters or ()), *(ties or ()), *(momentum_buffers or ()))
    tensors = (*listed, lr) if isinstance(lr, Tensor) else listed
    numbers = step_numbers(0.0 if isinstance(lr, Tensor) else lr, momentum, dampening, weight_decay)
    if is_plain(tensors):
        plans.call(_run_step, tensors, problem, numbers)
    else:
        _run_step(*tensors, problem, *numbers)
    # As PyTorch's in-place operations do: a backward pass that saved a param's old value then raises an error.
    torch.autograd.graph.increment_version(params)
