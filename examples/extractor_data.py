"""Sentences with their triples, from SKE (DuIE 1.0) files and from a text that a package ships.

What a sentence cannot be made of is either an error that names the file, the line and the field, or is left out and
counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from reader_data import DataError, people_daily

from pykernels.models.extractor import lower
from pykernels.models.extractor_decoding import Triple, without_credits_of_albums

TITLE = re.compile("《([^《》]+)》")


@dataclass(frozen=True)
class Sentence:
    """In lower case; triples without repetition, each of whose names occurs in the text."""

    text: str
    triples: tuple[Triple, ...]


def repaired(text: str, triples: Sequence[Triple]) -> list[Triple]:
    """The annotated triples with three known faults mended, in their order and without repetition.

    Names lose the marks 《》 and blanks around them. A subject that occurs once, and inside the marks of a title, is
    the whole title. The credits of what is an album, and no song, are dropped.
    """
    titles = [title.strip() for title in TITLE.findall(text)]

    def whole(subject: str) -> str:
        return next((t for t in titles if subject and subject in t and text.count(subject) == 1), subject)

    def bare(name: str) -> str:
        return lower(name).strip("《》 \t\u3000")

    mended = [Triple(whole(bare(t.subject)), t.predicate, bare(t.object)) for t in triples]
    kept = without_credits_of_albums(mended)
    return [t for t in dict.fromkeys(mended) if t in kept]


def _field(where: str, entry: Any, name: str, kind: type) -> Any:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, got {type(entry).__name__}")
    value = entry.get(name)
    if not isinstance(value, kind):
        got = "nothing" if value is None else type(value).__name__
        raise DataError(f"{where}: {name}: expected {kind.__name__}, got {got}")
    return value


def load(path: Path, longest: int) -> tuple[list[Sentence], Counter[str]]:
    """The usable sentences of a file with a JSON object a line, and how much was left out, by reason.

    {"text": ..., "spo_list": [{"subject": ..., "predicate": ..., "object": ...}]}, other fields are not looked at.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    sentences, skipped = [], Counter[str]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: no JSON: column {error.colno}: {error.msg}") from None
        text = lower(_field(where, entry, "text", str))
        annotated = [
            Triple(*(_field(f"{where}: spo_list[{i}]", spo, name, str) for name in Triple._fields))
            for i, spo in enumerate(_field(where, entry, "spo_list", list))
        ]
        triples = repaired(text, annotated)
        usable = tuple(t for t in triples if t.subject and t.object and t.subject in text and t.object in text)
        skipped["triples with a name that is not in the text"] += len(triples) - len(usable)
        if len(text) > longest:
            skipped[f"sentences of more than {longest} characters"] += 1
        elif not usable:
            skipped["sentences without a usable triple"] += 1
        else:
            sentences.append(Sentence(text, usable))
    skipped = +skipped
    if not sentences:
        why = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "it holds none"
        raise DataError(f"{path}: no usable sentence: {why}")
    return sentences, skipped


# --- augmentation ---


def swapped(sentence: Sentence, pool: dict[str, list[Triple]], random: np.random.Generator) -> Sentence:
    """One of its triples replaced, wherever its two names stand, by a triple of the same predicate from the pool."""
    old = sentence.triples[random.integers(len(sentence.triples))]
    candidates = pool[old.predicate]
    new = candidates[random.integers(len(candidates))]

    def replaced(text: str) -> str:
        return text.replace(old.subject, new.subject).replace(old.object, new.object)

    text = replaced(sentence.text)
    triples = [Triple(replaced(t.subject), t.predicate, replaced(t.object)) for t in sentence.triples]
    return Sentence(text, tuple(t for t in dict.fromkeys(triples) if t.subject in text and t.object in text))


# --- a sample ---

# Of two words "title, name" of a person, these are no titles but relations to somebody else.
RELATIVES = {"女儿", "儿子", "妻子", "丈夫", "夫人", "父亲", "母亲", "弟弟", "哥哥", "姐姐", "妹妹"}


def sample(count: int) -> list[Sentence]:
    """Sentences of the People's Daily with what a person's title, and the place or organisation before it, say.

    "俄罗斯 总统 叶利钦" makes (叶利钦, 职务, 总统) and (叶利钦, 所属, 俄罗斯). Found by the tags, which no model sees.
    """
    sentences = []
    for tagged in people_daily():
        text = lower("".join(word for word, _ in tagged))
        triples = []
        for i in range(1, len(tagged)):
            (title, tag), (name, kind) = tagged[i - 1], tagged[i]
            if kind == "nr" and tag == "n" and len(name) > 1 and len(title) > 1 and title not in RELATIVES:
                triples.append(Triple(lower(name), "职务", lower(title)))
                if i > 1 and tagged[i - 2][1] in ("ns", "nt"):
                    triples.append(Triple(lower(name), "所属", lower(tagged[i - 2][0])))
        if triples and len(text) <= 100:
            sentences.append(Sentence(text, tuple(dict.fromkeys(triples))))
            if len(sentences) == count:
                break
    return sentences
