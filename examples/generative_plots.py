"""The pictures of train_generative.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kit.picture import pyplot, save
from pykernels.models.files import write_atomically


def save_grid(images: Tensor, path: Path, columns: int = 10) -> None:
    """Images [N, H, W] in [0, 1] in rows of `columns`, a pixel a pixel; what does not fill a row is left out."""
    rows = len(images) // columns
    _, height, width = images.shape
    grid = images[: rows * columns].view(rows, columns, height, width).transpose(1, 2)
    flat = grid.reshape(rows * height, columns * width).numpy()
    write_atomically(path, lambda to: pyplot().imsave(to, flat, cmap="gray", vmin=0, vmax=1, format="png"))


def draw_scores(found: Mapping[str, Sequence[Mapping[str, Any]]], floor: float, path: Path) -> None:
    """Frechet distance and modes, counted both ways, against the step: by name of the model, mean and each seed."""
    figure, axes = pyplot().subplots(1, 3, figsize=(15, 4.5))
    for axis, name in zip(axes, ("frechet", "modes", "effective"), strict=True):
        for model, runs in found.items():
            # Runs of the same schedule are rated after the same steps; one that is longer is cut.
            by_step = list(zip(*(run["history"] for run in runs), strict=False))
            steps = [ratings[0]["step"] for ratings in by_step]
            means = [statistics.mean(rating[name] for rating in ratings) for ratings in by_step]
            (line,) = axis.plot(steps, means, label=model)
            for run in runs if len(runs) > 1 else ():
                points = [(rating["step"], rating[name]) for rating in run["history"]]
                axis.plot(*zip(*points, strict=True), color=line.get_color(), alpha=0.3, linewidth=0.8)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    axes[0].axhline(floor, color="gray", linestyle=":", linewidth=1)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("Frechet distance (dotted: of real images)")
    axes[1].set_ylabel("modes, of 10")
    axes[2].set_ylabel("effective modes, of 10")
    save(figure, path)
