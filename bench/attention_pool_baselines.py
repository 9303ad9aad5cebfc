"""What attention_pool is measured against: the expression as users write it, in two forms, and bare GEMMs.

B batch, L length, D width, H hidden. x [B, L, D], weight [H, D], query [H]; all rows of the batch, or those of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One size of the operator."""

    B: int
    L: int
    D: int
    H: int
    gated: bool = False

    @property
    def name(self) -> str:
        return f"B{self.B} L{self.L} D{self.D} H{self.H}" + " gated" * self.gated

    @property
    def rows(self) -> int:
        return self.B * self.L

    @property
    def flops(self) -> int:
        """Of the products of one forward pass; the gradients take twice as many."""
        return 2 * self.rows * self.D * self.H * (2 if self.gated else 1)

    @property
    def terms(self) -> dict[str, int]:
        """How many products are summed for an element of the output and of each gradient, with those of its scores."""
        scores = self.D + self.H
        of_rows = dict.fromkeys(("dweight", "dquery", "dgate_weight"), scores + self.rows)
        return {"y": scores + self.L, "dx": scores + 2 * self.H, **of_rows}


@dataclass
class Problem:
    """Random normal tensors of one shape and dtype; weights are scaled to give u and scores of order one."""

    shape: Shape
    dtype: torch.dtype
    device: str = "cpu"
    inputs: dict[str, Tensor] = field(init=False)
    dy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        generator = torch.Generator().manual_seed(30)

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*sizes, generator=generator).mul_(scale).to(self.device, self.dtype)

        self.inputs = {
            "x": normal(s.B, s.L, s.D),
            "weight": normal(s.H, s.D, scale=s.D**-0.5),
            "query": normal(s.H, scale=2 * s.H**-0.5),
        }
        if s.gated:
            self.inputs["gate_weight"] = normal(s.H, s.D, scale=s.D**-0.5)
        self.dy = normal(s.B, s.D)

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The inputs as fresh leaves that require gradients, optionally in another dtype."""
        return {name: t.detach().to(dtype or self.dtype).requires_grad_() for name, t in self.inputs.items()}


def _weights(
    x: Tensor, weight: Tensor, query: Tensor, gate_weight: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    u = torch.tanh(torch.nn.functional.linear(x, weight))
    if gate_weight is not None:
        u = u * torch.sigmoid(torch.nn.functional.linear(x, gate_weight))
    s = u @ query
    return torch.softmax(s if mask is None else s.masked_fill(~mask, -torch.inf), -1)


def eager_sum(x: Tensor, *tensors: Tensor, **options: Tensor) -> Tensor:
    """The weighted mean as an elementwise product and a sum."""
    return (_weights(x, *tensors, **options).unsqueeze(-1) * x).sum(1)


def eager_bmm(x: Tensor, *tensors: Tensor, **options: Tensor) -> Tensor:
    """The weighted mean as a batched product."""
    return torch.bmm(_weights(x, *tensors, **options).unsqueeze(1), x).squeeze(1)


class BareGemm:
    """The products alone: [B*L, D] x [D, H], twice that with a gate; for training also the dX and dW forms of it."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(31)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(device, dtype)

        outputs = shape.H * (2 if shape.gated else 1)
        self.x, self.w, self.dh = normal(shape.rows, shape.D), normal(outputs, shape.D), normal(shape.rows, outputs)

    def forward(self) -> Tensor:
        return torch.mm(self.x, self.w.t())

    def training(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.mm(self.x, self.w.t()), torch.mm(self.dh, self.w), torch.mm(self.dh.t(), self.x)
