"""Additive attention pooling in plain PyTorch, with the parameters and the contract of the fused operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionPool(nn.Module):
    """One vector for each sequence: s_l = query . tanh(weight x_l); a = softmax of s over the live rows; sum a_l x_l.

    Parameters `weight` [H, D] and `query` [H], no bias. A sequence without a live row gives zeros, and zero gradients.
    """

    def __init__(self, in_features: int, hidden_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_features, in_features))
        self.query = nn.Parameter(torch.empty(hidden_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot's uniform distribution, the query as the one row of a matrix."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.xavier_uniform_(self.query.unsqueeze(0))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """x [B, L, D], mask [B, L] bool -> [B, D]."""
        scores = F.linear(torch.tanh(F.linear(x, self.weight)), self.query.unsqueeze(0)).squeeze(-1).float()
        if mask is not None:
            # Finite, so that the softmax of nothing but these has no NaN; the mask clears it then.
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1)
        if mask is not None:
            weights = weights.masked_fill(~mask, 0)
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), x).squeeze(1)
