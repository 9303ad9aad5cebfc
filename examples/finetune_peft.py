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
from sentence_classifier import DTYPES, Fit, Plan, Pretrained, Sentences, TaskOptions, score, take_turns

from kit.config import option
from kit.example import run_example
from kit.picture import pyplot, save
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
class PeftConfig(TaskOptions):
    out: str = option("runs/peft", "folder of the run", may_change=True)
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
        self.at_least(r=1, lora_dropout=0, dropout=0, lr=0)
        self.at_least(seeds=1, steps=1, block=1, batch_size=1)
        if unknown := set(self.dtypes) - set(DTYPES):
            raise ValueError(f"dtypes: expected {' or '.join(DTYPES)}, got {min(unknown)}")
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
) -> dict[str, Any]:
    """Losses, step times and the scores on "dev" of each model. Stopped where that was requested."""
    model = peft_model(config, pretrained, dtype, seed)
    models = {PEFT: model, FUSED: fuse(copy.deepcopy(model))}
    if config.lora_dropout:
        models[OTHER] = copy.deepcopy(model)
    plan = Plan(config.steps, config.batch_size, seed)
    fits = {
        name: Fit(own, lambda m: adamw(config, m), parts["train"], plan, stream=int(name == OTHER))
        for name, own in models.items()
    }
    take_turns(fits, config.block, progress, stop, f"{dtype}, seed {seed}")
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
    dtypes = list(dict.fromkeys(dtype for dtype, _ in found))
    figure, axes = pyplot().subplots(2, len(dtypes), figsize=(6 * len(dtypes), 6), sharex=True, squeeze=False)
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
    save(figure, path)


def work(config: PeftConfig) -> int:
    out = Path(config.out)
    set_backend(config.backend)
    results = Results(out, config, config.resume)
    pretrained = Pretrained(config.encoder, config.max_length)
    parts = pretrained.parts(config)
    cases = [(dtype, seed) for dtype in config.dtypes for seed in range(config.seed, config.seed + config.seeds)]
    found = {}
    models = 3 if config.lora_dropout else 2
    total = len(cases) * models * config.steps
    with Stop() as stop, Progress(total, every=config.log_seconds, quiet=config.quiet) as progress:
        progress.say(f"{config.data}: {len(parts['train'])} sentences to train on, {len(parts['dev'])} in dev.tsv")
        for dtype, seed in cases:
            name = f"{dtype}, seed {seed}"
            if name not in results:
                results[name] = compare(config, pretrained, parts, dtype, seed, progress, stop)
            else:
                progress.skip(models * config.steps)
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
