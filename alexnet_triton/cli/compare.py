"""``alexnet-triton compare``: train networks alike, and print a table of their properties and results."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import nn

from ..data.augment import NOTHING
from ..data.dataset import Dataset
from ..data.shards import BUFFER
from ..training.checkpoint import Checkpoint, CheckpointError, from_file, read_checkpoint, training_state
from ..training.distributed import Processes
from ..training.files import write_atomically
from ..training.metrics import EpochMetrics
from ..training.plot import plot_comparison
from ..training.recipe import LEARNING_RATES, Recipe, allowed_of
from ..training.run_folder import claimed, held, holds_run
from ..training.signals import Stopped, StopSignals
from .options import (
    OUTPUT,
    RECIPE,
    AugmentOption,
    BackendChoice,
    BackendOption,
    ChannelsOption,
    CheckpointEveryOption,
    ClassWeightsOption,
    ColourOption,
    CropOption,
    DataOption,
    DeviceOption,
    EpochsOption,
    FlipOption,
    GraphOption,
    LabelSmoothingOption,
    LimitOption,
    Model,
    MomentumOption,
    NesterovOption,
    NormalizeOption,
    PrecisionChoice,
    PrecisionOption,
    RecipeChoice,
    RecipeOption,
    ScheduleOption,
    SeedOption,
    ShuffleBufferOption,
    SkipDamagedOption,
    StreamOption,
    TensorboardOption,
    TotalBatchOption,
    ValidationOption,
    WarmupOption,
    WeightDecayOption,
    WorkersOption,
    console,
    fail,
    joined_command,
    local_device,
    print_table,
)
from .resume import MAY_CHANGE, last_checkpoint, newest, resumed
from .run import FinishedRun, Run, RunOptions, graph_of_resumed, new_options, new_recipe, report_stop, run_on, run_training

#: Files in the folder of a comparison, beside one folder per run.
COMPARISON, CURVES = "comparison.json", "comparison.png"

#: Fields of :class:`Recipe` that differ between the runs.
_OWN = ("model", "lr")

#: Fields that may be given anew to a resumed comparison: none that would make its runs differ.
_MAY_CHANGE = MAY_CHANGE - {"lr", "weight_decay", "early_stop"}


@dataclasses.dataclass(frozen=True)
class Compared:
    """A column of the table: properties read from the network's modules, how it was trained, and what was measured.

    Attributes:
        convolutional, linear: number of convolutions and of linear layers.
        conv_channels: largest number of output channels of a convolution.
        activations: class names of the activations, each once, in the order of the network.
        dropout: probabilities of the dropout layers, each once.
        lr: learning rate.
        weight_decay: factor of the L2 penalty's gradient.
        label_smoothing: of the training loss.
        augmentation: random changes of the training images, in words; empty if there were none.
        input: channels, height and width of the input.
        parameters: number of learned parameters.
        epochs: number of epochs trained.
        loss, train_acc, test_acc: of the last epoch, as in :class:`alexnet_triton.training.metrics.EpochMetrics`.
        images_per_s: training images per second over all epochs, without evaluation, compilation and capture.
    """

    convolutional: int
    linear: int
    conv_channels: int
    activations: list[str]
    dropout: list[float]
    lr: float
    weight_decay: float
    label_smoothing: float
    augmentation: str
    input: tuple[int, int, int]
    parameters: int
    epochs: int
    loss: float
    train_acc: float
    test_acc: float
    images_per_s: float


def compared(finished: FinishedRun, recipe: Recipe) -> Compared:
    """The column of a finished run. Its network must begin with a convolution."""
    layers = list(finished.net.modules())
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    activations = [type(layer).__name__ for layer in layers if type(layer).__module__ == nn.ReLU.__module__]
    side, last = recipe.image_size, finished.history[-1]
    return Compared(
        convolutional=len(convolutions),
        linear=sum(isinstance(layer, nn.Linear) for layer in layers),
        conv_channels=max(layer.out_channels for layer in convolutions),
        activations=list(dict.fromkeys(activations)),
        dropout=list(dict.fromkeys(layer.p for layer in layers if isinstance(layer, nn.Dropout))),
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        label_smoothing=recipe.label_smoothing,
        augmentation="" if recipe.augment == NOTHING else str(recipe.augment),
        input=(convolutions[0].in_channels, side, side),
        parameters=sum(parameter.numel() for parameter in finished.net.parameters()),
        epochs=last.epoch,
        loss=last.loss,
        train_acc=last.train_acc,
        test_acc=last.test_acc,
        images_per_s=finished.images_per_s,
    )


def _regularisation(column: Compared) -> str:
    found = [f"dropout {p:g}" for p in column.dropout]
    if column.weight_decay:
        found.append(f"weight decay {column.weight_decay:g}")
    if column.label_smoothing:
        found.append(f"label smoothing {column.label_smoothing:g}")
    if column.augmentation:
        found.append(f"augmentation ({column.augmentation})")
    return ", ".join(found) or "none"


def comparison_table(columns: dict[str, Compared], title: str) -> Table:
    """The table to print, with one column per network."""
    described: dict[str, Callable[[Compared], str]] = {
        "depth": lambda c: f"{c.convolutional + c.linear} layers: {c.convolutional} convolutional, {c.linear} linear",
        "channels": lambda c: f"at most {c.conv_channels}",
        "activation": lambda c: ", ".join(c.activations),
        "regularisation": _regularisation,
        "input": lambda c: " x ".join(map(str, c.input)),
        "parameters": lambda c: f"{c.parameters:,}",
    }
    measured: dict[str, Callable[[Compared], str]] = {
        "training loss": lambda c: f"{c.loss:.4f}",
        "train accuracy": lambda c: f"{c.train_acc:.4f}",
        "test accuracy": lambda c: f"{c.test_acc:.4f}",
        "images/s": lambda c: f"{c.images_per_s:,.1f}",
    }
    table = Table(title=title)
    for name in ("", *columns):
        table.add_column(name)
    for rows in (described, measured):
        table.add_section()
        for label, cell in rows.items():
            table.add_row(label, *map(cell, columns.values()))
    return table


def compare_command(
    context: typer.Context,
    models: Annotated[
        list[Model] | None, typer.Argument(metavar="MODEL", help="Train these networks.", show_default="lenet alexnet")
    ] = None,
    recipe: RecipeOption = RecipeChoice.d2l,
    backend: BackendOption = BackendChoice.auto,
    data: DataOption = None,
    validation: ValidationOption = None,
    skip_damaged: SkipDamagedOption = False,
    channels: ChannelsOption = None,
    stream: StreamOption = None,
    shuffle_buffer: ShuffleBufferOption = BUFFER,
    workers: WorkersOption = None,
    epochs: EpochsOption = None,
    batch_size: TotalBatchOption = None,
    schedule: ScheduleOption = None,
    warmup: WarmupOption = None,
    momentum: MomentumOption = None,
    nesterov: NesterovOption = None,
    weight_decay: WeightDecayOption = None,
    label_smoothing: LabelSmoothingOption = None,
    class_weights: ClassWeightsOption = None,
    normalize: NormalizeOption = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    dtype: PrecisionOption = PrecisionChoice.auto,
    graph: GraphOption = None,
    augment: AugmentOption = False,
    flip: FlipOption = None,
    crop: CropOption = None,
    colour: ColourOption = None,
    tensorboard: TensorboardOption = False,
    checkpoint_every: CheckpointEveryOption = None,
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Write the results into this folder.", show_default="runs/compare-DATE-TIME", rich_help_panel=OUTPUT),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[PATH]",
            help="Resume the comparison in this folder, or without a path the newest one in runs/. Finished runs are kept, the "
            "others are trained to their end. The comparison keeps its options, but for these, which may be given anew: "
            + ", ".join(sorted(_MAY_CHANGE)).replace("_", "-")
            + ".",
            show_default=False,
            rich_help_panel=RECIPE,
        ),
    ] = None,
) -> None:
    """Train networks one after the other and compare them.

    Prints a table of their properties and results.

    Each network is trained as by `train`, with its own default learning rate, into a folder of its name. Beside these folders
    are comparison.json with the values of the table and the options, and comparison.png with all training curves.

    Signals such as Ctrl-C act as in `train`. The comparison can be resumed.
    """
    with joined_command() as processes:
        status = _compare(context, resume, out, processes)
    if status:
        raise typer.Exit(status)


@dataclasses.dataclass
class _Comparison:
    """The content of ``comparison.json``, which is written when the first run begins and after each run.

    Attributes:
        networks: names of the compared networks.
        options: the fields of :class:`Recipe` that the runs have in common, and all of :class:`RunOptions`.
        data, place: as in :class:`FinishedRun`; empty before the first run.
        models: the columns of the finished runs, by network.
    """

    networks: list[str]
    options: dict[str, Any]
    data: str = ""
    place: str = ""
    models: dict[str, Compared] = dataclasses.field(default_factory=dict)

    def write(self, out: Path) -> None:
        """Write the file into the folder ``out``.

        Raises:
            WriteError: the file cannot be written.
        """
        write_atomically(out / COMPARISON, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    @property
    def title(self) -> str:
        """Title of the table and of the curves."""
        return f"{self.data}, {self.options['epochs']} epoch(s), {self.place}"


def _read_comparison(path: Path) -> tuple[list[Model], Recipe, RunOptions]:
    """Networks, the recipe of the first of them, and options of a file of :class:`_Comparison`.

    Raises:
        CheckpointError: it is none.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
        models, options = [Model(name) for name in content["networks"]], dict(content["options"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a comparison that can be resumed") from error
    if not models or any(name in options for name in _OWN):
        raise CheckpointError(f"{path}: made by another version of this program, or damaged")
    of_options = {name: options.pop(name) for name in allowed_of(RunOptions) if name in options}
    others = from_file(RunOptions, of_options, path)
    of_recipe = options | {"model": str(models[0]), "lr": LEARNING_RATES[others.recipe][models[0]]}
    return models, from_file(Recipe, of_recipe, path), others


def _comparison_to_resume(resume: str, out: Path | None) -> Path:
    """The folder that ``--resume`` names; for "" ``out`` or the folder of the newest comparison."""
    if out is not None and resume and Path(resume).resolve() != out.resolve():
        raise typer.BadParameter(f"a comparison is resumed in its own folder, {resume}: leave --out away", param_hint="--out")
    if resume:
        return Path(resume)
    if out is not None:
        return out
    found = newest(f"*/{COMPARISON}")
    if found is None:
        raise typer.BadParameter("no folder in runs/ holds a comparison; give a path", param_hint="--resume")
    return found.parent


def _what_to_compare(
    context: typer.Context, resume: str | None, out: Path | None, while_comparing: contextlib.ExitStack
) -> tuple[list[Model], tuple[Recipe, RunOptions] | None, Path]:
    """The networks; the recipe and options of a resumed comparison, or None for a new one; the folder for the results.

    The folder's lock is entered into ``while_comparing``: until that closes, no other command can use the folder.
    """
    models: list[Model] | None = context.params["models"]
    try:
        if resume is not None:
            out = _comparison_to_resume(resume, out)
            while_comparing.enter_context(held(out, console.print))
            networks, recipe, options = _read_comparison(out / COMPARISON)
            if models and models != networks:
                raise typer.BadParameter(f"{out} compares {' '.join(networks)}", param_hint="MODEL")
            return networks, resumed(context, recipe, options, out / COMPARISON, _MAY_CHANGE), out
        networks = models or [Model.lenet, Model.alexnet]
        if len(set(networks)) < len(networks):
            raise typer.BadParameter("a network is given twice", param_hint="MODEL")
        default = Path("runs") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
        out = while_comparing.enter_context(claimed(out or default, console.print, renamed=out is None))
        if (out / COMPARISON).exists():
            raise typer.BadParameter(
                f"{out} already holds a comparison; choose another folder, or resume it by --resume {out}",
                param_hint="--out",
            )
        for folder in (out, *(out / model for model in networks)):
            if holds_run(folder):
                raise typer.BadParameter(f"{folder} already holds a run; choose another folder", param_hint="--out")
    except (CheckpointError, OSError) as error:
        raise fail(error) from error
    return networks, None, out


def _begun(folder: Path, run: Run, model: Model, while_training: contextlib.ExitStack) -> tuple[Recipe, Checkpoint | None]:
    """The recipe of ``model`` in the comparison of ``run``, and the checkpoint in ``folder`` if there is one.

    The folder's lock is entered into ``while_training``.

    A run that was once resumed by itself keeps the learning rate and the weight decay that it was given then.
    """
    first = run.recipe
    recipe = dataclasses.replace(first, model=str(model), lr=LEARNING_RATES[run.options.recipe][model])
    try:
        while_training.enter_context(claimed(folder, console.print))
        path = last_checkpoint(folder)
        if not path.exists():
            return recipe, None
        checkpoint = read_checkpoint(path)
        saved = from_file(Recipe, training_state(checkpoint)["recipe"], path)
        if len(checkpoint.metrics) > first.epochs:
            raise CheckpointError(
                f"{path}: trained for {len(checkpoint.metrics)} epochs, more than the {first.epochs} of this comparison; "
                f"--epochs {len(checkpoint.metrics)} trains the others as long"
            )
        return dataclasses.replace(recipe, lr=saved.lr, weight_decay=saved.weight_decay), checkpoint
    except (CheckpointError, OSError) as error:
        raise fail(error) from error


def _compare(context: typer.Context, resume: str | None, out: Path | None, processes: Processes) -> int:
    """Run ``compare`` in each of the processes, and return the exit code."""
    begin = time.perf_counter()
    stops = StopSignals(repeats=processes.launched)
    with stops.hearing_saves(), contextlib.ExitStack() as while_comparing:
        models, begun, out = processes.from_leader(lambda: _what_to_compare(context, resume, out, while_comparing))
        graph: bool | None = context.params["graph"]
        if begun is None:
            parameters = context.params | {"model": models[0], "lr": None}
            options = new_options(parameters)
            device = local_device(options.device, processes)
            recipe = new_recipe(parameters, device)
        else:
            recipe, options = begun
            device = local_device(options.device, processes)
            graph = graph_of_resumed(graph, options)
        first = run_on(device, processes, recipe, options, graph)
        values = dataclasses.asdict(first.recipe) | dataclasses.asdict(first.options)
        shared = {name: value for name, value in values.items() if name not in _OWN}
        return _compare_in(out, _Comparison([str(model) for model in models], shared), first, stops, begin)


def _compare_in(out: Path, comparison: _Comparison, first: Run, stops: StopSignals, begin: float) -> int:
    """Train the unfinished networks of ``comparison`` in ``out``, with the options of ``first``; return the exit code."""
    processes = first.where.processes
    histories: dict[str, list[EpochMetrics]] = {}
    columns = comparison.models

    def on_ready(dataset: Dataset, place: str) -> None:
        comparison.data, comparison.place = dataset.name, place
        if processes.leads and not (out / COMPARISON).exists():
            comparison.write(out)  # from here on the comparison can be resumed

    for model in map(Model, comparison.networks):
        try:
            if processes.any(stops()):  # the signal came too late for the previous run
                raise Stopped(f"before {model} began")
            with contextlib.ExitStack() as while_training:
                recipe, checkpoint = processes.from_leader(
                    lambda model=model, stack=while_training: _begun(out / model, first, model, stack)  # type: ignore[misc]
                )
                run = dataclasses.replace(first, recipe=recipe)
                restart = f"train it by itself (alexnet-triton train --model {model})"
                finished = run_training(run, out / model, stops, begin, checkpoint, restart, on_ready)
        except (Stopped, typer.Exit) as end:
            if columns:
                print_table(comparison_table(columns, comparison.title))
            if isinstance(end, Stopped):
                return report_stop(end, "compare", out, processes, stops)
            if (out / COMPARISON).exists():
                console.print(f"resume with: alexnet-triton compare --resume {shlex.quote(str(out))}")
            raise
        columns[model], histories[model] = compared(finished, recipe), finished.history
        del finished  # otherwise its weights stay on the device while the next network trains
        begin = time.perf_counter()
        try:
            if processes.leads:
                comparison.write(out)
        except OSError as error:
            raise fail(error) from error
    try:
        if processes.leads:
            plot_comparison(histories, out / CURVES, comparison.title)
    except OSError as error:
        raise fail(error) from error
    print_table(comparison_table(columns, comparison.title))
    console.print(f"comparison {out / COMPARISON}, {out / CURVES}")
    return 0
