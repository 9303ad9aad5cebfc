"""Batches of the reader: one passage of each question, cropped, with every occurrence of its answer as a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from reader_data import Record
from torch import Tensor

from pykernels.models.reader import Encoded, Reader

# Of the article's random crops, in characters.
CROP_SHORTEST, CROP_LONGEST = 128, 256


@dataclass(frozen=True)
class Item:
    """A record as the network takes it."""

    record: Record
    question: Encoded
    passages: tuple[Encoded, ...]


def encode(reader: Reader, records: Sequence[Record]) -> list[Item]:
    known: dict[str, Encoded] = {}

    def of(text: str) -> Encoded:
        if text not in known:
            known[text] = reader.encode(text)
        return known[text]

    return [Item(r, of(r.question), tuple(of(p.text) for p in r.passages)) for r in records]


def split(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and held-out records; all questions about one source are on the same side."""
    sources = list(dict.fromkeys(record.source for record in records))
    order = np.random.default_rng(seed).permutation(len(sources))
    held = {sources[i] for i in order[: round(share * len(sources))]}
    return [r for r in records if r.source not in held], [r for r in records if r.source in held]


def crop(passage: Encoded, random: np.random.Generator) -> Encoded:
    """A random span of a long passage, half of the time; else its beginning."""
    length = len(passage.text)
    if length > CROP_SHORTEST and random.random() < 0.5:
        start = random.integers(0, length - CROP_SHORTEST, endpoint=True)
        end = random.integers(start + CROP_SHORTEST, min(length, start + CROP_LONGEST), endpoint=True)
        return passage[int(start) : int(end)]
    return passage[:CROP_LONGEST]


def occurrences(text: str, answer: str) -> list[int]:
    """Where the answer begins, overlaps included."""
    return [i for i in range(len(text) - len(answer) + 1) if text.startswith(answer, i)] if answer else []


@dataclass(frozen=True)
class Batch:
    """question [B, Lq] and passage [B, Lp] ids, their word vectors or None, and 0/1 targets [B, Lp]."""

    question: Tensor
    passage: Tensor
    question_words: Tensor | None
    passage_words: Tensor | None
    start: Tensor
    end: Tensor


def draw(record: Record, answer_share: float, random: np.random.Generator) -> int:
    """The index of one passage: with probability answer_share among those with the answer, else among all."""
    candidates = range(len(record.passages))
    if random.random() < answer_share:
        candidates = [i for i in candidates if record.passages[i].answer]
    return int(candidates[random.integers(len(candidates))])


def make_batch(
    reader: Reader, items: Sequence[Item], chosen: Sequence[int], seed: int, epoch: int, answer_share: float = 0.0
) -> Batch:
    """One passage of each chosen item. Nothing but seed, epoch and the item's index decides which, and its crop."""
    questions, passages, found = [], [], []
    for index in chosen:
        item, random = items[index], np.random.default_rng((seed, epoch, index))
        k = draw(item.record, answer_share, random)
        passage, answer = crop(item.passages[k], random), item.record.passages[k].answer
        questions.append(item.question)
        passages.append(passage)
        found.append([(i, i + len(answer) - 1) for i in occurrences(passage.text, answer)])
    question, question_words = reader.batch(questions)
    passage_ids, passage_words = reader.batch(passages)
    start, end = torch.zeros(passage_ids.shape), torch.zeros(passage_ids.shape)
    for row, spans in enumerate(found):
        for first, last in spans:
            start[row, first] = end[row, last] = 1
    return Batch(question, passage_ids, question_words, passage_words, start, end)
