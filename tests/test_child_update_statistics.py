"""ChildTuning's drawn masks in the large, and what the article says of them: https://kexue.fm/archives/8764."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels import ChildTuningAdamW, ChildTuningSGD, child_update
from pykernels.random_bits import keep_threshold
from tests.child_update_cases import drawn_by_a_step


@pytest.mark.no_poison
@pytest.mark.parametrize("p", [0.2, 0.3])
def test_statistics_of_many_draws(p: float, extension: object) -> None:
    """10^8 draws over 100 steps: mean, variance and chi-square of bytes of mask bits, and of neighbouring steps."""
    numel, rounds = 1_000_000, 100
    q = keep_threshold(p) / 65536
    counts, kept, both, before = torch.zeros(256), 0, 0, None
    for t in range(rounds):
        mask = drawn_by_a_step(numel, p, 99, 2, t)
        kept += int(mask.sum())
        counts += torch.bincount(child_update.pack_mask(mask).long(), minlength=256)
        if before is not None:
            both += int((mask & before).sum())
        before = mask
    n = numel * rounds
    assert abs(kept - n * q) < 4.5 * math.sqrt(n * q * (1 - q))
    pairs = n - numel
    assert abs(both - pairs * q * q) < 4.5 * math.sqrt(pairs * q * q * (1 - q * q))
    ones = torch.tensor([bin(i).count("1") for i in range(256)]).double()
    wanted = (n // 8) * q**ones * (1 - q) ** (8 - ones)
    chi_square = ((counts.double() - wanted) ** 2 / wanted).sum().item()
    assert abs(chi_square - 255) < 4.5 * math.sqrt(2 * 255)


# --- the article's observations ---


@pytest.mark.parametrize("where", ["grad", "update"])
@pytest.mark.parametrize(("p", "mu", "s"), [(0.3, 0.7, 1.3), (0.2, 0.0, 1.0), (0.5, -2.0, 0.3), (0.9, 0.1, 2.0)])
def test_variance_of_the_masked_gradient(p: float, mu: float, s: float, where: str, extension: object) -> None:
    """E[g m / p] = E[g], and its variance is s^2 + (1 - p) / p (mu^2 + s^2), with mean mu and variance s^2 of g."""
    n = 2_000_000
    grad = torch.randn(n, generator=torch.Generator().manual_seed(0)) * s + mu
    w = torch.zeros(n, requires_grad=True)
    w.grad = grad
    ChildTuningSGD([w], lr=1.0, reserve_p=p, seed=1, where=where).step()
    masked = -w.detach().double()
    expected = s**2 + (1 - p) / p * (mu**2 + s**2)
    assert abs(masked.mean().item() - mu) < 5 * math.sqrt(expected / n)
    # The deviation of an estimated variance follows from the fourth moment.
    fourth = ((masked - mu) ** 4).mean().item()
    assert abs(masked.var().item() - expected) < 5 * math.sqrt((fourth - expected**2) / n)


def drift(mode: str, *, p: float, mu: float, s: float, cls: Any = ChildTuningAdamW, **options: Any) -> float:
    """How far a step moves against the mean gradient, per unit of lr, once the moments are those of the long run."""
    n, before, counted = 2000, 4000, 1500  # the second moment remembers 1000 steps
    generator = torch.Generator().manual_seed(3)
    w = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    own = cls([w], lr=1e-3, weight_decay=0.0, mode=mode, reserve_p=p, seed=4, **options)
    start: Tensor = w.detach().clone()
    for t in range(before + counted):
        if t == before:
            start = w.detach().clone()
        w.grad = torch.empty_like(w).normal_(mu, s, generator=generator) if s else torch.full_like(w, mu)
        own.step()
    return (start - w.detach()).mean().item() / (1e-3 * counted)


@pytest.mark.parametrize(("mu", "s"), [(1.0, 0.0), (0.5, 1.0)])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_under_adam_f_is_a_rate_smaller_by_the_root_of_p(p: float, mu: float, s: float, extension: object) -> None:
    """The first moment stays mu and the second becomes (mu^2 + s^2) / p: steps are sqrt(p) times as long.

    Masking the update, or SGD's gradient, leaves their length as it is.
    """
    plain = drift("none", p=1.0, mu=mu, s=s)
    assert plain == pytest.approx(mu / math.hypot(mu, s), rel=0.01)
    assert drift("F", p=p, mu=mu, s=s) / plain == pytest.approx(math.sqrt(p), rel=0.01)
    assert drift("F", p=p, mu=mu, s=s, where="update") / plain == pytest.approx(1.0, rel=0.01)
    assert drift("F", p=p, mu=mu, s=s, cls=ChildTuningSGD) == pytest.approx(mu, rel=0.01)
