"""Initial weights from a file, for fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import FORMAT, CheckpointError, read_file
from .run_folder import weights_file


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights in a file: tensors on the CPU by their names in the network.

    Args:
        path: a checkpoint of :func:`.loop.train`; the folder of a run (its best checkpoint, else its last); a ``state_dict``
            written by ``torch.save``, such as torchvision's; or a ``.safetensors`` file.

    Raises:
        CheckpointError: the file does not exist or holds something else, or the package safetensors is missing.
    """
    path = weights_file(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_file(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        content = content.get("state_dict")
    if not isinstance(content, dict) or not content or not all(map(_is_weight, content, content.values())):
        raise CheckpointError(f"{path}: not a state_dict: it does not hold weights by their names")
    return content


def _is_weight(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path}: needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except Exception as error:  # safetensors does not document the classes of its errors
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


@dataclasses.dataclass(frozen=True)
class Kept:
    """The result of :func:`take_weights`.

    Attributes:
        tensors: number of the network's tensors that were set.
        of: number of the network's tensors.
        new: names of the layers that were left unchanged.
        unknown: number of given weights whose names the network does not have.
        weights: the values set, by name, in float32, which is more precise than a network in half precision.
    """

    tensors: int
    of: int
    new: tuple[str, ...]
    unknown: int
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        said = f"kept {self.tensors} of {self.of} tensors; new: {', '.join(self.new) or 'none'}"
        return said + f"; {self.unknown} unknown to the network" * (self.unknown > 0)


@torch.no_grad()
def take_weights(net: nn.Module, weights: Mapping[str, Tensor]) -> Kept:
    """Set the layers of ``net`` for which ``weights`` has all parameters in the right shapes; leave the others unchanged.

    A layer is set as a whole, since a bias belongs to its weights.

    Args:
        net: network of any dtype, on any device.
        weights: tensors by name, of any floating-point dtype. Tensors of other dtypes are not used.
    """
    taken: dict[str, Tensor] = {}
    names: set[str] = set()
    new = []
    for layer_name, layer in net.named_modules():
        own = {f"{layer_name}.{name}": value for name, value in layer.named_parameters(recurse=False)}
        names |= own.keys()
        found = {name: weights.get(name) for name in own}
        fits = {
            name: value
            for name, value in found.items()
            if value is not None and value.is_floating_point() and value.shape == own[name].shape
        }
        if len(fits) < len(own):
            new.append(layer_name)
            continue
        for name, value in fits.items():
            own[name].copy_(value)
            taken[name] = value.float()
    return Kept(len(taken), len(names), tuple(new), len(weights.keys() - names), taken)
