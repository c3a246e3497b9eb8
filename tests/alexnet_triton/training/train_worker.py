"""The processes of test_distributed_training run this, alone or together: trainings whose results the leader saves."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from alexnet_triton import FusedSequential
from alexnet_triton.data.augment import NOTHING, Augment
from alexnet_triton.data.fashion_mnist import load_fashion_mnist
from alexnet_triton.training import checkpoint
from alexnet_triton.training import trainer as trainers
from alexnet_triton.training.distributed import Processes, joined
from alexnet_triton.training.listener import SILENT, Listener
from alexnet_triton.training.loop import train
from alexnet_triton.training.recipe import Recipe, Where
from alexnet_triton.training.signals import Stopped
from tests.alexnet_triton.training.listeners import Asked, Watching

CPU = torch.device("cpu")

#: name -> (training images, batch, dtype, momentum). Last batches: 9 (shares of 5 and 4), 1 (one share is empty), 2.
RUNS: dict[str, tuple[int, int, torch.dtype, float]] = {
    "partial": (41, 16, torch.float32, 0.9),
    "empty_share": (33, 16, torch.float32, 0.0),
    "unequal_shares": (20, 3, torch.float32, 0.0),
    "bfloat16": (41, 16, torch.bfloat16, 0.9),
}


def run(
    out: Path,
    processes: Processes,
    name: str = "partial",
    dropout: float = 0.0,
    augment: Augment = NOTHING,
    listener: Listener = SILENT,
    resume: checkpoint.Checkpoint | None = None,
    epochs: int = 2,
) -> Any:
    """A training of ``epochs`` epochs, tested on 21 images, which two processes do not divide evenly either."""
    images, batch_size, dtype, momentum = RUNS[name]
    torch.manual_seed(5)
    net = FusedSequential(nn.Conv2d(1, 8, 5, stride=3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    net += FusedSequential(nn.Linear(128, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 10))
    net.to(dtype=dtype, memory_format=torch.channels_last)
    data = load_fashion_mnist("sample")
    out.mkdir(parents=True, exist_ok=True)
    data = dataclasses.replace(data, train=data.train.limited(images), test=data.test.limited(21))
    fields = {"model": "lenet", "epochs": epochs, "batch_size": batch_size, "lr": 0.1, "seed": 5, "momentum": momentum}
    recipe = Recipe(**fields, **dataclasses.asdict(augment), dtype=str(dtype).removeprefix("torch."))
    return train(net, data, recipe, Where(CPU, processes=processes), out, listener, resume)


def resumed_runs_have_the_same_bits(folder: Path, processes: Processes) -> None:
    """With dropout and augmentation, whose draws differ between processes; only one process is asked to stop."""
    every = {"dropout": 0.5, "augment": Augment(flip=True, crop="resized", colour=True)}
    run(folder / "whole", processes, **every)
    for call in (2, 5):  # in the middle of the first epoch, in its evaluation
        calls = iter(range(1, 100))
        try:
            asked = Asked(lambda c=calls, n=call: next(c) == n and not processes.leads)
            run(folder / str(call), processes, **every, listener=asked)
        except Stopped as stopped:
            where = str(stopped)
        else:
            where = "not stopped"
        assert where.startswith("in epoch 1 "), where
        there = processes.from_leader(lambda n=call: checkpoint.read_checkpoint(folder / str(n) / checkpoint.LAST))
        torch.manual_seed(99)
        run(folder / str(call), processes, **every, resume=there)


def a_checkpoint_that_one_process_is_asked_for_is_saved_by_all(folder: Path, processes: Processes) -> None:
    """All processes save after the same step, in the middle of an epoch, and the run continues."""

    class Saves(Listener):
        asked = 0

        def save(self) -> bool:
            self.asked += 1
            return self.asked == 2 and not processes.leads

        def saved(self, line: str) -> None:
            (folder.parent / f"saved{processes.rank}").write_text(line.split(":")[0])

    run(folder, processes, dropout=0.5, augment=Augment(flip=True, crop="resized", colour=True), listener=Saves())


def progress_is_shown(folder: Path, processes: Processes) -> None:
    """Save what each process's bar would show: images seen and their loss, and how many images the process computed."""
    shown: list[tuple[int, float]] = []
    trainers._PROGRESS_INTERVAL, before = -1.0, trainers._PROGRESS_INTERVAL
    images, batch_size, _, _ = RUNS["unequal_shares"]
    try:
        watching = Watching(lambda seen, loss, _: shown.append((seen, loss)))
        history = run(folder, processes, "unequal_shares", listener=watching, epochs=1)
    finally:
        trainers._PROGRESS_INTERVAL = before
    own = sum(len(processes.share(index)) for index in torch.arange(images).split(batch_size))
    content = {"shown": shown, "own": own, "loss": history[0].loss}
    (folder.parent / f"progress{processes.rank}.json").write_text(json.dumps(content))


def a_loss_of_one_process_that_is_not_finite_stops_all(folder: Path, processes: Processes) -> str:
    """In the second step, the loss of every process but the leader is infinite."""
    steps = 0
    real = trainers.add_cross_entropy

    def broken(logits: Tensor, labels: Tensor, loss_sum: Tensor, *others: Any, **weighted: Any) -> Tensor | None:
        nonlocal steps
        steps += 1
        gradient = real(logits, labels, loss_sum, *others, **weighted)
        if steps == 2 and not processes.leads:
            loss_sum *= torch.inf
        return gradient

    trainers.add_cross_entropy = broken
    try:
        run(folder, processes)
    except FloatingPointError as error:
        return str(error)
    finally:
        trainers.add_cross_entropy = real
    raise AssertionError("not noticed")


def main(folder: Path, few: bool) -> None:
    """All scenarios, or a few. PyTorch's operations compute, since a step in Triton's interpreter would take seconds."""
    torch.set_num_threads(1)
    with joined() as processes, kernels.use_backend("torch"):
        for name in RUNS if not few else ["partial"]:
            run(folder / name, processes, name)
        resumed_runs_have_the_same_bits(folder, processes)
        if not few:
            progress_is_shown(folder / "progress", processes)
            a_checkpoint_that_one_process_is_asked_for_is_saved_by_all(folder / "asked", processes)
            message = a_loss_of_one_process_that_is_not_finite_stops_all(folder / "broken", processes)
            (folder / f"message{processes.rank}").write_text(message)


if __name__ == "__main__":
    main(Path(sys.argv[1]), few="four" in sys.argv)
