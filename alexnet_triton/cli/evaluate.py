"""``alexnet-triton evaluate``: accuracy and loss of a trained network on the test images."""

from __future__ import annotations

import dataclasses

import kernels

from ..data.augment import patch_side
from ..data.dataset import DataError
from ..data.image_folder import lacks_test, load_test
from ..data.stream import StreamedSplit
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
    StreamOption,
    TenCropOption,
    ValidationOption,
    WorkersOption,
    console,
    fail,
    runs_on,
    usable_device,
)
from .run import RunOptions


def evaluate_command(
    run: RunArgument,
    backend: BackendOption = BackendChoice.auto,
    data: DataOption = None,
    validation: ValidationOption = None,
    skip_damaged: SkipDamagedOption = None,
    batch_size: BatchOption = 128,
    limit: LimitOption = None,
    stream: StreamOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    ten_crop: TenCropOption = False,
) -> None:
    """Print accuracy and loss on the test images.

    For more than ten classes also the top-5 accuracy. Uses the test images of the run, unless --data names others.
    """
    where = usable_device(device)
    try:
        net, kept = load_run(run, where)
        model, side = kept.model, IMAGE_SIZE[kept.model]
        seed = 0
        if kept.training is not None:
            state = training_state(kept)
            recipe = from_file(Recipe, state["recipe"], kept.path)
            data, seed = recipe.data if data is None else data, recipe.seed
            if validation is None and lacks_test(data):
                validation = recipe.validation
            if skip_damaged is None:
                skip_damaged = from_file(RunOptions, state.get("options", {}), kept.path).skip_damaged
        test = load_test(
            data,
            classes=kept.classes,
            size=patch_side(side) if ten_crop else kept.size,
            channels=kept.channels,
            limit=limit,
            workers=workers,
            device=where,
            validation=validation,
            seed=seed,
            skip_damaged=bool(skip_damaged),
            stream=stream,
            on_note=lambda line: console.print(line, markup=False),
        )
        if ten_crop and test.size <= side:
            raise DataError(f"--ten-crop cuts {side} x {side} from larger images, these are {test.size} x {test.size}")
        test = dataclasses.replace(test, normalization=kept.normalization)
        batch_size = min(batch_size, len(test))
        with kernels.use_backend(backend.value):
            console.print(f"{model} on {runs_on(where)}, {len(test)} test images")
            loss, accuracy, top5 = evaluate(net, test, batch_size=batch_size, image_size=side, device=where, ten_crop=ten_crop)
    except (CheckpointError, DataError, OSError, RuntimeError) as error:
        raise fail(error) from error
    if isinstance(test, StreamedSplit) and test.skipped:
        first, reason = next(iter(test.skipped.items()))
        console.print(f"left out {len(test.skipped)} images that cannot be read, such as {first}: {reason}", markup=False)
    among_five = "" if top5 is None else f"top-5 {top5:.4f}  "
    console.print(f"test accuracy {accuracy:.4f}  {among_five}test loss {loss:.4f}")
