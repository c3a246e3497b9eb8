"""Fixtures for the tests of convolutions in TF32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.configs import tables

from ...conftest import DEVICE

#: TF32 through descriptors needs Hopper or data-centre Blackwell; the interpreter counts as Hopper.
hopper = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10), reason="descriptors need Hopper or Blackwell"
)


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 on: PyTorch's default for convolutions, which the suite turns off before each test and restores afterwards.

    In the interpreter products stay exact; there the switch only selects kernels. Weight gradients use the kernels over images
    for any batch.
    """
    torch.backends.cudnn.allow_tf32 = True
    with tables.override(IMAGES_WGRAD=1):
        yield
