"""The time of every kernel of a step, in order, beside its floor.

``python -m benchmarks.profile [--batch 128] [--mode train] [--impl ours]`` captures a training step or a forward pass as a
CUDA graph, replays it under the profiler and prints the median of each kernel. Our kernels are named by layer and pass, with
the floor of their launch by ``python -m benchmarks.audit``. PyTorch's kernels keep their own names.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from alexnet_triton.training.files import check_writable, write_atomically
from kernels.configs.tables import gpu_slug
from kernels.runtime import launch

from .audit import TARGETS, LayerMarker, OperatorCount, floor_us, pass_of
from .networks import ALEXNET, OURS, PEERS, prepare, step_function
from .report import DTYPES, RESULTS, commit, float32_products
from .timing import CudaTimer, captured, own_stream
from .work import fewest_bytes, flops


@dataclasses.dataclass(frozen=True)
class Noted:
    """One Triton launch, with the layer, pass and floor that the profiler's kernel event lacks."""

    layer: str
    pass_: str
    kernel: str
    floor_us: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel of a step: median microseconds over the replays, and the floor if the kernel is ours."""

    layer: str
    pass_: str
    kernel: str
    us: float
    floor_us: float | None


def match(launches: Sequence[Noted], replays: Sequence[Sequence[tuple[str, float]]]) -> list[Row]:
    """Find the layer and pass of each kernel of the replays. A replay is a list of (name, microseconds) in execution order.

    Raises:
        ValueError: the replays differ, or a launch is not among their kernels: the profiler lost events.
    """
    names = [[name for name, _ in replay] for replay in replays]
    if not names or any(other != names[0] for other in names):
        raise ValueError(f"the replays did not run the same kernels: {sorted({len(n) for n in names})} of them")
    waiting, rows = list(launches), []
    for i, name in enumerate(names[0]):
        us = statistics.median(replay[i][1] for replay in replays)
        if waiting and waiting[0].kernel == name:
            noted = waiting.pop(0)
            rows.append(Row(noted.layer, noted.pass_, name, us, noted.floor_us))
        else:
            rows.append(Row("PyTorch", "", name, us, None))
    if waiting:
        raise ValueError(f"no kernel event of the launch of {waiting[0].kernel} ({waiting[0].layer})")
    return rows


@contextmanager
def noted_launches(arch: str, dtype: torch.dtype, layer: LayerMarker) -> Iterator[list[Noted]]:
    """Yield a list to which every launch in the block is added, in order."""
    launches: list[Noted] = []
    count = OperatorCount()

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        name = kernel.fn.__name__
        useful, _ = flops(name, grid, arguments)
        floor = floor_us(TARGETS[arch], dtype, useful, fewest_bytes(launch.tensors_of(arguments))) if arch in TARGETS else None
        launches.append(Noted(layer.name, pass_of(count.current, name, arguments), name, floor))

    with launch.observe_launches(note), count:
        yield launches


def _replays(replay: Callable[[], object], times: int) -> list[list[tuple[str, float]]]:
    """Profile ``times`` replays; return one list of kernel events, in order, per replay."""
    from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(times):
            replay()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    kernels = [(e.name, float(e.device_time)) for e in events]
    size, rest = divmod(len(kernels), times)
    if rest or not kernels:
        raise ValueError(f"{len(kernels)} kernel events of {times} replays: the profiler lost some")
    return [kernels[i : i + size] for i in range(0, len(kernels), size)]


def profile_step(implementation: str, dtype: torch.dtype, batch: int, mode: str, times: int = 20) -> tuple[list[Row], float]:
    """Rows of one step, and the microseconds of one replay from start to end, with the gaps between kernels."""
    device = torch.device("cuda")
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    with float32_products("tf32"), own_stream(device):
        torch.manual_seed(0)
        built, images, labels = prepare(ALEXNET, implementation, dtype, batch, device)
        layer = LayerMarker()
        if implementation == OURS:
            module: Any = built.module
            marked = dataclasses.replace(built, net=lambda x: layer.forward(module, x))
            with noted_launches(arch, dtype, layer) as launches:
                step_function(marked, dtype, mode, images, labels)()
            torch.cuda.synchronize()
        else:
            launches = []
        replay = captured(step_function(built, dtype, mode, images, labels), device)
        whole = CudaTimer()(replay).ms * 1e3
        return match(launches, _replays(replay, times)), whole


def print_rows(rows: list[Row], whole: float, console: Console) -> None:
    """Print all kernels in order, then their sum and the time of the whole replay."""
    table = Table(title="kernels of a step, in order", title_justify="left")
    for name in ("layer", "pass", "kernel"):
        table.add_column(name, no_wrap=True, max_width=60)
    for name in ("us", "floor, us", "of the floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        floor = ("", "") if not r.floor_us else (f"{r.floor_us:.1f}", f"{r.floor_us / r.us:.0%}")
        table.add_row(r.layer, r.pass_, r.kernel.strip("_").removesuffix("_kernel")[:60], f"{r.us:.1f}", *floor)
    console.print(table)
    busy = sum(r.us for r in rows)
    console.print(f"{len(rows)} kernels, {busy:.0f} us in them; a replay with a cold L2 cache takes {whole:.0f} us")


def main() -> None:
    """Profile on the CUDA GPU of this machine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--mode", default="train", choices=["train", "infer"])
    parser.add_argument("--impl", default=OURS, choices=[OURS, *PEERS])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of profile/<gpu>.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("profile: there is no CUDA GPU here; python -m benchmarks.audit reads the compiled code without one")
    path = arguments.out / "profile" / f"{gpu_slug(torch.cuda.get_device_name())}.json"
    check_writable(path)
    rows, whole = profile_step(arguments.impl, DTYPES[arguments.dtype], arguments.batch, arguments.mode)
    print_rows(rows, whole, Console(width=None if sys.stdout.isatty() else 140))
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    name = "-".join((arguments.impl, arguments.dtype, f"N{arguments.batch}", arguments.mode))
    content[name] = {
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "commit": commit(),
        "replay_us": round(whole, 1),
        "kernels": [
            {"layer": r.layer, "pass": r.pass_, "kernel": r.kernel, "us": round(r.us, 2)}
            | ({} if r.floor_us is None else {"floor_us": round(r.floor_us, 2)})
            for r in rows
        ],
    }
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
