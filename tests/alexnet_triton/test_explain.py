"""explain: which operation each layer runs as, and why a layer is not fused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_triton import Explanation, FusedSequential, explain, fuse, reference_alexnet

from ..conftest import DEVICE
from .command import run_here


class Custom(nn.Conv2d):
    """A subclass of a convolution."""


class Trunk(nn.Module):
    """A Sequential beside layers that ``forward`` calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()
        self.rest = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        return self.rest(F.relu(self.first(x))) * (2 if twice else 1)


class Looking(nn.Module):
    """A ``forward`` that branches on its input's values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x)) if x.sum() > 0 else x


class OwnForward(nn.Sequential):
    """A Sequential whose ``forward`` does more than call its layers in turn."""

    def forward(self, x):
        return super().forward(x) + 1


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def replaced(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: x
    return layer


def lines(module: nn.Module) -> list[tuple[str, str | None, str]]:
    """(layers, operation, note) of each run."""
    paths = [".".join(filter(None, (run.container, "-".join(run.layers)))) for run in explain(module).runs]
    return [(path, run.operation, run.note) for path, run in zip(paths, explain(module).runs, strict=True)]


def test_alexnet() -> None:
    explanation = explain(reference_alexnet())
    assert isinstance(explanation, Explanation)
    assert (explanation.fused_layers, explanation.layers) == (20, 21)
    assert [run.operation for run in explanation.runs] == [
        *["conv2d_relu_max_pool2d"] * 2,
        *["conv2d"] * 2,
        "conv2d_relu_max_pool2d",
        None,
        *["linear_relu_dropout"] * 2,
        "linear",
    ]
    assert explanation.runs[0].kinds == ("Conv2d", "ReLU", "MaxPool2d")


REASONS = {
    "unknown": ([nn.Sigmoid()], [("0", None, "no operation for Sigmoid")]),
    "lone_relu": ([nn.ReLU()], [("0", None, "a ReLU is only fused into a Conv2d or Linear right before it")]),
    "subclass": ([Custom(3, 3, 1)], [("0", None, "Custom is a subclass of Conv2d")]),
    "parametrized": (
        [nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))],
        [("0", None, "ParametrizedLinear is a subclass of Linear")],
    ),
    "padding_mode": (
        [nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")],
        [("0", None, "padding_mode='reflect': the kernels pad with zeros")],
    ),
    "hook": (
        [hooked(nn.Conv2d(3, 3, 1)), nn.ReLU()],
        [
            ("0", None, "the Conv2d carries a hook"),
            ("1", None, "a ReLU is only fused into a Conv2d or Linear right before it"),
        ],
    ),
    "hook_on_the_relu": (
        [nn.Linear(2, 2), hooked(nn.ReLU())],
        [
            ("0", "linear", "the ReLU carries a hook"),
            ("1", None, "a ReLU is only fused into a Conv2d or Linear right before it"),
        ],
    ),
    "replaced": ([replaced(nn.MaxPool2d(2))], [("0", None, "the MaxPool2d's forward was replaced")]),
    "indices": (
        [nn.Conv2d(3, 3, 1), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)],
        [("0-1", "conv2d", "the MaxPool2d returns indices"), ("2", "max_pool2d", "")],
    ),
    "dilated": (
        [nn.Conv2d(3, 3, 1), nn.ReLU(), nn.MaxPool2d(2, dilation=2)],
        [("0-1", "conv2d", "the MaxPool2d is dilated"), ("2", "max_pool2d", "")],
    ),
    "in_place_dropout": (
        [nn.Dropout(inplace=True)],
        [("0", None, "the Dropout works in place on a tensor that the caller may still use")],
    ),
    "in_place_after_dropout": (
        [nn.Linear(2, 2), nn.ReLU(), nn.Dropout(), nn.Hardswish(inplace=True)],
        [
            (
                "0-1",
                "linear",
                "the Hardswish after the Dropout works in place on the output that the fused backward pass needs",
            ),
            ("2", "dropout", ""),
            ("3", None, "no operation for Hardswish"),
        ],
    ),
    "border": (
        [nn.Conv2d(3, 3, 1), nn.Sequential(nn.ReLU(), nn.Dropout())],
        [
            ("0", "conv2d", ""),
            ("1.0", None, "a ReLU is only fused into a Conv2d or Linear right before it"),
            ("1.1", "dropout", ""),
        ],
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name: str) -> None:
    layers, expected = REASONS[name]
    assert lines(nn.Sequential(*layers)) == lines(FusedSequential(*layers)) == expected


def test_a_hook_on_all_modules() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert lines(nn.Sequential(nn.Conv2d(3, 3, 1))) == [("0", None, "a hook on all modules is registered")]
    finally:
        handle.remove()


def test_layers_that_a_forward_calls() -> None:
    assert (
        lines(Trunk())
        == lines(fuse(Trunk()))
        == [
            ("first-relu", "conv2d", ""),
            ("rest.0-rest.1.0", "conv2d", ""),
            ("rest.1.1", "linear", ""),
            ("act", None, "not called"),
        ]
    )
    assert lines(OwnForward(nn.Conv2d(3, 3, 1))) == [("0", "conv2d", "")]
    assert lines(nn.Linear(2, 2)) == [("", None, "a single layer: fuse changes the modules that call layers")]
    assert lines(nn.Sequential()) == []
    assert lines(nn.ModuleList([nn.Linear(2, 2)])) == [("0", None, "held in a ModuleList")]


def test_a_forward_that_looks_at_its_input() -> None:
    """Such a ``forward`` cannot be traced without an input; after a call, ``explain`` reports what that call ran."""
    net = fuse(Looking()).to(DEVICE)
    for run in explain(net).runs:
        assert run.operation is None
        assert run.note.startswith("Looking.forward cannot be traced (TraceError: ")
    for _ in range(3):
        net(torch.ones(1, 3, 5, 5, device=DEVICE))
        assert lines(net) == [("conv-relu", "conv2d", "")]


class Parameters(nn.Module):
    """A module with a weight of its own and no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.weight))


def test_functions_of_own_parameters() -> None:
    assert [(run.kinds, run.operation) for run in explain(Parameters()).runs] == [(("conv2d", "relu"), "conv2d")]


def test_a_parametrized_layer_is_one_layer() -> None:
    norm = nn.utils.parametrizations.spectral_norm
    assert [run.kinds for run in explain(norm(nn.Linear(2, 2))).runs] == [("ParametrizedLinear",)]
    assert lines(nn.Sequential(norm(nn.ConvTranspose2d(2, 2, 3)))) == [
        ("0", None, "no operation for ParametrizedConvTranspose2d")
    ]


def test_fuse_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    net = reference_alexnet()
    fused = fuse(net, report=True)
    assert fused is net
    printed = capsys.readouterr().out
    assert printed == f"{explain(net)}\n"
    assert printed.startswith("Sequential: 20 of 21 layers in 8 calls of kernels\n  0 - 2 ")
    assert type(fused) is FusedSequential
    fuse(net)
    assert capsys.readouterr().out == ""


def _command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alexnet_triton", "explain", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_command() -> None:
    assert _command().stdout == f"{explain(reference_alexnet())}\n"
    runs = json.loads(run_here("explain", "torchvision.models:squeezenet1_0", "--json").stdout)
    assert runs[0]["operation"] == "conv2d_relu_max_pool2d"
    assert runs[1]["container"] == "features.3"


def test_command_on_a_module_of_the_users_own(tmp_path: Path) -> None:
    """The function reads a tensor's value, which the meta device cannot do."""
    code = "import torch\nfrom torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(int(torch.tensor(3)), 2))\n"
    (tmp_path / "mine.py").write_text(code)
    result = _command("mine:net", cwd=tmp_path)
    assert result.stdout == "Sequential: 1 of 1 layers in 1 calls of kernels\n  0  Linear  linear\n"


@pytest.mark.parametrize(
    "looks",
    [
        *("weight.numpy()", "np.asarray(weight)", "weight.tolist()", "weight.sum().item()", "float(weight.sum())"),
        *(
            "torch.save(weight, io.BytesIO())",
            "print(weight)",
            "f'{weight.sum():.3f}'",
            "weight.untyped_storage().data_ptr() or 1 / 0",
        ),
        *("[][int(weight.device.type == 'meta') - 1 :][0] if weight.is_meta else 0", "{'cpu': 0}[weight.device.type]"),
        "exec('assert not weight.is_meta')",
    ],
)
def test_command_on_a_module_that_looks_at_its_weights(looks: str, tmp_path: Path) -> None:
    """The command works whatever error reading the weights raises on the meta device; printed text is no part of the JSON."""
    name = f"looks{abs(hash(looks))}"  # a module is imported once
    code = "import io\nimport numpy as np, torch\nfrom torch import nn\n"
    code += f"def net():\n made = nn.Linear(3, 2)\n weight = made.weight.detach()\n {looks}\n return nn.Sequential(made)\n"
    (tmp_path / f"{name}.py").write_text(code)
    result = run_here("explain", f"{name}:net", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [run["operation"] for run in json.loads(result.stdout)] == ["linear"]


def test_command_on_a_module_that_cannot_be_made(tmp_path: Path) -> None:
    """The command reports, in one line, the error that making the network on the CPU raises."""
    code = "def net(): raise LookupError('no weights for\\nthis')\ndef other(): raise LookupError\n"
    (tmp_path / "cannot_be_made.py").write_text(code)
    result = run_here("explain", "cannot_be_made:net", cwd=tmp_path)
    assert result.returncode == 2
    assert "cannot make a network by 'cannot_be_made:net': no weights for" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert "'cannot_be_made:other': LookupError" in run_here("explain", "cannot_be_made:other", cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet", "neither alexnet nor lenet nor package.module:function"),
        ("torchvision.models:nothing", "has no attribute 'nothing'"),
        ("nowhere:net", "No module named 'nowhere'"),
        ("json:loads", "missing 1 required positional argument"),
        ("os:getcwd", "returned a str, not an nn.Module"),
    ],
)
def test_command_refuses_what_is_no_network(model: str, message: str) -> None:
    result = run_here("explain", model)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
