"""The toy problem of the LoRA+ paper (figure 2): two factors, two rates, and the loss over the plane of both.

    f(x) = W_out relu(B A relu(W_in x))        y = sin(mean of x)

d = 5 inputs, n = 100 units, rank 4, 1,000 samples to train on and 100 to test; W_in and B are drawn from N(0, 1), W_out
and A from N(0, 1 / n); A and B alone are trained, by gradient descent on all samples. B is the output-side factor.
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


def final(runs: Sequence[dict[str, Any]]) -> float:
    """The mean training loss at the end; inf where one of the runs diverged."""
    return sum(math.inf if run["test"] is None else run["train"][-1] for run in runs) / len(runs)
