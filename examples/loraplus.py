"""LoRA+: what a larger rate of the output-side factor is worth, on the paper's toy problem and on a real encoder.

    python examples/loraplus.py --data glue/CoLA

Hayou, Ghosh and Yu 2024 (https://arxiv.org/abs/2402.12354) find that lora_b should learn faster than lora_a, and the
article https://kexue.fm/archives/10001 derives by how much. The comparison is fair where each ratio has the rate that
is best for it. On the toy problem (loraplus_toy.py) all pairs of rates are tried. On the encoder each ratio tries the
same geometric means of both rates with one seed, more where the best is the first or the last of them, and the
held-out loss chooses; then come other seeds, and dev.tsv, which has chosen nothing.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loraplus_plots
import loraplus_toy
import torch
from plot import smooth
from sentence_classifier import DTYPES, HEAD, Fit, Plan, Pretrained, Sentences, TaskOptions, finish

from kit.config import option
from kit.example import run_example
from kit.progress import Progress
from kit.results import Results, spread
from kit.stop import Stop
from kit.training import Diverged
from pykernels import apply_lora, loraplus_param_groups

EXAMPLES = """examples:
  python examples/loraplus.py --quick --out runs/toy  # the toy problem on a coarse grid, seconds
  python examples/loraplus.py --quick --data glue/CoLA --out runs/quick  # and a few steps of the encoder
  python examples/loraplus.py --data glue/CoLA --dtype bf16 --threads 1  # some 30 CPU minutes
  python examples/loraplus.py --data glue/CoLA --dtype bf16 --threads 1 --seeds 5 --resume auto  # more seeds
  python examples/loraplus.py --data glue/RTE --targets query value --toy-seeds 0 --out runs/rte

--data: a folder with train.tsv, dev.tsv and perhaps val.tsv in the form of CoLA or RTE; without it the toy alone
exit status: 0 finished, 2 wrong arguments or data, 130 stopped by a signal (what is finished is kept)
"""

QUICK = {
    "toy_seeds": 1,
    "toy_steps": 50,
    "toy_spacing": 4,
    "ratios": (1.0, 16.0),
    "rates": (1e-3,),
    "widen": 0,
    "seeds": 2,
    "steps": 6,
    "batch_size": 16,
    "limit": 128,
}
WINDOW = 50  # steps that a loss of the curve is the mean of


@dataclass(frozen=True)
class PlusConfig(TaskOptions):
    out: str = option("runs/loraplus", "folder of the run", may_change=True)
    data: str = option("", "folder of the task", may_change=True)
    holdout: float = option(0.1, "share of train.tsv that chooses the rates where there is no val.tsv")
    dtype: str = option("fp32", "of frozen weights; adapters and head are float32", choices=tuple(DTYPES))
    targets: tuple[str, ...] = option(("all-linear",), "layers with an adapter")
    r: int = option(8, "rank")
    alpha: float = option(16.0, "scale times rank")
    init: str = option("b_zero", "which factor begins at zero", choices=("b_zero", "a_zero"))
    dropout: float = option(0.0, "of the encoder")
    ratios: tuple[float, ...] = option((1.0, 4.0, 8.0, 16.0, 32.0), "rate of lora_b over lora_a's", may_change=True)
    rates: tuple[float, ...] = option((5e-4, 1e-3, 2e-3), "geometric means of both rates to try", may_change=True)
    widen: int = option(2, "doublings or halvings beyond these while the best is at the end", may_change=True)
    seeds: int = option(3, "runs of each ratio at its best rates, with seeds from --seed on", may_change=True)
    steps: int = option(400, "of a run; the rates fall to zero")
    batch_size: int = option(16, "of a step")
    toy_seeds: int = option(3, "of the toy problem; 0: without it", may_change=True)
    toy_steps: int = option(200, "of gradient descent")
    toy_spacing: int = option(1, "rates are powers of two, so many octaves apart")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(r=1, dropout=0, widen=0, seeds=1, steps=1, batch_size=1)
        self.at_least(toy_seeds=0, toy_steps=1, toy_spacing=1)
        for name in ("ratios", "rates"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"{name}: expected numbers > 0, got {getattr(self, name)}")
        if len(set(self.ratios)) < len(self.ratios) or 1 not in self.ratios:
            raise ValueError(f"ratios: expected each once, and 1 among them, got {self.ratios}")
        if not (self.data or self.toy_seeds):
            raise ValueError("data: expected a folder with train.tsv and dev.tsv where --toy-seeds is 0")


# --- the toy problem ---


def toy(config: PlusConfig, results: Results, stop: Stop) -> loraplus_toy.Grid:
    """All pairs of rates and seeds, and what there is to say of them, printed."""
    cells = list(itertools.product(*loraplus_toy.exponents(config.toy_spacing)))
    seeds = range(config.seed, config.seed + config.toy_seeds)
    grid: loraplus_toy.Grid = {}
    with Progress(len(cells) * len(seeds), every=config.log_seconds, quiet=config.quiet) as progress:
        progress.say(f"toy problem: {len(cells)} pairs of rates, {len(seeds)} seeds, {config.toy_steps} steps each")
        for a, b in cells:
            for seed in seeds:
                stop.check()
                name = f"toy: 2^{a}, 2^{b}, seed {seed}"
                if name not in results:
                    results[name] = loraplus_toy.descend(2.0**a, 2.0**b, config.toy_steps, seed, config.backend)
                grid.setdefault((a, b), []).append(results[name])
                progress.step("toy problem")
    print(loraplus_toy.report(grid))
    return grid


# --- a real encoder ---


def train_one(
    config: PlusConfig, pretrained: Pretrained, parts: dict[str, Sentences], ratio: float, rate: float, seed: int
) -> Fit:
    model = pretrained.classifier(seed, dropout=config.dropout, dtype=DTYPES[config.dtype])
    targets = "all-linear" if config.targets == ("all-linear",) else config.targets
    apply_lora(model, targets, config.r, config.alpha, init=config.init, trainable=[HEAD], backend=config.backend)

    def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(loraplus_param_groups(model, rate / math.sqrt(ratio), ratio), weight_decay=0.0)

    return Fit(model, optimizer, parts["train"], Plan(config.steps, config.batch_size, seed))


class Weights:
    """The runs on the encoder; each is made once."""

    def __init__(self, config: PlusConfig, results: Results, stop: Stop, progress: Progress) -> None:
        self.config, self.results, self.stop, self.progress = config, results, stop, progress
        self.pretrained = Pretrained(config.encoder, config.max_length)
        self.parts = self.pretrained.parts(config)

    def result(self, ratio: float, rate: float, seed: int) -> dict[str, Any]:
        """Of `finish`, with scores of "val" and "dev"; or {"diverged": why}."""
        name = f"{self.config.data}: ratio {ratio:g}, rate {rate:g}, seed {seed}"
        if name in self.results:
            self.progress.skip(self.config.steps)
            return self.results[name]
        fit = train_one(self.config, self.pretrained, self.parts, ratio, rate, seed)
        try:
            held = {n: self.parts[n] for n in ("val", "dev")}
            result = finish(fit, held, self.progress, self.stop, f"ratio {ratio:g}, rate {rate:g}, seed {seed}")
        except Diverged as error:
            result = {"diverged": str(error)}
        self.results[name] = result
        loss = f"held-out loss {result['val']['loss']:.4f}" if "val" in result else result["diverged"]
        self.progress.say(f"ratio {ratio:g}, rate {rate:g}, seed {seed}: {loss}")
        return result

    def best_rate(self, ratio: float) -> float:
        """Of the lowest held-out loss with the first seed; one beyond it on each side was tried too, if `widen` let."""

        def loss(rate: float) -> float:
            result = self.result(ratio, rate, self.config.seed)
            return math.inf if "diverged" in result else result["val"]["loss"]

        losses = {rate: loss(rate) for rate in sorted(self.config.rates)}
        for _ in range(self.config.widen):
            best = min(losses, key=losses.__getitem__)
            if min(losses) < best < max(losses):
                break
            self.progress.extend(self.config.steps)
            beyond = 2 * best if best == max(losses) else best / 2
            losses[beyond] = loss(beyond)
        return min(losses, key=losses.__getitem__)


def encoder(config: PlusConfig, results: Results, stop: Stop) -> dict[float, list[dict[str, Any]]]:
    """The finished runs of each ratio at its best rates, and the table of them, printed."""
    runs = len(config.ratios) * (len(config.rates) + config.seeds)
    with Progress(runs * config.steps, every=config.log_seconds, quiet=config.quiet) as progress:
        weights = Weights(config, results, stop, progress)
        counts = ", ".join(f"{len(part)} in {name}" for name, part in weights.parts.items())
        progress.say(f"{config.data}: {counts}; {config.steps} steps of {config.batch_size}")
        best = {ratio: weights.best_rate(ratio) for ratio in config.ratios}
        seeds = range(config.seed, config.seed + config.seeds)
        found = {ratio: [weights.result(ratio, best[ratio], seed) for seed in seeds] for ratio in config.ratios}
    print(table(config, best, found))
    return {ratio: [run for run in runs if "diverged" not in run] for ratio, runs in found.items()}


def steps_to(losses: Sequence[float], target: float) -> int | None:
    """How many steps until the smoothed loss is at most the target and stays so; None: never."""
    above = [i for i, value in enumerate(smooth(losses, WINDOW)) if value > target]
    reached = max(above[-1] + 2 if above else 1, min(WINDOW, len(losses)))  # before that it is no mean of a window
    return reached if reached <= len(losses) else None


def table(config: PlusConfig, best: dict[float, float], found: dict[float, list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over the seeds; a ratio one of whose runs diverged says so.

    steps: of the mean curve, until it stays below the loss where that of ratio 1 ends.
    """
    curves = {
        ratio: [statistics.mean(at) for at in zip(*(run["losses"] for run in runs), strict=True)]
        for ratio, runs in found.items()
        if not any("diverged" in run for run in runs)
    }
    window = min(WINDOW, config.steps)
    target = smooth(curves[1.0], WINDOW)[-1] if 1.0 in curves else -math.inf
    lines = [
        f"{config.data}, dev.tsv: {config.seeds} seeds; loss: training, the last {window} of {config.steps} steps; "
        "steps: until it stays below that of ratio 1",
        f"{'ratio':>6} {'lr of a':>9} {'lr of b':>9} {'loss':>17} {'steps':>6} {'held-out loss':>17} "
        f"{'accuracy':>17} {'Matthews':>17}",
    ]
    for ratio, runs in found.items():
        a, b = best[ratio] / math.sqrt(ratio), best[ratio] * math.sqrt(ratio)
        line = f"{ratio:6g} {a:9.2g} {b:9.2g} "
        if ratio not in curves:
            lines.append(line + f"{sum('diverged' in run for run in runs)} of {len(runs)} runs diverged")
            continue
        final = spread([smooth(run["losses"], WINDOW)[-1] for run in runs])
        held = spread([run["val"]["loss"] for run in runs])
        rated = " ".join(f"{spread([run['dev'][name] for run in runs]):>17}" for name in ("accuracy", "matthews"))
        lines.append(line + f"{final:>17} {steps_to(curves[ratio], target) or '-':>6} {held:>17} {rated}")
    return "\n".join(lines)


def work(config: PlusConfig) -> int:
    out = Path(config.out)
    results = Results(out, config, config.resume)
    pictures = []
    with Stop() as stop:
        if config.toy_seeds:
            loraplus_plots.draw_toy(toy(config, results, stop), out / "toy.png")
            pictures.append("toy.png")
        if config.data:
            loraplus_plots.draw_encoder(encoder(config, results, stop), WINDOW, out / "encoder.png")
            pictures.append("encoder.png")
    print(f"\nresults.json, {' and '.join(pictures)} are in {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_example(
        PlusConfig,
        work,
        argv,
        script=__file__,
        description="Trains LoRA with several ratios of the two rates, each at its best rates, and compares.",
        epilog=EXAMPLES,
        presets={"quick": QUICK},
    )


if __name__ == "__main__":
    sys.exit(main())
