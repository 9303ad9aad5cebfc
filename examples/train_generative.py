"""Trains VAE, GAN, AAE and ALI (pykernels.models) on MNIST, and measures what the article's regulariser does for GANs.

    python examples/train_generative.py --data mnist --out runs/generative

https://kexue.fm/archives/5716 adds lambda ||G(z) - G_old(z)||^2 to the generator's loss, takes two generator steps on
the same z, and shows pictures of faces on which a GAN with it does not collapse. Here gan has it and gan-plain has not,
with the same seeds, initial weights, batches and noise, and as many steps. What samples show is counted by a classifier
(see generative_scores.py), at the end of each epoch, with the same z every time.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generative_data import SIDE, Digits, as_images, as_input, load
from generative_plots import draw_scores, save_grid
from generative_scores import Judge

from kit import checkpoint
from kit.config import option
from kit.example import run_example
from kit.options import Options
from kit.progress import Progress
from kit.results import Results, spread
from kit.run import Refused, Run
from kit.stop import Stop, Stopped
from kit.training import Diverged
from pykernels.models import GenerativeConfig, generative_model, save_generative

EXAMPLES = """examples:
  python examples/train_generative.py --data mnist --quick --out runs/quick  # a minute, shows little
  python examples/train_generative.py --data mnist --threads 1 --out runs/generative  # all five
  python examples/train_generative.py --data mnist --threads 1 --out runs/generative --resume auto
  python examples/train_generative.py --data mnist --models gan gan-plain --seeds 3 --out runs/regulariser
  python examples/train_generative.py --data mnist --models gan gan-plain --no-batch-norm --critic-batches 5 \\
      --out runs/without-bn  # the article's second experiment
  python examples/train_generative.py --data mnist --networks sequence --models vae --out runs/rows

--data: mnist.npz, a folder with it, or one with the four idx files
exit status: 0 finished, 2 wrong arguments or data, 3 a loss not finite, 130 stopped by a signal after a checkpoint
"""

MODELS = ("vae", "gan", "gan-plain", "aae", "ali")
QUICK = {"epochs": 2, "limit": 2048, "width": 8, "classifier_epochs": 1, "samples": 500}
COLUMNS = ["step", "loss", "critic", "generator", "reconstruction", "kl", "modes", "effective", "frechet", "seconds"]


@dataclass(frozen=True)
class TrainConfig(Options):
    out: str = option("runs/generative", "folder of the run", may_change=True)
    data: str = option("", "MNIST: mnist.npz, its folder, or that of the idx files")
    quick: bool = option(False, "a few steps of small networks, to see that all works")
    models: tuple[str, ...] = option(MODELS, "gan-plain: without the regulariser", choices=MODELS, may_change=True)
    seeds: int = option(1, "runs of each, with seeds from --seed on", may_change=True)
    networks: str = option("image", "convolutions, or gated ones over rows", choices=("image", "sequence"))
    epochs: int = option(5, "of each run")
    limit: int = option(0, "train on the first so many images; 0: all")
    batch_size: int = option(64, "of a batch")
    latent: int = option(100, "size of z")
    width: int = option(16, "channels of the first layer (article: 64); sequence: of all layers")
    layers: int = option(3, "of each network (article: 4, of images of 64 x 64)")
    batch_norm: bool = option(True, "of the image networks")
    lr: float = option(2e-4, "of Adam")
    beta1: float = option(0.5, "of Adam")
    vae_lr: float = option(1e-3, "of Adam for the VAE, whose beta1 is 0.9")
    regulariser: float = option(5.0, "lambda times the elements of an image, of gan")
    generator_steps: int = option(2, "on the same z, of gan and gan-plain")
    critic_batches: int = option(1, "of a step of gan and gan-plain (5: the article's second experiment)")
    reconstruction: float = option(20.0, "lambda times the elements of an image, of aae")
    objective: str = option("article", "of ali", choices=("article", "non_saturating", "min_max"))
    dtype: str = option("fp32", "bf16: autocast, with weights in float32", choices=("fp32", "bf16"))
    samples: int = option(2000, "to rate after each epoch")
    classifier_epochs: int = option(2, "of what rates them")
    save_every: int = option(500, "steps between checkpoints", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(seeds=1, epochs=1, limit=0, batch_size=2, critic_batches=1, generator_steps=1, save_every=1)
        self.at_least(latent=1, width=1, layers=1, classifier_epochs=1, samples=100, lr=0, vae_lr=0, regulariser=0)
        if not 0 <= self.beta1 < 1:
            raise ValueError(f"beta1: expected 0 <= beta1 < 1, got {self.beta1}")
        if not self.data:
            raise ValueError("data: expected --data with the folder of MNIST")

    def of_model(self, model: str) -> GenerativeConfig:
        return GenerativeConfig(
            model=model.removesuffix("-plain"),
            networks=self.networks,
            shape=(1, SIDE, SIDE) if self.networks == "image" else (SIDE, SIDE),
            latent=self.latent,
            width=self.width,
            layers=self.layers,
            batch_norm=self.batch_norm,
            regulariser=0.0 if model == "gan-plain" else self.regulariser,
            generator_steps=self.generator_steps,
            reconstruction=self.reconstruction,
            objective=self.objective,
        )

    def schedule(self, model: str, images: int) -> tuple[int, int]:
        """Batches of a step, and steps of an epoch."""
        batches = self.critic_batches if model.startswith("gan") else 1
        return batches, min(images, self.limit or images) // (self.batch_size * batches)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.dtype == "bf16" else nullcontext()


class Training:
    """One model and one seed, in a folder of its own; resumable after any step, and the same whether resumed or not."""

    def __init__(self, config: TrainConfig, name: str, seed: int, digits: Digits, judge: Judge, run: Run) -> None:
        self.config, self.name, self.seed, self.judge, self.run = config, name, seed, judge, run
        self.images, self.test = digits.train[: config.limit or None], digits.test
        torch.manual_seed(seed)
        self.model = generative_model(config.of_model(name), backend=config.backend)
        self.kind = self.model.config.model
        lr, beta1 = (config.vae_lr, 0.9) if self.kind == "vae" else (config.lr, config.beta1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr, betas=(beta1, 0.999))
        self.batches, self.steps_an_epoch = config.schedule(name, len(self.images))
        self.total = self.steps_an_epoch * config.epochs
        self.step, self.history, self.seconds = 0, [], 0.0
        self.z = torch.randn(config.samples, config.latent, generator=torch.Generator().manual_seed(0))

    def save(self) -> None:
        self.run.log.flush()
        progress = {"step": self.step, "history": self.history, "seconds": self.seconds, "log_rows": self.run.log.rows}
        checkpoint.save(self.run.checkpoint, {"model": self.model}, self.optimizer, progress)

    def resume(self) -> None:
        progress = checkpoint.load(self.run.checkpoint, {"model": self.model}, self.optimizer)
        self.step, self.history, self.seconds = progress["step"], progress["history"], progress["seconds"]
        self.run.log.cut(progress["log_rows"])

    def of_step(self, epoch: int, order: torch.Tensor) -> list[torch.Tensor]:
        """The batches of the next step."""
        size = self.config.batch_size * self.batches
        first = (self.step - epoch * self.steps_an_epoch) * size
        chosen = order[first : first + size].split(self.config.batch_size)
        return [as_input(self.images[i], self.kind, self.config.networks) for i in chosen]

    def train(self, progress: Progress, stop: Stop) -> dict[str, Any]:
        if self.run.resumed:
            self.resume()
        progress.done += self.step
        while self.step < self.total:
            epoch = self.step // self.steps_an_epoch
            order = torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(len(self.images)))
            while self.step < (epoch + 1) * self.steps_an_epoch:
                if stop.requested:
                    self.save()
                    raise Stopped
                self._step(self.of_step(epoch, order), progress)
                if self.step % self.config.save_every == 0:
                    self.save()
            self._rate(epoch + 1, progress)
            self.save()
        save_generative(self.run.folder / "model.safetensors", self.model)
        return {**self.history[-1], **self._on_test_images(), "history": self.history, "seconds": self.seconds}

    def _step(self, batches: list[torch.Tensor], progress: Progress) -> None:
        begun = time.perf_counter()
        self.model.train()
        with self.config.autocast():
            losses = self.model.train_step(self.optimizer, *batches)
        values = {name: value.item() for name, value in losses.items()}
        self.step += 1
        seconds = time.perf_counter() - begun
        self.seconds += seconds
        if not all(map(math.isfinite, values.values())):
            rate = "--vae-lr" if self.kind == "vae" else "--lr"
            raise Diverged(f"{self.name}, seed {self.seed}, step {self.step}: {values}; a lower {rate} may help")
        self.run.log.add(step=self.step, seconds=seconds, **values)
        progress.step(f"{self.name}, seed {self.seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))

    @torch.no_grad()
    def _rate(self, epoch: int, progress: Progress) -> None:
        self.model.eval()
        images = torch.cat([as_images(self.model(z), self.kind) for z in self.z.split(500)])
        save_grid(images[:100], self.run.folder / f"epoch-{epoch:03}.png")
        values = self.judge.rate(images)
        self.history.append({"step": self.step, **values})
        self.run.log.add(step=self.step, **values)
        rated = "modes {modes}, effective {effective:.2f}, Frechet distance {frechet:.2f}".format(**values)
        progress.say(f"{self.name}, seed {self.seed}, epoch {epoch}/{self.config.epochs}: {rated}")

    @torch.no_grad()
    def _on_test_images(self) -> dict[str, float]:
        """The VAE's loss (nats an image), or the others' mean squared error of reconstruction, pixels in [0, 1]."""
        if self.kind == "gan":
            return {}
        self.model.eval()
        torch.manual_seed(self.seed)
        losses, errors = [], []
        for part in self.test.split(1000):
            x = as_input(part, self.kind, self.config.networks)
            if self.kind == "vae":
                losses.append(self.model.loss(x).loss.item())
            error = as_images(self.model.reconstruct(x), self.kind) - part / 255
            errors.append(error.square().mean().item())
            if len(errors) == 1:
                pairs = torch.stack([part[:50] / 255, part[:50] / 255 + error[:50]], 1).flatten(0, 1)
                save_grid(pairs, self.run.folder / "reconstructions.png")
        return {"error": statistics.mean(errors), **({"loss": statistics.mean(losses)} if losses else {})}


def table(found: dict[str, list[dict[str, Any]]], judge: Judge) -> str:
    """Mean and standard deviation over the seeds, of the last epoch."""
    lines = [
        f"classifier: accuracy {judge.accuracy:.4f}; Frechet distance of real images {judge.floor:.2f}",
        f"{'model':>10} {'seeds':>5} {'modes':>14} {'effective':>16} {'Frechet distance':>18} {'test':>28} "
        f"{'ms a step':>9}",
    ]
    for model, runs in found.items():
        of = {name: [run[name] for run in runs if name in run] for name in ("modes", "effective", "frechet")}
        tested = [
            f"{text} {spread([run[name] for run in runs], digits)}"
            for name, text, digits in (("loss", "loss", 1), ("error", "error", 4))
            if name in runs[0]
        ]
        ms = 1000 * statistics.mean(run["seconds"] / run["step"] for run in runs)
        rated = f"{spread(of['modes'], 1):>14} {spread(of['effective'], 2):>16} {spread(of['frechet'], 2):>18}"
        lines.append(f"{model:>10} {len(runs):5} {rated} {(tested or ['-'])[0]:>28} {ms:9.1f}")
    return "\n".join(lines)


def work(config: TrainConfig) -> int:
    out, digits = Path(config.out), load(Path(config.data))
    steps = {model: config.schedule(model, len(digits.train))[1] * config.epochs for model in config.models}
    if short := next((model for model in config.models if not steps[model]), None):
        wanted = config.batch_size * config.schedule(short, 0)[0]
        given = min(len(digits.train), config.limit or len(digits.train))
        raise Refused(f"expected {wanted} images or more, as a step of {short} takes, got {given}: see --limit")
    results = Results(out, config, config.resume)
    pieces = [(model, config.seed + i) for i in range(config.seeds) for model in config.models]
    found: dict[str, list[dict[str, Any]]] = {model: [] for model in config.models}
    total = config.seeds * sum(steps.values())
    with Stop() as stop, Progress(total, every=config.log_seconds, quiet=config.quiet) as progress:
        judge = Judge(digits, out, config.classifier_epochs, config.samples, progress, stop)
        for i, (model, seed) in enumerate(pieces):
            name = f"{model}-{seed}"
            if name in results:
                progress.done += steps[model]
            else:
                run = Run(out / name, config, config.resume, COLUMNS)
                training = Training(config, model, seed, digits, judge, run)
                size = sum(p.numel() for p in training.model.parameters())
                progress.say(f"{name}, {i + 1} of {len(pieces)}: {size:,} parameters, {training.total} steps")
                results[name] = training.train(progress, stop)
            found[model].append(results[name])
    print(table(found, judge))
    draw_scores(found, judge.floor, out / "scores.png")
    print(f"\nresults.json, scores.png, and a folder for each model and seed are in {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_example(
        TrainConfig,
        work,
        argv,
        script=__file__,
        description="Trains VAE, GAN with and without the article's regulariser, AAE and ALI on MNIST; rates them.",
        epilog=EXAMPLES,
        presets={"quick": QUICK},
    )


if __name__ == "__main__":
    sys.exit(main())
