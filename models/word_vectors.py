"""Frozen word vectors, one for each character of a text: that of the word it stands in."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _segmenter(words: Iterable[str]) -> Any:
    """jieba's segmenter, knowing these words besides its own."""
    import logging

    import jieba

    jieba.setLogLevel(logging.WARNING)  # it prints how it loads its dictionary
    tokenizer = jieba.Tokenizer()
    tokenizer.initialize()
    for word in words:
        if len(word) > 1 and not tokenizer.FREQ.get(word):
            tokenizer.add_word(word)
    return tokenizer


class WordVectors:
    """words [V] with vectors [V, W]. Row 0 of `table` [V + 1, W] is zero and stands for what has no vector.

    Texts are cut into words by jieba, without its hidden Markov model for unknown words; vectors of single characters
    alone need no jieba. A word without a vector is taken character by character.
    """

    def __init__(self, words: Sequence[str], vectors: Tensor) -> None:
        if vectors.dim() != 2 or len(words) != len(vectors):
            raise ValueError(f"vectors: expected [{len(words)}, W], one for each word, got {list(vectors.shape)}")
        self.words = list(words)
        self.table = torch.cat([torch.zeros(1, vectors.shape[1]), vectors.float()])
        self._row = {word: row for row, word in enumerate(self.words, 1)}
        self._of_words = any(len(word) > 1 for word in self.words)
        self._tokenizer: Any = None

    @property
    def size(self) -> int:
        return self.table.shape[1]

    def segment(self, text: str) -> list[str]:
        """The words of the text, none left out; characters where there are only vectors of those."""
        if self._of_words and self._tokenizer is None:
            self._tokenizer = _segmenter(self.words)
        return list(self._tokenizer.cut(text, HMM=False)) if self._tokenizer else list(text)

    def row(self, word: str) -> int:
        """Of `table`; 0 for a word without a vector."""
        return self._row.get(word, 0)

    def rows(self, text: str) -> list[int]:
        """A row of `table` for each character of the text."""
        rows: list[int] = []
        for word in self.segment(text):
            row = self.row(word)
            rows += [row] * len(word) if row else [self.row(c) for c in word]
        return rows

    # --- where vectors come from ---

    @classmethod
    def skip_gram(cls, texts: Iterable[str], size: int = 256, *, seed: int = 0, epochs: int = 8) -> WordVectors:
        """Trained on these texts by gensim: skip-gram, window 5, 8 negative samples, words that occur twice or more."""
        from gensim.models import Word2Vec

        tokenizer = _segmenter([])
        sentences = [list(tokenizer.cut(text, HMM=False)) for text in texts]
        # One worker, since the order in which several finish would show in the result.
        model = Word2Vec(
            sentences, vector_size=size, window=5, negative=8, sg=1, min_count=2, epochs=epochs, seed=seed, workers=1
        )
        return cls(model.wv.index_to_key, torch.from_numpy(model.wv.vectors.copy()))

    @classmethod
    def from_jieba(cls) -> WordVectors:
        """The 128-d vectors of 20,000 characters that jieba ships as part of its tagger, scaled to a deviation of 1."""
        spec = importlib.util.find_spec("jieba")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("word vectors of jieba: jieba is not installed: pip install jieba")
        folder = Path(spec.origin).parent / "lac_small"
        # Not splitlines: some of the characters end lines in Unicode.
        entries = [line.split("\t") for line in (folder / "word.dic").read_text(encoding="utf-8").strip().split("\n")]
        # A parameter file of Paddle: a head whose last bytes describe the shape, then float32 values.
        data = (folder / "model_baseline" / "word_emb").read_bytes()
        head = 20 + int.from_bytes(data[16:20], "little")
        vectors = torch.frombuffer(bytearray(data[head:]), dtype=torch.float32).view(-1, 128)
        single = [(int(row), word) for row, word in entries if len(word) == 1]
        chosen = vectors[[row for row, _ in single]]
        return cls([word for _, word in single], chosen / chosen.std())

    @classmethod
    def from_word2vec(cls, path: Path, limit: int | None = None) -> WordVectors:
        """A word2vec text file, or a binary one by the name *.bin; the first `limit` words."""
        from gensim.models import KeyedVectors

        vectors = KeyedVectors.load_word2vec_format(str(path), binary=path.suffix == ".bin", limit=limit)
        return cls(vectors.index_to_key, torch.from_numpy(vectors.vectors.copy()))

    # --- files ---

    def tensors(self) -> dict[str, Tensor]:
        return {"vectors": self.table[1:].contiguous()}

    def metadata(self) -> dict[str, str]:
        return {"words": json.dumps(self.words, ensure_ascii=False)}

    @classmethod
    def load(cls, path: Path) -> WordVectors:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return cls(json.loads(file.metadata()["words"]), file.get_tensor("vectors"))
