"""The accuracy table: its unit at the ends of a dtype's range; a wrong kernel fails it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import kernels
from benchmarks import accuracy


def test_units() -> None:
    exact = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert accuracy.units(torch.tensor([3.0, 1.0 + 2**-9]).half(), exact, torch.float16) == 1  # of 3, whose unit is 2^-9
    assert accuracy.units(torch.tensor([2**-24, 0.0]).half(), exact * 0, torch.float16) == 1
    beyond = torch.tensor([65519.0, 1e9, -1e9], dtype=torch.float64)
    assert accuracy.units(beyond.half(), beyond, torch.float16) < 0.5
    assert accuracy.units(torch.tensor([65504.0, 65504.0, -math.inf]).half(), beyond, torch.float16) == 1
    assert accuracy.units(torch.tensor([math.inf]).half(), torch.tensor([32768.0]).double(), torch.float16) == 1024
    assert accuracy.units(torch.tensor([math.nan, 1.0]).half(), exact, torch.float16) == math.inf


def test_an_early_overflow_is_one_that_the_dtype_would_have_held() -> None:
    exact = torch.tensor([60000.0, 65519.0, 1e9], dtype=torch.float64)
    result = torch.full((3,), math.inf, dtype=torch.float16)
    assert accuracy.overflows_early(result, exact, torch.float16).tolist() == [True, False, False]


ARGUMENTS = ["--operations", "fc1_relu", "sgd_step", "--magnitudes", "1", "--seeds", "2", "--out"]


def test_the_table_is_written_and_a_planted_error_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "accuracy.md"
    with pytest.raises(SystemExit) as done:
        accuracy.main([*ARGUMENTS, str(path)])
    assert done.value.code == 0
    written = path.read_text()
    assert all(f"| {name} | {dtype} |" in written for name in ("fc1_relu", "sgd_step") for dtype in ("float32", "bfloat16"))

    right = kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda x, *rest, **named: right(x, *rest, **named) * (1 + 2.0**-6))
    with pytest.raises(SystemExit, match="fc1_relu in bfloat16, output at 1e\\+00") as done:
        accuracy.main([*ARGUMENTS, str(path)])
    assert "sgd_step" not in str(done.value)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        accuracy.main(["--operations", "fc9"])
    assert "there is no operation fc9, only conv1, " in capsys.readouterr().err


@pytest.mark.parametrize("part", [ARGUMENTS[:3], ["--magnitudes", "1"], ["--seeds", "1"]], ids=lambda part: part[0])
def test_a_part_of_the_table_does_not_replace_the_whole(
    part: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process's settings are restored, too."""
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    few = [operation for operation in accuracy.operations(torch.device("cpu")) if operation.name in ("fc1_relu", "sgd_step")]
    monkeypatch.setattr(accuracy, "operations", lambda _: few)
    monkeypatch.setattr(accuracy, "MAGNITUDES", (1.0, 2.0))
    monkeypatch.setattr(accuracy, "SEEDS", 2)
    cudnn, matmul, threads = torch.backends.cudnn, torch.backends.cuda.matmul, torch.get_num_threads()
    cudnn.allow_tf32, matmul.fp32_precision = True, "tf32"  # the suite's fixture restores them
    torch.set_num_threads(2)
    try:
        with pytest.raises(SystemExit) as done:
            accuracy.main(part[:2])
        assert (torch.get_num_threads(), matmul.fp32_precision, cudnn.allow_tf32) == (2, "tf32", True)
        assert (done.value.code, list(tmp_path.iterdir())) == (0, [])
        assert "a part of the table: " in capsys.readouterr().out
        with pytest.raises(SystemExit) as done:
            accuracy.main([])
        assert (done.value.code, len(list(tmp_path.iterdir()))) == (0, 1)
    finally:
        torch.set_num_threads(threads)
