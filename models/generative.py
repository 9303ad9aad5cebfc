"""The variational models with their default networks, from one configuration, and in one file.

    gan = generative_model(GenerativeConfig(model="gan", shape=(1, 28, 28), layers=3))
    gan.train_step(torch.optim.Adam(gan.parameters(), lr=2e-4, betas=(0.5, 0.999)), images)
    save_generative(Path("gan.safetensors"), gan)
    images = load_generative(Path("gan.safetensors")).sample(64)
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .files import save_tensors
from .variational import AAE, ALI, GAN, LIKELIHOODS, OBJECTIVES, VAE
from .variational_networks import (
    OUTPUTS,
    ImageGenerator,
    ImageTrunk,
    JointCritic,
    SequenceGenerator,
    SequenceTrunk,
    latent_critic,
)

MODELS = {"vae": VAE, "gan": GAN, "aae": AAE, "ali": ALI}
Generative = VAE | GAN | AAE | ALI


@dataclass(frozen=True)
class GenerativeConfig:
    """Sizes and weights of the losses; the defaults are those of the article's GAN.

    model: vae, gan, aae or ali. networks: image, for x [B, *shape] with shape (C, H, W), or sequence, with (L, C).
    layers: convolutions of x's trunk and of the generator. hidden: of the critics of z, and of x and z.
    output: of the generator, tanh for x in [-1, 1] or none for x without bounds (embedded text); the VAE's is its
    likelihood's. batch_norm: of images. The others are arguments of the models: regulariser and generator_steps of
    the GAN, reconstruction of the AAE, objective of ALI, likelihood of the VAE.
    """

    model: str = "gan"
    networks: str = "image"
    shape: tuple[int, ...] = (3, 64, 64)
    latent: int = 100
    width: int = 64
    layers: int = 4
    hidden: int = 256
    output: str = "tanh"
    batch_norm: bool = True
    regulariser: float = 5.0
    generator_steps: int = 2
    reconstruction: float = 20.0
    objective: str = "article"
    likelihood: str = "bernoulli"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # JSON makes a list of it
        known: dict[str, Collection[str]] = {"model": MODELS, "networks": ("image", "sequence"), "output": OUTPUTS}
        known |= {"objective": OBJECTIVES, "likelihood": LIKELIHOODS}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        wanted = "(C, H, W)" if self.networks == "image" else "(L, C)"
        if len(self.shape) != wanted.count(",") + 1 or min(self.shape) < 1:
            raise ValueError(f"shape: expected {wanted} for networks={self.networks!r}, got {self.shape}")
        for name in ("latent", "width", "layers", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")


def generative_model(config: GenerativeConfig, *, backend: str | None = None) -> Generative:
    """A new model, whose `config` is this one. backend: of the operators in sequence networks."""
    c, output = config, "none" if config.model == "vae" else config.output
    shape: Any = c.shape  # of the length that the networks want: the configuration has checked it
    image = c.networks == "image"
    options: dict[str, Any] = {"batch_norm": c.batch_norm} if image else {"backend": backend}
    Trunk, Generator = (ImageTrunk, ImageGenerator) if image else (SequenceTrunk, SequenceGenerator)

    def of_x(outputs: int) -> nn.Sequential:
        """A network of x that gives so many values."""
        trunk = Trunk(shape, c.width, c.layers, **options)
        last = nn.Linear(trunk.features, outputs)
        if image:  # as the article's; pooled features of sequences are too few and too small for it
            nn.init.normal_(last.weight, std=0.02)
            nn.init.zeros_(last.bias)
        return nn.Sequential(trunk, last)

    generator = Generator(shape, c.latent, c.width, c.layers, output=output, **options)
    model: Generative
    if c.model == "vae":
        model = VAE(of_x(2 * c.latent), generator, c.latent, likelihood=c.likelihood)
    elif c.model == "gan":
        steps = c.generator_steps
        model = GAN(generator, of_x(1), c.latent, regulariser=c.regulariser, generator_steps=steps)
    elif c.model == "aae":
        critic = latent_critic(c.latent, c.hidden)
        model = AAE(of_x(c.latent), generator, critic, c.latent, reconstruction=c.reconstruction)
    else:
        joint = JointCritic(Trunk(shape, c.width, c.layers, **options), c.latent, c.hidden)
        model = ALI(of_x(2 * c.latent), generator, joint, c.latent, objective=c.objective)
    model.config = config
    return model


def save_generative(path: Path, model: Generative) -> None:
    """A safetensors file with the configuration in it; `model` is one of `generative_model`."""
    if model.config is None:
        raise ValueError(f"model: expected one that generative_model made, got {type(model).__name__} without a config")
    save_tensors(path, model.state_dict(), {"config": json.dumps(asdict(model.config))})


def load_generative(path: Path, *, backend: str | None = None) -> Generative:
    """What `save_generative` wrote, in evaluation mode. Raises FileNotFoundError, or ValueError for another file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected the file of a trained model")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = generative_model(GenerativeConfig(**config), backend=backend)
        model.load_state_dict(weights)
    except KeyError:
        raise ValueError(f"{path}: no file of a generative model: it lacks a configuration") from None
    except (SafetensorError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: no file of a generative model: {error}") from None
    return model.eval()
