"""What the commands of the command line share: options and what they come down to, the console, errors."""

from __future__ import annotations

import contextlib
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

console = Console(soft_wrap=True, highlight=False)


def print_table(table: Table) -> None:
    """Print ``table``; in a file or a pipe, which has no width, without breaking a cell into lines."""
    (console if console.is_terminal else Console(width=400, highlight=False, quiet=console.quiet)).print(table)


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


class CropChoice(StrEnum):
    """See :class:`alexnet_triton.data.augment.Augment`."""

    none = "none"
    pad = "pad"
    resized = "resized"


def _bounded(name: str, **arguments: Any) -> Any:
    """An option for a number that is a field of a :class:`Recipe`, which says what it can be."""
    allowed = allowed_of(Recipe)[name]
    return typer.Option(min=allowed.least, max=allowed.most, **arguments)


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
    _bounded(
        "limit", help="Use at most N training and N test images: the first ones, of a folder of images evenly spread ones."
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=MOST,
        help="Processes that decode a folder of images; 0: this one.",
        show_default="one a core, 8 at most",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
BatchOption = Annotated[int, _bounded("batch_size", help="Images in a batch.")]
EpochsOption = Annotated[int, _bounded("epochs")]
TotalBatchOption = Annotated[int, _bounded("batch_size", help="Images in a batch, that of all processes together.")]
LearningRateOption = Annotated[float | None, _bounded("lr", help="Learning rate of plain SGD.", show_default="0.01; lenet 0.9")]
MomentumOption = Annotated[float, _bounded("momentum", help="Of SGD.")]
WeightDecayOption = Annotated[float, _bounded("weight_decay", help="Factor of the L2 penalty's gradient.")]
SeedOption = Annotated[
    int,
    _bounded("seed", help="Of the weights, the order of the images, dropout and augmentation."),
]
PrecisionOption = Annotated[
    PrecisionChoice,
    typer.Option(
        help="auto: bfloat16 with float32 masters on a GPU that has it, else float32. float32: products are exact. tf32: "
        "float32 on tensor cores, convolutions and linear layers alike (by PyTorch's default convolutions alone)."
    ),
]
GraphOption = Annotated[
    bool | None, typer.Option("--graph/--no-graph", help="Each step as one CUDA graph.", show_default="on CUDA")
]
AugmentOption = Annotated[
    bool,
    typer.Option(
        "--augment",
        help=f"Change each training image at random: {EVERYTHING}. Each has an option of its own.",
    ),
]
FlipOption = Annotated[
    bool | None, typer.Option("--flip/--no-flip", help="Mirror each image with probability 1/2.", show_default="with --augment")
]
CropOption = Annotated[
    CropChoice | None,
    typer.Option(
        help="pad: move each image by up to a fourteenth of its side. resized: enlarge a random box of it to its size.",
        show_default="none; with --augment pad",
    ),
]
ColourOption = Annotated[
    bool | None,
    typer.Option(
        "--colour/--no-colour",
        help="Change brightness and contrast of images of one channel, the light of those of three.",
        show_default="with --augment",
    ),
]
TensorboardOption = Annotated[
    bool,
    typer.Option(
        "--tensorboard/--no-tensorboard",
        help="Write each epoch for TensorBoard into the folder tensorboard beside the checkpoints.",
        show_default=False,
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
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"alexnet-triton: {message}", markup=False)
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
        help="1: a folder's images become grey, 3: red, green and blue.",
        show_default="3; Fashion-MNIST has 1",
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
