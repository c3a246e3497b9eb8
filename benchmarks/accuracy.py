"""Accuracy of every operation: the worst error against float64 over magnitudes from 1e-6 to 1e4, beside PyTorch's own.

``python -m benchmarks.accuracy`` runs the cases of :mod:`benchmarks.cases` and a few more, forward and every gradient, from
several seeds: on a CUDA GPU at AlexNet's sizes, else in Triton's interpreter on small tensors.

**Unit.** An error is counted in units in the last place of the largest exact value of its tensor, in the result's dtype. So a
correctly rounded result has an error of at most 0.5. Below the smallest normal number the unit stays the same. An infinity, and
an exact value beyond the dtype's range, count as the power of 2 after the dtype's largest number. So an infinite result is no
error where the exact result rounds to infinity. Any other pair of a finite and an infinite value differs by their distance.

**Rule.** For each result, dtype and magnitude the largest error of all seeds may be twice PyTorch's largest error on the same
tensors in the same dtype on the same device, plus half a unit (eight units in float32 on a GPU, see tests/oracle.py). The exit
code is 1 if an error is larger. One seed would compare two accidents: on a few float32 sums PyTorch's largest error varies from
0.3 to 2.5 units. In float32 and bfloat16 another magnitude only changes the rounding, since all values are far from the ends of
the range; there PyTorch's error is its largest over all magnitudes. In float16 each magnitude is compared with PyTorch's error
at that magnitude. Where PyTorch gives infinity or NaN although the exact value fits the dtype by more than a unit, its error is
shown as inf; in the rule those elements are replaced by PyTorch's float32 results, rounded once.

**Threads.** On the CPU PyTorch runs in one thread. With more threads it splits long sums, and shorter chains of additions have
smaller errors: its weight gradients, and with them the verdict, would depend on the machine.

**Decisions.** If a ReLU's argument is nearly zero, or a window has two maxima, rounding decides whether or where a gradient
passes, in PyTorch as here. The output's gradient is set to zero there, so that only errors of arithmetic are measured.

A resized image has errors of tens of units in float32, in PyTorch as here: a pixel's coordinate, rounded to float32, decides
the weight of each neighbour.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Triton reads the variable when a kernel is decorated, so it is set before anything imports ``kernels``.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
from rich.console import Console
from rich.table import Table

import kernels
from kernels.configs.tables import gpu_slug
from kernels.images import gather_resize_reference
from kernels.sgd import sgd_step, sgd_step_reference

from .cases import CASES, FUSED_CASES, PLAIN_CASES, POOL_BLOCK, Case, to_channels_last, truth

RESULTS = Path(__file__).parent / "results"

#: Magnitudes of inputs and output gradients; weights have a trained network's magnitude, see :class:`benchmarks.cases.Case`.
MAGNITUDES = tuple(10.0**exponent for exponent in range(-6, 5, 2))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEEDS = 5

#: Half units always allowed; more on a GPU, where a thread may add in one chain a sum that a library splits: tests/oracle.py.
_HALF_UNITS = {torch.float32: 16 if torch.cuda.is_available() else 1, torch.float16: 1, torch.bfloat16: 1}


@dataclasses.dataclass(frozen=True)
class Result:
    """One result of an operation, by each implementation.

    Attributes:
        name: of the result.
        ours: by our kernels.
        peer: by PyTorch in the same dtype.
        wide: by PyTorch in float32.
        exact: in float64.
    """

    name: str
    ours: Tensor
    peer: Tensor
    wide: Tensor
    exact: Tensor


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation, and the function that makes its results on a device, in a dtype, at a magnitude."""

    name: str
    results: Callable[[torch.device, torch.dtype, float], list[Result]]


@dataclasses.dataclass(frozen=True)
class Error:
    """The largest errors of one result at one magnitude, in units in the last place.

    Attributes:
        name: of the result.
        magnitude: of the inputs.
        ours: of our kernels.
        peer: PyTorch's, inf where it overflows.
        allowed: the limit of ``ours``.
    """

    name: str
    magnitude: float
    ours: float
    peer: float
    allowed: float

    @property
    def within(self) -> bool:
        """Whether the error is within the rule."""
        return self.ours <= self.allowed


def units(result: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The largest error in units in the last place of the largest exact value in ``dtype``.

    The module's docstring says how infinities count. The error is inf if only one of the two is NaN.
    """
    if not torch.equal(result.isnan(), exact.isnan()):
        return math.inf
    info = torch.finfo(dtype)
    end = 2.0 ** math.frexp(info.max)[1]
    bounded, due = (t.double().nan_to_num(0.0).clamp(-end, end) for t in (result, exact))
    largest = min(max(due.abs().max().item(), info.tiny), info.max)
    return (bounded - due).abs().max().item() / (info.eps * 2.0 ** math.floor(math.log2(largest)))


def overflows_early(result: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask of the elements where ``result`` is infinite or NaN although ``exact`` fits ``dtype`` by more than a unit."""
    info = torch.finfo(dtype)
    return ~result.isfinite() & (exact.abs() < info.max * (1 - info.eps))


def _undecided(case: Case, tensors: list[Tensor]) -> Tensor:
    """Mask of the output elements where rounding may decide a fused case's ReLU or maximum.

    The margin is two units of the value in the tensors' dtype plus sixteen units of the largest value in float32, the dtype of
    sums.
    """
    dtype = tensors[0].dtype
    layer, _, rest = case.name.partition("_")
    plain = next(c for c in PLAIN_CASES if c.name == layer)
    before = plain.meaning(*(t.detach().double() for t in tensors))
    # A ReLU without a pool is a window of one element.
    windows = before.unfold(2, 3, 2).unfold(3, 3, 2).flatten(-2) if rest == POOL_BLOCK else before.unsqueeze(-1)
    top, second = F.pad(windows, (0, 1), value=-math.inf).topk(2).values.unbind(-1)
    info = torch.finfo(dtype)
    near = 2 * info.eps * top.abs().clamp(min=info.tiny) + 16 * torch.finfo(torch.float32).eps * before.abs().max()
    return (top.abs() < near) | ((top > 0) & (top - second < near))


def _results(case: Case, tensors: list[Tensor], magnitude: float) -> list[Result]:
    """Output and gradients of ``case``, with a random output gradient of ``magnitude``."""
    output = case.ours(*tensors)
    grad = torch.randn_like(output) * magnitude
    if case.name in {c.name for c in FUSED_CASES}:
        grad = grad.masked_fill(_undecided(case, tensors), 0.0)
    ours = [output.detach(), *torch.autograd.grad(output, tensors, grad)]
    expected = truth(case, tensors, grad)
    wide = truth(case, [t.detach().float() for t in tensors], grad).peer
    names = (
        "output",
        "gradient of input",
        "gradient of weight",
        "gradient of bias",
        "gradient of second weight",
        "gradient of second bias",
    )
    return [Result(*r) for r in zip(names, ours, expected.peer, wide, expected.exact, strict=False)]


def _of_case(case: Case, batch: int) -> Operation:
    def results(device: torch.device, dtype: torch.dtype, magnitude: float) -> list[Result]:
        tensors = case.tensors(batch, dtype, device)
        for i in (0, 2):  # input and bias
            if i < len(tensors):
                tensors[i] = (tensors[i].detach() * magnitude).requires_grad_()
        return _results(case, tensors, magnitude)

    return Operation(case.name, results)


def _linked(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    y, link = kernels.linked_conv2d(x, w1, b1, padding=1)
    return kernels.conv2d(y, w2, b2, padding=1, link=link)


def _unlinked(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.conv2d(F.relu(F.conv2d(x, w1, b1, padding=1)), w2, b2, padding=1)


def _linked_conv2d(device: torch.device, dtype: torch.dtype, magnitude: float) -> list[Result]:
    """Two linked convolutions with enough channels for tensor descriptors in half precision, on small tensors too.

    A mask of the output's gradient cannot exclude undecided ReLUs of the first convolution. So its bias decides them: it is
    large, positive for one half of the channels and negative for the other.
    """
    case = Case("linked_conv2d", (384, 12, 12), (384, 384, 3, 3), _linked, _unlinked, ((16, 5, 4), (16, 16, 3, 3)))
    case, batch = (case, 16) if device.type == "cuda" else (case.shrunk(), 2)
    x, w1, b1 = (t.detach() for t in case.tensors(batch, dtype, device))
    sign = torch.where(torch.arange(len(b1), device=device) % 2 == 0, 1.0, -1.0)
    w2 = to_channels_last(torch.randn_like(w1) * w1[0].numel() ** -0.5)
    given = [x * magnitude, w1 / 4, (sign * 4 * magnitude).to(dtype), w2, b1 * magnitude]
    return _results(case, [t.requires_grad_() for t in given], magnitude)


def _gather_resize(device: torch.device, dtype: torch.dtype, magnitude: float) -> list[Result]:
    """Resized images. Pixels are bytes, so the magnitude is set by the standard deviation that divides them."""
    images = torch.randint(0, 256, (9, 28, 28), dtype=torch.uint8, device=device)
    index, size, std = torch.tensor([3, 0, 8, 3], device=device), 45, 1 / magnitude
    ours = kernels.gather_resize(images, index, size, dtype=dtype, mean=0.3, std=std)
    kinds = (dtype, torch.float32, torch.float64)
    others = [gather_resize_reference(images, index, size, dtype=kind, mean=0.3, std=std) for kind in kinds]
    return [Result("output", ours, *others)]


def _sgd(device: torch.device, dtype: torch.dtype, magnitude: float) -> list[Result]:
    """An SGD step with momentum and weight decay, with float32 masters for half types as in :mod:`kernels.sgd`."""
    start = [(torch.randn(1037, device=device) * magnitude).to(kind) for kind in (dtype, dtype, torch.float32)]
    runs: list[list[Tensor]] = []
    for ours, kind in ((True, dtype), (False, dtype), (False, torch.float32), (False, torch.float64)):
        wide = torch.promote_types(kind, torch.float32)
        # Copies: a step changes its tensors in place.
        param, grad, buffer = (t.to(k, copy=True) for t, k in zip(start, (kind, kind, wide), strict=True))
        master = None if kind == wide else param.float()
        settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}
        settings |= {"nesterov": True, "maximize": False, "first_step": False}
        if ours:
            sgd_step([param], [grad], None if master is None else [master], [buffer], **settings)
        else:
            sgd_step_reference(param, grad, master, buffer, **settings)
        runs.append([param, buffer])
    return [Result(name, *tensors) for name, *tensors in zip(("parameter", "momentum buffer"), *runs, strict=True)]


def operations(device: torch.device) -> list[Operation]:
    """Every public operation: at AlexNet's sizes on a GPU, else on small tensors."""
    cases, batch = list(CASES), 16
    if device.type != "cuda":
        shrunk: dict[object, Case] = {}
        for case in cases:
            # Layers with the same small case are measured once.
            shrunk.setdefault((*case.shrink, case.name.partition("_")[2], "fc" in case.name), case.shrunk())
        cases, batch = list(shrunk.values()), 2
    others = {"linked_conv2d": _linked_conv2d, "gather_resize": _gather_resize, "sgd_step": _sgd}
    return [*(_of_case(case, batch) for case in cases), *(Operation(name, results) for name, results in others.items())]


def measure(
    operation: Operation, dtype: torch.dtype, device: torch.device, magnitudes: Iterable[float], seeds: int
) -> list[Error]:
    """The largest errors of ``seeds`` seeds, for each result and magnitude."""
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = defaultdict(list)
    for magnitude in magnitudes:
        for seed in range(seeds):
            torch.manual_seed(seed)
            for r in operation.results(device, dtype, magnitude):
                kind = r.ours.dtype
                ours, peer = units(r.ours, r.exact, kind), units(r.peer, r.exact, kind)
                yardstick = peer
                early = overflows_early(r.peer, r.exact, kind)
                if early.any():
                    peer, yardstick = math.inf, units(torch.where(early, r.wide.to(kind), r.peer), r.exact, kind)
                found[r.name, magnitude].append((ours, peer, yardstick))
    largest = {key: tuple(map(max, zip(*values, strict=True))) for key, values in found.items()}
    errors = []
    for (name, magnitude), (ours, peer, yardstick) in largest.items():
        if dtype != torch.float16:  # the range is so wide that another magnitude only changes the rounding
            yardstick = max(values[2] for (other, _), values in largest.items() if other == name)
        errors.append(Error(name, magnitude, ours, peer, 2 * yardstick + 0.5 * _HALF_UNITS[dtype]))
    return errors


def environment(device: torch.device) -> str:
    """The device and the versions of the measurement, as text."""
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}"
    python = f"NumPy {np.__version__}, Python {platform.python_version()}"
    cpu = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return f"Triton's interpreter and PyTorch's CPU operations in one thread, {cpu}, small tensors; {versions}, {python}"


HEADER = ("operation", "dtype", "error, units", "PyTorch's", "in", "at magnitude", "PyTorch's worst")


def rows(name: str, dtype: torch.dtype, errors: Sequence[Error]) -> tuple[str, ...]:
    """The table's row of an operation in one dtype: our worst error, errors beyond the rule first."""
    worst = max(errors, key=lambda e: (not e.within, e.ours))
    peer = max(e.peer for e in errors)
    values = (f"{worst.ours:.2f}", f"{worst.peer:.2f}", worst.name, f"{worst.magnitude:.0e}", f"{peer:.2f}")
    return (name, str(dtype).removeprefix("torch."), *values)


def _verdict(broken: list[str]) -> str | int:
    return "\n".join(["accuracy: beyond the rule:", *broken]) if broken else 0


@contextlib.contextmanager
def _as_the_suite() -> Iterator[None]:
    """Exact float32 products, so that float32 is held to float32's error, and one thread, as in the test suite."""
    cudnn, matmul, threads = torch.backends.cudnn, torch.backends.cuda.matmul, torch.get_num_threads()
    before = cudnn.allow_tf32, matmul.fp32_precision
    cudnn.allow_tf32, matmul.fp32_precision = False, "ieee"
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.fp32_precision = before
        torch.set_num_threads(threads)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the table; exit with 1 if an error is beyond the rule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--operations", nargs="+", help="names of the operations to measure; default: all")
    parser.add_argument("--magnitudes", nargs="+", type=float, default=MAGNITUDES, help="magnitudes of the inputs")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="number of seeds, from 0 on")
    parser.add_argument("--out", type=Path, help="Markdown file; the default, in benchmarks/results, is for the whole table")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = operations(device)
    if arguments.operations is not None:
        unknown = set(arguments.operations) - {o.name for o in chosen}
        if unknown:
            parser.error(f"there is no operation {', '.join(sorted(unknown))}, only {', '.join(o.name for o in chosen)}")
        chosen = [o for o in chosen if o.name in arguments.operations]
    table, broken = Table(*HEADER), []
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    # NumPy warns of overflows in the interpreter; the results show them already.
    with _as_the_suite(), np.errstate(over="ignore", invalid="ignore"):
        for operation in chosen:
            for dtype in DTYPES:
                errors = measure(operation, dtype, device, arguments.magnitudes, arguments.seeds)
                row = rows(operation.name, dtype, errors)
                table.add_row(*row)
                lines.append(f"| {' | '.join(row)} |")
                for e in errors:
                    if not e.within:
                        where = f"{operation.name} in {row[1]}, {e.name} at {e.magnitude:.0e}"
                        broken.append(f"{where}: {e.ours:.2f} units, PyTorch's {e.peer:.2f}, allowed {e.allowed:.2f}")
    Console().print(environment(device), table)
    slug = gpu_slug(torch.cuda.get_device_name()) if device.type == "cuda" else "cpu-interpreter"
    path = arguments.out or RESULTS / f"accuracy-{slug}.md"
    whole = (len(chosen), [*arguments.magnitudes], arguments.seeds) == (len(operations(device)), [*MAGNITUDES], SEEDS)
    if not (whole or arguments.out):
        print(f"This is a part of the table: {path} stays as it is; --out FILE writes this part.")
        sys.exit(_verdict(broken))
    explained = (__doc__ or "").split("\n\n", 1)[1]
    seen = f"{environment(device)}; {arguments.seeds} seeds."
    path.write_text("\n".join([f"# Accuracy\n\n{explained}\n{seen}\n", *lines, ""]), encoding="utf-8")
    print(path)
    sys.exit(_verdict(broken))


if __name__ == "__main__":
    main()
