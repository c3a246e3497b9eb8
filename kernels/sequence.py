"""A sequence of operations run as one: one plan, one autograd node, the host time of a single call.

A network's layers are nearly always called in the same order. Called separately, each layer looks up its plan, allocates its
outputs and creates an autograd node. Here the operations' launch functions, saved tensors and backward passes are composed in
one function, which is planned as a whole. Intermediate tensors that are not saved share one workspace.

The composition mirrors autograd: a :class:`_Context` stands for the ``ctx`` of each operation's Function, and a :class:`Tape`
stores the contexts' attributes without the tensors. To differentiate the gradients again, a graph with a node for each
operation is built from the tape.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .dropouts import draw_seed
from .runtime import plans
from .runtime.torch_interop import OperatorFunction, is_plain


class Stage(NamedTuple):
    """One operation of a sequence.

    Attributes:
        function: the operation's autograd Function.
        prepare: ``(tensors, options, needs_grad) -> problem``; checks the arguments. ``tensors`` are the Function's tensors.
        options: the operation's further arguments, passed to ``prepare``.
        tensors: for each tensor that the Function takes after its input, its index among the sequence's tensors, or None if it
            is absent. The link is not included.
        makes_link: whether the next stage takes this stage's link.
    """

    function: type[OperatorFunction]
    prepare: Callable[[Sequence[Tensor | None], Any, bool], Any]
    options: Hashable
    tensors: tuple[int | None, ...]
    makes_link: bool = False


class Hashed:
    """A value whose hash is computed once."""

    def __init__(self, value: Hashable) -> None:
        self.value = value
        self._hash = hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Hashed) and self.value == other.value)


class _Context:
    """Stands for the ``ctx`` of an operation's Function."""

    def __init__(self) -> None:
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Ignored: a missing gradient is always None here."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Ignored: operations that are differentiated one by one have an autograd node each."""


class _Record(NamedTuple):
    """What a stage's forward pass recorded for its backward pass.

    Attributes:
        attributes: names and values of the context's attributes, without the saved tensors.
        saved: indices of the stage's saved tensors among those of the sequence.
        needs: for each tensor of the Function, whether its gradient is wanted.
        output: index of the stage's output among the sequence's saved tensors; None if it was not saved.
        output_size: shape of the stage's output.
    """

    stage: Stage
    attributes: tuple[tuple[str, Hashable], ...]
    saved: tuple[int | None, ...]
    needs: tuple[bool, ...]
    output: int | None
    output_size: tuple[int, ...]


class Tape(NamedTuple):
    """What a sequence's backward pass needs besides tensors.

    Attributes:
        saved_inputs: indices of those of the sequence's tensors that are saved. Saved intermediate tensors come after them.
        unsaved_inputs: indices of the sequence's tensors whose gradients are wanted but whose values are not saved: biases, the
            input of a pool or a dropout.
    """

    records: tuple[_Record, ...]
    saved_inputs: tuple[int, ...]
    unsaved_inputs: tuple[int, ...]


class Sequenced(NamedTuple):
    """A sequence's problem: its stages, and whether its forward pass records for a backward pass."""

    stages: tuple[Stage, ...]
    records: bool


def _run_forward(*arguments: Any) -> tuple[Any, ...]:
    """Run the stages. Arguments: the tensors (the input first), then the problem. Returns output, tape, tensors to save."""
    *tensors, problem = arguments
    stages, recorded = problem.value
    x, link = tensors[0], None
    needs_input = recorded and x.requires_grad
    steps: list[tuple[Stage, _Context, tuple[bool, ...], Tensor]] = []
    for stage in stages:
        own = [None if i is None else tensors[i] for i in stage.tensors]
        needs = [recorded and t is not None and t.requires_grad for t in own]
        given = [x, *own, link] if stage.function.takes_link else [x, *own]
        needs_grad = needs_input or any(needs)
        of_stage = stage.prepare(given, stage.options, needs_grad)
        results = stage.function.operator.run(*given, of_stage)
        results = results if isinstance(results, tuple) else (results,)
        if recorded:
            context = _Context()
            stage.function.setup_context(context, (*given, of_stage), results if len(results) > 1 else results[0])
            of_link = [needs_input and link is not None] if stage.function.takes_link else []
            if link is not None:
                context.saved_tensors = (None, *context.saved_tensors[1:])  # the link, which carries no data
            steps.append((stage, context, (needs_input, *needs, *of_link), results[0]))
        x, link = results[0], results[1] if stage.makes_link and needs_grad else None
        needs_input = needs_grad
    tape, saved = _tape_of(steps, tensors)
    return x, tape, *saved


def _tape_of(
    steps: Sequence[tuple[Stage, _Context, tuple[bool, ...], Tensor]], tensors: Sequence[Tensor | None]
) -> tuple[Hashed, list[Tensor]]:
    """The tape of a forward pass, and the intermediate tensors to save, without duplicates."""
    of_inputs = {id(tensor): i for i, tensor in enumerate(tensors)}
    wanted = [t for _, context, needs, _ in steps if any(needs) for t in context.saved_tensors if t is not None]
    unique = list({id(t): t for t in wanted}.values())
    inputs = [t for t in unique if id(t) in of_inputs]
    made = [t for t in unique if id(t) not in of_inputs]
    places = {id(t): i for i, t in enumerate([*inputs, *made])}
    records = []
    for stage, context, needs, output in steps:
        attributes = tuple((name, value) for name, value in vars(context).items() if name != "saved_tensors")
        saved = tuple(None if t is None else places.get(id(t)) for t in context.saved_tensors)
        records.append(_Record(stage, attributes, saved, needs, places.get(id(output)), tuple(output.shape)))
    saved_inputs = tuple(of_inputs[id(t)] for t in inputs)
    needed = [i for r in records for i, need in zip(r.stage.tensors, r.needs[1:], strict=False) if i is not None and need]
    needed += [0] if records and records[0].needs[0] else []
    unsaved_inputs = tuple(i for i in needed if i not in saved_inputs)
    return Hashed(Tape(tuple(records), saved_inputs, unsaved_inputs)), made


def _run_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """Gradients of a sequence's tensors. Arguments: the output's gradient, the saved tensors, (tape, number of tensors)."""
    grad, *saved, (tape, count) = arguments
    gradients: list[Tensor | None] = [None] * count
    grad_link = None
    for record in reversed(tape.value.records):
        stage, attributes, places, needs, *_ = record
        if not any(needs):
            break
        context: Any = _Context()
        vars(context).update(attributes)
        context.saved_tensors = tuple(None if i is None else saved[i] for i in places)
        context.needs_input_grad = (*needs, False)
        results = stage.function.backward(context, grad, *[grad_link] * stage.function.gives_link)
        for i, result in zip(stage.tensors, results[1:], strict=False):
            if i is not None and result is not None:
                gradients[i] = result
        grad = results[0]
        grad_link = results[len(needs) - 1] if stage.function.takes_link else None
        if grad is None:
            break
    gradients[0] = grad
    return tuple(gradients)


class _RecordedFunction(torch.autograd.Function):
    """Autograd node of a single operation, rebuilt from what its sequence saved.

    Inputs: the tensors of the operation's Function (None for a tensor without a gradient), then (record, the sequence's saved
    tensors) in place of the problem.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *given, (record, saved) = inputs
        function = record.stage.function
        for name, value in record.attributes:
            setattr(ctx, name, value)
        own = [None if i is None else saved[i] for i in record.saved]
        if function.takes_link:
            own[0] = given[-1]
        ctx.save_for_backward(*own)
        ctx.set_materialize_grads(False)
        ctx.function = function
        # The values of an output that was not saved, and of a link, are never read.
        nothing = next(t for t in given if t is not None).new_zeros(())
        output = nothing.expand(record.output_size) if record.output is None else saved[record.output].detach()
        return (output, nothing.expand(record.output_size[1])) if function.gives_link else output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.function.backward(ctx, *grads)


def _differentiable_gradients(ctx: Any, saved: Sequence[Tensor], grad_output: Tensor) -> list[Tensor | None]:
    """The gradients of :func:`_run_backward`, computed through a graph with a node for each operation."""
    tape = ctx.tape.value
    needs = ctx.needs_input_grad[1:]
    create_graph = torch.is_grad_enabled()
    gradients: list[Tensor | None] = [None] * len(needs)
    with torch.enable_grad():
        known = dict(zip(tape.saved_inputs, saved, strict=False)) | dict(zip(tape.unsaved_inputs, ctx.unsaved, strict=True))
        # Views, because one tensor may be computed from another, whose gradient must not include the first one's share.
        own = {i: tensor.view_as(tensor) for i, tensor in known.items() if needs[i]}
        values = [own.get(i, value) for i, value in zip(tape.saved_inputs, saved, strict=False)]
        values += saved[len(values) :]
        y, link = own.get(0), None
        for record in tape.records:
            if any(record.needs):
                function = record.stage.function
                tensors = [y, *map(own.get, record.stage.tensors), *[link] * function.takes_link]
                outputs = _apply_recorded(*tensors, (record, values))
                y, link = outputs if function.gives_link else (outputs, None)
                link = link if record.stage.makes_link else None
                if record.output is not None:
                    values[record.output] = y
        assert y is not None
        found = torch.autograd.grad(y, list(own.values()), grad_output, create_graph=create_graph, allow_unused=True)
    for i, gradient in zip(own, found, strict=True):
        gradients[i] = gradient
    return gradients


class SequenceFunction(torch.autograd.Function):
    """A sequence of operations. Its first input is (problem, number of seeds, plan found by :func:`run`), then the tensors."""

    @staticmethod
    def forward(ctx: Any, known: tuple[Hashed, int, Any], *tensors: Tensor | None) -> Tensor:
        problem, seeds, found = known
        y, tape, *made = _run(_run_forward, tensors, problem, found, seeds)
        ctx.save_for_backward(*[tensors[i] for i in tape.value.saved_inputs], *made)
        ctx.unsaved = [tensors[i] for i in tape.value.unsaved_inputs]
        ctx.tape = tape
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return None, *_differentiable_gradients(ctx, saved, grad_output)
        tensors = (grad_output, *saved)
        problem = (ctx.tape, len(ctx.needs_input_grad) - 1)
        found = plans.find(_run_backward, tensors, problem)
        if found is None and not is_plain(tensors):
            # As in autograd: each operation's backward pass separately, through PyTorch's dispatcher.
            return None, *_run_backward(*tensors, problem)
        return None, *_run(_run_backward, tensors, problem, found)


# The C function that Function.apply calls where no functorch transform is active.
_apply = super(torch.autograd.Function, SequenceFunction).apply
_apply_recorded = super(torch.autograd.Function, _RecordedFunction).apply


def _run(function: Callable[..., Any], tensors: Sequence[Tensor | None], problem: Hashable, found: Any, fresh: int = 0) -> Any:
    if found is None:
        return plans.call(function, tensors, problem, fresh=fresh)
    plan, inputs, addresses = found
    return plan.run(inputs, addresses)


def run(recorded: Hashed, unrecorded: Hashed, tensors: list[Tensor | None], seeds: int) -> Tensor | None:
    """The output of a sequence, or None where its operations have to be called one by one.

    Args:
        recorded, unrecorded: the sequence's problem, a :class:`Sequenced`, with and without recording for a backward pass.
        tensors: the input, then the stages' tensors without seeds.
        seeds: number of seeds that the stages take; they are drawn here and become the last tensors.
    """
    problem = unrecorded
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                problem = recorded
                break
    found = plans.find(_run_forward, tensors, problem)
    if found is None and not is_plain(tensors):
        return None
    if seeds:
        assert tensors[0] is not None
        drawn = [draw_seed(tensors[0].device, None) for _ in range(seeds)]
        tensors += drawn
        if found is not None:
            _, inputs, addresses = found
            inputs += drawn
            addresses += [seed.data_ptr() for seed in drawn]
    if problem is recorded:
        return _apply((problem, seeds, found), *tensors)
    return _run(_run_forward, tensors, problem, found, seeds)[0]
