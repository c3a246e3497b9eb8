"""Times one pass of one layer under the given configurations: for experiments with values that no table has yet.

``python -m benchmarks.variant --layer conv2 --pass wgrad --batch 1024 --dtype float32 FOLDED=0 FOLDED=1,num_stages=3`` verifies
and times the pass as ``alexnet-triton tune`` does: first with the configuration of the tables and rules, then with each given
configuration overriding its values. With ``--untuned`` the tables are not used, only the rules. It needs a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

import torch

from alexnet_triton import tune
from alexnet_triton.candidates import Candidate
from kernels.configs import tables


class Overridden(tune.Job):
    """A job with one empty candidate: :func:`kernels.configs.tables.override` around it sets the configuration."""

    def candidates(self, dtype: torch.dtype = torch.bfloat16) -> list[Candidate]:
        """One empty configuration."""
        return [{}]


def configuration(text: str) -> Candidate:
    """Parse ``"A=1,B=2"`` into a configuration.

    Raises:
        argparse.ArgumentTypeError: ``text`` has another form.
    """
    try:
        return {name: int(value) for name, value in (pair.split("=") for pair in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER,NAME=NUMBER,...") from error


def main() -> None:
    """Verify and time the chosen pass under each configuration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("configuration", nargs="+", type=configuration, help="NAME=NUMBER,NAME=NUMBER,...")
    parser.add_argument("--layer", required=True, choices=[*tune.LAYERS, *tune.LINEAR_LAYERS])
    parser.add_argument("--pass", dest="pass_", required=True, choices=["fprop", "dgrad", "wgrad", *tune.NARROW_PASSES])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=list(tune.PRECISIONS))
    parser.add_argument("--untuned", action="store_true", help="override the rules' configuration, without the tables")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("variant: there is no CUDA GPU here")
    dtype, linear_tf32 = tune.PRECISIONS[arguments.dtype]
    if not tune.jobs((arguments.batch,), (arguments.layer,), dtype):
        parser.error(tune.NO_POOLED_JOB)
    job = Overridden(arguments.layer, arguments.pass_, arguments.batch)
    refused = []
    for given in ({}, *arguments.configuration):
        with contextlib.ExitStack() as stack:
            stack.enter_context(tune.float32_switches(linear_tf32))
            stack.enter_context(tables.keep_tables())
            if arguments.untuned:
                stack.enter_context(tables.untuned())
            stack.enter_context(tables.override(**given))
            try:
                result = tune.tune_job(job, dtype)
            except IndexError:  # no run was correct, so there is no best one
                refused.append(given)
                print(f"{given}: this configuration is wrong or cannot run")
                continue
        print(f"{given or 'no override'}: {1e3 * result.best_ms:.1f} us, PyTorch {1e3 * result.peer_ms:.1f}")
    sys.exit(f"variant: there is no time of {refused}" if refused else 0)


if __name__ == "__main__":
    main()
