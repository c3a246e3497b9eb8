"""Group the layers of an ``nn.Sequential`` into runs that one operation computes, and call that operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module

import kernels
from kernels.runtime.arguments import pair
from kernels.runtime.torch_interop import overridable

#: Attributes of a module that hold the hooks on its forward and backward pass.
HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOK_DICTS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


#: Methods that change what a layer computes if they are set on the layer itself.
OWN_METHODS = frozenset(("forward", "_conv_forward", "_call_impl"))


class Run(NamedTuple):
    """Neighbouring layers that one call runs.

    Attributes:
        operation: name of the operation of ``kernels``, or ``"module"``: the layer is called as it stands.
        layers: the layers, in order: modules, or for a graph of calls the named tuples of :mod:`.graphs`.
        note: why the run is not longer, or why the layer is called as it stands; may be empty.
        output_format: the memory format that the next layer needs, or None for the one that PyTorch's layers would return.
    """

    operation: str
    layers: tuple[Any, ...]
    note: str = ""
    output_format: torch.memory_format | None = None


class CellImages(NamedTuple):
    """Images as the cells that a network's first layer reads: an input of a :class:`FusedSequential` in place of images.

    ``DistributedDataParallel`` and ``torch.compile`` take this named tuple as they take a tensor.

    Attributes:
        data: (N, rows, columns, stride * stride * C), from :func:`kernels.space_to_depth` or :func:`kernels.gather_resize`.
        cells: the parameters that ``data`` was made by. A layer that reads other cells raises ValueError.
    """

    data: Tensor
    cells: kernels.Cells


# The module that it was first defined in, so that old pickles load.
CellImages.__module__ = "alexnet_triton.fused"


def cells_of(run: Run) -> kernels.Cells | None:
    """The cells that ``run`` can read instead of images; None if it can read none."""
    if run.operation != "conv2d_relu_max_pool2d":
        return None
    conv = cast(nn.Conv2d, run.layers[0])
    padding = 0 if conv.padding == "valid" else conv.padding
    step, other = pair("stride", conv.stride, 1)
    if step != other or pair("dilation", conv.dilation, 1) != (1, 1) or conv.groups != 1 or isinstance(padding, str):
        return None
    return kernels.Cells(conv.kernel_size, step, pair("padding", padding, 0))


def check_cells(run: Run, given: kernels.Cells) -> None:
    reads = cells_of(run)
    if reads is None or reads.pairs() != given.pairs():
        names = " + ".join(type(layer).__name__ for layer in run.layers)
        what = "images" if reads is None else f"images or their {reads}"
        why = f" ({run.note})" if run.note else ""
        raise ValueError(f"the network begins with {names}{why}, which reads {what}, got {given}")


#: Tensor classes that operations take: PyTorch's own, and those by which PyTorch traces a computation without data.
KNOWN_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_KNOWN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(input: Any) -> bool:
    """Whether operations take ``input`` (a tensor, cells, or a trace's proxy). If not, layers are called as they stand.

    Not taken are quantized and sparse tensors, subclasses (which may compute differently), integers, and float64 on a GPU.
    """
    if not isinstance(input, Tensor):
        return isinstance(input, (CellImages, fx.Proxy))
    floats = input.dtype in _KNOWN_DTYPES or (input.dtype == torch.float64 and input.device.type == "cpu")
    return floats and input.layout is torch.strided and type(input) in KNOWN_TENSORS


def returned_format(input: Any, weights: Sequence[Tensor | None]) -> torch.memory_format:
    """The memory format that PyTorch's convolutions with ``weights``, and pools, would return for ``input``."""
    if isinstance(input, CellImages):
        return _returned_format(*weights)
    return _returned_format(input, *weights) if isinstance(input, Tensor) else memory_format_of(input, *weights)  # type: ignore[arg-type]


def _returned_format(*tensors: Any) -> torch.memory_format:
    for tensor in tensors:
        if _is_like_channels_last(tensor):
            return torch.channels_last
    return torch.contiguous_format


@overridable
def memory_format_of(*tensors: Tensor) -> torch.memory_format:
    """As :func:`returned_format`, for a trace, which records the call of this function."""
    return _returned_format(*tensors)


def _is_like_channels_last(tensor: Any) -> bool:
    """Whether PyTorch takes a tensor for channels-last by its strides: the rule of c10/core/MemoryFormat.h."""
    if tensor.dim() != 4:
        return False
    sizes, strides = tensor.shape, tensor.stride()
    if strides[3] == 1 and sizes[1] > 1:  # true of nearly all contiguous tensors
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]) or strides[1] == 0:
            return False
        least = strides[d] * max(sizes[d], 1)
    return True


def call(
    run: Run,
    input: Any,
    link: Tensor | None = None,
    following: Run | None = None,
    output_format: torch.memory_format | None = None,
) -> tuple[Any, Tensor | None]:
    """The output of a run's last layer, and its link (:func:`kernels.linked_conv2d`) if the ``following`` run takes one.

    ``link`` is the link that the previous run returned with ``input``; this run must be the only reader of ``input`` then.
    ``output_format`` is by default that of the run, or the operation's own.

    Raises:
        ValueError: ``input`` is :class:`CellImages`, but the run reads images or other cells.
    """
    if isinstance(input, CellImages):
        check_cells(run, input.cells)
    output_format = run.output_format if output_format is None else output_format
    options: dict[str, Any] = {} if output_format is None else {"output_format": output_format}
    if run.operation in TAKE_LINKS:
        options["link"] = link
        if run.operation == "conv2d" and len(run.layers) == 2 and following is not None and following.operation in TAKE_LINKS:
            return kernels.linked_conv2d(input, *conv_arguments(cast(nn.Conv2d, run.layers[0])), link=link)
    return _OPERATIONS[run.operation](input, *run.layers, **options), None


def computed_by() -> tuple[Any, ...]:
    """The methods and functions of PyTorch by which the known layers compute; a user may have replaced one."""
    return (
        *(nn.Conv2d.forward, nn.Conv2d._conv_forward, F.conv2d, nn.Linear.forward, F.linear, nn.ReLU.forward, F.relu),
        *(nn.MaxPool2d.forward, F.max_pool2d, nn.Dropout.forward, F.dropout, nn.Flatten.forward),
    )


_AS_SHIPPED = computed_by()
#: Part of :func:`computed_by` for each class of layers.
_PARTS: dict[type[nn.Module], slice] = {
    nn.Conv2d: slice(0, 3),
    nn.Linear: slice(3, 5),
    nn.ReLU: slice(5, 7),
    nn.MaxPool2d: slice(7, 9),
    nn.Dropout: slice(9, 11),
    nn.Flatten: slice(11, 12),
}


def _obstacle(layer: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why ``layer``, an instance of ``kind``, may compute something else than ``kind`` does; None if it computes the same."""
    if type(layer) is not kind:
        return f"{type(layer).__name__} is a subclass of {kind.__name__}"
    if "forward" in vars(layer) or "_conv_forward" in vars(layer) or "_call_impl" in vars(layer):
        return f"the {kind.__name__}'s forward was replaced"
    if computed_by()[_PARTS[kind]] != _AS_SHIPPED[_PARTS[kind]]:
        return f"the function of all {kind.__name__} layers was replaced"
    if any(getattr(layer, hooks) for hooks in HOOK_DICTS):
        return f"the {kind.__name__} carries a hook"
    for name in ("weight", "bias"):
        tensor = layer._parameters.get(name, vars(layer).get(name))
        if tensor is not None and type(tensor) not in KNOWN_TENSORS:
            return f"the {kind.__name__}'s {name} is a {type(tensor).__name__}, which computes in its own way"
    return None


def _conv_obstacle(layer: nn.Module) -> str | None:
    obstacle = _obstacle(layer, nn.Conv2d)
    if obstacle is None and cast(nn.Conv2d, layer).padding_mode != "zeros":
        return f"padding_mode={cast(nn.Conv2d, layer).padding_mode!r}: the kernels pad with zeros"
    return obstacle


def _pool_after_relu_obstacle(layer: nn.Module) -> str | None:
    obstacle = _obstacle(layer, nn.MaxPool2d)
    if obstacle is not None:
        return obstacle
    pool = cast(nn.MaxPool2d, layer)
    if pool.return_indices:
        return "the MaxPool2d returns indices"
    return None if pool.dilation in (1, (1, 1), [1, 1]) else "the MaxPool2d is dilated"


def _dropout_after_relu_obstacle(layers: Sequence[nn.Module]) -> str | None:
    """Why ``layers[0]``, a dropout, cannot be fused into a linear layer; ``layers[1]`` is the next layer, if there is one."""
    obstacle = _obstacle(layers[0], nn.Dropout)
    if obstacle is not None:
        return obstacle
    if len(layers) == 1:
        return "a layer after the container may work in place on the output that the fused backward pass needs"
    if obstacle_of(layers[1]) is None and isinstance(layers[1], (nn.Linear, nn.Conv2d, nn.MaxPool2d)):
        return None
    works = "works" if getattr(layers[1], "inplace", False) else "may work"
    return f"the {type(layers[1]).__name__} after the Dropout {works} in place on the output that the fused backward pass needs"


LONE_RELU = "a ReLU is only fused into a Conv2d or Linear right before it"

#: Layers that are looked at for one run: at most three layers of the run, and the next one.
LONGEST_LOOK = 4


def plan(layers: Sequence[nn.Module]) -> list[Run]:
    """Cut a sequence of layers into the longest runs that one operation can compute, from first to last.

    Fused are Conv2d [ReLU [MaxPool2d]], MaxPool2d, Linear [ReLU [Dropout]] and Dropout. Any other layer, and any layer that
    carries a hook, is a run of its own.
    """
    if any(getattr(torch_module, hooks, None) for hooks in GLOBAL_HOOK_DICTS):
        return [Run("module", (layer,), "a hook on all modules is registered") for layer in layers]
    runs = []
    i = 0
    while i < len(layers):
        run = _longest_run(layers[i : i + LONGEST_LOOK])
        i += len(run.layers)
        if run.operation in IMAGES and i < len(layers) and _obstacle(layers[i], nn.Flatten) is None:
            # Flatten's order is NCHW. The operation can write its output in that order, which makes Flatten a view.
            run = run._replace(output_format=torch.contiguous_format)
        runs.append(run)
    return runs


#: Operations that return images, as opposed to rows of features.
IMAGES = ("conv2d", "conv2d_relu_max_pool2d", "max_pool2d")


def _longest_run(layers: Sequence[nn.Module]) -> Run:
    """The run that starts with ``layers[0]``; ``layers`` are at most four, the last of which is only looked at."""
    first = layers[0]
    for kind, start_obstacle in _STARTS.items():
        if isinstance(first, kind):
            obstacle = start_obstacle(first)
            return Run("module", (first,), obstacle) if obstacle is not None else _extended_run(layers)
    if isinstance(first, nn.ReLU):
        return Run("module", (first,), LONE_RELU)
    if isinstance(first, nn.Sequential):
        return Run("module", (first,), "a nested container: runs do not cross its border")
    return Run("module", (first,), f"no operation for {type(first).__name__}")


def _extended_run(layers: Sequence[nn.Module]) -> Run:
    """The longest run that starts with ``layers[0]``, a layer without an obstacle that an operation can run alone."""
    first, *rest = layers
    if isinstance(first, (nn.MaxPool2d, nn.Dropout)):
        return Run("max_pool2d" if isinstance(first, nn.MaxPool2d) else "dropout", (first,))
    operation = "conv2d" if isinstance(first, nn.Conv2d) else "linear"
    if not rest or not isinstance(rest[0], nn.ReLU):
        return Run(operation, (first,))
    relu, *rest = rest
    obstacle = _obstacle(relu, nn.ReLU)
    if obstacle is not None:
        return Run(operation, (first,), obstacle)
    last_kind = nn.MaxPool2d if operation == "conv2d" else nn.Dropout
    if not rest or not isinstance(rest[0], last_kind):
        return Run(operation, (first, relu))
    obstacle = _pool_after_relu_obstacle(rest[0]) if operation == "conv2d" else _dropout_after_relu_obstacle(rest)
    if obstacle is not None:
        return Run(operation, (first, relu), obstacle)
    if operation == "linear":
        return Run("linear_relu_dropout", (first, relu, rest[0]))
    return Run("conv2d_relu_max_pool2d", (first, relu, rest[0]))


def _dropout_obstacle(layer: nn.Module) -> str | None:
    obstacle = _obstacle(layer, nn.Dropout)
    if obstacle is None and cast(nn.Dropout, layer).inplace:
        return "the Dropout works in place on a tensor that the caller may still use"
    return obstacle


#: Layers that a run can start with, and the function that says why a layer cannot.
_STARTS: dict[type[nn.Module], Callable[[nn.Module], str | None]] = {
    nn.Conv2d: _conv_obstacle,
    nn.Linear: lambda layer: _obstacle(layer, nn.Linear),
    nn.MaxPool2d: lambda layer: _obstacle(layer, nn.MaxPool2d),
    nn.Dropout: _dropout_obstacle,
}


def obstacle_of(layer: nn.Module) -> str | None:
    """Why a layer that has an operation is called as it stands; None without such a reason, or without an operation."""
    if isinstance(layer, nn.ReLU):
        return _obstacle(layer, nn.ReLU)
    return next((obstacle(layer) for kind, obstacle in _STARTS.items() if isinstance(layer, kind)), None)


def conv_arguments(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups


def _run_conv2d(
    input: Tensor,
    conv: nn.Conv2d,
    relu: nn.ReLU | None = None,
    output_format: torch.memory_format | None = None,
    *,
    link: Tensor | None,
) -> Tensor:
    activation = "relu" if relu is not None else None
    return kernels.conv2d(input, *conv_arguments(conv), activation=activation, link=link, output_format=output_format)


def _run_conv2d_relu_max_pool2d(
    input: Tensor | CellImages,
    conv: nn.Conv2d,
    relu: nn.ReLU,
    pool: nn.MaxPool2d,
    output_format: torch.memory_format | None = None,
    *,
    link: Tensor | None,
) -> Tensor:
    weight, bias, stride, padding, dilation, groups = conv_arguments(conv)
    cells = isinstance(input, CellImages)
    if isinstance(input, CellImages):
        input, padding = input.data, 0  # cells include the padding
    return kernels.conv2d_relu_max_pool2d(
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        pool_kernel_size=pool.kernel_size,
        pool_stride=pool.stride,
        pool_padding=pool.padding,
        ceil_mode=pool.ceil_mode,
        output_format=output_format,
        link=link,
        cells=cells,
    )


def _run_max_pool2d(
    input: Tensor, pool: nn.MaxPool2d, output_format: torch.memory_format | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    window = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices)
    return kernels.max_pool2d(input, *window, output_format=output_format)


def _run_linear(input: Tensor, linear: nn.Linear, relu: nn.ReLU | None = None) -> Tensor:
    return kernels.linear(input, linear.weight, linear.bias, activation="relu" if relu is not None else None)


def _run_linear_relu_dropout(input: Tensor, linear: nn.Linear, relu: nn.ReLU, dropout: nn.Dropout) -> Tensor:
    return kernels.linear_relu_dropout(input, linear.weight, linear.bias, dropout.p, dropout.training)


def _run_dropout(input: Tensor, dropout: nn.Dropout) -> Tensor:
    output = kernels.dropout(input, dropout.p, dropout.training)
    if isinstance(input, Tensor) and not input.is_contiguous() and output is not input:
        output = torch.empty_like(input).copy_(output)  # PyTorch's dropout keeps the strides
    return output


def _run_module(input: Any, layer: nn.Module) -> Any:
    return layer(input)


_OPERATIONS: dict[str, Any] = {
    "conv2d": _run_conv2d,
    "conv2d_relu_max_pool2d": _run_conv2d_relu_max_pool2d,
    "max_pool2d": _run_max_pool2d,
    "linear": _run_linear,
    "linear_relu_dropout": _run_linear_relu_dropout,
    "dropout": _run_dropout,
    "module": _run_module,
}


#: Operations whose backward pass applies the mask of the ReLU right before them, if they are given its link.
TAKE_LINKS = ("conv2d", "conv2d_relu_max_pool2d")
