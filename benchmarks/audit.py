"""The launches of one training step of AlexNet, compiled for a GPU that is not there, and a lower bound of their time.

``python -m benchmarks.audit --arch sm_90 --batch 128 --dtype bfloat16`` walks the real code path (forward, loss, backward,
optimizer) on CPU tensors. Each Triton launch is recorded with its arguments and compiled for the target instead of run. Each
PyTorch operator that would launch a kernel is counted. The totals are compared with those of the same step of
``nn.Sequential``, under autocast for bfloat16 and float16, on fake tensors.

``--mode train`` is the step that ``python -m benchmarks.report`` times, on images that are ready. ``--mode trainer`` is the
step of ``alexnet-triton train``, from the indices of uint8 images to the sums of loss and hits, beside the same loop around
``nn.Sequential``.

Everything printed is static: read from compiled code and counted from tensors. No time is measured here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from alexnet_triton import AlexNet, CellImages, reference_alexnet
from alexnet_triton.data.augment import input_for
from alexnet_triton.data.dataset import Split
from alexnet_triton.optim import SGD
from alexnet_triton.runs import call, plan
from alexnet_triton.training.recipe import Recipe, Where
from alexnet_triton.training.trainer import Trainer
from kernels.configs import tables
from kernels.runtime import launch

from .offline import compile_launch, offline_target
from .work import flops, moved_bytes

#: The committed totals: a change that makes one worse must change this file too. ``--update`` rewrites it.
COMMITTED = Path(__file__).parent / "audit.json"

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "flatten", "fc1", "fc2", "fc3")


@dataclasses.dataclass(frozen=True)
class Target:
    """The properties of a GPU that decide occupancy and floors.

    Attributes:
        name: of the product.
        multiprocessors: number of SMs.
        registers, shared_bytes, warps, blocks: limits of each SM.
        tflops, tbps: ceilings of half-precision products and of copies; None if unknown.
    """

    name: str
    multiprocessors: int
    registers: int
    shared_bytes: int
    warps: int
    blocks: int
    tflops: float | None = None
    tbps: float | None = None


#: Numbers of SMs from NVIDIA's architecture papers, limits from the CUDA programming guide's table of compute capabilities,
#: the H100's ceilings from the project's design (the report measured 680 TFLOP/s and 3.0 TB/s).
TARGETS = {
    "sm_80": Target("A100 SXM", 108, 65536, 164 * 1024, 64, 32),
    "sm_90": Target("H100 SXM", 132, 65536, 228 * 1024, 64, 32, tflops=798.0, tbps=3.0),
    "sm_100": Target("B200", 148, 65536, 228 * 1024, 64, 32),
}

#: Operators that launch nothing: they allocate, query or annotate.
_FREE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::alias", "aten::_unsafe_view", "prim::", "profiler::")


class OperatorCount(TorchDispatchMode):
    """Counts the PyTorch operators that would launch a kernel, and the bytes of their tensors.

    This project's operators are not counted, since their launches are recorded; ``current`` names the running one.

    Args:
        on_call: called with the name and the bytes of each counted operator.
    """

    def __init__(self, on_call: Callable[[str, int], None] | None = None) -> None:
        super().__init__()
        self.calls = 0
        self.bytes = 0
        self.current: str | None = None
        self.on_call = on_call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("alexnet_triton::"):
            self.current = name.removeprefix("alexnet_triton::")
            try:
                return func(*args, **(kwargs or {}))
            finally:
                self.current = None
        result = func(*args, **(kwargs or {}))
        if self.current is None and not func.is_view and not name.startswith(_FREE):
            moved = _operator_bytes(func, args, kwargs or {}, result)
            self.calls += 1
            self.bytes += moved
            if self.on_call is not None:
                self.on_call(name, moved)
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _operator_bytes(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes of each input read once and each output written once; a tensor changed in place counts twice."""
    read = {id(t): _size(t) for t in _tensors((args, kwargs))}
    written = {id(t): _size(t) for t in _tensors(result)}
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= {id(t): _size(t) for t in _tensors(value)}
    return sum(read.values()) + sum(written.values())


@dataclasses.dataclass(frozen=True)
class Record:
    """One Triton launch of the step, or one PyTorch operator, of which only the bytes are known."""

    layer: str
    pass_: str
    kernel: str
    arch: str
    dtype: str
    batch: int
    regs: int
    spill_bytes: int
    smem_bytes: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int
    grid: tuple[int, ...]
    waves: float
    has_dot: bool
    tensor_core_ops: int
    tma_loads: int
    useful_flops: int
    issued_flops: int
    min_bytes: int
    floor_us: float | None

    def as_json(self) -> dict[str, Any]:
        """The fields as a dict; ``pass_`` becomes ``pass``, which Python reserves as a name."""
        return {key.removesuffix("_"): value for key, value in dataclasses.asdict(self).items()}


def programs_per_multiprocessor(target: Target, registers: int, shared_bytes: int, warps: int) -> int:
    """How many programs fit on one SM, by registers (allocated per warp in units of 256), shared memory and warps.

    A program takes the shared memory of its code and 1 KiB that CUDA reserves for each block.
    """
    by_registers = target.registers // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = target.shared_bytes // (shared_bytes + 1024)
    return max(0, min(by_registers, by_shared, target.warps // warps, target.blocks))


def floor_us(target: Target, dtype: torch.dtype, useful_flops: int, moved_bytes: int) -> float | None:
    """Lower bound in microseconds by products and bytes; None without ceilings.

    The products' ceiling is measured in half precision, so float32 has no floor.
    """
    if target.tflops is None or target.tbps is None or dtype == torch.float32:
        return None
    return max(useful_flops / (target.tflops * 1e6), moved_bytes / (target.tbps * 1e6))


def pass_of(operator: str | None, kernel: str, arguments: dict[str, Any]) -> str:
    """The pass of a launch: ``linear_dgrad`` -> ``dgrad``. All launches of a pool are ``pool``, of an epilogue ``epilogue``.

    One operator launches a convolution's whole backward pass, so there the kernel decides between ``dgrad`` and ``wgrad``.
    """
    name = operator or "other"
    if "max_pool2d" in kernel or name.startswith("max_pool2d"):
        return "pool"
    if "epilogue" in kernel:
        return "epilogue"
    if name.endswith("_backward") and not name.startswith("linear"):
        return "dgrad" if "dgrad" in kernel or arguments.get("DGRAD", False) else "wgrad"
    return "epilogue" if "epilogue" in name else name.rsplit("_", 1)[-1]


class LayerMarker:
    """Name of the running layer: set before each run of the forward pass, and by a hook before its backward node."""

    def __init__(self) -> None:
        self.name = "other"

    def forward(self, net: nn.Sequential, x: Any) -> Tensor:
        """``net(x)``, run by run as in :meth:`FusedSequential.forward`."""
        link = None
        runs = plan(list(net))
        for name, run, following in zip(LAYERS, runs, [*runs[1:], None], strict=True):
            self.name = name
            x, link = call(run, x, link, following)
            if x.grad_fn is not None:
                x.grad_fn.register_prehook(lambda _, name=name: self._set(name))
        self.name = "loss"
        return x

    def _set(self, name: str) -> None:
        self.name = name


class MarkedSGD(SGD):
    """The trainer's optimizer, which sets the layer's name while it steps."""

    def __init__(self, params: Iterable[Tensor], layer: LayerMarker) -> None:
        super().__init__(params, lr=0.01)
        self.layer = layer

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step under the layer name ``"optimizer"``, then set ``"loss"``, whose sums come last in the trainer's step."""
        self.layer._set("optimizer")
        super().step()
        self.layer._set("loss")


def _step(
    net: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, mode: str, on_optimizer: Callable[[], None]
) -> None:
    """Run one training step, or with ``mode="infer"`` one forward pass in eval mode."""
    if mode == "infer":
        net.eval()
        with torch.no_grad():
            forward(x)
        return
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, foreach=True)
    kernels.cross_entropy(forward(x), labels).backward()
    on_optimizer()
    optimizer.step()


def _trainer_step(
    net: nn.Module, forward: Callable[[Any], Tensor], batch: int, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """The step of a :class:`Trainer` that has already made its buffers; ``optimizer`` replaces the trainer's own."""
    # Only as many images as a step reads, since a gathering kernel is charged for the whole tensor.
    split = Split(torch.zeros(batch, 28, 28, dtype=torch.uint8), torch.zeros(batch, dtype=torch.long))
    trainer = Trainer(net, split, Recipe(batch_size=batch), Where(torch.device("cpu")))
    trainer.parallel = cast(nn.Module, forward)
    trainer.optimizer = cast(Any, optimizer) or trainer.optimizer
    with launch.record_launches(lambda *_: None):
        trainer.step(trainer.index)
    return lambda: trainer.step(trainer.index)


def _plain_input(_: nn.Module, images: Tensor, index: Tensor, size: int, **__: Any) -> Tensor:
    """:func:`input_for` as a plain PyTorch training loop would write it."""
    return F.interpolate(images[index].unsqueeze(1).float() / 255, (size, size), mode="bilinear")


def _saved_bytes(forward: Callable[[Any], Tensor], x: Any) -> int:
    """Bytes of the distinct storages that a forward pass saves for its backward pass."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward(x)
    return sum(storages.values())


def _saved_bytes_an_image(forward: Callable[[Any], Tensor], images: Callable[[int], Any]) -> int:
    """Saved bytes per image. Parameters and their casts do not count, since they do not grow with the batch."""
    return (_saved_bytes(forward, images(4)) - _saved_bytes(forward, images(2))) // 2


def _images(dtype: torch.dtype) -> Callable[[int], Tensor]:
    return lambda batch: torch.empty(batch, 1, 224, 224, dtype=dtype)


def audit_ours(arch: str, dtype: torch.dtype, batch: int, mode: str) -> tuple[list[Record], dict[str, Any]]:
    """The step on the Triton kernels: one record per launch, and the totals."""
    target = TARGETS[arch]
    layer = LayerMarker()
    name = str(dtype).removeprefix("torch.")
    records: list[Record] = []

    def record_operator(operator: str, moved: int) -> None:
        where = {"layer": layer.name, "pass_": "optimizer" if layer.name == "optimizer" else "torch", "kernel": operator}
        nothing = dict.fromkeys(("regs", "spill_bytes", "smem_bytes", "num_warps", "num_stages", "waves", "tensor_core_ops"), 0)
        nothing |= dict.fromkeys(("programs_per_multiprocessor", "tma_loads", "useful_flops", "issued_flops"), 0)
        floor = floor_us(target, dtype, 0, moved)
        known = {
            "arch": arch,
            "dtype": name,
            "batch": batch,
            "grid": (),
            "has_dot": False,
            "min_bytes": moved,
            "floor_us": floor,
        }
        records.append(Record(**where, **nothing, **known))  # type: ignore[arg-type]

    count = OperatorCount(record_operator)

    def record(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        compiled = compile_launch(kernel, grid, arguments)
        useful, issued = flops(compiled.kernel, grid, arguments)
        moved = moved_bytes(compiled.kernel, arguments)
        fits = programs_per_multiprocessor(target, compiled.registers, compiled.shared_bytes, compiled.num_warps)
        programs = int(torch.Size(grid).numel())
        records.append(
            Record(
                layer=layer.name,
                pass_=layer.name if count.current is None else pass_of(count.current, compiled.kernel, arguments),
                kernel=compiled.kernel,
                arch=arch,
                dtype=name,
                batch=batch,
                regs=compiled.registers,
                spill_bytes=compiled.stack_bytes + compiled.local_bytes,
                smem_bytes=compiled.shared_bytes,
                num_warps=compiled.num_warps,
                num_stages=compiled.num_stages,
                programs_per_multiprocessor=fits,
                grid=grid,
                waves=programs / (target.multiprocessors * max(fits, 1)),
                has_dot=compiled.has_dot,
                tensor_core_ops=sum(compiled.tensor_core_ops.values()),
                tma_loads=compiled.tma_loads,
                useful_flops=useful,
                issued_flops=issued,
                min_bytes=moved,
                floor_us=floor_us(target, dtype, useful, moved),
            )
        )

    net = AlexNet().to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    labels = torch.zeros(batch, dtype=torch.long)
    images: Callable[[int], Any] = _images(dtype)

    def forward(x: Tensor | CellImages) -> Tensor:
        return layer.forward(net, x)

    def step() -> None:
        _step(net, forward, images(batch), labels, mode, lambda: layer._set("optimizer"))

    with offline_target(int(arch.removeprefix("sm_"))):
        if mode == "trainer":
            step = _trainer_step(net, forward, batch, MarkedSGD(net.parameters(), layer))
            layer.name = "data"  # until the network's first layer sets its own

            def images(n: int) -> Tensor | CellImages:
                return input_for(net, torch.zeros(n, 28, 28, dtype=torch.uint8), None, 224, dtype=dtype)

        with launch.record_launches(record), count:
            step()
        with launch.record_launches(lambda *_: None):
            saved = _saved_bytes_an_image(net.train(), images) if mode != "infer" else 0
    return records, _totals(records, count, saved)


def _totals(records: list[Record], count: OperatorCount, saved: int) -> dict[str, Any]:
    useful, issued = (sum(getattr(r, name) for r in records) for name in ("useful_flops", "issued_flops"))
    floors = [r.floor_us for r in records]
    return {
        "launches": len(records),
        "triton_launches": len(records) - count.calls,
        "torch_operators": count.calls,
        "useful_flops": useful,
        "issued_flops": issued,
        "useful_over_issued": round(useful / issued, 4),
        "bytes": sum(r.min_bytes for r in records),
        "saved_bytes_per_image": saved,
        "spill_bytes": sum(r.spill_bytes for r in records),
        "floor_us": None if None in floors else round(sum(f for f in floors if f is not None), 1),
    }


def _cuda_dropout(input: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    """``F.dropout`` by the operator that PyTorch uses on CUDA."""
    return torch.native_dropout(input, p, training)[0] if training else input


def audit_peer(dtype: torch.dtype, batch: int, mode: str) -> dict[str, Any]:
    """The same step of ``nn.Sequential`` with float32 parameters, under autocast for a half type: operator calls and bytes.

    It runs on fake CPU tensors. Dropout counts as one operator, as on CUDA. A convolution's backward pass counts as one too,
    although it launches several kernels on CUDA.
    """
    count = OperatorCount()

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)

    with FakeTensorMode(), kernels.use_backend("torch"):
        net = reference_alexnet()

        def forward(x: Tensor) -> Tensor:
            with autocast():
                return net(x)

        images = _images(torch.float32)
        labels = torch.zeros(batch, dtype=torch.long)

        def step() -> None:
            _step(net, forward, images(batch), labels, mode, lambda: None)

        with (
            mock.patch.object(F, "dropout", _cuda_dropout),
            mock.patch("alexnet_triton.training.trainer.input_for", _plain_input),
        ):
            if mode == "trainer":
                step = _trainer_step(net, forward, batch, torch.optim.SGD(net.parameters(), lr=0.01, foreach=True))
            with count:
                step()
        saved = _saved_bytes_an_image(forward, images) if mode != "infer" else 0
    return {"launches": count.calls, "bytes": count.bytes, "saved_bytes_per_image": saved}


def audit(arch: str, dtype: torch.dtype, batch: int, mode: str) -> dict[str, Any]:
    """The whole audit as JSON: ``records`` of our launches, and ``totals`` of ours and of ``nn.Sequential``."""
    records, ours = audit_ours(arch, dtype, batch, mode)
    peer = audit_peer(dtype, batch, mode)
    ratios = {key: round(ours[key] / peer[key], 4) for key in ("launches", "bytes", "saved_bytes_per_image") if peer[key]}
    return {
        "arch": arch,
        "gpu": TARGETS[arch].name,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "mode": mode,
        "records": [r.as_json() for r in records],
        "totals": ours | {"nn_sequential": peer, "ratio_to_nn_sequential": ratios},
    }


def by_layer(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records summed over each layer and pass, in the order of the step."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["layer"], record["pass"]), []).append(record)
    rows = []
    for (layer, which), group in groups.items():
        row = {"layer": layer, "pass": which, "launches": len(group), "regs": max(r["regs"] for r in group)}
        row |= {key: sum(r[key] for r in group) for key in ("useful_flops", "issued_flops", "min_bytes")}
        floors = [r["floor_us"] for r in group]
        rows.append(row | {"floor_us": None if None in floors else round(sum(floors), 1)})
    return rows


def case_name(arch: str, dtype: str, batch: int, mode: str) -> str:
    """Key of an audit in :data:`COMMITTED`."""
    return f"{arch}-{dtype}-N{batch}-{mode}"


#: The totals that may not get worse, and whether more is worse.
HELD = {"launches": True, "useful_over_issued": False, "bytes": True, "saved_bytes_per_image": True, "spill_bytes": True}


def worse(totals: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """One text for each total of :data:`HELD` that is worse than the committed one."""
    complaints = []
    for key, more_is_worse in HELD.items():
        now, before = totals[key], committed[key]
        if (now > before) if more_is_worse else (now < before):
            complaints.append(f"{key}: {now}, committed {before}")
    return complaints


#: The columns that come from compiled code.
_COMPILED = (
    *("regs", "spill_bytes", "smem_bytes", "num_warps", "num_stages"),
    *("programs_per_multiprocessor", "tensor_core_ops", "tma_loads"),
)


def print_table(result: dict[str, Any], console: Console) -> None:
    """Print the launches, ordered by layer, and the totals."""
    title = (
        f"{result['mode']} step, {result['dtype']}, batch {result['batch']}, compiled for {result['arch']} ({result['gpu']})"
    )
    table = Table(title=title + "; static, nothing measured", title_justify="left")
    for name in ("layer", "pass", "kernel"):
        table.add_column(name, no_wrap=True)
    numbers = (
        "regs",
        "spill",
        "smem",
        "warps",
        "stages",
        "fit",
        "tc ops",
        "tma",
        "grid",
        "waves",
        "GFLOP",
        "useful",
        "MB",
        "floor us",
    )
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    order = ["data", *LAYERS, "loss", "optimizer", "other"]
    for r in sorted(result["records"], key=lambda r: order.index(r["layer"])):
        issued = r["issued_flops"]
        table.add_row(
            r["layer"],
            r["pass"],
            r["kernel"].strip("_").removesuffix("_kernel"),
            *(str(r[key]) if r["grid"] else "" for key in _COMPILED),
            "x".join(map(str, r["grid"])),
            f"{r['waves']:.2f}" if r["grid"] else "",
            f"{r['useful_flops'] / 1e9:.1f}" if issued else "",
            f"{r['useful_flops'] / issued:.2f}" if issued else "",
            f"{r['min_bytes'] / 1e6:.1f}",
            "" if r["floor_us"] is None else f"{r['floor_us']:.1f}",
        )
    console.print(table)
    summary = Table(title="totals a step", title_justify="left")
    for name in ("", "ours", "nn.Sequential", "ratio"):
        summary.add_column(name, justify="right" if name else "left")
    for row in total_rows(result["totals"]):
        summary.add_row(*row)
    console.print(summary)


def total_rows(totals: dict[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    """The totals as (name, ours, nn.Sequential's, ratio)."""
    peer, ratio = totals["nn_sequential"], totals["ratio_to_nn_sequential"]
    launches = f"{totals['launches']} ({totals['triton_launches']} Triton, {totals['torch_operators']} PyTorch)"
    yield "launches", launches, str(peer["launches"]), f"{ratio['launches']:.2f}"
    yield "fewest bytes moved, MB", f"{totals['bytes'] / 1e6:.0f}", f"{peer['bytes'] / 1e6:.0f}", f"{ratio['bytes']:.2f}"
    if totals["saved_bytes_per_image"]:
        ours, theirs = (f"{t['saved_bytes_per_image'] / 1e6:.2f}" for t in (totals, peer))
        yield "saved for backward, MB an image", ours, theirs, f"{ratio['saved_bytes_per_image']:.2f}"
    yield "useful / issued FLOPs", f"{totals['useful_over_issued']:.3f}", "", ""
    yield "spilled bytes", str(totals["spill_bytes"]), "", ""
    if totals["floor_us"] is not None:
        yield "floor of these launches, us", f"{totals['floor_us']:.0f}", "", ""


def main() -> None:
    """Audit, print the tables, and optionally write the JSON or update the committed totals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", default="sm_90", choices=list(TARGETS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--mode", default="train", choices=["train", "trainer", "infer"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all records and totals to FILE")
    parser.add_argument("--untuned", action="store_true", help="use the rules' configurations, without tuned tables")
    parser.add_argument("--update", action="store_true", help=f"write the totals into {COMMITTED.name}")
    arguments = parser.parse_args()
    if arguments.update and arguments.untuned:
        parser.error(f"{COMMITTED.name} holds the configurations of the tuned tables: leave out --untuned")
    try:
        with tables.untuned() if arguments.untuned else contextlib.nullcontext():
            result = audit(arguments.arch, getattr(torch, arguments.dtype), arguments.batch, arguments.mode)
    except RuntimeError as error:
        sys.exit(f"audit: {error}")
    print_table(result, Console(width=None if sys.stdout.isatty() else 200))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.update:
        committed = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
        key = case_name(arguments.arch, arguments.dtype, arguments.batch, arguments.mode)
        committed[key] = result["totals"] | {"layers": by_layer(result["records"])}
        COMMITTED.write_text(json.dumps(committed, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
