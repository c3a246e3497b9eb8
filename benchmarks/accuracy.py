"""How exact every operation is: the worst error against float64 over magnitudes from 1e-6 to 1e4, beside PyTorch's own.

``python -m benchmarks.accuracy`` runs the cases of :mod:`benchmarks.cases` and a few more, forward and every gradient, on a CUDA
GPU at AlexNet's sizes, else in Triton's interpreter on small tensors. It prints a table and writes it as Markdown. An error
is counted in units in the last place of the largest value of its tensor, so 0.5 is a correctly rounded result. The exit code is 1
where an error is more than twice PyTorch's own and half a unit: the rule of the suite.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Triton decides when a kernel is decorated, so this comes before anything imports ``kernels``.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
from rich.console import Console
from rich.table import Table

import kernels
from kernels.config import gpu_slug
from kernels.images import gather_resize_reference
from kernels.sgd import sgd_step, sgd_step_reference

from .cases import CASES, Case, truth

RESULTS = Path(__file__).parent / "results"

#: Of inputs and of the gradients that come in; weights are of a trained network's size, see :class:`benchmarks.cases.Case`.
MAGNITUDES = tuple(10.0**exponent for exponent in range(-6, 5))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Half units always allowed; more where a GPU's thread adds up in one chain what a library splits: see tests/oracle.py.
_HALF_UNITS = {torch.float32: 16 if torch.cuda.is_available() else 1, torch.float16: 1, torch.bfloat16: 1}

#: Names, and result for result: ours, PyTorch's in the same dtype, and float64's.
Results = list[tuple[str, Tensor, Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation and how its results are made on a device, in a dtype, at a magnitude."""

    name: str
    results: Callable[[torch.device, torch.dtype, float], Results]


@dataclasses.dataclass(frozen=True)
class Error:
    """The worst result of an operation in one dtype.

    Attributes:
        ours, peer: errors in units in the last place of the largest exact value.
        name: which result.
        magnitude: of the inputs.
    """

    ours: float
    peer: float
    name: str
    magnitude: float

    def allowed(self, dtype: torch.dtype) -> float:
        """The suite's rule."""
        return 2 * self.peer + 0.5 * _HALF_UNITS[dtype]


def units(result: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The largest error in units in the last place that the largest value has in ``dtype``.

    Values that overflow ``dtype`` do not count, if ``result`` overflows there too; else the error is infinite.
    """
    info = torch.finfo(dtype)
    expected = exact.to(dtype)
    if not torch.equal(result.isfinite(), expected.isfinite()):
        # At the very end of the range half a unit decides: what is infinite in one may be the largest number in the other.
        differs = result.isfinite() != expected.isfinite()
        if (exact[differs].abs() < info.max * (1 - 4 * info.eps)).any() or (exact[differs].abs() > 2 * info.max).any():
            return math.inf
    finite = result.isfinite() & expected.isfinite()
    if not finite.any():
        return 0.0
    result, exact = result[finite].double(), exact[finite]
    largest = max(exact.abs().max().item(), info.tiny)  # below it numbers are equally far apart
    return (result - exact).abs().max().item() / (info.eps * 2.0 ** math.floor(math.log2(largest)))


def _of_case(case: Case, batch: int) -> Operation:
    def results(device: torch.device, dtype: torch.dtype, magnitude: float) -> Results:
        tensors = case.tensors(batch, dtype, device)
        for i in (0, 2):  # input and bias
            if i < len(tensors):
                tensors[i] = (tensors[i].detach() * magnitude).requires_grad_()
        expected = truth(case, tensors, magnitude)
        output = case.ours(*tensors)
        ours = [output.detach(), *torch.autograd.grad(output, tensors, expected.grad)]
        names = ("output", "gradient of input", "gradient of weight", "gradient of bias")
        return list(zip(names, ours, expected.peer, expected.exact, strict=False))

    return Operation(case.name, results)


def _linked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y, link = kernels.linked_conv2d(x, w, b, padding=1)
    return kernels.conv2d(y, w, b, padding=1, link=link)


def _unlinked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(F.relu(F.conv2d(x, w, b, padding=1)), w, b, padding=1)


#: Two convolutions, whose channels are enough for tensor descriptors in half precision on small tensors too.
_LINKED = Case("linked_conv2d", (384, 12, 12), (384, 384, 3, 3), _linked, _unlinked, ((16, 9, 7), (16, 16, 3, 3)))


def _gather_resize(device: torch.device, dtype: torch.dtype, magnitude: float) -> Results:
    """Pixels are bytes: the magnitude is that of what they are divided by."""
    images = torch.randint(0, 256, (9, 28, 28), dtype=torch.uint8, device=device)
    index, size = torch.tensor([3, 0, 8, 3], device=device), 45
    arguments = {"mean": 0.3, "std": 1 / magnitude}
    ours = kernels.gather_resize(images, index, size, dtype=dtype, **arguments)
    peer, exact = (gather_resize_reference(images, index, size, dtype=d, **arguments) for d in (dtype, torch.float64))
    return [("output", ours, peer, exact)]


def _sgd(device: torch.device, dtype: torch.dtype, magnitude: float) -> Results:
    """A step with momentum and weight decay; with a float32 master for half types, as :mod:`kernels.sgd` has it."""
    values = [torch.randn(1037, device=device) * magnitude for _ in range(3)]
    settings = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "nesterov": True, "maximize": False}
    runs = []
    for step, kind in ((sgd_step, dtype), (sgd_step_reference, dtype), (sgd_step_reference, torch.float64)):
        param, grad = values[0].to(dtype).to(kind), values[1].to(dtype).to(kind)
        wide = torch.float64 if kind == torch.float64 else torch.float32
        # In float64 the parameter is a master itself, so that it is no rounding of one.
        master = param.float().clone() if kind in (torch.float16, torch.bfloat16) else None
        buffer = values[2].to(wide)
        listed = [None if t is None else [t] for t in (param, grad, master, buffer)]
        step(*(listed if step is sgd_step else (param, grad, master, buffer)), **settings, first_step=False)  # type: ignore[arg-type]
        runs.append((param, buffer))
    return [(name, *tensors) for name, *tensors in zip(("parameter", "momentum buffer"), *runs, strict=True)]  # type: ignore[misc]


def operations(device: torch.device) -> list[Operation]:
    """Every public operation: at AlexNet's sizes on a GPU, on small tensors elsewhere."""
    cases = [*CASES, _LINKED]
    if device.type != "cuda":
        shrunk: dict[object, Case] = {}
        for case in cases:
            # Layers that become the same small case are one.
            shrunk.setdefault((*case.shrink, case.name.partition("_")[2], "fc" in case.name), case.shrunk())
        cases = list(shrunk.values())
    batch = 16 if device.type == "cuda" else 3
    return [*(_of_case(case, batch) for case in cases), Operation("gather_resize", _gather_resize), Operation("sgd_step", _sgd)]


def worst(operation: Operation, dtype: torch.dtype, device: torch.device, magnitudes: Iterable[float]) -> Error:
    """The result that is closest to what the rule allows, or furthest beyond it."""
    errors = []
    for magnitude in magnitudes:
        torch.manual_seed(0)
        for name, ours, peer, exact in operation.results(device, dtype, magnitude):
            errors.append(Error(units(ours, exact, ours.dtype), units(peer, exact, peer.dtype), name, magnitude))
    return max(errors, key=lambda e: (not e.ours <= e.allowed(dtype), e.ours))


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="of the Markdown file; by default in benchmarks/results")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # As the suite: float32 products exact, so that float32 is held to float32's error.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    where = torch.cuda.get_device_name() if device.type == "cuda" else "Triton's interpreter on the CPU, small tensors"
    title = f"{where}, torch {torch.__version__}, Triton {triton.__version__}"
    header = ("operation", "dtype", "error, units", "PyTorch's", "worst in", "at magnitude")
    table, lines = Table(*header, title=title), [f"{title}:", "", f"| {' | '.join(header)} |", "|---|---|---|---|---|---|"]
    bad = []
    for operation in operations(device):
        for dtype in DTYPES:
            error = worst(operation, dtype, device, MAGNITUDES)
            if not error.ours <= error.allowed(dtype):
                bad.append(f"{operation.name} in {dtype}")
            name = str(dtype).removeprefix("torch.")
            row = (operation.name, name, f"{error.ours:.2f}", f"{error.peer:.2f}", error.name, f"{error.magnitude:.0e}")
            table.add_row(*row)
            lines.append(f"| {' | '.join(row)} |")
    Console().print(table)
    slug = gpu_slug(torch.cuda.get_device_name()) if device.type == "cuda" else "interpreter"
    path = arguments.out or RESULTS / f"accuracy-{slug}.md"
    intro = (__doc__ or "").split("\n\n")[1].replace("\n", " ")
    path.write_text(f"# Accuracy\n\n{intro}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    print(path)
    sys.exit(f"accuracy: beyond the rule: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
