"""``alexnet-triton summary``: the layer table of a network."""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models import IMAGE_SIZE, reference_alexnet, reference_lenet
from ..training.networks import torchvision_alexnet
from .options import BatchOption, Model, fail, print_table


def layer_table(net: nn.Sequential, input_size: tuple[int, ...]) -> list[dict[str, Any]]:
    """One dict per layer: index, layer, output shape, parameters, FLOPs of a forward pass (a multiply and an add count as two).

    PyTorch's ``FlopCounterMode`` counts the FLOPs of matrix products, on the meta device: nothing is computed.
    """
    rows = []
    x = torch.empty(input_size, device="meta")
    for index, layer in enumerate(net.to("meta")):
        with FlopCounterMode(display=False) as counter:
            x = layer(x)
        parameters = sum(p.numel() for p in layer.parameters())
        rows.append(
            {
                "index": index,
                "layer": str(layer),
                "output": tuple(x.shape),
                "parameters": parameters,
                "flops": counter.get_total_flops(),
            }
        )
    return rows


def summary_command(
    model: Annotated[Model, typer.Option(help="Show the layers of this network.", rich_help_panel="Recipe")] = Model.alexnet,
    batch_size: BatchOption = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel="Output")] = False,
) -> None:
    """Print a network's layers, output sizes and FLOPs."""
    side, channels = IMAGE_SIZE[model], 1
    if model is Model.torchvision:
        try:
            whole, channels = torchvision_alexnet(1000, 3), 3
        except RuntimeError as error:
            raise fail(error) from error
        net = nn.Sequential(*whole.features, whole.avgpool, nn.Flatten(), *whole.classifier)  # type: ignore[misc,arg-type]
    else:
        net = reference_alexnet() if model is Model.alexnet else reference_lenet()
    try:
        rows = layer_table(net, (batch_size, channels, side, side))
    except (RuntimeError, TypeError) as error:  # a tensor that is too large to address
        raise typer.BadParameter(f"{batch_size} images are too many", param_hint="--batch-size") from error
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(title=f"{model.value}, input {batch_size} x {channels} x {side} x {side}", show_footer=True)
    table.add_column("#", justify="right")
    table.add_column("layer")
    table.add_column("output", footer="total")
    table.add_column("parameters", justify="right", footer=f"{sum(r['parameters'] for r in rows):,}")
    table.add_column("MFLOP", justify="right", footer=f"{sum(r['flops'] for r in rows) / 1e6:,.1f}")
    for row in rows:
        table.add_row(
            str(row["index"]),
            row["layer"],
            " x ".join(map(str, row["output"])),
            f"{row['parameters']:,}" if row["parameters"] else "",
            f"{row['flops'] / 1e6:,.1f}" if row["flops"] else "",
        )
    print_table(table)
