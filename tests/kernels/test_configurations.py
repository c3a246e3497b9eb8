"""Every configuration that the choosers return for AlexNet, run on a layer that is small yet larger than one ragged tile.

:mod:`tests.configurations` records them: for batches of 1, 2, 7 and 128, bfloat16, float32 and TF32, an A100, an H100 (with the
table measured on one) and a B200, in the forward pass and for each gradient. Here each distinct configuration runs once, with
the real layer's tiles, splits and choice of kernel, and is checked against the float64 oracle.

A small layer has fewer images, pixels, channels, parts of a split reduction and, for conv2, filter positions (3 x 3 instead of
5 x 5). Where a tile is one pixel of many images and a pool follows, the images fill one tile in part; without a pool, two
tiles.
Warps and stages are left out, since neither the interpreter nor the semantics of the IR have them: ``python -m
benchmarks.offline`` compiles them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels.configs import tables
from kernels.convolution import rules
from kernels.convolution.autograd import conv2d_reference
from kernels.convolution.relu_max_pool2d import conv2d_relu_max_pool2d_reference
from kernels.images import gather_resize_reference
from kernels.linear_rules import NARROW_OUTPUTS
from kernels.matrix_product import linear_reference
from kernels.runtime import launch
from kernels.runtime.backend import INTERPRETED
from kernels.sgd import join_master, sgd_step, sgd_step_reference, split_master

from ..configurations import (
    ASKED,
    BATCHES,
    DTYPES,
    GPUS,
    Part,
    all_parts,
    compiled_constants,
    distinct_parts,
    kernel_names,
    keys_of,
    precision_of_float32,
    pretend_gpu,
    replay,
    step_keys,
)
from ..conftest import DEVICE, UNDER_TTSEM
from ..oracle import assert_within_tolerance, integers, randn

#: Kernels that no layer of AlexNet launches, and why.
NOT_ALEXNETS = {
    "_cross_entropy_kernel": "a loss, not a layer",
    "_cross_entropy_sum_kernel": "a loss, not a layer",
    "_cross_entropy_dgrad_kernel": "a loss, not a layer",
    "_dropout_kernel": "AlexNet's dropout is done by the linear layer's last kernel",
    "_max_pool2d_gather_dgrad_kernel": "for windows of more than 16 positions",
    "_conv2d_stream_k_wgrad_kernel": "only where a table says so, and none does: test_stream_k_wgrad.py has its cases",
    "_sum_stream_k_kernel": "launched only with _conv2d_stream_k_wgrad_kernel",
}

PARTS = distinct_parts()


# ------------------------------------------------------------------------------------------------------ small layers


def _above(limit: int, step: int, remainder: int = 0) -> int:
    """The smallest number above ``limit`` that leaves ``remainder`` when divided by ``step``."""
    return limit + 1 + (remainder - limit - 1) % step


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _largest(part: Part, *names: str, of: str = "") -> int:
    """The largest sum of the values ``names`` among answers of choosers with ``of`` in their name; 0 without such answers."""
    answers = [choice.tiles for choice in part.choices if of in choice.function]
    return max((sum(tiles.get(name, 0) for name in names) for tiles in answers), default=0)


#: Choosers whose tiles must divide channels exactly, and the values that add up to such a tile. The tile is one of the channels
#: that the product is reduced over or, for the weight gradient, of the input's channels.
DIVIDING = {
    "conv2d_images_config": ("BLOCK_K",),
    "conv2d_box_config": ("BLOCK_K",),
    "conv2d_images_wgrad_config": ("BLOCK_N", "BLOCK_N2"),
    "conv2d_by_batch_wgrad_config": ("BLOCK_N", "BLOCK_N2"),
    "conv2d_stream_k_wgrad_config": ("BLOCK_N", "BLOCK_N2"),
}
#: Choosers whose tiles span several images, and the value that says how many.
IMAGES = {
    "conv2d_images_config": "BLOCK_M",
    "conv2d_images_wgrad_config": "BLOCK_K",
    "conv2d_by_batch_wgrad_config": "BLOCK_K",
    "conv2d_stream_k_wgrad_config": "BLOCK_K",
    "conv2d_stem": "BLOCK_M",
    "conv2d_stem_wgrad": "BLOCK_K",
    "conv2d_stem_pool_wgrad": "BLOCK_K",
    "conv2d_rows_config": "BLOCK_M",
    "conv2d_rows_wgrad_config": "BLOCK_K",
    "conv2d_box_config": "NB",
    "conv2d_taps_config": "BLOCK_M",
}


def _tile_of(part: Part, function: str) -> int:
    """How many channels a tile of this chooser takes at once, exactly; 1 where any number of channels works."""
    if _largest(part, "FOLDED", of=function):
        return 1
    return _largest(part, *DIVIDING[function], of=function) or 1


def _conv_shapes(part: Part, conv: nn.Conv2d, pooled: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of input and weight for padding 1: every dimension slightly larger than one tile."""
    first, gathered = conv.in_channels == 1, _largest(part, "BLOCK_M", of="matmul_config")
    written = _largest(part, "BLOCK_N", "BLOCK_N2")
    tile = math.lcm(16, *(_tile_of(part, function) for function in DIVIDING))
    rows_of_taps = _largest(part, "FOLDED", of="stream_k_wgrad") and part.dtype != torch.float32
    exact = {16: 48 if rows_of_taps else 24, 256: 256}.get(tile, 2 * tile)
    if rest := _largest(part, "BLOCK_K2", of="taps_config"):
        exact = 3 * rest  # so that a row of three taps is chunks of twice the rest and one rest
    wgrads = ("images_wgrad", "by_batch_wgrad", "stream_k_wgrad")
    filters = max(_largest(part, "BLOCK_M", of=of) for of in wgrads)  # filters of one tile of the weight gradient
    if part.phase == "input":
        c, k = _above(written, 16), exact
    elif part.phase == "weight":
        c, k = exact, _above(max(filters, gathered, 16 if not first else written), 16)
    elif part.phase == "both" and not gathered:
        reduced = math.lcm(16, *(_tile_of(part, function) for function in DIVIDING if "wgrad" not in function))
        c, k = _above(written, tile), _above(max(filters, 16 if not first else written), reduced)
    else:
        c, k = exact, _above(written, 16)
    n = max(2, *(_largest(part, value, of=function) + 1 for function, value in IMAGES.items()))
    if pooled and not _largest(part, "NB"):
        n = 5  # a pool has a tile for each image, and hundreds would take long
    if gathered:
        n, p, q = (2, 5, 6) if first and part.phase == "input" else (2, 9, 8)  # each of conv1's 16 phases is a tile
    else:
        p, q = (4 if first else 3, 5) if pooled else (2, 3)  # conv1's kernels with the pool take whole cells of two rows
        p, q = max(p, _largest(part, "TH") + 1), max(q, _largest(part, "TW") + 1, _largest(part, "COLUMNS") + 1)
    if first and pooled:  # the weight gradient takes blocks of 2 x 2 pixels
        p, q = p + p % 2, q + q % 2
    r, s = conv.kernel_size if first else (3, 3)
    step = conv.stride[0]
    return (n, 1 if first else c, (p - 1) * step + r - 2, (q - 1) * step + s - 2), (k, 1 if first else c, r, s)


def _linear_shapes(part: Part, linear: nn.Linear) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of input and weight. Rows start at multiples of 16 bytes where the real layer's do, which decides the kernel."""
    narrow = next((c.tiles for c in part.choices if c.function == "linear_narrow_config"), {"NARROW": 0})
    if narrow["NARROW"]:
        rows = narrow.get("ROWS", narrow.get("BLOCK_M", 0))
        return (rows + 3, 2 * narrow["BLOCK_K"] + 3), (linear.out_features, 2 * narrow["BLOCK_K"] + 3)
    product = next(choice.tiles for choice in part.choices if choice.function == "linear_config")
    m, n, k = (product[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    split = product.get("SPLIT", 2)  # equal shares: more shares than steps here, so each step is a part
    columns = _largest(part, "BLOCK_COLUMNS") if part.phase == "input" else 0  # columns of a block of the gradient's epilogue
    blocks = split * (1 if split > 4 else 2)
    while (blocks - 1) * k < columns or _cdiv(blocks, _cdiv(blocks, split)) != split:  # as many parts as the real layer has
        blocks += 1
    reduced = (blocks - 1) * k

    def features(real: int, limit: int) -> int:
        return _above(limit, 16, 8 if real % 8 == 0 else real % 16)

    outputs, inputs = linear.out_features, linear.in_features
    rows, out, into = {
        "input": (m + 3, features(outputs, reduced), features(inputs, n)),
        "weight": (reduced + 3, features(outputs, max(m, NARROW_OUTPUTS)), features(inputs, n)),
    }.get(part.phase, (m + 3, features(outputs, max(n, NARROW_OUTPUTS)), features(inputs, reduced)))
    return (rows, into), (out, into)


def _sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """-1, 0 and 1, and mostly 0 in a large filter: sums of products stay below 256, up to which bfloat16 is exact.

    With exact sums a pool's maxima, ties included, are at the same places in every dtype, and so are a ReLU's zeros in TF32.
    """
    filled = torch.rand(shape, device=DEVICE) < 1000 / math.prod(shape[1:])
    return (integers(*shape, dtype=dtype, high=1, grad=False) * filled).requires_grad_()


def _layer(part: Part) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """A small layer like the part's: our operation, its reference, and the input, weight and bias for both."""
    assert part.run is not None
    layer = part.run.layers[0]
    operation = part.run.operation
    pooled = operation == "conv2d_relu_max_pool2d"
    draw = _sparse if pooled or part.precision == "tf32" else randn
    if isinstance(layer, nn.Linear):
        shapes = _linear_shapes(part, layer)
        tensors = [draw(*shape, dtype=part.dtype) for shape in (*shapes, shapes[1][:1])]
        if operation == "linear":
            return kernels.linear, linear_reference, tensors
        if part.phase == "inference":
            return (
                lambda x, w, b: kernels.linear_relu_dropout(x, w, b, training=False),
                lambda x, w, b: linear_reference(x, w, b, activation="relu"),
                tensors,
            )
        mask = kernels.dropout_mask((shapes[0][0], shapes[1][0]), 0.5, 7, device=DEVICE)
        return (
            lambda x, w, b: kernels.linear_relu_dropout(x, w, b, 0.5, seed=7),
            lambda x, w, b: F.relu(F.linear(x, w, b)) * mask * 2,
            tensors,
        )
    assert isinstance(layer, nn.Conv2d)
    shapes = _conv_shapes(part, layer, pooled)
    x, w, b = (draw(*shape, dtype=part.dtype) for shape in (*shapes, shapes[1][:1]))
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    arguments: dict[str, Any] = {"stride": layer.stride, "padding": 1}
    if pooled:
        arguments |= {"pool_kernel_size": 3, "pool_stride": 2}
        output_format = part.run.output_format
        return (
            lambda x, w, b: kernels.conv2d_relu_max_pool2d(x, w, b, **arguments, output_format=output_format),
            lambda x, w, b: conv2d_relu_max_pool2d_reference(x, w, b, **arguments),
            [x, w, b],
        )
    assert operation == "conv2d", f"{part.layer}: no small layer for the operation {operation}, with {sorted(part.kernels)}"
    return (
        lambda x, w, b: kernels.conv2d(x, w, b, **arguments, activation="relu"),
        lambda x, w, b: conv2d_reference(x, w, b, **arguments, activation="relu"),
        [x, w, b],
    )


# ------------------------------------------------------------------------------------------------------------- tests


#: Kernels that may run as one program at real sizes too, for few rows or few elements.
_ONE_PROGRAM = ("_sum_parts_kernel", "_epilogue_backward_kernel")


@contextlib.contextmanager
def _as_in(part: Part) -> Iterator[None]:
    """Run the block with the part's configuration; check that it launches the part's kernels, with several programs each."""
    launched: list[tuple[str, dict[str, Any]]] = []
    programs: dict[str, int] = {}

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        name, constants = compiled_constants(kernel, arguments)
        launched.append((name, constants))
        programs[name] = max(programs.get(name, 0), math.prod(grid))

    with launch.observe_launches(note), replay(part):
        yield
    assert keys_of(part.choices, launched, part.dtype) == part.keys
    assert [name for name, count in programs.items() if count == 1 and name not in _ONE_PROGRAM] == []


@pytest.fixture
def like(request: pytest.FixtureRequest) -> Iterator[Part]:
    """A part, with kernels chosen as on its GPU."""
    part: Part = request.param
    if DEVICE == "cuda" and not UNDER_TTSEM:
        major, minor = torch.cuda.get_device_capability()
        if part.capability > 10 * major + minor:
            pytest.skip(f"needs a GPU of capability {part.capability / 10}")
    with pretend_gpu(part.capability, interpreted=INTERPRETED), precision_of_float32(part.precision):
        yield part


def _hold(part: Part, name: str, ours: Tensor, peer: Tensor, exact: Tensor) -> None:
    if part.precision == "tf32" and not INTERPRETED:  # PyTorch's CPU has no products of 10-bit operands
        assert (ours - exact).abs().max() <= 2.0**-9 * exact.abs().max(), name
        return
    assert_within_tolerance(name, ours, peer, exact)


@pytest.mark.thin
@pytest.mark.parametrize("like", [p for p in PARTS if p.run is not None], indirect=True, ids=lambda p: p.id)
def test_a_layer_like_alexnets(like: Part) -> None:
    part = like
    ours, reference, tensors = _layer(part)
    asked = ASKED.get(part.phase, ())
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in asked or part.phase == "forward")
    if asked:
        # The number of images, which is larger in AlexNet, decides what the forward pass saves for the weight gradient.
        by_images = any(choice.function == "conv2d_wgrad_by_images" and choice.answer for choice in part.choices)
        with tables.override(IMAGES_WGRAD=1) if by_images else contextlib.nullcontext():
            y = ours(*tensors)
        grad = torch.randn(y.shape, device=DEVICE).to(part.dtype)
        with _as_in(part):
            results = torch.autograd.grad(y, [tensors[i] for i in asked], grad)
    else:
        with _as_in(part), torch.set_grad_enabled(part.phase == "forward"):
            results = (ours(*tensors),)
    expected = []
    for dtype in (part.dtype, torch.float64):
        copies = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in tensors]
        y = reference(*copies)
        expected.append(torch.autograd.grad(y, [copies[i] for i in asked], grad.to(dtype)) if asked else (y.detach(),))
    for i, (got, peer, exact) in enumerate(zip(results, *expected, strict=True)):
        _hold(part, f"gradient of {('input', 'weight', 'bias')[asked[i]]}" if asked else "output", got, peer, exact)


@pytest.mark.parametrize("like", [p for p in PARTS if p.layer == "input"], indirect=True, ids=lambda p: p.id)
def test_the_networks_input(like: Part) -> None:
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8, device=DEVICE)
    index = torch.tensor([3, 0, 4], device=DEVICE)
    with _as_in(like):
        y = kernels.gather_resize(images, index, 45, dtype=like.dtype)
    peer, exact = (gather_resize_reference(images, index, 45, dtype=dtype) for dtype in (like.dtype, torch.float64))
    assert_within_tolerance("images", y, peer, exact)


@pytest.mark.parametrize("like", [p for p in PARTS if p.layer == "optimizer"], indirect=True, ids=lambda p: p.id)
def test_the_optimizer(like: Part) -> None:
    sizes = (5000, 10, 4096, 9001)
    half = like.dtype != torch.float32
    params, grads = ([randn(size, dtype=like.dtype, grad=False) for size in sizes] for _ in range(2))
    masters = [p.float() + 1e-4 * torch.rand_like(p, dtype=torch.float32) for p in params] if half else None
    buffers = [randn(size, dtype=torch.float32, grad=False) for size in sizes]
    values = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    expected = []
    for dtype in (torch.float32, torch.float64):
        copies = [
            [None if t is None else t.to(dtype) for t in group or [None] * 4] for group in (params, grads, masters, buffers)
        ]
        if half:
            copies[0] = [p.clone() for p in params]
        for tensors in zip(*copies, strict=True):
            sgd_step_reference(*tensors, **values, dampening=0.0, nesterov=False, maximize=False, first_step=False)
        expected.append((copies[2] if half else copies[0], copies[3]))
    with _as_in(like):
        if like.dtype == torch.bfloat16 and masters is not None:
            bits, ties = ([torch.empty_like(p, dtype=kind) for p in params] for kind in (torch.int16, torch.int8))
            for each in zip(masters, bits, ties, strict=True):
                split_master(*each)
            sgd_step(params, grads, bits, buffers, **values, ties=ties)
            masters = list(map(join_master, params, bits, ties))
        else:
            sgd_step(params, grads, masters, buffers, **values)
    for ours, peers, exacts in zip((masters or params, buffers), *expected, strict=True):
        for got, peer, exact in zip(ours, peers, exacts, strict=True):
            assert_within_tolerance("parameter or buffer", got, peer, exact)


def test_every_kernel_has_a_case() -> None:
    """Each kernel is launched by a part, or NOT_ALEXNETS says why not."""
    launched = set().union(*(part.kernels for part in PARTS))
    missing = kernel_names() - launched - set(NOT_ALEXNETS)
    assert not missing, f"no layer of AlexNet launched {sorted(missing)}: add a case for it, or a reason in NOT_ALEXNETS"
    assert not launched & set(NOT_ALEXNETS)


@pytest.mark.parametrize(("dtype", "precision"), DTYPES, ids=["bfloat16", "float32", "tf32"])
@pytest.mark.parametrize("capability", GPUS)
def test_a_whole_step_launches_nothing_else(capability: int, dtype: torch.dtype, precision: str) -> None:
    """A whole training step launches nothing beyond the layers' recorded parts."""
    covered = frozenset().union(*(part.keys for part in PARTS))
    for batch in BATCHES:
        assert step_keys(capability, dtype, precision, batch) - covered == set()


def test_the_parts_are_those_of_the_table() -> None:
    """Each configuration in the H100's table is chosen for a layer of AlexNet."""
    name = GPUS[90]
    table = tables.read_table(name)
    answers = [c.tiles for p in all_parts() if (p.capability, p.batch) == (90, 128) for c in p.choices if c.tiles]
    for key, values in table.items():
        if key.startswith(("conv2d_stem_fprop", "conv2d_stem_wgrad", "linear_fprop m128 n10")):
            continue  # AlexNet has no first layer without a pool, and few outputs use their own kernels
        wanted = {n: v for n, v in values.items() if n not in ("IMAGES", "FUSED")}  # separate choosers return these
        assert any(wanted.items() <= tiles.items() for tiles in answers), f"{name}: no layer used the entry {key}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_pointer_tiles_are_large_where_there_is_enough_to_do(dtype: torch.dtype, precision: str) -> None:
    """Large tiles read less. A small problem gets small tiles, unless partial sums keep the SMs busy."""
    with mock.patch.object(rules, "INTERPRETED", False):

        def tile(m: int, n: int, **how: bool) -> tuple[int, int]:
            config = rules.matmul_config(m, n, 2304, dtype, precision, **how)
            return config["BLOCK_M"], config["BLOCK_N"]

        assert tile(1024 * 144, 256, whole=True) == (128, 128)
        assert tile(144, 256, whole=True) == (64, 32)
        if dtype == torch.float32 and precision == "ieee":  # 2.2 waves of large tiles take 3, 8.7 waves of quarter tiles take 9
            assert tile(128 * 144, 256, whole=True) == (64, 64)
        assert tile(256, 2304, whole=False) == (128, 128)
        assert tile(128 * 144, 16, whole=True)[1] == 16  # not wider than the output
        assert tile(128 * 144, 256, whole=True, irregular_gather=True)[0] == 64


def test_a_replay_refuses_other_questions() -> None:
    part = next(p for p in PARTS if p.layer == "input")
    x = torch.zeros(2, 3, device=DEVICE)
    with (
        pytest.raises(AssertionError, match="calls linear_narrow_config, where AlexNet's layer called elementwise_config"),
        replay(part),
    ):
        kernels.linear(x, x)
    with pytest.raises(AssertionError, match=r"also called \['elementwise_config'\]"), replay(part):
        pass
