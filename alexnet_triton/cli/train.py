"""``alexnet-triton train``: a run from its options or from a checkpoint."""

from __future__ import annotations

import contextlib
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from ..data.shards import BUFFER
from ..training.checkpoint import Checkpoint, CheckpointError, from_file, read_checkpoint, training_state
from ..training.distributed import Processes
from ..training.metrics import history_of, is_finished
from ..training.recipe import Recipe
from ..training.run_folder import claimed, held, holds_run
from ..training.signals import Stopped, StopSignals
from .check import check_command
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
    EarlyStopOption,
    EpochsOption,
    FlipOption,
    FreezeChoice,
    FreezeOption,
    GraphOption,
    InitOption,
    LabelSmoothingOption,
    LearningRateOption,
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
)
from .resume import MAY_CHANGE, check_nothing_is_lost, checkpoint_to_resume, resumed
from .run import (
    RunOptions,
    early_end,
    graph_of_resumed,
    is_complete,
    new_options,
    new_recipe,
    report_stop,
    run_on,
    run_training,
)


def train_command(
    context: typer.Context,
    model: Annotated[
        Model, typer.Option(help="Train this network. torchvision is torchvision's AlexNet.", rich_help_panel=RECIPE)
    ] = Model.alexnet,
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
    lr: LearningRateOption = None,
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
    init: InitOption = None,
    freeze: FreezeOption = FreezeChoice.none,
    early_stop: EarlyStopOption = None,
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
        typer.Option(help="Write the results into this folder.", show_default="runs/MODEL-DATE-TIME", rich_help_panel=OUTPUT),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[PATH]",
            help="Resume the run of this checkpoint or folder; the result is bit-identical to an uninterrupted run. Without a "
            "path, resume the newest run in runs/. Without a path but with --out, resume the run in that folder, or begin it "
            "if there is none. "
            "The run keeps its options, but for these, which may be given anew: "
            + ", ".join(sorted(MAY_CHANGE)).replace("_", "-")
            + ".",
            show_default=False,
            rich_help_panel=RECIPE,
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Run `check` on the result.", hidden=True)] = False,
) -> None:
    """Train on Fashion-MNIST or on your own images.

    Writes metrics.jsonl, curves.png, confusion.png, most_wrong.png, checkpoint.pt (the last epoch) and best.pt (the best).

    On Ctrl-C, SIGTERM or SIGHUP (a closed terminal) the run finishes its step, saves, prints how to resume and ends with exit
    code 128 + the signal's number (130, 143, 129). A second Ctrl-C or SIGTERM ends the process at once, except under torchrun,
    which passes the first signal on more than once. On SIGUSR1 the run finishes its step, saves and continues.

    With several GPUs: torchrun --nproc-per-node=N -m alexnet_triton train ...
    """
    with joined_command() as processes:
        status = _train(context, resume, out, processes)
    if status:
        raise typer.Exit(status)


def _what_to_train(
    context: typer.Context, resume: str | None, out: Path | None, while_training: contextlib.ExitStack
) -> tuple[tuple[Recipe, RunOptions, Checkpoint] | None, Path]:
    """The recipe, options and checkpoint of the run to resume, or None for a new run; and the folder to write into.

    The folder's lock is entered into ``while_training``: until that closes, no other run can use the folder.
    """
    try:
        if resume == "" and out is not None and not holds_run(out):
            console.print(f"{out} holds no run yet: a new run begins there", markup=False)
        elif resume is not None:
            path = checkpoint_to_resume(resume, out)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # read_checkpoint has a better message
                while_training.enter_context(held(path.parent, console.print))
            checkpoint = read_checkpoint(path)
            check_nothing_is_lost(checkpoint, path)
            state = training_state(checkpoint)
            options = from_file(RunOptions, state.get("options", {}), path)
            recipe, options = resumed(context, from_file(Recipe, state["recipe"], path), options, path)
            return (recipe, options, checkpoint), path.parent
        default = Path("runs") / f"{context.params['model']}-{time.strftime('%Y%m%d-%H%M%S')}"
        out = while_training.enter_context(claimed(out or default, console.print, renamed=out is None))
    except (CheckpointError, OSError) as error:
        raise fail(error) from error
    if holds_run(out):
        raise typer.BadParameter(
            f"{out} already holds a run; choose another folder, or resume it by --resume {out}", param_hint="--out"
        )
    return None, out


def _needs_nothing(out: Path, checkpoint: Checkpoint, recipe: Recipe, processes: Processes) -> bool:
    """Whether a resumed run is finished and has all its files. Prints a line if it is finished."""
    try:
        history = history_of(checkpoint)
        if not is_finished(history, recipe.epochs, recipe.early_stop):
            return False
        complete = processes.from_leader(lambda: is_complete(out, checkpoint))
    except (CheckpointError, OSError) as error:
        raise fail(error) from error
    early = early_end(history, recipe)
    done = f"{out}: {early or f'all {recipe.epochs} epochs are done'}"
    option = "--early-stop" if early else "--epochs"
    console.print(f"{done}; to train longer: --resume {out} {option} N" if complete else f"{done}, {_MISSING}", markup=False)
    return complete


_MISSING = "but some files are missing: they are written now"


def _train(context: typer.Context, resume: str | None, out: Path | None, processes: Processes) -> int:
    """Run ``train`` in each of the processes, and return the exit code."""
    begin = time.perf_counter()
    stops = StopSignals(repeats=processes.launched)
    with stops.hearing_saves(), contextlib.ExitStack() as while_training:
        begun, out = processes.from_leader(lambda: _what_to_train(context, resume, out, while_training))
        graph: bool | None = context.params["graph"]
        checkpoint = None
        if begun is None:
            options = new_options(context.params)
            device = local_device(options.device, processes)
            recipe = new_recipe(context.params, device)
        else:
            recipe, options, checkpoint = begun
            device = local_device(options.device, processes)
            graph = graph_of_resumed(graph, options)
        run = run_on(device, processes, recipe, options, graph)
        if checkpoint is not None and _needs_nothing(out, checkpoint, recipe, processes):
            return 0
        try:
            run_training(run, out, stops, begin, checkpoint)
        except Stopped as stopped:
            return report_stop(stopped, "train", out, processes, stops)
    console.print(f"classify images with: alexnet-triton predict {shlex.quote(str(out))} IMAGE", markup=False)
    if context.params["check"] and processes.size == 1:
        check_command(out, options.device)
    return 0
