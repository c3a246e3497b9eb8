"""A handler that catches PyTorch's error for a bad call catches ours: PyTorch's type is a base of ours in every case."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from alexnet_triton import fuse
from kernels.runtime.arguments import ArgumentTypeError, ArgumentValueError

from ..conftest import DEVICE, UNDER_TTSEM

#: A call of a function of ``module`` (F or kernels) on tensors that ``randn`` makes on the suite's device.
Call = Callable[[Any, Callable[..., Tensor]], object]


def _x(r: Callable[..., Tensor]) -> Tensor:
    return r(2, 4, 7, 6)


def _w(r: Callable[..., Tensor]) -> Tensor:
    return r(6, 4, 3, 2)


def _conv(**options: Any) -> Call:
    return lambda f, r: f.conv2d(_x(r), _w(r), **options)


def _pool(**options: Any) -> Call:
    return lambda f, r: f.max_pool2d(_x(r), **{"kernel_size": 3, **options})


def _dropout(*arguments: Any) -> Call:
    return lambda f, r: f.dropout(_x(r), *arguments)


#: Values that are no size in pixels: neither stride, padding nor dilation takes them.
NO_SIZES: dict[str, Any] = {
    "negative": -1,
    "float": 1.5,
    "bool": True,
    "str": "a",
    "three": (1, 1, 1),
    "second_negative": (1, -1),
    "second_float": (1, 1.5),
    "second_none": (1, None),
    "first_str": ("a", 1),
    "nested": [[1], [1]],
    "set": {1, 2},
    "array": np.array([1, 1]),
    "tensor": torch.tensor([1, 1]),
    "numpy_float": np.float32(1),
    "huge": 10**30,
}

CALLS: dict[str, Call] = {
    "conv_rank_2": lambda f, r: f.conv2d(r(9, 7), _w(r)),
    "conv_rank_5": lambda f, r: f.conv2d(r(1, 2, 4, 7, 6), _w(r)),
    "conv_scalar": lambda f, r: f.conv2d(r(), _w(r)),
    "conv_weight_rank_3": lambda f, r: f.conv2d(_x(r), r(4, 3, 2)),
    "conv_weight_rank_5": lambda f, r: f.conv2d(_x(r), r(1, 6, 4, 3, 2)),
    "conv_channels": lambda f, r: f.conv2d(r(2, 5, 7, 6), _w(r)),
    "conv_no_filters": lambda f, r: f.conv2d(_x(r), r(0, 4, 3, 2)),
    "conv_empty_filter": lambda f, r: f.conv2d(_x(r), r(6, 4, 0, 2)),
    "conv_empty_image": lambda f, r: f.conv2d(r(2, 4, 0, 6), _w(r), padding=2),
    "conv_too_small": lambda f, r: f.conv2d(_x(r), r(6, 4, 8, 2)),
    "conv_bias_length": lambda f, r: f.conv2d(_x(r), _w(r), r(5)),
    "conv_bias_rank": lambda f, r: f.conv2d(_x(r), _w(r), r(1, 6)),
    "conv_same_strided": _conv(padding="same", stride=2),
    **{f"conv_groups_{name}": _conv(groups=g) for name, g in {"0": 0, "-1": -1, "3": 3, "float": 1.0, "bool": True}.items()},
    **{f"conv_{o}_{name}": _conv(**{o: v}) for o in ("stride", "padding", "dilation") for name, v in NO_SIZES.items()},
    **{
        f"conv_{o}_{name}": _conv(**{o: v})
        for o in ("stride", "dilation")
        for name, v in {"0": 0, "none": None, "empty": []}.items()
    },
    "pool_rank_2": lambda f, r: f.max_pool2d(r(9, 7), 2),
    "pool_rank_5": lambda f, r: f.max_pool2d(r(1, 2, 4, 7, 6), 2),
    "pool_no_channels": lambda f, r: f.max_pool2d(r(2, 0, 7, 6), 2),
    "pool_empty_image": lambda f, r: f.max_pool2d(r(2, 4, 0, 6), 2),
    "pool_too_small": _pool(kernel_size=8),
    "pool_padding_over_half": _pool(padding=2),
    "pool_padding_over_half_dilated": _pool(padding=2, dilation=2),
    "pool_ceil_mode": _pool(ceil_mode=1),
    **{
        f"pool_{o}_{name}": _pool(**{o: v})
        for o in ("kernel_size", "stride", "padding", "dilation")
        for name, v in NO_SIZES.items()
    },
    **{f"pool_{o}_0": _pool(**{o: 0}) for o in ("kernel_size", "stride", "dilation")},
    "linear_scalar": lambda f, r: f.linear(r(), r(3, 7)),
    "linear_weight_rank": lambda f, r: f.linear(r(5, 7), r(1, 3, 7)),
    "linear_features": lambda f, r: f.linear(r(5, 6), r(3, 7)),
    "linear_features_of_one_row": lambda f, r: f.linear(r(6), r(3, 7)),
    "linear_bias_length": lambda f, r: f.linear(r(5, 7), r(3, 7), r(2)),
    "linear_bias_rank": lambda f, r: f.linear(r(5, 7), r(3, 7), r(1, 1, 3)),
    "linear_bias_of_a_vector": lambda f, r: f.linear(r(5, 7), r(7), r()),
    "dropout_p_negative": _dropout(-0.1),
    "dropout_p_over_1": _dropout(1.5),
    "dropout_p_over_1_at_rest": _dropout(1.5, False),
    "dropout_p_nan": _dropout(float("nan")),
    "dropout_p_numpy": _dropout(np.float32(2)),
    "dropout_p_str": _dropout("a"),
    "dropout_p_none": _dropout(None),
    "dropout_p_complex": _dropout(1j),
    "dropout_training": _dropout(0.5, 1),
}


def _mixed(dtype: torch.dtype) -> dict[str, Call]:
    """Calls with one tensor of ``dtype`` and the others in float32."""
    name = str(dtype).removeprefix("torch.")
    return {
        f"conv_input_{name}": lambda f, r: f.conv2d(_x(r).to(dtype), _w(r)),
        f"conv_weight_{name}": lambda f, r: f.conv2d(_x(r), _w(r).to(dtype)),
        f"conv_bias_{name}": lambda f, r: f.conv2d(_x(r), _w(r), r(6).to(dtype)),
        f"linear_input_{name}": lambda f, r: f.linear(r(5, 7).to(dtype), r(3, 7)),
        f"linear_weight_{name}": lambda f, r: f.linear(r(5, 7), r(3, 7).to(dtype)),
        f"linear_bias_{name}": lambda f, r: f.linear(r(5, 7), r(3, 7), r(3).to(dtype)),
    }


def _not_a_tensor(name: str, value: Any) -> dict[str, Call]:
    """Calls with ``value`` in place of one tensor."""
    return {
        f"conv_input_{name}": lambda f, r: f.conv2d(value, _w(r)),
        f"conv_weight_{name}": lambda f, r: f.conv2d(_x(r), value),
        f"pool_input_{name}": lambda f, r: f.max_pool2d(value, 2),
        f"linear_input_{name}": lambda f, r: f.linear(value, r(3, 7)),
        f"linear_weight_{name}": lambda f, r: f.linear(r(5, 7), value),
        f"dropout_input_{name}": lambda f, r: f.dropout(value),
    }


for _dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool):
    CALLS |= _mixed(_dtype)
for _name, _value in {"none": None, "int": 3, "list": [1.0], "array": np.ones((2, 4, 7, 6), np.float32)}.items():
    CALLS |= _not_a_tensor(_name, _value)

#: Dtypes, layouts and devices that PyTorch refuses on the CPU.
ON_THE_CPU: dict[str, Call] = {
    "pool_bool": lambda f, r: f.max_pool2d(_x(r).bool(), 2),
    "pool_complex": lambda f, r: f.max_pool2d(_x(r).to(torch.complex64), 2),
    "conv_bool": lambda f, r: f.conv2d(_x(r).bool(), _w(r).bool()),
    "linear_bool": lambda f, r: f.linear(r(5, 7).bool(), r(3, 7).bool()),
    "dropout_int": lambda f, r: f.dropout(_x(r).long()),
    "conv_sparse": lambda f, r: f.conv2d(_x(r).to_sparse(), _w(r)),
    "pool_sparse": lambda f, r: f.max_pool2d(_x(r).to_sparse(), 2),
    "dropout_sparse": lambda f, r: f.dropout(_x(r).to_sparse()),
    "linear_bias_on_meta": lambda f, r: f.linear(r(5, 7), r(3, 7), r(3).to("meta")),
}
if torch.__version__ < (2, 15):  # from then on PyTorch drops complex numbers, the real and the imaginary part together
    ON_THE_CPU["dropout_complex"] = lambda f, r: f.dropout(_x(r).to(torch.complex64))


def _randn(*size: int) -> Tensor:
    return torch.randn(size, device=DEVICE)


def _error(call: Call, module: Any) -> Exception | None:
    try:
        call(module, _randn)
    except Exception as error:  # of any type
        return error
    return None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy 1 warns of its bool as an index
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", CALLS | (ON_THE_CPU if DEVICE == "cpu" else {}))
def test_what_catches_pytorchs_error_catches_ours(name: str, backend: Any, launches: list[str]) -> None:
    call = (CALLS | ON_THE_CPU)[name]
    theirs = _error(call, F)
    assert theirs is not None
    with kernels.use_backend(backend):
        ours = _error(call, kernels)
    assert isinstance(ours, type(theirs)), f"{type(theirs).__name__}: {theirs}"
    assert isinstance(ours, (TypeError, ValueError))
    assert launches == []


BLOCKS: dict[str, Call] = {
    "channels": lambda f, r: f(r(2, 5, 7, 6), _w(r), None),
    "dtype": lambda f, r: f(_x(r).half(), _w(r), None),
    "too_small": lambda f, r: f(r(2, 4, 3, 3), _w(r), None),
    "rank": lambda f, r: f(r(7, 6), _w(r), None),
    "bias": lambda f, r: f(_x(r), _w(r), r(5)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_fused_blocks_errors_are_those_of_its_parts(name: str) -> None:
    def ours(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return kernels.conv2d_relu_max_pool2d(x, w, b, pool_kernel_size=2)

    def parts(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.max_pool2d(F.conv2d(x, w, b).relu(), 2)

    assert isinstance(_error(BLOCKS[name], ours), type(_error(BLOCKS[name], parts)))


@pytest.mark.skipif(UNDER_TTSEM, reason="nothing is launched")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(2, 4, 13, 13), (2, 3, 4, 4), (2, 3, 20, 20), (3, 3)])
def test_a_fused_network_is_caught_where_the_plain_one_is(shape: tuple[int, ...], grad: bool) -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(72, 10), nn.ReLU(), nn.Dropout(0.5))
    ).to(DEVICE)
    x = _randn(*shape)
    for each in (net, fuse(copy.deepcopy(net))):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError):
            each(x)


@pytest.mark.parametrize("kind", [ArgumentValueError, ArgumentTypeError])
def test_an_error_goes_to_another_process(kind: type[Exception]) -> None:
    loaded = pickle.loads(pickle.dumps(kind("input has 5 channels")))  # our own
    assert type(loaded) is kind
    assert str(loaded) == "input has 5 channels"
