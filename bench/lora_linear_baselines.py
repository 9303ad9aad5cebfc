"""What lora_linear is measured against: the frozen layer without an adapter, the expression as users write it, PEFT.

M rows, K inputs, N outputs, R rank. The base weight is frozen; x and the adapter have gradients.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 2.0


@dataclass(frozen=True)
class Shape:
    """One size of the operator."""

    M: int
    K: int
    N: int
    R: int

    @property
    def name(self) -> str:
        return f"M{self.M} K{self.K} N{self.N} R{self.R}"

    @property
    def flops(self) -> int:
        """Of the base product; the gradient of x takes as many."""
        return 2 * self.M * self.K * self.N

    @property
    def terms(self) -> dict[str, int]:
        """How many products are summed for an element of the output and of each gradient."""
        return {
            "y": 2 * self.K + self.R,
            "dx": 2 * self.N + self.R,
            "dlora_a": self.M + self.N,
            "dlora_b": self.M + self.K,
        }


@dataclass
class Problem:
    """Random normal tensors of one shape; weights are scaled to give outputs of order one.

    The adapter has x's dtype, or float32 with ``exact_adapter``.
    """

    shape: Shape
    dtype: torch.dtype
    exact_adapter: bool = False
    device: str = "cpu"
    weight: Tensor = field(init=False)
    inputs: dict[str, Tensor] = field(init=False)
    dy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        generator = torch.Generator().manual_seed(40)

        def normal(*sizes: int, scale: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*sizes, generator=generator).mul_(scale).to(self.device, dtype)

        adapter = torch.float32 if self.exact_adapter else self.dtype
        self.weight = normal(s.N, s.K, scale=s.K**-0.5)
        self.inputs = {
            "x": normal(s.M, s.K),
            "lora_a": normal(s.R, s.K, scale=s.K**-0.5, dtype=adapter),
            "lora_b": normal(s.N, s.R, scale=max(1, s.R) ** -0.5, dtype=adapter),
        }
        self.dy = normal(s.M, s.N)

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The inputs as fresh leaves that require gradients, optionally in another dtype."""
        return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in self.inputs.items()}


def frozen(x: Tensor, weight: Tensor) -> Tensor:
    """The layer before it was adapted."""
    return F.linear(x, weight)


def eager(weight: Tensor, dropout: float, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """The expression as users write it."""
    d = F.dropout(x, dropout) if dropout else x
    return F.linear(x, weight) + F.linear(F.linear(d.to(lora_a.dtype), lora_a), lora_b) * SCALE


def peft_layer(problem: Problem, dropout: float, dora: bool = False) -> nn.Module | None:
    """PEFT's own layer with these tensors, None where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        return None
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    s = problem.shape
    base = nn.Linear(s.K, s.N, bias=False, dtype=problem.dtype, device=problem.device)
    base.weight = nn.Parameter(problem.weight, requires_grad=False)
    config = LoraConfig(r=s.R, lora_alpha=int(SCALE) * s.R, lora_dropout=dropout, use_dora=dora)
    layer = Linear(base, "default", config=config, r=s.R, lora_alpha=config.lora_alpha)
    layer.lora_A["default"].weight = nn.Parameter(problem.inputs["lora_a"].clone())
    layer.lora_B["default"].weight = nn.Parameter(problem.inputs["lora_b"].clone())
    return layer.train()
