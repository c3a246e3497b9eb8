"""Runs every kernel once under NVIDIA's compute-sanitizer: memcheck, racecheck and initcheck.

``python -m tests.sanitize`` (``make sanitize`` on a machine with a CUDA GPU) runs ``python -m tests.sanitize --launch`` under
each tool. Results are not compared here (the suite does that). Outputs are not poisoned, so that initcheck can see elements
that no kernel wrote.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

import kernels
from kernels.advanced import add_cross_entropy
from kernels.configs import tables
from kernels.runtime import launch
from kernels.runtime.backend import capability, has_tma
from kernels.sgd import sgd_step

from .configurations import DTYPES, kernel_names, precision_of_float32

ROOT = Path(__file__).parents[1]
TOOLS = {
    "memcheck": ("--leak-check", "no"),
    "racecheck": ("--racecheck-report", "all"),
    "initcheck": (),
}
#: Parts of the names of kernels that load through tensor descriptors, or that such kernels need: older GPUs run none of them.
DESCRIPTORS = (
    *("_descriptor_", "_images_", "_box_", "_stem_", "_rows_", "_space_to_depth_", "_fold_", "_unfold_", "_by_batch_"),
    *("_row_major_", "_shares_", "_stream_k_", "_taps_"),
)


def launch_all(device: torch.device) -> set[str]:
    """Launch every kernel of the package on small ragged tensors on ``device``; return the kernels' names.

    The operations run three times: observed, so that the launch functions run; unobserved, which records plans; by these plans.
    """
    launched: set[str] = set()
    for watched in (True, False, False):
        with launch.observe_launches(lambda kernel, *_: launched.add(kernel.fn.__name__)) if watched else nullcontext():
            for dtype, precision in DTYPES:
                with precision_of_float32(precision):
                    _operations(device, dtype)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return launched


def _operations(device: torch.device, dtype: torch.dtype) -> None:
    def randn(*shape: int, grad: bool = True) -> Tensor:
        # Made on the CPU, so that only this package's kernels run under the tool.
        return torch.randn(shape).to(dtype).to(device).requires_grad_(grad)

    def backward(y: Tensor) -> None:
        y.backward(torch.ones(y.shape, dtype=y.dtype).to(device))

    # AlexNet's first layers, then the kernels for many and for few images, then those for any geometry.
    image = randn(3, 1, 39, 47, grad=False)  # conv1 has no input gradient; that kernel runs below
    backward(kernels.conv2d_relu_max_pool2d(image, randn(96, 1, 11, 11), randn(96), 4, 1, pool_kernel_size=3, pool_stride=2))
    with tables.override(IMAGES_WGRAD=1):
        backward(kernels.conv2d(image, randn(96, 1, 11, 11), randn(96), 4, 1, activation="relu"))
    for images in (1, 0):
        with tables.override(IMAGES=images, IMAGES_WGRAD=1):
            y, link = kernels.linked_conv2d(randn(5, 64, 5, 6), randn(80, 64, 3, 3), randn(80), padding=1)
            backward(kernels.conv2d(y, randn(48, 80, 3, 3), randn(48), padding=1, activation="relu", link=link))
    for folded in (1, 0):
        with tables.override(IMAGES_WGRAD=1, STREAM_K=1, PROGRAMS=5, FOLDED=folded):
            backward(kernels.conv2d(randn(5, 64, 5, 6), randn(80, 64, 3, 3), None, padding=1))
    with tables.override(TAPS=1):
        kernels.conv2d(randn(5, 48, 5, 6), randn(80, 48, 3, 3), randn(80), padding=1, activation="relu")
    backward(kernels.conv2d(randn(2, 6, 9, 7), randn(9, 2, 3, 3), randn(9), 2, 1, groups=3, activation="relu"))
    for window in (3, 5):
        backward(kernels.max_pool2d(randn(2, 17, 9, 11), window, 2, 1))
    # Images of three channels, and images without a gradient: in TF32 no other launch copies those.
    backward(kernels.conv2d(randn(3, 3, 23, 27, grad=False), randn(16, 3, 11, 11), None, 4, 2))
    backward(kernels.conv2d(randn(5, 64, 5, 6, grad=False), randn(80, 64, 3, 3), None, padding=1))
    with tables.override(SPLIT=3):
        backward(kernels.linear_relu_dropout(randn(37, 200), randn(72, 200), randn(72), 0.5))
    with tables.override(PROGRAMS=3, CUT=1):
        backward(kernels.linear_relu_dropout(randn(37, 200), randn(72, 200), randn(72), 0.5))
    for narrow in (1, 0):
        with tables.override(NARROW=narrow):
            backward(kernels.linear_relu_dropout(randn(19, 21), randn(10, 21), randn(10), 0.5))
    labels = torch.tensor([3, 0, -100, 4, 99, 2, 1]).to(device)
    for split in (1, 3):
        with tables.override(BLOCK_ROWS=2, BLOCK_COLUMNS=16, SPLIT=split):
            weight = randn(37, grad=False)
            backward(kernels.cross_entropy(randn(7, 37), labels, weight=weight, label_smoothing=0.1))
            backward(kernels.cross_entropy(randn(7, 37, 2), labels[:, None].expand(7, 2), reduction="none"))
            totals = torch.zeros(2).to(device)
            for options in ({}, {"weight": weight.float(), "label_smoothing": 0.1}):
                add_cross_entropy(randn(7, 37, grad=False), labels, totals[0], totals[1], 0.5, **options)
    backward(kernels.dropout(randn(5, 300), 0.5))
    kernels.dropout_mask((70, 30), 0.5, 1, device=device)

    pixels = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8).to(device)
    index = torch.tensor([4, 0]).to(device)
    ones = torch.ones(2).to(device)
    augmentation = kernels.Augmentation(torch.tensor([[1, -2], [0, 3]], dtype=torch.int32).to(device), ones > 0, ones, ones)
    windows = augmentation._replace(size=torch.tensor([[9, 40], [28, 1]], dtype=torch.int32).to(device))
    changes = (None, augmentation, windows, windows._replace(flip=None, brightness=None, contrast=None))
    for augmented, cells in itertools.product(changes, (None, kernels.Cells(11, 4, (1, 2)))):
        kernels.gather_resize(pixels, index, 45, dtype=dtype, augmentation=augmented, cells=cells)

    sizes = (5000, 10, 4097)
    params, grads = ([randn(size, grad=False) for size in sizes] for _ in range(2))
    masters = None if dtype == torch.float32 else [p.float() for p in params]
    ties = None
    if dtype == torch.bfloat16:
        masters, ties = ([torch.zeros_like(p, dtype=kind) for p in params] for kind in (torch.int16, torch.int8))
        masters[0][::2] = -0x8000  # as if between two bfloat16 numbers
    buffers = [torch.zeros(size).to(device) for size in sizes]
    for first_step in (True, False):
        sgd_step(params, grads, masters, buffers, lr=0.01, momentum=0.9, weight_decay=1e-4, first_step=first_step, ties=ties)


def missing_kernels(launched: set[str], device: torch.device) -> set[str]:
    """Kernels of the package that are not in ``launched``, except those that ``device`` cannot run."""
    missing = kernel_names() - launched
    if capability(device) >= 100:  # there conv1 and its pool run as two kernels
        missing = {k for k in missing if "_stem_pool_" not in k}
    return missing if has_tma(device) else {k for k in missing if not any(part in k for part in DESCRIPTORS)}


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer: from PATH or a CUDA toolkit."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)


def main() -> None:
    """Run each tool; exit with code 1 where a tool found an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--launch", action="store_true", help="only launch the kernels, in this process")
    parser.add_argument("--tool", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    arguments = parser.parse_args()
    if arguments.launch:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        missing = missing_kernels(launch_all(device), device)
        sys.exit(f"sanitize: no operation launched {sorted(missing)}: add one to tests/sanitize.py" if missing else 0)
    if not torch.cuda.is_available():
        sys.exit("sanitize: compute-sanitizer needs a CUDA GPU")
    sanitizer = find_sanitizer()
    if sanitizer is None:
        sys.exit("sanitize: found no compute-sanitizer in PATH or CUDA_HOME; the CUDA toolkit contains it")
    # Without PyTorch's caching allocator, which rounds sizes up and reuses memory that is already written.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    found = []
    for tool in arguments.tool:
        command = [sanitizer, "--tool", tool, *TOOLS[tool], "--error-exitcode", "1"]
        command += [sys.executable, "-m", "tests.sanitize", "--launch"]
        print(f"compute-sanitizer {tool}", flush=True)
        found += [tool] * (subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode != 0)
    sys.exit(f"sanitize: {', '.join(found)} found errors" if found else 0)


if __name__ == "__main__":
    main()
