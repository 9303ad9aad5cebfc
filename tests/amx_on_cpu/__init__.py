"""Executes compiled AMX code on an x86-64 Linux CPU that has AVX2 but no AMX. README.md says what that proves.

if needed():
    amx = enable()
    run_the_kernel()
    assert amx.counts()["TDPBF16PS"] > 0
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("emulator.cpp")
# No contraction and no fast-math: the order of roundings is what the emulator is about.
FLAGS = "-std=c++20 -O3 -mavx2 -mfma -ffp-contract=off -fno-fast-math -fPIC -shared -fvisibility=hidden".split()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What Linux says that the CPU has; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def needed() -> bool:
    """True when this CPU has no AMX, so that AMX code runs here only under the emulator."""
    return not {"amx_tile", "amx_bf16"} <= cpu_flags()


def unavailable() -> str | None:
    """Why the emulator cannot run here, None when it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"needs Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    if not {"avx2", "fma"} <= cpu_flags():
        return "needs a CPU with AVX2 and FMA"
    return None


def compiler() -> list[str]:
    """The C++ compiler as the start of a command line: $CXX, else g++ or c++. RuntimeError when there is none."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    for name in ("g++", "c++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("no C++ compiler: install g++ or set CXX")


def compile_shared(source: Path, flags: list[str]) -> Path:
    """Compiles `source` into a shared library, or finds in the cache what the same text, flags and compiler gave."""
    command = [*compiler(), *flags]
    key = hashlib.sha256("\0".join([*command, source.read_text()]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("PYKERNELS_BUILD_DIR") or Path.home() / ".cache" / "pykernels") / "amx_on_cpu"
    library = folder / f"{source.stem}-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: another process may build the same file now.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / library.name
            done = subprocess.run([*command, "-o", str(output), str(source)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{shlex.join(command)} failed on {source.name}:\n{done.stderr}")
            output.replace(library)
    return library


def build() -> Path:
    """The emulator's shared library, compiled when it is not in the cache. RuntimeError when it cannot be built."""
    if reason := unavailable():
        raise RuntimeError(f"amx_on_cpu: {reason}")
    return compile_shared(SOURCE, FLAGS)


class Emulator:
    """The emulator of this process. Made by `enable`."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        library.amx_name.restype = ctypes.c_char_p
        self._names: list[str] = []
        while name := library.amx_name(len(self._names)):
            self._names.append(name.decode())

    def counts(self) -> dict[str, int]:
        """Instructions executed so far by all threads, by mnemonic, and "traps": how often Linux was entered."""
        values = (ctypes.c_uint64 * len(self._names))()
        self._library.amx_counts(values)
        return dict(zip(self._names, values, strict=True))

    def poison(self, on: bool) -> None:
        """With True, LDTILECFG leaves NaN in the tiles where a CPU leaves zeros: shows tiles read before written."""
        self._library.amx_poison(int(on))

    def tile(self, number: int) -> bytes:
        """The 16 x 64 bytes of one tile register of this thread. RuntimeError when it has no configuration."""
        data = ctypes.create_string_buffer(16 * 64)
        if self._library.amx_tile(number, data):
            raise RuntimeError(f"tile {number}: not a tile, or this thread has no tile configuration")
        return data.raw


def enable() -> Emulator:
    """Installs the SIGILL handler in this process, for all its threads; a second call changes nothing.

    RuntimeError on a CPU that has AMX (run natively there: see `needed`) and where `unavailable` names a reason.
    """
    if not needed():
        raise RuntimeError("amx_on_cpu: this CPU has AMX, its code runs without the emulator")
    emulator = _load(build())
    if emulator._library.amx_install():
        raise OSError(ctypes.get_errno(), "sigaction(SIGILL)")
    return emulator


@functools.cache
def _load(path: Path) -> Emulator:
    return Emulator(ctypes.CDLL(str(path), use_errno=True))
