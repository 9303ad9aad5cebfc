"""Scores of answers against sets of accepted ones: exact accuracy, character F1, and their mean."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Scores(NamedTuple):
    """Means over questions, from 0 to 1. final is the mean of the two."""

    accuracy: float
    f1: float

    @property
    def final(self) -> float:
        return (self.accuracy + self.f1) / 2


def half_width(text: str) -> str:
    """Full-width forms (U+FF01 ... U+FF5E, and the ideographic blank) as their ASCII equals."""
    codes = (0x20 if c == 0x3000 else c - 0xFEE0 if 0xFF01 <= c <= 0xFF5E else c for c in map(ord, text))
    return "".join(map(chr, codes))


def _separates(character: str) -> bool:
    """Punctuation, blanks and control characters; not symbols, so that C++ is not C."""
    return unicodedata.category(character)[0] in "PZC"


def tokens(text: str) -> list[str]:
    """The parts of the text between punctuation and blanks, half-width and in lower case."""
    text = half_width(text).lower()
    return "".join(" " if _separates(c) else c for c in text).split()


def normalize(text: str) -> str:
    """Half-width, lower case, without punctuation and blanks."""
    return "".join(tokens(text))


def accuracy(answer: str, accepted: Iterable[str]) -> float:
    """1 where the normalised answer is one of the accepted ones, or has the same set of tokens, else 0.

    An enumeration in another order has the same tokens. What is empty when normalised is no answer.
    """
    given = tokens(answer)
    matches = (set(given) == set(tokens(a)) or normalize(answer) == normalize(a) for a in accepted)
    return float(bool(given) and any(matches))


def character_f1(answer: str, accepted: Iterable[str]) -> float:
    """The best F1 of the characters, each counted as often as it occurs, over the accepted answers."""
    given = Counter(normalize(answer))

    def f1(other: str) -> float:
        wanted = Counter(normalize(other))
        common = (given & wanted).total()
        return 2 * common / (given.total() + wanted.total()) if common else 0.0

    return max(map(f1, accepted), default=0.0)


def evaluate(answers: Sequence[str | None], accepted: Sequence[Iterable[str]]) -> Scores:
    """Scores of one answer a question, None for none, against the accepted answers of each. Raises for no question."""
    if len(answers) != len(accepted) or not answers:
        raise ValueError(
            f"answers: expected one for each of {len(accepted)} questions, at least one, got {len(answers)}"
        )
    pairs = [(a or "", list(wanted)) for a, wanted in zip(answers, accepted, strict=True)]
    return Scores(
        accuracy=sum(accuracy(a, wanted) for a, wanted in pairs) / len(pairs),
        f1=sum(character_f1(a, wanted) for a, wanted in pairs) / len(pairs),
    )
