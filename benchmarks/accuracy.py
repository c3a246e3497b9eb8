"""How exact every operation is: the worst error against float64 over magnitudes from 1e-6 to 1e4, beside PyTorch's own.

``python -m benchmarks.accuracy`` runs the cases of :mod:`benchmarks.cases` and a few more, forward and every gradient, from
several seeds: on a CUDA GPU at AlexNet's sizes, else in Triton's interpreter on small tensors.

**Unit.** An error is counted in units in the last place that the largest exact value of its tensor has in the result's dtype,
so 0.5 is a correctly rounded result. Below the smallest normal number the unit stays what it is there. An infinity counts as
the power of 2 after the dtype's largest number, and an exact value beyond that as that too: to be infinite where the exact
result rounds to infinity is no error, to be finite there, or infinite elsewhere, is one of as many units as it is far.

**Rule.** For each result, dtype and magnitude the largest error of all seeds may be twice the largest that PyTorch makes of the
same tensors in the same dtype on the same device, plus half a unit (eight units in float32 on a GPU, see tests/oracle.py); the
exit code is 1 where it is more. One seed would compare two accidents: of a few float32 sums PyTorch's largest error is anything
from 0.3 to 2.5 units. So PyTorch's is the largest of all magnitudes in float32 and bfloat16, whose range nothing here comes
near: there another magnitude only rounds anew. In float16 every magnitude is held to PyTorch's error at that magnitude. Where
PyTorch itself gives infinity or NaN for what fits the dtype, more than a unit from its end, its error is shown as inf, and
those elements, computed in float32 and rounded once, take their own place in the rule.

**Threads.** On the CPU PyTorch runs in one thread. With more it splits long sums among them, and shorter chains of additions
err less: its weight gradients then depend on the machine, and so would the verdict.

**Decisions.** A ReLU whose argument is as good as zero, or a window with two maxima, passes a whole gradient or another one as
rounding will have it, in PyTorch as here. The output's gradient is zero at those, so that errors are those of arithmetic.

A resized image errs by tens of units in float32, in PyTorch as here: a pixel's coordinate, rounded to float32, decides how much
of each neighbour it takes.
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

# Triton decides when a kernel is decorated, so this comes before anything imports ``kernels``.
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

#: Of inputs and of the gradients that come in; weights are of a trained network's size, see :class:`benchmarks.cases.Case`.
MAGNITUDES = tuple(10.0**exponent for exponent in range(-6, 5, 2))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEEDS = 5

#: Half units always allowed; more where a GPU's thread adds up in one chain what a library splits: see tests/oracle.py.
_HALF_UNITS = {torch.float32: 16 if torch.cuda.is_available() else 1, torch.float16: 1, torch.bfloat16: 1}


@dataclasses.dataclass(frozen=True)
class Result:
    """One of an operation's results.

    Attributes:
        name: which.
        ours: of our kernels.
        peer: PyTorch's, in the same dtype.
        wide: PyTorch's in float32.
        exact: float64's.
    """

    name: str
    ours: Tensor
    peer: Tensor
    wide: Tensor
    exact: Tensor


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation and how its results are made on a device, in a dtype, at a magnitude."""

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
        allowed: what ours may be.
    """

    name: str
    magnitude: float
    ours: float
    peer: float
    allowed: float

    @property
    def within(self) -> bool:
        """Whether the rule is kept."""
        return self.ours <= self.allowed


def units(result: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The largest error in units in the last place that the largest exact value has in ``dtype``.

    For infinities see the module; inf where one is NaN and the other is not.
    """
    if not torch.equal(result.isnan(), exact.isnan()):
        return math.inf
    info = torch.finfo(dtype)
    end = 2.0 ** math.frexp(info.max)[1]
    bounded, due = (t.double().nan_to_num(0.0).clamp(-end, end) for t in (result, exact))
    largest = min(max(due.abs().max().item(), info.tiny), info.max)
    return (bounded - due).abs().max().item() / (info.eps * 2.0 ** math.floor(math.log2(largest)))


def overflows_early(result: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Where ``result`` is infinite or NaN where ``exact`` fits ``dtype``, by more than a unit."""
    info = torch.finfo(dtype)
    return ~result.isfinite() & (exact.abs() < info.max * (1 - info.eps))


def _undecided(case: Case, tensors: list[Tensor]) -> Tensor:
    """Where rounding may decide a fused case's ReLU or maximum: a mask of its output.

    Up to two units of the value in the tensors' dtype, plus sixteen of the largest value in float32, in which sums are formed.
    """
    dtype = tensors[0].dtype
    layer, _, rest = case.name.partition("_")
    plain = next(c for c in PLAIN_CASES if c.name == layer)
    before = plain.meaning(*(t.detach().double() for t in tensors))
    # A ReLU alone is a window of one, beside which there is nothing.
    windows = before.unfold(2, 3, 2).unfold(3, 3, 2).flatten(-2) if rest == POOL_BLOCK else before.unsqueeze(-1)
    top, second = F.pad(windows, (0, 1), value=-math.inf).topk(2).values.unbind(-1)
    info = torch.finfo(dtype)
    near = 2 * info.eps * top.abs().clamp(min=info.tiny) + 16 * torch.finfo(torch.float32).eps * before.abs().max()
    return (top.abs() < near) | ((top > 0) & (top - second < near))


def _results(case: Case, tensors: list[Tensor], magnitude: float) -> list[Result]:
    """Output and gradients of ``case``, for an output's gradient of ``magnitude``."""
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
    """Two convolutions, whose channels are enough for tensor descriptors in half precision on small tensors too.

    The first bias decides the ReLU, for one half of the channels each way, as no mask of the output's gradient can.
    """
    case = Case("linked_conv2d", (384, 12, 12), (384, 384, 3, 3), _linked, _unlinked, ((16, 5, 4), (16, 16, 3, 3)))
    case, batch = (case, 16) if device.type == "cuda" else (case.shrunk(), 2)
    x, w1, b1 = (t.detach() for t in case.tensors(batch, dtype, device))
    sign = torch.where(torch.arange(len(b1), device=device) % 2 == 0, 1.0, -1.0)
    w2 = to_channels_last(torch.randn_like(w1) * w1[0].numel() ** -0.5)
    given = [x * magnitude, w1 / 4, (sign * 4 * magnitude).to(dtype), w2, b1 * magnitude]
    return _results(case, [t.requires_grad_() for t in given], magnitude)


def _gather_resize(device: torch.device, dtype: torch.dtype, magnitude: float) -> list[Result]:
    """Pixels are bytes: the magnitude is that of what they are divided by."""
    images = torch.randint(0, 256, (9, 28, 28), dtype=torch.uint8, device=device)
    index, size, std = torch.tensor([3, 0, 8, 3], device=device), 45, 1 / magnitude
    ours = kernels.gather_resize(images, index, size, dtype=dtype, mean=0.3, std=std)
    kinds = (dtype, torch.float32, torch.float64)
    others = [gather_resize_reference(images, index, size, dtype=kind, mean=0.3, std=std) for kind in kinds]
    return [Result("output", ours, *others)]


def _sgd(device: torch.device, dtype: torch.dtype, magnitude: float) -> list[Result]:
    """A step with momentum and weight decay; with a float32 master for half types, as :mod:`kernels.sgd` has it."""
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
    """Every public operation: at AlexNet's sizes on a GPU, on small tensors elsewhere."""
    cases, batch = list(CASES), 16
    if device.type != "cuda":
        shrunk: dict[object, Case] = {}
        for case in cases:
            # Layers that become the same small case are one.
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
        if dtype != torch.float16:  # wide enough that a magnitude only rounds anew
            yardstick = max(values[2] for (other, _), values in largest.items() if other == name)
        errors.append(Error(name, magnitude, ours, peer, 2 * yardstick + 0.5 * _HALF_UNITS[dtype]))
    return errors


def environment(device: torch.device) -> str:
    """Where the errors were measured, with versions."""
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}"
    python = f"NumPy {np.__version__}, Python {platform.python_version()}"
    cpu = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return f"Triton's interpreter and PyTorch's CPU operations in one thread, {cpu}, small tensors; {versions}, {python}"


HEADER = ("operation", "dtype", "error, units", "PyTorch's", "in", "at magnitude", "PyTorch's worst")


def rows(name: str, dtype: torch.dtype, errors: Sequence[Error]) -> tuple[str, ...]:
    """The table's row of an operation in one dtype: ours at its worst, and what is beyond the rule before what is not."""
    worst = max(errors, key=lambda e: (not e.within, e.ours))
    peer = max(e.peer for e in errors)
    values = (f"{worst.ours:.2f}", f"{worst.peer:.2f}", worst.name, f"{worst.magnitude:.0e}", f"{peer:.2f}")
    return (name, str(dtype).removeprefix("torch."), *values)


def _verdict(broken: list[str]) -> str | int:
    return "\n".join(["accuracy: beyond the rule:", *broken]) if broken else 0


@contextlib.contextmanager
def _as_the_suite() -> Iterator[None]:
    """Float32 products exact, so that float32 is held to float32's error; in one thread. Afterwards as it was."""
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
    """Measure, print and write the table; exit with 1 where the rule is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--operations", nargs="+", help="names of those to measure; all by default")
    parser.add_argument("--magnitudes", nargs="+", type=float, default=MAGNITUDES, help="of the inputs")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, from 0 on")
    parser.add_argument("--out", type=Path, help="of the Markdown file; by default, of the whole table, in benchmarks/results")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = operations(device)
    if arguments.operations is not None:
        unknown = set(arguments.operations) - {o.name for o in chosen}
        if unknown:
            parser.error(f"no operation {', '.join(sorted(unknown))}; there are {', '.join(o.name for o in chosen)}")
        chosen = [o for o in chosen if o.name in arguments.operations]
    table, broken = Table(*HEADER), []
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    # An overflow in the interpreter is NumPy's: the result is looked at, not the warning.
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
        print(f"a part of the table: {path} stays; --out writes one")
        sys.exit(_verdict(broken))
    explained = (__doc__ or "").split("\n\n", 1)[1]
    seen = f"{environment(device)}; {arguments.seeds} seeds."
    path.write_text("\n".join([f"# Accuracy\n\n{explained}\n{seen}\n", *lines, ""]), encoding="utf-8")
    print(path)
    sys.exit(_verdict(broken))


if __name__ == "__main__":
    main()
