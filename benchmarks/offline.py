"""Compile the launches of a piece of code for a GPU that is not there.

``python -m benchmarks.offline --arch sm_90 --dtype bfloat16`` walks a training step of AlexNet, and single operations that it
does not use, on CPU tensors. Every launch goes to Triton's compiler instead of a GPU, and its compiled code is described in a
line of JSON. ``--check`` prints only the launches that spill registers or need more shared memory than the GPU has, and fails
if there are any. This compiles every configuration that AlexNet gets:

    python -m benchmarks.offline --check --arch sm_80 sm_90 sm_100 gfx942 --dtype bfloat16 float32 --batch 1 2 7 128

``--time`` compiles the kernels that a training run on Fashion-MNIST needs in its first epoch, from an empty cache on
``--threads`` threads, and prints the seconds of each kernel:

    python -m benchmarks.offline --time --threads 1 --batch 128

Unset ``TRITON_INTERPRET`` for it: the interpreter replaces the compiler at import.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

import kernels
from alexnet_triton import AlexNet, precompile
from alexnet_triton.data.dataset import Split
from alexnet_triton.models import IMAGE_SIZE
from alexnet_triton.optim import SGD
from alexnet_triton.training.evaluation import evaluate
from alexnet_triton.training.networks import new_model
from alexnet_triton.training.recipe import Recipe, Where
from alexnet_triton.training.trainer import Trainer
from kernels.advanced import add_cross_entropy
from kernels.configs import tables
from kernels.runtime import backend, launch

#: Bytes of shared memory that a program may use, by GPU architecture; AMD's are MI200, MI300 and MI350.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
SHARED_BYTES |= {"gfx90a": 64 * 1024, "gfx942": 64 * 1024, "gfx950": 160 * 1024}

#: Tensor-core instructions in PTX, by generation, and those of AMD's matrix cores.
_TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma)")


def capability_of(arch: str) -> int | str:
    """The argument of :func:`offline_target` for an architecture: 90 for ``"sm_90"``, ``"gfx942"`` for ``"gfx942"``."""
    return int(arch.removeprefix("sm_")) if arch.startswith("sm_") else arch


class OfflineDriver(DriverBase):  # type: ignore[misc]
    """A driver that only names its target, any NVIDIA or AMD GPU: enough to compile."""

    def __init__(self, capability: int | str) -> None:
        super().__init__()
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        if isinstance(self.capability, str):
            return GPUTarget("hip", self.capability, 64)
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int | str:
        # Triton caches compiled kernels by device, so each target must be a device of its own.
        return self.capability

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("the offline driver compiles, it does not launch")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("the offline driver compiles, it does not run")


@dataclasses.dataclass(frozen=True)
class CompiledLaunch:
    """Properties of one launch, read from its compiled code."""

    kernel: str
    grid: tuple[int, ...]
    arch: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int  # spills, and arrays that did not fit into registers
    local_bytes: int
    shared_bytes: int
    tensor_core_ops: dict[str, int]
    tma_loads: int
    async_copies: int  # to shared memory without passing registers: ``cp.async``
    register_operands: int  # asynchronous products whose first operand is in registers
    float_atomics: int
    fused_products: int  # float32 products fused with a sum, or that ptxas may still fuse with one
    has_dot: bool
    waits_first: bool  # it waits for the previous kernel before any memory access; False without dependent launch
    int32_program_products: int  # int32 products with a program id: must be 0 where offsets pass 2^31
    linear_reductions: int  # reductions of tensors in a linear layout: Triton before 3.7 adds wrong elements of some


#: An asynchronous copy of 4 to 16 bytes from memory to shared memory.
_ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.")
#: A warp group's product in Triton's GPU IR names the types of its operands: the type ``tensor`` means registers.
_REGISTER_OPERAND = re.compile(r"ttng\.warp_group_dot [^\n]* : tensor<")
#: A product that names its rounding (``mul.rn``) is never fused. AMD's divisions consist of fused products too.
_FUSED_PRODUCT = re.compile(r"\b(?:fma\.rn(?:\.ftz)?|mul(?:\.ftz)?)\.f32(?:x2)?\b|\bv_(?:pk_)?fmac?_f32")
#: An access to memory that another kernel may have written or may still read.
_MEMORY_ACCESS = re.compile(r"\b(?:ld\.global|st\.global|atom|red|cp\.async|cp\.reduce)\b")
_FLOAT_ATOMIC = re.compile(
    r"\b(?:atom|red)\.\S*\.(?:f16|f16x2|bf16|bf16x2|f32|f64)\b|\b(?:(?:global|flat|buffer)_atomic|ds)_(?:pk_)?add_(?:rtn_)?b?f\d+"
)
#: The types of the tensors that a reduction adds up: they follow the operation's body.
_REDUCED = re.compile(r'"tt\.reduce"\(.*?^\s*\}\) : \(([^)]*)\)', re.DOTALL | re.MULTILINE)
_OPERATION = re.compile(r"^\s*(%[\w:#]+) = ([\w.]+)(.*)$")


def int32_program_products(ttir: str) -> int:
    """Number of int32 products in a kernel's Triton IR with an operand that is computed from a program id.

    With a tile's size as the other factor such a product overflows above 2^31 elements, even if a later sum is int64.
    """
    from_program: set[str] = set()
    products = 0
    for line in ttir.splitlines():
        match = _OPERATION.match(line)
        if match is None:
            continue
        result, name, rest = match.groups()
        operands = set(re.findall(r"%[\w#]+", rest))
        types = rest.rsplit(" : ", 1)[-1].split(" loc(")[0]
        is_int32 = re.search(r"\bi32\b|xi32>", types.split("->")[-1].split(" to ")[-1]) is not None
        if not is_int32 or (name != "tt.get_program_id" and not operands & from_program):
            continue
        from_program.add(result)
        products += name == "arith.muli"
    return products


@functools.lru_cache(maxsize=1024)
def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes of a compiled kernel, read by the ``cuobjdump`` that Triton ships."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", output)}


def _amd_resource_usage(assembly: str) -> dict[str, int]:
    """The same from AMD's assembly. Scratch memory holds the vector and scalar registers that are spilled to memory.

    Scalar registers that are spilled to lanes of vector registers use no memory. They count as vector registers.
    """
    usage = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    registers = usage["vgpr_count"]  # with those of the accumulators
    return {"REG": registers, "STACK": usage["private_segment_fixed_size"], "LOCAL": 4 * usage["vgpr_spill_count"]}


@contextlib.contextmanager
def offline_target(capability: int | str) -> Iterator[None]:
    """Compile for an NVIDIA GPU of ``capability`` (80, 90, 100) or AMD's ``"gfx942"`` inside the block; no kernel can run.

    Raises:
        RuntimeError: the process runs Triton's interpreter, which replaces the compiler.
    """
    if backend.INTERPRETED:
        raise RuntimeError("offline compilation needs a process without TRITON_INTERPRET")
    triton.runtime.driver.set_active(OfflineDriver(capability))
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to go back to
            triton.runtime.driver.reset_active()


def _waits_first(ptx: str) -> bool:
    access = _MEMORY_ACCESS.search(ptx)
    return 0 <= ptx.find("griddepcontrol.wait") < (len(ptx) if access is None else access.start())


def compile_launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> CompiledLaunch:
    """Compile one launch for the :func:`offline_target`, with the specialization of the launch itself."""
    compiled = kernel.warmup(grid=grid, **arguments)
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        usage, arch = _amd_resource_usage(assembly), compiled.metadata.target.arch
    else:
        assembly = compiled.asm["ptx"]
        usage, arch = _resource_usage(compiled.asm["cubin"]), f"sm_{compiled.metadata.target.arch}"
    found = _TENSOR_CORE.findall(assembly)
    return CompiledLaunch(
        kernel=kernel.fn.__name__,
        grid=grid,
        arch=arch,
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        tensor_core_ops={name: found.count(name) for name in sorted(set(found))},
        tma_loads=assembly.count("cp.async.bulk.tensor"),
        async_copies=len(_ASYNC_COPY.findall(assembly)),
        register_operands=len(_REGISTER_OPERAND.findall(compiled.asm["ttgir"])),
        waits_first=_waits_first(assembly),
        float_atomics=len(_FLOAT_ATOMIC.findall(assembly)),
        fused_products=len(_FUSED_PRODUCT.findall(assembly)),
        has_dot="tt.dot" in compiled.asm["ttir"],
        int32_program_products=int32_program_products(compiled.asm["ttir"]),
        linear_reductions=sum("#linear" in types for types in _REDUCED.findall(compiled.asm["ttgir"])),
    )


def compile_launches(step: Callable[[], Any], capability: int | str) -> list[CompiledLaunch]:
    """Run ``step`` on CPU tensors and compile each of its launches for the GPU of :func:`offline_target`."""
    launches: list[CompiledLaunch] = []
    with offline_target(capability), launch.record_launches(lambda *launched: launches.append(compile_launch(*launched))):
        step()
    return launches


def training_step(dtype: torch.dtype, batch: int = 2) -> None:
    """Forward, backward and two optimizer steps of AlexNet at 224 x 224, with dropout and with the input's gradient."""
    net = AlexNet().to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.empty(batch, 1, 224, 224, dtype=dtype, requires_grad=True)
    net(images).sum().backward()
    optimizer = SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):  # the first makes the momentum buffers
        optimizer.step()


def single_operations(dtype: torch.dtype) -> None:
    """Forward and backward of operations outside the step: no activation, groups, dilation, indices, large windows, data."""
    x = torch.empty(2, 96, 27, 29, dtype=dtype, requires_grad=True)
    filters = torch.empty(256, 48, 3, 3, dtype=dtype, requires_grad=True)
    bias = torch.empty(256, dtype=dtype, requires_grad=True)
    kernels.conv2d(x, filters, bias, stride=2, padding=1, dilation=2, groups=2).sum().backward()
    pooled, _ = kernels.max_pool2d(x, 3, 2, 1, return_indices=True)
    pooled.sum().backward()
    large, _ = kernels.max_pool2d(x, 5, 2, return_indices=True)
    large.sum().backward()
    pixels = torch.empty(128, 1, 224, 224, dtype=dtype)  # requires no gradient, as in training
    first = torch.empty(96, 1, 11, 11, dtype=dtype, requires_grad=True)
    first_bias = torch.empty(96, dtype=dtype, requires_grad=True)
    kernels.conv2d(pixels, first, first_bias, stride=4, padding=1, activation="relu").sum().backward()
    with torch.no_grad():
        nchw = functools.partial(kernels.conv2d, output_format=torch.contiguous_format)
        nchw(pixels, first, first_bias, stride=4, padding=1, activation="relu")
        nchw(x, filters, bias, stride=2, padding=1, groups=2)
        for batch, channels, size in ((2, 256, 12), (128, 256, 12), (128, 96, 26)):
            maps = torch.empty(batch, channels, size, size, dtype=dtype)
            nchw(maps, torch.empty(256, channels, 3, 3, dtype=dtype), bias, padding=1, activation="relu")
    for output_format in (torch.channels_last, torch.contiguous_format):
        block = functools.partial(
            kernels.conv2d_relu_max_pool2d, stride=4, padding=1, pool_kernel_size=3, pool_stride=2, output_format=output_format
        )
        block(pixels, first, first_bias).sum().backward()
        with torch.no_grad():
            block(pixels, first, first_bias)
    # At batch 256 the weight gradients of conv2 and conv4, in half precision in equal shares, as a table may ask for.
    for batch, channels, count, size, r in ((256, 96, 256, 26, 5), (256, 384, 384, 12, 3)):
        maps = torch.empty(batch, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        filters = torch.empty(count, channels, r, r, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        output = kernels.conv2d(maps, filters, padding=r // 2)
        with tables.override(STREAM_K=int(dtype != torch.float32)):
            output.backward(torch.empty_like(output))
    features = torch.empty(130, 768, dtype=dtype, requires_grad=True)
    weight = torch.empty(640, 768, dtype=dtype, requires_grad=True)
    kernels.dropout(kernels.linear(features, weight)).sum().backward()
    for narrow in (1, 0):  # few outputs, in one kernel and as matrix products
        with tables.override(NARROW=narrow):
            kernels.linear_relu_dropout(features, weight[:20]).sum().backward()
    if dtype != torch.float32:
        # AlexNet's fc1 at a batch size without a table entry: equal shares of steps and of whole tiles.
        features = torch.empty(256, 6400, dtype=dtype, requires_grad=True)
        weight = torch.empty(4096, 6400, dtype=dtype, requires_grad=True)
        output = kernels.linear(features, weight)
        output.backward(torch.empty_like(output))
    kernels.dropout_mask((1000,), 0.5, 1)
    for rows, classes in ((128, 10), (2048, 1000)):
        logits = torch.empty(rows, classes, dtype=dtype, requires_grad=True)
        labels, weight = torch.zeros(rows, dtype=torch.int64), torch.empty(classes, dtype=dtype)
        kernels.cross_entropy(logits, labels).backward()
        kernels.cross_entropy(logits, labels, weight=weight, label_smoothing=0.1).backward()
        for scale in (None, 1.0):
            add_cross_entropy(logits, labels, torch.zeros(()), torch.zeros(()), scale)
    images, index = torch.empty(60000, 28, 28, dtype=torch.uint8), torch.zeros(128, dtype=torch.int64)
    ones = torch.ones(128)
    pairs = torch.ones(128, 2, dtype=torch.int32)
    changes = (
        None,
        kernels.Augmentation(pairs, ones > 0, ones, ones),
        kernels.Augmentation(pairs, ones > 0, ones, ones, pairs),
        kernels.Augmentation(offset=pairs, size=pairs),
        kernels.Augmentation(flip=ones > 0),
    )
    cells = kernels.Cells(kernel_size=11, stride=4, padding=1)  # conv1's
    for change, of_conv1 in itertools.product(changes, (None, cells)):
        kernels.gather_resize(images, index, 224, dtype=dtype, augmentation=change, cells=of_conv1)


@contextlib.contextmanager
def _timed_compilations() -> Iterator[list[float]]:
    """Print the seconds of each kernel compiled in the block; yield those spent in Python code, which holds its global lock."""
    python: list[float] = []

    def listen(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            python.append(times.ir_initialization * 1e-6)
            print(json.dumps({"kernel": src.fn.__name__, "seconds": times.total * 1e-6, "python_seconds": python[-1]}))

    with tempfile.TemporaryDirectory() as folder, knobs.compilation.scope(), knobs.cache.scope():
        knobs.cache.dir = folder
        knobs.compilation.listener = listen
        yield python


def time_run(capability: int | str, dtype: torch.dtype, batch: int, threads: int | None) -> None:
    """Compile the kernels of AlexNet's training on 60,000 images and of its evaluation on 10,000, and print the times.

    Args:
        threads: number of compiling threads; None: one for each core.
    """
    cpu, size = torch.device("cpu"), IMAGE_SIZE["alexnet"]
    net = new_model("alexnet", 0, cpu, dtype)

    def images(count: int) -> Split:
        return Split(torch.zeros(count, 28, 28, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))

    trainer = Trainer(net, images(60_000), Recipe(batch_size=batch), Where(cpu))

    def steps(count: int) -> None:
        net.train()
        for _ in range(2):  # the second step finds existing masters
            trainer.step(trainer.index[:count])

    def evaluation(count: int) -> None:
        evaluate(net, images(count), batch_size=batch, image_size=size, device=cpu)

    parts = [("steps", steps, batch), ("last step", steps, 60_000 % batch)]
    parts += [("evaluation", evaluation, batch), ("its last batch", evaluation, 10_000 % batch)]
    compiled, begin, cpu_begin = 0, time.perf_counter(), sum(os.times()[:4])
    with _timed_compilations() as python, offline_target(capability), launch.launch_without_gpu():
        for name, walk, count in parts:
            if count:
                new = precompile(functools.partial(walk, count), threads=threads)
                compiled += new
                print(json.dumps({"part": name, "batch": count, "kernels": new}))
    total = {"kernels": compiled, "threads": threads, "seconds": time.perf_counter() - begin, "python_seconds": sum(python)}
    print(json.dumps(total | {"cpu_seconds": sum(os.times()[:4]) - cpu_begin}))  # of children too: ptxas is a program


def main() -> None:
    """Compile for each architecture and dtype; print a JSON line per launch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=list(SHARED_BYTES))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], help="float32, float16, bfloat16")
    parser.add_argument("--batch", nargs="+", type=int, default=[2])
    parser.add_argument("--check", action="store_true", help="print launches that spill or do not fit; fail if there are any")
    parser.add_argument(
        "--tf32", action=argparse.BooleanOptionalAction, help="allow TF32 for float32; default: PyTorch's own switches"
    )
    parser.add_argument("--wide", action="store_true", help="compile for tensors of more than 2^31 elements")
    parser.add_argument("--time", action="store_true", help="print how long a training run's kernels take to compile")
    parser.add_argument("--threads", type=int, help="number of compiling threads for --time; default: one for each core")
    arguments = parser.parse_args()
    launch.force_int64 = arguments.wide
    if backend.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: the interpreter replaces the compiler")
    if arguments.tf32 is not None:
        precision = "tf32" if arguments.tf32 else "ieee"
        torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]  # made at run time
        torch.backends.cuda.matmul.fp32_precision = precision

    if arguments.time:
        for arch, name, batch in itertools.product(arguments.arch, arguments.dtype, arguments.batch):
            time_run(capability_of(arch), getattr(torch, name), batch, arguments.threads)
        return
    compiled, bad = 0, 0
    for arch, name in itertools.product(arguments.arch, arguments.dtype):
        dtype = getattr(torch, name)

        def everything(dtype: torch.dtype = dtype) -> None:
            for batch in arguments.batch:
                training_step(dtype, batch)
            single_operations(dtype)

        for launched in compile_launches(everything, capability_of(arch)):
            compiled += 1
            wrong = launched.stack_bytes or launched.local_bytes or launched.shared_bytes > SHARED_BYTES[arch]
            bad += bool(wrong)
            if wrong or not arguments.check:
                print(json.dumps({"dtype": name, **dataclasses.asdict(launched)}))
    if arguments.check:
        print(f"{compiled} launches compiled, {bad} of them spill or do not fit", file=sys.stderr)
        sys.exit(bool(bad))


if __name__ == "__main__":
    main()
