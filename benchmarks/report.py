"""One command that measures everything on a CUDA machine.

``python -m benchmarks.report [--quick] [--part NAME ...] [--out DIR]`` measures the machine's ceilings, the training step and
inference, each operation at AlexNet's shapes, and each fused operation against the separate ones. All of these are compared
with every peer.
bfloat16 at batch 128 comes first, then float32 at batch 128 with TF32 allowed for all, then other batches and float16. Every
implementation is verified against float64 before it is timed: a wrong result is reported as wrong and gets no time. Results are
written after each section, so an interrupted run is still useful. The report names the measurements that ran out of time.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch._functorch.config as functorch_config
import triton
from rich.console import Console
from torch import Tensor

from kernels.configs.tables import gpu_slug

from .cases import (
    FUSED_CASES,
    PLAIN_CASES,
    Case,
    Truth,
    pass_bytes,
    pass_flops,
    passes,
    runner,
    truth,
    verify,
)
from .networks import ALEXNET, OURS, PEERS, TINY, TUNED, Network, network_flops, prepare, step_function, verify_network
from .timing import CudaTimer, FakeTimer, NoGraph, Timer, captured, own_stream

RESULTS = Path(__file__).parent / "results"

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

#: The parts of a report: whole steps against every peer but the tuned one, single and fused operations against eager peers,
#: whole steps that Inductor tunes for minutes, and operations that Inductor compiles.
PARTS = ("steps", "operations", "tuned", "compiled_operations")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a report measures.

    Attributes:
        minutes: no new measurement begins after this time.
        dtypes: the most important first; the network is measured in the first two.
        parts: a choice of :data:`PARTS`; compiled operations are measured only in the first dtype and batch size.
        compile_backend: replaces Inductor, for tests.
    """

    device: torch.device
    timer: Timer
    minutes: float
    batches: tuple[int, ...] = (128, 1024)
    dtypes: tuple[str, ...] = ("bfloat16", "float32", "float16")
    step_batches: tuple[int, ...] = (128, 1024, 1)
    plain_cases: tuple[Case, ...] = PLAIN_CASES
    fused_cases: tuple[Case, ...] = FUSED_CASES
    network: Network = ALEXNET
    compile_backend: str = "inductor"
    parts: tuple[str, ...] = PARTS


def quick(settings: Settings) -> Settings:
    """``settings`` with one batch size and one dtype, without the parts for which Inductor takes minutes."""
    return dataclasses.replace(
        settings,
        minutes=2.5,
        parts=("steps", "operations"),
        batches=settings.batches[:1],
        dtypes=settings.dtypes[:1],
        step_batches=settings.step_batches[:1],
    )


def tiny(settings: Settings) -> Settings:
    """``settings`` with float32 shapes small enough for the interpreter, and a timer that times nothing."""
    return dataclasses.replace(
        settings,
        timer=FakeTimer(),
        batches=(2,),
        dtypes=("float32",),
        step_batches=(2,),
        plain_cases=(PLAIN_CASES[2].shrunk(), PLAIN_CASES[5].shrunk()),
        fused_cases=(FUSED_CASES[0].shrunk(), FUSED_CASES[-1].shrunk()),
        network=TINY,
        compile_backend="eager",
    )


class Report:
    """The results so far, and the file that they are written to, if any."""

    def __init__(self, settings: Settings, path: Path | None, console: Console) -> None:
        self.settings, self.path, self.console = settings, path, console
        self.deadline = time.monotonic() + settings.minutes * 60
        self.content: dict[str, Any] = {"environment": environment(settings), "ceilings": {}, "rows": [], "left_out": []}

    def write(self) -> None:
        """Write the results so far. The file is replaced at once, so a reader never sees half of it."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)

    def in_time(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time for a measurement of about ``seconds``; if not, record ``what`` as left out."""
        if time.monotonic() + seconds < self.deadline:
            return True
        self.content["left_out"].append(what)
        return False

    def add(self, **row: Any) -> None:
        """Add one row and print it."""
        self.content["rows"].append(row)
        value = "" if row["ms"] is None else f"{row['ms']:.4f} ms"
        note = f"  {row['note']}" if row.get("note") else ""
        labels = " ".join(str(row[key]) for key in ("section", "case", "pass", "dtype", "batch", "impl"))
        self.console.print(f"{labels}: {value}{note}", markup=False)

    def add_untimed(self, row: dict[str, Any], why: str) -> None:
        """Add a row without a time, with the reason as its note."""
        self.add(**row, ms=None, p20=None, p80=None, images_per_s=None, peak_mb=None, note=why)

    def add_timed(
        self, row: dict[str, Any], function: Callable[[], object], peak_mb: float | None, note: str | None = None
    ) -> None:
        """Add a row with the time of ``function``, which processes the row's batch."""
        timing = self.settings.timer(function)
        numbers = dataclasses.asdict(timing) | {"images_per_s": row["batch"] / timing.ms * 1e3, "peak_mb": peak_mb}
        self.add(**row, **numbers, note=note)


def printed_by(*arguments: str) -> str | None:
    """The standard output of a command run in the repository; None if the command fails."""
    try:
        result = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def commit() -> str | None:
    """Hash of the checked-out commit; None outside of a repository."""
    return printed_by("git", "rev-parse", "HEAD")


def gpu_name(device: torch.device) -> str:
    """The GPU's name, or a text that there is no GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"no GPU ({platform.machine()})"


def environment(settings: Settings) -> dict[str, Any]:
    """The machine, the versions, the commit, the timer."""
    cuda = settings.device.type == "cuda"
    changes = printed_by("git", "status", "--porcelain")
    return {
        "gpu": gpu_name(settings.device),
        "multiprocessors": torch.cuda.get_device_properties(settings.device).multi_processor_count if cuda else None,
        "driver": printed_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "commit": commit(),
        "changed_files": None if changes is None else len(changes.splitlines()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "timer": settings.timer.name,
    }


def measure_ceilings(settings: Settings, size: int = 8192, copy_bytes: int = 2**30) -> dict[str, float]:
    """Measured ceilings of this GPU: a large product in TFLOP/s, a large copy in TB/s (bytes read and written).

    The product is measured in bfloat16, and in float32 under PyTorch's switches, which allow TF32 here.
    """
    # An idle GPU runs at a low clock: keep it busy for a second first.
    if settings.device.type == "cuda":
        warm = torch.randn(4096, 4096, device=settings.device)
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            warm = (warm @ warm).clamp_(-1, 1)
            torch.cuda.synchronize(settings.device)

    def tflops(dtype: torch.dtype) -> float:
        a, b = (torch.randn(size, size, device=settings.device).to(dtype) for _ in range(2))
        return 2 * size**3 / settings.timer(lambda: a @ b).ms / 1e9

    products = {"bf16_tflops": tflops(torch.bfloat16), "tf32_tflops": tflops(torch.float32)}
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    copy = settings.timer(lambda: target.copy_(source))
    return {**products, "copy_tbps": 2 * copy_bytes / copy.ms / 1e9}


@contextmanager
def float32_products(precision: Literal["tf32", "ieee"]) -> Iterator[None]:
    """Form float32 products in TF32 or exactly, in all implementations, and let cuDNN choose its fastest algorithm."""
    backends: Any = torch.backends  # some of its attributes are made at run time
    cudnn, matmul = backends.cudnn, backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.fp32_precision, cudnn.benchmark
    # Set the older switches, which Inductor and torch.export read: torch 2.11 raises an error if they are read and only the
    # newer ones were set.
    cudnn.allow_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32, matmul.fp32_precision, cudnn.benchmark = before


def reason(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _peak_mb(function: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory in MB during a second call: searching, compiling and tuning in the first call do not count."""
    function()
    if device.type != "cuda":
        return None
    gc.collect()  # networks of the verification that are part of reference cycles
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e6


#: (name, function, its tensors)
Implementation = tuple[str, Callable[..., Tensor], list[Tensor]]


def _implementations(case: Case, tensors: list[Tensor]) -> Iterator[Implementation]:
    """Our implementation and each eager peer of an operation."""
    yield OURS, case.ours, tensors
    if tensors[0].dim() == 4:
        yield "torch_nchw", case.theirs, [t.detach().contiguous().requires_grad_() for t in tensors]
        yield "torch_channels_last", case.theirs, tensors
    else:
        yield "torch", case.theirs, tensors
    if importlib.util.find_spec("flag_gems") is not None:
        import flag_gems  # type: ignore[import-not-found]

        def gems(*arguments: Tensor) -> Tensor:
            with flag_gems.use_gems():
                return case.theirs(*arguments)

        yield "flag_gems_forward", gems, tensors


def _compiled(settings: Settings, case: Case, tensors: list[Tensor]) -> Iterator[Implementation]:
    """The peer that Inductor compiles."""
    torch.compiler.reset()
    yield "torch_compile", torch.compile(case.theirs, backend=settings.compile_backend), tensors


def measure_operations(
    report: Report, section: str, cases: Sequence[Case], dtype_name: str, batch: int, compiled: bool = False
) -> None:
    """Verify and time each case and pass: ours and each eager peer, or with ``compiled`` the compiled peer alone."""
    settings = report.settings
    for case in cases:
        label = {"section": section, "case": case.name, "dtype": dtype_name, "batch": batch}
        what = " ".join(map(str, label.values())) + (" torch_compile" if compiled else "")
        if not report.in_time(what):
            continue
        try:
            torch.manual_seed(0)
            tensors = case.tensors(batch, DTYPES[dtype_name], settings.device)
            expected = truth(case, tensors)
            implementations = _compiled(settings, case, tensors) if compiled else _implementations(case, tensors)
            for name, function, own in implementations:
                _measure_operation(report, label | {"impl": name}, case, function, own, expected)
            del tensors, expected
        except Exception as error:  # an error of one case does not stop the others
            row = label | {"impl": "all", "pass": "all", "verified": None, "flops": 0, "bytes": 0}
            report.add_untimed(row, reason(error))
        report.write()


def _measure_operation(
    report: Report,
    label: dict[str, Any],
    case: Case,
    function: Callable[..., Tensor],
    tensors: list[Tensor],
    expected: Truth,
) -> None:
    """Verify one implementation, then time its passes, in a CUDA graph where one can be captured."""
    settings = report.settings
    wrong = None
    verified: bool | None = None
    # A peer that draws other random numbers than ours has no reference.
    if label["impl"] == OURS or case.reference is None:
        try:
            verify(case, function, tensors, expected)
        except Exception as error:  # a kernel that cannot be compiled or launched counts as wrong
            wrong = f"WRONG: {reason(error)}"
        verified = wrong is None
    for which in passes(case):
        work = {
            "flops": pass_flops(case, label["batch"], which),
            "bytes": pass_bytes(case, label["batch"], which, tensors[0]),
        }
        row = label | {"pass": which, "verified": verified} | work
        if wrong is not None:
            report.add_untimed(row, wrong)
            continue
        try:
            eager = runner(function, which, tensors)
            peak = _peak_mb(eager, settings.device)
            try:
                timed, note = captured(eager, settings.device), None
            except NoGraph as error:
                timed, note = eager, f"timed without a CUDA graph: {error}"
            report.add_timed(row, timed, peak, note)
        except Exception as error:
            report.add_untimed(row, reason(error))


#: Seconds that Inductor takes to tune a step of AlexNet, roughly: no tuning begins with less time left.
_TUNING_SECONDS = 100.0


def measure_steps(report: Report, implementations: Sequence[str], dtype: str, batches: Sequence[int]) -> None:
    """Measure the training step and inference of each implementation, eager and as a CUDA graph."""
    settings = report.settings
    for implementation in implementations:
        seconds = _TUNING_SECONDS if implementation == TUNED and settings.compile_backend == "inductor" else 0.0
        for batch in batches:
            for mode in ("train", "infer"):
                if report.in_time(f"step {implementation} {mode} {dtype} {batch}", seconds):
                    label = {"section": "step", "case": "network", "dtype": dtype, "batch": batch, "pass": mode}
                    _measure_step(report, implementation, label)
                    report.write()


def _measure_step(report: Report, implementation: str, label: dict[str, Any]) -> None:
    """Verify one implementation on the batch that it is timed on, then time it eager and as a CUDA graph."""
    settings, mode = report.settings, label["pass"]
    dtype = DTYPES[label["dtype"]]
    eager, graph = (label | {"impl": implementation + suffix, "verified": None} for suffix in ("", "_graph"))
    try:
        torch.compiler.reset()
        torch.manual_seed(0)
        of = (settings.network, implementation, dtype, label["batch"], settings.device, settings.compile_backend)
        built, images, labels = prepare(*of)
        verify_network(settings.network, built, dtype, mode, images, labels)
        eager["verified"] = graph["verified"] = True
        step = step_function(built, dtype, mode, images, labels)
        peak = _peak_mb(step, settings.device)
        report.add_timed(eager, step, peak)
    except Exception as error:  # an error of one implementation does not stop the others
        wrong = isinstance(error, AssertionError)
        eager["verified"] = False if wrong else eager["verified"]
        report.add_untimed(eager, f"WRONG: {reason(error)}" if wrong else reason(error))
        return
    try:
        report.add_timed(graph, captured(step, settings.device), peak)
    except Exception as error:
        report.add_untimed(graph, reason(error))


def sections(report: Report) -> list[Callable[[], None]]:
    """The measurements in order: the step against every peer, then the single operations.

    float32 comes right after bfloat16. Other batches, float16 and the parts for which Inductor takes minutes come last.
    """
    settings = report.settings
    eager = [name for name in (OURS, *PEERS) if not name.startswith("compile")]
    compiled = [name for name in PEERS if name.startswith("compile") and name != TUNED]
    groups = (("plain", settings.plain_cases), ("fused", settings.fused_cases))
    first_batch, other_batches = settings.batches[:1], settings.batches[1:]
    dtypes = settings.dtypes[:2]  # of the network
    combinations = [(dtype, batch) for dtype in settings.dtypes for batch in first_batch]
    combinations += [(dtype, batch) for dtype in settings.dtypes for batch in other_batches]

    def operations(dtype: str, batch: int, compiled: bool = False) -> Callable[[], None]:
        def measure() -> None:
            for section, cases in groups:
                measure_operations(report, section, cases, dtype, batch, compiled)

        return measure

    def steps(implementations: Sequence[str], dtype: str, batches: Sequence[int]) -> Callable[[], None]:
        return lambda: measure_steps(report, implementations, dtype, batches)

    first, others = settings.step_batches[:1], settings.step_batches[1:]
    result: list[tuple[str, Callable[[], None]]] = []
    for i, dtype in enumerate(dtypes):
        result += [("steps", steps(eager, dtype, first)), ("steps", steps(compiled, dtype, first))]
        result += [("operations", operations(*combination)) for combination in combinations[i : i + 1]]
    result += [("steps", steps(eager, dtype, others)) for dtype in dtypes]
    # Inductor tunes for minutes.
    result += [("tuned", steps([TUNED], dtype, first)) for dtype in dtypes]
    result += [("operations", operations(*combination)) for combination in combinations[len(dtypes) :]]
    result += [("steps", steps(compiled, dtype, others)) for dtype in dtypes]
    result += [("compiled_operations", operations(*combination, compiled=True)) for combination in combinations[:1]]
    result += [("tuned", steps([TUNED], dtype, others)) for dtype in dtypes]
    return [section for part, section in result if part in settings.parts]


def run(settings: Settings, out: Path, console: Console, ceiling_size: int = 8192, copy_bytes: int = 2**30) -> Path:
    """Measure everything and write the JSON after each section; return its path.

    Raises:
        ValueError: fake times would be written among the real results.
    """
    if isinstance(settings.timer, FakeTimer) and out.resolve().is_relative_to(RESULTS.resolve()):
        raise ValueError(f"fake times do not belong into {out}")
    path = out / f"{gpu_slug(gpu_name(settings.device))}.json"
    report = Report(settings, path, console)
    console.print_json(json.dumps(report.content["environment"]))
    # By default Inductor frees a backward pass's saved tensors while it runs; here each backward pass runs many times.
    with float32_products("tf32"), own_stream(settings.device), functorch_config.patch(donated_buffer=False):
        report.content["ceilings"] = measure_ceilings(settings, ceiling_size, copy_bytes)
        forward, step = network_flops(settings.network, 1)
        parameters = sum(p.numel() for p in settings.network.reference().parameters())
        report.content["network"] = {"forward_flops": forward, "step_flops": step, "parameters": parameters}
        report.write()
        try:
            for section in sections(report):
                section()
        finally:
            report.write()
    return path


def main() -> None:
    """Measure on the CUDA GPU of this machine, then render tables and plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--quick", action="store_true", help="measure only batch 128 in bfloat16, in under three minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of <gpu>.json, tables and plots")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no new measurement after this many minutes")
    parser.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), help="only these dtypes; the network is measured in the first two"
    )
    parser.add_argument("--batch", nargs="+", type=int, help="only these batch sizes")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="only these parts")
    parser.add_argument("--dry", action="store_true", help="run tiny shapes without a GPU; all times are marked as fake")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.dry:
        sys.exit("report: there is no CUDA GPU here; python -m benchmarks.audit reads the compiled code without one")
    settings = Settings(torch.device("cuda"), CudaTimer(), arguments.minutes, parts=tuple(arguments.part))
    if arguments.dtype:
        settings = dataclasses.replace(settings, dtypes=tuple(arguments.dtype))
    if arguments.batch:
        settings = dataclasses.replace(settings, batches=tuple(arguments.batch), step_batches=tuple(arguments.batch))
    if arguments.quick:
        settings = dataclasses.replace(quick(settings), minutes=min(arguments.minutes, quick(settings).minutes))
    console = Console(soft_wrap=True, highlight=False)
    if arguments.dry:
        cpu = dataclasses.replace(tiny(settings), device=torch.device("cpu"))
        path = run(cpu, arguments.out, console, ceiling_size=64, copy_bytes=1024)
    else:
        path = run(settings, arguments.out, console)
    from .render import render_results

    for written in render_results(path, arguments.out):
        console.print(str(written))


if __name__ == "__main__":
    main()
