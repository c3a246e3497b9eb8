"""Checkpoints: the state of a run in one file, written and read.

:mod:`alexnet_triton.training.files` writes it atomically: after a crash of process or machine the old or the new file is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..data.augment import EVERYTHING, NOTHING
from ..data.dataset import Normalization
from .files import WriteError, replacing, write, write_atomically
from .recipe import Recipe, allowed_of

T = TypeVar("T")

FORMAT = "alexnet-triton checkpoint 1"

#: Files in the folder of a run: the newest checkpoint, and the one with the best test accuracy.
LAST, BEST = "checkpoint.pt", "best.pt"

#: Key of a run's configuration: names of the frozen layers, if the recipe freezes any. Older checkpoints lack the key: there
#: all convolutions were frozen.
FROZEN = "frozen layers"


class CheckpointError(ValueError):
    """A checkpoint cannot be read, used or written; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        model: name of the network.
        classes: names of the classes, in the order of the labels.
        metrics: the lines of ``metrics.jsonl`` so far.
        weights: the network's ``state_dict`` in float32, on the CPU.
        training: the rest of the training state, for an exact resume; None: the file is for evaluation only.
        path: the file from which the checkpoint was read.
        channels: channels of the images, 1 or 3.
        size: side of the stored images. It is smaller than the network's input if they are enlarged, and larger if the input is
            a patch of them (:func:`alexnet_triton.data.augment.patch_side`).
        normalization: how images are normalized for the network; None: pixels in [0, 1].
    """

    model: str
    classes: list[str]
    metrics: list[dict[str, Any]]
    weights: dict[str, Tensor]
    training: dict[str, Any] | None = None
    path: Path | None = None
    channels: int = 1
    size: int = 28
    normalization: Normalization | None = None


@contextlib.contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    try:
        yield
    except WriteError as error:
        raise CheckpointError(str(error)) from error


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``path``: a dict with the weights under ``"state_dict"``, for ``torch.load(weights_only=True)``.

    Raises:
        CheckpointError: the file cannot be written (no space, no permission, ...). An older file at ``path`` stays.
    """
    content = {
        "format": FORMAT,
        "model": checkpoint.model,
        "classes": checkpoint.classes,
        "channels": checkpoint.channels,
        "size": checkpoint.size,
        "normalization": None if checkpoint.normalization is None else dataclasses.asdict(checkpoint.normalization),
        "metrics": checkpoint.metrics,
        "state_dict": checkpoint.weights,
        "training": checkpoint.training,
    }
    # Serialize to memory first: on a full disk torch's own file writer reports its position, not the reason.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    # Not getbuffer(): Python 3.12.1 can crash when it collects a view of a BytesIO, and a traceback keeps such a view.
    with _as_checkpoint_error():
        write_atomically(path, buffer.getvalue())


def copy_checkpoint(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to the checkpoint ``source``, or a copy of it, in place of an older file.

    Raises:
        CheckpointError: ``target`` cannot be written (no space, no permission, ...). An older file there stays.
    """
    with _as_checkpoint_error(), replacing(target) as partial:
        partial.unlink(missing_ok=True)  # a crash may have left one, and os.link does not overwrite
        try:
            # Checkpoints are replaced, never modified in place. So a hard link is as good as a copy and writes no data.
            os.link(source, partial)
        except OSError:  # a file system without hard links
            write(partial, source.read_bytes())


def read_file(path: Path, *, of_torch: bool = True) -> Any:
    """Read a file of ``torch.save`` to the CPU: tensors, numbers, strings, and lists and dicts of these.

    Every byte of a zip archive is checked against the archive's checksums.

    Args:
        path: the file.
        of_torch: whether to accept the format of PyTorch before 1.6 too. It has no checksums; torchvision's AlexNet is in it.

    Raises:
        CheckpointError: the file does not exist, is damaged, or holds something else.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: not a checkpoint: not a regular file")  # opening a pipe would wait for a writer
        if not of_torch or zipfile.is_zipfile(path):
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint, or a truncated one (of an image and a run, the run comes first): {error}"
        ) from error
    except pickle.UnpicklingError as error:
        # A few bytes of any other file can look like a pickle.
        what = "not the weights of a network" if of_torch else "not a checkpoint of alexnet-triton train"
        raise CheckpointError(f"{path}: {what}: it holds more than tensors and numbers") from error
    except CheckpointError:
        raise
    # What the parser raises for damaged bytes is not documented. Any exception means a damaged file here.
    except Exception as error:
        if of_torch:
            raise CheckpointError(
                f"{path}: not the weights of a network: torch.save did not write it, or it is damaged"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a readable checkpoint: {reason}") from error


def _check_archive(path: Path) -> None:
    """Verify the checksums of the zip archive ``path``, which torch.load does not do; refuse a compressed archive."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            # torch.save never compresses. A few compressed bytes could expand until torch.load has filled the memory.
            raise CheckpointError(f"{path}: not a checkpoint of alexnet-triton train: it is compressed")
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged: the checksum of {damaged} is wrong")


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file written by :func:`save_checkpoint`, checking every byte against the file's checksums.

    Raises:
        CheckpointError: the file does not exist, is damaged, or is no such file.
    """
    content = read_file(path, of_torch=False)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of alexnet-triton train")
    kinds = {"model": str, "classes": list, "metrics": list, "state_dict": dict}
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise CheckpointError(f"{path}: damaged: {key!r} is missing or not a {kind.__name__}")
    training = content.get("training")
    if not isinstance(training, dict | None):
        raise CheckpointError(f"{path}: damaged: 'training' is not a dict")
    # Older files did not record channels and size. They are all of Fashion-MNIST.
    images = {"channels": content.get("channels", 1), "size": content.get("size", 28)}
    if images["channels"] not in (1, 3) or type(images["size"]) is not int or images["size"] < 1:
        raise CheckpointError(f"{path}: damaged: no network takes images of {images}")
    for key in ("classes", "state_dict"):
        if not all(isinstance(name, str) for name in content[key]):
            raise CheckpointError(f"{path}: damaged: {key!r} does not hold names" + " and weights" * (key == "state_dict"))
    images["normalization"] = _normalization(content.get("normalization"), images["channels"], path)
    return Checkpoint(content["model"], content["classes"], content["metrics"], content["state_dict"], training, path, **images)


def _normalization(kept: Any, channels: int, path: Path) -> Normalization | None:
    """The normalization that a checkpoint holds as ``kept``, for images of ``channels``.

    Raises:
        CheckpointError: ``kept`` is not a normalization for that many channels.
    """
    if kept is None:
        return None
    try:
        normalization = Normalization(tuple(kept["mean"]), tuple(kept["std"]))
        if len(normalization.mean) != channels:
            raise ValueError(f"it is for {len(normalization.mean)} channels, not for {channels}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: this is not a normalization: {str(kept)[:100]}") from error
    return normalization


def check_weights(net: nn.Module, checkpoint: Checkpoint) -> None:
    """Check that the checkpoint's weights have the names and shapes of those of ``net``.

    Raises:
        CheckpointError: a weight is missing, has another shape, or is unknown to ``net``.
    """
    expected = net.state_dict()
    for key in sorted(expected.keys() | checkpoint.weights.keys()):
        ours, theirs = expected.get(key), checkpoint.weights.get(key)
        shapes = [tuple(w.shape) if isinstance(w, Tensor) else "nothing" for w in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{checkpoint.path}: its weights do not fit this {checkpoint.model}: {key} is {shapes[0]}, here {shapes[1]}"
            )


def _with_parts(settings: Any) -> dict[str, Any]:
    """``settings`` of an older file with its single ``augment`` flag replaced by the flags of the parts of augmentation."""
    if not isinstance(settings, dict):
        return {}
    if not isinstance(settings.get("augment"), bool):
        return settings
    parts = dataclasses.asdict(EVERYTHING if settings["augment"] else NOTHING)
    return {key: value for key, value in settings.items() if key != "augment"} | parts


def _renewed(checkpoint: Checkpoint, training: dict[str, Any]) -> dict[str, Any]:
    """``training`` of an older file converted to today's keys: the fields of its recipe were in two dicts, some in both."""
    if not isinstance(options := training.get("options", {}), dict):
        raise CheckpointError(f"{checkpoint.path}: damaged: its options are a {type(options).__name__}")
    configuration, options = _with_parts(training.get("configuration")), _with_parts(options)
    if str(configuration.get("dtype")).startswith("torch."):  # the option of this name overrides it: it may say tf32
        configuration = configuration | {"dtype": configuration["dtype"].removeprefix("torch.")}
    names = allowed_of(Recipe)
    recipe = {key: value for key, value in (configuration | options).items() if key in names}
    renewed = training | {
        "recipe": {"channels": checkpoint.channels} | recipe,
        "options": {key: value for key, value in options.items() if key not in names},
    }
    if isinstance(training.get("configuration"), dict):
        renewed["configuration"] = {key: value for key, value in configuration.items() if key not in names}
    return renewed


def training_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The training state of ``checkpoint``, with the keys of the current version.

    Raises:
        CheckpointError: the checkpoint holds weights only, or no version of this package wrote its training state.
    """
    if checkpoint.training is None:
        raise CheckpointError(f"{checkpoint.path}: holds weights but not the state of a training run: it cannot be resumed")
    return checkpoint.training if "recipe" in checkpoint.training else _renewed(checkpoint, checkpoint.training)


def from_file(kind: type[T], values: object, source: Path | None) -> T:
    """Build ``kind``, a dataclass of :func:`.recipe.field` fields, from ``values`` of the file ``source`` and its defaults.

    Raises:
        CheckpointError: ``values`` is no dict, has an unknown field, or has a value that the field does not accept.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{source}: damaged: its options are a {type(values).__name__}")
    if unknown := [name for name in values if name not in allowed_of(kind)]:
        raise CheckpointError(f"{source}: made by another version of this program: unknown option {unknown[0]}")
    try:
        return kind(**values)
    except ValueError as error:
        raise CheckpointError(f"{source}: damaged: {error}") from error


def frozen_of(checkpoint: Checkpoint) -> list[str] | None:
    """Names of the frozen layers of the run of ``checkpoint``; None, in an older file: all that its recipe freezes.

    Raises:
        CheckpointError: the checkpoint holds weights only, or something else than names.
    """
    configuration = training_state(checkpoint).get("configuration")
    names = configuration.get(FROZEN) if isinstance(configuration, dict) else None
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{checkpoint.path}: damaged: {FROZEN!r} does not hold names")
    return names


def check_configuration(checkpoint: Checkpoint, recipe: Recipe, here: Mapping[str, object]) -> dict[str, Any]:
    """Check that ``checkpoint`` was trained by ``recipe`` in the configuration ``here``; return its :func:`training_state`.

    Raises:
        CheckpointError: the checkpoint holds weights only, or a setting differs that may not change.
    """
    state = training_state(checkpoint)
    if not isinstance(there := state.get("configuration"), dict):
        raise CheckpointError(f"{checkpoint.path}: damaged: 'configuration' is missing or not a dict")
    trained_by = from_file(Recipe, state["recipe"], checkpoint.path)
    kept = [name for name, allowed in allowed_of(Recipe).items() if not allowed.may_change]
    differing = [(name, getattr(trained_by, name), getattr(recipe, name)) for name in kept]
    differing += [(key, there.get(key), value) for key, value in here.items() if key != FROZEN or key in there]
    for name, value, ours in differing:
        if value != ours:
            raise CheckpointError(f"{checkpoint.path}: was trained with {name} {value}, this run has {ours}")
    return state


def position(checkpoint: Checkpoint) -> tuple[int, bool, int]:
    """Sort key of a run's progress: (completed epochs, whether the next is trained but not evaluated, its steps)."""
    state = training_state(checkpoint)
    trainer = state.get("trainer")
    steps = trainer.get("steps") if isinstance(trainer, dict) and trainer.get("order") is not None else 0
    return len(checkpoint.metrics), state.get("trained") is not None, steps if isinstance(steps, int) else 0
