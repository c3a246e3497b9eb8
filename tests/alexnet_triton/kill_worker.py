"""What a process of test_kills runs: ``alexnet-triton train``, killed at random moments and resumed until it has come to its end.

Children are forked from a process that has imported torch: each begins at once.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from alexnet_triton import training
from alexnet_triton.__main__ import main
from alexnet_triton.checkpoint import read_checkpoint
from alexnet_triton.train_command import last_checkpoint

OPTIONS = (
    *("--model", "lenet", "--data", "sample", "--limit", "64", "--batch-size", "8", "--epochs", "8", "--device", "cpu"),
    *("--backend", "torch", "--dtype", "bfloat16", "--momentum", "0.9", "--lr", "0.05", "--augment", "--seed", "3"),
)


def start(arguments: list[str], folder: Path) -> int:
    """A child that runs the command; its number."""
    child = os.fork()
    if child:
        return child
    code = 70  # of a traceback
    try:
        with (folder / "output").open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.argv = ["alexnet-triton", *arguments]
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def whole_run(folder: Path) -> float:
    """The run that nobody kills; its seconds."""
    begin = time.monotonic()
    _, status = os.waitpid(start(["train", *OPTIONS, "--out", str(folder / "whole")], folder), 0)
    assert status == 0
    return time.monotonic() - begin


def killed_run(folder: Path, seconds: float, least: int) -> tuple[int, int]:
    """Kills within the first ``seconds`` of each child, until one has ended after ``least`` kills; kills, and those in training."""
    out = folder / "killed"
    kills, while_training, before = 0, 0, (0, False, 0)
    while True:
        try:
            path = last_checkpoint(out)
            position = training.position(read_checkpoint(path)) if path.exists() else (0, False, 0)
            while_training += kills > 0 and position[0] < 8
            assert position >= before  # no kill takes a saved epoch away
            before = position
        except FileNotFoundError:
            pass
        begun = any((out / name).exists() for name in ("checkpoint.pt", "best.pt"))
        child = start(["train", "--resume", str(out)] if begun else ["train", *OPTIONS, "--out", str(out)], folder)
        end = time.monotonic() + random.uniform(0.2, 1) * seconds
        while time.monotonic() < end or kills >= 4 * least:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                assert status == 0, status
                if kills >= least:
                    return kills, while_training
                break
            time.sleep(0.001)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    random.seed(int(sys.argv[2]))
    place = Path(sys.argv[1])
    kills, while_training = killed_run(place, whole_run(place), least=6)
    print(f"{kills} kills, {while_training} while it trained")
