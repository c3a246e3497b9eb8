"""What PyTorch asks of operations of our own: autocast, ``__torch_function__``, and differentiation.

The autograd Functions share a registration with their operator. Of their gradients' derivatives: :mod:`.derivatives`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad
from torch.library import CustomOpDef  # type: ignore[attr-defined]
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function

from . import plans
from .derivatives import is_dual


class Operator:
    """An operation below autograd: for PyTorch's dispatcher a registered operator, for plain calls a function.

    Args:
        registered: takes the tensors, and then the problem as a flat list; a result that was not asked for is an empty tensor.
        run: takes the tensors, and then the problem; a result that was not asked for may be None or a vector of no elements.
            Where launches go to a GPU its calls are planned (:mod:`kernels.runtime.plans`).
    """

    def __init__(self, registered: CustomOpDef, run: Callable[..., Any]) -> None:
        self.registered, self.run = registered, run

    def __call__(self, tensors: tuple[Tensor | None, ...], problem: Any) -> Any:
        """Run it, from inside an autograd Function; through PyTorch's dispatcher unless there is nothing for it to do."""
        return call_planned(self.run, tensors, problem, self._dispatch)

    def _dispatch(self, *arguments: Any) -> Any:
        *tensors, problem = arguments
        return self.registered(*tensors, *problem.flat())

    def register_autograd(self, function: type[OperatorFunction], problem_of: Callable[..., Any], tensors: int) -> None:
        """Give the registered operator the gradient of ``function``.

        Eager and compiled code go through the Function and never need it. A graph of operators does, when it is differentiated
        later: what ``torch.export`` wrote can be trained. In forward mode an operator is an error: PyTorch would leave out the
        tangents.

        Args:
            problem_of: makes the problem of a flat list.
            tensors: how many the operator takes before.
        """

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.arguments = len(inputs)
            flat = [tuple(value) if isinstance(value, list) else value for value in inputs[tensors:]]
            function.setup_context(ctx, (*inputs[:tensors], problem_of(*flat)), output)

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            results = function.backward(ctx, *grads)[:tensors]
            return (*results, *[None] * (ctx.arguments - tensors))

        registered = self.registered
        registered.register_autograd(backward, setup_context=setup_context)
        differentiated = make_autograd_impl(registered._opoverload, registered)

        def autograd(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
            if forward_ad._current_level >= 0 and any(map(is_dual, inputs[:tensors])):
                raise NotImplementedError(
                    f"{registered._qualname} has no forward-mode derivative (jvp): differentiate the network that the graph "
                    'was made of, or make the graph under kernels.use_backend("torch")'
                )
            return differentiated(keyset, *inputs)

        with warnings.catch_warnings():  # PyTorch 2.11 warns whoever imports this package that the operator had another one
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            registered._lib.impl(registered._name, autograd, "Autograd", with_keyset=True, allow_override=True)


def call_planned(
    run: Callable[..., Any], tensors: tuple[Tensor | None, ...], problem: Any, otherwise: Callable[..., Any]
) -> Any:
    """``run(*tensors, problem)`` by its plan, or ``otherwise`` with the same arguments where the tensors are not plain ones."""
    if torch.compiler.is_compiling():
        return otherwise(*tensors, problem)
    if plans.is_recording():
        return run(*tensors, problem)
    if not is_observed():
        found = plans.find(run, tensors, problem)
        if found is not None:
            plan, inputs, addresses = found
            return plan.run(inputs, addresses)
        if is_plain(tensors):
            return plans.call(run, tensors, problem)
    return otherwise(*tensors, problem)


class OperatorFunction(torch.autograd.Function):
    """An autograd Function over one :class:`Operator`: its tensors and then its problem, and its outputs.

    Being in the form with ``setup_context``, it works under ``torch.func``; where ``vmap`` meets an operator, PyTorch calls the
    operator once for each entry. An application in this form takes Python much longer than one in the older
    form, though, so plain calls have a Function of that form, made of the same parts.
    """

    generate_vmap_rule = True
    #: Whether its last tensor is the link of the operation before, and whether its second output is a link for the next.
    takes_link: ClassVar[bool] = False
    gives_link: ClassVar[bool] = False
    #: Which of three outputs are for the backward pass alone.
    internal: ClassVar[tuple[int, ...]] = ()
    operator: ClassVar[Operator]
    apply_plain: ClassVar[Callable[..., Any]]


def over(operator: Operator) -> Callable[[type[OperatorFunction]], type[OperatorFunction]]:
    """Give an :class:`OperatorFunction` its operator, and with that the form for plain calls."""

    def complete(cls: type[OperatorFunction]) -> type[OperatorFunction]:
        def forward_and_save(ctx: Any, *inputs: Any) -> Any:
            *tensors, (problem, found) = inputs
            if found is None:
                output = plans.call(operator.run, tensors, problem)
            else:
                plan, given, addresses = found
                output = plan.run(given, addresses)
            setup_context(ctx, (*tensors, problem), output)
            # What is only saved need not become an output of the node.
            return without_internal((*output, None)) if cls.internal else output

        setup_context = cls.setup_context
        without_internal = itemgetter(*[-1 if i in cls.internal else i for i in range(3)])
        parts = {"forward": staticmethod(forward_and_save), "backward": staticmethod(cls.backward)}
        plain = type(cls.__name__, (torch.autograd.Function,), parts | {"__module__": cls.__module__, "__doc__": cls.__doc__})
        # What Function.apply itself ends in, with all arguments given in their order.
        cls.apply_plain = super(torch.autograd.Function, plain).apply  # type: ignore[misc]
        cls.operator = operator
        return cls

    return complete


def apply_function(function: type[OperatorFunction], tensors: tuple[Tensor | None, ...], problem: Any) -> Any:
    """``function.apply(*tensors, problem)``; without autograd where no gradient can be asked for."""
    if torch.compiler.is_compiling() or is_observed():
        return function.apply(*tensors, problem)
    found = plans.find(function.operator.run, tensors, problem)
    if found is None and not is_plain(tensors):
        return function.apply(*tensors, problem)
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return function.apply_plain(*tensors, (problem, found))
    if found is None:
        return plans.call(function.operator.run, tensors, problem)
    plan, inputs, addresses = found
    return plan.run(inputs, addresses)


def is_observed() -> bool:
    """Whether somebody wants to see operators: a dispatch mode, a transform, forward-mode AD, a tracer, a profiler."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0  # a dual tensor has no dispatch key of its own
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call on ``tensors`` is one of plain tensors in plain code: nothing for PyTorch's dispatcher to do.

    The way through the dispatcher takes more of the host than a launch does. Whatever a dispatch key stands for, of a tensor
    (lazy negation, a batch of vmap, a subclass) or of the thread (modes, transforms), belongs to the dispatcher.
    """
    if torch.compiler.is_compiling() or torch._C._dispatch_tls_local_include_set().raw_repr() & ~_THREAD_KEYS:
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter:
            return False
        if torch._C._dispatch_keys(tensor).raw_repr() & ~_tensor_keys(tensor.device):
            return False
    return True


#: The dispatch keys that a thread which does nothing special includes.
_THREAD_KEYS: int = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect) | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
).raw_repr()


@functools.cache
def _tensor_keys(device: torch.device) -> int:
    """The dispatch keys of a dense tensor of memory of its own."""
    with torch.inference_mode(False):
        return int(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether an operation on ``tensors`` may be asked for a gradient later."""
    if not torch.is_grad_enabled():
        return False
    # Inside vmap a tensor does not say that an outer torch.func.grad watches it.
    return any(t is not None and t.requires_grad for t in tensors) or torch._C._are_functorch_transforms_active()


def autocast_inputs(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors as autocast hands them to a convolution or linear layer.

    Inside an enabled autocast region of the input's device, floating-point tensors (but float64, as in PyTorch) become its
    dtype; elsewhere they come back as they are.
    """
    if not isinstance(input, Tensor):
        return input, weight, bias
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast, and asking it raises
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        castable = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if castable else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)


P = ParamSpec("P")
R = TypeVar("R")


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """Let arguments that define ``__torch_function__``, and active modes, take over a call of ``function``.

    So a ``torch.fx`` trace records one call of the operation instead of failing in its argument checks, and tensor subclasses
    and modes see it as they see ``F.conv2d``.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
            return handle_torch_function(wrapper, (*args, *kwargs.values()), *args, **kwargs)
        return function(*args, **kwargs)

    return wrapper
