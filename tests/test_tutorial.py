"""The tutorial's kernels run and compile as printed, and docs/draw.py draws its pictures."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from benchmarks.offline import CompiledLaunch
from kernels.runtime import launch
from kernels.runtime.backend import INTERPRETED

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"

#: Runs a file and compiles its launches for an H100 instead of executing them. With ``-O``: without results no assert can hold.
_COMPILE = """
import json, runpy, sys
import torch
from triton.runtime.jit import JITFunction
from benchmarks.offline import compile_launch, offline_target

warmup_run = JITFunction.run

def run(self, *args, grid, warmup, **kwargs):
    if warmup:
        return warmup_run(self, *args, grid=grid, warmup=True, **kwargs)
    launched = compile_launch(self, grid, dict(zip(self.arg_names, args)) | kwargs)
    print(launched.kernel, launched.stack_bytes + launched.local_bytes, *launched.tensor_core_ops)

JITFunction.run = run
torch.testing.assert_close = lambda *args, **kwargs: None
with offline_target(90):
    runpy.run_path(sys.argv[1])
"""


def extract(name: str, fence: str, folder: Path) -> Path:
    """Write all blocks of ``fence`` to a file, each at its line of the page, so that tracebacks show the page's lines."""
    lines, inside = [], False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = line == fence
            lines.append("")
        else:
            lines.append(line if inside else "")
    assert any(lines)
    file = folder / name
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def run_compiling(*arguments: str) -> str:
    """What Python prints in a process without the interpreter, which this process may be using."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def _guarded_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's memory guard learns a launch's tensors from the package's launches; here, from Triton's own."""
    if INTERPRETED:
        run = InterpretedFunction.run

        def watched_run(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
            interpreter._interpreter.watch(launch.tensors_of(dict(enumerate(args)) | kwargs))
            return run(self, *args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "run", watched_run)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # in the interpreter of Triton 3.6
@pytest.mark.usefixtures("_guarded_launches")
def test_the_blocks_run(tmp_path: Path) -> None:
    runpy.run_path(str(extract("tutorial.py", "```python", tmp_path)))


@pytest.mark.slow
def test_the_kernels_compile_without_spills(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    printed = run_compiling("-O", "-c", _COMPILE, str(extract("tutorial.py", "```python", tmp_path)))
    launches = [line.split() for line in printed.splitlines()]
    assert {name for name, *_ in launches} == set(re.findall(r"^def (\w+_kernel)\(", page, re.MULTILINE))
    assert all(spills == "0" for _, spills, *_ in launches)
    assert launches[-1] == ["descriptor_kernel", "0", "wgmma.mma_async"]


def test_the_compiled_launches_are_as_printed(tmp_path: Path) -> None:
    program = extract("compiled.py", '```python title="compiled.py"', tmp_path)
    assert run_compiling(str(program)) == extract("out", "```text", tmp_path).read_text(encoding="utf-8").strip("\n") + "\n"


def test_the_pictures_are_drawn_by_the_script() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "draw.py"))["drawings"]()
    files = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "docs" / "tutorial").iterdir()}
    assert drawn == files, "run python docs/draw.py"
    assert set(files) == set(re.findall(r"\(tutorial/(\w+\.svg)\)", PAGE.read_text(encoding="utf-8")))
    for text in files.values():
        ElementTree.fromstring(text)


@pytest.mark.parametrize(("name", "file"), re.findall(r"`(\w+)`(?: and `\w+`)? in\s+`([\w/]+\.py)`", PAGE.read_text("utf-8")))
def test_what_the_page_names_is_there(name: str, file: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_the_files_that_the_page_names_are_there() -> None:
    named = re.findall(r"`((?:kernels|benchmarks|tests|docs)/[\w/]+\.\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 20
    assert not [file for file in named if not (ROOT / file).is_file()]


def test_the_fields_of_a_compiled_launch_are_there() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    named = set(re.findall(r"\w+", " ".join(rows)))
    assert len(named) == 9
    assert named <= {field.name for field in dataclasses.fields(CompiledLaunch)}
