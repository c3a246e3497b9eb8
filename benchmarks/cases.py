"""The cases that this folder's benchmarks time: each operation at AlexNet's shapes, ours and PyTorch's.

A case makes its tensors and runs forward, or forward and backward, on either implementation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels.runtime.arguments import conv_input_precision, matmul_input_precision
from kernels.runtime.launch import new_output

IMPLEMENTATIONS = ("triton", "torch")
#: ``backward`` computes all gradients, ``dgrad`` only the input's, ``wgrad`` only the weight's.
PASSES = ("forward", "backward", "dgrad", "wgrad")


def to_channels_last(tensor: Tensor) -> Tensor:
    """A copy that is NHWC in memory and has channels-last strides.

    With one channel ``contiguous(memory_format=torch.channels_last)`` changes nothing, and PyTorch would treat the tensor and
    everything computed from it as NCHW.
    """
    return new_output(tensor.shape, tensor.dtype, tensor.device, channels_last=True).copy_(tensor)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one layer's shape.

    Attributes:
        name: of the layer.
        input: shape of the input without the batch.
        weight: shape of the weight, or None; with a weight there is a bias of ``weight[0]`` elements.
        ours: the operation of ``kernels``, called with input, weight, bias.
        theirs: PyTorch's operation, which is timed.
        shrink: input and weight shapes of a smaller case of the same kind, for checks without timing.
        reference: our values in PyTorch's operations, if ``theirs`` draws other random numbers.
        single: whether it is a single operation of PyTorch, whose gradients are timed one by one.
    """

    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...] | None
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    shrink: tuple[tuple[int, ...], tuple[int, ...] | None]
    reference: Callable[..., Tensor] | None = None
    single: bool = False

    def meaning(self, *tensors: Tensor) -> Tensor:
        """The expected value of ours, computed by PyTorch's operations in the tensors' dtype."""
        return (self.reference or self.theirs)(*tensors)

    def shrunk(self) -> Case:
        """The same operation on tensors small enough for the interpreter."""
        return dataclasses.replace(self, input=self.shrink[0], weight=self.shrink[1])

    def tensors(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        """Random input, weight and bias that require gradients; channels-last if they have four dimensions."""
        shapes = [(batch, *self.input)] + ([] if self.weight is None else [self.weight, self.weight[:1]])
        tensors = []
        for i, shape in enumerate(shapes):
            # Scale the weights so that outputs have the input's magnitude, as in a trained network.
            scale = torch.Size(shape[1:]).numel() ** -0.5 if i == 1 else 1.0
            tensor = (torch.randn(shape, device=device) * scale).to(dtype)
            if tensor.dim() == 4:
                tensor = to_channels_last(tensor)
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
    """``y`` after our dropout with seed 1."""
    return y * kernels.dropout_mask(y.shape, 0.5, 1, device=y.device) * 2


def _labels(x: Tensor) -> Tensor:
    """A class for each row of ``x``."""
    return torch.arange(len(x), device=x.device) % x.shape[1]


def _cross_entropy(x: Tensor) -> Tensor:
    return F.cross_entropy(x, _labels(x))


def _linear_relu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return kernels.linear(x, w, b, activation="relu")


_SMALL_CONV = ((6, 9, 9), (8, 6, 3, 3))
_SMALL_LINEAR = ((20,), (24, 20))

POOL_BLOCK = "relu_pool"
_SHAPES = {
    "conv1": ((1, 224, 224), (96, 1, 11, 11), (4, 1), ((1, 27, 27), (8, 1, 11, 11))),
    "conv2": ((96, 26, 26), (256, 96, 5, 5), (1, 2), ((6, 9, 9), (8, 6, 5, 5))),
    "conv3": ((256, 12, 12), (384, 256, 3, 3), (1, 1), _SMALL_CONV),
    "conv4": ((384, 12, 12), (384, 384, 3, 3), (1, 1), _SMALL_CONV),
    "conv5": ((384, 12, 12), (256, 384, 3, 3), (1, 1), _SMALL_CONV),
}
_POOLED = ("conv1", "conv2", "conv5")


def _conv_case(layer: str) -> Case:
    input, weight, geometry, small = _SHAPES[layer]
    return Case(
        layer,
        input,
        weight,
        lambda x, w, b: kernels.conv2d(x, w, b, *geometry),
        lambda x, w, b: F.conv2d(x, w, b, *geometry),
        small,
    )


def _conv_block_case(layer: str) -> Case:
    input, weight, geometry, small = _SHAPES[layer]
    pool = layer in _POOLED
    return Case(f"{layer}_{POOL_BLOCK if pool else 'relu'}", input, weight, *_conv_block(*geometry, pool), small)


def _linear_case(layer: str, weight: tuple[int, int]) -> Case:
    return Case(layer, weight[1:], weight, kernels.linear, F.linear, _SMALL_LINEAR)


_PLAIN = (
    *map(_conv_case, _SHAPES),
    Case("pool1", (96, 54, 54), None, _max_pool, lambda x: F.max_pool2d(x, 3, 2), ((6, 9, 9), None)),
    _linear_case("fc1", (4096, 6400)),
    _linear_case("fc2", (4096, 4096)),
    _linear_case("fc3", (10, 4096)),
    Case("cross_entropy", (10,), None, lambda x: kernels.cross_entropy(x, _labels(x)), _cross_entropy, ((20,), None)),
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

#: Single operations of PyTorch.
PLAIN_CASES = tuple(dataclasses.replace(case, single=True) for case in _PLAIN)

#: Fused operations, against the separate operations that they replace.
FUSED_CASES = (
    *map(_conv_block_case, _SHAPES),
    Case("fc1_relu", (6400,), (4096, 6400), _linear_relu, lambda x, w, b: F.relu(F.linear(x, w, b)), _SMALL_LINEAR),
    Case(
        "fc2_relu_dropout",
        (4096,),
        (4096, 4096),
        lambda x, w, b: kernels.linear_relu_dropout(x, w, b, 0.5, seed=1),
        lambda x, w, b: F.dropout(F.relu(F.linear(x, w, b)), 0.5),
        _SMALL_LINEAR,
        lambda x, w, b: _dropped(F.relu(F.linear(x, w, b))),
    ),
)

CASES = PLAIN_CASES + FUSED_CASES


@dataclasses.dataclass(frozen=True)
class Truth:
    """The expected results of a case on some tensors: in float64, and PyTorch's in the tensors' dtype.

    Attributes:
        grad: the output's gradient.
        exact: output and gradients in float64.
        peer: output and gradients of PyTorch in the dtype under test.
        tf32: for a fused case with TF32 allowed, output and gradients in float64 from operands cut to TF32; else None. PyTorch
            may have multiplied exactly (cuDNN does with one channel), and its error is then no limit for TF32.
    """

    grad: Tensor
    exact: list[Tensor]
    peer: list[Tensor]
    tf32: list[Tensor] | None = None


#: Bits of a float32 that TF32 leaves out.
TF32_BITS = 13


def cut(tensor: Tensor, bits: int = TF32_BITS) -> Tensor:
    """``tensor`` in float32 without its last ``bits`` bits, as the tensor cores read it (:func:`unit`)."""
    return (tensor.detach().float().view(torch.int32) & -(2**bits)).view(torch.float32)


def _cut_to_tf32(tensors: list[Tensor]) -> list[Tensor] | None:
    """The operands as the tensor cores read them, and the bias unchanged; None if TF32 is not allowed."""
    precision = conv_input_precision if tensors[0].dim() == 4 else matmul_input_precision
    if precision(tensors[0].dtype) != "tf32":
        return None
    return [cut(t) if t.dim() > 1 else t.detach() for t in tensors]


def truth(case: Case, tensors: list[Tensor], grad: Tensor | None = None) -> Truth:
    """The case's expected values and gradients. ``grad`` is the output's gradient, by default random normal numbers."""
    cut = None if case.single or case.weight is None else _cut_to_tf32(tensors)
    runs = []
    for given, dtype in ((tensors, tensors[0].dtype), (tensors, torch.float64), (cut, torch.float64)):
        if given is None:
            continue
        copies = [t.detach().to(dtype).requires_grad_() for t in given]
        result = case.meaning(*copies)
        grad = torch.randn_like(result) if grad is None else grad
        runs.append([result.detach(), *torch.autograd.grad(result, copies, grad.to(dtype))])
    assert grad is not None
    return Truth(grad, exact=runs[1], peer=runs[0], tf32=runs[2] if len(runs) > 2 else None)


def unit(dtype: torch.dtype) -> float:
    """Distance between 1 and the next number of the type in which products are formed.

    For float32 with TF32 allowed it is twice TF32's, since the tensor cores truncate both operands and cuDNN may choose not to
    use them.
    """
    tf32 = dtype == torch.float32 and "tf32" in (conv_input_precision(dtype), matmul_input_precision(dtype))
    return 2.0**-9 if tf32 else torch.finfo(dtype).eps


def _size(tensor: Tensor, largest: bool) -> float:
    return (tensor.abs().max() if largest else tensor.norm()).item()


def verify(case: Case, function: Callable[..., Tensor], tensors: list[Tensor], expected: Truth) -> None:
    """Compare output and gradients with float64: their error may be at most twice PyTorch's own.

    The error of a single operation is the largest one, that of a fused operation the norm: if a ReLU's argument is nearly zero,
    or a window has two maxima, rounding decides whether or where a gradient passes. For a fused operation with TF32 allowed,
    PyTorch's error counts as at least that of exact sums of TF32 products (:attr:`Truth.tf32`): cutting the operands alone
    moves the maxima of 2 windows in 10,000.

    Raises:
        AssertionError: a result is wrong.
    """
    output = function(*tensors)
    results = [output.detach(), *torch.autograd.grad(output, tensors, expected.grad)]
    names = ("output", "gradient of input", "gradient of weight", "gradient of bias")
    peers = zip(expected.peer, expected.tf32 or expected.peer, strict=True)
    for name, got, others, exact in zip(names, results, peers, expected.exact, strict=False):
        error, peer_error = (max(_size(t.double() - exact, case.single) for t in of) for of in ((got,), others))
        allowed = 2 * peer_error + 0.5 * unit(got.dtype) * _size(exact, case.single)
        if not error <= allowed:
            raise AssertionError(f"{case.name}: wrong {name}: error {error:.3e} against float64, allowed {allowed:.3e}")


def passes(case: Case) -> tuple[str, ...]:
    """The passes that a case is timed in: a single operation's gradients one by one, a fused one's together."""
    return ("forward", "dgrad", "wgrad") if case.single and case.weight is not None else ("forward", "backward")


def pass_flops(case: Case, batch: int, which: str) -> int:
    """FLOPs of a pass, counted by PyTorch; ``backward`` has two products, an operation without a weight 0 FLOPs."""
    if case.weight is None:
        return 0
    shapes = ((batch, *case.input), case.weight, case.weight[:1])
    with FlopCounterMode(display=False) as counter:
        case.theirs(*(torch.empty(shape, device="meta") for shape in shapes))
    return int(counter.get_total_flops()) * (2 if which == "backward" else 1)


def pass_bytes(case: Case, batch: int, which: str, like: Tensor) -> int:
    """Fewest bytes of a pass in the dtype of ``like``: each tensor is read or written once."""
    size = like.element_size()
    shapes = [(batch, *case.input)] + ([] if case.weight is None else [case.weight, case.weight[:1]])
    input, *weights = (torch.Size(shape).numel() for shape in shapes)
    output = case.theirs(*(torch.empty(shape, device="meta") for shape in shapes)).numel()
    weight = sum(weights)
    read_and_written = {
        "forward": input + weight + output,
        "dgrad": output + weight + input,
        "wgrad": output + input + weight,
        "backward": output + input + (input + 2 * weight if weights else 0),
    }
    return size * read_and_written[which]


def runner(function: Callable[..., Tensor], which: str, tensors: list[Tensor]) -> Callable[[], object]:
    """The timed function: the forward pass without an autograd graph, or a backward pass of a graph made here."""
    if which == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*tensors)

        return forward
    wanted = {"backward": tensors, "dgrad": tensors[:1], "wgrad": tensors[1:2]}[which]
    # Only the wanted tensors may require a gradient: PyTorch may compute others even if grad() does not ask for them.
    leaves = [t.detach().requires_grad_(any(t is w for w in wanted)) for t in tensors]
    output = function(*leaves)
    grad = torch.randn_like(output)
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)
