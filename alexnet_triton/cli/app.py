"""The command line: ``alexnet-triton train | compare | evaluate | predict | summary | explain | tune``."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels.configs import tables

from ..data.dataset import DataError
from ..data.image_files import read_images
from ..data.image_folder import load_test
from ..explain import explain
from ..models import IMAGE_SIZE, reference_alexnet, reference_lenet
from ..training.checkpoint import CheckpointError
from ..training.evaluation import classify, evaluate
from ..training.networks import load_checkpoint
from .compare import compare_command
from .options import (
    BackendChoice,
    BackendOption,
    BatchOption,
    DataOption,
    DeviceOption,
    LimitOption,
    Model,
    WorkersOption,
    console,
    fail,
    print_table,
    runs_on,
    show_tracebacks,
    usable_device,
)
from .train import train_command

app = typer.Typer(
    help="AlexNet on hand-written Triton kernels.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


@app.callback()
def _app(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, not its message alone.")] = False,
) -> None:
    show_tracebacks(debug)


app.command("train")(train_command)
app.command("compare")(compare_command)


@app.command("evaluate")
def evaluate_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint.pt of `train`.")],
    backend: BackendOption = BackendChoice.auto,
    data: DataOption = None,
    batch_size: BatchOption = 128,
    limit: LimitOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Accuracy and loss of a checkpoint on the test images."""
    where = usable_device(device)
    try:
        net, kept = load_checkpoint(checkpoint, where)
        model = kept.model
        test = load_test(
            data, classes=kept.classes, size=kept.size, channels=kept.channels, limit=limit, workers=workers, device=where
        )
        with kernels.use_backend(backend.value):
            console.print(f"{model} on {runs_on(where)}, {len(test)} test images")
            loss, accuracy = evaluate(net, test, batch_size=batch_size, image_size=IMAGE_SIZE[model], device=where)
    except (CheckpointError, DataError, OSError, RuntimeError) as error:
        raise fail(error) from error
    console.print(f"test accuracy {accuracy:.4f}  test loss {loss:.4f}")


@app.command("predict")
def predict_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint.pt or best.pt of `train`.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, of any format that Pillow reads.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to print for each image, the most probable first.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: {file: {class: probability}}.")] = False,
    backend: BackendOption = BackendChoice.auto,
    batch_size: BatchOption = 128,
    device: DeviceOption = "auto",
) -> None:
    """The most probable classes of image files, with their probabilities.

    The shorter side of an image is made as long as that of the images that the network was trained on, and the middle is cut
    out. A file that cannot be read is named, the others are still classified, and the exit code is 1.
    """
    where = usable_device(device)
    errors: list[DataError] = []
    found: dict[str, dict[str, float]] = {}
    try:
        net, kept = load_checkpoint(checkpoint, where)
        with kernels.use_backend(backend.value):
            # Batch by batch, so that thousands of photographs are never in memory at once.
            for begin in range(0, len(images), batch_size):
                pixels, paths, failed = read_images(images[begin : begin + batch_size], kept.channels, kept.size)
                errors += failed
                if not paths:
                    continue
                probabilities = classify(net, pixels, batch_size=batch_size, image_size=IMAGE_SIZE[kept.model], device=where)
                for path, row in zip(paths, probabilities, strict=True):
                    values, order = row.topk(min(top, len(kept.classes)))
                    found[str(path)] = {kept.classes[i]: p for i, p in zip(order.tolist(), values.tolist(), strict=True)}
    except (CheckpointError, OSError, RuntimeError) as error:
        raise fail(error) from error
    if as_json:
        print(json.dumps(found))
    else:
        width = max(map(len, kept.classes))
        for name, classes in found.items():
            console.print(name, markup=False)
            for label, probability in classes.items():
                console.print(f"  {label:{width}}  {probability:.4f}", markup=False)
    if errors:
        for unreadable in errors[:-1]:
            fail(unreadable)
        raise fail(errors[-1])


def layer_table(net: nn.Sequential, input_size: tuple[int, ...]) -> list[dict[str, Any]]:
    """For each layer: index, layer, output shape, parameters, FLOPs of a forward pass (a multiply and an add are two).

    FLOPs are counted by PyTorch's ``FlopCounterMode``, which counts the matrix products; nothing is computed.
    """
    rows = []
    x = torch.empty(input_size, device="meta")
    for index, layer in enumerate(net.to("meta")):
        with FlopCounterMode(display=False) as counter:
            x = layer(x)
        parameters = sum(p.numel() for p in layer.parameters())
        rows.append(
            {
                "index": index,
                "layer": str(layer),
                "output": tuple(x.shape),
                "parameters": parameters,
                "flops": counter.get_total_flops(),
            }
        )
    return rows


@app.command("summary")
def summary_command(
    model: Annotated[Model, typer.Option(help="The network.")] = Model.alexnet,
    batch_size: BatchOption = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """The layer table: output shapes, parameters, FLOPs of a forward pass."""
    net = reference_alexnet() if model is Model.alexnet else reference_lenet()
    side = IMAGE_SIZE[model]
    rows = layer_table(net, (batch_size, 1, side, side))
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(title=f"{model.value}, input {batch_size} x 1 x {side} x {side}", show_footer=True)
    table.add_column("#", justify="right")
    table.add_column("layer")
    table.add_column("output", footer="total")
    table.add_column("parameters", justify="right", footer=f"{sum(r['parameters'] for r in rows):,}")
    table.add_column("MFLOP", justify="right", footer=f"{sum(r['flops'] for r in rows) / 1e6:,.1f}")
    for row in rows:
        table.add_row(
            str(row["index"]),
            row["layer"],
            " x ".join(map(str, row["output"])),
            f"{row['parameters']:,}" if row["parameters"] else "",
            f"{row['flops'] / 1e6:,.1f}" if row["flops"] else "",
        )
    print_table(table)


def _import_model(target: str) -> nn.Module:
    """``package.module:function`` called without arguments; on the meta device where it can, so that no weight is drawn."""
    module_name, _, function_name = target.partition(":")
    sys.path.insert(0, "")  # the user's own modules, as `python -m` finds them
    try:
        make = getattr(importlib.import_module(module_name), function_name)
        try:
            with torch.device("meta"):
                net = make()
        except (NotImplementedError, RuntimeError):  # it looks at values, which meta tensors do not have
            net = make()
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(f"cannot make a network by {target!r}: {error}", param_hint="MODEL") from error
    if not isinstance(net, nn.Module):
        raise typer.BadParameter(f"{target!r} returned a {type(net).__name__}, not an nn.Module", param_hint="MODEL")
    return net


@app.command("explain")
def explain_command(
    model: Annotated[
        str,
        typer.Argument(
            help="alexnet, lenet, or package.module:function that returns a network, such as torchvision.models:vgg16."
        ),
    ] = "alexnet",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Which runs of layers fuse() hands to which operation, and why the others are called as they stand."""
    known = {"alexnet": "alexnet_triton:reference_alexnet", "lenet": "alexnet_triton:reference_lenet"}
    if model not in known and ":" not in model:
        raise typer.BadParameter(f"{model!r} is neither alexnet nor lenet nor package.module:function", param_hint="MODEL")
    explanation = explain(_import_model(known.get(model, model)))
    print(json.dumps([run._asdict() for run in explanation.runs]) if as_json else explanation)


def _with_values(arguments: list[str]) -> list[str]:
    """The command line with ``--resume=`` for a ``--resume`` without a path: Typer knows no value that may be left out."""
    return [
        "--resume=" if argument == "--resume" and after.startswith("-") else argument
        for argument, after in itertools.pairwise([*arguments, "-"])
    ]


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # The name of a file or of a class may have what the terminal cannot write, or not be UTF-8 at all.
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(app(_with_values(sys.argv[1:]), prog_name="alexnet-triton"))
    except OSError as error:  # of a path on the command line, before a command opens anything: not to be entered, too long, ...
        raise SystemExit(fail(error).exit_code) from error


@app.command(name="tune")
def tune_command(
    batch: Annotated[list[int], typer.Option(min=1, help="Batch sizes to tune for; give the option several times.")] = [128],  # noqa: B006
    layer: Annotated[list[str] | None, typer.Option(help="Layers to tune, conv1 to fc3; all if not given.")] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="bfloat16 (float16 shares its entries), float32 or tf32. float32 follows PyTorch's default switches: "
            "convolutions in TF32, linear layers exact. tf32: both in TF32."
        ),
    ] = "bfloat16",
    every: Annotated[bool, typer.Option(help="Show the time of each candidate, not of the best alone.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The table. Default: the one that the kernels read.", show_default=False)
    ] = None,
) -> None:
    """Measure every kernel configuration on this GPU and keep the fastest that is right."""
    from .. import tune

    if dtype not in tune.PRECISIONS:
        raise typer.BadParameter(f"must be one of {', '.join(tune.PRECISIONS)}", param_hint="--dtype")
    known = (*tune.LAYERS, *tune.LINEAR_LAYERS)
    if unknown := [name for name in layer or () if name not in known]:
        raise typer.BadParameter(f"no layer {unknown[0]!r}; there are {', '.join(known)}", param_hint="--layer")
    if not torch.cuda.is_available():
        raise fail("tune needs a CUDA GPU")
    path = out or tables.TABLES / f"{tables.gpu_slug(torch.cuda.get_device_name())}.json"

    def show(result: tune.Tuned) -> None:
        job = result.job
        console.print(
            f"{job.layer} {job.pass_} batch {job.batch}: {1e3 * result.best_ms:.1f} us, the rule {1e3 * result.rule_ms:.1f}, "
            f"PyTorch {1e3 * result.peer_ms:.1f}; {len(result.times)} candidates, {len(result.wrong)} wrong; {result.best}",
            markup=False,
        )
        for line in result.wrong[:3]:
            console.print(f"  wrong: {line}", markup=False)
        if every:
            for ms, candidate in result.times:
                console.print(f"  {1e3 * ms:7.1f} us {candidate or 'the rule'}", markup=False)

    work = tune.jobs(tuple(batch), tuple(layer) if layer else known, tune.PRECISIONS[dtype][0])
    try:
        results = tune.tune(work, dtype, path, show)
    except (ValueError, OSError) as error:
        raise fail(error) from error
    console.print(f"{path}: {len(results)} entries, {tune.speedup(results):.2f} times as fast as PyTorch (geometric mean)")
