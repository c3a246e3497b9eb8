"""Compile the ``forward`` of modules that call their layers themselves, with this package's backend, at the first call.

Dynamo (``torch.compile``'s front end) records the computation of ``forward`` under guards: another branch, shape, option or
layer is recorded anew. Before each call this module checks what those guards do not cover: hooks, methods that were replaced
after the recording, and both of modules that are held in plain lists.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from kernels.runtime.backend import can_run_triton, current_backend

from . import graphs
from .runs import HOOK_DICTS, OWN_METHODS
from .segments import has_function_mode, hooks_everywhere

#: Layers that a run of an operation can begin with.
_LAYERS = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.Dropout)


def owns_layers(module: nn.Module) -> bool:
    """Whether ``module`` has its own ``forward`` and layers that it may call: children, children in lists, or parameters."""
    defined_in = getattr(type(module).forward, "__module__", None) or ""
    if type(module).__module__.startswith("torch.") or defined_in.startswith("torch."):
        return False
    if any(isinstance(child, _LAYERS) for child in _own_children(module)):
        return True
    return any(p is not None and p.dim() in (2, 4) for p in module._parameters.values())


def _own_children(module: nn.Module) -> Iterator[nn.Module]:
    """The children of ``module``, with the members of a ModuleList or ModuleDict in place of it."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _own_children(child)
        else:
            yield child


def fused_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """The ``forward`` of the class that :func:`alexnet_triton.fuse` makes of ``kind``; it compiles ``kind.forward``."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # an outer compilation records its calls
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
    """Whether Python runs ``forward`` uncompiled: the kernels cannot run, or a mode or tracer observes its calls."""
    tensor = args[0] if args and isinstance(args[0], Tensor) else next(module.parameters(), None)
    if tensor is None or (not can_run_triton(tensor) and current_backend() != "triton"):
        return True
    if any(isinstance(argument, np.ndarray) for argument in args):  # the compiler would make tensors of them
        return True
    return (
        torch._C._get_tracing_state() is not None
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or has_function_mode()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or getattr(module, "_is_replica", False)  # DataParallel makes replicas for one call
    )


class _Compiled:
    """A module's compiled ``forward``, with the facts about the modules in it that the compiler does not guard.

    Args:
        module: the module.
        plain: the ``forward`` of its class.
    """

    def __init__(self, module: nn.Module, plain: Callable[..., Any]) -> None:
        self.module, self.plain, self.name = module, plain, type(module).__name__.removeprefix("Fused")
        self.modules = list(_all_modules(module))
        kinds = list(dict.fromkeys(itertools.chain.from_iterable(type(each).__mro__ for each in self.modules)))
        self.kinds = [kind for kind in kinds if "forward" in vars(kind)]
        self.own_kinds = [
            (vars(kind), [name for name, value in vars(kind).items() if isinstance(value, _METHODS)])
            for kind in kinds
            if not kind.__module__.startswith(("torch.", "builtins"))
        ]
        self.facts, self.methods, self.everywhere = self._facts(), self._methods(), hooks_everywhere()
        #: Compiled forwards by mode: the compiler checks its recordings one by one, so each mode has a list of its own.
        self.forwards: dict[Any, Callable[..., Any]] = {}
        self.runs: list[graphs.GraphRun] = []
        self.records = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as None: a copy of the module compiles its own forward."""
        return _nothing, ()

    def _facts(self) -> list[Any]:
        """Children, hooks and replaced methods of each module."""
        facts: list[Any] = []
        for module in self.modules:
            attributes = module.__dict__
            facts += attributes["_modules"].values()
            for hooks in HOOK_DICTS:
                facts.append(hooks)
                if attributes[hooks]:
                    facts += attributes[hooks].values()
            if not OWN_METHODS.isdisjoint(attributes):
                facts += [attributes.get(name) for name in OWN_METHODS]
        return facts

    def _methods(self) -> list[Any]:
        """Methods of the modules' classes: all methods of users' classes, and those by which PyTorch's layers compute."""
        methods: list[Any] = [getattr(kind, name, None) for kind in self.kinds for name in ("forward", "_conv_forward")]
        for attributes, names in self.own_kinds:
            methods.append(len(attributes))
            methods += map(attributes.get, names)
        return methods

    def holds(self, module: nn.Module, plain: Callable[..., Any]) -> bool:
        """Whether the module, its parts, their hooks and methods are those that were compiled."""
        return (
            self.module is module
            and self.plain is plain
            and self._facts() == self.facts
            and self._methods() == self.methods
            and hooks_everywhere() == self.everywhere
        )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), module.training)
        forward = self.forwards.get(key)
        if forward is None:
            forward = self.forwards[key] = self._compile()
        self.records = False
        return forward(module, *args, **kwargs)

    def _compile(self) -> Callable[..., Any]:
        """The forward compiled as by ``torch.compile``, with our own settings that hold only while Dynamo records."""
        context: Any = torch._dynamo.optimize(backend=self._backend)
        context.callback = _Recording(context.callback, self.name)
        return cast(Callable[..., Any], context(_copy(self.plain)))

    def _backend(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if not self.records:
            self.runs, self.records = [], True
        self.runs += itertools.chain.from_iterable(graphs.rewrite(graph))
        return graph.forward

    _backend.wants_layers = True  # type: ignore[attr-defined]


def _all_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in ``module``, and unregistered ones that these hold in lists, dicts and attributes."""
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        values = [value for name, value in vars(each).items() if name not in _OWN_DICTS]
        for value in [*each._modules.values(), *values]:
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            waiting += [part for part in parts if isinstance(part, nn.Module)]


#: Types of a class's methods.
_METHODS = (types.FunctionType, staticmethod, classmethod, property)
#: A module's attributes that are not searched for unregistered modules.
_OWN_DICTS = {"_parameters", "_buffers", "_modules", "_compiled_forward", "_known_layers", *HOOK_DICTS}


class _Recording:
    """Dynamo's callback that records a frame, called if no recording of the frame holds; here it runs under our settings.

    An integer attribute that a module changes does not cause a new recording. Python runs the parts that Dynamo cannot record,
    so an error in ``forward`` stays the original one. (Settings around each call of a compiled forward would take longer than
    the call.)

    Args:
        record: Dynamo's callback.
        name: name of the module's class.
    """

    def __init__(self, record: Callable[..., Any], name: str) -> None:
        self._torchdynamo_orig_backend = record  # Dynamo compares this to find the recordings of a backend
        self.name = name

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        around, _recording.name = _recording.name, self.name
        try:
            with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, suppress_errors=True, recompile_limit=64):
                return self._torchdynamo_orig_backend(*arguments, **options)
        finally:
            _recording.name = around

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torchdynamo_orig_backend, name)


class _Named(threading.local):
    """Name of the class of the module whose ``forward`` is being recorded in this thread."""

    name: str | None = None


_recording = _Named()


def _shorten(record: logging.LogRecord) -> bool:
    """Shorten Dynamo's warning of a hundred lines on a forward that it cannot record to one line. An error is still raised."""
    if _recording.name is None or record.levelno < logging.WARNING:
        return True
    if not record.name.endswith("convert_frame"):
        return False
    reasons = re.findall(r"^\S*(?:Error|Exception|Unsupported)\b.*", record.getMessage(), re.MULTILINE)
    reason = reasons[-1] if reasons else record.getMessage().splitlines()[0]
    record.msg, record.args = "alexnet_triton: a part of %s.forward runs as it stands (%s)", (_recording.name, reason)
    record.exc_info = None
    return True


for _logger in ("torch._dynamo.convert_frame", "torch._dynamo.exc", "torch._subclasses.fake_tensor"):
    logging.getLogger(_logger).addFilter(_shorten)


def _nothing() -> None:
    return None


def recorded_runs(module: nn.Module) -> list[graphs.GraphRun]:
    """The runs of the last call of ``module`` in which Dynamo recorded a graph; an empty list if there was none."""
    known: _Compiled | None = module.__dict__.get("_compiled_forward")
    return known.runs if known is not None else []


def forget(module: nn.Module) -> None:
    """Drop the compiled forward of ``module``."""
    module.__dict__.pop("_compiled_forward", None)


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its own code object: Dynamo keeps recordings by code object, so these are this module's alone."""
    if not isinstance(function, types.FunctionType):
        return lambda *args, **kwargs: function(*args, **kwargs)
    code = function.__code__.replace()
    copied = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
