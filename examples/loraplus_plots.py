"""The pictures of loraplus.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import loraplus_toy
from plot import band

from kit.picture import pyplot, save


def draw_toy(grid: loraplus_toy.Grid, path: Path) -> None:
    """The training loss over both rates, and its curves at the best pair of each ratio."""
    plt = pyplot()
    figure, (plane, curves) = plt.subplots(1, 2, figsize=(12, 4.5))
    rows, columns = sorted({a for a, _ in grid}), sorted({b for _, b in grid})
    # Where a seed diverged the cell stays empty.
    ends = [[loraplus_toy.final(grid[a, b]) for b in columns] for a in rows]
    values = [[math.log10(end) if end < math.inf else math.nan for end in row] for row in ends]
    image = plane.pcolormesh(columns, rows, values, shading="nearest", cmap="viridis_r")
    figure.colorbar(image, ax=plane, label="log10 of the training loss at the end")
    ends = max(rows[0], columns[0]), min(rows[-1], columns[-1])
    plane.plot(ends, ends, "r--", linewidth=1, label="equal rates")
    plane.set_xlabel("log2 of lora_b's rate")
    plane.set_ylabel("log2 of lora_a's rate")
    plane.legend(fontsize=8)
    for exponent in loraplus_toy.RATIOS:
        pair = loraplus_toy.best_of_ratio(grid, exponent)
        if pair is not None:
            mean = [statistics.mean(at) for at in zip(*(run["train"] for run in grid[pair]), strict=True)]
            curves.plot(mean, label=f"ratio 2^{exponent}, a 2^{pair[0]}", linewidth=1)
    curves.set_yscale("log")
    curves.set_xlabel("step")
    curves.set_ylabel("training loss")
    curves.legend(fontsize=8)
    save(figure, path)


def draw_encoder(found: Mapping[float, Sequence[Mapping[str, Any]]], window: int, path: Path) -> None:
    """The mean training loss of each ratio with the range of its seeds, and Matthews' correlation against the ratio."""
    plt = pyplot()
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(12, 4.5))
    for ratio, runs in found.items():
        if not runs:
            continue
        color = band(losses, [run["losses"] for run in runs], window, f"ratio {ratio:g}")
        points = [run["dev"]["matthews"] for run in runs]
        scores.plot([ratio] * len(points), points, "o", color=color, alpha=0.4)
        scores.plot([ratio], [statistics.mean(points)], "_", color=color, markersize=24)
    losses.set_xlabel("step")
    losses.set_ylabel(f"training loss, mean of {window} steps")
    losses.legend(fontsize=8)
    scores.set_xscale("log", base=2)
    scores.set_xlabel("ratio of the rates")
    scores.set_ylabel("Matthews' correlation, dev.tsv")
    save(figure, path)
