"""What ``fuse`` makes of a module, and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .fused import FusedSequential, fuse
from .runs import plan


class ExplainedRun(NamedTuple):
    """Layers that are run together: one line of an :class:`Explanation`.

    Attributes:
        container: qualified name of the module that calls them, ``""`` for the root.
        layers: their names in it, in order.
        kinds: their classes' names.
        operation: name of the operation of ``kernels`` that runs them, or None: each is called as it stands.
        note: why they are called as they stand, or why the run is not longer; empty where there is nothing to say.
    """

    container: str
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    operation: str | None
    note: str


class Explanation(NamedTuple):
    """What :func:`fuse` makes of a module; ``str()`` of it is a table.

    Attributes:
        name: of the module's class.
        runs: all of the module's layers (modules without children), in order.
    """

    name: str
    runs: tuple[ExplainedRun, ...]

    @property
    def fused_layers(self) -> int:
        """How many layers run on the operations of ``kernels``."""
        return sum(len(run.layers) for run in self.runs if run.operation is not None)

    @property
    def layers(self) -> int:
        """How many layers there are."""
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
    """Which runs of layers :func:`fuse` hands to which operation, and why the others are called as they stand.

    Hooks count as they are registered now. What depends on the input (its dtype or device) is not looked at.

    Args:
        module: any module, fused or not; it is left as it is.
    """
    fused = fuse(module)
    if _is_leaf(fused) and not isinstance(fused, nn.Sequential):
        alone = ExplainedRun("", ("",), (type(fused).__name__,), None, "a layer by itself: fuse looks into nn.Sequential only")
        return Explanation(type(module).__name__, (alone,))
    return Explanation(type(module).__name__, tuple(_explain(fused, "")))


def _explain(container: nn.Module, path: str) -> Iterator[ExplainedRun]:
    children = [(name, child) for name, child in container._modules.items() if child is not None]
    if isinstance(container, FusedSequential):
        names = iter(name for name, _ in children)
        runs = [
            (tuple(itertools.islice(names, len(run.layers))), run.layers, run.operation, run.note)
            for run in plan([child for _, child in children])
        ]
    else:
        kind = type(container).__name__
        holds = isinstance(container, (nn.ModuleList, nn.ModuleDict))
        note = f"held in a {kind}" if holds else f"{kind}.forward calls it"
        note += ", not a Sequential that fuse may change"
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


def _neighbouring_leaves(children: list[tuple[str, nn.Module]]) -> Iterator[list[tuple[str, nn.Module]]]:
    """Children without children of their own together with their neighbours, others by themselves."""
    groups = itertools.groupby(children, key=lambda child: _is_leaf(child[1]))
    for are_leaves, group in [(key, list(members)) for key, members in groups]:
        yield from [group] if are_leaves else ([child] for child in group)


def _is_leaf(module: nn.Module) -> bool:
    """Whether it is one layer: without children, or with none but its parametrizations (as weight_norm hangs them on)."""
    return not module._modules or is_parametrized(module)
