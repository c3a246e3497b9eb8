"""What the tests of convolutions in TF32 share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.configs import tables

from ...conftest import DEVICE

#: TF32 through descriptors is Hopper's and data-centre Blackwell's; the interpreter counts as Hopper.
hopper = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10), reason="descriptors are Hopper's and Blackwell's"
)


@pytest.fixture
def tf32() -> Iterator[None]:
    """PyTorch's default for convolutions, which the suite turns off before each test and puts back after it.

    In the interpreter products stay exact: the switch selects kernels. Weight gradients go by images, however few there are.
    """
    torch.backends.cudnn.allow_tf32 = True
    with tables.override(IMAGES_WGRAD=1):
        yield
