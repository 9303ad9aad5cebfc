"""Pictures without a display, each on the disk whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pykernels.models.files import write_atomically


def pyplot() -> Any:
    """matplotlib.pyplot, imported where a picture is drawn: that takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    # The name that is written first has another ending.
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format=path.suffix[1:] or "png"))
