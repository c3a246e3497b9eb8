"""``alexnet-triton evaluate``: accuracy and loss of a trained network on the test images."""

from __future__ import annotations

import dataclasses

import kernels

from ..data.dataset import DataError
from ..data.image_folder import load_test
from ..models import IMAGE_SIZE
from ..training.checkpoint import CheckpointError, from_file, training_state
from ..training.evaluation import evaluate
from ..training.recipe import Recipe
from .network import RunArgument, load_run
from .options import (
    BackendChoice,
    BackendOption,
    BatchOption,
    DataOption,
    DeviceOption,
    LimitOption,
    SkipDamagedOption,
    ValidationOption,
    WorkersOption,
    console,
    fail,
    runs_on,
    usable_device,
)
from .run import plain_path


def evaluate_command(
    run: RunArgument,
    backend: BackendOption = BackendChoice.auto,
    data: DataOption = None,
    validation: ValidationOption = None,
    skip_damaged: SkipDamagedOption = False,
    batch_size: BatchOption = 128,
    limit: LimitOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Print accuracy and loss on the test images."""
    where = usable_device(device)
    try:
        net, kept = load_run(run, where)
        model = kept.model
        recipe = None if kept.training is None else from_file(Recipe, training_state(kept)["recipe"], kept.path)
        if validation is None and recipe is not None and data is not None and recipe.data == plain_path(data, "--data"):
            validation = recipe.validation  # the images that it was tested with
        test = load_test(
            data,
            classes=kept.classes,
            size=kept.size,
            channels=kept.channels,
            limit=limit,
            workers=workers,
            device=where,
            validation=validation,
            seed=0 if recipe is None else recipe.seed,
            skip_damaged=skip_damaged,
            on_note=lambda line: console.print(line, markup=False),
        )
        test = dataclasses.replace(test, normalization=kept.normalization)
        batch_size = min(batch_size, len(test))
        with kernels.use_backend(backend.value):
            console.print(f"{model} on {runs_on(where)}, {len(test)} test images")
            loss, accuracy = evaluate(net, test, batch_size=batch_size, image_size=IMAGE_SIZE[model], device=where)
    except (CheckpointError, DataError, OSError, RuntimeError) as error:
        raise fail(error) from error
    console.print(f"test accuracy {accuracy:.4f}  test loss {loss:.4f}")
