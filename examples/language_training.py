"""What training a language model needs, whichever: batches, held-out loss, the best weights, samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from language_data import Tokens
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kit.config import option
from kit.example import finish, write_json
from kit.progress import Progress
from kit.run import Refused, Run
from kit.training import COLUMNS, Schedule, Trainer
from pykernels.models.files import save_tensors, write_atomically

FOLDER = "model"


@dataclass(frozen=True)
class LanguageConfig(Schedule):
    """Options of both examples; sizes are small by default, for training from nothing on a CPU."""

    min_count: int = option(2, "tokens that occur less often are unknown")
    holdout: float = option(0.05, "share of the texts to evaluate on")
    layers: int = option(4, "of the network")
    width: int = option(256, "of the network")
    heads: int = option(4, "of the attention")
    context: int = option(128, "longest text in tokens; what is longer is cut")
    dropout: float = option(0.1, "of the network")
    samples: int = option(4, "texts to print at the end", may_change=True)
    batch_size: int = option(32, "texts a step")
    epochs: int = option(10, "in all", may_change=True)
    warmup_epochs: float = option(0.5, "over which the rate rises from zero")
    lr: float = option(1e-3, "of the first stage")
    second_lr: float = option(2e-4, "of the second stage")
    switch_epoch: int = option(8, "epochs of the first stage, at most")
    ema_decay: float = option(0.0, "of the averaged weights, which are evaluated and kept; 0: no averaging")
    save_every: int = option(200, "steps between checkpoints; one is written after every epoch too", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(min_count=1, layers=1, width=2, heads=1, context=4, samples=0)
        for name in ("holdout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width: expected a multiple of 2 * heads = {2 * self.heads}, got {self.width}")


@dataclass(frozen=True)
class Item:
    """A text. labels: as ids, with -100 where nothing is to be learned."""

    ids: Tensor
    labels: Tensor

    @classmethod
    def of(cls, ids: Sequence[int], labels: Sequence[int] | None = None) -> Item:
        return cls(torch.tensor(ids), torch.tensor(ids if labels is None else labels))


def split_items(items: Sequence[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """For training and held out."""
    order = np.random.default_rng((seed, 20)).permutation(len(items)).tolist()
    count = round(share * len(items))
    if count == len(items):
        raise Refused(f"--holdout {share}: nothing is left to train on of {len(items)} texts")
    return [items[i] for i in sorted(order[count:])], [items[i] for i in sorted(order[:count])]


def batch_of(items: Sequence[Item], pad: int) -> dict[str, Tensor]:
    """Arguments of a model, padded to the longest text."""
    ids = pad_sequence([item.ids for item in items], batch_first=True, padding_value=pad)
    labels = pad_sequence([item.labels for item in items], batch_first=True, padding_value=-100)
    lengths = torch.tensor([len(item.ids) for item in items])
    mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


@torch.no_grad()
def held_loss(
    model: Any,
    held: Sequence[Item],
    size: int,
    autocast: Callable[[], AbstractContextManager[object]],
    progress: Progress | None = None,
) -> float:
    """Mean over all predicted tokens of the held-out texts, `size` of them at once; NaN where there are none."""
    model.eval()
    total = count = 0.0
    for first in range(0, len(held), size):
        batch = batch_of(held[first : first + size], model.config.pad_token_id)
        predicted = int((batch["labels"][:, 1:] != -100).sum())
        if predicted:
            with autocast():
                total += model(**batch).loss.item() * predicted
            count += predicted
        if progress is not None:
            progress.at(f"evaluating, {first} of {len(held)} texts")
    return total / count if count else math.nan


class LanguageTrainer(Trainer):
    """model: of transformers. The score is 1 / perplexity of the held-out texts."""

    config: LanguageConfig

    def __init__(
        self, config: LanguageConfig, model: Any, tokens: Tokens, train: list[Item], held: list[Item], run: Run
    ) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
        super().__init__(config, model, optimizer, len(train), run)
        self.tokens, self.items, self.held = tokens, train, held

    def order(self, epoch: int) -> list[int]:
        """At random, but batches hold texts of about one length."""
        random = np.random.default_rng((self.config.seed, epoch))
        lengths = np.array([len(item.ids) for item in self.items])
        by_length = np.argsort(lengths + random.uniform(0, 8, len(lengths)))
        size = self.config.batch_size
        whole = len(by_length) // size * size
        batches = random.permutation(by_length[:whole].reshape(-1, size))
        return [*batches.flatten().tolist(), *by_length[whole:].tolist()]  # the shorter batch is the last one

    def loss(self, chosen: list[int], epoch: int) -> Tensor:
        batch = batch_of([self.items[i] for i in chosen], self.model.config.pad_token_id)
        with self.config.autocast():
            return self.model(**batch).loss

    def held_loss(self, progress: Progress | None = None) -> float:
        """Of the averaged weights."""
        return held_loss(self.ema.module, self.held, self.config.batch_size, self.config.autocast, progress)

    def evaluate(self, progress: Progress) -> tuple[Mapping[str, float], str] | None:
        if not self.held:
            return None
        loss = self.held_loss(progress)
        values = {"held_loss": loss, "perplexity": math.exp(loss), "score": math.exp(-loss)}
        return values, f"held-out loss {loss:.4f}, perplexity {math.exp(loss):.1f}"

    # --- the best weights, as from_pretrained reads them ---

    @property
    def folder(self) -> Path:
        return self.run.folder / FOLDER

    def keep(self) -> None:
        model = self.ema.module
        self.folder.mkdir(exist_ok=True)
        write_atomically(self.folder / "vocab.txt", lambda path: path.write_text(self.tokens.text(), encoding="utf-8"))
        model.config.architectures = [type(model).__name__]
        text = model.config.to_json_string()
        write_atomically(self.folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
        tied = model.all_tied_weights_keys
        weights = {name: t for name, t in model.state_dict().items() if name not in tied}
        save_tensors(self.folder / "model.safetensors", weights, {"format": "pt"})

    def kept(self) -> Mapping[str, Tensor]:
        return type(self.ema.module).from_pretrained(self.folder).state_dict()


def train_language(
    trainer: LanguageTrainer, about: str, sample: Callable[[Any], Mapping[str, str]], kept: str
) -> int:
    """Trains to the end and prints the held-out loss before and after, and `sample` of the best model."""
    before_file = trainer.run.folder / "before.json"
    if not trainer.run.resumed:
        write_json(before_file, {"held_loss": trainer.held_loss() if trainer.held else None})

    def results() -> tuple[dict[str, str], dict[str, Any]]:
        model = type(trainer.ema.module).from_pretrained(trainer.folder).eval()
        before = json.loads(before_file.read_text(encoding="utf-8"))["held_loss"]
        texts: dict[str, str] = {}
        scores: dict[str, Any] = {"held_loss_before": before}
        if trainer.held:
            trainer.ema.module.load_state_dict(model.state_dict())
            after = trainer.held_loss()
            texts["held-out loss"] = f"{before:.4f} before, {after:.4f} after (perplexity {math.exp(after):.1f})"
            scores |= {"held_loss": after, "perplexity": math.exp(after)}
        torch.manual_seed(trainer.config.seed)
        return texts | dict(sample(model)), scores

    return finish(trainer, about, results, kept)


def columns() -> list[str]:
    return [*COLUMNS, "held_loss", "perplexity"]
