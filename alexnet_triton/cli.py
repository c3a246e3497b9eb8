"""The command line: ``alexnet-triton train | evaluate | predict | summary | explain | tune``."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import shlex
import signal
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kernels

from .checkpoint import BEST, LAST, Checkpoint, CheckpointError, read_checkpoint, training_state
from .data import DataError, Dataset
from .distributed import Processes, joined
from .evaluation import classify, evaluate, measure_speed, predict_split
from .explain import explain
from .image_files import read_images
from .image_folder import default_channels, is_image_folder, load_data, load_test
from .models import IMAGE_SIZE, reference_alexnet, reference_lenet
from .plot import plot_confusion, plot_curves, plot_most_wrong
from .signals import Stopped, StopSignals
from .training import (
    LEARNING_RATE,
    METRICS,
    EpochMetrics,
    default_precision,
    describe_backend,
    float32_products,
    holds_run,
    load_checkpoint,
    new_model,
    train,
)

#: The pictures that a run writes.
CURVES, CONFUSION, MOST_WRONG = "curves.png", "confusion.png", "most_wrong.png"

app = typer.Typer(
    help="AlexNet on hand-written Triton kernels.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
console = Console(soft_wrap=True, highlight=False)


class Model(StrEnum):
    """The networks that can be trained."""

    alexnet = "alexnet"
    lenet = "lenet"


class PrecisionChoice(StrEnum):
    """What a network computes in."""

    auto = "auto"
    float32 = "float32"
    tf32 = "tf32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class BackendChoice(StrEnum):
    """See :func:`kernels.use_backend`."""

    auto = "auto"
    triton = "triton"
    torch = "torch"


DataOption = Annotated[
    str | None,
    typer.Option(
        help="A folder of images: train and test (or val), in each a folder for every class. Or a folder of Fashion-MNIST's "
        "IDX files, or 'sample' for its small sample inside the package. Default: Fashion-MNIST from the usual places, else "
        "torchvision's download.",
        show_default=False,
    ),
]
BackendOption = Annotated[BackendChoice, typer.Option(help="auto: Triton kernels on CUDA, PyTorch on the CPU.")]
LimitOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Use at most N training and N test images: the first ones, of a folder of images evenly spread ones."
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=0, help="Processes that decode a folder of images; 0: this one.", show_default="one a core, 8 at most"),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
BatchOption = Annotated[int, typer.Option(min=1, help="Images in a batch.")]


_debug = False


@app.callback()
def _app(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, not its message alone.")] = False,
) -> None:
    global _debug
    _debug = debug


def _fail(message: object) -> typer.Exit:
    if _debug and isinstance(message, BaseException):
        raise message
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"alexnet-triton: {message}", markup=False)
    return typer.Exit(1)


def _one_or_three(channels: int | None) -> int | None:
    if channels not in (None, 1, 3):
        raise typer.BadParameter(f"must be 1 (grey) or 3 (red, green, blue), not {channels}")
    return channels


ChannelsOption = Annotated[
    int | None,
    typer.Option(
        callback=_one_or_three,
        help="1: a folder's images become grey, 3: red, green and blue.",
        show_default="3; Fashion-MNIST has 1",
    ),
]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{name!r} is no usable device: {str(error).splitlines()[0]}") from error


def _local_device(name: str, processes: Processes) -> torch.device:
    """:func:`_device`; of several processes on GPUs, each has the one of its local rank."""
    if processes.size == 1:
        return _device(name)
    if ":" in name:
        raise typer.BadParameter(f"{processes.size} processes cannot share {name}: give cuda", param_hint="--device")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        device = _device(f"cuda:{processes.local_rank}")
        torch.cuda.set_device(device)
        return device
    return _device(name)


def _runs_on(device: torch.device) -> str:
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"the CPU ({torch.get_num_threads()} threads)"
    return f"{describe_backend(device)} on {hardware}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class _Bar:
    """The progress bar of an epoch; nothing where the output is no terminal."""

    def __init__(self, images: int, epochs: int) -> None:
        self.images, self.epochs = images, epochs
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} images/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=images, epoch=0, loss=0.0, speed=0.0)

    def epoch(self, epoch: int) -> Any:
        """The progress callback of one epoch; None where nothing is shown, so that no step waits for its loss."""
        if self.progress.disable:
            return None
        self.progress.reset(self.task, total=self.images, epoch=epoch, loss=0.0, speed=0.0)
        return lambda seen, loss, speed: self.progress.update(self.task, completed=seen, loss=loss, speed=speed)


def _print_epoch(metrics: EpochMetrics) -> None:
    console.print(
        f"epoch {metrics.epoch:3d}  loss {metrics.loss:.4f}  train acc {metrics.train_acc:.4f}  "
        f"test acc {metrics.test_acc:.4f}  {metrics.images_per_s:.1f} images/s  {metrics.seconds:.1f} s"
    )


@dataclasses.dataclass(frozen=True)
class _RunOptions:
    """The options of ``train`` that a checkpoint keeps: a resumed run has them without being told again."""

    model: str
    backend: str
    data: str | None
    channels: int
    workers: int | None
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    limit: int | None
    seed: int
    dtype: str
    graph: bool
    augment: bool
    device: str


#: What a resumed run may have otherwise: where and for how long it runs, and what helps one that diverged.
_MAY_CHANGE = frozenset({"backend", "data", "device", "epochs", "graph", "lr", "weight_decay", "workers"})


def _checkpoint_to_resume(resume: str, out: Path | None) -> Path:
    """The file that ``--resume`` means: a file, that of a folder, or for "" that of ``out`` or of the newest run."""
    if resume:
        path = Path(resume)
        path = path / LAST if path.is_dir() else path
    elif out is not None:
        path = out / LAST
    else:
        runs = sorted(Path("runs").glob(f"*/{LAST}"), key=lambda file: file.stat().st_mtime)
        if not runs:
            raise typer.BadParameter("no folder in runs/ holds a checkpoint; give a path", param_hint="--resume")
        path = runs[-1]
    if out is not None and path.resolve().parent != out.resolve():
        raise typer.BadParameter(f"a resumed run goes on in its own folder, {path.parent}", param_hint="--out")
    return path


def _options_of_resumed(context: typer.Context, checkpoint: Checkpoint) -> dict[str, Any]:
    """The parameters of ``train``: those of the run in ``checkpoint``, apart from what is given on the command line."""
    options = dict(context.params)
    saved = training_state(checkpoint).get("options", {})
    if unknown := [name for name in saved if name not in options]:
        raise CheckpointError(f"{checkpoint.path}: made by another version of this program: it has an option {unknown[0]}")
    for name, value in saved.items():
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE" and (name, options[name]) != ("dtype", "auto")
        if given and name not in _MAY_CHANGE and options[name] != value:
            raise typer.BadParameter(
                f"the run in {checkpoint.path} has {value}, not {options[name]}", param_hint="--" + name.replace("_", "-")
            )
        if not given:
            options[name] = value
    return options


def _resolved(options: dict[str, Any], where: torch.device) -> _RunOptions:
    """What the defaults of ``train`` come down to on ``where``."""
    resolved = {field.name: options[field.name] for field in dataclasses.fields(_RunOptions)}
    resolved["model"], resolved["backend"] = str(options["model"]), str(options["backend"])
    resolved["dtype"] = default_precision(where) if options["dtype"] == PrecisionChoice.auto else str(options["dtype"])
    resolved["channels"] = options["channels"] or default_channels(options["data"])
    if options["data"] not in (None, "sample"):
        resolved["data"] = str(Path(options["data"]).expanduser().resolve())  # found from another folder too
    if options["lr"] is None:
        resolved["lr"] = LEARNING_RATE[options["model"]]
    return _RunOptions(**resolved)


@app.command("train")
def train_command(
    context: typer.Context,
    model: Annotated[Model, typer.Option(help="The network.")] = Model.alexnet,
    backend: BackendOption = BackendChoice.auto,
    data: DataOption = None,
    channels: ChannelsOption = None,
    workers: WorkersOption = None,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch, that of all processes together.")] = 128,
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="Learning rate of plain SGD.", show_default="0.01; lenet 0.9")
    ] = None,
    momentum: Annotated[float, typer.Option(min=0.0, help="Of SGD.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Factor of the L2 penalty's gradient.")] = 0.0,
    limit: LimitOption = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the order of the images and dropout.")] = 0,
    dtype: Annotated[
        PrecisionChoice,
        typer.Option(
            help="auto: bfloat16 with float32 masters on a GPU that has it, else float32. tf32: float32 on tensor cores."
        ),
    ] = PrecisionChoice.auto,
    graph: Annotated[
        bool | None, typer.Option("--graph/--no-graph", help="Each step as one CUDA graph.", show_default="on CUDA")
    ] = None,
    augment: Annotated[
        bool, typer.Option("--augment", help="Crop, flip and change brightness and contrast of each image at random.")
    ] = False,
    device: DeviceOption = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="runs/MODEL-DATE-TIME")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[PATH]",
            help="Go on with the run of a checkpoint or folder, without a path with the newest one in runs/, to the same bits "
            "as if it had never stopped. All options are the run's own; these may be given anew: "
            + ", ".join(sorted(_MAY_CHANGE)),
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train on Fashion-MNIST or on your own images.

    Written are metrics.jsonl, curves.png, confusion.png, most_wrong.png, checkpoint.pt (the last epoch), best.pt (the best).

    Ctrl-C and SIGTERM finish the step, save, say how to resume and end with exit code 128 + the signal's number (130, 143); a
    second one ends the process at once.

    With several GPUs: torchrun --nproc-per-node=N -m alexnet_triton train ...
    """
    with joined() as processes:
        console.quiet = not processes.leads
        status = _train(context, resume, out, processes)
    if status:
        raise typer.Exit(status)


def _what_to_train(
    context: typer.Context, resume: str | None, out: Path | None
) -> tuple[dict[str, Any], Path, Checkpoint | None]:
    """The parameters of ``train``, the folder to write into, and the checkpoint to resume."""
    if resume is not None:
        path = _checkpoint_to_resume(resume, out)
        try:
            checkpoint = read_checkpoint(path)
            return _options_of_resumed(context, checkpoint), path.parent, checkpoint
        except CheckpointError as error:
            raise _fail(error) from error
    out = out or Path("runs") / f"{context.params['model']}-{time.strftime('%Y%m%d-%H%M%S')}"
    if holds_run(out):
        raise typer.BadParameter(
            f"{out} already holds a run; choose another folder, or go on with it by --resume {out}", param_hint="--out"
        )
    return dict(context.params), out, None


def _load(run: _RunOptions, device: torch.device, processes: Processes) -> Dataset:
    """The data of a run, limited; a folder's images, which each process decodes for itself, on ``device``."""

    def load() -> Dataset:
        size = IMAGE_SIZE[run.model]
        return load_data(run.data, size=size, channels=run.channels, limit=run.limit, workers=run.workers, device=device)

    if is_image_folder(run.data):
        console.print(f"reading the images of {run.data}")  # which can take minutes
        return load()
    return processes.first_on_each_machine(load)  # of which one may download


def _train(context: typer.Context, resume: str | None, out: Path | None, processes: Processes) -> int:
    """What ``train`` does, in each of the processes; the exit code."""
    begin = time.perf_counter()
    parameters, out, checkpoint = processes.from_leader(lambda: _what_to_train(context, resume, out))
    where = _local_device(parameters["device"], processes)
    if parameters["graph"] is None or (checkpoint is not None and context.params["graph"] is None):
        # Where it can be; a run that was without one stays so.
        parameters["graph"] = parameters["graph"] is not False and where.type == "cuda" and processes.size == 1
        if where.type == "cuda" and processes.size > 1:
            console.print(f"no CUDA graph: it is for one process, not for {processes.size}")
    run = _resolved(parameters, where)
    if run.graph and where.type != "cuda":
        raise typer.BadParameter(f"a CUDA graph needs a CUDA device, not {where.type}", param_hint="--graph")
    if run.graph and processes.size > 1:
        raise typer.BadParameter(f"a CUDA graph is for one process, not for {processes.size}", param_hint="--graph")
    if checkpoint is not None and len(checkpoint.metrics) >= run.epochs:
        console.print(f"{out}: all {run.epochs} epochs are done; --resume {out} --epochs N goes on")
        return 0
    stops = StopSignals()
    try:
        dataset = _load(run, where, processes)
        with kernels.use_backend(run.backend), float32_products(run.dtype), contextlib.ExitStack() as while_training:  # type: ignore[arg-type]
            runs_on = f"{_runs_on(where)}, {run.dtype}" + f", {processes.size} processes" * (processes.size > 1)
            training, test = dataset.train, dataset.test
            setup_begin = time.perf_counter()
            ready: list[float] = []
            torch_dtype = torch.float32 if run.dtype == "tf32" else getattr(torch, run.dtype)
            net = new_model(run.model, run.seed, where, torch_dtype, len(dataset.classes), training.channels)
            expected = ""
            # A step that is not captured says nothing of one that is, nor one process of several.
            if not run.graph and processes.size == 1:
                speed = measure_speed(net, training, run.batch_size, IMAGE_SIZE[run.model], where)
                expected = (
                    f": about {_duration(len(training) / speed)} an epoch of {len(training)} images ({speed:.1f} images/s)"
                )
            console.print(f"{run.model} on {runs_on}{expected}")
            console.print(
                f"data {dataset.source} ({len(training)} train, {len(test)} test, {len(dataset.classes)} classes), "
                f"batch {run.batch_size}, lr {run.lr}, seed {run.seed}"
            )
            if checkpoint is not None:
                console.print(f"resumed from {checkpoint.path} after {len(checkpoint.metrics)} whole epoch(s)")
            if processes.leads:
                out.mkdir(parents=True, exist_ok=True)
            bar = _Bar(len(training), run.epochs)

            def begin_training() -> None:
                ready.append(time.perf_counter())
                while_training.enter_context(stops)  # until then nothing could be saved

            with bar.progress:
                history = train(
                    net,
                    training,
                    test,
                    model=run.model,
                    classes=dataset.classes,
                    epochs=run.epochs,
                    batch_size=run.batch_size,
                    lr=run.lr,
                    seed=run.seed,
                    device=where,
                    out=out,
                    graph=run.graph,
                    augment=run.augment,
                    momentum=run.momentum,
                    weight_decay=run.weight_decay,
                    resume=checkpoint,
                    options=dataclasses.asdict(run),
                    stop=stops,
                    processes=processes,
                    on_ready=begin_training,
                    on_batch=bar.epoch,
                    on_epoch=_print_epoch,
                )
            if processes.leads:
                said = predict_split(net, test, batch_size=run.batch_size, image_size=IMAGE_SIZE[run.model], device=where)
        if processes.leads:
            title = f"{run.model} on {dataset.name}, {runs_on}"
            plot_curves(history, out / CURVES, title)
            plot_confusion(test, said, dataset.classes, out / CONFUSION, title)
            plot_most_wrong(test, said, dataset.classes, out / MOST_WRONG, title)
    except Stopped as stopped:
        received = stops.received or signal.SIGTERM  # another process may have got it
        again = f"train --resume {shlex.quote(str(out))}"
        if processes.size > 1:
            again += f" in {processes.size} processes"
        console.print(f"{received.name}: stopped {stopped}; go on with: alexnet-triton {again}")
        return 128 + received
    except (CheckpointError, DataError, FloatingPointError, OSError, RuntimeError) as error:
        raise _fail(error) from error
    last = history[-1]
    console.print(f"test accuracy {last.test_acc:.4f}, training loss {last.loss:.4f} after {last.epoch} epoch(s)")
    seconds, setup_seconds = sum(m.seconds for m in history), ready[0] - setup_begin
    console.print(
        f"training {seconds:.1f} s ({len(history) * len(training) / seconds:.1f} images/s), "
        f"setup {setup_seconds:.1f} s (weights, compilation, warm-up, capture), "
        f"{time.perf_counter() - begin:.1f} s from start to end"
    )
    pictures = ", ".join(str(out / name) for name in (CURVES, CONFUSION, MOST_WRONG))
    console.print(f"pictures {pictures}  metrics {out / METRICS}  checkpoints {out / LAST}, {out / BEST}")
    return 0


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
    where = _device(device)
    try:
        net, kept = load_checkpoint(checkpoint, where)
        model = kept.model
        test = load_test(
            data, classes=kept.classes, size=kept.size, channels=kept.channels, limit=limit, workers=workers, device=where
        )
        with kernels.use_backend(backend.value):
            console.print(f"{model} on {_runs_on(where)}, {len(test)} test images")
            loss, accuracy = evaluate(net, test, batch_size=batch_size, image_size=IMAGE_SIZE[model], device=where)
    except (CheckpointError, DataError, OSError, RuntimeError) as error:
        raise _fail(error) from error
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
    where = _device(device)
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
        raise _fail(error) from error
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
            _fail(unreadable)
        raise _fail(errors[-1])


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
    console.print(table)


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
    sys.exit(app(_with_values(sys.argv[1:]), prog_name="alexnet-triton"))


@app.command(name="tune")
def tune_command(
    batch: Annotated[list[int], typer.Option(min=1, help="Batch sizes to tune for; give the option several times.")] = [128],  # noqa: B006
    layer: Annotated[list[str] | None, typer.Option(help="Layers to tune, conv1 to fc3; all if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16")] = "bfloat16",
    every: Annotated[bool, typer.Option(help="Show the time of each candidate, not of the best alone.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The table. Default: the one that the kernels read.", show_default=False)
    ] = None,
) -> None:
    """Measure every kernel configuration on this GPU and keep the fastest that is right."""
    from . import tune

    if dtype not in ("bfloat16", "float16"):
        raise typer.BadParameter("must be bfloat16 or float16", param_hint="--dtype")
    known = (*tune.LAYERS, *tune.LINEAR_LAYERS)
    if unknown := [name for name in layer or () if name not in known]:
        raise typer.BadParameter(f"no layer {unknown[0]!r}; there are {', '.join(known)}", param_hint="--layer")
    if not torch.cuda.is_available():
        raise _fail("tune needs a CUDA GPU")
    path = out or kernels.config.TABLES / f"{kernels.config.gpu_slug(torch.cuda.get_device_name())}.json"

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

    work = tune.jobs(tuple(batch), tuple(layer) if layer else known)
    results = tune.tune(work, getattr(torch, dtype), path, show)
    console.print(f"{path}: {len(results)} entries, {tune.speedup(results):.2f} times as fast as PyTorch (geometric mean)")
