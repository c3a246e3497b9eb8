"""conv2d through tensor descriptors, in half precision and in TF32: every kernel, and that it is the kernel that runs.

In TF32 the tensors hold numbers that TF32 represents exactly: products are exact on every device, and results are held to
float32's tolerance.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.configs import tables
from kernels.convolution import descriptor, rules
from kernels.convolution.select import _SUMS_OF_8
from kernels.runtime.backend import INTERPRETED, capability

from ...conftest import DEVICE
from ...oracle import check, dtype_id, randn, tf32_numbers
from .conftest import hopper

pytestmark = [hopper, pytest.mark.usefixtures("tf32")]

HALF = (torch.float16, torch.bfloat16)
DRAW = {torch.float16: randn, torch.bfloat16: randn, torch.float32: tf32_numbers}

IMAGES = {"_conv2d_images_kernel", "_conv2d_images_wgrad_kernel"}
BOX = {"_conv2d_box_kernel", "_conv2d_images_wgrad_kernel"}
STEM = {
    "_space_to_depth_kernel",
    "_fold_filter_kernel",
    "_conv2d_stem_kernel",
    "_conv2d_stem_wgrad_kernel",
    "_unfold_filter_kernel",
}
ROW_STEM = {
    "_fold_filter_kernel",
    "_conv2d_rows_kernel",
    "_cells_by_batch_kernel",
    "_conv2d_rows_wgrad_kernel",
    "_unfold_filter_kernel",
}
GENERAL = {"_conv2d_fprop_kernel", "_conv2d_dgrad_kernel", "_conv2d_wgrad_kernel"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution, forced configuration values, and the kernels that must run; ``why`` says what the case tests."""

    why: str
    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    padding: int | tuple[int, int] | str = 1
    stride: int = 1
    bias: bool = True
    tiles: dict[str, int] = dataclasses.field(default_factory=dict)
    runs: frozenset[str] = frozenset(IMAGES)

    @property
    def id(self) -> str:
        return f"{self.why}-N{self.n}-C{self.c}-H{self.h}-W{self.w}-K{self.k}-R{self.r}-S{self.s}"

    def kernels(self, dtype: torch.dtype) -> frozenset[str]:
        """The kernels that must run in ``dtype``."""
        if dtype != torch.float32:
            return self.runs
        return frozenset(ROW_STEM) if self.stride > 1 else self.runs | {"_by_batch_kernel"}

    def check(self, dtype: torch.dtype) -> torch.Tensor:
        """Check output and gradients against float64 with the case's configuration; return the output."""
        draw = DRAW[dtype]
        tensors = [
            draw(self.n, self.c, self.h, self.w, dtype=dtype).to(memory_format=torch.channels_last).detach().requires_grad_(),
            draw(self.k, self.c, self.r, self.s, dtype=dtype),
            draw(self.k, dtype=dtype) if self.bias else None,
        ]

        def ours(x, w, b):
            return kernels.conv2d(x, w, b, self.stride, self.padding, activation="relu")

        def reference(x, w, b):
            return F.relu(F.conv2d(x, w, b, self.stride, self.padding))

        with tables.override(IMAGES_WGRAD=1, **self.tiles):
            return check(ours, reference, tensors, names="input weight bias", draw=draw)


def images(why: str, *shape: int, **values) -> Case:
    tiles = {"IMAGES": 1, "BLOCK_M": 16, **values.pop("tiles", {})}
    return Case(why, *shape, tiles=tiles, **values)


def box(why: str, *shape: int, **values) -> Case:
    tiles = {"IMAGES": 0, "NB": 2, "TH": 2, "TW": 4, "BLOCK_N": 16, **values.pop("tiles", {})}
    return Case(why, *shape, tiles=tiles, runs=frozenset(BOX), **values)


CASES = (
    images("own_tiles", 5, 32, 6, 5, 48, 3, 3, tiles={"BLOCK_M": 16}),
    images("ragged_images", 19, 16, 4, 3, 16, 3, 3, tiles={"BLOCK_K": 16}),
    images("several_filter_blocks", 3, 16, 4, 4, 80, 3, 3, tiles={"BLOCK_N": 32, "BLOCK_N2": 16}),
    images("several_channel_blocks", 3, 80, 4, 4, 16, 3, 3, tiles={"BLOCK_K": 16, "BLOCK_N": 16}),
    images("two_pixels", 3, 32, 4, 5, 32, 3, 3, tiles={"PIXELS": 2, "BLOCK_N": 16, "BLOCK_N2": 16}),
    images("two_pixels_wide_filter", 2, 16, 5, 6, 16, 5, 5, padding=2, tiles={"PIXELS": 2, "BLOCK_N": 16}),
    images("two_positions", 18, 16, 4, 3, 32, 3, 2, tiles={"POSITIONS": 2, "BLOCK_N": 16, "BLOCK_N2": 0, "SPLIT": 3}),
    images("two_positions_two_blocks", 17, 48, 3, 4, 32, 2, 2, tiles={"POSITIONS": 2, "BLOCK_N": 32, "BLOCK_N2": 16}),
    images("warp_specialized", 3, 32, 4, 4, 32, 3, 3, tiles={"WARP_SPECIALIZE": 1}),
    box("warp_specialized_box", 2, 16, 4, 5, 16, 3, 3, tiles={"WARP_SPECIALIZE": 1}),
    images("split_beyond_steps", 2, 16, 2, 2, 16, 1, 1, padding=0, tiles={"SPLIT": 7}),
    images("no_padding", 3, 16, 5, 4, 16, 3, 2, padding=0, bias=False),
    images("padding_over_filter", 2, 16, 3, 4, 16, 2, 3, padding=4),
    images("rectangular", 2, 16, 5, 3, 32, 1, 3, padding=(0, 2)),
    images("same_of_even_filter", 2, 16, 5, 4, 16, 4, 2, padding="same"),
    images("one_position_a_program", 3, 16, 5, 4, 16, 3, 3, tiles={"POSITIONS": 1}),
    images("one_pixel", 3, 16, 1, 1, 16, 1, 1, padding=0),
    box("own_box", 3, 32, 6, 5, 48, 3, 3, tiles={"NB": 1, "TH": 4, "TW": 4}),
    box("ragged_box", 3, 16, 5, 7, 16, 3, 3),
    box("several_blocks", 2, 48, 4, 5, 48, 3, 3, tiles={"BLOCK_K": 16}),
    box("no_padding_one_image", 1, 16, 5, 6, 16, 3, 2, padding=0, bias=False),
    box("padding_over_filter", 2, 16, 3, 4, 16, 2, 3, padding=4),
    box("same_of_even_filter", 2, 16, 5, 4, 16, 4, 2, padding="same"),
    Case("alexnet_one_channel", 3, 1, 27, 23, 32, 11, 11, stride=4, runs=frozenset(STEM)),
    Case("alexnet_three_channels", 2, 3, 23, 27, 16, 11, 11, stride=4, padding=2, runs=frozenset(STEM)),
    Case(
        "stem_two_filter_blocks", 17, 1, 19, 23, 96, 11, 11, stride=4, tiles={"BLOCK_M": 64, "COLUMNS": 2}, runs=frozenset(STEM)
    ),
    Case("stem_zero_filled", 2, 1, 19, 19, 16, 12, 12, stride=4, tiles={"BLOCK_K": 64, "BLOCK_K2": 0}, runs=frozenset(STEM)),
    Case("stem_last_pixels_unseen", 2, 1, 22, 21, 16, 11, 11, stride=4, padding=0, runs=frozenset(STEM)),
    Case("stem_split", 18, 1, 19, 19, 8, 9, 10, stride=4, padding=0, tiles={"SPLIT": 3, "BLOCK_K": 32}, runs=frozenset(STEM)),
)


@pytest.mark.thin
@pytest.mark.parametrize("dtype", DRAW, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_and_gradients(case: Case, dtype: torch.dtype, launches: list[str]) -> None:
    output = case.check(dtype)
    assert output.permute(0, 2, 3, 1).is_contiguous()
    assert case.kernels(dtype) <= set(launches)
    # The input gradient of a strided layer is computed on cells, which takes filters in multiples of 16.
    assert ("_conv2d_dgrad_kernel" in launches) == (case.k % 16 != 0)
    assert not {"_conv2d_fprop_kernel", "_conv2d_wgrad_kernel"} & set(launches)
    assert case.k % 16 != 0 or {"_conv2d_images_kernel", "_conv2d_box_kernel"} & set(launches)


@pytest.mark.parametrize("dtype", DRAW, ids=dtype_id)
@pytest.mark.parametrize("pixels", [1, 2])
def test_first_operand_from_registers(pixels: int, dtype: torch.dtype, launches: list[str]) -> None:
    """The gradient of 96 channels is computed in blocks of 64 and 32 columns, or refused where ptxas is too old."""
    tiles = {"REGISTERS": 1, "PIXELS": pixels, "BLOCK_N": 64, "BLOCK_N2": 32}
    case = images("registers", 3, 96, 2, 3, 16, 3, 1, tiles=tiles)
    if not INTERPRETED and descriptor.ptxas_version(capability(torch.device(DEVICE))) < (13, 3):
        with pytest.raises(RuntimeError, match="ptxas"):
            case.check(dtype)
        return
    case.check(dtype)
    assert case.kernels(dtype) <= set(launches)


#: Channels and filters in multiples of 8 (32 bytes in float32), and batches that neither blocks nor 16 bytes divide.
TF32_CASES = (
    images("c8", 3, 8, 5, 4, 8, 3, 3),
    images("c8_to_24", 2, 8, 4, 5, 24, 3, 2, bias=False),
    images("c24_to_40", 5, 24, 4, 3, 40, 3, 3, tiles={"BLOCK_K": 16}),
    images("c40_to_24", 17, 40, 3, 4, 24, 2, 3),
    images("c72_to_96", 3, 72, 4, 3, 96, 3, 3, tiles={"BLOCK_N": 64, "BLOCK_N2": 32}),
    images("c96_to_72", 3, 96, 3, 4, 72, 3, 3, tiles={"BLOCK_N": 64, "BLOCK_N2": 32}),
    images("c96_two_pixels", 3, 96, 4, 5, 96, 3, 3, tiles={"PIXELS": 2, "BLOCK_N": 64, "BLOCK_N2": 32}),
    images("n1", 1, 16, 4, 5, 32, 3, 3),
    images("n2", 2, 16, 4, 5, 32, 3, 3),
    images("n33", 33, 16, 3, 4, 32, 3, 3),
    images("n130", 130, 16, 3, 3, 16, 3, 3, tiles={"BLOCK_M": 64}),
    images("n130_split", 130, 16, 2, 3, 16, 3, 3, tiles={"BLOCK_K": 16, "SPLIT": 5}),
    box("c8_box", 3, 8, 5, 4, 8, 3, 3),
    box("c24_to_40_box", 5, 24, 4, 3, 40, 3, 3),
    box("c40_to_72_box", 2, 40, 5, 4, 72, 2, 3),
    box("n1_box", 1, 16, 4, 5, 32, 3, 3),
    box("n33_box", 33, 16, 3, 4, 32, 3, 3),
)


@pytest.mark.thin("c8-", "c96_two_pixels", "n33")
@pytest.mark.parametrize("case", TF32_CASES, ids=lambda case: case.id)
def test_tf32_channels_and_batches(case: Case, launches: list[str]) -> None:
    case.check(torch.float32)
    described = _SUMS_OF_8 or (case.c % 16 == 0 and case.k % 16 == 0)
    assert bool(GENERAL & set(launches)) != described
    assert (case.kernels(torch.float32) <= set(launches)) == described


@pytest.mark.parametrize("channels", [(12, 16), (16, 12), (20, 36)], ids=str)
def test_tf32_other_channels_run_on_the_general_kernels(channels: tuple[int, int], launches: list[str]) -> None:
    images("general", 3, channels[0], 4, 5, channels[1], 3, 3).check(torch.float32)
    assert set(launches) >= GENERAL
    assert not any("_images_" in name or "_box_" in name or "_by_batch_" in name for name in launches)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("case", [CASES[0], CASES[-6]], ids=lambda case: case.id)
def test_exact_float32_runs_on_the_general_kernels(case: Case, launches: list[str]) -> None:
    """PyTorch's switch decides between the kernels."""
    torch.backends.cudnn.allow_tf32 = False
    case.check(torch.float32)
    assert set(launches) >= GENERAL
    assert not any(part in name for name in launches for part in ("_images_", "_box_", "_rows_", "_by_batch_"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("images", [1, 0], ids=["images", "box"])
def test_nan_and_infinity_stay_where_they_belong(images: int, dtype: torch.dtype, launches: list[str]) -> None:
    """A zero that TMA fills in is not an element of the image: its neighbour must not be multiplied in its place."""
    draw = DRAW[dtype]
    x = draw(2, 16, 4, 4, dtype=dtype, grad=False).to(memory_format=torch.channels_last)
    x[0, 3, 0, 3], x[1, 5, 3, 0] = torch.inf, torch.nan
    tensors = [x.requires_grad_(), draw(16, 16, 3, 3, dtype=dtype), draw(16, dtype=dtype)]
    with tables.override(IMAGES=images, IMAGES_WGRAD=1, NB=1, TH=2, TW=2, BLOCK_M=16, BLOCK_K=16):
        check(
            lambda x, w, b: kernels.conv2d(x, w, b, padding=1),
            lambda x, w, b: F.conv2d(x, w, b, padding=1),
            tensors,
            names="input weight bias",
            draw=draw,
        )
    assert not GENERAL & set(launches)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "every_other": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape).contiguous(),
    "part_of_a_batch": lambda t: torch.cat([t, t])[: t.shape[0]],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("images", [1, 0], ids=["images", "box"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, images: int, dtype: torch.dtype, launches: list[str]) -> None:
    """Tensors that are not dense channels-last are copied first, the output gradient too."""
    draw, change = DRAW[dtype], LAYOUTS[layout]
    x, w = (change(draw(*shape, dtype=dtype, grad=False)).detach() for shape in ((3, 16, 5, 4), (32, 16, 3, 3)))
    with tables.override(IMAGES=images, IMAGES_WGRAD=1):
        check(
            lambda x, w: kernels.conv2d(x, w, padding=1),
            lambda x, w: F.conv2d(x, w, padding=1),
            [x.requires_grad_(), w.requires_grad_()],
            names="input weight",
            draw=lambda *shape, **options: change(draw(*shape, **options)),
        )
    assert not GENERAL & set(launches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("images", [1, 0], ids=["images", "box"])
def test_output_in_nchw(images: int, dtype: torch.dtype, launches: list[str]) -> None:
    draw = DRAW[dtype]
    tensors = [draw(*shape, dtype=dtype) for shape in ((3, 16, 5, 4), (32, 16, 3, 3), (32,))]
    with tables.override(IMAGES=images, IMAGES_WGRAD=1):
        output = check(
            lambda x, w, b: kernels.conv2d(x, w, b, padding=1, output_format=torch.contiguous_format),
            lambda x, w, b: F.conv2d(x, w, b, padding=1),
            tensors,
            names="input weight bias",
            draw=draw,
        )
    assert output.is_contiguous()
    assert not GENERAL & set(launches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("batch", [1, 2, 7, 128, 1024])
@pytest.mark.parametrize("k", [16, 48, 64, 96, 128, 160, 192, 256, 384])
@pytest.mark.parametrize("c", [16, 48, 64, 96, 256])
def test_configurations_fit(c: int, k: int, batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks divide the channels where they must, and fit on one SM of an H100."""
    monkeypatch.setattr(rules, "INTERPRETED", False)
    monkeypatch.setattr(rules, "tuned", lambda device, key: {})
    shared, itemsize, device = 227 * 1024, dtype.itemsize, torch.device(DEVICE)
    sizes = (batch, 12, 12, c, k, 3, 3)
    for tiles in (
        rules.conv2d_images_config(device, "conv2d_fprop", *sizes, dtype=dtype),
        rules.conv2d_box_config(device, "conv2d_fprop", *sizes, dtype=dtype),
    ):
        assert c % tiles["BLOCK_K"] == 0
        pixels = tiles["BLOCK_M"] * tiles["PIXELS"] if "BLOCK_M" in tiles else tiles["NB"] * tiles["TH"] * tiles["TW"]
        filters = tiles["BLOCK_N"] + tiles.get("BLOCK_N2", 0)
        assert tiles["num_stages"] * (pixels + filters) * tiles["BLOCK_K"] * itemsize < shared
        assert pixels * filters / (32 * tiles["num_warps"]) <= 128, "accumulators must leave registers for the rest"
    by_batch = dtype == torch.float32
    tiles = rules.conv2d_by_batch_wgrad_config(device, *sizes) if by_batch else rules.conv2d_images_wgrad_config(device, *sizes)
    channels = tiles["BLOCK_N"] + tiles["BLOCK_N2"]
    assert c % channels == 0 or (by_batch and tiles["FOLDED"])
    assert tiles["num_stages"] * (tiles["BLOCK_M"] + channels * tiles["POSITIONS"]) * tiles["BLOCK_K"] * itemsize < shared
    assert tiles["BLOCK_M"] * channels * tiles["POSITIONS"] / (32 * tiles["num_warps"]) <= 192
