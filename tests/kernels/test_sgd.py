"""The optimizer's kernel on lists of tensors: values, what one launch takes, errors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

import kernels
from kernels.configs import tables
from kernels.runtime import launch
from kernels.runtime.backend import INTERPRETED
from kernels.sgd import (
    MAX_TENSORS,
    is_dense,
    join_master,
    memory_order,
    sgd_step,
    sgd_step_reference,
    split_master,
)

from ..conftest import DEVICE, UNDER_TTSEM

#: One element, fewer than a block's alignment, ragged ends, whole blocks, an empty tensor.
SHAPES = [(10,), (1,), (12, 7, 3, 3), (0,), (32, 16), (21, 5), (500,)]

HALF = [torch.bfloat16, torch.float16]


def settings() -> list[dict[str, Any]]:
    """Every combination of options that SGD allows."""
    names = ("momentum", "dampening", "nesterov", "weight_decay", "maximize")
    values = itertools.product((0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.05), (False, True))
    combined = [dict(zip(names, chosen, strict=True)) for chosen in values]
    return [c for c in combined if not (c["nesterov"] and (c["momentum"] == 0 or c["dampening"] != 0))]


def name(setting: dict[str, Any]) -> str:
    return "-".join(key for key, value in setting.items() if value) or "plain"


def make(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def masters_of(params: list[Tensor]) -> list[Tensor]:
    """Float32 weights that round to the parameters but differ from them."""
    ulp = torch.finfo(params[0].dtype).eps
    return [p.float() * (1 + 0.2 * ulp * torch.rand(p.shape, device=p.device)) for p in params]


def split(masters: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, missing bits and tie flags of float32 masters."""
    bits = [torch.empty_like(m, dtype=torch.int16) for m in masters]
    ties = [torch.empty_like(m, dtype=torch.int8) for m in masters]
    for each in zip(masters, bits, ties, strict=True):
        split_master(*each)
    return [m.bfloat16() for m in masters], bits, ties


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    """Check that all bits are equal, the signs of zeros too, except a NaN's payload."""
    integer = torch.int16 if ours.dtype == torch.bfloat16 else torch.int32
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours.view(integer)[~nan], theirs.view(integer)[~nan])


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("setting", settings(), ids=name)
def test_float32_is_torch_sgd_bit_for_bit(setting: dict[str, Any]) -> None:
    params = make(torch.float32)
    expected = [torch.nn.Parameter(p.clone()) for p in params]
    theirs = torch.optim.SGD(expected, lr=0.1, **setting, foreach=False)
    buffers = [torch.full_like(p, torch.nan) for p in params] if setting["momentum"] else None
    for step in range(3):
        grads = make(torch.float32)
        grads[2][:, 0] = 0.0  # the sign of a zero
        for p, g in zip(expected, grads, strict=True):
            p.grad = g.clone()
        theirs.step()
        sgd_step(params, grads, None, buffers, lr=0.1, first_step=step == 0, **setting)
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(torch.signbit(p), torch.signbit(q))
    for b, q in zip(buffers or [], expected if buffers else [], strict=True):
        assert torch.equal(b, theirs.state[q]["momentum_buffer"])
        assert torch.equal(torch.signbit(b), torch.signbit(theirs.state[q]["momentum_buffer"]))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("grad_dtype", [None, torch.float32], ids=["grad-as-param", "grad-float32"])
def test_half_precision_is_a_float32_step_rounded(dtype: torch.dtype, grad_dtype: torch.dtype | None) -> None:
    params = make(dtype)
    masters = masters_of(params)
    buffers = make(torch.float32)
    grads = make(grad_dtype or dtype)
    weights, their_buffers = clones(masters), clones(buffers)
    setting = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    sgd_step(weights, [g.float() for g in grads], None, their_buffers, **setting)
    sgd_step(params, grads, masters, buffers, **setting)
    for i, p in enumerate(params):
        assert torch.equal(masters[i], weights[i])
        assert torch.equal(buffers[i], their_buffers[i])
        assert torch.equal(p, weights[i].to(dtype))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("setting", settings()[::5], ids=name)
def test_kernel_and_reference_agree(dtype: torch.dtype, setting: dict[str, Any]) -> None:
    params, grads, buffers = make(dtype), make(dtype), make(torch.float32)
    masters = masters_of(params) if dtype != torch.float32 else None
    if masters is not None:
        params[2][3] = 7.0  # set from outside: no master rounds to it
    copies = [clones(t) if t is not None else [None] * len(params) for t in (params, grads, masters, buffers)]
    for p, g, m, b in zip(*copies, strict=True):
        b = b if setting["momentum"] else None
        sgd_step_reference(p, g, m, b, lr=0.1, first_step=False, **setting)
    sgd_step(params, grads, masters, buffers if setting["momentum"] else None, lr=0.1, **setting)
    for ours, reference in zip((params, masters, buffers), (copies[0], copies[2], copies[3]), strict=True):
        for a, b in zip(ours or [], reference if ours else [], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALF)
def test_a_weight_set_from_outside_becomes_its_master(dtype: torch.dtype) -> None:
    (param,) = make(dtype, [(100,)])
    (master,) = masters_of([param])
    before = master.clone()
    param[40:50] = torch.linspace(3, 4, 10, device=DEVICE).to(dtype)
    param[50] = torch.nan
    given = param.clone()
    sgd_step([param], [torch.zeros_like(param)], [master], lr=0.1)
    assert torch.equal(master[40:50], given[40:50].float())
    assert torch.isnan(master[50])
    assert torch.isnan(param[50])
    kept = [*range(40), *range(51, 100)]
    assert torch.equal(master[kept], before[kept])
    assert not torch.equal(before[kept], given[kept].float())  # otherwise keeping them would show nothing


#: Upper halves of float32 of both signs: zeros, subnormals, odd and even ones, the largest finite number, infinities, NaN.
UPPER = [sign | high for sign in (0, 0x8000) for high in (0, 1, 2, 0x7F, 0x80, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F, 0x7F80, 0x7FC1)]


def with_every_lower_half(upper: int) -> Tensor:
    return torch.from_numpy((np.arange(2**16, dtype=np.uint32) | upper << 16).view(np.float32)).to(DEVICE)


@pytest.mark.parametrize("upper", UPPER, ids=hex)
def test_a_parameter_and_its_missing_bits_are_the_master(upper: int) -> None:
    master = with_every_lower_half(upper)
    (param,), (bits,), (ties,) = split([master])
    assert_same_bits(join_master(param, bits, ties), master)


@pytest.mark.parametrize("upper", UPPER, ids=hex)
def test_the_kernel_joins_and_splits_as_the_reference(upper: int) -> None:
    """The step adds -0, which changes only -0."""
    if INTERPRETED and 0 < (upper + 1) & 0x7FFF <= 0x80 and upper & 0x7FFF != 0x7FFF:
        pytest.skip("the interpreter converts bfloat16's subnormals wrongly")
    master = with_every_lower_half(upper)
    params, bits, ties = split([master])
    expected = master + 0.0
    sgd_step(params, [torch.zeros_like(params[0])], bits, lr=1.0, ties=ties, maximize=True)
    assert_same_bits(params[0], expected.bfloat16())
    assert_same_bits(join_master(params[0], bits[0], ties[0]), expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("setting", settings(), ids=name)
def test_missing_bits_make_the_steps_of_float32_masters(setting: dict[str, Any], backend: Any) -> None:
    """Gradients of few bits and weights near 1, so that many masters lie midway between two bfloat16 numbers."""
    shapes = [(500,), (1,), (21, 5)]
    weights = [1 + torch.randint(256, shape, device=DEVICE).float() / 256 for shape in shapes]
    their_params, masters = [w.bfloat16() for w in weights], clones(weights)
    params, bits, ties = split(weights)
    buffers = [torch.full_like(w, torch.nan) for w in weights] if setting["momentum"] else None
    their_buffers = clones(buffers) if buffers else None
    exact = {key: value and (0.5 if key in ("momentum", "dampening") else value) for key, value in setting.items()}
    rounded_up = rounded_down = 0
    for step in range(5):
        grads = [(torch.randint(-8, 9, shape, device=DEVICE) / 128).bfloat16() for shape in shapes]
        arguments = {"lr": 0.125, "first_step": step == 0, **exact, "weight_decay": float(setting["weight_decay"] > 0)}
        with kernels.use_backend(backend):
            sgd_step(their_params, grads, masters, their_buffers, **arguments)
            sgd_step(params, grads, bits, buffers, ties=ties, **arguments)
        for param, bit, tie, theirs, master in zip(params, bits, ties, their_params, masters, strict=True):
            assert_same_bits(param, theirs)
            assert_same_bits(join_master(param, bit, tie), master)
            middle = bit == -0x8000
            rounded_up += int((middle & (tie == 1)).sum())
            rounded_down += int((middle & (tie == 0)).sum())
    assert all(map(torch.equal, buffers or [], their_buffers or []))
    assert rounded_up > 0
    assert rounded_down > 0


@pytest.mark.slow
def test_thousands_of_steps_are_those_of_float32_masters() -> None:
    master = torch.randn(1000, device=DEVICE) * torch.logspace(-30, 30, 1000, device=DEVICE)
    (param,), (bits,), (ties,) = split([master])
    theirs, buffer = param.clone(), torch.zeros_like(master)
    their_buffer = buffer.clone()
    scale = master.abs()
    for _ in range(20 if UNDER_TTSEM else 1000):
        grad = torch.randn(1000, device=DEVICE) * scale
        values = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
        sgd_step([theirs], [grad], [master], [their_buffer], **values)
        sgd_step([param], [grad], [bits], [buffer], **values, ties=[ties])
    assert_same_bits(param, theirs)
    assert_same_bits(join_master(param, bits, ties), master)
    assert torch.equal(buffer, their_buffer)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_weight_set_from_outside_keeps_its_missing_bits(backend: Any) -> None:
    """The joined master rounds to the parameter, for any bits; where no bits allow this, the master is the parameter."""
    before = torch.randint(-(2**31), 2**31, (3, 4096), dtype=torch.int64, device=DEVICE).int().view(torch.float32)
    _, bits, ties = split([before.nan_to_num()])
    bits[0][0, ::2] = -0x8000
    param = torch.randn(3, 4096, device=DEVICE).bfloat16()
    param[1], param[2, :2048], param[2, 2048:] = 0.0, torch.inf, torch.nan
    given = param.clone()
    joined = join_master(param, bits[0], ties[0])
    assert_same_bits(joined.bfloat16(), given)
    assert (joined[0] != given[0]).float().mean() > 0.7
    with kernels.use_backend(backend):
        sgd_step([param], [torch.zeros_like(param)], bits, lr=0.1, ties=ties)
    assert_same_bits(param, given)
    assert torch.equal(join_master(param, bits[0], ties[0]).nan_to_num(), joined.nan_to_num())


def test_nan_and_infinity_stay_where_they_are() -> None:
    (param,), (grad,) = make(torch.bfloat16, [(64,)]), make(torch.bfloat16, [(64,)])
    master = param.float()
    grad[3], grad[5] = torch.nan, torch.inf
    sgd_step([param], [grad], [master], lr=0.1)
    assert torch.isnan(param).nonzero().flatten().tolist() == [3]
    assert torch.isinf(param).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_learning_rate_in_memory_counts_as_the_number(dtype: torch.dtype) -> None:
    params, grads = make(torch.float32), make(torch.float32)
    copies = clones(params)
    lr = torch.tensor(0.1, dtype=dtype, device=DEVICE)
    sgd_step(params, grads, lr=lr)
    sgd_step(copies, grads, lr=lr.item())
    assert all(map(torch.equal, params, copies))
    assert lr.item() == torch.tensor(0.1, dtype=dtype).item()


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.array])
def test_a_launch_gets_pythons_numbers_for_numpys(kind: Any) -> None:
    params, grads, buffers = (make(torch.float32) for _ in range(3))
    copies, their_buffers = clones(params), clones(buffers)
    numbers = {"lr": kind(0.1), "momentum": kind(0.9), "dampening": kind(0.6), "weight_decay": kind(0.05)}
    arguments: dict[str, Any] = {}
    with launch.observe_launches(lambda _, grid, given: arguments.update(given, grid=grid)):
        sgd_step(params, grads, None, buffers, **numbers, nesterov=np.False_, maximize=np.True_, first_step=np.False_)
    values = [value for given in arguments.values() for value in (given if isinstance(given, tuple) else (given,))]
    assert {type(value) for value in values} <= {Tensor, int, float, bool, type(None)}
    sgd_step(copies, grads, None, their_buffers, **{name: float(value) for name, value in numbers.items()}, maximize=True)
    assert all(map(torch.equal, [*params, *buffers], [*copies, *their_buffers]))


def test_one_launch_up_to_the_limit(launches: list[str]) -> None:
    params, grads = make(torch.float32, [(3,)] * MAX_TENSORS), make(torch.float32, [(3,)] * MAX_TENSORS)
    sgd_step(params, grads, lr=0.1)
    assert launches == ["_sgd_kernel"]


def test_more_tensors_than_one_launch_takes(launches: list[str]) -> None:
    shapes = [(i % 7 + 1,) for i in range(2 * MAX_TENSORS + 1)]
    params, grads = make(torch.bfloat16, shapes), make(torch.bfloat16, shapes)
    masters = [p.float() for p in params]
    expected = [p.float() - 0.5 * g.float() for p, g in zip(params, grads, strict=True)]
    sgd_step(params, grads, masters, lr=0.5)  # half of a gradient is exact, so fma changes nothing
    assert launches == ["_sgd_kernel"] * 3
    assert all(map(torch.equal, masters, expected))


def test_nothing_to_do_launches_nothing(launches: list[str]) -> None:
    sgd_step([], [], lr=0.1)
    sgd_step(make(torch.float32, [(0,), (3, 0)]), make(torch.float32, [(0,), (3, 0)]), lr=0.1)
    assert launches == []


def test_int64_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    params, grads = make(torch.float32), make(torch.float32)
    copies = clones(params)
    sgd_step(copies, grads, lr=0.1)
    monkeypatch.setattr(launch, "force_int64", True)
    with tables.override(BLOCK=64):
        sgd_step(params, grads, lr=0.1)
    assert all(map(torch.equal, params, copies))


def test_unaligned_tensors() -> None:
    """Addresses that vector accesses cannot use: views that start one element into their storage."""
    storage, gradient = torch.randn(5001, device=DEVICE), torch.randn(5001, device=DEVICE)
    before = storage.clone()
    params, grads = [storage[1:2001], storage[2002:]], [gradient[1:2001], gradient[2002:]]
    expected = clones(params)
    for p, g in zip(expected, grads, strict=True):
        p.add_(g, alpha=-0.1)
    sgd_step(params, grads, lr=0.1)
    assert all(map(torch.equal, params, expected))
    assert storage[0] == before[0]
    assert storage[2001] == before[2001]


def test_a_saved_parameter_is_known_to_have_changed() -> None:
    """A backward pass that needs the old value raises, as after any in-place operation."""
    weight = torch.randn(4, 4, device=DEVICE, requires_grad=True)
    x = torch.randn(2, 4, device=DEVICE, requires_grad=True)
    y = (x @ weight).sum()
    sgd_step([weight], [torch.ones_like(weight)], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.skipif(not INTERPRETED, reason="guards the interpreter's memory")
def test_the_guard_sees_tensors_in_tuples() -> None:
    """An access beyond a tensor inside a tuple argument is an error; the launch is given a wrong size."""
    from kernels import sgd

    (param,), (grad,) = make(torch.float32, [(100,)]), make(torch.float32, [(100,)])
    arguments: dict[str, Any] = {}
    with launch.record_launches(lambda _, grid, given: arguments.update(given, grid=grid)):
        sgd_step([param], [grad], lr=0.1)
    grid = arguments.pop("grid")
    launch.launch(sgd._sgd_kernel, grid, **arguments)
    with pytest.raises(InterpreterError, match="1 of 101 addresses of a load are outside of every tensor"):
        launch.launch(sgd._sgd_kernel, grid, **arguments | {"elements": (101,)})


def test_strides_that_matter() -> None:
    x = torch.empty(6, 1, 4, 5)
    assert memory_order(x) == memory_order(x.to(memory_format=torch.channels_last)) == (20, 5, 1)
    assert memory_order(torch.empty(2, 3).t()) != memory_order(torch.empty(3, 2))
    dense = [x, torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.empty(2, 3).t(), torch.empty(()), x[:0]]
    assert all(map(is_dense, dense))
    gaps = [torch.empty(4, 4)[:, ::2], torch.empty(3).expand(2, 3), torch.empty(4, 4)[:2, :2]]
    assert not any(map(is_dense, gaps))


def test_a_lazily_negated_gradient_has_the_sign_it_says() -> None:
    (param,) = make(torch.float32, [(5,)])
    before, grad = param.clone(), torch._neg_view(torch.ones(5, device=DEVICE))
    sgd_step([param], [grad], lr=torch._neg_view(torch.full((), -0.5, device=DEVICE)))
    assert torch.equal(param, before + 0.5)


class TestRefused:
    """Nothing is launched, and the message names the argument."""

    @pytest.fixture(autouse=True)
    def _nothing_launched(self, launches: list[str]) -> Any:
        yield
        assert launches == []

    def test_dtypes(self) -> None:
        half, single, double = (make(d, [(3,)]) for d in (torch.bfloat16, torch.float32, torch.float64))
        with pytest.raises(TypeError, match=r"params must be float32, float16 or bfloat16, got torch\.float64"):
            sgd_step(double, double, lr=0.1)
        with pytest.raises(TypeError, match=r"grads must be float32, float16 or bfloat16, got torch\.float64"):
            sgd_step(single, double, lr=0.1)
        with pytest.raises(TypeError, match=r"params\[1\] must be torch\.float32, got torch\.bfloat16"):
            sgd_step([*single, *half], [*single, *single], lr=0.1)
        with pytest.raises(TypeError, match="masters must be given if and only if params are"):
            sgd_step(half, half, lr=0.1)
        with pytest.raises(TypeError, match="masters must be given if and only if params are"):
            sgd_step(single, single, single, lr=0.1)
        with pytest.raises(TypeError, match=r"masters\[0\] must be torch\.float32"):
            sgd_step(half, half, half, lr=0.1)
        bits, ties = ([t.to(dtype) for t in half] for dtype in (torch.int16, torch.int8))
        with pytest.raises(TypeError, match=r"masters\[0\] must be torch\.int16"):
            sgd_step(half, half, single, lr=0.1, ties=ties)
        with pytest.raises(TypeError, match=r"ties\[0\] must be torch\.int8"):
            sgd_step(half, half, bits, lr=0.1, ties=bits)
        with pytest.raises(TypeError, match="masters must be given if and only if params are"):
            sgd_step(half, half, lr=0.1, ties=ties)
        with pytest.raises(TypeError, match=r"ties must be given for bfloat16 params only, got torch\.float16"):
            sgd_step(make(torch.float16, [(3,)]), half, bits, lr=0.1, ties=ties)

    @pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay"])
    @pytest.mark.parametrize("value", ["0.1", None, 1j, np.zeros(1)], ids=repr)
    def test_what_is_no_number(self, name: str, value: Any) -> None:
        tensors = make(torch.float32, [(3,)])
        with pytest.raises(TypeError, match=f"{name} must be a number, got"):
            sgd_step(tensors, tensors, **({"lr": 0.1} | {name: value}))

    def test_momentum_without_buffers(self) -> None:
        tensors = make(torch.float32, [(3,)])
        with pytest.raises(ValueError, match="momentum_buffers must be given if and only if"):
            sgd_step(tensors, tensors, lr=0.1, momentum=0.9)
        with pytest.raises(ValueError, match="momentum_buffers must be given if and only if"):
            sgd_step(tensors, tensors, None, tensors, lr=0.1)

    def test_shapes_strides_and_lengths(self) -> None:
        tensors = make(torch.float32, [(3, 2)])
        with pytest.raises(ValueError, match=r"grads must have one tensor for each of the 1 params, got 0"):
            sgd_step(tensors, [], lr=0.1)
        with pytest.raises(ValueError, match=r"grads\[0\] must have the shape and strides of params\[0\], \(3, 2\)"):
            sgd_step(tensors, make(torch.float32, [(6,)]), lr=0.1)
        with pytest.raises(ValueError, match=r"grads\[0\] must have the shape and strides"):
            sgd_step(tensors, [make(torch.float32, [(2, 3)])[0].t()], lr=0.1)
        gaps = [make(torch.float32, [(4, 4)])[0][:, ::2]]
        with pytest.raises(ValueError, match=r"params\[0\] must be dense in memory"):
            sgd_step(gaps, gaps, lr=0.1)

    def test_lazily_negated(self) -> None:
        tensors = make(torch.float32, [(3,)])
        with pytest.raises(ValueError, match=r"params\[0\] must not be lazily negated"):
            sgd_step([torch._neg_view(t) for t in tensors], tensors, lr=0.1)

    @pytest.mark.skipif(UNDER_TTSEM, reason="ttsem only pretends that tensors are on a GPU")
    def test_devices(self) -> None:
        tensors = make(torch.float32, [(3,)])
        meta = [t.to("meta") for t in tensors]
        with pytest.raises(ValueError, match=r"grads\[0\] must be on the device of params\[0\]"):
            sgd_step(tensors, meta, lr=0.1)
        with pytest.raises(ValueError, match="lr must be on the device of params"):
            sgd_step(tensors, tensors, lr=torch.tensor(0.1, device="meta"))
        with pytest.raises(ValueError, match="lr must be a number or a tensor of one element"):
            sgd_step(tensors, tensors, lr=torch.ones(2))
