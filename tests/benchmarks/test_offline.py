"""What the compiler makes of every kernel for GPUs that are not here: no spills, tensor cores, no float atomics."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton
import triton.language as tl

import kernels
from benchmarks.offline import SHARED_BYTES
from kernels.convolution.descriptor import ptxas_version

ROOT = Path(__file__).parents[2]
#: The dtypes of each architecture. On Ampere the kernels of float16 are those of bfloat16, so one of the two is enough.
DTYPES = {"sm_80": ("bfloat16", "float32"), "sm_90": ("bfloat16", "float16", "float32")}


#: Kernels with products whose operands come through tensor descriptors, on sm_90 and later: in half precision and in TF32; in
#: half precision only; in TF32 only, PyTorch's default for float32 convolutions.
BOTHS_PRODUCTS = {"_conv2d_images_kernel", "_conv2d_box_kernel", "_conv2d_images_wgrad_kernel"}
HALFS_PRODUCTS = {
    *("_conv2d_stem_kernel", "_conv2d_stem_wgrad_kernel", "_conv2d_stem_pool_kernel", "_conv2d_stream_k_wgrad_kernel"),
    *("_conv2d_stem_pool_wgrad_kernel", "_conv2d_taps_kernel", "_matmul_descriptor_kernel", "_matmul_shares_kernel"),
}
TF32_PRODUCTS = {
    *("_conv2d_rows_kernel", "_conv2d_rows_wgrad_kernel"),
}
DESCRIPTOR_PRODUCTS = BOTHS_PRODUCTS | HALFS_PRODUCTS | TF32_PRODUCTS
#: With the kernels that prepare their operands or sum their parts.
HALFS_KERNELS = HALFS_PRODUCTS | {"_space_to_depth_kernel", "_sum_stream_k_kernel", "_matmul_shares_finish_kernel"}
TF32_KERNELS = TF32_PRODUCTS | {"_by_batch_kernel", "_cells_by_batch_kernel", "_max_pool2d_dgrad_by_batch_kernel"}
DESCRIPTOR_KERNELS = HALFS_KERNELS | TF32_KERNELS | BOTHS_PRODUCTS | {"_fold_filter_kernel", "_unfold_filter_kernel"}
#: The kernel for operands of exact float32 linear layers.
FLOAT32_KERNELS = {"_row_major_kernel"}
#: Kernels that copy with the batch innermost: they divide a tile's number, not multiply it, to get an offset.
COPIES = {"_by_batch_kernel", "_cells_by_batch_kernel"}


def _compile(*arguments: str) -> list[dict]:
    """Compile in another process, since this one may run the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.offline", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in DTYPES])
def launches(request: pytest.FixtureRequest) -> list[dict]:
    """Every launch of a training step at batch 128 and of the single operations, compiled."""
    return _compile("--arch", request.param, "--dtype", *DTYPES[request.param], "--batch", "128")


def kernel_names() -> set[str]:
    """Every ``_..._kernel`` in the package."""
    names = set()
    for module in pkgutil.walk_packages(kernels.__path__, "kernels."):
        names |= {n for n in vars(importlib.import_module(module.name)) if n.endswith("_kernel")}
    return names


def test_every_kernel_is_compiled_in_every_dtype(launches: list[dict]) -> None:
    for dtype in DTYPES[launches[0]["arch"]]:
        expected = kernel_names()
        if launches[0]["arch"] == "sm_80":
            expected -= DESCRIPTOR_KERNELS
        expected -= HALFS_KERNELS if dtype == "float32" else TF32_KERNELS | FLOAT32_KERNELS
        assert {r["kernel"] for r in launches if r["dtype"] == dtype} == expected


def test_no_spills(launches: list[dict]) -> None:
    assert [r for r in launches if r["stack_bytes"] or r["local_bytes"]] == []


def test_a_kernel_waits_for_the_one_before_it(launches: list[dict]) -> None:
    """From Hopper on, launches overlap (programmatic dependent launch): no kernel reads or writes before it waits."""
    assert {r["waits_first"] for r in launches} == {launches[0]["arch"] != "sm_80"}


LINEAR = {"_matmul_kernel", "_linear_narrow_backward_kernel"}
GENERAL = {"_conv2d_fprop_kernel", "_conv2d_dgrad_kernel", "_conv2d_wgrad_kernel"}
TENSOR_CORE_OPS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


@pytest.mark.parametrize("half", [True, False], ids=["half", "tf32"])
def test_products_run_on_tensor_cores(half: bool, launches: list[dict]) -> None:
    """All do in half precision. In float32 only convolutions do: by default PyTorch's linear layers are exact, not TF32."""
    arch = launches[0]["arch"]
    products = [r for r in launches if r["has_dot"] and (r["dtype"] != "float32") == half]
    described = BOTHS_PRODUCTS | (HALFS_PRODUCTS if half else TF32_PRODUCTS)
    assert {r["kernel"] for r in products} == GENERAL | LINEAR | (described if arch != "sm_80" else set())
    convolutions = [r for r in products if half or r["kernel"] not in LINEAR]
    assert [r for r in convolutions if not r["tensor_core_ops"]] == []
    # These kernels' operands are in shared memory. In float32 the general kernels' go through registers, as for few outputs.
    warp_group = [r for r in products if (half or r["kernel"] in described) and r["kernel"] != "_linear_narrow_backward_kernel"]
    assert [r for r in warp_group if not r["tensor_core_ops"].get(TENSOR_CORE_OPS[arch])] == []


def test_tma_feeds_the_tensor_cores(launches: list[dict]) -> None:
    """Operands come by TMA and none goes through registers, where Triton 3.6 lets it be overwritten too early."""
    records = [r for r in launches if r["kernel"] in DESCRIPTOR_PRODUCTS]
    assert {r["kernel"] for r in records} == (DESCRIPTOR_PRODUCTS if launches[0]["arch"] != "sm_80" else set())
    assert [r for r in records if not r["tma_loads"] or r["register_operands"]] == []


def test_copies_past_the_registers_feed_an_a100s_tensor_cores(launches: list[dict]) -> None:
    """Both operands are copied 16 bytes at a time in each pass's large tiles: three stages of two 128 x 32 blocks."""
    if launches[0]["arch"] != "sm_80":
        pytest.skip("later GPUs have TMA, or read shared memory in other layouts")
    convolutions = [r for r in launches if r["kernel"].startswith("_conv2d") and r["has_dot"]]
    assert [r for r in convolutions if r["dtype"] == "float32" and not r["async_copies"]] == []
    for dtype in DTYPES["sm_80"]:
        itemsize = 4 if dtype == "float32" else 2
        stage = 2 * 128 * 32 * itemsize
        large = [r for r in convolutions if r["dtype"] == dtype and r["shared_bytes"] >= 2 * stage]
        assert {r["kernel"] for r in large} == {"_conv2d_fprop_kernel", "_conv2d_dgrad_kernel", "_conv2d_wgrad_kernel"}
        assert [r for r in large if r["async_copies"] * 16 * 32 * r["num_warps"] != 3 * stage] == []


@pytest.mark.slow
def test_exact_float32_spills_nothing_on_an_a100() -> None:
    """Exact products are computed in registers, which leaves few for pointers. The test of the TF32 switch covers sm_90."""
    assert _compile("--check", "--arch", "sm_80", "--dtype", "float32", "--no-tf32", "--batch", "128") == []


def test_shared_memory_fits(launches: list[dict]) -> None:
    assert [r for r in launches if r["shared_bytes"] > SHARED_BYTES[r["arch"]]] == []


@pytest.mark.slow
def test_an_amd_gpu_runs_the_general_kernels() -> None:
    """They fit in its 64 KiB of shared memory, spill nothing and multiply on its matrix cores."""
    records = _compile("--arch", "gfx942", "--dtype", "bfloat16", "--batch", "128")
    assert {r["kernel"] for r in records} == kernel_names() - DESCRIPTOR_KERNELS - FLOAT32_KERNELS
    assert [r for r in records if r["stack_bytes"] or r["local_bytes"]] == []
    assert [r for r in records if r["shared_bytes"] > SHARED_BYTES["gfx942"]] == []
    assert [r for r in records if r["has_dot"] and not r["tensor_core_ops"].get("v_mfma")] == []
    assert [r for r in records if r["float_atomics"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gfx90a", "gfx942"])
def test_float32_convolutions_of_an_amd_gpu_run_on_its_matrix_cores(arch: str) -> None:
    """PyTorch's switch allows TF32 by default. An MI200 has none and multiplies float32 exactly; an MI300 has it."""
    program = """
import dataclasses, json, sys
import torch, kernels
from benchmarks.offline import compile_launches

def step():
    x, w = torch.empty(2, 96, 26, 26, requires_grad=True), torch.empty(256, 96, 5, 5, requires_grad=True)
    kernels.conv2d(x, w, padding=2).sum().backward()

for launched in compile_launches(step, sys.argv[1]):
    print(json.dumps(dataclasses.asdict(launched)))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, arch]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    products = [r for r in map(json.loads, result.stdout.splitlines()) if r["has_dot"]]
    assert {"_conv2d_fprop_kernel", "_conv2d_dgrad_kernel", "_conv2d_wgrad_kernel"} <= {r["kernel"] for r in products}
    assert [r for r in products if r["stack_bytes"] or r["local_bytes"] or r["shared_bytes"] > SHARED_BYTES[arch]] == []
    assert [r for r in products if not r["tensor_core_ops"].get("v_mfma")] == []


def test_no_float_atomics(launches: list[dict]) -> None:
    assert [r for r in launches if r["float_atomics"]] == []


def test_no_reduction_of_a_layout_of_any_bases(launches: list[dict]) -> None:
    """Triton 3.6 sums wrong elements of some such tensors (its pull request 9219), which no interpreter shows."""
    assert [r for r in launches if r["linear_reductions"]] == []


def test_images_and_cells_are_computed_without_fused_products(launches: list[dict]) -> None:
    """The compiler's choice of products to fuse with a sum depends on nearby code: cells and images would differ in bits."""
    records = [r for r in launches if r["kernel"] == "_gather_resize_kernel"]
    assert len(records) == 10 * len(DTYPES[launches[0]["arch"]])
    assert [r for r in records if r["fused_products"]] == []
    assert any(r["fused_products"] for r in launches)  # other kernels do fuse


@pytest.mark.slow
def test_offsets_of_large_tensors_are_in_int64_from_the_program_id_on() -> None:
    """Nothing spills there either, although int64 offsets need twice the registers."""
    records = _compile("--arch", "sm_90", "--dtype", "bfloat16", "float32", "--wide", "--batch", "128")
    assert {r["kernel"] for r in records} == kernel_names()
    assert [r for r in records if r["int32_program_products"]] == []
    assert [r for r in records if r["stack_bytes"] or r["local_bytes"]] == []


@triton.jit
def _reduce_transposed_kernel(x_ptr, out_ptr, steps):
    """The sum of a block of five dimensions that was permuted and reshaped, [32, 16] to [16, 32]."""
    rows = tl.arange(0, 4)[:, None, None, None, None] * 8 + tl.arange(0, 8)[None, None, None, :, None]
    columns = tl.arange(0, 4)[None, None, :, None, None] * 4 + tl.arange(0, 4)[None, None, None, None, :]
    total = tl.zeros((4, 1, 4, 8, 4), dtype=tl.float32)
    for step in range(steps):
        total += tl.load(x_ptr + step * 512 + rows * 16 + columns)
    tl.store(out_ptr + tl.arange(0, 16), tl.sum(tl.permute(total, (1, 2, 4, 0, 3)).reshape(16, 32), axis=1))


def test_the_check_of_reductions_sees_one() -> None:
    code = (
        "import torch\nfrom benchmarks.offline import compile_launch, offline_target\n"
        "from tests.benchmarks.test_offline import _reduce_transposed_kernel as kernel\n"
        "with offline_target(90):\n"
        "    arguments = {'x_ptr': torch.empty(512), 'out_ptr': torch.empty(16), 'steps': 3}\n"
        "    print(compile_launch(kernel, (1,), arguments).linear_reductions)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert printed.stdout == "1\n"


def test_the_int64_check_sees_an_int32_product(launches: list[dict]) -> None:
    """The kernels for small tensors multiply program ids in int32, and the check reports each."""
    # A row of many classes is one program's block, with a factor of 1, and the sum over programs has one program.
    without = COPIES | {"_cross_entropy_kernel", "_cross_entropy_sum_kernel"}
    assert {r["kernel"] for r in launches if not r["int32_program_products"]} <= without


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "tf32"), [("sm_90", True), ("sm_90", False), ("sm_100", True)])
def test_the_tf32_switch_reaches_the_code(arch: str, tf32: bool) -> None:
    """With either switch, for few images and for many, nothing spills and shared memory suffices."""
    records = _compile("--arch", arch, "--dtype", "float32", "--tf32" if tf32 else "--no-tf32", "--batch", "128")
    products = [r for r in records if r["has_dot"]]
    assert products
    assert [r for r in products if bool(r["tensor_core_ops"]) != tf32] == []
    assert [r for r in records if r["stack_bytes"] or r["local_bytes"] or r["shared_bytes"] > SHARED_BYTES[arch]] == []
    assert [r for r in records if r["float_atomics"]] == []
    described = [r for r in products if r["tma_loads"]]
    expected = BOTHS_PRODUCTS | TF32_PRODUCTS | {"_matmul_descriptor_kernel", "_matmul_shares_kernel"}
    assert {r["kernel"] for r in described} == (expected if tf32 else set())
    assert [r for r in described if r["register_operands"] or not r["tensor_core_ops"].get(TENSOR_CORE_OPS[arch])] == []


@pytest.mark.slow
def test_each_target_of_one_process_gets_code_of_its_own() -> None:
    """Triton caches compiled code by device, so the targets must count as different devices."""
    program = """
import torch, kernels
from benchmarks.offline import compile_launches

def step():
    kernels.linear(torch.empty(128, 512, dtype=torch.bfloat16), torch.empty(512, 512, dtype=torch.bfloat16))

for capability in (90, 100):
    print(*[name for launched in compile_launches(step, capability) for name in launched.tensor_core_ops])
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.stdout.split() == ["wgmma.mma_async", "tcgen05.mma"], result.stderr


_FROM_REGISTERS = """
import subprocess, sys, tempfile
from pathlib import Path
import torch, triton, kernels
from benchmarks.offline import compile_launch, offline_target
from kernels.configs import tables
from kernels.runtime import launch

dtype = getattr(torch, sys.argv[1])
x = torch.empty(128, 96, 26, 26, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
w = torch.empty(256, 96, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"

def show(kernel, grid, arguments):
    if not arguments.get("DGRAD"):
        return
    launched = compile_launch(kernel, grid, arguments)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.warmup(grid=grid, **arguments).asm["cubin"])
        code = subprocess.run([disassembler, file.name], capture_output=True, text=True, check=True).stdout
    # Between the first product and the last: the loop, without the epilogue.
    loop = code[code.index("HGMMA") : code.rindex("HGMMA")]
    counts = [code.count("HGMMA"), loop.count("LDSM"), code.count("WARPGROUP.DEPBAR")]
    print(launched.register_operands, launched.stack_bytes, launched.local_bytes, *counts)

with offline_target(90), launch.record_launches(show):
    y = kernels.conv2d(x, w, padding=2)
    with tables.override(REGISTERS=int(sys.argv[2])):
        y.backward(torch.empty_like(y))
"""


def _from_registers(dtype: str, registers: int) -> subprocess.CompletedProcess[str]:
    """conv2's input gradient at batch 128, with REGISTERS and otherwise an H100's recorded configuration."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _FROM_REGISTERS, dtype, str(registers)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_first_operand_from_registers_is_read_once_for_both_blocks(dtype: str) -> None:
    """In a warp, with 64 + 32 columns of two pixels and 64 channels a step: 16 wgmma, 8 loads of 16 x 16, 4 waits.

    ptxas may wait for each wgmma separately, which is correct but slow: then there are 16 waits.
    """
    if ptxas_version(90) < (13, 3):
        pytest.skip("this Triton's ptxas is refused")
    result = _from_registers(dtype, 1)
    assert result.returncode == 0, result.stderr
    operands, stack, local, products, loads, waits = map(int, result.stdout.split())
    assert (operands, stack, local, products) == (4, 0, 0, 16)
    assert loads <= 8
    assert waits <= 5


@pytest.mark.slow
def test_a_first_operand_from_registers_is_refused_before_ptxas_13_3() -> None:
    if ptxas_version(90) >= (13, 3):
        pytest.skip("this Triton's ptxas is new enough")
    result = _from_registers("bfloat16", 1)
    version = ".".join(map(str, ptxas_version(90)))
    assert f"Triton {triton.__version__} has ptxas {version} for sm_90" in result.stderr
    assert _from_registers("bfloat16", 0).stdout.startswith("0 0 0 16 ")


_LINEAR = """
import dataclasses, json, sys
import torch, kernels
from benchmarks.offline import compile_launches

torch.backends.cuda.matmul.fp32_precision = sys.argv[1]

def step():
    for batch in map(int, sys.argv[3:]):
        for outputs, inputs in ((4096, 6400), (4096, 4096), (10, 4096)):
            x, w, b = (torch.empty(*size, requires_grad=True) for size in ((batch, inputs), (outputs, inputs), (outputs,)))
            kernels.linear(x, w, b, activation="relu").sum().backward()

for launched in compile_launches(step, int(sys.argv[2])):
    print(json.dumps(dataclasses.asdict(launched)))
"""


def _linear_launches(precision: str, arch: str, *batches: int) -> list[dict]:
    """AlexNet's linear layers in float32, three passes each, compiled; without the biases' gradients."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _LINEAR, precision, arch.removeprefix("sm_"), *map(str, batches)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    return [r for r in records if r["kernel"].startswith(("_matmul", "_row_major", "_linear_narrow"))]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_linear_layers_in_tf32_run_on_tensor_cores_through_descriptors(arch: str) -> None:
    """fc1 and fc2 do so in all passes; fc3's ten outputs have their own kernels, and only the backward one has products."""
    records = _linear_launches("tf32", arch, 7, 128)
    assert [r for r in records if r["stack_bytes"] or r["local_bytes"] or r["shared_bytes"] > SHARED_BYTES[arch]] == []
    products = [r for r in records if r["has_dot"]]
    by_tma = ("_matmul_descriptor_kernel", "_matmul_shares_kernel")
    assert [r["kernel"] in by_tma for r in products] == [*[True] * 6, False] * 2
    described = [r for r in products if r["kernel"] in by_tma]
    assert {r["kernel"] for r in described} == set(by_tma)
    wanted = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}[arch]
    assert [r for r in described if not r["tma_loads"] or not r["tensor_core_ops"].get(wanted) or r["register_operands"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_exact_linear_layers_do_not_spill(arch: str) -> None:
    records = _linear_launches("ieee", arch, 1, 2, 7, 128, 1024)
    products = [r for r in records if r["has_dot"]]
    assert len(products) == 4 * 7 + 9  # ten outputs have one product, except three for 1024 rows
    assert {r["kernel"] for r in products} == {"_matmul_kernel", "_linear_narrow_backward_kernel"}
    assert not any(r["tensor_core_ops"] for r in products)
    assert [r for r in records if r["stack_bytes"] or r["local_bytes"] or r["shared_bytes"] > SHARED_BYTES[arch]] == []
