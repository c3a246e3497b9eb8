"""Results are bit-identical in every run, in every process, and wherever a sample stands in its batch.

``tests/benchmarks/test_offline.py`` checks in compiled code that no kernel adds floats in an unspecified order.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from alexnet_triton.data.augment import EVERYTHING, draw_augmentation
from alexnet_triton.data.fashion_mnist import load_fashion_mnist
from alexnet_triton.models import IMAGE_SIZE
from alexnet_triton.training.recipe import Recipe, Where
from alexnet_triton.training.trainer import Trainer
from kernels.configs import tables
from kernels.runtime.backend import INTERPRETED

from . import determinism
from .configurations import precision_of_float32
from .conftest import DEVICE, SMALL_TILES, own_devices
from .determinism import DTYPES, PRECISIONS, TRAINED, deterministic, digest, network, trained
from .oracle import dtype_id, randn

ROOT = Path(__file__).parents[1]


each_precision = pytest.mark.parametrize(
    ("dtype", "precision"), PRECISIONS, ids=lambda value: value if isinstance(value, str) else dtype_id(value)
)


@functools.cache
def _of_another_process() -> dict[str, str]:
    # Another hash seed: another order of sets, other addresses.
    environment = os.environ | {"PYTHONHASHSEED": "12345", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-m", "tests.determinism"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=250)
    return json.loads(run.stdout)


#: Kernels that the steps launch. Dropout is in a product's epilogue. Half-precision kernels load through descriptors.
KERNELS_OF_BOTH = {
    *("_epilogue_backward_kernel", "_sum_parts_kernel", "_matmul_finish_kernel"),
    *("_linear_narrow_fprop_kernel", "_linear_narrow_backward_kernel"),
    *("_max_pool2d_fprop_kernel", "_max_pool2d_dgrad_kernel", "_sgd_kernel"),
}
KERNELS_OF_FLOAT32 = {"_conv2d_fprop_kernel", "_conv2d_dgrad_kernel", "_conv2d_wgrad_kernel", "_matmul_kernel"}
KERNELS_OF_TF32 = {
    *("_fold_filter_kernel", "_unfold_filter_kernel", "_conv2d_rows_kernel", "_conv2d_rows_wgrad_kernel"),
    *("_max_pool2d_dgrad_by_batch_kernel", "_cells_by_batch_kernel"),
    *("_by_batch_kernel", "_conv2d_box_kernel", "_conv2d_images_wgrad_kernel"),
    *("_matmul_descriptor_kernel", "_row_major_kernel"),
}
KERNELS_OF_HALF = {
    *("_space_to_depth_kernel", "_fold_filter_kernel", "_unfold_filter_kernel", "_conv2d_stem_pool_kernel"),
    *("_conv2d_stem_pool_wgrad_kernel", "_conv2d_box_kernel", "_conv2d_images_wgrad_kernel", "_matmul_descriptor_kernel"),
}


@pytest.mark.slow
@own_devices
@pytest.mark.parametrize(("dtype", "precision"), TRAINED, ids=lambda v: v if isinstance(v, str) else dtype_id(v))
def test_ten_steps_twice_here_and_in_another_process(
    dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch, launches: list[str]
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch requires this on CUDA
    first = trained(dtype, precision=precision)
    assert first.endswith(f"conv {precision} matmul {precision}")
    if INTERPRETED:
        of_float32 = KERNELS_OF_TF32 if precision == "tf32" else KERNELS_OF_FLOAT32
        assert set(launches) == KERNELS_OF_BOTH | (of_float32 if dtype == torch.float32 else KERNELS_OF_HALF)
    else:  # the kernels of convolutions and products depend on the GPU
        assert set(launches) >= KERNELS_OF_BOTH
    if dtype == torch.float32:  # state that one call leaves for the next does not depend on dtype
        assert trained(dtype, precision=precision) == first
    assert _of_another_process()[f"{dtype} {precision}"] == first


def test_the_digest_sees_one_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One flipped bit in one element of one gradient of one step changes the digest; without the flip it is the same again."""
    first = trained(torch.float32, steps=1)

    def flip(gradient: Tensor) -> Tensor:
        flipped = gradient.clone()
        flipped.view(torch.int32).view(-1)[:1].bitwise_xor_(1)
        assert (flipped != gradient).sum() == 1
        return flipped

    def with_a_flipped_bit(dtype: torch.dtype) -> torch.nn.Module:
        net = network(dtype)
        net[0].bias.register_hook(flip)  # the parameter whose gradient is computed last
        return net

    monkeypatch.setattr(determinism, "network", with_a_flipped_bit)
    assert trained(torch.float32, steps=1) != first
    monkeypatch.setattr(determinism, "network", network)
    assert trained(torch.float32, steps=1) == first


def _each_operation() -> dict[str, Callable[[], list[Tensor]]]:
    """For each public operation, a function that returns its output and the gradients of all its inputs."""

    def all_of(run: Callable[..., Tensor], *shapes: tuple[int, ...]) -> list[Tensor]:
        leaves = [randn(*shape, dtype=torch.float32) for shape in shapes]
        output = run(*leaves)
        return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]

    def linked(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        y, link = kernels.linked_conv2d(x, w, padding=1)
        return kernels.conv2d(y, v, padding=1, link=link)

    def resized() -> list[Tensor]:
        images = torch.randint(0, 256, (6, 28, 28), dtype=torch.uint8, device=DEVICE)
        index = torch.tensor([4, 0, 4], device=DEVICE)
        return [kernels.gather_resize(images, index, 30, augmentation=draw_augmentation(3, index.device))]

    x, w, b = (2, 4, 9, 7), (6, 4, 3, 3), (6,)
    return {
        "conv2d": lambda: all_of(lambda x, w, b: kernels.conv2d(x, w, b, 2, 1, activation="relu"), x, w, b),
        "linked_conv2d": lambda: all_of(linked, x, w, (5, 6, 3, 3)),
        "fused": lambda: all_of(lambda x, w, b: kernels.conv2d_relu_max_pool2d(x, w, b, pool_kernel_size=2), x, w, b),
        "max_pool2d": lambda: all_of(lambda x: kernels.max_pool2d(x, 3, 2, 1, return_indices=True)[0], x),
        "max_pool2d_of_large_windows": lambda: all_of(lambda x: kernels.max_pool2d(x, 5, 1, 2), x),
        "linear": lambda: all_of(lambda x, w, b: kernels.linear(x, w, b, activation="relu"), (5, 70), (9, 70), (9,)),
        "linear_relu_dropout": lambda: all_of(kernels.linear_relu_dropout, (5, 70), (9, 70), (9,)),
        "dropout": lambda: all_of(kernels.dropout, (5, 70)),
        "cross_entropy": lambda: all_of(
            lambda x: kernels.cross_entropy(x, torch.arange(50, device=x.device)).view(1), (50, 70)
        ),
        "gather_resize": resized,
    }


@own_devices
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", _each_operation())
def test_each_operation_satisfies_deterministic_algorithms(name: str) -> None:
    """Two runs from one seed agree under ``torch.use_deterministic_algorithms``, which also fills uninitialized memory."""
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        with deterministic():
            results.append(digest(_each_operation()[name]()))
    assert results[0] == results[1]


@own_devices
@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=pytest.mark.skipif(DEVICE != "cuda", reason="CUDA's"))])
def test_an_epoch_of_the_trainer_satisfies_deterministic_algorithms(graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoch has augmentation, dropout, momentum and a smaller last batch."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setitem(IMAGE_SIZE, "alexnet", 27)
    recipe = Recipe(batch_size=4, lr=0.1, momentum=0.9, **dataclasses.asdict(EVERYTHING))
    split = load_fashion_mnist("sample").train.limited(10)
    results = []
    for _ in range(2):
        with deterministic():
            net = network(torch.float32)
            trainer = Trainer(net, split, recipe, Where(torch.device(DEVICE), graph))
            trainer.epoch(torch.Generator().manual_seed(1))
            results.append(digest(p.clone() for p in net.parameters()))
    assert results[0] == results[1]


def test_deterministic_algorithms_refuse_what_is_not() -> None:
    values = torch.zeros(3, device=DEVICE)
    with deterministic(), pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        values.put_(torch.tensor([0, 0], device=DEVICE), torch.ones(2, device=DEVICE))


Operation = Callable[[Tensor], Tensor]


def _operations(dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], Operation]]:
    """For each operation, the shape of one sample and a function of a batch of samples."""

    def w(*shape: int) -> Tensor:
        return randn(*shape, dtype=dtype, grad=False)

    stem, stem_bias, wide, wide_bias = w(16, 1, 11, 11), w(16), w(40, 32, 3, 3), w(40)
    grouped, fc, fc_bias = w(6, 2, 3, 2), w(45, 70), w(45)
    return {
        "conv2d_relu_max_pool2d": (
            (1, 33, 37),
            lambda x: kernels.conv2d_relu_max_pool2d(x, stem, stem_bias, 4, 1, pool_kernel_size=3, pool_stride=2),
        ),
        "conv2d": ((32, 5, 6), lambda x: kernels.conv2d(x, wide, wide_bias, padding=1, activation="relu")),
        "conv2d_grouped": ((4, 7, 6), lambda x: kernels.conv2d(x, grouped, None, 2, 1, groups=2)),
        "max_pool2d": ((5, 9, 7), lambda x: kernels.max_pool2d(x, 3, 2, 1)),
        "linear": ((70,), lambda x: kernels.linear(x, fc, fc_bias, activation="relu")),
    }


@pytest.mark.thin
@each_precision
@pytest.mark.parametrize("name", _operations(torch.float32))
@pytest.mark.parametrize("images", [0, 1], ids=["for_few", "for_many"])
def test_a_sample_gives_the_same_bits_wherever_it_stands(name: str, dtype: torch.dtype, precision: str, images: int) -> None:
    if images and not name.startswith("conv2d"):
        pytest.skip("only a convolution has a kernel for many images")
    shape, operation = _operations(dtype)[name]
    n = 7
    x = randn(n, *shape, dtype=dtype, grad=False)
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2], device=DEVICE)
    with tables.override(**SMALL_TILES, IMAGES=images), precision_of_float32(precision):
        there, here = operation(x[order]), operation(x)[order]
        filled = operation(torch.cat([x[:1].expand(n - 1, *shape), x[3:4]]))  # the other samples do not matter either
    assert torch.equal(there, here)
    assert torch.equal(filled[-1], here[0])


@own_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_network_gives_a_sample_the_same_bits_wherever_it_stands(dtype: torch.dtype) -> None:
    net = network(dtype).eval()
    x = randn(5, 1, 33, 37, dtype=dtype, grad=False)
    with torch.no_grad():
        assert torch.equal(net(x.flip(0)), net(x).flip(0))
