"""Several processes of torchrun train what one process trains on the same batches; signals, kills and restarts."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from typer.testing import CliRunner

import kernels
from alexnet_triton import FusedSequential
from alexnet_triton.cli import app as cli
from alexnet_triton.data.fashion_mnist import load_fashion_mnist
from alexnet_triton.optim import SGD
from alexnet_triton.training.checkpoint import read_checkpoint
from alexnet_triton.training.distributed import ALONE, Processes, joined, leave
from alexnet_triton.training.networks import new_model
from alexnet_triton.training.recipe import Recipe, Where
from alexnet_triton.training.trainer import Trainer
from kernels.runtime import launch

from ...conftest import DEVICE
from ..data.test_image_folder import write_folder
from .test_resume import contents, flat
from .test_signals import read_until, start
from .train_worker import RUNS, run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif("ttsem" in sys.modules, reason="the processes started here would not run under ttsem"),
]

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of train_worker in two processes."""
    folder = tmp_path_factory.mktemp("two")
    process = start(*TORCHRUN, Path(__file__).with_name("train_worker.py"), folder)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_trains(name: str, two_processes: Path, tmp_path: Path) -> None:
    """Results agree within rounding: gradients are summed in another order, and in bfloat16 rounded before the sum."""
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
    """The two processes' losses, weighted by their numbers of images, give the epoch's loss."""
    shown = [json.loads((two_processes / f"progress{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["own"] for each in shown] == [13, 7]  # shares of batches of 3, and of a last batch of 2
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
    assert not torch.equal(*states)  # each process draws its own dropout masks


def test_a_loss_that_is_not_finite_in_one_process_stops_both(two_processes: Path) -> None:
    messages = [(two_processes / f"message{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert messages[0].startswith("epoch 1: the loss of step 2 of 3 is not finite; there is no checkpoint yet")
    assert list((two_processes / "broken").iterdir()) == []


def test_the_command_in_two_processes_prints_once_and_a_signal_saves(tmp_path: Path) -> None:
    """torchrun forwards SIGTERM to both processes. A single process cannot resume a run of two."""
    out = tmp_path / "run"
    options = ("--model", "lenet", "--data", "sample", "--limit", "17", "--batch-size", "8", "--device", "cpu")
    process = start(*TORCHRUN, "-m", "alexnet_triton", "train", *options, "--epochs", "100000", "--out", out)
    read_until(process, "epoch   1 ")
    other = CliRunner().invoke(cli.app, ["train", "--resume", str(out)])
    assert (other.exit_code, other.output) == (1, f"alexnet-triton: {out}: another run is writing into it\n")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = [line for line in output.splitlines() if line]
    assert all(line.startswith("epoch ") for line in lines[:-1])
    assert [int(line.split()[1]) for line in lines[:-1]] == list(range(2, len(lines) + 1))
    assert lines[-1].startswith("SIGTERM: stopped in epoch ")
    assert lines[-1].endswith(f"; resume with: alexnet-triton train --resume {out} in 2 processes")
    checkpoint = read_checkpoint(out / "checkpoint.pt")
    assert checkpoint.metrics == [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert f"in epoch {len(checkpoint.metrics) + 1} " in lines[-1]
    assert {p.name for p in out.iterdir()} == {"checkpoint.pt", "best.pt", "metrics.jsonl"}

    before = (out / "checkpoint.pt").read_bytes()
    alone = CliRunner().invoke(cli.app, ["train", "--resume", str(out), "--backend", "torch"])
    assert alone.exit_code == 1
    assert "was trained with processes 2, this run has 1" in alone.output
    assert (out / "checkpoint.pt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data", "option"])
def test_what_all_processes_find_wrong_is_said_once(kind: str, tmp_path: Path) -> None:
    """Each process decodes the folder of images and checks the options; an error that all find is printed once."""
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
    """Repeated signals: Slurm signals torchrun and its processes, torchrun forwards the signal, then Ctrl-C comes again.

    torchrun turns the second signal into SIGTERM. The resumed run is bit-identical to an uninterrupted one.
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


#: Options of runs in several processes: lenet, with 8 batches of 8 images and one of 3 per epoch.
OPTIONS = (
    *("--model", "lenet", "--data", "sample", "--limit", 67, "--batch-size", 8, "--epochs", 3, "--device", "cpu"),
    *("--lr", 0.5, "--momentum", 0.9, "--augment"),
)


def state_of(out: Path) -> list[Any]:
    """Metrics, weights and trainer state in the last checkpoint of ``out``, to compare."""
    kept = read_checkpoint(out / "checkpoint.pt")
    assert kept.training is not None
    return flat([kept.metrics, kept.weights, kept.training["trainer"]])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """:func:`state_of` an uninterrupted run with ``OPTIONS`` in two processes on one machine."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(*TORCHRUN, "-m", "alexnet_triton", "train", *OPTIONS, "--out", out)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return state_of(out)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(undisturbed: list[Any], tmp_path: Path) -> None:
    """torchrun ends the other process and starts both again; the resumed run is bit-identical to an undisturbed one."""
    script, out = Path(__file__).with_name("restart_worker.py"), tmp_path / "run"
    command = (*OPTIONS, "--out", out, "--resume", "--checkpoint-every", 4)
    process = start(*TORCHRUN, "--max-restarts=1", script, tmp_path, "train", *command)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.splitlines()[0] == f"{out} holds no run yet: a new run begins there"
    assert f"resumed from {out / 'checkpoint.pt'} after 1 whole epoch(s)" in output
    # The last checkpoint was saved after step 9 + 3 of the run; the second attempt begins there.
    lines = [(tmp_path / f"steps-{rank}").read_text().split("\n")[1:] for rank in (0, 1)]
    first, second = [[list(map(int, line.split())) for line in attempts] for attempts in zip(*lines, strict=True)]
    assert first[1] == [*range(9), *range(5)]
    assert first[0] in ([*range(9), *range(5)], [*range(9), *range(6)])
    assert second == [[*range(3, 9), *range(9)]] * 2
    assert state_of(out) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_machines_train_what_one_trains(undisturbed: list[Any], tmp_path: Path) -> None:
    """Two torchrun agents, started as in the documentation except for the addresses; rendezvous decides which one leads."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"--rdzv-endpoint=127.0.0.1:{server.getsockname()[1]}"
    agent = (*TORCHRUN[:2], "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", endpoint, "--rdzv-id=alexnet")
    command = (*agent, "-m", "alexnet_triton", "train", *OPTIONS, "--out", tmp_path / "run")
    machines = [start(*command) for _ in range(2)]
    results = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], results
    assert sorted(output.count("epoch   3 ") for output, _ in results) == [0, 1]  # only rank 0 prints
    assert state_of(tmp_path / "run") == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_four_processes_train_what_one_trains_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    """Sums of more than two gradients depend on their order, which must be the same in the first step after resuming."""
    worker = start(*TORCHRUN[:-1], "--nproc-per-node=4", Path(__file__).with_name("train_worker.py"), tmp_path, "four")
    _, errors = worker.communicate(timeout=200)
    assert worker.returncode == 0, errors
    with kernels.use_backend("torch"):
        run(tmp_path / "alone", ALONE)
    weights = read_checkpoint(tmp_path / "partial" / "checkpoint.pt").weights
    for key, weight in read_checkpoint(tmp_path / "alone" / "checkpoint.pt").weights.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-4, atol=1e-5)
    whole = contents(tmp_path / "whole")
    assert [contents(tmp_path / call) for call in ("2", "5")] == [whole, whole]


def test_shares_are_a_batch() -> None:
    for size in (1, 2, 3, 5):
        for images in (0, 1, 2, 7, 15):
            index = torch.arange(images)
            shares = [Processes(rank, size).share(index) for rank in range(size)]
            assert torch.equal(torch.cat(shares), index)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.fixture
def group_of_one() -> Iterator[Processes]:
    """A process group of this process alone, which all-reduces its gradients nevertheless."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield Processes(grouped=True)
    leave()


def test_a_group_of_one_process_trains_what_it_trains_alone(group_of_one: Processes, tmp_path: Path) -> None:
    with kernels.use_backend("torch"):
        for processes in (ALONE, group_of_one):
            run(tmp_path / str(processes.grouped), processes, "bfloat16", dropout=0.5)
    assert contents(tmp_path / "True") == contents(tmp_path / "False")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_captured_step_holds_the_all_reduce(dtype: torch.dtype, group_of_one: Processes) -> None:
    """In an NCCL group of one, captured steps equal eager steps and a run without a group bit for bit."""
    cuda = torch.device("cuda", 0)
    data = load_fashion_mnist("sample").train.limited(150)
    recipe = Recipe("alexnet", batch_size=64, lr=0.01, momentum=0.9, schedule="cosine")
    results = []
    for processes, graph in ((ALONE, False), (group_of_one, False), (group_of_one, True)):
        trainer = Trainer(new_model("alexnet", 0, cuda, dtype), data, recipe, Where(cuda, graph, processes))
        assert (trainer.replay is not None) == graph
        assert (trainer.parallel is not trainer.net) == processes.grouped
        generator = torch.Generator(cuda).manual_seed(0)
        torch.manual_seed(0)
        epochs = [trainer.epoch(generator, number)[:2] for number in (1, 2)]
        results.append(flat([epochs, trainer.float32_weights()]))
        del trainer
    assert results[0] == results[1] == results[2]


def test_the_buckets_of_alexnet_overlap_its_backward_pass(group_of_one: Processes) -> None:
    """Large linear layers have their own buckets and are reduced first; the bucket with conv1's gradients is the last."""
    net = new_model("alexnet", 0, torch.device("cpu"), torch.float32)
    parallel = group_of_one.parallel(net, torch.device("cpu"))
    with kernels.use_backend("torch"):
        for _ in range(3):  # DDP records the order of gradients in the first pass, and logs the third
            parallel(torch.randn(1, 1, 224, 224)).sum().backward()
    buckets = (("20.bias", "20.weight", "17.bias", "17.weight"), ("14.bias", "14.weight"))
    buckets += (
        ("10.weight", "10.bias", "8.weight"),
        ("8.bias", "6.weight", "6.bias", "3.weight"),
        ("3.bias", "0.weight", "0.bias"),
    )
    sizes = [sum(net.get_parameter(name).nbytes for name in bucket) for bucket in buckets]
    assert parallel._get_ddp_logging_data()["rebuilt_bucket_sizes"] == ", ".join(map(str, sizes))


def test_one_launch_steps_the_views_of_buckets(group_of_one: Processes) -> None:
    net = FusedSequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    net.to(device=DEVICE, memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    parallel, launched = group_of_one.parallel(net, torch.device(DEVICE)), []
    ours, theirs = SGD(net.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(4, 1, 6, 6, device=DEVICE)
        for each, called, optimizer in ((net, parallel, ours), (other, other, theirs)):
            each.zero_grad()
            called(x).square().sum().backward()
            if optimizer is ours:
                assert len({p.grad.untyped_storage().data_ptr() for p in net.parameters()}) == 1
                with launch.observe_launches(lambda *launch: launched.append(launch)):
                    optimizer.step()
            else:
                optimizer.step()
    assert any(p.grad.data_ptr() % 16 for p in net.parameters())
    assert len(launched) == 3
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


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
