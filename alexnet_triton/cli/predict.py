"""``alexnet-triton predict``: the most probable classes of image files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import kernels

from ..data.dataset import DataError
from ..data.image_files import read_images
from ..models import IMAGE_SIZE
from ..training.checkpoint import CheckpointError
from ..training.evaluation import classify
from ..training.trainer import load_checkpoint
from .options import BackendChoice, BackendOption, BatchOption, DeviceOption, console, fail, usable_device


def predict_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint.pt or best.pt of `train`.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, of any format that Pillow reads.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to print for each image, the most probable first.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: {file: {class: probability}}.")] = False,
    backend: BackendOption = BackendChoice.auto,
    batch_size: BatchOption = 128,
    device: DeviceOption = "auto",
) -> None:
    """The most probable classes of image files, with their probabilities.

    The shorter side of an image is made as long as that of the images that the network was trained on, and the middle is cut
    out. A file that cannot be read is named, the others are still classified, and the exit code is 1.
    """
    where = usable_device(device)
    errors: list[DataError] = []
    found: dict[str, dict[str, float]] = {}
    try:
        net, kept = load_checkpoint(checkpoint, where)
        with kernels.use_backend(backend.value):
            # Batch by batch, so that thousands of photographs are never in memory at once.
            for begin in range(0, len(images), batch_size):
                pixels, paths, failed = read_images(images[begin : begin + batch_size], kept.channels, kept.size)
                errors += failed
                if not paths:
                    continue
                probabilities = classify(net, pixels, batch_size=batch_size, image_size=IMAGE_SIZE[kept.model], device=where)
                for path, row in zip(paths, probabilities, strict=True):
                    values, order = row.topk(min(top, len(kept.classes)))
                    found[str(path)] = {kept.classes[i]: p for i, p in zip(order.tolist(), values.tolist(), strict=True)}
    except (CheckpointError, OSError, RuntimeError) as error:
        raise fail(error) from error
    if as_json:
        print(json.dumps(found))
    else:
        width = max(map(len, kept.classes))
        for name, classes in found.items():
            console.print(name, markup=False)
            for label, probability in classes.items():
                console.print(f"  {label:{width}}  {probability:.4f}", markup=False)
    if errors:
        for unreadable in errors[:-1]:
            fail(unreadable)
        raise fail(errors[-1])
