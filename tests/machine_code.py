"""What nvcc makes of kernels/cuda for each GPU: registers, shared memory, spills and instructions of every kernel.

``python -m tests.machine_code`` writes machine_code.json anew: the registers and bytes of shared memory that
test_machine_code.py holds the kernels to.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.ptx_on_cpu.build import cache_folder, key, nvcc

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_suffix(".json")
ARCHS = ("80", "90a", "100a", "120")
FLAGS = ("-std=c++17", "-O3", "-DPYKERNELS_SM90A", "-Xptxas", "-v")
# One of those that matter, with what is asked of it: the multiplications of tensor cores and others, 16-byte accesses.
INSTRUCTIONS = re.compile(r"\b(HGMMA|UTC\w*MMA|HMMA\.\S+|FFMA|LDGSTS\S*\.128|LDG\S*\.128|STG\S*\.128|LDSM)")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass
class Kernel:
    """One kernel for one architecture. name: as in the source, with template arguments and without parameters."""

    name: str
    arch: str
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    instructions: set[str] = field(default_factory=set)


def cuobjdump() -> str | None:
    """That of CUDA, else the one that Triton brings."""
    home = Path(nvcc() or "").parent
    found = shutil.which("cuobjdump", path=str(home)) or shutil.which("cuobjdump")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


def unavailable() -> str | None:
    """Why there is no machine code to look at, None where there is."""
    if nvcc() is None:
        return "needs nvcc, in CUDA_HOME or PATH"
    if shutil.which("c++filt") is None:
        return "needs c++filt of binutils"
    return None if cuobjdump() else "needs cuobjdump, of CUDA or Triton"


def sources() -> list[Path]:
    return sorted((ROOT / "kernels" / "cuda").glob("*.cu"))


def version() -> str:
    """That of nvcc, by which registers are given out."""
    output = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release (\S+),", output)[0]


def _run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, input=text)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _built(source: Path) -> tuple[str, Path]:
    """nvcc's messages, and the machine code for all architectures; both are kept."""
    headers = "".join(f.read_text() for f in sorted((ROOT / "kernels").rglob("*h")))
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{source.stem}-{key(version(), *FLAGS, *ARCHS, headers, source.read_text())}"
    messages, code = stem.with_suffix(".txt"), stem.with_suffix(".fatbin")
    if not (messages.exists() and code.exists()):
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        own = stem.with_suffix(f".{os.getpid()}")  # moved into place when it is whole
        text = _run(str(nvcc()), *FLAGS, f"-I{ROOT}", *targets, "-fatbin", "-o", str(own), str(source))
        own.replace(code)
        messages.write_text(text)
    return messages.read_text(), code


def short_names(mangled: list[str]) -> dict[str, str]:
    """pykernels::cuda::(anonymous namespace)::kernel<float, ...>(...) as kernel<float, ...>."""
    names = _run("c++filt", "-p", text="\n".join(mangled)).split("\n")
    short = (re.sub(r"\w+::|\(anonymous namespace\)::|\(.*?\)|^void ", "", name) for name in names)
    return dict(zip(mangled, short, strict=False))


@functools.cache
def kernels(source: Path) -> tuple[list[Kernel], str]:
    """All kernels of a file for all architectures, and nvcc's warnings."""
    messages, code = _built(source)
    found: dict[tuple[str, str], Kernel] = {}
    current = Kernel("", "")
    for line in messages.splitlines():
        if match := ENTRY.search(line):
            current = found[match[1], match[2]] = Kernel(match[1], match[2])
        elif match := SPILLS.search(line):
            current.spilled = max(current.spilled, int(match[1]) + int(match[2]))
        elif match := USED.search(line):
            current.registers, current.shared = int(match[1]), int(match[2] or 0)
    for arch in ARCHS:
        function = ""
        for line in _run(str(cuobjdump()), "-sass", "-arch", f"sm_{arch}", str(code)).splitlines():
            if match := re.search(r"Function : (\w+)", line):
                function = match[1]
            elif (function, arch) in found:
                found[function, arch].instructions.update(INSTRUCTIONS.findall(line))
    names = short_names(sorted({name for name, _ in found}))
    for kernel in found.values():
        kernel.name = names[kernel.name]
    warnings = "\n".join(line for line in messages.splitlines() if "warning" in line.lower())
    return list(found.values()), warnings


def all_kernels() -> list[Kernel]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for own, _ in pool.map(kernels, sources()) for kernel in own]


def main() -> None:
    table: dict[str, dict[str, list[int]]] = {arch: {} for arch in ARCHS}
    for kernel in sorted(all_kernels(), key=lambda k: k.name):
        table[kernel.arch][kernel.name] = [kernel.registers, kernel.shared]
    lines = [
        f'  "{arch}": {{\n' + ",\n".join(f"    {json.dumps(name)}: {used}" for name, used in own.items()) + "\n  }"
        for arch, own in table.items()
    ]
    TABLE.write_text(f'{{\n  "nvcc": "{version()}",\n' + ",\n".join(lines) + "\n}\n")
    print(f"{TABLE}: {sum(map(len, table.values()))} kernels")


if __name__ == "__main__":
    main()
