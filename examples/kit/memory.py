"""What a process holds in memory, at most, while something runs."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

PROCESS = Path("/proc/self")


class Peak:
    """The largest resident memory of the whole process, libraries and data among it, from the construction on.

    What earlier work freed is given back to the system first, where the C library can do that.
    """

    def __init__(self) -> None:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        try:
            (PROCESS / "clear_refs").write_text("5")  # Linux begins its count anew
            self.known = True
        except OSError:
            self.known = False

    def bytes(self) -> int | None:
        """None where the system does not tell it."""
        if not self.known:
            return None
        found = re.search(r"^VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text(), re.M)
        return 1024 * int(found[1]) if found else None
