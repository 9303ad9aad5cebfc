"""Links operators for CUDA tensors against emulated launchers and registers them for CPU tensors.

The sources are those of the GPU's library. Two things differ: device.h, which is the one here, and the namespace, of
C++ and of the operators, so that the CPU's own kernels stay what they are.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import Library, Runtime, build_glue

HERE = Path(__file__).parent


def torch_flags() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Flags for compiling and linking against the installed PyTorch, found by its files."""
    folder = Path(torch.__file__).parent
    libraries = ("torch", "torch_cpu", "c10")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    link = (f"-L{folder / 'lib'}", *(f"-l{name}" for name in libraries), f"-Wl,-rpath,{folder / 'lib'}")
    return (f"-I{folder / 'include'}", abi), link


def build_operators(
    sources: tuple[Path, ...],
    launchers: Path,
    namespace: str = "pykernels_ptx",
    include: tuple[Path, ...] = (),
    sanitizer: str | None = None,
) -> Path:
    """A library of the sources with namespace `pykernels` renamed, for torch.ops.load_library.

    `launchers`: the library that they call. `include`: folders of headers.
    """
    compile_, link = torch_flags()
    flags = (*(f"-I{i}" for i in include), *compile_, f"-Dpykernels={namespace}")
    files, replace = [*sources, HERE / "allocator.cpp"], {"device.h": HERE / "device.h"}
    return build_glue(files, [launchers], flags, sanitizer, link, replace)


@functools.cache
def load_operators(
    sources: tuple[Path, ...],
    library: Library,
    namespace: str = "pykernels_ptx",
    include: tuple[Path, ...] = (),
    sanitizer: str | None = None,
) -> ctypes.CDLL:
    """Builds and loads what build_operators makes; the operators are in torch.ops then."""
    return ctypes.CDLL(str(build_operators(sources, library.path, namespace, include, sanitizer)))


def record_allocations(operators: ctypes.CDLL) -> None:
    """From now on, PyTorch's CPU tensors are allowed memory; `with runtime().bounds():` then allows only them."""
    operators.ptx_record_allocations()


@contextlib.contextmanager
def count_launchers(operators: ctypes.CDLL, runtime: Runtime) -> Iterator[list[tuple[str, dict[str, int]]]]:
    """Collects the name that each launcher of a counting build is checked by, and what its kernels counted."""
    found: list[tuple[str, dict[str, int]]] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    def after(name: bytes) -> None:
        found.append((name.decode(), runtime.counters()))
        runtime.reset_counters()  # so that distinct sectors are those of one launcher

    pointer = ctypes.c_void_p.in_dll(operators, "ptx_after_launcher")
    runtime.reset_counters()
    pointer.value = ctypes.cast(after, ctypes.c_void_p).value
    try:
        yield found
    finally:
        pointer.value = None
