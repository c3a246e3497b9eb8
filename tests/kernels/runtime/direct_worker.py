"""Compares what Triton's C launcher gets from :mod:`kernels.runtime.direct` and from ``kernel[grid](...)``.

``test_direct.py`` runs this without TRITON_INTERPRET on the installed Triton. Prints as JSON how many launches of each kernel
were compared.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.compiler import LazyDict

from alexnet_triton import AlexNet
from alexnet_triton.optim import SGD
from benchmarks.idle import IdleUtils, idle_gpu
from benchmarks.offline import single_operations
from kernels.runtime import direct, launch


def flat_arguments(annotations: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """The arguments in the order in which the C code walks them: without constants, tuples opened."""
    from triton.backends.nvidia import driver

    found = []
    assert len(annotations) == len(arguments)
    for annotation, argument in zip(annotations, arguments, strict=True):
        if annotation.type == driver.ARG_TUPLE:
            found += flat_arguments(annotation.nested_tuple, argument)
        elif annotation.type == driver.ARG_KERNEL:
            found.append(argument)
    return found


class Comparison:
    """Repeats each noted launch directly and compares what arrived."""

    def __init__(self, utils: IdleUtils) -> None:
        self.utils = utils
        self.launched: list[tuple[Any, ...]] = []
        self.described: list[tuple[Any, ...]] = []
        self.kernels: collections.Counter[str] = collections.Counter()
        utils.on_launch = lambda *arguments: self.launched.append(arguments)
        utils.on_descriptor = lambda *arguments: self.described.append(arguments)

    def note(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], compiled: Any) -> None:
        """Compare the launch that has just run."""
        first, first_described = self.launched.pop(), self._take_described()
        run, leaves = direct.bind(kernel, compiled, grid), direct.leaves(compiled, arguments)
        assert run is not None, kernel.fn.__name__
        assert leaves is not None, kernel.fn.__name__
        run(0, tuple(_value(leaf) for leaf in leaves))
        second, second_described = self.launched.pop(), self._take_described()
        assert not self.launched
        assert first_described == second_described, kernel.fn.__name__
        assert len(first) == len(second), kernel.fn.__name__  # a tuple counts as one value
        assert _comparable(first, leaves) == _comparable(second, leaves), kernel.fn.__name__
        self.kernels[kernel.fn.__name__] += 1

    def _take_described(self) -> list[tuple[Any, ...]]:
        described, self.described[:] = [_plain(arguments) for arguments in self.described], []
        return described


def _plain(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(list(a) if isinstance(a, (list, tuple)) else a for a in arguments)


def _value(leaf: Any) -> Any:
    if isinstance(leaf, direct.Described):
        return leaf.encode(leaf.base.data_ptr())
    return leaf.data_ptr() if isinstance(leaf, Tensor) else leaf


def _comparable(launched: Sequence[Any], leaves: Sequence[Any]) -> tuple[Any, ...]:
    """What a C launcher got, made comparable: kernel arguments without constants, tuples opened, tensors as addresses.

    Triton 3.6 ignores the value in a constant's place, which may be a tuple; ``leaves`` have None there. A hook without
    callbacks counts as None, and so do values that only hooks get.
    """
    if direct.VERSION == (3, 6):
        head, arguments, of_all = launched[:13], [], iter(leaves)
        for argument in launched[13:]:
            if next(of_all) is not None:
                opened = argument if isinstance(argument, tuple) else (argument,)
                arguments += opened
                for _ in opened[1:]:
                    next(of_all)
        assert not list(of_all)
    else:
        *head, annotations, signature, kernel_arguments = launched
        head.append(bytes(signature))
        arguments = flat_arguments(annotations, kernel_arguments)
    head = [None if getattr(value, "calls", None) == [] or isinstance(value, LazyDict) else value for value in head]
    return head, [(type(v), v) for v in (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)]


def main() -> None:
    """Run a training step and the operations outside it, in bfloat16 and float32."""
    with idle_gpu() as utils:
        comparison = Comparison(utils)
        # Observed, so that every launch goes through ``kernel[grid](...)`` and no plan is made.
        with launch.noting(comparison.note), launch.observe_launches(lambda *_: None):
            for dtype in (torch.bfloat16, torch.float32):
                net = AlexNet().to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
                optimizer = SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
                for _ in range(2):
                    net(torch.empty(64, 1, 224, 224, dtype=dtype)).sum().backward()
                    optimizer.step()
                single_operations(dtype)
    print(json.dumps({"triton": triton.__version__, "kernels": comparison.kernels}))


if __name__ == "__main__":
    main()
