"""The suite's rounding to TF32, and what only convolutions in TF32 do: copies with the batch innermost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.configs import tables
from kernels.runtime import launch
from kernels.runtime.backend import INTERPRETED

from ...configurations import modules
from ...conftest import DEVICE
from ...oracle import TF32_EPS, check, integers, randn, round_to_tf32, tf32_numbers, truncate
from .conftest import hopper

pytestmark = pytest.mark.usefixtures("tf32")

# ------------------------------------------------------------------------------------------------------------ the rule


def test_rounding_and_truncation() -> None:
    """With 10 mantissa bits the unit just above 1 is 2^-10; ties are rounded away from zero."""
    unit, tiny = 2.0**-10, 2.0**-23
    above = {1.0: 1.0, 1 + unit / 2 - tiny: 1.0, 1 + unit / 2: 1 + unit, 1 + 3 * unit / 2: 1 + 2 * unit, 2 - tiny: 2.0}
    for sign in (1.0, -1.0):
        given = sign * torch.tensor(list(above), device=DEVICE)
        assert torch.equal(round_to_tf32(given), sign * torch.tensor(list(above.values()), device=DEVICE))
        assert torch.equal(truncate(given), sign * torch.tensor([1.0, 1.0, 1.0, 1 + unit, 2 - unit], device=DEVICE))
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0], device=DEVICE)
    for rounded in (round_to_tf32(special), truncate(special)):
        torch.testing.assert_close(rounded, special, equal_nan=True, rtol=0, atol=0)
    numbers = torch.randn(1000, device=DEVICE)
    assert ((truncate(numbers) - numbers) / numbers).abs().max() < TF32_EPS
    assert (truncate(numbers).abs() <= numbers.abs()).all()
    assert ((round_to_tf32(numbers) - numbers) / numbers).abs().max() <= TF32_EPS / 2
    assert torch.equal(truncate(round_to_tf32(numbers)), round_to_tf32(numbers))
    # bfloat16 is the upper half of a float32.
    assert torch.equal(truncate(numbers.bfloat16().float(), 16), numbers.bfloat16().float())


class _Multiplied(torch.autograd.Function):
    """A convolution that multiplies rounded operands in its passes: a model of the tensor cores."""

    @staticmethod
    def forward(ctx, x, w, b, roundings):
        ctx.save_for_backward(x, w)
        ctx.roundings = roundings
        return F.conv2d(roundings["output"](x), roundings["output"](w), b, padding=1)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        of_x, of_w = ctx.roundings["input"], ctx.roundings["weight"]
        dx = torch.nn.grad.conv2d_input(x.shape, of_x(w), of_x(grad), padding=1)
        dw = torch.nn.grad.conv2d_weight(of_w(x), w.shape, of_w(grad), padding=1)
        return dx, dw, grad.double().sum((0, 2, 3)).float(), None


PASSES = ("output", "input", "weight")
#: Shapes of input and weight: sums of a few products, and sums as long as AlexNet's largest.
SHAPES = (((3, 16, 5, 4), (32, 16, 3, 3)), ((2, 256, 12, 12), (24, 256, 3, 3)), ((33, 24, 6, 5), (40, 24, 3, 3)))


def _check_model(roundings: dict[str, Callable[[Tensor], Tensor]], shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    tensors = [randn(*shape, dtype=torch.float32) for shape in (*shapes, shapes[1][:1])]
    check(
        lambda *t: _Multiplied.apply(*t, roundings),
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        tensors,
        names="input weight bias",
        tf32=True,
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="PyTorch's own products must be exact in the model")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("rounding", [truncate, round_to_tf32], ids=["truncated", "rounded"])
def test_products_of_tf32_operands_obey_the_rule(rounding, shapes, seed: int) -> None:
    """Operands are truncated, as tensor cores do, or rounded, as a compiler does."""
    torch.manual_seed(seed)
    _check_model(dict.fromkeys(PASSES, rounding), shapes)


@pytest.mark.skipif(DEVICE == "cuda", reason="PyTorch's own products must be exact in the model")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("which", PASSES)
def test_products_of_bfloat16_operands_do_not(which: str, shapes, seed: int) -> None:
    """Only one of the three passes has bfloat16 operands."""
    torch.manual_seed(seed)
    roundings = dict.fromkeys(PASSES, truncate) | {which: lambda t: truncate(t, 16)}
    message = "^output: error" if which == "output" else f"^gradient of {which}: error"
    with pytest.raises(AssertionError, match=message):
        _check_model(roundings, shapes)


@pytest.mark.skipif(DEVICE == "cuda", reason="PyTorch's own products must be exact in the model")
def test_a_bias_has_no_tf32_in_it() -> None:
    """The bias gradient is a sum, and is held to float32's tolerance."""

    class Rough(_Multiplied):
        @staticmethod
        def backward(ctx, grad):
            dx, dw, _, _ = _Multiplied.backward(ctx, grad)
            return dx, dw, truncate(grad).sum((0, 2, 3)), None

    tensors = [randn(*shape, dtype=torch.float32) for shape in (*SHAPES[0], SHAPES[0][1][:1])]
    roundings = dict.fromkeys(PASSES, truncate)
    with pytest.raises(AssertionError, match="gradient of bias"):
        check(
            lambda *t: Rough.apply(*t, roundings),
            lambda x, w, b: F.conv2d(x, w, b, padding=1),
            tensors,
            names="input weight bias",
            tf32=True,
        )


#: Shapes of input and weight, stride, configuration values, a kernel that must run: by descriptors, first layer, general.
KERNELS = {
    "images": ((19, 32, 6, 5), (48, 32, 3, 3), 1, {"IMAGES": 1}, "_conv2d_images_kernel"),
    "box": ((3, 32, 6, 5), (48, 32, 3, 3), 1, {"IMAGES": 0}, "_conv2d_box_kernel"),
    "rows": ((5, 1, 31, 32), (32, 1, 11, 11), 4, {}, "_conv2d_rows_kernel"),
    "general": ((3, 12, 6, 5), (20, 12, 3, 3), 2, {}, "_conv2d_fprop_kernel"),
}


@pytest.mark.parametrize("case", KERNELS)
def test_the_kernels_obey_the_rule(case: str, launches: list[str]) -> None:
    """On a GPU and in the semantics of the IR, products are rounded to TF32; in the interpreter they are exact."""
    x_shape, w_shape, stride, tiles, kernel = KERNELS[case]
    if DEVICE == "cuda" and kernel != "_conv2d_fprop_kernel" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("descriptors need Hopper or Blackwell")
    tensors = [randn(*shape, dtype=torch.float32) for shape in (x_shape, w_shape, w_shape[:1])]
    with tables.override(IMAGES_WGRAD=1, **tiles):
        output = check(
            lambda x, w, b: kernels.conv2d(x, w, b, stride, 1),
            lambda x, w, b: F.conv2d(x, w, b, stride, 1),
            tensors,
            names="input weight bias",
            tf32=True,
        )
    assert kernel in launches
    exact = F.conv2d(*(t.double() for t in tensors), stride, 1)
    is_exact = (output - exact).abs().max() < 1e-5 * exact.abs().max()
    assert is_exact == INTERPRETED


# --------------------------------------------------------------------------------------------------------- the copies


@hopper
@pytest.mark.parametrize(("wanted", "copies"), [("weight", 1), ("input", 1), ("input weight", 1), ("bias", 0)])
def test_which_launch_copies(wanted: str, copies: int, launches: list[str]) -> None:
    """The input gradient's filters are copied in a launch of their own; the weight gradient's operands too, if it is alone."""
    copied: list[bool] = []

    def note(kernel, grid, arguments):
        if "HAS_COPIES" in arguments:
            copied.append(arguments["HAS_COPIES"])

    named = {"input": tf32_numbers(3, 16, 5, 4), "weight": tf32_numbers(32, 16, 3, 3), "bias": tf32_numbers(32)}
    for name, tensor in named.items():
        tensor.requires_grad_(name in wanted)
    y = kernels.conv2d(*named.values(), padding=1)
    launches.clear()
    with launch.observe_launches(note):
        torch.autograd.grad(y, [named[name] for name in wanted.split()], torch.ones_like(y))
    assert launches.count("_by_batch_kernel") == copies
    assert copied == ([wanted == "input weight"] if "input" in wanted else [])


@pytest.mark.thin
@hopper
@pytest.mark.parametrize("int64", [False, True])
@pytest.mark.parametrize("images", [1, 0], ids=["images", "box"])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 17, 65])
def test_copies_of_ragged_batches(batch: int, images: int, int64: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are more tiles to copy than programs, or fewer. Rows of a copy are padded to 16 bytes, so beyond the last image."""
    monkeypatch.setattr(launch, "force_int64", int64)
    r, h, w = (2, 3, 4) if batch < 65 else (1, 1, 2)
    for c, k in ((16, 144), (144, 16)):
        for x_wanted in (True, False):
            tensors = [tf32_numbers(batch, c, h, w, grad=x_wanted), tf32_numbers(k, c, r, 1)]
            with tables.override(IMAGES=images, IMAGES_WGRAD=1):
                check(
                    lambda x, w: kernels.conv2d(x, w, padding=r - 1),
                    lambda x, w: F.conv2d(x, w, padding=r - 1),
                    tensors,
                    names="input weight",
                    draw=tf32_numbers,
                )


#: Channels, filter columns, BLOCK_N and BLOCK_N2: S * C columns of one filter row, in blocks of which the last is ragged.
FOLDED = [(16, 3, 32, 0), (16, 5, 64, 32), (48, 3, 64, 32), (16, 3, 16, 16), (32, 2, 64, 0), (16, 3, 128, 0)]


@pytest.mark.thin
@hopper
@pytest.mark.parametrize(
    ("batch", "padding"), [(3, 0), (17, 1), (3, (1, 4))], ids=["3-no_padding", "17-padding_1", "3-padding_1x4"]
)
@pytest.mark.parametrize("folded", FOLDED, ids=lambda folded: "C{}-S{}-{}+{}".format(*folded))
def test_folded_columns(
    folded: tuple[int, int, int, int], batch: int, padding, monkeypatch: pytest.MonkeyPatch, launches: list[str]
) -> None:
    """The weight gradient folds all filter columns of one row into the channels, with and without a split."""
    c, s, block_n, block_n2 = folded
    for split in (1, 3):
        config = {"POSITIONS": 1, "FOLDED": 1, "BLOCK_M": 32, "BLOCK_N": block_n, "BLOCK_N2": block_n2, "BLOCK_K": 16}
        config |= {"num_warps": 4, "num_stages": 1, "SPLIT": split}
        for module in modules():  # every module that imported it
            if "conv2d_by_batch_wgrad_config" in vars(module):
                monkeypatch.setattr(module, "conv2d_by_batch_wgrad_config", lambda *_, config=config: dict(config))
        tensors = [tf32_numbers(batch, c, 4, 5), tf32_numbers(48, c, 3, s)]
        check(
            lambda x, w: kernels.conv2d(x, w, padding=padding),
            lambda x, w: F.conv2d(x, w, padding=padding),
            tensors,
            names="input weight",
            draw=tf32_numbers,
        )
    assert launches.count("_conv2d_images_wgrad_kernel") == 2


@hopper
def test_a_configuration_for_other_channels_writes_nothing_outside(launches: list[str]) -> None:
    """BLOCK_N and BLOCK_N2 that do not divide the channels are replaced, wherever they come from."""
    tensors = [tf32_numbers(3, 16, 4, 4), tf32_numbers(80, 16, 3, 3)]
    for tiles in ({"BLOCK_N": 32, "BLOCK_N2": 16}, {"BLOCK_N": 16, "BLOCK_N2": 16, "POSITIONS": 2}):
        with tables.override(FOLDED=0, IMAGES_WGRAD=1, **tiles):
            check(
                lambda x, w: kernels.conv2d(x, w, padding=1),
                lambda x, w: F.conv2d(x, w, padding=1),
                tensors,
                names="input weight",
                draw=tf32_numbers,
            )
    assert launches.count("_conv2d_images_wgrad_kernel") == 2


@hopper
@pytest.mark.parametrize("images", [1, 0], ids=["images", "box"])
def test_two_runs_give_the_same_bits(images: int) -> None:
    tensors = [randn(*shape, dtype=torch.float32) for shape in ((5, 16, 5, 4), (48, 16, 3, 3), (48,))]

    def step() -> list[Tensor]:
        with tables.override(IMAGES=images, IMAGES_WGRAD=1, SPLIT=3):
            y, link = kernels.linked_conv2d(*tensors, padding=1)
            assert link is not None
            return [y, *torch.autograd.grad(y, tensors, torch.ones_like(y))]

    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


@hopper
def test_an_empty_batch(launches: list[str]) -> None:
    """The output is empty and gradients are zero, as in PyTorch."""
    x, w, b = (integers(*s, dtype=torch.float32) for s in ((0, 16, 5, 4), (32, 16, 3, 3), (32,)))
    y = kernels.conv2d(x, w, b, padding=1, activation="relu")
    dx, dw, db = torch.autograd.grad(y, (x, w, b), torch.ones_like(y))
    assert (y.shape, dx.shape) == ((0, 32, 5, 4), (0, 16, 5, 4))
    assert not dw.any()
    assert not db.any()
