"""What Triton makes of kernels for GPUs that need not be here: compiled as an operator's call on CPU tensors launches
them, every configuration of the tuned ones, and not run."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

from tests.ptx_on_cpu.triton_driver import Driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One kernel in one specialisation."""

    name: str
    capability: int
    config: tuple[Any, ...]  # its block sizes, warps, stages
    shared: int  # bytes of shared memory
    ptx: str
    cubin: bytes = field(repr=False)

    def stack_bytes(self, folder: Path) -> int:
        """Of a thread's local memory: where ptxas puts what registers do not suffice for."""
        path = folder / "kernel.cubin"
        path.write_bytes(self.cubin)
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", path]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return max(map(int, re.findall(r"STACK:(\d+)", told)))


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Inside, Triton compiles for this capability whatever is launched on CPU tensors, and runs nothing."""
    compiled: list[Compiled] = []

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            files = get_cache_manager(metadata.hash)
            path = {kind: Path(files.get_file(f"{metadata.name}.{kind}")) for kind in ("ptx", "cubin")}
            made = path["ptx"].read_text(), path["cubin"].read_bytes()
            constants = {source.fn.arg_names[at[0]]: value for at, value in source.constants.items()}
            sizes = (constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_BYTES") if name in constants)
            config = (*sizes, metadata.num_warps, metadata.num_stages)
            compiled.append(Compiled(metadata.name, capability, config, metadata.shared, *made))

        def __call__(self, *arguments: Any) -> None:
            pass

    config = triton.runtime.driver
    before, driver = config._active, Driver(capability, count=False)
    driver.launcher_cls = Launcher
    # Triton keeps compiled kernels by device, and each use of this function shall see them all.
    driver.get_current_device = lambda: id(driver)
    config.set_active(driver)
    try:
        yield compiled
    finally:
        config._active = before
