"""``alexnet-triton predict``: the most probable classes of image files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

import kernels

from ..data.dataset import DataError
from ..data.image_files import find_images, read_images
from ..models import IMAGE_SIZE
from ..training.checkpoint import CheckpointError
from ..training.evaluation import classify
from .network import RunArgument, load_run
from .options import BackendChoice, BackendOption, BatchOption, DeviceOption, console, fail, usable_device


def image_files(paths: list[Path]) -> tuple[list[Path], list[DataError]]:
    """``paths`` with each folder replaced by its images, and an error for each folder that is unreadable or has no images."""
    files: list[Path] = []
    errors: list[DataError] = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        unreadable: list[DataError] = []
        found, _ = find_images(path, unreadable.append)
        files += found
        errors += unreadable
        if not found and not unreadable:
            errors.append(DataError(f"{path}: no image files in it"))
    return files, errors


def predict_command(
    run: RunArgument,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE",
            help="Image files of any format that Pillow reads, or folders, which are searched with their subfolders.",
        ),
    ],
    top: Annotated[
        int,
        typer.Option(min=1, help="Print this many classes per image, the most probable first.", rich_help_panel="Output"),
    ] = 5,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: {file: {class: probability}}.", rich_help_panel="Output")
    ] = False,
    backend: BackendOption = BackendChoice.auto,
    batch_size: BatchOption = 128,
    device: DeviceOption = "auto",
) -> None:
    """Print the most probable classes of images.

    Each image is resized so that its shorter side matches the images that the network was trained on, and the middle is cut
    out. A file or folder that cannot be read is reported in one line. The other images are still classified, and the exit code
    is 1.
    """
    where = usable_device(device)
    found: dict[str, dict[str, float]] = {}
    try:
        net, kept = load_run(run, where)
        files, errors = image_files(images)
        with kernels.use_backend(backend.value):
            # Batch by batch, so that thousands of photographs are never in memory at once.
            for begin in range(0, len(files), batch_size):
                pixels, paths, failed = read_images(files[begin : begin + batch_size], kept.channels, kept.size)
                errors += failed
                if not paths:
                    continue
                probabilities = classify(
                    net,
                    pixels,
                    batch_size=len(paths),
                    image_size=IMAGE_SIZE[kept.model],
                    device=where,
                    normalization=kept.normalization,
                )
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
    for unreadable in errors:
        fail(unreadable)
    if errors:
        raise typer.Exit(1)
