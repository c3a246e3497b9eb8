"""SGD in one kernel launch, with float32 master weights for half-precision parameters."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    StateDict,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from kernels.runtime.arguments import number
from kernels.runtime.backend import current_backend
from kernels.runtime.launch import has_plans
from kernels.sgd import (
    SGDProblem,
    has_own_dispatch,
    is_dense,
    join_master,
    memory_order,
    repeat_step,
    sgd_step,
    sgd_step_reference,
    split_master,
    step_numbers,
)

_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, *_HALF)

#: Keys and dtypes of the bits that a bfloat16 parameter lacks; keys of all forms of a master in a parameter's state.
_MISSING = (("master_bits", torch.int16), ("master_ties", torch.int8))
_MASTER_KEYS = ("master", "master_bits", "master_ties")


class SGD(Optimizer):
    """:class:`torch.optim.SGD` by one Triton kernel for many parameters, exact for half precision.

    bfloat16 keeps 8 bits of a weight, so rounding loses every update below 1/512 of the weight. For a bfloat16 or float16
    parameter this optimizer therefore keeps a float32 copy, the master: a step updates the master, and sets the parameter to
    the rounded master. Momentum is kept in float32 too. A float32 parameter is its own master.

    For a bfloat16 parameter only the master's 16 bits that the parameter lacks are stored, and a byte for ties, which a step
    hardly accesses. A step moves 10 bytes per element, not 14, and the results are bit-identical to those of float32 masters.
    :meth:`master` joins parameter and bits.

    A parameter's first step makes its master. Later changes of a parameter by other code (loading a checkpoint, clipping,
    setting ``.data``) are respected. The master of a changed float16 element becomes that element. The master of a changed
    bfloat16 element is within half a unit in its last place: it keeps the missing bits, or becomes the element if no master
    with these bits rounds to it. :meth:`set_master` sets a parameter and its master exactly.

    With the Triton kernels a step is one launch for up to 32 parameters of a group that share device and dtype (and one more
    if some take their first step with momentum). PyTorch computes the step on other devices and for float64.

    With float32 parameters the results are bit-identical to ``torch.optim.SGD(..., foreach=False)``, on the CPU by PyTorch's
    operations and on a GPU by the kernel, which writes out the fused multiply-adds that PyTorch's code compiles to. (Triton's
    interpreter has no such instruction: there one result in 2^29 may differ in its last bit.)

    A captured CUDA graph repeats the values that Python passed at its capture. To change ``lr`` later, give it as a tensor on
    the parameters' device, which schedulers change in place. Take a step before the capture, to make masters and buffers.

    Gradients must be dense tensors. A gradient is copied first if its strides differ from its parameter's or if it is not
    aligned to 16 bytes. ``GradScaler`` and ``clip_grad_norm_`` work as with ``torch.optim.SGD``.

    A parameter may be a DTensor, of FSDP2 (``fully_shard``) or of tensor parallelism: each process steps its local shard, which
    may be empty, and the state is a DTensor with the parameter's placement. A gradient with another placement (a pending sum,
    ``Partial``) is redistributed first. Parameters of other classes with ``__torch_dispatch__`` are stepped by PyTorch.

    ``state_dict()`` has the form of ``torch.optim.SGD``'s: per parameter ``"momentum_buffer"`` and ``"master"``, if they exist,
    both float32. Each class loads the other's. ``load_state_dict`` copies tensors and keeps them float32. (In ``state``, a
    bfloat16 parameter has ``"master_bits"`` and ``"master_ties"`` after its first step.)

    NumPy numbers are accepted like Python's: as arguments, in a group's dict, and assigned to ``param_groups`` later.

    Args:
        params: parameters, named parameters, or dicts that define groups: float32, float16 or bfloat16, on the CPU float64 too.
        lr: learning rate: a number, or a tensor of one element, which the kernel reads if it is on the parameters' device.
        momentum: factor of the momentum buffer; without momentum (0) there is no buffer.
        dampening: 1 minus the factor of the gradient in the momentum buffer, from the second step on.
        weight_decay: factor of the L2 penalty's gradient: a number, or a tensor of one element, which each step reads.
        nesterov: use Nesterov momentum.
        maximize: maximize the objective instead of minimizing it.
        foreach, fused: accepted as in ``torch.optim.SGD``, where they select an implementation; here there is only one.
        differentiable: must be False: no gradient flows through the kernel.

    Raises:
        ValueError: a negative ``lr``, ``momentum`` or ``weight_decay``; an ``lr`` of more than one element; ``nesterov``
            without momentum or with dampening.
        TypeError: a parameter of another dtype; a ``momentum``, ``dampening`` or ``weight_decay`` that is no number.
        NotImplementedError: ``differentiable`` is true. It is a RuntimeError, the type that ``torch.optim.SGD`` raises.
        RuntimeError: both ``foreach`` and ``fused`` are true.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        defaults |= _python_options(defaults)
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if defaults["lr"] < 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if defaults["momentum"] < 0.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if defaults["weight_decay"] < 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        #: By the id of a group: the cached facts of its last step.
        self._known: dict[int, _Known] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError: :class:`SGD` does not take the dtype of a parameter; an option is no number but should be.
            RuntimeError: :class:`SGD` refuses the options of the group.
        """
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        group.update(_python_options(group))
        for param in group["params"]:
            if param.dtype not in _DTYPES and not (param.dtype == torch.float64 and param.device.type == "cpu"):
                raise TypeError(
                    "parameters must be float32, float16 or bfloat16 (on the CPU float64 too), "
                    f"got {param.dtype} on {param.device}"
                )
        self.param_groups.append(group)

    @torch.no_grad()
    def master(self, param: Tensor) -> Tensor | None:
        """The master of ``param``: the weight, more exact than ``param``, that the next step begins with.

        Returns:
            float32, of the shape of ``param`` (a DTensor if ``param`` is one). None before the first step, and for a float32 or
            float64 parameter. For bfloat16 a new tensor. For float16 the tensor in ``state``, which is valid only in elements
            where ``param`` is still its rounded value.
        """
        state = self.state.get(param, {})
        if "master_bits" not in state and ("master" not in state or param.dtype != torch.bfloat16):
            return state.get("master")
        # After net.half() or net.float() the parameter no longer has the dtype that the bits belong to.
        made, weight = _new_state(param, torch.float32), _local(param.detach()).bfloat16()
        if "master" in state:  # from load_state_dict
            _local(made).copy_(_counting(_local(state["master"]), weight))
        else:
            _local(made).copy_(join_master(weight, *(_local(state[key]) for key, _ in _MISSING)))
        return made

    @torch.no_grad()
    def set_master(self, param: Tensor, value: Tensor) -> None:
        """Set ``param`` to ``value`` rounded, and its master to ``value``; existing tensors are changed in place.

        Args:
            param: one of the optimizer's parameters.
            value: of the shape of ``param``, on any device; a DTensor exactly if ``param`` is one.
        """
        param.copy_(value)
        if param.dtype not in _HALF:
            return
        state = self.state[param]
        value = _new_state(param, torch.float32).copy_(value)
        if param.dtype == torch.bfloat16 and not has_own_dispatch(_local(param)):
            bits, ties = self._missing_bits(param, _local(param))
            split_master(_local(value), bits, ties)
        elif self._state(param, "master") is None:
            state["master"] = value
        else:
            state["master"].copy_(value)

    def state_dict(self) -> StateDict:
        """As :meth:`torch.optim.Optimizer.state_dict`, with every master in float32, for bfloat16 in a new tensor."""

        def join(_: Optimizer, made: StateDict) -> None:
            numbers = itertools.chain(*(group["params"] for group in made["param_groups"]))
            params = itertools.chain(*(group["params"] for group in self.param_groups))
            for index, param in zip(numbers, params, strict=True):
                state = made["state"].get(index, {})
                if "master_bits" in state:
                    others = {key: value for key, value in state.items() if key not in _MASTER_KEYS}
                    made["state"][index] = {"master": self.master(param)} | others

        # A hook that runs first, so that other hooks see masters.
        hook = self.register_state_dict_post_hook(join, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known = {}
        for group in self.param_groups:
            for name, value in _OLD_DEFAULTS.items():
                group.setdefault(name, value)
            group.update(_python_options(group))

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As :meth:`torch.optim.Optimizer.load_state_dict`, but masters and momentum buffers are copied and stay float32.

        The next step splits the master of a bfloat16 parameter into bits: take a step before a CUDA graph is captured.

        Raises:
            ValueError: groups have other sizes; a state and its parameter differ in shape or in being a DTensor.
            TypeError: an option is no number but should be.
            RuntimeError: :class:`SGD` refuses the options of a group. Whatever is raised, nothing is loaded.
        """
        given: list[tuple[Tensor, str, Tensor]] = []

        def remember(_: Optimizer, final: StateDict) -> None:
            for group in final["param_groups"]:
                _python_options(group)
            given.extend(self._checked_states(final))

        def restore(_: Optimizer) -> None:
            # The base class has rounded the states to the dtype of their parameters.
            for param, key, value in given:
                self.state[param][key] = _new_state(param, _wide(param)).copy_(value)

        # Hooks: the first sees the dict as other hooks changed it, the second runs before hooks that read the result.
        hooks = (
            self.register_load_state_dict_pre_hook(remember),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _checked_states(self, state_dict: StateDict) -> Iterator[tuple[Tensor, str, Tensor]]:
        """Masters and momentum buffers of ``state_dict``, each with its parameter and its key."""
        numbers = [group["params"] for group in state_dict["param_groups"]]
        params = [group["params"] for group in self.param_groups]
        if list(map(len, numbers)) != list(map(len, params)):
            return  # the base class raises the error
        for index, param in zip(itertools.chain(*numbers), itertools.chain(*params), strict=True):
            for key in ("master", "momentum_buffer"):
                value = state_dict["state"].get(index, {}).get(key)
                if not isinstance(value, Tensor):
                    continue
                if value.shape != param.shape:
                    raise ValueError(
                        f"{key} of parameter {index} must have its shape {tuple(param.shape)}, got {tuple(value.shape)}"
                    )
                if _is_dtensor(value) != _is_dtensor(param):
                    raise ValueError(
                        f"{key} of parameter {index} must be a DTensor exactly if the parameter is one, "
                        f"got a {type(value).__name__} for a {type(param).__name__}"
                    )
                yield param, key, value

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss and the gradients; it is called first.

        Returns:
            The loss that ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse; a first step, which makes masters or momentum buffers, is captured in a CUDA
                graph; :class:`SGD` refuses options set in ``param_groups``.
            TypeError: an option set there is no number but should be; of a gradient and its parameter, only one is a DTensor.
            ValueError: a parameter has gaps in its memory.
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

    # Keeps Optimizer.__init__ from wrapping step in hooks and a profiler mark. :meth:`_step_observed` has these, and runs only
    # if there are hooks or a profiler.
    step.hooked = True  # type: ignore[attr-defined]

    def _is_observed(self) -> bool:
        if type(self).step is not SGD.step:  # a subclass's step, wrapped by Optimizer, calls this one
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
        """Repeat the last launch of a group; returns False if more than values and addresses may have changed."""
        known = self._known.get(id(group))
        if known is None or not known.holds(group, self.state):
            return False
        problem = known.problem
        tensors: list[Any] = [*known.params, *[param.grad for param in known.params]]  # with a None no launch is found
        if problem.ties:
            if any("master" in state for state in known.states):
                return False
            for key in ("master_bits", "master_ties"):
                tensors += [state.get(key) for state in known.states]
        elif problem.masters:
            tensors += [state.get("master") for state in known.states]
        if problem.buffers:
            tensors += [state.get("momentum_buffer") for state in known.states]
        numbers = known.numbers
        if problem.lr_in_memory:
            tensors.append(group["lr"])
        elif group["lr"] != known.lr:  # a scheduler may change it at every step
            numbers = step_numbers(group["lr"], group["momentum"], group["dampening"], group["weight_decay"])
        return repeat_step(tensors, problem, numbers)

    # Excluded from torch.compile, which breaks its graph here. (torch.compiler.disable would import the compiler.)
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step_group(self, group: dict[str, Any]) -> None:
        values = _step_values(group)
        # Tensors that one launch takes: of one device and dtype, and all in their first step or none.
        together: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]]] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            weight, grad = _shards(param)
            master = tie = None
            if param.dtype != torch.bfloat16:  # it may have been bfloat16 before
                for missing, _ in _MISSING:
                    self.state.get(param, {}).pop(missing, None)
            if param.dtype == torch.bfloat16 and not has_own_dispatch(weight):
                master, tie = self._missing_bits(param, weight)
            elif param.dtype in _HALF:
                master = self._state(param, "master")
                if master is None:
                    master = self.state[param]["master"] = self._make_state(param, "master").copy_(param)
            buffer, first_step = None, False
            if values["momentum"] != 0:
                buffer = self._state(param, "momentum_buffer")
                if buffer is None:
                    first_step = True
                    buffer = self._make_state(param, "momentum_buffer")
            # No kernel takes these tensors.
            by_torch = weight.dtype == torch.float64 or has_own_dispatch(weight) or has_own_dispatch(grad)
            by_torch = by_torch and current_backend() != "triton"
            key = (weight.device, weight.dtype, grad.dtype, tie is None, first_step, by_torch)
            together.setdefault(key, []).append((param, weight, grad, master, buffer, tie))
        self._known.pop(id(group), None)
        for (*_, first_step, by_torch), listed in together.items():
            params, weights, grads, *states = zip(*listed, strict=True)
            masters, buffers, ties = [None if state[0] is None else list(map(_local, state)) for state in states]
            if by_torch:
                nothing = [None] * len(params)
                for each in zip(weights, grads, masters or nothing, buffers or nothing, ties or nothing, strict=True):
                    sgd_step_reference(*each, **values, first_step=first_step)
            else:
                sgd_step(weights, grads, masters, buffers, **values, first_step=first_step, ties=ties)
            if first_step:  # only now: a step that raised must leave no unwritten buffer
                for param, buffer in zip(params, states[1], strict=True):
                    self.state[param]["momentum_buffer"] = buffer
            sharded = [param for param, weight in zip(params, weights, strict=True) if weight is not param]
            torch.autograd.graph.increment_version(sharded)  # a DTensor has its own version counter
            once = len(together) == 1 and not (first_step or by_torch or sharded)
            if once and _is_fixed(_OPTIONS(group)) and has_plans(params[0]):
                self._known[id(group)] = _Known(group, list(params), self.state)

    def _state(self, param: Tensor, key: str) -> Tensor | None:
        """A state of ``param``, moved into the memory order of ``param`` if that changed (``net.to(memory_format=...)``)."""
        state = self.state[param]
        value: Tensor | None = state.get(key)
        if value is not None and memory_order(_local(value)) != memory_order(_local(param)):
            value = state[key] = _new_state(param, value.dtype).copy_(value)
        return value

    def _missing_bits(self, param: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Local shards of a bfloat16 ``param``'s missing bits and ties, made first if needed; ``weight``: its local shard."""
        state = self.state[param]
        bits, ties = self._state(param, "master_bits"), self._state(param, "master_ties")
        if bits is None or ties is None or "master" in state:
            bits, ties = (self._make_state(param, key, dtype) for key, dtype in _MISSING)
            weight = weight.detach()
            master = _counting(_local(state["master"]), weight) if "master" in state else weight.float()
            split_master(master, _local(bits), _local(ties))
            state.update(master_bits=bits, master_ties=ties)
            state.pop("master", None)
        return _local(bits), _local(ties)

    def _make_state(self, param: Tensor, key: str, dtype: torch.dtype | None = None) -> Tensor:
        if param.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph that makes a {key} would make it anew at every replay: take a step before the capture"
            )
        return _new_state(param, dtype or _wide(param))


def _counting(master: Tensor, weight: Tensor) -> Tensor:
    """``master``, but ``weight`` in elements where ``weight`` is not the rounded master because other code has set it."""
    return torch.where(master.to(weight.dtype) == weight, master, weight.float())


_NUMBERS = ("lr", "momentum", "dampening", "weight_decay")
_FLAGS = ("nesterov", "maximize", "foreach", "differentiable", "fused")

#: All options but the learning rate, which a scheduler may change at every step.
_OPTIONS = operator.itemgetter(*_NUMBERS[1:], *_FLAGS)

#: Defaults of options that a group in an old file lacks.
_OLD_DEFAULTS = {"nesterov": False, "maximize": False, "foreach": None, "differentiable": False, "fused": False}


def _python_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group, with NumPy's numbers and booleans made Python's; ``lr`` and ``weight_decay`` may be tensors.

    Raises:
        TypeError: an option is no number but should be.
        NotImplementedError: ``differentiable`` is true.
        RuntimeError: both ``foreach`` and ``fused`` are true.
    """
    options: dict[str, Any] = {}
    for name in filter(group.__contains__, _NUMBERS):
        value = group[name]
        # Tensors are kept, because they may be changed in place.
        kept = isinstance(value, Tensor) and (name == "lr" or (name == "weight_decay" and value.numel() == 1))
        options[name] = value if kept else number(name, value)
    for name in filter(group.__contains__, _FLAGS):
        options[name] = None if group[name] is None else bool(group[name])
    if options.get("differentiable"):
        raise NotImplementedError(
            "SGD does not support differentiable=True: no gradient flows through its kernel; use torch.optim.SGD for that"
        )
    if options.get("foreach") and options.get("fused"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    return options


def _step_values(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group's step, as keyword arguments of :func:`sgd_step`."""
    options = _python_options(group)
    values = {name: options[name] for name in (*_NUMBERS, "nesterov", "maximize")}
    if isinstance(values["weight_decay"], Tensor):
        values["weight_decay"] = values["weight_decay"].item()
    if _is_dtensor(values["lr"]):
        values["lr"] = values["lr"].full_tensor()
    return values


def _is_fixed(options: Sequence[Any]) -> bool:
    """Whether the options cannot change in place: none is a tensor or an array."""
    return all(value is None or isinstance(value, (int, float, np.generic)) for value in options)


class _Known:
    """The cached facts of a group's last step, with which the next step repeats its launch.

    Args:
        group: the group that was stepped.
        params: its parameters with a gradient.
        state: the optimizer's state.
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
        self.lr = 0.0 if self.problem.lr_in_memory else float(group["lr"])
        self.numbers = step_numbers(self.lr, *self.options[:3])

    def _problem(self, group: dict[str, Any]) -> SGDProblem:
        masters, ties = self.params[0].dtype != torch.float32, self.params[0].dtype == torch.bfloat16
        in_memory = isinstance(group["lr"], Tensor)
        momentum, weight_decay = bool(group["momentum"] != 0), bool(group["weight_decay"] != 0)
        options = (bool(group["nesterov"]), bool(group["maximize"]))
        return SGDProblem(len(self.params), masters, ties, momentum, in_memory, False, weight_decay, *options)

    def _takes_options(self, group: dict[str, Any]) -> bool:
        """Whether the group's new options need the same launch with other numbers; if so, they are stored."""
        _python_options(group)
        if not _is_fixed(_OPTIONS(group)) or self._problem(group) != self.problem:
            return False
        self.options = _OPTIONS(group)
        self.numbers = step_numbers(self.lr, *self.options[:3])
        return True

    def holds(self, group: dict[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether the parameters, the states and the kind of the step are the same as in the last step."""
        params = group["params"]
        return (
            len(params) == len(self.group_params)
            and all(map(operator.is_, params, self.group_params))
            and state is self.state
            and len(state) == len(self.all_states)
            and all(map(operator.is_, state.values(), self.all_states))
            # Compared by identity: a NumPy float32 may equal a Python float.
            and (all(map(operator.is_, _OPTIONS(group), self.options)) or self._takes_options(group))
            and isinstance(group["lr"], Tensor) == self.problem.lr_in_memory
            and all(param.grad is None for param in self.without_grad)
        )


def _wide(param: Tensor) -> torch.dtype:
    """The dtype of momentum buffers and masters: float32, or float64 for a float64 parameter."""
    return torch.promote_types(param.dtype, torch.float32)


def _new_state(param: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of the shape and memory order of ``param``."""
    return torch.empty_like(param, dtype=dtype, requires_grad=False)


def _is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor, without the slow import of that class: until it is imported, no DTensor exists."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _local(tensor: Any) -> Any:
    """This process's shard of a DTensor, or any other tensor itself. Waits for a pending collective of the tensor."""
    if _is_dtensor(tensor):
        tensor = tensor.to_local()
    return tensor.wait() if hasattr(tensor, "wait") else tensor


def _shards(param: Any) -> tuple[Tensor, Tensor]:
    """This process's shards of a parameter and of its gradient, in the same memory order."""
    grad = param.grad
    if grad.layout != torch.strided:
        raise RuntimeError(f"SGD takes dense gradients only, got layout {grad.layout} (sparse=True of an embedding?)")
    if _is_dtensor(grad) != _is_dtensor(param):
        raise TypeError(
            "a gradient must be a DTensor exactly if its parameter is one, "
            f"got a {type(grad).__name__} for a {type(param).__name__}"
        )
    if _is_dtensor(param) and (grad.device_mesh, grad.placements) != (param.device_mesh, param.placements):
        grad = grad.redistribute(param.device_mesh, param.placements)
    weight, grad = _local(param), _local(grad)
    if not is_dense(weight):
        raise ValueError(f"parameters must be dense in memory, got shape {tuple(weight.shape)} and strides {weight.stride()}")
    # One pointer that is not aligned to 16 bytes splits the kernel's accesses to all gradients into single elements. A view of
    # a DistributedDataParallel bucket is unaligned if it follows the bias of ten classes.
    if memory_order(grad) != memory_order(weight) or grad.data_ptr() % 16:
        grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
    return weight, grad
