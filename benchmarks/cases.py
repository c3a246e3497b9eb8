"""The cases that everything in this folder times: each operation at AlexNet's shapes, ours and PyTorch's.

One registry: a case makes its tensors, and runs forward or forward and backward on either implementation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

IMPLEMENTATIONS = ("triton", "torch")
PASSES = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one layer's shape.

    Attributes:
        name: of the layer.
        input: its shape without the batch.
        weight: shape of the weight, or None; a bias of ``weight[0]`` goes with it.
        ours: the operation of ``kernels``, called with input, weight, bias.
        theirs: the same from PyTorch, as it is timed.
        shrink: shapes of a smaller case of the same kind, for a check that does not time.
        reference: the values of ours in PyTorch's operations, where ``theirs`` draws other random numbers.
    """

    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...] | None
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    shrink: tuple[tuple[int, ...], tuple[int, ...] | None]
    reference: Callable[..., Tensor] | None = None

    def meaning(self, *tensors: Tensor) -> Tensor:
        """What ours should give, in PyTorch's operations and in the tensors' dtype."""
        return (self.reference or self.theirs)(*tensors)

    def shrunk(self) -> Case:
        """The same operation on tensors small enough for the interpreter."""
        return dataclasses.replace(self, input=self.shrink[0], weight=self.shrink[1])

    def tensors(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        """Random input, weight and bias that ask for gradients; channels-last where they have four dimensions."""
        shapes = [(batch, *self.input)] + ([] if self.weight is None else [self.weight, self.weight[:1]])
        tensors = []
        for shape in shapes:
            scale = 1.0 if shape[0] == batch or len(shape) == 1 else torch.Size(shape[1:]).numel() ** -0.5
            tensor = (torch.randn(shape, device=device) * scale).to(dtype)
            if tensor.dim() == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            tensors.append(tensor.requires_grad_())
        return tensors

    def function(self, implementation: str) -> Callable[..., Tensor]:
        """The operation of ``"triton"`` (ours) or ``"torch"``."""
        return self.ours if implementation == "triton" else self.theirs


def _conv_block(stride: int, padding: int, pool: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if pool:
            return kernels.conv2d_relu_max_pool2d(x, w, b, stride, padding, pool_kernel_size=3, pool_stride=2)
        return kernels.conv2d(x, w, b, stride, padding, activation="relu")

    def theirs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, w, b, stride, padding))
        return F.max_pool2d(y, 3, 2) if pool else y

    return ours, theirs


def _max_pool(x: Tensor) -> Tensor:
    y = kernels.max_pool2d(x, 3, 2)
    assert isinstance(y, Tensor)
    return y


def _dropped(y: Tensor) -> Tensor:
    """Dropout of seed 1, as ours draws it."""
    return y * kernels.dropout_mask(y.shape, 0.5, 1, device=y.device) * 2


def _linear_relu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return kernels.linear(x, w, b, activation="relu")


_SMALL_CONV = ((6, 9, 9), (8, 6, 3, 3))
_SMALL_LINEAR = ((20,), (24, 20))

CASES = (
    Case("conv1", (1, 224, 224), (96, 1, 11, 11), *_conv_block(4, 1, True), ((1, 27, 27), (8, 1, 11, 11))),
    Case("conv2", (96, 26, 26), (256, 96, 5, 5), *_conv_block(1, 2, True), ((6, 9, 9), (8, 6, 5, 5))),
    Case("conv3", (256, 12, 12), (384, 256, 3, 3), *_conv_block(1, 1, False), _SMALL_CONV),
    Case("conv4", (384, 12, 12), (384, 384, 3, 3), *_conv_block(1, 1, False), _SMALL_CONV),
    Case("conv5", (384, 12, 12), (256, 384, 3, 3), *_conv_block(1, 1, True), _SMALL_CONV),
    Case("pool1", (96, 54, 54), None, _max_pool, lambda x: F.max_pool2d(x, 3, 2), ((6, 9, 9), None)),
    Case("fc1", (6400,), (4096, 6400), _linear_relu, lambda x, w, b: F.relu(F.linear(x, w, b)), _SMALL_LINEAR),
    Case("fc2", (4096,), (4096, 4096), _linear_relu, lambda x, w, b: F.relu(F.linear(x, w, b)), _SMALL_LINEAR),
    Case("fc3", (4096,), (10, 4096), kernels.linear, F.linear, _SMALL_LINEAR),
    Case(
        "fc2_dropout",
        (4096,),
        (4096, 4096),
        lambda x, w, b: kernels.linear_relu_dropout(x, w, b, 0.5, seed=1),
        lambda x, w, b: F.dropout(F.relu(F.linear(x, w, b)), 0.5),
        _SMALL_LINEAR,
        lambda x, w, b: _dropped(F.relu(F.linear(x, w, b))),
    ),
    Case(
        "dropout",
        (4096,),
        None,
        lambda x: kernels.dropout(x, 0.5, seed=1),
        lambda x: F.dropout(x, 0.5),
        ((20,), None),
        _dropped,
    ),
)


def verify(case: Case, tensors: list[Tensor]) -> None:
    """Before anything is timed: our output and gradients against float64, at most twice PyTorch's own error.

    Raises:
        AssertionError: a result is wrong.
    """
    output = case.ours(*tensors)
    grad = torch.randn_like(output)
    ours = [output, *torch.autograd.grad(output, tensors, grad)]
    runs = []
    for dtype in (output.dtype, torch.float64):
        copies = [t.detach().to(dtype).requires_grad_() for t in tensors]
        result = case.meaning(*copies)
        runs.append([result, *torch.autograd.grad(result, copies, grad.to(dtype))])
    names = ("output", "gradient of input", "gradient of weight", "gradient of bias")
    for name, got, peer, exact in zip(names, ours, *runs, strict=False):
        error, peer_error = ((t.double() - exact).abs().max().item() for t in (got, peer))
        allowed = 2 * peer_error + 0.5 * torch.finfo(got.dtype).eps * exact.abs().max().item()
        if not error <= allowed:
            raise AssertionError(f"{case.name}: wrong {name}: error {error:.3e} against float64, allowed {allowed:.3e}")


def runner(case: Case, implementation: str, which: str, tensors: list[Tensor]) -> Callable[[], object]:
    """What is timed: the forward pass without a graph, or the backward pass of one recorded before."""
    function = case.function(implementation)
    if which == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*tensors)

        return forward
    output = function(*tensors)
    grad = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, tensors, grad, retain_graph=True)
