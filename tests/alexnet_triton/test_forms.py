"""fuse on every style of network in ``forms.py``, in every common use: results equal the unfused network's."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from alexnet_triton import fuse, unfuse

from ..conftest import BACKEND, DEVICE
from .forms import FORMS, tensors_of

Use = Callable[[nn.Module, nn.Module, Tensor], None]


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 12, 12, device=DEVICE)


def assert_same(ours: Any, theirs: Any) -> None:
    """Assert that all tensors of two outputs agree in values and strides."""
    for got, wanted in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"], check_stride=True)


#: Tolerances for float32: of elements (rtol, atol), and of a gradient's error in norm.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5, "gradient": 1e-3}


@pytest.fixture(autouse=True)
def _tolerance_of_half_precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``Regions`` computes a part in bfloat16, where ours and PyTorch's results differ by their rounding.

    On a GPU the sums differ in order before they are rounded. On a CPU without instructions for bfloat16 PyTorch rounds the
    sums of a convolution's gradients more than once, and ours are rounded once.
    """
    differ = DEVICE == "cuda" or not torch.cpu._is_avx512_bf16_supported()
    if differ and request.node.callspec.params["form"] == "Regions":
        for name, value in {"rtol": 2.0**-7, "atol": 2.0**-8, "gradient": 2.0**-6}.items():
            monkeypatch.setitem(TOLERANCE, name, value)


def loss(output: Any) -> Tensor:
    return torch.stack([tensor.float().square().mean() for tensor in tensors_of(output)]).sum()


def gradients(net: nn.Module, output: Any) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss(output), list(net.parameters()), allow_unused=True))


def assert_trains_alike(fused: nn.Module, net: nn.Module, ours: Any, theirs: Any) -> None:
    assert_same(ours, theirs)
    for got, wanted in zip(gradients(fused, ours), gradients(net, theirs), strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            assert (got - wanted).norm() <= TOLERANCE["gradient"] * wanted.norm() + 1e-6


def train_and_evaluate(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Training and evaluation in turn, as in a training loop, with batches of several sizes."""
    for batch in (x, images(3), x[:1]):
        assert_trains_alike(fused.train(), net.train(), fused(batch), net(batch))
        with torch.no_grad():
            assert_same(fused.eval()(batch), net.eval()(batch))
    with torch.inference_mode():
        assert_same(fused(x), net(x))


def channels_last(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Channels-last images, then channels-last weights as well: outputs have the unfused network's strides."""
    if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
        net.eval(), fused.eval()
    for each in (net, fused):
        each.train(False)
    assert_same(
        _safely(fused, x.contiguous(memory_format=torch.channels_last)),
        _safely(net, x.contiguous(memory_format=torch.channels_last)),
    )
    net.to(memory_format=torch.channels_last)
    fused.to(memory_format=torch.channels_last)
    assert_same(_safely(fused, x), _safely(net, x))


def _safely(net: nn.Module, x: Tensor) -> Any:
    """The output, or 1.0 if the call fails because a view of a channels-last tensor is impossible."""
    try:
        return net(x)
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        return [x.new_tensor(1.0)]


def copies_and_pickles(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Copies made before and after the first call are fused and have their own parameters."""
    before = copy.deepcopy(fused)
    expected = net.eval()(x)
    fused.eval()(x)
    for copied in (before.eval(), copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(copied) is type(fused)
        assert_same(copied(x), expected)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert all(not tensor.any() for tensor in tensors_of(copied(x))) or isinstance(net, FORMS["Subclassed"])
    assert_same(fused(x), expected)


def saved_whole(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    file = io.BytesIO()
    torch.save(fused.eval(), file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False)(x), net.eval()(x))


def state_dict(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """A state_dict is loaded after the first call."""
    fused.eval()(x)
    other = type(net)().to(DEVICE).eval()
    assert list(fused.state_dict()) == list(other.state_dict())
    fused.load_state_dict(other.state_dict())
    assert_same(fused(x), other(x))


def convolutions(net: nn.Module) -> list[nn.Module]:
    return [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]


def hooks(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Hooks on layers are registered after the first call and removed again."""
    seen: dict[nn.Module, list[Tensor]] = {net: [], fused: []}
    for each in (net, fused):
        each.eval()(x)
        handles = [
            layer.register_forward_hook(lambda _, args, output, each=each: seen[each].append(output))
            for layer in convolutions(each)
        ]
        each(x)
        for handle in handles:
            handle.remove()
        each(x)
    assert_same(seen[fused], seen[net])


def changing_hooks(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """A hook that changes an output, and one that changes a gradient."""
    for each in (net, fused):
        each(x)
        for layer in convolutions(each):
            layer.register_forward_hook(lambda *_: _[2] * 2)
            layer.register_full_backward_hook(lambda _, grads, __: tuple(g if g is None else 3 * g for g in grads))
    try:
        expected = net(x)
    except RuntimeError as error:  # an in-place operation on a hooked layer's output
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])):
            fused(x)
    else:
        assert_trains_alike(fused, net, fused(x), expected)


def replaced_layers(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """After the first call, convolutions are replaced, and so is the ``forward`` of linear layers."""
    torch.manual_seed(1)
    new = nn.Conv2d(3, 8, 3, bias=False).to(DEVICE)
    for each in (net, fused):
        each.eval()(x)
        for parent in list(each.modules()):
            for name, child in list(parent._modules.items()):
                if (
                    isinstance(child, nn.Conv2d)
                    and child.in_channels == 3
                    and type(child) is nn.Conv2d
                    and child.stride == (1, 1)
                ):
                    setattr(parent, name, copy.deepcopy(new)) if not isinstance(parent, nn.Sequential) else parent.__setitem__(
                        int(name), copy.deepcopy(new)
                    )
                elif isinstance(child, nn.Linear):
                    child.forward = lambda x, child=child: 2 * nn.functional.linear(x, child.weight)
    assert_same(fused(x), net(x))


def classes_patched(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """After the first call, methods of the classes Conv2d and ReLU are patched, and restored later."""
    fused.eval()(x)
    net.eval()(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.Conv2d,
            "_conv_forward",
            lambda self, x, weight, bias: 0.5 * nn.functional.conv2d(x, weight, None, self.stride, self.padding),
        )
        patch.setattr(nn.ReLU, "forward", lambda self, x: torch.tanh(x))
        ours, theirs = fused(x), net(x)
    assert_same(ours, theirs)
    assert_same(fused(x), net(x))


def weights_in_place(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """An optimizer created before the first call steps the weights; then the weights are frozen."""
    for each in (net, fused):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss(each(x)).backward()
            optimizer.step()
    assert_same(fused.eval()(x), net.eval()(x))
    for each in (net, fused):
        each.requires_grad_(False)
    assert not any(tensor.requires_grad for tensor in tensors_of(fused(x)))


def input_gradient(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    grads = []
    for each in (net, fused):
        leaf = x.clone().requires_grad_()
        loss(each(leaf)).backward()
        grads.append(leaf.grad)
    if not isinstance(net, FORMS["Regions"]):
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-6, check_stride=True)


def checkpointed(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    x.requires_grad_()
    assert_trains_alike(fused, net, checkpoint(fused, x, use_reentrant=False), checkpoint(net, x, use_reentrant=False))


def functional_call(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    halves = {name: parameter / 2 for name, parameter in net.named_parameters()}
    assert_same(torch.func.functional_call(fused.eval(), halves, (x,)), torch.func.functional_call(net.eval(), halves, (x,)))


def float64(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    if not isinstance(net, FORMS["Regions"]):
        assert_same(fused.double().eval()(x.double()), net.double().eval()(x.double()))


def autocast(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours, theirs = fused.eval()(x), net.eval()(x)
    for got, wanted in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05, check_stride=True)


def traced(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Traces by TorchScript, torch.fx and torch.export, for the forms that they can trace."""
    if isinstance(net, FORMS["Looking"] | FORMS["SideEffects"] | FORMS["Regions"]):
        return
    expected = net.eval()(x)
    fused.eval()
    assert_same(torch.jit.trace(fused, x, strict=False)(x), expected)
    assert_same(torch.export.export(fused, (x,)).module()(x), expected)
    if not isinstance(net, FORMS["TensorMethods"] | FORMS["ReadTwice"] | FORMS["Branches"] | FORMS["Subclassed"]):
        assert_same(torch.fx.symbolic_trace(fused)(x), expected)


def compiled_before(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """A network that was compiled before works after ``fuse`` and after ``unfuse``."""
    unfuse(fused).eval()
    compiled = torch.compile(fused, backend="aot_eager")
    expected = net.eval()(x)
    assert_same(compiled(x), expected)
    fuse(fused)
    assert_same(compiled(x), expected)
    unfuse(fused)
    assert_same(compiled(x), expected)


def errors(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """A fused network raises the unfused one's error types on wrong inputs, before and after valid calls."""
    wrong = (x[:, :2], x.expand(2, 2, 3, 12, 12), x[:, :, :2], x.long(), None)
    for _ in range(2):
        for bad in wrong:
            with pytest.raises(Exception) as theirs:  # noqa: PT011 (any exception)
                net(bad)
            with pytest.raises(theirs.type):
                fused(bad)
        assert_same(fused.eval()(x), net.eval()(x))


def side_effects(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    for each in (net, fused):
        for batch in (x, images(3), images(5), x, x):
            each.eval()(batch)
    for name, value in vars(net).items():
        if isinstance(value, (int, list)) and not any(isinstance(part, nn.Module) for part in [value]):
            assert getattr(fused, name) == value or name == "walked"
    for (name, wanted), got in zip(net.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(got, wanted, msg=name)
    if hasattr(net, "kept"):
        assert (net.calls, len(net.shapes)) == (5, 5)
        assert_same(fused.kept, net.kept)


def watched(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Under a FLOP counter, which is a dispatch mode, and under a profiler."""
    expected = net.eval()(x)
    counts = []
    for each in (net, fused.eval()):
        with FlopCounterMode(display=False) as counter:
            assert_same(each(x), expected)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0 or isinstance(net, FORMS["Looking"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert_same(fused(x), expected)


def per_sample(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Per-sample gradients by torch.func."""
    if isinstance(net, FORMS["Looking"] | FORMS["SideEffects"] | FORMS["Residual"] | FORMS["Branches"] | FORMS["InPlace"]):
        return
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    found = []
    for each in (fused.eval(), net.eval()):

        def objective(parameters: dict[str, Tensor], x: Tensor, each: nn.Module = each) -> Tensor:
            return loss(torch.func.functional_call(each, parameters, (x[None],)))

        found.append(list(torch.func.vmap(torch.func.grad(objective), in_dims=(None, 0))(parameters, x).values()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


USES: dict[str, Use] = {
    use.__name__: use
    for use in (
        *(train_and_evaluate, channels_last, copies_and_pickles, saved_whole, state_dict, hooks, changing_hooks),
        *(replaced_layers, classes_patched, weights_in_place, input_gradient, checkpointed, functional_call, float64),
        *(autocast, traced, compiled_before, errors, side_effects, watched, per_sample),
    )
}


@pytest.mark.thin
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("form", FORMS)
def test_form(form: str, use: str) -> None:
    torch._dynamo.reset()
    net = FORMS[form]().to(DEVICE)
    fused = fuse(copy.deepcopy(net))
    USES[use](net, fused, images())


#: The least number of convolution, pool and linear launches of each form.
LAUNCHES = {name: {"conv2d": 2, "pool": 1, "linear": 1} for name in FORMS} | {
    "Lists": {"conv2d": 4, "pool": 1, "linear": 2},
    "OwnParameters": {"conv2d": 1, "pool": 1, "linear": 1},
    "Residual": {"conv2d": 5, "pool": 0, "linear": 1},
    "Subclassed": {"conv2d": 1, "pool": 1, "linear": 1},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["fuse", "backend"])
def test_its_layers_run_on_kernels(form: str, backend: str, launches: list[str]) -> None:
    """Both ``fuse`` and torch.compile with this project's backend run the layers on kernels."""
    torch._dynamo.reset()
    net = FORMS[form]().to(DEVICE).eval()
    x = images()
    expected = net(x)
    run = fuse(copy.deepcopy(net)) if backend == "fuse" else torch.compile(copy.deepcopy(net), backend=BACKEND)
    for _ in range(2):
        launches.clear()
        assert_same(run(x), expected)
        for kind, least in LAUNCHES[form].items():
            assert sum(kind in name for name in launches) >= least, (kind, launches)
