"""The launches of `make sanitize`: they include every kernel."""

from __future__ import annotations

import pytest
import torch

from .conftest import DEVICE
from .sanitize import launch_all, missing_kernels


@pytest.mark.slow
def test_every_kernel_is_launched() -> None:
    device = torch.device(DEVICE)
    launched = launch_all(device)
    assert missing_kernels(launched, device) == set()
    assert missing_kernels(launched - {"_sgd_kernel"}, device) == {"_sgd_kernel"}
