"""Two processes of torchrun train what one trains on the same batches; the command line among them, and its end by a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kernels
from alexnet_triton.cli import app as cli
from alexnet_triton.training.checkpoint import read_checkpoint
from alexnet_triton.training.distributed import ALONE, Processes, joined
from alexnet_triton.training.recipe import Where

from ..data.test_image_folder import write_folder
from .test_resume import contents, flat
from .test_signals import read_until, start
from .train_worker import RUNS, run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif("ttsem" in sys.modules, reason="processes that would not run under it"),
]

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two processes left what train_worker does."""
    folder = tmp_path_factory.mktemp("two")
    process = start(*TORCHRUN, Path(__file__).with_name("train_worker.py"), folder)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_trains(name: str, two_processes: Path, tmp_path: Path) -> None:
    """Losses, accuracies and weights, within rounding: gradients are summed in another order, in bfloat16 rounded before."""
    with kernels.use_backend("torch"):
        alone = run(tmp_path, ALONE, name)
    together = read_checkpoint(two_processes / name / "checkpoint.pt")
    half = RUNS[name][2] == torch.bfloat16
    for ours, theirs in zip(together.metrics, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs.loss, rel=1e-2 if half else 1e-5)
        if not half:
            assert (ours["train_acc"], ours["test_acc"]) == (theirs.train_acc, theirs.test_acc)
    weights = read_checkpoint(tmp_path / "checkpoint.pt").weights
    for key, weight in weights.items():
        torch.testing.assert_close(together.weights[key], weight, rtol=1e-2 if half else 1e-4, atol=1e-2 if half else 1e-5)
    assert (two_processes / name / "metrics.jsonl").read_text().count("\n") == 2


def test_the_loss_that_a_bar_shows_is_that_of_the_images_that_its_process_has_seen(two_processes: Path) -> None:
    """Both together make the epoch's; each alone is no half of it."""
    shown = [json.loads((two_processes / f"progress{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["own"] for each in shown] == [13, 7]  # of batches of 3, and a last one of 2
    for each in shown:
        assert [seen for seen, _ in each["shown"]] == [3, 6, 9, 12, 15, 18, 20]
    together = sum(each["own"] * each["shown"][-1][1] for each in shown) / 20
    assert together == pytest.approx(shown[0]["loss"], rel=1e-5)


def test_a_checkpoint_that_one_process_is_asked_for_is_saved_by_both(two_processes: Path) -> None:
    said = [(two_processes / f"saved{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].startswith("saved in epoch 1 after step 1 of ")
    assert contents(two_processes / "asked") == contents(two_processes / "whole")


def test_a_resumed_run_of_two_processes_has_the_same_bits(two_processes: Path) -> None:
    whole = contents(two_processes / "whole")
    for call in ("2", "5"):
        assert contents(two_processes / call) == whole
    training = read_checkpoint(two_processes / "whole" / "checkpoint.pt").training
    assert training is not None
    states = [process["rng"] for process in training["trainer"]["processes"]]
    assert len(states) == 2
    assert not torch.equal(*states)  # masks of its own in each


def test_a_loss_that_is_not_finite_in_one_process_stops_both(two_processes: Path) -> None:
    messages = [(two_processes / f"message{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert messages[0].startswith("epoch 1: the loss of step 2 of 3 is not finite; there is no checkpoint yet")
    assert list((two_processes / "broken").iterdir()) == []


def test_the_command_in_two_processes_prints_once_and_a_signal_saves(tmp_path: Path) -> None:
    """torchrun hands SIGTERM on to both. One process alone cannot go on with what two began."""
    out = tmp_path / "run"
    options = ("--model", "lenet", "--data", "sample", "--limit", "17", "--batch-size", "8", "--device", "cpu")
    process = start(*TORCHRUN, "-m", "alexnet_triton", "train", *options, "--epochs", "100000", "--out", out)
    read_until(process, "epoch   1 ")
    other = CliRunner().invoke(cli.app, ["train", "--resume", str(out)])
    assert (other.exit_code, other.output) == (1, f"alexnet-triton: {out}: another run goes on in it\n")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = [line for line in output.splitlines() if line]
    assert all(line.startswith("epoch ") for line in lines[:-1])
    assert [int(line.split()[1]) for line in lines[:-1]] == list(range(2, len(lines) + 1))
    assert lines[-1].startswith("SIGTERM: stopped in epoch ")
    assert lines[-1].endswith(f"; go on with: alexnet-triton train --resume {out} in 2 processes")
    checkpoint = read_checkpoint(out / "checkpoint.pt")
    assert checkpoint.metrics == [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert f"in epoch {len(checkpoint.metrics) + 1} " in lines[-1]
    assert {p.name for p in out.iterdir()} == {"checkpoint.pt", "best.pt", "metrics.jsonl"}

    before = (out / "checkpoint.pt").read_bytes()
    alone = CliRunner().invoke(cli.app, ["train", "--resume", str(out), "--backend", "torch"])
    assert alone.exit_code == 1
    assert "was trained with processes 2, this run has 1" in alone.output
    assert (out / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("kind", ["data", "option"])
def test_what_all_processes_find_wrong_is_said_once(kind: str, tmp_path: Path) -> None:
    """Each decodes a folder of images for itself, each sees that it cannot do what an option says."""
    image = write_folder(tmp_path / "images", train=2, tests=1) / "train" / "sky" / "00.png"
    image.write_bytes(b"no image")
    options = ("--data", tmp_path / "images", "--workers", "0") if kind == "data" else ("--data", "sample", "--graph")
    command = ("-m", "alexnet_triton", "train", "--model", "lenet", "--device", "cpu", *options, "--out", tmp_path / "run")
    output, errors = start(*TORCHRUN, *command).communicate(timeout=120)
    assert output == (f"reading the images of {tmp_path / 'images'}\n" if kind == "data" else "")
    assert errors.count(f"alexnet-triton: {image}: " if kind == "data" else "a CUDA graph needs a CUDA device") == 1, errors
    assert [each.name for each in tmp_path.iterdir()] == ["images"]


@pytest.mark.slow
def test_signals_that_come_again_while_it_saves_lose_nothing(tmp_path: Path) -> None:
    """As from Slurm, which signals torchrun and its processes, and torchrun passes it on; then Ctrl-C again, impatiently.

    torchrun makes a SIGTERM of the second one. The run that goes on has the bits of one that never stopped.
    """
    script, out = Path(__file__).with_name("slow_disk_worker.py"), tmp_path / "run"
    options = ("--model", "lenet", "--data", "sample", "--limit", "17", "--batch-size", "8", "--device", "cpu")

    def torchrun(*arguments: object) -> subprocess.Popen[str]:
        return start(*TORCHRUN, script, tmp_path, "train", *arguments, start_new_session=True)

    process = torchrun(*options, "--epochs", 100000, "--out", out)
    read_until(process, "epoch   1 ")
    for rank in (0, 1):
        os.kill(int((tmp_path / f"pid-{rank}").read_text()), signal.SIGINT)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.1)
    output, errors = process.communicate(timeout=60)
    assert output.splitlines()[-1].startswith("SIGINT: stopped in epoch "), errors
    assert errors.count("closing signal SIGINT") == errors.count("closing signal SIGTERM") == 2
    assert {p.name for p in out.iterdir()} == {"checkpoint.pt", "best.pt", "metrics.jsonl"}

    epochs = len(read_checkpoint(out / "checkpoint.pt").metrics) + 1
    runs = (("--resume", out), (*options, "--out", tmp_path / "whole"))
    for process in [torchrun(*each, "--epochs", epochs) for each in runs]:  # both at once
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    resumed, whole = (read_checkpoint(folder / "checkpoint.pt") for folder in (out, tmp_path / "whole"))
    states = [flat([c.metrics, c.weights, c.training]) for c in (resumed, whole)]
    assert states[0] == states[1]


def test_shares_are_a_batch() -> None:
    for size in (1, 2, 3, 5):
        for images in (0, 1, 2, 7, 15):
            index = torch.arange(images)
            shares = [Processes(rank, size).share(index) for rank in range(size)]
            assert torch.equal(torch.cat(shares), index)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_graph_is_for_one_process() -> None:
    with pytest.raises(ValueError, match="a CUDA graph of the step is for one process, not for 2"):
        Where(torch.device("cuda"), graph=True, processes=Processes(0, 2))


def test_alone_needs_no_process_group() -> None:
    assert ALONE.leads
    assert ALONE.gather(3) == [3]
    assert ALONE.from_leader(lambda: 4) == 4
    assert ALONE.first_on_each_machine(lambda: 5) == 5
    assert ALONE.any(True)
    assert ALONE.any_of(True, False) == [True, False]
    assert not ALONE.any(False)
    assert os.environ.get("WORLD_SIZE", "1") == "1"


def test_a_launchers_only_process_gets_its_signals_repeated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined() as processes:
        assert processes is ALONE
        assert not processes.launched
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # as torchrun --nproc-per-node=1 sets it
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as processes:
        assert (processes.size, processes.launched) == (1, True)
