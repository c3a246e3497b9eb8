"""What the commands of the command line share: options and what they come down to, the console, errors."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..data.augment import EVERYTHING
from ..training.distributed import Processes, first_to_say, joined
from ..training.networks import describe_backend
from ..training.recipe import MOST, Recipe, allowed_of


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


def _bounded(name: str, **arguments: Any) -> Any:
    """An option for a number that is a field of a :class:`Recipe`, which says what it can be."""
    allowed = allowed_of(Recipe)[name]
    return typer.Option(min=allowed.least, max=allowed.most, **arguments)


#: The panels of the help, in their order there.
DATA, RECIPE, AUGMENTATION, HARDWARE, OUTPUT = "Data", "Recipe", "Augmentation", "Hardware", "Output"

DataOption = Annotated[
    str | None,
    typer.Option(
        help="Read a folder of images: train and test (or val, valid, validation), in each a folder for every class. Or a "
        "folder of Fashion-MNIST's IDX files, or 'sample' for its small sample inside the package. By default Fashion-MNIST is "
        "looked for in the usual places, else downloaded by torchvision.",
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
    bool,
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
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=MOST,
        help="Decode a folder of images in so many processes; 0 decodes in this one.",
        show_default="one a core, 8 at most",
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
EpochsOption = Annotated[
    int,
    _bounded("epochs", help="Train for so many passes over the training images, in all.", rich_help_panel=RECIPE),
]
TotalBatchOption = Annotated[
    int,
    _bounded("batch_size", help="Take so many images a step, those of all processes together.", rich_help_panel=RECIPE),
]
LearningRateOption = Annotated[
    float | None,
    _bounded("lr", help="Use this learning rate of plain SGD.", show_default="0.01; lenet 0.9", rich_help_panel=RECIPE),
]
MomentumOption = Annotated[float, _bounded("momentum", help="Use this momentum of SGD.", rich_help_panel=RECIPE)]
WeightDecayOption = Annotated[
    float,
    _bounded("weight_decay", help="Multiply the gradient of the L2 penalty by this factor.", rich_help_panel=RECIPE),
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
    FreezeChoice, typer.Option(help="Keep the weights of all convolutions as they are (features).", rich_help_panel=RECIPE)
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
FlipOption = Annotated[
    bool | None,
    typer.Option(
        "--flip/--no-flip",
        help="Mirror each image with probability 1/2.",
        show_default="with --augment",
        rich_help_panel=AUGMENTATION,
    ),
]
CropOption = Annotated[
    CropChoice | None,
    typer.Option(
        help="Move each image by up to a fourteenth of its side (pad), or enlarge a random box of it to its size (resized).",
        show_default="none; with --augment pad",
        rich_help_panel=AUGMENTATION,
    ),
]
ColourOption = Annotated[
    bool | None,
    typer.Option(
        "--colour/--no-colour",
        help="Change brightness and contrast of images of one channel, the light of those of three.",
        show_default="with --augment",
        rich_help_panel=AUGMENTATION,
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
