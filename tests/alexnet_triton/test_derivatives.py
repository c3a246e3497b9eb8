"""Higher derivatives and forward mode of a network, each compared with the same use of PyTorch's layers.

In training mode with the same random numbers, which PyTorch's operations draw under ``kernels.use_backend("torch")``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import kernels
from alexnet_triton import FusedSequential

from ..conftest import DEVICE
from .test_fused import images, small_layers

#: Other tests run the same kernels under ttsem.
pytestmark = pytest.mark.slow_under_ttsem

#: float64 kernels only run in the interpreter. There sums differ in order; on a GPU float32 loses most in third derivatives.
DTYPE, TOLERANCE = (torch.float64, 1e-10) if DEVICE == "cpu" else (torch.float32, 1e-3)

Parameters = dict[str, Tensor]
Use = Callable[[nn.Module, Tensor], Any]


def parameters(net: nn.Module) -> list[Tensor]:
    """The parameters that require a gradient."""
    return [p for p in net.parameters() if p.requires_grad]


def detached(net: nn.Module) -> Parameters:
    return {name: p.detach() for name, p in net.named_parameters()}


def call(net: nn.Module, given: Parameters, x: Tensor) -> Tensor:
    return torch.func.functional_call(net, given, (x,))


def loss(y: Tensor) -> Tensor:
    return y.sin().sum()


def loss_of_bias(net: nn.Module, x: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    given = detached(net)
    return lambda bias: loss(call(net, {**given, name: bias}, x).square())


def first_gradients(net: nn.Module, x: Tensor) -> Any:
    return torch.autograd.grad(loss(net(x)), [x, *parameters(net)], create_graph=True)


def gradient_penalty(net: nn.Module, x: Tensor) -> Any:
    y = loss(net(x))
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    return torch.autograd.grad(y + grad.square().sum(), [x, *parameters(net)])


def hessian_vector_product(net: nn.Module, x: Tensor) -> Any:
    grads = torch.autograd.grad(loss(net(x)), parameters(net), create_graph=True)
    return torch.autograd.grad(grads, parameters(net), [p.detach() for p in parameters(net)])


def third_order(net: nn.Module, x: Tensor) -> Any:
    grads = torch.autograd.grad(loss(net(x)), parameters(net), create_graph=True)
    for create_graph in (True, False):
        grads = torch.autograd.grad(grads, parameters(net), [p.detach() for p in parameters(net)], create_graph=create_graph)
    return grads


def meta_learning(net: nn.Module, x: Tensor) -> Any:
    fast = dict(net.named_parameters())
    for _ in range(2):
        grads = torch.autograd.grad(loss(call(net, fast, x)), list(fast.values()), create_graph=True)
        fast = {name: p - 0.01 * grad for (name, p), grad in zip(fast.items(), grads, strict=True)}
    return torch.autograd.grad(loss(call(net, fast, x)), parameters(net))


def weights_made_of_the_input(net: nn.Module, x: Tensor) -> Any:
    """A bias that is computed from the input and used in two layers."""
    given = detached(net)
    bias = given["3.bias"] + x.mean()
    (grad,) = torch.autograd.grad(loss(call(net, {**given, "3.bias": bias, "5.bias": bias}, x)), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)


def a_frozen_front(net: nn.Module, x: Tensor) -> Any:
    net[:5].requires_grad_(False)
    grads = torch.autograd.grad(loss(net(x.detach())), parameters(net), create_graph=True)
    return [*grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), parameters(net))]


def biases_alone(net: nn.Module, x: Tensor) -> Any:
    for name, p in net.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return a_hessian_diagonal(net, x.detach())


def a_hessian_diagonal(net: nn.Module, x: Tensor) -> Any:
    grads = torch.autograd.grad(loss(net(x)), parameters(net), create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in grads), parameters(net))


def checkpointed(net: nn.Module, x: Tensor) -> Any:
    y = checkpoint(net, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(loss(y), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), parameters(net))


def a_checkpointed_penalty(net: nn.Module, x: Tensor) -> Any:
    def penalty(x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss(net(x)), x, create_graph=True)
        return grad.square().sum()

    return torch.autograd.grad(checkpoint(penalty, x, use_reentrant=False), parameters(net))


def in_anomaly_mode_saved_on_the_host(net: nn.Module, x: Tensor) -> Any:
    with torch.autograd.set_detect_anomaly(True), torch.autograd.graph.save_on_cpu():
        return gradient_penalty(net, x)


def func_jvp(net: nn.Module, x: Tensor) -> Any:
    given = detached(net)
    tangents = {name: p.cos() for name, p in given.items()}
    return torch.func.jvp(lambda p, x: call(net, p, x), (given, x), (tangents, x.cos()))


def func_linearize(net: nn.Module, x: Tensor) -> Any:
    y, push = torch.func.linearize(net.eval(), x.detach())
    return y, push(x.detach().cos())


def func_jvp_of_grad(net: nn.Module, x: Tensor) -> Any:
    given = detached(net)
    tangents = {name: p.cos() for name, p in given.items()}
    return torch.func.jvp(torch.func.grad(lambda p: loss(call(net, p, x))), (given,), (tangents,))


def func_jvp_of_vjp(net: nn.Module, x: Tensor) -> Any:
    y, pull = torch.func.vjp(lambda p: call(net, p, x), detached(net))
    return torch.func.jvp(pull, (torch.ones_like(y),), (y.detach().cos(),))


def func_hessian(net: nn.Module, x: Tensor) -> Any:
    return torch.func.hessian(loss_of_bias(net.eval(), x, "3.bias"))(net[3].bias.detach())


def func_hessian_in_training(net: nn.Module, x: Tensor) -> Any:
    of = torch.func.jacrev(loss_of_bias(net, x, "14.bias"))
    return torch.func.jacfwd(of, randomness="same")(net[14].bias.detach())


def func_reverse_over_reverse(net: nn.Module, x: Tensor) -> Any:
    return torch.func.jacrev(torch.func.jacrev(loss_of_bias(net, x, "5.bias")))(net[5].bias.detach())


def func_reverse_over_forward(net: nn.Module, x: Tensor) -> Any:
    of = torch.func.jacfwd(loss_of_bias(net, x, "14.bias"), randomness="same")
    return torch.func.jacrev(of)(net[14].bias.detach())


def func_penalty_of_each_sample(net: nn.Module, x: Tensor) -> Any:
    def penalty(given: Parameters, one: Tensor) -> Tensor:
        return torch.func.grad(lambda one: loss(call(net, given, one[None])))(one).square().sum()

    net.eval()
    return torch.func.grad(lambda p: torch.func.vmap(lambda one: penalty(p, one))(x.detach()).sum())(detached(net))


def functional_jvp(net: nn.Module, x: Tensor) -> Any:
    return torch.autograd.functional.jvp(net, x, x.detach().cos())


def functional_hessian_at_once(net: nn.Module, x: Tensor) -> Any:
    """A vmap over the backward passes of one graph."""
    of = loss_of_bias(net, x.detach(), "5.bias")
    return torch.autograd.functional.hessian(of, net[5].bias.detach(), vectorize=True)


def batched_gradients(net: nn.Module, x: Tensor) -> Any:
    y = net(x)
    several = torch.stack([torch.ones_like(y), y.detach()])
    (grad,) = torch.autograd.grad(y.sin(), x, several, is_grads_batched=True, create_graph=True)
    return [grad, *torch.autograd.grad(grad.square().sum(), parameters(net))]


def dual_weight(net: nn.Module, x: Tensor, name: str) -> list[Tensor]:
    with forward_ad.dual_level():
        given: Parameters = dict(net.named_parameters())
        given[name] = forward_ad.make_dual(given[name], given[name].detach().cos())
        grads = torch.autograd.grad(loss(call(net, given, x)), [x, *net.parameters()])
        return [part for grad in grads for part in forward_ad.unpack_dual(grad)]


def a_dual_first_weight(net: nn.Module, x: Tensor) -> Any:
    return dual_weight(net, x, "0.weight")


def a_dual_last_weight(net: nn.Module, x: Tensor) -> Any:
    """The layers before run the kernels and get a gradient with a tangent."""
    return dual_weight(net, x, "14.weight")


def a_dual_gradient(net: nn.Module, x: Tensor) -> Any:
    """The output gradient has a tangent; the graph was recorded before."""
    y = net(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(y), y.detach().cos())
        grads = torch.autograd.grad(y, [x, *net.parameters()], dual)
        return [part for grad in grads for part in forward_ad.unpack_dual(grad)]


def exported(net: nn.Module, x: Tensor) -> Any:
    """The exported graph holds operators with registered gradients."""
    module = torch.export.export(net, (x.detach(),)).module()
    return gradient_penalty(module, x)


USES: Sequence[Use] = [
    first_gradients,
    gradient_penalty,
    hessian_vector_product,
    third_order,
    meta_learning,
    weights_made_of_the_input,
    a_frozen_front,
    biases_alone,
    checkpointed,
    a_checkpointed_penalty,
    in_anomaly_mode_saved_on_the_host,
    func_jvp,
    func_linearize,
    func_jvp_of_grad,
    func_jvp_of_vjp,
    func_hessian,
    func_hessian_in_training,
    func_reverse_over_reverse,
    func_reverse_over_forward,
    func_penalty_of_each_sample,
    functional_jvp,
    functional_hessian_at_once,
    batched_gradients,
    a_dual_first_weight,
    a_dual_last_weight,
    a_dual_gradient,
    exported,
]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_as_the_layers(use: Use) -> None:
    net = FusedSequential(*small_layers()).to(DEVICE, DTYPE)
    x = images(3).to(DTYPE)

    def results() -> list[Tensor]:
        net.train().requires_grad_()
        torch.manual_seed(3)
        return torch.utils._pytree.tree_leaves(use(net, x.clone().requires_grad_()))

    ours = results()
    with kernels.use_backend("torch"):
        theirs = results()
    assert len(ours) > 0
    for got, due in zip(ours, theirs, strict=True):
        assert (got - due).abs().max() <= TOLERANCE * due.abs().max()


def test_as_a_plain_sequential() -> None:
    """There is no dropout, since nn.Sequential draws PyTorch's own random numbers."""
    layers = small_layers()
    plain, fused = (kind(*layers).to(DEVICE, DTYPE).eval() for kind in (nn.Sequential, FusedSequential))
    x = images(3).to(DTYPE).requires_grad_()
    for use in (third_order, func_jvp, a_dual_last_weight):
        for got, due in zip(*(torch.utils._pytree.tree_leaves(use(net, x)) for net in (fused, plain)), strict=True):
            assert (got - due).abs().max() <= TOLERANCE * due.abs().max()


def test_the_gradients_are_those_of_the_kernels() -> None:
    """Gradients are bit-identical, recorded for differentiation or not."""
    net = FusedSequential(*small_layers()).to(DEVICE)
    x = images().requires_grad_()
    found = []
    for create_graph in (False, True):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(loss(net(x)), [x, *net.parameters()], create_graph=create_graph))
    for plain, differentiable in zip(*found, strict=True):
        assert torch.equal(plain, differentiable)
        assert differentiable.requires_grad
        assert not plain.requires_grad


def test_a_bias_may_change_before_its_gradient_is_asked_for() -> None:
    """No gradient depends on the bias's value, so PyTorch's layers allow it too."""
    net = FusedSequential(*small_layers()).to(DEVICE).eval()
    x = images()
    y = loss(net(x))
    with torch.no_grad():
        net[0].bias.add_(1)
    grads = torch.autograd.grad(y, parameters(net), create_graph=True)
    assert len(torch.autograd.grad(sum(grad.sum() for grad in grads), parameters(net))) == len(grads)
    y = loss(net(x))
    with torch.no_grad():
        net[0].weight.add_(1)
        net[3].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, parameters(net), create_graph=True)
