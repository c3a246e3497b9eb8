"""A run: its epochs, their evaluation, and the files that it writes."""

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
    """Train ``net`` and write into ``folder``, after each epoch: a line of ``metrics.jsonl``, ``checkpoint.pt``, ``best.pt``.

    ``best.pt`` is the checkpoint of the first epoch with the highest test accuracy.

    A resumed run computes the same bits as one that was never stopped, wherever in an epoch that was: on the same device,
    versions and ``where.graph``, and while ``recipe`` stays what it was, but for ``epochs`` and ``data``.

    Args:
        net: a model of :func:`.networks.new_model`, on the device of ``where``, in the dtype of ``recipe`` and with what that
            freezes frozen (:func:`.networks.freeze`).
        data: the images, their classes in the order of the labels.
        recipe: what decides the numbers. Its ``data``, ``limit``, ``validation`` and ``init`` are kept, not read: ``data`` and
            ``net`` are what comes of them.
        where: processes that train together do so each by this call, on equal shares of each batch. The one that leads writes.
            Each draws its own dropout and augmentation.
        folder: which is there.
        listener: told what happens, and asked to stop.
        resume: go on from there, up to ``recipe.epochs`` in all; ``recipe.early_stop`` counts those before too.
            ``metrics.jsonl`` becomes its epochs, and goes on.
        weights: float32 values, by their names, of parameters that ``net`` has rounded; a resumed run has its own.

    Returns:
        The metrics of all epochs, those before ``resume`` too.

    Raises:
        ValueError: ``net`` is of another dtype than ``recipe``'s, other layers of it are frozen, one of ``data`` and
            ``recipe`` is normalized, or the images are not of :attr:`.recipe.Recipe.image_side` where patches are cut.
        CheckpointError: ``folder`` holds a run that is not resumed, ``resume`` is of another configuration, or a file cannot be
            written.
        DataError: an image of a stream cannot be read, or nothing reads them any more; of one process all is saved.
        FloatingPointError: a loss or a weight is not finite; nothing is saved of that epoch. The message names the step, the
            last good checkpoint and what to try.
        Stopped: ``listener`` said so; all is saved.
    """
    if resume is None and where.processes.leads and holds_run(folder):
        raise CheckpointError(f"{folder}: already holds a run")
    if (dtype := next(net.parameters()).dtype) != recipe.torch_dtype:
        raise ValueError(f"net is of {dtype}, which {recipe.dtype} is not")
    if any((split.normalization is not None) != recipe.normalize for split in (data.train, data.test)):
        raise ValueError(f"data is {'not ' * recipe.normalize}normalized, of which the recipe says {recipe.normalize}")
    recipe.check_side(data.train.size)
    # After an init some may be new, and not frozen: the checkpoint of a run that is resumed says which.
    all_or_none = recipe.init is None or recipe.freeze == "none" or (resume is not None and frozen_of(resume) is None)
    if all_or_none and frozen_layers(net) != (list(features(net)) if recipe.freeze == "features" else []):
        raise ValueError(f"net is not frozen as {recipe.freeze} says")
    run = _Run(net, data, recipe, where, folder, listener, resume)
    if resume is None and weights is not None:
        run.trainer.set_weights(weights)
    listener.ready()
    while not is_finished(run.history, recipe.epochs, recipe.early_stop):
        run.epoch(len(run.history) + 1)
    return run.history


class _Run:
    """A run between two steps: what of it a checkpoint keeps, and how.

    The arguments are :func:`train`'s.
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
        #: What decides the bits besides the recipe.
        self.configuration: dict[str, object] = {
            "device": where.device.type,
            "processes": where.processes.size,
            "training images": len(data.train),
            "data checksum": _checksum(data.train),
        }
        if recipe.freeze != "none":
            self.configuration[FROZEN] = frozen_layers(net)
        #: How many streamed images could not be read when it was last said.
        self.skipped = 0
        self.history: list[EpochMetrics] = []
        #: Loss, accuracy and seconds of an epoch that is trained and not evaluated.
        self.trained: tuple[float, float, float] | None = None
        state: dict[str, Any] = {}
        if resume is not None:
            check_weights(net, resume)
            state = check_configuration(resume, recipe, self.configuration)
            self.history = history_of(resume)
        if not where.processes.leads:
            torch.manual_seed(recipe.seed + where.processes.rank)  # masks of its own
        self.generator = torch.Generator(where.device).manual_seed(recipe.seed)  # the same order of images in all
        # The test images once, not at each evaluation.
        self.data = dataclasses.replace(data, test=data.test.to(where.device))
        self.trainer = Trainer(net, data.train, recipe, where, evaluated=self.data.test, listener=listener)
        if resume is not None:
            self._load(resume, state)

    def _load(self, resume: Checkpoint, state: dict[str, Any]) -> None:
        """Become the run of ``resume``, whose training state is ``state``."""
        try:
            self.trainer.load_state_dict(resume.weights, state["trainer"])
            self.generator.set_state(state["generator"])
            if state["trained"] is not None:
                self.trained = _trained(*state["trained"])
        # What a tensor of another kind makes PyTorch raise is not documented: all of it means the same here.
        except Exception as error:
            raise CheckpointError(f"{resume.path}: damaged: its training state does not load: {error!r}") from error
        if self.where.processes.leads:
            try:
                write_atomically(self.folder / METRICS, metrics_file(m.as_dict() for m in self.history))
            except WriteError as error:
                raise CheckpointError(str(error)) from error
            best, last = self.folder / BEST, self.folder / LAST
            if resume.path == best and not last.exists():  # a crash came between the two
                copy_checkpoint(best, last)

    def _save(self, path: Path) -> None:
        """Write a checkpoint; called by all processes, of which one writes."""
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
        """Add to the run's list the streamed images that could not be read so far; called by all processes."""
        streams = [split for split in (self.data.train, self.data.test) if isinstance(split, StreamedSplit)]
        if not any(split.skip_damaged for split in streams):
            return
        own = {str(path): reason for split in streams for path, reason in split.skipped.items()}
        found = {path: reason for each in self.where.processes.gather(own) for path, reason in each.items()}
        if len(found) > self.skipped:  # in the process that leads
            list_skipped(self.folder, found, more=True)
            first, reason = next(iter(found.items()))
            rest = f" and {len(found) - 1} more" if len(found) > 1 else ""
            self.listener.saved(f"images that cannot be read: {first}: {reason}{rest}; {self.folder / SKIPPED} lists them")
            self.skipped = len(found)

    def epoch(self, epoch: int) -> None:
        """Train the epoch, or what is left of it, evaluate and save it.

        Raises:
            FloatingPointError, Stopped: as :func:`train`.
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
            self.where.processes.wait()  # torchrun ends all when the first has gone
            raise Stopped(f"in epoch {epoch} {stopped}") from None
        except DataError as error:
            if self.trained is None:
                raise
            raise self._saved_all_the_same(error, epoch) from error
        loss, train_acc, seconds = self.trained
        speed, lr = len(self.data.train) / seconds, self.trainer.learning_rate(epoch)
        self._keep(EpochMetrics(epoch, loss, train_acc, tested.accuracy, speed, seconds, tested.loss, lr, tested.top5))

    def _train(self, epoch: int) -> None:
        """Train the epoch to its end, or to where a checkpoint is asked for, and save that."""
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
        """What to raise for ``error``. The steps so far are saved, if this process is the only one."""
        if self.where.processes.size > 1:
            return error
        with self._advice(epoch):
            self.trainer.check_finite()
        self._save(self.folder / LAST)
        return DataError(f"{error}; what epoch {epoch} came to is saved: --resume {self.folder} goes on with it")

    def _keep(self, metrics: EpochMetrics) -> None:
        """Write the files of an epoch."""
        best = all(metrics.test_acc > earlier.test_acc for earlier in self.history)
        self.history.append(metrics)
        self.trained = None
        # The best one first: a crash before the other repeats the epoch, and both are written again.
        self._save(self.folder / (BEST if best else LAST))
        if self.where.processes.leads:
            if best:
                copy_checkpoint(self.folder / BEST, self.folder / LAST)
            with (self.folder / METRICS).open("ab") as file:
                file.write(metrics_file([metrics.as_dict()]))
        self.listener.epoch_ends(metrics)

    @contextlib.contextmanager
    def _advice(self, epoch: int) -> Iterator[None]:
        """Add to a FloatingPointError of the block where it happened, what is left, and what to try."""
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
    """CRC-32 of images and labels, of streamed images that of their names: a run goes on with the data that it began with."""
    if isinstance(split, StreamedSplit):
        return split.source.checksum()
    checksum = 0
    for images in split.images.split(4096):  # a set may fill the device, and the host need not have room for another
        checksum = zlib.crc32(images.cpu().numpy().tobytes(), checksum)
    return zlib.crc32(split.labels.cpu().numpy().tobytes(), checksum)


def _trained(loss: object, accuracy: object, seconds: object) -> tuple[Any, Any, Any]:
    """What :meth:`Trainer.epoch` returned, from a file: numbers."""
    for name, value in {"loss": loss, "accuracy": accuracy, "seconds": seconds}.items():
        check_number(name, value)
    return loss, accuracy, seconds
