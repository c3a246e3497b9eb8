"""Fields of a recipe and values that it refuses; checkpoints of versions without recipes; very large numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

import pytest
import torch

import kernels
from alexnet_triton.cli.app import app
from alexnet_triton.training.checkpoint import Checkpoint, check_configuration, from_file, read_checkpoint, training_state
from alexnet_triton.training.recipe import MOST, Recipe, Where, allowed_of
from alexnet_triton.training.trainer import Trainer

from ..command import run_here
from .test_training import CPU, sample, small_net, small_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

#: A checkpoint of a run that stopped after two of the three steps of its second epoch, written on the CPU by the last version
#: without recipes (commit 126b075): train --model lenet --data sample --limit 40 --batch-size 16 --backend torch --augment
#: --crop resized --weight-decay 0.01 --lr 0.25 --seed 3 --epochs 2.
OLD = Path(__file__).with_name("old_checkpoint.pt")

#: SHA-256 of the weights, in the order of their names, after that version resumed the run up to a third epoch; and the sum of
#: each weight, for processors that round differently.
RESUMED = "8500f8d40035ace8e99ec6a11af1430c42a8f60201d506a52f1cbec339ecfead"
SUMS = {
    "0.weight": 0.22357815864961594,
    "0.bias": 0.2788714077323675,
    "3.weight": -7.225494920345227,
    "3.bias": 0.11225001560524106,
    "7.weight": -13.67558494716468,
    "7.bias": -0.053705676400568336,
    "9.weight": -15.616401004750514,
    "9.bias": 0.08259211225959007,
    "11.weight": -1.6946467757225037,
    "11.bias": 0.21029514074325562,
}


def test_a_checkpoint_from_before_recipes_is_resumed_to_the_bits_of_its_version(tmp_path: Path) -> None:
    """The weights are bit-identical on a processor with AVX-512; on others their sums agree to 1e-3."""
    (tmp_path / "run").mkdir()
    shutil.copy(OLD, tmp_path / "run" / "checkpoint.pt")
    refused = run_here("train", "--resume", "run", "--crop", "pad", cwd=tmp_path)
    assert refused.returncode == 2
    assert "has resized, not pad" in refused.stderr
    resumed = run_here("train", "--resume", "run", "--epochs", "3", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "after 1 whole epoch(s)" in resumed.stdout
    kept = read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert {name: weight.double().sum().item() for name, weight in kept.weights.items()} == pytest.approx(SUMS, abs=1e-3)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        digest = hashlib.sha256()
        for name in sorted(kept.weights):
            digest.update(kept.weights[name].numpy().tobytes())
        assert digest.hexdigest() == RESUMED
    assert kept.training is not None
    assert Recipe(**kept.training["recipe"]) == Recipe(
        "lenet", data="sample", limit=40, epochs=3, batch_size=16, lr=0.25, weight_decay=0.01, seed=3, flip=True,
        crop="resized", colour=True,
    )  # fmt: skip
    options: dict[str, Any] = {"recipe": "d2l", "backend": "torch", "workers": None, "graph": False, "tensorboard": False}
    options |= {"device": "cpu", "skip_damaged": False, "stream": False, "checkpoint_every": None}
    assert kept.training["options"] == options
    assert [metrics["lr"] for metrics in kept.metrics] == [0.25] * 3
    assert ["test_loss" in metrics for metrics in kept.metrics] == [False, True, True]


def test_a_checkpoint_from_before_recipes_is_evaluated() -> None:
    result = run_here("evaluate", str(OLD), "--data", "sample", "--limit", "40", "--device", "cpu", "--backend", "torch")
    assert result.returncode == 0, result.stderr
    assert "test accuracy 0.1000" in result.stdout


def test_the_recipe_of_a_run_without_a_command_line_is_that_of_its_configuration() -> None:
    """Versions without recipes kept no options of such a run: its learning rate and weight decay are not known."""
    old = read_checkpoint(OLD)
    assert old.training is not None
    old.training["options"] = {}
    state = training_state(dataclasses.replace(old, channels=3))
    assert from_file(Recipe, state["recipe"], OLD) == Recipe(
        "lenet", channels=3, batch_size=16, seed=3, flip=True, crop="resized", colour=True
    )
    assert state["configuration"].keys() == {"device", "processes", "training images", "data checksum"}


def test_a_field_that_a_checkpoint_lacks_has_its_default() -> None:
    """A field can thus be added later: its default must be the behaviour of earlier versions."""
    recipe = small_recipe()
    kept = dataclasses.asdict(recipe)
    del kept["momentum"]
    checkpoint = Checkpoint("lenet", [], [], {}, {"recipe": kept, "configuration": {}})
    check_configuration(checkpoint, recipe, {})
    with pytest.raises(ValueError, match=r"was trained with momentum 0\.0, this run has 0\.5"):
        check_configuration(checkpoint, dataclasses.replace(recipe, momentum=0.5), {})


def test_what_may_change_is_what_the_fields_say() -> None:
    assert {name for name, allowed in allowed_of(Recipe).items() if allowed.may_change} == {
        *("data", "early_stop", "epochs", "lr", "weight_decay")
    }


WRONG: list[tuple[str, Any]] = [
    *(("model", value) for value in ("vgg", None, 3)),
    *((name, value) for name in ("epochs", "batch_size", "limit") for value in (0, -1, 1.0, True, MOST + 1, "3")),
    *(
        (name, value)
        for name in ("lr", "momentum", "weight_decay")
        for value in (-0.1, float("nan"), float("inf"), None, "0.1", True)
    ),
    *(("seed", value) for value in (MOST + 1, -MOST - 2, 0.0, None)),
    *(("dtype", value) for value in ("auto", "float64", torch.float32)),
    *(("flip", value) for value in (1, None, "yes")),
    *(("crop", value) for value in ("centre", None)),
    *(("channels", value) for value in (2, "1", True, None)),
    *((name, value) for name in ("data", "init") for value in (3, Path("data"))),
    *(("validation", value) for value in (-0.1, 1.1, float("nan"), "0.2")),
    *(("freeze", value) for value in ("classifier", None, True)),
    *(("early_stop", value) for value in (0, -1, 1.0, MOST + 1)),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_a_recipe_refuses_what_no_command_line_can_give(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} cannot be "):
        Recipe(**{name: value})


def test_a_network_of_another_dtype_is_refused(tmp_path: Path) -> None:
    from alexnet_triton.training.loop import train

    with pytest.raises(ValueError, match=r"net has dtype torch\.float32, but the recipe says bfloat16"):
        train(small_net(), sample(8, 8), small_recipe(dtype=torch.bfloat16), Where(CPU), tmp_path)


# --------------------------------------------------------------------------------------------------------- large numbers


def _integers(command: Callable[..., object]) -> list[str]:
    """The parameters of a command whose type is int, optional int, or several ints."""
    hints = get_type_hints(command)
    return [name for name, kind in hints.items() if int in (kind, *get_args(kind), *map(get_origin, get_args(kind)))]


#: All integer options except tune's --batch and predict's --top, which their commands parse themselves.
INTEGERS = [
    (info.name, "--" + name.replace("_", "-"))
    for info in app.registered_commands
    for name in _integers(cast(Any, info.callback))
    if (info.name, name) not in (("tune", "batch"), ("predict", "top"))
]


def test_there_are_integer_options() -> None:
    expected = {("train", "--batch-size"), ("train", "--seed"), ("evaluate", "--limit"), ("summary", "--batch-size")}
    assert expected <= {*INTEGERS}


@pytest.mark.parametrize(("command", "option"), INTEGERS)
def test_an_integer_that_is_no_int64_is_refused_by_its_option(command: str, option: str, tmp_path: Path) -> None:
    arguments = {"evaluate": ["x.pt"], "predict": ["x.pt", "x.png"]}.get(command, [])
    result = run_here(command, *arguments, option, "9" * 20, cwd=tmp_path)
    assert result.returncode == 2
    assert option in result.stderr
    assert len(result.stderr.splitlines()) < 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch_size", [10**10, MOST])
@pytest.mark.parametrize("tests", [5, 70], ids=["fewer tests", "more tests"])
def test_a_batch_that_no_epoch_has_asks_for_no_memory(batch_size: int, tests: int) -> None:
    """Training, evaluation and compilation then use one batch of all images."""
    data = sample(16, tests)
    weights = []
    with kernels.use_backend("torch"):
        for size in (16, batch_size):
            torch.manual_seed(3)
            trainer = Trainer(small_net(), data.train, small_recipe(batch_size=size), Where(CPU), evaluated=data.test)
            trainer._walk()
            assert (trainer.index.numel(), trainer.loss_sums.numel()) == (16, 1)
            trainer.epoch(torch.Generator().manual_seed(1))
            weights.append(trainer.float32_weights())
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.parametrize("batch_size", [10**10, MOST])
def test_a_run_of_one_batch(batch_size: int, tmp_path: Path) -> None:
    options = ("--model", "lenet", "--data", "sample", "--limit", "8", "--device", "cpu", "--backend", "torch", "--epochs", "1")
    for name, size in (("large", batch_size), ("fitting", 8)):
        result = run_here("train", *options, "--batch-size", str(size), "--out", name, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    large, fitting = (read_checkpoint(tmp_path / name / "checkpoint.pt").weights for name in ("large", "fitting"))
    assert all(torch.equal(weight, fitting[name]) for name, weight in large.items())
