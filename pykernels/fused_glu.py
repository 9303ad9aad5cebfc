"""Gated linear units of other packages on `gated_conv1d`: fairseq's fconv and AllenNLP's gated CNN.

Both are of the convolutional sequence to sequence model (Gehring et al. 2017), by the papers and the documented
behaviour: v * sigmoid(z) of a convolution (v, z), then (unit + residual) * sqrt(1/2). fairseq computes on [T, B, C], of
which our rows [B, T, C] are a view; the rows that it fills with zeros before each convolution are masked in ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._fusion import Fusion, computes, reach, takes, unserved_conv, unserved_time_first, weight
from .gated_conv import gated_conv1d

Draw = Callable[..., Tensor]
Own = Callable[..., Any]


def _unit(rows: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """The gated linear unit, blended with the residual where there is one."""
    # Under autocast the sum keeps the residual's dtype.
    if residual is rows and not torch.is_autocast_enabled(rows.device.type):
        return gated_conv1d(rows, weight, bias, residual="add", **options) * math.sqrt(0.5)
    u = gated_conv1d(rows, weight, bias, residual="none", **options)
    return u if residual is None else (u + residual) * math.sqrt(0.5)


# --- fairseq ---


class _ScaledGradient(torch.autograd.Function):
    """x, whose gradient is multiplied by scale."""

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def _served(layer: Any) -> bool:
    return computes(next(layer.fc1.parameters()), *layer.convolutions, around=(layer.dropout_module,))


def _drop(module: Any, rows: Tensor, batch_first: bool) -> Tensor:
    """Dropout by the random bits of fairseq's [T, B, C], which lies in memory as [B, T, C] if batch_first."""
    if not (module.p > 0 and (module.training or module.apply_during_inference)):
        return rows
    x = rows.transpose(0, 1)
    return module(x if batch_first else x.contiguous()).transpose(0, 1)


def _channels_first(weight: Tensor) -> Tensor:
    """[K, C_in, C_out] as [C_out, C_in, K]."""
    taps, inner, outer = weight.shape
    # By way of a matrix's transpose, which PyTorch does in blocks: a third of the time of one permuted copy.
    transposed = weight.reshape(taps * inner, outer).t().contiguous()
    return transposed.view(outer, taps, inner).transpose(1, 2).contiguous()


def _convolved(layer: Any, i: int, rows: Tensor, residual: Tensor | None, **options: Any) -> Tensor:
    conv = layer.convolutions[i]
    return _unit(rows, residual, _channels_first(weight(conv)), conv.bias, **options)


def _residual(layer: Any, i: int, before: list[Tensor]) -> Tensor | None:
    back, projection = layer.residuals[i], layer.projections[i]
    if back <= 0:
        return None
    return before[-back] if projection is None else projection(before[-back])


def forward_encoder(layer: Any, own: Own, src_tokens: Tensor, src_lengths: Any) -> dict[str, Any]:
    """FConvEncoder."""
    if not _served(layer):
        return own(src_tokens, src_lengths)
    embedded = layer.dropout_module(layer.embed_tokens(src_tokens) + layer.embed_positions(src_tokens))
    rows = layer.fc1(embedded)
    found = src_tokens.eq(layer.padding_idx)
    # A traced call has no branch on values; a mask without padding changes nothing.
    padding = found if torch.compiler.is_compiling() or found.any() else None
    live = None if padding is None else ~padding
    before = [rows]
    for i in range(len(layer.convolutions)):
        residual = _residual(layer, i, before)
        # Zeros in the place of padding are written into a copy, [T, B, C] in memory too.
        seen = _drop(layer.dropout_module, rows, i == 0 and padding is None)
        rows = _convolved(layer, i, seen, residual, padding="same", mask=live)
        before.append(rows)
    x = layer.fc2(rows)
    if padding is not None:
        x = x.masked_fill(padding.unsqueeze(-1), 0)
    x = _ScaledGradient.apply(x, 1.0 / (2.0 * layer.num_attention_layers))
    return {"encoder_out": (x, (x + embedded) * math.sqrt(0.5)), "encoder_padding_mask": padding}


def forward_decoder(
    layer: Any,
    own: Own,
    prev_output_tokens: Tensor,
    encoder_out: Any = None,
    incremental_state: Any = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """FConvDecoder. Token by token, with an incremental_state, runs in its own forward."""
    attending = [attention is not None for attention in layer.attention]
    if incremental_state is not None or (any(attending) and encoder_out is None) or not _served(layer):
        return own(prev_output_tokens, encoder_out=encoder_out, incremental_state=incremental_state, **rest)
    encoded, padding = None, None
    if encoder_out is not None:
        keys, values = encoder_out["encoder_out"]
        encoded, padding = (keys.transpose(1, 2).contiguous(), values), encoder_out["encoder_padding_mask"]
    x = layer.embed_tokens(prev_output_tokens)
    if layer.embed_positions is not None:
        x = x + layer.embed_positions(prev_output_tokens, None)
    target = layer.dropout_module(x)
    rows, scores = layer.fc1(target), None
    before = [rows]
    for i, attention in enumerate(layer.attention):
        residual = _residual(layer, i, before)
        rows = _drop(layer.dropout_module, rows, i == 0 or attending[i - 1])
        if attention is None:
            rows = _convolved(layer, i, rows, residual, padding="causal")
        else:
            rows, attended = attention(_convolved(layer, i, rows, None, padding="causal"), target, encoded, padding)
            if not layer.training and layer.need_attn:
                attended = attended / len(attending)
                scores = attended if scores is None else scores + attended
            rows = rows if residual is None else (rows + residual) * math.sqrt(0.5)
        before.append(rows)
    if layer.fc2 is not None and layer.fc3 is not None:
        rows = layer.fc3(layer.dropout_module(layer.fc2(rows)))
    return rows, scores


def _check_fairseq(layer: Any, kind: str, padding: Callable[[int], int]) -> str:
    convs = layer.convolutions
    if not 0 < len(convs) == len(layer.projections) == len(layer.residuals):
        return f"{len(convs)} convolutions, {len(layer.projections)} projections, {len(layer.residuals)} residuals"
    named = ((f"convolutions.{i}", conv) for i, conv in enumerate(convs))
    return next(filter(None, (unserved_time_first(m, name, kind, padding(m.kernel_size[0])) for name, m in named)), "")


def check_encoder(layer: Any) -> str:
    if not layer.num_attention_layers:
        return f"num_attention_layers of {layer.num_attention_layers}, by which its forward divides"
    # For an even kernel size its forward pads.
    return _check_fairseq(layer, "ConvTBC", lambda k: k // 2 if k % 2 else 0)


def check_decoder(layer: Any) -> str:
    if len(layer.attention) != len(layer.convolutions):
        return f"{len(layer.convolutions)} convolutions and {len(layer.attention)} attention layers"
    return _check_fairseq(layer, "LinearizedConvolution", lambda k: k - 1)


def _tokens(layer: Any, draw: Draw) -> Tensor:
    size = layer.embed_tokens.num_embeddings
    return (draw(2, 9).abs() * size).long() % size


def _example_encoder(layer: Any, draw: Draw) -> tuple[Any, ...]:
    tokens = _tokens(layer, draw)
    tokens[1, :3] = layer.padding_idx
    return tokens, None


def _example_decoder(layer: Any, draw: Draw) -> tuple[Any, ...]:
    width = layer.embed_tokens.embedding_dim
    encoded = {"encoder_out": (draw(2, 5, width), draw(2, 5, width)), "encoder_padding_mask": None}
    return _tokens(layer, draw), encoded


# --- AllenNLP ---


def forward_allennlp(layer: Any, own: Own, x: Tensor) -> Tensor:
    """ResidualBlock of GatedCnnEncoder: convolutions that see earlier rows only, or later ones only."""
    convs = list(layer._convolutions)
    # The convolution refuses inputs without rows. An exported call has no such branch.
    if not takes(x, *convs) or not (torch.compiler.is_exporting() or x.shape[2]):
        return own(x)
    dropping = layer.dropout > 0 and layer.training
    rows = x.transpose(1, 2)
    out = F.dropout(x, layer.dropout).transpose(1, 2) if dropping else rows
    for conv in convs:
        residual, padding = rows if conv is convs[-1] else None, "causal"
        if layer._direction == "backward" and (later := reach(conv)):
            out, padding = F.pad(out, (0, 0, 0, later)), "valid"
        out = _unit(out, residual, weight(conv), conv.bias, dilation=conv.dilation[0], padding=padding)
    out = out.transpose(1, 2)
    # In the layer's own layout, by which the next one's dropout draws.
    return out.contiguous() if dropping else out


def check_allennlp(layer: Any) -> str:
    if layer._direction not in ("forward", "backward"):
        return f"_direction: {layer._direction!r}"
    if not len(layer._convolutions):
        return "no convolutions"
    for i, conv in enumerate(layer._convolutions):
        # Its forward cuts off what the padding on one side adds.
        rows = 2 * reach(conv) if hasattr(conv, "dilation") else 0
        if what := unserved_conv(conv, f"_convolutions.{i}", rows):
            return what
    return ""


def _example_allennlp(layer: Any, draw: Draw) -> tuple[Any, ...]:
    return (draw(2, layer._convolutions[0].in_channels, 9),)


FAIRSEQ_ENCODER = Fusion(forward_encoder, check_encoder, _example_encoder)
FAIRSEQ_DECODER = Fusion(forward_decoder, check_decoder, _example_decoder)
ALLENNLP = Fusion(forward_allennlp, check_allennlp, _example_allennlp)
