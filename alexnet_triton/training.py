"""Training and evaluation: d2l's recipe (Xavier-uniform weights, plain SGD, cross-entropy)."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import kernels

from .data import CLASSES, Split, batches, to_input
from .fused import fuse
from .models import IMAGE_SIZE, AlexNet, init_xavier_uniform, reference_lenet

#: d2l's learning rates.
LEARNING_RATE = {"alexnet": 0.01, "lenet": 0.9}

CHECKPOINT_FORMAT = "alexnet-triton checkpoint 1"


class CheckpointError(ValueError):
    """A file that is no checkpoint of this program; the message names it."""


@dataclasses.dataclass(frozen=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``.

    Attributes:
        epoch: from 1.
        loss: mean cross-entropy over the epoch's training images, as they were seen, in nats.
        train_acc, test_acc: fraction of images classified right; the former as they were seen, with dropout.
        images_per_s: training images a second, evaluation not counted.
        seconds: of training.
    """

    epoch: int
    loss: float
    train_acc: float
    test_acc: float
    images_per_s: float
    seconds: float


#: ``(images seen, mean loss so far, images a second so far) -> None``, called after each batch.
Progress = Callable[[int, float, float], None]


def build_model(model: str) -> nn.Module:
    """``"alexnet"`` or ``"lenet"``, fused, for one-channel images of ten classes."""
    return AlexNet() if model == "alexnet" else fuse(reference_lenet())


def new_model(model: str, seed: int, device: torch.device) -> nn.Module:
    """A model with Xavier-uniform weights drawn from ``seed``, channels-last in memory, on ``device``."""
    torch.manual_seed(seed)
    net = build_model(model)
    net.apply(init_xavier_uniform)
    return net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    *,
    batch_size: int,
    image_size: int,
    device: torch.device,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> tuple[float, float, float]:
    """One pass over ``split`` in an order drawn from ``generator``; mean loss, accuracy, seconds.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    net.train()
    # Sums stay on the device: reading one would make the host wait for the step.
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    seen = 0
    start = time.perf_counter()
    for inputs, labels in batches(split, batch_size, image_size, device, generator):
        optimizer.zero_grad(set_to_none=True)
        logits = net(inputs)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach() * len(labels)
        correct += (logits.detach().argmax(1) == labels).sum()
        seen += len(labels)
        if progress is not None:
            progress(seen, loss_sum.item() / seen, seen / (time.perf_counter() - start))
    _synchronize(device)
    seconds = time.perf_counter() - start
    if not torch.isfinite(loss_sum):
        raise FloatingPointError("the training loss is not finite any more: try a smaller --lr")
    return loss_sum.item() / seen, correct.item() / seen, seconds


@torch.no_grad()
def evaluate(net: nn.Module, split: Split, *, batch_size: int, image_size: int, device: torch.device) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on ``split``, in eval mode."""
    net.eval()
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    for inputs, labels in batches(split, batch_size, image_size, device):
        logits = net(inputs)
        loss_sum += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return loss_sum.item() / len(split), correct.item() / len(split)


def measure_speed(net: nn.Module, split: Split, batch_size: int, image_size: int, device: torch.device) -> float:
    """Images a second of a forward and backward pass, timed on one batch (on the CPU a small one) after a first one.

    Leaves parameters, gradients and random state as they were.
    """
    few = min(batch_size, len(split), batch_size if device.type == "cuda" else 8)
    inputs, labels = to_input(split.images[:few].to(device), image_size), split.labels[:few].to(device)
    net.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2):
            _synchronize(device)
            start = time.perf_counter()
            F.cross_entropy(net(inputs), labels).backward()
            _synchronize(device)
            seconds = time.perf_counter() - start
    net.zero_grad(set_to_none=True)
    return few / seconds


def train(
    net: nn.Module,
    train_split: Split,
    test_split: Split,
    *,
    model: str,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    out: Path,
    on_batch: Callable[[int], Progress] | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
) -> list[EpochMetrics]:
    """Train ``net`` and write ``metrics.jsonl`` (a line an epoch) and ``checkpoint.pt`` (after each epoch) into ``out``.

    Args:
        net: a model of :func:`new_model`.
        model: its name.
        on_batch: given the epoch, makes the epoch's progress callback.
        on_epoch: called after each epoch.
    """
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    image_size = IMAGE_SIZE[model]
    history: list[EpochMetrics] = []
    for epoch in range(1, epochs + 1):
        loss, train_acc, seconds = train_epoch(
            net,
            optimizer,
            train_split,
            batch_size=batch_size,
            image_size=image_size,
            device=device,
            generator=generator,
            progress=on_batch(epoch) if on_batch is not None else None,
        )
        _, test_acc = evaluate(net, test_split, batch_size=batch_size, image_size=image_size, device=device)
        metrics = EpochMetrics(epoch, loss, train_acc, test_acc, len(train_split) / seconds, seconds)
        history.append(metrics)
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")
        save_checkpoint(out / "checkpoint.pt", net, model, history)
        if on_epoch is not None:
            on_epoch(metrics)
    return history


def save_checkpoint(path: Path, net: nn.Module, model: str, history: list[EpochMetrics]) -> None:
    """Write weights and metrics; a crash leaves the previous file whole. Loads with ``weights_only=True``."""
    # Plain contiguous tensors: what loads the file need not know of memory formats.
    weights = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    content = {
        "format": CHECKPOINT_FORMAT,
        "model": model,
        "classes": list(CLASSES),
        "metrics": [dataclasses.asdict(m) for m in history],
        "state_dict": weights,
    }
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, device: torch.device) -> tuple[nn.Module, str, list[dict[str, Any]]]:
    """The model of a checkpoint on ``device``, its name, and its metrics.

    Raises:
        CheckpointError: no such file, or not a checkpoint of :func:`save_checkpoint`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a readable checkpoint: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of alexnet-triton train")
    model = content.get("model")
    if model not in IMAGE_SIZE:
        raise CheckpointError(f"{path}: holds an unknown model {model!r}, known are {', '.join(IMAGE_SIZE)}")
    net = build_model(model)
    try:
        net.load_state_dict(content["state_dict"], strict=True)
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: its weights do not fit {model}: {error}") from error
    return net.to(device=device, memory_format=torch.channels_last), model, content.get("metrics", [])  # type: ignore[call-overload]


def describe_backend(device: torch.device) -> str:
    """In words, what the operations run on under the current backend."""
    if not kernels.backend.runs_triton(torch.empty(0, device=device)):
        return "PyTorch reference"
    return "Triton kernels" if device.type == "cuda" else "Triton kernels in Triton's interpreter (for checking, slow)"
