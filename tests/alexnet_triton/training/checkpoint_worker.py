"""The worker of test_checkpoint: children write checkpoints endlessly, and each is killed at a random moment.

Children are forked from a process that has imported torch: twenty of them take no longer than one.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from alexnet_triton.training.checkpoint import BEST, LAST, Checkpoint, copy_checkpoint, read_checkpoint, save_checkpoint


def write_for_ever(folder: Path, number: int, told: int) -> None:
    """Write checkpoints numbered from ``number``; write each number to the pipe ``told`` once its files should be safe."""
    while True:
        weights = {"weight": torch.full((50_000,), float(number))}
        save_checkpoint(folder / BEST, Checkpoint("lenet", [], [{"epoch": number}], weights))
        copy_checkpoint(folder / BEST, folder / LAST)
        os.write(told, b"%d\n" % number)
        number += 1


def main(folder: Path, kills: int) -> None:
    """Kill ``kills`` writers; after each the newest checkpoint must be complete and no older than the last number printed."""
    torch.set_num_threads(1)
    random.seed(0)
    number, in_the_middle = 0, 0
    for _ in range(kills):
        hear, tell = os.pipe()
        child = os.fork()
        if child == 0:
            write_for_ever(folder, number + 1, tell)
        os.close(tell)
        with os.fdopen(hear) as lines:
            next(lines)  # the child writes
            time.sleep(random.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            safe = [int(line) for line in lines] or [number + 1]
        in_the_middle += any(folder.glob("*.partial"))
        for name in (LAST, BEST):
            checkpoint = read_checkpoint(folder / name)
            found = checkpoint.metrics[0]["epoch"]
            assert safe[-1] <= found <= safe[-1] + 1, (name, safe[-1], found)
            assert (checkpoint.weights["weight"] == found).all()
        number = found
    print(f"{kills} kills, {in_the_middle} in the middle of a write, {number} checkpoints")
    assert in_the_middle > 0


main(Path(sys.argv[1]), int(sys.argv[2]))
