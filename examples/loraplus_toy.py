"""The toy problem of the LoRA+ paper (figure 2): two factors, two rates, and the loss over the plane of both.

    f(x) = W_out relu(B A relu(W_in x))        y = sin(mean of x)

d = 5 inputs, n = 100 units, rank 4, 1,000 samples to train on and 100 to test; W_in and B are drawn from N(0, 1), W_out
and A from N(0, 1 / n); A and B alone are trained, by gradient descent on all samples. B is the output-side factor. The
number of steps is a choice here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels import LoRALinear, loraplus_param_groups

INPUTS, UNITS, RANK, TRAIN, TEST = 5, 100, 4, 1000, 100


class Toy(nn.Module):
    """f(x) [B] of x [B, 5]. The layer between the ReLUs is a LoRALinear whose frozen weight is zero."""

    def __init__(self, seed: int, backend: str | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * std

        self.register_buffer("w_in", normal(UNITS, INPUTS))
        self.register_buffer("w_out", normal(UNITS, std=UNITS**-0.5))
        self.middle = LoRALinear(UNITS, UNITS, RANK, alpha=RANK, bias=False, backend=backend)
        with torch.no_grad():
            self.middle.weight.zero_()
            self.middle.lora_a.copy_(normal(RANK, UNITS, std=UNITS**-0.5))
            self.middle.lora_b.copy_(normal(UNITS, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.middle(F.relu(F.linear(x, self.w_in)))) @ self.w_out


def samples(seed: int) -> tuple[Tensor, Tensor]:
    """x [1100, 5] and y; the first 1,000 are to train on."""
    x = torch.randn(TRAIN + TEST, INPUTS, generator=torch.Generator().manual_seed(seed + 1_000_000))
    return x, x.mean(1).sin()


def descend(lr_a: float, lr_b: float, steps: int, seed: int, backend: str | None = None) -> dict[str, Any]:
    """Losses {"train": one before each step and after the last, "test"}; "train" ends early where it diverges."""
    model, (x, y) = Toy(seed, backend), samples(seed)
    optimizer = torch.optim.SGD(loraplus_param_groups(model, lr_a, lr_b / lr_a))
    losses: list[float] = []
    for _ in range(steps):
        loss = F.mse_loss(model(x[:TRAIN]), y[:TRAIN])
        losses.append(loss.item())
        if not losses[-1] < 1e6:
            return {"train": losses[:-1], "test": None}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        train, test = (F.mse_loss(model(x[part]), y[part]).item() for part in (slice(TRAIN), slice(TRAIN, None)))
    finite = math.isfinite(train) and math.isfinite(test)
    return {"train": [*losses, train], "test": test} if finite else {"train": losses, "test": None}


# --- the plane of both rates ---

Grid = dict[tuple[int, int], list[dict[str, Any]]]
"""The runs with rates 2^a and 2^b by (a, b), a seed each."""

RATIOS = (0, 1, 2, 3, 4, 5)
"""Exponents of the ratios that are told of."""


def exponents(spacing: int) -> tuple[range, range]:
    """Of lr_a and of lr_b: from too slow to where gradient descent diverges. Equal rates are among them."""
    return range(-14, -3, spacing), range(-10, 3, spacing)


def final(runs: Sequence[dict[str, Any]], name: str = "train") -> float:
    """The mean loss at the end; inf where one of the runs diverged."""
    if any(run["test"] is None for run in runs):
        return math.inf
    return sum(run["test"] if name == "test" else run["train"][-1] for run in runs) / len(runs)


def best_of_ratio(grid: Grid, exponent: int) -> tuple[int, int] | None:
    """The pair whose ratio is 2^exponent and whose training loss ends lowest; None where all diverged."""
    pairs = [pair for pair in grid if pair[1] - pair[0] == exponent and final(grid[pair]) < math.inf]
    return min(pairs, key=lambda pair: final(grid[pair]), default=None)


def report(grid: Grid) -> str:
    steps = max(len(run["train"]) - 1 for runs in grid.values() for run in runs)
    lines = [
        f"toy problem: means of {len(next(iter(grid.values())))} seeds after {steps} steps of gradient descent, the "
        "best pair of each ratio",
        f"{'ratio':>12} {'lr of a':>9} {'lr of b':>9} {'train loss':>11} {'test loss':>10}",
    ]
    rows = [(f"2^{k}", best_of_ratio(grid, k)) for k in RATIOS]
    stable = [pair for pair in grid if final(grid[pair]) < math.inf]
    best = min(stable, key=lambda pair: final(grid[pair]), default=None)
    rows.append(("best: " + (f"2^{best[1] - best[0]}" if best else ""), best))
    for name, pair in rows:
        if pair is not None:
            losses = f"{final(grid[pair]):11.4f} {final(grid[pair], 'test'):10.4f}"
            lines.append(f"{name:>12} {f'2^{pair[0]}':>9} {f'2^{pair[1]}':>9} {losses}")
    if stable:
        a, b = max(pair[0] for pair in stable), max(pair[1] for pair in stable)
        lines.append(f"the largest rates with which no seed diverges, whatever the other is: a 2^{a}, b 2^{b}")
    return "\n".join(lines)
