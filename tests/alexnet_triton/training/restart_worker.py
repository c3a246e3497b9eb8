"""``alexnet-triton`` in processes of torchrun, one of which ends by SIGKILL in the middle of the first attempt.

Each process writes the number of each step within its epoch to ``FOLDER/steps-RANK``, one line for each attempt.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from alexnet_triton.__main__ import main
from alexnet_triton.cli import run as run_of_a_command
from alexnet_triton.training.trainer import Trainer

#: Steps of the second process, over all epochs, before it is killed.
LAST_STEP = 14


def noting(file: Path, real_step: object, kills: bool) -> None:
    """Note a trainer's steps, and with ``kills`` kill the process before a step."""
    done = 0

    def step(self: Trainer, index: torch.Tensor, count: int | None = None) -> None:
        nonlocal done
        if kills and done == LAST_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        with file.open("a") as notes:
            notes.write(f"{self.steps} ")
        real_step(self, index, count)  # type: ignore[operator]

    Trainer.step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_of_a_command.measure_speed = lambda *_: 1.0  # the measurement takes as long as an epoch
    notes = Path(sys.argv.pop(1)) / f"steps-{os.environ['RANK']}"
    with notes.open("a") as file:
        file.write("\n")
    noting(notes, Trainer.step, os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
    main()
