"""Common uses of an nn.Sequential (compile, export, transforms, autocast): FusedSequential gives the plain layers' results."""

from __future__ import annotations

import copy
import io
import operator
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

import kernels
from alexnet_triton import FusedSequential, fuse, unfuse

from ..conftest import DEVICE
from .test_fused import images, small_layers

KERNELS_OF_A_FORWARD_PASS = [
    *("_conv2d_fprop_kernel", "_max_pool2d_fprop_kernel"),
    *("_conv2d_fprop_kernel", "_conv2d_fprop_kernel", "_max_pool2d_fprop_kernel"),
    *["_linear_narrow_fprop_kernel"] * 3,
]


@pytest.fixture
def net() -> FusedSequential:
    """A FusedSequential with every kind of fused run, with dropout, in training mode."""
    return FusedSequential(*small_layers()).to(DEVICE)


def gradients(net: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Gradients of a loss by every parameter of ``net``, from seed 3; ``forward`` is called in place of ``net`` if given."""
    torch.manual_seed(3)
    return list(torch.autograd.grad((forward or net)(x).square().sum(), list(net.parameters())))


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Assert that two lists of tensors are bit-identical."""
    for got, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(got, wanted)


# --------------------------------------------------------------------------------------------- compile and export


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_of_forward_and_backward_as_one_graph(net: FusedSequential, dynamic: bool, launches: list[str]) -> None:
    """TorchInductor checks the strides that the fake implementations promise; with ``dynamic``, one graph serves any batch."""
    torch._dynamo.reset()
    net[10].p = net[13].p = 0.0
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=dynamic):
        for batch in (4, 6) if dynamic else (4,):
            x = images(batch)
            launches.clear()
            ours = gradients(net, x, compiled)
            assert launches[:8] == KERNELS_OF_A_FORWARD_PASS
            for got, eager in zip(ours, gradients(net, x), strict=True):
                torch.testing.assert_close(got, eager)


def test_compile_with_dropout_draws_anew(net: FusedSequential) -> None:
    torch._dynamo.reset()
    x = images()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x), compiled(x))


def test_compile_under_autocast(net: FusedSequential) -> None:
    torch._dynamo.reset()
    net.eval()
    x = images()
    with torch.autocast(DEVICE, torch.bfloat16):
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
        eager = net(x)
    assert compiled.dtype == torch.bfloat16
    torch.testing.assert_close(compiled, eager)


def test_compile_with_arguments_that_change() -> None:
    torch._dynamo.reset()
    x, weight = torch.randn(1, 3, 9, 9, device=DEVICE), torch.randn(4, 3, 3, 3, device=DEVICE)

    def convolve(stride: int, padding: int) -> Tensor:
        return kernels.conv2d(x, weight, stride=stride, padding=padding)

    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager")
    for arguments in ((1, 0), (2, 1), (3, 2)):
        assert torch.equal(compiled(*arguments), convolve(*arguments))


def operators(program: torch.export.ExportedProgram) -> list[str]:
    """Names of this project's operators in an exported graph."""
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [t.split(".")[1] for t in targets if t.startswith("alexnet_triton.")]


OPERATORS = ["conv2d_relu_max_pool2d_fprop", "conv2d_fprop", "conv2d_fprop", "max_pool2d_fprop", *["linear_fprop"] * 3]


def test_export_for_any_batch_and_image_size(net: FusedSequential) -> None:
    net.eval()
    program = torch.export.export(net, (images(),), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert operators(program) == OPERATORS
    x = images(7)
    assert torch.equal(program.module()(x), net(x))
    assert torch.equal(program.run_decompositions().module()(x), net(x))
    sizes = {axis: torch.export.Dim(name, min=12, max=64) for axis, name in ((2, "h"), (3, "w"))}
    part = torch.export.export(net[:6], (images(),), dynamic_shapes=(sizes,))
    x = torch.randn(4, 3, 20, 31, device=DEVICE)
    assert torch.equal(part.module()(x), net[:6](x))


def test_an_exported_network_trains(net: FusedSequential) -> None:
    """The exported graph holds operators, not autograd Functions; the operators' registered gradients run the same kernels."""
    x = images()
    module = torch.export.export(net, (x,)).module()
    torch.manual_seed(3)
    ours = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    assert_equal(list(ours), gradients(net, x))


def test_an_export_without_gradients_refuses_to_be_trained(net: FusedSequential) -> None:
    with torch.no_grad():
        module = torch.export.export(net.eval(), (images(),)).module()
    with pytest.raises(RuntimeError, match="recorded without the window positions"):
        module(images()).sum().backward()


def test_an_export_is_loaded_by_another_process(net: FusedSequential, tmp_path: Path) -> None:
    x = images()
    torch.export.save(torch.export.export(net.eval(), (x,)), tmp_path / "net.pt2")
    torch.save((x, net(x)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, kernels\n"
        "torch.backends.cudnn.allow_tf32 = False\n"  # as in this process
        "x, expected = torch.load(sys.argv[2])\n"
        "assert torch.equal(torch.export.load(sys.argv[1]).module()(x), expected)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "net.pt2", tmp_path / "expected.pt"], check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_package_of_aot_inductor(net: FusedSequential, tmp_path: Path) -> None:
    with torch.no_grad():
        program = torch.export.export(net.eval(), (images(),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    x = images()
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), net(x))


# -------------------------------------------------------------------------------------------- traces and transforms


def test_fx_records_the_operations(net: FusedSequential, launches: list[str]) -> None:
    net.eval()
    traced = torch.fx.symbolic_trace(net)
    x = images()
    expected = net(x)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function" and node.target is not operator.getitem]
    assert called[:4] == [kernels.conv2d_relu_max_pool2d, kernels.linked_conv2d, kernels.conv2d, kernels.max_pool2d]
    launches.clear()
    for module in (traced, pickle.loads(pickle.dumps(traced))):
        assert torch.equal(module(x), expected)
    assert launches == KERNELS_OF_A_FORWARD_PASS * 2


def test_torchvision_extracts_features(net: FusedSequential) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    whole = nn.Sequential(net, nn.Softmax(dim=1)).eval()
    extractor = create_feature_extractor(whole, ["0.conv2d_relu_max_pool2d", "1"])
    x = images()
    features = extractor(x)
    assert torch.equal(features["0.conv2d_relu_max_pool2d"], net[:3](x))
    assert torch.equal(features["1"], whole(x))


def test_tensor_subclasses_and_modes_see_the_operations() -> None:
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        """Records every function called."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 2, 6, 6, device=DEVICE)
    with Mode():
        kernels.conv2d(x, torch.randn(2, 2, 1, 1, device=DEVICE), activation="relu")
        kernels.max_pool2d(x, kernel_size=2)
        kernels.dropout(x)
    assert [f for f in seen if f in vars(kernels).values()] == [kernels.conv2d, kernels.max_pool2d, kernels.dropout]


def test_functional_call(net: FusedSequential) -> None:
    net.eval()
    doubled = {name: p * 2 for name, p in net.named_parameters()}
    other = copy.deepcopy(net)
    other.load_state_dict(doubled)
    x = images()
    assert torch.equal(torch.func.functional_call(net, doubled, (x,)), other(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_func_grad_and_the_gradient_of_each_sample(net: FusedSequential) -> None:
    net.eval()
    x = images(3)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    assert_equal(list(torch.func.grad(loss)(parameters, x).values()), gradients(net, x))
    each = torch.func.vmap(torch.func.grad(lambda p, one: loss(p, one[None])), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        assert_equal([g[i] for g in each.values()], gradients(net, x[i : i + 1]))
    over_vmap = torch.func.grad(lambda p: torch.func.vmap(lambda one: loss(p, one[None]))(x).sum())(parameters)
    for ours, whole in zip(over_vmap.values(), gradients(net, x), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(device: str, launches: list[str]) -> None:
    """Fake tensors have a step's shapes, strides and gradients, also on an absent GPU; no kernel is launched."""
    if device != DEVICE and device == "cpu":
        pytest.skip("fake CPU tensors run the reference where kernels run on CUDA")
    with FakeTensorMode(), torch.device(device):
        net = FusedSequential(*small_layers())
        y = net(torch.randn(4, 3, 18, 18))
        if device == DEVICE:  # PyTorch's autograd engine needs the real device
            y.sum().backward()
        assert net[:1](torch.randn(4, 3, 18, 18)).is_contiguous()
    assert (y.shape, y.device.type) == ((4, 5), device)
    assert all(p.grad is None if device != DEVICE else p.grad.shape == p.shape for p in net.parameters())
    assert launches == []


def test_torchscript(net: FusedSequential) -> None:
    """torch.jit.trace records PyTorch's own layers; torch.jit.script is refused with a one-line error."""
    net.eval()
    x = images()
    traced = torch.jit.trace(net, x)
    torch.testing.assert_close(traced(x), net(x))
    with pytest.raises(RuntimeError, match=r"alexnet_triton\.unfuse"):
        torch.jit.script(net)
    torch.jit.script(unfuse(net))


@pytest.mark.filterwarnings("ignore")
def test_a_graph_for_tensorboard(net: FusedSequential, tmp_path: Path) -> None:
    """``add_graph`` traces the network and shows PyTorch's own layers."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        writer.add_graph(net.eval(), images())
    (events,) = tmp_path.iterdir()
    assert b"aten::_convolution" in events.read_bytes()


def test_flops_are_counted_as_pytorchs() -> None:
    """Only a grouped convolution differs: PyTorch counts its weight gradient as if it were not grouped."""
    x, w = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((2, 6, 9, 9), (4, 3, 3, 3)))
    rows, matrix = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((5, 7), (3, 7)))

    def total(operation: Callable[..., Tensor], *tensors: Tensor, **arguments: int) -> int:
        with FlopCounterMode(display=False) as counter:
            operation(*tensors, **arguments).sum().backward()
        return int(counter.get_total_flops())

    whole = torch.randn(4, 6, 3, 3, device=DEVICE, requires_grad=True)
    convolution = total(F.conv2d, x, whole)
    assert total(kernels.conv2d, x, whole) == convolution > 0
    assert total(kernels.conv2d_relu_max_pool2d, x, whole, pool_kernel_size=2) == convolution
    assert total(kernels.linear, rows, matrix) == total(F.linear, rows, matrix) > 0
    assert total(kernels.conv2d, x, w, groups=2) == 3 * 2 * (2 * 4 * 7 * 7) * 3 * 9


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_pass_drops_the_same_elements(net: FusedSequential, reentrant: bool) -> None:
    x = images().requires_grad_()
    expected = gradients(net, x)
    torch.manual_seed(3)
    checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
    assert_equal([p.grad for p in net.parameters()], expected)


def test_checkpoint_sequential(net: FusedSequential) -> None:
    net.eval()
    x = images()
    for ours, whole in zip(
        gradients(net, x, lambda x: checkpoint_sequential(net, 3, x, use_reentrant=False)), gradients(net, x), strict=True
    ):
        torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_that_of_the_layers(dtype: torch.dtype) -> None:
    """Same dtypes of outputs and gradients in a region, a nested one and a disabled one; a float64 tensor is not cast."""
    layers = small_layers(dropout=0.0)
    plain, fused = nn.Sequential(*layers).to(DEVICE), FusedSequential(*layers).to(DEVICE)
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    x = images()
    found = []
    for net in (plain, fused):
        with torch.autocast(DEVICE, dtype):
            y = net(x)
            # cache_enabled=False: PyTorch's layers would take cached weights in the outer region's dtype and fail.
            with torch.autocast(DEVICE, other, cache_enabled=False):
                nested = net[:2](x)
            with torch.autocast(DEVICE, enabled=False):
                off = net(x)
            # A pooling layer does not cast: its output has the dtype of its input.
            pooled = (kernels.max_pool2d if net is fused else F.max_pool2d)(x, 2)
        grads = torch.autograd.grad(y.float().square().sum(), list(net.parameters()))
        found.append(([t.dtype for t in (y, nested, off, pooled, *grads)], y, off))
    (theirs, y, off), (ours, fused_y, fused_off) = found
    assert ours == theirs
    assert ours[:4] == [dtype, other, torch.float32, torch.float32]
    torch.testing.assert_close(fused_y, y, rtol=0.05, atol=0.05)
    torch.testing.assert_close(fused_off, off)
    if DEVICE == "cpu":
        with torch.autocast(DEVICE, dtype):
            doubles = [t.double() for t in (x, layers[0].weight, layers[0].bias)]
            assert kernels.conv2d(*doubles).dtype == F.conv2d(*doubles).dtype == torch.float64


def test_grad_scaler_skips_an_overflow(net: FusedSequential) -> None:
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = net(images()).float().mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    before = [p.detach().clone() for p in net.parameters()]
    step(1e30)
    assert_equal(list(net.parameters()), before)
    assert scaler.get_scale() == 2.0**9
    step(1.0)
    assert not torch.equal(net[-1].weight, before[-2])
    assert scaler.get_scale() == 2.0**10


def test_gradients_accumulate(net: FusedSequential) -> None:
    net.eval()
    x = images()
    net(x[:2]).square().sum().backward()
    net(x[2:]).square().sum().backward()
    parts = [a + b for a, b in zip(gradients(net, x[:2]), gradients(net, x[2:]), strict=True)]
    assert_equal([p.grad for p in net.parameters()], parts)


def test_frozen_layers_launch_nothing_for_themselves(net: FusedSequential, launches: list[str]) -> None:
    """With frozen features, as in fine-tuning, the backward pass stops at the first layer that is trained."""
    net[:8].requires_grad_(False)
    y = net(images())
    launches.clear()
    y.sum().backward()
    assert not [name for name in launches if "conv2d" in name or "pool" in name]
    assert launches == ["_linear_narrow_backward_kernel"] * 3  # each computes all gradients of a layer
    assert all(p.grad is None for p in net[:8].parameters())
    assert all(p.grad is not None for p in net[8:].parameters())


def test_only_the_bias_learns(net: FusedSequential, launches: list[str]) -> None:
    net.requires_grad_(False)
    net[0].bias.requires_grad_()
    y = net(images())
    launches.clear()
    y.sum().backward()
    assert "_conv2d_wgrad_kernel" not in launches
    assert launches.count("_conv2d_dgrad_kernel") == 2  # the input gradients of the two later convolutions
    assert launches.count("_linear_narrow_backward_kernel") == 3  # input gradients only


def test_nothing_is_saved_without_gradients(net: FusedSequential) -> None:
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = net.eval()(images())
        assert y.grad_fn is None
        assert not y.requires_grad


def test_retained_graphs_anomaly_mode_and_saved_tensor_hooks(net: FusedSequential) -> None:
    net.eval()
    x = images()
    expected = gradients(net, x)
    loss = net(x).square().sum()
    for _ in range(2):
        assert_equal(list(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)), expected)
    with torch.autograd.set_detect_anomaly(True), torch.autograd.graph.save_on_cpu():
        assert_equal(gradients(net, x), expected)


def test_a_saved_input_changed_in_place_is_noticed() -> None:
    x, w = torch.randn(2, 3, 6, 6, device=DEVICE), torch.randn(4, 3, 3, 3, device=DEVICE, requires_grad=True)
    y = kernels.conv2d(x, w)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_whole_networks_are_saved_averaged_and_cast(net: FusedSequential) -> None:
    net.eval()
    x = images()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), net(x))
    average = torch.optim.swa_utils.AveragedModel(net)
    average.update_parameters(net)
    assert torch.equal(average(x), net(x))
    half = copy.deepcopy(net).to(torch.bfloat16, memory_format=torch.channels_last)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="weight must have the dtype of input"):
        half(x)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_an_optimizer_made_before_or_after_fuse(before: bool) -> None:
    """The d2l recipe runs unchanged: Xavier weights by ``apply`` and ``type(m) ==``, plain SGD, the loop that prints shapes."""
    plain = nn.Sequential(*small_layers(dropout=0.0)).to(DEVICE)

    def init_weights(m: nn.Module) -> None:
        if type(m) == nn.Linear or type(m) == nn.Conv2d:  # noqa: E721 (as d2l writes it)
            nn.init.xavier_uniform_(m.weight)

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1) if before else None
    net = fuse(plain)
    assert net is plain
    net.apply(init_weights)
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.1)
    twin = unfuse(copy.deepcopy(plain))
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    X = torch.randn(1, 3, 18, 18, device=DEVICE)
    for layer in net:
        X = layer(X)
    assert X.shape == (1, 5)
    x, labels = images(), torch.tensor([0, 1, 2, 3], device=DEVICE)
    for model, sgd in ((net, optimizer), (twin, twin_optimizer)):
        for _ in range(2):
            sgd.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            sgd.step()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
