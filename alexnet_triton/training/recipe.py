"""The settings of a run: :class:`Recipe` decides its numbers, :class:`Where` the device and processes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import torch

from ..data.augment import Augment, Crop, patch_side
from ..data.dataset import DataError
from ..data.shards import BUFFER
from ..models import IMAGE_SIZE
from .distributed import ALONE, Processes
from .schedule import Schedule, ScheduleName

#: For each ``--recipe``, its values for fields of :class:`Recipe`. An option on the command line overrides them.
RECIPES: dict[str, dict[str, Any]] = {
    "d2l": {
        "epochs": 10,
        "batch_size": 128,
        "momentum": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
        "schedule": "constant",
        "warmup": 0.0,
        "label_smoothing": 0.0,
        "class_weights": "none",
        "normalize": False,
        "flip": False,
        "crop": "none",
        "colour": False,
    }
}
RECIPES["modern"] = RECIPES["d2l"] | {
    "epochs": 20,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "schedule": "onecycle",
    "label_smoothing": 0.1,
    "normalize": True,
    "flip": True,
    "crop": "pad",
}

#: The recipe of Krizhevsky, Sutskever and Hinton, 2012, with these differences. They divided the learning rate by ten three
#: times in about 90 epochs, by hand, whenever the validation error stopped falling; here the rate is divided after 30 and
#: after 60 epochs, as in torchvision's reference script for ImageNet. They subtracted a mean per pixel; --normalize subtracts a
#: mean per channel and divides by a standard deviation. Local response normalization, biases that begin at 1 and weights with
#: a standard deviation of 0.01 are left out, since PyTorch's form of the network lacks them.
RECIPES["paper"] = RECIPES["d2l"] | {
    "epochs": 90,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "step",
    "normalize": True,
    "flip": True,
    "crop": "patch",
    "colour": True,
}

#: The learning rate of each recipe for each network. ``"d2l"`` has the book's rates; torchvision's AlexNet gets the rate of the
#: book's AlexNet. The paper has no LeNet: the book's rate is divided by ten, the factor by which momentum 0.9 lengthens a step.
LEARNING_RATES = {
    "d2l": {"alexnet": 0.01, "lenet": 0.9, "torchvision": 0.01},
    "modern": {"alexnet": 0.02, "lenet": 0.3, "torchvision": 0.02},
    "paper": {"alexnet": 0.01, "lenet": 0.09, "torchvision": 0.01},
}

#: The largest int64, which is the largest size, step or seed that torch takes.
MOST = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The values that a field accepts, besides the restriction of its type.

    Attributes:
        least, most: bounds of a number, both accepted.
        among: the accepted values; empty: all.
        may_change: whether a resumed run may have another value than it began with.
    """

    least: float | None = None
    most: float | None = None
    among: tuple[object, ...] = ()
    may_change: bool = False

    def allows(self, value: Any) -> bool:
        """Whether the field accepts ``value``, which has the field's type. NaN and infinity are never accepted."""
        return (
            not (isinstance(value, float) and not math.isfinite(value))
            and (not self.among or value in self.among)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
        )


def field(default: object, **allowed: Any) -> Any:
    """A dataclass field with a default and, for :func:`check_fields`, an :class:`Allowed` made of ``allowed``."""
    return dataclasses.field(default=default, metadata={"allowed": Allowed(**allowed)})


def allowed_of(kind: Any) -> dict[str, Allowed]:
    """The :class:`Allowed` of each field by name, for a dataclass whose fields are made by :func:`field`."""
    return {each.name: each.metadata["allowed"] for each in dataclasses.fields(kind)}


def check_fields(value: Any) -> None:
    """Check the type and value of each field of ``value``, a dataclass whose fields are made by :func:`field`.

    Raises:
        ValueError: a field does not accept its value. The message names the field as a command-line option.
    """
    kinds = get_type_hints(type(value))
    for name, allowed in allowed_of(value).items():
        kind, found = kinds[name], getattr(value, name)
        if found is None and isinstance(None, kind):
            continue
        # As in Python's type hints an int is accepted for a float. A bool is not accepted for a number.
        fits = isinstance(found, kind | int if kind is float else kind)
        fits = fits and (not isinstance(found, bool) or bool in (kind, *get_args(kind)))
        if not fits or not allowed.allows(found):
            raise ValueError(f"--{name.replace('_', '-')} cannot be {str(found)[:50]!r}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings that decide a run's numbers. The command line makes a recipe, the trainer reads it, a checkpoint keeps it.

    A run can be resumed with a recipe that equals its own in every field except those marked "may change". A checkpoint that
    lacks a field, because the field was added later, gets the field's default: the default is what runs did before.

    Attributes:
        model: the network: ``"alexnet"``, ``"lenet"`` or ``"torchvision"`` (torchvision's AlexNet).
        data: as for :func:`alexnet_triton.data.image_folder.load_data`; may change, since the images are compared.
        channels: channels of the images, 1 or 3.
        limit: the most training images, and the most test images; None: all.
        epochs: epochs of the whole run, including those before it was resumed; may change.
        batch_size: images per step, over all processes.
        lr: learning rate, the highest one of the schedule; may change, for a run that diverged.
        momentum, nesterov, weight_decay: as in :class:`alexnet_triton.optim.SGD`; the last may change.
        schedule, warmup: as in :class:`.schedule.Schedule`. If ``epochs`` changes, the rest of the run has the learning rates
            of a run of the new length.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`, in the training loss.
        class_weights: ``"balanced"``: a training image's loss is weighted by the inverse of its class's number of images; the
            mean of these weights over the training images is 1. ``"none"``: no weights.
        normalize: whether images are normalized by the :class:`alexnet_triton.data.dataset.Normalization` of the training
            images.
        seed: seed of the weights, the order of the images, dropout and augmentation.
        dtype: what the network computes in: ``"float32"``, ``"tf32"``, ``"float16"`` or ``"bfloat16"``.
        flip, crop, colour: as in :class:`alexnet_triton.data.augment.Augment`.
        validation: fraction of the training images that is held out for the test; None: the data has its own test images.
        init: file or run folder of the initial weights, see :func:`.initial.read_weights`; None: random weights.
        freeze: which layers are frozen: ``"features"``: all convolutions except those that ``init`` lacks; ``"none"``.
        shuffle_buffer: size of the shuffle buffer for tar shards, in images. The order of the shards is shuffled as well.
        early_stop: end after this number of epochs without a better test loss; None: never; may change.

    Raises:
        ValueError: a field does not accept its value, the warm-up is longer than the run, or ``nesterov`` is set without
            momentum.
    """

    model: str = field("alexnet", among=tuple(IMAGE_SIZE))
    data: str | None = field(None, may_change=True)
    channels: int = field(1, among=(1, 3))
    limit: int | None = field(None, least=1, most=MOST)
    epochs: int = field(10, least=1, most=MOST, may_change=True)
    batch_size: int = field(128, least=1, most=MOST)
    lr: float = field(LEARNING_RATES["d2l"]["alexnet"], least=0.0, may_change=True)
    momentum: float = field(0.0, least=0.0)
    weight_decay: float = field(0.0, least=0.0, may_change=True)
    seed: int = field(0, least=-MOST - 1, most=MOST)
    dtype: str = field("float32", among=("float32", "tf32", "float16", "bfloat16"))
    flip: bool = field(False)
    crop: str = field("none", among=get_args(Crop))
    colour: bool = field(False)
    nesterov: bool = field(False)
    schedule: str = field("constant", among=get_args(ScheduleName))
    warmup: float = field(0.0, least=0.0)
    label_smoothing: float = field(0.0, least=0.0, most=1.0)
    class_weights: str = field("none", among=("none", "balanced"))
    normalize: bool = field(False)
    validation: float | None = field(None, least=0.0, most=1.0)
    init: str | None = field(None)
    freeze: str = field("none", among=("none", "features"))
    early_stop: int | None = field(None, least=1, most=MOST, may_change=True)
    shuffle_buffer: int = field(BUFFER, least=1, most=MOST)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.warmup > self.epochs:
            raise ValueError(f"--warmup of {self.warmup:g} epochs does not fit into a run of {self.epochs}")
        if self.nesterov and not self.momentum:
            raise ValueError("--nesterov needs a --momentum above 0")

    @property
    def learning_rates(self) -> Schedule:
        """The learning rate of each step."""
        return Schedule(self.schedule, self.lr, self.epochs, self.warmup)  # type: ignore[arg-type]  # among which schedule is

    @property
    def augment(self) -> Augment:
        """The random augmentation of the training images."""
        return Augment(self.flip, self.crop, self.colour)  # type: ignore[arg-type]  # among which crop is

    @property
    def image_size(self) -> int:
        """Side of the network's input."""
        return IMAGE_SIZE[self.model]

    @property
    def image_side(self) -> int:
        """Side of the stored images: larger than :attr:`image_size` if patches are cut from them."""
        return patch_side(self.image_size) if self.crop == "patch" else self.image_size

    def check_side(self, side: int) -> None:
        """Check that patches can be cut from stored images of ``side`` x ``side``, if the crop is ``"patch"``.

        Raises:
            DataError: ``side`` is not :attr:`image_side`.
        """
        if self.crop == "patch" and side != self.image_side:
            raise DataError(
                f"--crop patch cuts {self.image_size} x {self.image_size} pixels from {self.image_side} x {self.image_side}, "
                f"the images are {side} x {side}: give --crop pad"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the network's parameters."""
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)


@dataclasses.dataclass(frozen=True)
class Where:
    """Where a run computes its numbers.

    Attributes:
        device: device of the network and of the images.
        graph: run each step as one CUDA graph.
        processes: the processes that train together, each on a share of every batch.
        checkpoint_every: steps between checkpoints within an epoch, counted from the run's first step; None: none.
        options: the caller's options from which this value was made: numbers, strings, None. Checkpoints keep them; nothing
            else reads them.

    Raises:
        ValueError: ``graph`` is set and ``device`` is not a CUDA device.
    """

    device: torch.device
    graph: bool = False
    processes: Processes = ALONE
    checkpoint_every: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.graph and self.device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, not {self.device.type}")
