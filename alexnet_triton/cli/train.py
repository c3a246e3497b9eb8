"""``alexnet-triton train``: a run from its options or from a checkpoint, with progress, pictures and an end by a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shlex
import signal
import time
from collections.abc import Callable, Container, Mapping, Set
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import kernels

from ..data.augment import EVERYTHING, NOTHING, Augment
from ..data.dataset import DataError, Dataset
from ..data.image_folder import default_channels, is_image_folder, load_data
from ..models import IMAGE_SIZE
from ..precompile import precompile
from ..training.checkpoint import BEST, LAST, Checkpoint, CheckpointError, position, read_checkpoint, training_state
from ..training.distributed import Processes
from ..training.evaluation import measure_speed, predict_split
from ..training.events import EpochEvents, summary_writer
from ..training.loop import train
from ..training.metrics import METRICS, EpochMetrics, history_of, learning_rates, metrics_file
from ..training.networks import default_precision, float32_products, new_model
from ..training.plot import plot_confusion, plot_curves, plot_most_wrong
from ..training.recipe import LEARNING_RATE
from ..training.run_folder import claimed, held, holds_run
from ..training.signals import Stopped, StopSignals
from .options import (
    LEAST_SEED,
    MOST_SEED,
    AugmentOption,
    BackendChoice,
    BackendOption,
    ChannelsOption,
    ColourOption,
    CropChoice,
    CropOption,
    DataOption,
    DeviceOption,
    EpochsOption,
    FlipOption,
    GraphOption,
    LimitOption,
    Model,
    MomentumOption,
    PrecisionChoice,
    PrecisionOption,
    SeedOption,
    TensorboardOption,
    TotalBatchOption,
    WeightDecayOption,
    WorkersOption,
    console,
    fail,
    joined_command,
    local_device,
    runs_on,
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
MAY_CHANGE = frozenset({"backend", "data", "device", "epochs", "graph", "lr", "tensorboard", "weight_decay", "workers"})


def newest(*patterns: str) -> Path | None:
    """The file in ``runs/`` that was written last, of those that match; None if there is none."""
    files = (file for pattern in patterns for file in Path("runs").glob(pattern))
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint in ``folder``, or where it would be: of a run that a crash ended before it had two, the best."""
    return folder / (BEST if (folder / BEST).exists() and not (folder / LAST).exists() else LAST)


def _checkpoint_to_resume(resume: str, out: Path | None) -> Path:
    """The file that ``--resume`` means: a file, that of a folder, or for "" that of ``out`` or of the newest run."""
    if resume:
        path = Path(resume)
        path = last_checkpoint(path) if path.is_dir() else path
    elif out is not None:
        path = last_checkpoint(out)
    else:
        found = newest(*(f"{run}/{name}" for run in ("*", "*/*") for name in (LAST, BEST)))  # a comparison's are one deeper
        if found is None:
            raise typer.BadParameter("no folder in runs/ holds a checkpoint; give a path", param_hint="--resume")
        path = last_checkpoint(found.parent)
    if out is not None and os.path.dirname(os.path.realpath(path)) != os.path.realpath(out):  # of links in a circle, too
        raise typer.BadParameter(f"a resumed run goes on in its own folder, {path.parent}", param_hint="--out")
    return path


def _check_nothing_is_lost(checkpoint: Checkpoint, path: Path) -> None:
    """That the run in the folder of ``path`` has not come further than ``checkpoint``, which is in that file.

    Raises:
        CheckpointError: it has, by its last checkpoint.
    """
    last = path.with_name(LAST)
    if path.name == LAST or not last.exists():
        return
    try:
        newer = read_checkpoint(last)
        further = position(newer) > position(checkpoint)
    except CheckpointError:  # there is nothing that could be lost
        return
    if further:
        raise CheckpointError(
            f"{path} has {len(checkpoint.metrics)} whole epoch(s), the run in {last} came further ({len(newer.metrics)}): that "
            f"would be lost; --resume {path.parent}, or copy {path.name} into a folder of its own, as {LAST}, and resume that"
        )


def _with_parts(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with each part of the augmentation: as ``augment`` has it where it is None."""
    parts = dataclasses.asdict(EVERYTHING if options["augment"] else NOTHING)
    return {**options} | {name: value if options[name] is None else options[name] for name, value in parts.items()}


#: What a value of these options is one of, and the least that one can be. Their types are those of the fields above.
_ONE_OF: dict[str, Container[object]] = {
    "model": list(Model),
    "backend": list(BackendChoice),
    "crop": list(CropChoice),
    "dtype": list(PrecisionChoice),
    "channels": (1, 3),
    "seed": range(LEAST_SEED, MOST_SEED + 1),
}
_LEAST = {"epochs": 1, "batch_size": 1, "limit": 1, "workers": 0, "lr": 0.0, "momentum": 0.0, "weight_decay": 0.0}


def _check_saved(saved: Mapping[str, Any], source: Path) -> None:
    """That a command line could have given each of ``saved``, which are in the file ``source``.

    Raises:
        CheckpointError: it could not.
    """
    for name, kind in get_type_hints(RunOptions).items():
        value: Any = saved.get(name)
        if name not in saved or (value is None and isinstance(None, kind)):
            continue
        fits = isinstance(value, kind | int if kind is float else kind) and (kind is bool or not isinstance(value, bool))
        if not fits or value not in _ONE_OF.get(name, [value]) or not value >= _LEAST.get(name, value):
            raise CheckpointError(f"{source}: damaged: no --{name.replace('_', '-')} can be {str(value)[:50]!r}")


def options_of_resumed(
    context: typer.Context, saved: Mapping[str, Any], source: Path, may_change: Set[str] = MAY_CHANGE
) -> dict[str, Any]:
    """The parameters of a command: ``saved``, which are in the file ``source``, apart from what is given on the command line.

    Raises:
        CheckpointError: ``saved`` are not those of this version of the command.
        typer.BadParameter: given is another value than the saved one of what must stay.
    """
    options = dict(context.params)
    if options["augment"]:
        options = _with_parts(options)
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{source}: damaged: its options are a {type(saved).__name__}")
    if unknown := [name for name in saved if name not in options]:
        raise CheckpointError(f"{source}: made by another version of this program: it has an option {unknown[0]}")
    _check_saved(saved, source)
    try:
        Augment(**{name: saved[name] for name in _PARTS if name in saved})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: made by another version of this program: {error}") from error
    for name, value in saved.items():
        parameter_source = context.get_parameter_source(name)
        given = (
            parameter_source is not None
            and parameter_source.name == "COMMANDLINE"
            and (name, options[name]) != ("dtype", "auto")
        )
        given = given or (name in _PARTS and options["augment"])
        if given and name not in may_change and options[name] != value:
            raise typer.BadParameter(
                f"the run in {source} has {value}, not {options[name]}", param_hint="--" + name.replace("_", "-")
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
    momentum: MomentumOption = 0.0,
    weight_decay: WeightDecayOption = 0.0,
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
            + ", ".join(sorted(MAY_CHANGE)),
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
    with joined_command() as processes:
        status = _train(context, resume, out, processes)
    if status:
        raise typer.Exit(status)


def _what_to_train(
    context: typer.Context, resume: str | None, out: Path | None, while_training: contextlib.ExitStack
) -> tuple[dict[str, Any], Path, Checkpoint | None]:
    """The parameters of ``train``, the folder to write into, and the checkpoint to resume.

    The folder is entered into ``while_training``: no other run can have it as long.
    """
    try:
        if resume is not None:
            path = _checkpoint_to_resume(resume, out)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # which the checkpoint's reader tells better
                while_training.enter_context(held(path.parent, console.print))
            checkpoint = read_checkpoint(path)
            _check_nothing_is_lost(checkpoint, path)
            saved = training_state(checkpoint).get("options", {})
            return options_of_resumed(context, saved, path), path.parent, checkpoint
        default = Path("runs") / f"{context.params['model']}-{time.strftime('%Y%m%d-%H%M%S')}"
        out = while_training.enter_context(claimed(out or default, console.print, renamed=out is None))
    except (CheckpointError, OSError) as error:
        raise fail(error) from error
    if holds_run(out):
        raise typer.BadParameter(
            f"{out} already holds a run; choose another folder, or go on with it by --resume {out}", param_hint="--out"
        )
    return dict(context.params), out, None


def is_complete(out: Path, checkpoint: Checkpoint) -> bool:
    """Whether the folder of a run that has come to its end in ``checkpoint`` has all its files, the metrics up to there.

    Raises:
        CheckpointError: the checkpoint's metrics are damaged.
    """
    files = [out / name for name in (LAST, BEST, METRICS, CURVES, CONFUSION, MOST_WRONG)]
    return all(file.is_file() for file in files) and (out / METRICS).read_bytes() == metrics_file(history_of(checkpoint))


def _draw(plot: Callable[[Path], None], path: Path) -> None:
    """Write a picture beside ``path`` first: what is there is whole, so that a resumed run knows which are missing."""
    partial = path.with_name(f"partial-{path.name}")  # plotting asks the end of a name for the format
    try:
        plot(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
    restart: str = "start again",
    on_ready: Callable[[Dataset, str], None] | None = None,
) -> FinishedRun:
    """One run: train as ``run`` says, or go on from ``checkpoint``, with everything printed and written into ``out``.

    Of a run that ``checkpoint`` has finished, the files that are missing are written.

    Args:
        out: a folder that is there, and that this process has for itself.
        stops: entered while something could be saved.
        begin: when the run began, by ``time.perf_counter``.
        restart: as in :func:`alexnet_triton.training.train`.
        on_ready: given the data and what the run is on, called when its first step is about to be taken.

    Raises:
        Stopped: ``stops`` said so; all is saved.
        typer.Exit: it failed, which is said.
    """
    try:
        finished = checkpoint is not None and len(checkpoint.metrics) >= run.epochs
        complete = checkpoint is not None and finished and is_complete(out, checkpoint)
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
            if not run.graph and processes.size == 1 and not finished:
                measure = functools.partial(measure_speed, net, training, run.batch_size, IMAGE_SIZE[run.model], where)
                if where.type == "cuda":
                    precompile(measure, tell=console.print)
                speed = measure()
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
            bar = _Bar(len(training), run.epochs)

            def begin_training() -> None:
                ready.append(time.perf_counter())
                while_training.enter_context(stops)  # until then nothing could be saved
                if run.tensorboard and processes.leads:
                    before = [] if checkpoint is None else history_of(checkpoint)
                    rates = [] if checkpoint is None else learning_rates(checkpoint, run.lr)
                    events.append(while_training.enter_context(EpochEvents(out, before, rates, run.lr)))
                if on_ready is not None:
                    on_ready(dataset, place)

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
                    restart=restart,
                    on_compile=console.print,
                    on_ready=begin_training,
                    on_batch=bar.epoch,
                    on_epoch=end_epoch,
                )
            if processes.leads and not complete:
                said = predict_split(net, test, batch_size=run.batch_size, image_size=IMAGE_SIZE[run.model], device=where)
        if processes.leads and not complete:
            title = f"{run.model} on {dataset.name}, {place}"
            _draw(lambda path: plot_curves(history, path, title), out / CURVES)
            _draw(lambda path: plot_confusion(test, said, dataset.classes, path, title), out / CONFUSION)
            _draw(lambda path: plot_most_wrong(test, said, dataset.classes, path, title), out / MOST_WRONG)
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


def report_stop(stopped: Stopped, command: str, out: Path, processes: Processes, stops: StopSignals) -> int:
    """Say how ``command`` goes on in ``out``; the exit code."""
    received = stops.received or signal.SIGTERM  # another process may have got it
    again = f"{command} --resume {shlex.quote(str(out))}"
    if processes.size > 1:
        again += f" in {processes.size} processes"
    console.print(f"{received.name}: stopped {stopped}; go on with: alexnet-triton {again}")
    return 128 + received


def graph_of_resumed(context: typer.Context, wanted: bool, processes: Processes) -> bool | None:
    """``graph`` of a resumed run, for :func:`resolve`: unless it was said, where it can be, or none as the run had none."""
    return None if context.params["graph"] is None and (wanted or processes.size > 1) else wanted


def _train(context: typer.Context, resume: str | None, out: Path | None, processes: Processes) -> int:
    """What ``train`` does, in each of the processes; the exit code."""
    begin = time.perf_counter()
    with contextlib.ExitStack() as while_training:
        parameters, out, checkpoint = processes.from_leader(lambda: _what_to_train(context, resume, out, while_training))
        where = local_device(parameters["device"], processes)
        if checkpoint is not None:
            parameters["graph"] = graph_of_resumed(context, parameters["graph"], processes)
        run = resolve(parameters, where, processes)
        if checkpoint is not None and len(checkpoint.metrics) >= run.epochs:
            done = f"{out}: all {run.epochs} epochs are done"
            try:
                complete = processes.from_leader(lambda: is_complete(out, checkpoint))
            except (CheckpointError, OSError) as error:
                raise fail(error) from error
            if complete:
                console.print(f"{done}; --resume {out} --epochs N goes on")
                return 0
            console.print(f"{done}, not all its files are there: they are written now")
        stops = StopSignals(repeats=processes.launched)
        try:
            run_training(run, out, where, processes, stops, checkpoint=checkpoint, begin=begin)
        except Stopped as stopped:
            return report_stop(stopped, "train", out, processes, stops)
    return 0
