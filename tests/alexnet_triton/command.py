"""Runs the command line in this process: without starting Python and PyTorch again, and with kernels as in the suite."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from unittest import mock

from alexnet_triton.__main__ import main


def run_here(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Output and exit code of ``alexnet-triton ARGUMENTS``. An exception, which would print a traceback, is raised."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["alexnet-triton", *arguments]))
        stack.enter_context(mock.patch.dict("os.environ", {"COLUMNS": "120"}))
        stack.enter_context(contextlib.chdir(cwd or Path.cwd()))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def run(*arguments: str, cwd: Path) -> str:
    """The output of ``alexnet-triton ARGUMENTS``, which must succeed."""
    result = run_here(*arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout
