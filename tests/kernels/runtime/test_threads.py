"""Kernels called from several threads at once, and in processes that a DataLoader forks or spawns."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import multiprocessing
import os
import sys
import threading
import time

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from triton.runtime.jit import JITFunction

import kernels
from kernels.runtime import launch
from kernels.runtime.backend import INTERPRETED

from ...conftest import DEVICE, UNDER_TTSEM, own_devices
from ...oracle import integers, randn

pytestmark = pytest.mark.skipif(
    UNDER_TTSEM, reason="ttsem executes one launch at a time, in the process that it was started in"
)

HALF = (torch.float16, torch.bfloat16)


def _all_of_it(x: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
    y = kernels.max_pool2d(kernels.conv2d(x, w, b, padding=1, activation="relu"), 2)
    return [y.detach(), *torch.autograd.grad(y, (x, w, b), torch.ones_like(y))]


def test_threads_do_not_disturb_each_other() -> None:
    """On CUDA each thread has its own stream; the interpreter runs one launch at a time."""
    calls = [(randn(2, c, 6, 7, dtype=d), randn(5, c, 3, 3, dtype=d), randn(5, dtype=d)) for c in (3, 16) for d in HALF * 2]
    expected = [_all_of_it(*call) for call in calls]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    together = threading.Barrier(len(calls))

    def run(call: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        stream = torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else contextlib.nullcontext()
        with stream:
            together.wait()
            results = _all_of_it(*call)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return results

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        for got, alone in zip(pool.map(run, calls), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))


class _Pooled(Dataset):
    """Items computed by a kernel on the CPU, in the interpreter."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        x = torch.arange(24.0).view(1, 1, 4, 6) * (index + 1)
        return kernels.max_pool2d(x, 2)[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_kernels_in_the_workers_of_a_data_loader(context: str) -> None:
    """The tensors are on the CPU: for CUDA after a fork PyTorch raises its own clear error."""
    # Launch kernels in this process first, so that a forked process copies its state.
    kernels.max_pool2d(integers(1, 1, 4, 4, dtype=torch.float32), 2)
    (batch,) = DataLoader(_Pooled(), batch_size=3, num_workers=1, multiprocessing_context=context, timeout=120)
    pooled = torch.tensor([[7.0, 9.0, 11.0], [19.0, 21.0, 23.0]])
    assert torch.equal(batch, torch.stack([pooled * i for i in (1, 2, 3)]).unsqueeze(1))


def _pool_and_leave() -> None:
    y = kernels.max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2)
    os._exit(0 if y.flatten().tolist() == [5, 7, 13, 15] else 1)


@pytest.mark.skipif(not INTERPRETED, reason="tests the interpreter's lock")
def test_a_fork_in_the_middle_of_another_threads_launch() -> None:
    """A lock that the other thread holds is never released in the child, which does not have that thread."""
    inside, leave = threading.Event(), threading.Event()

    def launching() -> None:
        with launch._interpreter:
            inside.set()
            leave.wait(120)

    thread = threading.Thread(target=launching)
    thread.start()
    try:
        assert inside.wait(60)
        child = multiprocessing.get_context("fork").Process(target=_pool_and_leave)
        child.start()
        child.join(60)
        waits = child.is_alive()
        child.kill()
        child.join()
    finally:
        leave.set()
        thread.join()
    assert not waits
    assert child.exitcode == 0


class _OnTheGpu(_Pooled):
    def __getitem__(self, index: int) -> Tensor:
        return kernels.max_pool2d(torch.ones(1, 1, 4, 4, device="cuda"), 2)[0].cpu()


@own_devices
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_cuda_after_a_fork_is_a_clear_error_and_no_hang(context: str) -> None:
    """CUDA is in use in this process: a forked worker cannot use it, a spawned one can."""
    kernels.max_pool2d(torch.ones(1, 1, 4, 4, device="cuda"), 2)
    loader = DataLoader(_OnTheGpu(), batch_size=3, num_workers=1, multiprocessing_context=context, timeout=120)
    if context == "spawn":
        assert torch.equal(next(iter(loader)), torch.ones(3, 1, 2, 2))
        return
    with pytest.raises(RuntimeError, match="Cannot re-initialize CUDA in forked subprocess"):
        next(iter(loader))


class _Garbage:
    """A cycle whose collection lets another thread run."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        time.sleep(0)


def test_threads_parse_kernels_at_once() -> None:
    """Python 3.11.7 raises SystemError where threads parse at once; Triton parses when it compiles a kernel."""
    from kernels.convolution.general import _conv2d_fprop_kernel

    kernel = JITFunction(_conv2d_fprop_kernel.fn)
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    begun, end = threading.Barrier(5), time.monotonic() + 4

    def parse() -> None:
        begun.wait()
        while time.monotonic() < end:
            _Garbage()
            kernel.parse()

    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(50)  # collections in the middle of parsing
        with concurrent.futures.ThreadPoolExecutor(5) as executor:
            for done in [executor.submit(parse) for _ in range(5)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
