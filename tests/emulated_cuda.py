"""An operator's CUDA kernels, launchers and glue for CPU tensors, by tests/ptx_on_cpu: one library a capability."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests import ptx_on_cpu
from tests.ptx_on_cpu.torch_glue import load_operators, record_allocations

ROOT = Path(__file__).parent.parent
SCHEDULES = {"forward": 0, "reverse": 1, "random": 5}


def build_operator(operator: str, capability: str, *glue: str, **options: bool | str) -> ptx_on_cpu.Library:
    """Builds kernels/cuda/<operator>*.cu with csrc/cuda/<operator>.cpp and loads torch.ops.<library.namespace>.

    capability: "80" or "90". glue: other files of csrc without .cpp. options: those of ptx_on_cpu.build.
    """
    include = (ROOT, ROOT / "csrc", ROOT / "kernels", ROOT / "kernels" / "cpu")
    flags = [f"-I{folder}" for folder in include] + ["-DPYKERNELS_SM90A"] * (capability == "90")
    kernels = [ROOT / "kernels" / "cuda" / "batch.cu", *sorted((ROOT / "kernels" / "cuda").glob(f"{operator}*.cu"))]
    library = ptx_on_cpu.build(*kernels, arch=capability, flags=tuple(flags), **options)
    sources = [ROOT / "csrc" / "cuda" / f"{name}.cpp" for name in ("batch", operator)]
    sources += [ROOT / "csrc" / f"{name}.cpp" for name in ("arguments", "ops", *glue)]
    sanitizer = options.get("sanitizer")
    library.capability = int(capability)
    # A namespace is defined once a process: each way of building has its own.
    library.namespace = "_".join(
        ("pykernels", operator, f"sm{capability}", *filter(None, ("counted" * bool(options.get("count")), sanitizer)))
    )
    library.operators = load_operators(tuple(sources), library, library.namespace, include, sanitizer)
    record_allocations(library.operators)
    # Other tests' tensors are older than the record, and so outside of the allowed memory.
    if problem := getattr(importlib.import_module(f"tests.{operator}_cases"), "problem", None):
        problem.cache_clear()
    return library


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
