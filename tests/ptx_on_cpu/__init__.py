"""Executes PTX, nvcc's or Triton's, on the CPU. README.md says what that proves.

library = build("kernels/cuda/example.cu")
library.call("example_forward", x, y, x.numel(), None)
"""

import contextlib
import ctypes
import functools
from pathlib import Path

from .build import build_cuda, build_glue, build_ptx, cache_folder, runtime_library, unavailable
from .ptx_parser import PtxError

__all__ = [
    "COUNTERS",
    "KernelError",
    "Library",
    "PtxError",
    "Runtime",
    "build",
    "build_cuda",
    "build_glue",
    "build_ptx",
    "cache_folder",
    "runtime",
    "unavailable",
]

FORWARD, REVERSE = 0, 1
# In the order of runtime/counters.h.
COUNTERS = (
    "launches blocks global_read_bytes global_write_bytes global_read_sectors global_write_sectors unique_read_sectors "
    "unique_write_sectors global_requests uncoalesced_requests shared_read_bytes shared_write_bytes shared_requests "
    "bank_conflicts atomics tensor_flops fp32_flops fp64_flops half_flops"
).split()


class KernelError(RuntimeError):
    """A launch that failed; `code` is the cudaError_t."""

    def __init__(self, code: int, message: str):
        super().__init__(f"CUDA error {code}: {message}")
        self.code = code


class _Options(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in ("schedule", "poison", "early_exits", "order_blocks", "capability", "processors")
    ]


class _Range(ctypes.Structure):
    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64), ("writable", ctypes.c_uint64)]


def _extent(memory) -> tuple[int, int]:
    """First address and bytes of a tensor's storage, of an array's buffer, or of an (address, bytes) pair."""
    if isinstance(memory, tuple):
        return memory
    if hasattr(memory, "untyped_storage"):
        storage = memory.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    while isinstance(memory.base, type(memory)):
        memory = memory.base
    return memory.ctypes.data, memory.nbytes


class Runtime:
    """The options and counters that all libraries of one way of building share. Made by `runtime`."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.ptx_options.restype = ctypes.POINTER(_Options)
        library.ptx_message.restype = ctypes.c_char_p
        library.ptx_counters.restype = ctypes.POINTER(ctypes.c_uint64 * len(COUNTERS))
        library.ptx_find.restype = library.ptx_layout.restype = ctypes.c_void_p

    def message(self) -> str:
        """Why the last launch failed: kernel, block, thread, line. Empty when it did not."""
        return self.library.ptx_message().decode()

    @contextlib.contextmanager
    def options(self, **values: int):
        """Sets options for a block of code.

        schedule: FORWARD, REVERSE, or a larger number as the seed of a random one. poison: shared memory starts as
        0xFF bytes (on). early_exits: threads may exit before barriers and warp instructions that wait for them (off).
        order_blocks: off, the thread sanitizer looks for races between blocks too (on). capability, processors: of the
        device (80, 4).
        """
        options = self.library.ptx_options().contents
        before = {name: getattr(options, name) for name in values}
        try:
            for name, value in values.items():
                setattr(options, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(options, name, value)

    @contextlib.contextmanager
    def bounds(self, *writable, read_only=()):
        """Inside, kernels may touch only the memory of these tensors or arrays, and cudaMalloc's.

        `read_only` must not be written. Views stand for their whole storage.
        """
        extents = [(*_extent(m), w) for ms, w in ((writable, 1), (read_only, 0)) for m in ms]
        table = (_Range * max(1, len(extents)))(*(_Range(a, a + n, w) for a, n, w in extents))
        self.library.ptx_set_ranges(len(extents), table)
        try:
            yield
        finally:
            self.library.ptx_set_ranges(-1, table)

    def counters(self) -> dict[str, int]:
        """What has been counted since `reset_counters`; zeros unless built with count=True."""
        return dict(zip(COUNTERS, self.library.ptx_counters().contents, strict=True))

    def reset_counters(self) -> None:
        self.library.ptx_reset_counters()


@functools.cache
def runtime(sanitizer: str | None = None, count: bool = False) -> Runtime:
    """The runtime of libraries that were built with the same arguments."""
    return Runtime(ctypes.CDLL(str(runtime_library(sanitizer, count))))


def _argument(value):
    if value is None or isinstance(value, ctypes._SimpleCData):
        return value
    if isinstance(value, bool | int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(value.data_ptr() if hasattr(value, "data_ptr") else value.ctypes.data)


class Library:
    """The extern "C" functions of a built file. Made by `build`."""

    def __init__(self, path: Path, runtime_: Runtime):
        self.path, self.runtime = path, runtime_
        self.functions = ctypes.CDLL(str(path))

    def call(self, name: str, *arguments) -> None:
        """Calls a launcher that returns cudaError_t; KernelError when that is not cudaSuccess.

        Tensors and arrays pass their address, int goes as 64 bits (right for 32-bit parameters too), float as fp32;
        ctypes values pass as they are.
        """
        if code := self.functions[name](*map(_argument, arguments)):
            raise KernelError(code, self.runtime.message())


def build(
    *sources: str | Path,
    arch: str = "80",
    flags: tuple[str, ...] = (),
    sanitizer: str | None = None,
    count: bool = False,
) -> Library:
    """Compiles .cu files with nvcc, translates their PTX, loads the library. What is in the cache is not built again.

    arch: compute capability, "80" or "90" (with wgmma). flags: further ones of nvcc, such as -D and -I. sanitizer:
    "thread" or "address", for processes that were started with that sanitizer's library. count: with counters.
    RuntimeError where `unavailable` names a reason, PtxError for PTX that is not understood.
    """
    if reason := unavailable():
        raise RuntimeError(f"ptx_on_cpu: {reason}")
    return _build(tuple(Path(s) for s in sources), arch, tuple(flags), sanitizer, count)


@functools.cache
def _build(sources: tuple[Path, ...], arch: str, flags: tuple[str, ...], sanitizer: str | None, count: bool) -> Library:
    return Library(build_cuda(sources, arch, flags, sanitizer, count), runtime(sanitizer, count))
