"""Every configuration that the choosers return for AlexNet: recorded on its real layers, replayed on small ones.

Each layer's forward and backward passes run at their real size for a GPU that need not be present. Nothing is computed: each
call of a chooser (:func:`_choosers`) is recorded with its answer, and so is each launch. :func:`replay` gives the same answers,
in the same order, to a layer small enough for the interpreter. New kernels and choosers need no change here.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn

import kernels
from alexnet_triton import AlexNet
from alexnet_triton.runs import Run, call, plan
from kernels.configs import tables
from kernels.runtime import launch
from kernels.sgd import sgd_step

#: Compute capability -> the GPU whose table of measured configurations is used, or "" for none.
GPUS = {80: "", 90: "h100-80gb-hbm3", 100: ""}
BATCHES = (1, 2, 7, 128)
#: (dtype, precision of float32 products): PyTorch has a switch for the precision, and each precision has tiles of its own.
DTYPES = ((torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"))


def modules() -> list[Any]:
    """Every module of the package ``kernels``."""
    return [importlib.import_module(m.name) for m in pkgutil.walk_packages(kernels.__path__, "kernels.")]


def kernel_names() -> set[str]:
    """Every ``_..._kernel`` in the package."""
    return {name for module in modules() for name in vars(module) if name.endswith("_kernel")}


@contextlib.contextmanager
def pretend_gpu(capability: int, *, interpreted: bool) -> Iterator[None]:
    """In the block, choose kernels for a GPU of ``capability``, tiles for it or (``interpreted``) for the interpreter."""
    with contextlib.ExitStack() as stack:
        for module in modules():
            if "capability" in vars(module):
                stack.enter_context(mock.patch.object(module, "capability", return_value=capability))
        for module in modules():
            if isinstance(vars(module).get("INTERPRETED"), bool):  # in kernels the name is a constexpr
                stack.enter_context(mock.patch.object(module, "INTERPRETED", interpreted))
        stack.enter_context(mock.patch.object(tables, "_table_name", return_value=GPUS[capability]))
        yield


@contextlib.contextmanager
def precision_of_float32(precision: str) -> Iterator[None]:
    """Set the precision of float32 convolutions and matrix products to ``"tf32"`` or ``"ieee"`` inside the block."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.fp32_precision
    cudnn.allow_tf32, matmul.fp32_precision = precision == "tf32", precision
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.fp32_precision = before


def _choosers() -> dict[str, Callable[..., Any]]:
    """The public functions that choose configurations for launches, by name, from every module of ``kernels``."""
    found: dict[str, Callable[..., Any]] = {"split_count": tables.split_count}
    for module in modules():
        all_of_it = module.__name__.endswith("rules")
        for name, function in vars(module).items():
            is_rule = name.endswith(("_config", "_split")) or all_of_it
            if is_rule and not name.startswith("_") and inspect.isroutine(function) and function.__module__ == module.__name__:
                found[name] = function
    return found


@contextlib.contextmanager
def _choosers_through(wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace each chooser by ``wrap(name, function)`` in every module of ``kernels`` that has imported it."""
    choosers = _choosers()
    with contextlib.ExitStack() as stack:
        for module in modules():
            for name, value in list(vars(module).items()):
                if name in choosers and value is choosers[name]:
                    stack.enter_context(mock.patch.object(module, name, wrap(name, value)))
        yield


@dataclasses.dataclass(frozen=True)
class Choice:
    """One call of a chooser: the function's name and its answer (a dict as sorted pairs)."""

    function: str
    answer: Any

    @property
    def tiles(self) -> dict[str, int]:
        """The answer's values by name; empty for an answer that is a single value."""
        return dict(self.answer) if isinstance(self.answer, tuple) else {}


@dataclasses.dataclass(frozen=True)
class Part:
    """What a layer asks and launches in one phase of a training step at AlexNet's own size, for one GPU.

    Attributes:
        layer: ``conv1`` to ``fc3``, ``input`` or ``optimizer``.
        run: operation and modules of the layer; None for ``input`` and ``optimizer``.
        capability: the GPU's compute capability, 90 for an H100.
        dtype, precision: dtype of the tensors; precision of float32 products, ``"ieee"`` or ``"tf32"``.
        batch: number of images.
        phase: ``forward``, ``inference`` (without a gradient), or the gradients that the backward pass computes: ``input``,
            ``weight`` or ``both``.
        choices: the calls of choosers, in order.
        keys: what a test of this part covers: each kernel with its tiles and switches, each answer of a chooser.
    """

    layer: str
    run: Run | None
    capability: int
    dtype: torch.dtype
    precision: str
    batch: int
    phase: str
    choices: tuple[Choice, ...]
    keys: frozenset[tuple[Any, ...]]

    @property
    def id(self) -> str:
        dtype = "tf32" if self.precision == "tf32" else str(self.dtype).removeprefix("torch.")
        return f"{self.layer}-{self.phase}-sm_{self.capability}-{dtype}-N{self.batch}"

    @property
    def kernels(self) -> set[str]:
        return {key[0] for key in self.keys if key[0].endswith("_kernel")}


#: Options of the compiler: they change nothing in the interpreter, nor in the semantics of the IR.
_OPTIONS = ("num_warps", "num_stages")
#: What a layer's launches compute for the layer before: only in a chain of linked layers
#: (tests/kernels/convolution/test_linked_conv2d.py).
_OF_THE_NEIGHBOURS = ("RELU_GRAD", "HAS_VECTORS", "BLOCK_COLUMNS", "BLOCK_COLUMN_PARTS")
Launches = list[tuple[str, dict[str, Any]]]


def _as_pairs(answer: Any) -> Any:
    return tuple(sorted(answer.items())) if isinstance(answer, dict) else answer


def compiled_constants(kernel: Any, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a launch's kernel, and the arguments that are compiled into the kernel."""
    annotations = kernel.fn.__annotations__
    constants = {n: v for n, v in arguments.items() if "constexpr" in str(annotations.get(n))}
    return kernel.fn.__name__, {n: v for n, v in constants.items() if n not in _OF_THE_NEIGHBOURS}


class Recorder:
    """Records, inside its ``with`` block, each call of a chooser and each launch; kernels do not run."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []
        self.launches: Launches = []
        self._stack = contextlib.ExitStack()
        self._answering = False

    def take(self) -> tuple[list[Choice], Launches]:
        """The choices and launches recorded since the last call."""
        taken = self.choices, self.launches
        self.choices, self.launches = [], []
        return taken

    def __enter__(self) -> Recorder:
        self._stack.enter_context(launch.record_launches(self._note))
        self._stack.enter_context(_choosers_through(self._wrap))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _note(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        self.launches.append(compiled_constants(kernel, arguments))

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **kwargs: Any) -> Any:
            if self._answering:  # called by another chooser, whose answer is recorded
                return function(*args, **kwargs)
            self._answering = True
            try:
                answer = function(*args, **kwargs)
            finally:
                self._answering = False
            self.choices.append(Choice(name, _as_pairs(answer)))
            return answer

        return asked


#: Tiles that follow from a size, so that no chooser returns them.
FOLLOWING = {
    *(("_space_to_depth_kernel", "BLOCK"), ("_unfold_filter_kernel", "BLOCK"), ("_unfold_filter_kernel", "BLOCK_PARTS")),
    *(("_conv2d_rows_kernel", "POSITIONS"), ("_sum_stream_k_kernel", "COLUMNS")),
    *(("_linear_narrow_fprop_kernel", "BLOCK_N"), ("_linear_narrow_backward_kernel", "BLOCK_N")),
}


def keys_of(choices: Sequence[Choice], launches: Launches, dtype: torch.dtype) -> frozenset[tuple[Any, ...]]:
    """The keys that tell compiled kernels and choosers' answers apart: tiles and switches, not the layer's size."""
    tiles = {name for choice in choices for name in choice.tiles} - set(_OPTIONS)
    keys: set[tuple[Any, ...]] = set()
    for kernel, constants in launches:
        chosen = {n for n in tiles if (kernel, n) not in FOLLOWING}
        told_apart = {n: v for n, v in constants.items() if n in chosen or isinstance(v, bool)}
        keys.add((kernel, dtype, *sorted(told_apart.items())))
    for choice in choices:
        # SPLIT is a number of programs. Where it is compiled into a kernel, the launch's key has it.
        values = tuple((n, v) for n, v in choice.answer if n not in (*_OPTIONS, "SPLIT", "PROGRAMS")) if choice.tiles else ()
        keys |= {(choice.function, dtype, *values)} if values else set()
    return frozenset(keys)


def _network(dtype: torch.dtype) -> nn.Sequential:
    with torch.device("meta"):
        net = AlexNet()
    return net.to_empty(device="cpu").to(dtype=dtype, memory_format=torch.channels_last)


def _layers(net: nn.Sequential) -> Iterator[tuple[str, Run]]:
    """The runs that launch kernels, with their names."""
    counts = {"conv": 0, "fc": 0}
    for run in plan(list(net)):
        kind = "conv" if run.operation.startswith("conv2d") else "fc"
        if run.operation == "module":
            yield "module", run
            continue
        counts[kind] += 1
        yield f"{kind}{counts[kind]}", run


#: Phase -> which gradients the backward pass computes, as indices into (input, weight, bias).
ASKED = {"input": (0,), "weight": (1, 2), "both": (0, 1, 2)}


def _walk(net: nn.Sequential, capability: int, dtype: torch.dtype, precision: str, batch: int) -> Iterator[Part]:
    x = torch.empty(batch, 1, 224, 224, dtype=dtype, device="cpu")
    with Recorder() as recorder:
        for layer, run in _layers(net):
            if layer == "module":
                x, _ = call(run, x)
                continue

            def part(phase: str, layer: str = layer, run: Run = run) -> Part:
                choices, launches = recorder.take()
                keys = keys_of(choices, launches, dtype)
                return Part(layer, run, capability, dtype, precision, batch, phase, tuple(choices), keys)

            leaves = (x, run.layers[0].weight, run.layers[0].bias)
            with torch.no_grad():
                call(Run(run.operation, tuple(_evaluating(m) for m in run.layers), output_format=run.output_format), x)
            yield part("inference")
            for phase, asked in ASKED.items():
                for i, leaf in enumerate(leaves):
                    leaf.requires_grad_(i in asked)
                y, _ = call(run, x)
                if phase == "both":
                    yield part("forward")
                recorder.take()
                torch.autograd.grad(y, [leaves[i] for i in asked], torch.empty_like(y))
                yield part(phase)
            x = y.detach()


def _evaluating(module: nn.Module) -> nn.Module:
    return copy.copy(module).eval()


def _walk_the_rest(net: nn.Sequential, capability: int, dtype: torch.dtype, batch: int) -> Iterator[Part]:
    params = [p.detach() for p in net.parameters()]
    floats = [torch.empty_like(p, dtype=torch.float32) for p in params]
    masters, ties = None if dtype == torch.float32 else floats, None
    if dtype == torch.bfloat16:
        masters, ties = ([torch.empty_like(p, dtype=kind) for p in params] for kind in (torch.int16, torch.int8))
    images, index = torch.empty(60000, 28, 28, dtype=torch.uint8, device="cpu"), torch.zeros(batch, dtype=torch.int64)
    steps = {
        "optimizer": lambda: sgd_step(params, params, masters, floats, lr=0.01, momentum=0.9, weight_decay=5e-4, ties=ties),
        "input": lambda: kernels.gather_resize(images, index, 224, dtype=dtype),
    }
    with Recorder() as recorder:
        for name, step in steps.items():
            step()
            choices, launches = recorder.take()
            keys = keys_of(choices, launches, dtype)
            yield Part(name, None, capability, dtype, "ieee", batch, "forward", tuple(choices), keys)


_networks = functools.cache(_network)


def step_keys(capability: int, dtype: torch.dtype, precision: str, batch: int) -> frozenset[tuple[Any, ...]]:
    """The keys of a whole training step as :class:`FusedSequential` runs it."""
    net = _networks(dtype).requires_grad_()
    with pretend_gpu(capability, interpreted=False), precision_of_float32(precision), Recorder() as recorder:
        net(torch.empty(batch, 1, 224, 224, dtype=dtype, device="cpu")).sum().backward()
    net.zero_grad()
    return keys_of(*recorder.take(), dtype)


@functools.cache
def all_parts() -> tuple[Part, ...]:
    """Every layer, phase, GPU, dtype and batch: about 1300 parts, in a few seconds."""
    found: list[Part] = []
    for capability, (dtype, precision), batch in itertools.product(GPUS, DTYPES, BATCHES):
        with pretend_gpu(capability, interpreted=False), precision_of_float32(precision):
            found += _walk(_networks(dtype), capability, dtype, precision, batch)
            if batch == BATCHES[-1] and precision == "ieee":
                found += _walk_the_rest(_networks(dtype), capability, dtype, batch)
    return tuple(found)


def distinct_parts() -> list[Part]:
    """A few of :func:`all_parts` that together have all the keys of a training step, the smallest phases first.

    The phase ``both`` is taken only for keys that neither gradient has alone, since a layer for one gradient is smaller.
    ``inference`` is taken only for kernels and choosers that training does not use; its others write fewer outputs.
    """
    training = [p for p in all_parts() if p.phase != "inference"]
    left = frozenset().union(*(p.keys for p in training))
    known = {key[0] for key in left}
    left |= {key for p in all_parts() for key in p.keys if key[0] not in known}
    chosen = []
    for phases in (("forward", "input", "weight"), ("both",), ("inference",)):
        candidates = [p for p in all_parts() if p.phase in phases]
        while left & frozenset().union(*(p.keys for p in candidates)):
            best = max(candidates, key=lambda p: len(left & p.keys))
            chosen.append(best)
            left -= best.keys
    return chosen


#: The most parts into which :func:`replay` splits a reduction over the pixels of a small layer.
PARTS = 5


@contextlib.contextmanager
def replay(part: Part) -> Iterator[None]:
    """Let the choosers return, in order, the answers recorded for ``part``.

    A reduction over pixels is split into at most :data:`PARTS` parts, since a small layer has few pixels: the number of
    parts is an argument of the launch, not part of the kernel's code. As in the chooser, no more parts than blocks.

    Raises:
        AssertionError: the block asks other choosers than ``part`` did, or fewer.
    """
    expected = iter(part.choices)

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            choice = next(expected, None)
            wanted = None if choice is None else choice.function
            assert wanted == name, f"{part.id}: the small layer calls {name}, where AlexNet's layer called {wanted}"
            assert choice is not None
            if name == "split_count":
                return max(1, min(choice.answer, args[1], PARTS))
            if not choice.tiles:
                return choice.answer
            tiles = choice.tiles
            for parts in {"SPLIT", "PROGRAMS"} & set(tiles) if name.endswith("wgrad_config") else ():
                tiles[parts] = min(tiles[parts], PARTS)
            return tiles

        return answer

    with _choosers_through(wrap):
        yield
    left = [choice.function for choice in expected]
    assert not left, f"{part.id}: AlexNet's layer also called {left}"
