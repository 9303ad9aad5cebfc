"""Questions answered from passages: text in, answer out; and the command for it.

python -m pykernels.models.reader runs/reader "谁写了《红楼梦》？" --passage "《红楼梦》的作者是曹雪芹。"
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pykernels import GatedConv1d
from pykernels.models.dgcnn_reader import DGCNNReader, DGCNNReaderConfig
from pykernels.models.files import save_tensors
from pykernels.models.reader_decoding import MAX_LENGTH, THRESHOLD, answer_scores
from pykernels.models.vocabulary import Vocabulary
from pykernels.models.word_vectors import WordVectors

if TYPE_CHECKING:
    from pykernels.models.reader_2018 import Reader2018

MODEL_FILE, WORDS_FILE = "reader.safetensors", "words.safetensors"


@dataclass(frozen=True)
class Encoded:
    """A text with a character id and a row of the word vectors for each character, [L] int64 each."""

    text: str
    characters: Tensor
    words: Tensor

    def __getitem__(self, part: slice) -> Encoded:
        return Encoded(self.text[part], self.characters[part], self.words[part])


@dataclass(frozen=True)
class Answer:
    """The best candidate or None, its score, and the scores of all candidates, best first."""

    text: str | None
    score: float
    candidates: dict[str, float]


class Reader:
    """A trained network with all that it needs to take texts.

    words: None where the network takes no word vectors. threshold, max_length: of `reader_decoding`.
    """

    def __init__(
        self,
        model: DGCNNReader,
        vocabulary: Vocabulary,
        words: WordVectors | None = None,
        *,
        threshold: float = THRESHOLD,
        max_length: int = MAX_LENGTH,
    ) -> None:
        wanted, got = model.config.word_size, 0 if words is None else words.size
        if wanted != got:
            raise ValueError(f"words: expected vectors of width {wanted} (0: none), as the network has, got {got}")
        self.model, self.vocabulary, self.words = model, vocabulary, words
        self.threshold, self.max_length = threshold, max_length

    # --- texts to tensors ---

    def encode(self, text: str) -> Encoded:
        rows = [0] * len(text) if self.words is None else self.words.rows(text)
        return Encoded(text, torch.tensor(self.vocabulary.encode(text), dtype=torch.int64), torch.tensor(rows))

    def batch(self, texts: Sequence[Encoded]) -> tuple[Tensor, Tensor | None]:
        """Character ids [B, L], padded with 0, and word vectors [B, L, W], padded with zeros, or None."""
        characters = pad_sequence([t.characters for t in texts], batch_first=True)
        if self.words is None:
            return characters, None
        return characters, self.words.table[pad_sequence([t.words.long() for t in texts], batch_first=True)]

    # --- answers ---

    def predict(self, question: str, passages: Sequence[str]) -> Answer:
        """The answer to one question. Passages may be of any number and length; empty ones have no candidates."""
        return self.predict_encoded([(self.encode(question), [self.encode(p) for p in passages])])[0]

    @torch.no_grad()
    def predict_encoded(
        self, questions: Sequence[tuple[Encoded, Sequence[Encoded]]], *, passages_a_batch: int = 128
    ) -> list[Answer]:
        """Answers to many questions, each with its passages; batches reach over questions."""
        training = self.model.training
        self.model.eval()
        pairs = [(question, passage) for question, passages in questions for passage in passages if passage.text]
        # Sorted by length, so that a batch holds little padding.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][1].text))
        found: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(pairs)
        for first in range(0, len(order), passages_a_batch):
            chosen = order[first : first + passages_a_batch]
            start, end = self.probabilities([pairs[i][0] for i in chosen], [pairs[i][1] for i in chosen])
            for row, i in enumerate(chosen):
                found[i] = start[row], end[row]
        self.model.train(training)

        answers, probabilities = [], iter(found)
        for _, passages in questions:
            texts = [passage.text for passage in passages if passage.text]
            starts_ends = [next(probabilities) for _ in texts]
            starts, ends = [s for s, _ in starts_ends], [e for _, e in starts_ends]
            scores = answer_scores(texts, starts, ends, self.threshold, self.max_length)
            best = next(iter(scores), None)
            answers.append(Answer(best, scores[best] if best is not None else 0.0, scores))
        return answers

    def probabilities(self, questions: Sequence[Encoded], passages: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """The network's start and end probabilities [B, Lp] for pairs of a question and a passage."""
        question, question_words = self.batch(questions)
        passage, passage_words = self.batch(passages)
        return self.model(question, passage, question_words, passage_words)

    # --- files ---

    def save(self, folder: Path) -> None:
        """reader.safetensors, with the configuration and the characters in it, and words.safetensors in the folder."""
        if self.words is not None and not (folder / WORDS_FILE).exists():
            save_tensors(folder / WORDS_FILE, self.words.tensors(), self.words.metadata())
        about = {
            "config": json.dumps(asdict(self.model.config)),
            "characters": json.dumps(self.vocabulary.characters, ensure_ascii=False),
            "decoding": json.dumps({"threshold": self.threshold, "max_length": self.max_length}),
        }
        save_tensors(folder / MODEL_FILE, self.model.state_dict(), about)

    @classmethod
    def load(cls, folder: Path, *, backend: str | None = None) -> Reader:
        """What `save` wrote, ready for inference. Raises FileNotFoundError that names the missing file."""
        from safetensors import safe_open

        path = folder / MODEL_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: expected the folder of a trained reader")
        with safe_open(path, "pt") as file:
            about = {name: json.loads(text) for name, text in file.metadata().items()}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
        model = DGCNNReader(DGCNNReaderConfig(**about["config"]), backend=backend)
        model.load_state_dict(weights)
        if model.config.word_size and not (folder / WORDS_FILE).is_file():
            raise FileNotFoundError(f"{folder / WORDS_FILE} does not exist, and the reader in {path} needs it")
        words = WordVectors.load(folder / WORDS_FILE) if model.config.word_size else None
        model.eval()
        for module in model.modules():
            if isinstance(module, GatedConv1d):
                module.prepack()
        return cls(model, Vocabulary(about["characters"]), words, **about["decoding"])


# --- command ---


def load(folder: Path, *, backend: str | None = None) -> Reader | Reader2018:
    """The reader in a folder, of 2019 or of 2018."""
    from pykernels.models import reader_2018

    if (folder / reader_2018.MODEL_FILE).is_file():
        return reader_2018.Reader2018.load(folder, backend=backend)
    return Reader.load(folder, backend=backend)


EXAMPLES = """examples:
  python -m pykernels.models.reader runs/reader "谁写了《红楼梦》？" --passage "《红楼梦》的作者是曹雪芹。"
  python -m pykernels.models.reader runs/reader "谁写了《红楼梦》？" --passages-file passages.txt
  cat passages.txt | python -m pykernels.models.reader runs/reader "谁写了《红楼梦》？" --passages-file -

exit status: 0 with an answer, 1 where no passage has a candidate, 2 for wrong arguments or files
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pykernels.models.reader",
        description="Answers a question from passages with a trained reader; prints one JSON object.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of a reader trained by an example")
    parser.add_argument("question")
    parser.add_argument("--passage", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--passages-file", metavar="FILE", help="a passage a line; - for standard input")
    parser.add_argument("--candidates", type=int, default=5, metavar="N", help="how many to list (5)")
    parser.add_argument("--backend", help="of the kernels: auto (default), reference, cpu")
    args = parser.parse_args(argv)
    try:
        passages = list(args.passage)
        if args.passages_file == "-":
            passages += sys.stdin.read().splitlines()
        elif args.passages_file:
            passages += Path(args.passages_file).read_text(encoding="utf-8").splitlines()
        if not any(passages):
            raise ValueError("no passage: expected --passage TEXT or --passages-file FILE")
        answer = load(args.folder, backend=args.backend).predict(args.question, passages)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    listed = [{"answer": a, "score": round(s, 6)} for a, s in list(answer.candidates.items())[: args.candidates]]
    shown = {"question": args.question, "answer": answer.text, "score": round(answer.score, 6), "candidates": listed}
    print(json.dumps(shown, ensure_ascii=False))
    return 0 if answer.text is not None else 1


if __name__ == "__main__":
    sys.exit(main())
