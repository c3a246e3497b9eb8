"""use_backend: which implementation runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import kernels
from kernels.backend import current_backend

from ..conftest import DEVICE


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
    """In a process of its own without the interpreter; importing also neither touches CUDA nor loads the extras."""
    import os

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_INTERPRETER], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "cannot run on a tensor on cpu" in result.stdout
    assert "TRITON_INTERPRET=1" in result.stdout
