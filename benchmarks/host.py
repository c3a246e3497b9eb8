"""Host time: how long Python works on a call, ours beside PyTorch's.

``python -m benchmarks.host [--json FILE]`` without a GPU runs our real code path on CPU tensors, with kernels compiled for an
H100 by a stand-in driver (:mod:`benchmarks.idle`). Host time includes everything that Python does up to the call into the
driver, Triton's part too. It excludes the driver's own work and all work on values. The peer is an ``nn.Sequential`` of the
same layers with tiny tensors and ``torch.optim.SGD``, or the operation of ``torch.nn.functional``. Both take turns in one
process. The last table shows the time of a training step by function.

On a CUDA GPU the same command launches real kernels. Host time is measured for the same cases at the smallest batch, with the
GPU idle before each call. For each batch size the eager step and its CUDA graph are timed, ours and channels-last PyTorch's.

A row of the JSON has these fields:

- ``case``, and ``mode``: ``step`` of a network, ``train`` or ``infer`` of the case ``module`` (AlexNet as a class whose forward
  pass calls its layers; its peer is the same class), ``forward`` or ``forward_backward`` of an operation. On a GPU also
  ``eager`` and ``graph``, whose times are the GPU's and the host's together.
- ``batch`` and ``dtype`` of our tensors.
- ``ours_us`` and ``peer_us``: median microseconds of a call. ``ratio``: ours over the peer's, the median of the rounds' ratios.
- Counts of one warm call of ours: ``launches`` of kernels, ``descriptors`` encoded for the TMA, ``calls`` of Python functions,
  the same by package in ``calls_by``, and ``plans`` made. A second run gives the same counts, except ``descriptors`` of tensors
  to which the allocator gives another address.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import cProfile
import gc
import itertools
import json
import math
import platform
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import triton

import alexnet_triton
import kernels
from kernels.runtime import backend, direct, launch, plans

from .host_cases import DTYPES, HostCase, Pair, TrainingStep, host_cases
from .idle import NEEDS_COMPILER, idle_gpu
from .networks import ALEXNET, OURS, Network, prepare, step_function
from .report import commit
from .timing import NoGraph, captured, own_stream

#: The peer of a whole step on a GPU: channels-last PyTorch with parameters in the dtype itself.
PEER = "eager_channels_last"

#: A turn of one side lasts at least this long, so that each side runs with its own code in the caches.
_TURN_SECONDS = 2e-3
_MOST_CALLS_A_TURN = 200
_WARM_CALLS = 5


def plans_made() -> int:
    """Number of plans that this process has made."""
    return plans.made


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, CPU, GPU and commit that the figures depend on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # only Linux has this file
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cpu": model,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "commit": commit(),
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Run with one thread for PyTorch's operators and without garbage collection."""
    threads = torch.get_num_threads()
    collects = gc.isenabled()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()


def _turn(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Microseconds of host time per call. The GPU is idle before each call, so a call never waits for it."""
    if device.type != "cuda":
        begin = time.perf_counter_ns()
        for _ in range(calls):
            function()
        return (time.perf_counter_ns() - begin) / calls / 1e3
    total = 0
    for _ in range(calls):
        torch.cuda.synchronize(device)
        begin = time.perf_counter_ns()
        function()
        total += time.perf_counter_ns() - begin
    return total / calls / 1e3


def take_turns(pair: Pair, rounds: int, device: torch.device) -> tuple[float, float, float]:
    """Median microseconds of a call, ours and the peer's, and their ratio. Both sides have a turn in each round.

    The ratio is the median of the rounds' ratios: a disturbance longer than a round slows both sides of the round.
    """
    functions = (pair.ours, pair.peer)
    with _undisturbed():
        calls = []
        for function in functions:
            for _ in range(_WARM_CALLS):
                function()
            microseconds = max(_turn(function, 1, device), 1e-3)
            calls.append(min(_MOST_CALLS_A_TURN, math.ceil(_TURN_SECONDS * 1e6 / microseconds)))
        times = [[_turn(f, n, device) for f, n in zip(functions, calls, strict=True)] for _ in range(rounds)]
    ours, peer = (statistics.median(side) for side in zip(*times, strict=True))
    return ours, peer, statistics.median(of_ours / of_peer for of_ours, of_peer in times)


#: Directories and the name of their code in a table.
_PACKAGES = {
    Path(kernels.__file__).parent: "this package",
    Path(alexnet_triton.__file__).parent: "this package",
    Path(__file__).parent: "benchmarks",
    Path(triton.__file__).parent: "triton",
    Path(torch.__file__).parent: "torch",
}
_PREFIXES = {f"{directory}/": name for directory, name in _PACKAGES.items()}


def package_of(filename: str, function: str) -> str:
    """The package of a function, from the file and function name of a code object or a profile.

    ``~`` is a profile's file name for functions written in C, ``<string>`` that of generated code, such as Triton's binder.
    """
    for prefix, name in _PREFIXES.items():
        if filename.startswith(prefix):
            return name
    if filename == "~":
        return next((name for name in ("triton", "torch") if name in function), "builtins")
    return "triton" if function == "dynamic_func" else "python"


@contextlib.contextmanager
def _one_thread_of_python() -> Iterator[None]:
    """Let autograd run backward passes in the calling thread on a GPU too, so that a profile sees them."""
    with torch.autograd.set_multithreading_enabled(False):
        yield


def count_calls(function: Callable[[], object]) -> dict[str, int]:
    """How many Python functions a call of ``function`` calls, by package, without those that encode a TMA descriptor.

    How often a descriptor is encoded depends on the addresses that the allocator returns.
    """
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    encoding = 0

    def profiler(frame: FrameType, event: str, _: object) -> None:
        nonlocal encoding
        encodes = frame.f_code.co_name == "encode" and frame.f_code.co_filename == direct.__file__
        if event == "call":
            encoding += encodes
            if not encoding:
                found[frame.f_code.co_filename, frame.f_code.co_name] += 1
        elif event == "return":
            encoding -= encodes

    with _undisturbed(), _one_thread_of_python():
        sys.setprofile(profiler)
        try:
            function()
        finally:
            sys.setprofile(None)
    packages: collections.Counter[str] = collections.Counter()
    for (filename, name), calls in found.items():
        packages[package_of(filename, name)] += calls
    return dict(sorted(packages.items()))


@contextlib.contextmanager
def count_descriptors() -> Iterator[list[int]]:
    """Yield a list to which each tensor descriptor that Triton's launcher encodes in the block adds an element."""
    utils = triton.runtime.driver.active.utils
    # Triton 3.6 has one function; later versions have one for tiles and one for im2col.
    names = [n for n in ("fill_tma_descriptor", "fill_tma_descriptor_tiled", "fill_tma_descriptor_im2col") if hasattr(utils, n)]
    before = {name: getattr(utils, name) for name in names}
    encoded: list[int] = []

    def counting(encode: Callable[..., object]) -> Callable[..., object]:
        def count(*arguments: object) -> object:
            encoded.append(1)
            return encode(*arguments)

        return count

    for name, encode in before.items():
        setattr(utils, name, counting(encode))
    try:
        yield encoded
    finally:
        for name, encode in before.items():
            setattr(utils, name, encode)


def counts(function: Callable[[], object]) -> dict[str, Any]:
    """Counts of a warm call of ``function``: launches, descriptors, calls of Python functions, plans.

    A tensor with the same address as in one of the last calls gets no new descriptor, so weights never do. PyTorch's CUDA
    allocator returns the same addresses step after step; malloc does so less regularly.
    """
    calls = count_calls(function)
    launched: list[object] = []
    plans = plans_made()
    with count_descriptors() as encoded:
        function()
    with launch.observe_launches(lambda *_: launched.append(None)):  # an observer sees every launch: no plan is used
        function()
    return {
        "launches": len(launched),
        "descriptors": len(encoded),
        "calls": sum(calls.values()),
        "calls_by": calls,
        "plans": plans_made() - plans,
    }


def _row(
    case: str, mode: str, batch: int, dtype: str, ours: float | None, peer: float | None, ratio: float | None = None
) -> dict[str, Any]:
    if ratio is None and ours is not None and peer is not None:
        ratio = ours / peer
    return {
        "case": case,
        "mode": mode,
        "batch": batch,
        "dtype": dtype,
        "ours_us": None if ours is None else round(ours, 2),
        "peer_us": None if peer is None else round(peer, 2),
        "ratio": None if ratio is None else round(ratio, 3),
    }


def measure(case: HostCase, pair: Pair, rounds: int, device: torch.device) -> dict[str, Any]:
    """The row of a case: host time of both sides, and the counts of ours."""
    times = take_turns(pair, rounds, device)
    return {**_row(case.name, case.mode, case.batch, case.dtype, *times), **counts(pair.ours)}


def profile(function: Callable[[], object], steps: int = 20) -> dict[str, Any]:
    """Profile the host time of a call: own time by package, and of the functions that take most.

    Python's profiler slows down calls of Python functions: shares are rough, and the total is more than a row's time.
    """
    with _undisturbed(), _one_thread_of_python():
        for _ in range(_WARM_CALLS):
            function()
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(steps):
            function()
        profiler.disable()
    functions: list[dict[str, Any]] = []
    packages: collections.Counter[str] = collections.Counter()
    stats: Any = pstats.Stats(profiler)
    for (filename, line, name), (_, calls, own, _, _) in stats.stats.items():
        package = package_of(filename, name)
        packages[package] += own
        where = name if filename == "~" else f"{'/'.join(Path(filename).parts[-2:])}:{line} {name}"
        functions.append({"function": where, "package": package, "own_us": own, "calls": calls / steps})
    total = sum(packages.values())
    functions.sort(key=lambda f: -f["own_us"])
    for entry in functions:
        entry["share"] = round(entry["own_us"] / total, 4)
        entry["own_us"] = round(entry["own_us"] / steps * 1e6, 2)
    return {
        "total_us": round(total / steps * 1e6, 1),
        "packages": {
            name: {"own_us": round(own / steps * 1e6, 1), "share": round(own / total, 4)}
            for name, own in packages.most_common()
        },
        "functions": functions[:40],
    }


def measure_parts(pair: Pair, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Median host microseconds of each part of a training step, with autograd's own threads (the default) and without.

    On a GPU a backward pass runs in a thread of autograd, which has to wake up and take Python's global lock.
    """
    found = []
    for threads in (True, False):
        with _undisturbed(), torch.autograd.set_multithreading_enabled(threads):
            of_both = []
            for step in (pair.ours, pair.peer):
                assert isinstance(step, TrainingStep)
                parts: list[dict[str, float]] = []
                for _ in range(_WARM_CALLS + rounds):
                    parts.append(step.parts())
                    _synchronize(device)
                of_both.append({name: statistics.median(p[name] for p in parts[_WARM_CALLS:]) for name in parts[0]})
        ours, peer = of_both
        found += [
            {"part": name, "threads": threads, "ours_us": round(ours[name], 1), "peer_us": round(peer[name], 1)}
            for name in ours
        ]
    return found


def _loop_us(function: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median microseconds per call of a loop, the GPU's work included: the time that a training loop sees."""

    def loop(calls: int) -> float:
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        _synchronize(device)
        return (time.perf_counter() - begin) / calls

    for _ in range(_WARM_CALLS):
        function()
    calls = min(20, max(2, math.ceil(0.03 / loop(2))))
    return statistics.median(loop(calls) for _ in range(rounds)) * 1e6


def measure_steps(network: Network, batch: int, dtype: str, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of a training step and of inference, eager and as a CUDA graph, ours and the peer's at the same batch size."""
    rows = []
    for mode in ("train", "infer"):
        times: dict[str, list[float | None]] = {"eager": [], "graph": []}
        for implementation in (OURS, PEER):
            built, images, labels = prepare(network, implementation, DTYPES[dtype], batch, device)
            step = step_function(built, DTYPES[dtype], mode, images, labels)
            with _undisturbed(), own_stream(device):
                times["eager"].append(_loop_us(step, rounds, device))
                try:
                    times["graph"].append(_loop_us(captured(step, device), rounds, device))
                except NoGraph:
                    times["graph"].append(None)
        rows += [_row(mode, how, batch, dtype, *both) for how, both in times.items()]
    return rows


def _number(value: Any, width: int, digits: int = 0) -> str:
    return f"{'-' if value is None else format(value, f',.{digits}f'):>{width}}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, one line per row."""
    columns = {"ours_us": 10, "peer_us": 10, "ratio": 7, "launches": 9, "descriptors": 12, "calls": 7, "plans": 6}
    lines = [f"{'case':<24}{'mode':<17}{'batch':>6}  {'dtype':<9}" + "".join(f"{name:>{w}}" for name, w in columns.items())]
    for row in rows:
        numbers = (_number(row.get(name), w, int(name in ("ours_us", "peer_us", "ratio"))) for name, w in columns.items())
        lines.append(f"{row['case']:<24}{row['mode']:<17}{row['batch']:>6}  {row['dtype']:<9}" + "".join(numbers))
    return "\n".join(lines)


def parts_table(parts: Sequence[dict[str, Any]]) -> str:
    """The parts of a training step as text."""
    lines = ["Parts of a training step: host time in us, ours and the peer's, with autograd's threads and without"]
    for part in parts:
        threads = "threads" if part["threads"] else "one thread"
        lines.append(f"  {part['part']:<12}{threads:<12}{part['ours_us']:>10,.1f}{part['peer_us']:>10,.1f}")
    return "\n".join(lines)


def profile_table(found: dict[str, Any], most: int = 25) -> str:
    """The profile as text: a line for each package, then one for each of the first functions."""
    lines = [f"Where a training step's host time goes, under Python's profiler: {found['total_us']:,.0f} us"]
    for name, entry in found["packages"].items():
        lines.append(f"{entry['own_us']:>9,.0f} us {entry['share']:>6.1%}  {name}")
    lines.append(f"{'own time':>12} {'share':>6} {'calls':>7}  {'package':<13} function")
    for entry in found["functions"][:most]:
        numbers = f"{entry['own_us']:>9,.1f} us {entry['share']:>6.1%} {entry['calls']:>7,.0f}"
        lines.append(f"{numbers}  {entry['package']:<13} {entry['function']}")
    return "\n".join(lines)


def run(cases: Sequence[HostCase], rounds: int, device: torch.device) -> dict[str, Any]:
    """Measure ``cases``, and profile the first case named ``train``."""
    rows = []
    where, parts = None, None
    for case in cases:
        pair = case.pair(device)
        rows.append(measure(case, pair, rounds, device))
        if case.name == "train" and where is None:
            where = {"case": case.name, "batch": case.batch, "dtype": case.dtype, **profile(pair.ours)}
            parts = measure_parts(pair, rounds, device)
    return {"environment": environment(device), "rounds": rounds, "rows": rows, "parts": parts, "profile": where}


def main() -> None:
    """Measure the chosen cases, print the tables, write the JSON."""
    names = list(dict.fromkeys(case.name for case in host_cases()))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    parser.add_argument("--case", nargs="+", choices=names, default=names, help="measure only these cases")
    parser.add_argument(
        "--batch",
        nargs="+",
        type=int,
        help="our batch sizes: by default 128, on a GPU 1, 128 and 1024; host time on a GPU is of the smallest",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES), help="dtype of our tensors")
    parser.add_argument("--rounds", type=int, default=100, help="how often each case is timed")
    arguments = parser.parse_args()
    if backend.INTERPRETED:
        parser.error(NEEDS_COMPILER)
    if arguments.rounds < 1 or min(arguments.batch or [1]) < 1:
        parser.error("--rounds and --batch must be at least 1")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    batches = arguments.batch or ([1, 128, 1024] if on_gpu else [128])
    of_host_time = [min(batches)] if on_gpu else batches
    cases = [c for batch in of_host_time for c in host_cases(batch, arguments.dtype) if c.name in arguments.case]
    with contextlib.nullcontext() if on_gpu else idle_gpu():
        result = run(cases, arguments.rounds, device)
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        # One round here is a loop of up to 20 steps.
        rounds = min(arguments.rounds, 10)
        steps = (measure_steps(ALEXNET, batch, arguments.dtype, rounds, device) for batch in batches)
        result["rows"] += [row for row in itertools.chain.from_iterable(steps) if row["case"] in arguments.case]
    where = "" if on_gpu else ", no GPU: kernels compiled for an H100, launched on nothing"
    print(", ".join(f"{name} {value}" for name, value in result["environment"].items() if value) + where)
    print(table(result["rows"]))
    if result["profile"] is not None:
        print(parts_table(result["parts"]))
        print(profile_table(result["profile"]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
