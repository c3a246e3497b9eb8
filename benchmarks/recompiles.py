"""Lists the kernels that a new batch size compiles: ``python -m benchmarks.recompiles --batch 128 160 192``.

It walks AlexNet's training step on CPU tensors at each batch size and compares the launches with those of the sizes before. A
launch needs no compilation if an earlier one has the same kernel, constants, dtypes, tensor descriptors' blocks and integer
specialization (1, multiples of 16, others). The other launches are listed with the arguments that differ. Nothing is compiled
or run.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.runtime import launch

from .offline import offline_target, training_step


@dataclasses.dataclass(frozen=True)
class Variant:
    """The compiled code that a launch runs.

    Attributes:
        kernel: the kernel's name.
        arguments: each argument's name and its specialization.
    """

    kernel: str
    arguments: tuple[tuple[str, str], ...]

    def differences(self, other: Variant) -> list[str]:
        """The arguments whose specialization differs from that in ``other`` of the same kernel: ``"N: 16k -> int"``."""
        before = dict(other.arguments)
        return [f"{name}: {before[name]} -> {value}" for name, value in self.arguments if before[name] != value]


def _compiled_for(value: Any, constant: bool, specialized: bool = True) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_compiled_for(v, constant, specialized) for v in value)})"
    if isinstance(value, TensorDescriptor):
        return f"{value.base.dtype} {list(value.block_shape)}"
    if isinstance(value, Tensor):
        return f"{value.dtype}{'' if value.data_ptr() % 16 == 0 else ' unaligned'}"
    if constant or not isinstance(value, int) or isinstance(value, bool):
        return f"{value}"
    width = "" if -(2**31) <= value < 2**31 else " int64"
    return (("1" if value == 1 else "16k" if value % 16 == 0 else "int") if specialized else "any") + width


def variant(kernel: Any, arguments: dict[str, Any]) -> Variant:
    """The variant of a launch; a compiler option (``num_warps``) counts as a constant."""
    constants = {p.name for p in kernel.params if p.is_constexpr} | arguments.keys() - {p.name for p in kernel.params}
    unspecialized = {p.name for p in kernel.params if p.do_not_specialize}
    values = ((n, _compiled_for(value, n in constants, n not in unspecialized)) for n, value in arguments.items())
    return Variant(kernel.fn.__name__, tuple(values))


def variants(batch: int, capability: int = 90, dtype: torch.dtype = torch.bfloat16) -> list[Variant]:
    """The distinct variants of a training step, in order."""
    found: dict[Variant, None] = {}
    with (
        offline_target(capability),
        launch.record_launches(lambda kernel, _, arguments: found.setdefault(variant(kernel, arguments))),
    ):
        training_step(dtype, batch)
    return list(found)


def new_variants(batches: list[int], capability: int = 90) -> Iterator[tuple[int, list[tuple[Variant, list[str]]]]]:
    """For each batch size the variants that no earlier size had, each with its differences to the most similar one."""
    seen: list[Variant] = []
    for batch in batches:
        new = [v for v in variants(batch, capability) if v not in seen]
        alike = [[v.differences(s) for s in seen if s.kernel == v.kernel] for v in new]
        yield batch, [(v, min(candidates, key=len, default=[])) for v, candidates in zip(new, alike, strict=True)]
        seen += new


def main() -> None:
    """Print the new variants of each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 160, 192, 100, 99])
    parser.add_argument("--arch", default="sm_90", help="sm_80, sm_90, sm_100")
    arguments = parser.parse_args()
    for batch, new in new_variants(arguments.batch, int(arguments.arch.removeprefix("sm_"))):
        print(f"batch {batch}: {len(new)} compiled")
        for v, differences in new if batch != arguments.batch[0] else []:
            print(f"  {v.kernel.strip('_').removesuffix('_kernel')}: {', '.join(differences) or 'first seen'}")


if __name__ == "__main__":
    main()
