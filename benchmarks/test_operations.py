"""``pytest benchmarks``: each operation at AlexNet's shapes, forward and backward, ours against PyTorch.

It needs a CUDA GPU (``test_host.py``, for host time, does not). Compare runs with pytest-benchmark's own options:
``--benchmark-json=FILE``, ``--benchmark-compare``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import CASES, IMPLEMENTATIONS, Case, passes, runner, truth, verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="timing needs a CUDA GPU")

BATCHES = (128,)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("case", "which"), [pytest.param(c, p, id=f"{c.name}-{p}") for c in CASES for p in passes(c)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES, ids=lambda n: f"N{n}")
def test_operation(case: Case, batch: int, dtype: str, which: str, implementation: str, benchmark: Any) -> None:
    benchmark.group = f"{case.name}-N{batch}-{dtype}-{which}"
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    tensors = case.tensors(batch, DTYPES[dtype], "cuda")
    if implementation == "triton":
        verify(case, case.ours, tensors, truth(case, tensors))
    run = runner(case.function(implementation), which, tensors)

    def synchronized() -> None:
        run()
        torch.cuda.synchronize()

    synchronized()
    benchmark(synchronized)
