"""``alexnet-triton check``: compare a trained network's forward and backward pass on the Triton kernels with PyTorch's."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
import time

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import kernels
from kernels.runtime import launch
from kernels.runtime.backend import INTERPRETED

from ..data.augment import NOTHING, augmented_input
from ..data.fashion_mnist import load_fashion_mnist
from ..fused import unfuse
from ..models import IMAGE_SIZE
from ..training.checkpoint import CheckpointError
from ..training.networks import float32_products
from .network import RunArgument, load_run
from .options import DeviceOption, console, fail, print_table, runs_on, usable_device

#: Number of images that go through the network. The interpreter is slow.
IMAGES = 2

#: Allowed error of the kernels: so many times PyTorch's own, plus half units in the last place of the largest value. Storing a
#: result costs half a unit. A GPU is allowed more: the kernels add a product in one chain, which cuBLAS splits.
_TIMES, _HALF_UNITS = 2.0, {"cpu": 1, "cuda": 16}


@dataclasses.dataclass(frozen=True)
class Difference:
    """Largest errors of a result against float64, relative to its largest value in float64.

    Attributes:
        name: ``"logits"``, or the name of the parameter whose gradient is compared.
        ours, theirs: error of the kernels, and of PyTorch in float32.
        within: whether the kernels' error is within the allowed one.
    """

    name: str
    ours: float
    theirs: float
    within: bool


def results_of(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradient of the cross-entropy for each parameter, by name: computed in eval mode, returned in float64."""
    net.zero_grad(set_to_none=True)
    logits = net.eval()(images)
    F.cross_entropy(logits, labels).backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach().double()} | {name: gradient.double() for name, gradient in gradients.items()}


def differences(net: nn.Module, images: Tensor, labels: Tensor) -> list[Difference]:
    """The errors of :func:`results_of` for the fused ``net`` on the kernels and for the same network of PyTorch's layers.

    Args:
        net: in float32.
        images: input of ``net``, float32.
        labels: classes of ``images``.
    """
    plain = unfuse(copy.deepcopy(net))
    with kernels.use_backend("triton"):
        ours = results_of(net, images, labels)
    theirs = results_of(plain, images, labels)
    exact = results_of(plain.double(), images.double(), labels)
    half_unit = _HALF_UNITS[images.device.type] * torch.finfo(torch.float32).eps / 2
    found = []
    for name, value in exact.items():
        largest = value.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        our_error, their_error = (((each[name] - value).abs().max() / largest).item() for each in (ours, theirs))
        found.append(Difference(name, our_error, their_error, our_error <= _TIMES * their_error + half_unit))
    return found


def check_command(run: RunArgument, device: DeviceOption = "auto") -> None:
    """Compare the Triton kernels with PyTorch on a trained network.

    Runs the forward and backward pass on two images of the shipped sample: in float32 with the kernels and with PyTorch, and in
    float64 with PyTorch. Prints the largest errors of the logits and of each gradient. Without a GPU the kernels run in
    Triton's interpreter, which takes a minute for AlexNet. The exit code is 1 if an error of the kernels is more than twice
    PyTorch's plus an allowance for rounding.
    """
    where = usable_device(device)
    if where.type == "cpu" and not INTERPRETED:
        # Triton reads TRITON_INTERPRET once, when a kernel is defined, so only a new process can set it.
        sys.stdout.flush()
        os.execve(
            sys.executable,
            [sys.executable, "-m", "alexnet_triton", "check", str(run), "--device", device],
            {**os.environ, "TRITON_INTERPRET": "1"},
        )
    launched: list[str] = []
    begin = time.perf_counter()
    try:
        net, kept = load_run(run, where)
        test = load_fashion_mnist("sample").test.limited(IMAGES).to(where)
        pixels = test.images if kept.channels == 1 else test.images[:, None].expand(-1, 3, -1, -1).contiguous()
        with float32_products("float32"), launch.observe_launches(lambda kernel, *_: launched.append(kernel.fn.__name__)):
            with kernels.use_backend("triton"):
                console.print(f"{kept.model} on {runs_on(where)}: {IMAGES} images of the sample, forward and backward")
                index = torch.arange(IMAGES, device=where)
                images = augmented_input(pixels, index, IMAGE_SIZE[kept.model], NOTHING, torch.float32)
            found = differences(net, images, test.labels % len(kept.classes))
    except (CheckpointError, OSError, RuntimeError) as error:
        raise fail(error) from error
    table = Table(title="largest error against float64, as a part of the largest value")
    for column in ("", "Triton kernels", "PyTorch", ""):
        table.add_column(column)
    for each in found:
        gradient = "logits" if each.name == "logits" else f"gradient of {each.name}"
        table.add_row(gradient, f"{each.ours:.1e}", f"{each.theirs:.1e}", "" if each.within else "too large")
    print_table(table)
    seconds = time.perf_counter() - begin
    console.print(f"{len(launched)} launches of Triton kernels in {seconds:.1f} s: {', '.join(dict.fromkeys(launched))}")
    wrong = [each.name for each in found if not each.within]
    if wrong:
        raise fail(f"the kernels' error is more than twice PyTorch's plus the allowance for rounding: {', '.join(wrong)}")
    console.print(f"all {len(found)} results are within twice PyTorch's own error, plus the allowance for rounding")
