"""The optimizer: plain SGD, with float32 master weights for half-precision parameters, in one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from kernels.runtime.backend import current_backend
from kernels.sgd import is_dense, memory_order, sgd_step, sgd_step_reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class SGD(Optimizer):
    """:class:`torch.optim.SGD` as one Triton kernel over all parameters of a group, and exact for half precision.

    bfloat16 keeps 8 bits of a weight, so an update below 1/512 of it is lost to rounding, step after step. For a bfloat16 or
    float16 parameter this optimizer therefore keeps the weight in float32, its master: the step changes the master, and the
    parameter becomes the master rounded. Momentum is kept in float32 too. A float32 parameter is its own master.

    A parameter's master is made from it at its first step. Whoever changes a parameter by other means later (loads a
    checkpoint, clips it, sets ``.data``) is obeyed: at each step an element that is not its master rounded becomes the master.

    Under the Triton kernels a step is one launch for up to 32 parameters of a group that share device and dtype (and one more
    where some make their first step with momentum). On other devices, and for float64, it is done by PyTorch.

    With float32 parameters the results are those of ``torch.optim.SGD(..., foreach=False)`` bit for bit, on the CPU in
    PyTorch's operations and on a GPU in the kernel: the kernel writes out the fused multiply-adds that PyTorch's code compiles
    to. (In Triton's interpreter, which has no such instruction, one result in 2^29 may differ in its last bit.)

    A captured CUDA graph repeats what Python passed at its capture. Give ``lr`` as a tensor on the parameters' device to change
    it later (schedulers then change it in place), and take a first step before the capture: it makes masters and buffers.

    Gradients must be dense tensors. One whose strides are not its parameter's is copied into them first. ``GradScaler`` and
    ``clip_grad_norm_`` work as with ``torch.optim.SGD``.

    ``state_dict()`` has the form of ``torch.optim.SGD``'s, with ``"momentum_buffer"`` and, where there is one, ``"master"`` for
    a parameter, both float32; either class loads the other's. ``load_state_dict`` copies tensors and keeps them float32.

    Args:
        params: parameters, named parameters, or dicts that define groups: float32, float16 or bfloat16, on the CPU float64 too.
        lr: learning rate: a number, or a tensor of one element, which the kernel reads if it is on the parameters' device.
        momentum: factor of the momentum buffer; 0 keeps none.
        dampening: 1 minus the factor of the gradient in the momentum buffer, from the second step on.
        weight_decay: factor of the L2 penalty's gradient.
        nesterov: Nesterov momentum.
        maximize: go up instead of down.

    Raises:
        ValueError: a negative ``lr``, ``momentum`` or ``weight_decay``; an ``lr`` of more than one element; ``nesterov``
            without momentum or with dampening.
        TypeError: parameters of another dtype; a ``momentum``, ``dampening`` or ``weight_decay`` that is no number.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        for name, value in {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}.items():
            if not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if momentum < 0.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if weight_decay < 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError: a parameter of a dtype that :class:`SGD` does not take.
        """
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dtype not in _DTYPES and not (param.dtype == torch.float64 and param.device.type == "cpu"):
                del self.param_groups[-1]
                raise TypeError(
                    "parameters must be float32, float16 or bfloat16 (on the CPU float64 too), "
                    f"got {param.dtype} on {param.device}"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # old files lack these
            group.setdefault("nesterov", False)
            group.setdefault("maximize", False)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As :meth:`torch.optim.Optimizer.load_state_dict`, but masters and momentum buffers are copied and stay float32.

        Raises:
            ValueError: groups of other sizes, or a state of another shape than its parameter.
        """
        given: StateDict = {}

        def remember(_: Optimizer, final: StateDict) -> None:
            given.update(final)

        def restore(_: Optimizer) -> None:
            # The base class rounded all to the parameters' dtype.
            numbers = (number for group in given["param_groups"] for number in group["params"])
            params = (param for group in self.param_groups for param in group["params"])
            for number, param in zip(numbers, params, strict=True):
                for key in ("master", "momentum_buffer"):
                    value = given["state"].get(number, {}).get(key)
                    if isinstance(value, Tensor):
                        if value.shape != param.shape:
                            raise ValueError(
                                f"{key} of parameter {number} must have its shape {tuple(param.shape)}, "
                                f"got {tuple(value.shape)}"
                            )
                        self.state[param][key] = _new_state(param).copy_(value)

        # As hooks, so that they see what other hooks make of the dict, and come before those that look at the result.
        hooks = (
            self.register_load_state_dict_pre_hook(remember),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients; called first.

        Returns:
            What ``closure`` returned.

        Raises:
            RuntimeError: a sparse gradient; a first step inside a CUDA graph capture that needs masters or momentum buffers.
            ValueError: a parameter with gaps in its memory.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    # torch.compile runs it as it stands, between two graphs. (torch.compiler.disable would import the compiler here and now.)
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step_group(self, group: dict[str, Any]) -> None:
        # What one launch takes: tensors of one device and dtype that all make their first step or none.
        together: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            grad = param.grad
            if grad.layout != torch.strided:
                raise RuntimeError(f"SGD takes dense gradients only, got layout {grad.layout} (sparse=True of an embedding?)")
            if not is_dense(param):
                raise ValueError(
                    f"parameters must be dense in memory, got shape {tuple(param.shape)} and strides {param.stride()}"
                )
            if memory_order(grad) != memory_order(param):
                grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
            master = None
            if param.dtype in (torch.float16, torch.bfloat16):
                master = self._state(param, "master")
                if master is None:
                    master = self._make_state(param, "master").copy_(param)
            buffer, first_step = None, False
            if group["momentum"] != 0:
                buffer = self._state(param, "momentum_buffer")
                if buffer is None:
                    first_step = True
                    buffer = self._make_state(param, "momentum_buffer")
            key = (param.device, param.dtype, grad.dtype, first_step)
            together.setdefault(key, []).append((param, grad, master, buffer))
        for (_, dtype, _, first_step), tensors in together.items():
            values = {name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")}
            if dtype == torch.float64 and current_backend() != "triton":
                for each in tensors:
                    sgd_step_reference(*each, **values, first_step=first_step)
                continue
            params, grads, masters, buffers = zip(*tensors, strict=True)
            sgd_step(
                params,
                grads,
                masters if masters[0] is not None else None,
                buffers if buffers[0] is not None else None,
                **values,
                first_step=first_step,
            )

    def _state(self, param: Tensor, key: str) -> Tensor | None:
        """``param``'s state, moved into its memory order where that changed (``net.to(memory_format=...)``)."""
        state = self.state[param]
        value: Tensor | None = state.get(key)
        if value is not None and memory_order(value) != memory_order(param):
            value = state[key] = _new_state(param).copy_(value)
        return value

    def _make_state(self, param: Tensor, key: str) -> Tensor:
        if param.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph that makes a {key} would make it anew at every replay: take a step before the capture"
            )
        value = self.state[param][key] = _new_state(param)
        return value


def _new_state(param: Tensor) -> Tensor:
    """An uninitialised tensor in ``param``'s memory order, in float32 at least."""
    return torch.empty_like(param, dtype=torch.promote_types(param.dtype, torch.float32), requires_grad=False)
