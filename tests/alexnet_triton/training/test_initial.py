"""Fine-tuning: weights from files, frozen layers, torchvision's network; and early stopping."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

import kernels
from alexnet_triton import AlexNet
from alexnet_triton.training import networks
from alexnet_triton.training.checkpoint import CheckpointError, frozen_of, read_checkpoint
from alexnet_triton.training.initial import Kept, read_weights, take_weights
from alexnet_triton.training.loop import train
from alexnet_triton.training.metrics import EpochMetrics, is_finished
from alexnet_triton.training.networks import freeze, load_checkpoint, new_model
from alexnet_triton.training.recipe import Recipe, Where
from alexnet_triton.training.signals import Stopped
from alexnet_triton.training.trainer import Trainer

from ...conftest import DEVICE
from ..command import run_here
from ..data.test_image_folder import write_folder
from .listeners import Asked
from .test_resume import contents, flat
from .test_training import CPU, sample, small_net, small_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ("--model", "lenet", "--data", "sample", "--limit", "24", "--batch-size", "8", "--device", "cpu", "--backend", "torch")


def begin(out: str, *options: str, cwd: Path) -> str:
    """Start a run in ``out``; returns the output of ``train``."""
    result = run_here("train", *SHORT, "--out", out, *options, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out / "checkpoint.pt").weights


# ------------------------------------------------------------------------------------------------------------ --init


def test_files_of_every_kind_give_the_same_weights(tmp_path: Path) -> None:
    begin("run", "--epochs", "1", cwd=tmp_path)
    expected = weights(tmp_path / "run")
    torch.save(expected, tmp_path / "a.pth")
    torch.save(expected, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # torchvision's AlexNet is such a file
    safetensors.torch.save_file(expected, tmp_path / "a.safetensors")
    for name in ("run", "run/checkpoint.pt", "a.pth", "old.pth", "a.safetensors"):
        found = read_weights(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_runs_best_checkpoint_is_taken(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "best.pt")
    torch.save({"w": torch.zeros(1)}, tmp_path / "checkpoint.pt")
    assert read_weights(tmp_path)["w"] == 1


def _module(path: Path) -> None:
    torch.save(nn.Linear(1, 1), path)


NO_WEIGHTS: dict[str, tuple[Any, str]] = {
    "absent": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), r"neither best\.pt nor checkpoint\.pt"),
    "numbers": (lambda path: torch.save({"a": 1}, path), "not a state_dict"),
    "list": (lambda path: torch.save([torch.ones(1)], path), "not a state_dict"),
    "empty": (lambda path: torch.save({}, path), "not a state_dict"),
    "module": (_module, "holds more than tensors and numbers"),
    "text": (lambda path: path.write_text("features"), "not "),
    "lines": (
        lambda path: path.write_text("root:x:0:0:root:/root:/bin/bash\n"),
        "torch.save did not write it, or it is damaged$",
    ),
    "no bytes": (lambda path: path.touch(), "torch.save did not write it, or it is damaged$"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_no_weights_is_one_line(kind: str, suffix: str, tmp_path: Path) -> None:
    make, message = NO_WEIGHTS[kind]
    path = tmp_path / f"file{suffix}"
    make(path)
    if suffix == ".safetensors" and kind not in ("absent", "folder"):
        message = "cannot be read"
    with pytest.raises(CheckpointError, match=message) as error:
        read_weights(path)
    assert str(error.value).startswith(f"{path}: ")
    result = run_here("train", *SHORT, "--init", str(path), "--out", str(tmp_path / "run"))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_without_safetensors_a_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        read_weights(tmp_path / "a.safetensors")


def test_what_does_not_fit_is_new_as_in_a_new_network() -> None:
    """From 10 classes and one channel to 5 classes and three channels, the first and the last layer are new."""
    trained, net = (new_model("lenet", seed, CPU, classes=n, channels=c) for seed, n, c in ((1, 10, 1), (2, 5, 3)))
    new = new_model("lenet", 2, CPU, classes=5, channels=3).state_dict()
    kept = take_weights(net, trained.state_dict() | {"other": torch.ones(1)})
    assert kept == Kept(6, 10, ("0", "11"), 1)
    assert str(kept) == "kept 6 of 10 tensors; new: 0, 11; 1 unknown to the network"
    for name, weight in net.state_dict().items():
        expected = new if name.split(".")[0] in kept.new else trained.state_dict()
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_another_dtype_are_rounded(dtype: torch.dtype) -> None:
    trained, net = new_model("lenet", 1, CPU), new_model("lenet", 2, CPU, dtype)
    assert take_weights(net, trained.state_dict()).tensors == 10
    assert torch.equal(net[0].weight, trained[0].weight.to(dtype))  # type: ignore[index]
    assert take_weights(trained, {"0.weight": torch.ones(6, 1, 5, 5, dtype=torch.int64)}).tensors == 0


@pytest.mark.slow
def test_a_fine_tuned_run_is_resumed_without_the_file(tmp_path: Path) -> None:
    begin("first", "--epochs", "1", cwd=tmp_path)
    torch.save(weights(tmp_path / "first"), tmp_path / "w.pth")
    said = begin("whole", "--init", "w.pth", "--seed", "3", "--epochs", "2", cwd=tmp_path)
    assert f"began with {tmp_path / 'w.pth'}: kept 10 of 10 tensors; new: none" in said.splitlines()
    begin("parts", "--init", "w.pth", "--seed", "3", "--epochs", "1", cwd=tmp_path)
    (tmp_path / "w.pth").rename(tmp_path / "v.pth")
    other = run_here("train", "--resume", "parts", "--init", "v.pth", "--epochs", "2", cwd=tmp_path)
    assert other.returncode == 2
    assert "--init" in other.stderr
    resumed = run_here("train", "--resume", "parts", "--epochs", "2", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "began with" not in resumed.stdout
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    # The run did begin with the file's weights: an epoch from scratch with the same seed gives others.
    begin("scratch", "--seed", "3", "--epochs", "1", cwd=tmp_path)
    assert not torch.equal(weights(tmp_path / "scratch")["0.weight"], weights(tmp_path / "parts")["0.weight"])


def test_a_file_of_which_nothing_fits_says_which_network_it_is_of(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.ones(64, 3, 11, 11)}, tmp_path / "w.pth")
    result = run_here("train", *SHORT, "--init", "w.pth", cwd=tmp_path)
    assert result.returncode == 1
    assert "none of its 1 tensors fits lenet: give --model torchvision" in result.stderr


# -------------------------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("channels", [1, 3])
def test_torchvisions_network(channels: int) -> None:
    """The model has torchvision's keys and initialization; torchvision's weights fit except for other classes and channels."""
    net = new_model("torchvision", 4, CPU, classes=7, channels=channels)
    torch.manual_seed(4)
    plain = torchvision.models.alexnet(num_classes=7)
    state = net.state_dict()
    assert list(state) == list(plain.state_dict())
    assert state["features.0.weight"].shape == (64, channels, 11, 11)
    same = [torch.equal(state[name], value) for name, value in plain.state_dict().items() if "features.0" not in name]
    assert all(same)
    with torch.device("meta"):
        official = torchvision.models.alexnet()
    official = {name: torch.rand(value.shape) for name, value in official.state_dict().items()}
    kept = take_weights(net, official)
    assert kept.new == (("classifier.6",) if channels == 3 else ("features.0", "classifier.6"))
    assert torch.equal(state["features.3.weight"], official["features.3.weight"])


def test_torchvisions_network_is_trained_evaluated_and_resumed(tmp_path: Path) -> None:
    """Trains on a folder of colour images with frozen convolutions, resumes, and evaluates the checkpoint."""
    write_folder(tmp_path / "images", train=2, tests=1)
    options = ("--model", "torchvision", "--data", "images", "--workers", "0", "--batch-size", "4", "--backend", "torch")
    options += ("--device", "cpu", "--freeze", "features", "--lr", "0.001")
    result = run_here("train", *options, "--epochs", "1", "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "torchvision on " in result.stdout
    assert "the convolutions are frozen at random weights" in result.stdout
    first = weights(tmp_path / "run")
    resumed = run_here("train", "--resume", "run", "--epochs", "2", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    last = weights(tmp_path / "run")
    assert last["features.0.weight"].shape == (64, 3, 11, 11)
    assert {name for name in first if torch.equal(first[name], last[name])} == {n for n in first if n.startswith("features")}
    net, kept = load_checkpoint(tmp_path / "run" / "checkpoint.pt", CPU)
    assert kept.model == "torchvision"
    assert all(torch.equal(value, last[name]) for name, value in net.state_dict().items())
    said = run_here("evaluate", "run/checkpoint.pt", "--data", "images", "--device", "cpu", "--backend", "torch", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    accuracy = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["test_acc"]
    assert f"test accuracy {accuracy:.4f}" in said.stdout


def test_without_torchvision_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    result = run_here("train", *SHORT, "--model", "torchvision", "--out", "run", cwd=tmp_path)
    assert result.returncode == 1
    assert "pip install torchvision" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- --freeze


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_frozen_layers_keep_their_bits_and_the_optimizer_knows_nothing_of_them(dtype: torch.dtype, tmp_path: Path) -> None:
    """Momentum and weight decay do not move frozen weights. A run stopped in an epoch and resumed is bit-identical."""
    fields: dict[str, Any] = {"dtype": dtype, "freeze": "features", "momentum": 0.9, "weight_decay": 0.1, "epochs": 2}
    recipe = small_recipe(**fields)

    def run(folder: Path, **options: Any) -> nn.Module:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(7)
        net = small_net(0.5).to(dtype)
        freeze(net, "features")
        with kernels.use_backend("torch"):
            train(net, sample(40, 8), recipe, Where(CPU), folder, **options)
        return net

    net = run(tmp_path / "whole")
    torch.manual_seed(7)
    before = small_net().to(dtype)
    assert torch.equal(net[0].weight, before[0].weight)  # type: ignore[index]
    assert torch.equal(net[0].bias, before[0].bias)  # type: ignore[index]
    assert not torch.equal(net[4].weight, before[4].weight)  # type: ignore[index]
    kept = read_checkpoint(tmp_path / "whole" / "checkpoint.pt").training
    assert kept is not None
    assert kept["trainer"]["momentum"].keys() == {"4.weight", "4.bias", "7.weight", "7.bias"}
    calls = iter(range(1, 100))
    with pytest.raises(Stopped):
        run(tmp_path / "parts", listener=Asked(lambda: next(calls) == 3))
    run(tmp_path / "parts", resume=read_checkpoint(tmp_path / "parts" / "checkpoint.pt"))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_new_convolution_is_trained_and_the_others_are_the_files_to_the_bit(dtype: str, tmp_path: Path) -> None:
    """The same holds in half precision and in a resumed run."""
    file = new_model("lenet", 1, CPU).state_dict() | {"0.weight": torch.ones(6, 3, 5, 5)}
    torch.save(file, tmp_path / "w.pth")
    options = ("--init", "w.pth", "--freeze", "features", "--dtype", dtype, "--momentum", "0.9")
    said = begin("whole", *options, "--epochs", "2", cwd=tmp_path)
    assert [line for line in said.splitlines() if "is new" in line] == ["0 is new: it is trained"]
    begin("parts", *options, "--epochs", "1", cwd=tmp_path)
    result = run_here("train", "--resume", "parts", "--epochs", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    found, new = weights(tmp_path / "whole"), new_model("lenet", 0, CPU).state_dict()
    same = {name for name, value in found.items() if torch.equal(value, file[name])}
    assert same == {"3.weight", "3.bias"}
    assert not torch.equal(found["0.weight"], new["0.weight"].to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_learning_rate_of_0_keeps_the_files_weights_to_the_bit(dtype: str, tmp_path: Path) -> None:
    file = new_model("lenet", 1, CPU).state_dict()
    torch.save(file, tmp_path / "w.pth")
    begin("run", "--init", "w.pth", "--lr", "0", "--dtype", dtype, "--epochs", "1", cwd=tmp_path)
    assert all(torch.equal(value, file[name]) for name, value in weights(tmp_path / "run").items())


def test_which_layers_are_frozen_is_the_checkpoints_and_all_of_an_older_one(tmp_path: Path) -> None:
    net = small_net()
    freeze(net, "features", [])
    recipe = small_recipe(freeze="features", init="w.pth", epochs=1)
    with kernels.use_backend("torch"):
        train(net, sample(8, 8), recipe, Where(CPU), tmp_path)
        kept = read_checkpoint(tmp_path / "checkpoint.pt")
        assert kept.training is not None
        assert frozen_of(kept) == kept.training["configuration"]["frozen layers"] == []
        train(net, sample(8, 8), recipe, Where(CPU), tmp_path, resume=kept)
        freeze(net, "features")
        with pytest.raises(CheckpointError, match=r"was trained with frozen layers \[\], this run has \['0'\]"):
            train(net, sample(8, 8), recipe, Where(CPU), tmp_path, resume=kept)
        del kept.training["configuration"]["frozen layers"]
        assert frozen_of(kept) is None
        train(net, sample(8, 8), recipe, Where(CPU), tmp_path, resume=kept)
        with pytest.raises(ValueError, match="the frozen layers of net are not those of freeze='features'"):
            train(small_net(), sample(8, 8), recipe, Where(CPU), tmp_path, resume=kept)
    kept.training["configuration"]["frozen layers"] = "0"
    with pytest.raises(CheckpointError, match="damaged: 'frozen layers' does not hold names"):
        frozen_of(kept)


def test_a_network_that_is_not_frozen_as_the_recipe_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the frozen layers of net are not those of freeze='features'"):
        train(small_net(), sample(8, 8), small_recipe(freeze="features"), Where(CPU), tmp_path)
    net = small_net()
    freeze(net, "features")
    with pytest.raises(ValueError, match="the frozen layers of net are not those of freeze='none'"):
        train(net, sample(8, 8), small_recipe(), Where(CPU), tmp_path)


def test_a_step_of_the_kernels_with_frozen_layers(launches: list[str]) -> None:
    """The step updates the other layers as PyTorch does, within rounding, and computes no gradient of a frozen filter."""
    trainers = []
    for backend in ("torch", "triton"):
        torch.manual_seed(7)
        net = small_net().to(DEVICE)
        freeze(net, "features")
        with kernels.use_backend(backend):  # type: ignore[arg-type]
            trainer = Trainer(net, sample(16, 0).train, small_recipe(freeze="features"), Where(torch.device(DEVICE)))
            trainer.step(trainer.index[:8])
        trainers.append(trainer)
    assert not [name for name in launches if "wgrad" in name]
    assert "_linear_narrow_backward_kernel" in launches
    for one, other in zip(*(trainer.net.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(one, other)


def test_all_convolutions_are_features() -> None:
    for net in (AlexNet(), networks.build_model("torchvision", 3, 3)):
        freeze(net, "features")
        frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
        convolutions = {name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)}
        assert len(convolutions) == 5
        assert frozen == {f"{name}.{part}" for name in convolutions for part in ("weight", "bias")}


# ------------------------------------------------------------------------------------------------------- --early-stop


def history(*losses: float | None) -> list[EpochMetrics]:
    return [EpochMetrics(i + 1, 1.0, 0.5, 0.5, 10.0, 1.0, loss) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "early_stop", "finished"),
    [
        ((), 1, False),
        ((1.0,), 1, False),
        ((1.0, 0.9), 1, False),
        ((1.0, 1.0), 1, True),  # an equal loss is not better
        ((1.0, 1.1, 0.9, 1.0), 2, False),
        ((1.0, 1.1, 0.9, 1.0, 0.95), 2, True),
        ((1.0, math.nan), 1, True),
        ((math.nan, 1.0), 1, False),
        ((None, None, None), 1, False),  # from a version that did not record test losses
        ((None, None, 1.0), 1, False),
        ((None, 1.0, 2.0), 1, True),
        ((1.0, 2.0, 3.0), None, False),
    ],
)
def test_when_a_run_is_finished(losses: tuple[float | None, ...], early_stop: int | None, finished: bool) -> None:
    assert is_finished(history(*losses), 10, early_stop) is finished
    assert is_finished(history(*losses), len(losses), early_stop)


def test_a_run_that_stops_early_is_complete_and_can_be_told_to_go_on(tmp_path: Path) -> None:
    """With a learning rate of 0 the test loss never improves. A resumed run counts the epochs before it."""
    said = begin("whole", "--lr", "0", "--early-stop", "3", "--epochs", "9", cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    early = f"stopped early: 3 epoch(s) without a better test loss than the {lines[0]['test_loss']:.4f} of epoch 1"
    assert early in said.splitlines()
    begin("parts", "--lr", "0", "--early-stop", "3", "--epochs", "2", cwd=tmp_path)
    resumed = run_here("train", "--resume", "parts", "--epochs", "9", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert flat([weights(tmp_path / name) for name in ("parts", "whole")]) == flat([weights(tmp_path / "whole")] * 2)
    again = run_here("train", "--resume", "parts", cwd=tmp_path)
    assert again.returncode == 0
    assert again.stdout == f"parts: {early}; to train longer: --resume parts --early-stop N\n"
    more = run_here("train", "--resume", "parts", "--early-stop", "4", cwd=tmp_path)
    assert "epoch   5 " in more.stdout
    assert "epoch   6 " not in more.stdout


def test_a_loss_of_another_version_is_no_part_of_its_line() -> None:
    assert "test_loss" not in history(None)[0].as_dict()
    assert history(2.0)[0].as_dict()["test_loss"] == 2.0
    assert Recipe().early_stop is None


@pytest.mark.slow
def test_a_missing_picture_of_a_run_that_stopped_early_is_drawn(tmp_path: Path) -> None:
    begin("run", "--lr", "0", "--early-stop", "1", "--epochs", "9", cwd=tmp_path)
    (tmp_path / "run" / "curves.png").unlink()
    result = run_here("train", "--resume", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "but some files are missing" in result.stdout
    assert (tmp_path / "run" / "curves.png").exists()
