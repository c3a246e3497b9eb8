"""Scenarios about a call's surroundings: switches, modes, transforms, hooks, threads, processes (``plan_worker.py``)."""

from __future__ import annotations

import os
import tempfile
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import kernels
from alexnet_triton.optim import SGD
from kernels.configs import tables
from kernels.runtime import launch, plans

from .plan_harness import (
    Check,
    idle_utils,
    images,
    is_direct,
    scenario,
    small_net,
    step_of,
)


@scenario
def switches(check: Check) -> None:
    net = small_net()
    check(*step_of(net, images()))
    with tables.override(num_stages=2):
        check(*step_of(net, images()))
        with tables.override(num_warps=4):
            check(*step_of(net, images()))
    with tables.untuned():
        check(*step_of(net, images()))
    check(*step_of(net, images()))
    launch.force_int64 = True
    try:
        check(*step_of(net, images()))
    finally:
        launch.force_int64 = False
    check(*step_of(net, images()))
    x = images()
    before = len(check.launcher.of(lambda: net(x))[0])
    with kernels.use_backend("torch"):
        assert check.launcher.of(lambda: net(x))[0] == []
    assert len(check.launcher.of(lambda: net(x))[0]) == before
    net.float()
    before_matmul = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("tf32", "ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
            torch.backends.cuda.matmul.fp32_precision = precision
            check(*step_of(net, images(dtype=torch.float32)))
    finally:  # TF32 is PyTorch's default for convolutions alone
        torch.backends.cuda.matmul.fp32_precision = before_matmul


@scenario
def autocast(check: Check) -> None:
    """PyTorch casts anew in each call, so only the launched kernels are compared."""
    net, x = small_net(torch.float32), images(dtype=torch.float32)
    step, _ = step_of(net, x)
    for dtype in (None, torch.bfloat16, torch.float16, None):

        def call(dtype: torch.dtype | None = dtype) -> list[Tensor]:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                return step()

        for _ in range(2):
            call()
        ours, _ = check.launcher.of(call)
        with launch.observe_launches(lambda *_: None):
            theirs, _ = check.launcher.of(call)
        assert [launched[:5] for launched in ours] == [launched[:5] for launched in theirs]


@scenario
def checkpointing(check: Check) -> None:
    net, x = small_net(), images().requires_grad_()

    def step() -> list[Tensor]:
        y = checkpoint(net, x, use_reentrant=False)
        leaves = [*net.parameters(), x]
        return [y, *torch.autograd.grad(y, leaves, torch.zeros_like(y))]

    check(step, {"x": x, **dict(net.named_parameters())})


@scenario
def transforms_and_modes(check: Check) -> None:
    """Under a transform, a mode, a compiler or an exporter no plan is made or used; afterwards plans work as before."""
    net, x = small_net(), images()
    step, tensors = step_of(net, x)
    check(step, tensors)
    y = net(x)
    (grad,) = torch.autograd.grad(y, net[3].weight, torch.zeros_like(y), create_graph=True)
    assert torch.autograd.grad(grad.sum(), net[0].weight)[0].shape == net[0].weight.shape
    check(step, tensors)
    made = plans.made
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = net(mode.from_tensor(x))
        assert isinstance(fake, FakeTensor)
        assert fake.shape == (64, 16)
    check(step, tensors)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.zeros_like(x)))).tangent is not None
    check(step, tensors)
    assert plans.made == made
    exported = torch.export.export(net.eval(), (x,))
    assert any("alexnet_triton" in str(node.target) for node in exported.graph.nodes)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    launched, _ = check.launcher.of(lambda: compiled(x))
    launched, _ = check.launcher.of(lambda: compiled(x))
    assert len(launched) == len(check.launcher.of(lambda: net(x))[0])
    net.train()
    check(step, tensors)
    torch.compiler.reset()


@scenario
def distributed_data_parallel(check: Check) -> None:
    """Gradients are views of DistributedDataParallel's buckets; with a single process."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            net, x = small_net(torch.float32), images(dtype=torch.float32)
            wrapped = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
            optimizer = SGD(wrapped.parameters(), lr=0.1, momentum=0.9)

            def step() -> list[Tensor]:
                optimizer.zero_grad()
                y = wrapped(x)
                y.backward(torch.zeros_like(y))
                optimizer.step()
                return [y]

            for _ in range(3):  # the buckets are rebuilt after the first step
                step()
            tensors = {"x": x, **dict(net.named_parameters())}
            buckets = {p.grad.untyped_storage().data_ptr(): p.grad for p in net.parameters() if p.grad is not None}
            tensors |= {f"bucket {i}": bucket for i, bucket in enumerate(buckets.values())}
            tensors |= {f"momentum {i}": state["momentum_buffer"] for i, state in enumerate(optimizer.state.values())}
            check(step, tensors)
        finally:
            torch.distributed.destroy_process_group()


@scenario
def what_watches_sees_each_launch(check: Check) -> None:
    """With Triton's hooks, pre-run hooks or a profiler active, launches go through ``kernel[grid](...)``."""
    from triton import knobs

    from kernels.matmul_descriptor import _matmul_descriptor_kernel

    net, x = small_net(), images()
    step, tensors = step_of(net, x)
    check(step, tensors)
    seen: list[object] = []

    def hook(metadata: object) -> None:
        seen.append(metadata)

    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        launched, _ = check.launcher.of(step)
        assert launched
        assert not any(map(is_direct, launched))
        chain.remove(hook)
        check(step, tensors)
    _matmul_descriptor_kernel.pre_run_hooks.append(lambda *args, **kwargs: seen.append(kwargs))
    seen.clear()
    check.launcher.of(step)
    assert seen
    _matmul_descriptor_kernel.pre_run_hooks.clear()
    check(step, tensors)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        net(x)
    assert any("alexnet_triton" in event.key for event in profile.key_averages())
    check(step, tensors)


@scenario
def an_error_in_a_launch(check: Check) -> None:
    net, x = small_net(), images()
    step, tensors = step_of(net, x)
    check(step, tensors)
    utils = idle_utils[0]
    before = utils.on_launch
    for at in (0, 3, 9):
        count = iter(range(1000))

        def fail(*arguments: Any, at: int = at, count: Iterator[int] = count) -> None:
            if next(count) == at:
                raise RuntimeError("Triton Error [CUDA]: invalid argument")

        utils.on_launch = fail
        with pytest.raises(RuntimeError, match="invalid argument"):
            step()
        utils.on_launch = before
        check(step, tensors)


@scenario
def threads_at_once(check: Check) -> None:
    net = small_net()
    failed: list[str] = []

    def work(n: int) -> None:
        try:
            step, _ = step_of(net, images(n))
            for _ in range(20):
                step()
        except Exception:
            failed.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(n,)) for n in (64, 33, 1, 2, 64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    for n in (64, 33, 1, 2):
        check(*step_of(net, images(n)))


@scenario
def each_kernel_may_begin_while_the_one_before_ends(check: Check) -> None:
    """Programmatic dependent launch, by launch functions and by plan."""
    net, seen = small_net(), []
    step, _ = step_of(net, images())
    idle_utils[0].on_launch = lambda *arguments: seen.append(arguments[6])
    try:
        for _ in range(3):
            step()
    finally:
        idle_utils[0].on_launch = None
    assert len(seen) % 3 == 0
    assert seen
    assert all(seen), seen


@scenario
def after_a_fork(check: Check) -> None:
    net = small_net()
    check(*step_of(net, images()))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            check(*step_of(net, images()))
            check(*step_of(net, images(7)))
            os.write(write, b"right")
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-2000:])
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    said = os.read(read, 4000).decode()
    assert said == "right", said
