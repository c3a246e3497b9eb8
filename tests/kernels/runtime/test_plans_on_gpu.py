"""Calls by plan equal calls by launch functions on a GPU, bit for bit, with poisoned outputs and changing tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from alexnet_triton import AlexNet, fuse
from alexnet_triton.optim import SGD
from kernels.configs import tables
from kernels.runtime import launch, plans

from ...conftest import UNDER_TTSEM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or UNDER_TTSEM, reason="plans are made on a GPU")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _no_plans_yet() -> Iterator[None]:
    plans.forget()
    yield
    plans.forget()


def randn(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    return (torch.randn(shape, device="cuda") * 0.3).to(dtype).requires_grad_(grad)


def nhwc(*shape: int, dtype: torch.dtype) -> Tensor:
    n, c, h, w = shape
    return randn(n, h, w, c, dtype=dtype, grad=False).permute(0, 3, 1, 2).requires_grad_()


def all_of(run: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all tensors that require one."""
    output = run(*tensors)
    leaves = [t for t in tensors if t.requires_grad]
    torch.manual_seed(3)
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.randn_like(output))]


def by_launch_functions(run: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    with launch.observe_launches(lambda *_: None):
        return all_of(run, tensors)


def check(run: Callable[..., Tensor], make: Callable[[], list[Tensor]], times: int = 4) -> None:
    """Call ``run`` on new tensors several times: by plan from the second call on, bit-identical to its launch functions."""
    for i in range(times):
        tensors = make()
        before = plans.made
        found = all_of(run, tensors)
        assert i < 2 or plans.made == before, "a repeated kind of call made a plan"
        for mine, other in zip(found, by_launch_functions(run, tensors), strict=True):
            assert mine.stride() == other.stride()
            assert torch.equal(mine, other) or torch.equal(mine.nan_to_num(7), other.nan_to_num(7))
    assert plans.made > 0
    assert not plans.unrepeatable


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operations(dtype: torch.dtype) -> None:
    def conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return kernels.conv2d(x, w, b, padding=1, activation="relu")

    def block(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return kernels.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_kernel_size=3, pool_stride=2)

    def first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return kernels.conv2d_relu_max_pool2d(x, w, b, 4, 1, pool_kernel_size=3, pool_stride=2)

    def strided(x: Tensor, w: Tensor) -> Tensor:
        return kernels.conv2d(x, w, None, 2, 1, 2, 2)

    def filters() -> list[Tensor]:
        return [nhwc(64, 64, 14, 13, dtype=dtype), nhwc(96, 64, 3, 3, dtype=dtype), randn(96, dtype=dtype)]

    def default_format() -> list[Tensor]:
        return [randn(40, 64, 9, 9, dtype=dtype), randn(96, 64, 3, 3, dtype=dtype), randn(96, dtype=dtype)]

    for make in (filters, default_format):
        check(conv, make)
        check(block, make)
    check(first, lambda: [randn(33, 1, 63, 63, dtype=dtype), randn(96, 1, 11, 11, dtype=dtype), randn(96, dtype=dtype)])
    check(strided, lambda: [randn(3, 6, 19, 17, dtype=dtype), randn(8, 3, 3, 3, dtype=dtype)])
    check(lambda x: kernels.max_pool2d(x, 3, 2, 1), lambda: [randn(3, 17, 19, 17, dtype=dtype)])
    check(lambda x: kernels.max_pool2d(x, 5, 2, 1), lambda: [nhwc(3, 17, 19, 17, dtype=dtype)])
    check(kernels.linear, lambda: [randn(37, 200, dtype=dtype), randn(72, 200, dtype=dtype), randn(72, dtype=dtype)])
    check(
        lambda x, w, b: kernels.linear_relu_dropout(x, w, b, 0.4, seed=5),
        lambda: [randn(128, 640, dtype=dtype), randn(512, 640, dtype=dtype), randn(512, dtype=dtype)],
    )
    check(lambda x: kernels.dropout(x, 0.4, seed=5), lambda: [randn(33, 77, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "default"])
def test_alexnets_steps(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Logits, gradients and parameters are bit-identical by plan and by launch functions."""

    def trained(watched: bool) -> list[Tensor]:
        torch.manual_seed(1)
        net = AlexNet().to("cuda", dtype=dtype, memory_format=memory_format)  # type: ignore[call-overload]
        optimizer = SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        seen = []
        for step, batch in enumerate((64, 64, 33, 64, 33, 64)):
            x = torch.rand(batch, 1, 224, 224, device="cuda").to(dtype)
            labels = torch.randint(10, (batch,), device="cuda")
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            optimizer.zero_grad()
            if watched:
                with launch.observe_launches(lambda *_: None):
                    logits = net(x)
                    F.cross_entropy(logits.float(), labels).backward()
                    optimizer.step()
            else:
                logits = net(x)
                F.cross_entropy(logits.float(), labels).backward()
                optimizer.step()
            seen += [logits.detach(), *[p.grad.clone() for p in net.parameters()]]
        net.eval()
        with torch.no_grad():
            seen.append(net(x))
        return [*seen, *[p.detach().clone() for p in net.parameters()]]

    for ours, theirs in zip(trained(watched=False), trained(watched=True), strict=True):
        assert torch.equal(ours, theirs)
    assert not plans.unrepeatable


def test_what_changes_between_two_calls() -> None:
    """Changed, replaced and moved parameters, backends, switches, hooks, autocast: each call is right."""
    layers = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    net = fuse(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 24), nn.ReLU(), nn.Dropout(0.5))).to("cuda")
    x = torch.randn(40, 16, 8, 8, device="cuda")

    def same() -> None:
        """Call by plan twice, then by launch functions: the results are bit-identical."""
        found = []
        for watched in (False, False, True):
            torch.manual_seed(0)
            run = net.forward if not watched else _watched(net.forward)
            y = run(x.to(next(net.parameters()).dtype))
            grads = torch.autograd.grad(y.float().square().sum(), list(net.parameters())) if y.requires_grad else ()
            found.append([y, *grads])
        for results in found[:2]:
            for mine, other in zip(results, found[2], strict=True):
                assert torch.equal(mine, other)

    def _watched(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Tensor) -> Tensor:
            with launch.observe_launches(lambda *_: None):
                return function(*arguments)

        return run

    same()
    with torch.no_grad():
        net[0].weight.mul_(1.5)
    same()
    net[0].weight.data = net[0].weight.data.clone().contiguous(memory_format=torch.channels_last)
    same()
    net[0].weight = nn.Parameter(torch.randn(32, 16, 3, 3, device="cuda"))
    same()
    net[0].bias = None
    same()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        net.to(dtype)
        same()
    net.to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    same()
    for training in (False, True):
        net.train(training)
        same()
    net[8].p = 0.1
    same()
    net[0].weight.requires_grad_(False)
    y = net(x.bfloat16())
    assert torch.autograd.grad(y.float().sum(), net[6].weight)[0].isfinite().all()
    net[0].weight.requires_grad_(True)
    with tables.override(num_stages=2):
        same()
    with tables.untuned():
        same()
    with torch.autocast("cuda", torch.float16):
        net.float()
        same()
    handle = net[1].register_forward_hook(lambda module, inputs, output: output * 2)
    same()
    handle.remove()
    same()
    for precision in ("tf32", "ieee"):
        torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
        same()
    net.eval()
    with kernels.use_backend("torch"):
        expected = net(x)
    torch.testing.assert_close(net(x), expected, rtol=1e-3, atol=1e-3)
    net.train()
    net[2] = nn.MaxPool2d(3, 2, 1)
    same()


def test_batches_in_turn_and_no_growth() -> None:
    """50 batch sizes in turn: results are right, and neither the number of plans nor memory grows."""
    net = fuse(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 8))).to("cuda", torch.bfloat16)
    inputs = [torch.randn(n, 64, device="cuda", dtype=torch.bfloat16) for n in range(1, 51)]

    def step(x: Tensor) -> None:
        net(x).float().sum().backward()
        net.zero_grad()

    for x in inputs * 2:
        step(x)
    torch.cuda.synchronize()
    made, memory = plans.made, torch.cuda.memory_allocated()
    for i in range(2000):
        step(inputs[i * 7 % 50])
    torch.cuda.synchronize()
    assert plans.made == made
    assert torch.cuda.memory_allocated() == memory


def test_misaligned_tensors() -> None:
    w, b = randn(72, 200, dtype=torch.bfloat16), randn(72, dtype=torch.bfloat16)
    base = torch.randn(37 * 200 + 8, device="cuda", dtype=torch.bfloat16)
    for offset in (0, 1, 8, 3, 0, 1):
        x = base[offset : offset + 37 * 200].view(37, 200).requires_grad_()
        ours, theirs = all_of(kernels.linear, [x, w, b]), by_launch_functions(kernels.linear, [x, w, b])
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_in_a_cuda_graph() -> None:
    """A captured call by plan reads its tensors' current values at each replay."""
    net = AlexNet().to("cuda", torch.bfloat16, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    x = torch.rand(8, 1, 224, 224, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            net(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = net(x)
    for _ in range(3):
        x.copy_(torch.rand_like(x))
        graph.replay()
        with torch.no_grad():
            assert torch.equal(y, net(x))
