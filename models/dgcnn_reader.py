"""The DGCNN reader of 2019: reading comprehension by gated dilated convolutions, without recurrence or self-attention.

Su Jianlin, https://kexue.fm/archives/6906. (Not the dynamic graph CNN, nor the deep graph CNN, of the same letters.)

B batch, Lq and Lp characters of the question and of the passage, D char_size. GC(d) is a gated convolution of 3 taps
and dilation d, with its highway: x * (1 - sigmoid(z)) + c * sigmoid(z).

    q = GC(1) GC(2) GC(1) of the embedded question                                   [B, Lq, D]
    v = attention pooling of q                                                       [B, D]
    p = GC(1) GC(2) GC(4) GC(8) GC(16) GC(1) of W [embedded passage; v]              [B, Lp, D]
    a = sigmoid of a linear map of the attention pooling of [p; v]                   [B, 1]
    start, end = a * sigmoid of linear maps of [p; v]                                [B, Lp]

In the convolution weights the value half c comes first and the gate logits z second, as in the article's code, which is
split="value_gate". Dropout on z, rescaled, comes before the sigmoid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels import AttentionPool, GatedConv1d

from .embedding import MixedEmbedding, check_characters
from .focal_loss import masked_focal_loss

LOSS_SCALE = 100.0


@dataclass(frozen=True)
class DGCNNReaderConfig:
    """Sizes and rates; the defaults are the article's.

    vocabulary_size: characters, with the padding 0 and the unknown character 1. word_size: width of the word vectors,
    0 for none. dropout: of both embeddings. gate_dropout: of the gate logits in every block.
    """

    vocabulary_size: int
    word_size: int = 256
    char_size: int = 128
    kernel_size: int = 3
    question_dilations: tuple[int, ...] = (1, 2, 1)
    passage_dilations: tuple[int, ...] = (1, 2, 4, 8, 16, 1)
    dropout: float = 0.1
    gate_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("question_dilations", "passage_dilations"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON makes lists of them
        for name, least in (("vocabulary_size", 2), ("word_size", 0), ("char_size", 1), ("kernel_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")


def _of_joined(layer: nn.Linear, rows: Tensor, vector: Tensor) -> Tensor:
    """layer([rows; vector]) for rows [B, L, D] and one vector [B, D] a sequence, without joining them."""
    for_rows, for_vector = layer.weight.split([rows.shape[-1], vector.shape[-1]], dim=1)
    return F.linear(rows, for_rows) + F.linear(vector, for_vector, layer.bias).unsqueeze(1)


class DGCNNReader(nn.Module):
    """Probabilities that an answer starts, and ends, at each character of a passage. See the module for the formula.

    backend: of the gated convolutions and poolings, as in `pykernels.gated_conv1d`. 1,035,651 parameters besides the
    character embedding at the article's sizes; initial values are those of Keras (Glorot uniform, biases 0).
    """

    def __init__(self, config: DGCNNReaderConfig, *, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        D = config.char_size

        def blocks(dilations: tuple[int, ...]) -> nn.ModuleList:
            return nn.ModuleList(
                GatedConv1d(
                    D,
                    D,
                    config.kernel_size,
                    dilation=dilation,
                    split="value_gate",
                    gate_dropout=config.gate_dropout,
                    backend=backend,
                )
                for dilation in dilations
            )

        self.embedding = MixedEmbedding(config.vocabulary_size, D, config.word_size)
        self.dropout = nn.Dropout(config.dropout)
        self.question_blocks = blocks(config.question_dilations)
        self.question_pool = AttentionPool(D, D, backend=backend)
        self.join = nn.Linear(2 * D, D, bias=False)
        self.passage_blocks = blocks(config.passage_dilations)
        self.passage_pool = AttentionPool(2 * D, 2 * D, backend=backend)
        self.answerable = nn.Linear(2 * D, 1)
        self.pointers = nn.Linear(2 * D, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.uniform_(module.weight, -0.05, 0.05)
            elif isinstance(module, nn.Linear | GatedConv1d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, AttentionPool):
                nn.init.xavier_uniform_(module.weight)
                nn.init.xavier_uniform_(module.query.unsqueeze(0))  # the one row of a matrix

    def forward(
        self,
        question: Tensor,
        passage: Tensor,
        question_words: Tensor | None = None,
        passage_words: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Start and end probabilities, float32 [B, Lp] each, without meaning where the passage is padding.

        Args:
            question, passage: [B, Lq] and [B, Lp] int64 character ids; 0 is padding, wherever it stands.
            question_words, passage_words: [B, Lq, word_size] and [B, Lp, word_size], the vector of each character's
                word (zeros: none). Both are None where the configuration has word_size 0.

        A question or a passage of nothing but padding is pooled to zeros. (The article's code averages over its padding
        instead, since 1e12 takes all digits of the scores it is subtracted from.)
        """
        check_characters("question", question)
        check_characters("passage", passage, len(question))
        question_mask, passage_mask = question > 0, passage > 0
        q = self.dropout(self.embedding(question, question_words, "question_words"))
        p = self.dropout(self.embedding(passage, passage_words, "passage_words"))
        for block in self.question_blocks:
            q = block(q, mask=question_mask)
        v = self.question_pool(q, mask=question_mask)
        p = _of_joined(self.join, p, v)
        for block in self.passage_blocks:
            p = block(p, mask=passage_mask)
        joined = torch.cat([p, v.to(p.dtype).unsqueeze(1).expand(-1, p.shape[1], -1)], dim=-1)
        answerable = self.answerable(self.passage_pool(joined, mask=passage_mask)).float().sigmoid()
        start, end = (answerable.unsqueeze(1) * _of_joined(self.pointers, p, v).float().sigmoid()).unbind(-1)
        return start, end


def reader_loss(start: Tensor, end: Tensor, start_target: Tensor, end_target: Tensor, passage: Tensor) -> Tensor:
    """100 times the sum of the focal losses of start and end over the passages' characters; all arguments [B, Lp]."""
    mask = passage > 0
    return LOSS_SCALE * (masked_focal_loss(start, start_target, mask) + masked_focal_loss(end, end_target, mask))
