"""dora_linear: a linear layer with a low-rank term whose rows have a trained length (DoRA, Liu et al. 2024).

M rows, K inputs, N outputs, R rank.

    V = W + scale * B A;   m[n] = magnitude[n] / |V[n]|;   y = m * (x V^T) + bias

|V[n]| counts as constant, as in the paper and in PEFT. It is had without V:
|V[n]|^2 = |W[n]|^2 + 2 scale B[n] . (W A^T)[n] + scale^2 B[n] (A A^T) B[n]^T. Rows of V that are zero have no
direction: m = 0. With dropout, only what the adapter changes sees the dropped d = dropout(x), as in PEFT:

    y = x W^T + bias + scale * (d A^T) (m * B)^T + (m - 1) * (d W^T)
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from . import random_bits
from ._checks import check_dropout, check_float, check_shape, check_tensor
from .lora_linear import lora_linear

# Rows of a 16-bit weight that are converted to float32 at a time.
_CHUNK = 512


def dora_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float = 1.0) -> Tensor:
    """|W[n] + scale * (B A)[n]| for every output n, without gradient: what DoRA's magnitudes begin as.

    weight [N, K], lora_a [R, K], lora_b [N, R] -> [N], float32 (float64 for float64).
    """
    for name, t in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        check_tensor(name, t)
    check_shape("lora_a", lora_a, (lora_a.shape[0] if lora_a.dim() else 0, *weight.shape[1:]))
    check_shape("lora_b", lora_b, (*weight.shape[:1], lora_a.shape[0]))
    exact = torch.promote_types(weight.dtype, torch.float32)
    device = weight.device.type
    uncast = torch.autocast(device, enabled=False) if device in ("cpu", "cuda") else nullcontext()
    with torch.no_grad(), uncast:
        a, b = lora_a.to(exact), lora_b.to(exact) * scale
        chunks = [weight] if weight.dtype == exact else weight.split(_CHUNK)
        squares = [torch.linalg.vector_norm(chunk, dim=-1, dtype=exact).square() for chunk in chunks]
        cross = torch.cat([F.linear(chunk.to(exact), a) for chunk in chunks])
        total = torch.cat(squares) + (b * (2 * cross + F.linear(b, F.linear(a, a)))).sum(-1)
        return total.clamp_min(0).sqrt()  # rounding may leave less than nothing of a row that the adapter cancels


def dora_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m [N], zero where the norm is."""
    return magnitude / norm.masked_fill(norm == 0, torch.inf)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = m * (x weight^T + scale * (x lora_a^T) lora_b^T) + bias, m = magnitude / |weight + scale * lora_b lora_a|.

    Args:
        magnitude: [N], of x's dtype or float32. With float32 adapters it is applied in float32, to a product in x's
            dtype.

    The other arguments, the result and the errors are those of `lora_linear`. With dropout (when training) the base
    product is taken of x and of dropout(x), which is what PEFT computes.
    """
    check_tensor("magnitude", magnitude)
    check_tensor("weight", weight)
    check_shape("magnitude", magnitude, weight.shape[:1])
    check_float("scale", scale)
    check_dropout("dropout", dropout)
    m = dora_scale(magnitude, dora_norm(weight, lora_a, lora_b, scale))
    if not (training and dropout):
        y = lora_linear(x, weight, lora_a, lora_b, scale=scale, backend=backend)
        # Rounded once: a 16-bit m would cost float32 adapters their accuracy, and magnitude's gradient more of it.
        z = y * m.to(torch.promote_types(y.dtype, lora_a.dtype))
        return (z if bias is None else z + bias).to(y.dtype)
    bits = random_bits.seed_tensor(seed)
    y = lora_linear(
        x,
        weight,
        lora_a,
        (m[:, None] * lora_b).to(lora_b.dtype),
        bias=bias,
        scale=scale,
        dropout=dropout,
        training=True,
        seed=bits,
        backend=backend,
    )
    keep, factor = random_bits.kept(random_bits.activation_draws(bits, x), dropout)
    # The factor of those kept comes after the product, which then has x's own values.
    base = F.linear(torch.where(keep, x, 0), weight)
    change = base * ((m - 1) * factor).to(torch.promote_types(base.dtype, lora_a.dtype))
    return (y + change).to(y.dtype)
