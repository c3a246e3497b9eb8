"""What decides a run's numbers, and where it runs."""

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

#: For each ``--recipe``, the fields of a :class:`Recipe` that it decides where no option does.
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

#: That of Krizhevsky, Sutskever and Hinton, 2012. They divided the learning rate by ten three times in about 90 epochs, by
#: hand, whenever the error on the validation images stopped falling; here it is divided after 30 and after 60 epochs, as
#: torchvision's reference script for ImageNet does. They subtracted the mean of each pixel; --normalize has one for each
#: channel, and divides by a standard deviation. Left out is what PyTorch's form of the network lacks: local response
#: normalization, biases that begin at 1, weights drawn with a standard deviation of 0.01.
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

#: The learning rate of each recipe for each network; of ``"d2l"`` those of the book, its AlexNet's for torchvision's. The paper
#: has no LeNet: the book's is divided by ten, by which momentum 0.9 lengthens a step.
LEARNING_RATES = {
    "d2l": {"alexnet": 0.01, "lenet": 0.9, "torchvision": 0.01},
    "modern": {"alexnet": 0.02, "lenet": 0.3, "torchvision": 0.02},
    "paper": {"alexnet": 0.01, "lenet": 0.09, "torchvision": 0.01},
}

#: The largest number that torch takes for a size, a step or a seed: that of an int64.
MOST = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What a field can hold besides what its type says.

    Attributes:
        least, most: of a number.
        among: the values that there are; empty: all.
        may_change: whether a resumed run may have another value than it began with.
    """

    least: float | None = None
    most: float | None = None
    among: tuple[object, ...] = ()
    may_change: bool = False

    def allows(self, value: Any) -> bool:
        """Whether ``value``, which is of the field's type, is one of these. NaN and infinity are not."""
        return (
            not (isinstance(value, float) and not math.isfinite(value))
            and (not self.among or value in self.among)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
        )


def field(default: object, **allowed: Any) -> Any:
    """A dataclass's field with an :class:`Allowed` of these attributes, for :func:`check_fields`."""
    return dataclasses.field(default=default, metadata={"allowed": Allowed(**allowed)})


def allowed_of(kind: Any) -> dict[str, Allowed]:
    """What each field of a dataclass made of :func:`field` can hold, by its name."""
    return {each.name: each.metadata["allowed"] for each in dataclasses.fields(kind)}


def check_fields(value: Any) -> None:
    """That each field of ``value``, a dataclass made of :func:`field`, holds what it can.

    Raises:
        ValueError: one does not; the message names it as an option of the command line.
    """
    kinds = get_type_hints(type(value))
    for name, allowed in allowed_of(value).items():
        kind, found = kinds[name], getattr(value, name)
        if found is None and isinstance(None, kind):
            continue
        # An int is a float, as Python's own type hints have it; a bool is no number.
        fits = isinstance(found, kind | int if kind is float else kind)
        fits = fits and (not isinstance(found, bool) or bool in (kind, *get_args(kind)))
        if not fits or not allowed.allows(found):
            raise ValueError(f"no --{name.replace('_', '-')} can be {str(found)[:50]!r}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's numbers: the command line makes it, the trainer reads it, a checkpoint keeps it.

    A run is resumed by a recipe that equals its own in every field but those that may change (:class:`Allowed`). The default of
    a field that is added later is what runs did before: a checkpoint that lacks the field gets it.

    Attributes:
        model: the network, ``"alexnet"``, ``"lenet"`` or ``"torchvision"``, torchvision's AlexNet.
        data: as for :func:`alexnet_triton.data.image_folder.load_data`; may change, since the images are compared.
        channels: of the images, 1 or 3.
        limit: at most so many training images, and test images; None: all.
        epochs: in all, those before a resumption too; may change.
        batch_size: images of a step, of all processes together.
        lr: learning rate, of a schedule the highest one; may change, for a run that diverged.
        momentum, nesterov, weight_decay: as in :class:`alexnet_triton.optim.SGD`; the last may change.
        schedule, warmup: as in :class:`.schedule.Schedule`. Where ``epochs`` changes, the rest of the run has the
            learning rates of a run that has always had so many.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`, of the training loss.
        class_weights: ``"balanced"``: a training image's loss counts by the inverse of how many there are of its class, and the
            mean of these weights over the training images is 1. ``"none"``: all count alike.
        normalize: the network sees images by the :class:`alexnet_triton.data.dataset.Normalization` of the training images.
        seed: of the weights, the order of the images, dropout and augmentation.
        dtype: what the network computes in: ``"float32"``, ``"tf32"``, ``"float16"`` or ``"bfloat16"``.
        flip, crop, colour: as in :class:`alexnet_triton.data.augment.Augment`.
        validation: part of the training images that are the test images; None: the data has its own.
        init: file or run's folder of the weights that the network began with, see :func:`.initial.read_weights`; None: random.
        freeze: what keeps its weights: ``"features"``, all convolutions but those that ``init`` did not have, or ``"none"``.
        shuffle_buffer: of tar shards, which come in another order in each epoch, among how many images that of the images is
            drawn.
        early_stop: end after so many epochs without a better test loss; None: never; may change.

    Raises:
        ValueError: a value is of another type or not one that its field can hold, a warm-up is longer than the run, or
            ``nesterov`` has no momentum.
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
            raise ValueError(f"no --warmup of {self.warmup:g} epochs fits into a run of {self.epochs}")
        if self.nesterov and not self.momentum:
            raise ValueError("--nesterov needs a --momentum above 0")

    @property
    def learning_rates(self) -> Schedule:
        """The learning rate of each step."""
        return Schedule(self.schedule, self.lr, self.epochs, self.warmup)  # type: ignore[arg-type]  # among which schedule is

    @property
    def augment(self) -> Augment:
        """What is changed in the training images at random."""
        return Augment(self.flip, self.crop, self.colour)  # type: ignore[arg-type]  # among which crop is

    @property
    def image_size(self) -> int:
        """Side of what the network takes."""
        return IMAGE_SIZE[self.model]

    @property
    def image_side(self) -> int:
        """Side that the images are held at: above :attr:`image_size` where patches are cut from them."""
        return patch_side(self.image_size) if self.crop == "patch" else self.image_size

    def check_side(self, side: int) -> None:
        """That images of ``side`` x ``side`` have patches, where the crop is those.

        Raises:
            DataError: they have none.
        """
        if self.crop == "patch" and side != self.image_side:
            raise DataError(
                f"--crop patch cuts {self.image_size} x {self.image_size} pixels from {self.image_side} x {self.image_side}, "
                f"the images are {side} x {side}: give --crop pad"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the network's parameters."""
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)


@dataclasses.dataclass(frozen=True)
class Where:
    """Where a run computes its numbers.

    Attributes:
        device: of the network and of the images.
        graph: each step is one CUDA graph.
        processes: that train together, each on a shard of every batch.
        checkpoint_every: in the middle of an epoch, save after so many steps, counted from the run's first; None: never.
        options: how whoever made this would make it again: numbers, strings, None. Checkpoints keep them, nothing else reads
            them.

    Raises:
        ValueError: ``graph`` on a device without CUDA graphs.
    """

    device: torch.device
    graph: bool = False
    processes: Processes = ALONE
    checkpoint_every: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.graph and self.device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, not {self.device.type}")
