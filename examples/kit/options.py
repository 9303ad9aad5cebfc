"""Options that all examples have."""

from __future__ import annotations

from dataclasses import dataclass

from .config import option
from .run import RESUME


@dataclass(frozen=True)
class Options:
    """Each example gives its own defaults to some."""

    out: str = option("runs/model", "folder of the run", may_change=True)
    resume: str = option("no", "auto: go on with what is in --out", choices=RESUME, may_change=True)
    seed: int = option(1, "of everything random")
    backend: str = option("auto", "of the kernels", choices=("auto", "reference", "cpu"), may_change=True)
    threads: int = option(0, "0: PyTorch's choice", may_change=True)
    log_seconds: float = option(10.0, "between lines where stderr is no terminal", may_change=True)
    quiet: bool = option(False, "no progress", may_change=True)

    def __post_init__(self) -> None:
        self.at_least(threads=0)

    def at_least(self, **lowest: float) -> None:
        """ValueError for the first option that is below its lowest value; all elements of a tuple count."""
        for name, low in lowest.items():
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one < low:
                    raise ValueError(f"{name}: expected {low} or more, got {one}")
