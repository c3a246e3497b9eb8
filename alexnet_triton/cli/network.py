"""What ``evaluate``, ``predict`` and ``export`` have in common: the trained network of a checkpoint or of a run's folder."""

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
    typer.Argument(metavar="RUN", help=f"The folder of a run, of which {BEST} is taken, else {LAST}; or a checkpoint's file."),
]


def load_run(run: Path, device: torch.device) -> tuple[nn.Module, Checkpoint]:
    """The network of ``run``, fused, on ``device`` in float32, and what else its checkpoint holds.

    Args:
        run: a checkpoint, or a run's folder: its checkpoint of the best test accuracy, else its newest one. Which of them is
            taken, a line of standard error says: standard output may be JSON.

    Raises:
        CheckpointError: no such file, a folder without one, or not a checkpoint of ``train``.
    """
    file = weights_file(run)
    if file != run:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"the network of {file}", markup=False)
    return load_checkpoint(file, device)
