"""Runs that consist of many pieces: what is finished is kept, and not done again."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .example import write_json
from .run import Refused, Run


class Results:
    """results.json in the folder of a run, whole after each piece; see `Run` for resume.

    Usable as a dictionary from the names of the pieces to what JSON can hold.
    """

    def __init__(self, folder: Path, config: Any, resume: str) -> None:
        self.run = Run(folder, config, resume, [], checkpoint="results.json")
        self._done: dict[str, Any] = {}
        if self.run.resumed:
            try:
                self._done = json.loads(self.run.checkpoint.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise Refused(f"{self.run.checkpoint}: no JSON: {error}; remove it to begin anew") from None

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def __getitem__(self, name: str) -> Any:
        return self._done[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._done[name] = value
        write_json(self.run.checkpoint, self._done)

    def copy(self) -> dict[str, Any]:
        return dict(self._done)


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.{digits}f} +- {statistics.stdev(values) if len(values) > 1 else 0:.{digits}f}"
