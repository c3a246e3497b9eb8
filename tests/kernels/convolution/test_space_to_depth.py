"""A strided first layer that reads cells: images that the caller has rearranged (space-to-depth)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.configs import tables

from ...conftest import DEVICE
from ...oracle import dtype_id, integers, randn

POOL = {"pool_kernel_size": 3, "pool_stride": 2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def images(n: int, c: int, dtype: torch.dtype, height: int = 43, width: int = 40) -> torch.Tensor:
    return randn(n, c, height, width, dtype=dtype, grad=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_elements_are_where_they_are_said_to_be(backend: str, channels: int, dtype: torch.dtype) -> None:
    x = images(2, channels, dtype)
    with kernels.use_backend(backend):
        cells = kernels.space_to_depth(x, 11, 4, (1, 2))
    rows, columns = (43 + 2 - 11) // 4 + 3, (40 + 4 - 11) // 4 + 3
    assert cells.shape == (2, rows, columns, 16 * channels)
    assert cells.is_contiguous()
    padded = torch.zeros(2, channels, 4 * rows + 8, 4 * columns + 8, dtype=dtype, device=DEVICE)
    padded[:, :, 1:44, 2:42] = x
    for a, b, c in ((0, 0, 0), (1, 3, channels - 1), (3, 2, 0)):
        expected = padded[:, c, a : 4 * rows : 4, b : 4 * columns : 4]
        assert torch.equal(cells[..., (a * 4 + b) * channels + c], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_block_on_cells_is_the_block_on_images(backend: str, channels: int, dtype: torch.dtype, launches: list[str]) -> None:
    """Output and gradients are bit-identical, with one rearrangement fewer."""
    # Integers, so that PyTorch's order of summation does not matter.
    shapes = ((2, channels, 43, 40), (16, channels, 11, 11), (16,))
    x, w, b = (integers(*shape, dtype=dtype, high=1) for shape in shapes)
    x = x.detach()
    results = []
    with kernels.use_backend(backend), tables.override(IMAGES_WGRAD=1):
        cells = kernels.space_to_depth(x, 11, 4, 1)
        for given, padding in ((x, 1), (cells, 0)):
            launches.clear()
            y = kernels.conv2d_relu_max_pool2d(given, w, b, 4, padding, cells=given is cells, **POOL)
            grad = (torch.arange(y.numel(), device=DEVICE) % 3 - 1).view(y.shape).to(dtype)
            results.append((y, *torch.autograd.grad(y, (w, b), grad)))
    for on_images, on_cells in zip(*results, strict=True):
        assert torch.equal(on_images, on_cells)
    if backend == "auto" and dtype != torch.float32:
        assert "_conv2d_stem_pool_kernel" in launches or "_conv2d_stem_kernel" in launches
        assert "_space_to_depth_kernel" not in launches


def test_few_images_have_a_gradient_too() -> None:
    """With few images the weight gradient normally reads the images, which do not exist here."""
    x, w = integers(1, 1, 27, 27, dtype=torch.float16, high=1), integers(16, 1, 11, 11, dtype=torch.float16, high=1)
    x = x.detach()
    with tables.override(IMAGES_WGRAD=0):
        y = kernels.conv2d_relu_max_pool2d(kernels.space_to_depth(x, 11, 4), w, stride=4, cells=True, **POOL)
        (ours,) = torch.autograd.grad(y.sum(), w)
    expected = F.max_pool2d(F.relu(F.conv2d(x.float(), w.float(), stride=4)), 3, 2)
    (exact,) = torch.autograd.grad(expected.sum(), w)
    assert torch.equal(y.float(), expected)
    assert torch.equal(ours, exact)


def test_cells_that_are_not_aligned() -> None:
    """The cells are a view at an address where no descriptor may begin, in both passes."""
    x, w = integers(2, 1, 27, 27, dtype=torch.float16, high=1), integers(16, 1, 11, 11, dtype=torch.float16, high=1)
    cells = kernels.space_to_depth(x.detach(), 11, 4)
    memory = torch.empty(cells.numel() + 1, dtype=cells.dtype, device=DEVICE)
    shifted = memory[1:].view(cells.shape).copy_(cells)
    assert shifted.data_ptr() % 16 != 0
    results = []
    for given in (cells, shifted):
        y = kernels.conv2d_relu_max_pool2d(given, w, stride=4, cells=True, **POOL)
        results.append((y, *torch.autograd.grad(y.sum(), w)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_reads_cells() -> None:
    w = randn(16, 1, 11, 11, dtype=torch.float16)
    like = images(1, 1, torch.float16)
    assert kernels.reads_cells(like, w, 4)
    assert kernels.reads_cells(like, w, (4, 4), 1, 1)
    assert not kernels.reads_cells(like.float(), w.float(), 4)
    assert not kernels.reads_cells(like[:0], w, 4)
    assert not kernels.reads_cells(like, w, (4, 2))
    assert not kernels.reads_cells(like, w, 4, 2)
    assert not kernels.reads_cells(like, w[:9], 4)
    assert not kernels.reads_cells(like, w, 3)
    with kernels.use_backend("torch"):
        assert not kernels.reads_cells(like, w, 4)


def test_what_is_refused() -> None:
    x = images(1, 1, torch.float16)
    w = randn(16, 1, 11, 11, dtype=torch.float16)
    cells = kernels.space_to_depth(x, 11, 4)
    block = kernels.conv2d_relu_max_pool2d
    with pytest.raises(ValueError, match=r"cells must be contiguous \(N, rows, columns, 16\)"):
        block(x, w, stride=4, cells=True, **POOL)
    with pytest.raises(ValueError, match="need padding 0"):
        block(cells, w, stride=4, padding=1, cells=True, **POOL)
    with pytest.raises(ValueError, match="cells have one stride"):
        block(cells, w, stride=(4, 2), cells=True, **POOL)
    with pytest.raises(ValueError, match="cells take no gradient"):
        block(cells.requires_grad_(), w, stride=4, cells=True, **POOL)
    with pytest.raises(ValueError, match="space_to_depth takes no gradient"):
        kernels.space_to_depth(x.clone().requires_grad_(), 11, 4)
    with pytest.raises(ValueError, match="smaller than a filter"):
        kernels.space_to_depth(x, 50, 4)
    with pytest.raises(ValueError, match=r"cells have one stride, got \(4, 2\)"):
        kernels.space_to_depth(x, 11, (4, 2))
    with pytest.raises(ValueError, match=r"input must be \(N, C, H, W\)"):
        kernels.space_to_depth(x[0], 11, 4)
