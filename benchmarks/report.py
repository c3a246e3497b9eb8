"""One command that tells the whole truth on a CUDA machine.

``python -m benchmarks.report [--quick] [--out DIR]`` measures, in this order: the machine and its ceilings; each operation at
AlexNet's shapes; fused operations against the run of separate ones; the whole training step and inference; each against every
peer. Nothing is timed before it is verified against float64: a wrong result is reported as wrong and gets no time. Results
are written after each section, so a run that is cut off is still useful, and what the time limit left out is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from torch import Tensor

from .cases import FUSED_CASES, PLAIN_CASES, Case, case_flops, pass_bytes, passes, runner, verify
from .networks import ALEXNET, OURS, PEERS, TUNED, Network, batch_of, build, network_flops, step_function, verify_network
from .timing import CudaTimer, FakeTimer, NoGraph, Timer, captured, own_stream

RESULTS = Path(__file__).parent / "results"

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        minutes: after how long no new measurement is begun.
        compile_backend: in place of Inductor, for tests.
    """

    device: torch.device
    timer: Timer
    minutes: float
    batches: tuple[int, ...] = (128, 1024)
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    step_batches: tuple[int, ...] = (128, 1024, 1)
    plain_cases: tuple[Case, ...] = PLAIN_CASES
    fused_cases: tuple[Case, ...] = FUSED_CASES
    network: Network = ALEXNET
    compile_backend: str = "inductor"


def quick(settings: Settings) -> Settings:
    """The same at one batch size and in one dtype."""
    return dataclasses.replace(settings, minutes=2.7, batches=(128,), dtypes=("bfloat16",), step_batches=(128,))


class Report:
    """The results so far, and the file they are written to."""

    def __init__(self, settings: Settings, out: Path, console: Console) -> None:
        self.settings, self.out, self.console = settings, out, console
        self.deadline = time.monotonic() + settings.minutes * 60
        self.content: dict[str, Any] = {"environment": environment(settings), "ceilings": {}, "rows": [], "left_out": []}

    @property
    def path(self) -> Path:
        """``<gpu>.json``."""
        name = self.content["environment"]["gpu"].lower().replace("nvidia ", "").replace(" ", "-").replace("/", "-")
        return self.out / f"{name}.json"

    def write(self) -> None:
        """What there is, whole: a reader never sees half a file."""
        self.out.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)

    def in_time(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time for one more measurement of about ``seconds``; else notes that it was left out."""
        if time.monotonic() + seconds < self.deadline:
            return True
        self.content["left_out"].append(what)
        return False

    def add(self, **row: Any) -> None:
        """One row; it is printed too."""
        self.content["rows"].append(row)
        value = "" if row["ms"] is None else f"{row['ms']:.4f} ms"
        note = f"  {row['note']}" if row.get("note") else ""
        labels = " ".join(str(row[key]) for key in ("section", "case", "pass", "dtype", "batch", "impl"))
        self.console.print(f"{labels}: {value}{note}", markup=False)


def _command(*arguments: str) -> str:
    try:
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(settings: Settings) -> dict[str, Any]:
    """The machine, the versions, the commit, the timer."""
    cuda = settings.device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(settings.device) if cuda else f"no GPU ({platform.machine()})",
        "multiprocessors": torch.cuda.get_device_properties(settings.device).multi_processor_count if cuda else None,
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "commit": _command("git", "rev-parse", "HEAD"),
        "changed_files": len([line for line in _command("git", "status", "--porcelain").splitlines() if line != "unknown"]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "timer": settings.timer.name,
    }


def measure_ceilings(settings: Settings, size: int = 8192, copy_bytes: int = 2**30) -> dict[str, float]:
    """What this GPU does at best: a large bfloat16 product in TFLOP/s, a large copy in TB/s (bytes read and written)."""
    a, b = (torch.randn(size, size, device=settings.device).to(torch.bfloat16) for _ in range(2))
    product = settings.timer(lambda: a @ b)
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    copy = settings.timer(lambda: target.copy_(source))
    return {"bf16_tflops": 2 * size**3 / product.ms / 1e9, "copy_tbps": 2 * copy_bytes / copy.ms / 1e9}


@contextmanager
def _float32_on_tensor_cores() -> Iterator[None]:
    """TF32 for both implementations, and cuDNN free to choose its fastest algorithm."""
    backends: Any = torch.backends  # some of its attributes are made at run time
    conv, matmul, benchmark = backends.cudnn.conv, backends.cuda.matmul, backends.cudnn.benchmark
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = "tf32"
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = before
        torch.backends.cudnn.benchmark = benchmark


def _peak_mb(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None


def _add_timed(report: Report, prepare: Callable[[], tuple[Callable[[], object], str | None]], row: dict[str, Any]) -> None:
    """Time what ``prepare`` makes, which may come with a note, and add its row; a failure is a row with its reason."""
    settings = report.settings
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(settings.device)
    try:
        function, note = prepare()
        function()
        timing = settings.timer(function)
    except RuntimeError as error:
        report.add(**row, ms=None, p20=None, p80=None, images_per_s=None, peak_mb=None, note=str(error).splitlines()[0])
        return
    images_per_s = row["batch"] / timing.ms * 1e3
    numbers = dataclasses.asdict(timing) | {"images_per_s": images_per_s, "peak_mb": _peak_mb(settings.device)}
    report.add(**row, **numbers, note=note)


def _add_wrong(report: Report, row: dict[str, Any], why: str) -> None:
    report.add(**row, ms=None, p20=None, p80=None, images_per_s=None, peak_mb=None, note=why)


def _first_line(error: BaseException) -> str:
    return f"WRONG: {(str(error).splitlines() or [type(error).__name__])[0]}"


#: (name, function, its tensors)
Implementation = tuple[str, Callable[..., Tensor], list[Tensor]]


def _implementations(report: Report, case: Case, tensors: list[Tensor], compiled: bool) -> Iterator[Implementation]:
    """Ours and each peer of an operation."""
    yield OURS, case.ours, tensors
    if tensors[0].dim() == 4:
        yield "torch_nchw", case.theirs, [t.detach().contiguous().requires_grad_() for t in tensors]
        yield "torch_channels_last", case.theirs, tensors
    else:
        yield "torch", case.theirs, tensors
    if compiled:
        torch.compiler.reset()
        yield "torch_compile", torch.compile(case.theirs, backend=report.settings.compile_backend), tensors
    if importlib.util.find_spec("flag_gems") is not None:
        import flag_gems  # type: ignore[import-not-found]

        def gems(*arguments: Tensor) -> Tensor:
            with flag_gems.use_gems():
                return case.theirs(*arguments)

        yield "flag_gems", gems, tensors


def measure_operations(report: Report, section: str, cases: tuple[Case, ...]) -> None:
    """Every case in every dtype and batch, each pass, against each peer; nothing of a case whose results are wrong."""
    settings = report.settings
    for dtype_name in settings.dtypes:
        for batch in settings.batches:
            for case in cases:
                label = {"section": section, "case": case.name, "dtype": dtype_name, "batch": batch}
                if not report.in_time(" ".join(map(str, label.values()))):
                    continue
                torch.manual_seed(0)
                tensors = case.tensors(batch, DTYPES[dtype_name], settings.device)
                wrong = None
                try:
                    verify(case, tensors)
                except (AssertionError, RuntimeError) as error:
                    wrong = _first_line(error)
                # Inductor takes seconds a case: only where the fused operations are to be judged, and in one dtype.
                compiled = section == "fused" and dtype_name == settings.dtypes[0]
                for impl, function, own in _implementations(report, case, tensors, compiled):
                    for which in passes(case):
                        row = label | {"impl": impl, "pass": which, "verified": wrong is None if impl == OURS else None}
                        row |= {"flops": case_flops(case, batch), "bytes": pass_bytes(case, batch, which, tensors[0])}
                        if impl == OURS and wrong is not None:
                            _add_wrong(report, row, wrong)
                        else:
                            _add_timed(report, _operation(settings.device, function, which, own), row)


def _operation(
    device: torch.device, function: Callable[..., Tensor], which: str, tensors: list[Tensor]
) -> Callable[[], tuple[Callable[[], object], str | None]]:
    """Prepares one pass of an operation: from a CUDA graph where it can be captured, so that only the GPU's work is timed."""

    def prepare() -> tuple[Callable[[], object], str | None]:
        eager = runner(function, which, tensors)
        try:
            return captured(eager, device), None
        except NoGraph as error:
            return eager, f"timed without a CUDA graph: {error}"

    return prepare


#: Seconds that Inductor takes to tune a step of AlexNet, roughly: none is begun with less time left.
_TUNING_SECONDS = 100.0


def measure_steps(report: Report, implementations: Sequence[str], batches: Sequence[int]) -> None:
    """The training step and inference in the first dtype: each implementation, eager and as a CUDA graph."""
    settings = report.settings
    dtype = DTYPES[settings.dtypes[0]]
    wrong = None
    if OURS in implementations:
        try:
            verify_network(settings.network, dtype, settings.device)
        except (AssertionError, RuntimeError) as error:
            wrong = _first_line(error)
    for implementation in implementations:
        seconds = _TUNING_SECONDS if implementation == TUNED and settings.compile_backend == "inductor" else 0.0
        for batch in batches:
            for mode in ("train", "infer"):
                if not report.in_time(f"step {implementation} {mode} {batch}", seconds):
                    continue
                label = {"section": "step", "case": "network", "dtype": settings.dtypes[0], "batch": batch, "pass": mode}
                label["verified"] = wrong is None if implementation == OURS else None
                if implementation == OURS and wrong is not None:
                    _add_wrong(report, label | {"impl": OURS}, wrong)
                else:
                    _measure_step(report, implementation, label, dtype)


def _measure_step(report: Report, implementation: str, label: dict[str, Any], dtype: torch.dtype) -> None:
    settings = report.settings
    torch.compiler.reset()
    net, autocast = build(settings.network, implementation, dtype, settings.device, settings.compile_backend)
    image_dtype = torch.float32 if autocast else dtype
    images, labels = batch_of(settings.network, label["batch"], image_dtype, settings.device)
    step = step_function(net, autocast, dtype, label["pass"], images, labels)
    _add_timed(report, lambda: (step, None), label | {"impl": implementation})
    _add_timed(report, lambda: (captured(step, settings.device), None), label | {"impl": f"{implementation}_graph"})


def run(settings: Settings, out: Path, console: Console, ceiling_size: int = 8192, copy_bytes: int = 2**30) -> Path:
    """Measure everything, writing after each section; the path of the JSON.

    Raises:
        ValueError: fake times would land among the real results.
    """
    if isinstance(settings.timer, FakeTimer) and out.resolve().is_relative_to(RESULTS.resolve()):
        raise ValueError(f"fake times do not belong into {out}")
    report = Report(settings, out, console)
    console.print_json(json.dumps(report.content["environment"]))
    cheap = [name for name in (OURS, *PEERS) if name != TUNED]
    first, *others = settings.step_batches or (None,)
    # What tells most comes first; Inductor's tuning takes longest, so all but its first batch size come last.
    sections: list[Callable[[], None]] = [
        lambda: measure_steps(report, cheap, settings.step_batches),
        lambda: measure_steps(report, [TUNED], [] if first is None else [first]),
        lambda: measure_operations(report, "fused", settings.fused_cases),
        lambda: measure_operations(report, "plain", settings.plain_cases),
        lambda: measure_steps(report, [TUNED], others),
    ]
    with _float32_on_tensor_cores(), own_stream(settings.device):
        report.content["ceilings"] = measure_ceilings(settings, ceiling_size, copy_bytes)
        forward, step = network_flops(settings.network, 1)
        parameters = sum(p.numel() for p in settings.network.reference().parameters())
        report.content["network"] = {"forward_flops": forward, "step_flops": step, "parameters": parameters}
        report.write()
        for section in sections:
            section()
            report.write()
    return report.path


def main() -> None:
    """Measure on the CUDA GPU of this machine, then render tables and plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--quick", action="store_true", help="batch 128 in bfloat16 only, under three minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of <gpu>.json, tables and plots")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no new measurement after this long")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("report: there is no CUDA GPU here; what can be known without one: python -m benchmarks.audit")
    settings = Settings(torch.device("cuda"), CudaTimer(), arguments.minutes)
    if arguments.quick:
        settings = quick(settings)
    console = Console(soft_wrap=True, highlight=False)
    path = run(settings, arguments.out, console)
    from .render import render_results

    for written in render_results(path, arguments.out):
        console.print(str(written))


if __name__ == "__main__":
    main()
