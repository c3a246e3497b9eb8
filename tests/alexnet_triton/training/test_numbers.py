"""Schedules, Nesterov momentum, label smoothing, class weights and normalization in training and in a run's files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from alexnet_triton.data.augment import EVERYTHING, to_input
from alexnet_triton.data.dataset import Normalization
from alexnet_triton.optim import SGD
from alexnet_triton.training.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from alexnet_triton.training.evaluation import evaluate
from alexnet_triton.training.loop import train
from alexnet_triton.training.metrics import EpochMetrics
from alexnet_triton.training.networks import load_checkpoint, new_model
from alexnet_triton.training.recipe import LEARNING_RATES, RECIPES, Recipe, Where
from alexnet_triton.training.schedule import Schedule
from alexnet_triton.training.signals import Stopped
from alexnet_triton.training.trainer import Trainer, balanced_weights

from . import test_resume
from .test_resume import ASKED, CUDA, Case, at, contents, resume, run
from .test_training import CPU, _pytorch_where_kernels_are_slow, needs_a_gpu, sample, small_net, small_recipe, small_trainer

__all__ = ["_pytorch_where_kernels_are_slow"]

#: Steps per epoch of 40 images.
STEPS = 3


def stepped(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, epochs: int) -> list[float]:
    """The learning rate of each optimizer step in ``epochs`` epochs."""
    rates: list[float] = []
    real = SGD.step

    def noted(optimizer: SGD) -> None:
        rates.append(float(optimizer.param_groups[0]["lr"]) * trainer.scale)
        real(optimizer)

    monkeypatch.setattr(SGD, "step", noted)
    generator = torch.Generator().manual_seed(1)
    for number in range(1, epochs + 1):
        trainer.epoch(generator, number)
    return rates


@pytest.mark.parametrize("on_the_device", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["constant", "step", "cosine", "onecycle"])
@pytest.mark.parametrize("warmup", [0.0, 1.2])
def test_each_step_has_the_learning_rate_of_the_schedule(
    name: str, warmup: float, dtype: torch.dtype, on_the_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate is a number, or a tensor that a captured step would read."""
    trainer = small_trainer(dtype=dtype, schedule=name, warmup=warmup, epochs=3)
    if on_the_device:
        trainer.optimizer.param_groups[0]["lr"] = torch.tensor(trainer.optimizer.param_groups[0]["lr"])
    schedule = Schedule(name, 0.1, 3, warmup)  # type: ignore[arg-type]
    expected = [schedule.at(step, STEPS) for step in range(3 * STEPS)]
    assert stepped(trainer, monkeypatch, 3) == pytest.approx(expected, rel=1e-6)
    assert [trainer.learning_rate(epoch) for epoch in (1, 2, 3)] == expected[STEPS - 1 :: STEPS]


def test_a_learning_rate_on_the_device_is_filled_only_where_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step schedule changes the rate twice in three epochs: the tensor is filled twice, and the weights are the same."""
    weights = []
    for on_the_device in (False, True):
        trainer = small_trainer(schedule="step", epochs=3)
        if on_the_device:
            lr = torch.tensor(0.1)
            trainer.optimizer.param_groups[0]["lr"] = lr
        stepped(trainer, monkeypatch, 3)
        weights.append(trainer.float32_weights())
    assert trainer.optimizer.param_groups[0]["lr"] is lr
    assert lr._version == 2
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value)


def test_a_constant_rate_stays_the_number_it_was() -> None:
    trainer = small_trainer()
    (group,) = trainer.optimizer.param_groups
    before = group["lr"]
    trainer.epoch(torch.Generator().manual_seed(1))
    assert group["lr"] is before


@needs_a_gpu
@pytest.mark.parametrize("name", ["step", "cosine", "onecycle"])
def test_a_captured_step_reads_the_learning_rate(name: str) -> None:
    weights = []
    for graph in (False, True):
        trainer = small_trainer(torch.device("cuda"), graph=graph, schedule=name, momentum=0.9, nesterov=True, epochs=3)
        assert (trainer.replay is not None) == graph
        generator = torch.Generator("cuda").manual_seed(1)
        for number in (1, 2, 3):
            trainer.epoch(generator, number)
        weights.append(trainer.float32_weights())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value)


def test_an_epoch_of_everything_is_the_plain_loop(tmp_path: Path) -> None:
    """With all options, loss and weights equal those of a plain loop on 59 images, whose last batch is smaller."""
    images, test = 59, 50
    data = sample(images, test).normalized()
    recipe = small_recipe(
        seed=3, epochs=1, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, schedule="onecycle", label_smoothing=0.1,
        class_weights="balanced", normalize=True,
    )  # fmt: skip
    torch.manual_seed(3)
    net, plain = small_net(), small_net()
    plain.load_state_dict(net.state_dict())
    (metrics,) = train(net, data, recipe, Where(CPU), tmp_path)
    by = data.train.normalization
    assert by is not None

    def inputs(pixels: torch.Tensor) -> torch.Tensor:
        return (to_input(pixels, 28) - by.mean[0]) / by.std[0]

    assert inputs(data.train.images).mean().item() == pytest.approx(0, abs=1e-5)
    assert inputs(data.train.images).std().item() == pytest.approx(1, abs=1e-4)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)
    counts = torch.bincount(data.train.labels, minlength=10)
    weight = images / (10 * counts)
    schedule, loss_sum = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=4, cycle_momentum=False), 0.0
    for index in torch.randperm(images, generator=torch.Generator().manual_seed(3)).split(16):
        logits = plain(inputs(data.train.images[index]))
        loss = F.cross_entropy(logits, data.train.labels[index], weight, label_smoothing=0.1, reduction="sum")
        optimizer.zero_grad()
        (loss / len(index)).backward()
        optimizer.step()
        schedule.step()
        loss_sum += loss.item()
    assert metrics.loss == pytest.approx(loss_sum / images, rel=1e-5)
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # The test loss is neither smoothed nor weighted.
    with torch.no_grad():
        test_loss = F.cross_entropy(plain.eval()(inputs(data.test.images)), data.test.labels)
    assert metrics.test_loss == pytest.approx(test_loss.item(), rel=1e-4)
    assert metrics.lr == pytest.approx(0.05 / 25 / 1e4)


#: Options that change the loss or the step.
EVERY_NUMBER = {"nesterov": True, "weight_decay": 0.01, "label_smoothing": 0.1, "class_weights": "balanced", "normalize": True}

#: Runs of two epochs whose learning rates change: (case, further fields of the recipe).
SCHEDULED: dict[str, tuple[Case, dict[str, Any]]] = {
    "step": (Case(), {"schedule": "step"}),
    "cosine": (Case(momentum=0.9), {"schedule": "cosine"}),
    "warmup": (Case(), {"warmup": 1.5}),
    "onecycle": (Case(), {"schedule": "onecycle", "warmup": 0.7}),
    "onecycle-all": (Case(torch.bfloat16, 0.9, 0.5, EVERYTHING), {"schedule": "onecycle", **EVERY_NUMBER}),
    "float16-cosine": (Case(torch.float16, 0.9), {"schedule": "cosine", "warmup": 0.4, **EVERY_NUMBER}),
    "gpu-onecycle-all": (
        Case(torch.bfloat16, 0.9, 0.5, EVERYTHING, device=CUDA),
        {"schedule": "onecycle", **EVERY_NUMBER},
    ),
    "gpu-graph-onecycle-all": (
        Case(torch.bfloat16, 0.9, 0.5, EVERYTHING, graph=True, device=CUDA),
        {"schedule": "onecycle", **EVERY_NUMBER},
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_a_gpu] * (case.device == CUDA)) for name, (case, _) in SCHEDULED.items()]
)
def test_a_resumed_run_with_a_schedule_has_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops before the first step, within an epoch, before and in its evaluation, at its end, in the next epoch."""
    case, fields = SCHEDULED[name]
    if fields.get("normalize"):
        monkeypatch.setattr(test_resume, "sample", lambda *sizes: sample(*sizes).normalized())
    run(case, tmp_path / "whole", **fields)
    expected = contents(tmp_path / "whole")
    for call in (1, 3, 4, 5, 7, 8):
        out = tmp_path / str(call)
        with pytest.raises(Stopped, match=f"in epoch {(call - 1) // ASKED + 1} (after step|before its evaluation)"):
            run(case, out, stop=at(call), **fields)
        resume(case, out, **fields)
        assert contents(out) == expected, call


def test_balanced_weights_are_the_inverse_counts_with_mean_1() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    weights = balanced_weights(labels, 5)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 0.0, 10 / 3, 0.0]))
    assert weights[labels].mean().item() == pytest.approx(1)


def test_data_is_normalized_where_the_recipe_says_so(tmp_path: Path) -> None:
    for data, recipe in ((sample(8, 8), small_recipe(normalize=True)), (sample(8, 8).normalized(), small_recipe())):
        with pytest.raises(ValueError, match="normalized, but the recipe says normalize="):
            train(small_net(), data, recipe, Where(CPU), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_keeps_the_normalization(tmp_path: Path) -> None:
    """An evaluation with the kept normalization gives the run's accuracy and loss; a damaged normalization is refused."""
    data = sample(32, 30).normalized()
    history = train(new_model("lenet", 0, CPU), data, small_recipe(normalize=True, epochs=1), Where(CPU), tmp_path)
    path = tmp_path / "checkpoint.pt"
    net, kept = load_checkpoint(path, CPU)
    assert kept.normalization == data.train.normalization
    test = dataclasses.replace(sample(0, 30).test, normalization=kept.normalization)
    found = evaluate(net, test, batch_size=16, image_size=28, device=CPU)
    assert found[:2] == pytest.approx((history[0].test_loss, history[0].test_acc))

    content = torch.load(path, weights_only=True)
    damaged: list[Any] = [3, {}, {"mean": [0.5]}, {"mean": [0.5], "std": [0.0]}, {"mean": [0.5] * 3, "std": [1.0] * 3}]
    for value in damaged:
        torch.save(content | {"normalization": value}, path)
        with pytest.raises(CheckpointError, match="damaged: this is not a normalization:"):
            read_checkpoint(path)
    del content["normalization"]  # as in an old file
    torch.save(content, path)
    assert read_checkpoint(path).normalization is None


def test_a_checkpoint_of_images_as_they_are_has_no_normalization(tmp_path: Path) -> None:
    train(new_model("lenet", 0, CPU), sample(16, 8), small_recipe(epochs=1), Where(CPU), tmp_path)
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pt")
    assert checkpoint.normalization is None
    save_checkpoint(
        tmp_path / "other.pt", dataclasses.replace(checkpoint, channels=3, normalization=Normalization((0.5,) * 3, (1.0,) * 3))
    )
    assert read_checkpoint(tmp_path / "other.pt").normalization == Normalization((0.5,) * 3, (1.0,) * 3)


def test_metrics_from_before_there_was_a_test_loss_load() -> None:
    old = {"epoch": 1, "loss": 2.0, "train_acc": 0.5, "test_acc": 0.25, "images_per_s": 10.0, "seconds": 1.0}
    assert (EpochMetrics(**old).test_loss, EpochMetrics(**old).lr, EpochMetrics(**old).test_top5) == (None, None, None)
    assert EpochMetrics(**old).as_dict() == old
    with pytest.raises(TypeError, match="test_loss is a str"):
        EpochMetrics(**old, test_loss="1")


def test_the_default_recipe_is_that_of_runs_before_there_were_recipes() -> None:
    """A checkpoint that lacks the fields therefore resumes bit-identically."""
    recipe = Recipe()
    assert {name: getattr(recipe, name) for name in RECIPES["d2l"]} == RECIPES["d2l"]
    assert recipe.lr == LEARNING_RATES["d2l"]["alexnet"]
    assert all(fields.keys() == RECIPES["d2l"].keys() for fields in RECIPES.values())
    assert LEARNING_RATES.keys() == RECIPES.keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup": 3.5, "epochs": 3}, r"--warmup of 3\.5 epochs does not fit into a run of 3"),
        ({"nesterov": True}, "--nesterov needs a --momentum above 0"),
        *(({name: value}, f"--{name.replace('_', '-')} cannot be") for name, value in [
            ("warmup", -1.0), ("schedule", "linear"), ("label_smoothing", 1.5), ("label_smoothing", float("nan")),
            ("class_weights", "equal"), ("class_weights", None), ("nesterov", 1), ("normalize", "yes"),
        ]),
    ],
    ids=str,
)  # fmt: skip
def test_recipes_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


def test_lines_of_a_run_have_learning_rate_and_test_loss(tmp_path: Path) -> None:
    history = train(new_model("lenet", 0, CPU), sample(40, 20), small_recipe(schedule="cosine", epochs=2), Where(CPU), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    schedule = Schedule("cosine", 0.1, 2)
    assert [line["lr"] for line in lines] == [schedule.at(2, STEPS), schedule.at(5, STEPS)]
    assert [line["test_loss"] for line in lines] == [m.test_loss for m in history]
    assert all(line["test_loss"] > 0 for line in lines)
