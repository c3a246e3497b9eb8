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

from .data import CLASSES, Split, to_input
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


def new_model(model: str, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with Xavier-uniform weights drawn from ``seed``, channels-last in memory, on ``device``, in ``dtype``."""
    torch.manual_seed(seed)
    net = build_model(model)
    net.apply(init_xavier_uniform)
    return net.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def default_precision(device: torch.device) -> str:
    """``"bfloat16"`` on a GPU that computes in it, ``"float32"`` elsewhere."""
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


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


#: Float16 gradients of a mean over a batch are as small as 1e-7: losses are multiplied by this, the learning rate divided.
_FLOAT16_SCALE = 1024.0

#: A progress callback reads the loss, for which the host waits: not more often than this, in seconds.
_PROGRESS_INTERVAL = 0.25


class Trainer:
    """Plain SGD on images that live on the device: one step at a time, or as a CUDA graph of the whole step.

    The step is data (gather, resize, scale, cast), forward, loss, backward, optimizer and the sums of loss and hits. Captured,
    it is one launch for the host, and nothing in an epoch waits for the GPU. The last, smaller batch of an epoch runs eagerly.
    Half-precision parameters have float32 masters (:class:`alexnet_triton.optim.SGD`). float16 losses are scaled by a constant
    and the learning rate by its inverse, which is the same step for SGD without momentum.

    Args:
        net: on ``device``, in the dtype it trains in.
        split: training images; copied to ``device``.
        graph: capture the step; on CUDA only.

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
    ) -> None:
        if graph and device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, not {device.type}")
        self.net, self.device, self.image_size, self.batch_size = net, device, image_size, batch_size
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.dtype = next(net.parameters()).dtype
        self.scale = _FLOAT16_SCALE if self.dtype == torch.float16 else 1.0
        # On a GPU in memory, where a captured step reads it: so that it can be 0 while the capture warms up.
        self.lr: float | torch.Tensor = lr / self.scale
        if device.type == "cuda":
            self.lr = torch.tensor(self.lr, dtype=torch.float32, device=device)
        self.optimizer = SGD(net.parameters(), lr=self.lr)
        self.loss_sum, self.correct = torch.zeros((), device=device), torch.zeros((), device=device)
        self.index = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.replay: Callable[[], None] | None = None
        if graph and len(split) >= batch_size:
            self.replay = self._capture()

    def step(self, index: torch.Tensor) -> None:
        """One step on the images of ``index``, run operation by operation."""
        inputs, labels = to_input(self.images[index], self.image_size).to(self.dtype), self.labels[index]
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.net(inputs).float()
        loss = F.cross_entropy(logits, labels)
        (loss * self.scale).backward()
        self.optimizer.step()
        self.loss_sum += loss.detach() * len(labels)
        self.correct += (logits.detach().argmax(1) == labels).sum()

    def _capture(self) -> Callable[[], None]:
        """The step on ``self.index`` as a CUDA graph. Leaves weights, sums and random state as they were."""
        assert isinstance(self.lr, torch.Tensor)
        lr = self.lr.clone()
        random_state = torch.cuda.get_rng_state(self.device)
        self.lr.zero_()
        self.net.train()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, makes the masters, fills the allocator's pools
                self.step(self.index)
            last = len(self.labels) % self.batch_size
            if last:  # compile for the epoch's last, smaller batch now, not in the middle of the first epoch
                self.step(self.index[:last])
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(self.index)
        torch.cuda.set_rng_state(random_state, self.device)
        self.lr.copy_(lr)
        self.loss_sum.zero_()
        self.correct.zero_()
        return graph.replay

    def epoch(self, generator: torch.Generator, progress: Progress | None = None) -> tuple[float, float, float]:
        """One pass over the images in an order drawn from ``generator``, on its device; mean loss, accuracy, seconds.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        self.net.train()
        self.loss_sum.zero_()
        self.correct.zero_()
        total, seen = len(self.labels), 0
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
    images, all_labels = split.images.to(device), split.labels.to(device)
    for start in range(0, len(split), batch_size):
        part = slice(start, start + batch_size)
        labels = all_labels[part]
        logits = net(to_input(images[part], image_size).to(dtype)).float()
        loss_sum += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return loss_sum.item() / len(split), correct.item() / len(split)


def measure_speed(net: nn.Module, split: Split, batch_size: int, image_size: int, device: torch.device) -> float:
    """Images a second of a forward and backward pass, timed on one batch (on the CPU a small one) after a first one.

    Leaves parameters, gradients and random state as they were.
    """
    few = min(batch_size, len(split), batch_size if device.type == "cuda" else 8)
    dtype = next(net.parameters()).dtype
    inputs = to_input(split.images[:few].to(device), image_size).to(dtype)
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
    on_batch: Callable[[int], Progress] | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
) -> list[EpochMetrics]:
    """Train ``net`` and write ``metrics.jsonl`` (a line an epoch) and ``checkpoint.pt`` (after each epoch) into ``out``.

    Args:
        net: a model of :func:`new_model`.
        model: its name.
        graph: run each step as a CUDA graph.
        on_batch: given the epoch, makes the epoch's progress callback.
        on_epoch: called after each epoch.
    """
    generator = torch.Generator(device).manual_seed(seed)
    image_size = IMAGE_SIZE[model]
    trainer = Trainer(net, train_split, batch_size=batch_size, image_size=image_size, lr=lr, device=device, graph=graph)
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
