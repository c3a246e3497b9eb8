"""Learning-rate schedules: the learning rate is a function of the step number alone.

A schedule has no state, so a resumed run has none to restore.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

ScheduleName = Literal["constant", "step", "cosine", "onecycle"]

#: ``"step"``: the factor of the learning rate between two of the equal parts of training, and the number of parts. They are
#: those of torchvision's reference script for ImageNet, which divides the rate by ten every 30 of 90 epochs.
_DECAY, _PARTS = 0.1, 3

#: ``"onecycle"``, the defaults of ``torch.optim.lr_scheduler.OneCycleLR``: the fraction of training in which the rate rises if
#: there is no warm-up, the highest rate divided by the first, and the first rate divided by the last.
_RISE, _FIRST, _LAST = 0.3, 25.0, 1e4


def _cosine(begin: float, end: float, part: float) -> float:
    """Value between ``begin`` and ``end`` on half a period of a cosine, at the fraction ``part``."""
    return end + (begin - end) * (1 + math.cos(math.pi * part)) / 2


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate over a training run.

    Attributes:
        name: ``"constant"``; ``"step"``: divided by ten after each third; ``"cosine"``: down to 0 along half a cosine
            (Loshchilov and Hutter, "SGDR", 2017, without restarts); ``"onecycle"``: up and then down to almost 0 (Smith and
            Topin, "Super-convergence", 2018), as in ``torch.optim.lr_scheduler.OneCycleLR``.
        lr: the highest learning rate.
        epochs: epochs of the whole run.
        warmup: epochs in which the learning rate rises linearly from almost 0 to ``lr``. The schedule takes the remaining
            epochs. For ``"onecycle"``: the epochs in which the rate rises; 0: three tenths of all.

    Raises:
        ValueError: the name is unknown, a number is negative, or the warm-up is longer than the run.
    """

    name: ScheduleName = "constant"
    lr: float = 0.01
    epochs: int = 10
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            raise ValueError(f"schedule must be one of {', '.join(get_args(ScheduleName))}, got {self.name!r}")
        if not self.lr >= 0:
            raise ValueError(f"lr must not be negative, got {self.lr!r}")
        if not 0 <= self.warmup <= self.epochs:
            raise ValueError(f"warmup must be between 0 and the {self.epochs} epochs of the run, got {self.warmup!r}")

    def at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of step number ``step`` of the run, from 0."""
        total = self.epochs * steps_per_epoch
        if self.name == "onecycle":
            return self._onecycle(step, total)
        warmup = round(self.warmup * steps_per_epoch)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done, rest = step - warmup, max(total - warmup, 1)
        if self.name == "cosine":
            return _cosine(self.lr, 0.0, min(done / rest, 1.0))
        if self.name == "step":
            return self.lr * _DECAY ** min(done * _PARTS // rest, _PARTS - 1)
        return self.lr

    def _onecycle(self, step: int, total: int) -> float:
        rise = self.warmup / self.epochs if self.warmup else _RISE
        # The step with the highest rate and the last step, numbered as in PyTorch.
        top, last = rise * total - 1, total - 1
        first = self.lr / _FIRST
        if step <= top:
            return _cosine(first, self.lr, step / top) if top > 0 else self.lr
        part = min((step - top) / max(last - top, 1), 1.0)
        return _cosine(self.lr, first / _LAST, part)
