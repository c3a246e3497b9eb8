"""The optimizer: plain SGD, with float32 master weights for half-precision parameters, in one launch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    StateDict,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from kernels.runtime.backend import current_backend
from kernels.runtime.launch import has_plans
from kernels.sgd import SGDProblem, is_dense, memory_order, repeat_step, sgd_step, sgd_step_reference, step_numbers

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
        #: By the identity of a group: what its last step was made of.
        self._known: dict[int, _Known] = {}
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
        self._known = {}
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
        if closure is not None and type(self).step is SGD.step:
            return self._step_observed(closure)
        if closure is not None:
            return self._step_all(closure)
        if torch.compiler.is_compiling() or self._is_observed():
            return self._step_observed()
        for group in self.param_groups:
            if not self._repeat_step(group):
                with torch.no_grad():
                    self._step_group(group)
        return None

    # What Optimizer.__init__ would wrap in hooks and a mark for the profiler: :meth:`_step_observed` has them, where there is
    # somebody to see them.
    step.hooked = True  # type: ignore[attr-defined]

    def _is_observed(self) -> bool:
        if type(self).step is not SGD.step:  # a subclass's step, which Optimizer has wrapped, calls this one
            return False
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        )

    @Optimizer.profile_hook_step
    def _step_observed(self, closure: Callable[[], float] | None = None) -> float | None:
        return self._step_all(closure)

    @torch.no_grad()
    def _step_all(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _repeat_step(self, group: dict[str, Any]) -> bool:
        """Make the step of a group that was stepped before, if all is as it was but values and addresses."""
        known = self._known.get(id(group))
        if known is None or not known.holds(group, self.state):
            return False
        problem = known.problem
        tensors: list[Any] = [*known.params, *[param.grad for param in known.params]]  # without a gradient nothing is found
        if problem.masters:
            tensors += [state.get("master") for state in known.states]
        if problem.buffers:
            tensors += [state.get("momentum_buffer") for state in known.states]
        numbers = known.numbers
        if problem.lr_in_memory:
            tensors.append(group["lr"])
        elif group["lr"] != known.lr:  # a scheduler's, perhaps at every step
            numbers = step_numbers(group["lr"], group["momentum"], group["dampening"], group["weight_decay"])
        return repeat_step(tensors, problem, numbers)

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
        self._known.pop(id(group), None)
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
            if len(together) == 1 and not first_step and has_plans(params[0]):
                self._known[id(group)] = _Known(group, list(params), self.state)

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


_OPTIONS = operator.itemgetter("momentum", "dampening", "weight_decay", "nesterov", "maximize")


class _Known:
    """What a group's step was made of, so that the next one need not look it all up.

    Args:
        group: it was stepped.
        params: those with a gradient.
        state: of the optimizer.
    """

    def __init__(self, group: dict[str, Any], params: list[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> None:
        self.group_params = list(group["params"])
        self.params = params
        with_grad = {id(param) for param in params}
        self.without_grad = [param for param in self.group_params if id(param) not in with_grad]
        self.state, self.all_states = state, list(state.values())
        self.states = [state[param] for param in params] if state else []
        self.problem = self._problem(group)
        self.options = _OPTIONS(group)
        self.lr = 0.0 if self.problem.lr_in_memory else group["lr"]
        self.numbers = step_numbers(self.lr, *self.options[:3])

    def _problem(self, group: dict[str, Any]) -> SGDProblem:
        masters = self.params[0].dtype != torch.float32
        in_memory = isinstance(group["lr"], Tensor)
        momentum, weight_decay = group["momentum"] != 0, group["weight_decay"] != 0
        options = (bool(group["nesterov"]), bool(group["maximize"]))
        return SGDProblem(len(self.params), masters, momentum, in_memory, False, weight_decay, *options)

    def _takes_options(self, group: dict[str, Any]) -> bool:
        """Whether other options ask for the same launch: other numbers."""
        if self._problem(group) != self.problem:
            return False
        self.options = _OPTIONS(group)
        self.numbers = step_numbers(self.lr, *self.options[:3])
        return True

    def holds(self, group: dict[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether the group has the same parameters, the optimizer the same states, and a step is asked to do the same."""
        params = group["params"]
        return (
            len(params) == len(self.group_params)
            and all(map(operator.is_, params, self.group_params))
            and state is self.state
            and len(state) == len(self.all_states)
            and all(map(operator.is_, state.values(), self.all_states))
            and (_OPTIONS(group) == self.options or self._takes_options(group))
            and isinstance(group["lr"], Tensor) == self.problem.lr_in_memory
            and all(param.grad is None for param in self.without_grad)
        )


def _new_state(param: Tensor) -> Tensor:
    """An uninitialised tensor in ``param``'s memory order, in float32 at least."""
    return torch.empty_like(param, dtype=torch.promote_types(param.dtype, torch.float32), requires_grad=False)
