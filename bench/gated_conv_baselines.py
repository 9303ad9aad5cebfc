"""What gated_conv1d is measured against: the expression as users write it, better-laid-out forms of it, and bare GEMMs.

B batch, L length, C channels, K kernel size, d dilation. x [B, L, C_in], weight [2*C_out, C_in, K], value half first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One size of the operator. cond: rows of the conditioning tensor, "none", "one" (a row per sequence) or "all"."""

    B: int
    L: int
    C_in: int
    C_out: int
    K: int
    dilation: int
    residual: str = "highway"
    value_act: str = "identity"
    cond: str = "none"

    @property
    def name(self) -> str:
        channels = f"C{self.C_in}" if self.C_in == self.C_out else f"C{self.C_in}->{self.C_out}"
        extras = [self.residual] * (self.residual != "highway") + ["tanh"] * (self.value_act == "tanh")
        extras += [f"cond {self.cond}"] * (self.cond != "none")
        return " ".join([f"B{self.B} L{self.L} {channels} K{self.K} d{self.dilation}", *extras])

    @property
    def form(self) -> dict[str, Any]:
        """Keyword arguments of the operator and of its module."""
        return {"dilation": self.dilation, "residual": self.residual, "value_act": self.value_act}

    @property
    def rows(self) -> int:
        return self.B * self.L

    @property
    def flops(self) -> int:
        """Of one forward pass; forward and backward together take three times as many."""
        return 2 * self.rows * self.K * self.C_in * 2 * self.C_out

    @property
    def terms(self) -> dict[str, int]:
        """How many products are summed for an element of the output and of each gradient."""
        of_rows = {"dweight": self.rows, "dbias": self.rows, "dcond": self.L if self.cond == "one" else 1}
        return {"y": self.K * self.C_in, "dx": self.K * 2 * self.C_out, **of_rows}


@dataclass
class Problem:
    """Random normal tensors of one shape and dtype; weights are scaled to give outputs of order one."""

    shape: Shape
    dtype: torch.dtype
    device: str = "cpu"
    x: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    bias: Tensor = field(init=False)
    cond: Tensor | None = field(init=False)
    dy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        generator = torch.Generator().manual_seed(20)

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*sizes, generator=generator).mul_(scale).to(self.device, self.dtype)

        self.x = normal(s.B, s.L, s.C_in)
        self.weight = normal(2 * s.C_out, s.C_in, s.K, scale=(s.K * s.C_in) ** -0.5)
        self.bias = normal(2 * s.C_out)
        self.cond = normal(s.B, 1 if s.cond == "one" else s.L, 2 * s.C_out) if s.cond != "none" else None
        self.dy = normal(s.B, s.L, s.C_out)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Everything that has a gradient, by name."""
        named = {"x": self.x, "weight": self.weight, "bias": self.bias}
        return named | ({"cond": self.cond} if self.cond is not None else {})

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The inputs as fresh leaves that require gradients, optionally in another dtype."""
        return {name: t.detach().to(dtype or self.dtype).requires_grad_() for name, t in self.inputs.items()}


def _gate(shape: Shape, h: Tensor, x: Tensor) -> Tensor:
    value, logits = h.chunk(2, dim=-1)
    g = torch.sigmoid(logits)
    if shape.value_act == "tanh":
        value = torch.tanh(value)
    if shape.residual == "highway":
        return x * (1 - g) + value * g
    return x + value * g if shape.residual == "add" else value * g


def eager(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor, cond: Tensor | None = None) -> Tensor:
    """The expression as written by hand for [B, L, C] tensors: transpose, conv1d, transpose, gate, blend."""
    h = F.conv1d(x.transpose(1, 2), weight, bias, padding="same", dilation=shape.dilation).transpose(1, 2)
    return _gate(shape, h if cond is None else h + cond, x)


def shifted_matmul(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor, cond: Tensor | None = None) -> Tensor:
    """The same without a transpose of x: the K shifted copies side by side, one matrix product, gate, blend."""
    reach = (shape.K - 1) * shape.dilation
    padded = F.pad(x, (0, 0, reach // 2, reach - reach // 2))
    taps = [padded[:, k * shape.dilation : k * shape.dilation + shape.L] for k in range(shape.K)]
    h = F.linear(torch.cat(taps, dim=-1), weight.transpose(1, 2).reshape(2 * shape.C_out, -1), bias)
    return _gate(shape, h if cond is None else h + cond, x)


def eager_masked(shape: Shape, mask: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What users write around a padded batch: zero the padding, compute all of it, zero it again. mask [B, L, 1]."""
    return eager(shape, torch.where(mask, x, 0), weight, bias) * mask


def eager_step(shape: Shape, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of a causal stack: the last (K-1)*d rows of input travel along as state [B, (K-1)*d, C_in]."""
    window = torch.cat([state, x], dim=1)
    h = F.conv1d(window.transpose(1, 2), weight, bias, dilation=shape.dilation).transpose(1, 2)
    return _gate(shape, h, x), window[:, x.shape[1] :]


class BareGemm:
    """The products alone: [B*L, K*C_in] x [K*C_in, 2*C_out], and for training also the dX and dW forms of it.

    ``forward_transposed`` keeps the weight as nn.Linear does, which for some dtypes and processors is another speed.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(21)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(device, dtype)

        self.a = normal(shape.rows, shape.K * shape.C_in)
        self.w = normal(shape.K * shape.C_in, 2 * shape.C_out)
        self.linear_w = self.w.t().contiguous()
        self.dh = normal(shape.rows, 2 * shape.C_out)

    def forward(self) -> Tensor:
        return torch.mm(self.a, self.w)

    def forward_transposed(self) -> Tensor:
        return torch.mm(self.a, self.linear_w.t())

    def training(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.mm(self.a, self.w), torch.mm(self.dh, self.w.t()), torch.mm(self.a.t(), self.dh)
