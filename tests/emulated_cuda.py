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


def _glue_files(operator: str) -> tuple[Path, ...]:
    device = [ROOT / "csrc" / "cuda" / f"{name}.cpp" for name in ("batch", operator)]
    return (*device, *(ROOT / "csrc" / f"{name}.cpp" for name in ("arguments", "ops", f"{operator}_arguments")))


def _flags(capability: str) -> tuple[str, ...]:
    return (*(f"-I{folder}" for folder in INCLUDE), *["-DPYKERNELS_SM90A"] * (capability == "90"))


def namespace_of(operator: str, capability: str, *way: str) -> str:
    """A namespace is defined once a process, so that each way of building has its own."""
    return "_".join(("pykernels", operator, f"sm{capability}", *way))


def build_operator(operator: str, capability: str, count: bool = False) -> ptx_on_cpu.Library:
    """Builds kernels/cuda/<operator>*.cu with csrc/cuda/<operator>.cpp and loads torch.ops.<library.namespace>.

    capability: "80" or "90". count: with counters.
    """
    library = ptx_on_cpu.build(*kernel_files(operator), arch=capability, flags=_flags(capability), count=count)
    library.capability = int(capability)
    library.namespace = namespace_of(operator, capability, *["counted"] * count)
    library.operators = load_operators(_glue_files(operator), library, library.namespace, INCLUDE)
    record_allocations(library.operators)
    # Other tests' tensors are older than the record, and so outside of the allowed memory.
    if problem := getattr(importlib.import_module(f"tests.{operator}_cases"), "problem", None):
        problem.cache_clear()
    return library


def compile_operator(operator: str, sanitizer: str, kernels: list[Path] | None = None) -> tuple[Path, Path]:
    """Libraries of kernels for 8.0 and of glue, in namespace_of(operator, "80", sanitizer), for another process.

    That has to be started with the sanitizer's library. kernels: other files in place of the operator's own.
    """
    launchers = ptx_on_cpu.build_cuda(tuple(kernels or kernel_files(operator)), "80", _flags("80"), sanitizer)
    namespace = namespace_of(operator, "80", sanitizer)
    return launchers, build_operators(_glue_files(operator), launchers, namespace, INCLUDE, sanitizer)


@contextmanager
def emulating(library: ptx_on_cpu.Library, schedule: str, module: str, **operators: str) -> Iterator[str]:
    """backend="cpu" calls the library's operators: names of `module` stand for these. Yields "cpu".

    schedule: a key of SCHEDULES. Accesses are held to the exact bytes of PyTorch's tensors.
    """
    own = getattr(torch.ops, library.namespace)
    options = {"schedule": SCHEDULES[schedule], "capability": library.capability, "processors": 4}
    with pytest.MonkeyPatch.context() as patch, library.runtime.options(**options), library.runtime.bounds():
        for name, operator in operators.items():
            patch.setattr(importlib.import_module(module), name, getattr(own, operator).default)
        yield "cpu"
