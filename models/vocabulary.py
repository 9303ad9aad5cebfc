"""Ids of characters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class Vocabulary:
    """Ids of characters: 0 is padding, 1 an unknown character, 2 ... those of `characters`."""

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = list(characters)
        self._id = {character: i for i, character in enumerate(self.characters, 2)}

    def __len__(self) -> int:
        return len(self.characters) + 2

    @classmethod
    def of(cls, texts: Iterable[str], min_count: int) -> Vocabulary:
        """The characters that occur at least min_count times, the most frequent first."""
        counts = Counter(character for text in texts for character in text)
        return cls([c for c, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n >= min_count])

    def encode(self, text: str) -> list[int]:
        return [self._id.get(character, 1) for character in text]
