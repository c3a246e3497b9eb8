"""``explain``: which operation each layer of a module runs on after ``fuse``, or why it runs on none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .forwards import owns_layers, recorded_runs
from .fused import is_container, plain_name
from .graphs import GraphRun, Trace, traced
from .runs import LONE_RELU, obstacle_of, plan


class ExplainedRun(NamedTuple):
    """Layers that run together: one line of an :class:`Explanation`.

    Attributes:
        container: qualified name of the module that calls them, ``""`` for the root.
        layers: names of the layers in ``container``, in order; a function that ``forward`` calls has the name of its call.
        kinds: class names of the layers; for a function the function's name.
        operation: name of the operation of ``kernels`` that runs the layers, or None if each is called as it stands.
        note: why the layers are called as they stand, or why the run is not longer; may be empty.
    """

    container: str
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    operation: str | None
    note: str


class Explanation(NamedTuple):
    """The runs of layers that :func:`fuse` makes of a module. ``str()`` returns a table.

    Attributes:
        name: name of the module's class.
        runs: all of the module's layers (modules without children, and functions that are layers), in order.
    """

    name: str
    runs: tuple[ExplainedRun, ...]

    @property
    def fused_layers(self) -> int:
        """Number of layers that run on the operations of ``kernels``."""
        return sum(len(run.layers) for run in self.runs if run.operation is not None)

    @property
    def layers(self) -> int:
        """Number of layers in total."""
        return sum(len(run.layers) for run in self.runs)

    def __str__(self) -> str:
        calls = sum(run.operation is not None for run in self.runs)
        rows = []
        for run in self.runs:
            ends = run.layers[:1] if len(run.layers) == 1 else (run.layers[0], run.layers[-1])
            path = f"{run.container}." if run.container else ""
            rows.append((path + " - ".join(ends), ", ".join(run.kinds), run.operation or "as it stands", run.note))
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = [f"{self.name}: {self.fused_layers} of {self.layers} layers in {calls} calls of kernels"]
        for *cells, note in rows:
            lines.append("  ".join(["", *(f"{c:<{width}}" for c, width in zip(cells, widths, strict=True)), note]).rstrip())
        return "\n".join(lines)


def explain(module: nn.Module) -> Explanation:
    """Explain which operation each run of layers is given to by :func:`fuse`, or why its layers are called as they stand.

    Hooks count as they are registered now. The dtype and device of an input are not considered. A ``forward`` that calls its
    layers is traced by ``torch.fx``, on a copy that shares the parameters, with its arguments' defaults. If tracing fails, as
    where ``forward`` reads values of its input, the result shows the last recorded call of a fused module.

    Args:
        module: any module, fused or not; it is not changed.
    """
    name = plain_name(type(module))
    if _is_leaf(module) and not isinstance(module, nn.Sequential) and not owns_layers(module):
        alone = ExplainedRun("", ("",), (name,), None, "a single layer: fuse changes the modules that call layers")
        return Explanation(name, (alone,))
    return Explanation(name, tuple(_explain(module, "")))


def _explain(container: nn.Module, path: str) -> Iterator[ExplainedRun]:
    why = ""
    if owns_layers(container) and not is_container(container):
        trace = traced(container, lambda child: not _is_leaf(child) or owns_layers(child))
        if isinstance(trace, Trace) or recorded_runs(container):
            yield from _explain_forward(container, path, trace)
            return
        why = f" ({trace}: call the module once)"
    children = [(name, child) for name, child in container._modules.items() if child is not None]
    if is_container(container):
        names = iter(name for name, _ in children)
        runs = [
            (tuple(itertools.islice(names, len(run.layers))), run.layers, run.operation, run.note)
            for run in plan([child for _, child in children])
        ]
    else:
        kind = type(container).__name__
        holds = isinstance(container, (nn.ModuleList, nn.ModuleDict))
        note = f"held in a {kind}" if holds else f"{plain_name(type(container))}.forward calls it, as it stands"
        note = f"{plain_name(type(container))}.forward cannot be traced{why}" if why else note
        runs = [
            (tuple(name for name, _ in group), tuple(child for _, child in group), "module", note)
            for group in _neighbouring_leaves(children)
        ]
    for names_of_run, layers, operation, note in runs:
        if not _is_leaf(layers[0]):
            yield from _explain(layers[0], f"{path}.{names_of_run[0]}" if path else names_of_run[0])
        elif not isinstance(layers[0], nn.Sequential):
            kinds = tuple(type(layer).__name__ for layer in layers)
            yield ExplainedRun(path, names_of_run, kinds, None if operation == "module" else operation, note)


def _explain_forward(module: nn.Module, path: str, trace: Trace | str) -> Iterator[ExplainedRun]:
    """Explain a module whose own ``forward`` calls its layers and those of the modules in it."""
    leaves = {name: child for name, child in module.named_modules() if name and _is_leaf(child)}
    why = "" if isinstance(trace, Trace) else "not called"
    runs: Sequence[GraphRun] = trace.runs if isinstance(trace, Trace) else recorded_runs(module)
    called: dict[str, None] = dict.fromkeys(trace.modules) if isinstance(trace, Trace) else {}
    fused = {name: run for run in runs for name in run.names}
    shown: set[int] = set()
    for name in dict.fromkeys([*called, *(name for run in runs for name in run.names), *leaves]):
        run = fused.get(name)
        if run is None:
            kind = type(leaves[name]).__name__
            yield ExplainedRun(path, (name,), (kind,), None, why or _reason(leaves[name], name in called))
        elif id(run) not in shown:
            shown.add(id(run))
            yield ExplainedRun(path, run.names, run.kinds, run.run.operation, "")


def _reason(layer: nn.Module, called: bool) -> str:
    """Why a layer in a module with its own ``forward`` is not in a run; ``called``: whether ``forward`` calls it."""
    if not called:
        return "not called"
    if isinstance(layer, nn.ReLU):
        return obstacle_of(layer) or LONE_RELU
    return obstacle_of(layer) or f"no operation for {type(layer).__name__}"


def _neighbouring_leaves(children: list[tuple[str, nn.Module]]) -> Iterator[list[tuple[str, nn.Module]]]:
    """Group neighbouring children that are single layers; every other child is a group of its own."""
    groups = itertools.groupby(children, key=lambda child: _is_leaf(child[1]))
    for are_leaves, group in [(key, list(members)) for key, members in groups]:
        yield from [group] if are_leaves else ([child] for child in group)


def _is_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is one layer: it has no children but parametrizations, such as that of weight_norm."""
    return not module._modules or is_parametrized(module)
