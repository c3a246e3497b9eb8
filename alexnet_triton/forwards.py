"""Modules whose own ``forward`` calls their layers: it is compiled, by this package's backend, when it is first called.

Dynamo (``torch.compile``'s front end) records what ``forward`` computes and guards it: another branch, shape, option or layer
is recorded anew. What its guards do not look at is looked at here: hooks, and methods that were replaced after the recording.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from kernels.runtime.backend import can_run_triton, current_backend

from . import graphs
from .runs import GLOBAL_HOOK_DICTS, HOOK_DICTS, OWN_METHODS
from .segments import has_function_mode

#: Layers that operations are for.
_LAYERS = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.Dropout)


def owns_layers(module: nn.Module) -> bool:
    """Whether ``module`` has a ``forward`` of its own that may call layers: its children, those in lists, or parameters."""
    defined_in = getattr(type(module).forward, "__module__", None) or ""
    if type(module).__module__.startswith("torch.") or defined_in.startswith("torch."):
        return False
    if any(isinstance(child, _LAYERS) for child in _own_children(module)):
        return True
    return any(p is not None and p.dim() in (2, 4) for p in module._parameters.values())


def _own_children(module: nn.Module) -> Iterator[nn.Module]:
    """The children, those of lists and dicts among them in their place."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _own_children(child)
        else:
            yield child


def fused_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """What takes the place of ``kind.forward`` in the class that :func:`alexnet_triton.fuse` makes of ``kind``."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # its calls are recorded
            return kind.forward(self, *args, **kwargs)
        return _run(self, kind, args, kwargs)

    return forward


def _run(module: nn.Module, kind: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plain: Callable[..., Any] = kind.forward
    if _is_as_it_stands(module, args):
        return plain(module, *args, **kwargs)
    known: _Compiled | None = module.__dict__.get("_compiled_forward")
    if known is None or not known.holds(module, plain):
        known = module.__dict__["_compiled_forward"] = _Compiled(module, plain)
    return known(module, args, kwargs)


def _is_as_it_stands(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether ``forward`` is to run as Python runs it: where kernels cannot, and where somebody watches what it calls."""
    tensor = args[0] if args and isinstance(args[0], Tensor) else next(module.parameters(), None)
    if tensor is None or (not can_run_triton(tensor) and current_backend() != "triton"):
        return True
    return (
        torch._C._get_tracing_state() is not None
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or has_function_mode()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or getattr(module, "_is_replica", False)  # of DataParallel, made for one call
    )


class _Compiled:
    """A module's forward, compiled, and what of the modules in it the compiler does not guard.

    Args:
        module: it belongs to.
        plain: its class's forward.
    """

    def __init__(self, module: nn.Module, plain: Callable[..., Any]) -> None:
        self.module, self.plain = module, plain
        self.modules = list(module.modules())
        self.facts, self.methods, self.everywhere = self._facts(), self._methods(), _hooks_everywhere()
        #: By what the compiler is not to tell apart in one list of guards, which it goes through one by one.
        self.forwards: dict[Any, Callable[..., Any]] = {}
        self.recorded = True
        self.runs: list[graphs.GraphRun] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle of the module compiles its own."""
        return _nothing, ()

    def _facts(self) -> list[Any]:
        """Of each module: its children, its hooks, and whether methods were set on itself."""
        facts: list[Any] = []
        for module in self.modules:
            attributes = module.__dict__
            facts += attributes["_modules"].values()
            for hooks in HOOK_DICTS:
                if attributes[hooks]:
                    facts += attributes[hooks].values()
            if not OWN_METHODS.isdisjoint(attributes):
                facts += [attributes.get(name) for name in OWN_METHODS]
        return facts

    def _methods(self) -> list[Any]:
        """Of each class of module: its forward and what that may be made of."""
        kinds = dict.fromkeys(map(type, self.modules))
        return [getattr(kind, name, None) for kind in kinds for name in ("forward", "_conv_forward")]

    def holds(self, module: nn.Module, plain: Callable[..., Any]) -> bool:
        """Whether all is as it was."""
        return (
            self.module is module
            and self.plain is plain
            and self._facts() == self.facts
            and self._methods() == self.methods
            and _hooks_everywhere() == self.everywhere
        )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), module.training)
        forward = self.forwards.get(key)
        if forward is None:
            forward = self.forwards[key] = torch.compile(_copy(self.plain), backend=self._backend)
        if not self.recorded:
            try:
                return forward(module, *args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException:
                pass  # of a recording, not of what was recorded before
        # Right after a recording there may be another: of a size that changes, of a number that the module counts. What the
        # compiler cannot record it prints, and Python runs it: so an error in forward is the one that it always was.
        self.recorded = False
        self.runs = []
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, suppress_errors=True, recompile_limit=64):
            return forward(module, *args, **kwargs)

    def _backend(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.recorded = True
        self.runs += itertools.chain.from_iterable(graphs.rewrite(graph))
        return graph.forward

    _backend.wants_layers = True  # type: ignore[attr-defined]


def _nothing() -> None:
    return None


def recorded_runs(module: nn.Module) -> list[graphs.GraphRun]:
    """The runs of the last forward pass of ``module`` that the compiler recorded; none if there was none."""
    known: _Compiled | None = module.__dict__.get("_compiled_forward")
    return known.runs if known is not None else []


def _hooks_everywhere() -> list[bool]:
    return [bool(getattr(torch_module, hooks, None)) for hooks in GLOBAL_HOOK_DICTS]


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own, by which the compiler keeps what it recorded: of this module alone."""
    if not isinstance(function, types.FunctionType):
        return lambda *args, **kwargs: function(*args, **kwargs)
    code = function.__code__.replace()
    copied = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
