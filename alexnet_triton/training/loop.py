"""A run: epochs, their evaluation, and the files that it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.augment import NOTHING, Augment
from ..data.dataset import Split
from ..data.fashion_mnist import CLASSES
from ..models import IMAGE_SIZE
from .checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    CheckpointError,
    check_configuration,
    check_weights,
    copy_checkpoint,
    save_checkpoint,
)
from .distributed import ALONE, Processes
from .evaluation import evaluate
from .files import WriteError, write_atomically
from .metrics import METRICS, EpochMetrics, as_line, check_number, history_of, learning_rates, metrics_file
from .run_folder import holds_run
from .signals import Stop, Stopped
from .trainer import Progress, Trainer


def _checksum(split: Split) -> int:
    """CRC-32 of images and labels: a run goes on with the data that it began with."""
    checksum = 0
    for images in split.images.split(4096):  # a set may fill the device, and the host need not have room for another
        checksum = zlib.crc32(images.cpu().numpy().tobytes(), checksum)
    return zlib.crc32(split.labels.cpu().numpy().tobytes(), checksum)


def _trained(loss: object, accuracy: object, seconds: object) -> tuple[Any, Any, Any]:
    """What :meth:`Trainer.epoch` returned, from a file: numbers."""
    for name, value in {"loss": loss, "accuracy": accuracy, "seconds": seconds}.items():
        check_number(name, value)
    return loss, accuracy, seconds


@contextlib.contextmanager
def _advice(epoch: int, out: Path, dtype: torch.dtype, restart: str) -> Iterator[None]:
    """Add to a FloatingPointError of the block where it happened, what is left, and what to try."""
    try:
        yield
    except FloatingPointError as error:
        last = out / LAST
        good = f"the last good checkpoint is {last}: resume it" if last.exists() else f"there is no checkpoint yet: {restart}"
        other = ", or --dtype float32, whose range is wider" if dtype == torch.float16 else ""
        raise FloatingPointError(f"epoch {epoch}: {error}; {good} with a smaller --lr{other}") from error


def train(
    net: nn.Module,
    train_split: Split,
    test_split: Split,
    *,
    model: str,
    classes: Sequence[str] = CLASSES,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    out: Path,
    graph: bool = False,
    augment: Augment = NOTHING,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    resume: Checkpoint | None = None,
    options: Mapping[str, Any] | None = None,
    stop: Stop | None = None,
    processes: Processes = ALONE,
    restart: str = "start again",
    on_compile: Callable[[str], object] | None = None,
    on_ready: Callable[[], None] | None = None,
    on_batch: Callable[[int], Progress] | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
) -> list[EpochMetrics]:
    """Train ``net`` and write into ``out``, after each epoch: a line of ``metrics.jsonl``, ``checkpoint.pt``, ``best.pt``.

    ``best.pt`` is the checkpoint of the first epoch with the highest test accuracy.

    A resumed run computes the same bits as one that was never stopped, wherever in an epoch that was: on the same device,
    versions and ``graph``, and while ``lr`` and ``weight_decay`` stay what they were.

    Args:
        net: a model of :func:`new_model`.
        model: its name.
        classes: what it tells apart, in the order of the labels.
        graph: run each step as a CUDA graph.
        augment: what to change in each training image at random.
        momentum, weight_decay: as in :class:`alexnet_triton.optim.SGD`.
        resume: go on from there, up to ``epochs`` in all. ``metrics.jsonl`` becomes its epochs, and goes on.
        options: kept in the checkpoint for whoever resumes it; numbers, strings, None.
        stop: asked before each step and each batch of the evaluation.
        processes: that train together, each by this call, on equal shares of each batch: ``batch_size`` is that of all. The one
            that leads writes. Each draws its own dropout and augmentation.
        restart: what to do with a smaller learning rate where the loss is not finite and there is no checkpoint yet.
        on_compile: given lines about compilation, where something is compiled.
        on_ready: called once, when everything is compiled and captured and the first epoch begins.
        on_batch: given the epoch, makes the epoch's progress callback.
        on_epoch: called after each epoch.

    Returns:
        The metrics of all epochs, those before ``resume`` too.

    Raises:
        CheckpointError: ``out`` holds a run that is not resumed, ``resume`` is of another configuration, or a file cannot be
            written.
        FloatingPointError: a loss or a weight is not finite; nothing is saved of that epoch. The message names the step, the
            last good checkpoint and what to try.
        Stopped: ``stop`` said so; all is saved.
    """
    if resume is None and processes.leads and holds_run(out):
        raise CheckpointError(f"{out}: already holds a run")
    # What decides the bits, apart from what may be changed on purpose.
    configuration = {
        "model": model,
        "dtype": str(next(net.parameters()).dtype),
        "device": device.type,
        "batch_size": batch_size,
        "momentum": momentum,
        "seed": seed,
        **dataclasses.asdict(augment),
        "processes": processes.size,
        "training images": len(train_split),
        "data checksum": _checksum(train_split),
    }
    history: list[EpochMetrics] = []
    #: The learning rate of each epoch in it, which may change where a run is resumed.
    rates: list[float] = []
    if resume is not None:
        check_weights(net, resume)
        state = check_configuration(resume, configuration)
        history = history_of(resume)
        rates = learning_rates(resume, lr)
    if not processes.leads:
        torch.manual_seed(seed + processes.rank)  # masks of its own
    generator = torch.Generator(device).manual_seed(seed)  # the same order of images in all
    image_size = IMAGE_SIZE[model]
    test_split = test_split.to(device)  # once, not at each evaluation
    trainer = Trainer(
        net,
        train_split,
        batch_size=batch_size,
        image_size=image_size,
        lr=lr,
        device=device,
        graph=graph,
        augment=augment,
        momentum=momentum,
        weight_decay=weight_decay,
        processes=processes,
        evaluated=test_split,
        tell=on_compile,
    )
    #: Loss, accuracy and seconds of an epoch that is trained and not evaluated.
    trained: tuple[float, float, float] | None = None
    if resume is not None:
        try:
            trainer.load_state_dict(resume.weights, state["trainer"])
            generator.set_state(state["generator"])
            if state["trained"] is not None:
                trained = _trained(*state["trained"])
        # What a tensor of another kind makes PyTorch raise is not documented: all of it means the same here.
        except Exception as error:
            raise CheckpointError(f"{resume.path}: damaged: its training state does not load: {error!r}") from error
        if processes.leads:
            try:
                write_atomically(out / METRICS, metrics_file(history))
            except WriteError as error:
                raise CheckpointError(str(error)) from error
            if resume.path == out / BEST and not (out / LAST).exists():  # a crash came between the two
                copy_checkpoint(out / BEST, out / LAST)
    if stop is not None and processes.size > 1:
        asked = stop

        def stop() -> bool:  # all of them, at the same step
            return processes.any(asked())

    def save(path: Path) -> None:
        state = {
            "configuration": configuration,
            "options": dict(options or {}),
            "trainer": trainer.state_dict(),
            "generator": generator.get_state(),
            "trained": trained,
            "learning_rates": rates,
        }
        metrics = [dataclasses.asdict(m) for m in history]
        if processes.leads:
            content = Checkpoint(model, list(classes), metrics, trainer.float32_weights(), state)
            save_checkpoint(path, dataclasses.replace(content, channels=train_split.channels, size=train_split.size))

    if on_ready is not None:
        on_ready()
    for epoch in range(len(history) + 1, epochs + 1):
        try:
            if trained is None:
                with _advice(epoch, out, trainer.dtype, restart):
                    trained = trainer.epoch(generator, on_batch(epoch) if on_batch is not None else None, stop)
            _, test_acc = evaluate(
                net, test_split, batch_size=batch_size, image_size=image_size, device=device, stop=stop, processes=processes
            )
        except Stopped as stopped:
            with _advice(epoch, out, trainer.dtype, restart):
                trainer.check_finite()
            save(out / LAST)
            processes.wait()  # torchrun ends all when the first has gone
            raise Stopped(f"in epoch {epoch} {stopped}") from None
        loss, train_acc, seconds = trained
        metrics = EpochMetrics(epoch, loss, train_acc, test_acc, len(train_split) / seconds, seconds)
        best = all(test_acc > earlier.test_acc for earlier in history)
        history.append(metrics)
        rates.append(lr)
        trained = None
        # The best one first: a crash before the other repeats the epoch, and both are written again.
        save(out / (BEST if best else LAST))
        if processes.leads:
            if best:
                copy_checkpoint(out / BEST, out / LAST)
            with (out / METRICS).open("a") as file:
                file.write(as_line(metrics))
        if on_epoch is not None:
            on_epoch(metrics)
    return history
