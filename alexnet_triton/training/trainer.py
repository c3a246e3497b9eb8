"""The training of a network, a step at a time: plain SGD on images that live on the device or come to it, cross-entropy."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from kernels.advanced import add_cross_entropy

from ..data.augment import input_for
from ..data.dataset import Split
from ..data.stream import AnySplit, Feed, Ring, StreamedSplit
from ..optim import SGD
from ..precompile import precompile
from .evaluation import evaluate, synchronize
from .listener import SILENT, Listener
from .metrics import check_number
from .recipe import Recipe, Where
from .signals import SaveAsked, Stopped


def _copy(into: torch.Tensor, value: object, name: str) -> None:
    """Copy a tensor of the same shape; ``copy_`` alone would repeat a smaller one."""
    if not isinstance(value, torch.Tensor) or value.shape != into.shape:
        found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} is {found}, not a tensor of shape {list(into.shape)}")
    into.copy_(value)


#: Float16 gradients of a mean over a batch are as small as 1e-7: losses are multiplied by this, the learning rate divided. A
#: constant: a scale that adapts reads on the host whether a gradient overflowed, which no captured step can do.
_FLOAT16_SCALE = 1024.0

#: Of an epoch's time, what it may wait for images without a word; a second too.
_MOST_WAITED = 0.05

#: To tell of a batch its loss is read, for which the host waits: not more often than this, in seconds.
_PROGRESS_INTERVAL = 0.25


def balanced_weights(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """A weight for each class, float32 (``classes``,): the inverse of how many of ``labels`` (int64) are of it.

    Scaled so that their mean over ``labels`` is 1. A class without labels has 0.
    """
    counts = torch.bincount(labels, minlength=classes)
    present = (counts > 0).sum()
    return torch.where(counts > 0, len(labels) / (present * counts.clamp(min=1)), 0.0).float()


#: Steps before a capture: the first compiles and makes the masters, the others settle the allocator.
_WARM_UP_STEPS = 3

#: As many as PyTorch's notes on CUDA graphs ask for where DistributedDataParallel is captured, which times its first ten.
_GROUPED_WARM_UP_STEPS = 11


class Trainer:
    """Plain SGD: one step at a time, or as a CUDA graph of the whole step.

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

    Where the learning rate changes, a captured step reads it from the device, where it is filled before the replay. Elsewhere
    it is a number that the optimizer is told.

    Args:
        net: on the device of ``where``, in the dtype it trains in. A parameter without ``requires_grad`` stays what it is.
        split: training images; copied to the device, unless they are streamed: a step then finds its own in a place there.
        recipe: of which all is read that decides a step: image size, batch size, learning rates, loss, optimizer, augmentation.
        where: processes that train together call the methods of this class alike, except for :meth:`float32_weights`.
        evaluated: images of the run's evaluations, whose kernels are compiled with those of the steps.
        listener: told about compilation and batches, and asked whether to stop.
    """

    def __init__(
        self,
        net: nn.Module,
        split: AnySplit,
        recipe: Recipe,
        where: Where,
        *,
        evaluated: AnySplit | None = None,
        listener: Listener = SILENT,
    ) -> None:
        self.net, self.recipe, self.device, self.processes = net, recipe, where.device, where.processes
        self.image_size, self.augment, self.schedule = recipe.image_size, recipe.augment, recipe.learning_rates
        self.given, self.total = split.to(self.device), len(split)
        #: Of an epoch that has fewer images than a batch, they are its only one.
        self.batch_size = min(recipe.batch_size, self.total)
        #: What a captured step reads: each replay finds the next batch's images, or this process's of them, here.
        self.index = torch.zeros(self._share(self.batch_size), dtype=torch.int64, device=self.device)
        self.ring: Ring | None = None
        #: Where a step's images are on the device.
        self.split = self._on_device()
        self.evaluated, self.listener, self.checkpoint_every = evaluated, listener, where.checkpoint_every
        self.dtype = next(net.parameters()).dtype
        self.scale = _FLOAT16_SCALE if self.dtype == torch.float16 else 1.0
        #: Of each class, in the training loss. The last layer is linear: its last parameter has a row for each class.
        self.class_weights = (
            balanced_weights(split.labels.to(self.device), len(list(net.parameters())[-1]))
            if recipe.class_weights == "balanced"
            else None
        )
        self.loss_sum, self.correct = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        #: The sum of losses after each step of the epoch: at its end it says which step was the first to go wrong.
        self.loss_sums = torch.zeros(-(-self.total // self.batch_size), device=self.device)
        #: The learning rate of the last step, whatever the scale.
        self.lr = self.learning_rate(1, 0)
        rate: float | torch.Tensor = self.lr / self.scale
        if where.graph and (recipe.schedule != "constant" or recipe.warmup):
            rate = torch.tensor(rate, device=self.device)
        # The penalty is not a part of the loss: it is scaled as the gradients are, so that lr / scale takes it back.
        self.optimizer = SGD(
            [param for param in net.parameters() if param.requires_grad],
            lr=rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay * self.scale,
            nesterov=recipe.nesterov,
        )
        #: Float32 values of parameters that the optimizer does not have, by their names, where they were given.
        self.frozen: dict[str, torch.Tensor] = {}
        self.replay: Callable[[], None] | None = None
        #: The epoch's permutation of the images; None between two epochs.
        self.order: torch.Tensor | None = None
        #: Of the epoch: steps done, the seconds that they took up to the last stop, and those without images to compute on.
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                self._prepare(where.graph and self.total >= recipe.batch_size)
        else:
            #: What a step calls: it makes the gradients of all processes one.
            self.parallel = self.processes.parallel(net, self.device)
            if self.processes.grouped:
                self._settle()

    def _settle(self) -> None:
        """Take a backward pass of no image, after which DistributedDataParallel sums in another order than before.

        So the first step of a resumed run has the bits that it has in one that never stopped.
        """
        images = torch.empty(0, self.split.channels, self.image_size, self.image_size, dtype=self.dtype, device=self.device)
        with torch.random.fork_rng([]):
            self.parallel(images).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _share(self, count: int) -> int:
        """Images of this process in a batch of ``count``."""
        return len(self.processes.share(torch.empty(count, device="meta")))

    def _on_device(self) -> Split:
        """Images and labels where a step reads them; of a stream there are none yet."""
        if isinstance(self.given, Split):
            return self.given
        if self.device.type == "cuda":
            self.ring = Ring(self.given, max(len(self.index), 1), self.device)
            return self.ring.split
        return self.given.blank(max(len(self.index), 1))

    def _new_order(self, generator: torch.Generator) -> torch.Tensor:
        """All images in the order of an epoch: on the device, or where a stream's are asked for."""
        if isinstance(self.given, StreamedSplit):
            return self.given.source.order(generator).cpu()
        if self.given.order is not None:
            return self.given.order(generator).to(self.device)
        return torch.randperm(self.total, generator=generator, device=generator.device).to(self.device)

    def learning_rate(self, epoch: int, step: int = -1) -> float:
        """Of a step, counted from 0, of an epoch, counted from 1; -1: of its last step."""
        steps = len(self.loss_sums)
        return self.schedule.at(self._steps_of_run(epoch, step % steps), steps)

    def _steps_of_run(self, epoch: int, step: int) -> int:
        """How many steps come before ``step``, counted from 0, of an epoch, counted from 1."""
        return (epoch - 1) * len(self.loss_sums) + step

    def _set_learning_rate(self, lr: float) -> None:
        """Of the steps to come; nothing is launched where it is what it was."""
        if lr == self.lr:
            return
        self.lr, group = lr, self.optimizer.param_groups[0]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr / self.scale)
        else:
            group["lr"] = lr / self.scale

    def step(self, index: torch.Tensor, count: int | None = None) -> None:
        """One step, run operation by operation, on the images of ``index``, a process's share of ``count``; None: all of them.

        They are places in ``self.split``.
        """
        options: dict[str, Any] = {"dtype": self.dtype, "augment": self.augment, "normalization": self.split.normalization}
        inputs = input_for(self.net, self.split.images, index, self.image_size, **options)
        labels = self.split.labels[index]
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.parallel(inputs)
        # The gradient of the mean over the batch. Processes take the mean of theirs, each of which therefore counts size-fold:
        # right for unequal shares too, and for an empty one.
        scale = self.scale * self.processes.size / (len(index) if count is None else count)
        # Sums stay on the device: reading one would make the host wait for the step.
        sums, smoothing = (self.loss_sum, self.correct), self.recipe.label_smoothing
        weighted: dict[str, Any] = {"weight": self.class_weights, "label_smoothing": smoothing}
        logits.backward(add_cross_entropy(logits.detach(), labels, *sums, scale, **weighted))
        self.optimizer.step()

    def precompile(self) -> int:
        """Compile the kernels of the steps and evaluations of a run in parallel; returns how many Triton's cache lacked.

        Where kernels run, that is; elsewhere nothing happens. Masters, momentum, gradients and sums hold nonsense afterwards.
        Of several processes on a machine the first one compiles for all.
        """
        return self.processes.first_on_each_machine(lambda: precompile(self._walk, tell=self.listener.compiling))

    def _walk(self) -> None:
        """The steps and evaluations of a run that launch different kernels; what processes exchange launches none."""
        parallel, self.parallel = self.parallel, self.net
        try:
            self._steps(_WARM_UP_STEPS)
        finally:
            self.parallel = parallel
        if self.evaluated is not None:
            count, batch = len(self.evaluated), self.recipe.batch_size
            for size in map(self._share, (min(batch, count), count % batch)):
                if size > 0:
                    few = (
                        self.evaluated.blank(size)
                        if isinstance(self.evaluated, StreamedSplit)
                        else self.evaluated.limited(size)
                    )
                    evaluate(self.net, few, batch_size=size, image_size=self.image_size, device=self.device)

    def _steps(self, count: int) -> None:
        """``count`` steps on whole batches, and one on the smaller batch of an epoch."""
        self.net.train()
        whole, rest = self.batch_size, self.total % self.batch_size
        for size in [whole] * count + [rest] * (rest > 0):
            self.step(self.index[: self._share(size)], size)

    def warm_up(self) -> None:
        """Compile everything and take a few steps; everything that they changed is as it was."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            params = self.optimizer.param_groups[0]["params"]
            before = [param.detach().clone() for param in params]
            self.precompile()
            self._steps(_GROUPED_WARM_UP_STEPS if self.processes.grouped else _WARM_UP_STEPS)
        with torch.no_grad():
            for param, value in zip(params, before, strict=True):
                self.optimizer.set_master(param, value)
                state = self.optimizer.state[param]
                if "momentum_buffer" in state:
                    state["momentum_buffer"].zero_()  # from which the next step makes the gradient, as a first step does
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum.zero_()
        self.correct.zero_()

    def _prepare(self, capture: bool) -> None:
        """:meth:`warm_up`, and the step on ``self.index`` as a CUDA graph, which computes nothing yet.

        The graph of several processes holds NCCL's all-reduce of each bucket, on NCCL's stream, beside the backward pass. All
        of them replay it in the same steps, as NCCL demands: a batch is whole in all or in none.

        Raises:
            RuntimeError: several processes cannot capture. None goes on without a graph: the others might have one.
        """
        # Not on the default stream, on which nothing can be captured. One stream for all, so that the allocator knows it, and
        # since DistributedDataParallel accumulates gradients on the stream that it is made on.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.parallel = self.processes.parallel(self.net, self.device)
            self.warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        if capture:
            graph = torch.cuda.CUDAGraph()
            # Threads of gloo and NCCL may call CUDA meanwhile.
            mode = "thread_local" if self.processes.grouped else "global"
            try:
                with torch.random.fork_rng([self.device]), torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
                    self.step(self.index, self.batch_size)
            except RuntimeError as error:
                if not self.processes.grouped:
                    raise
                reason = str(error).partition("\n")[0]
                advice = "no CUDA graph can hold the step of several processes here (--no-graph runs it without)"
                raise RuntimeError(f"{advice}: {reason}") from error
            self.replay = graph.replay
        synchronize(self.device)

    def epoch(self, generator: torch.Generator, number: int = 1) -> tuple[float, float, float]:
        """One pass over the images in an order drawn from ``generator``, on its device; mean loss, accuracy, seconds.

        ``number`` counts the run's epochs from 1: the learning rates are those of its steps.

        After a :class:`Stopped` or :class:`SaveAsked`, or a :meth:`load_state_dict` of a state in the middle of an epoch, the
        rest of that epoch; what is returned is of the whole one.

        Raises:
            FloatingPointError: the loss is not finite, or a weight is not. Seen when the epoch is over, or where the listener
                is told the loss; the message names the step.
            DataError: an image of a stream cannot be read, or nothing reads them any more.
            SaveAsked, Stopped: the listener said so, of any process; or it is time for one of the checkpoints of ``where``.
        """
        self.net.train()
        total = self.total
        synchronize(self.device)
        begin = time.perf_counter()
        if self.order is None:
            self.order = self._new_order(generator)
            self.steps, self.seconds, self.waited = 0, 0.0, 0.0
            self.loss_sum.zero_()
            self.correct.zero_()
        start = begin - self.seconds
        shown, seen = begin, self.steps * self.batch_size
        # Of this process, whose losses are all that it can show: to add up all would make every process wait.
        own = sum(len(self.processes.share(index)) for index in self.order.split(self.batch_size)[: self.steps])
        rest = self.order.split(self.batch_size)[self.steps :]
        # One process may turn back from waiting for images; several would wait for each other.
        stop_waiting = self.listener.stop if self.processes.size == 1 else None
        shares = [self.processes.share(batch) for batch in rest]
        feed = Feed(self.given, shares, self.device, ring=self.ring, stop=stop_waiting)
        parts, due = iter(feed), False
        with contextlib.closing(feed), self._timed(start, feed):
            for batch in rest:
                stop, save = self.processes.any_of(self.listener.stop(), self.listener.save())
                save = save or due
                part = None if stop or save else next(parts, None)
                if part is None:
                    raise (SaveAsked if save and not stop else Stopped)(
                        f"after step {self.steps} of {-(-total // self.batch_size)}"
                    )
                self._set_learning_rate(self.learning_rate(number, self.steps))
                self.split, index = part
                if self.replay is not None and len(batch) == self.batch_size:
                    self.index.copy_(index)
                    self.replay()
                else:
                    self.step(index, len(batch))
                self.loss_sums[self.steps].copy_(self.loss_sum)
                self.steps += 1
                # The same in all processes, without asking them.
                due = self.checkpoint_every is not None and self._steps_of_run(number, self.steps) % self.checkpoint_every == 0
                seen += len(batch)
                own += len(index)
                now = time.perf_counter()
                if self.listener.wants_batches and (now - shown > _PROGRESS_INTERVAL or seen == total):
                    loss = self.loss_sum.item() / max(own, 1)  # it may have had no share yet
                    self.listener.batch(seen, loss, seen / (now - start))
                    if not math.isfinite(loss) and self.processes.size == 1:
                        break
                    shown = now
        seconds = self.seconds
        self.check_finite()
        self.order = None
        if self.waited > max(1.0, _MOST_WAITED * seconds):
            self.listener.waited(self.waited, seconds)
        loss_sum, correct = self.processes.add_up(torch.stack([self.loss_sum, self.correct])).tolist()
        return loss_sum / total, correct / total, seconds

    @contextlib.contextmanager
    def _timed(self, start: float, feed: Feed) -> Iterator[None]:
        """Note, however the block ends, the seconds of the epoch, which began at ``start``."""
        try:
            yield
        finally:
            synchronize(self.device)
            self.seconds = time.perf_counter() - start
            self.waited += feed.waited

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
    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Give parameters the float32 values that ``weights`` has by their names, to the bit, of any precision.

        A captured step reads them: they are copied into the tensors that are there.
        """
        for name, param in self.net.named_parameters():
            if (value := weights.get(name)) is None:
                continue
            if param.requires_grad:
                self.optimizer.set_master(param, value)
            else:
                param.copy_(value)
                self.frozen[name] = value.cpu()

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
        check_number("seconds", seconds)
        total = self.total
        if order is not None and not (
            # An index that is no image would end the process on a GPU, and read any memory on none.
            isinstance(order, torch.Tensor) and order.dtype == torch.int64 and order.sort()[0].equal(torch.arange(total))
        ):
            raise ValueError(f"order is no permutation of {total} images")
        self.net.load_state_dict(weights)
        self.set_weights(weights)
        for name, param in self.net.named_parameters():
            if param.requires_grad and name in momentum:
                _copy(self._momentum_buffer(param), momentum[name], f"momentum of {name}")
        self.order = order if order is None or isinstance(self.given, StreamedSplit) else order.to(self.device)
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
            value = self.frozen.get(key, value.detach()) if master is None else master
            weights[key] = (value.float() if value.is_floating_point() else value).cpu().contiguous()
        return weights
