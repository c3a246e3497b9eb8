"""``alexnet-triton check``: a trained network's forward and backward pass on the Triton kernels, beside PyTorch's."""

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

#: That go through the network: the interpreter takes long.
IMAGES = 2

#: What the kernels' error may be: so many times PyTorch's own, and half a unit in the last place of the largest value, the
#: rounding that storing a result costs. On a GPU more half units: a product is one chain of additions where cuBLAS splits it.
_TIMES, _HALF_UNITS = 2.0, {"cpu": 1, "cuda": 16}


@dataclasses.dataclass(frozen=True)
class Difference:
    """Largest errors of a result against float64, as parts of its largest value there.

    Attributes:
        name: ``"logits"``, or of the parameter whose gradient it is.
        ours, theirs: of the kernels, and of PyTorch in float32.
        within: whether the kernels' is as small as it has to be.
    """

    name: str
    ours: float
    theirs: float
    within: bool


def results_of(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of the cross-entropy of ``labels`` for each parameter, by name: in eval mode, in float64."""
    net.zero_grad(set_to_none=True)
    logits = net.eval()(images)
    F.cross_entropy(logits, labels).backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach().double()} | {name: gradient.double() for name, gradient in gradients.items()}


def differences(net: nn.Module, images: Tensor, labels: Tensor) -> list[Difference]:
    """What :func:`results_of` the fused ``net`` on the kernels differs by from the same network of PyTorch's layers.

    Args:
        net: in float32.
        images: float32, what ``net`` takes.
        labels: of ``images``.
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

    Two images go through it, forward and backward, in float32: by the kernels, by PyTorch, and in float64 by PyTorch. Printed
    are the largest errors of the logits and of each gradient. Without a GPU the kernels run in Triton's interpreter, which
    takes a minute for AlexNet. The exit code is 1 where the kernels' error is more than twice PyTorch's.
    """
    where = usable_device(device)
    if where.type == "cpu" and not INTERPRETED:
        # Triton asks once, when a kernel is defined: another process can still say so.
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
        raise fail(f"the kernels' error is more than twice PyTorch's: {', '.join(wrong)}")
    console.print(f"all {len(found)} results are within twice PyTorch's own error, and half a unit in the last place")
