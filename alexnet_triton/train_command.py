"""``alexnet-triton train``: a run from its options or from a checkpoint, with progress, pictures and an end by a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import kernels

from .checkpoint import BEST, LAST, Checkpoint, CheckpointError, read_checkpoint, training_state
from .data import EVERYTHING, NOTHING, Augment, DataError, Dataset
from .distributed import Processes, joined
from .evaluation import measure_speed, predict_split
from .events import EpochEvents, summary_writer
from .image_folder import default_channels, is_image_folder, load_data
from .models import IMAGE_SIZE
from .options import (
    AugmentOption,
    BackendChoice,
    BackendOption,
    ChannelsOption,
    ColourOption,
    CropOption,
    DataOption,
    DeviceOption,
    EpochsOption,
    FlipOption,
    GraphOption,
    LimitOption,
    Model,
    PrecisionChoice,
    PrecisionOption,
    SeedOption,
    TensorboardOption,
    TotalBatchOption,
    WorkersOption,
    console,
    fail,
    local_device,
    runs_on,
)
from .plot import plot_confusion, plot_curves, plot_most_wrong
from .signals import Stopped, StopSignals
from .training import (
    LEARNING_RATE,
    METRICS,
    EpochMetrics,
    default_precision,
    float32_products,
    holds_run,
    new_model,
    train,
)

#: The pictures that a run writes.
CURVES, CONFUSION, MOST_WRONG = "curves.png", "confusion.png", "most_wrong.png"


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
class RunOptions:
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
    flip: bool
    crop: str
    colour: bool
    tensorboard: bool
    device: str

    @property
    def augment(self) -> Augment:
        """What is changed in the training images."""
        return Augment(self.flip, self.crop, self.colour)  # type: ignore[arg-type]  # which checks it


#: The options that are parts of the augmentation.
_PARTS = tuple(field.name for field in dataclasses.fields(Augment))

#: What a resumed run may have otherwise: where and for how long it runs, and what helps one that diverged.
_MAY_CHANGE = frozenset({"backend", "data", "device", "epochs", "graph", "lr", "tensorboard", "weight_decay", "workers"})


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
    if out is not None and os.path.dirname(os.path.realpath(path)) != os.path.realpath(out):  # of links in a circle, too
        raise typer.BadParameter(f"a resumed run goes on in its own folder, {path.parent}", param_hint="--out")
    return path


def _with_parts(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with each part of the augmentation: as ``augment`` has it where it is None."""
    parts = dataclasses.asdict(EVERYTHING if options["augment"] else NOTHING)
    return {**options} | {name: value if options[name] is None else options[name] for name, value in parts.items()}


def _options_of_resumed(context: typer.Context, checkpoint: Checkpoint) -> dict[str, Any]:
    """The parameters of ``train``: those of the run in ``checkpoint``, apart from what is given on the command line."""
    options = dict(context.params)
    if options["augment"]:
        options = _with_parts(options)
    saved = training_state(checkpoint).get("options", {})
    if unknown := [name for name in saved if name not in options]:
        raise CheckpointError(f"{checkpoint.path}: made by another version of this program: it has an option {unknown[0]}")
    try:
        Augment(**{name: saved[name] for name in _PARTS if name in saved})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: made by another version of this program: {error}") from error
    for name, value in saved.items():
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE" and (name, options[name]) != ("dtype", "auto")
        given = given or (name in _PARTS and options["augment"])
        if given and name not in _MAY_CHANGE and options[name] != value:
            raise typer.BadParameter(
                f"the run in {checkpoint.path} has {value}, not {options[name]}", param_hint="--" + name.replace("_", "-")
            )
        if not given:
            options[name] = value
    return options


def resolve(options: Mapping[str, Any], where: torch.device, processes: Processes) -> RunOptions:
    """What the options of a run come down to on ``where``; a ``graph`` of None: one where it can be.

    Raises:
        typer.BadParameter: a CUDA graph where there is none, or data where no path can lead.
        typer.Exit: a package that an option needs is missing, which is said.
    """
    options = _with_parts(options)
    resolved = {field.name: options[field.name] for field in dataclasses.fields(RunOptions)}
    for name in ("model", "backend", "crop"):  # plain strings, which a checkpoint can keep
        resolved[name] = str(options[name])
    resolved["dtype"] = default_precision(where) if options["dtype"] == PrecisionChoice.auto else str(options["dtype"])
    try:
        resolved["channels"] = options["channels"] or default_channels(options["data"])
        if options["data"] not in (None, "sample"):
            resolved["data"] = str(Path(options["data"]).expanduser().resolve())  # found from another folder too
    except (RuntimeError, ValueError) as error:  # links in a circle, no such user's home, a character that no path can have
        raise typer.BadParameter(f"{options['data']!r}: {error}", param_hint="--data") from error
    if options["lr"] is None:
        resolved["lr"] = LEARNING_RATE[options["model"]]
    if options["graph"] is None:
        resolved["graph"] = where.type == "cuda" and processes.size == 1
        if where.type == "cuda" and processes.size > 1:
            console.print(f"no CUDA graph: it is for one process, not for {processes.size}")
    run = RunOptions(**resolved)
    if run.graph and where.type != "cuda":
        raise typer.BadParameter(f"a CUDA graph needs a CUDA device, not {where.type}", param_hint="--graph")
    if run.graph and processes.size > 1:
        raise typer.BadParameter(f"a CUDA graph is for one process, not for {processes.size}", param_hint="--graph")
    if run.tensorboard:
        processes.from_leader(_check_tensorboard)
    return run


def _check_tensorboard() -> None:
    try:
        summary_writer()
    except ImportError as error:
        raise fail(error) from error


def train_command(
    context: typer.Context,
    model: Annotated[Model, typer.Option(help="The network.")] = Model.alexnet,
    backend: BackendOption = BackendChoice.auto,
    data: DataOption = None,
    channels: ChannelsOption = None,
    workers: WorkersOption = None,
    epochs: EpochsOption = 10,
    batch_size: TotalBatchOption = 128,
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="Learning rate of plain SGD.", show_default="0.01; lenet 0.9")
    ] = None,
    momentum: Annotated[float, typer.Option(min=0.0, help="Of SGD.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Factor of the L2 penalty's gradient.")] = 0.0,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    dtype: PrecisionOption = PrecisionChoice.auto,
    graph: GraphOption = None,
    augment: AugmentOption = False,
    flip: FlipOption = None,
    crop: CropOption = None,
    colour: ColourOption = None,
    tensorboard: TensorboardOption = False,
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
    second one ends the process at once, unless it is one of torchrun's, which passes the first on more than once.

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
            raise fail(error) from error
    out = out or Path("runs") / f"{context.params['model']}-{time.strftime('%Y%m%d-%H%M%S')}"
    if holds_run(out):
        raise typer.BadParameter(
            f"{out} already holds a run; choose another folder, or go on with it by --resume {out}", param_hint="--out"
        )
    return dict(context.params), out, None


def _load(run: RunOptions, device: torch.device, processes: Processes) -> Dataset:
    """The data of a run, limited; a folder's images, which each process decodes for itself, on ``device``."""

    def load() -> Dataset:
        size = IMAGE_SIZE[run.model]
        return load_data(run.data, size=size, channels=run.channels, limit=run.limit, workers=run.workers, device=device)

    if is_image_folder(run.data):
        console.print(f"reading the images of {run.data}")  # which can take minutes
        return load()
    return processes.first_on_each_machine(load)  # of which one may download


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a run comes to, besides its files.

    Attributes:
        net: the trained network.
        history: the metrics of all epochs.
        images_per_s: training images a second, over all epochs.
        data: name of the data.
        place: in words, what it ran on.
    """

    net: nn.Module
    history: list[EpochMetrics]
    images_per_s: float
    data: str
    place: str


def run_training(
    run: RunOptions,
    out: Path,
    where: torch.device,
    processes: Processes,
    stops: StopSignals,
    *,
    checkpoint: Checkpoint | None = None,
    begin: float,
) -> FinishedRun:
    """One run: train as ``run`` says, or go on from ``checkpoint``, with everything printed and written into ``out``.

    Args:
        stops: entered while something could be saved.
        begin: when the run began, by ``time.perf_counter``.

    Raises:
        Stopped: ``stops`` said so; all is saved.
        typer.Exit: it failed, which is said.
    """
    try:
        dataset = _load(run, where, processes)
        with kernels.use_backend(run.backend), float32_products(run.dtype), contextlib.ExitStack() as while_training:  # type: ignore[arg-type]
            place = f"{runs_on(where)}, {run.dtype}" + f", {processes.size} processes" * (processes.size > 1)
            training, test = dataset.train, dataset.test
            setup_begin = time.perf_counter()
            ready: list[float] = []
            events: list[EpochEvents] = []  # one, where it was asked for and this process leads
            torch_dtype = torch.float32 if run.dtype == "tf32" else getattr(torch, run.dtype)
            net = new_model(run.model, run.seed, where, torch_dtype, len(dataset.classes), training.channels)
            expected = ""
            # A step that is not captured says nothing of one that is, nor one process of several.
            if not run.graph and processes.size == 1:
                speed = measure_speed(net, training, run.batch_size, IMAGE_SIZE[run.model], where)
                expected = (
                    f": about {_duration(len(training) / speed)} an epoch of {len(training)} images ({speed:.1f} images/s)"
                )
            console.print(f"{run.model} on {place}{expected}")
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
                if run.tensorboard and processes.leads:
                    first = 1 if checkpoint is None else len(checkpoint.metrics) + 1
                    events.append(while_training.enter_context(EpochEvents(out, first, run.lr)))

            def end_epoch(metrics: EpochMetrics) -> None:
                _print_epoch(metrics)
                for each in events:
                    each.write(metrics)

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
                    on_epoch=end_epoch,
                )
            if processes.leads:
                said = predict_split(net, test, batch_size=run.batch_size, image_size=IMAGE_SIZE[run.model], device=where)
        if processes.leads:
            title = f"{run.model} on {dataset.name}, {place}"
            plot_curves(history, out / CURVES, title)
            plot_confusion(test, said, dataset.classes, out / CONFUSION, title)
            plot_most_wrong(test, said, dataset.classes, out / MOST_WRONG, title)
    except (CheckpointError, DataError, FloatingPointError, OSError, RuntimeError) as error:
        raise fail(error) from error
    last = history[-1]
    console.print(f"test accuracy {last.test_acc:.4f}, training loss {last.loss:.4f} after {last.epoch} epoch(s)")
    seconds, setup_seconds = sum(m.seconds for m in history), ready[0] - setup_begin
    images_per_s = len(history) * len(training) / seconds
    console.print(
        f"training {seconds:.1f} s ({images_per_s:.1f} images/s), "
        f"setup {setup_seconds:.1f} s (weights, compilation, warm-up, capture), "
        f"{time.perf_counter() - begin:.1f} s from start to end"
    )
    pictures = ", ".join(str(out / name) for name in (CURVES, CONFUSION, MOST_WRONG))
    console.print(f"pictures {pictures}  metrics {out / METRICS}  checkpoints {out / LAST}, {out / BEST}")
    return FinishedRun(net, history, images_per_s, dataset.name, place)


def report_stop(stopped: Stopped, out: Path, processes: Processes, stops: StopSignals) -> int:
    """Say how to go on with the run in ``out``; the exit code."""
    received = stops.received or signal.SIGTERM  # another process may have got it
    again = f"train --resume {shlex.quote(str(out))}"
    if processes.size > 1:
        again += f" in {processes.size} processes"
    console.print(f"{received.name}: stopped {stopped}; go on with: alexnet-triton {again}")
    return 128 + received


def _train(context: typer.Context, resume: str | None, out: Path | None, processes: Processes) -> int:
    """What ``train`` does, in each of the processes; the exit code."""
    begin = time.perf_counter()
    parameters, out, checkpoint = processes.from_leader(lambda: _what_to_train(context, resume, out))
    where = local_device(parameters["device"], processes)
    if checkpoint is not None and context.params["graph"] is None and (parameters["graph"] or processes.size > 1):
        parameters["graph"] = None  # where it can be; a run that was without one stays so
    run = resolve(parameters, where, processes)
    if checkpoint is not None and len(checkpoint.metrics) >= run.epochs:
        console.print(f"{out}: all {run.epochs} epochs are done; --resume {out} --epochs N goes on")
        return 0
    stops = StopSignals(repeats=processes.launched)
    try:
        run_training(run, out, where, processes, stops, checkpoint=checkpoint, begin=begin)
    except Stopped as stopped:
        return report_stop(stopped, out, processes, stops)
    return 0
