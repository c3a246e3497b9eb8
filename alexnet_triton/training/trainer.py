"""Training and evaluation: d2l's recipe (Xavier-uniform weights, plain SGD, cross-entropy)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels.advanced import add_cross_entropy
from kernels.runtime.backend import runs_triton

from ..data.augment import NOTHING, Augment, input_for
from ..data.dataset import Split
from ..data.fashion_mnist import CLASSES
from ..fused import fuse
from ..models import IMAGE_SIZE, AlexNet, init_xavier_uniform, reference_lenet
from ..optim import SGD
from ..precompile import precompile
from .checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    CheckpointError,
    check_configuration,
    check_weights,
    copy_checkpoint,
    read_checkpoint,
    save_checkpoint,
    training_state,
)
from .distributed import ALONE, Processes
from .evaluation import evaluate, synchronize
from .files import WriteError, write_atomically
from .signals import Stop, Stopped

#: d2l's learning rates.
LEARNING_RATE = {"alexnet": 0.01, "lenet": 0.9}

#: In the folder of a run, beside its checkpoints: a line of JSON an epoch.
METRICS = "metrics.jsonl"


def _check_number(name: str, value: object) -> None:
    """Raise a TypeError unless ``value`` is a Python number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a {type(value).__name__}")


def _copy(into: torch.Tensor, value: object, name: str) -> None:
    """Copy a tensor of the same shape; ``copy_`` alone would repeat a smaller one."""
    if not isinstance(value, torch.Tensor) or value.shape != into.shape:
        found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} is {found}, not a tensor of shape {list(into.shape)}")
    into.copy_(value)


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

    def __post_init__(self) -> None:
        if type(self.epoch) is not int:
            raise TypeError(f"epoch is a {type(self.epoch).__name__}")
        for name, value in dataclasses.asdict(self).items():
            _check_number(name, value)


#: ``(images seen, mean loss so far, images a second so far) -> None``, called a few times a second and at the end of an epoch.
#: Images are those of all processes, the loss is that of this one's.
Progress = Callable[[int, float, float], None]


def build_model(model: str, classes: int = len(CLASSES), channels: int = 1) -> nn.Module:
    """``"alexnet"`` or ``"lenet"``, fused, for images of so many channels and classes."""
    return AlexNet(classes, channels) if model == "alexnet" else fuse(reference_lenet(classes, channels))


def new_model(
    model: str,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    classes: int = len(CLASSES),
    channels: int = 1,
) -> nn.Module:
    """:func:`build_model` with Xavier-uniform weights drawn from ``seed``, channels-last, on ``device``, in ``dtype``."""
    torch.manual_seed(seed)
    net = build_model(model, classes, channels)
    net.apply(init_xavier_uniform)
    return net.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def default_precision(device: torch.device) -> str:
    """``"bfloat16"`` on a GPU that computes in it, ``"float32"`` elsewhere."""
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """PyTorch's switches for float32 products inside the block: in TF32 for ``"tf32"``, else exact.

    Of convolutions and of linear layers alike, where PyTorch's default is TF32 for convolutions alone.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


#: Float16 gradients of a mean over a batch are as small as 1e-7: losses are multiplied by this, the learning rate divided. A
#: constant: a scale that adapts reads on the host whether a gradient overflowed, which no captured step can do.
_FLOAT16_SCALE = 1024.0

#: A progress callback reads the loss, for which the host waits: not more often than this, in seconds.
_PROGRESS_INTERVAL = 0.25

#: Steps before a capture: the first compiles and makes the masters, the others settle the allocator.
_WARM_UP_STEPS = 3


class Trainer:
    """Plain SGD on images that live on the device: one step at a time, or as a CUDA graph of the whole step.

    The step is data (gather, augment, resize, scale, cast; cells where the first layer reads those), forward, loss, backward,
    optimizer and the sums of loss and hits. Captured, it is one launch for the host, and nothing in an epoch waits for the GPU.
    The last, smaller batch of an epoch runs eagerly. Half-precision parameters have float32 masters
    (:class:`alexnet_triton.optim.SGD`). float16 losses are scaled by a constant and the learning rate by its inverse, which is
    the same step, with momentum too; a gradient that overflows all the same makes the loss NaN, and the epoch says so. Nothing
    else reads a loss, so that no step waits for one.

    Between two steps, in the middle of an epoch too, :meth:`state_dict` and :meth:`float32_weights` are all that the rest of
    the training depends on, and :meth:`load_state_dict` of them goes on with the same bits on the same device.

    On CUDA the constructor runs the step on batches of both sizes, so that everything is compiled before the first epoch.
    Weights and random state are afterwards what they were.

    Args:
        net: on ``device``, in the dtype it trains in.
        split: training images; copied to ``device``.
        graph: capture the step; on CUDA only.
        augment: what to change in each image at random (:func:`alexnet_triton.data.augment.augmented_input`).
        momentum, weight_decay: as in :class:`alexnet_triton.optim.SGD`.
        processes: that train together, on a shard of each batch every one. They call the methods of this class alike, except
            for :meth:`float32_weights`.
        evaluated: images of the run's evaluations, whose kernels are compiled with those of the steps.
        tell: given lines about compilation, where something is compiled.

    Raises:
        ValueError: ``graph`` on a device without CUDA graphs, or with more than one process.
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
        augment: Augment = NOTHING,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        processes: Processes = ALONE,
        evaluated: Split | None = None,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        if graph and device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, not {device.type}")
        if graph and processes.size > 1:
            raise ValueError(f"a CUDA graph of the step is for one process, not for {processes.size}")
        self.net, self.device, self.image_size, self.batch_size = net, device, image_size, batch_size
        self.split = split.to(device)
        self.processes, self.evaluated, self.tell = processes, evaluated, tell
        #: What a step calls: it makes the gradients of all processes one.
        self.parallel = processes.parallel(net, device)
        self.augment = augment
        self.dtype = next(net.parameters()).dtype
        self.scale = _FLOAT16_SCALE if self.dtype == torch.float16 else 1.0
        # The penalty is not a part of the loss: it is scaled as the gradients are, so that lr / scale takes it back.
        self.optimizer = SGD(net.parameters(), lr=lr / self.scale, momentum=momentum, weight_decay=weight_decay * self.scale)
        self.loss_sum, self.correct = torch.zeros((), device=device), torch.zeros((), device=device)
        #: What a captured step reads: each replay finds the next batch here.
        self.index = torch.zeros(batch_size, dtype=torch.int64, device=device)
        #: The sum of losses after each step of the epoch: at its end it says which step was the first to go wrong.
        self.loss_sums = torch.zeros(-(-len(split) // batch_size), device=device)
        self.replay: Callable[[], None] | None = None
        #: The epoch's permutation of the images; None between two epochs.
        self.order: torch.Tensor | None = None
        #: Of the epoch: steps done, and the seconds that they took up to the last stop.
        self.steps, self.seconds = 0, 0.0
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._prepare(graph and len(split) >= batch_size)

    def step(self, index: torch.Tensor) -> None:
        """One step on the images of ``index``, run operation by operation; of several processes, each on its share of them."""
        share = self.processes.share(index)
        inputs = input_for(self.net, self.split.images, share, self.image_size, dtype=self.dtype, augment=self.augment)
        labels = self.split.labels[share]
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.parallel(inputs)
        # The gradient of the mean over the batch. Processes take the mean of theirs, each of which therefore counts size-fold:
        # right for unequal shares too, and for an empty one.
        scale = self.scale * self.processes.size / len(index)
        # Sums stay on the device: reading one would make the host wait for the step.
        logits.backward(add_cross_entropy(logits.detach(), labels, self.loss_sum, self.correct, scale))
        self.optimizer.step()

    def precompile(self) -> int:
        """Compile the kernels of the steps and evaluations of a run in parallel; returns how many Triton's cache lacked.

        Where kernels run, that is; elsewhere nothing happens. Masters, momentum, gradients and sums hold nonsense afterwards.
        Of several processes on a machine the first one compiles for all.
        """
        return self.processes.first_on_each_machine(lambda: precompile(self._walk, tell=self.tell))

    def _walk(self) -> None:
        """The steps and evaluations of a run that launch different kernels; what processes exchange launches none."""
        parallel, self.parallel = self.parallel, self.net
        try:
            self._steps()
        finally:
            self.parallel = parallel
        if self.evaluated is not None:
            whole, rest = min(self.batch_size, len(self.evaluated)), len(self.evaluated) % self.batch_size
            for size in (len(self.processes.share(self.index[:n])) for n in (whole, rest)):
                if size > 0:
                    few = self.evaluated.limited(size)
                    evaluate(self.net, few, batch_size=size, image_size=self.image_size, device=self.device)

    def _steps(self) -> None:
        """A few steps on batches of both sizes of an epoch."""
        self.net.train()
        whole, rest = min(self.batch_size, len(self.split)), len(self.split) % self.batch_size
        for size in [whole] * _WARM_UP_STEPS + [rest] * (rest > 0):
            self.step(self.index[:size])

    def warm_up(self) -> None:
        """Compile everything and take a few steps; everything that they changed is as it was."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            before = [param.detach().clone() for param in self.net.parameters()]
            self.precompile()
            self._steps()
        with torch.no_grad():
            for param, value in zip(self.net.parameters(), before, strict=True):
                self.optimizer.set_master(param, value)
                state = self.optimizer.state[param]
                if "momentum_buffer" in state:
                    state["momentum_buffer"].zero_()  # from which the next step makes the gradient, as a first step does
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
        synchronize(self.device)

    def epoch(
        self, generator: torch.Generator, progress: Progress | None = None, stop: Stop | None = None
    ) -> tuple[float, float, float]:
        """One pass over the images in an order drawn from ``generator``, on its device; mean loss, accuracy, seconds.

        After a :class:`Stopped`, or a :meth:`load_state_dict` of a state in the middle of an epoch, the rest of that epoch;
        what is returned is of the whole one.

        Raises:
            FloatingPointError: the loss is not finite, or a weight is not. Seen when the epoch is over, or where ``progress``
                reads the loss; the message names the step.
            Stopped: ``stop`` said so.
        """
        self.net.train()
        total = len(self.split)
        synchronize(self.device)
        begin = time.perf_counter()
        if self.order is None:
            self.order = torch.randperm(total, generator=generator, device=generator.device).to(self.device)
            self.steps, self.seconds = 0, 0.0
            self.loss_sum.zero_()
            self.correct.zero_()
        start = begin - self.seconds
        shown, seen = begin, self.steps * self.batch_size
        # Of this process, whose losses are all that it can show: to add up all would make every process wait.
        own = sum(len(self.processes.share(index)) for index in self.order.split(self.batch_size)[: self.steps])
        for index in self.order.split(self.batch_size)[self.steps :]:
            if stop is not None and stop():
                synchronize(self.device)
                self.seconds = time.perf_counter() - start
                raise Stopped(f"after step {self.steps} of {-(-total // self.batch_size)}")
            if self.replay is not None and len(index) == self.batch_size:
                self.index.copy_(index)
                self.replay()
            else:
                self.step(index)
            self.loss_sums[self.steps].copy_(self.loss_sum)
            self.steps += 1
            seen += len(index)
            own += len(self.processes.share(index))
            now = time.perf_counter()
            if progress is not None and (now - shown > _PROGRESS_INTERVAL or seen == total):
                loss = self.loss_sum.item() / max(own, 1)  # it may have had no share yet
                progress(seen, loss, seen / (now - start))
                if not math.isfinite(loss) and self.processes.size == 1:
                    break
                shown = now
        synchronize(self.device)
        seconds = time.perf_counter() - start
        self.check_finite()
        self.order = None
        loss_sum, correct = self.processes.add_up(torch.stack([self.loss_sum, self.correct])).tolist()
        return loss_sum / total, correct / total, seconds

    def check_finite(self) -> None:
        """Wait for the steps of the epoch so far, and look at their losses and at the weights.

        Raises:
            FloatingPointError: one is not finite; the message names the first such step.
        """
        bad = (~torch.isfinite(self.processes.add_up(self.loss_sums[: self.steps].clone()))).nonzero()
        if len(bad):
            raise FloatingPointError(f"the loss of step {bad[0].item() + 1} of {len(self.loss_sums)} is not finite")
        # The last step made weights that no loss has seen. A master that is not finite makes a parameter that is not.
        if not torch.stack([torch.isfinite(param).all() for param in self.net.parameters()]).all():
            raise FloatingPointError(f"the weights are not finite after step {self.steps} of {len(self.loss_sums)}")

    def state_dict(self) -> dict[str, Any]:
        """What training depends on besides :meth:`float32_weights` and the generator of :meth:`epoch`; tensors on the CPU.

        That is momentum, the states of torch's random generators (from which dropout and augmentation draw), and the place
        within an epoch: order of the images, steps done, sums so far. The states of all processes are in that of the leader.
        """
        momentum = {}
        for name, param in self.net.named_parameters():
            buffer = self.optimizer.state[param].get("momentum_buffer") if param in self.optimizer.state else None
            if buffer is not None:
                momentum[name] = buffer.cpu().contiguous()
        own = {
            "loss_sums": self.loss_sums.cpu(),
            "loss_sum": self.loss_sum.cpu(),
            "correct": self.correct.cpu(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        return {
            "momentum": momentum,
            "order": None if self.order is None else self.order.cpu(),
            "steps": self.steps,
            "seconds": self.seconds,
            "processes": self.processes.gather(own),
        }

    @torch.no_grad()
    def load_state_dict(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Become what another trainer was when it gave its :meth:`float32_weights` and its :meth:`state_dict`.

        Everything is copied into the tensors that are there, which a captured step reads.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: ``state`` is not one of such a trainer; this one is then neither.
        """
        momentum, order, all_own = state["momentum"], state["order"], state["processes"]
        steps, seconds = state["steps"], state["seconds"]
        if not isinstance(momentum, dict):
            raise TypeError(f"momentum is a {type(momentum).__name__}")
        if not isinstance(all_own, list) or len(all_own) != self.processes.size:
            raise ValueError(f"processes is no list of {self.processes.size}")
        if type(steps) is not int or not 0 <= steps <= len(self.loss_sums):
            raise ValueError(f"steps is no number up to {len(self.loss_sums)}")
        _check_number("seconds", seconds)
        total = len(self.split)
        if order is not None and not (
            # An index that is no image would end the process on a GPU, and read any memory on none.
            isinstance(order, torch.Tensor) and order.dtype == torch.int64 and order.sort()[0].equal(torch.arange(total))
        ):
            raise ValueError(f"order is no permutation of {total} images")
        self.net.load_state_dict(weights)
        for name, param in self.net.named_parameters():
            self.optimizer.set_master(param, weights[name])
            if name in momentum:
                _copy(self._momentum_buffer(param), momentum[name], f"momentum of {name}")
        self.order = None if order is None else order.to(self.device)
        self.steps, self.seconds = steps, seconds
        own = all_own[self.processes.rank]
        _copy(self.loss_sums, own["loss_sums"], "loss_sums")
        _copy(self.loss_sum, own["loss_sum"], "loss_sum")
        _copy(self.correct, own["correct"], "correct")
        torch.set_rng_state(own["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], self.device)

    def _momentum_buffer(self, param: torch.Tensor) -> torch.Tensor:
        """The optimizer's for ``param``, made where it takes its first step later."""
        state = self.optimizer.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
        return state["momentum_buffer"]

    def float32_weights(self) -> dict[str, torch.Tensor]:
        """The network's state in float32 on the CPU, from the masters where there are any; plain contiguous tensors."""
        weights = {}
        for key, value in self.net.state_dict(keep_vars=True).items():
            master = self.optimizer.master(value)
            value = value.detach() if master is None else master
            weights[key] = (value.float() if value.is_floating_point() else value).cpu().contiguous()
        return weights


def holds_run(out: Path) -> bool:
    """Whether a run has written into the folder ``out``: another one must not overwrite it."""
    return any((out / name).exists() for name in (METRICS, LAST, BEST))


def _checksum(split: Split) -> int:
    """CRC-32 of images and labels: a run goes on with the data that it began with."""
    checksum = 0
    for images in split.images.split(4096):  # a set may fill the device, and the host need not have room for another
        checksum = zlib.crc32(images.cpu().numpy().tobytes(), checksum)
    return zlib.crc32(split.labels.cpu().numpy().tobytes(), checksum)


def history_of(checkpoint: Checkpoint) -> list[EpochMetrics]:
    """The metrics of the epochs in ``checkpoint``.

    Raises:
        CheckpointError: they are something else.
    """
    try:
        return [EpochMetrics(**metrics) for metrics in checkpoint.metrics]
    except TypeError as error:
        raise CheckpointError(f"{checkpoint.path}: damaged: its metrics are not those of epochs: {error}") from error


def _trained(loss: object, accuracy: object, seconds: object) -> tuple[Any, Any, Any]:
    """What :meth:`Trainer.epoch` returned, from a file: numbers."""
    for name, value in {"loss": loss, "accuracy": accuracy, "seconds": seconds}.items():
        _check_number(name, value)
    return loss, accuracy, seconds


def learning_rates(checkpoint: Checkpoint, otherwise: float) -> list[float]:
    """The learning rate of each epoch in ``checkpoint``; in a file from before it kept them, its last one, or ``otherwise``.

    Raises:
        CheckpointError: they are something else, or there is no training state.
    """
    state = training_state(checkpoint)
    options = state.get("options")
    last = options.get("lr", otherwise) if isinstance(options, dict) else otherwise
    rates = state.get("learning_rates", [last] * len(checkpoint.metrics))
    if (
        not isinstance(rates, list)
        or len(rates) != len(checkpoint.metrics)
        or not all(isinstance(rate, int | float) for rate in rates)
    ):
        raise CheckpointError(f"{checkpoint.path}: damaged: 'learning_rates' are not those of its epochs")
    return list(rates)


def _as_line(metrics: EpochMetrics) -> str:
    return json.dumps(dataclasses.asdict(metrics)) + "\n"


def metrics_file(history: Sequence[EpochMetrics]) -> bytes:
    """The content of ``metrics.jsonl`` after ``history``."""
    return "".join(map(_as_line, history)).encode()


def position(checkpoint: Checkpoint) -> tuple[int, bool, int]:
    """How far a run had come, as a value to compare: whole epochs, whether the next one lacks but its evaluation, its steps."""
    state = training_state(checkpoint)
    trainer = state.get("trainer")
    steps = trainer.get("steps") if isinstance(trainer, dict) and trainer.get("order") is not None else 0
    return len(checkpoint.metrics), state.get("trained") is not None, steps if isinstance(steps, int) else 0


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
                file.write(_as_line(metrics))
        if on_epoch is not None:
            on_epoch(metrics)
    return history


def load_checkpoint(path: Path, device: torch.device) -> tuple[nn.Module, Checkpoint]:
    """The network of a checkpoint on ``device``, in float32, and what else the file holds.

    Raises:
        CheckpointError: no such file, or not a checkpoint of :func:`train`.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.model not in IMAGE_SIZE:
        raise CheckpointError(f"{path}: holds an unknown model {checkpoint.model!r}, known are {', '.join(IMAGE_SIZE)}")
    if len(checkpoint.classes) < 2:
        raise CheckpointError(f"{path}: damaged: it names fewer than two classes")
    net = build_model(checkpoint.model, len(checkpoint.classes), checkpoint.channels)
    check_weights(net, checkpoint)
    net.load_state_dict(checkpoint.weights, strict=True)
    net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net, checkpoint


def describe_backend(device: torch.device) -> str:
    """In words, what the operations run on under the current backend."""
    if not runs_triton(torch.empty(0, device=device)):
        return "PyTorch reference"
    return "Triton kernels" if device.type == "cuda" else "Triton kernels in Triton's interpreter (for checking, slow)"
