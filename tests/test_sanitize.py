"""The launches of `make sanitize`: they include every kernel."""

from __future__ import annotations

import torch

from kernels.runtime import launch

from .conftest import DEVICE
from .sanitize import launch_all, missing_kernels


def test_every_kernel_is_launched() -> None:
    """The launches are recorded and not run: other tests see what the kernels compute."""
    device = torch.device(DEVICE)
    launched: set[str] = set()
    with launch.record_launches(lambda kernel, *_: launched.add(kernel.fn.__name__)):
        launch_all(device)
    assert missing_kernels(launched, device) == set()
    assert missing_kernels(launched - {"_sgd_kernel"}, device) == {"_sgd_kernel"}
