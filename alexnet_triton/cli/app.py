"""The command line: ``alexnet-triton train | compare | evaluate | predict | export | check | summary | explain | tune``."""

from __future__ import annotations

import io
import itertools
import platform
import sys
from collections.abc import Callable
from typing import Annotated, Any

import torch
import triton
import typer
from typer.core import TyperCommand

from .. import __version__
from .check import check_command
from .compare import compare_command
from .evaluate import evaluate_command
from .explain import explain_command
from .export import export_command
from .options import PANELS, fail, show_tracebacks
from .predict import predict_command
from .summary import summary_command
from .train import train_command
from .tune import tune_command


class _Command(TyperCommand):
    """A command whose help has one section per ``rich_help_panel`` of its options, as plain text without boxes."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, the options of each panel in PANELS, those of other panels, and those without a panel."""
        parts: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", *PANELS)}
        others: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:  # a hidden option
                continue
            if parameter.param_type_name == "argument":
                parts["Arguments"].append(record)
            elif panel := getattr(parameter, "rich_help_panel", None):
                parts.setdefault(panel, []).append(record)
            else:
                others.append(record)
        in_panels = any(records for name, records in parts.items() if name != "Arguments")
        for name, records in (*parts.items(), ("Other options" if in_panels else "Options", others)):
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


app = typer.Typer(
    help="AlexNet on hand-written Triton kernels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _print_versions(wanted: bool) -> None:
    if wanted:
        versions = f"torch {torch.__version__}, Triton {triton.__version__}, Python {platform.python_version()}"
        print(f"alexnet-triton {__version__}, {versions}")
        raise typer.Exit


@app.callback()
def _app(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, not only its message.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions of this package, torch, Triton and Python, and exit.",
        ),
    ] = False,
) -> None:
    show_tracebacks(debug)


_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train_command,
    "compare": compare_command,
    "evaluate": evaluate_command,
    "predict": predict_command,
    "export": export_command,
    "check": check_command,
    "summary": summary_command,
    "explain": explain_command,
    "tune": tune_command,
}
for _name, _function in _COMMANDS.items():
    app.command(_name, cls=_Command)(_function)


def _with_values(arguments: list[str]) -> list[str]:
    """``arguments`` with ``--resume=`` for a ``--resume`` without a path: Typer has no options with an optional value."""
    return [
        "--resume=" if argument == "--resume" and after.startswith("-") else argument
        for argument, after in itertools.pairwise([*arguments, "-"])
    ]


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file's or class's name may hold characters that the terminal cannot write, or may not be UTF-8.
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(app(_with_values(sys.argv[1:]), prog_name="alexnet-triton"))
    except OSError as error:  # Typer's own check of a path: no permission, too long, ...
        raise SystemExit(fail(error).exit_code) from error
