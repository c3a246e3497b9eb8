"""Offsets past 2^31 elements without the memory: few elements far apart, and the ends of outputs too large to fill.

The interpreter checks every integer for overflow and every address against the launch's tensors, so an offset computed in 32
bits fails here even for small tensors. On a GPU the last test uses real memory.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import mmap
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor

import kernels
from kernels.configs import tables
from kernels.convolution.problem import Geometry, Problem
from kernels.convolution.select import dgrad
from kernels.dropouts import philox_uniform_reference
from kernels.pooling.autograd import max_pool2d_dgrad
from kernels.runtime import launch
from kernels.runtime.backend import INTERPRETED
from kernels.runtime.launch import cdiv
from kernels.sgd import sgd_step
from kernels.sums import epilogue_backward, sum_parts

from ..configurations import precision_of_float32
from ..conftest import DEVICE, UNDER_TTSEM, own_devices
from ..oracle import integers

LIMIT = 2**31

interpreted = pytest.mark.skipif(not INTERPRETED or UNDER_TTSEM, reason="needs the interpreter, and reserved memory")

_NORESERVE = 0x4000  # Linux's MAP_NORESERVE, Python 3.11 has no name for it


def sparse(elements: int, dtype: torch.dtype) -> Tensor:
    """A tensor of zeros whose memory is allocated only when it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def spread(tensor: Tensor, dim: int) -> Tensor:
    """The same values in memory where ``dim`` (of size 3 or more) leads past :data:`LIMIT` in smaller steps."""
    step = LIMIT // (tensor.shape[dim] - 1) + 2**18
    assert step < LIMIT
    strides = list(torch.empty(tensor.shape, device="meta").transpose(0, dim).contiguous().transpose(0, dim).stride())
    strides[dim] = step
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    far = sparse(last + 1, tensor.dtype).as_strided(tensor.shape, strides)
    return far.copy_(tensor.detach())


MODULES = [
    importlib.import_module(f"kernels.{name}")
    for name in (
        *("convolution.cells", "convolution.general", "convolution.descriptor", "convolution.stem", "convolution.stem_pool"),
        *("convolution.row_stem", "convolution.row_stem_wgrad", "convolution.by_batch"),
        *("dropouts", "images", "matmul", "matmul_descriptor", "pooling.autograd", "pooling.kernels", "sums", "sgd"),
        *("linear_narrow", "loss_kernels"),
    )
]


def _range(*bounds: object) -> Iterator[object]:
    """Counters of the type of their bounds, as in compiled code; the interpreter makes Python integers of int64 bounds."""
    is_wide = any(isinstance(bound, tl.tensor) and bound.dtype == tl.int64 for bound in bounds)
    for i in range(*bounds):  # type: ignore[call-overload]
        yield tl.tensor(interpreter.TensorHandle(np.array([i], np.int64), tl.int64), tl.int64) if is_wide else i


@pytest.fixture
def _sparse_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing fill or copy a whole tensor: the interpreter would copy each tensor onto itself after a launch."""
    monkeypatch.setattr(launch, "poison_outputs", False)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    for module in MODULES:
        monkeypatch.setattr(module, "range", _range, raising=False)


# ------------------------------------------------------------------------------------------- elements far apart in memory


@dataclasses.dataclass(frozen=True)
class Far:
    """An operation on small tensors, and the shape of each tensor by name."""

    run: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    tf32: bool = False  # with the weight gradient's kernel for many images

    def results(self, tensors: dict[str, Tensor], grad: Tensor) -> list[Tensor]:
        """The output and all gradients for the output gradient ``grad``."""
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        with precision_of_float32("tf32" if self.tf32 else "ieee"), tables.override(**{"IMAGES_WGRAD": 1} if self.tf32 else {}):
            output = self.run(*leaves)
            return [output, *torch.autograd.grad(output, leaves, grad)]


X, W, B = (3, 4, 5, 6), (6, 2, 3, 2), (6,)
POOL = {"pool_kernel_size": 2}
FAR = {
    "conv2d": Far(
        lambda x, w, b: kernels.conv2d(x, w, b, 2, 1, groups=2, activation="relu"), {"input": X, "weight": W, "bias": B}
    ),
    "conv2d_half": Far(
        lambda x, w, b: kernels.conv2d(x, w, b, padding=1), {"input": (3, 16, 3, 4), "weight": (16, 16, 3, 3), "bias": (16,)},
        torch.float16,
    ),
    "conv2d_stem": Far(
        lambda x, w, b: kernels.conv2d(x, w, b, 4, 1), {"input": (3, 1, 19, 21), "weight": (8, 1, 11, 11), "bias": (8,)},
        torch.float16,
    ),
    "conv2d_relu_max_pool2d": Far(
        lambda x, w, b: kernels.conv2d_relu_max_pool2d(x, w, b, 1, 1, groups=2, **POOL), {"input": X, "weight": W, "bias": B}
    ),
    "conv2d_stem_pool": Far(
        lambda x, w, b: kernels.conv2d_relu_max_pool2d(x, w, b, 4, 1, pool_kernel_size=3, pool_stride=2),
        {"input": (3, 1, 23, 27), "weight": (8, 1, 11, 11), "bias": (8,)},
        torch.float16,
    ),
    "conv2d_stem_pool_wgrad": Far(
        lambda x, w, b: kernels.conv2d_relu_max_pool2d(x, w, b, 4, 1, pool_kernel_size=3, pool_stride=2),
        {"input": (3, 1, 23, 31), "weight": (16, 1, 11, 11), "bias": (16,)},
        torch.float16,
    ),
    "conv2d_rows_pool": Far(
        lambda x, w, b: kernels.conv2d_relu_max_pool2d(x, w, b, 4, 1, pool_kernel_size=3, pool_stride=2),
        {"input": (3, 1, 23, 27), "weight": (16, 1, 11, 11), "bias": (16,)},
        tf32=True,
    ),
    "max_pool2d": Far(lambda x: kernels.max_pool2d(x, 3, 2, 1), {"input": (3, 4, 5, 6)}),
    "max_pool2d_large": Far(lambda x: kernels.max_pool2d(x, 5, 1, 2), {"input": (3, 4, 5, 6)}),
    "linear": Far(
        lambda x, w, b: kernels.linear(x, w, b, activation="relu"), {"input": (5, 7), "weight": (35, 7), "bias": (35,)}
    ),
    "linear_half": Far(
        lambda x, w, b: kernels.linear(x, w, b), {"input": (5, 16), "weight": (40, 16), "bias": (40,)}, torch.float16
    ),
    "linear_relu_dropout": Far(
        lambda x, w, b: kernels.linear_relu_dropout(x, w, b, seed=3), {"input": (5, 7), "weight": (35, 7), "bias": (35,)}
    ),
    "linear_narrow": Far(
        lambda x, w, b: kernels.linear_relu_dropout(x, w, b, seed=3), {"input": (5, 7), "weight": (9, 7), "bias": (9,)}
    ),
    "dropout": Far(lambda x: kernels.dropout(x, seed=3), {"input": (5, 7)}),
    "cross_entropy": Far(
        lambda x: kernels.cross_entropy(x, torch.arange(15).view(5, 3) % 7, reduction="none"), {"input": (5, 7, 3)}
    ),
}  # fmt: skip


#: Operations and the tensor that is spread out. A bias is copied into a row first, the same way in all operations. The fused
#: first layer reads the same tensors as the convolution alone.
SPREAD = [
    (name, which)
    for name, far in FAR.items()
    for which in (*far.shapes, "grad")
    if (which != "bias" or name == "linear_half") and (not name.startswith("conv2d_stem_pool") or which == "grad")
]


def _dimensions(tensor: Tensor) -> list[int]:
    """The first and the last dimension that can be spread out."""
    found = [dim for dim, size in enumerate(tensor.shape) if size > 2]
    return sorted({found[0], found[-1]})


@interpreted
@pytest.mark.usefixtures("_sparse_memory", "small_tiles")
@pytest.mark.parametrize(("operation", "which"), SPREAD)
def test_tensors_whose_elements_are_far_apart(operation: str, which: str) -> None:
    """Output and gradients have the bits that they have for the same values in dense memory, for each dimension."""
    far = FAR[operation]
    tensors = {name: integers(*shape, dtype=far.dtype, high=1) for name, shape in far.shapes.items()}
    grad = integers(*far.run(*tensors.values()).shape, dtype=far.dtype, high=1, grad=False)
    expected = far.results(tensors, grad)
    target = grad if which == "grad" else tensors[which]
    for dim in _dimensions(target):
        there = spread(target, dim)
        got = far.results(tensors, there) if which == "grad" else far.results(tensors | {which: there}, grad)
        assert all(map(torch.equal, got, expected)), dim


AUGMENTATION = kernels.Augmentation(
    torch.tensor([[1, -2], [0, 3], [-1, 1]], dtype=torch.int32),
    torch.tensor([True, False, True]),
    torch.tensor([0.8, 1.0, 1.2]),
    torch.tensor([1.1, 0.9, 1.0]),
)


@interpreted
@pytest.mark.usefixtures("_sparse_memory")
@pytest.mark.parametrize("augmentation", [None, AUGMENTATION], ids=["plain", "augmented"])
def test_images_whose_pixels_are_far_apart(augmentation: kernels.Augmentation | None) -> None:
    images = torch.randint(0, 256, (4, 6, 5), dtype=torch.uint8)
    index = torch.tensor([3, 0, 2])
    expected = kernels.gather_resize(images, index, 7, augmentation=augmentation)
    for dim in range(3):
        assert torch.equal(kernels.gather_resize(spread(images, dim), index, 7, augmentation=augmentation), expected)
    assert torch.equal(kernels.gather_resize(images, spread(index, 0), 7, augmentation=augmentation), expected)


# ----------------------------------------------------------------------------------------- outputs of more than 2^31 elements


@pytest.fixture
def _corners(_sparse_memory: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run only the first eight and the last eight programs of each axis of a large grid."""

    def ends(*bounds: int) -> Iterable[int]:
        if len(bounds) > 1 or bounds[0] < 1000:
            return range(*bounds)
        return itertools.chain(range(8), range(bounds[0] - 8, bounds[0]))

    monkeypatch.setattr(interpreter, "range", ends, raising=False)
    with tables.override(BLOCK=256):
        yield


def _images_for(elements: int) -> int:
    """How many images of ``elements`` elements together just exceed :data:`LIMIT`."""
    return LIMIT // elements + 2


def _x(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return integers(*shape, dtype=dtype, high=1, grad=False)


def _many(image: Tensor, images: int) -> Tensor:
    """A batch of ``images`` times the same image, in the memory of one."""
    return image.expand(images, *image.shape[1:])


def _ends(got: Tensor, expected: Tensor) -> None:
    """Check the first and the last image of a batch of equal images."""
    assert got.numel() > LIMIT
    for image in (got[0], got[-1]):
        assert torch.equal(image.float(), expected[0].float())


def _conv2d() -> None:
    x, w, b = _x(1, 3, 4, 5), _x(8, 3, 2, 2), _x(8)
    _ends(kernels.conv2d(_many(x, _images_for(96)), w, b), F.conv2d(x.float(), w.float(), b.float()))


def _conv2d_dgrad() -> None:
    dz, w = _x(1, 8, 3, 4), _x(8, 3, 2, 2)
    n = _images_for(60)
    problem = Problem.of((n, 3, 4, 5), w, Geometry((1, 1), (0, 0), (1, 1), 1), (3, 4))
    dx, _, _ = dgrad(_many(dz, n), w, problem)
    _ends(dx, F.conv_transpose2d(dz.float(), w.float()))


def _dense(image: Tensor) -> Tensor:
    """NHWC images with more than :data:`LIMIT` elements together, of which only the first and the last image are not zero."""
    _, c, h, w = image.shape
    n = _images_for(c * h * w)
    images = sparse(n * h * w * c, image.dtype).view(n, h, w, c).permute(0, 3, 1, 2)
    images[0] = images[-1] = image[0]
    return images


def _conv2d_descriptor(images: int) -> None:
    """A tile is a pixel of many images, or a box of a few: the first program has the first pixel, the last the last."""
    x, w, b = _x(1, 16, 2, 2), _x(16, 16, 1, 1), _x(16)
    with tables.override(IMAGES=images):
        y = kernels.conv2d(_dense(x), w, b)
    exact = F.conv2d(x.float(), w.float(), b.float())
    assert y.numel() > LIMIT
    assert torch.equal(y[0, :, 0, 0].float(), exact[0, :, 0, 0])
    assert torch.equal(y[-1, :, 1, 1].float(), exact[0, :, 1, 1])


def _max_pool2d(channels_last: bool) -> None:
    x = _x(1, 6, 5, 4)
    y, position, _ = torch.ops.alexnet_triton.max_pool2d_fprop(
        _many(x, _images_for(24)), [2, 2], [2, 2], [0, 0], [1, 1], [2, 2], channels_last, False, True, False
    )
    exact, index = F.max_pool2d(x.float(), 2, return_indices=True)
    _ends(y, exact)
    _ends(position, index // 4 % 2 * 2 + index % 2)


def _max_pool2d_dgrad(window: int) -> None:
    """Windows are 2 x 2, which are unrolled, or 5 x 5."""
    grad = _x(1, 6, 2, 2)
    position = torch.randint(0, window**2, grad.shape, dtype=torch.uint8)
    size, stride = window + 1 + (window == 2), 2 if window == 2 else 1
    n = _images_for(6 * size**2)
    geometry = [window] * 2, [stride] * 2, [0, 0], [1, 1]
    with tables.override(SPLIT=n):  # one program for each image
        dx, _ = max_pool2d_dgrad(_many(grad, n), _many(position, n), [n, 6, size, size], *geometry, True, True, False)
    exact, _ = max_pool2d_dgrad(grad, position, [1, 6, size, size], *geometry, True, True, False)
    _ends(dx, exact)


def _stem() -> None:
    x, w, b = _x(1, 1, 19, 19), _x(8, 1, 11, 11), _x(8)
    y = kernels.conv2d(_many(x, _images_for(72)), w, b, 4, 1)
    exact = F.conv2d(x.float(), w.float(), b.float(), 4, 1)
    assert y.numel() > LIMIT
    assert torch.equal(y[0, :, 0, 0].float(), exact[0, :, 0, 0])
    assert torch.equal(y[-1, :, -1, -1].float(), exact[0, :, -1, -1])


def _stem_pool() -> None:
    """There are so many filters that the output is larger than the cells."""
    x, w, b = _x(1, 1, 35, 35), _x(256, 1, 11, 11), _x(256)
    n = _images_for(9 * 256)
    y = kernels.conv2d_relu_max_pool2d(_many(x, n), w, b, 4, 1, pool_kernel_size=3, pool_stride=2)
    exact = F.max_pool2d(F.relu(F.conv2d(x.float(), w.float(), b.float(), 4, 1)), 3, 2)
    assert y.numel() > LIMIT
    assert torch.equal(y[0, :16, 0, 0].float(), exact[0, :16, 0, 0])
    assert torch.equal(y[-1, -16:, -1, -1].float(), exact[0, -16:, -1, -1])


def _linear() -> None:
    x, w, b = _x(1, 3), _x(64, 3), _x(64)
    _ends(kernels.linear(_many(x, _images_for(64)), w, b), F.linear(x.float(), w.float(), b.float()))


def _linear_wgrad() -> None:
    """A weight of more than 2^31 elements; its gradient is an outer product."""
    side = 46342
    dz, x = _x(3, side), _x(3, side)
    dw = torch.ops.alexnet_triton.linear_wgrad(dz, x, torch.empty((), dtype=torch.float16).expand(side, side))
    assert dw.numel() > LIMIT
    exact = dz[:, -10:].float().t() @ x[:, -10:].float()
    assert torch.equal(dw[-10:, -10:].float(), exact)


def _kept(first: int, count: int, p: float, seed: int) -> Tensor:
    return philox_uniform_reference(torch.tensor(seed), count, first) >= p


def _dropout() -> None:
    n = LIMIT + 1000
    x = sparse(n, torch.float16)
    x[:100] = x[-100:] = 3
    y = kernels.dropout(x, 0.5, seed=5)
    for part, first in ((y[:100], 0), (y[-100:], n - 100)):
        assert torch.equal(part, 6 * _kept(first, 100, 0.5, 5).half())
    mask = kernels.dropout_mask((n,), 0.5, 5)
    assert torch.equal(mask[-100:], _kept(n - 100, 100, 0.5, 5))


def _epilogue() -> None:
    """The backward pass of dropout, which draws the mask again from the element's index."""
    n = _images_for(64)
    grad = _x(1, 64, 1, 1) + 2
    with tables.override(SPLIT=cdiv(n, 16)):  # one program for each block of rows
        dz, _, _ = epilogue_backward(_many(grad, n), None, torch.tensor(5), 0.5, write_dz=True, sum_columns=False)
    for image, number in ((dz[0], 0), (dz[-1], n - 1)):
        assert torch.equal(image.flatten(), grad.flatten() * 2 * _kept(number * 64, 64, 0.5, 5).half())


def _parts() -> None:
    """Five parts of a large weight's gradient: the last part is past the limit, the weight itself is not."""
    elements = 2**29 + 64
    partial, out = sparse(5 * elements, torch.float32).view(5, elements), sparse(elements, torch.float16)
    ends = torch.arange(5.0)[:, None] + torch.arange(10.0)
    partial[:, :10] = partial[:, -10:] = ends
    sum_parts(partial, out.view(-1, 1, 1, 1))
    assert torch.equal(out[:10].float(), ends.sum(0))
    assert torch.equal(out[-10:].float(), ends.sum(0))


def _gather_resize() -> None:
    images = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    got = kernels.gather_resize(images, torch.tensor([2]).expand(_images_for(64)), 8, dtype=torch.float16)
    _ends(got, kernels.gather_resize(images, torch.tensor([2]), 8, dtype=torch.float16))


def _sgd() -> None:
    n = LIMIT + 1000
    param, grad = sparse(n, torch.float32), sparse(n, torch.float32)
    param[:100] = param[-100:] = 2
    grad[:100] = grad[-100:] = torch.arange(100.0)
    sgd_step([param], [grad], lr=0.5)
    for part in (param[:100], param[-100:]):
        assert torch.equal(part, 2 - 0.5 * torch.arange(100.0))


BIG: dict[str, Callable[[], None]] = {
    "conv2d": _conv2d,
    "conv2d_dgrad": _conv2d_dgrad,
    "conv2d_images": functools.partial(_conv2d_descriptor, 1),
    "conv2d_box": functools.partial(_conv2d_descriptor, 0),
    "conv2d_stem": _stem,
    "conv2d_stem_pool": _stem_pool,
    "max_pool2d_nhwc": functools.partial(_max_pool2d, True),
    "max_pool2d_nchw": functools.partial(_max_pool2d, False),
    "max_pool2d_dgrad": functools.partial(_max_pool2d_dgrad, 2),
    "max_pool2d_gather_dgrad": functools.partial(_max_pool2d_dgrad, 5),
    "linear": _linear,
    "linear_wgrad": _linear_wgrad,
    "dropout": _dropout,
    "epilogue": _epilogue,
    "parts": _parts,
    "gather_resize": _gather_resize,
    "sgd": _sgd,
}


@interpreted
@pytest.mark.usefixtures("_corners")
@pytest.mark.parametrize("name", BIG)
def test_the_ends_of_tensors_of_more_than_2_to_the_31_elements(name: str) -> None:
    BIG[name]()


@interpreted
@pytest.mark.usefixtures("_corners")
@pytest.mark.parametrize("name", sorted(BIG.keys() - {"gather_resize"}))  # which always counts images in 64 bits
def test_offsets_in_32_bits_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        monkeypatch.setattr(module, "needs_int64", lambda *_: False, raising=False)
    with pytest.raises(Exception, match=r"overflow detected|outside of every tensor"):
        BIG[name]()


# ------------------------------------------------------------------------------------------------------ with all its memory


@pytest.mark.slow
@own_devices
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU with 32 GB")
def test_the_first_layer_at_a_batch_of_8192() -> None:
    """2.29e9 outputs take 4.6 GB: convolution, pool and dropout, forward and backward, are checked at the batch's ends."""
    n, dtype = 8192, torch.bfloat16
    x = torch.randn(n, 1, 224, 224, dtype=dtype, device=DEVICE, requires_grad=True)
    w = (torch.randn(96, 1, 11, 11, device=DEVICE) / 11).to(dtype).requires_grad_()
    b = torch.randn(96, dtype=dtype, device=DEVICE, requires_grad=True)
    y = kernels.conv2d(x, w, b, 4, 1, activation="relu")
    assert y.numel() > LIMIT
    ends = torch.tensor([0, 1, n - 2, n - 1], device=DEVICE)
    few = [x.detach()[ends].float().requires_grad_(), w.detach().float().requires_grad_(), b.detach().float().requires_grad_()]
    exact = F.relu(F.conv2d(*few, 4, 1))
    torch.testing.assert_close(y[ends].float(), exact, rtol=1e-2, atol=1e-2)

    grad = torch.zeros_like(y)
    grad[ends] = torch.randn_like(grad[ends])
    dx, dw, db = torch.autograd.grad(y, (x, w, b), grad)
    # With the layer's own mask: a sum that rounds to zero only in bfloat16 would pass another gradient.
    exact_grads = torch.autograd.grad(F.conv2d(*few, 4, 1), few, grad[ends].float() * (y[ends] > 0))
    for ours, theirs in zip((dx[ends], dw, db), exact_grads, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item())
    assert not dx[2:-2].any()
    del dx, grad

    y = y.detach().requires_grad_()
    pooled = kernels.max_pool2d(y, 3, 2)
    at_ends = y.detach()[ends].requires_grad_()
    assert torch.equal(pooled[ends], F.max_pool2d(at_ends, 3, 2))
    ours = torch.autograd.grad(pooled.sum(), y)[0][ends]
    assert torch.equal(ours, torch.autograd.grad(kernels.max_pool2d(at_ends, 3, 2).sum(), at_ends)[0])
    del pooled, ours

    last = y.numel() - 1000
    dropped = kernels.dropout(y.detach().permute(0, 2, 3, 1), 0.5, seed=5).view(-1)[last:]
    kept = philox_uniform_reference(torch.tensor(5, device=DEVICE), 1000, last) >= 0.5
    assert torch.equal(dropped, y.detach().permute(0, 2, 3, 1).reshape(-1)[last:] * kept * 2)
