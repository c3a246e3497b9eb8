"""Training and evaluation: d2l's recipe (Xavier-uniform weights, plain SGD, cross-entropy)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import kernels

from .data import CLASSES, Split, draw_augmentation, to_input
from .fused import fuse
from .models import IMAGE_SIZE, AlexNet, init_xavier_uniform, reference_lenet
from .optim import SGD

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
        seconds: of training: from an idle device to an idle device, the data included; evaluation, compilation and the capture
            of a CUDA graph not.
    """

    epoch: int
    loss: float
    train_acc: float
    test_acc: float
    images_per_s: float
    seconds: float


#: ``(images seen, mean loss so far, images a second so far) -> None``, called a few times a second and at the end of an epoch.
Progress = Callable[[int, float, float], None]


def build_model(model: str) -> nn.Module:
    """``"alexnet"`` or ``"lenet"``, fused, for one-channel images of ten classes."""
    return AlexNet() if model == "alexnet" else fuse(reference_lenet())


def new_model(model: str, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with Xavier-uniform weights drawn from ``seed``, channels-last in memory, on ``device``, in ``dtype``."""
    torch.manual_seed(seed)
    net = build_model(model)
    net.apply(init_xavier_uniform)
    return net.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def default_precision(device: torch.device) -> str:
    """``"bfloat16"`` on a GPU that computes in it, ``"float32"`` elsewhere."""
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """PyTorch's switches for float32 products inside the block: exact, or on TF32 tensor cores for ``"tf32"``."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


#: Float16 gradients of a mean over a batch are as small as 1e-7: losses are multiplied by this, the learning rate divided. A
#: constant: a scale that adapts reads on the host whether a gradient overflowed, which no captured step can do.
_FLOAT16_SCALE = 1024.0

#: A progress callback reads the loss, for which the host waits: not more often than this, in seconds.
_PROGRESS_INTERVAL = 0.25

#: Steps before a capture: the first compiles and makes the masters, the others settle the allocator.
_WARM_UP_STEPS = 3


class Trainer:
    """Plain SGD on images that live on the device: one step at a time, or as a CUDA graph of the whole step.

    The step is data (gather, augment, resize, scale, cast), forward, loss, backward, optimizer and the sums of loss and hits.
    Captured, it is one launch for the host, and nothing in an epoch waits for the GPU. The last, smaller batch of an epoch runs
    eagerly. Half-precision parameters have float32 masters (:class:`alexnet_triton.optim.SGD`). float16 losses are scaled by a
    constant and the learning rate by its inverse, which is the same step for SGD without momentum; a gradient that overflows
    all the same makes the loss NaN, and the epoch says so.

    On CUDA the constructor runs the step on batches of both sizes, so that everything is compiled before the first epoch.
    Weights and random state are afterwards what they were.

    Args:
        net: on ``device``, in the dtype it trains in.
        split: training images; copied to ``device``.
        graph: capture the step; on CUDA only.
        augment: change each image at random (:func:`alexnet_triton.data.draw_augmentation`).

    Raises:
        ValueError: ``graph`` on a device without CUDA graphs.
    """

    def __init__(
        self,
        net: nn.Module,
        split: Split,
        *,
        batch_size: int,
        image_size: int,
        lr: float,
        device: torch.device,
        graph: bool,
        augment: bool = False,
    ) -> None:
        if graph and device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, not {device.type}")
        self.net, self.device, self.image_size, self.batch_size = net, device, image_size, batch_size
        self.split = split.to(device)
        self.augment = augment
        self.dtype = next(net.parameters()).dtype
        self.scale = _FLOAT16_SCALE if self.dtype == torch.float16 else 1.0
        self.optimizer = SGD(net.parameters(), lr=lr / self.scale)
        self.loss_sum, self.correct = torch.zeros((), device=device), torch.zeros((), device=device)
        #: What a captured step reads: each replay finds the next batch here.
        self.index = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.replay: Callable[[], None] | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._prepare(graph and len(split) >= batch_size)

    def step(self, index: torch.Tensor) -> None:
        """One step on the images of ``index``, run operation by operation."""
        augmentation = draw_augmentation(len(index), self.device) if self.augment else None
        inputs = kernels.gather_resize(self.split.images, index, self.image_size, dtype=self.dtype, augmentation=augmentation)
        labels = self.split.labels[index]
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.net(inputs).float()
        loss = F.cross_entropy(logits, labels)
        (loss * self.scale).backward()
        self.optimizer.step()
        # Sums stay on the device: reading one would make the host wait for the step.
        self.loss_sum += loss.detach() * len(labels)
        self.correct += (logits.detach().argmax(1) == labels).sum()

    def warm_up(self) -> None:
        """A few steps on batches of both sizes of an epoch, and everything that they changed as it was."""
        self.net.train()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            before = [param.detach().clone() for param in self.net.parameters()]
            whole, rest = min(self.batch_size, len(self.split)), len(self.split) % self.batch_size
            for size in [whole] * _WARM_UP_STEPS + [rest] * (rest > 0):
                self.step(self.index[:size])
        with torch.no_grad():
            for param, value in zip(self.net.parameters(), before, strict=True):
                param.copy_(value)
                master = self.optimizer.state[param].get("master")
                if master is not None:
                    master.copy_(value)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum.zero_()
        self.correct.zero_()

    def _prepare(self, capture: bool) -> None:
        """:meth:`warm_up`, and the step on ``self.index`` as a CUDA graph, which computes nothing yet."""
        # Not on the default stream, on which nothing can be captured; one stream for both, so that the allocator knows it.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.random.fork_rng([self.device]), torch.cuda.graph(graph, stream=stream):
                self.step(self.index)
            self.replay = graph.replay
        _synchronize(self.device)

    def epoch(self, generator: torch.Generator, progress: Progress | None = None) -> tuple[float, float, float]:
        """One pass over the images in an order drawn from ``generator``, on its device; mean loss, accuracy, seconds.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        self.net.train()
        self.loss_sum.zero_()
        self.correct.zero_()
        total, seen = len(self.split), 0
        _synchronize(self.device)
        start = shown = time.perf_counter()
        order = torch.randperm(total, generator=generator, device=generator.device).to(self.device)
        for index in order.split(self.batch_size):
            if self.replay is not None and len(index) == self.batch_size:
                self.index.copy_(index)
                self.replay()
            else:
                self.step(index)
            seen += len(index)
            now = time.perf_counter()
            if progress is not None and (now - shown > _PROGRESS_INTERVAL or seen == total):
                progress(seen, self.loss_sum.item() / seen, seen / (now - start))
                shown = now
        _synchronize(self.device)
        seconds = time.perf_counter() - start
        if not torch.isfinite(self.loss_sum):
            raise FloatingPointError("the training loss is not finite any more: try a smaller --lr")
        return self.loss_sum.item() / total, self.correct.item() / total, seconds

    def float32_weights(self) -> dict[str, torch.Tensor]:
        """The network's state in float32 on the CPU, from the masters where there are any; plain contiguous tensors."""
        masters = {id(p): state["master"] for p, state in self.optimizer.state.items() if "master" in state}
        weights = {}
        for key, value in self.net.state_dict(keep_vars=True).items():
            value = masters.get(id(value), value).detach()
            weights[key] = (value.float() if value.is_floating_point() else value).cpu().contiguous()
        return weights


@torch.no_grad()
def evaluate(net: nn.Module, split: Split, *, batch_size: int, image_size: int, device: torch.device) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on ``split``, in eval mode and the network's dtype."""
    net.eval()
    dtype = next(net.parameters()).dtype
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    split = split.to(device)
    for index in torch.arange(len(split), device=device).split(batch_size):
        labels = split.labels[index]
        logits = net(kernels.gather_resize(split.images, index, image_size, dtype=dtype)).float()
        loss_sum += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return loss_sum.item() / len(split), correct.item() / len(split)


def measure_speed(net: nn.Module, split: Split, batch_size: int, image_size: int, device: torch.device) -> float:
    """Images a second of a forward and backward pass, timed on one batch (on the CPU a small one) after a first one.

    Leaves parameters, gradients and random state as they were.
    """
    few = min(batch_size, len(split), batch_size if device.type == "cuda" else 8)
    inputs = to_input(split.images[:few].to(device), image_size, next(net.parameters()).dtype)
    labels = split.labels[:few].to(device)
    net.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2):
            _synchronize(device)
            start = time.perf_counter()
            F.cross_entropy(net(inputs).float(), labels).backward()
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
    graph: bool = False,
    augment: bool = False,
    on_ready: Callable[[], None] | None = None,
    on_batch: Callable[[int], Progress] | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
) -> list[EpochMetrics]:
    """Train ``net`` and write ``metrics.jsonl`` (a line an epoch) and ``checkpoint.pt`` (after each epoch) into ``out``.

    Args:
        net: a model of :func:`new_model`.
        model: its name.
        graph: run each step as a CUDA graph.
        augment: change each training image at random.
        on_ready: called once, when everything is compiled and captured and the first epoch begins.
        on_batch: given the epoch, makes the epoch's progress callback.
        on_epoch: called after each epoch.
    """
    generator = torch.Generator(device).manual_seed(seed)
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
    )
    if on_ready is not None:
        on_ready()
    history: list[EpochMetrics] = []
    for epoch in range(1, epochs + 1):
        loss, train_acc, seconds = trainer.epoch(generator, on_batch(epoch) if on_batch is not None else None)
        _, test_acc = evaluate(net, test_split, batch_size=batch_size, image_size=image_size, device=device)
        metrics = EpochMetrics(epoch, loss, train_acc, test_acc, len(train_split) / seconds, seconds)
        history.append(metrics)
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")
        save_checkpoint(out / "checkpoint.pt", trainer.float32_weights(), model, history)
        if on_epoch is not None:
            on_epoch(metrics)
    return history


def save_checkpoint(path: Path, weights: dict[str, torch.Tensor], model: str, history: list[EpochMetrics]) -> None:
    """Write weights and metrics; a crash leaves the previous file whole. Loads with ``weights_only=True``."""
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
