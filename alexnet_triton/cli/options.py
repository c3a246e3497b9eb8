"""What the commands of the command line share: options and what they come down to, the console, errors."""

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
    """A console whose terminal may be closed while a run goes on: it says no more then, and the run can save."""

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.quiet = True
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.file.fileno())  # what waits in a buffer goes there at the end of the process
            os.close(null)


console = _Console(soft_wrap=True, highlight=False)


def print_table(table: Table) -> None:
    """Print ``table``; in a file or a pipe, which has no width, without breaking a cell into lines."""
    (console if console.is_terminal else Console(width=400, highlight=False, quiet=console.quiet)).print(table)


class Model(StrEnum):
    """The networks that can be trained."""

    alexnet = "alexnet"
    lenet = "lenet"
    torchvision = "torchvision"


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


class FreezeChoice(StrEnum):
    """What keeps its weights."""

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
        raise typer.BadParameter(f"{wrong[0]} is no number of 64 bits")
    return value


def number(least: float | None, *flags: str, **arguments: Any) -> Any:
    """An option for a number, or several, of at least ``least`` that torch can take: every one of a command is made by this.

    A callback refuses what is no int64, so that the help does not give 2^63 - 1 as a bound.
    """
    return typer.Option(*flags, min=least, callback=_an_int64, **arguments)


def _bounded(name: str, *flags: str, **arguments: Any) -> Any:
    """An option for a number that is a field of a :class:`Recipe`, which says what it can be."""
    allowed = allowed_of(Recipe)[name]
    return number(allowed.least, *flags, max=None if allowed.most == MOST else allowed.most, **arguments)


def _shown(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _by_recipe(name: str, *flags: str, **arguments: Any) -> Any:
    """An option, None where it is not given, for a field of a :class:`Recipe` that its ``--recipe`` decides then."""
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


#: The panels of the help, in their order there.
PANELS = DATA, RECIPE, AUGMENTATION, HARDWARE, OUTPUT = "Data", "Recipe", "Augmentation", "Hardware", "Output"

DataOption = Annotated[
    str | None,
    typer.Option(
        help="Read a folder of images: train and test (or val, valid, validation), in each a folder for every class. Or tar "
        "shards as WebDataset writes them, a folder of such or 'DIR/train-{0000..0127}.tar'. Or a folder that save_to_disk of "
        "Hugging Face's datasets wrote. Or a folder of Fashion-MNIST's IDX files, or 'sample' for its small sample inside the "
        "package. By default Fashion-MNIST is looked for in the usual places, else downloaded by torchvision.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
ValidationOption = Annotated[
    float | None,
    _bounded(
        "validation",
        help="Take this part of each class, such as 0.2, for the test images, where a folder of images has none: it holds "
        "train alone, or the folders of the classes. Which ones, the seed decides.",
        rich_help_panel=DATA,
    ),
]
SkipDamagedOption = Annotated[
    bool | None,
    typer.Option(
        "--skip-damaged/--no-skip-damaged",
        help="Leave out the images of a folder that cannot be read, and list them; otherwise the first one is an error.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
LimitOption = Annotated[
    int | None,
    _bounded(
        "limit",
        help="Use at most N training and N test images: the first ones, of a folder of images evenly spread ones.",
        rich_help_panel=DATA,
    ),
]
StreamOption = Annotated[
    bool | None,
    typer.Option(
        help="Read the images while training, a few batches ahead, not all of them before.",
        show_default="--stream where they do not fit the device's memory",
        rich_help_panel=DATA,
    ),
]
ShuffleBufferOption = Annotated[
    int,
    number(
        1,
        help="Of tar shards, which come in another order in each epoch, draw the order of images among so many.",
        rich_help_panel=DATA,
    ),
]
WorkersOption = Annotated[
    int | None,
    number(
        0,
        help="Decode images in so many processes; 0 decodes in this one.",
        show_default="one a core",
        rich_help_panel=DATA,
    ),
]
BackendOption = Annotated[
    BackendChoice,
    typer.Option(
        help="Compute by Triton kernels (triton) or by PyTorch (torch); auto takes the kernels on CUDA, PyTorch on the CPU.",
        rich_help_panel=HARDWARE,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(help="Compute on this device: cpu, cuda, cuda:1; auto takes a GPU if there is one.", rich_help_panel=HARDWARE),
]
BatchOption = Annotated[
    int, _bounded("batch_size", help="Take so many images at a time, in one batch.", rich_help_panel=HARDWARE)
]
RecipeOption = Annotated[
    RecipeChoice,
    typer.Option(
        help="Take the values of the options that are not given from this recipe: d2l is that of Dive into Deep Learning, "
        "modern trains with one cycle of the learning rate on normalized and augmented images, paper is AlexNet's own for "
        "ImageNet.",
        rich_help_panel="Recipe",
    ),
]
EpochsOption = Annotated[int | None, _by_recipe("epochs", help="Train so many epochs in all.")]
TotalBatchOption = Annotated[
    int | None, _by_recipe("batch_size", help="Take so many images for a step, in all processes together.")
]
LearningRateOption = Annotated[
    float | None,
    _bounded(
        "lr",
        help="Train with this learning rate, the highest one of a schedule.",
        show_default=_shown_learning_rates(),
        rich_help_panel="Recipe",
    ),
]
ScheduleOption = Annotated[
    ScheduleChoice | None,
    _by_recipe(
        "schedule",
        help="Change the learning rate from step to step: step divides it by ten after each third of the run, cosine takes it "
        "down to 0, onecycle up from a 25th and down to almost 0.",
    ),
]
WarmupOption = Annotated[
    float | None,
    _by_recipe(
        "warmup",
        metavar="EPOCHS",
        help="Raise the learning rate from almost 0 for so many epochs; of onecycle this is the rise, three tenths of the run "
        "if it is not given.",
    ),
]
MomentumOption = Annotated[float | None, _by_recipe("momentum", help="Give SGD this momentum.")]
NesterovOption = Annotated[
    bool | None, _by_recipe("nesterov", "--nesterov/--no-nesterov", help="Make the momentum that of Nesterov.")
]
WeightDecayOption = Annotated[
    float | None, _by_recipe("weight_decay", help="Multiply the L2 penalty's gradient, which is the weights, by this.")
]
LabelSmoothingOption = Annotated[
    float | None,
    _by_recipe("label_smoothing", help="Take this part of each training label and spread it over all classes."),
]
ClassWeightsOption = Annotated[
    ClassWeightsChoice | None,
    _by_recipe(
        "class_weights",
        help="Weigh the loss of each training image: balanced by the inverse of how many its class has, none all alike.",
    ),
]
NormalizeOption = Annotated[
    bool | None,
    _by_recipe(
        "normalize",
        "--normalize/--no-normalize",
        help="Give the training images' pixels mean 0 and standard deviation 1 in each channel, and change the test images "
        "alike.",
    ),
]
SeedOption = Annotated[
    int,
    _bounded(
        "seed",
        help="Draw the weights, the order of the images, dropout, augmentation and --validation from this seed.",
        rich_help_panel=RECIPE,
    ),
]
PrecisionOption = Annotated[
    PrecisionChoice,
    typer.Option(
        help="Compute in this precision. auto is bfloat16 with float32 masters on a GPU that has it, else float32, whose "
        "products are exact; tf32 is float32 on tensor cores, convolutions and linear layers alike (by PyTorch's default "
        "convolutions alone).",
        rich_help_panel=RECIPE,
    ),
]
InitOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Begin with the weights of this file instead of random ones: a checkpoint or a run's folder, or a state_dict, "
        "such as torchvision's for --model torchvision, from torch.save or as .safetensors. Layers of other shapes begin anew.",
        show_default=False,
        rich_help_panel=RECIPE,
    ),
]
FreezeOption = Annotated[
    FreezeChoice,
    typer.Option(help="Keep the convolutions as --init brought them (features); new ones are trained.", rich_help_panel=RECIPE),
]
EarlyStopOption = Annotated[
    int | None,
    _bounded(
        "early_stop", metavar="N", help="Stop after N epochs without a better test loss than before.", rich_help_panel=RECIPE
    ),
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
        help=f"Change each training image at random: {EVERYTHING}. Each has an option of its own.",
        rich_help_panel=AUGMENTATION,
    ),
]
#: The default of what ``modern`` augments by, too.
_AUGMENTED = "with --augment or --recipe modern"
FlipOption = Annotated[
    bool | None,
    typer.Option(
        "--flip/--no-flip",
        help="Mirror each image with probability 1/2.",
        show_default=f"{_AUGMENTED} or paper",
        rich_help_panel=AUGMENTATION,
    ),
]
CropOption = Annotated[
    CropChoice | None,
    typer.Option(
        help="Move each image by up to a fourteenth of its side (pad), enlarge a random box of it to its size (resized), or "
        "read a folder's images with a side of 256 in place of 224 and cut a random patch of 224 x 224, the middle one of a "
        "test image (patch).",
        show_default=f"none; {_AUGMENTED} pad; paper patch",
        rich_help_panel=AUGMENTATION,
    ),
]
ColourOption = Annotated[
    bool | None,
    typer.Option(
        "--colour/--no-colour",
        help="Change brightness and contrast of images of one channel, the light of those of three.",
        show_default="with --augment or --recipe paper",
        rich_help_panel=AUGMENTATION,
    ),
]
TenCropOption = Annotated[
    bool,
    typer.Option(
        "--ten-crop",
        help="Average the probabilities over ten patches of each image, which is read larger: at the corners, in the middle, "
        "and all of them mirrored.",
        rich_help_panel="Recipe",
    ),
]
CheckpointEveryOption = Annotated[
    int | None,
    number(
        1,
        metavar="STEPS",
        help="Save after so many steps in the middle of an epoch too, counted from the run's first: so many can a crash cost.",
        show_default="after each epoch",
        rich_help_panel=OUTPUT,
    ),
]
TensorboardOption = Annotated[
    bool,
    typer.Option(
        "--tensorboard/--no-tensorboard",
        help="Write each epoch for TensorBoard into the folder tensorboard beside the checkpoints.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


_debug = False


def show_tracebacks(show: bool) -> None:
    """Whether :func:`fail` raises the error that it is given, for its traceback."""
    global _debug
    _debug = show


def fail(message: object) -> typer.Exit:
    """Print ``message`` as one line of standard error; what to raise then, for exit code 1.

    Of the processes of a run that fail alike, one prints it.

    Raises:
        BaseException: ``message`` itself, if it is one and :func:`show_tracebacks` was called for it.
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
    """:func:`.distributed.joined` for a command: one process prints, also what is wrong with an option."""
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
        help="Make a folder's images grey (1), or red, green and blue (3).",
        show_default="3; Fashion-MNIST has 1",
        rich_help_panel=DATA,
    ),
]


def usable_device(name: str) -> torch.device:
    """The device that ``--device`` names; auto: a GPU if there is one.

    Raises:
        typer.BadParameter: it names none that can be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{name!r} is no usable device: {str(error).splitlines()[0]}") from error


def local_device(name: str, processes: Processes) -> torch.device:
    """:func:`usable_device`; of several processes on GPUs, each has the one of its local rank."""
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
    """In words, what the operations run on: the backend and the hardware."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"the CPU ({torch.get_num_threads()} threads)"
    return f"{describe_backend(device)} on {hardware}"
