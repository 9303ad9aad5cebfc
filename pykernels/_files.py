"""Files that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """write(temporary path), brought to the disk and renamed to `path`, which holds the old or the new at any time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, written atomically."""
    from safetensors.torch import save_file

    contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, dict(metadata)))
