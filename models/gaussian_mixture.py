"""A mixture of Gaussians fitted by EM: the variational step of https://kexue.fm/archives/5716 with both argmins exact.

N samples of D features, K components. q(z = k) = pi_k and q(x|z = k) = N(x; mu_k, diag(v_k)); p(x, z) = p~(x) p(z|x).
KL(p(x, z) || q(x, z)) is minimised over p(z|x) and over q in turn:

    E   p(z|x) = q(x|z) q(z) / sum_z q(x|z) q(z)
    M   q = argmax E_x sum_z p(z|x) log q(x, z):
        pi_k = mean of p(k|x),  mu_k and v_k = mean and variance of x with the weights p(k|x)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GaussianMixture(nn.Module):
    """Buffers `weights` [K], `means` [K, D] and `variances` [K, D] in float64; `fit` begins with k-means++.

    least_variance: below that no variance falls. A component that lost all samples keeps its place.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    def __init__(self, components: int, features: int, *, least_variance: float = 1e-6) -> None:
        super().__init__()
        for name, size in (("components", components), ("features", features)):
            if size < 1:
                raise ValueError(f"{name}: expected 1 or more, got {size}")
        if not least_variance > 0:
            raise ValueError(f"least_variance: expected more than 0, got {least_variance}")
        self.least_variance = least_variance
        self.register_buffer("weights", torch.full((components,), 1 / components, dtype=torch.float64))
        self.register_buffer("means", torch.randn(components, features, dtype=torch.float64))
        self.register_buffer("variances", torch.ones(components, features, dtype=torch.float64))

    def _checked(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(f"x: expected [N, {self.means.shape[1]}], got {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
        return x.to(self.means.dtype)

    def _some(self, x: Tensor) -> Tensor:
        x = self._checked(x)
        if not len(x):
            raise ValueError("x: expected one sample or more, got none")
        return x

    def log_joint(self, x: Tensor) -> Tensor:
        """log q(x, z) [N, K] of x [N, D] in any floating-point dtype."""
        x = self._checked(x)
        columns = [
            weight.log() - ((x - mean).square() / variance + (2 * math.pi * variance).log()).sum(-1) / 2
            for weight, mean, variance in zip(self.weights, self.means, self.variances, strict=True)
        ]  # one component after the other: no [N, K, D] in memory
        return torch.stack(columns, -1)

    def posterior(self, x: Tensor) -> Tensor:
        """p(z|x) [N, K], the E step."""
        return self.log_joint(x).softmax(-1)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log q(x) [N]."""
        return self.log_joint(x).logsumexp(-1)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """One E and one M step; the mean log-likelihood before them. It never falls, but for `least_variance`."""
        x, log_joint = self._some(x), self.log_joint(x)
        p = log_joint.softmax(-1)
        counts = p.sum(0)
        lives = (counts > torch.finfo(p.dtype).tiny).unsqueeze(-1)
        shares = p / counts.clamp(min=torch.finfo(p.dtype).tiny)
        means = shares.T @ x
        pairs = zip(shares.unbind(-1), means, strict=True)
        variances = torch.stack([share @ (x - mean).square() for share, mean in pairs])
        self.weights.copy_(counts / len(x))
        self.means.copy_(torch.where(lives, means, self.means))
        self.variances.copy_(torch.where(lives, variances, self.variances).clamp(min=self.least_variance))
        return log_joint.logsumexp(-1).mean()

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Means by k-means++: each a sample drawn with probability proportional to its distance squared to the nearest
        one before; the variances of all x, equal weights. Draws from PyTorch's generator."""
        x = self._some(x)
        distances = torch.ones(len(x), dtype=x.dtype, device=x.device)
        for k in range(len(self.means)):
            self.means[k] = x[torch.multinomial(distances, 1)][0]
            nearest = (x - self.means[k]).square().sum(-1)
            distances = nearest if k == 0 else torch.minimum(distances, nearest)
            if not distances.sum() > 0:
                distances = torch.ones_like(distances)  # fewer distinct samples than components
        self.variances.copy_(x.var(0, unbiased=False).clamp(min=self.least_variance).expand_as(self.variances))
        self.weights.fill_(1 / len(self.weights))

    def fit(self, x: Tensor, steps: int = 100, tolerance: float = 1e-6) -> list[float]:
        """Initial values, then steps until the mean log-likelihood rises by less than the tolerance; its values."""
        if steps < 1:
            raise ValueError(f"steps: expected 1 or more, got {steps}")
        if not torch.isfinite(self._checked(x)).all():
            raise ValueError("x: expected finite samples, got NaN or infinite ones")
        self.initialise(x)
        values: list[float] = []
        for _ in range(steps):
            values.append(self.step(x).item())
            if len(values) > 1 and values[-1] - values[-2] < tolerance:
                break
        return values

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """[count, D], float64."""
        if count < 1:
            raise ValueError(f"count: expected 1 or more, got {count}")
        k = torch.multinomial(self.weights, count, replacement=True)
        return self.means[k] + self.variances[k].sqrt() * torch.randn_like(self.means[k])
