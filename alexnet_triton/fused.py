"""``FusedSequential``, an ``nn.Sequential`` that runs known layers on fused Triton kernels; ``fuse`` and ``unfuse``."""

from __future__ import annotations

import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

import kernels
from kernels.runtime.backend import can_run_triton, current_backend

from .forwards import forget, fused_forward, owns_layers
from .graphs import LayerTracer, is_traced_for_fusing
from .runs import HOOK_DICTS, LONGEST_LOOK, CellImages, cells_of, plan
from .segments import forget_segments, segments_of

__all__ = ["CellImages", "FusedSequential", "first_layer_cells", "fuse", "unfuse"]


def first_layer_cells(
    net: nn.Module, image_size: int | Sequence[int], *, dtype: torch.dtype, device: torch.device, channels: int = 1
) -> kernels.Cells | None:
    """The cells that ``net`` can read in place of images, which saves the pass that rearranges images into cells; or None.

    :func:`kernels.reads_cells` decides for the current backend and GPU, and for the layers as they are now, with their hooks.
    In a training loop::

        cells = first_layer_cells(net, 224, dtype=torch.bfloat16, device=device)
        inputs = kernels.gather_resize(images, index, 224, dtype=torch.bfloat16, cells=cells)
        logits = net(inputs if cells is None else CellImages(inputs, cells))

    Args:
        net: any module.
        image_size: side of the images, or (rows, columns).
        dtype, device: of the images.
        channels: of the images.

    Returns:
        None if ``net`` needs images: it is no :class:`FusedSequential`, carries a hook (which expects images), does not begin
        with Conv2d + ReLU + MaxPool2d, or its first layer's kernel reads images.
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
    # Only shape, dtype and device are read: one element stands for all images.
    images = torch.empty(1, dtype=dtype, device=device).expand(1, channels, *size)
    readable = channels == conv.in_channels and kernels.reads_cells(images, conv.weight, cells.stride)
    return cells if readable else None


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` whose forward pass runs each known run of layers as one fused operation.

    Its children are the ordinary modules, so everything done with an ``nn.Sequential`` (iterating and calling each layer,
    ``apply``, slicing, replacing a layer, ``state_dict``, hooks, train and eval, pickling, deepcopy) works the same. Layers are
    grouped into runs again whenever a layer, an option or a hook changes. Shapes and dtypes are those of the operations in
    :mod:`kernels`. An error is both the ValueError or TypeError named there and PyTorch's RuntimeError. The output has the
    memory format that the ``nn.Sequential`` would return.

    Layers are called one by one, unfused, where the kernels cannot run (on a CPU), where TorchScript traces them and where FX
    quantization prepares them.

    If the first layers are a Conv2d, a ReLU and a MaxPool2d, the input may also be :class:`CellImages`.
    """

    def forward(self, input: Any) -> Any:
        """The output of the last layer for ``input``, the first layer's input."""
        if _is_as_it_stands(input):
            return super().forward(input)
        try:
            for segment in segments_of(self):
                input = segment(input)
        except Exception:
            forget_segments(self)  # an invalid option may compare equal to its correction
            raise
        return input

    def children(self) -> Iterator[nn.Module]:
        """The layers; if :func:`torch.utils.checkpoint.checkpoint_sequential` asks, modules that run its segments fused."""
        layers = super().children()
        if torch.compiler.is_compiling():  # Dynamo cannot trace sys._getframe
            return layers
        caller = sys._getframe(1)
        return _checkpointed(list(layers), caller) if caller.f_code is checkpoint_sequential.__code__ else layers

    def __getitem__(self, index: slice | int) -> Any:
        """A layer, or for a slice a :class:`FusedSequential` of the same layers under the same keys."""
        if isinstance(index, slice):
            # A slice of a fused subclass has that class, as a slice of the subclass has.
            kind = type(self) if type(self) in _plain_classes else FusedSequential
            return kind(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def __add__(self, other: nn.Sequential) -> FusedSequential:
        """A :class:`FusedSequential` of the layers of both."""
        return FusedSequential(*super().__add__(other))

    def __mul__(self, times: int) -> FusedSequential:
        """A :class:`FusedSequential` of the layers repeated ``times`` times; the same layers, not copies."""
        return FusedSequential(*super().__mul__(times))

    def __rmul__(self, times: int) -> FusedSequential:
        """As :meth:`__mul__`."""
        return self * times

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse :func:`torch.jit.script`, which calls this and cannot compile the forward pass."""
        return _refuse_to_be_scripted(self)


def _is_as_it_stands(input: Any) -> bool:
    """Whether the layers are called one by one, unfused, as an ``nn.Sequential`` calls them."""
    if isinstance(input, Tensor):
        if not can_run_triton(input) and current_backend() != "triton":
            return True
    elif isinstance(input, torch.fx.Proxy):
        tracer = input.tracer
        if isinstance(tracer, LayerTracer) or type(tracer).__module__.startswith("torch.ao."):
            return True  # explain and FX quantization need PyTorch's layers
    if torch.compiler.is_compiling():
        return is_traced_for_fusing()
    return torch._C._get_tracing_state() is not None


def _checkpointed(layers: list[nn.Module], caller: FrameType) -> Iterator[nn.Module]:
    """One module per layer: the first of each segment of ``checkpoint_sequential`` runs that segment, the others do nothing."""
    segments = caller.f_locals["segments"]
    size = len(layers) // segments
    starts = [*range(0, size * (segments - 1), size), size * (segments - 1)] if size else [0]
    for start, end in itertools.zip_longest(starts, starts[1:], fillvalue=len(layers)):
        yield FusedSequential(*layers[start:end])
        yield from itertools.repeat(nn.Identity(), end - start - 1)


# torch.fx copies annotations into its graph, and PyTorch 2.11's cannot pickle a graph with one that is still a string.
FusedSequential.forward.__annotations__.clear()

#: The fused class of each class that was fused, and the class of each fused class.
_fused_classes: dict[type[nn.Module], type[nn.Module]] = {nn.Sequential: FusedSequential}
_plain_classes: dict[type[nn.Module], type[nn.Module]] = {}


class _Unregistered(nn.Module):
    """As first base, keeps a generated class from the ``__init_subclass__`` of its other bases, which may register classes."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Do nothing."""


def _fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``kind`` whose forward pass is fused; :class:`FusedSequential` for ``nn.Sequential``."""
    if kind not in _fused_classes:
        body: dict[str, Any] = {"__reduce_ex__": _reduce_fused, "__module__": kind.__module__, "__doc__": kind.__doc__}
        if kind.forward is nn.Sequential.forward:
            # Methods of the subclass come first; its super() is FusedSequential.
            bases: tuple[type, ...] = (_Unregistered, kind, FusedSequential)
        else:
            bases = (_Unregistered, kind)
            body |= {"forward": fused_forward(kind), "__prepare_scriptable__": _refuse_to_be_scripted}
        fused = _fused_classes[kind] = type(f"Fused{kind.__name__}", bases, body)
        _plain_classes[fused] = kind
    return _fused_classes[kind]


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class from which :func:`fuse` made ``kind``; ``kind`` itself if it is not a fused class."""
    if kind in _plain_classes:
        return _plain_classes[kind]
    # FusedSequential and AlexNet hold nothing but layers. The plain class of any other subclass is unknown.
    return nn.Sequential if issubclass(kind, FusedSequential) and kind.__module__.startswith("alexnet_triton.") else kind


def plain_name(kind: type[nn.Module]) -> str:
    """Name of the class from which :func:`fuse` made ``kind``, or of ``kind`` itself."""
    return (plain_class(kind) if kind in _plain_classes or kind is FusedSequential else kind).__name__


def _refuse_to_be_scripted(module: nn.Module) -> nn.Module:
    raise RuntimeError(
        f"torch.jit.script cannot compile a fused module ({type(module).__name__}): script the module that "
        "alexnet_triton.unfuse(module) gives back, or use torch.export or torch.jit.trace"
    )


def _reduce_fused(module: nn.Module, protocol: Any) -> Any:
    """Pickle and copy by the original class, because the class made by :func:`_fused_class` cannot be imported."""
    fused = type(module)
    kind = _plain_classes[fused]
    reduced = super(fused, module).__reduce_ex__(protocol)
    if not isinstance(reduced, tuple):
        return reduced
    make, arguments, *state = reduced
    return _fused_again, (make, tuple(kind if argument is fused else argument for argument in arguments)), *state


def _fused_again(make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    module = make(*arguments)
    module.__class__ = _fused_class(type(module))
    return module


def _new_fused(kind: type[nn.Sequential]) -> nn.Module:
    """An empty module of the fused class; pickles of version 0.1 refer to this function."""
    fused = _fused_class(kind)
    return fused.__new__(fused)


M = TypeVar("M", bound=nn.Module)


def fuse(module: M, *, report: bool = False) -> M:
    """Change ``module`` in place so that its layers run on the fused operations of :mod:`kernels`, and return ``module``.

    Every ``nn.Sequential`` in it becomes a :class:`FusedSequential`. Every module in it whose own ``forward`` calls its layers
    is compiled by ``torch.compile``, with this package's backend, at its first call. All modules stay the same objects, so
    parameters, ``state_dict`` keys, hooks, optimizers and other references to parts of the network stay valid. Only classes
    change: each changed module gets a subclass of its class. A copy or a pickle of a fused module is fused.

    Args:
        module: any module.
        report: print the result of :func:`alexnet_triton.explain`.

    Returns:
        ``module`` itself. For a fused copy: ``fuse(copy.deepcopy(module))``.
    """
    classes = [(each, _fused_class(type(each))) for each in module.modules() if _can_fuse(each)]
    for each, fused in classes:
        each.__class__ = fused
    if report:
        from .explain import explain

        print(explain(module))
    return module


def unfuse(module: M) -> M:
    """Undo :func:`fuse` in place, and return ``module``: every module in it gets its original class back.

    A :class:`FusedSequential` and an :class:`alexnet_triton.AlexNet` become an ``nn.Sequential``.
    """
    for each in list(module.modules()):
        plain = plain_class(type(each))
        if plain is not type(each):
            each.__class__ = plain
            forget(each)
            forget_segments(each)
    return module


def _can_fuse(module: nn.Module) -> bool:
    kind = type(module)
    if kind in _plain_classes or isinstance(module, (FusedSequential, torch.jit.ScriptModule)) or "forward" in vars(module):
        return False
    return is_container(module) or owns_layers(module)


def is_container(module: nn.Module) -> bool:
    """Whether ``module`` is an ``nn.Sequential`` that calls its layers one after the other."""
    forwards = (nn.Sequential.forward, FusedSequential.forward)
    return isinstance(module, nn.Sequential) and type(module).forward in forwards and "forward" not in vars(module)
