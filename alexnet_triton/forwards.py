"""Modules whose own ``forward`` calls their layers: it is compiled, by this package's backend, when it is first called.

Dynamo (``torch.compile``'s front end) records what ``forward`` computes and guards it: another branch, shape, option or layer
is recorded anew. What its guards do not look at is looked at here, before each call: hooks, methods that were replaced after
the recording, and both of modules that are held in plain lists.
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
    if any(isinstance(argument, np.ndarray) for argument in args):  # which the compiler would take for tensors
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
        #: By what the compiler is not to tell apart in one list of guards, which it goes through one by one.
        self.forwards: dict[Any, Callable[..., Any]] = {}
        self.runs: list[graphs.GraphRun] = []
        self.records = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle of the module compiles its own."""
        return _nothing, ()

    def _facts(self) -> list[Any]:
        """Of each module: its children, its hooks, and what was set on itself in place of methods."""
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
        """What the modules' classes are made of: all methods of somebody's own, of PyTorch's those that layers compute by."""
        methods: list[Any] = [getattr(kind, name, None) for kind in self.kinds for name in ("forward", "_conv_forward")]
        for attributes, names in self.own_kinds:
            methods.append(len(attributes))
            methods += map(attributes.get, names)
        return methods

    def holds(self, module: nn.Module, plain: Callable[..., Any]) -> bool:
        """Whether all is as it was."""
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
        """What ``torch.compile`` makes of the forward, with settings of our own for its recordings alone."""
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
    """The modules in ``module``, and those that they hold without having registered them: in lists, dicts and attributes."""
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


#: Of a class.
_METHODS = (types.FunctionType, staticmethod, classmethod, property)
#: A module's attributes that hold something else than modules of its own.
_OWN_DICTS = {"_parameters", "_buffers", "_modules", "_compiled_forward", "_known_layers", *HOOK_DICTS}


class _Recording:
    """The compiler's function that records a frame, which its evaluator of frames calls where nothing recorded holds.

    A number that a module counts is no reason to record anew. What the compiler cannot record Python runs: so an error in
    forward is the one that it always was. (Settings around each call of a compiled forward would take longer than the call.)

    Args:
        record: the compiler's.
        name: of the module's class.
    """

    def __init__(self, record: Callable[..., Any], name: str) -> None:
        self._torchdynamo_orig_backend = record  # by which the evaluator knows whose recordings are whose
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
    """The class of the module whose forward is being recorded in this thread."""

    name: str | None = None


_recording = _Named()


def _shorten(record: logging.LogRecord) -> bool:
    """Let a line say what the compiler, which cannot record a forward, says on a hundred; the error itself comes afterwards."""
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
    """The runs of the last call of ``module`` in which the compiler recorded something; none if there was none."""
    known: _Compiled | None = module.__dict__.get("_compiled_forward")
    return known.runs if known is not None else []


def forget(module: nn.Module) -> None:
    """Drop what was compiled for ``module``."""
    module.__dict__.pop("_compiled_forward", None)


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own, by which the compiler keeps what it recorded: of this module alone."""
    if not isinstance(function, types.FunctionType):
        return lambda *args, **kwargs: function(*args, **kwargs)
    code = function.__code__.replace()
    copied = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
