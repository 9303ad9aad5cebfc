"""From start and end probabilities to triples, the rules on triples, and their scores (kexue.fm/archives/6671)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

START, END = 0.5, 0.4  # the article's thresholds

SPOUSES = {"丈夫": "妻子", "妻子": "丈夫"}
ALBUM, CREDITS = "所属专辑", ("歌手", "作词", "作曲")


class Triple(NamedTuple):
    subject: str
    predicate: str
    object: str


class Scores(NamedTuple):
    """Of triples, over all sentences together; from 0 to 1."""

    precision: float
    recall: float
    f1: float


def subject_spans(start: Tensor, end: Tensor, thresholds: tuple[float, float] = (START, END)) -> list[tuple[int, int]]:
    """(first, last) character of each subject: each start above its threshold takes the nearest end from there on.

    start, end: [L] probabilities of one sentence, without its padding.
    """
    ends = torch.nonzero(end > thresholds[1]).flatten()
    starts = torch.nonzero(start > thresholds[0]).flatten()
    nearest = torch.searchsorted(ends, starts)
    pairs = zip(starts.tolist(), nearest.tolist(), strict=True)
    return [(i, int(ends[n])) for i, n in pairs if n < len(ends)]


def object_spans(
    start: Tensor, end: Tensor, thresholds: tuple[float, float] = (START, END)
) -> list[tuple[int, int, int]]:
    """(predicate, first, last) of each object of one subject, each predicate as in `subject_spans`; start, end [L, C].

    C x L values, of which few are above a threshold: the predicates without a start are not looked at.
    """
    possible = torch.nonzero((start > thresholds[0]).any(0)).flatten().tolist()
    return [(c, *span) for c in possible for span in subject_spans(start[:, c], end[:, c], thresholds)]


def complete(triples: Iterable[Triple]) -> set[Triple]:
    """With both directions of a marriage, and without the credits of an album that is no song of the sentence too."""
    found = set(triples)
    found |= {Triple(t.object, SPOUSES[t.predicate], t.subject) for t in found if t.predicate in SPOUSES}
    return without_credits_of_albums(found)


def without_credits_of_albums(triples: Collection[Triple]) -> set[Triple]:
    """Singers, lyricists and composers belong to songs: those of what is only known as an album are dropped."""
    albums = {t.object for t in triples if t.predicate == ALBUM} - {t.subject for t in triples if t.predicate == ALBUM}
    return {t for t in triples if not (t.predicate in CREDITS and t.subject in albums)}


def evaluate(predicted: Sequence[Collection[Triple]], gold: Sequence[Collection[Triple]]) -> Scores:
    """Micro-averaged over sentences: a triple counts when all three of its strings are right. 0 for nothing of nothing.

    Raises ValueError unless there is one prediction for each sentence, and at least one sentence.
    """
    if len(predicted) != len(gold) or not gold:
        raise ValueError(f"predicted: expected triples of {len(gold)} sentences, one at least, got {len(predicted)}")
    right = sum(len(set(p) & set(g)) for p, g in zip(predicted, gold, strict=True))
    given, wanted = sum(len(set(p)) for p in predicted), sum(len(set(g)) for g in gold)
    return Scores(right / max(given, 1), right / max(wanted, 1), 2 * right / max(given + wanted, 1))
