"""The hand-made features of the reader of 2018: how a passage's words relate to the question and to other passages.

https://kexue.fm/archives/5409 (named there, with two examples of their values). For each token of a passage:

    1. match: whether the question contains the token
    2. co-occurrence: the other passages that contain it, divided by the number of all passages
    3. Jaccard similarity of the question's tokens and those of a window of |Q| tokens around the token
    4. edit distance of that window to the question, divided by |Q|: 1 where they have nothing in common

and the same four of the characters, averaged over the characters of the token. Of the window of token i, tokens
i - |Q| // 2 up to i - |Q| // 2 + |Q| - 1, what lies outside the passage is left out. (The article's examples have a
question of even length; for odd ones the token is in the middle.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

FEATURES = 8


def window_features(question: Sequence[str], passage: Sequence[str]) -> list[tuple[float, float]]:
    """(Jaccard similarity, relative edit distance) of the window around each token of the passage."""
    size, wanted = len(question), set(question)
    if not size:
        return [(0.0, 1.0)] * len(passage)
    features = []
    for i in range(len(passage)):
        first = i - size // 2
        window = passage[max(first, 0) : first + size]
        tokens = set(window)
        jaccard = len(tokens & wanted) / len(tokens | wanted)
        features.append((jaccard, Levenshtein.distance(window, question) / size))
    return features


def _four(question: Sequence[str], passages: Sequence[Sequence[str]]) -> list[Tensor]:
    """The four features of each token of each passage, [L, 4]."""
    wanted = set(question)
    containing = Counter(token for passage in passages for token in set(passage))
    rows = []
    for passage in passages:
        # A token of this passage: all passages that contain it but this one.
        rows.append(
            [
                (float(token in wanted), (containing[token] - 1) / len(passages), *near)
                for token, near in zip(passage, window_features(question, passage), strict=True)
            ]
        )
    return [torch.tensor(row, dtype=torch.float32).view(-1, 4) for row in rows]


def passage_features(question: Sequence[str], passages: Sequence[Sequence[str]]) -> list[Tensor]:
    """[L, 8] float32 for each passage: the four features of its tokens, then those of their characters.

    question, passages: tokens, none of which is empty.
    """
    features = []
    words = _four(question, passages)
    characters = _four([*"".join(question)], [[*"".join(passage)] for passage in passages])
    for passage, of_words, of_characters in zip(passages, words, characters, strict=True):
        lengths = torch.tensor([len(token) for token in passage], dtype=torch.int64)
        if not (lengths > 0).all():
            raise ValueError("passages: expected tokens of one character or more, got an empty one")
        means = [part.mean(0) for part in of_characters.split(lengths.tolist())] if passage else []
        averaged = torch.stack(means) if means else of_characters
        features.append(torch.cat([of_words, averaged], dim=1))
    return features
