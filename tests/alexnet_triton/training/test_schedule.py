"""Learning-rate schedules against PyTorch's own schedulers."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from alexnet_triton.training.schedule import Schedule

EPOCHS, STEPS = 6, 7
TOTAL = EPOCHS * STEPS


def rates(make: Callable[[torch.optim.Optimizer], LRScheduler], lr: float = 0.4) -> list[float]:
    """The learning rate of each step from PyTorch's scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR warns of its own use of an argument
        for _ in range(TOTAL):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return found


def ours(name: str, warmup: float = 0.0, lr: float = 0.4) -> list[float]:
    schedule = Schedule(name, lr, EPOCHS, warmup)  # type: ignore[arg-type]
    return [schedule.at(step, STEPS) for step in range(TOTAL)]


PEERS: dict[str, Callable[[torch.optim.Optimizer, int], LRScheduler]] = {
    "constant": lambda optimizer, steps: ConstantLR(optimizer, 1.0, 1),
    "step": lambda optimizer, steps: StepLR(optimizer, steps // 3, 0.1),
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
}


@pytest.mark.parametrize("name", PEERS)
def test_as_pytorchs(name: str) -> None:
    assert ours(name) == pytest.approx(rates(lambda optimizer: PEERS[name](optimizer, TOTAL)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", PEERS)
def test_after_a_warm_up(name: str) -> None:
    warmup = 3

    def make(optimizer: torch.optim.Optimizer) -> LRScheduler:
        steps = warmup * STEPS
        rise = LinearLR(optimizer, 1 / steps, 1.0, steps - 1)
        return SequentialLR(optimizer, [rise, PEERS[name](optimizer, TOTAL - steps)], [steps])

    assert ours(name, warmup) == pytest.approx(rates(make), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_one_cycle(warmup: int) -> None:
    rise = warmup / EPOCHS if warmup else 0.3
    peer = rates(lambda optimizer: OneCycleLR(optimizer, 0.4, total_steps=TOTAL, pct_start=rise))
    assert ours("onecycle", warmup) == pytest.approx(peer, rel=1e-9)


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "onecycle"])
@pytest.mark.parametrize(("epochs", "steps", "warmup"), [(1, 1, 0), (1, 1, 1), (1, 2, 0.5), (3, 1, 3), (2, 5, 0.1)])
def test_short_runs_have_a_rate_at_every_step_and_after_the_last(name: str, epochs: int, steps: int, warmup: float) -> None:
    schedule = Schedule(name, 0.5, epochs, warmup)  # type: ignore[arg-type]
    for step in range(epochs * steps + 3):
        assert 0 <= schedule.at(step, steps) <= 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "linear"}, "schedule must be one of constant, step, cosine, onecycle, got 'linear'"),
        ({"lr": -0.1}, "lr must not be negative, got -0.1"),
        ({"lr": float("nan")}, "lr must not be negative, got nan"),
        ({"warmup": 11}, "warmup must be between 0 and the 10 epochs of the run, got 11"),
        ({"warmup": -1}, "warmup must be between 0 and the 10 epochs of the run, got -1"),
    ],
)
def test_what_is_no_schedule(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**options)
