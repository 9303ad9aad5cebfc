"""The variational models with their default networks: sizes, gradients, files, bfloat16, compilation, errors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels.models import GAN, GenerativeConfig, generative_model, load_generative, save_generative
from pykernels.models.generative import Generative
from pykernels.models.variational_networks import (
    DoublingConv2d,
    HalvingConv2d,
    ImageGenerator,
    ImageTrunk,
    JointCritic,
    SequenceGenerator,
    SequenceTrunk,
)

NETWORKS = {"image": (1, 12, 9), "sequence": (7, 5)}
CASES = [(model, networks) for model in ("vae", "gan", "aae", "ali") for networks in NETWORKS]


def small(model: str, networks: str, **options: Any) -> GenerativeConfig:
    sizes = {"latent": 3, "width": 4, "layers": 2, "hidden": 8}
    return GenerativeConfig(model=model, networks=networks, shape=NETWORKS[networks], **sizes, **options)


def batch(networks: str, count: int = 6) -> Tensor:
    return torch.rand(count, *NETWORKS[networks], generator=torch.Generator().manual_seed(5))


def losses(model: Generative, x: Tensor) -> list[Tensor]:
    """All of a model, with fresh noise."""
    if model.config.model == "vae":
        return [model.loss(x).loss]
    z = model.prior(len(x))
    if model.config.model == "gan":
        return [model.critic_loss(x, z), model.generator_loss(z, x)]
    if model.config.model == "aae":
        return [model.critic_loss(x, z), model.autoencoder_loss(x)[0]]
    return [model.critic_loss(x, z), model.generator_loss(x, z)]


# --- networks ---


def test_sizes_of_the_article() -> None:
    """The weights of the published generator and critic, and where they have biases and batch normalisation."""
    model = generative_model(GenerativeConfig())
    generator = [p.numel() for p in model.generator.parameters() if p.dim() > 1]
    assert generator == [819_200, 3_276_800, 819_200, 204_800, 4_800]
    assert [p.numel() for p in model.critic.parameters() if p.dim() > 1] == [4_800, 204_800, 819_200, 3_276_800, 8_192]
    kinds = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
    biases = {n: [m.bias is not None for m in getattr(model, n).modules() if isinstance(m, kinds)] for n in NAMES}
    assert biases == {"generator": [False] * 4 + [True], "critic": [True] + [False] * 3 + [True]}
    norms = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert norms == [8192, 256, 128, 64, 128, 256, 512]
    assert model(model.prior(2)).shape == (2, 3, 64, 64)
    plain = generative_model(GenerativeConfig(batch_norm=False))
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in plain.modules())
    assert model.critic[0][0].weight.std().item() == pytest.approx(0.02 * 0.88, rel=0.05)  # truncated at two deviations
    assert model.generator[0].weight.std().item() == pytest.approx(0.02, rel=0.02)


NAMES = ("generator", "critic")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 28])
def test_convolutions_pad_as_tensorflow_does_and_are_transposes(size: int) -> None:
    torch.manual_seed(0)
    down, up = HalvingConv2d(2, 3, bias=False).double(), DoublingConv2d(3, 2, (size, 2 * size), bias=False).double()
    x = torch.randn(2, 2, size, 2 * size, dtype=torch.float64)
    y = down(x)
    assert y.shape == (2, 3, (size + 1) // 2, size)
    # SAME: the window of output i begins at 2 i - before, and the larger half of the padding comes after.
    before = [max((-(-n // 2) - 1) * 2 + 5 - n, 0) // 2 for n in (size, 2 * size)]
    i, j = y.shape[2] - 1, y.shape[3] // 2
    wide = F.pad(x, (5, 5, 5, 5))
    top, left = 2 * i - before[0] + 5, 2 * j - before[1] + 5
    expected = torch.einsum("bcij,ocij->bo", wide[:, :, top : top + 5, left : left + 5], down.weight)
    assert torch.allclose(y[:, :, i, j], expected)
    up.weight.data = down.weight.data
    dy = torch.randn_like(y)
    assert torch.allclose((y * dy).sum(), (x * up(dy)).sum())


def test_sequence_networks_are_their_formula(backend: str) -> None:
    torch.manual_seed(2)
    trunk = SequenceTrunk((7, 5), 4, 2, backend=backend)
    generator = SequenceGenerator((7, 5), 3, 4, 2, backend=backend)
    for p in (*trunk.parameters(), *generator.parameters()):
        nn.init.normal_(p, std=0.5)

    def gated(name: str, module: nn.Module, h: Tensor, dilation: int) -> Tensor:
        weight, bias = (module.get_parameter(f"blocks.{name}.{kind}").double() for kind in ("weight", "bias"))
        both = F.conv1d(h.mT, weight, bias, padding="same", dilation=dilation)
        c, g = both.mT.chunk(2, -1)
        return h * (1 - g.sigmoid()) + c * g.sigmoid()

    x, z = torch.randn(2, 7, 5), torch.randn(2, 3)
    h = F.linear(x.double(), trunk.embedding.weight.double(), trunk.embedding.bias.double())
    h = gated("1", trunk, gated("0", trunk, h + trunk.positions.double(), 1), 2)
    scores = torch.tanh(h @ trunk.pool.weight.double().T) @ trunk.pool.query.double().T
    expected = torch.einsum("blj,bld->bjd", scores.softmax(1), h).flatten(1)
    assert torch.allclose(trunk(x).double(), expected, atol=1e-5)
    first = F.linear(z.double(), generator.first[0].weight.double(), generator.first[0].bias.double())
    h = gated("1", generator, gated("0", generator, first.relu().view(2, 7, 4), 2), 1)
    expected = F.linear(h, generator.last.weight.double(), generator.last.bias.double()).tanh()
    assert torch.allclose(generator(z).double(), expected, atol=1e-5)


# --- every model ---


@pytest.mark.parametrize(("model", "networks"), CASES)
def test_shapes_gradients_and_training(model: str, networks: str) -> None:
    torch.manual_seed(0)
    net, x = generative_model(small(model, networks)), batch(networks)
    assert net.sample(5).shape == (5, *NETWORKS[networks])
    if model != "gan":
        assert net.reconstruct(x).shape == x.shape
    reached = set()
    for loss in losses(net, x):
        assert loss.shape == () and torch.isfinite(loss)
        named = dict(net.named_parameters())
        for name, grad in zip(named, torch.autograd.grad(loss, named.values(), allow_unused=True), strict=True):
            if grad is not None:
                assert torch.isfinite(grad).all(), name
                reached |= {name} if grad.any() else set()
    assert reached == {name for name, _ in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    before = {name: p.clone() for name, p in net.named_parameters()}
    for _ in range(3):
        values = net.train_step(optimizer, x)
    assert all(torch.isfinite(v) for v in values.values())
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_embedded_text_has_no_bounds() -> None:
    """output="none" reaches values that tanh cannot: an AAE reconstructs word vectors of length 3."""
    torch.manual_seed(0)
    words = 3 * F.normalize(torch.randn(4, 5), dim=1)
    x = words[torch.randint(4, (32, 7))]
    errors = {}
    for output in ("none", "tanh"):
        torch.manual_seed(1)
        net = generative_model(GenerativeConfig("aae", "sequence", (7, 5), 8, 16, 2, 16, output))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        errors[output] = [net.train_step(optimizer, x)["reconstruction"].item() for _ in range(150)]
    assert errors["none"][-1] < 0.5 * errors["none"][0] and errors["none"][-1] < errors["tanh"][-1]


def test_frozen_parameters_stay() -> None:
    net = generative_model(small("vae", "sequence"))
    net.encoder.requires_grad_(False)
    before = {name: p.clone() for name, p in net.named_parameters()}
    net.train_step(torch.optim.Adam(net.parameters(), lr=0.1), batch("sequence"))
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("encoder"), name


@pytest.mark.parametrize(("model", "networks"), CASES)
def test_saved_and_loaded(model: str, networks: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = generative_model(small(model, networks, objective="min_max", regulariser=2.0)), batch(networks)
    net.train_step(torch.optim.Adam(net.parameters()), x)  # batch normalisation has statistics
    path = tmp_path / "model.safetensors"
    save_generative(path, net)
    loaded = load_generative(path)
    assert loaded.config == net.config and not loaded.training
    z = net.prior(4)
    assert torch.equal(loaded(z), net.eval()(z))
    for name, t in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t), name
    assert GenerativeConfig(**json.loads(json.dumps(asdict(net.config)))) == net.config


@pytest.mark.parametrize(("model", "networks"), CASES)
def test_bfloat16(model: str, networks: str) -> None:
    """Under autocast and with parameters in bfloat16: finite, near float32, losses in float32."""
    torch.manual_seed(0)
    net, x = generative_model(small(model, networks)), batch(networks)

    def seeded(x: Tensor) -> list[Tensor]:
        torch.manual_seed(1)
        return losses(net, x)

    expected = seeded(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = seeded(x)
    sum(mixed).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    net.bfloat16()
    torch.manual_seed(1)
    low = losses(net, x.bfloat16())
    for a, b, c in zip(expected, mixed, low, strict=True):
        assert b.dtype == c.dtype == torch.float32 and torch.isfinite(c)
        assert b.item() == pytest.approx(a.item(), rel=0.05, abs=0.05)
    assert net.sample(3).dtype == torch.bfloat16


def test_autocast_uses_the_weights_of_the_last_step() -> None:
    """Its cache of rounded weights would outlive a step in the same context."""
    moved = []
    for cache in (True, False):
        torch.manual_seed(0)
        net = generative_model(small("gan", "image"))
        before = {name: p.clone() for name, p in net.named_parameters()}
        of_loss, losses = net.generator_loss, []

        def generator_loss(z: Tensor, old: Tensor, of_loss: Any = of_loss, losses: list[float] = losses) -> Tensor:
            losses.append(of_loss(z, old).item())
            return of_loss(z, old)

        net.generator_loss = generator_loss
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            net.train_step(torch.optim.SGD(net.parameters(), lr=1.0), batch("image"))
        assert losses[1] != losses[0], "the second step has not seen the first"
        assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())
        moved.append(losses)
    assert moved[0] == pytest.approx(moved[1], rel=0.01)


@pytest.mark.parametrize(("model", "networks"), [("vae", "image"), *CASES[3:5], ("ali", "sequence")])
def test_compiled_losses_are_those_of_eager(model: str, networks: str, forget_compiled: None) -> None:
    torch.manual_seed(0)
    net, x = generative_model(small(model, networks)), batch(networks)
    total, results = lambda x: sum(losses(net, x)), []
    for call in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        torch.manual_seed(1)
        loss = call(x)
        loss.backward()
        results.append((loss.item(), {n: p.grad.clone() for n, p in net.named_parameters()}))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    for name, grad in results[0][1].items():
        assert torch.allclose(results[1][1][name], grad, rtol=1e-3, atol=1e-5), name


def test_inductor_compiles_a_sequence_gan(forget_compiled: None) -> None:
    torch.manual_seed(0)
    net = generative_model(small("gan", "sequence"))
    x, z = batch("sequence"), net.prior(6)
    expected = net.generator_loss(z, x)
    assert torch.compile(net.generator_loss, fullgraph=True)(z, x).item() == pytest.approx(expected.item(), rel=1e-5)


# --- errors ---


@pytest.mark.parametrize(("model", "networks"), CASES)
def test_wrong_inputs_are_named(model: str, networks: str) -> None:
    net, shape = generative_model(small(model, networks)), NETWORKS[networks]
    wanted = ", ".join(map(str, shape))
    optimizer = torch.optim.Adam(net.parameters())
    before = {name: t.clone() for name, t in net.state_dict().items() if "num_batches" not in name}
    with pytest.raises(ValueError, match=rf"x: expected \[B, {wanted}\], got \[6, "):
        net.train_step(optimizer, batch(networks)[..., :-1])
    with pytest.raises(TypeError, match="x: expected a floating-point tensor, got torch.uint8"):
        net.train_step(optimizer, batch(networks).mul(255).to(torch.uint8))
    with pytest.raises(ValueError, match=r"z: expected \[B, 3\], got \[2, 4\]"):
        net(torch.zeros(2, 4))
    names = [name for name, _ in net.named_parameters()]
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in names)


def test_wrong_configurations_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected one of vae, gan, aae, ali, got 'em'"):
        GenerativeConfig(model="em")
    with pytest.raises(ValueError, match=r"shape: expected \(L, C\) for networks='sequence', got \(1, 28, 28\)"):
        GenerativeConfig(networks="sequence", shape=(1, 28, 28))
    with pytest.raises(ValueError, match="layers: expected 1 or more, got 0"):
        GenerativeConfig(layers=0)
    with pytest.raises(ValueError, match="objective: expected one of article, .*, got 'x'"):
        GenerativeConfig(objective="x")
    with pytest.raises(ValueError, match="output: expected one of tanh, none, got 'relu'"):
        GenerativeConfig(output="relu")
    with pytest.raises(ValueError, match="output: expected one of tanh, none, got 'relu'"):
        ImageGenerator((1, 8, 8), 3, 4, 1, output="relu")
    joint = JointCritic(ImageTrunk((1, 8, 8), 4, 2), 3, 8)
    with pytest.raises(ValueError, match="z: expected 2 rows, as x has, got 3"):
        joint(torch.zeros(2, 1, 8, 8), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="model: expected one that generative_model made, got GAN without a config"):
        save_generative(tmp_path / "own.safetensors", GAN(nn.Linear(3, 4), nn.Linear(4, 1), 3))
    with pytest.raises(FileNotFoundError, match="nothing.safetensors does not exist"):
        load_generative(tmp_path / "nothing.safetensors")
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    config = json.dumps(asdict(small("gan", "image")))
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no file of a generative model: it lacks a configuration"):
        load_generative(path)
    for about, reason in (({"size": 1}, "unexpected keyword argument 'size'"), (json.loads(config), "Missing key")):
        save_file({"a": torch.zeros(1)}, path, {"config": json.dumps(about)})
        with pytest.raises(ValueError, match=f"(?s)no file of a generative model: .*{reason}"):
            load_generative(path)
    path.write_text("text")
    with pytest.raises(ValueError, match="no file of a generative model: "):
        load_generative(path)
