"""The profile of a step, without the profiler: kernel events are matched to launches."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

import kernels
from benchmarks.audit import LayerMarker
from benchmarks.profile import Noted, Row, match, noted_launches, print_rows

from ..conftest import DEVICE, own_devices

LAUNCHES = [Noted("conv1", "fprop", "_a_kernel", 2.0), Noted("conv2", "fprop", "_a_kernel", None)]


def replay(*times: float) -> list[tuple[str, float]]:
    return list(zip(("_a_kernel", "fill", "_a_kernel", "memcpy"), times, strict=True))


def test_events_take_their_launch_in_order_and_the_median_of_the_replays() -> None:
    rows = match(LAUNCHES, [replay(1, 9, 3, 4), replay(2, 9, 5, 4), replay(7, 9, 4, 4)])
    assert rows == [
        Row("conv1", "fprop", "_a_kernel", 2, 2.0),
        Row("PyTorch", "", "fill", 9, None),
        Row("conv2", "fprop", "_a_kernel", 4, None),
        Row("PyTorch", "", "memcpy", 4, None),
    ]
    printed = io.StringIO()
    print_rows(rows, 25.0, Console(width=120, file=printed))
    assert "4 kernels, 19 us in them; a replay with a cold L2 cache takes 25 us" in printed.getvalue()
    assert re.search(r"conv1 +│ fprop +│ a +│ +2\.0 │ +2\.0 │ +100%", printed.getvalue())


def test_lost_events_are_an_error() -> None:
    with pytest.raises(ValueError, match="did not run the same kernels"):
        match(LAUNCHES, [replay(1, 2, 3, 4), replay(1, 2, 3, 4)[1:]])
    with pytest.raises(ValueError, match="did not run the same kernels"):
        match(LAUNCHES, [])
    with pytest.raises(ValueError, match=r"no kernel event of the launch of _a_kernel \(conv2\)"):
        match(LAUNCHES, [replay(1, 2, 3, 4)[:2]])


@own_devices
def test_launches_are_noted_with_pass_and_floor() -> None:
    x, w = (torch.randn(rows, 32, device=DEVICE).bfloat16().requires_grad_() for rows in (4, 40))
    with noted_launches("sm_90", torch.bfloat16, LayerMarker()) as noted:
        kernels.linear(x, w).sum().backward()
    products = [n for n in noted if n.kernel.startswith("_matmul")]
    assert [n.pass_ for n in products if "finish" not in n.kernel] == ["fprop", "dgrad", "wgrad"]
    assert all(n.layer == "other" and n.floor_us is not None and n.floor_us > 0 for n in noted)
    with noted_launches("sm_120", torch.bfloat16, LayerMarker()) as noted:
        kernels.linear(x, w)
    assert {n.floor_us for n in noted} == {None}
