"""Speed of reading images for training: ``python -m benchmarks.stream``.

Ours and torchvision's ``ImageFolder`` with ``DataLoader`` read the same files, in turns. Options measure the memory of
streaming, the time to the first batch of large folders and, on a CUDA GPU, its JPEG decoder and a training step.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

import kernels
from alexnet_triton.data.image_folder import load_data
from alexnet_triton.data.image_workers import default_workers
from alexnet_triton.data.stream import Feed, StreamedSplit
from alexnet_triton.training.evaluation import synchronize
from alexnet_triton.training.files import check_writable, write_atomically
from alexnet_triton.training.listener import Listener
from alexnet_triton.training.networks import new_model
from alexnet_triton.training.recipe import Recipe, Where
from alexnet_triton.training.trainer import Trainer

from .host import environment

#: Target of images per second for sixteen cores and a GPU.
WANTED = 20_000

#: Side in pixels of the squares that the images become.
SIZE = 224

_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Amounts:
    """Sizes of the measurements.

    Attributes:
        side: side of the JPEGs in pixels.
        distinct: number of different JPEGs; all other names are links to them.
        images: images of an epoch.
        batch: images of a batch.
        rounds: how often each way of reading is timed.
        streamed: images that are streamed while memory is watched.
        listed: number of names of each folder whose time to the first batch is measured.
        per_class: names in a class.
        model: the network to train, as in :class:`Recipe`.
    """

    side: int = 256
    distinct: int = 256
    images: int = 3072
    batch: int = 128
    rounds: int = 5
    streamed: int = 100_000
    listed: tuple[int, ...] = (100_000, 1_000_000)
    per_class: int = 1000
    model: str = "alexnet"


#: The many workers of a GPU's host read these images in a second or two.
ON_GPU = Amounts(images=25_600, per_class=100)

#: For a dry run, which only shows that everything runs.
TINY = Amounts(side=64, distinct=4, images=24, batch=8, rounds=1, streamed=64, listed=(40,), per_class=10, model="lenet")


def jpegs(count: int, side: int, seed: int = 0) -> list[bytes]:
    """``count`` JPEGs of quality 90 with noise of four scales, so that the files are about as large as photographs'."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        pixels = torch.zeros(1, 3, side, side)
        for cells, weight in ((4, 0.45), (16, 0.3), (64, 0.19), (side, 0.06)):
            noise = torch.rand(1, 3, cells, cells, generator=generator)
            pixels += weight * interpolate(noise, (side, side), mode="bicubic")
        file = io.BytesIO()
        Image.fromarray((pixels[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


@contextlib.contextmanager
def made_folder(names: int, amounts: Amounts) -> Iterator[Path]:
    """A folder of images for :func:`load_data`, with ``names`` training images and one test image of each class.

    The folder is in memory, since the disk is not measured.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm") as temporary:
        folder = Path(temporary)
        originals = [folder / f"{i}.jpg" for i in range(amounts.distinct)]
        for path, data in zip(originals, jpegs(amounts.distinct, amounts.side), strict=True):
            path.write_bytes(data)
        for first in range(0, names, amounts.per_class):
            for part, count in (("train", min(amounts.per_class, names - first)), ("test", 1)):
                own = folder / part / f"{first // amounts.per_class:04}"
                own.mkdir(parents=True)
                for i in range(first, first + count):
                    os.link(originals[i % amounts.distinct], f"{own}/{i:07}.jpg")
        yield folder


def _streamed(folder: Path, workers: int, **options: Any) -> StreamedSplit:
    split = load_data(folder, size=SIZE, channels=3, stream=True, workers=workers, **options).train
    assert isinstance(split, StreamedSplit)
    return split


def _shuffled(split: StreamedSplit, batch: int) -> Sequence[Tensor]:
    return split.source.order(torch.Generator().manual_seed(0)).split(batch)


def _ours(folder: Path, workers: int, batch: int) -> int:
    split = _streamed(folder, workers)
    with contextlib.closing(Feed(split, _shuffled(split, batch), _CPU)) as feed:
        return sum(len(index) for _, index in feed)


def _torchvisions(transform: Callable[[Any], Tensor], folder: Path, workers: int, batch: int) -> int:
    images = torchvision.datasets.ImageFolder(str(folder / "train"), transform)
    loader = torch.utils.data.DataLoader(images, batch, shuffle=True, num_workers=workers)
    return sum(len(labels) for _, labels in loader)


#: The same transform on Pillow's image, as in torchvision's own recipes, and on a tensor, as in :func:`read_image`.
_ON_IMAGE = v2.Compose([v2.Resize(SIZE, antialias=True), v2.CenterCrop(SIZE), v2.PILToTensor()])
_ON_TENSOR = v2.Compose([v2.PILToTensor(), v2.Resize(SIZE, antialias=True), v2.CenterCrop(SIZE)])

#: Ways to read an epoch: each takes the folder, the number of workers and the batch size, and returns the images read.
WAYS: dict[str, Callable[[Path, int, int], int]] = {
    "ours": _ours,
    "torchvision, on Pillow's image": functools.partial(_torchvisions, _ON_IMAGE),
    "torchvision, on a tensor": functools.partial(_torchvisions, _ON_TENSOR),
}


def speed(folder: Path, amounts: Amounts) -> list[dict[str, Any]]:
    """Images/s of whole epochs, start and end of processes included: a row for each number of workers and each way."""
    torch.set_num_threads(1)  # as in a worker
    rows = []
    for workers in (0, 1, 2):
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        for _, (way, read) in itertools.product(range(amounts.rounds), WAYS.items()):
            begin = time.perf_counter()
            count = read(folder, workers, amounts.batch)
            rates[way].append(count / (time.perf_counter() - begin))
        for way, found in rates.items():
            ratios = [ours / theirs for ours, theirs in zip(rates["ours"], found, strict=True)]
            row = {"workers": workers, "way": way, "images_per_s": statistics.median(found), "ours": statistics.median(ratios)}
            rows.append(row)
            print(
                f"{workers} workers {way:<32}{row['images_per_s']:>8,.0f} images/s, ours {row['ours']:.2f} times as fast",
                flush=True,
            )
    return rows


def resident_bytes() -> int:
    """Resident bytes of this process and its children; memory that several share counts once."""
    pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
    found = 0
    for pid in pids:
        match = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        assert match is not None  # Linux has it since 4.14
        found += 1024 * int(match[1])
    return found


def memory(folder: Path, amounts: Amounts) -> dict[str, Any]:
    """Resident bytes while streaming, looked at a hundred times: after the first hundredth, the most, and at the end."""
    split = _streamed(folder, 2)
    batches = _shuffled(split, amounts.batch)
    every = max(1, len(batches) // 100)
    with contextlib.closing(Feed(split, batches, _CPU)) as feed:
        seen = [resident_bytes() for number, _ in enumerate(feed, 1) if number % every == 0]
    found = {"images": len(split), "first_bytes": seen[0], "most_bytes": max(seen), "last_bytes": seen[-1]}
    first, most, last = (value / 1e6 for value in (seen[0], max(seen), seen[-1]))
    print(
        f"{len(split):,} images: {first:.0f} MB after {every * amounts.batch:,}, at most {most:.0f} ({most / first - 1:+.1%}), "
        f"{last:.0f} MB at the end ({last / first - 1:+.1%})",
        flush=True,
    )
    return found


def first_batch(folder: Path, batch: int) -> float:
    """Seconds from the start of listing to the first batch of a shuffled epoch."""
    begin = time.perf_counter()
    split = _streamed(folder, 2)
    listed = time.perf_counter() - begin
    with contextlib.closing(Feed(split, _shuffled(split, batch), _CPU)) as feed:
        next(iter(feed))
        seconds = time.perf_counter() - begin
    print(f"{len(split):,} names: first batch after {seconds:.2f} s, of which {listed:.2f} s to list them", flush=True)
    return seconds


def needs(one_worker: float) -> str:
    """What :data:`WANTED` images/s need at ``one_worker`` images/s a core: cores, a GPU's share of decoding, GB/s to it."""
    squares = WANTED * 3 * SIZE * SIZE
    return (
        f"by arithmetic: {WANTED:,} images/s take {WANTED / one_worker:.1f} cores like this one; 16 cores read "
        f"{16 * one_worker:,.0f}, and a GPU would decode the other {max(0, WANTED - 16 * one_worker):,.0f}; as squares they "
        f"are {squares / 1e9:.1f} GB/s from host to GPU"
    )


# ------------------------------------------------------------------------------------------------------------ with a GPU


def _batches_per_s(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Calls per second, after one untimed call."""
    function()
    synchronize(device)
    begin, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - begin < seconds:
        function()
        synchronize(device)
        calls += 1
    return calls / (time.perf_counter() - begin)


def gpu_decoder(device: torch.device, amounts: Amounts, seconds: float) -> dict[str, float]:
    """Images/s of ``torchvision.io.decode_jpeg`` on ``device`` in batches: decoding alone, and with resizing to squares."""
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in jpegs(amounts.batch, amounts.side)]

    def decoded() -> list[Tensor]:
        return torchvision.io.decode_jpeg(files, mode=torchvision.io.ImageReadMode.RGB, device=device.type)

    def squares() -> Tensor:
        return _ON_TENSOR.transforms[1](torch.stack(decoded()))

    found = {}
    for name, function in (("decoded", decoded), ("decoded and resized", squares)):
        found[name] = amounts.batch * _batches_per_s(function, device, seconds)
        print(f"decode_jpeg on {device}, {name}: {found[name]:,.0f} images/s", flush=True)
    return found


def feeds(folder: Path, device: torch.device, amounts: Amounts, workers: Sequence[int]) -> dict[int, float]:
    """Images/s that reach ``device`` for each number of ``workers``; the images per worker are the same for all."""
    found = {}
    for count in workers:
        split = _streamed(folder, count, limit=amounts.images * count // max(workers))
        begin = time.perf_counter()
        with contextlib.closing(Feed(split, _shuffled(split, amounts.batch), device)) as feed:
            images = sum(len(index) for _, index in feed)
        synchronize(device)
        found[count] = images / (time.perf_counter() - begin)
        print(f"{count} workers: {found[count]:,.0f} images/s on {device}", flush=True)
    return found


class _Waits(Listener):
    """Keeps the seconds that steps waited for images; 0 if the trainer does not report them."""

    seconds = 0.0

    def waited(self, seconds: float, of: float) -> None:
        self.seconds = seconds


def training(folder: Path, device: torch.device, amounts: Amounts, workers: int) -> dict[str, dict[str, float]]:
    """An epoch in bfloat16, with the step as a CUDA graph, on streamed images and on the same images in memory."""
    recipe = Recipe(amounts.model, channels=3, batch_size=amounts.batch, dtype="bfloat16")
    found = {}
    for name, stream in (("in memory", False), ("streamed", True)):
        data = load_data(folder, size=SIZE, channels=3, stream=stream, workers=workers, device=device)
        net = new_model(recipe.model, 0, device, torch.bfloat16, len(data.classes), 3)
        waits = _Waits()
        where = Where(device, graph=device.type == "cuda")
        trainer = Trainer(net, data.train, recipe, where, listener=waits)
        seconds = trainer.epoch(torch.Generator(device).manual_seed(0))[-1]
        rate = len(data.train) / seconds
        found[name] = {"images_per_s": rate, "seconds": seconds, "waited_s": waits.seconds}
        print(f"{recipe.model}, {name}: {rate:,.0f} images/s, waited {waits.seconds:.2f} of {seconds:.2f} s", flush=True)
    return found


def on_gpu(device: torch.device, amounts: Amounts) -> dict[str, Any]:
    """Speeds of a GPU's JPEG decoder, of its host's workers, and of training."""
    most = default_workers()
    counts = sorted({min(1 << i, most) for i in range(5)})
    with made_folder(amounts.images, amounts) as folder:
        return {
            "gpu_decoder": gpu_decoder(device, amounts, seconds=4.0 if device.type == "cuda" else 0.0),
            "feeds": feeds(folder, device, amounts, counts),
            "training": training(folder, device, amounts, most),
        }


def main() -> None:
    """Measure the chosen parts, print each result, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    parser.add_argument("--memory", action="store_true", help="measure only memory while 100,000 images are streamed")
    parser.add_argument("--listing", action="store_true", help="measure only the time to the first batch of large folders")
    parser.add_argument("--cuda", action="store_true", help="measure only the GPU's decoder, feeds and training")
    parser.add_argument("--backend", choices=["auto", "triton", "torch"], default="auto", help="backend of --cuda's training")
    parser.add_argument("--dry", action="store_true", help="run on tiny inputs, --cuda without a GPU, to show that all runs")
    arguments = parser.parse_args()
    if arguments.cuda and not (torch.cuda.is_available() or arguments.dry):
        sys.exit("stream: there is no CUDA GPU here; --dry walks through --cuda without one")
    if arguments.json is not None:
        check_writable(arguments.json)
    amounts = TINY if arguments.dry else ON_GPU if arguments.cuda else Amounts()
    device = torch.device("cuda" if arguments.cuda and torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"environment": environment(device) | {"cores": default_workers()}}
    print(", ".join(f"{name} {value}" for name, value in result["environment"].items() if value), flush=True)
    if arguments.cuda:
        with kernels.use_backend(arguments.backend):
            result["cuda"] = on_gpu(device, amounts)
    if arguments.memory:
        with made_folder(amounts.streamed, amounts) as folder:
            result["memory"] = memory(folder, amounts)
    if arguments.listing:
        result["listing"] = {}
        for names in amounts.listed:
            with made_folder(names, amounts) as folder:
                result["listing"][names] = first_batch(folder, amounts.batch)
    if not (arguments.cuda or arguments.memory or arguments.listing):
        with made_folder(amounts.images, amounts) as folder:
            result["speed"] = speed(folder, amounts)
        print(needs(next(row["images_per_s"] for row in result["speed"] if (row["workers"], row["way"]) == (1, "ours"))))
    if arguments.json is not None:
        write_atomically(arguments.json, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
