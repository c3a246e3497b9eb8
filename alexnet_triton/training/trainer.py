"""Training step by step: SGD on the cross-entropy, with images that stay on the device or are streamed to it."""

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
    """Copy ``value`` into ``into``, and raise a ValueError unless the shapes match: ``copy_`` alone would broadcast."""
    if not isinstance(value, torch.Tensor) or value.shape != into.shape:
        found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} is {found}, not a tensor of shape {list(into.shape)}")
    into.copy_(value)


#: Gradient scale in float16: gradients of a mean over a batch are as small as 1e-7. The learning rate is divided by the same
#: factor. It is constant since an adaptive scale reads on the host whether a gradient overflowed; a captured step cannot do so.
_FLOAT16_SCALE = 1024.0

#: The listener is told of time spent waiting for images if it exceeds this fraction of the epoch, and one second.
_MOST_WAITED = 0.05

#: The least seconds between two calls of :meth:`.Listener.batch`: each reads the loss, for which the host waits.
_PROGRESS_INTERVAL = 0.25


def balanced_weights(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Loss weights, float32 (``classes``,): the inverse of the number of ``labels`` (int64) of each class.

    They are scaled so that their mean over ``labels`` is 1. A class without labels has weight 0.
    """
    counts = torch.bincount(labels, minlength=classes)
    present = (counts > 0).sum()
    return torch.where(counts > 0, len(labels) / (present * counts.clamp(min=1)), 0.0).float()


#: Steps before a capture: the first compiles kernels and makes float32 masters, the others settle the caching allocator.
_WARM_UP_STEPS = 3

#: Steps before a capture with DistributedDataParallel: PyTorch's notes on CUDA graphs ask for 11. DDP times its first ten.
_GROUPED_WARM_UP_STEPS = 11


class Trainer:
    """Trains a network with SGD, running each step eagerly or as one CUDA graph.

    A step gathers, augments, resizes, scales and casts its images (into cells if the first layer reads cells), runs forward,
    loss, backward and optimizer, and accumulates loss and hits. A captured step is one launch for the host. The host does not
    wait for a step within an epoch unless the listener wants batches. The last, smaller batch of an epoch runs eagerly.

    Half-precision parameters have float32 masters (:class:`alexnet_triton.optim.SGD`). In float16 the loss is scaled by a
    constant and the learning rate by its inverse, which gives the same step, with momentum too. If a gradient overflows all
    the same, the loss becomes NaN and the epoch raises at its end.

    Between any two steps :meth:`state_dict` and :meth:`float32_weights` hold everything on which the rest of the training
    depends. After :meth:`load_state_dict` of both, training on the same device is bit-identical.

    On CUDA the constructor runs the step on batches of both sizes, so that everything is compiled before the first epoch. It
    then restores weights and random state.

    If the learning rate changes, a captured step reads it from a device tensor that is filled before the replay. Otherwise the
    learning rate is a Python number in the optimizer.

    Args:
        net: network on the device of ``where``, in its training dtype. Parameters without ``requires_grad`` stay unchanged.
        split: training images. They are copied to the device, or streamed to it batch by batch.
        recipe: image size, batch size, learning rates, loss, optimizer and augmentation are read from here.
        where: processes that train together must make the same calls on this class, except of :meth:`float32_weights`.
        evaluated: images of the run's evaluations. The kernels for them are compiled together with those of the steps.
        listener: receives compilation and batch events, and is asked whether to stop or save.
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
        #: If the set has fewer images than a batch, an epoch is one smaller batch.
        self.batch_size = min(recipe.batch_size, self.total)
        #: Image numbers that a captured step reads. Before each replay this process's share of the next batch is copied here.
        self.index = torch.zeros(self._share(self.batch_size), dtype=torch.int64, device=self.device)
        self.ring: Ring | None = None
        #: Images and labels on the device, into which a step indexes.
        self.split = self._on_device()
        self.evaluated, self.listener, self.checkpoint_every = evaluated, listener, where.checkpoint_every
        self.dtype = next(net.parameters()).dtype
        self.scale = _FLOAT16_SCALE if self.dtype == torch.float16 else 1.0
        #: Class weights of the training loss. The last parameter of the network, a linear layer's, has a row for each class.
        self.class_weights = (
            balanced_weights(split.labels.to(self.device), len(list(net.parameters())[-1]))
            if recipe.class_weights == "balanced"
            else None
        )
        self.loss_sum, self.correct = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        #: The running loss sum after each step of the epoch. From it the end of the epoch finds the first non-finite step.
        self.loss_sums = torch.zeros(-(-self.total // self.batch_size), device=self.device)
        #: The learning rate of the last step, before the division by the scale.
        self.lr = self.learning_rate(1, 0)
        rate: float | torch.Tensor = self.lr / self.scale
        if where.graph and (recipe.schedule != "constant" or recipe.warmup):
            rate = torch.tensor(rate, device=self.device)
        # Weight decay is not part of the scaled loss: scale it like the gradients, so that lr / scale undoes both.
        self.optimizer = SGD(
            [param for param in net.parameters() if param.requires_grad],
            lr=rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay * self.scale,
            nesterov=recipe.nesterov,
        )
        #: Given float32 values, by name, of frozen parameters. The optimizer has no masters for those.
        self.frozen: dict[str, torch.Tensor] = {}
        self.replay: Callable[[], None] | None = None
        #: The epoch's permutation of the images; None between two epochs.
        self.order: torch.Tensor | None = None
        #: Of the current epoch: steps done, seconds of training so far, and seconds of waiting for images.
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                self._prepare(where.graph and self.total >= recipe.batch_size)
        else:
            #: The module that a step calls. DistributedDataParallel averages the gradients of all processes.
            self.parallel = self.processes.parallel(net, self.device)
            if self.processes.grouped:
                self._settle()

    def _settle(self) -> None:
        """Run one backward pass on an empty batch, after which DistributedDataParallel sums gradients in another order.

        So the first step of a resumed run is bit-identical to the same step of an uninterrupted run.
        """
        images = torch.empty(0, self.split.channels, self.image_size, self.image_size, dtype=self.dtype, device=self.device)
        with torch.random.fork_rng([]):
            self.parallel(images).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _share(self, count: int) -> int:
        """Number of images of this process in a batch of ``count``."""
        return len(self.processes.share(torch.empty(count, device="meta")))

    def _on_device(self) -> Split:
        """The split that a step indexes: all images, or for a stream a ring or blank images until the first batch arrives."""
        if isinstance(self.given, Split):
            return self.given
        if self.device.type == "cuda":
            self.ring = Ring(self.given, max(len(self.index), 1), self.device)
            return self.ring.split
        return self.given.blank(max(len(self.index), 1))

    def _new_order(self, generator: torch.Generator) -> torch.Tensor:
        """A permutation of all images for one epoch, drawn from ``generator``: on the device, or on the CPU for a stream."""
        if isinstance(self.given, StreamedSplit):
            return self.given.source.order(generator).cpu()
        if self.given.order is not None:
            return self.given.order(generator).to(self.device)
        return torch.randperm(self.total, generator=generator, device=generator.device).to(self.device)

    def learning_rate(self, epoch: int, step: int = -1) -> float:
        """The learning rate of ``step`` (from 0) in ``epoch`` (from 1); -1: of the epoch's last step."""
        steps = len(self.loss_sums)
        return self.schedule.at(self._steps_of_run(epoch, step % steps), steps)

    def _steps_of_run(self, epoch: int, step: int) -> int:
        """Number of steps of the run before ``step`` (from 0) of ``epoch`` (from 1)."""
        return (epoch - 1) * len(self.loss_sums) + step

    def _set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the following steps. An unchanged rate launches nothing."""
        if lr == self.lr:
            return
        self.lr, group = lr, self.optimizer.param_groups[0]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr / self.scale)
        else:
            group["lr"] = lr / self.scale

    def step(self, index: torch.Tensor, count: int | None = None) -> None:
        """Run one eager step on the images ``index`` of ``self.split``.

        ``index`` is this process's share of a batch of ``count`` images; None: the whole batch.
        """
        options: dict[str, Any] = {"dtype": self.dtype, "augment": self.augment, "normalization": self.split.normalization}
        inputs = input_for(self.net, self.split.images, index, self.image_size, **options)
        labels = self.split.labels[index]
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.parallel(inputs)
        # This gives the gradient of the mean over the whole batch. Processes average their gradients, so each scales its own by
        # the number of processes. Unequal and empty shares are right too.
        scale = self.scale * self.processes.size / (len(index) if count is None else count)
        # Sums stay on the device: reading one would make the host wait for the step.
        sums, smoothing = (self.loss_sum, self.correct), self.recipe.label_smoothing
        weighted: dict[str, Any] = {"weight": self.class_weights, "label_smoothing": smoothing}
        logits.backward(add_cross_entropy(logits.detach(), labels, *sums, scale, **weighted))
        self.optimizer.step()

    def precompile(self) -> int:
        """Compile the kernels of a run's steps and evaluations in parallel; return how many Triton's cache lacked.

        Without Triton kernels nothing happens. Masters, momentum, gradients and sums are undefined afterwards. Of several
        processes on a machine the first one compiles for all.
        """
        return self.processes.first_on_each_machine(lambda: precompile(self._walk, tell=self.listener.compiling))

    def _walk(self) -> None:
        """Run steps and evaluations of each batch size, for their kernels. Communication is left out: it launches none."""
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
        """Run ``count`` steps on whole batches, and one on the epoch's smaller last batch if there is one."""
        self.net.train()
        whole, rest = self.batch_size, self.total % self.batch_size
        for size in [whole] * count + [rest] * (rest > 0):
            self.step(self.index[: self._share(size)], size)

    def warm_up(self) -> None:
        """Compile everything and run a few steps, then restore weights, momentum, sums and random state."""
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
                    state["momentum_buffer"].zero_()  # then the next step stores the gradient, as a first step does
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum.zero_()
        self.correct.zero_()

    def _prepare(self, capture: bool) -> None:
        """:meth:`warm_up`, then capture the step on ``self.index`` as a CUDA graph if ``capture`` is set.

        With several processes the graph contains NCCL's all-reduce of each bucket, on NCCL's stream, overlapping the backward
        pass. NCCL demands that all processes replay it in the same steps. They do: a batch is whole in all of them or in none.

        Raises:
            RuntimeError: the capture fails. With several processes none falls back to eager steps: others may have a graph.
        """
        # The default stream cannot be captured. Use one other stream for warm-up and capture: its memory is then reused, and
        # DistributedDataParallel accumulates gradients on the stream on which it was made.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.parallel = self.processes.parallel(self.net, self.device)
            self.warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        if capture:
            graph = torch.cuda.CUDAGraph()
            # Threads of gloo and NCCL may call CUDA during the capture.
            mode = "thread_local" if self.processes.grouped else "global"
            try:
                with torch.random.fork_rng([self.device]), torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
                    self.step(self.index, self.batch_size)
            except RuntimeError as error:
                if not self.processes.grouped:
                    raise
                reason = str(error).partition("\n")[0]
                advice = "a CUDA graph cannot capture the step of several processes here (--no-graph runs without a graph)"
                raise RuntimeError(f"{advice}: {reason}") from error
            self.replay = graph.replay
        synchronize(self.device)

    def epoch(self, generator: torch.Generator, number: int = 1) -> tuple[float, float, float]:
        """Train one epoch and return its mean loss, accuracy and seconds.

        The order of the images is drawn from ``generator``, on its device. ``number`` is the number of the epoch in the run,
        from 1, and decides the learning rates.

        After a :class:`Stopped` or :class:`SaveAsked`, or after :meth:`load_state_dict` of a state within an epoch, this trains
        the rest of that epoch. The returned values are those of the whole epoch.

        Raises:
            FloatingPointError: a loss or a weight is not finite. This is checked at the end of the epoch, and when the listener
                is told the loss. The message names the step.
            DataError: a streamed image cannot be read, or a worker process has died.
            SaveAsked, Stopped: the listener of any process asked for it, or ``where.checkpoint_every`` steps have passed.
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
        # Images of this process. Progress shows this process's loss only: a sum over processes would make each of them wait.
        own = sum(len(self.processes.share(index)) for index in self.order.split(self.batch_size)[: self.steps])
        rest = self.order.split(self.batch_size)[self.steps :]
        # A single process may stop while it waits for images. Of several, the others would wait for the one that stopped.
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
                # All processes compute the same value, without communication.
                due = self.checkpoint_every is not None and self._steps_of_run(number, self.steps) % self.checkpoint_every == 0
                seen += len(batch)
                own += len(index)
                now = time.perf_counter()
                if self.listener.wants_batches and (now - shown > _PROGRESS_INTERVAL or seen == total):
                    loss = self.loss_sum.item() / max(own, 1)  # all shares so far may have been empty
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
        """When the block ends, even by an exception, record the epoch's seconds since ``start`` and those without images."""
        try:
            yield
        finally:
            synchronize(self.device)
            self.seconds = time.perf_counter() - start
            self.waited += feed.waited

    def check_finite(self) -> None:
        """Wait for the steps of the epoch so far, and check their losses and the weights.

        Raises:
            FloatingPointError: a loss or a weight is not finite. The message names the first step with such a loss, else the
                last step.
        """
        bad = (~torch.isfinite(self.processes.add_up(self.loss_sums[: self.steps].clone()))).nonzero()
        if len(bad):
            raise FloatingPointError(f"the loss of step {bad[0].item() + 1} of {len(self.loss_sums)} is not finite")
        # No loss has been computed with the weights of the last step. A non-finite master makes its parameter non-finite.
        if not torch.stack([torch.isfinite(param).all() for param in self.net.parameters()]).all():
            raise FloatingPointError(f"the weights are not finite after step {self.steps} of {len(self.loss_sums)}")

    def state_dict(self) -> dict[str, Any]:
        """The training state besides :meth:`float32_weights` and the generator of :meth:`epoch`; tensors on the CPU.

        It holds momentum, the states of torch's random generators (from which dropout and augmentation draw), and the position
        within the epoch: order of the images, steps done, sums so far. The leader's has the random states and sums of all
        processes.
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
        """Set parameters to the float32 values that ``weights`` has for their names, exact in masters too.

        The values are copied into the existing tensors, since a captured step reads those.
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
        """Restore ``weights``, from :meth:`float32_weights`, and ``state``, from :meth:`state_dict`, of another trainer.

        Everything is copied into the existing tensors, since a captured step reads those.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: ``state`` is not that of such a trainer. This trainer may then be
                restored in part and must not be used.
        """
        momentum, order, all_own = state["momentum"], state["order"], state["processes"]
        steps, seconds = state["steps"], state["seconds"]
        if not isinstance(momentum, dict):
            raise TypeError(f"momentum is a {type(momentum).__name__}")
        if not isinstance(all_own, list) or len(all_own) != self.processes.size:
            raise ValueError(f"processes is not a list of length {self.processes.size}")
        if type(steps) is not int or not 0 <= steps <= len(self.loss_sums):
            raise ValueError(f"steps is not an integer from 0 to {len(self.loss_sums)}")
        check_number("seconds", seconds)
        total = self.total
        if order is not None and not (
            # An index out of range aborts the process on a GPU, and reads arbitrary memory on a CPU.
            isinstance(order, torch.Tensor) and order.dtype == torch.int64 and order.sort()[0].equal(torch.arange(total))
        ):
            raise ValueError(f"order is not a permutation of {total} images")
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
        """The optimizer's momentum buffer of ``param``, created if ``param`` has not had its first step."""
        state = self.optimizer.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
        return state["momentum_buffer"]

    def float32_weights(self) -> dict[str, torch.Tensor]:
        """The network's state in float32 on the CPU, from the masters where they exist, as plain contiguous tensors."""
        weights = {}
        for key, value in self.net.state_dict(keep_vars=True).items():
            master = self.optimizer.master(value)
            value = self.frozen.get(key, value.detach()) if master is None else master
            weights[key] = (value.float() if value.is_floating_point() else value).cpu().contiguous()
        return weights
