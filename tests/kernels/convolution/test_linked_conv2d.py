"""Linked convolutions: the second one's backward pass applies the first one's ReLU mask and sums the bias gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.configs import tables
from kernels.runtime import launch

from ...conftest import DEVICE
from ...oracle import check, dtype_id, integers, randn

Second = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def convolution(**arguments) -> tuple[Second, Second]:
    """A convolution with ReLU as the second of two, and its reference."""

    def reference(y, w, b, _):
        return F.relu(F.conv2d(y, w, b, **arguments))

    return lambda y, w, b, link: kernels.conv2d(y, w, b, **arguments, activation="relu", link=link), reference


def block(**arguments) -> tuple[Second, Second]:
    """A convolution with ReLU and pool as the second of two, and its reference."""

    def reference(y, w, b, _):
        return F.max_pool2d(F.relu(F.conv2d(y, w, b, **arguments)), 3, 2)

    def ours(y, w, b, link):
        return kernels.conv2d_relu_max_pool2d(y, w, b, **arguments, pool_kernel_size=3, pool_stride=2, link=link)

    return ours, reference


#: The second operation, the batch, configuration values. 16 channels in, 32 between, 48 out; 3 x 3 filters.
CASES = {
    "images": (convolution(padding=1), 19, {"IMAGES": 1, "BLOCK_M": 16, "BLOCK_N": 16}),
    "images_two_filter_blocks": (convolution(padding=1), 3, {"IMAGES": 1, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_N2": 16}),
    "images_two_pixels": (convolution(padding=1), 3, {"IMAGES": 1, "BLOCK_M": 16, "BLOCK_N": 32, "PIXELS": 2}),
    "images_two_pixels_two_blocks": (
        convolution(padding=1),
        18,
        {"IMAGES": 1, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_N2": 16, "PIXELS": 2},
    ),
    "box": (convolution(padding=1), 3, {"IMAGES": 0, "NB": 2, "TH": 2, "TW": 4, "BLOCK_N": 16}),
    "pool_after_images": (block(padding=1), 3, {"IMAGES": 1, "BLOCK_M": 16}),
    "general_kernel": (convolution(padding=1, stride=2), 2, {}),
    "general_kernel_pool": (block(padding=2, dilation=2), 2, {}),
}


def units(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    """-1, 0 and 1: sums of both convolutions are exact in every dtype, so no rounding moves a ReLU or a pool's maximum."""
    return integers(*shape, dtype=dtype, high=1, grad=grad)


def tensors(n: int, dtype: torch.dtype, make: Callable[..., Tensor] = randn) -> list[Tensor]:
    """The input, and the weights and biases of two convolutions."""
    shapes = ((n, 16, 5, 3), (32, 16, 3, 3), (32,), (48, 32, 3, 3), (48,))
    return [make(*shape, dtype=dtype) for shape in shapes]


@pytest.mark.thin
@pytest.mark.parametrize("tf32", [False, True], ids=["exact", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case: str, dtype: torch.dtype, tf32: bool, launches: list[str]) -> None:
    if tf32 and dtype != torch.float32:
        pytest.skip("TF32 applies to float32 only")
    torch.backends.cudnn.allow_tf32 = tf32
    (second, reference), n, tiles = CASES[case]

    def ours(x, w1, b1, w2, b2):
        y, link = kernels.linked_conv2d(x, w1, b1, padding=1)
        assert link is not None
        return second(y, w2, b2, link)

    with tables.override(**tiles):
        check(
            ours,
            lambda x, w1, b1, w2, b2: reference(F.relu(F.conv2d(x, w1, b1, padding=1)), w2, b2, None),
            tensors(n, dtype, units),
            names="input weight bias weight bias",
            draw=units if tf32 else randn,
        )
    described = dtype != torch.float32 or tf32
    assert bool({"_conv2d_images_kernel", "_conv2d_box_kernel"} & set(launches)) == described
    if described and "general" not in case:
        # A ReLU without a following convolution or pool needs its own backward pass.
        assert launches.count("_epilogue_backward_kernel") == ("pool" not in case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_the_operations_alone(case: str) -> None:
    """The first bias's gradient is an exception: its terms are summed before they are rounded."""
    (second, _), n, tiles = CASES[case]
    x, w1, b1, w2, b2 = given = tensors(n, torch.float16)
    with tables.override(**tiles):
        y, link = kernels.linked_conv2d(x, w1, b1, padding=1)
        linked = second(y, w2, b2, link)
        alone = second(kernels.conv2d(x, w1, b1, padding=1, activation="relu"), w2, b2, None)
        grad = torch.randn(alone.shape, device=DEVICE).half()
        ours, expected = (torch.autograd.grad(output, given, grad) for output in (linked, alone))
    assert torch.equal(linked, alone)
    for i in (0, 1, 3, 4):
        assert torch.equal(ours[i], expected[i])
    torch.testing.assert_close(ours[2], expected[2], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("images", [0, 1])
def test_the_gradient_passes_where_the_output_is_nan_and_stops_where_it_is_zero(images: int) -> None:
    x, w1, b1, w2, b2 = (t.detach() for t in tensors(2, torch.float16, integers))
    b1[0], b1[1] = torch.nan, -torch.inf
    b1.requires_grad_()
    y, link = kernels.linked_conv2d(x, w1, b1, padding=1)
    with tables.override(IMAGES=images, NB=2, TH=2, TW=4, BLOCK_M=16):
        z = kernels.conv2d(y, w2, b2, padding=1, link=link)
        (grad,) = torch.autograd.grad(z, b1, torch.ones_like(z))
    exact = torch.nn.grad.conv2d_input(y.shape, w2.double(), torch.ones_like(z).double(), padding=1)
    exact = (exact * ~(y <= 0)).sum(dim=(0, 2, 3))
    assert grad[1] == 0
    torch.testing.assert_close(grad.double(), exact, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters_of_the_first(frozen: str) -> None:
    x, w1, b1, w2, b2 = tensors(2, torch.float32)
    (w1 if frozen != "bias" else b1).requires_grad_(False)
    if frozen == "both":
        b1.requires_grad_(False)
    wanted = [t for t in (x, w1, b1, w2, b2) if t.requires_grad]
    y, link = kernels.linked_conv2d(x, w1, b1, padding=1)
    z = kernels.conv2d(y, w2, b2, padding=1, link=link)
    expected = F.conv2d(F.relu(F.conv2d(x, w1, b1, padding=1)), w2, b2, padding=1)
    for ours, exact in zip(*(torch.autograd.grad(o.sum(), wanted) for o in (z, expected)), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)


def test_a_first_layer_that_needs_no_gradient() -> None:
    x, w1, b1, w2, b2 = tensors(2, torch.float32)
    with torch.no_grad():
        y, link = kernels.linked_conv2d(x, w1, b1, padding=1)
    z = kernels.conv2d(y, w2, b2, padding=1, link=link)
    ours, exact = (torch.autograd.grad(o.sum(), (w2, b2)) for o in (z, F.conv2d(y, w2, b2, padding=1)))
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_one_image_without_a_batch() -> None:
    x, w1, b1, w2, b2 = tensors(1, torch.float32)
    y, link = kernels.linked_conv2d(x[0], w1, b1, padding=1)
    z = kernels.conv2d(y, w2, b2, padding=1, link=link)
    expected = F.conv2d(F.relu(F.conv2d(x[0], w1, b1, padding=1)), w2, b2, padding=1)
    for ours, exact in zip(*(torch.autograd.grad(o.sum(), (x, w1, b1)) for o in (z, expected)), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("images", [0, 1])
def test_int64_offsets(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "force_int64", True)

    def ours(x, w1, b1, w2, b2):
        y, link = kernels.linked_conv2d(x, w1, b1, padding=1)
        return kernels.conv2d(y, w2, b2, padding=1, link=link)

    with tables.override(IMAGES=images, NB=2, TH=2, TW=4, BLOCK_M=16):
        check(
            ours,
            lambda x, w1, b1, w2, b2: F.conv2d(F.relu(F.conv2d(x, w1, b1, padding=1)), w2, b2, padding=1),
            tensors(3, torch.float16),
            names="input weight bias weight bias",
        )


def test_an_empty_batch() -> None:
    x, w1, b1, w2, b2 = tensors(0, torch.float16)
    y, link = kernels.linked_conv2d(x, w1, b1, padding=1)
    z = kernels.conv2d(y, w2, b2, padding=1, link=link)
    for grad in torch.autograd.grad(z.sum(), (w1, b1, w2, b2)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_a_link_of_another_tensor_is_refused() -> None:
    x, w1, b1, w2, _ = tensors(1, torch.float32)
    y, _ = kernels.linked_conv2d(x, w1, b1, padding=1)
    with pytest.raises(ValueError, match=r"link must be the one that was returned beside input, \(32,\), got \(16,\)"):
        kernels.conv2d(y, w2, link=torch.empty(16, device=DEVICE))
    with pytest.raises(ValueError, match="link must be"):
        kernels.conv2d_relu_max_pool2d(y, w2, padding=1, pool_kernel_size=2, link=torch.empty(16, device=DEVICE))


def test_the_torch_backend_gives_no_link() -> None:
    x, w1, b1, *_ = tensors(1, torch.float32)
    with kernels.use_backend("torch"):
        y, link = kernels.linked_conv2d(x, w1, b1, padding=1)
    assert link is None
    assert torch.equal(y, F.relu(F.conv2d(x, w1, b1, padding=1)))


def test_three_in_a_row() -> None:
    """The middle convolution takes a link and returns one."""
    x, w1, b1, w2, b2 = tensors(2, torch.float16)
    w3, b3 = randn(16, 48, 1, 1, dtype=torch.float16), randn(16, dtype=torch.float16)
    y, link = kernels.linked_conv2d(x, w1, b1, padding=1)
    y, link = kernels.linked_conv2d(y, w2, b2, padding=1, link=link)
    linked = kernels.conv2d(y, w3, b3, link=link)
    y = kernels.conv2d(kernels.conv2d(x, w1, b1, padding=1, activation="relu"), w2, b2, padding=1, activation="relu")
    alone = kernels.conv2d(y, w3, b3)
    ours, expected = (torch.autograd.grad(z, (x, w1, b1, w2, b2, w3, b3), torch.ones_like(z)) for z in (linked, alone))
    for i in (0, 1, 3, 5, 6):
        assert torch.equal(ours[i], expected[i])
    for i in (2, 4):
        torch.testing.assert_close(ours[i], expected[i], rtol=2e-2, atol=0.1)


def test_a_link_that_nothing_takes_is_none_of_the_gradients_business() -> None:
    x, w1, b1, *_ = tensors(2, torch.float32)
    y, _ = kernels.linked_conv2d(x, w1, b1, padding=1)
    z = F.relu(F.conv2d(x, w1, b1, padding=1))
    for ours, exact in zip(*(torch.autograd.grad(o.sum(), (x, w1, b1)) for o in (y, z)), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)


def test_what_the_saved_tensors_hooks_give_back_may_have_other_strides() -> None:
    x, w1, b1, w2, b2 = given = tensors(2, torch.float32)

    def network():
        y, link = kernels.linked_conv2d(x, w1, b1, padding=1)
        return kernels.conv2d(y, w2, b2, padding=1, activation="relu", link=link).sum()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()):
        packed = network()
    for ours, exact in zip(*(torch.autograd.grad(z, given) for z in (packed, network())), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-3)
