"""NumPy's numbers and flags work as Python's do, and never reach a launch or a problem.

On a GPU a launch with a NumPy number fails to compile, unless a kernel compiled for Python's number exists already. The
interpreter compiles nothing, so these tests look at the arguments of launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import kernels
from kernels.runtime import launch, plans
from kernels.sgd import sgd_step

from ..conftest import DEVICE

#: Types that launches and problems may hold: exactly these, no subclasses.
PLAIN = (int, float, bool, str, type(None), Tensor, torch.nn.Parameter, TensorDescriptor, tl.dtype, torch.dtype, torch.device)

#: Converts Python's number to NumPy's.
Numbers = Callable[[Any], Any]


def wide(value: Any) -> Any:
    return np.bool_(value) if isinstance(value, bool) else np.int64(value) if isinstance(value, int) else np.float64(value)


def narrow(value: Any) -> Any:
    return np.bool_(value) if isinstance(value, bool) else np.uint8(value) if isinstance(value, int) else np.float32(value)


def smallest(value: Any) -> Any:
    return np.bool_(value) if isinstance(value, bool) else np.int8(value) if isinstance(value, int) else np.float16(value)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    sizes = {"x": (2, 4, 9, 8), "w": (6, 2, 3, 2), "b": (6,), "images": (2, 1, 23, 23), "w_images": (8, 1, 11, 11)}
    sizes |= {"rows": (3, 7), "matrix": (5, 7), "vector": (5,)}
    return {name: make(*size) for name, size in sizes.items()}


def _cells(t: dict[str, Tensor], n: Numbers) -> Tensor:
    images, w = t["images"].half(), t["w_images"].half()
    cells = kernels.space_to_depth(images, (n(11), n(11)), n(4), n(1))
    return kernels.conv2d_relu_max_pool2d(
        cells, w, None, n(4), n(0), pool_kernel_size=n(3), pool_stride=n(2), cells=n(True)
    ).float()


def _sgd(t: dict[str, Tensor], n: Numbers) -> Tensor:
    param, grad, buffer = (t[name].clone() for name in ("matrix", "matrix", "matrix"))
    flags = {name: n(True) for name in ("nesterov", "maximize")} | {"first_step": n(False)}
    sgd_step([param], [grad], None, [buffer], lr=n(0.1), momentum=n(0.9), dampening=n(0), weight_decay=n(5e-4), **flags)
    return torch.stack([param, buffer])


def _reads_cells(t: dict[str, Tensor], n: Numbers) -> Tensor:
    answer = kernels.reads_cells(t["images"].half(), t["w_images"].half(), n(4), n(1), n(1))
    assert type(answer) is bool
    return torch.tensor(answer)


def _gather(t: dict[str, Tensor], n: Numbers, cells: kernels.Cells | None = None) -> Tensor:
    pixels = torch.arange(2 * 28 * 28, device=DEVICE).view(2, 28, 28).to(torch.uint8)
    index = torch.tensor([1, 0], device=DEVICE)
    return kernels.gather_resize(pixels, index, n(40), mean=n(0.3), std=n(0.7), cells=cells)


def _pair(pair: tuple[Tensor, Tensor]) -> Tensor:
    values, indices = pair
    return torch.cat([values, indices.to(values.dtype)])


CALLS: dict[str, Callable[[dict[str, Tensor], Numbers], Tensor]] = {
    "conv2d": lambda t, n: kernels.conv2d(t["x"], t["w"], t["b"], n(2), (n(1), n(0)), [n(1), n(1)], n(2), activation="relu"),
    "linked_conv2d": lambda t, n: kernels.linked_conv2d(t["x"], t["w"], t["b"], (n(1), n(2)), n(1), n(2), n(2))[0],
    "conv2d_relu_max_pool2d": lambda t, n: kernels.conv2d_relu_max_pool2d(
        *(t["x"], t["w"], t["b"], n(1), n(1), n(1), n(2)),
        pool_kernel_size=n(3),
        pool_stride=(n(2), n(1)),
        pool_padding=n(1),
        ceil_mode=n(True),
        cells=n(False),
    ),
    "max_pool2d": lambda t, n: kernels.max_pool2d(t["x"], (n(3), n(2)), n(2), n(1), n(1), n(True), n(False)),  # type: ignore[dict-item, return-value]
    "max_pool2d_indices": lambda t, n: _pair(kernels.max_pool2d(t["x"], n(3), None, n(0), n(2), n(False), n(True))),  # type: ignore[arg-type]
    "dropout": lambda t, n: kernels.dropout(t["x"], n(0.9), n(True), seed=n(7)),
    "dropout_of_all": lambda t, n: kernels.dropout(t["x"], n(1), n(True), seed=n(7)),
    "dropout_of_none": lambda t, n: kernels.dropout(t["x"], n(0.9), n(False)),
    "dropout_mask": lambda t, n: kernels.dropout_mask((n(3), n(50)), n(0.9), n(7), device=DEVICE),
    "linear_relu_dropout": lambda t, n: kernels.linear_relu_dropout(
        t["rows"], t["matrix"], t["vector"], n(0.9), n(True), seed=n(7)
    ),
    "cross_entropy": lambda t, n: kernels.cross_entropy(
        t["rows"], torch.zeros(len(t["rows"]), dtype=torch.int64, device=DEVICE), label_smoothing=n(0.9)
    ),
    "space_to_depth": lambda t, n: kernels.space_to_depth(t["images"], n(11), n(4), (n(1), n(2))),
    "conv2d_relu_max_pool2d_cells": _cells,
    "reads_cells": _reads_cells,
    "gather_resize": _gather,
    "gather_resize_cells": lambda t, n: _gather(t, n, kernels.Cells((n(11), n(11)), n(4), n(1))),
    "sgd_step": _sgd,
}


def _foreign(value: Any) -> Iterator[type]:
    """Types within ``value`` that are neither in :data:`PLAIN` nor tuples and lists of such values."""
    if isinstance(value, (tuple, list)):
        for inner in value:
            yield from _foreign(inner)
    elif type(value) not in PLAIN:
        yield type(value)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, type]]]:
    """Non-plain values that launches or problems get: (where, name, type)."""
    found: list[tuple[str, str, type]] = []
    look_up = plans.find

    def find(function: Any, given: Any, problem: Any) -> Any:
        found.extend((function.__qualname__, "problem", kind) for kind in _foreign(problem))
        return look_up(function, given, problem)

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        for name, value in {"grid": grid, **arguments}.items():
            found.extend((kernel.fn.__name__, name, kind) for kind in _foreign(value))

    monkeypatch.setattr(plans, "find", find)
    with launch.observe_launches(note):
        yield found


def _results(name: str, numbers: Numbers) -> list[Tensor]:
    """The output and the gradients of a call."""
    given = tensors()
    for t in given.values():
        t.requires_grad_(name not in ("space_to_depth", "conv2d_relu_max_pool2d_cells", "sgd_step"))
    output = CALLS[name](given, numbers)
    if not output.requires_grad:
        return [output]
    wanted = list(given.values())
    grads = torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
    return [output, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("numbers", [wide, narrow, smallest], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_numpys_numbers_mean_what_pythons_do(
    name: str, numbers: Numbers, backend: Any, foreign: list[tuple[str, str, type]]
) -> None:
    with kernels.use_backend(backend):
        ours = _results(name, numbers)
        python = _results(name, lambda value: numbers(value).item())
    assert foreign == []
    for got, due in zip(ours, python, strict=True):
        assert got.dtype == due.dtype
        assert torch.equal(got, due)


def test_every_public_operation_that_takes_numbers_is_called() -> None:
    called = {name.removesuffix("_cells").removesuffix("_indices") for name in CALLS} | {"reads_cells"}
    assert called >= set(kernels.__all__) - {"Augmentation", "Cells", "linear", "use_backend"}


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("size", [np.float64(2), np.True_, np.array([2, 2]), (np.True_, 2), (2, np.True_), (2, np.float32(2))])
def test_what_is_no_integer_is_refused(size: Any, backend: Any) -> None:
    """An array is refused too, as by PyTorch."""
    t = tensors()
    with kernels.use_backend(backend):
        for option in ("stride", "padding", "dilation", "groups"):
            with pytest.raises(TypeError, match=option):
                kernels.conv2d(t["x"], t["w"], **{"groups": 2, option: size})
        for option in ("kernel_size", "stride", "padding", "dilation"):
            with pytest.raises(TypeError, match=option):
                kernels.max_pool2d(t["x"], **{"kernel_size": 3, option: size})


@pytest.mark.parametrize("flag", [1, 0, None, "True", np.int64(1), 1.0])
def test_what_is_no_flag_is_refused(flag: Any) -> None:
    """return_indices may have any value, as in F.max_pool2d."""
    t = tensors()
    with pytest.raises(TypeError, match="ceil_mode"):
        kernels.max_pool2d(t["x"], 3, ceil_mode=flag)
    with pytest.raises(TypeError, match="ceil_mode"):
        kernels.conv2d_relu_max_pool2d(t["x"], t["w"], groups=2, pool_kernel_size=2, ceil_mode=flag)
    assert isinstance(kernels.max_pool2d(t["x"], 3, return_indices=flag), tuple) == bool(flag)


@pytest.mark.parametrize("p", [np.float32(-0.1), np.float64(1.5), np.float32("nan"), np.int64(2)])
def test_a_probability_out_of_range_is_refused(p: Any) -> None:
    t = tensors()
    for call in (
        lambda: kernels.dropout(t["x"], p),
        lambda: kernels.linear_relu_dropout(t["rows"], t["matrix"], None, p),
        lambda: kernels.dropout_mask((3,), p, 1),
    ):
        with pytest.raises(ValueError, match=r"p \(the probability of dropping an element\) must be in"):
            call()
