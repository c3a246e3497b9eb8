"""``alexnet-triton explain``: the operation that each layer of a network runs on, or why it runs on none."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from typing import Annotated

import torch
import typer
from torch import nn

from ..explain import explain


def _import_model(target: str) -> nn.Module:
    """The network that ``target``, a ``package.module:function``, returns when it is called without arguments.

    The call is made on the meta device, which draws no weights, or on the default device if that fails. Its standard output is
    redirected to standard error.
    """
    module_name, _, function_name = target.partition(":")
    sys.path.insert(0, "")  # finds the user's own modules, as `python -m` does
    try:
        with contextlib.redirect_stdout(sys.stderr):
            make = getattr(importlib.import_module(module_name), function_name)
            try:
                with torch.device("meta"):
                    net = make()
            # The function reads values, which meta tensors do not have. The type of the error depends on the function.
            except Exception:
                net = make()
    except Exception as error:  # the user's code may raise anything
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise typer.BadParameter(f"cannot make a network by {target!r}: {reason}", param_hint="MODEL") from error
    if not isinstance(net, nn.Module):
        raise typer.BadParameter(f"{target!r} returned a {type(net).__name__}, not an nn.Module", param_hint="MODEL")
    return net


def explain_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The network: alexnet, lenet, or package.module:function that returns one, such as torchvision.models:vgg16.",
        ),
    ] = "alexnet",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel="Output")] = False,
) -> None:
    """Print which operation fuse() runs each layer of a network on.

    Prints one line per run of layers: its fused operation, or why its layers are called as they stand.
    """
    known = {"alexnet": "alexnet_triton:reference_alexnet", "lenet": "alexnet_triton:reference_lenet"}
    if model not in known and ":" not in model:
        raise typer.BadParameter(f"{model!r} is neither alexnet nor lenet nor package.module:function", param_hint="MODEL")
    explanation = explain(_import_model(known.get(model, model)))
    print(json.dumps([run._asdict() for run in explanation.runs]) if as_json else explanation)
