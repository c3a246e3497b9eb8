"""``alexnet-triton compare``: networks trained alike, and a table of what they are and what came of it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from torch import nn

from .checkpoint import CheckpointError, write_atomically
from .data import NOTHING
from .distributed import Processes, joined
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
    print_table,
)
from .plot import plot_comparison
from .signals import Stopped, StopSignals
from .train_command import FinishedRun, RunOptions, report_stop, resolve, run_training
from .training import LEARNING_RATE, EpochMetrics, holds_run

#: In the folder of a comparison, beside a folder for each run.
COMPARISON, CURVES = "comparison.json", "comparison.png"


@dataclasses.dataclass(frozen=True)
class Compared:
    """A column of the table: what the network is, read off its modules, how it was trained, and what was measured.

    Attributes:
        convolutional, linear: how many such layers it has.
        conv_channels: the most that any convolution puts out.
        activations: names of their modules' classes, each once, in the order of the network.
        dropout: probabilities of its dropout layers, each once.
        weight_decay: factor of the L2 penalty's gradient.
        augmentation: what was changed in the training images at random; empty: nothing.
        input: channels, height and width of what it takes.
        parameters: how many numbers it learns.
        epochs: how many it was trained for.
        loss, train_acc, test_acc: of the last epoch, as in :class:`alexnet_triton.training.EpochMetrics`.
        images_per_s: training images a second, over all epochs; evaluation, compilation and capture not counted.
    """

    convolutional: int
    linear: int
    conv_channels: int
    activations: list[str]
    dropout: list[float]
    weight_decay: float
    augmentation: str
    input: tuple[int, int, int]
    parameters: int
    epochs: int
    loss: float
    train_acc: float
    test_acc: float
    images_per_s: float


def compared(finished: FinishedRun, run: RunOptions) -> Compared:
    """The column of a run, whose network begins with a convolution."""
    layers = list(finished.net.modules())
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    activations = [type(layer).__name__ for layer in layers if type(layer).__module__ == nn.ReLU.__module__]
    side, last = IMAGE_SIZE[run.model], finished.history[-1]
    return Compared(
        convolutional=len(convolutions),
        linear=sum(isinstance(layer, nn.Linear) for layer in layers),
        conv_channels=max(layer.out_channels for layer in convolutions),
        activations=list(dict.fromkeys(activations)),
        dropout=list(dict.fromkeys(layer.p for layer in layers if isinstance(layer, nn.Dropout))),
        weight_decay=run.weight_decay,
        augmentation="" if run.augment == NOTHING else str(run.augment),
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
    if column.augmentation:
        found.append(f"augmentation ({column.augmentation})")
    return ", ".join(found) or "none"


def comparison_table(columns: dict[str, Compared], title: str) -> Table:
    """The table as it is printed: a column for each network."""
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
        list[Model] | None, typer.Argument(metavar="MODEL", help="The networks.", show_default="lenet alexnet")
    ] = None,
    backend: BackendOption = BackendChoice.auto,
    data: DataOption = None,
    channels: ChannelsOption = None,
    workers: WorkersOption = None,
    epochs: EpochsOption = 10,
    batch_size: TotalBatchOption = 128,
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
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="runs/compare-DATE-TIME")] = None,
) -> None:
    """Train networks one after the other, and print a table of what they are and what they reach.

    Each is trained as `train` does it, with its own default learning rate, into a folder of its name. Beside these folders are
    comparison.json, the values of the table, and comparison.png, the curves of all.

    Ctrl-C and SIGTERM are what they are for `train`: the run that they stop can be resumed by `train --resume`.
    """
    with joined() as processes:
        console.quiet = not processes.leads
        status = _compare(context, models or [Model.lenet, Model.alexnet], out, processes)
    if status:
        raise typer.Exit(status)


def _folder(models: list[Model], out: Path | None) -> Path:
    """The folder for the results, in which there are none yet."""
    if len(set(models)) < len(models):
        raise typer.BadParameter("a network is given twice", param_hint="MODEL")
    out = out or Path("runs") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
    for folder in (out, *(out / model for model in models)):
        if holds_run(folder):
            raise typer.BadParameter(f"{folder} already holds a run; choose another folder", param_hint="--out")
    if (out / COMPARISON).exists():
        raise typer.BadParameter(f"{out} already holds a comparison; choose another folder", param_hint="--out")
    return out


def _compare(context: typer.Context, models: list[Model], out: Path | None, processes: Processes) -> int:
    """What ``compare`` does, in each of the processes; the exit code."""
    begin = time.perf_counter()
    out = processes.from_leader(lambda: _folder(models, out))
    where = local_device(context.params["device"], processes)
    only_of_train = {"model": models[0], "lr": None, "momentum": 0.0, "weight_decay": 0.0}
    first = resolve(context.params | only_of_train, where, processes)
    columns: dict[str, Compared] = {}
    histories: dict[str, list[EpochMetrics]] = {}
    # One for all runs: a signal too late for one stops the next before its first step.
    stops = StopSignals(repeats=processes.launched)
    for model in models:
        run = dataclasses.replace(first, model=str(model), lr=LEARNING_RATE[model])
        try:
            finished = run_training(run, out / model, where, processes, stops, begin=begin)
        except Stopped as stopped:
            return report_stop(stopped, out / model, processes, stops)
        columns[model], histories[model] = compared(finished, run), finished.history
        data, place = finished.data, finished.place
        del finished  # else its weights stay on the device while the next network trains
        begin = time.perf_counter()
    title = f"{data}, {run.epochs} epoch(s), {place}"
    if processes.leads:
        content = {"data": data, "place": place, "models": {name: dataclasses.asdict(c) for name, c in columns.items()}}
        try:
            write_atomically(out / COMPARISON, (json.dumps(content, indent=2) + "\n").encode())
            plot_comparison(histories, out / CURVES, title)
        except (CheckpointError, OSError) as error:
            raise fail(error) from error
    print_table(comparison_table(columns, title))
    console.print(f"comparison {out / COMPARISON}, {out / CURVES}")
    return 0
