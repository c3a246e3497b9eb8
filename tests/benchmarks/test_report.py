"""The report's whole code path without a GPU: on tiny shapes, with a timer that times nothing and says so."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import nn
from triton.runtime.errors import OutOfResources

from alexnet_triton import fuse
from benchmarks import render, report
from benchmarks.cases import FUSED_CASES, PLAIN_CASES, pass_bytes, pass_flops
from benchmarks.networks import ALEXNET, PEERS, TINY, Built, batch_of, cut_products, network_flops, verify_network
from benchmarks.report import RESULTS, Settings, quick, run
from benchmarks.timing import CudaTimer, FakeTimer, NoGraph, Timing, captured, own_stream
from kernels.runtime.arguments import conv_input_precision, matmul_input_precision

from ..conftest import DEVICE

QUIET = Console(quiet=True)


def tiny_settings(**changes: object) -> Settings:
    """Settings for every measurement, on shapes for the interpreter."""
    settings = report.tiny(Settings(torch.device(DEVICE), FakeTimer(), minutes=10))
    return dataclasses.replace(settings, **changes)  # type: ignore[arg-type]


def run_tiny(out: Path, **changes: object) -> dict:
    return json.loads(run(tiny_settings(**changes), out, QUIET, ceiling_size=64, copy_bytes=1024).read_text())


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A whole report."""
    return run_tiny(tmp_path_factory.mktemp("report"))


def rows(content: dict, **wanted: object) -> list[dict]:
    return [r for r in content["rows"] if all(r[key] == value for key, value in wanted.items())]


@pytest.mark.slow
def test_environment_and_ceilings(content: dict) -> None:
    environment = content["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["commit"] is None or len(environment["commit"]) == 40
    assert environment["timer"].startswith("FAKE")
    assert content["ceilings"] == {"bf16_tflops": 2 * 64**3 / 1e9, "tf32_tflops": 2 * 64**3 / 1e9, "copy_tbps": 2048 / 1e9}


@pytest.mark.slow
def test_every_operation_pass_and_peer_has_a_row(content: dict) -> None:
    conv = {(r["impl"], r["pass"]) for r in rows(content, section="plain", case="conv3")}
    assert conv == {
        (impl, which)
        for impl in ("ours", "torch_nchw", "torch_channels_last", "torch_compile")
        for which in ("forward", "dgrad", "wgrad")
    }
    assert {r["pass"] for r in rows(content, case="pool1")} == {"forward", "backward"}
    linear = {r["impl"] for r in rows(content, section="fused", case="fc2_relu_dropout")}
    assert linear == {"ours", "torch", "torch_compile"}
    assert all(r["ms"] == 1.0 and r["images_per_s"] == 2000 for r in content["rows"] if r["ms"] is not None)
    assert all(r["verified"] for r in content["rows"] if r["impl"] == "ours" or r["case"] in ("conv3", "pool1", "network"))
    assert all(r["verified"] is None for r in rows(content, case="fc2_relu_dropout") if r["impl"] != "ours")


def test_every_network_and_mode_has_a_row(content: dict) -> None:
    expected = {(name + suffix, mode) for name in ("ours", *PEERS) for suffix in ("", "_graph") for mode in ("train", "infer")}
    steps = rows(content, section="step")
    assert {(r["impl"], r["pass"]) for r in steps} == expected
    graphs = [r for r in steps if r["impl"].endswith("_graph")]
    if DEVICE == "cpu":
        assert all(r["ms"] is None and "no CUDA graphs on cpu" in r["note"] for r in graphs)
    assert all(r["ms"] is not None for r in steps if not r["impl"].endswith("_graph"))


def test_a_wrong_operation_gets_no_time(tmp_path: Path) -> None:
    right = FUSED_CASES[2].shrunk()
    wrong = dataclasses.replace(right, ours=lambda x, w, b: right.theirs(x, w, b) * 1.01)
    content = run_tiny(tmp_path, plain_cases=(), fused_cases=(wrong,), step_batches=())
    ours = rows(content, impl="ours")
    assert len(ours) == 2
    assert all(r["ms"] is None and r["verified"] is False and r["note"].startswith("WRONG: ") for r in ours)
    assert all(r["ms"] is not None for r in content["rows"] if r["impl"] != "ours")
    assert "WRONG" in render.markdown(content)


class Doubled(nn.Sequential):
    """A network whose logits are wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.01


@pytest.mark.parametrize("error", [ValueError("odd"), OutOfResources(1, 2, "shared memory"), RuntimeError("")], ids=repr)
def test_one_case_that_raises_does_not_end_the_run(error: Exception, tmp_path: Path) -> None:
    def raises(*_: torch.Tensor) -> torch.Tensor:
        raise error

    right = FUSED_CASES[2].shrunk()
    cases = (dataclasses.replace(right, ours=raises), dataclasses.replace(right, name="theirs", theirs=raises), right)
    content = run_tiny(tmp_path, plain_cases=(), fused_cases=cases, step_batches=())
    first = rows(content, case="conv3_relu", impl="ours")
    assert [r["ms"] for r in first] == [None, None, 1.0, 1.0]
    assert type(error).__name__ in first[0]["note"]
    assert type(error).__name__ in rows(content, case="theirs")[0]["note"]


def test_a_wrong_network_gets_no_time(tmp_path: Path) -> None:
    network = dataclasses.replace(TINY, fused=lambda: fuse(Doubled(*TINY.reference())))
    content = run_tiny(tmp_path, network=network, plain_cases=(), fused_cases=())
    ours = rows(content, impl="ours")
    assert len(ours) == 2
    assert all(r["ms"] is None and r["verified"] is False and "WRONG: AssertionError: logits" in r["note"] for r in ours)
    assert all(r["verified"] for r in rows(content, impl="eager_nchw"))


def test_a_network_with_a_wrong_gradient_gets_no_time(tmp_path: Path) -> None:
    class Scaled(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y.detach() + 1.02 * (y - y.detach())

    network = dataclasses.replace(TINY, fused=lambda: Scaled(*TINY.reference()))
    content = run_tiny(tmp_path, network=network, plain_cases=(), fused_cases=())
    train, infer = rows(content, impl="ours")
    assert train["verified"] is False
    assert infer["verified"] is True


@pytest.mark.parametrize(("bits", "right"), [(13, True), (16, False)], ids=["tf32", "bfloat16"])
def test_a_network_may_round_its_products_to_tf32_and_no_further(bits: int, right: bool, tmp_path: Path) -> None:
    """Where PyTorch multiplies exactly (on CPUs, sometimes on GPUs), we are compared with products cut to TF32."""
    network = dataclasses.replace(TINY, fused=lambda: cut_products(TINY.reference(), bits))
    content = run_tiny(tmp_path, network=network, plain_cases=(), fused_cases=())
    train, _ = rows(content, impl="ours")
    assert train["pass"] == "train"
    assert train["verified"] is right


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="PyTorch's exact products are a CPU's")
@pytest.mark.parametrize(("bits", "right"), [(13, True), (16, False)], ids=["tf32", "bfloat16"])
def test_so_may_alexnet(bits: int, right: bool) -> None:
    torch.manual_seed(0)
    net = cut_products(ALEXNET.reference(), bits)
    built = Built(net, net, autocast=False, images=torch.contiguous_format)
    tensors = batch_of(ALEXNET, 2, torch.float32, torch.device("cpu"))
    with report.float32_products("tf32"), contextlib.nullcontext() if right else pytest.raises(AssertionError, match="allowed"):
        verify_network(ALEXNET, built, torch.float32, "train", *tensors)


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    content = run_tiny(tmp_path, minutes=0)
    assert content["rows"] == []
    assert content["left_out"][:2] == ["step ours train float32 2", "step ours infer float32 2"]
    assert "fused conv1_relu_pool float32 2" in content["left_out"]
    assert f"Left out for lack of time: {len(content['left_out'])} measurements" in render.markdown(content)


def test_parts_make_up_the_whole(tmp_path: Path) -> None:
    """A report without any time names what it left out; the parts' lists together must be the whole report's."""
    of_parts = [entry for part in report.PARTS for entry in run_tiny(tmp_path, minutes=0, parts=(part,))["left_out"]]
    assert all(run_tiny(tmp_path, minutes=0, parts=(part,))["left_out"] for part in report.PARTS)
    assert sorted(of_parts) == sorted(run_tiny(tmp_path, minutes=0)["left_out"])


def test_a_run_that_is_cut_off_keeps_what_it_has(tmp_path: Path) -> None:
    class CutOff(FakeTimer):
        calls = 0

        def __call__(self, function: Callable[[], object]) -> Timing:
            self.calls += 1
            if self.calls == (20 if DEVICE == "cpu" else 30):  # graphs are timed too on a GPU
                raise KeyboardInterrupt
            return super().__call__(function)

    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path, timer=CutOff())
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert {r["section"] for r in content["rows"]} == {"step", "plain"}
    assert "| **ours** |" in render.markdown(content)


def test_the_step_against_every_peer_comes_first(content: dict) -> None:
    order = list(dict.fromkeys((r["section"], r["impl"]) for r in content["rows"]))
    position = {key: i for i, key in enumerate(order)}
    assert position["step", "ours"] == 0
    assert position["step", "compile_default"] < position["plain", "ours"] < position["fused", "ours"]
    # Inductor tunes for minutes, so it comes after the most telling measurements.
    assert position["fused", "ours"] < position["step", "compile_max_autotune"] < position["plain", "torch_compile"]


def test_float32_at_the_first_batch_comes_right_after_bfloat16(tmp_path: Path) -> None:
    """In what a report without any time names, step and operations, each with its peers, come before anything else."""
    dtypes, batches = Settings.dtypes, (128, 1024)
    content = run_tiny(tmp_path, minutes=0, dtypes=dtypes, batches=batches, step_batches=(*batches, 1))
    kinds = {"step": 4, "plain": 3, "fused": 3}  # the place of the dtype among the words; the batch follows
    named = [tuple(entry.split()) for entry in content["left_out"]]
    order = list(
        dict.fromkeys((words[0], *words[kinds[words[0]] - 1 :][:2]) for words in named if words[-1] != "torch_compile")
    )
    sections = ("step", "plain", "fused")
    assert order[:6] == [(section, dtype, "128") for dtype in ("bfloat16", "float32") for section in sections]
    of_float32 = {
        words[1] for words in named[: named.index(("step", "ours", "train", "bfloat16", "1024"))] if "float32" in words
    }
    assert {"ours", *PEERS} - {"compile_max_autotune"} <= of_float32


@pytest.mark.parametrize(("precision", "older"), [("tf32", "high"), ("ieee", "highest")])
def test_inductor_can_ask_for_the_precision_it_is_given(precision: Literal["tf32", "ieee"], older: str) -> None:
    """torch 2.11 raises where only the newer switch was set, and Inductor reads the older one while it tunes."""
    with report.float32_products(precision):
        assert torch.get_float32_matmul_precision() == older
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
        assert (conv_input_precision(torch.float32), matmul_input_precision(torch.float32)) == (precision, precision)
    assert (conv_input_precision(torch.float32), matmul_input_precision(torch.float32)) == ("ieee", "ieee")


def test_fake_times_never_land_among_results() -> None:
    with pytest.raises(ValueError, match="fake times do not belong"):
        run(tiny_settings(), RESULTS / "x", QUIET)
    assert not [path for path in render.stored_results() if render.is_fake(json.loads(path.read_text()))]


def test_quick_is_a_part_of_the_whole() -> None:
    full = tiny_settings(batches=(128, 1024), dtypes=("bfloat16", "float32"), minutes=8)
    few = quick(full)
    assert few.minutes < 3
    assert (few.batches, few.dtypes, few.parts) == ((128,), ("bfloat16",), ("steps", "operations"))


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["report"])
    with pytest.raises(SystemExit, match="no CUDA GPU here"):
        report.main()


def test_rendering_from_the_json_alone(content: dict, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content))
    table, bars, roofline = render.render_results(path, tmp_path / "out")
    text = table.read_text()
    assert "FAKE: nothing was timed" in text
    assert "| **ours** |" in text
    assert "torch_nchw" in text
    for picture in (bars, roofline):
        assert imread(picture)[..., :3].std() > 0.03


def real(content: dict, **times: float) -> dict:
    """The same report, as if a real timer had measured ``times`` for the training step."""
    steps = []
    for row in rows(content, section="step", **{"pass": "train"}):
        if row["impl"] in times:
            ms = times[row["impl"]]
            steps.append(row | {"ms": ms, "images_per_s": 2 / ms * 1e3})
    environment = content["environment"] | {"timer": "a clock", "gpu": "Some GPU"}
    return content | {
        "rows": steps,
        "environment": environment,
        "ceilings": {"bf16_tflops": 100.0, "tf32_tflops": 50.0, "copy_tbps": 1.0},
    }


def test_ratio_to_the_best_peer_and_fraction_of_the_floor(content: dict, tmp_path: Path) -> None:
    changed = real(content, ours=2.0, eager_nchw=4.0, compile_default=3.0)
    network = changed["network"]
    flops, parameters = 2 * network["step_flops"], network["parameters"] / 1e9
    floor = render.floor_ms(changed, "float32", 2, "train")
    assert floor == pytest.approx(flops / 5e10 + 12 * parameters)
    assert render.floor_ms(changed, "bfloat16", 2, "train") == pytest.approx(flops / 1e11 + 6 * parameters)
    lines = render.step_table(changed).splitlines()[2:]
    assert [line.split("|")[4].strip() for line in lines] == ["**ours**", "compile_default", "eager_nchw"]
    assert [line.split("|")[7].strip() for line in lines] == ["1.50", "1.00", "0.75"]
    assert f"{floor / 2.0:.0%}" in lines[0]
    del changed["ceilings"]["tf32_tflops"]  # as in older reports
    assert "%" not in render.step_table(changed)
    render.plot_bars(changed, tmp_path / "bars.png")


def test_roofline_points(content: dict) -> None:
    forward = rows(content, section="plain", case="conv3", **{"pass": "forward"})
    times = {"ours": 0.5, "torch_nchw": 3.0, "torch_channels_last": 2.0, "torch_compile": 4.0}
    timed = [r | {"dtype": "bfloat16", "ms": times[r["impl"]]} for r in forward]
    changed = content | {"rows": timed + rows(content, case="pool1")}
    row = timed[0]
    intensity = row["flops"] / row["bytes"]
    assert render.roofline_points(changed, ours=True) == [(intensity, row["flops"] / 0.5 / 1e9)]
    assert render.roofline_points(changed, ours=False) == [(intensity, row["flops"] / 2.0 / 1e9)]


def test_the_pages_are_what_the_stored_results_give(tmp_path: Path) -> None:
    """After a change of audit.json or of results/, run ``make render``."""
    text = render.PERFORMANCE.read_text()
    assert render.performance(text, render.stored_results()) == text
    text = render.README.read_text()
    assert render.readme(text) == text
    render.plot_peers(json.loads(render.NEWEST_REPORT.read_text()), tmp_path / "again.svg")
    drawn, stored = (re.findall(r">([^<>]+)</text>", path.read_text()) for path in (tmp_path / "again.svg", render.PICTURE))
    assert drawn == stored
    assert "78,358" in drawn


def test_the_page_takes_real_results_and_no_fake_ones(content: dict, tmp_path: Path) -> None:
    text = "".join(
        f"a\n<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("audit", "results", "tuned", "eager", "kernelbench", "runs")
    )
    path = tmp_path / "some-gpu.json"
    path.write_text(json.dumps(real(content, ours=2.0, eager_nchw=4.0)))
    result = render.performance(text, [path])
    assert "Some GPU" in result
    assert "2.00" in result
    assert "old" not in result
    assert "saved for backward" in result
    assert "| conv2, bfloat16, batch 128 |" in result
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="fake"):
        render.performance(text, [path])
    with pytest.raises(ValueError, match="no <!-- audit -->"):
        render.performance("nothing", [])


def test_flops_and_bytes_of_cases() -> None:
    conv = PLAIN_CASES[1]
    assert pass_flops(conv, 128, "dgrad") == 2 * 128 * 26 * 26 * 256 * 96 * 25
    assert pass_flops(conv, 128, "backward") == 2 * pass_flops(conv, 128, "forward")
    assert pass_flops(PLAIN_CASES[5], 128, "forward") == 0
    like = torch.empty(0, dtype=torch.bfloat16)
    x, y, w = 128 * 96 * 26 * 26, 128 * 256 * 26 * 26, 256 * 96 * 25 + 256
    assert pass_bytes(conv, 128, "forward", like) == 2 * (x + y + w)
    assert pass_bytes(conv, 128, "backward", like) == 2 * (2 * x + y + 2 * w)
    forward, step = network_flops(ALEXNET, 128)
    assert forward == pytest.approx(240e9, rel=0.01)
    assert step == pytest.approx(712e9, rel=0.01)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs a machine without a GPU")
def test_no_graph_without_cuda() -> None:
    with pytest.raises(NoGraph, match="no CUDA graphs on cpu"):
        captured(lambda: None, torch.device("cpu"))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
def test_cuda_times_and_graphs() -> None:
    device = torch.device("cuda")
    x = torch.ones(1000, device=device)
    with own_stream(device):
        replay = captured(lambda: x.add_(1), device)
        before = x[0].item()
        replay()
        assert x[0].item() == before + 1
        timing = CudaTimer()(replay)
    assert 0 < timing.p20 <= timing.ms <= timing.p80
