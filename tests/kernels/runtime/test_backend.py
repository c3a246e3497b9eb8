"""use_backend and the other process-wide switches: which implementation runs."""

from __future__ import annotations

import contextlib
import pickle
import random
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import kernels
from kernels.configs import tables
from kernels.convolution import select
from kernels.convolution.problem import Geometry, Problem
from kernels.runtime import backend, direct, gpu, launch
from kernels.runtime.backend import current_backend

from ...conftest import DEVICE, own_devices


def test_torch_runs_no_kernel(launches: list[str]) -> None:
    x, w = torch.randn(1, 2, 5, 5, device=DEVICE), torch.randn(3, 2, 3, 3, device=DEVICE)
    f = torch.randn(4, 3, device=DEVICE)
    with kernels.use_backend("torch"):
        kernels.conv2d(x, w)
        kernels.max_pool2d(x, 3)
        kernels.conv2d_relu_max_pool2d(x, w, pool_kernel_size=3)
        kernels.linear(f, f)
        kernels.dropout(f)
        kernels.linear_relu_dropout(f, f)
        kernels.dropout_mask((3,), 0.5, 1, device=DEVICE)
    assert launches == []
    with kernels.use_backend("triton"):
        kernels.conv2d(x, w)
    assert launches == ["_conv2d_fprop_kernel"]


def test_nests_and_restores() -> None:
    assert current_backend() == "auto"
    with kernels.use_backend("torch"):
        with kernels.use_backend("triton"):
            assert current_backend() == "triton"
        assert current_backend() == "torch"
        with pytest.raises(ZeroDivisionError), kernels.use_backend("triton"):
            1 / 0  # noqa: B018
        assert current_backend() == "torch"
    assert current_backend() == "auto"


def _ignore(kernel: object, grid: object, arguments: object) -> None:
    raise AssertionError


#: For each process-wide switch: two blocks, and a function that returns the current value.
SWITCHES: dict[str, tuple[Callable, Callable, Callable[[], object]]] = {
    "use_backend": (lambda: kernels.use_backend("torch"), lambda: kernels.use_backend("triton"), current_backend),
    "override": (
        lambda: tables.override(A=1, B=1),
        lambda: tables.override(B=2),
        lambda: tables.apply_overrides({"A": 0, "B": 0}),
    ),
    "untuned": (tables.untuned, tables.untuned, lambda: tables._use_tables.value),
    "keep_tables": (tables.keep_tables, tables.keep_tables, lambda: tables._tables_kept.value),
    "record_launches": (lambda: launch.record_launches(_ignore), lambda: launch.record_launches(_ignore), launch.is_recording),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_blocks_of_two_threads_that_overlap_leave_nothing_behind(name: str) -> None:
    """The first block ends inside the second: its change must be undone, and the second block's must stay."""
    first, second, current = SWITCHES[name]
    outside = current()
    with first():
        in_first = current()
    with second():
        in_second = current()
    assert in_first != outside != in_second
    entered, ended = threading.Event(), threading.Event()

    def other() -> None:
        with second():
            entered.set()
            ended.wait(60)

    thread = threading.Thread(target=other)
    with contextlib.ExitStack() as stack:
        stack.enter_context(first())
        thread.start()
        entered.wait(60)
    assert current() == in_second
    ended.set()
    thread.join()
    assert current() == outside


def test_many_threads_that_overlap_leave_nothing_behind() -> None:
    together = threading.Barrier(8)

    def work(seed: int) -> None:
        choose = random.Random(seed)
        together.wait()
        for _ in range(300):
            with kernels.use_backend(choose.choice(["auto", "triton", "torch"])):  # type: ignore[arg-type]
                time.sleep(0)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert current_backend() == "auto"


@own_devices
def test_the_backend_is_seen_by_other_threads_and_by_torch_compile() -> None:
    """Autograd may rerun a forward pass in another thread. A compiled graph is recompiled for another backend."""
    seen: list[str] = []
    with kernels.use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(current_backend()))
        thread.start()
        thread.join()
    assert seen == ["torch"]

    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(str(graph.graph))
        return graph

    def inside(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with kernels.use_backend("torch"):
            return kernels.conv2d(x, w)

    x, w = torch.randn(1, 2, 5, 5, device=DEVICE), torch.randn(3, 2, 3, 3, device=DEVICE)
    for function, runs_triton in ((kernels.conv2d, [True, False]), (inside, [False, False])):
        graphs.clear()
        torch.compiler.reset()
        run = torch.compile(function, fullgraph=True, backend=record)
        with kernels.use_backend("triton"):
            first = run(x, w)
        with kernels.use_backend("torch"):
            torch.testing.assert_close(run(x, w), first)
        with kernels.use_backend("triton"):
            run(x, w)
        assert current_backend() == "auto"
        assert ["alexnet_triton.conv2d" in graph for graph in graphs] == runs_triton


def test_unknown_backend_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'torch', got 'cuda'"),
        kernels.use_backend("cuda"),
    ):  # type: ignore[arg-type]
        pass


_WITHOUT_INTERPRETER = """
import torch, kernels
x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
assert torch.equal(kernels.conv2d(x, w), torch.nn.functional.conv2d(x, w))
try:
    with kernels.use_backend("triton"):
        kernels.conv2d(x, w)
except RuntimeError as error:
    print(error)
assert "matplotlib" not in __import__("sys").modules
assert not torch.cuda.is_initialized()
"""


def test_cpu_tensors_run_the_reference_or_say_why_not() -> None:
    """The process has no interpreter. Importing neither touches CUDA nor loads the extras."""
    import os

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_INTERPRETER], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "cannot run on a tensor on cpu" in result.stdout
    assert "TRITON_INTERPRET=1" in result.stdout


@pytest.mark.parametrize(
    ("older", "value"),
    [
        (b"\x80\x02ckernels.conv2d_stem\nCells\nq\x00K\x0bK\x04K\x01\x87q\x01\x81q\x02.", kernels.Cells(11, 4, 1)),
        (b"\x80\x02ckernels.images\nAugmentation\nq\x00(NNNNNtq\x01\x81q\x02.", kernels.Augmentation()),
    ],
    ids=["Cells", "Augmentation"],
)
def test_pickles_do_not_depend_on_where_a_class_is_defined(older: bytes, value: tuple) -> None:
    assert b"ckernels\n" in pickle.dumps(value, protocol=2)
    for pickled in (older, pickle.dumps(value)):
        again = pickle.loads(pickled)
        assert type(again) is type(value)
        assert again == value


def test_what_builds_pipelines_is_the_packages_own() -> None:
    from kernels import advanced

    older = set(advanced.__all__) - {"add_cross_entropy"}  # names that were in the package itself remain there
    assert all(getattr(advanced, name) is getattr(kernels, name) for name in older)


#: The compute capability that ROCm reports for a GPU, and the name of its instruction set.
AMD = {
    "MI200": ((9, 0), "gfx90a:sramecc+:xnack-"),
    "MI300": ((9, 4), "gfx942:sramecc+:xnack-"),
    "RX 7900": ((11, 0), "gfx1100"),
}


@pytest.fixture(params=AMD)
def amd_gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """PyTorch for ROCm on an AMD GPU, as far as the code asks; yields the name of the instruction set."""
    numbers, name = AMD[request.param]
    properties = types.SimpleNamespace(gcnArchName=name)
    with (
        mock.patch.object(torch.version, "hip", "7.0"),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=numbers),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(gpu, "INTERPRETED", False),
    ):
        gpu._gpu_architecture.cache_clear()
        yield name.split(":")[0]
    gpu._gpu_architecture.cache_clear()


def test_an_amd_gpu_is_no_hopper(amd_gpu: str) -> None:
    """An AMD GPU's capability reads like NVIDIA's, 9.0 to 11.0, but there is no TMA and no H100 table."""
    device = torch.device("cuda", 0)
    assert backend.capability(device) == 0
    assert not backend.has_tma(device)
    assert backend.dot_precision(device, "ieee") == "ieee"
    assert backend.dot_precision(device, "tf32") == ("tf32" if amd_gpu == "gfx942" else "ieee")
    for c, stride in ((64, 1), (1, 4)):  # like conv2 and like conv1
        geometry = Geometry((stride, stride), (1, 1), (1, 1), 1)
        problem = Problem(128, c, 64, 64, 96, 11, 11, 14, 14, geometry, torch.bfloat16, device)
        passes = (select.fprop_kernels, select.dgrad_kernels, select.wgrad_kernels)
        assert {choose(problem) for choose in passes} == {select.Kernels.GENERAL}
        assert not select.reads_cells(problem)


def test_an_nvidia_gpu_says_its_capability() -> None:
    device = torch.device("cuda", 0)
    with (
        mock.patch.object(torch.version, "hip", None),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(gpu, "INTERPRETED", False),
    ):
        gpu._gpu_architecture.cache_clear()
        assert backend.capability(device) == 90
        assert backend.has_tma(device)
        assert backend.dot_precision(device, "tf32") == "tf32"
    gpu._gpu_architecture.cache_clear()


def test_an_amd_launcher_is_not_launched_directly() -> None:
    """Direct launches know only NVIDIA's launcher in C; other launchers run through ``kernel[grid](...)``."""
    from triton.backends.amd.driver import HIPLauncher

    compiled: Any = types.SimpleNamespace(run=HIPLauncher.__new__(HIPLauncher))
    with mock.patch.object(direct, "JITFunction", object):  # in the interpreter a kernel is no JITFunction
        assert direct.bind(object(), compiled, (1,)) is None
