"""What the tests of the emulator run: compiled and assembled tile code, and memory beside pages without access."""

import ctypes
import functools
import mmap
import subprocess
from pathlib import Path

from . import compile_shared, compiler, needed

PAGE = mmap.PAGESIZE
SOURCE = Path(__file__).with_name("tiles.cpp")
FLAGS = "-std=c++20 -O2 -mamx-tile -mamx-bf16 -fPIC -shared -Wall -Wextra".split()
PROT_NONE, PROT_ALL, MAP_32BIT = 0, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC, 0x40


@functools.cache
def tiles() -> ctypes.CDLL:
    """tiles.cpp, compiled with intrinsics. RuntimeError on a CPU with AMX when Linux refuses tile registers."""
    library = ctypes.CDLL(str(compile_shared(SOURCE, FLAGS)))
    if library.request() and not needed():
        raise RuntimeError("this CPU has AMX, but Linux refuses tile registers to this process")
    return library


def call(function, *arguments):
    """Calls a C function of pointers and 64-bit integers; an array stands for the address of its first element."""
    return function(*(ctypes.c_int64(a if isinstance(a, int) else a.ctypes.data) for a in arguments))


def config(*shapes: tuple[int, int, int]) -> bytes:
    """The 64 bytes that LDTILECFG reads; each shape is (tile, rows, bytes of a row)."""
    data = bytearray(64)
    data[0] = 1
    for tile, rows, row_bytes in shapes:
        data[48 + tile] = rows
        data[16 + 2 * tile : 18 + 2 * tile] = row_bytes.to_bytes(2, "little")
    return bytes(data)


def text(name: str, body: str) -> str:
    """A function for `assemble`, with a label `name`_end behind it."""
    return f".globl {name}\n.globl {name}_end\n{name}:\n{body}\nret\n{name}_end:\n"


def assemble(folder: Path, source: str) -> Path:
    """Assembles AT&T text into a shared library in `folder`."""
    path, library = folder / "text.s", folder / "text.so"
    path.write_text(f'{source}\n.section .note.GNU-stack,"",@progbits\n')
    command = [*compiler(), "-shared", "-nostdlib", "-x", "assembler", str(path), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return library


def address(library: ctypes.CDLL, name: str) -> int:
    """Where a function of `library` is."""
    return ctypes.cast(library[name], ctypes.c_void_p).value or 0


class Pages:
    """`size` bytes, rounded up to pages, between two pages without access.

    `low`: below 2 GiB, where a displacement of 32 bits is an address. Without close() the memory stays until exit.
    """

    def __init__(self, size: int, low: bool = False):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._size = -(-size // PAGE) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_32BIT if low else 0)
        whole = call(self._libc.mmap, 0, self._size + 2 * PAGE, PROT_ALL, flags, -1, 0)
        if whole in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        self.start, self.end = whole + PAGE, whole + PAGE + self._size
        for guard in (whole, self.end):
            if call(self._libc.mprotect, guard, PAGE, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")

    def put(self, data: bytes, at: int | None = None) -> int:
        """Writes `data` at an address, without one so that it ends where the memory ends. Returns the address."""
        at = self.end - len(data) if at is None else at
        ctypes.memmove(at, data, len(data))
        return at

    def get(self, at: int, size: int) -> bytes:
        return ctypes.string_at(at, size)

    def close(self) -> None:
        call(self._libc.munmap, self.start - PAGE, self._size + 2 * PAGE)
