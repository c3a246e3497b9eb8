"""A training run: the loop over epochs, the evaluation after each, and the files written."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.dataset import DataError, Dataset
from ..data.stream import AnySplit, StreamedSplit
from .checkpoint import (
    BEST,
    FROZEN,
    LAST,
    Checkpoint,
    CheckpointError,
    check_configuration,
    check_weights,
    copy_checkpoint,
    frozen_of,
    save_checkpoint,
)
from .evaluation import evaluate
from .files import WriteError, write_atomically
from .listener import SILENT, Listener
from .metrics import METRICS, EpochMetrics, check_number, history_of, is_finished, metrics_file
from .networks import features, frozen_layers
from .recipe import Recipe, Where
from .run_folder import SKIPPED, holds_run, list_skipped
from .signals import SaveAsked, Stopped
from .trainer import Trainer


def train(
    net: nn.Module,
    data: Dataset,
    recipe: Recipe,
    where: Where,
    folder: Path,
    listener: Listener = SILENT,
    resume: Checkpoint | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> list[EpochMetrics]:
    """Train ``net`` by ``recipe``, writing ``metrics.jsonl``, ``checkpoint.pt`` and ``best.pt`` into ``folder``.

    All three are written at the end of an epoch. ``best.pt`` is the checkpoint of the first epoch with the highest test
    accuracy.

    A resumed run is bit-identical to an uninterrupted one, wherever in an epoch the stop came. This holds for the same device,
    versions, ``where.graph`` and ``recipe``. Only its ``data`` (the path) may differ, and ``epochs`` where the schedule is
    constant.

    Args:
        net: a model of :func:`.networks.new_model`, on the device of ``where``, in the dtype of ``recipe``, with the layers
            frozen that ``recipe`` freezes (:func:`.networks.freeze`).
        data: training and test images, and the class names in the order of the labels.
        recipe: the training settings. ``data``, ``limit``, ``validation`` and ``init`` are only recorded: the arguments
            ``data`` and ``net`` already result from them.
        where: the device and the processes. Processes that train together each make this call. Each trains on an equal share
            of every batch and draws its own dropout and augmentation. The leader writes the files.
        folder: an existing folder.
        listener: receives the events of the run, and is asked whether to stop.
        resume: the checkpoint to resume from, up to ``recipe.epochs`` in all. ``recipe.early_stop`` counts its epochs too.
            ``metrics.jsonl`` is rewritten with the checkpoint's epochs and then extended.
        weights: float32 values by name for parameters that ``net`` holds rounded. A resumed run takes the checkpoint's.

    Returns:
        The metrics of all epochs, including those before ``resume``.

    Raises:
        ValueError: ``net`` has another dtype or other frozen layers than ``recipe`` says, only one of ``data`` and ``recipe``
            is normalized, or patches are to be cut from images that are not of :attr:`.recipe.Recipe.image_side`.
        CheckpointError: ``folder`` holds a run and ``resume`` is None, ``resume`` has another configuration, or a file cannot
            be written.
        DataError: a streamed image cannot be read, or a worker process has died. A single-process run is saved first.
        FloatingPointError: a loss or a weight is not finite. No checkpoint of that state is written. The message names the
            step, the last good checkpoint and what to try.
        Stopped: ``listener`` asked to stop; the run has been saved.
    """
    if resume is None and where.processes.leads and holds_run(folder):
        raise CheckpointError(f"{folder}: already holds a run")
    if (dtype := next(net.parameters()).dtype) != recipe.torch_dtype:
        raise ValueError(f"net has dtype {dtype}, but the recipe says {recipe.dtype}")
    if any((split.normalization is not None) != recipe.normalize for split in (data.train, data.test)):
        raise ValueError(f"data is {'not ' * recipe.normalize}normalized, but the recipe says normalize={recipe.normalize}")
    recipe.check_side(data.train.size)
    # Layers that ``init`` did not have are new and not frozen. Only the checkpoint of a resumed run says which layers they are.
    all_or_none = recipe.init is None or recipe.freeze == "none" or (resume is not None and frozen_of(resume) is None)
    if all_or_none and frozen_layers(net) != (list(features(net)) if recipe.freeze == "features" else []):
        raise ValueError(f"the frozen layers of net are not those of freeze={recipe.freeze!r}")
    run = _Run(net, data, recipe, where, folder, listener, resume)
    if resume is None and weights is not None:
        run.trainer.set_weights(weights)
    listener.ready()
    while not is_finished(run.history, recipe.epochs, recipe.early_stop):
        run.epoch(len(run.history) + 1)
    return run.history


class _Run:
    """The state of a run between two steps, with methods to train an epoch, save it and load it.

    The arguments are those of :func:`train`.
    """

    def __init__(
        self,
        net: nn.Module,
        data: Dataset,
        recipe: Recipe,
        where: Where,
        folder: Path,
        listener: Listener,
        resume: Checkpoint | None,
    ) -> None:
        self.net, self.recipe, self.where, self.folder, self.listener = net, recipe, where, folder, listener
        #: What the results depend on besides the recipe. A resumed run must have the same.
        self.configuration: dict[str, object] = {
            "device": where.device.type,
            "processes": where.processes.size,
            "training images": len(data.train),
            "data checksum": _checksum(data.train),
        }
        if recipe.freeze != "none":
            self.configuration[FROZEN] = frozen_layers(net)
        #: How many unreadable streamed images the listener was last told about.
        self.skipped = 0
        self.history: list[EpochMetrics] = []
        #: Loss, accuracy and seconds of an epoch that is trained but not yet evaluated; else None.
        self.trained: tuple[float, float, float] | None = None
        state: dict[str, Any] = {}
        if resume is not None:
            check_weights(net, resume)
            state = check_configuration(resume, recipe, self.configuration)
            self.history = history_of(resume)
        if not where.processes.leads:
            torch.manual_seed(recipe.seed + where.processes.rank)  # each process draws its own dropout masks
        self.generator = torch.Generator(where.device).manual_seed(recipe.seed)  # the same image order in all processes
        # Copy the test images to the device once, not at each evaluation.
        self.data = dataclasses.replace(data, test=data.test.to(where.device))
        self.trainer = Trainer(net, data.train, recipe, where, evaluated=self.data.test, listener=listener)
        if resume is not None:
            self._load(resume, state)

    def _load(self, resume: Checkpoint, state: dict[str, Any]) -> None:
        """Restore the run from the checkpoint ``resume``, whose training state is ``state``."""
        try:
            self.trainer.load_state_dict(resume.weights, state["trainer"])
            self.generator.set_state(state["generator"])
            if state["trained"] is not None:
                self.trained = _trained(*state["trained"])
        # PyTorch does not document what it raises for a wrong kind of tensor. Any exception means a damaged file here.
        except Exception as error:
            raise CheckpointError(f"{resume.path}: damaged: its training state does not load: {error!r}") from error
        if self.where.processes.leads:
            try:
                write_atomically(self.folder / METRICS, metrics_file(m.as_dict() for m in self.history))
            except WriteError as error:
                raise CheckpointError(str(error)) from error
            best, last = self.folder / BEST, self.folder / LAST
            if resume.path == best and not last.exists():  # the process died between writing the two
                copy_checkpoint(best, last)

    def _save(self, path: Path) -> None:
        """Write a checkpoint to ``path``. All processes call this; the leader writes."""
        state = {
            "recipe": dataclasses.asdict(self.recipe),
            "configuration": self.configuration,
            "options": dict(self.where.options),
            "trainer": self.trainer.state_dict(),
            "generator": self.generator.get_state(),
            "trained": self.trained,
        }
        self._list_skipped()
        if not self.where.processes.leads:
            return
        metrics = [m.as_dict() for m in self.history]
        weights, images = self.trainer.float32_weights(), self.data.train
        seen: dict[str, Any] = {"channels": images.channels, "size": images.size, "normalization": images.normalization}
        content = Checkpoint(self.recipe.model, list(self.data.classes), metrics, weights, state)
        save_checkpoint(path, dataclasses.replace(content, **seen))

    def _list_skipped(self) -> None:
        """Add unreadable streamed images to the run's file :data:`.run_folder.SKIPPED`. All processes call this."""
        streams = [split for split in (self.data.train, self.data.test) if isinstance(split, StreamedSplit)]
        if not any(split.skip_damaged for split in streams):
            return
        own = {str(path): reason for split in streams for path, reason in split.skipped.items()}
        found = {path: reason for each in self.where.processes.gather(own) for path, reason in each.items()}
        if len(found) > self.skipped:  # only in the leader, which gathers
            list_skipped(self.folder, found, more=True)
            first, reason = next(iter(found.items()))
            rest = f" and {len(found) - 1} more" if len(found) > 1 else ""
            self.listener.saved(f"images that cannot be read: {first}: {reason}{rest}; {self.folder / SKIPPED} lists them")
            self.skipped = len(found)

    def epoch(self, epoch: int) -> None:
        """Train ``epoch``, or the rest of it, evaluate the network and save the run.

        Raises:
            DataError, FloatingPointError, Stopped: as :func:`train`.
        """
        try:
            if self.trained is None:
                self.listener.epoch_begins(epoch)
            while self.trained is None:
                self._train(epoch)
            tested = evaluate(
                self.net,
                self.data.test,
                batch_size=self.recipe.batch_size,
                image_size=self.recipe.image_size,
                device=self.where.device,
                stop=self.listener.stop,
                processes=self.where.processes,
            )
        except Stopped as stopped:
            with self._advice(epoch):
                self.trainer.check_finite()
            self._save(self.folder / LAST)
            self.where.processes.wait()  # torchrun ends all processes as soon as the first one exits
            raise Stopped(f"in epoch {epoch} {stopped}") from None
        except DataError as error:
            if self.trained is None:
                raise
            raise self._saved_all_the_same(error, epoch) from error
        loss, train_acc, seconds = self.trained
        speed, lr = len(self.data.train) / seconds, self.trainer.learning_rate(epoch)
        self._keep(EpochMetrics(epoch, loss, train_acc, tested.accuracy, speed, seconds, tested.loss, lr, tested.top5))

    def _train(self, epoch: int) -> None:
        """Train ``epoch`` to its end, or until a checkpoint is requested, and then write that checkpoint."""
        try:
            with self._advice(epoch):
                self.trained = self.trainer.epoch(self.generator, epoch)
        except SaveAsked as asked:
            with self._advice(epoch):
                self.trainer.check_finite()
            self._save(self.folder / LAST)
            self.listener.saved(f"saved in epoch {epoch} {asked}: {self.folder / LAST}")
        except DataError as error:
            raise self._saved_all_the_same(error, epoch) from error

    def _saved_all_the_same(self, error: DataError, epoch: int) -> DataError:
        """The error to raise in place of ``error``. A single process first saves the steps done so far."""
        if self.where.processes.size > 1:
            return error
        with self._advice(epoch):
            self.trainer.check_finite()
        self._save(self.folder / LAST)
        return DataError(f"{error}; the steps of epoch {epoch} so far are saved: resume with --resume {self.folder}")

    def _keep(self, metrics: EpochMetrics) -> None:
        """Record a finished epoch: append ``metrics`` to the history and write checkpoints and ``metrics.jsonl``."""
        best = all(metrics.test_acc > earlier.test_acc for earlier in self.history)
        self.history.append(metrics)
        self.trained = None
        # Write best.pt first: a crash before the second write repeats the epoch, and both files are written again.
        self._save(self.folder / (BEST if best else LAST))
        if self.where.processes.leads:
            if best:
                copy_checkpoint(self.folder / BEST, self.folder / LAST)
            with (self.folder / METRICS).open("ab") as file:
                file.write(metrics_file([metrics.as_dict()]))
        self.listener.epoch_ends(metrics)

    @contextlib.contextmanager
    def _advice(self, epoch: int) -> Iterator[None]:
        """Extend the message of a FloatingPointError in the block: the epoch, the last good checkpoint and what to try."""
        try:
            yield
        except FloatingPointError as error:
            last = self.folder / LAST
            good = (
                f"the last good checkpoint is {last}: resume it"
                if last.exists()
                else f"there is no checkpoint yet: {self.listener.restart}"
            )
            other = ", or --dtype float32, whose range is wider" if self.trainer.dtype == torch.float16 else ""
            raise FloatingPointError(f"epoch {epoch}: {error}; {good} with a smaller --lr{other}") from error


def _checksum(split: AnySplit) -> int:
    """CRC-32 of images and labels, or of a streamed source's names and labels. A run resumes only on the data it began with."""
    if isinstance(split, StreamedSplit):
        return split.source.checksum()
    checksum = 0
    for images in split.images.split(4096):  # the images may fill the device, and the host may lack memory for a full copy
        checksum = zlib.crc32(images.cpu().numpy().tobytes(), checksum)
    return zlib.crc32(split.labels.cpu().numpy().tobytes(), checksum)


def _trained(loss: object, accuracy: object, seconds: object) -> tuple[Any, Any, Any]:
    """The values that :meth:`Trainer.epoch` returned, as read from a checkpoint, checked to be numbers."""
    for name, value in {"loss": loss, "accuracy": accuracy, "seconds": seconds}.items():
        check_number(name, value)
    return loss, accuracy, seconds
