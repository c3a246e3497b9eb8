"""FusedSequential and fuse: every use of an nn.Sequential has the same result."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

import kernels
from alexnet_triton import FusedSequential, fuse, reference_lenet, unfuse
from alexnet_triton.runs import plan

from ..conftest import DEVICE


def small_layers(dropout: float = 0.5) -> list[nn.Module]:
    """Layers with every kind of run, for images of 3 x 18 x 18."""
    return [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(54, 20),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(20, 16),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(16, 5),
    ]


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 18, 18, device=DEVICE)


@pytest.fixture
def pair() -> tuple[nn.Sequential, FusedSequential]:
    """The plain network and the fused one with the same layers, in eval mode."""
    layers = small_layers()
    return nn.Sequential(*layers).to(DEVICE).eval(), FusedSequential(*layers).to(DEVICE).eval()


def operations(net: FusedSequential) -> list[str]:
    return [run.operation for run in plan(list(net))]


@pytest.mark.parametrize("grad", [False, True])
def test_flatten_after_a_block_is_a_view(grad: bool) -> None:
    """The block's pool writes the memory order that Flatten needs, but not with another layer in between."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(8 * 49, 5)]
    plain, fused = nn.Sequential(*layers).to(DEVICE), FusedSequential(*layers).to(DEVICE)
    assert [run.output_format for run in plan(list(fused))] == [torch.contiguous_format, None, None]
    x = images().contiguous(memory_format=torch.channels_last).requires_grad_(grad)
    pooled = fused[:4][:3](x)
    assert pooled.is_contiguous(memory_format=torch.channels_last)  # because this network ends there
    flat = fused[:4](x)
    assert flat._is_view()
    torch.testing.assert_close(flat, plain[:4](x))
    leaves = [*fused.parameters(), *([x] if grad else [])]
    for ours, theirs in zip(*(torch.autograd.grad(net(x).square().sum(), leaves) for net in (fused, plain)), strict=True):
        torch.testing.assert_close(ours, theirs)


FUSED = ["conv2d_relu_max_pool2d", "conv2d", "conv2d", "max_pool2d", "module", *["linear_relu_dropout"] * 2, "linear"]


def test_runs(pair: tuple[nn.Sequential, FusedSequential], launches: list[str]) -> None:
    plain, fused = pair
    assert operations(fused) == FUSED
    x = images()
    torch.testing.assert_close(fused(x), plain(x))
    assert launches == [
        "_conv2d_fprop_kernel",
        "_max_pool2d_fprop_kernel",
        "_conv2d_fprop_kernel",
        "_conv2d_fprop_kernel",
        "_max_pool2d_fprop_kernel",
        *["_linear_narrow_fprop_kernel"] * 3,
    ]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.Dropout(), nn.Linear(3, 3), nn.ReLU()], ["dropout", "linear"]),  # torchvision's order
        ([nn.Dropout(inplace=True)], ["module"]),
        ([nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2)], ["conv2d_relu_max_pool2d"]),
        ([nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.ReLU()], ["module", "module"]),
        ([nn.Conv2d(3, 3, 1), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)], ["conv2d", "max_pool2d"]),
        ([nn.Conv2d(3, 3, 1), nn.ReLU(), nn.MaxPool2d(2, dilation=2)], ["conv2d", "max_pool2d"]),
        ([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()], ["conv2d", "module", "module"]),
        ([nn.Conv2d(3, 3, 1), nn.MaxPool2d(2)], ["conv2d", "max_pool2d"]),
        ([nn.ReLU(), nn.Sigmoid(), nn.AvgPool2d(2)], ["module"] * 3),
        ([nn.Linear(3, 3), nn.Dropout()], ["linear", "dropout"]),
        ([nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.ReLU()], ["module", "module"]),
        ([nn.LazyConv2d(3, 1), nn.ReLU()], ["module", "module"]),
        ([nn.Linear(3, 3), nn.ReLU(), nn.Dropout(), nn.ReLU(inplace=True)], ["linear", "dropout", "module"]),
        ([], []),
    ],
)
def test_what_is_fused_and_what_is_not(layers: list[nn.Module], expected: list[str]) -> None:
    assert operations(FusedSequential(*layers)) == expected


def test_children_are_the_ordinary_modules(pair: tuple[nn.Sequential, FusedSequential]) -> None:
    plain, fused = pair
    assert type(fused[0]) is nn.Conv2d
    assert [type(layer) for layer in fused] == [type(layer) for layer in plain]
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert isinstance(fused, nn.Sequential)


def test_iterating_layer_by_layer(pair: tuple[nn.Sequential, FusedSequential]) -> None:
    plain, fused = pair
    x = images()
    y = x
    for layer in fused:
        y = layer(y)
    torch.testing.assert_close(y, plain(x))


def test_apply_and_parameters(pair: tuple[nn.Sequential, FusedSequential]) -> None:
    _, fused = pair

    def init_weights(m: nn.Module) -> None:
        if type(m) == nn.Linear or type(m) == nn.Conv2d:  # noqa: E721 (as d2l writes it)
            nn.init.ones_(m.weight)

    fused.apply(init_weights)
    assert all(bool((m.weight == 1).all()) for m in fused if hasattr(m, "weight"))


def test_slicing(pair: tuple[nn.Sequential, FusedSequential]) -> None:
    plain, fused = pair
    part = fused[:4]
    assert type(part) is FusedSequential
    assert list(part.state_dict()) == list(plain[:4].state_dict())
    assert part[0] is fused[0]
    x = images()
    torch.testing.assert_close(part(x), plain[:4](x))
    assert list(fused[5:].state_dict()) == list(plain[5:].state_dict())


def test_replacing_inserting_and_deleting_a_layer(pair: tuple[nn.Sequential, FusedSequential]) -> None:
    _, fused = pair
    fused[1] = nn.Sigmoid()
    assert operations(fused)[:3] == ["conv2d", "module", "max_pool2d"]
    fused[1] = nn.ReLU()
    assert operations(fused) == FUSED
    fused.insert(1, nn.BatchNorm2d(8).to(DEVICE))
    assert operations(fused)[:2] == ["conv2d", "module"]
    del fused[1]
    assert operations(fused) == FUSED


def test_hooks_see_what_they_would_see(pair: tuple[nn.Sequential, FusedSequential]) -> None:
    plain, fused = pair
    seen: list[torch.Tensor] = []
    x = images()
    handle = fused[1].register_forward_hook(lambda module, args, output: seen.append(output))
    assert operations(fused)[:3] == ["conv2d", "module", "max_pool2d"]
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(seen[0], torch.relu(plain[0](x)))
    handle.remove()
    assert operations(fused) == FUSED
    fused[3].register_full_backward_hook(lambda *_: None)
    assert operations(fused)[1:3] == ["module", "module"]


def test_a_global_hook_sees_every_layer(pair: tuple[nn.Sequential, FusedSequential]) -> None:
    _, fused = pair
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        fused(images())
    finally:
        handle.remove()
    assert seen == [*fused, fused]


def test_train_and_eval(pair: tuple[nn.Sequential, FusedSequential]) -> None:
    _, fused = pair
    x = images()
    assert torch.equal(fused(x), fused(x))
    fused.train()
    assert not torch.equal(fused(x), fused(x))


def test_copies_and_pickles(pair: tuple[nn.Sequential, FusedSequential]) -> None:
    _, fused = pair
    x = images()
    expected = fused(x)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(copied) is FusedSequential
        assert torch.equal(copied(x), expected)
        assert copied[0].weight is not fused[0].weight


def test_named_layers_and_empty() -> None:
    net = FusedSequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), relu=nn.ReLU())).to(DEVICE)
    assert list(net.state_dict()) == ["conv.weight", "conv.bias"]
    x = images()
    assert torch.equal(net(x), kernels.conv2d(x, net.conv.weight, net.conv.bias, activation="relu"))
    assert FusedSequential()(x) is x


def _losses(net: nn.Sequential, backend: str) -> list[float]:
    """The losses of five SGD steps on the same images with the same random numbers."""
    torch.manual_seed(1)
    net = net.to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, labels = images(8), torch.randint(0, 5, (8,), device=DEVICE)
    losses = []
    with kernels.use_backend(backend):  # type: ignore[arg-type]
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_a_network_trains_as_its_nn_sequential() -> None:
    plain = nn.Sequential(*small_layers(dropout=0.0))
    fused = fuse(copy.deepcopy(plain))
    ours, theirs = _losses(fused, "triton"), _losses(plain, "torch")
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[4] < ours[0]


def test_a_network_with_dropout_trains_alike_on_both_backends() -> None:
    """Seeds come from torch's generator, so both backends drop the same elements."""
    net = FusedSequential(*small_layers())
    copied = copy.deepcopy(net)
    ours = _losses(net, "triton")
    assert ours == pytest.approx(_losses(copied, "torch"), rel=1e-5)
    again = FusedSequential(*small_layers())
    again.load_state_dict(copied.state_dict())
    assert ours != pytest.approx(_losses(again, "triton"), rel=1e-2)


def test_two_runs_of_training_give_the_same_bits() -> None:
    net = FusedSequential(*small_layers())
    copied = copy.deepcopy(net)
    assert _losses(net, "triton") == _losses(copied, "triton")
    for first, second in zip(net.parameters(), copied.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    "tail",
    [
        [nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2, inplace=True)],
        [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Hardswish(inplace=True)],
        [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(inplace=True)],
        [nn.MaxPool2d(2), nn.ReLU6(inplace=True)],
        [nn.Flatten(), nn.Linear(972, 8), nn.Hardtanh(inplace=True)],
        [nn.Flatten(), nn.Dropout(0.0), nn.ELU(inplace=True)],
    ],
    ids=lambda layers: "-".join(type(m).__name__ for m in layers),
)
def test_a_next_layer_may_work_in_place(tail: list[nn.Module]) -> None:
    plain, fused = nn.Sequential(*tail).to(DEVICE), FusedSequential(*tail).to(DEVICE)
    x = images().requires_grad_()
    grads = [torch.autograd.grad(net(x.clone()).square().sum(), x)[0] for net in (plain, fused)]
    torch.testing.assert_close(*grads)


def test_an_in_place_layer_after_dropout() -> None:
    net = FusedSequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.ReLU(inplace=True)).to(DEVICE)
    net(torch.randn(4, 6, device=DEVICE)).sum().backward()
    assert net[0].weight.grad.any()


@pytest.mark.parametrize("after", [[], [nn.Identity(), nn.Dropout(0.0)], [nn.Flatten(), nn.Hardtanh(inplace=True)]])
def test_what_comes_after_dropout_may_work_in_place(after: list[nn.Module]) -> None:
    """So may the caller, since PyTorch's dropout does not need its output."""
    net = FusedSequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), *after).to(DEVICE)
    net(torch.randn(4, 6, device=DEVICE)).mul_(2).sum().backward()
    assert net[0].weight.grad.any()


def test_a_hook_between_in_place_layers() -> None:
    net = FusedSequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)).to(DEVICE)
    seen: list[torch.Tensor] = []
    net[1].register_forward_hook(lambda module, args, output: seen.append(output))
    net(images()).sum().backward()
    assert seen[0].min() >= 0
    assert net[0].weight.grad is not None


def test_dropout_layers_and_steps_draw_their_own_masks() -> None:
    net = FusedSequential(nn.Linear(4, 1000), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1000, 1000), nn.ReLU(), nn.Dropout(0.5))
    for layer in (net[0], net[3]):
        nn.init.zeros_(layer.weight)
        nn.init.ones_(layer.bias)
    net.to(DEVICE)
    x = torch.randn(8, 4, device=DEVICE)
    first = net[:3](x) > 0
    torch.manual_seed(5)
    masks = [first, net[:3](x) > 0, net(x) > 0, net(x) > 0]
    for i, a in enumerate(masks):
        assert abs(a.double().mean().item() - 0.5) < 0.03
        for b in masks[:i]:
            assert abs((a == b).double().mean().item() - 0.5) < 0.03


class Branching(nn.Module):
    """Sequentials inside other modules, of which one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.heads = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU()) for _ in range(2)])
        self.shared = self.heads[0]
        self.alone = nn.Conv2d(2, 2, 1)
        self.register_buffer("shift", torch.ones(2, 1, 1))
        self.empty = None
        self.register_module("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trunk(x)
        return self.alone(sum(head(x) for head in self.heads) + self.shared(x)) + self.shift


def test_fuse_changes_classes_and_nothing_else() -> None:
    net = Branching().to(DEVICE).eval()
    x = images()
    expected, objects = net(x), list(net.modules())
    kinds, keys, parameters = [type(m) for m in objects], list(net.state_dict()), [id(p) for p in net.parameters()]
    fused = fuse(net)
    assert fused is net
    assert all(mine is theirs for mine, theirs in zip(fused.modules(), objects, strict=True))
    assert isinstance(fused, Branching)
    assert type(fused.trunk) is type(fused.heads[1]) is FusedSequential
    assert fused.shared is fused.heads[0]
    assert type(fused.alone) is nn.Conv2d
    assert not fused.training
    assert (list(fused.state_dict()), [id(p) for p in fused.parameters()]) == (keys, parameters)
    torch.testing.assert_close(fused(x), expected)
    assert fuse(fused) is fused
    assert unfuse(fused) is fused
    assert [type(m) for m in fused.modules()] == kinds
    torch.testing.assert_close(fused(x), expected)


class Features(nn.Sequential):
    """A subclass with its own method and its own ``train``."""

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return self[0](x)

    def train(self, mode: bool = True) -> Features:
        return super().train(False)


class OwnForward(nn.Sequential):
    """A subclass that does more than call its layers in turn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def test_fuse_of_a_subclass_keeps_what_it_adds(launches: list[str]) -> None:
    net = Features(nn.Conv2d(3, 4, 3), nn.ReLU()).to(DEVICE)
    net.note = "kept"
    x = images()
    expected = net(x)
    fused = fuse(net)
    assert isinstance(fused, FusedSequential)
    assert isinstance(fused, Features)
    assert fused.note == "kept"
    fused.train()
    assert not fused.training
    torch.testing.assert_close(fused.first(x), net[0](x))
    assert type(fused[:1]) is type(fused)  # a slice has the subclass's type, as for every nn.Sequential
    assert launches == []
    for same in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(same) is type(fused)
        torch.testing.assert_close(same(x), expected)
    assert launches == ["_conv2d_fprop_kernel"] * 3


def test_fuse_of_a_sequential_with_a_forward_of_its_own(launches: list[str]) -> None:
    own = OwnForward(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 4, 1)).to(DEVICE)
    x = images()
    expected = own(x)
    fused = fuse(own)
    assert isinstance(fused, OwnForward)
    assert isinstance(fused[:1], OwnForward)
    torch.testing.assert_close(fused(x), expected)
    assert launches == ["_conv2d_fprop_kernel"] * 2


def test_fuse_of_what_has_no_container_and_of_empty_ones() -> None:
    layer = nn.Conv2d(3, 4, 3)
    assert fuse(layer) is layer
    assert type(layer) is nn.Conv2d
    already = FusedSequential(layer)
    assert fuse(already) is already
    net = fuse(nn.Sequential(layer, nn.Sequential()))
    assert type(net) is type(net[1]) is FusedSequential


def test_sums_and_multiples_stay_fused() -> None:
    net = FusedSequential(nn.Conv2d(3, 3, 3), nn.ReLU())
    for combined in (net + net, net * 2, 2 * net):
        assert type(combined) is FusedSequential
        assert list(combined) == list(net) * 2


def test_torchvision_alexnet_trains_fused() -> None:
    from torchvision.models import alexnet

    net = alexnet(num_classes=5, dropout=0.0).to(DEVICE)
    small = nn.Sequential(net.features[:6], nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(768, 5)).to(DEVICE)
    fused = fuse(copy.deepcopy(small))
    assert operations(fused[0]) == ["conv2d_relu_max_pool2d"] * 2
    x = torch.randn(1, 3, 47, 47, device=DEVICE)
    results = [torch.autograd.grad(n(x).square().sum(), list(n.parameters())) for n in (fused, small)]
    for ours, theirs in zip(*results, strict=True):
        # By norm: where a ReLU's argument is almost zero, rounding decides whether a gradient passes.
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    assert [type(m) for _, m in fuse(net).named_children()] == [FusedSequential, nn.AdaptiveAvgPool2d, FusedSequential]


def test_lenet_runs_its_convolutions_and_linears_on_kernels(launches: list[str]) -> None:
    net = reference_lenet().to(DEVICE)
    fused = fuse(copy.deepcopy(net))
    x = torch.randn(2, 1, 28, 28, device=DEVICE)
    torch.testing.assert_close(fused(x), net(x))
    products = [name for name in launches if name != "_matmul_finish_kernel"]  # which follows a split on a GPU
    assert products == [*["_conv2d_fprop_kernel"] * 2, *["_matmul_kernel"] * 2, "_linear_narrow_fprop_kernel"]
