"""Training and evaluation on space-to-depth cells of a strided first layer: bit-identical, one pass over memory less."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kernels
from alexnet_triton import (
    AlexNet,
    CellImages,
    FusedSequential,
    first_layer_cells,
    fuse,
    reference_alexnet,
    reference_lenet,
)
from alexnet_triton.data.augment import EVERYTHING, NOTHING, Augment, augmented_input, input_for, network_input, patch_side
from alexnet_triton.data.dataset import Split
from alexnet_triton.data.fashion_mnist import load_fashion_mnist
from alexnet_triton.models import IMAGE_SIZE
from alexnet_triton.training.evaluation import evaluate, measure_speed, predict_split
from alexnet_triton.training.networks import float32_products
from alexnet_triton.training.recipe import Recipe, Where
from alexnet_triton.training.trainer import Trainer
from kernels.runtime.backend import HALF, INTERPRETED, has_tma

from ..conftest import DEVICE, UNDER_TTSEM, own_devices
from ..oracle import dtype_id

DEVICE_ = torch.device(DEVICE)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not (INTERPRETED or has_tma(DEVICE_)), reason="cells are read on Hopper and later only"),
]

#: Side in pixels of the network's input, and of the stored images that patches are cut from.
SIZE = 27
HELD = patch_side(SIZE)
CONV1 = kernels.Cells((11, 11), 4, (1, 1))
HALF_DTYPES = pytest.mark.parametrize("dtype", HALF, ids=dtype_id)


def network(dtype: torch.dtype, dropout: float = 0.5) -> FusedSequential:
    """A small AlexNet for 27 x 27 images; its first layer is AlexNet's with 16 filters."""
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(1, 16, 11, stride=4, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16, 24), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, 10)),
    ]
    return FusedSequential(*layers).to(DEVICE, dtype)


def split(images: int = 10) -> Split:
    return load_fashion_mnist("sample").train.limited(images).to(DEVICE_)


def held_for_patches(images: int) -> Split:
    """:func:`split` with a black border, padded to the size in which images are stored for patches."""
    small = split(images)
    return dataclasses.replace(small, images=nn.functional.pad(small.images, (0, HELD - small.size) * 2))


def cells_for(net: nn.Module, dtype: torch.dtype, size: int = SIZE, channels: int = 1) -> kernels.Cells | None:
    return first_layer_cells(net, size, dtype=dtype, device=DEVICE_, channels=channels)


def given_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, give every network images, as if it could not read cells."""
    monkeypatch.setattr("alexnet_triton.data.augment.first_layer_cells", lambda *_, **__: None)


# ------------------------------------------------------------------------------------- which networks are given cells


@HALF_DTYPES
def test_alexnet_reads_cells_in_half_precision(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        nets = {channels: AlexNet(in_channels=channels) for channels in (1, 3)}
    for channels, net in nets.items():
        net = net[:3].to_empty(device=DEVICE).to(dtype)
        assert cells_for(net, dtype, 224, channels) == CONV1
        assert cells_for(net, dtype, 224, 4 - channels) is None  # the network's call reports the wrong channel count
        assert first_layer_cells(net, (224, 300), dtype=dtype, device=DEVICE_, channels=channels) == CONV1
        assert cells_for(net, torch.float32, 224, channels) is None
        with kernels.use_backend("torch"):
            assert cells_for(net, dtype, 224, channels) is None


def test_ints_for_pairs_are_pairs() -> None:
    """Layers accept an int for a pair in their forward pass, and so does ``first_layer_cells``."""
    net = network(torch.bfloat16)
    net[0].stride, net[0].padding, net[0].dilation = 4, "valid", [1, 1]
    assert cells_for(net, torch.bfloat16) == CONV1._replace(padding=(0, 0))


def test_on_other_gpus_images_stay_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """``first_layer_cells`` follows the kernels' own selection."""
    net = network(torch.bfloat16)
    assert cells_for(net, torch.bfloat16) == CONV1
    monkeypatch.setattr("kernels.convolution.select.has_tma", lambda _: False)
    assert cells_for(net, torch.bfloat16) is None


class OwnForward(FusedSequential):
    """A subclass whose ``forward`` uses its input's pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean())


def _with(change: Callable[[FusedSequential], object]) -> nn.Module:
    net = network(torch.bfloat16)
    change(net)
    return net


@pytest.mark.parametrize(
    "make",
    {
        "plain": lambda: nn.Sequential(*network(torch.bfloat16)),
        "in_a_container": lambda: FusedSequential(network(torch.bfloat16)),
        "empty": lambda: FusedSequential(),
        "lenet": lambda: fuse(reference_lenet()).to(DEVICE, torch.bfloat16),
        "subclass_with_a_forward": lambda: OwnForward(*network(torch.bfloat16)),
        "no_pool": lambda: network(torch.bfloat16)[:2],
        "replaced_forward": lambda: _with(lambda net: setattr(net, "forward", lambda x: x)),
        "hook_on_the_network": lambda: _with(lambda net: net.register_forward_pre_hook(lambda *_: None)),
        "hook_on_the_first_layer": lambda: _with(lambda net: net[0].register_forward_hook(lambda *_: None)),
        "stride_1": lambda: _with(lambda net: setattr(net[0], "stride", (1, 1))),
        "two_strides": lambda: _with(lambda net: setattr(net[0], "stride", (4, 2))),
        "dilated": lambda: _with(lambda net: setattr(net[0], "dilation", (2, 2))),
        "padding_mode": lambda: _with(lambda net: setattr(net[0], "padding_mode", "reflect")),
    }.items(),
    ids=lambda item: item[0],
)
def test_who_is_given_images(make: tuple[str, Callable[[], nn.Module]]) -> None:
    assert cells_for(make[1](), torch.bfloat16) is None


def test_a_hook_is_asked_about_at_every_call_and_sees_images() -> None:
    net, images = network(torch.bfloat16), split(2).images
    seen: list[object] = []
    assert isinstance(input_for(net, images, None, SIZE, dtype=torch.bfloat16), CellImages)
    handle = net.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net(input_for(net, images, None, SIZE, dtype=torch.bfloat16))
    assert isinstance(seen[0], Tensor)
    assert seen[0].shape == (2, 1, SIZE, SIZE)
    handle.remove()
    assert isinstance(input_for(net, images, None, SIZE, dtype=torch.bfloat16), CellImages)


def test_a_global_hook_sees_images_too() -> None:
    net = network(torch.bfloat16)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert cells_for(net, torch.bfloat16) is None
    finally:
        handle.remove()


# -------------------------------------------------------------------------------------------- networks called on cells


def both(net: nn.Module, dtype: torch.dtype, n: int = 3) -> tuple[Tensor, CellImages]:
    """The first ``n`` images as a tensor and the same images as cells."""
    images, index = split().images, torch.arange(n, device=DEVICE)
    cells = cells_for(net, dtype)
    assert cells is not None
    made = (network_input(images, index, SIZE, dtype=dtype, cells=of) for of in (None, cells))
    return next(made), CellImages(next(made), cells)


@HALF_DTYPES
@pytest.mark.parametrize("n", [1, 3, 0])
def test_output_and_gradients_are_those_of_the_images(n: int, dtype: torch.dtype, launches: list[str]) -> None:
    net = network(dtype, dropout=0.0)
    results = []
    for x in both(net, dtype, n):
        launches.clear()
        y = net(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), net.parameters())))
        assert ("_space_to_depth_kernel" in launches) == (n > 0 and isinstance(x, Tensor))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert n == 0 or all(bool(grad.any()) for grad in results[0][1:3])


def test_alexnets_own_first_layer(launches: list[str]) -> None:
    """The image is 48 x 48: at 224 x 224, the 96 filters take a minute and a half in the interpreter."""
    net = AlexNet()[:3].to(DEVICE, torch.bfloat16).eval()
    images, index = split(1).images, torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        expected = net(network_input(images, index, 48, dtype=torch.bfloat16))
        launches.clear()
        got = net(input_for(net, images, None, 48, dtype=torch.bfloat16))
    assert launches == ["_gather_resize_kernel", "_fold_filter_kernel", "_conv2d_stem_pool_kernel"]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_cells_mean_the_same_where_images_would_be_faster(backend: str) -> None:
    """In float32 and on PyTorch's operations, the images are restored from the cells."""
    net = network(torch.float32).eval()
    x = network_input(split().images, torch.arange(3, device=DEVICE), SIZE)
    cells = kernels.space_to_depth(x, *CONV1)
    with kernels.use_backend(backend), torch.no_grad():  # type: ignore[arg-type]
        torch.testing.assert_close(net(CellImages(cells, CONV1)), net(x))


def test_copies_pickles_and_slices_take_them() -> None:
    net = network(torch.bfloat16).eval()
    x, cells = both(net, torch.bfloat16)
    expected = net(x)
    for same in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), fuse(nn.Sequential(*net)).eval(), net[:7] + net[7:]):
        assert torch.equal(same(cells), expected)
    y: Tensor = x
    for layer in net:
        y = layer(y)
    assert y.shape == expected.shape


@own_devices
def test_compiled_as_one_graph() -> None:
    """A call with cells and a call with images compile to one graph each."""
    torch._dynamo.reset()
    net = network(torch.bfloat16, dropout=0.0)
    x, cells = both(net, torch.bfloat16)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    results = []
    for module, given in ((net, x), (compiled, cells), (compiled, x)):
        y = module(given)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), net.parameters())))
    for compiled_result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(compiled_result, results[0], strict=True))


@pytest.mark.parametrize(
    ("layers", "cells", "message"),
    [
        (
            slice(7),
            kernels.Cells(11, 4, 2),
            r"Conv2d \+ ReLU \+ MaxPool2d, which reads images or their Cells\(kernel_size=\(11, 11\), s",
        ),
        (slice(7), kernels.Cells(7, 4, 1), r"got Cells\(kernel_size=7, stride=4, padding=1\)"),
        (slice(2), CONV1, r"the network begins with Conv2d \+ ReLU, which reads images, got Cells"),
        (slice(1, 2), CONV1, r"ReLU \(a ReLU is only fused into a Conv2d or Linear right before it\), which reads images"),
        (slice(7, 11), CONV1, r"Linear \+ ReLU \+ Dropout, which reads images"),
    ],
    ids=["padding", "filter", "no_pool", "relu", "linear"],
)
def test_other_cells_and_layers_that_read_none_are_refused(
    layers: slice, cells: kernels.Cells, message: str, launches: list[str]
) -> None:
    """Without the error, the network would silently compute with the wrong pixels."""
    net = network(torch.bfloat16)
    given = both(net, torch.bfloat16)[1]._replace(cells=cells)
    launches.clear()
    with pytest.raises(ValueError, match=message):
        net[layers](given)
    assert launches == []


def test_a_hook_that_comes_between_is_no_silent_mistake() -> None:
    net = network(torch.bfloat16)
    _, cells = both(net, torch.bfloat16)
    net[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"Conv2d \(the ReLU carries a hook\), which reads images, got Cells"):
        net(cells)


# ------------------------------------------------------------------------------------------------ training, evaluation


def _state(trainer: Trainer) -> list[Tensor]:
    masters = [p if (m := trainer.optimizer.master(p)) is None else m for p in trainer.net.parameters()]
    return [t.detach().clone() for t in (*trainer.net.parameters(), *masters, trainer.loss_sum, trainer.correct)]


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the trainer resize images to 27 x 27 for AlexNet."""
    monkeypatch.setitem(IMAGE_SIZE, "alexnet", SIZE)


def _trained(dtype: torch.dtype, augment: Augment) -> list[Tensor]:
    """State after two epochs, each of a batch of 4 and one of 3 images."""
    recipe = Recipe(batch_size=4, lr=0.1, **dataclasses.asdict(augment))
    images = held_for_patches(7) if augment.crop == "patch" else split(7)
    trainer = Trainer(network(dtype), images, recipe, Where(DEVICE_))
    torch.manual_seed(1)
    for seed in range(2):
        trainer.epoch(torch.Generator(DEVICE).manual_seed(seed))
    return _state(trainer)


@pytest.mark.thin("plain-bfloat16", "patch-float16")
@HALF_DTYPES
@pytest.mark.parametrize(
    "augment",
    [NOTHING, EVERYTHING, Augment(flip=True, crop="resized"), Augment(flip=True, crop="patch")],
    ids=["plain", "augmented", "resized", "patch"],
)
def test_training_computes_the_same_bits(
    augment: Augment, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, launches: list[str]
) -> None:
    on_cells = _trained(dtype, augment)
    assert "_space_to_depth_kernel" not in launches
    # On a GPU the trainer warms up first.
    assert launches.count("_gather_resize_kernel") == launches.count("_conv2d_stem_pool_kernel") >= 4
    steps = launches.count("_gather_resize_kernel")
    launches.clear()
    given_images(monkeypatch)
    on_images = _trained(dtype, augment)
    assert launches.count("_space_to_depth_kernel") == launches.count("_gather_resize_kernel") == steps
    assert all(torch.equal(a, b) for a, b in zip(on_cells, on_images, strict=True))
    assert not any(torch.equal(now, start) for now, start in zip(on_cells, network(dtype).parameters(), strict=False))


@pytest.mark.thin("resized-bfloat16")
@HALF_DTYPES
@pytest.mark.parametrize("images", ["resized", "patches", "ten crops"])
def test_evaluation_computes_the_same_bits(
    images: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, launches: list[str]
) -> None:
    net, test = network(dtype), split(7) if images == "resized" else held_for_patches(7)
    arguments = {"batch_size": 3, "image_size": SIZE, "device": DEVICE_}
    results = []
    batches = 33 if images == "ten crops" else 6
    for on_cells in (True, False):
        launches.clear()
        found = evaluate(net, test, **arguments, ten_crop=images == "ten crops")
        results.append((found, predict_split(net, test, **arguments)))
        assert launches.count("_gather_resize_kernel") == launches.count("_conv2d_stem_pool_kernel") == batches
        assert launches.count("_space_to_depth_kernel") == (0 if on_cells else batches)
        given_images(monkeypatch)
    (ours, predicted), (theirs, expected) = results
    assert ours == theirs
    assert torch.equal(predicted.true, expected.true)
    assert torch.equal(predicted.classes, expected.classes)


def test_speed_is_that_of_the_networks_own_input(launches: list[str]) -> None:
    assert measure_speed(network(torch.bfloat16), split(), 4, SIZE, DEVICE_) > 0
    assert "_space_to_depth_kernel" not in launches
    assert launches.count("_gather_resize_kernel") == 1


def test_float32_lenet_and_pytorchs_operations_are_given_images(launches: list[str]) -> None:
    images = split(3).images
    lenet = fuse(reference_lenet()).to(DEVICE, torch.bfloat16)
    assert isinstance(input_for(lenet, images, None, 28, dtype=torch.bfloat16), Tensor)
    plain = reference_alexnet()[:3].to(DEVICE, torch.bfloat16)
    assert isinstance(input_for(plain, images, None, 224, dtype=torch.bfloat16), Tensor)
    assert isinstance(input_for(network(torch.float32), images, None, SIZE), Tensor)
    with kernels.use_backend("torch"):
        assert isinstance(input_for(network(torch.bfloat16), images, None, SIZE, dtype=torch.bfloat16), Tensor)
    launches.clear()
    trainer = Trainer(network(torch.float32), split(), Recipe(batch_size=4, lr=0.1), Where(DEVICE_))
    trainer.step(torch.arange(4, device=DEVICE))
    assert "_conv2d_fprop_kernel" in launches
    assert not any("_stem_" in name or name == "_space_to_depth_kernel" for name in launches)


#: Kernels of convolutions in TF32: the first layer reads images, the others read through tensor descriptors.
TF32_KERNELS = {"_conv2d_rows_kernel", "_conv2d_rows_wgrad_kernel", "_conv2d_images_kernel", "_conv2d_images_wgrad_kernel"}
GENERAL_KERNELS = {"_conv2d_fprop_kernel", "_conv2d_dgrad_kernel", "_conv2d_wgrad_kernel"}


@pytest.mark.parametrize("precision", ["tf32", "float32"])
def test_float32_trains_under_the_precision_that_is_asked_for(precision: str, launches: list[str]) -> None:
    """``train --dtype tf32`` runs the TF32 kernels on images; ``--dtype float32`` runs the exact kernels."""
    # On a GPU, the constructor runs the step and captures it.
    graph = DEVICE == "cuda"
    with float32_products(precision):
        net = network(torch.float32)
        assert isinstance(input_for(net, split(4).images, None, SIZE), Tensor)
        trainer = Trainer(net, split(4), Recipe(batch_size=4, lr=0.1), Where(DEVICE_, graph))
        if not graph:
            trainer.step(torch.arange(4, device=DEVICE))
    expected, other = (TF32_KERNELS, GENERAL_KERNELS) if precision == "tf32" else (GENERAL_KERNELS, TF32_KERNELS)
    assert expected <= set(launches)
    assert not other & set(launches)


def test_images_of_three_channels_stay_images() -> None:
    net = AlexNet(in_channels=3)[:3].to(DEVICE, torch.bfloat16)
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, device=DEVICE)
    index = torch.tensor([1], device=DEVICE)
    for augment in (NOTHING, EVERYTHING):
        given = input_for(net, images, index, 32, dtype=torch.bfloat16, augment=augment)
        assert isinstance(given, Tensor)
        assert given.shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"cells are made of images \(D, H, W\) of one channel, got shape \(2, 3, 28, 28\)"):
        network_input(images, index, 32, cells=CONV1)


def test_augmented_cells_are_drawn_as_augmented_images() -> None:
    images, index = split().images, torch.arange(4, device=DEVICE)
    results = []
    for cells in (None, CONV1):
        torch.manual_seed(3)
        results.append(augmented_input(images, index, SIZE, EVERYTHING, torch.bfloat16, cells))
    assert torch.equal(kernels.space_to_depth(results[0], *CONV1), results[1])


@pytest.mark.skipif(not torch.cuda.is_available() or UNDER_TTSEM, reason="needs a CUDA GPU")
@HALF_DTYPES
def test_a_captured_step_on_cells_is_the_eager_step(dtype: torch.dtype) -> None:
    results = []
    for graph in (False, True):
        net = network(dtype, dropout=0.0)
        trainer = Trainer(net, split(40), Recipe(batch_size=16, lr=0.1), Where(DEVICE_, graph))
        losses = [trainer.epoch(torch.Generator(DEVICE).manual_seed(seed))[:2] for seed in range(2)]
        results.append((losses, _state(trainer)))
    (eager_losses, eager), (captured_losses, captured) = results
    assert eager_losses == captured_losses
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
