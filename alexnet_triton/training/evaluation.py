"""Evaluation of a network: loss and accuracy on a split, class probabilities of images, training speed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.advanced import add_cross_entropy

from ..data.augment import input_for, ten_crops
from ..data.dataset import DataError, Normalization, Split
from ..data.stream import AnySplit, Feed
from .distributed import ALONE, Processes
from .signals import Stop, Stopped


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished all work launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


#: Top-5 accuracy is computed only for more classes than this.
_FEW_CLASSES = 10


class Evaluation(NamedTuple):
    """The result of :func:`evaluate`.

    Attributes:
        loss: mean cross-entropy, in nats.
        accuracy: fraction of images whose class has the largest logit.
        top5: fraction of images whose class has one of the five largest logits; None for ten classes or fewer.
    """

    loss: float
    accuracy: float
    top5: float | None


def top5_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Number of rows of ``logits`` (N, 5 classes or more) whose label (N,) is one of ``topk(5)``: an int64 tensor.

    The host does not wait for the device. A row with a NaN is no hit.
    """
    among = (logits.topk(5).indices == labels[:, None]).any(1)
    return (among & ~logits.isnan().any(1)).sum()


def _ten_crop_logits(net: nn.Module, images: Tensor, index: Tensor, size: int, options: dict[str, Any]) -> Tensor:
    """Logarithm of the class probabilities averaged over :func:`ten_crops`: (N, classes) float32."""
    found = [net(inputs).float().log_softmax(1) for inputs in ten_crops(net, images, index, size, **options)]
    return torch.stack(found).logsumexp(0) - math.log(len(found))


@torch.no_grad()
def evaluate(
    net: nn.Module,
    split: AnySplit,
    *,
    batch_size: int,
    image_size: int,
    device: torch.device,
    stop: Stop | None = None,
    processes: Processes = ALONE,
    ten_crop: bool = False,
) -> Evaluation:
    """Loss and accuracy of ``net`` on ``split``, in eval mode and the network's dtype.

    With ``ten_crop`` the probabilities are averaged over the :func:`.augment.ten_crops` of each image. The stored images must
    then be larger than ``image_size``. Of several processes, pass ``stop`` to all or to none.

    Raises:
        DataError: an image cannot be read, or, if damaged images are skipped, none can.
        ValueError: ``ten_crop`` is set and the images are no larger than ``image_size``.
        Stopped: ``stop`` returned True in any process.
    """
    if ten_crop and split.size <= image_size:
        raise ValueError(f"ten crops of side {image_size} need larger images, got side {split.size}")
    net.eval()
    options: dict[str, Any] = {"dtype": next(net.parameters()).dtype, "normalization": split.normalization}
    loss_sum, correct, top5 = (torch.zeros((), device=device) for _ in range(3))
    few_classes = True
    shares = [processes.share(index) for index in torch.arange(len(split), device=device).split(batch_size)]
    stop_waiting = stop if processes.size == 1 else None  # of several, the others would wait for the one that stopped
    seen = 0
    with contextlib.closing(Feed(split.to(device), shares, device, stop=stop_waiting, replace=False)) as feed:
        parts = iter(feed)
        for _ in shares:
            found = None if stop is not None and processes.any(stop()) else next(parts, None)
            if found is None:
                raise Stopped("before its evaluation")
            part, index = found
            seen += len(index)
            labels = part.labels[index]
            if ten_crop:
                logits = _ten_crop_logits(net, part.images, index, image_size, options)
            else:
                logits = net(input_for(net, part.images, index, image_size, **options))
            add_cross_entropy(logits, labels, loss_sum, correct)
            few_classes = logits.shape[1] <= _FEW_CLASSES
            if not few_classes:
                top5 += top5_hits(logits, labels)
    count = processes.add_up(torch.tensor(seen)).item()
    if count == 0:
        raise DataError(f"none of {len(split)} images can be read")
    loss, hits, among = (total / count for total in processes.add_up(torch.stack([loss_sum, correct, top5])).tolist())
    return Evaluation(loss, hits, None if few_classes else among)


@torch.no_grad()
def classify(
    net: nn.Module,
    images: Tensor,
    *,
    batch_size: int,
    image_size: int,
    device: torch.device,
    normalization: Normalization | None = None,
) -> Tensor:
    """Class probabilities of ``images`` (uint8, as in a :class:`Split`): (N, classes) float32 on the CPU.

    The network runs in eval mode and in its own dtype. The softmax is computed in float32.
    """
    net.eval()
    dtype = next(net.parameters()).dtype
    batches = images.split(batch_size)
    options: dict[str, Any] = {"dtype": dtype, "normalization": normalization}
    inputs = (input_for(net, batch.to(device), None, image_size, **options) for batch in batches)
    return torch.cat([net(batch).float().softmax(1).cpu() for batch in inputs])


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A network's predictions for the N readable images of a split, on the CPU.

    Attributes:
        classes: the most probable class of each image, int64 (N,).
        labels: the true class, int64 (N,).
        true: probability of the true class, float32 (N,).
        index: the image's number in the split, int64 (N,), ascending.
    """

    classes: Tensor
    labels: Tensor
    true: Tensor
    index: Tensor


def predict_split(net: nn.Module, split: AnySplit, *, batch_size: int, image_size: int, device: torch.device) -> Predictions:
    """Predictions of ``net`` for all readable images of ``split``, in eval mode."""
    options: dict[str, Any] = {"batch_size": batch_size, "image_size": image_size, "device": device}
    batches = torch.arange(len(split)).split(batch_size)
    with contextlib.closing(Feed(split, batches, torch.device("cpu"), replace=False)) as feed:
        probabilities = torch.cat(
            [classify(net, part.images[index], **options, normalization=part.normalization) for part, index in feed]
        )
    index = torch.tensor([i for i in range(len(split)) if i not in feed.missing])
    labels = split.labels.cpu()[index]
    return Predictions(probabilities.argmax(1), labels, probabilities.gather(1, labels[:, None])[:, 0], index)


def measure_speed(net: nn.Module, split: Split, batch_size: int, image_size: int, device: torch.device) -> float:
    """Images per second of a forward and backward pass, timed on one batch (on the CPU of at most 8 images) after a warm-up.

    Parameters and random state stay unchanged. Gradients are set to None.
    """
    few = min(batch_size, len(split), batch_size if device.type == "cuda" else 8)
    options: dict[str, Any] = {"dtype": next(net.parameters()).dtype, "normalization": split.normalization}
    inputs = input_for(net, split.images[:few].to(device), None, image_size, **options)
    labels = split.labels[:few].to(device)
    net.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2):
            synchronize(device)
            start = time.perf_counter()
            F.cross_entropy(net(inputs).float(), labels).backward()
            synchronize(device)
            seconds = time.perf_counter() - start
    net.zero_grad(set_to_none=True)
    return few / seconds
