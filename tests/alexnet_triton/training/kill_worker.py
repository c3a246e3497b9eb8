"""The worker of test_kills: ``alexnet-triton train``, killed at random moments and resumed until it ends by itself.

Children are forked from a process that has imported torch, so they start at once.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import TextIO

import torch

from alexnet_triton.__main__ import main
from alexnet_triton.cli import run as run_of_a_command
from alexnet_triton.training import checkpoint
from alexnet_triton.training.checkpoint import BEST, LAST, read_checkpoint

EPOCHS = 10
OPTIONS = (
    *("--model", "lenet", "--data", "sample", "--limit", "64", "--batch-size", "8", "--epochs", str(EPOCHS), "--device", "cpu"),
    *("--backend", "torch", "--dtype", "bfloat16", "--momentum", "0.9", "--lr", "0.05", "--augment", "--seed", "3"),
)


def start(*arguments: str) -> tuple[int, TextIO]:
    """Fork a child that runs the command; return its process id and its output."""
    hear, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        return child, os.fdopen(hear)
    code = 70  # the exit code for an exception
    try:
        os.dup2(tell, 1)
        os.dup2(tell, 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.argv = ["alexnet-triton", *arguments]
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def read_until_it_trains(lines: TextIO) -> None:
    """Read up to the line that the command prints just before training."""
    for line in lines:
        if line.startswith("data "):
            return
    raise AssertionError("it ended before it trained")


def end_of(child: int, lines: TextIO) -> None:
    """Wait until the child ends by itself, and check that it succeeded."""
    output = lines.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, output


def position(out: Path) -> tuple[int, bool, int]:
    """How far the run in ``out`` has come, by its last checkpoint, which must be readable."""
    files = [path for path in (out / LAST, out / BEST) if path.exists()]
    return checkpoint.position(read_checkpoint(files[0])) if files else (0, False, 0)


def killed_run(out: Path, seconds: float, most: int) -> tuple[int, int]:
    """Kill the run at random moments until it ends by itself or was killed ``most`` times.

    A kill comes after none to two lines of the run's epochs and up to ``seconds`` more.

    Returns:
        The number of kills, and how many of them came during training with a checkpoint.
    """
    kills, while_training, before = 0, 0, (0, False, 0)
    while True:
        begun = any((out / name).exists() for name in (LAST, BEST))
        child, lines = start("train", *(("--resume", str(out)) if begun else (*OPTIONS, "--out", str(out))))
        with lines:
            read_until_it_trains(lines)
            if kills == most:
                end_of(child, lines)
                return kills, while_training
            for _ in range(random.randrange(3)):
                lines.readline()
            time.sleep(random.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            if os.waitpid(child, 0)[1] == 0:  # it ended before the kill
                return kills, while_training
        kills += 1
        now = position(out)
        assert now >= before  # no kill loses a checkpoint
        before = now
        while_training += 0 < now[0] < EPOCHS


if __name__ == "__main__":
    torch.set_num_threads(1)
    random.seed(0)
    run_of_a_command.measure_speed = lambda *_: 1.0  # the measurement takes as long as an epoch
    place = Path(sys.argv[1])
    process, printed = start("train", *OPTIONS, "--out", str(place / "whole"))
    with printed:
        read_until_it_trains(printed)
        begin = time.monotonic()
        for _ in range(EPOCHS):
            printed.readline()
        epoch = (time.monotonic() - begin) / EPOCHS
        end_of(process, printed)
    print("{} kills, {} while it trained".format(*killed_run(place / "killed", epoch, int(sys.argv[2]))))
