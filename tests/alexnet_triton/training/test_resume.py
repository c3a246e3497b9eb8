"""A resumed run is bit-identical to an uninterrupted one; checkpoints that do not belong to the run are refused."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from alexnet_triton.data.augment import EVERYTHING, NOTHING, Augment
from alexnet_triton.data.fashion_mnist import load_fashion_mnist
from alexnet_triton.training import files
from alexnet_triton.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    read_checkpoint,
    save_checkpoint,
)
from alexnet_triton.training.evaluation import Evaluation
from alexnet_triton.training.listener import SILENT, Listener
from alexnet_triton.training.loop import train
from alexnet_triton.training.metrics import EpochMetrics
from alexnet_triton.training.recipe import Where
from alexnet_triton.training.signals import Stopped

from .listeners import Asked
from .test_checkpoint import file_size_limit
from .test_training import HAS_GPU, needs_a_gpu, sample, small_net, small_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@dataclasses.dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.float32
    momentum: float = 0.0
    dropout: float = 0.0
    augment: Augment = NOTHING
    graph: bool = False
    device: torch.device = CPU


CASES = {
    "plain": Case(),
    "momentum": Case(momentum=0.9),
    "dropout": Case(dropout=0.5),
    "augment": Case(augment=EVERYTHING),
    "resized_crop": Case(augment=Augment(crop="resized")),
    "augment-resized_crop": Case(augment=Augment(flip=True, crop="resized", colour=True)),
    "bfloat16": Case(torch.bfloat16),
    "float16-momentum": Case(torch.float16, momentum=0.9),
    "bfloat16-all": Case(torch.bfloat16, momentum=0.9, dropout=0.5, augment=EVERYTHING),
    "gpu-all": Case(torch.bfloat16, momentum=0.9, dropout=0.5, augment=EVERYTHING, device=CUDA),
    "gpu-graph-all": Case(torch.bfloat16, momentum=0.9, dropout=0.5, augment=EVERYTHING, graph=True, device=CUDA),
}
cases = pytest.mark.parametrize(
    "case", [pytest.param(c, id=n, marks=[needs_a_gpu] * (c.device == CUDA)) for n, c in CASES.items()]
)

#: 40 training images are three steps and 20 test images two batches: the run asks five times per epoch whether to stop.
ASKED = 5


def run(
    case: Case,
    out: Path,
    epochs: int = 2,
    stop: Callable[[], bool] | None = None,
    resume: Checkpoint | None = None,
    listener: Listener = SILENT,
    checkpoint_every: int | None = None,
    **fields: Any,
) -> list[EpochMetrics]:
    """Train a small network; ``fields`` override the case's recipe."""
    out.mkdir(exist_ok=True)
    torch.manual_seed(5)
    net = small_net(case.dropout).to(case.device, case.dtype, memory_format=torch.channels_last)
    recipe = small_recipe(**{"augment": case.augment, "momentum": case.momentum, "seed": 5, "epochs": epochs} | fields)
    recipe = dataclasses.replace(recipe, dtype=str(case.dtype).removeprefix("torch."))
    where = Where(case.device, case.graph, checkpoint_every=checkpoint_every)
    listener = listener if stop is None else Asked(stop)
    with kernels.use_backend("auto" if HAS_GPU else "torch"):
        return train(net, sample(40, 20), recipe, where, out, listener, resume)


class Saved(Listener):
    """Keeps the place (epoch and step) of each saved checkpoint."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def saved(self, line: str) -> None:
        self.places.append(line.split(":")[0])


@cases
def test_checkpoints_in_the_middle_of_an_epoch_change_no_bit(case: Case, tmp_path: Path) -> None:
    """A checkpoint is saved every so many steps of the run, except at the end of an epoch, which has its own."""
    run(case, tmp_path / "whole")
    for every, places in (
        (2, ["saved in epoch 1 after step 2 of 3", "saved in epoch 2 after step 1 of 3"]),
        (3, []),
        (4, ["saved in epoch 2 after step 1 of 3"]),
    ):
        listener = Saved()
        run(case, tmp_path / str(every), listener=listener, checkpoint_every=every)
        assert listener.places == places
        assert contents(tmp_path / str(every)) == contents(tmp_path / "whole")


def resume(case: Case, out: Path, epochs: int = 2, **options: Any) -> list[EpochMetrics]:
    """Resume the run in ``out`` as a new process would: with other random states."""
    torch.manual_seed(99)
    return run(case, out, epochs, resume=read_checkpoint(out / "checkpoint.pt"), **options)


def at(call: int) -> Callable[[], bool]:
    """A function that returns True at its ``call``-th call."""
    calls = iter(range(1, call + 1))
    return lambda: next(calls) == call


def flat(value: Any) -> list[Any]:
    """All values in nested dicts and lists as one list; tensors as bytes, without times and speeds."""
    if isinstance(value, dict):
        return [x for key, each in sorted(value.items()) if key not in ("seconds", "images_per_s") for x in (key, *flat(each))]
    if isinstance(value, list | tuple):
        return [x for each in value for x in flat(each)]
    return [value.contiguous().view(torch.uint8).numpy().tobytes() if isinstance(value, torch.Tensor) and value.ndim else value]


def before_recipes(training: dict[str, Any]) -> dict[str, Any]:
    """A current training state in the format of versions without recipes."""
    recipe, options = training["recipe"], training["options"]
    kept = {name: recipe[name] for name in ("model", "batch_size", "momentum", "seed", "flip", "crop", "colour")}
    configuration = kept | {"dtype": f"torch.{recipe['dtype'].replace('tf32', 'float32')}"} | training["configuration"]
    # A caller of train() without a command line had no options.
    old = {"configuration": configuration, "options": recipe | options if options else {}}
    return {name: value for name, value in training.items() if name != "recipe"} | old


def with_one_flag_of_augmentation(settings: dict[str, Any]) -> None:
    """Change ``settings`` to those of an old version, with one flag for all parts of the augmentation."""
    parts = {part: settings.pop(part) for part in ("flip", "crop", "colour") if part in settings}
    if parts:
        settings["augment"] = parts["flip"]


def contents(out: Path) -> list[Any]:
    """The contents of a run's files, without times and without the number of epochs asked for when they were written."""
    files = [read_checkpoint(out / name) for name in ("checkpoint.pt", "best.pt")]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for file in files:
        assert file.training is not None
        file.training.get("recipe", {}).pop("epochs", None)
    return [flat([f.model, f.metrics, f.weights, f.training]) for f in files] + [flat(lines)]


@cases
def test_a_resumed_run_has_the_same_bits(case: Case, tmp_path: Path) -> None:
    """The run stops before the first step, within an epoch, before and in its evaluation, at its end, in the next epoch."""
    run(case, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    for call in (1, 3, 4, 5, 6, 7):
        out = tmp_path / str(call)
        with pytest.raises(Stopped, match=f"in epoch {(call - 1) // ASKED + 1} (after step|before its evaluation)"):
            run(case, out, stop=at(call))
        resume(case, out)
        assert contents(out) == expected, call


def test_a_run_that_is_stopped_again_and_again_has_the_same_bits(tmp_path: Path) -> None:
    """The run stops at every third question: after two steps, in the evaluation, right after it, ..."""
    case = CASES["bfloat16-all"]
    run(case, tmp_path / "whole")
    stops = []
    with pytest.raises(Stopped) as stopped:
        run(case, tmp_path / "parts", stop=at(3))
    stops.append(str(stopped.value))
    for _ in range(4):
        with pytest.raises(Stopped) as stopped:
            resume(case, tmp_path / "parts", stop=at(3))
        stops.append(str(stopped.value))
    resume(case, tmp_path / "parts", stop=at(3))
    epoch = ["after step 2 of 3", "before its evaluation"]
    assert stops == [
        *(f"in epoch 1 {at}" for at in epoch),
        "in epoch 2 after step 0 of 3",
        *(f"in epoch 2 {at}" for at in epoch),
    ]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@cases
def test_a_run_goes_on_after_its_last_epoch(case: Case, tmp_path: Path) -> None:
    run(case, tmp_path / "whole")
    history = run(case, tmp_path / "parts", epochs=1)
    more = resume(case, tmp_path / "parts", epochs=2)
    assert more[0] == history[0]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_the_comparison_sees_a_random_state_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would fail if resuming lost a part of the state: each kind of state is damaged in turn."""
    case = CASES["bfloat16-all"]
    run(case, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(case, tmp_path / "stopped", stop=at(3))
    whole = read_checkpoint(tmp_path / "stopped" / "checkpoint.pt")
    assert whole.training is not None
    for number, key in enumerate(("rng", "momentum", "order", "generator", "weights")):
        out = tmp_path / str(number)
        out.mkdir()
        state = copy.deepcopy(whole.training)
        weights = whole.weights
        if key == "generator":
            state["generator"] = torch.Generator().manual_seed(1).get_state()
        elif key == "weights":  # rounded to bfloat16, as without masters
            weights = {k: w.bfloat16().float() for k, w in weights.items()}
        elif key == "rng":
            state["trainer"]["processes"][0]["rng"] = torch.Generator().manual_seed(1).get_state()
        else:
            state["trainer"][key] = {"momentum": {}, "order": torch.arange(40)}[key]
        save_checkpoint(out / "checkpoint.pt", dataclasses.replace(whole, training=state, weights=weights))
        resume(case, out)
        assert contents(out)[0] != contents(tmp_path / "whole")[0], key


def test_metrics_that_were_written_after_the_checkpoint_are_not_there_twice(tmp_path: Path) -> None:
    """A crash between the writes of the two files, or a full disk, may leave an extra or partial line."""
    case = CASES["plain"]
    run(case, tmp_path, epochs=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "loss": 1')
    resume(case, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]


def test_the_best_checkpoint_is_that_of_the_first_epoch_with_the_highest_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.2, 0.5, 0.4, 0.5])
    monkeypatch.setattr("alexnet_triton.training.loop.evaluate", lambda *_, **__: Evaluation(1.0, next(accuracies), None))
    case = CASES["plain"]
    run(case, tmp_path, epochs=3)
    resume(case, tmp_path, epochs=4)
    assert [m["epoch"] for m in read_checkpoint(tmp_path / "best.pt").metrics] == [1, 2]
    assert [m["epoch"] for m in read_checkpoint(tmp_path / "checkpoint.pt").metrics] == [1, 2, 3, 4]


def test_the_learning_rate_may_be_changed_on_resuming(tmp_path: Path) -> None:
    case = CASES["momentum"]
    run(case, tmp_path, epochs=1)
    before = read_checkpoint(tmp_path / "checkpoint.pt").weights
    resume(case, tmp_path, lr=0.0)
    after = read_checkpoint(tmp_path / "checkpoint.pt").weights
    assert all(torch.equal(before[key], after[key]) for key in before)


OTHER = {
    "dtype": ({}, {"dtype": torch.bfloat16}, "dtype float32, this run has bfloat16"),
    "batch_size": ({"batch_size": 8}, {}, "batch_size 16, this run has 8"),
    "momentum": ({"momentum": 0.5}, {}, r"momentum 0.0, this run has 0.5"),
    "seed": ({"seed": 6}, {}, "seed 5, this run has 6"),
    "flip": ({"augment": Augment(flip=True)}, {}, "flip False, this run has True"),
    "crop": ({"augment": Augment(crop="resized")}, {}, "crop none, this run has resized"),
    "colour": ({"augment": Augment(colour=True)}, {}, "colour False, this run has True"),
    "model": ({"model": "alexnet"}, {}, "model lenet, this run has alexnet"),
}


@pytest.mark.parametrize("other", OTHER)
def test_a_checkpoint_of_another_configuration_is_refused(other: str, tmp_path: Path) -> None:
    options, changes, message = OTHER[other]
    case = CASES["plain"]
    run(case, tmp_path, epochs=1)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=f"checkpoint.pt: was trained with {message}"):
        resume(dataclasses.replace(case, **changes), tmp_path, **options)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("augment", [NOTHING, EVERYTHING], ids=str)
def test_a_run_from_before_the_parts_of_the_augmentation_had_flags_goes_on(augment: Augment, tmp_path: Path) -> None:
    """An old file has one flag for all parts; the run resumes with the same draws. A changed part is refused."""
    case = Case(augment=augment, dropout=0.5)
    run(case, tmp_path / "whole")
    run(case, tmp_path / "parts", epochs=1)
    for name in ("checkpoint.pt", "best.pt"):
        path = tmp_path / "parts" / name
        checkpoint = read_checkpoint(path)
        assert checkpoint.training is not None
        old = before_recipes(checkpoint.training)
        with_one_flag_of_augmentation(old["configuration"])
        assert old["configuration"]["augment"] is (augment == EVERYTHING)
        save_checkpoint(path, dataclasses.replace(checkpoint, training=old))
    with pytest.raises(CheckpointError, match=r"crop (none|pad), this run has resized"):
        resume(dataclasses.replace(case, augment=dataclasses.replace(augment, crop="resized")), tmp_path / "parts")
    resume(case, tmp_path / "parts")
    expected, found = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert (found[0], found[-1]) == (expected[0], expected[-1])


def test_other_classes_channels_and_images_are_refused(tmp_path: Path) -> None:
    run(CASES["plain"], tmp_path, epochs=1)
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pt")
    data = load_fashion_mnist("sample")
    recipe = small_recipe(epochs=2, seed=5)

    def refused(message: str, net: torch.nn.Module, split: Any) -> None:
        with pytest.raises(CheckpointError, match=message):
            train(net, dataclasses.replace(sample(0, 20), train=split), recipe, Where(CPU), tmp_path, resume=checkpoint)

    net = small_net()
    refused("training images 40, this run has 39", net, data.train.limited(39))
    moved = type(data.train)(data.train.images.flip(2), data.train.labels).limited(40)
    refused("data checksum", net, moved)
    net[-1] = torch.nn.Linear(16, 7)
    refused(r"its weights do not fit this lenet: 7\.bias is \(10,\), here \(7,\)", net, data.train.limited(40))
    net = small_net()
    net[0] = torch.nn.Conv2d(3, 8, 5, stride=2)
    refused(r"0\.weight is \(8, 1, 5, 5\), here \(8, 3, 5, 5\)", net, data.train.limited(40))
    refused(r"0\.bias is \(8,\), here nothing", net[3:], data.train.limited(40))


def test_weights_alone_and_damaged_states_are_refused(tmp_path: Path) -> None:
    case = CASES["plain"]
    run(case, tmp_path, epochs=1)
    whole = read_checkpoint(tmp_path / "checkpoint.pt")
    state = whole.training
    assert state is not None
    damaged: dict[str, Checkpoint] = {
        "cannot be resumed": dataclasses.replace(whole, training=None),
        "'configuration' is missing": dataclasses.replace(whole, training={}),
        "its training state does not load": dataclasses.replace(whole, training={**state, "trainer": {"order": 3}}),
        "its metrics are not valid": dataclasses.replace(whole, metrics=[{"epoch": 1}]),
        "loss is a str": dataclasses.replace(whole, metrics=[dict.fromkeys(whole.metrics[0], "1") | {"epoch": 1}]),
        "epoch is a float": dataclasses.replace(whole, metrics=[whole.metrics[0] | {"epoch": 1.0}]),
        "argument after ": dataclasses.replace(whole, metrics=[3]),
    }
    for message, checkpoint in damaged.items():
        with pytest.raises(CheckpointError, match=rf"checkpoint\.pt: .*{message}"):
            run(case, tmp_path, resume=checkpoint)


#: (place in the training state, a value that no run writes there, the error's message).
CRAFTED: dict[str, tuple[tuple[str | int, ...], object, str]] = {
    "trained_of_one": (("trained",), (1,), "missing 2 required"),
    "trained_of_strings": (("trained",), ("a", "b", "c"), "loss is a str"),
    "trained_number": (("trained",), 3, "must be an iterable"),
    "generator": (("generator",), torch.zeros(3), "generator|RNG|state"),
    "trainer": (("trainer",), [], "list indices"),
    "no_processes": (("trainer", "processes"), [], "processes is not a list of length 1"),
    "processes_of_none": (("trainer", "processes"), [None], "not subscriptable"),
    "processes_number": (("trainer", "processes"), 1, "processes is not a list of length 1"),
    "steps_float": (("trainer", "steps"), 1.0, "steps is not an integer from 0 to 3"),
    "steps_negative": (("trainer", "steps"), -1, "steps is not an integer from 0 to 3"),
    "steps_too_many": (("trainer", "steps"), 4, "steps is not an integer from 0 to 3"),
    "seconds": (("trainer", "seconds"), "1", "seconds is a str"),
    "order_of_others": (("trainer", "order"), torch.arange(40) + 1, "order is not a permutation of 40 images"),
    "order_twice": (("trainer", "order"), torch.zeros(40, dtype=torch.int64), "order is not a permutation of 40 images"),
    "order_short": (("trainer", "order"), torch.arange(39), "order is not a permutation of 40 images"),
    "order_float": (("trainer", "order"), torch.arange(40.0), "order is not a permutation of 40 images"),
    "order_list": (("trainer", "order"), [0], "order is not a permutation of 40 images"),
    "momentum_list": (("trainer", "momentum"), [], "momentum is a list"),
    "momentum_scalar": (
        ("trainer", "momentum", "0.weight"),
        torch.zeros(()),
        r"momentum of 0\.weight is \[\], not a tensor of",
    ),
    "loss_sums": (("trainer", "processes", 0, "loss_sums"), torch.zeros(1), r"loss_sums is \[1\], not a tensor of shape \[3\]"),
    "loss_sum": (("trainer", "processes", 0, "loss_sum"), 1.0, r"loss_sum is float, not a tensor of shape \[\]"),
    "rng": (("trainer", "processes", 0, "rng"), torch.zeros(3), "RNG|state"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_training_state_that_no_run_has_is_refused(name: str, tmp_path: Path) -> None:
    """The error comes before a step or a write: an index out of range would read arbitrary memory."""
    place, value, message = CRAFTED[name]
    case = CASES["momentum"]
    with pytest.raises(Stopped):
        run(case, tmp_path, stop=at(3))
    whole = read_checkpoint(tmp_path / "checkpoint.pt")
    at_place: Any = whole.training
    for key in place[:-1]:
        at_place = at_place[key]
    assert place[-1] in at_place
    at_place[place[-1]] = value
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        CheckpointError, match=rf"checkpoint\.pt: damaged: its training state does not load: .*({message})"
    ) as error:
        run(case, tmp_path, resume=whole)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_run_does_not_overwrite_another(tmp_path: Path) -> None:
    case = CASES["plain"]
    for name in ("checkpoint.pt", "best.pt", "metrics.jsonl"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_bytes(b"not ours, or damaged")
        with pytest.raises(CheckpointError, match="already holds a run"):
            run(case, out)
        assert (out / name).read_bytes() == b"not ours, or damaged"


def test_a_full_disk_stops_training_and_the_run_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second epoch cannot be saved and the first stays; with space again, the resumed run is bit-identical."""
    case = CASES["bfloat16-all"]
    run(case, tmp_path / "whole")
    real = files.write
    writes = 0

    def write(path: Path, content: bytes) -> None:
        nonlocal writes
        writes += 1
        with file_size_limit(1000) if writes > 1 else contextlib.nullcontext():
            real(path, content)

    monkeypatch.setattr(files, "write", write)
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(case, tmp_path / "full")
    assert len(read_checkpoint(tmp_path / "full" / "checkpoint.pt").metrics) == 1
    assert not list((tmp_path / "full").glob("*.partial"))
    monkeypatch.setattr(files, "write", real)
    resume(case, tmp_path / "full")
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")
