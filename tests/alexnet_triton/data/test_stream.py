"""Streamed images are bit-identical to images in memory, for any number of workers; images that cannot be read; stops."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from alexnet_triton.data import image_workers, reading
from alexnet_triton.data.dataset import DataError, Dataset, Split
from alexnet_triton.data.image_folder import load_data, load_test
from alexnet_triton.data.sources import Files
from alexnet_triton.data.stream import Feed, StreamedSplit
from alexnet_triton.training.checkpoint import read_checkpoint
from alexnet_triton.training.distributed import Processes
from alexnet_triton.training.evaluation import evaluate, predict_split
from alexnet_triton.training.loop import train
from alexnet_triton.training.networks import new_model
from alexnet_triton.training.recipe import Recipe, Where
from alexnet_triton.training.signals import Stopped
from alexnet_triton.training.trainer import Trainer

from ...conftest import DEVICE
from ..command import run_here
from ..training.listeners import Asked
from .test_image_folder import write_folder
from .test_shards import shards_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 20 training and 7 test images."""
    return write_folder(tmp_path_factory.mktemp("images") / "a", train=20, tests=7)


def load(folder: Path, stream: bool = True, **options: Any) -> Dataset[Any]:
    return load_data(folder, **({"size": 28, "channels": 3, "workers": 2, "stream": stream} | options))


def streamed(folder: Path, **options: Any) -> StreamedSplit:
    split = load(folder, **options).train
    assert isinstance(split, StreamedSplit)
    return split


def fed(split: StreamedSplit | Split, batches: list[Tensor], device: torch.device = CPU) -> list[tuple[Tensor, Tensor]]:
    """(images, labels) of each batch."""
    with contextlib.closing(Feed(split, batches, device)) as feed:
        return [(part.images[index].cpu().clone(), part.labels[index].cpu().clone()) for part, index in feed]


@pytest.mark.parametrize("workers", [0, 1, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_those_of_images_in_memory(channels: int, workers: int, folder: Path) -> None:
    split = streamed(folder, channels=channels, workers=workers)
    held = load(folder, stream=False, channels=channels).train
    order = torch.randperm(60)
    # More batches than the ring has slots, of several sizes; one batch has an image twice, one is empty.
    batches = [*order.split(7), torch.tensor([3, 3, 59]), torch.tensor([], dtype=torch.int64), order[:40]]
    for (ours, labels), batch in zip(fed(split, batches, torch.device(DEVICE)), batches, strict=True):
        assert torch.equal(ours, held.images[batch])
        assert torch.equal(labels, held.labels[batch])
    assert (len(split), split.channels, split.size) == (60, channels, 28)
    assert torch.equal(torch.cat([part.clone() for part in split.parts()]), held.images)
    assert torch.equal(split.image(17), held.images[17])


def test_fashion_mnist_streams_too() -> None:
    ours = load_data("sample", size=28, channels=1, stream=True, workers=1)
    held = load_data("sample", size=28, channels=1)
    assert isinstance(ours.train, StreamedSplit)
    order = torch.randperm(len(held.train))[:300]
    (images, labels), *_ = fed(ours.train, [order])
    assert torch.equal(images, held.train.images[order])
    assert torch.equal(labels, held.train.labels[order])
    test = load_test("sample", classes=held.classes, size=28, channels=1, limit=5, stream=True)
    assert (isinstance(test, StreamedSplit), len(test)) == (True, 5)


def test_normalization_is_that_of_images_in_memory(folder: Path, damaged: Path) -> None:
    """The normalization is computed from the images that can be read."""
    for images in (folder, damaged):
        found = [load(images, stream, skip_damaged=True).normalized().train.normalization for stream in (True, False)]
        assert found[0] == found[1]


def test_a_set_of_one_image_that_cannot_be_read(damaged: Path) -> None:
    with pytest.raises(DataError, match=r"1 images one after the other cannot be read: .*brick/00\.png: not an image"):
        fed(streamed(damaged, skip_damaged=True).limited(1), [torch.tensor([0])])


def test_what_does_not_fit_is_streamed_and_it_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    quiet = functools.partial(load, folder, stream=None, on_note=said.append)
    assert isinstance(quiet().train, Split)
    assert said == []
    monkeypatch.setattr(reading, "_free_bytes", lambda device: 100_000)
    data = quiet()
    assert isinstance(data.train, StreamedSplit)
    assert isinstance(data.test, Split)  # 21 images are 49 kB
    need, has = "60 images of 3 x 28 x 28 take 0.0 GB", "cpu has 0.0 GB for them"
    assert said == [f"{folder}/train: {need}, {has}: they are streamed (--no-stream forbids it)"]


def test_shards_are_read_as_the_folder_that_they_were_made_of(folder: Path, tmp_path: Path) -> None:
    """Shards have their own order (by shards and a buffer), in memory too, which differs from the folder's."""
    shards = tmp_path / "shards"
    for part in ("train", "test"):
        shards_of(folder / part, shards, 4)
    data, held = load(shards, buffer=5), load(shards, stream=False, buffer=5)
    assert isinstance(data.train, StreamedSplit)
    assert data.classes == load(folder).classes
    order = data.train.source.order(torch.Generator().manual_seed(3))
    assert torch.equal(order, held.train.order(torch.Generator().manual_seed(3)))
    assert sorted(order.tolist()) == list(range(60))
    for images, batch in zip(fed(data.train, [*order.split(9)]), order.split(9), strict=True):
        assert torch.equal(images[0], held.train.images[batch])
    losses, tensors = epochs(data)
    expected, others = epochs(held)
    assert losses == expected
    assert all(torch.equal(*pair) for pair in zip(tensors, others, strict=True))
    assert losses != epochs(load(shards, buffer=60))[0]


def test_the_order_in_memory_is_of_the_images_that_are_left(damaged: Path) -> None:
    held = load(damaged, stream=False, skip_damaged=True).train
    assert sorted(held.order(torch.Generator().manual_seed(0)).tolist()) == list(range(16)) == list(range(len(held)))


# ------------------------------------------------------------------------------------------------------------ training


RECIPE = Recipe(model="lenet", channels=3, batch_size=8, epochs=2, lr=0.1, momentum=0.9, flip=True, crop="pad")


def epochs(data: Dataset[Any], recipe: Recipe = RECIPE) -> tuple[list[tuple[float, float]], list[Tensor]]:
    """Losses and accuracies of two epochs and of an evaluation; weights and predictions."""
    torch.manual_seed(0)
    with kernels.use_backend("torch"):
        net = new_model("lenet", 0, CPU, torch.float32, len(data.classes), 3)
        trainer = Trainer(net, data.train, recipe, Where(CPU))
        generator = torch.Generator().manual_seed(0)
        found = [trainer.epoch(generator, i + 1)[:2] for i in range(2)]
        found.append(evaluate(net, data.test, batch_size=8, image_size=28, device=CPU))
        predictions = predict_split(net, data.test, batch_size=8, image_size=28, device=CPU)
    return found, [*net.parameters(), predictions.classes, predictions.true]


@pytest.mark.parametrize("options", [{}, {"class_weights": "balanced"}, {"normalize": True}], ids=str)
def test_training_gives_the_bits_of_images_in_memory(options: dict[str, Any], folder: Path) -> None:
    recipe = dataclasses.replace(RECIPE, **options)
    results = []
    for stream, workers in ((False, 0), (True, 0), (True, 1), (True, 4)):
        data = load(folder, stream=stream, workers=workers)
        results.append(epochs(data.normalized() if recipe.normalize else data, recipe))
    for losses, tensors in results[1:]:
        assert losses == results[0][0]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, results[0][1], strict=True))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
@pytest.mark.parametrize("graph", [True, False])
def test_captured_steps_read_what_is_streamed(graph: bool, folder: Path) -> None:
    """Captured steps read the slots of the ring, which are fewer than the batches; the smaller last batch runs eagerly."""
    cuda = torch.device("cuda")
    results = []
    for stream, workers in ((False, 0), (True, 2), (True, 5)):
        data = load(folder, stream=stream, workers=workers, device=cuda)
        torch.manual_seed(0)
        net = new_model("lenet", 0, cuda, torch.bfloat16, len(data.classes), 3)
        trainer = Trainer(net, data.train, dataclasses.replace(RECIPE, dtype="bfloat16"), Where(cuda, graph=graph))
        assert (trainer.replay is not None) == graph
        generator = torch.Generator(cuda).manual_seed(0)
        found: list[object] = [trainer.epoch(generator, i + 1)[:2] for i in range(3)]
        found.append(evaluate(net, data.test, batch_size=8, image_size=28, device=cuda))
        results.append(
            (found, [*net.parameters(), predict_split(net, data.test, batch_size=8, image_size=28, device=cuda).true])
        )
    for found, tensors in results[1:]:
        assert found == results[0][0]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, results[0][1], strict=True))


def run(folder: Path, out: Path, workers: int, stream: bool = True, listener: Any = None, resume: Any = None) -> list[Tensor]:
    torch.manual_seed(0)
    out.mkdir(exist_ok=True)
    with kernels.use_backend("torch"):
        data = load(folder, stream=stream, workers=workers)
        net = new_model("lenet", 0, CPU, torch.float32, len(data.classes), 3)
        train(net, data, RECIPE, Where(CPU), out, **({"listener": listener} if listener else {}), resume=resume)
    return list(net.parameters())


@pytest.mark.parametrize("stop_at", [1, 4, 9, 13])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(stop_at: int, folder: Path, tmp_path: Path) -> None:
    """The run stops within an epoch too, and resumes with another number of workers."""
    whole = run(folder, tmp_path / "whole", 2)
    calls = iter(range(1, 1000))
    with pytest.raises(Stopped):
        run(folder, tmp_path / "parts", 3, listener=Asked(lambda: next(calls) == stop_at))
    kept = read_checkpoint(tmp_path / "parts" / "checkpoint.pt")
    assert all(torch.equal(*pair) for pair in zip(whole, run(folder, tmp_path / "parts", 0, resume=kept), strict=True))


def test_processes_have_their_own_shares(folder: Path) -> None:
    """Each process reads only its own share; together they read every image once."""
    split = streamed(folder)
    order = torch.randperm(60)
    seen: list[int] = []
    for rank in range(4):
        share = Processes(rank, 4).share
        for batch, (images, labels) in zip(order.split(7), fed(split, [share(b) for b in order.split(7)]), strict=True):
            assert torch.equal(labels, split.labels[share(batch)])
            assert len(images) == len(share(batch))
            seen += share(batch).tolist()
    assert sorted(seen) == list(range(60))
    (none, _), *_ = fed(split, [order[:0], order[:0]])
    assert len(none) == 0


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "a", train=6, tests=3)
    for name in ("brick/00.png", "sky/03.png"):
        (folder / "train" / name).write_bytes(b"?")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_an_error_or_the_one_before_it_again(workers: int, damaged: Path) -> None:
    order = torch.arange(18)
    with pytest.raises(DataError, match=r"train/brick/00\.png: not an image"):
        fed(streamed(damaged, workers=workers), [order])
    split = streamed(damaged, workers=workers, skip_damaged=True)
    (images, labels), (last, _) = fed(split, [order[:15], order[15:]])
    assert torch.equal(images[0], images[1])  # the first image has none before it: the next one is taken
    assert labels[0] == 0
    assert torch.equal(last[0], split.image(16))  # image 15, sky/03, is the first of its batch
    assert {str(path.relative_to(damaged)) for path in split.skipped} == {"train/brick/00.png", "train/sky/03.png"}
    ((only, label),) = fed(split, [torch.tensor([15])])  # the batch has no other image: the next one of the set is taken
    assert torch.equal(only[0], split.image(16))
    assert label == 2
    for path in (damaged / "train").glob("*/*"):
        path.write_bytes(b"?")
    with pytest.raises(DataError, match=r"18 images one after the other cannot be read: .*not an image"):
        fed(split, [torch.tensor([15])])


def test_the_list_of_damaged_images(damaged: Path, tmp_path: Path) -> None:
    options = (
        "train",
        "--stream",
        "--model",
        "lenet",
        "--data",
        str(damaged),
        "--epochs",
        "1",
        "--backend",
        "torch",
        "--device",
        "cpu",
    )
    result = run_here(*options, "--skip-damaged", "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "images that cannot be read: " in result.stdout
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in sorted(lines)] == [
        str(damaged / "train" / n) for n in ("brick/00.png", "sky/03.png")
    ]
    result = run_here(*options, "--out", str(tmp_path / "other"))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert ".png: not an image" in result.stderr


def test_a_stop_does_not_wait_for_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk hangs, a request to stop is obeyed while a step waits for its images, and no worker is left."""
    monkeypatch.setattr(image_workers, "read_into", lambda *_: time.sleep(60))
    data = load(folder, workers=2)
    begin = time.monotonic()
    with kernels.use_backend("torch"):
        net = new_model("lenet", 0, CPU, torch.float32, len(data.classes), 3)
        trainer = Trainer(net, data.train, RECIPE, Where(CPU), listener=Asked(lambda: time.monotonic() > begin + 1))
        with pytest.raises(Stopped, match="after step 0 of 8"):
            trainer.epoch(torch.Generator().manual_seed(0))
    assert time.monotonic() < begin + 20
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_waiting_for_images_is_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[float, float]] = []
    read = Files.read

    class Told(Asked):
        def waited(self, seconds: float, of: float) -> None:
            waits.append((seconds, of))

    run(folder, tmp_path / "a", 2, listener=Told(lambda: False))
    monkeypatch.setattr(Files, "read", lambda *given: (time.sleep(0.1), read(*given))[1])
    waits.clear()
    run(folder, tmp_path / "b", 2, listener=Told(lambda: False))
    assert len(waits) == 2
    assert all(1 < seconds < of for seconds, of in waits)


def test_what_an_epoch_came_to_is_saved_when_an_image_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    """Once the image can be read again, the run resumes from there, bit-identical to an undisturbed run."""
    whole = run(folder, tmp_path / "whole", 2)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    order = streamed(copy).source.order(torch.Generator().manual_seed(RECIPE.seed))
    late = streamed(copy).source.name(int(order[45]))
    content = late.read_bytes()
    late.write_bytes(b"?")
    with pytest.raises(DataError, match=rf"{late.name}: not an image.*; the steps of epoch 1 so far are saved: "):
        run(copy, tmp_path / "parts", 2)
    kept = read_checkpoint(tmp_path / "parts" / "checkpoint.pt")
    assert kept.training is not None
    assert kept.training["trainer"]["steps"] == 5
    late.write_bytes(content)
    assert all(torch.equal(*pair) for pair in zip(whole, run(copy, tmp_path / "parts", 3, resume=kept), strict=True))


def test_predictions_are_of_the_images_that_were_there(damaged: Path) -> None:
    """Predictions and a run's pictures leave out the images that cannot be read."""
    (damaged / "test" / "grass" / "01.png").write_bytes(b"?")
    data = load(damaged, skip_damaged=True)
    with kernels.use_backend("torch"):
        net = new_model("lenet", 0, CPU, torch.float32, len(data.classes), 3)
        said = predict_split(net, data.test, batch_size=4, image_size=28, device=CPU)
        found = evaluate(net, data.test, batch_size=4, image_size=28, device=CPU)
        expected = evaluate(net, load(damaged, False, skip_damaged=True).test, batch_size=4, image_size=28, device=CPU)
    assert said.index.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(said.labels, data.test.labels[said.index])
    assert found == pytest.approx(expected)
    for path in (damaged / "test").glob("*/*"):
        path.write_bytes(b"?")
    with kernels.use_backend("torch"), pytest.raises(DataError, match="none of 9 images can be read"):
        evaluate(net, data.test, batch_size=4, image_size=28, device=CPU)


@pytest.mark.slow
def test_signals_to_all_processes_stop_a_run_as_one_does(folder: Path, tmp_path: Path) -> None:
    """`timeout` and batch systems send signals to all processes of a group."""
    how = ("--stream", "--model", "lenet", "--epochs", "1000", "--backend", "torch", "--device", "cpu", "--workers", "3")
    command = [sys.executable, "-m", "alexnet_triton", "train", *how, "--data", str(folder), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert any(line.startswith("epoch   1") for line in process.stdout)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert (process.returncode, error) == (143, "")
    assert (tmp_path / "out" / "checkpoint.pt").exists()
