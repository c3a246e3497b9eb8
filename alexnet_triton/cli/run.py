"""A training run of a command: its recipe and options from the parameters, its lines, pictures and files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

import kernels

from ..data.augment import EVERYTHING, Augment
from ..data.dataset import DataError, Dataset
from ..data.image_folder import default_channels, is_own, load_data
from ..data.shards import BUFFER, is_shards
from ..data.stream import StreamedSplit
from ..precompile import precompile
from ..training.checkpoint import BEST, LAST, Checkpoint, CheckpointError, frozen_of
from ..training.distributed import Processes
from ..training.evaluation import measure_speed, predict_split
from ..training.events import EpochEvents, summary_writer
from ..training.initial import Kept, read_weights, take_weights
from ..training.loop import train
from ..training.metrics import METRICS, EpochMetrics, best_test_loss, history_of, is_finished, metrics_file
from ..training.networks import default_precision, features, float32_products, freeze, new_model, torchvision_alexnet
from ..training.plot import plot_confusion, plot_curves, plot_most_wrong
from ..training.recipe import LEARNING_RATES, MOST, RECIPES, Recipe, Where, allowed_of, check_fields, field
from ..training.run_folder import list_skipped
from ..training.signals import Stopped, StopSignals
from .options import BackendChoice, PrecisionChoice, console, fail, runs_on
from .screen import Bar, Screen

#: The pictures that a run writes.
CURVES, CONFUSION, MOST_WRONG = "curves.png", "confusion.png", "most_wrong.png"

#: The fields of a recipe that belong to the augmentation.
PARTS = tuple(each.name for each in dataclasses.fields(Augment))


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The options of a run that do not change its numbers. A checkpoint keeps them, so a resumed run has them again.

    Each field is an option of ``train``. ``recipe`` names the recipe that gave every field of :class:`Recipe` without an option
    on the command line. A field that a checkpoint lacks has its default.

    Raises:
        ValueError: a value has another type than its field, or is out of its range.
    """

    recipe: str = field("d2l", among=tuple(RECIPES))
    backend: str = field("auto", among=tuple(map(str, BackendChoice)), may_change=True)
    workers: int | None = field(None, least=0, most=MOST, may_change=True)
    graph: bool = field(False, may_change=True)
    tensorboard: bool = field(False, may_change=True)
    device: str = field("auto", may_change=True)
    skip_damaged: bool = field(False, may_change=True)
    stream: bool | None = field(None)
    checkpoint_every: int | None = field(None, least=1, most=MOST, may_change=True)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that a command trains: its recipe, its options, and the device and processes that it runs on."""

    recipe: Recipe
    options: RunOptions
    where: Where


@contextlib.contextmanager
def refused_values() -> Iterator[None]:
    """Turn a ValueError of the block into :class:`typer.BadParameter`."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def plain_path(path: str, option: str) -> str:
    """``path``, the value of ``option``, as an absolute path that is valid from any working folder.

    Raises:
        typer.BadParameter: ``path`` cannot be resolved.
    """
    try:
        return str(Path(path).expanduser().resolve())
    except (RuntimeError, ValueError) as error:  # a circle of links, an unknown user's home, a character that no path can hold
        raise typer.BadParameter(f"{path!r}: {error}", param_hint=option) from error


def plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a command as a checkpoint can keep them.

    Enums become strings. ``data`` and ``init`` become absolute paths. A field of the augmentation that is None takes its value
    from ``--augment`` if that is given; any other field that is None takes its value from ``recipe``.

    Raises:
        typer.BadParameter: the path of ``data`` or ``init`` cannot be resolved.
    """
    found = {name: str(value) if isinstance(value, StrEnum) else value for name, value in parameters.items()}
    parts = dataclasses.asdict(EVERYTHING) if found["augment"] else {}
    missing = {name: value for name, value in (RECIPES[found["recipe"]] | parts).items() if found[name] is None}
    if found["momentum"] == 0 and "nesterov" in missing:
        missing["nesterov"] = False  # Nesterov needs a momentum
    found |= missing
    for name in ("data", "init"):
        if (path := found.get(name)) is None or (name, path) == ("data", "sample"):
            continue
        found[name] = plain_path(path, f"--{name}")
    return found


def new_recipe(parameters: Mapping[str, Any], device: torch.device) -> Recipe:
    """The recipe that the parameters of a command give on ``device``.

    Raises:
        typer.BadParameter: the path of ``data`` or ``init`` cannot be resolved, or a value is invalid.
    """
    found = plain(parameters)
    if found["dtype"] == PrecisionChoice.auto:
        found["dtype"] = default_precision(device)
    if found["lr"] is None:
        found["lr"] = LEARNING_RATES[found["recipe"]][found["model"]]
    with refused_values():
        if found["shuffle_buffer"] != BUFFER and not is_shards(parameters["data"]):
            raise ValueError("--shuffle-buffer is only for tar shards: other images are shuffled over the whole set")
        found["channels"] = found["channels"] or default_channels(parameters["data"], found["validation"])
        return Recipe(**{name: found[name] for name in allowed_of(Recipe) if name in found})


def new_options(parameters: Mapping[str, Any]) -> RunOptions:
    """The run options that the parameters of a command give. :func:`run_on` sets ``graph``, which is False here."""
    found = plain(parameters) | {"graph": False}
    with refused_values():
        return RunOptions(**{each.name: found[each.name] for each in dataclasses.fields(RunOptions)})


def run_on(device: torch.device, processes: Processes, recipe: Recipe, options: RunOptions, graph: bool | None) -> Run:
    """The run of ``recipe`` on ``device``, with a CUDA graph if ``graph`` is true; None means: on CUDA devices.

    Raises:
        typer.BadParameter: a CUDA graph is asked for where none can be captured.
        typer.Exit: torchvision (for that model) or tensorboard (for that option) is missing. The message is printed.
    """
    if graph is None:
        graph = device.type == "cuda"
    options = dataclasses.replace(options, graph=graph)
    try:
        where = Where(device, graph, processes, options.checkpoint_every, dataclasses.asdict(options))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--graph") from error
    if options.tensorboard:
        processes.from_leader(_check_tensorboard)
    if recipe.model == "torchvision":
        processes.from_leader(_check_torchvision)
    return Run(recipe, options, where)


def graph_of_resumed(said: bool | None, options: RunOptions) -> bool | None:
    """``graph`` of a resumed run, for :func:`run_on`: ``said`` if given, else None, or False if the run had no graph."""
    return None if said is None and options.graph else options.graph


def _check_tensorboard() -> None:
    try:
        summary_writer()
    except ImportError as error:
        raise fail(error) from error


def _check_torchvision() -> None:
    try:
        with torch.device("meta"):
            torchvision_alexnet(2, 3)
    except RuntimeError as error:
        raise fail(error) from error


def early_end(history: list[EpochMetrics], recipe: Recipe) -> str:
    """Why a run ended before its last epoch, in words; empty if it did not."""
    best = best_test_loss(history)
    if len(history) >= recipe.epochs or best is None or not is_finished(history, recipe.epochs, recipe.early_stop):
        return ""
    epochs = len(history) - best.epoch
    return f"stopped early: {epochs} epoch(s) without a better test loss than the {best.test_loss:.4f} of epoch {best.epoch}"


def is_complete(out: Path, checkpoint: Checkpoint) -> bool:
    """Whether the folder ``out`` of a finished run has all its files, with the metrics that ``checkpoint`` holds.

    Raises:
        CheckpointError: the checkpoint's metrics are damaged.
    """
    history_of(checkpoint)
    files = [out / name for name in (LAST, BEST, METRICS, CURVES, CONFUSION, MOST_WRONG)]
    return all(file.is_file() for file in files) and (out / METRICS).read_bytes() == metrics_file(checkpoint.metrics)


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """The result of a run, besides its files.

    Attributes:
        net: the trained network.
        history: the metrics of all epochs.
        images_per_s: training images a second, over all epochs.
        data: name of the data.
        place: backend, hardware, precision and number of processes, in words.
    """

    net: nn.Module
    history: list[EpochMetrics]
    images_per_s: float
    data: str
    place: str


def run_training(
    run: Run,
    out: Path,
    stops: StopSignals,
    begin: float,
    checkpoint: Checkpoint | None = None,
    restart: str = Screen.restart,
    on_ready: Callable[[Dataset, str], None] | None = None,
) -> FinishedRun:
    """Train ``run``, from ``checkpoint`` if given; print its progress and write its files into ``out``.

    If the run of ``checkpoint`` is finished, only its missing files are written.

    Args:
        out: an existing folder, which no other process uses.
        stops: entered when the first step is about to be taken: from then on a run can be saved.
        begin: when the run began, by ``time.perf_counter``.
        restart: as in :class:`alexnet_triton.training.listener.Listener`.
        on_ready: called with the data and the run's ``place`` when the first step is about to be taken.

    Raises:
        Stopped: ``stops`` received a signal; the run is saved.
        typer.Exit: the run failed; the message is printed.
    """
    recipe, where = run.recipe, run.where
    try:
        finished = checkpoint is not None and is_finished(history_of(checkpoint), recipe.epochs, recipe.early_stop)
        writes = where.processes.leads and not (checkpoint is not None and finished and is_complete(out, checkpoint))
        weights = read_weights(Path(recipe.init)) if recipe.init is not None and checkpoint is None else None
        dataset = _load(run, checkpoint)
        streams, tests_stream = (isinstance(split, StreamedSplit) for split in (dataset.train, dataset.test))
        # Saved, so that a resumed run does not decide anew. None if only the test images are streamed.
        stream = streams if streams or not tests_stream else None
        where = dataclasses.replace(where, options={**where.options, "stream": stream})
        with kernels.use_backend(run.options.backend), float32_products(recipe.dtype), contextlib.ExitStack() as block:  # type: ignore[arg-type]
            setup_begin = time.perf_counter()
            place = f"{runs_on(where.device)}, {recipe.dtype}"
            place += f", {where.processes.size} processes" * (where.processes.size > 1)
            channels = dataset.train.channels
            net = new_model(recipe.model, recipe.seed, where.device, recipe.torch_dtype, len(dataset.classes), channels)
            kept = _begin_with(net, weights, recipe) if weights is not None else None
            freeze(net, recipe.freeze, _frozen(net, kept, checkpoint))
            _print_begin(run, dataset, place, "" if finished else _expected(run, net, dataset))
            if kept is not None:
                console.print(f"began with {recipe.init}: {kept}", markup=False)
            if recipe.freeze == "features" and checkpoint is None:
                _print_frozen(net, kept)
            if checkpoint is not None:
                console.print(f"resumed from {checkpoint.path} after {len(checkpoint.metrics)} whole epoch(s)")

            def begins() -> None:
                if where.processes.leads and (checkpoint is None or not streams):
                    list_skipped(out, {str(image): reason for image, reason in dataset.skipped})
                if on_ready is not None:
                    on_ready(dataset, place)

            bar = Bar(len(dataset.train), recipe.epochs)
            screen = Screen(bar, stops, _events(run, out, checkpoint), block, on_ready=begins, restart=restart)
            with bar.progress:
                history = train(net, dataset, recipe, where, out, screen, checkpoint, kept.weights if kept else None)
            if writes:
                said = predict_split(
                    net, dataset.test, batch_size=recipe.batch_size, image_size=recipe.image_size, device=where.device
                )
        if writes:
            title = f"{recipe.model} on {dataset.name}, {place}"
            _draw(lambda path: plot_curves(history, path, title), out / CURVES)
            _draw(lambda path: plot_confusion(said, dataset.classes, path, title), out / CONFUSION)
            _draw(lambda path: plot_most_wrong(dataset.test, said, dataset.classes, path, title), out / MOST_WRONG)
    except (CheckpointError, DataError, FloatingPointError, OSError, RuntimeError) as error:
        raise fail(error) from error
    images_per_s = len(history) * len(dataset.train) / sum(m.seconds for m in history)
    if early := early_end(history, recipe):
        console.print(early)
    speed = f"{images_per_s:.1f} images/s" + ", all sessions" * (checkpoint is not None)
    _print_end(history, speed, screen.ready_at - setup_begin, time.perf_counter() - begin, out)
    return FinishedRun(net, history, images_per_s, dataset.name, place)


def _load(run: Run, checkpoint: Checkpoint | None) -> Dataset:
    """The data of a run, at most ``limit`` images of each split. Each process decodes a folder's images by itself."""
    recipe = run.recipe

    def load() -> Dataset:
        data = load_data(
            recipe.data,
            size=recipe.image_side,
            channels=recipe.channels,
            limit=recipe.limit,
            workers=run.options.workers,
            device=run.where.device,
            validation=recipe.validation,
            seed=recipe.seed,
            skip_damaged=run.options.skip_damaged,
            stream=run.options.stream,
            buffer=recipe.shuffle_buffer,
            on_note=functools.partial(console.print, markup=False),
        )
        recipe.check_side(data.train.size)
        # A checkpoint holds the statistics. Otherwise all training images are read to compute them.
        return data.normalized(None if checkpoint is None else checkpoint.normalization) if recipe.normalize else data

    if is_own(recipe.data, recipe.validation):
        console.print(f"reading the images of {recipe.data}")  # this can take minutes
        return load()
    return run.where.processes.first_on_each_machine(load)  # the first process may download the images


def _begin_with(net: nn.Module, weights: Mapping[str, torch.Tensor], recipe: Recipe) -> Kept:
    """Load a file's weights into ``net`` by :func:`.initial.take_weights`; at least one tensor must fit.

    Raises:
        CheckpointError: no tensor fits.
    """
    kept = take_weights(net, weights)
    if kept.tensors == 0:
        hint = ": give --model torchvision" if "features.0.weight" in weights and recipe.model != "torchvision" else ""
        raise CheckpointError(f"{recipe.init}: none of its {len(weights)} tensors fits {recipe.model}{hint}")
    return kept


def _frozen(net: nn.Module, kept: Kept | None, checkpoint: Checkpoint | None) -> list[str] | None:
    """Names of the convolutions that ``--freeze`` keeps: those loaded from a file. None means all."""
    if checkpoint is not None:
        return frozen_of(checkpoint)
    return None if kept is None else [name for name in features(net) if name not in kept.new]


def _print_frozen(net: nn.Module, kept: Kept | None) -> None:
    """Print what may surprise about ``--freeze``: random weights are frozen, or a new convolution is trained."""
    if kept is None:
        console.print("the convolutions are frozen at random weights: --freeze is meant to be used with --init")
        return
    for name in features(net):
        if name in kept.new:
            console.print(f"{name} is new: it is trained")


def _expected(run: Run, net: nn.Module, dataset: Dataset) -> str:
    """A line on the time of an epoch, from a short measurement; empty where a measurement would mislead."""
    recipe, where = run.recipe, run.where
    # The time of an uncaptured step does not predict a captured one, and one process does not predict several.
    if where.graph or where.processes.size > 1 or isinstance(dataset.train, StreamedSplit):
        return ""
    images = len(dataset.train)
    measure = functools.partial(measure_speed, net, dataset.train, recipe.batch_size, recipe.image_size, where.device)
    if where.device.type == "cuda":
        precompile(measure, tell=console.print)
    speed = measure()
    return f": about {_duration(images / speed)} an epoch of {images} images ({speed:.1f} images/s)"


def _events(run: Run, out: Path, checkpoint: Checkpoint | None) -> EpochEvents | None:
    """The TensorBoard writer of the run's epochs; None without ``--tensorboard`` and in processes that do not lead."""
    if not run.options.tensorboard or not run.where.processes.leads:
        return None
    before = [] if checkpoint is None else history_of(checkpoint)
    return EpochEvents(out, before)


def _draw(plot: Callable[[Path], None], path: Path) -> None:
    """Write a picture beside ``path``, then rename it: an existing file is complete, so a resumed run knows what is missing."""
    partial = path.with_name(f"partial-{path.name}")  # matplotlib takes the format from the end of the name
    try:
        plot(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _print_begin(run: Run, dataset: Dataset, place: str, expected: str) -> None:
    recipe = run.recipe
    console.print(f"{recipe.model} on {place}{expected}")
    console.print(
        f"data {dataset.source} ({len(dataset.train)} train, {len(dataset.test)} test, {len(dataset.classes)} classes), "
        f"recipe {run.options.recipe}, batch {recipe.batch_size}, lr {recipe.lr} ({recipe.schedule}), seed {recipe.seed}"
    )


def _print_end(history: list[EpochMetrics], speed: str, setup: float, total: float, out: Path) -> None:
    last = history[-1]
    console.print(f"test accuracy {last.test_acc:.4f}, training loss {last.loss:.4f} after {last.epoch} epoch(s)")
    console.print(
        f"training {sum(m.seconds for m in history):.1f} s ({speed}), "
        f"setup {setup:.1f} s (weights, compilation, warm-up, capture), "
        f"{total:.1f} s from start to end"
    )
    pictures = ", ".join(str(out / name) for name in (CURVES, CONFUSION, MOST_WRONG))
    console.print(f"pictures {pictures}  metrics {out / METRICS}  checkpoints {out / LAST}, {out / BEST}")


def report_stop(stopped: Stopped, command: str, out: Path, processes: Processes, stops: StopSignals) -> int:
    """Print the command that resumes the run in ``out``, and return the exit code."""
    received = stops.received or signal.SIGTERM  # another process may have received the signal
    again = f"{command} --resume {shlex.quote(str(out))}"
    if processes.size > 1:
        again += f" in {processes.size} processes"
    console.print(f"{received.name}: stopped {stopped}; resume with: alexnet-triton {again}")
    return 128 + received
