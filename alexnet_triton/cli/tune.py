"""``alexnet-triton tune``: measure every kernel configuration on this GPU, and keep the fastest correct ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from kernels.configs import tables

from .. import tune
from .options import console, fail


def tune_command(
    batch: Annotated[
        list[int],
        typer.Option(min=1, help="Tune for this batch size. The option may be given several times.", rich_help_panel="Recipe"),
    ] = [128],  # noqa: B006
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="Tune this layer, conv1 to fc3. The option may be given several times.",
            show_default="all",
            rich_help_panel="Recipe",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Tune for bfloat16 (float16 shares its entries), float32 or tf32. float32 follows PyTorch's default "
            "switches: convolutions compute in TF32, linear layers exactly. tf32 computes both in TF32.",
            rich_help_panel="Recipe",
        ),
    ] = "bfloat16",
    every: Annotated[
        bool, typer.Option(help="Print the time of every candidate, not only of the best.", rich_help_panel="Output")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the table to this file.", show_default="the table that the kernels read", rich_help_panel="Output"
        ),
    ] = None,
) -> None:
    """Find this GPU's fastest kernel configurations.

    Measures every configuration and keeps the fastest that gives correct results.
    """
    if dtype not in tune.PRECISIONS:
        raise typer.BadParameter(f"must be one of {', '.join(tune.PRECISIONS)}", param_hint="--dtype")
    known = (*tune.LAYERS, *tune.LINEAR_LAYERS)
    if unknown := [name for name in layer or () if name not in known]:
        raise typer.BadParameter(f"no layer {unknown[0]!r}; the layers are {', '.join(known)}", param_hint="--layer")
    precision = tune.PRECISIONS[dtype][0]
    if any(not tune.jobs((1,), (name,), precision) for name in layer or ()):
        raise typer.BadParameter(tune.NO_POOLED_JOB, param_hint="--layer")
    if not torch.cuda.is_available():
        raise fail("tune needs a CUDA GPU")
    path = out or tables.TABLES / f"{tables.gpu_slug(torch.cuda.get_device_name())}.json"

    def show(result: tune.Tuned) -> None:
        job = result.job
        console.print(
            f"{job.layer} {job.pass_} batch {job.batch}: {1e3 * result.best_ms:.1f} us, the rule {1e3 * result.rule_ms:.1f}, "
            f"PyTorch {1e3 * result.peer_ms:.1f}; {len(result.times)} candidates, {len(result.wrong)} wrong; {result.best}",
            markup=False,
        )
        for line in result.wrong[:3]:
            console.print(f"  wrong: {line}", markup=False)
        if every:
            for ms, candidate in result.times:
                console.print(f"  {1e3 * ms:7.1f} us {candidate or 'the rule'}", markup=False)

    work = tune.jobs(tuple(batch), tuple(layer) if layer else known, precision)
    try:
        results = tune.tune(work, dtype, path, show)
    except (ValueError, OSError) as error:
        raise fail(error) from error
    console.print(f"{path}: {len(results)} entries, {tune.speedup(results):.2f} times as fast as PyTorch (geometric mean)")
