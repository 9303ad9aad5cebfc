"""The DGCNN extractor of 2019: triples (subject, predicate, object) from a sentence, as a probabilistic graph.

Su Jianlin, https://kexue.fm/archives/6671: P(s, p, o) = P(s) P(p, o | s), where s and o are spans of the sentence.

B sentences, S subjects (of any of the sentences), L characters, D char_size, C predicates.

    t = GC(1) GC(2) GC(5) ... GC(1) of dropout(characters + words + positions)             [B, L, D]
    n1, n2 = sigmoid MLPs of t: does anything start, end here                              [B, L]
    c = sigmoid MLP of the maximum of t over the sentence: does the predicate occur        [B, C]
    subject start, end = (n1, n2) * sigmoid of linear maps of u,
        u = relu conv3 [t; self-attention of t; known subjects]                            [B, L]
    k = last states of a bidirectional GRU over six rows of t from the subject's end to its start, plus at row i
        [position |i - start|; position |i - end|]                                         [S, L, 2D]
    object start, end = (n1, n2) * c * sigmoid(w v) * sigmoid of linear maps of v,
        v = relu conv3 [t; self-attention of t; k; known subjects; known objects]          [S, L, C]

GC(d) is a gated convolution of 3 taps and dilation d. The article's code keeps the gate half first and blends the other
way round; `keras_layouts.gate_first_to_value_first` brings its weights into ours. The two known-triple inputs are there
with distant supervision only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels import GatedConv1d

from .embedding import MixedEmbedding

SUBJECT_ENCODINGS = ("gru", "ends")
# Before the logarithm: of probabilities, which are products of up to five sigmoids, and of their complements.
SMALLEST, SMALLEST_COMPLEMENT = 1e-30, 1e-7

# The article's configurations; the second takes no word vectors.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "full": {"dilations": (1, 2, 5, 1, 2, 5, 1, 2, 5, 1, 1, 1), "subject_encoding": "gru"},
        "reduced": {"dilations": (1, 2, 5, 1, 2, 5), "subject_encoding": "ends", "word_size": 0},
    }
)


@dataclass(frozen=True)
class DGCNNExtractorConfig:
    """Sizes and rates; the defaults are the article's.

    vocabulary_size: characters, with the padding 0 and the unknown character 1. predicates: C. word_size: width of the
    word vectors, 0 for none. max_length: characters of the longest sentence. distant_supervision: take known subjects
    and objects. subject_encoding: "gru", or "ends", the rows of its first and its last character. dropout: of the
    embedding. gate_dropout: of the gate logits in every block.

    isolate: rows of padding are zeros before the convolutions of both heads, so that padding and neighbours change
    nothing. False is the article's code in training: the last character of a shorter sentence sees one row of padding.
    (At inference that code takes one sentence at a time, where both agree.)
    """

    vocabulary_size: int
    predicates: int
    word_size: int = 256
    char_size: int = 128
    max_length: int = 512
    dilations: tuple[int, ...] = PRESETS["full"]["dilations"]
    heads: int = 8
    head_size: int = 16
    subject_encoding: str = "gru"
    distant_supervision: bool = False
    dropout: float = 0.25
    gate_dropout: float = 0.1
    isolate: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "dilations", tuple(self.dilations))  # JSON makes a list of it
        least = {"vocabulary_size": 2, "predicates": 1, "word_size": 0, "char_size": 1, "max_length": 1}
        for name, smallest in (least | {"heads": 1, "head_size": 1}).items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}: expected {smallest} or more, got {getattr(self, name)}")
        if self.subject_encoding not in SUBJECT_ENCODINGS:
            raise ValueError(f"subject_encoding: expected one of {SUBJECT_ENCODINGS}, got {self.subject_encoding!r}")


class SelfAttention(nn.Module):
    """Multi-head attention of the rows to all live rows: no biases and no output projection. [B, L, D] -> [B, L, h s].

    Parameter `weight` [3 h s, D]: queries, keys, values; head by head in each.
    """

    def __init__(self, in_features: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, head_size
        self.weight = nn.Parameter(torch.empty(3 * heads * head_size, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for part in self.weight.chunk(3):
            nn.init.xavier_normal_(part)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, D], mask [B, L] bool."""
        q, k, v = F.linear(x, self.weight).unflatten(-1, (3, self.heads, self.head_size)).permute(2, 0, 3, 1, 4)
        # A sentence without a live row attends to all of its rows, which is finite, and nobody looks at it.
        live = (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=live).transpose(1, 2).flatten(2)


class Trunk(NamedTuple):
    """What both heads take of the sentences, so that it is computed once: a batch that can be indexed."""

    mask: Tensor  # [B, L] bool
    t: Tensor  # [B, L, D]
    attended: Tensor  # [B, L, heads * head_size], the object head's self-attention
    starts: Tensor  # [B, L], n1
    ends: Tensor  # [B, L], n2
    occurs: Tensor  # [B, C], c

    def at(self, sentences: Tensor) -> Trunk:
        """The rows [S] of the batch, one for each subject."""
        return Trunk(*(part.index_select(0, sentences) for part in self))


class Spans(NamedTuple):
    """Probabilities that a span starts, and ends, at a character: [B, L] of subjects, [S, L, C] of objects."""

    start: Tensor
    end: Tensor


class ConvHead(nn.Module):
    """relu(conv3(x)), zeros beyond both ends. [B, L, N] -> [B, L, D]. Parameters `conv.weight` [D, N, 3], `conv.bias`.

    One product for all taps, whose results are then shifted: as fast as nn.Conv1d with its two transposes, and oneDNN
    keeps no convolution for every length that it has met, which took hundreds of MiB in a training.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, 3, padding=1)

    def forward(self, parts: list[Tensor], mask: Tensor | None) -> Tensor:
        x = torch.cat(parts, dim=-1)
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        taps = F.linear(x, self.conv.weight.permute(2, 0, 1).flatten(0, 1))
        before, here, after = F.pad(taps, (0, 0, 1, 1)).chunk(3, dim=-1)  # [B, L + 2, D] each
        L, bias = x.shape[1], self.conv.bias
        assert bias is not None  # nn.Conv1d makes one
        return (before[:, :L] + here[:, 1 : L + 1] + after[:, 2:] + bias).relu()


def _mlp(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


def _probability(logits: Tensor) -> Tensor:
    return logits.float().sigmoid()


class DGCNNExtractor(nn.Module):
    """Probabilities of subjects, and of the objects of given subjects. See the module for the formulas.

    backend: of the gated convolutions, as in `pykernels.gated_conv1d`. Parameters besides the character embedding at
    the article's sizes: 1,941,784 for 49 predicates, 1,980,952 with distant supervision. Initial values are those of
    Keras, but for the positions, which begin as zeros.
    """

    def __init__(self, config: DGCNNExtractorConfig, *, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        D, C = config.char_size, config.predicates
        known = config.distant_supervision
        self.embedding = MixedEmbedding(config.vocabulary_size, D, config.word_size)
        self.position = nn.Embedding(config.max_length, D)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            GatedConv1d(D, D, 3, dilation=d, gate_dropout=config.gate_dropout, backend=backend)
            for d in config.dilations
        )
        self.starts, self.ends, self.occurs = _mlp(D, 1), _mlp(D, 1), _mlp(D, C)
        attended = config.heads * config.head_size
        self.subject_attention = SelfAttention(D, config.heads, config.head_size)
        self.subject_head = ConvHead(D + attended + 2 * known, D)
        self.subject_pointers = nn.Linear(D, 2)
        self.subject_gru = (
            nn.GRU(D, D, batch_first=True, bidirectional=True) if config.subject_encoding == "gru" else None
        )
        self.object_attention = SelfAttention(D, config.heads, config.head_size)
        self.object_head = ConvHead(D + attended + 2 * D + (2 + 2 * C) * known, D)
        self.object_exists = nn.Linear(D, 1)
        self.object_pointers = nn.Linear(D, 2 * C)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.uniform_(module.weight, -0.05, 0.05)
            elif isinstance(module, nn.Linear | nn.Conv1d | GatedConv1d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, SelfAttention):
                module.reset_parameters()
            elif isinstance(module, nn.GRU):
                for name, p in module.named_parameters():
                    if "bias" in name:
                        nn.init.zeros_(p)
                    elif "weight_ih" in name:
                        nn.init.xavier_uniform_(p)
                    else:
                        for gate in p.data.chunk(3):
                            nn.init.orthogonal_(gate)
        nn.init.zeros_(self.position.weight)

    def _known(self, name: str, value: Tensor | None, width: int, rows: int) -> list[Tensor]:
        if not self.config.distant_supervision:
            if value is not None:
                raise ValueError(f"{name}: expected None, since distant_supervision is False, got {list(value.shape)}")
            return []
        if value is None or value.dim() != 3 or value.shape[0] != rows or value.shape[2] != width:
            got = "None" if value is None else list(value.shape)
            raise ValueError(f"{name}: expected [{rows}, L, {width}], since distant_supervision is True, got {got}")
        return [value]

    def trunk(self, characters: Tensor, words: Tensor | None = None) -> Trunk:
        """characters [B, L] int64, 0 for padding; words [B, L, word_size], None where word_size is 0."""
        if characters.dim() != 2 or characters.shape[1] > self.config.max_length:
            raise ValueError(
                f"characters: expected [B, L] with L <= max_length = {self.config.max_length}, "
                f"got {list(characters.shape)}"
            )
        mask = characters > 0
        t = self.embedding(characters, words) + self.position.weight[: characters.shape[1]]
        t = self.dropout(t).masked_fill(~mask.unsqueeze(-1), 0)
        for block in self.blocks:
            t = block(t, mask=mask)
        # Of nothing but padding: the maximum is taken as zero.
        lowest = torch.finfo(t.dtype).min
        highest = t.masked_fill(~mask.unsqueeze(-1), lowest)
        highest = highest.amax(1) if t.shape[1] else t.new_zeros(t.shape[0], t.shape[2])
        highest = highest.masked_fill(~mask.any(1, keepdim=True), 0)
        starts, ends = _probability(self.starts(t)).squeeze(-1), _probability(self.ends(t)).squeeze(-1)
        return Trunk(mask, t, self.object_attention(t, mask), starts, ends, _probability(self.occurs(highest)))

    def subjects(self, trunk: Trunk, known_subjects: Tensor | None = None) -> Spans:
        """Start and end of subjects, float32 [B, L] each; no meaning where the sentence is padding.

        known_subjects: [B, L, 2], 1 where a known subject starts, and ends.
        """
        parts = [trunk.t, self.subject_attention(trunk.t, trunk.mask)]
        parts += self._known("known_subjects", known_subjects, 2, len(trunk.t))
        rows = self.subject_head(parts, trunk.mask if self.config.isolate else None)
        start, end = _probability(self.subject_pointers(rows)).unbind(-1)
        return Spans(trunk.starts * start, trunk.ends * end)

    def encode_subjects(self, t: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """t [S, L, D], first and last row of each subject [S] -> [S, 2D]."""
        # Rows round(start a + end (1 - a)) for a = 0, 1/5, ..., 1, in integers: no fifth lies halfway.
        fifths = torch.arange(6, device=t.device)
        rows = ((fifths * start.unsqueeze(1) + (5 - fifths) * end.unsqueeze(1)) * 2 + 5) // 10
        if self.subject_gru is None:
            rows = torch.stack([start, end], dim=1)
        inner = t.gather(1, rows.unsqueeze(-1).expand(-1, -1, t.shape[-1]))
        if self.subject_gru is None:
            return inner.flatten(1)
        _, last = self.subject_gru(inner)
        return last.transpose(0, 1).flatten(1)

    def objects(
        self,
        trunk: Trunk,
        start: Tensor,
        end: Tensor,
        known_subjects: Tensor | None = None,
        known_objects: Tensor | None = None,
    ) -> Spans:
        """Start and end of objects of one subject a sentence, by predicate: float32 [S, L, C] each.

        Args:
            trunk: of S sentences, one for each subject (`Trunk.at`).
            start, end: [S] int64, the first and the last character of the subjects.
            known_subjects: [S, L, 2]. known_objects: [S, L, 2C], 1 where a known object of this subject starts under
                each predicate, then where one ends.
        """
        S, L, D = trunk.t.shape
        for name, at in (("start", start), ("end", end)):
            if at.shape != (S,):
                raise ValueError(f"{name}: expected [{S}], one subject for each sentence, got {list(at.shape)}")
            if at.dtype != torch.int64:
                raise TypeError(f"{name}: expected int64, got {at.dtype}")
        place = torch.arange(L, device=start.device)
        near = [self.position((place - at.unsqueeze(1)).abs()) for at in (start, end)]
        k = self.encode_subjects(trunk.t, start, end).unsqueeze(1) + torch.cat(near, dim=-1)
        parts = [trunk.t, trunk.attended, k]
        parts += self._known("known_subjects", known_subjects, 2, S)
        parts += self._known("known_objects", known_objects, 2 * self.config.predicates, S)
        rows = self.object_head(parts, trunk.mask if self.config.isolate else None)
        gate = _probability(self.object_exists(rows)) * trunk.occurs.unsqueeze(1)
        starts, ends = _probability(self.object_pointers(rows)).chunk(2, -1)
        return Spans(gate * starts * trunk.starts.unsqueeze(-1), gate * ends * trunk.ends.unsqueeze(-1))

    def forward(
        self,
        characters: Tensor,
        start: Tensor,
        end: Tensor,
        words: Tensor | None = None,
        known_subjects: Tensor | None = None,
        known_objects: Tensor | None = None,
    ) -> tuple[Spans, Spans]:
        """Subjects of the sentences, and the objects of one given subject of each. Arguments as in the parts above."""
        trunk = self.trunk(characters, words)
        return self.subjects(trunk, known_subjects), self.objects(trunk, start, end, known_subjects, known_objects)


class Targets(NamedTuple):
    """0 or 1: subjects [B, L] each, and the objects of the given subjects, [B, L, C] each."""

    subjects: Spans
    objects: Spans


def extractor_loss(subjects: Spans, objects: Spans, targets: Targets, mask: Tensor) -> Tensor:
    """The four binary cross-entropies of starts and ends: sums over predicates, means over live characters.

    The article's code holds probabilities above 1e-7 first, which leaves a name without a gradient once it is less
    probable than that; a training may then stay where no name is found at all. Here it has one down to 1e-30.
    """

    def of(probability: Tensor, target: Tensor) -> Tensor:
        live = mask if probability.dim() == 2 else mask.unsqueeze(-1)
        # Whatever the padding holds, NaN too, counts as a right zero.
        p, y = probability.masked_fill(~live, 0), target.to(probability.dtype).masked_fill(~live, 0)
        each = y * p.clamp_min(SMALLEST).log() + (1 - y) * torch.log1p(-p.clamp_max(1 - SMALLEST_COMPLEMENT))
        return -each.sum() / mask.sum().clamp_min(1)

    pairs = (*zip(subjects, targets.subjects, strict=True), *zip(objects, targets.objects, strict=True))
    return torch.stack([of(p, y) for p, y in pairs]).sum()
