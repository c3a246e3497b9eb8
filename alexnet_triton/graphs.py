"""Run the layers in the graphs that Dynamo records on fused operations: the backend ``"alexnet_triton"`` of ``torch.compile``.

Dynamo records the computation of a function as a graph of calls, under guards that say when the graph is valid. This module
recognises the calls of layers (convolution, ReLU, max-pool, linear layer, dropout, as modules or functions) and replaces
neighbouring ones by a :class:`.segments.Segment`. All other calls in the graph run as they stand.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import UnsupportedOperatorException

from .runs import KNOWN_TENSORS, Run, obstacle_of, takes
from .segments import Segment, cut

# ------------------------------------------------------------------------------------------------- layers of a graph


class Conv2d(NamedTuple):
    """A convolution's options, as :class:`torch.nn.Conv2d` names them, and in a call its parameters."""

    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: Any = 1
    weight: Any = None
    bias: Any = None


class Linear(NamedTuple):
    """A linear layer, and in a call its parameters."""

    weight: Any = None
    bias: Any = None


class ReLU(NamedTuple):
    """A ReLU, in place or not."""

    inplace: bool = False


class MaxPool2d(NamedTuple):
    """A max-pool's options, as :class:`torch.nn.MaxPool2d` names them."""

    kernel_size: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: Any = False
    return_indices: Any = False


class Dropout(NamedTuple):
    """A dropout's options, as :class:`torch.nn.Dropout` names them."""

    p: Any = 0.5
    training: Any = True
    inplace: Any = False


Layer = Conv2d | Linear | ReLU | MaxPool2d | Dropout


class Call(NamedTuple):
    """The call of a layer by a node of a graph.

    Attributes:
        layer: the layer, without its parameters.
        input: the node of the layer's input.
        weights: the nodes of weight and bias, for layers that have them.
    """

    layer: Layer
    input: fx.Node
    weights: tuple[fx.Node | None, ...] = ()


def _conv2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> Call:
    return Call(Conv2d(stride, padding, dilation, groups), input, (weight, bias))


def _linear(input: Any, weight: Any, bias: Any = None) -> Call:
    return Call(Linear(), input, (weight, bias))


def _relu(input: Any, inplace: bool = False) -> Call:
    return Call(ReLU(inplace), input)


def _relu_in_place(input: Any) -> Call:
    return Call(ReLU(inplace=True), input)


def _max_pool2d(input: Any, *window: Any, **options: Any) -> Call:
    return Call(MaxPool2d(*window, **options), input)


def _max_pool2d_with_indices(input: Any, *window: Any, **options: Any) -> Call:
    return Call(MaxPool2d(*window, **options)._replace(return_indices=True), input)


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Call:
    return Call(Dropout(p, training, inplace), input)


def _torch_dropout(input: Any, p: float, train: bool) -> Call:
    return Call(Dropout(p, train), input)


#: Functions of PyTorch and names of tensor methods, each with the function that makes a :class:`Call` of its arguments.
_CALLS: Mapping[Any, Callable[..., Call]] = {
    torch.conv2d: _conv2d,  # F.conv2d is the same object
    F.linear: _linear,
    F.relu: _relu,
    torch.relu: _relu,
    torch.relu_: _relu_in_place,  # F.relu_ is the same object
    Tensor.relu: _relu,
    Tensor.relu_: _relu_in_place,
    "relu": _relu,
    "relu_": _relu_in_place,
    F.max_pool2d: _max_pool2d,
    F.max_pool2d_with_indices: _max_pool2d_with_indices,
    torch.max_pool2d: _max_pool2d,
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
}


def _called_module(node: fx.Node) -> Call | None:
    """The layer's call by ``node``, which calls a module; None if the module may compute something else than its class."""
    assert node.graph.owning_module is not None
    module: Any = node.graph.owning_module.get_submodule(str(node.target))
    input, *others = node.args
    if others or node.kwargs or obstacle_of(module) is not None:
        return None
    if isinstance(module, nn.Conv2d):
        return _conv2d(input, None, None, module.stride, module.padding, module.dilation, module.groups)
    if isinstance(module, nn.Linear):
        return _linear(input, None)
    if isinstance(module, nn.ReLU):
        return _relu(input, module.inplace)
    if isinstance(module, nn.MaxPool2d):
        window = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode, module.return_indices)
        return _max_pool2d(input, *window)
    if isinstance(module, nn.Dropout):
        return _dropout(input, module.p, module.training, module.inplace)
    return None


def _call_of(node: fx.Node) -> Call | None:
    """The layer's call by ``node``; None if ``node`` calls no known layer, or no operation takes its tensors."""
    if node.op == "call_module":
        return _called_module(node)
    make = _CALLS.get(node.target) if node.op in ("call_function", "call_method") else None
    if make is None:
        return None
    try:
        call = make(*node.args, **node.kwargs)
    except TypeError:  # an argument that the layer does not have, such as out=
        return None
    tensors = [call.input, *call.weights]
    if not isinstance(call.input, fx.Node) or not all(t is None or isinstance(t, fx.Node) for t in call.weights):
        return None
    if any(isinstance(option, fx.Node) for value in call.layer for option in _flat(value)):
        return None  # the value of an option is only known when the graph runs
    values = [tensor.meta.get("example_value") for tensor in tensors if tensor is not None]
    if any(value is not None and (type(value) not in KNOWN_TENSORS or not takes(value)) for value in values):
        return None
    if isinstance(call.layer, Dropout) and call.layer.inplace:
        return None
    return call


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for inner in value:
            yield from _flat(inner)
    else:
        yield value


# ------------------------------------------------------------------------------------------------------------- runs


class GraphRun(NamedTuple):
    """A run of layers in a graph.

    Attributes:
        run: the run; its layers have no parameters.
        nodes: the nodes of the layers' calls, in order.
        calls: the calls of ``nodes``.
    """

    run: Run
    nodes: tuple[fx.Node, ...]
    calls: tuple[Call, ...]

    @property
    def input(self) -> fx.Node:
        """The node of the first layer's input."""
        return self.calls[0].input

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers in the module that calls them; for a function the name of its node."""
        return tuple(_path(node) or node.name for node in self.nodes)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Class names of the layers; for a function the function's name."""
        return tuple(
            type(call.layer).__name__ if _path(node) else getattr(node.target, "__name__", str(node.target))
            for node, call in zip(self.nodes, self.calls, strict=True)
        )

    @property
    def weights(self) -> tuple[fx.Node | None, ...]:
        """The nodes of the first layer's weight and bias."""
        return self.calls[0].weights


def _path(node: fx.Node) -> str:
    """Path of the module that ``node`` calls; empty if it calls a function."""
    if node.op == "call_module":
        return str(node.target)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack or not issubclass(stack[-1][1], (nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool2d, nn.Dropout)):
        return ""
    return str(stack[-1][0]).partition("]")[2].lstrip(".")  # after L['self'], as the compiler calls the module itself


def _settle_in_place_relus(graph: fx.Graph) -> None:
    """Make nodes that read a tensor after a ReLU in place read the ReLU's result instead, which is the same tensor."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        call = _call_of(node)
        if call is not None and isinstance(call.layer, ReLU) and call.layer.inplace:
            call.input.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])  # type: ignore[misc]


#: Modules whose functions only compute something, but for those that :func:`_is_barrier` names.
_COMPUTING_MODULES = ("_operator", "operator", "math", "builtins", "torch", "torch._C._nn", "torch.nn.functional")
_IN_PLACE_OPERATORS = {
    *(operator.iadd, operator.isub, operator.imul, operator.imatmul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.iconcat),
    *(operator.setitem, operator.delitem),
}


def _is_barrier(node: fx.Node) -> bool:
    """Whether no call may be moved past ``node``, which may change a tensor or a mode (autocast, gradient mode)."""
    if node.op in ("placeholder", "get_attr", "output", "call_module"):
        return False
    if node.op == "call_method":
        name = str(node.target)
        in_place = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__", "__iter__")
        return in_place or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    name = getattr(node.target, "__name__", "_")
    return (
        getattr(node.target, "__module__", None) not in _COMPUTING_MODULES
        or name.endswith("_")
        or name.startswith(("_", "set_"))
        or name in _WRITE_WHAT_THEY_ARE_GIVEN
        or node.target in _IN_PLACE_OPERATORS
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
        or (name in _TAKE_INPLACE and any(argument is True for argument in node.args))
    )


#: Functions that may change an argument: embeddings renormalise weights, norms update running statistics.
_WRITE_WHAT_THEY_ARE_GIVEN = {"embedding", "embedding_bag", "batch_norm", "instance_norm"}
#: Functions of torch.nn.functional that take ``inplace`` by position.
_TAKE_INPLACE = {
    name for name, function in vars(F).items() if "inplace" in getattr(getattr(function, "__code__", None), "co_varnames", ())
}


class _Order:
    """The positions of a graph's nodes, and its barriers."""

    def __init__(self, graph: fx.Graph) -> None:
        nodes = list(graph.nodes)
        self.place = {node: i for i, node in enumerate(nodes)}
        self.barriers = [node for node in nodes if _is_barrier(node)]

    def are_together(self, nodes: Sequence[fx.Node]) -> bool:
        """Whether all calls of ``nodes`` may be moved to the position of the last one."""
        first, last = self.place[nodes[0]], self.place[nodes[-1]]
        return not any(first < self.place[node] < last and node not in nodes for node in self.barriers)


def runs_of(graph: fx.Graph) -> list[GraphRun]:
    """The runs of layers in a graph, in the graph's order."""
    order, runs = _Order(graph), []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        call = None if node in taken else _call_of(node)
        if call is not None and not isinstance(call.layer, ReLU):
            run = _longest_run(node, call, order)
            taken.update(run.nodes)
            runs.append(run)
    return runs


def _next(node: fx.Node, kind: type, order: _Order, so_far: tuple[fx.Node, ...]) -> tuple[fx.Node, Call] | None:
    """The only reader of ``node``, if it calls a ``kind`` and may be moved together with the nodes ``so_far``."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    call = _call_of(user)
    if call is None or not isinstance(call.layer, kind) or call.input is not node or not order.are_together((*so_far, user)):
        return None
    return user, call


def _longest_run(node: fx.Node, call: Call, order: _Order) -> GraphRun:
    nodes: tuple[fx.Node, ...] = (node,)
    calls: tuple[Call, ...] = (call,)

    def made(operation: str) -> GraphRun:
        return GraphRun(Run(operation, tuple(each.layer for each in calls)), nodes, calls)

    if isinstance(call.layer, MaxPool2d):
        return made("max_pool2d")
    if isinstance(call.layer, Dropout):
        return made("dropout")
    operation = "conv2d" if isinstance(call.layer, Conv2d) else "linear"
    relu = _next(node, ReLU, order, nodes)
    if relu is None:
        return made(operation)
    nodes, calls = (node, relu[0]), (call, relu[1])
    last = _next(relu[0], MaxPool2d if operation == "conv2d" else Dropout, order, nodes)
    if last is None:
        return made(operation)
    layer = last[1].layer
    if isinstance(layer, MaxPool2d) and (layer.return_indices or set(_flat(layer.dilation)) != {1}):
        return made(operation)
    if isinstance(layer, Dropout) and not _is_only_read_by_layers(last[0]):
        return made(operation)  # the fused backward pass needs its output unchanged
    nodes, calls = (*nodes, last[0]), (*calls, last[1])
    return made("conv2d_relu_max_pool2d" if operation == "conv2d" else "linear_relu_dropout")


def _is_only_read_by_layers(node: fx.Node) -> bool:
    """Whether every reader of ``node`` is a layer that returns a new tensor."""
    calls = [_call_of(user) for user in node.users]
    return all(call is not None and isinstance(call.layer, (Conv2d, Linear, MaxPool2d)) for call in calls)


# --------------------------------------------------------------------------------------------------------- rewriting


class GraphSegment(Segment):
    """A segment of a graph's runs, called with the input and with the weights and biases of its layers."""

    def __init__(self, runs: tuple[Run, ...]) -> None:
        super().__init__(runs)
        self.__name__ = self.__qualname__ = "__".join(run.operation for run in runs)

    def __call__(self, input: Any, *weights: Tensor | None) -> Any:
        """The output of the last operation for ``input``."""
        return self.compute(input, list(weights))

    def bound(self, weights: list[Tensor | None]) -> list[Run]:
        """The runs, with ``weights`` put into their layers."""
        given = iter(weights)
        runs = []
        for run in self.runs:
            first, *others = run.layers
            if isinstance(first, (Conv2d, Linear)):
                first = first._replace(weight=next(given), bias=next(given))
            runs.append(run._replace(layers=(first, *others)))
        return runs


def rewrite(module: fx.GraphModule) -> list[list[GraphRun]]:
    """Replace the calls of layers in a graph by segments, in place; return the runs of each segment, in the graph's order."""
    graph = module.graph
    checkpointing: Any = next((n.target for n in graph.nodes if _is_checkpoint(n)), None)
    if checkpointing is not None:
        # A recorded checkpoint would draw another dropout mask in its recomputation, and count a batch twice. This error makes
        # Dynamo stop recording there: Python runs the checkpoint, and the functions that it calls are recorded separately.
        raise UnsupportedOperatorException(checkpointing)
    _settle_in_place_relus(graph)
    segments = _segments(runs_of(graph), _Order(graph))
    replaced: dict[fx.Node, fx.Node] = {}
    for runs in segments:
        last = runs[-1].nodes[-1]
        segment = GraphSegment(tuple(run.run for run in runs))
        tensors = (runs[0].input, *itertools.chain.from_iterable(run.weights for run in runs))
        with graph.inserting_before(last):
            node = graph.call_function(segment, tuple(t if t is None else replaced.get(t, t) for t in tensors))
        node.meta = last.meta.copy()
        last.replace_all_uses_with(node)
        replaced[last] = node
        for old in reversed([node for run in runs for node in run.nodes]):
            graph.erase_node(old)
    if segments:
        graph.lint()
        module.recompile()
    return segments


def _is_checkpoint(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "tag_activation_checkpoint"


def _segments(runs: Sequence[GraphRun], order: _Order) -> list[list[GraphRun]]:
    """Group runs into chains, each run reading the one before, that one segment can run."""
    chains: list[list[GraphRun]] = []
    ending: dict[fx.Node, list[GraphRun]] = {}
    for run in runs:
        before = ending.get(run.input)
        joined = [*before, run] if before is not None else []
        if (
            before is not None
            and len(run.input.users) == 1
            and run.input not in run.weights
            and len(cut([each.run for each in joined])) == 1
            and _dimensions(before[0].input) == _dimensions(run.input)
            and order.are_together([node for each in joined for node in each.nodes])
        ):
            del ending[run.input]
            before.append(run)
            chain = before
        else:
            chain = [run]
            chains.append(chain)
        ending[run.nodes[-1]] = chain
    return chains


def _dimensions(node: fx.Node) -> int | None:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, Tensor) else None


# ------------------------------------------------------------------------------------------- traces without an input


class LayerTracer(fx.Tracer):
    """Records the calls of a module's layers; it traces into the modules that ``looks_into`` accepts."""

    def __init__(self, looks_into: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.looks_into = looks_into
        self.modules: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of ``m`` is recorded as one node."""
        leaf = not self.looks_into(m)
        if leaf:
            self.modules.append(module_qualified_name)
        return leaf


class Trace(NamedTuple):
    """The layers that a module's ``forward`` calls.

    Attributes:
        runs: the runs that operations compute.
        modules: names of all layers called, in order.
    """

    runs: list[GraphRun]
    modules: list[str]


def traced(module: nn.Module, looks_into: Callable[[nn.Module], bool]) -> Trace | str:
    """The trace of ``module``, or the first line of the error if it cannot be traced."""
    shared = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    try:
        copied = copy.deepcopy(module, dict(shared))
        parameters = inspect.signature(copied.forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        tracer = LayerTracer(looks_into)
        graph = tracer.trace(copied, concrete_args=defaults)
        recorded = fx.GraphModule(copied, graph)
    except Exception as error:  # the module's code may raise anything when it is given a proxy
        return f"{type(error).__name__}: {error}".splitlines()[0]
    _settle_in_place_relus(recorded.graph)
    return Trace(runs_of(recorded.graph), tracer.modules)


# ----------------------------------------------------------------------------------------------------------- backend


def backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend ``"alexnet_triton"`` of :func:`torch.compile`: run layers on the fused operations.

    Args:
        module: the graph that Dynamo recorded; it is changed in place.
        example_inputs: example inputs of the graph.
        options: ``{"rest": "inductor"}`` gives the rest of the graph to TorchInductor; ``{"rest": "eager"}``, the default, runs
            it as it stands.

    Raises:
        ValueError: ``options`` has another key or value.
    """
    given = dict(options or {})
    rest = given.pop("rest", "eager")
    if given or rest not in ("eager", "inductor"):
        raise ValueError(f'backend "alexnet_triton" has the option rest, "eager" or "inductor", got {dict(options or {})}')
    rewrite(module)
    if rest == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return cast(Callable[..., Any], compile_fx(module, list(example_inputs)))
    return module.forward


#: Marks a backend that needs PyTorch's own calls in its graphs, also inside fused containers.
backend.wants_layers = True  # type: ignore[attr-defined]


def is_traced_for_fusing() -> bool:
    """Whether Dynamo is recording a graph for a backend that needs PyTorch's own calls (``wants_layers``)."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        compiler: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # torch.export has no such translator
        return False
    while compiler is not None and not hasattr(compiler, "wants_layers"):
        # Unwrap Dynamo's wrappers and functools.partial.
        wrapped = ("_torchdynamo_orig_backend", "compiler_fn", "func")
        compiler = next((getattr(compiler, name) for name in wrapped if hasattr(compiler, name)), None)
    return compiler is not None


# Dynamo calls the function while it records, and takes the result for a constant. torch.compiler.assume_constant_result would
# set the same mark, but it imports the compiler.
is_traced_for_fusing._dynamo_marked_constant = True  # type: ignore[attr-defined]
