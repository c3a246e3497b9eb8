"""Experiments that wait for a GPU: each is a prediction and the command that tests it.

``python -m benchmarks.gpu`` runs the experiments last and records their output. If a stage has the same command, the stage
serves as the experiment. Add an experiment when its prediction is in ``benchmarks/NOTES.md``; remove it when its outcome is.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A prediction and the command that tests it.

    Attributes:
        prediction: a sentence with the expected numbers, and where the command's output has them.
        argv: arguments after ``python -m``; ``{out}`` is a folder for results, ``{gpu}`` the GPU's name in file names.
        seconds: upper estimate of the command's time.
        environment: variables that are set for the command.
        may_fail: whether a failure of the command, which its log shows, counts as an outcome.
    """

    name: str
    prediction: str
    argv: tuple[str, ...]
    seconds: float = 120.0
    environment: tuple[tuple[str, str], ...] = ()
    may_fail: bool = False


def tune(dtype: str, layer: str, batch: int = 128) -> tuple[str, ...]:
    """The command that tunes a layer and writes the table that the kernels read."""
    return ("alexnet_triton", "tune", "--dtype", dtype, "--batch", str(batch), "--layer", layer)


def report(dtype: str, batch: int, part: str) -> tuple[str, ...]:
    """The command that measures a part of the report."""
    options = ("--dtype", dtype, "--batch", str(batch), "--part", part, "--minutes", "60")
    return ("benchmarks.report", *options, "--out", f"{{out}}/report/{dtype}-{batch}-{part}")


def variant(layer: str, pass_: str, *configurations: str) -> tuple[str, ...]:
    """The command that times a pass under the given configurations, in bfloat16 at batch 128."""
    return ("benchmarks.variant", "--layer", layer, "--pass", pass_, *configurations)


EXPERIMENTS = (
    Experiment(
        "conv2 input gradient, first operand from registers",
        "conv2's input gradient takes 175 to 205 us with REGISTERS=1 on Triton 3.9, 218 without; 3.6 to 3.8 refuse it.",
        variant("conv2", "dgrad", "REGISTERS=0", "REGISTERS=1"),
        60,
        may_fail=True,
    ),
    Experiment("exact fc1", "fc1 forward in exact float32 takes 45 us.", tune("float32", "fc1")),
    Experiment(
        "package of AOTInductor",
        "PyTorch's loader of the package still ends in a segmentation fault (_load_aoti), as on 2026-11-26.",
        ("pytest", "-q", "tests/alexnet_triton/test_drop_in.py", "-k", "package_of_aot_inductor"),
        120,
        may_fail=True,
    ),
    Experiment(
        "more than 2^31 elements for real",
        "The tests of the operations on tensors with more than 2^31 elements in memory pass.",
        ("pytest", "-q", "tests/kernels/test_big.py", "-k", "8192"),
        240,
    ),
)
