"""The DGCNN reader of 2018: words instead of characters, hand-made features, and noise at the gates.

Su Jianlin, https://kexue.fm/archives/5409. B pairs of a question and a passage, Lq and Lp words, W word_size, D
channels. GC(d) is a gated convolution of 3 taps and dilation d; with as many input as output channels it has its
highway, x * (1 - sigmoid(z)) + c * sigmoid(z), else it is c * sigmoid(z).

    v = attention pooling of GC(1) of the question's word vectors                              [B, D]
    p = GC(1) GC(2) GC(4) of the 1-tap gated convolution of
        [word vectors; v; sinusoidal positions; features]                                      [B, Lp, D]
    a = sigmoid of a linear map of the attention pooling of p                                  [B, 1]
    start, end = a * sigmoid(linear(tanh(linear(p)))), each with its own two maps              [B, Lp]

In training z is multiplied by 1 + e, e uniform in [-0.1, 0.1]. The article shows sizes of kernels and dilations in a
picture; those here are the ones that others read from it. It gives no width for the hidden layer of the taggers, which
is D here. The word vectors are data and stay as they are (frozen).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from pykernels import AttentionPool, GatedConv1d

from .focal_loss import masked_focal_loss


@dataclass(frozen=True)
class DGCNNReader2018Config:
    """Sizes and rates; the defaults are the article's, or the choices above.

    word_size: W. channels: D. position_size: channels of the positions. features: of each word of the passage.
    tagger_size: of the hidden layer before start and end. gate_noise: the largest e.
    """

    word_size: int = 128
    channels: int = 128
    position_size: int = 128
    features: int = 8
    kernel_size: int = 3
    question_dilations: tuple[int, ...] = (1,)
    passage_dilations: tuple[int, ...] = (1, 2, 4)
    tagger_size: int = 128
    gate_noise: float = 0.1

    def __post_init__(self) -> None:
        for name in ("question_dilations", "passage_dilations"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON makes lists of them
        least = {"word_size": 1, "channels": 1, "position_size": 0, "features": 0, "kernel_size": 1, "tagger_size": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}: expected {smallest} or more, got {getattr(self, name)}")
        if self.position_size % 2:
            raise ValueError(f"position_size: expected an even number, got {self.position_size}")


@lru_cache(maxsize=64)
def sinusoidal_positions(length: int, size: int) -> Tensor:
    """[length, size]: sin(p / 10000^(2i / size)) in channel 2i, the cosine of the same in channel 2i + 1."""
    rates = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / max(size, 1))
    angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


class Tagger(nn.Sequential):
    """sigmoid(linear(tanh(linear(x)))): [B, L, D] -> [B, L]."""

    def __init__(self, in_features: int, hidden_features: int) -> None:
        super().__init__(nn.Linear(in_features, hidden_features), nn.Tanh(), nn.Linear(hidden_features, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(-1).float().sigmoid()


class DGCNNReader2018(nn.Module):
    """Probabilities that an answer starts, and ends, at each word of a passage. See the module for the formula.

    backend: of the gated convolutions and poolings, as in `pykernels.gated_conv1d`. Initial values are those of Keras.
    """

    def __init__(self, config: DGCNNReader2018Config | None = None, *, backend: str | None = None) -> None:
        super().__init__()
        self.config = config = config or DGCNNReader2018Config()
        D = config.channels

        def block(in_channels: int, kernel_size: int, dilation: int) -> GatedConv1d:
            residual = "highway" if in_channels == D and kernel_size > 1 else "none"
            return GatedConv1d(
                in_channels,
                D,
                kernel_size,
                dilation=dilation,
                residual=residual,
                gate_noise=config.gate_noise,
                backend=backend,
            )

        widths = [config.word_size, *[D] * len(config.question_dilations)]
        pairs = zip(widths, config.question_dilations, strict=False)
        self.question_blocks = nn.ModuleList(block(width, config.kernel_size, d) for width, d in pairs)
        self.question_pool = AttentionPool(widths[-1], D, backend=backend)
        joined = config.word_size + widths[-1] + config.position_size + config.features
        self.fusion = block(joined, 1, 1)
        self.passage_blocks = nn.ModuleList(block(D, config.kernel_size, d) for d in config.passage_dilations)
        self.passage_pool = AttentionPool(D, D, backend=backend)
        self.answerable = nn.Linear(D, 1)
        self.start, self.end = Tagger(D, config.tagger_size), Tagger(D, config.tagger_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | GatedConv1d):
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
        features: Tensor,
        question_mask: Tensor,
        passage_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Start and end probabilities, float32 [B, Lp] each, without meaning where the passage is padding.

        Args:
            question, passage: word vectors [B, Lq, W] and [B, Lp, W]; zeros for words without one.
            features: [B, Lp, 8], see `reader_features`.
            question_mask, passage_mask: [B, Lq] and [B, Lp] bool, True for words and False for padding.
        """
        config = self.config
        for name, mask in (("question_mask", question_mask), ("passage_mask", passage_mask)):
            if mask.dim() != 2 or len(mask) != len(question):
                raise ValueError(f"{name}: expected [{len(question)}, L], got {list(mask.shape)}")
        wanted = {
            "question": (question, (*question_mask.shape, config.word_size)),
            "passage": (passage, (len(question), passage_mask.shape[-1], config.word_size)),
            "features": (features, (*passage_mask.shape, config.features)),
        }
        for name, (given, shape) in wanted.items():
            if given.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(given.shape)}")
        q = question
        for block in self.question_blocks:
            q = block(q, mask=question_mask)
        v = self.question_pool(q, mask=question_mask)
        B, Lp = passage_mask.shape
        # Tracing ignores caches, and warns of them.
        table = sinusoidal_positions.__wrapped__ if torch.compiler.is_compiling() else sinusoidal_positions
        positions = table(Lp, config.position_size).to(passage).expand(B, -1, -1)
        joined = [passage, v.to(passage.dtype).unsqueeze(1).expand(-1, Lp, -1), positions, features.to(passage.dtype)]
        p = self.fusion(torch.cat(joined, dim=-1), mask=passage_mask)
        for block in self.passage_blocks:
            p = block(p, mask=passage_mask)
        answerable = self.answerable(self.passage_pool(p, mask=passage_mask)).float().sigmoid()
        return answerable * self.start(p), answerable * self.end(p)


def reader_2018_loss(start: Tensor, end: Tensor, start_target: Tensor, end_target: Tensor, mask: Tensor) -> Tensor:
    """The focal losses of start and end, each the mean over the passages' words; all arguments [B, Lp]."""
    return masked_focal_loss(start, start_target, mask) + masked_focal_loss(end, end_target, mask)
