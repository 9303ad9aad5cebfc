"""log.csv: a row a step, buffered, on the disk whenever a checkpoint is."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pykernels.models.files import write_atomically


class Log:
    """Rows with the given columns, the first of which is "step"; what a row does not name stays empty.

    rows: how many there are, the buffered ones among them.
    """

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path, self.columns, self.rows = path, columns, 0
        self._waiting: list[dict[str, Any]] = []

    def add(self, **values: Any) -> None:
        unknown = values.keys() - set(self.columns)
        if unknown:
            raise ValueError(f"log: no column {', '.join(sorted(unknown))}")
        self._waiting.append({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
        self.rows += 1

    def flush(self) -> None:
        new = not self.path.exists()
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            writer.writerows(self._waiting)
        self._waiting.clear()

    def cut(self, count: int) -> None:
        """Keeps the first `count` rows; a resumed run makes the others again."""
        if not self.path.exists():
            return
        rows = read(self.path)[:count]
        self.rows = len(rows)

        def write(path: Path) -> None:
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.path, write)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a log; one that was cut short by the end of its process is left out."""
    with open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and row["step"].isdigit()]
