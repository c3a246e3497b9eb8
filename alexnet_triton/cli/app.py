"""The command line: ``alexnet-triton train | compare | evaluate | predict | summary | explain | tune``."""

from __future__ import annotations

import io
import itertools
import sys
from typing import Annotated

import typer

from .compare import compare_command
from .evaluate import evaluate_command
from .explain import explain_command
from .options import fail, show_tracebacks
from .predict import predict_command
from .summary import summary_command
from .train import train_command
from .tune import tune_command

app = typer.Typer(
    help="AlexNet on hand-written Triton kernels.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


@app.callback()
def _app(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, not its message alone.")] = False,
) -> None:
    show_tracebacks(debug)


app.command("train")(train_command)
app.command("compare")(compare_command)
app.command("evaluate")(evaluate_command)
app.command("predict")(predict_command)
app.command("summary")(summary_command)
app.command("explain")(explain_command)
app.command("tune")(tune_command)


def _with_values(arguments: list[str]) -> list[str]:
    """The command line with ``--resume=`` for a ``--resume`` without a path: Typer knows no value that may be left out."""
    return [
        "--resume=" if argument == "--resume" and after.startswith("-") else argument
        for argument, after in itertools.pairwise([*arguments, "-"])
    ]


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # The name of a file or of a class may have what the terminal cannot write, or not be UTF-8 at all.
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(app(_with_values(sys.argv[1:]), prog_name="alexnet-triton"))
    except OSError as error:  # of a path on the command line, before a command opens anything: not to be entered, too long, ...
        raise SystemExit(fail(error).exit_code) from error
