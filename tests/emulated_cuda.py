"""An operator's CUDA kernels, launchers and glue for CPU tensors, by tests/ptx_on_cpu: one library a capability."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests import ptx_on_cpu
from tests.ptx_on_cpu.torch_glue import build_operators, load_operators, record_allocations

ROOT = Path(__file__).parent.parent
INCLUDE = (ROOT, ROOT / "csrc", ROOT / "kernels", ROOT / "kernels" / "cpu")
SCHEDULES = {"forward": 0, "reverse": 1, "random": 5}


def kernel_files(operator: str) -> list[Path]:
    folder = ROOT / "kernels" / "cuda"
    return [folder / "batch.cu", *sorted(folder.glob(f"{operator}*.cu"))]


def glue_files(operator: str, *others: str) -> tuple[Path, ...]:
    """others: files of csrc without .cpp."""
    device = [ROOT / "csrc" / "cuda" / f"{name}.cpp" for name in ("batch", operator)]
    return (*device, *(ROOT / "csrc" / f"{name}.cpp" for name in ("arguments", "ops", *others)))


def compiler_flags(capability: str) -> tuple[str, ...]:
    return (*(f"-I{folder}" for folder in INCLUDE), *["-DPYKERNELS_SM90A"] * (capability == "90"))


def namespace_of(operator: str, capability: str) -> str:
    return f"pykernels_{operator}_sm{capability}"


def build_operator(operator: str, capability: str, *glue: str, **options: bool | str) -> ptx_on_cpu.Library:
    """Builds kernels/cuda/<operator>*.cu with csrc/cuda/<operator>.cpp and loads torch.ops.<library.namespace>.

    capability: "80" or "90". glue: other files of csrc without .cpp. options: those of ptx_on_cpu.build.
    """
    files, sanitizer = kernel_files(operator), options.get("sanitizer")
    library = ptx_on_cpu.build(*files, arch=capability, flags=compiler_flags(capability), **options)
    library.namespace = namespace_of(operator, capability)
    library.operators = load_operators(glue_files(operator, *glue), library, library.namespace, INCLUDE, sanitizer)
    record_allocations(library.operators)
    return library


def compile_operator(
    operator: str, capability: str, *glue: str, sanitizer: str, kernels: list[Path] | None = None
) -> tuple[Path, Path]:
    """Libraries of kernels and of glue for a process that was started with the sanitizer, made outside of it.

    kernels: other files in place of the operator's own.
    """
    files = tuple(kernels or kernel_files(operator))
    launchers = ptx_on_cpu.build_cuda(files, capability, compiler_flags(capability), sanitizer)
    namespace = namespace_of(operator, capability)
    return launchers, build_operators(glue_files(operator, *glue), launchers, namespace, INCLUDE, sanitizer)


@contextmanager
def emulating(library: ptx_on_cpu.Library, schedule: str, module: str, **operators: str) -> Iterator[str]:
    """backend="cpu" calls the library's operators: names of `module` stand for these. Yields "cpu".

    schedule: a key of SCHEDULES. Accesses are held to the exact bytes of PyTorch's tensors.
    """
    own = getattr(torch.ops, library.namespace)
    options = {"schedule": SCHEDULES[schedule], "capability": int(library.namespace[-2:]), "processors": 4}
    with pytest.MonkeyPatch.context() as patch, library.runtime.options(**options), library.runtime.bounds():
        for name, operator in operators.items():
            patch.setattr(importlib.import_module(module), name, getattr(own, operator).default)
        yield "cpu"
