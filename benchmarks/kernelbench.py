"""Two networks of KernelBench through :func:`alexnet_triton.fuse`: verified, then timed.

``python -m benchmarks.kernelbench [--json FILE]`` runs AlexNet and LeNet-5, problems 5 and 4 of level 3 of KernelBench
(https://github.com/ScalingIntelligence/KernelBench), rewritten here with the same layers, batches and random images, in two
styles of writing a class. They run as in KernelBench: forward, without gradients, as constructed (in training mode; AlexNet's
dropout has p = 0).

On a CUDA GPU each network runs in three precisions: ``float32`` with exact products (the default of linear layers), ``tf32``,
and ``bfloat16`` for weights and images. Ours, eager and as a CUDA graph, is compared with eager PyTorch and ``torch.compile``
in its default mode and in ``reduce-overhead``. The results are written to ``benchmarks/results/kernelbench/<gpu>.json``.
Without a GPU only ours is verified, at a small batch: in Triton's interpreter under ``TRITON_INTERPRET=1``, else on the PyTorch
reference.

No speed is reported for a wrong result. The error of every implementation against float64 may be twice eager PyTorch's own in
the same precision, plus the rounding of the result. This is tested with PyTorch's initial weights, which KernelBench uses, and
with weights of He's variance: with the initial weights AlexNet's logits are about 0.008 and differ by 0.0001 between images,
less than bfloat16 can resolve. Ours must also launch at least one kernel for each convolution and linear layer. KernelBench's
own test is reported too: whether ``torch.allclose`` to eager holds with both tolerances at 1e-4 and at 1e-2.

The exit status is 0 if everything was verified and, on a GPU, timed; else 1.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from alexnet_triton import fuse
from kernels.configs.tables import gpu_slug
from kernels.runtime import backend, launch

from .cases import unit
from .networks import OURS
from .report import RESULTS, Report, Settings, float32_products, gpu_name, reason
from .timing import CudaTimer, FakeTimer, captured, own_stream

#: Number of batches of images that are verified on a GPU, for each kind of weights.
SEEDS = 3

#: KernelBench's tolerances; each is both the absolute and the relative one.
TOLERANCES = (1e-4, 1e-2)

#: name -> (dtype of weights and images, how float32 products are formed).
PRECISIONS: dict[str, tuple[torch.dtype, Literal["tf32", "ieee"]]] = {
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bfloat16": (torch.bfloat16, "ieee"),
}

EAGER = "eager"
#: Ours as a CUDA graph.
GRAPH = f"{OURS}_graph"
#: name -> mode of torch.compile.
COMPILED = {"compile_default": "default", "compile_reduce_overhead": "reduce-overhead"}

NOT_TIMED = "not timed: no CUDA GPU"


class AlexNet(nn.Module):
    """AlexNet for color images of 224 x 224, every layer an attribute of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4, padding=2)
        self.relu1 = nn.ReLU(inplace=True)
        self.pool1 = nn.MaxPool2d(3, 2)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2)
        self.relu2 = nn.ReLU(inplace=True)
        self.pool2 = nn.MaxPool2d(3, 2)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.relu3 = nn.ReLU(inplace=True)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1)
        self.relu4 = nn.ReLU(inplace=True)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1)
        self.relu5 = nn.ReLU(inplace=True)
        self.pool5 = nn.MaxPool2d(3, 2)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.relu6 = nn.ReLU(inplace=True)
        self.dropout6 = nn.Dropout(0.0)
        self.fc7 = nn.Linear(4096, 4096)
        self.relu7 = nn.ReLU(inplace=True)
        self.dropout7 = nn.Dropout(0.0)
        self.fc8 = nn.Linear(4096, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of 1,000 classes."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.conv3(x))
        x = self.relu4(self.conv4(x))
        x = self.pool5(self.relu5(self.conv5(x)))
        x = torch.flatten(x, start_dim=1)
        x = self.dropout6(self.relu6(self.fc6(x)))
        x = self.dropout7(self.relu7(self.fc7(x)))
        return self.fc8(x)


class LeNet5(nn.Module):
    """LeNet-5 for grey images of 32 x 32: modules for layers with weights, functions for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 20)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of 20 classes."""
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(conv(x)), kernel_size=2, stride=2)
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem of KernelBench.

    Attributes:
        name: of the network.
        make: makes the network with random weights.
        image: shape of an image.
        batch: KernelBench's batch size.
        small: batch size for the interpreter.
    """

    name: str
    make: Callable[[], nn.Module]
    image: tuple[int, int, int]
    batch: int
    small: int


PROBLEMS = (
    Problem("level3-5-alexnet", AlexNet, (3, 224, 224), 1024, 1),
    Problem("level3-4-lenet5", LeNet5, (1, 32, 32), 4096, 16),
)


def products(net: nn.Module) -> int:
    """Number of convolutions and linear layers of a network."""
    return sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules())


@dataclasses.dataclass(frozen=True)
class Trial:
    """Weights and images with their expected output.

    Attributes:
        of_kernelbench: whether weights and images are KernelBench's.
        weights: a state dict.
        images: the input.
        exact: the plain network's output in float64.
        peer: its output in the precision under test.
    """

    of_kernelbench: bool
    weights: dict[str, Tensor]
    images: Tensor
    exact: Tensor
    peer: Tensor


def make_trials(problem: Problem, device: torch.device, dtype: torch.dtype, batch: int, seeds: int) -> list[Trial]:
    """A trial per seed with He's weights (normal images), then with PyTorch's (images uniform in [0, 1], as KernelBench's)."""
    trials = []
    for of_kernelbench, images_of in ((False, torch.randn), (True, torch.rand)):
        torch.manual_seed(0)
        net = problem.make()
        if not of_kernelbench:
            for parameter in net.parameters():
                if parameter.dim() > 1:
                    nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        net = net.to(device, dtype)
        exact = copy.deepcopy(net).double()
        for seed in range(seeds):
            torch.manual_seed(seed)
            images = images_of(batch, *problem.image, device=device).to(dtype)
            trials.append(Trial(of_kernelbench, net.state_dict(), images, exact(images.double()), net(images)))
    return trials


def verify(trial: Trial, output: Tensor, layers: int) -> tuple[float, float]:
    """Check ``output`` and return its largest error and PyTorch's: at most twice as large, plus the rounding of the result.

    As in ``tests/oracle.py``, float32 on a GPU is allowed sixteen times that rounding: cuBLAS and cuDNN may split a sum that
    our kernel adds up in one chain. Where TF32 is allowed PyTorch may still multiply exactly, so the rounding is allowed once
    for each of the ``layers`` with a product.

    Raises:
        AssertionError: the error is larger, or shape, dtype or strides are not PyTorch's.
    """
    if output.shape != trial.exact.shape or output.dtype != trial.peer.dtype or output.stride() != trial.peer.stride():
        given, due = (f"{tuple(t.shape)} {t.dtype} with strides {t.stride()}" for t in (output, trial.peer))
        raise AssertionError(f"the output is {given}, expected {due}")
    error, peer_error = ((t.double() - trial.exact).abs().max().item() for t in (output, trial.peer))
    dtype = output.dtype
    chain = layers if unit(dtype) > torch.finfo(dtype).eps else 16 if dtype == torch.float32 and output.is_cuda else 1
    allowed = 2 * peer_error + 0.5 * chain * unit(dtype) * trial.exact.abs().max().item()
    if not error <= allowed:
        raise AssertionError(f"error {error:.3e} against float64, allowed {allowed:.3e}")
    return error, peer_error


def judge(net: Callable[[Tensor], Tensor], module: nn.Module, trials: Sequence[Trial]) -> dict[str, Any]:
    """Verify ``net``, which runs ``module``, on each trial; ``module`` keeps the last trial's weights.

    Returns:
        The largest ratio of its error to eager PyTorch's, KernelBench's verdicts, and our launches per call.

    Raises:
        AssertionError: an output is wrong.
    """
    worst, close, launched = 0.0, dict.fromkeys(TOLERANCES, True), [0]

    def count(*_: object) -> None:
        launched[0] += 1

    for trial in trials:
        module.load_state_dict(trial.weights)
        with launch.observe_launches(count):
            output = net(trial.images)
        error, peer_error = verify(trial, output, products(module))
        worst = max(worst, error / peer_error if peer_error else 1.0)
        if trial.of_kernelbench:
            close = {t: close[t] and torch.allclose(output, trial.peer, rtol=t, atol=t) for t in TOLERANCES}
    verdicts = {f"allclose_{t:.0e}": ok for t, ok in close.items()}
    return {"error_over_eager": round(worst, 3), "launches": launched[0] // len(trials), **verdicts}


def _graph(net: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """``net`` as a CUDA graph. A call copies its images into the graph's input, as ``reduce-overhead`` does."""
    given = torch.empty_like(images)
    outputs: list[Tensor] = []
    replay = captured(lambda: outputs.append(net(given)), images.device)

    def call(images: Tensor) -> Tensor:
        given.copy_(images)
        replay()
        return outputs[-1]

    return call


def implementation(name: str, net: nn.Module, images: Tensor, compile_backend: str) -> Callable[[Tensor], Tensor]:
    """The implementation ``name`` of ``net``; ``images`` have the shape and dtype of its later inputs.

    Raises:
        NoGraph: ours cannot be captured.
    """
    if name == EAGER:
        return net
    if name in COMPILED:
        torch.compiler.reset()
        # Only Inductor has modes.
        return torch.compile(net, backend=compile_backend, mode=COMPILED[name] if compile_backend == "inductor" else None)
    net = fuse(net)
    return _graph(net, images) if name == GRAPH else net


def measure(report: Report, problem: Problem, precision: str, timed: bool) -> None:
    """Measure every implementation of a network in one precision; without ``timed`` only verify ours."""
    settings = report.settings
    batch = problem.batch if timed else problem.small
    dtype, float32 = PRECISIONS[precision]
    with float32_products(float32), torch.no_grad():
        trials = make_trials(problem, settings.device, dtype, batch, SEEDS if timed else 1)
        for name in (OURS, GRAPH, EAGER, *COMPILED) if timed else (OURS,):
            labels = {"section": "kernelbench", "case": problem.name, "dtype": precision, "batch": batch, "pass": "forward"}
            if report.in_time(f"{problem.name} {precision} {name}"):
                _measure(report, labels | {"impl": name}, problem.make().to(settings.device, dtype), trials, timed)
                report.write()


def _measure(report: Report, labels: dict[str, Any], module: nn.Module, trials: Sequence[Trial], timed: bool) -> None:
    """Verify an implementation of ``module``, then time it with the last trial's weights, which are KernelBench's own."""
    settings, images = report.settings, trials[-1].images
    row, layers = labels | {"verified": None}, products(module)
    try:
        net = implementation(row["impl"], module, images, settings.compile_backend)
        row |= judge(net, module, trials)
        if row["impl"] == OURS and backend.runs_triton(images) and row["launches"] < layers:
            raise AssertionError(f"{row['launches']} launches for {layers} convolutions and linear layers: it is not fused")
        row["verified"] = True
        if row["impl"] == GRAPH:
            row["launches"] = None  # a replay's launches cannot be counted
        if timed:
            report.add_timed(row, lambda: net(images), None)
        else:
            report.add_untimed(row, NOT_TIMED)
    except Exception as error:  # an error of one implementation does not stop the others
        if isinstance(error, AssertionError):
            report.add_untimed(row | {"verified": False}, f"WRONG: {reason(error)}")
        else:
            report.add_untimed(row, reason(error))


def table(rows: Sequence[dict[str, Any]], timed: bool) -> Table:
    """The rows as a table; speed is relative to eager PyTorch."""
    eager = {(r["case"], r["dtype"]): r["ms"] for r in rows if r["impl"] == EAGER}
    title = "milliseconds are medians; speed: eager PyTorch is 1" if timed else NOT_TIMED
    result = Table(title=f"KernelBench, {title}", title_justify="left")
    for header in ("network", "precision", "batch", "implementation", "verified", "error / eager's"):
        result.add_column(header, no_wrap=True)
    for header in (*(f"allclose {t:.0e}" for t in TOLERANCES), "launches", "ms", "images/s", "speed", "note"):
        result.add_column(header)
    for r in rows:
        verified = {None: "no", True: "yes", False: "WRONG"}[r["verified"]]
        judged = [r.get(key) for key in ("error_over_eager", *(f"allclose_{t:.0e}" for t in TOLERANCES), "launches")]
        peer = eager.get((r["case"], r["dtype"]))
        speed = f"{peer / r['ms']:.2f}" if peer and r["ms"] else None
        times = [None, None] if r["ms"] is None else [f"{r['ms']:.3f}", f"{r['images_per_s']:,.0f}"]
        cells = [r["case"], r["dtype"], r["batch"], r["impl"], verified, *judged, *times, speed, r["note"]]
        result.add_row(*("" if cell is None else str(cell) for cell in cells))
    return result


def run(settings: Settings, path: Path | None, console: Console, timed: bool, problems: Sequence[Problem] = PROBLEMS) -> bool:
    """Measure ``problems`` in the precisions of ``settings`` and write ``path``; return whether all were verified and timed."""
    report = Report(settings, path, console)
    with own_stream(settings.device):
        for problem in problems:
            for precision in settings.dtypes:
                measure(report, problem, precision, timed)
    rows, left_out = report.content["rows"], report.content["left_out"]
    console.print(table(rows, timed))
    if left_out:
        console.print(f"left out for lack of time: {', '.join(left_out)}")
    return not left_out and all(r["verified"] and (r["ms"] is not None or not timed) for r in rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="file of the results; on a GPU benchmarks/results/kernelbench/<gpu>.json"
    )
    parser.add_argument("--network", nargs="+", choices=[p.name for p in PROBLEMS], help="only these networks")
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), help="only these precisions")
    parser.add_argument("--minutes", type=float, default=4.0, help="begin no new measurement after this many minutes")
    arguments = parser.parse_args(argv)
    timed = torch.cuda.is_available()
    device = torch.device("cuda" if timed else "cpu")
    # The CPU has no TF32.
    precisions = arguments.precision or [p for p in PRECISIONS if timed or p != "tf32"]
    # The interpreter gets no time limit.
    minutes = arguments.minutes if timed else math.inf
    settings = Settings(device, CudaTimer() if timed else FakeTimer(), minutes, dtypes=tuple(precisions))
    path = arguments.json or (RESULTS / "kernelbench" / f"{gpu_slug(gpu_name(device))}.json" if timed else None)
    problems = [p for p in PROBLEMS if not arguments.network or p.name in arguments.network]
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    sys.exit(not run(settings, path, console, timed, problems))


if __name__ == "__main__":
    main()
