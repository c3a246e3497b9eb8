"""Call consecutive runs of layers as one sequence, and check in microseconds that the layers have not changed since."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

from kernels import reads_cells, sequence
from kernels.convolution.autograd import Conv2dFunction, prepare_conv2d
from kernels.convolution.relu_max_pool2d import Conv2dReLUMaxPool2dFunction, prepare_conv2d_relu_max_pool2d
from kernels.dropouts import DropoutFunction, prepare_dropout
from kernels.matrix_product import LinearFunction, prepare_linear
from kernels.pooling.autograd import MaxPool2dFunction, prepare_max_pool2d
from kernels.runtime.arguments import check_probability
from kernels.runtime.backend import runs_triton
from kernels.runtime.torch_interop import is_observed

from .runs import (
    GLOBAL_HOOK_DICTS,
    HOOK_DICTS,
    IMAGES,
    OWN_METHODS,
    TAKE_LINKS,
    CellImages,
    Run,
    call,
    check_cells,
    computed_by,
    conv_arguments,
    plan,
    returned_format,
    takes,
)


class Segment:
    """Neighbouring runs whose operations may be called as one sequence (:mod:`kernels.sequence`).

    The output has the memory format that PyTorch would return. Images between its operations are channels-last.

    Args:
        runs: all of operations on images, or all of operations on rows of features; or one run of a module.
    """

    def __init__(self, runs: tuple[Run, ...]) -> None:
        self.runs = runs
        self.weighted = [run.layers[0] for run in runs if _has_weight(run)]
        self.writes_images = runs[-1].operation in IMAGES
        self.dimensions = None if _returns_indices(runs[0]) else _DIMENSIONS.get(runs[0].operation)
        self._as_one: dict[tuple[bool, Any], _AsOne | None] = {}

    def __call__(self, input: Any) -> Any:
        """The output of the last layer for ``input``."""
        if self.runs[0].operation == "module":
            if isinstance(input, CellImages):
                check_cells(self.runs[0], input.cells)
            return self.runs[0].layers[0](input)
        if takes(input):
            return self.compute(input, self._weights())
        for layer in itertools.chain.from_iterable(run.layers for run in self.runs):
            input = layer(input)
        return input

    def _weights(self) -> list[Tensor | None]:
        """Weight and bias of each convolution and linear layer."""
        try:
            return [layer._parameters[name] for layer in self.weighted for name in ("weight", "bias")]
        except KeyError:  # an attribute that is computed, as by a parametrization
            return [getattr(layer, name) for layer in self.weighted for name in ("weight", "bias")]

    def compute(self, input: Any, weights: list[Tensor | None]) -> Any:
        """The output of the last operation for ``input``, with these weights and biases."""
        output_format = self.runs[-1].output_format
        if self.writes_images and output_format is None:
            output_format = returned_format(input, weights[::2])
        output = self._compute_as_one(input, weights, output_format)
        if output is not None:
            return output
        if isinstance(input, Tensor) and input.dim() == 3 and self.runs[-1].operation.endswith("max_pool2d"):
            output_format = torch.contiguous_format  # PyTorch's format for an image without a batch
        link = None
        for run, following in itertools.zip_longest(self.bound(weights), self.runs[1:]):
            input, link = call(run, input, link, following, output_format if following is None else None)
        return input

    def bound(self, weights: list[Tensor | None]) -> Sequence[Run]:
        """The runs, whose layers hold ``weights`` already. A subclass puts them into the layers."""
        return self.runs

    def _stages(self, cells: bool, output_format: torch.memory_format | None) -> _AsOne | None:
        """The runs as one sequence; None if they cannot be one."""
        stages: list[sequence.Stage] = []
        tensors, seeds = 1, itertools.count(1 + 2 * len(self.weighted))
        for run, following in itertools.zip_longest(self.runs, self.runs[1:]):
            own = (tensors, tensors + 1) if _has_weight(run) else ()
            tensors += len(own)
            links = following is not None and following.operation in TAKE_LINKS
            given = _Given(own, seeds, links, cells and not stages, output_format if following is None else None)
            stages += _STAGES[run.operation](run, given)
        if not stages:
            return None
        count = next(seeds) - 1 - 2 * len(self.weighted)
        try:
            recorded, unrecorded = (sequence.Hashed(sequence.Sequenced(tuple(stages), records)) for records in (True, False))
        except TypeError:  # an option cannot be hashed; the operation itself checks whether it is valid
            return None
        return _AsOne(recorded, unrecorded, count)

    def _compute_as_one(
        self, input: Any, weights: list[Tensor | None], output_format: torch.memory_format | None
    ) -> Tensor | None:
        """The output of all runs by one call; None if they have to be called one after the other."""
        if self.dimensions is None or torch.compiler.is_compiling() or has_function_mode() or is_observed():
            return None
        cells = type(input) is CellImages
        if cells:
            check_cells(self.runs[0], input.cells)
        x = input.data if cells else input
        if not isinstance(x, Tensor) or x.dim() != self.dimensions or not runs_triton(x):
            return None
        if torch.is_autocast_enabled(x.device.type):  # autocast casts for each operation
            return None
        if (cells, output_format) not in self._as_one:
            self._as_one[cells, output_format] = self._stages(cells, output_format)
        as_one = self._as_one[cells, output_format]
        if as_one is None or (cells and not _reads_cells(x, weights[0], self.runs[0])):
            return None
        return sequence.run(as_one.recorded, as_one.unrecorded, [x, *weights], as_one.seeds)


def has_function_mode() -> bool:
    """Whether a ``TorchFunctionMode`` is active, other than the one of ``torch.device`` as a context."""
    return any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(torch._C._len_torch_function_stack())
    )


def _reads_cells(cells: Tensor, weight: Tensor | None, run: Run) -> bool:
    conv = run.layers[0]
    return isinstance(weight, Tensor) and reads_cells(cells, weight, conv.stride, conv.dilation, conv.groups)


class _AsOne(NamedTuple):
    """A segment as one sequence: recorded for a backward pass, unrecorded, and the number of seeds that it takes."""

    recorded: sequence.Hashed
    unrecorded: sequence.Hashed
    seeds: int


#: Number of dimensions of an operation's input: 4 for images, 2 for rows of features.
_DIMENSIONS = {"conv2d": 4, "conv2d_relu_max_pool2d": 4, "max_pool2d": 4, "linear": 2, "linear_relu_dropout": 2, "dropout": 2}


def _has_weight(run: Run) -> bool:
    return run.operation in ("conv2d", "conv2d_relu_max_pool2d", "linear", "linear_relu_dropout")


def _returns_indices(run: Run) -> bool:
    return run.operation == "max_pool2d" and run.layers[0].return_indices


class _Given(NamedTuple):
    """The context of a run within a sequence.

    Attributes:
        own: indices of the run's parameters among the sequence's tensors.
        seeds: iterator over the indices of seeds that are not yet used.
        links: whether the next operation takes a link.
        cells: whether the run's input is cells.
        output_format: of the sequence's output if the run is its last, else None.
    """

    own: tuple[int, ...]
    seeds: Iterator[int]
    links: bool
    cells: bool
    output_format: torch.memory_format | None


#: Type of the functions that make the stages of a run.
_Stages = Callable[[Run, _Given], list[sequence.Stage]]


def _option(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _conv2d(run: Run, given: _Given) -> list[sequence.Stage]:
    _, _, *geometry = conv_arguments(run.layers[0])
    makes_link = given.links and len(run.layers) == 2
    channels_last = given.output_format != torch.contiguous_format
    options = (*map(_option, geometry), len(run.layers) == 2, makes_link, channels_last)
    return [sequence.Stage(Conv2dFunction, prepare_conv2d, options, given.own, makes_link)]


def _conv2d_relu_max_pool2d(run: Run, given: _Given) -> list[sequence.Stage]:
    conv, _, pool = run.layers
    _, _, stride, padding, dilation, groups = map(_option, conv_arguments(conv))
    window = (_option(pool.kernel_size), _option(pool.stride), _option(pool.padding), pool.ceil_mode)
    channels_last = given.output_format != torch.contiguous_format
    options = (stride, 0 if given.cells else padding, dilation, groups, *window, channels_last, given.cells)
    return [sequence.Stage(Conv2dReLUMaxPool2dFunction, prepare_conv2d_relu_max_pool2d, options, given.own)]


def _max_pool2d(run: Run, given: _Given) -> list[sequence.Stage]:
    pool = run.layers[0]
    options = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    return [sequence.Stage(MaxPool2dFunction, prepare_max_pool2d, (*map(_option, options), given.output_format), ())]


def _linear(run: Run, given: _Given) -> list[sequence.Stage]:
    p = _probability(run.layers[2]) if len(run.layers) == 3 else None
    options = (p or 0.0, len(run.layers) > 1)
    return [sequence.Stage(LinearFunction, prepare_linear, options, (*given.own, None if p is None else next(given.seeds)))]


def _dropout(run: Run, given: _Given) -> list[sequence.Stage]:
    p = _probability(run.layers[0])
    return [] if p is None else [sequence.Stage(DropoutFunction, prepare_dropout, p, (next(given.seeds),))]


def _probability(dropout: Any) -> float | None:
    """The probability of dropping an element; None if the layer drops none, and so needs no seed."""
    check_probability(dropout.p)
    return float(dropout.p) if dropout.training and dropout.p > 0 else None


_STAGES: dict[str, _Stages] = {
    "conv2d": _conv2d,
    "conv2d_relu_max_pool2d": _conv2d_relu_max_pool2d,
    "max_pool2d": _max_pool2d,
    "linear": _linear,
    "linear_relu_dropout": _linear,
    "dropout": _dropout,
}


class _Layers:
    """A container's children, their state when they were cut into segments, and these segments.

    Args:
        children: the container's children.
    """

    def __init__(self, children: tuple[nn.Module, ...]) -> None:
        self.children = children
        self.types = [type(child) for child in children]
        self.hooks = [getattr(child, hooks) for child in children for hooks in HOOK_DICTS]
        self.hooked, self.global_hooks, self.computed_by = _truths(self.hooks), hooks_everywhere(), computed_by()
        self.weights = [(child._parameters, name) for child in children for name in child._parameters]
        self.weight_types = self._weight_types()
        self.facts = []
        for child in children:
            attributes, parameters = child.__dict__, child._parameters
            get = operator.itemgetter(*HOOK_DICTS, *_OPTIONS.get(type(child), ()))
            # A list may be changed in place.
            values = tuple([list(value) if isinstance(value, list) else value for value in get(attributes)])
            own = not OWN_METHODS.isdisjoint(attributes)
            self.facts.append((attributes, own, attributes.get("inplace"), parameters, get, values))
        self.segments = [Segment(tuple(runs)) for runs in cut(plan(children))]

    def _weight_types(self) -> list[type]:
        return [type(parameters.get(name)) for parameters, name in self.weights]

    def hold(self, children: tuple[nn.Module, ...]) -> bool:
        """Whether ``children`` are the same modules, of the same classes, with the same options and hooks."""
        if children != self.children or [type(child) for child in children] != self.types:
            return False
        for attributes, own, inplace, parameters, get, values in self.facts:
            if (
                get(attributes) != values
                or attributes.get("inplace") is not inplace  # decides whether a dropout before the layer is fused
                or attributes["_parameters"] is not parameters
                or ("forward" in attributes or "_conv_forward" in attributes or "_call_impl" in attributes) is not own
            ):
                return False
        return (
            _truths(self.hooks) == self.hooked
            and hooks_everywhere() == self.global_hooks
            and self._weight_types() == self.weight_types
            and computed_by() == self.computed_by
        )


class _Known(list[_Layers]):
    """The two most recent segmentations of a container, typically those of training and of evaluation."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as an empty list: a copy of the container cuts its own children."""
        return list, ()


def _truths(values: Sequence[Any]) -> list[bool]:
    return list(map(bool, values))


def hooks_everywhere() -> list[Any]:
    """The global hooks, which PyTorch calls for every module."""
    return [hook for hooks in GLOBAL_HOOK_DICTS for hook in (hooks, *(getattr(torch_module, hooks, None) or {}).values())]


#: Attributes of each kind of layer that decide how runs are cut, or that operations are given.
_OPTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.Dropout: ("p", "training"),
}


def cut(runs: Sequence[Run]) -> list[list[Run]]:
    """Group neighbouring runs: operations on images together, those on rows of features together, any other run alone."""
    groups: list[list[Run]] = []
    before = None
    for run in runs:
        kind = None if _returns_indices(run) else _DIMENSIONS.get(run.operation)
        if kind is not None and kind == before:
            groups[-1].append(run)
        else:
            groups.append([run])
        before = kind
    return groups


def forget_segments(net: nn.Module) -> None:
    """Forget the segments of ``net``, so that its next call cuts the layers anew."""
    net.__dict__.pop("_known_layers", None)


def segments_of(net: nn.Sequential) -> list[Segment]:
    """The segments of ``net``: those of an earlier call if its layers have not changed since, else new ones."""
    children = tuple(net._modules.values())
    if torch.compiler.is_compiling():
        return [Segment(tuple(runs)) for runs in cut(plan(children))]
    known: list[_Layers] | None = net.__dict__.get("_known_layers")
    if known is None:
        known = net.__dict__["_known_layers"] = _Known()
    for layers in known:
        if layers.hold(children):
            return layers.segments
    new = _Layers(children)
    known[:] = [new, *known[:1]]
    return new.segments
