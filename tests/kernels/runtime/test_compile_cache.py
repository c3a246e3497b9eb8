"""PyTorch's cache of compiled graphs: a graph that was compiled with other operators than today's is not used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import kernels
from kernels.runtime import compile_cache
from kernels.runtime.compile_cache import source_tag, tag_compiled_graphs

PACKAGE = Path(kernels.__file__).parent

#: An operator whose signature and strides differ between two versions of the package.
OLD = """
import torch
@torch.library.custom_op("alexnet_triton::copied", mutates_args=())
def copied(x: torch.Tensor, unused: bool = False) -> torch.Tensor:
    return x.clone()
@copied.register_fake
def _(x, unused=False):
    return torch.empty_like(x)
"""
NEW = """
import torch
@torch.library.custom_op("alexnet_triton::copied", mutates_args=())
def copied(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()
@copied.register_fake
def _(x):
    return torch.empty_like(x.t(), memory_format=torch.contiguous_format).t()
"""
PROGRAM = """
import json, threading, torch
import kernels
from torch._dynamo.utils import counters
def double(x):
    return 2 * kernels.copied(x)
def work():
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(torch.compile(double, fullgraph=True)(x), 2 * x)
    found = counters["inductor"]["fxgraph_cache_hit"] > 0
    print(json.dumps({"found": found, "tag": torch.compiler.config.cache_key_tag}))
thread = threading.Thread(target=work)  # as autograd compiles a backward pass on a GPU
thread.start()
thread.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler")
def test_another_version_of_the_operators_compiles_again(tmp_path: Path) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / "__init__.py").read_text()
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["TORCH_COMPILE_CACHE_KEY_TAG"] = "mine"

    def run(operator: str) -> dict[str, str | bool]:
        (copy / "__init__.py").write_text(source + operator)
        program = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PROGRAM}"]
        done = subprocess.run(program, capture_output=True, text=True, check=False, cwd="/", env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        result: dict[str, str | bool] = json.loads(done.stdout.splitlines()[-1])
        return result

    old, again, new = run(OLD), run(OLD), run(NEW)
    assert (old["found"], again["found"], new["found"]) == (False, True, False)
    assert old["tag"] == again["tag"] != new["tag"]
    assert str(new["tag"]).startswith("mine alexnet_triton-")


def test_the_tag_is_of_all_python_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.py").write_text("a")
    tags = [source_tag(tmp_path)]
    for path, text in (("folder/b.py", "b"), ("folder/b.py", "c"), ("a.py", ""), ("folder/b.py", "ac")):
        (tmp_path / path).write_text(text)
        tags.append(source_tag(tmp_path))
    (tmp_path / "folder" / "b.py").rename(tmp_path / "b.py")
    tags.append(source_tag(tmp_path))
    assert len(set(tags)) == len(tags)
    (tmp_path / "notes.txt").write_text("not code")
    (tmp_path / ".#a.py").symlink_to("nowhere")  # as an editor's lock
    assert source_tag(tmp_path) == tags[-1]


def test_the_tag_is_added_once_and_for_all_threads() -> None:
    before = torch.compiler.config.cache_key_tag
    assert source_tag(PACKAGE) in before
    tag_compiled_graphs()
    tags = [torch.compiler.config.cache_key_tag]
    thread = threading.Thread(target=lambda: tags.append(torch.compiler.config.cache_key_tag))
    thread.start()
    thread.join()
    assert tags == [before, before]


def test_the_users_own_tags_stay() -> None:
    tag = source_tag(PACKAGE)
    for users in ("mine", "0", f"{tag}-interpreted", "mine too"):
        with torch.compiler.config.patch(cache_key_tag=users):
            tag_compiled_graphs()
            assert torch.compiler.config.cache_key_tag == f"{users} {tag}"
    read = {str(value): compile_cache._with(value, tag) for value in (False, True, "0", "", object())}
    assert read["False"] != read["True"] != read[""] == tag
    assert list(read.values())[-1] == tag
