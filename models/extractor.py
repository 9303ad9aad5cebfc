"""Triples from sentences: text in, (subject, predicate, object) out; and the command for it.

    python -m pykernels.models.extractor runs/extractor "《红楼梦》的作者是曹雪芹。"
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pykernels import GatedConv1d
from pykernels.models.dgcnn_extractor import DGCNNExtractor, DGCNNExtractorConfig, Spans, Trunk
from pykernels.models.extractor_decoding import END, START, Triple, complete, object_spans, subject_spans
from pykernels.models.files import save_tensors, write_atomically
from pykernels.models.known_triples import KnownTriples
from pykernels.models.vocabulary import Vocabulary
from pykernels.models.word_vectors import WordVectors

MODEL_FILE, WORDS_FILE, KNOWN_FILE = "extractor.safetensors", "words.safetensors", "known.json"
SUBJECTS_A_BATCH = 128

# First and last character, and for objects the predicate before them.
Span = tuple[int, int]
ObjectSpan = tuple[int, int, int]


def lower(text: str) -> str:
    """In lower case, character by character, so that places in it are places in the text."""
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def locate(text: str, triples: Iterable[Triple], predicates: dict[str, int]) -> dict[Span, list[ObjectSpan]]:
    """{subject: its objects}, each where it occurs first in the text. Names that are not in the text are left out."""
    found: dict[Span, list[ObjectSpan]] = defaultdict(list)
    for triple in triples:
        s, o = text.find(triple.subject), text.find(triple.object)
        if s >= 0 and o >= 0:
            span = (predicates[triple.predicate], o, o + len(triple.object) - 1)
            found[s, s + len(triple.subject) - 1].append(span)
    return dict(found)


@dataclass(frozen=True)
class Encoded:
    """A text with a character id and a row of the word vectors for each character, [L] int64 each, and what it may say.

    known: the triples that distant supervision finds in it, as in `locate`; None without distant supervision.
    """

    text: str
    characters: Tensor
    words: Tensor
    known: dict[Span, list[ObjectSpan]] | None


class Extractor:
    """A trained network with all that it needs to take texts.

    words: None where the network takes no word vectors; known: None where it has no distant supervision.
    thresholds: of starts and of ends, see `extractor_decoding`.
    """

    def __init__(
        self,
        model: DGCNNExtractor,
        vocabulary: Vocabulary,
        predicates: Sequence[str],
        words: WordVectors | None = None,
        known: KnownTriples | None = None,
        *,
        thresholds: tuple[float, float] = (START, END),
    ) -> None:
        config = model.config
        for name, size, given in (
            ("words: width", config.word_size, 0 if words is None else words.size),
            ("predicates", config.predicates, len(predicates)),
            ("vocabulary", config.vocabulary_size, len(vocabulary)),
        ):
            if size != given:
                raise ValueError(f"{name}: expected {size}, as the network has, got {given}")
        if (known is not None) != config.distant_supervision:
            wanted, got = ("known triples", "none") if known is None else ("none", "some")
            raise ValueError(f"known: expected {wanted}, as distant_supervision is {known is None}, got {got}")
        self.model, self.vocabulary, self.words, self.known = model, vocabulary, words, known
        self.predicates, self.thresholds = list(predicates), (float(thresholds[0]), float(thresholds[1]))
        self.predicate_id = {predicate: c for c, predicate in enumerate(self.predicates)}

    # --- texts to tensors ---

    def encode(self, text: str, annotated: Collection[Triple] = ()) -> Encoded:
        """annotated: the triples of this text, where it is one of those that the known triples were counted from."""
        if len(text) > self.model.config.max_length:
            raise ValueError(f"text: expected at most {self.model.config.max_length} characters, got {len(text)}")
        text = lower(text)
        rows = [0] * len(text) if self.words is None else self.words.rows(text)
        known = None
        if self.known is not None:
            known = locate(text, self.known.search(text, annotated), self.predicate_id)
        characters = torch.tensor(self.vocabulary.encode(text), dtype=torch.int64)
        return Encoded(text, characters, torch.tensor(rows, dtype=torch.int64), known)

    def batch(self, texts: Sequence[Encoded]) -> tuple[Tensor, Tensor | None]:
        """Character ids [B, L], padded with 0, and word vectors [B, L, W], padded with zeros, or None."""
        characters = pad_sequence([t.characters for t in texts], batch_first=True)
        if self.words is None:
            return characters, None
        return characters, self.words.table[pad_sequence([t.words for t in texts], batch_first=True)]

    def known_subjects(self, texts: Sequence[Encoded], length: int) -> Tensor | None:
        """[B, L, 2]: 1 where a known subject starts, and ends; None without distant supervision."""
        if self.known is None:
            return None
        marks = torch.zeros(len(texts), length, 2)
        for row, text in enumerate(texts):
            for first, last in text.known or ():
                marks[row, first, 0] = marks[row, last, 1] = 1
        return marks

    def known_objects(self, texts: Sequence[Encoded], subjects: Sequence[Span], length: int) -> Tensor | None:
        """[S, L, 2C]: 1 where a known object of this subject of this text starts, then where one ends."""
        if self.known is None:
            return None
        C = len(self.predicates)
        marks = torch.zeros(len(texts), length, 2 * C)
        for row, (text, subject) in enumerate(zip(texts, subjects, strict=True)):
            for c, first, last in (text.known or {}).get(subject, ()):
                marks[row, first, c] = marks[row, last, C + c] = 1
        return marks

    # --- triples ---

    def predict(self, text: str) -> list[Triple]:
        """The triples of one text, sorted. Upper and lower case are those of the text."""
        return sorted(extract([self], [text])[0])

    # --- files ---

    def save(self, folder: Path) -> None:
        """extractor.safetensors, and once for a folder words.safetensors and known.json where they are needed."""
        if self.words is not None and not (folder / WORDS_FILE).exists():
            save_tensors(folder / WORDS_FILE, self.words.tensors(), self.words.metadata())
        if self.known is not None and not (folder / KNOWN_FILE).exists():
            text = json.dumps(self.known.to_json(), ensure_ascii=False)
            write_atomically(folder / KNOWN_FILE, lambda path: path.write_text(text, encoding="utf-8"))
        about = {
            "config": asdict(self.model.config),
            "characters": self.vocabulary.characters,
            "predicates": self.predicates,
            "thresholds": self.thresholds,
        }
        stored = {name: json.dumps(value, ensure_ascii=False) for name, value in about.items()}
        save_tensors(folder / MODEL_FILE, self.model.state_dict(), stored)

    @classmethod
    def load(cls, folder: Path, *, backend: str | None = None) -> Extractor:
        """What `save` wrote, ready for inference. Raises FileNotFoundError that names the missing file."""
        from safetensors import safe_open

        path = folder / MODEL_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: expected the folder of a trained extractor")
        with safe_open(path, "pt") as file:
            about = {name: json.loads(text) for name, text in file.metadata().items()}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
        model = DGCNNExtractor(DGCNNExtractorConfig(**about["config"]), backend=backend)
        model.load_state_dict(weights)
        needed = {WORDS_FILE: model.config.word_size > 0, KNOWN_FILE: model.config.distant_supervision}
        for name, is_needed in needed.items():
            if is_needed and not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} does not exist, and the extractor in {path} needs it")
        words = WordVectors.load(folder / WORDS_FILE) if needed[WORDS_FILE] else None
        known = None
        if needed[KNOWN_FILE]:
            known = KnownTriples.from_json(json.loads((folder / KNOWN_FILE).read_text(encoding="utf-8")))
        model.eval()
        for module in model.modules():
            if isinstance(module, GatedConv1d):
                module.prepack()
        thresholds = tuple(about["thresholds"])
        return cls(model, Vocabulary(about["characters"]), about["predicates"], words, known, thresholds=thresholds)


@contextmanager
def _inference(extractors: Sequence[Extractor]) -> Iterator[None]:
    """Without gradients and dropout; the models are afterwards in the mode they were in."""
    modes = [extractor.model.training for extractor in extractors]
    for extractor, training in zip(extractors, modes, strict=True):
        if training:
            extractor.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for extractor, training in zip(extractors, modes, strict=True):
            if training:
                extractor.model.train()


def _mean(parts: Sequence[Spans]) -> Spans:
    if len(parts) == 1:
        return parts[0]
    return Spans(*(torch.stack(both).mean(0) for both in zip(*parts, strict=True)))


def extract(
    extractors: Sequence[Extractor], texts: Sequence[str | Encoded], *, sentences_a_batch: int = 64
) -> list[set[Triple]]:
    """The triples of each text by one extractor or several.

    The probabilities of several are averaged, first of subjects, then of the objects of the subjects found. Extractors
    with and without distant supervision are averaged apart, and the triples of both kinds are united, as the article
    does. All have the same predicates; the thresholds are those of the first of a kind. Texts that are `Encoded` serve
    a single extractor.
    """
    if not extractors:
        raise ValueError("extractors: expected one or more, got none")
    for other in extractors:
        if other.predicates != extractors[0].predicates:
            raise ValueError("extractors: expected the same predicates in the same order in all of them")
    if len(extractors) > 1 and any(isinstance(text, Encoded) for text in texts):
        raise ValueError("texts: expected strings for several extractors, each of which encodes them its own way")
    kinds = [[e for e in extractors if (e.known is not None) == known] for known in (False, True)]
    plain = [text.text if isinstance(text, Encoded) else text for text in texts]
    triples: list[set[Triple]] = [set() for _ in texts]
    # Sorted by length, so that a batch holds little padding.
    order = sorted((i for i, text in enumerate(plain) if text), key=lambda i: len(plain[i]))
    with _inference(extractors):
        for members in filter(None, kinds):
            for first in range(0, len(order), sentences_a_batch):
                chosen = order[first : first + sentences_a_batch]
                batch = _extract_batch(members, [texts[i] for i in chosen], [plain[i] for i in chosen])
                for i, found in zip(chosen, batch, strict=True):
                    triples[i] |= found
    return triples


def _extract_batch(
    members: Sequence[Extractor], texts: Sequence[str | Encoded], plain: Sequence[str]
) -> list[set[Triple]]:
    encoded = [[t if isinstance(t, Encoded) else member.encode(t) for t in texts] for member in members]
    lengths = [len(text) for text in plain]
    trunks: list[Trunk] = []
    found: list[Spans] = []
    for member, sentences in zip(members, encoded, strict=True):
        trunks.append(member.model.trunk(*member.batch(sentences)))
        found.append(member.model.subjects(trunks[-1], member.known_subjects(sentences, max(lengths))))
    start, end = _mean(found)
    thresholds = members[0].thresholds
    subjects = [
        (row, span)
        for row, n in enumerate(lengths)
        for span in subject_spans(start[row, :n], end[row, :n], thresholds)
    ]
    triples: list[list[Triple]] = [[] for _ in plain]
    for first in range(0, len(subjects), SUBJECTS_A_BATCH):
        part = subjects[first : first + SUBJECTS_A_BATCH]
        rows, spans = [row for row, _ in part], [span for _, span in part]
        at, ends = torch.tensor(spans).unbind(1)
        found = []
        for member, sentences, trunk in zip(members, encoded, trunks, strict=True):
            own = [sentences[row] for row in rows]
            marks = None
            if member.known is not None:
                marks = member.known_subjects(own, max(lengths)), member.known_objects(own, spans, max(lengths))
            found.append(member.model.objects(trunk.at(torch.tensor(rows)), at, ends, *(marks or ())))
        start, end = _mean(found)
        for s, (row, (i, j)) in enumerate(part):
            n, text = lengths[row], plain[row]
            for c, o, p in object_spans(start[s, :n], end[s, :n], thresholds):
                triples[row].append(Triple(text[i : j + 1], members[0].predicates[c], text[o : p + 1]))
    return [complete(of_text) for of_text in triples]


# --- command ---

EXAMPLES = """examples:
  python -m pykernels.models.extractor runs/extractor "《红楼梦》的作者是曹雪芹。"
  python -m pykernels.models.extractor runs/extractor "《红楼梦》的作者是曹雪芹。" --json
  python -m pykernels.models.extractor runs/a --also runs/b --also runs/c < sentences.txt
  python -m pykernels.models.extractor runs/extractor        # asks for sentences

exit status: 0 with a triple, 1 where there is none, 2 for wrong arguments or files
"""


def _sentences(given: str | None) -> Iterator[str]:
    """The one given, or lines as they are typed, or piped, in."""
    if given is not None:
        yield given
        return
    while True:
        if sys.stdin.isatty():
            print("sentence: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pykernels.models.extractor",
        description="Prints the triples of sentences: subject, predicate and object, a line each, separated by tabs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of a trained extractor, as examples/train_extractor.py writes it")
    parser.add_argument("sentence", nargs="?", help="without it, lines from standard input")
    parser.add_argument("--also", type=Path, action="append", default=[], metavar="FOLDER", help="averaged with it")
    parser.add_argument("--json", action="store_true", help="one JSON object for each sentence")
    parser.add_argument("--backend", help="of the kernels: auto (default), reference, cpu")
    args = parser.parse_args(argv)
    try:
        if args.sentence is not None and not args.sentence.strip():
            raise ValueError("sentence: expected text, got none")
        extractors = [Extractor.load(folder, backend=args.backend) for folder in (args.folder, *args.also)]
        any_found = False
        for sentence in _sentences(args.sentence):
            triples = sorted(extract(extractors, [sentence])[0])
            any_found |= bool(triples)
            if args.json:
                shown = {"sentence": sentence, "triples": [triple._asdict() for triple in triples]}
                print(json.dumps(shown, ensure_ascii=False), flush=True)
            else:
                print("\n".join("\t".join(triple) for triple in triples) or "no triple", flush=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0 if any_found else 1


if __name__ == "__main__":
    sys.exit(main())
