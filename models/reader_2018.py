"""Questions answered from passages by the reader of 2018: text in, answer out.

The command of `pykernels.models.reader` takes folders of both readers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pykernels import GatedConv1d
from pykernels.models.dgcnn_reader_2018 import DGCNNReader2018, DGCNNReader2018Config
from pykernels.models.files import save_tensors
from pykernels.models.reader import Answer
from pykernels.models.reader_decoding import vote
from pykernels.models.reader_evaluation import half_width
from pykernels.models.reader_features import passage_features
from pykernels.models.word_vectors import WordVectors

MODEL_FILE, WORDS_FILE = "reader_2018.safetensors", "words.safetensors"
MAX_WORDS = 10.0  # of the article
LETTERS = re.compile("[a-zA-Z0-9]|[^a-zA-Z0-9]+")


def tokenize(text: str, words: WordVectors) -> list[str]:
    """Words as the vectors have them, in half width; every Latin letter and digit is a word of its own."""
    return [part for word in words.segment(half_width(text)) for part in LETTERS.findall(word)]


def span_scores(tokens: Sequence[str], start: Tensor, end: Tensor, max_words: float = MAX_WORDS) -> dict[str, float]:
    """{candidate: start_i * end_j} of all spans i <= j of at most max_words, for one passage.

    A character counts 1, a Latin letter or digit 0.5. A string that occurs twice has its larger score. start, end: [L]
    with L >= len(tokens); the rest is padding.
    """
    starts, ends = (p[: len(tokens)].detach().cpu().double().tolist() for p in (start, end))
    sizes = [0.5 if token.isascii() and token.isalnum() else float(len(token)) for token in tokens]
    scores: dict[str, float] = {}
    for i, p in enumerate(starts):
        size, candidate = 0.0, ""
        for j in range(i, len(tokens)):
            size += sizes[j]
            if size > max_words:
                break
            candidate += tokens[j]
            scores[candidate] = max(scores.get(candidate, 0.0), p * ends[j])
    return scores


@dataclass(frozen=True)
class Words:
    """A text as words, with a row of the word vectors for each, [L] int64. Blanks at both ends of it are gone."""

    tokens: tuple[str, ...]
    rows: Tensor


@dataclass(frozen=True)
class Pair:
    """A question and one of its passages as the network takes them: rows of word vectors [L], features [Lp, 8]."""

    question: Tensor
    passage: Tensor
    features: Tensor


class Reader2018:
    """A trained network with the word vectors that it was trained with. max_words: of `span_scores`."""

    def __init__(self, model: DGCNNReader2018, words: WordVectors, *, max_words: float = MAX_WORDS) -> None:
        if words.size != model.config.word_size:
            raise ValueError(f"words: expected width {model.config.word_size}, as the network has, got {words.size}")
        if not max_words >= 0.5:
            raise ValueError(f"max_words: expected 0.5 or more, got {max_words}")
        self.model, self.words, self.max_words = model, words, max_words

    # --- texts to tensors ---

    def encode(self, text: str) -> Words:
        tokens = tokenize(text.strip(), self.words)
        return Words(tuple(tokens), torch.tensor([self.words.row(token) for token in tokens], dtype=torch.int64))

    def pairs(self, question: Words, passages: Sequence[Words]) -> list[Pair]:
        """One for each passage; the features of one depend on all."""
        features = passage_features(question.tokens, [passage.tokens for passage in passages])
        return [Pair(question.rows, p.rows, f) for p, f in zip(passages, features, strict=True)]

    def batch(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """The arguments of the network, padded; each word of a text is live, with or without a vector."""
        inputs = {}
        for name, rows in (("question", [p.question for p in pairs]), ("passage", [p.passage for p in pairs])):
            lengths = torch.tensor([len(row) for row in rows])
            inputs[name] = self.words.table[pad_sequence(rows, batch_first=True)]
            inputs[f"{name}_mask"] = torch.arange(inputs[name].shape[1]) < lengths.unsqueeze(1)
        return inputs | {"features": pad_sequence([p.features for p in pairs], batch_first=True)}

    # --- answers ---

    def predict(self, question: str, passages: Sequence[str]) -> Answer:
        """The answer to one question. Passages may be of any number; without a word in any there is none."""
        return self.predict_encoded([(self.encode(question), [self.encode(p) for p in passages])])[0]

    @torch.no_grad()
    def predict_encoded(
        self, questions: Sequence[tuple[Words, Sequence[Words]]], *, passages_a_batch: int = 128
    ) -> list[Answer]:
        """Answers to many questions, each with its passages; batches reach over questions."""
        training = self.model.training
        if training:
            self.model.eval()
        asked = [(question, [p for p in passages if p.tokens]) for question, passages in questions]
        pairs = [pair for question, passages in asked for pair in self.pairs(question, passages)]
        # Sorted by length, so that a batch holds little padding.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].passage))
        found: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(pairs)
        for first in range(0, len(order), passages_a_batch):
            chosen = order[first : first + passages_a_batch]
            start, end = self.model(**self.batch([pairs[i] for i in chosen]))
            for row, i in enumerate(chosen):
                found[i] = start[row], end[row]
        if training:
            self.model.train()

        answers, probabilities = [], iter(found)
        for _, passages in asked:
            scores = vote([span_scores(p.tokens, *next(probabilities), self.max_words) for p in passages])
            best = next(iter(scores), None)
            answers.append(Answer(best, scores[best] if best is not None else 0.0, scores))
        return answers

    # --- files ---

    def save(self, folder: Path) -> None:
        """reader_2018.safetensors, with the configuration in it, and once for a folder words.safetensors."""
        if not (folder / WORDS_FILE).exists():
            save_tensors(folder / WORDS_FILE, self.words.tensors(), self.words.metadata())
        about = {"config": asdict(self.model.config), "decoding": {"max_words": self.max_words}}
        stored = {name: json.dumps(value) for name, value in about.items()}
        save_tensors(folder / MODEL_FILE, self.model.state_dict(), stored)

    @classmethod
    def load(cls, folder: Path, *, backend: str | None = None) -> Reader2018:
        """What `save` wrote, ready for inference. Raises FileNotFoundError that names the missing file."""
        from safetensors import safe_open

        for name in (MODEL_FILE, WORDS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} does not exist: expected the folder of a trained reader")
        with safe_open(folder / MODEL_FILE, "pt") as file:
            about = {name: json.loads(text) for name, text in file.metadata().items()}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
        model = DGCNNReader2018(DGCNNReader2018Config(**about["config"]), backend=backend)
        model.load_state_dict(weights)
        model.eval()
        for module in model.modules():
            if isinstance(module, GatedConv1d):
                module.prepack()
        return cls(model, WordVectors.load(folder / WORDS_FILE), **about["decoding"])
