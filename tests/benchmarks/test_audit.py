"""The static audit covers the whole step and counts correctly; totals worse than the committed ones fail."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.audit import (
    COMMITTED,
    LAYERS,
    TARGETS,
    OperatorCount,
    audit_peer,
    case_name,
    programs_per_multiprocessor,
    worse,
)
from benchmarks.work import _meeting, fewest_bytes, flops, moved_bytes

ROOT = Path(__file__).parents[2]


def run_audit(path: Path, *arguments: str) -> tuple[dict, str]:
    """The audit in a process without the interpreter: its JSON and what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.audit", "--json", str(path), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text()), result.stdout


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """A training step at batch 128 in bfloat16 for sm_90."""
    return run_audit(tmp_path_factory.mktemp("audit") / "a.json")


FIELDS = {
    *("layer", "pass", "kernel", "arch", "dtype", "batch", "regs", "spill_bytes", "smem_bytes", "num_warps", "num_stages"),
    *("grid", "waves", "tensor_core_ops", "tma_loads", "useful_flops", "issued_flops", "min_bytes", "floor_us"),
}


def test_records_have_every_field(step: tuple[dict, str]) -> None:
    result, printed = step
    assert all(set(record) >= FIELDS for record in result["records"])
    assert printed.count("conv2d_images_wgrad") == 4
    assert printed.count("conv2d_stem_pool") == 2  # forward and the gradient of the weight
    assert "static, nothing measured" in printed


def test_every_layer_and_pass_is_there(step: tuple[dict, str]) -> None:
    """The input image needs no gradient, so conv1 has no dgrad."""
    passes = {(r["layer"], r["pass"]) for r in step[0]["records"] if r["useful_flops"]}
    layers = [name for name in LAYERS if name != "flatten"]
    expected = {(layer, which) for layer in layers for which in ("fprop", "dgrad", "wgrad")} | {("fc3", "backward")}
    # With few outputs one kernel computes all gradients.
    assert passes == expected - {("conv1", "dgrad"), ("fc3", "dgrad"), ("fc3", "wgrad")}
    pools = sorted(r["layer"] for r in step[0]["records"] if r["pass"] == "pool")
    assert pools == sorted(["conv2", "conv5"] * 2)  # conv1's kernels pool
    assert {r["layer"] for r in step[0]["records"]} == {*layers, "loss", "optimizer"}  # flattening is a view
    (optimizer,) = [r for r in step[0]["records"] if r["pass"] == "optimizer"]
    assert optimizer["min_bytes"] == 6 * 46_764_746  # bfloat16 parameter and gradient read, parameter written


def test_useful_flops_are_alexnets(step: tuple[dict, str]) -> None:
    """They count three passes, less conv1's input gradient: 240 GFLOP forward and 712 a step."""
    records = step[0]["records"]
    forward: dict[str, int] = {}
    for r in records:
        if r["pass"] == "fprop":
            forward[r["layer"]] = forward.get(r["layer"], 0) + r["useful_flops"]
    assert forward["conv2"] == 2 * 128 * 26 * 26 * 256 * 96 * 25
    assert forward["fc1"] == 2 * 128 * 6400 * 4096
    total = 3 * sum(forward.values()) - forward["conv1"]
    assert step[0]["totals"]["useful_flops"] == total
    assert total == pytest.approx(712e9, rel=0.01)
    # Where a tile is one pixel of many images, filter positions in the padding are skipped: of a 12 x 12 image's 36 pairs of
    # output row and filter row, 34 remain.
    images = [r for r in records if "conv2d_images" in r["kernel"]]
    assert all(r["issued_flops"] >= r["useful_flops"] for r in records if r not in images)
    assert {r["issued_flops"] for r in images if r["layer"] == "conv4"} == {2 * 128 * 384 * 384 * 34 * 34}
    assert all(0.89 * r["useful_flops"] < r["issued_flops"] < r["useful_flops"] for r in images)


def test_forward_nothing_of_conv1_before_its_pool_is_written(step: tuple[dict, str]) -> None:
    """It reads the cells and parameters, and writes the pooled output with one byte of position for each element."""
    records = [r for r in step[0]["records"] if r["layer"] == "conv1" and r["pass"] == "fprop"]
    images, cells, pooled, unpooled = (128 * size for size in (224 * 224, 56 * 56 * 16, 26 * 26 * 96, 54 * 54 * 96))
    filters = 96 * 144
    (fprop,) = [r for r in records if r["kernel"] == "_conv2d_stem_pool_kernel"]
    assert fprop["min_bytes"] == 2 * cells + 3 * pooled + 2 * (filters + 96)
    (rearranged,) = [r for r in records if r["kernel"] == "_space_to_depth_kernel"]
    assert rearranged["min_bytes"] == 2 * (images + cells)
    assert sum(r["min_bytes"] for r in records) < 2 * unpooled


def test_nothing_of_conv1_before_its_pool_is_in_its_gradient(step: tuple[dict, str]) -> None:
    """It reads the cells and the pooled output's gradient and positions; each of 88 programs writes two parts."""
    records = [r for r in step[0]["records"] if r["layer"] == "conv1" and r["pass"] in ("wgrad", "pool")]
    assert [r["kernel"] for r in records] == ["_conv2d_stem_pool_wgrad_kernel", "_unfold_filter_kernel"]
    cells, pooled, parts = 128 * 56 * 56 * 16, 128 * 26 * 26 * 96, 88 * 96 * (2 * 144 + 1)
    assert records[0]["min_bytes"] == 2 * cells + 3 * pooled + 4 * parts


@pytest.fixture(scope="module")
def trainer_step(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The step of ``alexnet-triton train`` at batch 128 in bfloat16 for sm_90."""
    return run_audit(tmp_path_factory.mktemp("audit") / "a.json", "--mode", "trainer")[0]


def test_the_trainers_step_writes_what_conv1_reads(step: tuple[dict, str], trainer_step: dict) -> None:
    """The launches are those on ready images without rearranging, after the data's kernel and before the optimizer's."""
    triton = [r for r in trainer_step["records"] if r["grid"]]
    data, *network = triton
    (sgd,) = [r for r in triton if r["layer"] == "optimizer"]
    network.remove(sgd)
    assert (data["layer"], data["kernel"]) == ("data", "_gather_resize_kernel")
    assert data["min_bytes"] == 128 * (28 * 28 + 8 + 2 * 56 * 56 * 16)  # pixels, indices, cells
    assert sgd["min_bytes"] == 10 * 46_764_746  # parameter and missing bits read and written, gradient read
    ready = [r for r in step[0]["records"] if r["grid"]]
    (rearranged,) = [r for r in ready if r["kernel"] == "_space_to_depth_kernel"]
    assert rearranged["min_bytes"] == 2 * 128 * (
        224 * 224 + 56 * 56 * 16
    )  # cells from the data's kernel save this and a launch
    ready.remove(rearranged)
    losses = [[r for r in records if r["layer"] == "loss"] for records in (network, ready)]
    assert [[r["kernel"] for r in records] for records in losses] == [
        ["_cross_entropy_kernel"],  # loss, hits and gradient
        ["_cross_entropy_kernel", "_cross_entropy_dgrad_kernel"],
    ]
    assert [r for r in network if r["layer"] != "loss"] == [r for r in ready if r["layer"] != "loss"]
    assert {r["layer"] for r in trainer_step["records"] if not r["grid"]} == {"data", "fc1", "fc2"}


def test_launches_of_the_steps(step: tuple[dict, str], trainer_step: dict) -> None:
    assert step[0]["totals"]["launches"] <= 44
    assert trainer_step["totals"]["launches"] <= 43
    assert trainer_step["totals"]["torch_operators"] <= 3  # the labels' gather, two seeds


@pytest.mark.slow
def test_older_gpus_are_given_images(tmp_path: Path) -> None:
    records = run_audit(tmp_path / "a.json", "--mode", "trainer", "--arch", "sm_80", "--batch", "2")[0]["records"]
    (data,) = [r for r in records if r["kernel"] == "_gather_resize_kernel"]
    assert data["min_bytes"] == 2 * (28 * 28 + 8 + 2 * 224 * 224)


def test_the_peers_loop_is_counted_with_its_data() -> None:
    ready, loop = (audit_peer(torch.float32, 2, mode) for mode in ("train", "trainer"))
    # Two gathers, a cast, a division, the resizing; a product with the loss and its gradient's; argmax, ==, sum, two additions.
    assert loop["launches"] == ready["launches"] + 5 + 2 + 5
    assert loop["saved_bytes_per_image"] == ready["saved_bytes_per_image"]


def test_flops_of_conv1_with_its_pool() -> None:
    """Each row of windows takes three rows of pixels, and each strip takes one more column."""
    a = {"N": 128, "K": 96, "USEFUL_POSITIONS": 121, "CONV_SIZE": 54 * 54, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_N2": 32}
    useful = 2 * 128 * 54 * 54 * 96 * 121
    forward = a | {"Q": 26, "ROWS": 1, "columns": 6, "BLOCK_K": 32, "BLOCK_K2": 16}
    issued = 2 * 128 * (26 * 3) * (2 * 26 + 5) * 96 * 144
    assert flops("_conv2d_stem_pool_kernel", (26 * 2 * 5,), forward) == (useful, issued)
    two_rows = forward | {"ROWS": 2}
    issued = 2 * 128 * (13 * 5) * (2 * 26 + 5) * 96 * 144
    assert flops("_conv2d_stem_pool_kernel", (13 * 2 * 5,), two_rows) == (useful, issued)
    # Its gradient: three blocks of filters; each pixel, in 27 x 27 blocks of 2 x 2, takes the 64 positions of four cells.
    backward = a | {"P": 26, "Q": 26, "BLOCK_N": 32, "BLOCK_K": 64}
    issued = 2 * 128 * 54 * 54 * 96 * 3 * 64
    assert flops("_conv2d_stem_pool_wgrad_kernel", (3, 88), backward) == (useful, issued)


def test_no_spills_and_tensor_cores_everywhere(step: tuple[dict, str]) -> None:
    assert [r for r in step[0]["records"] if r["spill_bytes"]] == []
    assert [r for r in step[0]["records"] if r["has_dot"] and not r["tensor_core_ops"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("key", json.loads(COMMITTED.read_text()))
def test_totals_are_not_worse_than_the_committed_ones(key: str, tmp_path: Path) -> None:
    """If a change makes them worse on purpose, update the file: python -m benchmarks.audit --update.

    Update it as well where they got better: docs/performance.md takes its table from it.
    """
    arch, dtype, batch, mode = key.split("-")
    arguments = ("--arch", arch, "--dtype", dtype, "--batch", batch.removeprefix("N"), "--mode", mode)
    result, _ = run_audit(tmp_path / "a.json", *arguments)
    committed = json.loads(COMMITTED.read_text())[key]
    assert worse(result["totals"], committed) == []
    assert worse(committed, result["totals"]) == []
    without_tensor_cores = {r["layer"] for r in result["records"] if r["has_dot"] and not r["tensor_core_ops"]}
    # By default PyTorch's float32 linear layers are exact, which tensor cores are not.
    assert without_tensor_cores == ({"fc1", "fc2", "fc3"} if dtype == "float32" else set())


@pytest.mark.slow
def test_weight_gradients_multiply_next_to_nothing_in_vain(tmp_path: Path) -> None:
    """The rules, which apply where nothing was measured, split the work into parts of equal size."""
    result, _ = run_audit(tmp_path / "a.json", "--untuned")
    passes = [r for r in result["records"] if r["layer"] in ("conv2", "conv3", "conv4", "conv5") and r["pass"] == "wgrad"]
    kernels = [r["kernel"] for r in passes]
    assert kernels == ["_conv2d_images_wgrad_kernel", "_sum_parts_kernel"] * 4
    for record in passes[::2]:
        assert record["useful_flops"] >= 0.93 * record["issued_flops"], record["layer"]
        assert not record["spill_bytes"]
    assert result["totals"]["spill_bytes"] == 0


def test_flops_of_rows_of_taps() -> None:
    """In AlexNet's conv2, chunks in the padding are skipped at four of 26 columns."""
    a = {"N": 128, "P": 26, "Q": 26, "K": 256, "C": 96, "R": 5, "S": 5, "H": 26, "W": 26, "pad_h": 2, "pad_w": 2}
    a |= {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "BLOCK_K2": 32}
    columns = 22 * 480 + 288 + 416 + 384 + 320
    rows = 22 * 5 + 2 * (3 + 4)
    assert flops("_conv2d_taps_kernel", (26 * 26,), a) == (2 * 128 * 26 * 26 * 256 * 2400, 2 * 128 * 256 * rows * columns)


def test_what_counts_as_worse() -> None:
    totals = {"launches": 50, "useful_over_issued": 0.9, "bytes": 100, "saved_bytes_per_image": 10, "spill_bytes": 0}
    assert worse(totals, totals) == []
    assert worse(totals | {"launches": 49, "useful_over_issued": 0.95}, totals) == []
    assert worse(totals | {"launches": 51}, totals) == ["launches: 51, committed 50"]
    assert worse(totals | {"useful_over_issued": 0.8}, totals) == ["useful_over_issued: 0.8, committed 0.9"]


def test_the_committed_file_covers_the_targets_and_batches() -> None:
    committed = json.loads(COMMITTED.read_text())
    wanted = {case_name(arch, "bfloat16", 128, "train") for arch in TARGETS}
    wanted |= {case_name("sm_90", "bfloat16", batch, "train") for batch in (1, 1024)} | {
        case_name("sm_90", "float32", 128, "train")
    }
    assert wanted | {case_name("sm_90", "bfloat16", 128, mode) for mode in ("infer", "trainer")} == set(committed)


@pytest.mark.slow
def test_float32(tmp_path: Path) -> None:
    result, _ = run_audit(tmp_path / "a.json", "--batch", "1", "--dtype", "float32", "--mode", "infer")
    assert result["totals"]["spill_bytes"] == 0
    assert {r["pass"] for r in result["records"]} == {"fprop", "pool"}
    assert result["totals"]["saved_bytes_per_image"] == 0
    assert result["totals"]["floor_us"] is None  # no ceiling of float32 products has been measured


@pytest.fixture(scope="module")
def float32_step(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A training step at batch 128 in float32 for sm_90, with PyTorch's switches as they are: TF32 in convolutions."""
    return run_audit(tmp_path_factory.mktemp("audit") / "a.json", "--dtype", "float32")[0]


@pytest.mark.slow
def test_float32_convolutions_run_on_tensor_cores_through_descriptors(float32_step: dict) -> None:
    """conv2 to conv5 do so in all passes, and so does conv1, whose filters are small."""
    products = [r for r in float32_step["records"] if r["has_dot"] and r["layer"].startswith("conv")]
    passes = {(f"conv{i}", which) for i in range(1, 6) for which in ("fprop", "dgrad", "wgrad")} - {("conv1", "dgrad")}
    assert {(r["layer"], r["pass"]) for r in products} == passes
    assert [r for r in products if not r["tma_loads"] or not r["tensor_core_ops"]] == []
    wasteful = [r for r in products if r["layer"] != "conv1" and r["useful_flops"] < 0.95 * r["issued_flops"]]
    assert wasteful == []
    assert float32_step["totals"]["spill_bytes"] == 0


@pytest.mark.slow
def test_bytes_of_a_float32_step(float32_step: dict) -> None:
    """Copies with the batch innermost, and conv1's unpooled output and gradient, are written and read."""
    totals = float32_step["totals"]
    assert totals["bytes"] <= 0.75 * totals["nn_sequential"]["bytes"]
    assert totals["saved_bytes_per_image"] <= 1.25e6
    records = float32_step["records"]
    unpooled, pooled = (4 * 128 * size * size * 96 for size in (54, 26))
    (gradient,) = [r for r in records if r["kernel"] == "_max_pool2d_dgrad_by_batch_kernel"]
    # Window positions have one byte, numbers four; each program writes its sums.
    assert 0 < gradient["min_bytes"] - (unpooled + 5 * pooled // 4) <= 4 * 27 * 27 * 2 * 96
    (wgrad,) = [r for r in records if r["kernel"] == "_conv2d_rows_wgrad_kernel"]
    assert unpooled < wgrad["min_bytes"] < 1.4 * unpooled


def test_issued_flops_against_a_walk_over_the_programs() -> None:
    """The expected count adds up the steps of every program of each phase along the reduction."""
    a = {"N": 2, "P": 5, "Q": 4, "G": 2, "KG": 6, "CG": 3, "R": 5, "S": 3, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    a |= {"STRIDE_H": 2, "STRIDE_W": 3, "DILATION_H": 1, "DILATION_W": 2, "H": 9, "W": 8, "pad_h": 1, "pad_w": 2}
    programs = 7
    issued = 0
    for phase_h, phase_w in itertools.product(range(2), range(3)):
        taps = [(r, s) for r in range(5) for s in range(3) if r % 2 == phase_h and 2 * s % 3 == phase_w]
        for _ in range(programs):
            issued += sum(2 * 16 * 16 * 16 for _ in range(0, len(taps) * 6, 16))
    assert flops("_conv2d_dgrad_kernel", (programs * 6,), a) == (2 * 2 * 5 * 4 * 12 * 3 * 15, issued)
    assert sum(_meeting(5, 4, 6, phase) for phase in range(4)) == 5
    assert flops("_max_pool2d_fprop_kernel", (3,), {}) == (0, 0)


def test_fewest_bytes_counts_a_tensor_once_and_an_expanded_one_as_stored() -> None:
    x, y = torch.zeros(10, 10), torch.zeros(3)
    assert fewest_bytes([x, x, x[:], y]) == 400 + 12
    assert fewest_bytes([y[:1].expand(1000)]) == 12


def test_what_is_changed_in_place_is_read_and_written() -> None:
    params, grads = (torch.zeros(8), torch.zeros(5)), (torch.ones(8), torch.ones(5))
    arguments = {"param_ptrs": params, "grad_ptrs": grads, "master_ptrs": None, "buffer_ptrs": None, "lr": 0.1}
    assert moved_bytes("_sgd_kernel", arguments) == 4 * 13 * 3
    assert moved_bytes("_sgd_kernel", arguments | {"tie_ptrs": (torch.zeros(8), torch.zeros(5))}) == 4 * 13 * 3
    assert moved_bytes("_matmul_kernel", {"a_ptr": params[0], "c_ptr": grads[1]}) == 4 * 13


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (128, 0, 8, 2),
        (32, 0, 4, 16),
        (64, 100 * 1024, 4, 2),
        (255, 0, 8, 1),
        (16, 0, 1, 32),
        (32, 0, 8, 8),
        (64, 227 * 1024, 4, 1),
    ],
)
def test_programs_per_multiprocessor(registers: int, shared: int, warps: int, expected: int) -> None:
    """The expected numbers follow NVIDIA's occupancy rules for compute capability 9.0."""
    assert programs_per_multiprocessor(TARGETS["sm_90"], registers, shared, warps) == expected


def test_operators_are_counted_with_their_bytes() -> None:
    x, w = torch.ones(4, 8), nn.Parameter(torch.ones(2, 8))
    with OperatorCount() as count:
        F.linear(x, w).t().relu_()
    assert count.calls == 2  # mm and relu_; the two transpositions are views
    assert count.bytes == 4 * (32 + 16 + 8) + 4 * (8 + 8)


def test_the_peer_is_counted_as_a_written_out_step() -> None:
    peer = audit_peer(torch.float32, 2, "train")
    assert peer["saved_bytes_per_image"] == pytest.approx(4.0e6, rel=0.03)
    assert audit_peer(torch.float32, 2, "infer")["launches"] == 5 + 7 + 3 + 3
