"""Focal loss of probabilities (Lin et al. 2017, arXiv 1708.02002), over the live positions of padded batches."""

from __future__ import annotations

from torch import Tensor

# Of probabilities, before the logarithm.
SMALLEST = 1e-8


def focal_loss(probability: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """-alpha y (1 - p)^gamma log p - (1 - alpha) (1 - y) p^gamma log(1 - p), elementwise.

    p and 1 - p are each held above 1e-8. (Clipping p alone to [1e-8, 1 - 1e-8] would leave log 0 in float32, where
    1 - 1e-8 is 1.)
    """
    complement = 1 - probability
    positive = target * complement**gamma * probability.clamp_min(SMALLEST).log()
    negative = (1 - target) * probability**gamma * complement.clamp_min(SMALLEST).log()
    return -alpha * positive - (1 - alpha) * negative


def masked_focal_loss(
    probability: Tensor, target: Tensor, mask: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """The mean of `focal_loss` over the positions where mask is True, of all sequences together; 0 where there is none.

    probability, target (0 or 1) and mask have one shape.
    """
    loss = focal_loss(probability, target.to(probability.dtype), alpha, gamma).masked_fill(~mask, 0)
    return loss.sum() / mask.sum().clamp_min(1)
