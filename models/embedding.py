"""Mixed embedding: a trainable vector of the character plus the projected, frozen vector of its word."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_characters(name: str, characters: Tensor, rows: int | None = None) -> None:
    """Raises where characters are not integers [B, L], or not `rows` sequences."""
    if characters.is_floating_point() or characters.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers [B, L], got {characters.dtype}")
    if characters.dim() != 2 or rows not in (None, len(characters)):
        raise ValueError(f"{name}: expected [{'B' if rows is None else rows}, L], got {list(characters.shape)}")


class MixedEmbedding(nn.Module):
    """embedding[character] + projection(vector of the word that the character stands in).

    The word vectors are data, not parameters: each comes repeated for every character of its word, and zeros stand for
    a word that has none. Parameters `character.weight` [vocabulary_size, D] and `word.weight` [D, word_size], no bias;
    with word_size 0 there is no `word`. Row 0 is the padding, row 1 the unknown character.
    """

    def __init__(self, vocabulary_size: int, embedding_size: int, word_size: int = 0) -> None:
        super().__init__()
        self.character = nn.Embedding(vocabulary_size, embedding_size)
        self.word = nn.Linear(word_size, embedding_size, bias=False) if word_size else None

    def forward(self, characters: Tensor, words: Tensor | None = None, name: str = "words") -> Tensor:
        """characters [B, L] integers, words [B, L, word_size] or None -> [B, L, D]. name: of words in messages."""
        check_characters("characters", characters)
        if (words is None) != (self.word is None):
            wanted = "no word vectors" if self.word is None else f"word vectors [B, L, {self.word.in_features}]"
            raise ValueError(f"{name}: expected {wanted}, got {'none' if words is None else list(words.shape)}")
        # A length or a batch of one would be repeated without a word.
        if words is not None and self.word is not None and words.shape != (*characters.shape, self.word.in_features):
            sizes = [*characters.shape, self.word.in_features]
            raise ValueError(f"{name}: expected {sizes}, got {list(words.shape)}")
        embedded = self.character(characters)
        return embedded if self.word is None else embedded + self.word(words)
