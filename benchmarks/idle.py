"""A stand-in for a GPU that accepts every launch and runs none: for measuring the host's work before a kernel runs.

Inside :func:`idle_gpu` operations on CPU tensors walk the code path of a GPU. Triton compiles their kernels for that GPU, as
far as its IR for GPUs, and launches them with its own ``CudaLauncher``, tensor descriptors included. Only the functions that
Triton gets from ``libcuda`` are replaced, which do nothing, and the last steps of its compiler, whose machine code nobody
would run. No kernel reads or writes a tensor, so outputs hold uninitialized memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import types
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.nvidia import compiler
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel

from kernels.runtime import backend, launch, plans

from .offline import SHARED_BYTES, OfflineDriver

#: The error message in a process with ``TRITON_INTERPRET=1``.
NEEDS_COMPILER = (
    "host time is that of compiled kernels' launches: unset TRITON_INTERPRET, whose interpreter replaces the compiler"
)


class _KernelArgument(NamedTuple):
    """Replaces the class by which Triton 3.7 and later describe an argument to their launcher in C."""

    nested_tuple: Any
    type: int


class TensorMap(NamedTuple):
    """Replaces a ``CUtensorMap``, the 128 bytes of a tensor descriptor; holds the arguments of its encoding, address first."""

    arguments: tuple[Any, ...]


class _Module:
    """Replaces the handle of loaded machine code."""


class IdleUtils:
    """Replaces Triton's ``CudaUtils``: driver functions that do nothing.

    Attributes:
        on_launch: if not None, called with the arguments of every launch; for tests.
        on_descriptor: if not None, called with the arguments of every encoded descriptor; for tests.
        module: the module of every kernel.
    """

    def __init__(self) -> None:
        self.on_launch: Callable[..., object] | None = None
        self.on_descriptor: Callable[..., object] | None = None
        self.module = _Module()

    def launch(self, *arguments: Any) -> None:
        """Launch function of every compiled kernel; launches nothing."""
        if self.on_launch is not None:
            self.on_launch(*arguments)

    def fill_tma_descriptor_tiled(self, *arguments: Any) -> TensorMap:
        """Encode a tensor descriptor."""
        if self.on_descriptor is not None:
            self.on_descriptor(*arguments)
        return TensorMap(arguments)

    #: The function's name in Triton 3.6.
    fill_tma_descriptor = fill_tma_descriptor_tiled

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple[_Module, int, int, int, int]:
        """Module, function, registers, spills and threads of a kernel; the function's handle is a checksum of its code."""
        return self.module, zlib.crc32(binary), 128, 0, 1024

    def unload_module(self, module: object) -> None:
        """Unload what :meth:`load_binary` loaded."""

    def build_signature_metadata(self, signature: list[str]) -> bytes:
        """The argument types of a kernel, one byte per argument, as the launcher in C reads them."""
        return bytes(sum(kind.encode()) % 256 for kind in signature)

    def get_device_properties(self, device: str) -> dict[str, int]:
        """An H100's properties, with the shared memory of the device's generation."""
        return {
            "max_shared_mem": SHARED_BYTES[device.removeprefix("idle ")],
            "max_num_regs": 65536,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "sm_clock_rate": 1_980_000,
            "mem_clock_rate": 2_619_000,
            "mem_bus_width": 5120,
        }


#: One for the process: compiled kernels outlive an :func:`idle_gpu` block, and each keeps its launch function.
UTILS = IdleUtils()


class IdleDriver(OfflineDriver):
    """The offline driver with the real launcher in front of :data:`UTILS`."""

    def __init__(self, capability: int) -> None:
        super().__init__(capability)
        self.utils = UTILS
        self.launcher_cls = nvidia.CudaLauncher

    def get_current_device(self) -> str:
        # Not the offline driver's device, under which Triton caches kernels that have machine code.
        return f"idle sm_{self.capability}"

    def map_python_to_cpp_type(self, ty: str) -> str:
        return str(nvidia.ty_to_cpp(ty))


def _idle_module(**_: Any) -> types.SimpleNamespace:
    """Replaces the launcher in C that Triton 3.6 compiles for each kernel, with a C compiler and against libcuda."""
    return types.SimpleNamespace(launch=UTILS.launch)


#: Replacements for the parts of Triton's module that need libcuda, by global variable; each version has some of them.
_FROM_LIBCUDA: dict[str, Any] = {
    "PyKernelArg": _KernelArgument,
    "PyCUtensorMap": TensorMap,
    "ARG_CONSTEXPR": 0,
    "ARG_KERNEL": 1,
    "ARG_TUPLE": 2,
    "compile_module_from_src": _idle_module,
    "library_dirs": list,
}


@contextlib.contextmanager
def _without_libcuda() -> Iterator[None]:
    before = {name: getattr(nvidia, name) for name in _FROM_LIBCUDA if hasattr(nvidia, name)}
    for name in before:
        setattr(nvidia, name, _FROM_LIBCUDA[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(nvidia, name, value)


def _metadata_only(ttgir: Any, metadata: dict[str, Any], *_: object) -> str:
    """Replaces the step to LLVM IR: sets what the launcher reads, for a kernel without shared memory, and keeps the IR."""
    sizes = dict.fromkeys(("shared", "tmem_size", "global_scratch_size", "profile_scratch_size"), 0)
    metadata |= sizes | {"global_scratch_align": 1, "profile_scratch_align": 1}
    return str(ttgir)


def _name_only(ttgir: str, metadata: dict[str, Any], *_: object) -> str:
    """Replaces the step to PTX: finds the kernel's name."""
    (metadata["name"],) = re.findall(r"tt\.func public @(\w+)", ttgir)
    return ttgir


def _ir_as_code(ttgir: str, *_: object) -> bytes:
    """Replaces the step to machine code: the IR's text, which differs wherever kernels differ."""
    return ttgir.encode()


@contextlib.contextmanager
def _without_machine_code() -> Iterator[None]:
    """End compilation at Triton's IR for GPUs, which saves more than half of its time."""
    backend, key = compiler.CUDABackend, compiler.CUDABackend.hash
    steps: dict[str, Any] = {
        "make_llir": staticmethod(_metadata_only),
        "make_ptx": staticmethod(_name_only),
        "make_cubin": staticmethod(_ir_as_code),
        "hash": lambda self: key(self) + "-idle",  # Triton's cache on the disk must not mistake them for kernels that run
    }
    with contextlib.ExitStack() as stack:
        for name, step in steps.items():
            stack.enter_context(mock.patch.object(backend, name, step))
        yield


def _keep_freed_memory() -> None:
    """Let malloc keep freed memory, as PyTorch's CUDA allocator does, for the rest of the process.

    Mapping a large tensor again takes as long as ten launches. Pages that are never written take no memory.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(-4, 0)  # M_MMAP_MAX: all from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _forget_modules() -> None:
    """Remove the stand-in's modules from compiled kernels, which keep their code and load a module at their next launch.

    A deleted kernel unloads its module with the driver that is active then. That may be a real driver, which does not know the
    stand-in's handle.
    """
    for kernel in gc.get_objects():
        if type(kernel) is CompiledKernel and kernel.module is UTILS.module:
            kernel.module = kernel._run = None


@contextlib.contextmanager
def idle_gpu(capability: int = 90) -> Iterator[IdleUtils]:
    """Run operations on CPU tensors as on an NVIDIA GPU of ``capability`` (80, 90, 100) that does nothing.

    Yields:
        The driver's functions, so that a test can see what they get.

    Raises:
        RuntimeError: the process runs Triton's interpreter, which replaces the compiler.
    """
    if backend.INTERPRETED:
        raise RuntimeError(NEEDS_COMPILER)
    _keep_freed_memory()
    triton.runtime.driver.set_active(IdleDriver(capability))
    try:
        with _without_libcuda(), _without_machine_code(), launch.launch_without_gpu():
            yield UTILS
    finally:
        plans.forget()
        _forget_modules()
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to go back to
            triton.runtime.driver.reset_active()
