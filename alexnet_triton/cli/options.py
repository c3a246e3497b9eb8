"""Shared by the commands: their options, the device that an option names, the console, error messages."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..data.augment import EVERYTHING
from ..training.distributed import Processes, first_to_say, joined
from ..training.networks import describe_backend
from ..training.recipe import LEARNING_RATES, MOST, RECIPES, Recipe, allowed_of

T = TypeVar("T")


class _Console(Console):
    """A console that falls silent when its terminal is closed, so that the run can still save."""

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.quiet = True
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.file.fileno())  # buffered text is flushed there when the process ends
            os.close(null)


console = _Console(soft_wrap=True, highlight=False)


def print_table(table: Table) -> None:
    """Print ``table``. A file or a pipe has no width: no cell is wrapped there."""
    (console if console.is_terminal else Console(width=400, highlight=False, quiet=console.quiet)).print(table)


class Model(StrEnum):
    """The networks that can be trained."""

    alexnet = "alexnet"
    lenet = "lenet"
    torchvision = "torchvision"


class PrecisionChoice(StrEnum):
    """The precision that a network computes in."""

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


class FreezeChoice(StrEnum):
    """Which layers are not trained."""

    none = "none"
    features = "features"


class CropChoice(StrEnum):
    """See :class:`alexnet_triton.data.augment.Augment`."""

    none = "none"
    pad = "pad"
    resized = "resized"
    patch = "patch"


class RecipeChoice(StrEnum):
    """See :data:`alexnet_triton.training.recipe.RECIPES`."""

    d2l = "d2l"
    modern = "modern"
    paper = "paper"


class ScheduleChoice(StrEnum):
    """See :class:`alexnet_triton.training.schedule.Schedule`."""

    constant = "constant"
    step = "step"
    cosine = "cosine"
    onecycle = "onecycle"


class ClassWeightsChoice(StrEnum):
    """See :class:`alexnet_triton.training.recipe.Recipe`."""

    none = "none"
    balanced = "balanced"


def _an_int64(value: T) -> T:
    numbers = value if isinstance(value, list) else [value]
    if wrong := [each for each in numbers if isinstance(each, int) and not -MOST - 1 <= each <= MOST]:
        raise typer.BadParameter(f"{wrong[0]} does not fit into 64 bits")
    return value


def number(least: float | None, *flags: str, **arguments: Any) -> Any:
    """An option for a number, or for several, of at least ``least``.

    A callback checks that integers fit an int64, which torch needs. A ``max`` of 2^63 - 1 would be shown in the help.
    """
    return typer.Option(*flags, min=least, callback=_an_int64, **arguments)


def _bounded(name: str, *flags: str, **arguments: Any) -> Any:
    """An option for a number that is a field of :class:`Recipe`, with the bounds of that field."""
    allowed = allowed_of(Recipe)[name]
    return number(allowed.least, *flags, max=None if allowed.most == MOST else allowed.most, **arguments)


def _shown(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _by_recipe(name: str, *flags: str, **arguments: Any) -> Any:
    """An option for a field of :class:`Recipe`. If it is not given, it is None, and ``--recipe`` decides the field."""
    usual = _shown(RECIPES[RecipeChoice.d2l][name])
    others = {recipe: _shown(RECIPES[recipe][name]) for recipe in RecipeChoice}
    return _bounded(
        name,
        *flags,
        show_default="; ".join((usual, *(f"{recipe} {value}" for recipe, value in others.items() if value != usual))),
        **{"rich_help_panel": "Recipe"} | arguments,
    )


def _shown_learning_rates() -> str:
    rates = {(recipe, model): LEARNING_RATES[recipe][model] for recipe in RecipeChoice for model in Model}
    return "; ".join(" ".join((*map(str, names), f"{lr:g}")) for names, lr in rates.items())


#: The panels of the help, in the order in which the help shows them.
PANELS = DATA, RECIPE, AUGMENTATION, HARDWARE, OUTPUT = "Data", "Recipe", "Augmentation", "Hardware", "Output"

DataOption = Annotated[
    str | None,
    typer.Option(
        help="Read the images from here: a folder that holds train and test (or val, valid, validation) with one folder per "
        "class in each; tar shards as WebDataset writes them (their folder, or 'DIR/train-{0000..0127}.tar'); a folder written "
        "by save_to_disk of Hugging Face's datasets; a folder of Fashion-MNIST's IDX files; or 'sample', a small part of "
        "Fashion-MNIST inside the package. By default Fashion-MNIST is looked for in the usual places; if it is not there, "
        "torchvision downloads it.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
ValidationOption = Annotated[
    float | None,
    _bounded(
        "validation",
        help="Use this part of each class, such as 0.2, as test images. This is for a folder of images without test images: it "
        "holds train alone, or the class folders. --seed decides which images are taken.",
        rich_help_panel=DATA,
    ),
]
SkipDamagedOption = Annotated[
    bool | None,
    typer.Option(
        "--skip-damaged/--no-skip-damaged",
        help="Leave out images of a folder that cannot be read, and list them. Otherwise the first such image is an error.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
LimitOption = Annotated[
    int | None,
    _bounded(
        "limit",
        help="Use at most N training and N test images: of Fashion-MNIST the first ones, of your own images "
        "evenly spread ones.",
        rich_help_panel=DATA,
    ),
]
StreamOption = Annotated[
    bool | None,
    typer.Option(
        help="Read the images while they are used, a few batches ahead, instead of all of them at the start.",
        show_default="stream if the images do not fit the device's memory",
        rich_help_panel=DATA,
    ),
]
ShuffleBufferOption = Annotated[
    int,
    number(
        1,
        help="Shuffle the images of tar shards in a buffer of this many images. Each epoch also reads the shards in another "
        "order.",
        rich_help_panel=DATA,
    ),
]
WorkersOption = Annotated[
    int | None,
    number(
        0,
        help="Decode images in this many worker processes; 0 decodes in the main process.",
        show_default="one per core",
        rich_help_panel=DATA,
    ),
]
BackendOption = Annotated[
    BackendChoice,
    typer.Option(
        help="Compute with the Triton kernels (triton) or with PyTorch (torch). auto uses the kernels on CUDA, PyTorch on the "
        "CPU.",
        rich_help_panel=HARDWARE,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="Compute on this device, such as cpu, cuda or cuda:1. auto uses a GPU if there is one.", rich_help_panel=HARDWARE
    ),
]
BatchOption = Annotated[int, _bounded("batch_size", help="Compute this many images in one batch.", rich_help_panel=HARDWARE)]
RecipeOption = Annotated[
    RecipeChoice,
    typer.Option(
        help="Take the training options that are not given (epochs, batch size, learning rate, schedule, optimizer, loss, "
        "normalization, augmentation) from this recipe. d2l is the recipe of Dive into Deep Learning. modern "
        "trains with a one-cycle learning rate on normalized and augmented images. paper is AlexNet's own for ImageNet.",
        rich_help_panel="Recipe",
    ),
]
EpochsOption = Annotated[int | None, _by_recipe("epochs", help="Train for this many epochs in total.")]
TotalBatchOption = Annotated[
    int | None, _by_recipe("batch_size", help="Train on this many images per step, over all processes.")
]
LearningRateOption = Annotated[
    float | None,
    _bounded(
        "lr",
        help="Train with this learning rate. For a schedule it is the highest one.",
        show_default=_shown_learning_rates(),
        rich_help_panel="Recipe",
    ),
]
ScheduleOption = Annotated[
    ScheduleChoice | None,
    _by_recipe(
        "schedule",
        help="Change the learning rate from step to step. step divides it by ten after each third of the run. cosine lowers it "
        "to 0. onecycle raises it from 1/25 of --lr to --lr, and lowers it to almost 0.",
    ),
]
WarmupOption = Annotated[
    float | None,
    _by_recipe(
        "warmup",
        metavar="EPOCHS",
        help="Raise the learning rate from almost 0 during the first EPOCHS epochs. With --schedule onecycle the learning "
        "rate rises during these epochs, by default during three tenths of the run.",
    ),
]
MomentumOption = Annotated[float | None, _by_recipe("momentum", help="Train by SGD with this momentum.")]
NesterovOption = Annotated[bool | None, _by_recipe("nesterov", "--nesterov/--no-nesterov", help="Use Nesterov momentum.")]
WeightDecayOption = Annotated[
    float | None, _by_recipe("weight_decay", help="Add this factor times the weights to their gradients (an L2 penalty).")
]
LabelSmoothingOption = Annotated[
    float | None,
    _by_recipe("label_smoothing", help="Spread this part of each training label evenly over all classes."),
]
ClassWeightsOption = Annotated[
    ClassWeightsChoice | None,
    _by_recipe(
        "class_weights",
        help="Weight the loss of each training image. balanced: by the inverse of its class's number of images. none: equally.",
    ),
]
NormalizeOption = Annotated[
    bool | None,
    _by_recipe(
        "normalize",
        "--normalize/--no-normalize",
        help="Normalize each channel to mean 0 and standard deviation 1 over the training images. Test images are normalized "
        "by the same numbers.",
    ),
]
SeedOption = Annotated[
    int,
    _bounded(
        "seed",
        help="Seed the initial weights, the order of the images, dropout, augmentation and --validation with this number.",
        rich_help_panel=RECIPE,
    ),
]
PrecisionOption = Annotated[
    PrecisionChoice,
    typer.Option(
        help="Compute in this precision. auto is bfloat16 with float32 master weights on a GPU that has bfloat16, else "
        "float32. float32 multiplies in full float32, without TF32. tf32 uses TF32 tensor cores for convolutions and "
        "linear layers (PyTorch's default is TF32 for convolutions alone).",
        rich_help_panel=RECIPE,
    ),
]
InitOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Begin with the weights of this file instead of random ones: a checkpoint, a run's folder, or a state_dict from "
        "torch.save or in .safetensors (such as torchvision's for --model torchvision). Layers that the file lacks, or "
        "has in other shapes, begin with random weights.",
        show_default=False,
        rich_help_panel=RECIPE,
    ),
]
FreezeOption = Annotated[
    FreezeChoice,
    typer.Option(
        help="With features, do not train the convolutions that --init loaded (without --init: any convolution). With none, "
        "train all layers.",
        rich_help_panel=RECIPE,
    ),
]
EarlyStopOption = Annotated[
    int | None,
    _bounded("early_stop", metavar="N", help="Stop when the test loss has not improved for N epochs.", rich_help_panel=RECIPE),
]
GraphOption = Annotated[
    bool | None,
    typer.Option(
        "--graph/--no-graph", help="Run each step as one CUDA graph.", show_default="on CUDA", rich_help_panel=HARDWARE
    ),
]
AugmentOption = Annotated[
    bool,
    typer.Option(
        "--augment",
        help=f"Change each training image at random: {EVERYTHING}. Each change also has its own option below.",
        rich_help_panel=AUGMENTATION,
    ),
]
#: Default of the changes that the recipe ``modern`` makes as well.
_AUGMENTED = "with --augment or --recipe modern"
FlipOption = Annotated[
    bool | None,
    typer.Option(
        "--flip/--no-flip",
        help="Mirror each image with probability 1/2.",
        show_default="with --augment, --recipe modern or --recipe paper",
        rich_help_panel=AUGMENTATION,
    ),
]
CropOption = Annotated[
    CropChoice | None,
    typer.Option(
        help="Crop each image at random. pad moves the image by up to a fourteenth of its side. resized enlarges a random box "
        "of it to the full size. patch reads your own images with side 256 instead of 224 (for LeNet 32 instead of 28) and "
        "cuts out a random patch of 224 x 224 (28 x 28), of a test image the middle one.",
        show_default=f"none; pad {_AUGMENTED}; patch with --recipe paper",
        rich_help_panel=AUGMENTATION,
    ),
]
ColourOption = Annotated[
    bool | None,
    typer.Option(
        "--colour/--no-colour",
        help="Change brightness and contrast of images with one channel, the illumination of images with three.",
        show_default="with --augment or --recipe paper",
        rich_help_panel=AUGMENTATION,
    ),
]
TenCropOption = Annotated[
    bool,
    typer.Option(
        "--ten-crop",
        help="Average the probabilities over ten patches of each image: the four corners and the middle, and these mirrored. "
        "The images are read larger for this.",
        rich_help_panel="Recipe",
    ),
]
CheckpointEveryOption = Annotated[
    int | None,
    number(
        1,
        metavar="STEPS",
        help="Also save every STEPS steps, counted from the run's first step. A crash loses at most this many steps.",
        show_default="after each epoch",
        rich_help_panel=OUTPUT,
    ),
]
TensorboardOption = Annotated[
    bool,
    typer.Option(
        "--tensorboard/--no-tensorboard",
        help="Write each epoch's metrics for TensorBoard into the folder tensorboard beside the checkpoints.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


_debug = False


def show_tracebacks(show: bool) -> None:
    """Set whether :func:`fail` raises the error that it is given, so that its traceback is shown."""
    global _debug
    _debug = show


def fail(message: object) -> typer.Exit:
    """Print ``message`` as one line of standard error, and return the exception to raise, which sets exit code 1.

    Where several processes of a run fail with the same message, one of them prints it.

    Raises:
        BaseException: ``message`` itself, if it is an exception and :func:`show_tracebacks` asked for tracebacks.
    """
    if _debug and isinstance(message, BaseException):
        raise message
    if isinstance(message, OSError) and message.filename is not None:
        message = f"{message.filename}: {message.strerror}"
    if first_to_say(str(message)):
        _Console(stderr=True, soft_wrap=True, highlight=False).print(f"alexnet-triton: {message}", markup=False)
    return typer.Exit(1)


@contextlib.contextmanager
def joined_command() -> Iterator[Processes]:
    """:func:`.distributed.joined` for a command: only one process prints, errors in options included."""
    with joined() as processes:
        console.quiet = not processes.leads
        try:
            yield processes
        except typer.BadParameter as error:
            if not first_to_say(str(error)):
                raise SystemExit(error.exit_code) from error
            raise


def _one_or_three(channels: int | None) -> int | None:
    if channels not in (None, 1, 3):
        raise typer.BadParameter(f"must be 1 (grey) or 3 (red, green, blue), not {channels}")
    return channels


ChannelsOption = Annotated[
    int | None,
    typer.Option(
        callback=_one_or_three,
        help="Convert a folder's images to grey (1) or to red, green and blue (3).",
        show_default="3; Fashion-MNIST has 1",
        rich_help_panel=DATA,
    ),
]


def usable_device(name: str) -> torch.device:
    """The device called ``name``; for ``"auto"`` a GPU if there is one, else the CPU.

    Raises:
        typer.BadParameter: ``name`` is no device that can be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{name!r} is no usable device: {str(error).splitlines()[0]}") from error


def local_device(name: str, processes: Processes) -> torch.device:
    """:func:`usable_device`; of several processes on GPUs, each gets the GPU of its local rank."""
    if processes.size == 1:
        return usable_device(name)
    if ":" in name:
        raise typer.BadParameter(f"{processes.size} processes cannot share {name}: give cuda", param_hint="--device")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        device = usable_device(f"cuda:{processes.local_rank}")
        torch.cuda.set_device(device)
        return device
    return usable_device(name)


def runs_on(device: torch.device) -> str:
    """The backend and the hardware that the operations run on, in words."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"the CPU ({torch.get_num_threads()} threads)"
    return f"{describe_backend(device)} on {hardware}"
