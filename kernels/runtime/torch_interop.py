"""PyTorch's protocols for custom operations: autocast, ``__torch_function__``, differentiation, dispatch.

An autograd Function also provides the registered gradient of its operator. Second derivatives are in :mod:`.derivatives`.
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
    """An operation below autograd: a registered operator for PyTorch's dispatcher, a Python function for plain calls.

    Args:
        registered: takes the tensors, then the fields of the problem as a flat list. An unwanted result is an empty tensor.
        run: takes the tensors, then the problem. An unwanted result may be None or an empty vector. Calls that launch on a GPU
            are planned (:mod:`kernels.runtime.plans`).
    """

    def __init__(self, registered: CustomOpDef, run: Callable[..., Any]) -> None:
        self.registered, self.run = registered, run

    def __call__(self, tensors: tuple[Tensor | None, ...], problem: Any) -> Any:
        """Run the operation from inside an autograd Function, through PyTorch's dispatcher unless the call is plain."""
        return call_planned(self.run, tensors, problem, self._dispatch)

    def _dispatch(self, *arguments: Any) -> Any:
        *tensors, problem = arguments
        return self.registered(*tensors, *problem.flat())

    def register_autograd(self, function: type[OperatorFunction], problem_of: Callable[..., Any], tensors: int) -> None:
        """Register the gradient of ``function`` for the operator.

        Eager and compiled code call the Function and do not use this gradient. A graph of operators uses it when it is
        differentiated later, so that a graph from ``torch.export`` can be trained. In forward mode the operator raises an
        error, because PyTorch would silently drop the tangents.

        Args:
            function: the operator's autograd Function.
            problem_of: makes the problem from the operator's arguments after the tensors.
            tensors: number of the operator's tensor arguments, which come first.
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
                    'was made from, or make the graph under kernels.use_backend("torch")'
                )
            return differentiated(keyset, *inputs)

        with warnings.catch_warnings():  # PyTorch 2.11 warns at import that this replaces the operator's Autograd kernel
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            registered._lib.impl(registered._name, autograd, "Autograd", with_keyset=True, allow_override=True)


def call_planned(
    run: Callable[..., Any], tensors: tuple[Tensor | None, ...], problem: Any, otherwise: Callable[..., Any]
) -> Any:
    """``run(*tensors, problem)`` through its plan, or ``otherwise(*tensors, problem)`` if the call is not plain."""
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
    """An autograd Function over one :class:`Operator`; its inputs are the operator's tensors, then the problem.

    Having a ``setup_context``, it works under ``torch.func``; under ``vmap`` PyTorch calls the operator once for each entry.
    Applying a Function of this form takes much more host time than the older form without ``setup_context``. Plain calls
    therefore use a second Function in the older form, made of the same methods.
    """

    generate_vmap_rule = True
    #: Whether the last tensor is the previous operation's link, and whether the second output is a link for the next operation.
    takes_link: ClassVar[bool] = False
    gives_link: ClassVar[bool] = False
    #: Indices of those of three outputs that are used by the backward pass alone.
    internal: ClassVar[tuple[int, ...]] = ()
    operator: ClassVar[Operator]
    apply_plain: ClassVar[Callable[..., Any]]


def over(operator: Operator) -> Callable[[type[OperatorFunction]], type[OperatorFunction]]:
    """Class decorator that gives an :class:`OperatorFunction` its operator and its second form for plain calls."""

    def complete(cls: type[OperatorFunction]) -> type[OperatorFunction]:
        def forward_and_save(ctx: Any, *inputs: Any) -> Any:
            *tensors, (problem, found) = inputs
            if found is None:
                output = plans.call(operator.run, tensors, problem)
            else:
                plan, given, addresses = found
                output = plan.run(given, addresses)
            setup_context(ctx, (*tensors, problem), output)
            # Tensors that are only saved need not become outputs of the autograd node.
            return without_internal((*output, None)) if cls.internal else output

        setup_context = cls.setup_context
        without_internal = itemgetter(*[-1 if i in cls.internal else i for i in range(3)])
        parts = {"forward": staticmethod(forward_and_save), "backward": staticmethod(cls.backward)}
        plain = type(cls.__name__, (torch.autograd.Function,), parts | {"__module__": cls.__module__, "__doc__": cls.__doc__})
        # The C function that Function.apply calls in the end; it takes positional arguments only.
        cls.apply_plain = super(torch.autograd.Function, plain).apply  # type: ignore[misc]
        cls.operator = operator
        return cls

    return complete


def apply_function(function: type[OperatorFunction], tensors: tuple[Tensor | None, ...], problem: Any) -> Any:
    """``function.apply(*tensors, problem)``; a plain call without gradients skips autograd."""
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
    """Whether operators must go through PyTorch: a dispatch mode, transform, forward-mode AD, tracer or profiler is active."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0  # a dual tensor has no dispatch key of its own
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call on ``tensors`` is plain, so that it may skip PyTorch's dispatcher.

    The dispatcher takes more host time than a launch. It is needed for everything that has a dispatch key, of a tensor (lazy
    negation, a batch of vmap, a subclass) or of the thread (modes, transforms).
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


#: The dispatch keys that a thread includes without any mode or transform.
_THREAD_KEYS: int = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect) | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
).raw_repr()


@functools.cache
def _tensor_keys(device: torch.device) -> int:
    """The dispatch keys of an ordinary dense tensor on ``device``."""
    with torch.inference_mode(False):
        return int(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient of an operation on ``tensors`` may be computed later."""
    if not torch.is_grad_enabled():
        return False
    # Inside vmap, a tensor that an outer torch.func.grad differentiates does not have requires_grad set.
    return any(t is not None and t.requires_grad for t in tensors) or torch._C._are_functorch_transforms_active()


def autocast_inputs(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors, cast as autocast casts them for a convolution or linear layer.

    If autocast is enabled for the input's device, floating-point tensors other than float64 (as in PyTorch) are cast to
    autocast's dtype. Otherwise the tensors are returned unchanged.
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
    """Decorate ``function`` so that arguments with ``__torch_function__`` and active modes can override its calls.

    A ``torch.fx`` trace then records one call of the operation instead of failing in its argument checks. Tensor subclasses and
    modes can handle the operation as they handle ``F.conv2d``.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
            return handle_torch_function(wrapper, (*args, *kwargs.values()), *args, **kwargs)
        return function(*args, **kwargs)

    return wrapper
