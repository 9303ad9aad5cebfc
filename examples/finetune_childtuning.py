"""ChildTuning on a real encoder: AdamW, and ChildTuningAdamW with drawn (F) and with fixed masks (D), over seeds.

    python examples/finetune_childtuning.py --data glue/CoLA

Xu et al. 2021 (https://arxiv.org/abs/2109.05687, https://kexue.fm/archives/8764) train a part of the parameters. For
each seed all methods begin with the same weights, see the same batches, drop the same elements of hidden states, and
take turns in blocks of steps, so that drift of the machine hits all alike. D's masks come from the Fisher information
on the training data, before the first step. Under Adam, F's noise acts like a rate smaller by sqrt(p); "F-scaled" has
its rate divided by that. dev.tsv is scored along the way and chooses nothing: the table has the last scores.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from child_training import ChildOptions, fisher_batches, masks_for, parameter_groups, state_bytes, trained_share
from plot import band, smooth
from sentence_classifier import Fit, Plan, Pretrained, Sentences, TaskOptions, loss_of, score, take_turns
from torch import Tensor, nn

from kit.config import option
from kit.example import run_example
from kit.picture import pyplot, save
from kit.progress import Progress
from kit.results import Results, spread
from kit.stop import Stop
from pykernels import ChildTuningAdamW, set_backend

EXAMPLES = """examples:
  python examples/finetune_childtuning.py --quick --data glue/CoLA --out runs/quick  # a few steps
  python examples/finetune_childtuning.py --data glue/CoLA --dtype bf16  # three epochs, three seeds
  python examples/finetune_childtuning.py --data glue/CoLA --dtype bf16 --seeds 5 --resume auto  # two seeds more
  python examples/finetune_childtuning.py --data glue/CoLA --dtype bf16 --steps 226 --batch-size 64 --lr 2e-4 \\
    --dropout 0 --out runs/two-epochs  # a sixth of the steps
  python examples/finetune_childtuning.py --data glue/RTE --max-length 128 --methods plain F F-scaled D --out runs/rte

--data: a folder with train.tsv, dev.tsv and perhaps val.tsv in the form of CoLA or RTE
exit status: 0 finished, 2 wrong arguments or data, 3 a loss not finite, 130 stopped by a signal (what is finished is
kept)
"""

METHODS = ("plain", "F", "F-scaled", "D")
QUICK = {"seeds": 2, "steps": 6, "block": 2, "batch_size": 8, "limit": 64, "evaluations": 2, "fisher_batches": 4}
WINDOW = 50  # steps that a loss of the curve is the mean of


@dataclass(frozen=True)
class ChildConfig(ChildOptions, TaskOptions):
    out: str = option("runs/childtuning", "folder of the run", may_change=True)
    dtype: str = option("fp32", "of products; weights and moments are float32", choices=("fp32", "bf16"))
    methods: tuple[str, ...] = option(("plain", "F", "D"), "to compare", choices=METHODS)
    lr: float = option(1e-4, "rises over --warmup of the steps and falls to zero")
    evaluations: int = option(3, "of dev.tsv, equally far apart, the last of them at the end")
    block: int = option(5, "steps that a model makes before it is the next one's turn")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(lr=0, evaluations=1, block=1)
        self.once_each("methods")
        if not self.data:
            raise ValueError("data: expected a folder with train.tsv and dev.tsv")

    @property
    def autocast(self) -> bool:
        return self.dtype == "bf16"


# --- a seed ---


def optimizer_of(
    config: ChildConfig, method: str, model: nn.Module, masks: Mapping[str, Tensor] | None, seed: int
) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW, whose gradients `Fit` clips, or ours, which clips them in its step."""
    groups = parameter_groups(model, config.weight_decay)
    if method == "plain":
        return torch.optim.AdamW(groups, config.lr, fused=True)
    lr = config.lr / math.sqrt(config.reserve_p) if method == "F-scaled" else config.lr
    own = {"reserve_p": config.reserve_p, "seed": seed, "max_grad_norm": config.clip or None}
    if method == "D":
        return ChildTuningAdamW(groups, lr, mode="D", masks=masks, **own)
    return ChildTuningAdamW(groups, lr, mode="F", **own)


def train_seed(
    config: ChildConfig,
    pretrained: Pretrained,
    parts: Mapping[str, Sentences],
    seed: int,
    progress: Progress,
    stop: Stop,
) -> dict[str, Any]:
    """Of each method losses, median seconds, bytes of state and the scores on "dev", with the steps they were taken at.

    Stopped where that was requested.
    """
    model, train, dev = pretrained.classifier(seed, dropout=config.dropout), parts["train"], parts["dev"]
    masks, result = None, {}
    if "D" in config.methods:
        begun = time.perf_counter()
        loss = lambda model, chosen: loss_of(model, train, chosen, config.autocast)  # noqa: E731
        masks = masks_for(config, model, loss, train, seed, progress, stop)
        result["masks"] = {"seconds": time.perf_counter() - begun, "trained": trained_share(model, masks)}
    steps = config.steps_of(len(train))
    fits = {}
    for method in config.methods:
        # Ours clips in its step.
        clip = config.clip if method == "plain" else 0.0
        plan = Plan(steps, config.batch_size, seed, config.warmup, clip, config.autocast)
        optimizer = lambda own: optimizer_of(config, method, own, masks, seed)  # noqa: B023, E731, called at once
        fits[method] = Fit(copy.deepcopy(model), optimizer, train, plan)
    marks = {round(steps * (i + 1) / config.evaluations) for i in range(config.evaluations)}
    scores: dict[str, list[Any]] = {method: [] for method in fits}

    def made(method: str, fit: Fit) -> None:
        if len(fit.losses) in marks:
            progress.at(f"seed {seed}, {method}: scoring dev.tsv")
            scores[method].append([len(fit.losses), score(fit.model, dev, config.autocast)])

    take_turns(fits, config.block, progress, stop, f"seed {seed}", made)
    for method, fit in fits.items():
        result[method] = {
            "losses": [round(v, 6) for v in fit.losses],
            "seconds": statistics.median(fit.seconds),
            "update_seconds": statistics.median(fit.update_seconds),
            "state_bytes": state_bytes(fit.optimizer),
            "dev": scores[method],
        }
    return result


# --- what is reported ---


def table(config: ChildConfig, found: Sequence[Mapping[str, Any]]) -> str:
    """A line for each method: mean and standard deviation of the last scores over the seeds."""
    window = min(WINDOW, len(found[0][config.methods[0]]["losses"]))
    lines = [
        f"{config.data}, dev.tsv: {len(found)} seeds, p {config.reserve_p:g}, lr {config.lr:g}; loss: training, the "
        f"last {window} steps; ms: medians, of a step and of clipping and optimizer in it; state: MB of the optimizer",
        f"{'method':<9} {'accuracy':>17} {'Matthews':>17} {'dev loss':>17} {'loss':>17} "
        f"{'step ms':>8} {'update ms':>9} {'state':>7}",
    ]
    for method in config.methods:
        runs = [result[method] for result in found]
        rated = [spread([run["dev"][-1][1][name] for run in runs]) for name in ("accuracy", "matthews", "loss")]
        loss = spread([smooth(run["losses"], window)[-1] for run in runs])
        ms = [1e3 * statistics.mean(run[name] for run in runs) for name in ("seconds", "update_seconds")]
        columns = " ".join(f"{text:>17}" for text in (*rated, loss))
        lines.append(f"{method:<9} {columns} {ms[0]:8.1f} {ms[1]:9.1f} {runs[0]['state_bytes'] / 1e6:7.1f}")
    if "D" in config.methods:
        masks = [result["masks"] for result in found]
        trained, seconds = 100 * masks[0]["trained"], statistics.mean(one["seconds"] for one in masks)
        lines.append(f"D trains {trained:.1f} % of the parameters; its masks took {seconds:.1f} s")
    return "\n".join(lines)


def draw(config: ChildConfig, found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The training loss of each method, mean and range over the seeds, and the scores along the way."""
    figure, (losses, *rated) = pyplot().subplots(1, 3, figsize=(15, 4.5))
    for method in config.methods:
        runs = [result[method] for result in found]
        color = band(losses, [run["losses"] for run in runs], WINDOW, method)
        steps = [step for step, _ in runs[0]["dev"]]
        for axis, name in zip(rated, ("accuracy", "matthews"), strict=True):
            values = [[scores[name] for _, scores in run["dev"]] for run in runs]
            axis.plot(steps, [statistics.mean(at) for at in zip(*values, strict=True)], color=color, label=method)
            for own in values:
                axis.plot(steps, own, "o", color=color, alpha=0.4, markersize=4)
    losses.set_ylabel(f"training loss, mean of {WINDOW} steps")
    rated[0].set_ylabel("accuracy, dev.tsv")
    rated[1].set_ylabel("Matthews' correlation, dev.tsv")
    for axis in (losses, *rated):
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    save(figure, path)


def work(config: ChildConfig) -> int:
    out = Path(config.out)
    set_backend(config.backend)
    results = Results(out, config, config.resume)
    pretrained = Pretrained(config.encoder, config.max_length)
    parts = pretrained.parts(config)
    train, steps = parts["train"], config.steps_of(len(parts["train"]))
    fisher = len(fisher_batches(config, train, 0))
    a_seed = len(config.methods) * steps + ("D" in config.methods) * fisher
    with Stop() as stop, Progress(config.seeds * a_seed, every=config.log_seconds, quiet=config.quiet) as progress:
        progress.say(f"{config.data}: {len(train)} to train on, {len(parts['dev'])} in dev.tsv; {steps} steps each")
        found = []
        for seed in range(config.seed, config.seed + config.seeds):
            name = f"seed {seed}"
            if name in results:
                progress.skip(a_seed)
            else:
                results[name] = train_seed(config, pretrained, parts, seed, progress, stop)
            found.append(results[name])
    print(f"{steps} steps of {config.batch_size}, {config.dtype}, {torch.get_num_threads()} threads")
    print(table(config, found))
    draw(config, found, out / "curves.png")
    print(f"\nresults.json and curves.png are in {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_example(
        ChildConfig,
        work,
        argv,
        script=__file__,
        description="Fine-tunes a whole encoder with AdamW and with ChildTuning, and compares.",
        epilog=EXAMPLES,
        presets={"quick": QUICK},
    )


if __name__ == "__main__":
    sys.exit(main())
