"""An ``nn.Sequential`` that runs the layers it knows on fused Triton kernels."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

import kernels

from .runs import HOOK_DICTS, LONGEST_LOOK, CellImages, call, cells_of, plan
from .segments import forget_segments, segments_of

__all__ = ["CellImages", "FusedSequential", "first_layer_cells", "fuse"]


def first_layer_cells(
    net: nn.Module, image_size: int | Sequence[int], *, dtype: torch.dtype, device: torch.device, channels: int = 1
) -> kernels.Cells | None:
    """The cells that ``net`` reads faster than the images they are made of: it would rearrange those itself, first.

    The answer is that of the kernels (:func:`kernels.reads_cells`) for the current backend, the GPU, and the layers as they are
    now, hooks included. In a training loop::

        cells = first_layer_cells(net, 224, dtype=torch.bfloat16, device=device)
        inputs = kernels.gather_resize(images, index, 224, dtype=torch.bfloat16, cells=cells)
        logits = net(inputs if cells is None else CellImages(inputs, cells))

    Args:
        net: any module.
        image_size: side of the images, or (rows, columns).
        dtype, device: of the images.
        channels: of the images.

    Returns:
        None where ``net`` is to be given the images: it is no :class:`FusedSequential`, carries a hook (which expects images),
        begins with something else than Conv2d + ReLU + MaxPool2d, or its first layer's kernel reads images.
    """
    if not isinstance(net, FusedSequential) or type(net).forward is not FusedSequential.forward:
        return None
    if "forward" in vars(net) or any(getattr(net, hooks) for hooks in HOOK_DICTS):
        return None
    runs = plan(list(itertools.islice(net, LONGEST_LOOK)))
    cells = cells_of(runs[0]) if runs else None
    if cells is None:
        return None
    conv = cast(nn.Conv2d, runs[0].layers[0])
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    # Nothing is read but dtype and device: one element for all of an image.
    images = torch.empty(1, dtype=dtype, device=device).expand(1, channels, *size)
    readable = channels == conv.in_channels and kernels.reads_cells(images, conv.weight, cells.stride)
    return cells if readable else None


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` whose forward pass runs known runs of layers as one fused operation each.

    Its children are the ordinary modules, so everything done with an ``nn.Sequential`` (iterating and calling each layer,
    ``apply``, slicing, replacing a layer, ``state_dict``, hooks, train and eval, pickling, deepcopy) means the same. The
    runs are cut anew whenever a layer, an option or a hook changes. Shapes, dtypes and errors are those of the operations in
    :mod:`kernels`.

    Where the first layers are a Conv2d, a ReLU and a MaxPool2d, the input may be :class:`CellImages` as well.
    """

    def forward(self, input: Any) -> Any:
        """The output of the last layer for ``input``, the first layer's input."""
        try:
            for segment in segments_of(self):
                output = segment.run_as_one(input)
                if output is None:
                    link = None
                    for run, following in itertools.zip_longest(segment.runs, segment.runs[1:]):
                        input, link = call(run, input, link, following)
                else:
                    input = output
        except Exception:
            forget_segments(self)  # of an option that is no option an equal one may be made
            raise
        return input

    def __getitem__(self, index: slice | int) -> Any:
        """A layer, or for a slice a :class:`FusedSequential` of the same layers under the same keys."""
        if isinstance(index, slice):
            return FusedSequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def __add__(self, other: nn.Sequential) -> FusedSequential:
        """The layers of both."""
        return FusedSequential(*super().__add__(other))

    def __mul__(self, times: int) -> FusedSequential:
        """The layers ``times`` times over; the same layers, not copies."""
        return FusedSequential(*super().__mul__(times))

    def __rmul__(self, times: int) -> FusedSequential:
        """As :meth:`__mul__`."""
        return self * times


# torch.fx copies annotations into its graph, and PyTorch 2.11's cannot pickle a graph with one that is still a string.
FusedSequential.forward.__annotations__.clear()

_fused_classes: dict[type[nn.Sequential], type[FusedSequential]] = {nn.Sequential: FusedSequential}


def _fused_class(kind: type[nn.Sequential]) -> type[FusedSequential]:
    """:class:`FusedSequential` for an ``nn.Sequential``; for a subclass of it, a class that is both."""
    if kind not in _fused_classes:
        body = {"__reduce_ex__": _reduce_fused, "__module__": kind.__module__, "__doc__": kind.__doc__}
        _fused_classes[kind] = type(f"Fused{kind.__name__}", (FusedSequential, kind), body)
    return _fused_classes[kind]


def _reduce_fused(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle and deepcopy by the class that was fused: the one made by :func:`_fused_class` has no name to import."""
    return _new_fused, (type(module).__mro__[2],), module.__dict__


def _new_fused(kind: type[nn.Sequential]) -> FusedSequential:
    fused = _fused_class(kind)
    return fused.__new__(fused)


def fuse(module: nn.Module, *, report: bool = False) -> nn.Module:
    """The same module tree with every ``nn.Sequential`` in it made a :class:`FusedSequential`.

    Containers on the way to one are new objects; layers, Parameters and buffers are the same objects, state-dict keys are
    unchanged, and ``module`` itself is left as it was. An instance of a subclass of ``nn.Sequential`` becomes an instance of
    both, with the subclass's methods; one with a ``forward`` of its own keeps its class, and the containers inside it are
    fused.

    Args:
        module: any module. Without an ``nn.Sequential`` inside it comes back as it is.
        report: print what :func:`alexnet_triton.explain` says of it.
    """
    if report:
        from .explain import explain

        print(explain(module))
    return _fuse(module, {})


def _is_fusable_container(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Sequential)
        and not isinstance(module, FusedSequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )


def _fuse(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:  # one container used in two places stays one
        return done[id(module)]
    children = {name: None if child is None else _fuse(child, done) for name, child in module._modules.items()}
    changed = any(children[name] is not child for name, child in module._modules.items())
    result = module
    if isinstance(module, nn.Sequential) and _is_fusable_container(module):
        result = _new_fused(type(module))
    elif changed:
        result = type(module).__new__(type(module))
    if result is not module:
        # Its own dictionaries of children, parameters, buffers and hooks: a later change to one tree leaves the other be.
        result.__dict__.update({k: v.copy() if isinstance(v, (dict, set)) else v for k, v in vars(module).items()})
        result.__dict__["_modules"] = children
    done[id(module)] = result
    return result
