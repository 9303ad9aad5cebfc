"""Loss and score curves of runs in one picture.

python examples/plot.py runs/a runs/b -o curves.png
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit import log
from kit.picture import pyplot, save


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values, of fewer at the beginning."""
    sums, out = 0.0, []
    for i, value in enumerate(values):
        sums += value - (values[i - window] if i >= window else 0.0)
        out.append(sums / min(i + 1, window))
    return out


def band(axis: Any, curves: Sequence[Sequence[float]], window: int, label: str) -> str:
    """The mean of curves, each smoothed over `window` steps, and their range; its colour."""
    first = min(window, 5)  # fewer steps than these say nothing yet
    smoothed = list(zip(*(smooth(curve, window) for curve in curves), strict=True))[first - 1 :]
    steps = range(first, first + len(smoothed))
    (line,) = axis.plot(steps, [statistics.mean(at) for at in smoothed], label=label, linewidth=1)
    axis.fill_between(steps, [min(at) for at in smoothed], [max(at) for at in smoothed], alpha=0.1)
    return line.get_color()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Draws the loss, and the scores where there are any, of runs against the step.",
        epilog="example:\n  python examples/plot.py runs/a runs/b -o curves.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders with a log.csv")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--window", type=int, default=20, metavar="N", help="steps that a point is the mean of (20)")
    args = parser.parse_args(argv)

    figure, (losses, scores) = pyplot().subplots(1, 2, figsize=(11, 4))
    for run in args.runs:
        try:
            rows = log.read(run / "log.csv")
        except OSError as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 2
        steps = [row for row in rows if row["loss"]]
        values = smooth([float(row["loss"]) for row in steps], max(1, args.window))
        losses.plot([int(row["step"]) for row in steps], values, label=str(run))
        rated = [row for row in rows if row.get("score")]
        scores.plot([int(row["step"]) for row in rated], [float(row["score"]) for row in rated], label=str(run))
    losses.set_ylabel(f"loss, mean of {max(1, args.window)} steps")
    losses.set_yscale("log")
    scores.set_ylabel("score")
    for axis in (losses, scores):
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    save(figure, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
