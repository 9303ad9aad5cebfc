"""From start and end probabilities over several passages to one answer (the rule of https://kexue.fm/archives/6906)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

THRESHOLD = 0.1
MAX_LENGTH = 12


def passage_scores(
    passage: str, start: Tensor, end: Tensor, threshold: float = THRESHOLD, max_length: int = MAX_LENGTH
) -> dict[str, float]:
    """{candidate: score}: start_i * end_j for i <= j < i + max_length, both above the threshold.

    A string that occurs twice has its larger score. start, end: [L] with L >= len(passage); the rest is padding.
    """
    start, end = start[: len(passage)].detach().cpu().double(), end[: len(passage)].detach().cpu().double()
    scores: dict[str, float] = {}
    ends = torch.nonzero(end > threshold).flatten().tolist()
    for i in torch.nonzero(start > threshold).flatten().tolist():
        for j in ends:
            if i <= j < i + max_length:
                candidate = passage[i : j + 1]
                scores[candidate] = max(scores.get(candidate, 0.0), float(start[i] * end[j]))
    return scores


def vote(passages: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """{candidate: sum s^2 / (sum s + 1)} of the scores s that it has in the passages, best first."""
    found: dict[str, list[float]] = {}
    for scores in passages:
        for candidate, score in scores.items():
            found.setdefault(candidate, []).append(score)
    combined = {c: sum(s * s for s in scores) / (sum(scores) + 1) for c, scores in found.items()}
    return dict(sorted(combined.items(), key=lambda pair: -pair[1]))


def answer_scores(
    passages: Sequence[str],
    start: Sequence[Tensor] | Tensor,
    end: Sequence[Tensor] | Tensor,
    threshold: float = THRESHOLD,
    max_length: int = MAX_LENGTH,
) -> dict[str, float]:
    """{candidate: score} over all passages of one question, best first: sum s^2 / (sum s + 1) of its passage scores.

    start, end: one row a passage, of its length or longer. No candidate anywhere: an empty dictionary.
    """
    rows = zip(passages, start, end, strict=True)
    return vote(passage_scores(passage, first, last, threshold, max_length) for passage, first, last in rows)
