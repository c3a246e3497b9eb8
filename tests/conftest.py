"""Chooses the suite's device, and gives every test poisoned outputs, exact float32 products and a seed."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import torch
from torch._subclasses.fake_tensor import UnsupportedOperatorException

if os.environ.get("SANITIZE_IR") == "1":
    # Does what ``python -m ttsem.sanitize pytest`` does, but in every worker of pytest-xdist.
    from ttsem import sanitize  # type: ignore[import-not-found]

    os.environ["ALEXNET_TRITON_PDL"] = "0"  # ttsem does not know PTX's griddepcontrol.wait

    def _unchecked() -> None:
        warnings.warn("ttsem: a launch too large to be checked for races", stacklevel=2)

    _session = sanitize.session(source="<pytest>", on_unchecked=_unchecked)
    _session.__enter__()

# Triton chooses the interpreter when a kernel is decorated, so this must come before any import of ``kernels``.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from alexnet_triton import graphs
from kernels.configs import tables
from kernels.runtime import launch
from kernels.runtime.backend import INTERPRETED

from .guard import guard_memory
from .interpreter import speed_up
from .selection import mark_slow_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Tiles so small that a shape of a few dozen elements spans several programs and has ragged edges.
SMALL_TILES = {
    "BLOCK_M": 32,
    "BLOCK_N": 16,
    "BLOCK_K": 32,
    "BLOCK": 128,
    "BLOCK_PARTS": 2,
    "BLOCK_ROWS": 16,
    "BLOCK_COLUMNS": 16,
    "BLOCK_PIXELS": 16,
    "BLOCK_CHANNELS": 4,
    "SPLIT": 3,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases that ``make test`` leaves out as slow, before pytest applies ``-m "not slow"``."""
    mark_slow_cases(items)


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill outputs with NaN before a launch: an element that a kernel fails to write stays NaN."""
    monkeypatch.setattr(launch, "poison_outputs", True)


def _mend_ttsem() -> None:
    """Let ttsem 0.1.0 run a descriptor load whose block loses dimensions of size 1.

    Triton folds that reshape into the load's result type; ttsem returns the block as the descriptor has it.
    """
    from ttsem import ops  # type: ignore[import-not-found]

    load = ops.OPS["tt.descriptor_load"]

    def reshaped(interp: object, op: Any, args: list) -> list:
        (block,) = load(interp, op, args)
        return [block.reshape(ops._rty(op).shape)]

    ops.OPS["tt.descriptor_load"] = reshaped
    _stop_at_the_ir()


def _stop_at_the_ir() -> None:
    """Let ttsem compile a kernel only as far as the IR that it executes, and each specialization once per process.

    ttsem compiles down to machine code, which takes long, and uses only that IR. ``tests/benchmarks/test_offline.py`` checks
    what needs machine code (registers, shared memory).
    """
    from ttsem import harness, mlir

    texts: dict[tuple[str, ...], str] = {}
    mlir.enable_generic_printing()

    def ir_for_launch(record: Any, stage: str, target: Any, *_: object) -> str:
        options, *specialization = harness._specialize(record.fn, record.args, record.kwargs, target)
        key = (record.fn.cache_key, repr(specialization), options.hash(), stage, repr(target))
        if key not in texts:
            texts[key] = harness._stage_text(record, stage, target)
        return texts[key]

    harness.ir_for_launch = ir_for_launch


#: Under ``python -m ttsem.sanitize`` CPU tensors report that they are on CUDA.
UNDER_TTSEM = "ttsem" in sys.modules
if UNDER_TTSEM:
    _mend_ttsem()
    torch.cuda.is_current_stream_capturing = lambda: False

#: The backend for torch.compile: its registered name or, where the package is importable but not installed, the function.
BACKEND: Any = "alexnet_triton" if entry_points(group="torch_dynamo_backends", name="alexnet_triton") else graphs.backend

#: Skips, under ttsem, tests in which PyTorch itself looks up a tensor's device.
own_devices = pytest.mark.skipif(
    UNDER_TTSEM, reason="under ttsem tensors say that they are on CUDA: autocast, dynamo see the CPU"
)


@pytest.fixture(autouse=True)
def _guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make an address outside of a kernel's tensors an error in the interpreter too."""
    if not INTERPRETED:
        yield
        return
    with guard_memory(monkeypatch):
        speed_up(monkeypatch)
        yield


@pytest.fixture(autouse=True)
def _ieee_and_seed() -> Iterator[None]:
    """Exact float32 products, so that float32 is held to float32's tolerance (TF32 has its own tests); a fixed seed."""
    # By the older switch: torch.export reads it, and reading it fails once only the newer switch for convolutions was set.
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.fp32_precision
    cudnn.allow_tf32 = False
    matmul.fp32_precision = "ieee"
    torch.manual_seed(0)
    yield
    cudnn.allow_tf32, matmul.fp32_precision = before


@pytest.fixture(autouse=True)
def _no_graph_is_given_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test in which rewriting a graph fails: there the compiler only prints why and runs the module unchanged."""
    failures: list[Exception] = []
    rewrite = graphs.rewrite

    def rewrite_or_note(graph: Any) -> Any:
        try:
            return rewrite(graph)
        except Exception as error:
            if not isinstance(error, UnsupportedOperatorException):  # by this error the compiler asks for another graph
                failures.append(error)
            raise

    monkeypatch.setattr(graphs, "rewrite", rewrite_or_note)
    yield
    assert not failures


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, for networks so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Run every kernel with :data:`SMALL_TILES`."""
    with tables.override(**SMALL_TILES):
        yield


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """The names of the kernels launched during the test, in order."""
    names: list[str] = []
    with launch.observe_launches(lambda kernel, *_: names.append(kernel.fn.__name__)):
        yield names
