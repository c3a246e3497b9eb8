"""A strided first layer in TF32 in training: what it saves, which gradients it computes, higher derivatives, compilation.

TF32 rounds no products or sums of small integers, so results equal those of PyTorch's own operations bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from alexnet_triton import fuse
from kernels.convolution.problem import Geometry, Problem
from kernels.convolution.relu_max_pool2d import conv2d_relu_max_pool2d_reference
from kernels.convolution.row_stem import Rows

from ...conftest import BACKEND, DEVICE, own_devices
from ...oracle import TF32_EPS, check, integers, tf32_numbers
from .conftest import hopper

pytestmark = [hopper, pytest.mark.usefixtures("tf32")]

GEOMETRY = {"stride": 4, "padding": 1}
BLOCK = {**GEOMETRY, "pool_kernel_size": 3, "pool_stride": 2}
ROWS = "_conv2d_rows_kernel"


def tensors(n: int = 3, h: int = 31, w: int = 35, k: int = 16) -> list[Tensor]:
    """Images, and a weight and a bias that require gradients."""
    x, weight, bias = (integers(*s, dtype=torch.float32, high=1) for s in ((n, 1, h, w), (k, 1, 11, 11), (k,)))
    return [x.detach(), weight, bias]


def block(*given: Tensor | None) -> Tensor:
    return kernels.conv2d_relu_max_pool2d(*given, **BLOCK)


def reference(*given: Tensor | None) -> Tensor:
    return conv2d_relu_max_pool2d_reference(*given, **BLOCK)


def ones(y: Tensor) -> Tensor:
    """An output gradient of -1, 0 and 1."""
    return (torch.arange(y.numel(), device=DEVICE) % 3 - 1).view(y.shape).to(y.dtype)


def gradients(y: Tensor, leaves: list[Tensor], **options) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, leaves, ones(y), **options)


def assert_all_equal(ours, theirs) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def assert_close(mine: Tensor, other: Tensor) -> None:
    """Derivatives of gradients are no small integers; both sides are PyTorch's operations, which round to TF32 on a GPU."""
    tolerance = 1e-4 if DEVICE == "cpu" else 4 * TF32_EPS
    torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


# ------------------------------------------------------------------------------------------------- without the pool

#: Batch, channels, rows, columns, filters, filter rows and columns, stride, padding: image rows of whole 16 bytes, and not.
ALONE = {
    "alexnet": (5, 1, 27, 31, 96, 11, 11, 4, 1),
    "one_image": (1, 1, 19, 24, 16, 11, 11, 4, 2),
    "three_channels": (3, 3, 23, 27, 16, 11, 11, 4, 2),
    "stride_2_of_four_channels": (17, 4, 9, 11, 24, 5, 5, 2, 1),
    "stride_3_of_eight_channels": (2, 8, 13, 14, 16, 7, 5, 3, (1, 2)),
    "batch_33": (33, 1, 17, 18, 8, 11, 11, 4, 3),
    "batch_130": (130, 1, 15, 15, 16, 11, 11, 4, 0),
}


@pytest.mark.parametrize("output_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("case", ALONE)
def test_the_convolution_alone(case: str, output_format: torch.memory_format, launches: list[str]) -> None:
    n, c, h, w, k, r, s, stride, padding = ALONE[case]
    given = [tf32_numbers(n, c, h, w, grad=False), tf32_numbers(k, c, r, s), tf32_numbers(k)]
    output = check(
        lambda x, w, b: kernels.conv2d(x, w, b, stride, padding, activation="relu", output_format=output_format),
        lambda x, w, b: F.relu(F.conv2d(x, w, b, stride, padding)),
        given,
        names="input weight bias",
        draw=tf32_numbers,
    )
    assert output.is_contiguous(memory_format=output_format)
    assert {"_conv2d_rows_kernel", "_conv2d_rows_wgrad_kernel", "_cells_by_batch_kernel"} <= set(launches)
    assert not {"_conv2d_fprop_kernel", "_conv2d_wgrad_kernel"} & set(launches)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every_other": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:1].expand_as(t),
    "part_of_a_batch": lambda t: torch.cat([t, t])[1 : 1 + len(t)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, launches: list[str]) -> None:
    """Layouts of images with rows of whole 16 bytes, which the kernel reads in place if it can, and of the weight."""
    x, w, b = tensors(w=32)
    x, w = LAYOUTS[layout](x), LAYOUTS[layout](w.detach()).requires_grad_()
    ours, theirs = block(x, w, b), reference(x, w, b)
    assert ROWS in launches
    assert torch.equal(ours, theirs)
    assert_all_equal(gradients(ours, [w, b]), gradients(theirs, [w, b]))


@pytest.mark.parametrize("column", [0, 9, 14, 15, 26])
def test_a_nan_pixel_reaches_what_is_multiplied_by_the_zeros_beside_a_filter(column: int) -> None:
    """Filter rows of 11 columns are padded with zeros to 16, from a multiple of 4 at or before the first column."""
    x, w, _ = tensors(1, 31, 32)
    x[0, 0, 13, column] = torch.nan
    y = kernels.conv2d(x, w, None, **GEOMETRY)[0, 0]
    problem = Problem.of(x.shape, w, Geometry((4, 4), (1, 1), (1, 1), 1), y.shape)
    rows = Rows.of(problem)
    assert (rows.first, rows.shift, rows.positions) == (4, 3, 16)
    p, q = torch.arange(y.shape[0], device=DEVICE)[:, None] * 4, torch.arange(y.shape[1], device=DEVICE) * 4
    seen = (p <= 14) & (p > 3) & (q - 4 <= column) & (column < q + 12)
    assert torch.equal(y.isnan(), seen)
    exact = F.conv2d(x.double(), w.double(), None, **GEOMETRY)[0, 0]
    assert not (exact.isnan() & ~seen).any()
    assert torch.equal(y[~seen].double(), exact[~seen])


def test_a_nan_outside_of_every_filter_row_reaches_nothing() -> None:
    """The filters of the seventh output row end at image row 33 of 35."""
    x, w, b = tensors(2, 35, 48)
    x[:, :, 34:] = torch.nan
    y = kernels.conv2d(x, w, b, **GEOMETRY)
    assert not y.isnan().any()


# ------------------------------------------------------------------------------------------------- what is wanted


@pytest.mark.thin
@pytest.mark.parametrize("wanted", ["weight", "bias", "input", "input, bias", "weight, bias", "input, weight, bias"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
def test_only_what_is_wanted(wanted: str, has_bias: bool, launches: list[str]) -> None:
    x, w, b = (t.detach() for t in tensors())
    named = {"input": x, "weight": w, "bias": b if has_bias else None}
    leaves = [t.requires_grad_() for name, t in named.items() if name in wanted and t is not None]
    if not leaves:
        pytest.skip("there is no bias")
    ours, theirs = (run(x, w, named["bias"]) for run in (block, reference))
    assert ROWS in launches
    launches.clear()
    assert torch.equal(ours, theirs)
    assert_all_equal(gradients(ours, leaves), gradients(theirs, leaves))
    assert ("_conv2d_rows_wgrad_kernel" in launches) == ("weight" in wanted)
    # Only the input gradient reads the unpooled gradient.
    assert ("_max_pool2d_dgrad_kernel" in launches) == ("input" in wanted or wanted == "bias")


def saved_storages(y: Tensor) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in y.grad_fn.saved_tensors if t is not None}


def test_the_images_are_saved_and_no_copy_of_them() -> None:
    x, w, b = tensors(w=32)
    y = block(x, w, b)
    assert x.untyped_storage().data_ptr() in saved_storages(y)
    assert not [t for t in y.grad_fn.saved_tensors if t is not None and t.dim() == 3]


@pytest.mark.parametrize("images_want_a_gradient", [False, True])
def test_images_that_change_are_an_error(images_want_a_gradient: bool) -> None:
    """PyTorch saves them, too."""
    x, w, b = tensors()
    images = x.requires_grad_(images_want_a_gradient) * 1
    for run in (block, reference):
        y = run(images, w, b)
        with torch.no_grad():
            images.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(y, [w])


def test_a_changed_weight_is_an_error() -> None:
    x, w, b = tensors()
    y = block(x, w, b)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(y, [b])


def test_two_backward_passes() -> None:
    x, w, b = tensors()
    y, theirs = block(x, w, b), reference(x, w, b)
    first = gradients(y, [w, b], retain_graph=True)
    assert_all_equal(first, gradients(theirs, [w, b], retain_graph=True))
    assert_all_equal(gradients(y, [w, b]), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(y, [w, b])


@own_devices
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    x, w, b = tensors()
    y = checkpoint(block, x, w, b, use_reentrant=use_reentrant)
    y.backward(ones(y))
    theirs = reference(x, w, b)
    assert_all_equal((w.grad, b.grad), gradients(theirs, [w, b]))


def test_saved_on_the_host() -> None:
    x, w, b = tensors()
    with torch.autograd.graph.save_on_cpu():
        y = block(x, w, b)
    assert_all_equal(gradients(y, [w, b]), gradients(reference(x, w, b), [w, b]))


# ---------------------------------------------------------------------------------------------------- the switch


@pytest.mark.parametrize("before", [True, False], ids=["tf32_then_exact", "exact_then_tf32"])
@pytest.mark.parametrize("wanted", ["weight", "all"])
def test_the_switch_changes_between_forward_and_backward(before: bool, wanted: str, launches: list[str]) -> None:
    """Each way reads what the other one saved."""
    x, w, b = tensors(h=33, w=36)  # the last rows and columns are in no cell
    leaves = [w, b] if wanted == "weight" else [x.requires_grad_(), w, b]
    expected = gradients(reference(x, w, b), leaves)
    torch.backends.cudnn.allow_tf32 = before
    y = block(x, w, b)
    assert (ROWS in launches) == before
    launches.clear()
    torch.backends.cudnn.allow_tf32 = not before
    assert_all_equal(gradients(y, leaves), expected)
    assert ("_conv2d_rows_wgrad_kernel" in launches) == (not before)


def test_the_switch_changes_for_a_convolution_between_two_backward_passes(launches: list[str]) -> None:
    x, w, b = (integers(*s, dtype=torch.float32, high=1) for s in ((3, 16, 5, 4), (32, 16, 3, 3), (32,)))
    expected = gradients(F.relu(F.conv2d(x, w, b, 1, 1)), [x, w, b])
    y = kernels.conv2d(x, w, b, 1, 1, activation="relu")
    for tf32 in (True, False):
        launches.clear()
        torch.backends.cudnn.allow_tf32 = tf32
        assert_all_equal(gradients(y, [x, w, b], retain_graph=True), expected)
        assert ("_conv2d_images_wgrad_kernel" in launches) == tf32


@own_devices
def test_autocast_off_inside_of_autocast(launches: list[str]) -> None:
    x, w, b = tensors()
    with torch.autocast(DEVICE, torch.bfloat16):
        with torch.autocast(DEVICE, enabled=False):
            ours = block(x, w, b)
        assert ROWS in launches
        launches.clear()
        assert block(x, w, b).dtype == torch.bfloat16
        assert ROWS not in launches
    theirs = reference(x, w, b)
    assert torch.equal(ours, theirs)
    assert_all_equal(gradients(ours, [w, b]), gradients(theirs, [w, b]))


# --------------------------------------------------------------------------------- derivatives of derivatives, compiled


@own_devices
@pytest.mark.parametrize("images_want_a_gradient", [False, True])
def test_gradient_penalty(images_want_a_gradient: bool, launches: list[str]) -> None:
    """PyTorch's operations compute the squared norm of the gradients, also of the images'."""
    results = []
    x, w, b = tensors()
    x.requires_grad_(images_want_a_gradient)
    leaves = [x, w, b] if images_want_a_gradient else [w, b]
    for run in (block, reference):
        y = run(x, w, b)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads) * 2.0**-20
        results.append(torch.autograd.grad(penalty, leaves))
    assert ROWS in launches
    for mine, other in zip(*results, strict=True):
        assert_close(mine, other)


@own_devices
@pytest.mark.parametrize("images_want_a_gradient", [False, True])
def test_func_grad_of_grad(images_want_a_gradient: bool) -> None:
    """A transform of torch.func saves even images that require no gradient."""
    x, w, b = tensors(1, 19, 23)
    argnums = (0, 1) if images_want_a_gradient else (1,)
    results = []
    for run in (block, reference):

        def loss(x: Tensor, w: Tensor, run: Callable[..., Tensor] = run) -> Tensor:
            return (run(x, w, b.detach()) * 2.0**-6).square().sum()

        def of_gradients(x: Tensor, w: Tensor, loss: Callable[..., Tensor] = loss) -> Tensor:
            return sum(grad.square().sum() for grad in torch.func.grad(loss, argnums)(x, w))

        results.append(torch.func.grad(of_gradients, argnums)(x, w.detach()))
    for mine, other in zip(*results, strict=True):
        assert_close(mine, other)


def network() -> nn.Module:
    """A first layer, and a layer that runs through descriptors, with small integers as parameters."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 11, stride=4, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
    ).to(DEVICE)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(integers(*p.shape, dtype=torch.float32, high=1, grad=False))
    return fuse(net)


@pytest.mark.slow
@own_devices
@pytest.mark.parametrize("backend", ["aot_eager", BACKEND], ids=["aot_eager", "own"])
def test_compiled(backend, launches: list[str]) -> None:
    """Dynamo cannot read PyTorch's switches."""
    torch._dynamo.reset()
    net, (x, *_) = network(), tensors()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    results = []
    for module in (net, compiled):
        launches.clear()
        y = module(x)
        results.append([y, *torch.autograd.grad(y, list(net.parameters()), ones(y))])
        assert {ROWS, "_conv2d_rows_wgrad_kernel", "_conv2d_images_wgrad_kernel"} <= set(launches)
    assert_all_equal(*results)


@own_devices
def test_exported(launches: list[str]) -> None:
    net, (x, *_) = network().eval(), tensors()
    expected = net(x)
    program = torch.export.export(net, (x,))
    launches.clear()
    assert torch.equal(program.module()(x), expected)
    assert ROWS in launches
