"""``alexnet-triton export``: write a trained network as a file that other programs read."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import io
import json
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from ..data.augment import patch_side
from ..fused import unfuse
from ..models import IMAGE_SIZE
from ..training.checkpoint import Checkpoint, CheckpointError
from ..training.files import check_writable, replacing, write
from .network import RunArgument, load_run
from .options import console, fail

#: Version of ONNX's operators. Its convolution does not take bfloat16, which opset 22 added.
OPSET = 18

#: Name of the extra file that holds the metadata as JSON, in a file of ``torch.export``.
METADATA = "alexnet_triton.json"

INPUT, OUTPUT = "images", "logits"


class Format(StrEnum):
    """The formats of an exported network; each is also the suffix of the file."""

    onnx = "onnx"
    safetensors = "safetensors"
    pt2 = "pt2"


class ExportPrecision(StrEnum):
    """The dtype of the weights, the input and the output of an exported network."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


#: Largest error of a file's logits, as a part of the network's largest logit. Other programs add in another order.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class ExportError(ValueError):
    """A network cannot be written as asked, or the written file does not give the network's logits."""


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How a format is written and read back.

    Attributes:
        packages: names of the packages that the format needs.
        content: the file's bytes, from (network, input, metadata).
        logits: the logits that a file gives, from (file, network, input). A file of weights alone is loaded into the network's
            layers.
    """

    packages: tuple[str, ...]
    content: Callable[[nn.Module, Tensor, dict[str, str]], bytes]
    logits: Callable[[Path, nn.Module, Tensor], Tensor]


def _safetensors_content(net: nn.Module, images: Tensor, metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save

    # Readers that ignore the other metadata see from "format" that these are PyTorch's tensors.
    return save({name: weight.contiguous() for name, weight in net.state_dict().items()}, {"format": "pt", **metadata})


def _safetensors_logits(path: Path, net: nn.Module, images: Tensor) -> Tensor:
    from safetensors.torch import load_file

    loaded = copy.deepcopy(net)
    loaded.load_state_dict(load_file(path), strict=True)
    return loaded(images)


def _onnx_content(net: nn.Module, images: Tensor, metadata: dict[str, str]) -> bytes:
    # The exporter prints its progress, and standard output may be a pipe.
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            net,
            (images,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # None only with dynamo=False
    model = program.model_proto
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def _onnx_logits(path: Path, net: nn.Module, images: Tensor) -> Tensor:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    (logits,) = ReferenceEvaluator(model).run([OUTPUT], {INPUT: images.numpy()})
    return torch.from_numpy(logits)


def _pt2_content(net: nn.Module, images: Tensor, metadata: dict[str, str]) -> bytes:
    program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(metadata)})
    return buffer.getvalue()


def _pt2_logits(path: Path, net: nn.Module, images: Tensor) -> Tensor:
    with path.open("rb") as file:
        return torch.export.load(file).module()(images)


_KINDS = {
    Format.onnx: _Kind(("onnx", "onnxscript"), _onnx_content, _onnx_logits),
    Format.safetensors: _Kind(("safetensors",), _safetensors_content, _safetensors_logits),
    Format.pt2: _Kind((), _pt2_content, _pt2_logits),
}


def metadata_of(kept: Checkpoint, dtype: torch.dtype) -> dict[str, str]:
    """The metadata of an exported file, by name. Lists and numbers are JSON."""
    side = IMAGE_SIZE[kept.model]
    colours = "grey" if kept.channels == 1 else "red, green and blue"
    if kept.size == patch_side(side):
        cut = f"the {side} x {side} in the middle cut out"
    else:
        cut = "the middle cut out"
        cut += "" if kept.size == side else f", resized bilinearly to {side} x {side} (align_corners=False)"
    by, normalized, statistics = kept.normalization, "", {}
    if by is not None:
        normalized = f"; then the mean {list(by.mean)} subtracted from each channel, and divided by {list(by.std)}"
        statistics = {"mean": json.dumps(by.mean), "std": json.dumps(by.std)}
    return {
        "model": kept.model,
        "classes": json.dumps(kept.classes),
        "channels": str(kept.channels),
        "size": str(kept.size),
        "input_size": str(side),
        "dtype": str(dtype).removeprefix("torch."),
        "preprocessing": f"{colours} in [0, 1]; the shorter side made {kept.size}, {cut}{normalized}",
        **statistics,
    }


@torch.no_grad()
def export(net: nn.Module, kept: Checkpoint, kind: Format, path: Path, dtype: torch.dtype) -> None:
    """Write ``net`` to ``path`` and check the file's logits. If anything fails, ``path`` is left as it was.

    The layers are PyTorch's own, on the CPU, in eval mode. An ONNX file and a ``torch.export`` file take ``images``
    (N, channels, side, side) for any N and return ``logits`` (N, classes), both in ``dtype``.

    Args:
        net: the network of :func:`.network.load_run` on the CPU; it is changed in place.
        kept: its checkpoint.
        dtype: float32, float16 or bfloat16.

    Raises:
        ExportError: bfloat16 for ONNX, a missing package, or a file whose logits are not the network's.
        WriteError: the file cannot be written.
    """
    how = _KINDS[kind]
    if missing := [name for name in how.packages if importlib.util.find_spec(name) is None]:
        raise ExportError(f"--format {kind} needs {' and '.join(missing)}: pip install 'alexnet-triton[export]'")
    if kind is Format.onnx and dtype == torch.bfloat16:
        raise ExportError(f"ONNX has no bfloat16 convolution in opset {OPSET}: give --dtype float32 or float16")
    check_writable(path)
    net = unfuse(net).eval().requires_grad_(False).to(dtype=dtype, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    side = IMAGE_SIZE[kept.model]
    images = torch.rand(2, kept.channels, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    with warnings.catch_warnings(), replacing(path) as partial:
        warnings.simplefilter("ignore")  # the exporters warn about their own code
        write(partial, how.content(net, images, metadata_of(kept, dtype)))
        found, expected = how.logits(partial, net, images).float(), net(images).float()
        error, largest = (found - expected).abs().max().item(), expected.abs().max().item()
        if not error <= _TOLERANCE[dtype] * largest:
            raise ExportError(f"{path}: not written: its logits are off by {error:.2g}, where the largest is {largest:.2g}")


def export_command(
    run: RunArgument,
    kind: Annotated[
        Format,
        typer.Option(
            "--format",
            help="Write this format. onnx: the network, for ONNX Runtime and others. safetensors: the weights alone, under "
            "their names in PyTorch's nn.Sequential. pt2: the network for torch.export.load, which needs PyTorch alone.",
            rich_help_panel="Output",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write to this file. Its name must end in the format.",
            show_default="beside the checkpoint",
            rich_help_panel="Output",
        ),
    ] = None,
    dtype: Annotated[
        ExportPrecision, typer.Option(help="Use this dtype for weights, input and output.", rich_help_panel="Output")
    ] = ExportPrecision.float32,
) -> None:
    """Write a trained network for other programs.

    The exported layers are PyTorch's own. The file is read back, and it gets its name only if its logits on two random images
    match the network's. Its metadata hold the classes, the size of the images and their preprocessing.
    """
    try:
        net, kept = load_run(run, torch.device("cpu"))
        assert kept.path is not None  # load_run read it from a file
        name = kept.path.stem + ("" if dtype is ExportPrecision.float32 else f"-{dtype}")
        path = out or kept.path.with_name(f"{name}.{kind}")
        if path.suffix != f".{kind}" or path.resolve() == kept.path.resolve():
            raise typer.BadParameter(f"{path}: must end in .{kind} and not be the checkpoint", param_hint="--out")
        export(net, kept, kind, path, getattr(torch, dtype))
    except (CheckpointError, ExportError, OSError, RuntimeError) as error:
        raise fail(error) from error
    takes = f"{INPUT} (N, {kept.channels}, {IMAGE_SIZE[kept.model]}, {IMAGE_SIZE[kept.model]}), {dtype}"
    told = {Format.onnx: f", opset {OPSET}: {takes}", Format.safetensors: f", {dtype}", Format.pt2: f": {takes}"}
    console.print(f"{path}{told[kind]}; read back, it gives the network's logits", markup=False)
