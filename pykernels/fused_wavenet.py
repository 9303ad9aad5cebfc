"""Gated convolution blocks of other packages on `gated_conv1d`: VITS, GluonTS, Parallel WaveGAN, DiffWave, DiffSinger.

All of them take [B, C, L]. Blocks return views of [B, L, C], which the next block reads without a copy; the pointwise
convolutions around the gate are products of rows. Written from the papers and the packages' documented behaviour:

    gated unit (van den Oord et al. 2016)   u = tanh(value) * sigmoid(gate) of a dilated convolution and conditioning
    VITS (Kim et al. 2021)                  x = (x + residual(u)) * mask, the sum of the layers' skip(u) * mask
    GluonTS' WaveNet                        skip(u), x + residual(u), without padding
    Parallel WaveGAN (Yamamoto et al. 2020) (x + residual(u)) * sqrt(1/2), skip(u)
    DiffWave (Kong et al. 2021)             the same, of x + step, with the gate in the first half
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._fusion import Fusion, drop, pointwise, reach, takes, unserved_conv, unserved_layer, weight
from .gated_conv import gated_conv1d

Draw = Callable[..., Tensor]
Own = Callable[..., Any]


def _gated(conv: Any, rows: Tensor, cond: Tensor | None, padding: str, split: str) -> Tensor:
    options: Any = {"dilation": conv.dilation[0], "padding": padding, "residual": "none", "value_act": "tanh"}
    return gated_conv1d(rows, weight(conv), conv.bias, cond=cond, split=split, **options)


def _cond(layer: Any, cond: Tensor, batch: int) -> Tensor:
    """The conditioning [B or 1, C, L or 1] as rows [B, L or 1, 2 * C_out]."""
    return pointwise(layer, cond.transpose(1, 2)).expand(batch, -1, -1)


def _fits(cond: Any, x: Tensor) -> bool:
    """Whether cond broadcasts along x, but for its channels."""
    return (
        isinstance(cond, Tensor)
        and cond.dim() == 3
        and cond.shape[0] in (x.shape[0], 1)
        and (cond.shape[2] == x.shape[2] or cond.shape[2] == 1)
    )


def _floating(mask: Tensor) -> Tensor | None:
    return mask if mask.is_floating_point() else None


def _unserved_dropout(layer: Any, name: str) -> str:
    if type(layer) is not nn.Dropout or layer._forward_hooks or layer._forward_pre_hooks:
        return f"{name}: {type(layer).__name__}, or hooks, where Dropout was expected"
    return ""


# --- VITS: WN, and VitsWaveNet of transformers ---


def _vits(layer: Any, own: Own, args: tuple[Any, ...], dropout: Any, x: Any, mask: Any, g: Any) -> Tensor:
    n, convs, mixers = len(layer.in_layers), layer.in_layers, layer.res_skip_layers
    conditioned = [] if g is None else [layer.cond_layer]
    if not (
        isinstance(mask, Tensor)
        and mask.dim() == 3
        and type(dropout) is nn.Dropout
        and takes(x, *convs, *mixers, *conditioned, around=(dropout,), others=(g, _floating(mask)))
        and (g is None or _fits(g, x))
    ):
        return own(*args)
    width = x.shape[1]
    cond = None if g is None else _cond(layer.cond_layer, g, x.shape[0])
    rows, mask, total = x.transpose(1, 2), mask.transpose(1, 2), None
    for i in range(n):
        part = None if cond is None else cond[..., 2 * width * i : 2 * width * (i + 1)]
        u = _gated(convs[i], rows, part, "same", "value_gate")
        if dropout.training and dropout.p:
            u = drop(u, dropout.p)
        mixed = pointwise(mixers[i], u)
        if i < n - 1:
            rows = (rows + mixed[..., :width]) * mask
            mixed = mixed[..., width:]
        total = mixed.to(x.dtype) if total is None else total + mixed
    return (total * mask).transpose(1, 2).contiguous()


def forward_vits(layer: Any, own: Own, inputs: Tensor, padding_mask: Tensor, global_conditioning: Any = None) -> Tensor:
    """VitsWaveNet of transformers."""
    args = inputs, padding_mask, global_conditioning
    return _vits(layer, own, args, layer.dropout, *args)


def forward_wn(layer: Any, own: Own, x: Tensor, x_mask: Tensor, g: Any = None, **kwargs: Any) -> Tensor:
    """WN of VITS and its descendants."""
    return _vits(layer, own, (x, x_mask, g), layer.drop, x, x_mask, g)


def _check_vits(layer: Any, width: int, layers: int, dropout: str) -> str:
    convs, mixers = layer.in_layers, layer.res_skip_layers
    if not 0 < layers == len(convs) == len(mixers):
        return f"{len(convs)} in_layers and {len(mixers)} res_skip_layers where {layers} were expected"
    named: list[tuple[str, Any, int | None]] = [(f"in_layers.{i}", conv, None) for i, conv in enumerate(convs)]
    named += [(f"res_skip_layers.{i}", conv, 1) for i, conv in enumerate(mixers)]
    named += [("cond_layer", layer.cond_layer, 1)] if hasattr(layer, "cond_layer") else []
    for name, conv, size in named:
        rows = reach(conv) if size is None and isinstance(conv, nn.Conv1d) else 0
        if what := unserved_conv(conv, name, rows, size):
            return what
    for name, conv, outputs in [
        *((f"in_layers.{i}", conv, 2 * width) for i, conv in enumerate(convs)),
        *((f"res_skip_layers.{i}", conv, 2 * width if i < layers - 1 else width) for i, conv in enumerate(mixers)),
    ]:
        if (conv.in_channels, conv.out_channels) != (width, outputs):
            return f"{name}: {conv.in_channels} -> {conv.out_channels} channels, not {width} -> {outputs}"
    return _unserved_dropout(getattr(layer, dropout), dropout)


def _example_vits(layer: Any, draw: Draw) -> tuple[Any, ...]:
    x, mask = draw(2, layer.in_layers[0].in_channels, 9), torch.ones_like(draw(2, 1, 9))
    mask[1, :, 6:] = 0
    return (x, mask, draw(2, layer.cond_layer.in_channels, 1)) if hasattr(layer, "cond_layer") else (x, mask)


# --- GluonTS ---


def forward_gluonts(layer: Any, own: Own, x: Tensor) -> tuple[Tensor, Tensor]:
    """CausalDilatedResidualLayer: two convolutions without padding, of the gate and of the value."""
    (gate, sigmoid), (value, tanh) = (m._modules.values() for m in (layer.conv_sigmoid, layer.conv_tanh))
    skip, around = layer.conv_skip, (layer.conv_sigmoid, layer.conv_tanh, sigmoid, tanh)
    convs = (gate, value, skip, layer.conv_residual) if layer.return_dense_output else (gate, value, skip)
    first = value.dilation[0] * (value.kernel_size[0] - 1)
    # The convolution refuses inputs that are too short. An exported call has no such branch.
    if not takes(x, *convs, around=around) or not (torch.compiler.is_exporting() or x.shape[2] > first):
        return own(x)
    rows = x.transpose(1, 2)
    options: Any = {"dilation": value.dilation[0], "padding": "valid", "residual": "none", "value_act": "tanh"}
    u = gated_conv1d(rows, weight(value), value.bias, gate_weight=weight(gate), gate_bias=gate.bias, **options)
    s = pointwise(skip, u).transpose(1, 2)
    if not layer.return_dense_output:
        return s, torch.zeros_like(u).transpose(1, 2)
    return s, (pointwise(layer.conv_residual, u) + rows[:, first:]).transpose(1, 2)


def check_gluonts(layer: Any) -> str:
    for name, act in (("conv_sigmoid", nn.Sigmoid), ("conv_tanh", nn.Tanh)):
        pair = getattr(layer, name)
        if type(pair) is not nn.Sequential or len(pair) != 2 or type(pair[1]) is not act:
            return f"{name}: {pair}"
        if any(m._forward_hooks or m._forward_pre_hooks for m in (pair, pair[1])):
            return f"{name}: hooks, which would not be called"
        if what := unserved_conv(pair[0], f"{name}.0"):
            return what
    gate, value = layer.conv_sigmoid[0], layer.conv_tanh[0]
    forms = [(m.weight.shape, m.dilation, m.bias is None) for m in (gate, value)]
    if forms[0] != forms[1]:
        return "conv_sigmoid and conv_tanh of different shapes, dilations or biases"
    if reach(value) != (layer.kernel_size - 1) * layer.dilation:
        return f"a reach of {reach(value)} rows where {(layer.kernel_size - 1) * layer.dilation} were expected"
    for name in ("conv_skip", "conv_residual")[: 1 + bool(layer.return_dense_output)]:
        if what := unserved_conv(getattr(layer, name), name, kernel_size=1):
            return what
    return ""


def _example_gluonts(layer: Any, draw: Draw) -> tuple[Any, ...]:
    return (draw(2, layer.conv_tanh[0].in_channels, reach(layer.conv_tanh[0]) + 3),)


# --- Parallel WaveGAN ---


def forward_parallel_wavegan(layer: Any, own: Own, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """WaveNetResidualBlock."""
    convs = layer.conv, layer.conv1x1_out, layer.conv1x1_skip, *(() if c is None else (layer.conv1x1_aux,))
    if not (takes(x, *(m for m in convs if m is not None), others=(c,)) and (c is None or _fits(c, x))):
        return own(x, c)
    if c is not None and layer.conv1x1_aux is None:
        return own(x, c)
    rows = x.transpose(1, 2)
    seen = drop(rows, layer.dropout) if layer.dropout and layer.training else rows
    cond = None if c is None else _cond(layer.conv1x1_aux, c, x.shape[0])
    u = _gated(layer.conv, seen, cond, "causal" if layer.use_causal_conv else "same", "value_gate")
    s = pointwise(layer.conv1x1_skip, u)
    y = (pointwise(layer.conv1x1_out, u) + rows) * math.sqrt(0.5)
    return y.transpose(1, 2), s.transpose(1, 2)


def check_parallel_wavegan(layer: Any) -> str:
    conv = layer.conv
    both = (2 if layer.use_causal_conv else 1) * reach(conv) if isinstance(conv, nn.Conv1d) else 0
    pointwises = ["conv1x1_out", "conv1x1_skip", *(["conv1x1_aux"] if layer.conv1x1_aux is not None else [])]
    named = [("conv", conv, both, None), *((name, getattr(layer, name), 0, 1) for name in pointwises)]
    return next(filter(None, (unserved_conv(m, name, rows, size) for name, m, rows, size in named)), "")


def _example_parallel_wavegan(layer: Any, draw: Draw) -> tuple[Any, ...]:
    x = draw(2, layer.conv.in_channels, 9)
    return x, None if layer.conv1x1_aux is None else draw(2, layer.conv1x1_aux.in_channels, 9)


# --- DiffWave and DiffSinger ---


def _diffusion(layer: Any, own: Own, args: tuple[Any, ...], x: Tensor, step: Any, cond: Any) -> tuple[Tensor, Tensor]:
    projection = layer.conditioner_projection
    layers = layer.dilated_conv, layer.diffusion_projection, layer.output_projection
    if not (
        takes(x, *layers, *(() if projection is None else (projection,)), others=(step, cond))
        and step.dim() in (1, 2)
        and (cond is None) == (projection is None)
        and (cond is None or _fits(cond, x))
    ):
        return own(*args)
    rows = x.transpose(1, 2)
    seen = rows + layer.diffusion_projection(step).unsqueeze(-2)
    given = None if cond is None else _cond(projection, cond, seen.shape[0])
    mixed = pointwise(layer.output_projection, _gated(layer.dilated_conv, seen, given, "same", "gate_value"))
    residual, skip = mixed.transpose(1, 2).chunk(2, 1)
    return (x + residual) / math.sqrt(2.0), skip


def forward_diffwave(layer: Any, own: Own, x: Tensor, diffusion_step: Any, conditioner: Any = None) -> Any:
    """ResidualBlock of DiffWave."""
    return _diffusion(layer, own, (x, diffusion_step, conditioner), x, diffusion_step, conditioner)


def forward_diffsinger(layer: Any, own: Own, x: Tensor, conditioner: Any, diffusion_step: Any) -> Any:
    """ResidualBlock of DiffSinger's WaveNet."""
    return _diffusion(layer, own, (x, conditioner, diffusion_step), x, diffusion_step, conditioner)


def check_diffusion(layer: Any) -> str:
    conv, projection = layer.dilated_conv, layer.conditioner_projection
    rows = reach(conv) if isinstance(conv, nn.Conv1d) else 0
    named = [("dilated_conv", conv, rows, None), ("output_projection", layer.output_projection, 0, 1)]
    if projection is not None:
        named.append(("conditioner_projection", projection, 0, 1))
    found = [unserved_conv(m, name, rows, size) for name, m, rows, size in named]
    return next(filter(None, found), "") or unserved_layer(
        layer.diffusion_projection, nn.Linear, "diffusion_projection"
    )


def _example_diffwave(layer: Any, draw: Draw) -> tuple[Any, ...]:
    projection = layer.conditioner_projection
    x, step = draw(2, layer.dilated_conv.in_channels, 9), draw(2, layer.diffusion_projection.in_features)
    return x, step, None if projection is None else draw(2, projection.in_channels, 9)


def _example_diffsinger(layer: Any, draw: Draw) -> tuple[Any, ...]:
    x, step, cond = _example_diffwave(layer, draw)
    return x, cond, step


VITS = Fusion(forward_vits, lambda m: _check_vits(m, m.hidden_size, m.num_layers, "dropout"), _example_vits)
WN = Fusion(forward_wn, lambda m: _check_vits(m, m.hidden_channels, m.n_layers, "drop"), _example_vits)
GLUONTS = Fusion(forward_gluonts, check_gluonts, _example_gluonts)
PARALLEL_WAVEGAN = Fusion(forward_parallel_wavegan, check_parallel_wavegan, _example_parallel_wavegan)
DIFFWAVE = Fusion(forward_diffwave, check_diffusion, _example_diffwave)
DIFFSINGER = Fusion(forward_diffsinger, check_diffusion, _example_diffsinger)
