"""EM and the losses of VAE, GAN, AAE and ALI, against the formulas in float64 and recorded outputs of the original."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pykernels.models import AAE, ALI, GAN, VAE, GaussianMixture
from pykernels.models.variational import critic_loss, gaussian_kl, reparameterised
from pykernels.models.variational_networks import ImageGenerator, ImageTrunk
from tests.recorded import recorded

Z = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(inputs: int, outputs: int, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs).double()
    with torch.no_grad():
        layer.weight.copy_(normal(outputs, inputs, seed=seed))
        layer.bias.copy_(normal(outputs, seed=seed + 1))
    return layer


def probability(logits: Tensor) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.detach().numpy().astype(np.float64)))


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(5 + Z, 1, seed=7)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.layer(torch.cat([x, z], 1))


# --- EM ---


def mixture(count: int = 3000) -> tuple[Tensor, Tensor]:
    """Samples of three Gaussians in a plane, and which each is of."""
    means = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    k = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), count, True, generator=torch.Generator().manual_seed(1))
    return means[k] + normal(count, 2) * torch.tensor([1.0, 0.5], dtype=torch.float64), k


def test_em_raises_the_likelihood_at_every_step_and_finds_the_mixture() -> None:
    x, k = mixture()
    torch.manual_seed(0)
    model = GaussianMixture(3, 2)
    values = model.fit(x, steps=200, tolerance=1e-9)
    assert len(values) > 3 and all(b >= a - 1e-12 for a, b in zip(values, values[1:], strict=False))
    order = [int((model.means - torch.tensor(m)).square().sum(1).argmin()) for m in ([0, 0], [6, 0], [0, 5])]
    assert sorted(order) == [0, 1, 2]
    for found, share, centre in zip(order, (0.5, 0.3, 0.2), ([0, 0], [6, 0], [0, 5]), strict=True):
        assert model.weights[found].item() == pytest.approx(share, abs=0.03)
        assert model.means[found].tolist() == pytest.approx(centre, abs=0.1)
        assert model.variances[found].tolist() == pytest.approx([1, 0.25], rel=0.15)
    right = torch.tensor(order)[k] == model.posterior(x).argmax(1)
    assert right.double().mean() > 0.98
    drawn = model.sample(4000)
    assert drawn.mean(0).tolist() == pytest.approx(x.mean(0).tolist(), abs=0.2)


def test_em_step_is_the_formulas() -> None:
    x, _ = mixture(40)
    torch.manual_seed(3)
    model = GaussianMixture(2, 2)
    weights, means, variances = (t.clone().numpy() for t in (model.weights, model.means, model.variances))
    xs = x.numpy()
    squares = (xs[:, None] - means) ** 2 / variances  # [N, K, D]
    density = weights * np.prod(np.exp(-squares / 2) / np.sqrt(2 * np.pi * variances), axis=-1)
    p = density / density.sum(1, keepdims=True)
    assert np.allclose(model.posterior(x).numpy(), p, rtol=1e-10)
    assert np.allclose(model.log_likelihood(x).numpy(), np.log(density.sum(1)), rtol=1e-10)
    before = model.step(x)
    assert before.item() == pytest.approx(np.log(density.sum(1)).mean())
    for k in range(2):
        mean = np.average(xs, axis=0, weights=p[:, k])
        assert np.allclose(model.weights[k].item(), p[:, k].mean())
        assert np.allclose(model.means[k].numpy(), mean)
        assert np.allclose(model.variances[k].numpy(), np.average((xs - mean) ** 2, axis=0, weights=p[:, k]))


def test_em_with_too_many_components_and_a_component_without_samples() -> None:
    torch.manual_seed(0)
    model = GaussianMixture(4, 2)
    values = model.fit(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert all(map(math.isfinite, values)) and (model.variances >= 1e-6).all()
    model = GaussianMixture(2, 1)
    model.means.copy_(torch.tensor([[0.0], [1e6]]))
    model.step(torch.zeros(5, 1))
    assert model.means.tolist() == [[0.0], [1e6]] and model.weights.tolist() == [1, 0]
    model.step(torch.zeros(5, 1))
    assert torch.isfinite(model.posterior(torch.zeros(1, 1))).all()


def test_em_in_other_dtypes_compiled_and_saved() -> None:
    x, _ = mixture(300)
    torch.manual_seed(0)
    model = GaussianMixture(3, 2)
    model.initialise(x)
    other = GaussianMixture(3, 2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.log_likelihood(x), model.log_likelihood(x))
    compiled = torch.compile(other.step, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model.step(x)) and torch.allclose(other.means, model.means)
    rounded = x.bfloat16()
    assert torch.equal(model.step(rounded), other.step(rounded.double()))


def test_em_gradient_in_x_is_that_of_the_density() -> None:
    """d log q(x) / dx = -sum_k p(k|x) (x - mu_k) / v_k."""
    x, _ = mixture(20)
    torch.manual_seed(3)
    model = GaussianMixture(3, 2)
    model.fit(x, steps=3)
    (grad,) = torch.autograd.grad(model.log_likelihood(x.requires_grad_()).sum(), x)
    x = x.detach()
    steps = (x.unsqueeze(1) - model.means) / model.variances
    assert torch.allclose(grad, -(model.posterior(x).unsqueeze(-1) * steps).sum(1))


def test_em_refuses_other_inputs() -> None:
    model = GaussianMixture(2, 3)
    with pytest.raises(ValueError, match="x: expected finite samples, got NaN or infinite ones"):
        model.fit(torch.full((4, 3), math.nan))
    with pytest.raises(ValueError, match="count: expected 1 or more, got 0"):
        model.sample(0)
    with pytest.raises(ValueError, match=r"x: expected \[N, 3\], got \[4, 2\]"):
        model.step(torch.zeros(4, 2))
    with pytest.raises(TypeError, match="x: expected a floating-point tensor, got torch.int64"):
        model.posterior(torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="components: expected 1 or more, got 0"):
        GaussianMixture(0, 3)
    with pytest.raises(ValueError, match="x: expected one sample or more, got none"):
        model.fit(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="x: expected one sample or more, got none"):
        model.step(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="steps: expected 1 or more, got 0"):
        model.fit(torch.zeros(4, 3), steps=0)


# --- VAE ---


def test_kl_is_the_integral() -> None:
    """In closed form against the sum over a fine grid, for one feature; the features add up."""
    mean, variance = 0.7, 0.3
    z = np.linspace(-12, 12, 200_001)
    p = np.exp(-((z - mean) ** 2) / 2 / variance) / math.sqrt(2 * math.pi * variance)
    log_q = -(z**2) / 2 - math.log(2 * math.pi) / 2
    log_p = -((z - mean) ** 2) / 2 / variance - math.log(2 * math.pi * variance) / 2
    expected = (p * (log_p - log_q)).sum() * (z[1] - z[0])
    got = gaussian_kl(torch.tensor([[mean, 0.0, mean]]), torch.tensor([[math.log(variance), 0.0, math.log(variance)]]))
    assert got.item() == pytest.approx(2 * expected, rel=1e-5)
    assert gaussian_kl(torch.zeros(4, 5), torch.zeros(4, 5)).tolist() == [0] * 4


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_vae_loss_is_the_formula(likelihood: str) -> None:
    x = normal(4, 5, seed=5).sigmoid()
    model = VAE(linear(5, 2 * Z, 1), linear(Z, 5, 3), Z, likelihood=likelihood)
    torch.manual_seed(0)
    got = model.loss(x)
    torch.manual_seed(0)
    mean, log_variance = model.encode(x)
    z = (mean + (log_variance / 2).exp() * torch.randn_like(mean)).detach()
    out, xs = model.decoder(z), x.numpy()
    if likelihood == "bernoulli":
        d = probability(out)
        of_sample = -(xs * np.log(d) + (1 - xs) * np.log(1 - d)).sum(1)
    else:
        of_sample = ((xs - out.detach().numpy()) ** 2).sum(1) / 2
    m, v = mean.detach().numpy(), np.exp(log_variance.detach().numpy())
    kl = 0.5 * (m**2 + v - np.log(v) - 1).sum(1)
    assert got.reconstruction.item() == pytest.approx(of_sample.mean(), rel=1e-9)
    assert got.kl.item() == pytest.approx(kl.mean(), rel=1e-9)
    assert got.loss.item() == pytest.approx(of_sample.mean() + kl.mean(), rel=1e-9)
    assert torch.equal(model(z), out.sigmoid() if likelihood == "bernoulli" else out)


def test_reparameterised_is_the_normal_distribution() -> None:
    torch.manual_seed(0)
    z = reparameterised(torch.full((20_000, 1), 2.0), torch.full((20_000, 1), math.log(0.25)))
    assert z.mean().item() == pytest.approx(2, abs=0.02) and z.std().item() == pytest.approx(0.5, abs=0.01)


def test_vae_of_a_linear_gaussian_comes_near_the_likelihood() -> None:
    """x = w z + noise of variance 1: the bound is tight, so the loss comes to -log p(x), known in closed form."""
    torch.manual_seed(0)
    w = torch.tensor([[1.5, -1.0]])
    x = torch.randn(4000, 1) @ w + torch.randn(4000, 2)
    covariance = w.T @ w + torch.eye(2)
    exact = -torch.distributions.MultivariateNormal(torch.zeros(2), covariance).log_prob(x).mean().item()
    model = VAE(nn.Linear(2, 2), nn.Linear(1, 2), 1, likelihood="gaussian")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(600):
        model.train_step(optimizer, x[step * 100 % 4000 :][:100])
    with torch.no_grad():
        loss = sum(model.loss(x).loss.item() for _ in range(20)) / 20 + math.log(2 * math.pi)
    assert exact - 0.02 < loss < exact + 0.03


# --- GAN ---


def gan(regulariser: float = 5.0) -> GAN:
    return GAN(linear(Z, 5, 1), linear(5, 1, 3), Z, regulariser=regulariser)


def test_gan_losses_are_the_formulas() -> None:
    model, x, z, old = gan(), normal(4, 5, seed=2), normal(6, Z, seed=3), normal(6, 5, seed=4)
    real, fake = probability(model.critic(x)), probability(model.critic(model.generator(z)))
    wanted = -np.log(real).mean() / 2 - np.log(1 - fake).mean() / 2
    assert model.critic_loss(x, z).item() == pytest.approx(wanted, rel=1e-9)
    squares = ((model.generator(z) - old).detach().numpy() ** 2).sum(1).mean()
    assert model.generator_loss(z, old).item() == pytest.approx(-np.log(fake).mean() + 5 / 5 * squares, rel=1e-9)
    model.regulariser = 0.0
    assert model.generator_loss(z, old).item() == pytest.approx(-np.log(fake).mean(), rel=1e-9)


def test_critic_loss_of_logits_far_away_is_finite() -> None:
    assert critic_loss(torch.tensor([-1e4]), torch.tensor([1e4])).item() == 1e4
    half = critic_loss(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16))
    assert half.dtype == torch.float32 and half.item() == pytest.approx(math.log(2))


class Recorder(torch.optim.SGD):
    """Which parameters got a gradient, step by step."""

    def step(self, closure: object = None) -> None:
        (group,) = self.param_groups
        self.seen = [*getattr(self, "seen", []), [p.grad is not None for p in group["params"]]]
        super().step()


@pytest.mark.parametrize("batches", [1, 5])
def test_gan_phase_takes_two_steps_on_the_same_z(batches: int) -> None:
    model, seen = gan(), []
    of_loss = model.generator_loss

    def generator_loss(z: Tensor, old: Tensor) -> Tensor:
        seen.append((z, old, (model.generator(z) - old).abs().max().item()))
        return of_loss(z, old)

    model.generator_loss = generator_loss  # type: ignore[method-assign]
    optimizer = Recorder(model.parameters(), lr=0.1)
    torch.manual_seed(0)
    losses = model.train_step(optimizer, *(normal(4, 5, seed=i) for i in range(batches)))
    assert set(losses) == {"critic", "generator"} and not any(t.requires_grad for t in losses.values())
    # The generator has the first two parameters, the critic the last two.
    assert optimizer.seen == [[False, False, True, True]] * batches + [[True, True, False, False]] * 2 * batches
    for (z, old, first), (again, same, second) in zip(seen[::2], seen[1::2], strict=True):
        assert z is again and old is same and second > 0
        assert (first == 0) == (z is seen[0][0]), "the other batches' steps have moved the generator"
    assert len({id(z) for z, _, _ in seen}) == batches


def test_regulariser_keeps_the_second_step_near_and_leaves_the_first_alone() -> None:
    moved = {}
    for regulariser in (0.0, 50.0):
        first = gan(regulariser)
        first.generator_steps = 1
        both = gan(regulariser)
        for model in (first, both):
            torch.manual_seed(1)
            model.train_step(torch.optim.SGD(model.parameters(), lr=0.01), normal(4, 5))
        z = normal(100, Z, seed=9)
        moved[regulariser] = (first(z), (both(z) - gan()(z)).square().mean().item())
    assert torch.equal(moved[0.0][0], moved[50.0][0])
    assert moved[50.0][1] < 0.7 * moved[0.0][1]


# --- AAE, ALI ---


def test_aae_losses_are_the_formulas() -> None:
    model = AAE(linear(5, Z, 1), linear(Z, 5, 3), linear(Z, 1, 5), Z, reconstruction=2.5)
    x, z = normal(4, 5, seed=2), normal(4, Z, seed=3)
    encoded = model.encoder(x)
    of_prior, of_x = probability(model.critic(z)), probability(model.critic(encoded))
    wanted = -np.log(1 - of_x).mean() / 2 - np.log(of_prior).mean() / 2
    assert model.critic_loss(x, z).item() == pytest.approx(wanted, rel=1e-9)
    squares = ((x - model.generator(encoded)).detach().numpy() ** 2).sum(1).mean()
    loss, error = model.autoencoder_loss(x)
    assert loss.item() == pytest.approx(-np.log(of_x).mean() + 2.5 / 5 * squares, rel=1e-9)
    assert error.item() == pytest.approx(squares / 5)
    optimizer = Recorder(model.parameters(), lr=0.01)
    model.train_step(optimizer, x)
    assert optimizer.seen == [[False] * 4 + [True] * 2, [True] * 4 + [False] * 2]


@pytest.mark.parametrize("objective", ["article", "non_saturating", "min_max"])
def test_ali_losses_are_the_formulas(objective: str) -> None:
    model = ALI(linear(5, 2 * Z, 1), linear(Z, 5, 3), Joint(), Z, objective=objective)
    x, z = normal(4, 5, seed=2), normal(4, Z, seed=3)
    torch.manual_seed(0)
    inferred = reparameterised(*model.encode(x))
    p, q = probability(model.critic(x, inferred)), probability(model.critic(model.generator(z), z))
    torch.manual_seed(0)
    assert model.critic_loss(x, z).item() == pytest.approx(-np.log(p).mean() / 2 - np.log(1 - q).mean() / 2, rel=1e-9)
    wanted = {
        "article": -np.log(p).mean() - np.log(q).mean(),
        "non_saturating": -np.log(1 - p).mean() - np.log(q).mean(),
        "min_max": np.log(p).mean() + np.log(1 - q).mean(),
    }
    torch.manual_seed(0)
    assert model.generator_loss(x, z).item() == pytest.approx(wanted[objective], rel=1e-9)
    optimizer = Recorder(model.parameters(), lr=0.01)
    model.train_step(optimizer, x)
    assert optimizer.seen == [[False] * 4 + [True] * 2, [True] * 4 + [False] * 2]


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="likelihood: expected one of bernoulli, gaussian, got 'poisson'"):
        VAE(linear(5, 6), linear(Z, 5), Z, likelihood="poisson")
    with pytest.raises(ValueError, match="objective: expected one of article, non_saturating, min_max, got 'x'"):
        ALI(linear(5, 6), linear(Z, 5), Joint(), Z, objective="x")
    with pytest.raises(ValueError, match="regulariser: expected 0 or more, got -1"):
        gan(-1)
    with pytest.raises(ValueError, match="generator_steps: expected 1 or more, got 0"):
        GAN(linear(Z, 5), linear(5, 1), Z, generator_steps=0)
    with pytest.raises(ValueError, match="reconstruction: expected 0 or more, got -1"):
        AAE(linear(5, Z), linear(Z, 5), linear(Z, 1), Z, reconstruction=-1)
    with pytest.raises(ValueError, match="latent: expected 1 or more, got 0"):
        VAE(linear(5, 6), linear(Z, 5), 0)
    with pytest.raises(ValueError, match="batches: expected one or more, got none"):
        gan().train_step(torch.optim.SGD(gan().parameters()))
    x = normal(4, 5)
    with pytest.raises(ValueError, match=r"gives \[4, 6\] \(means and log variances\), got \[4, 3\]"):
        VAE(linear(5, 3), linear(Z, 5), Z).loss(x)
    with pytest.raises(ValueError, match=r"gives \[4, 3\], got \[4, 6\]"):
        AAE(linear(5, 6), linear(Z, 5), linear(Z, 1), Z).autoencoder_loss(x)


# --- the original's outputs ---


def from_tensorflow(arrays: dict[str, np.ndarray], network: str, module: nn.Module) -> dict[str, str]:
    """Loads one of the original's networks; the names of our parameters and buffers by the original's.

    There linear maps are [in, out], with an image's features in the order H, W, C; convolutions are [H, W, in, out],
    transposed ones [H, W, out, in].
    """
    names: dict[str, str] = {}
    prefixes = sorted({k.rsplit("/", 1)[0] for k in arrays if f"/w/{network}/" in k and "BatchNorm" not in k})
    fc = next(p for p in prefixes if "fully" in p)
    convolutions = [p for p in prefixes if p != fc]
    order = [fc, *convolutions] if network == "generator" else [*convolutions, fc]
    layers = [n for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    norms = [n for n, m in module.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for theirs, ours in zip(order, layers, strict=True):
        names[f"{ours}.weight"] = f"{theirs}/weights"
        if f"{theirs}/biases" in arrays:
            names[f"{ours}.bias"] = f"{theirs}/biases"
    with_norm = [p for p in order if f"{p}/BatchNorm/beta" in arrays]
    for theirs, ours in zip(with_norm, norms, strict=True):
        stat = theirs.replace("/w/", "/stat/")
        names |= {f"{ours}.weight": f"{theirs}/BatchNorm/gamma", f"{ours}.bias": f"{theirs}/BatchNorm/beta"}
        names |= {f"{ours}.running_mean": f"{stat}/BatchNorm/moving_mean"}
        names |= {f"{ours}.running_var": f"{stat}/BatchNorm/moving_variance"}
    state = {ours: in_our_layout(arrays[theirs]) for ours, theirs in names.items()}
    state |= {f"{n}.num_batches_tracked": torch.tensor(0) for n in norms}
    module.load_state_dict(state)
    return names


def in_our_layout(array: np.ndarray) -> Tensor:
    t = torch.from_numpy(array)
    if t.dim() == 4:
        return t.permute(3, 2, 0, 1)
    if t.shape == (512, 1):
        return t.view(4, 4, 32).permute(2, 0, 1).reshape(1, 512)
    if t.shape in ((10, 512), (512,)):
        return t.view(-1, 4, 4, 32).permute(3, 1, 2, 0).reshape(512, -1).squeeze(1)
    return t


@pytest.mark.parametrize("form", ["bn", "nobn"])
def test_gan_equals_the_original(form: str) -> None:
    with np.load(recorded("golden", "gan_regulariser.npz")) as file:
        arrays = {name: file[name] for name in file.files if name != "__meta__"}
    sizes = ((3, 64, 64), 10, 4, 4)
    generator = ImageGenerator(*sizes, batch_norm=form == "bn")
    trunk = ImageTrunk(sizes[0], 4, 4, batch_norm=form == "bn")
    critic = nn.Sequential(trunk, nn.Linear(trunk.features, 1))
    arrays = {k: v for k, v in arrays.items() if "/" not in k or k.startswith(f"{form}/")}
    of_generator = from_tensorflow(arrays, "generator", generator)
    of_critic = from_tensorflow(arrays, "discriminator", critic)
    model = GAN(generator, critic, 10)
    z = torch.from_numpy(arrays["z"])
    images = (arrays[name].astype(np.float32) for name in ("real", f"{form}/old_fake"))
    real, old = (torch.from_numpy(image).permute(0, 3, 1, 2) for image in images)

    def same(got: Tensor, name: str, tolerance: float) -> None:
        assert torch.allclose(got, torch.from_numpy(arrays[f"{form}/{name}"]), rtol=0, atol=tolerance), name

    if form == "bn":
        with torch.no_grad():
            same(generator.eval()(z).permute(0, 2, 3, 1), "sample_inference", 1e-5)
        generator.train()
    d_loss = model.critic_loss(real, z)
    if form == "bn":
        for ours, theirs in of_generator.items():
            if "running" in ours:
                after = in_our_layout(arrays[theirs.replace("/stat/", "/stat_after_one_pass/")])
                assert torch.allclose(generator.state_dict()[ours], after, atol=1e-6), theirs
    fake = generator(z)
    same(fake.permute(0, 2, 3, 1), "fake", 1e-5)
    same(critic(fake), "f_logit", 5e-5)
    same(critic(real), "r_logit", 5e-5)
    g_loss = model.generator_loss(z, old)
    same(d_loss, "d_loss", 1e-5)
    same(g_loss, "g_loss", 1e-5)
    for loss, module, names, kind in ((d_loss, critic, of_critic, "d"), (g_loss, generator, of_generator, "g")):
        parameters = dict(module.named_parameters())
        for (ours, _), got in zip(parameters.items(), torch.autograd.grad(loss, parameters.values()), strict=True):
            expected = in_our_layout(arrays[names[ours].replace("/w/", f"/grad_{kind}/")])
            assert torch.allclose(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item()), names[ours]
    weight = model.regulariser
    model.regulariser = 0.0
    assert (g_loss - model.generator_loss(z, old)).item() == pytest.approx(
        weight * (fake - old).square().mean().item(), abs=1e-5
    )
