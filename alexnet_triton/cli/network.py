"""Shared by ``evaluate``, ``predict``, ``export`` and ``check``: the trained network of a checkpoint or run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

from ..training.checkpoint import BEST, LAST, Checkpoint
from ..training.networks import load_checkpoint
from ..training.run_folder import weights_file

RunArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN", help=f"A run's folder, from which {BEST} is read, else {LAST}; or a checkpoint file."),
]


def load_run(run: Path, device: torch.device) -> tuple[nn.Module, Checkpoint]:
    """The network of ``run``, fused, on ``device`` in float32, and its checkpoint.

    Args:
        run: a checkpoint, or a run's folder: its checkpoint of the best test accuracy, else its newest one. For a folder, a
            line on standard error names the file that is read, because standard output may be JSON.

    Raises:
        CheckpointError: there is no such file, the folder holds no checkpoint, or the file is no checkpoint of ``train``.
    """
    file = weights_file(run)
    if file != run:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"reading the network from {file}", markup=False)
    return load_checkpoint(file, device)
