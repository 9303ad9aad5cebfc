"""Trains a small dialogue model from nothing: on NEZHA (pykernels.models.NezhaDialog), or CDial-GPT.

    python examples/train_dialog.py --sample
    python examples/train_dialog.py --data toy_train.txt toy_data.json --out runs/dialog
    python examples/chat.py runs/dialog

NEZHA learns all utterances of a dialogue, as in https://kexue.fm/archives/7718, and CDial-GPT the last one
(https://arxiv.org/abs/2008.03946). The optimizer is AdamW, and the sizes are for a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from chat import Chat
from language_data import (
    CDIAL_SPEAKERS,
    CDIAL_SPECIAL,
    SPECIAL,
    Dialog,
    Tokens,
    count_tokens,
    read_dialogs,
    sample_dialogs,
)
from language_training import FOLDER, Item, LanguageConfig, LanguageTrainer, columns, split_items, train_language

from kit.config import option
from kit.example import run_example
from kit.run import Run

EXAMPLES = """examples:
  python examples/train_dialog.py --sample                                  # needs no file
  python examples/train_dialog.py --data toy_train.txt --out runs/dialog    # a dialogue a line, tabs between utterances
  python examples/train_dialog.py --data toy_train.txt --model cdial-gpt --out runs/cdial
  python examples/train_dialog.py --data toy_train.txt --out runs/dialog --resume auto --epochs 20
  python examples/chat.py runs/dialog

exit status: 0 finished, 2 wrong arguments or data, 3 a loss not finite, 130 stopped by a signal after a checkpoint
"""

SAMPLE = {"epochs": 30, "switch_epoch": 25, "layers": 2, "width": 128, "context": 64, "out": "runs/sample-dialog"}
SAMPLE |= {"min_count": 1, "holdout": 0.1}


@dataclass(frozen=True)
class TrainConfig(LanguageConfig):
    data: tuple[str, ...] = option((), "text files, a dialogue a line with tabs, or JSON lists of lists (LCCC)")
    sample: bool = option(False, "train on chatterbot-corpus; sets a small network and a short schedule")
    model: str = option("nezha", "which", choices=("nezha", "cdial-gpt"))
    vocab: str = option("", "vocab.txt to use, a token a line; by default, the tokens that occur")
    out: str = option("runs/dialog", "folder of the run", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.data) == self.sample:
            raise ValueError("data: expected either --data FILE or --sample")


def vocabulary(config: TrainConfig, dialogs: Sequence[Dialog]) -> Tokens:
    if config.vocab:
        return Tokens.load(Path(config.vocab))
    counted = count_tokens(chain.from_iterable(chain.from_iterable(dialogs)), config.min_count)
    if config.model == "nezha":
        return Tokens([*SPECIAL, *counted])
    return Tokens([*CDIAL_SPECIAL, *counted, *CDIAL_SPEAKERS])


def network(config: TrainConfig, tokens: Tokens) -> Any:
    from pykernels.models import CDialGPT, CDialGPTConfig, NezhaConfig, NezhaDialog

    special = {f"{name}_token_id": tokens[token] for name, token in (("bos", "[CLS]"), ("eos", "[SEP]"))}
    special["pad_token_id"] = tokens["[PAD]"]
    if config.model == "nezha":
        return NezhaDialog(
            NezhaConfig(
                vocab_size=len(tokens),
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=4 * config.width,
                hidden_dropout_prob=config.dropout,
                **special,
            )
        )
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    sizes = {"n_positions": config.context, "n_embd": config.width, "n_layer": config.layers, "n_head": config.heads}
    return CDialGPT(CDialGPTConfig(vocab_size=len(tokens), **sizes, **rates, **special))


def encode(config: TrainConfig, tokens: Tokens, model: Any, dialog: Dialog) -> Item | None:
    """None where not even two utterances fit."""
    from pykernels.models import cdial_gpt, nezha

    utterances = [tokens.encode(utterance) for utterance in dialog]
    if config.model == "nezha":
        cls, sep = model.config.bos_token_id, model.config.eos_token_id
        ids, _ = nezha.encode_dialog(utterances, cls=cls, sep=sep, longest=config.context)
        return Item.of(ids) if ids.count(sep) > 1 else None
    while len(utterances) > 1:
        ids, labels = cdial_gpt.encode_dialog(utterances, model.config)
        if len(ids) <= config.context:
            return Item.of(ids, labels)
        utterances.pop(0)
    return None


def train(config: TrainConfig) -> int:
    dialogs = sample_dialogs() if config.sample else read_dialogs(config.data)
    training, held = split_items(dialogs, config.holdout, config.seed)
    run = Run(Path(config.out), config, config.resume, columns())
    tokens = vocabulary(config, training)
    torch.manual_seed(config.seed)
    model = network(config, tokens)

    def items(dialogs: Sequence[Dialog]) -> list[Item]:
        return [item for d in dialogs if (item := encode(config, tokens, model, d)) is not None]

    trainer = LanguageTrainer(config, model, tokens, items(training), items(held), run)

    def sample(model: Any) -> dict[str, str]:
        """Replies to the first utterances of dialogues that were held out."""
        texts = {}
        for i, dialog in enumerate((held or training)[: config.samples], 1):
            chat = Chat(model, tokens)
            said = tokens.decode(tokens.encode(dialog[0]))
            texts[f"dialogue {i}"] = f"{said} -> {chat.reply(dialog[0])}"
        return texts

    about = f"{len(trainer.items)} dialogues to train on, {len(trainer.held)} held out; {len(tokens)} tokens"
    return train_language(trainer, about, sample, f"the model is in {run.folder / FOLDER}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_example(
        TrainConfig,
        train,
        argv,
        script=__file__,
        description="Trains a small dialogue model and prints some replies.",
        epilog=EXAMPLES,
        presets={"sample": SAMPLE},
    )


if __name__ == "__main__":
    sys.exit(main())
