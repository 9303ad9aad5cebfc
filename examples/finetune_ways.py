"""Full fine-tuning, LoRA and LoRA+, each with AdamW, ChildTuning-F and -D: their options, a run, and the table."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from child_training import ChildOptions, fisher_batches, masks_for, parameter_groups, trained_elements
from plot import band
from sentence_classifier import Fit, take_turns
from torch import Tensor, nn
from training_memory import PARTS, allocated

from kit.config import option
from kit.picture import pyplot, save
from kit.progress import Progress
from kit.results import spread
from kit.run import Refused
from kit.stop import Stop
from pykernels import ChildTuningAdamW, apply_lora, loraplus_param_groups
from pykernels.child_update import unpack_mask

WAYS = ("full", "lora", "loraplus")
OPTIMIZERS = ("adamw", "F", "D")
WINDOW = 50  # steps that a loss of the curve is the mean of


@dataclass(frozen=True)
class WayOptions(ChildOptions):
    """Each example gives its own defaults to some."""

    train: tuple[str, ...] = option(WAYS, "full: all parameters; else adapters", choices=WAYS, may_change=True)
    optimizers: tuple[str, ...] = option(
        OPTIMIZERS, "AdamW, ChildTuning-F and -D; all pairs run", choices=OPTIMIZERS, may_change=True
    )
    full_lr: float = option(1e-4, "of full; it and the next two rise over --warmup and fall to zero")
    lora_lr: float = option(1e-3, "of LoRA")
    loraplus_lr: float = option(2.5e-4, "of LoRA+: that of lora_a")
    ratio: float = option(4.0, "of LoRA+: rate of lora_b over lora_a's")
    targets: tuple[str, ...] = option(("all-linear",), "layers with an adapter")
    rank: int = option(8, "of the adapters")
    alpha: float = option(16.0, "scale times rank")
    mask_steps: int = option(20, "of LoRA before D's masks are taken: at first lora_a has no gradient")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(full_lr=0, lora_lr=0, loraplus_lr=0, rank=1, mask_steps=1)
        self.once_each("train", "optimizers")
        if not self.ratio > 0:
            raise ValueError(f"ratio: expected more than 0, got {self.ratio}")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Ways and optimizers."""
        return list(itertools.product(self.train, self.optimizers))

    @property
    def run_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)

    def steps_before_masks(self, way: str) -> int:
        return 0 if way == "full" else self.mask_steps

    def check_mask_steps(self, steps: int) -> None:
        if "D" in self.optimizers and set(self.train) != {"full"} and self.mask_steps >= steps:
            raise Refused(f"--mask-steps {self.mask_steps}: expected fewer than the {steps} steps of a run")


# --- a run ---


def adapt(options: WayOptions, way: str, model: nn.Module, trainable: Sequence[str] = ()) -> nn.Module:
    """The model with what is trained of it, changed. trainable: modules that are trained whole, whatever the way."""
    if way == "full":
        return model
    targets = "all-linear" if options.targets == ("all-linear",) else options.targets
    try:
        return apply_lora(model, targets, options.rank, options.alpha, trainable=trainable)
    except (TypeError, ValueError) as error:
        raise Refused(f"--targets {' '.join(options.targets)}: {error}") from None


def optimizer_of(options: WayOptions, way: str, kind: str, model: nn.Module, seed: int) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW, or ours, which clips in its step. D has no masks yet."""
    if way == "loraplus":
        rates = {"lr": options.loraplus_lr, "ratio": options.ratio}
        groups = loraplus_param_groups(model, **rates, weight_decay=options.weight_decay, named=True)
    else:
        lr = options.full_lr if way == "full" else options.lora_lr
        groups = [{**group, "lr": lr} for group in parameter_groups(model, options.weight_decay)]
    if kind == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    own = {"reserve_p": options.reserve_p, "seed": seed, "max_grad_norm": options.clip or None}
    return ChildTuningAdamW(groups, mode=kind, **own)


def reserved_shares(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Of the elements of each kind of parameter that have a mask, those that it selects, by the end of the name."""
    counts: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        if name in masks:
            count = counts.setdefault(name.rpartition(".")[2], [0, 0])
            count[0] += int(unpack_mask(masks[name], p.shape).sum())
            count[1] += p.numel()
    return {kind: selected / whole for kind, (selected, whole) in counts.items()}


def train_run(
    options: WayOptions,
    way: str,
    kind: str,
    fit: Fit,
    model: nn.Module,
    loss: Callable[[nn.Module, list[int]], Tensor],
    progress: Progress,
    stop: Stop,
    about: str,
) -> dict[str, Any]:
    """Trains to the end: losses, median seconds, counts and bytes. Diverged as in `Fit.step`, Stopped on request.

    model: that of `fit`, or what its wrapper for several processes holds. loss: of a batch, for D's masks.
    """
    begin = options.steps_before_masks(way) if kind == "D" else -1
    masks: dict[str, Tensor] = {}
    seconds = 0.0

    def take_masks() -> None:
        nonlocal seconds
        begun = time.perf_counter()
        found = masks_for(options, fit.model, loss, fit.train, fit.plan.seed, progress, stop)
        masks.update({name.removeprefix("module."): mask for name, mask in found.items()})  # a wrapper's own name
        getattr(fit.optimizer, "optimizer", fit.optimizer).set_masks(masks)
        seconds = time.perf_counter() - begun

    def made(name: str, fit: Fit) -> None:
        if len(fit.losses) == begin:
            take_masks()

    if begin == 0:
        take_masks()
    take_turns({"": fit}, fit.plan.steps, progress, stop, about, made)
    return {
        "losses": [round(v, 6) for v in fit.losses],
        "seconds": statistics.median(fit.seconds),
        "update_seconds": statistics.median(fit.update_seconds),
        "mask_seconds": seconds,
        "trained": trained_elements(model, masks),
        "parameters": sum(p.numel() for p in model.parameters()),
        "reserved": reserved_shares(model, masks),
        "bytes": allocated(model, fit.optimizer),
    }


def steps_of_run(options: WayOptions, way: str, kind: str, train: Any, steps: int) -> int:
    """What a run adds to the progress."""
    return steps + (len(fisher_batches(options, train, options.seed)) if kind == "D" else 0)


# --- what is reported ---

Found = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
"""The runs of each way and optimizer, a seed each."""


def table(found: Found, scores: Mapping[str, Callable[[Mapping[str, Any]], float]]) -> str:
    """A line for each way and optimizer: means over the seeds. scores: columns with mean and standard deviation."""
    columns = "".join(f" {name:>17}" for name in scores)
    lines = [
        f"{'train':<8} {'optimizer':<9} {'trained':>11}{columns} {'step ms':>8} {'update ms':>9} "
        f"{'weights':>8} {'gradients':>9} {'state':>8} {'peak':>7}"
    ]
    for (way, kind), runs in found.items():
        rated = "".join(f" {spread([value(run) for run in runs]):>17}" for value in scores.values())
        ms = [1e3 * statistics.mean(run[name] for run in runs) for name in ("seconds", "update_seconds")]
        held = [statistics.mean(run["bytes"][name] for run in runs) / 1e6 for name in PARTS]
        known = [run["peak"] for run in runs if run["peak"] is not None]
        peak = f"{statistics.mean(known) / 1e6:7.0f}" if known else f"{'-':>7}"
        lines.append(
            f"{way:<8} {kind:<9} {round(statistics.mean(run['trained'] for run in runs)):>11,}{rated} "
            f"{ms[0]:8.1f} {ms[1]:9.1f} {held[0]:8.1f} {held[1]:9.1f} {held[2]:8.1f} {peak}"
        )
    lines.append(
        "ms: medians, of a step and of clipping and optimizer in it; weights, gradients, state of the optimizer: MB as "
        "allocated; peak: MB of the whole process while the run trained, Python, libraries and data among it"
    )
    for (way, kind), runs in found.items():
        if kind == "D":
            shares = ", ".join(
                f"{100 * statistics.mean(run['reserved'][name] for run in runs):.1f} % of {name}"
                for name in runs[0]["reserved"]
                if way != "full"
            )
            took = statistics.mean(run["mask_seconds"] for run in runs)
            lines.append(f"{way}: D's masks took {took:.1f} s" + (f" and reserve {shares}" if shares else ""))
    return "\n".join(lines)


def draw(found: Found, score: Callable[[Mapping[str, Any]], float], label: str, path: Path) -> None:
    """The training loss of each way and optimizer, mean and range over the seeds, and a score of each seed."""
    figure, (losses, scores) = pyplot().subplots(1, 2, figsize=(13, 5))
    names = [f"{way}, {kind}" for way, kind in found]
    for place, (name, runs) in enumerate(zip(names, found.values(), strict=True)):
        curves = [run["losses"] for run in runs]
        color = band(losses, curves, WINDOW, name)
        scores.plot([place] * len(runs), [score(run) for run in runs], "o", color=color, alpha=0.5)
    losses.set_xlabel("step")
    losses.set_ylabel(f"training loss, mean of {WINDOW} steps")
    losses.legend(fontsize=8)
    scores.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    scores.set_ylabel(label)
    save(figure, path)
