"""VAE, GAN, AAE and ALI as one variational step: a KL divergence of joint distributions in place of the marginals'.

Su Jianlin, https://kexue.fm/archives/5716 (arXiv 1807.05936); EM, the fifth, is in gaussian_mixture.py.

p~(x) is the data, q(x, z) = q(x|z) q(z) the model with q(z) = N(0, 1), p(x, z) = p~(x) p(z|x). B samples, Z latent
features. Critics give logits: D = sigmoid(logit), so -log D = softplus(-logit) and -log(1 - D) = softplus(logit). Each
model takes any networks of the shapes it names; `generative.generative_model` builds the default ones.

All four train alike: `train_step(optimizer, x)`, with one optimizer over all parameters. A step of the critic leaves
the others without gradients, and the reverse, so that the optimizer passes over them. What a critic's loss takes as
given is detached, not computed under no_grad: autocast would keep weights rounded there, which have no gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

LIKELIHOODS = ("bernoulli", "gaussian")
OBJECTIVES = ("article", "non_saturating", "min_max")


def _wide(t: Tensor) -> Tensor:
    """Losses are sums, which 16 bits are too few for."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """(-E log D(real) - E log(1 - D(fake))) / 2 of two tensors of logits.

    The halves are the article's prior p(y) = 1/2; its formulas leave them out, its code does not.
    """
    return (F.softplus(-_wide(real)).mean() + F.softplus(_wide(fake)).mean()) / 2


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) = sum(mean^2 + variance - log variance - 1) / 2 over the features: [B]."""
    mean, log_variance = _wide(mean), _wide(log_variance)
    return (mean.square() + log_variance.exp() - log_variance - 1).sum(-1) / 2


def reparameterised(mean: Tensor, log_variance: Tensor) -> Tensor:
    """One z ~ N(mean, variance) for each row, differentiable, in the dtype of the mean."""
    wide = _wide(mean)
    return (wide + (_wide(log_variance) / 2).exp() * torch.randn_like(wide)).to(mean.dtype)


def _update(optimizer: Optimizer, loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """A step of these parameters alone, of those that are not frozen."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=[p for p in parameters if p.requires_grad])
    optimizer.step()
    torch.clear_autocast_cache()  # of rounded weights, which would be used for the next loss in the same context
    return loss.detach()


class _Generative(nn.Module):
    """What the four share: a latent size, and networks that are given. config: of a model made from one."""

    config: Any = None

    def __init__(self, latent: int) -> None:
        super().__init__()
        if latent < 1:
            raise ValueError(f"latent: expected 1 or more, got {latent}")
        self.latent = latent

    def prior(self, count: int) -> Tensor:
        """z [count, Z] ~ q(z), in the dtype and on the device of the parameters; 16 bits draw what 32 would."""
        like = next(self.parameters())
        wide = torch.promote_types(like.dtype, torch.float32)
        return torch.randn(count, self.latent, dtype=wide, device=like.device).to(like.dtype)

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """x [count, ...] of z ~ q(z)."""
        return self(self.prior(count))

    def _gaussian(self, encoder: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        out = encoder(x)
        if out.shape != (len(x), 2 * self.latent):
            wanted = f"[{len(x)}, {2 * self.latent}] (means and log variances)"
            raise ValueError(f"encoder: expected a network that gives {wanted}, got {list(out.shape)}")
        mean, log_variance = out.chunk(2, -1)
        return mean, log_variance


class VAELoss(NamedTuple):
    """Means over the batch; loss = reconstruction + kl."""

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor


class VAE(_Generative):
    """Variational autoencoder: min KL(p(x, z) || q(x, z)) with p(z|x) = N(mean(x), variance(x)).

        L = E_x[-log q(x|z) + KL(p(z|x) || q(z))],  one z ~ p(z|x), reparameterised

    encoder: x -> [B, 2Z], means and log variances. decoder: z -> of x's shape, logits (bernoulli, x in [0, 1]) or
    means (gaussian of variance 1, whose constant log(2 pi) / 2 an element is left out).
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent: int, *, likelihood: str = "bernoulli") -> None:
        super().__init__(latent)
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood: expected one of {', '.join(LIKELIHOODS)}, got {likelihood!r}")
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of p(z|x), [B, Z] each."""
        return self._gaussian(self.encoder, x)

    def loss(self, x: Tensor) -> VAELoss:
        mean, log_variance = self.encode(x)
        out = _wide(self.decoder(reparameterised(mean, log_variance)))
        target = x.to(out.dtype)
        if self.likelihood == "bernoulli":
            of_element = F.binary_cross_entropy_with_logits(out, target, reduction="none")
        else:
            of_element = (target - out).square() / 2
        reconstruction = of_element.flatten(1).sum(-1).mean()
        kl = gaussian_kl(mean, log_variance).mean()
        return VAELoss(reconstruction + kl, reconstruction, kl)

    def train_step(self, optimizer: Optimizer, x: Tensor) -> dict[str, Tensor]:
        losses = self.loss(x)
        _update(optimizer, losses.loss, self.parameters())
        return {name: value.detach() for name, value in losses._asdict().items()}

    def forward(self, z: Tensor) -> Tensor:
        """The mean of q(x|z)."""
        out = self.decoder(z)
        return out.sigmoid() if self.likelihood == "bernoulli" else out

    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of q(x|z) at the mean of p(z|x)."""
        return self(self.encode(x)[0])


class GAN(_Generative):
    """Generative adversarial network: y tells p~(x) from q(x), min KL(q(x, y) || p(x, y)) with D(x) = p(1|x).

        critic      -E_x log D(x) - E_z log(1 - D(G(z)))
        generator   E_z[-log D(G(z)) + lambda ||G(z) - G_old(z)||^2]

    The second term, the article's regulariser, stands for KL(q(x) || q_old(x)), which the exact loss has: the optimal
    critic knows q as it was before the generator moves. G_old(z) are G's samples at the beginning of the generator's
    phase, which is `generator_steps` steps on the same z; in the first of them the term and its gradient are zero.

    generator: z -> x. critic: x -> [B, 1] or [B]. regulariser: lambda times the elements of a sample, so that the
    term is regulariser * mean squared difference; 5 in the article's code, 0 for none.
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        latent: int,
        *,
        regulariser: float = 5.0,
        generator_steps: int = 2,
    ) -> None:
        super().__init__(latent)
        if regulariser < 0:
            raise ValueError(f"regulariser: expected 0 or more, got {regulariser}")
        if generator_steps < 1:
            raise ValueError(f"generator_steps: expected 1 or more, got {generator_steps}")
        self.generator, self.critic = generator, critic
        self.regulariser, self.generator_steps = regulariser, generator_steps

    def critic_loss(self, x: Tensor, z: Tensor) -> Tensor:
        return critic_loss(self.critic(x), self.critic(self.generator(z).detach()))

    def generator_loss(self, z: Tensor, old: Tensor) -> Tensor:
        """old: G_old(z)."""
        x = self.generator(z)
        adversarial = F.softplus(-_wide(self.critic(x))).mean()
        if not self.regulariser:
            return adversarial
        return adversarial + self.regulariser * (_wide(x) - _wide(old)).square().mean()

    def train_step(self, optimizer: Optimizer, *batches: Tensor) -> dict[str, Tensor]:
        """A critic step on each batch, then the generator's steps on as many z.

        One batch is the article's experiment with batch normalisation, five that without.
        """
        if not batches:
            raise ValueError("batches: expected one or more, got none")
        for x in batches:
            critic = _update(optimizer, self.critic_loss(x, self.prior(len(x))), self.critic.parameters())
        phase = [self.prior(len(x)) for x in batches]
        before = [self.generator(z).detach() for z in phase]
        for z, old in zip(phase, before, strict=True):
            for _ in range(self.generator_steps):
                generator = _update(optimizer, self.generator_loss(z, old), self.generator.parameters())
        return {"critic": critic, "generator": generator}

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)


class AAE(_Generative):
    """Adversarial autoencoder: GAN with x and z in each other's place, D(z) the probability that z is from the prior.

        critic              -E_x log(1 - D(E(x))) - E_z log D(z)
        encoder, generator  E_x[-log D(E(x)) + lambda ||x - G(E(x))||^2]

    The exact loss also has KL(p(z) || p_old(z)), which the article drops.

    encoder: x -> [B, Z]. generator: z -> x. critic: z -> [B, 1] or [B]. reconstruction: lambda times the elements of a
    sample, as `GAN.regulariser`; the article gives no value.
    """

    def __init__(
        self, encoder: nn.Module, generator: nn.Module, critic: nn.Module, latent: int, *, reconstruction: float = 20.0
    ) -> None:
        super().__init__(latent)
        if reconstruction < 0:
            raise ValueError(f"reconstruction: expected 0 or more, got {reconstruction}")
        self.encoder, self.generator, self.critic, self.weight = encoder, generator, critic, reconstruction

    def encode(self, x: Tensor) -> Tensor:
        """[B, Z]"""
        z = self.encoder(x)
        if z.shape != (len(x), self.latent):
            wanted = f"[{len(x)}, {self.latent}]"
            raise ValueError(f"encoder: expected a network that gives {wanted}, got {list(z.shape)}")
        return z

    def critic_loss(self, x: Tensor, z: Tensor) -> Tensor:
        return critic_loss(self.critic(z), self.critic(self.encode(x).detach()))

    def autoencoder_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the mean squared error in it."""
        z = self.encode(x)
        error = (_wide(x) - _wide(self.generator(z))).square().mean()
        return F.softplus(-_wide(self.critic(z))).mean() + self.weight * error, error

    def train_step(self, optimizer: Optimizer, x: Tensor) -> dict[str, Tensor]:
        critic = _update(optimizer, self.critic_loss(x, self.prior(len(x))), self.critic.parameters())
        loss, error = self.autoencoder_loss(x)
        _update(optimizer, loss, [*self.encoder.parameters(), *self.generator.parameters()])
        return {"critic": critic, "generator": loss.detach(), "reconstruction": error.detach()}

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self(self.encode(x))


class ALI(_Generative):
    """Adversarially learned inference (BiGAN): y tells p~(x) p(z|x) from q(z) q(x|z), D(x, z) = p(1|x, z).

        critic              -E_p log D(x, z) - E_q log(1 - D(x, z))
        encoder, generator  article          -E_p log D(x, z) - E_q log D(x, z)
                            non_saturating   -E_p log(1 - D(x, z)) - E_q log D(x, z)
                            min_max           E_p log D(x, z) + E_q log(1 - D(x, z))

    E_p is over x and z ~ N(mean(x), variance(x)), reparameterised; E_q over z and x = G(z). The exact loss of the
    article has two terms more, which are normally dropped; so here.

    encoder: x -> [B, 2Z], means and log variances. generator: z -> x. critic: (x, z) -> [B, 1] or [B].
    """

    def __init__(
        self, encoder: nn.Module, generator: nn.Module, critic: nn.Module, latent: int, *, objective: str = "article"
    ) -> None:
        super().__init__(latent)
        if objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
        self.encoder, self.generator, self.critic, self.objective = encoder, generator, critic, objective

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of p(z|x), [B, Z] each."""
        return self._gaussian(self.encoder, x)

    def logits(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of (x, z ~ p(z|x)) and of (G(z), z)."""
        inferred = reparameterised(*self.encode(x))
        return self.critic(x, inferred), self.critic(self.generator(z), z)

    def critic_loss(self, x: Tensor, z: Tensor) -> Tensor:
        inferred, generated = reparameterised(*self.encode(x)).detach(), self.generator(z).detach()
        return critic_loss(self.critic(x, inferred), self.critic(generated, z))

    def generator_loss(self, x: Tensor, z: Tensor) -> Tensor:
        p, q = map(_wide, self.logits(x, z))
        if self.objective == "article":
            return F.softplus(-p).mean() + F.softplus(-q).mean()
        if self.objective == "non_saturating":
            return F.softplus(p).mean() + F.softplus(-q).mean()
        return -F.softplus(-p).mean() - F.softplus(q).mean()

    def train_step(self, optimizer: Optimizer, x: Tensor) -> dict[str, Tensor]:
        critic = _update(optimizer, self.critic_loss(x, self.prior(len(x))), self.critic.parameters())
        loss = self.generator_loss(x, self.prior(len(x)))
        _update(optimizer, loss, [*self.encoder.parameters(), *self.generator.parameters()])
        return {"critic": critic, "generator": loss}

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def reconstruct(self, x: Tensor) -> Tensor:
        """G at the mean of p(z|x)."""
        return self(self.encode(x)[0])
