"""Layers of other packages that `fuse` serves, written anew: their names, parameters and layouts, by the papers and the
packages' documented behaviour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS: dict[str, Callable[..., nn.Module]] = {
    "plain": lambda m, **_: m,
    "weight_norm": nn.utils.weight_norm,
    "parametrized": nn.utils.parametrizations.weight_norm,
}


class VitsBlock(nn.Module):
    """The WaveNet of VITS' flows and posterior encoder."""

    def __init__(self, hidden: int, kernel: int, rate: int, layers: int, gin: int, p: float, norm: Any) -> None:
        super().__init__()
        self.hidden_channels, self.n_layers, self.drop = hidden, layers, nn.Dropout(p)
        convs = [nn.Conv1d(hidden, 2 * hidden, kernel, dilation=rate**i, padding=rate**i * (kernel - 1) // 2)
                 for i in range(layers)]  # fmt: skip
        mixers = [nn.Conv1d(hidden, hidden * (2 if i < layers - 1 else 1), 1) for i in range(layers)]
        self.in_layers, self.res_skip_layers = (nn.ModuleList(map(norm, ms)) for ms in (convs, mixers))
        if gin:
            self.cond_layer = norm(nn.Conv1d(gin, 2 * hidden * layers, 1))

    def forward(self, x: Tensor, x_mask: Tensor, g: Tensor | None = None, **_: Any) -> Tensor:
        total: Any = 0
        parts = None if g is None else self.cond_layer(g).chunk(self.n_layers, 1)
        for i, (conv, mixer) in enumerate(zip(self.in_layers, self.res_skip_layers, strict=True)):
            h = conv(x) if parts is None else conv(x) + parts[i]
            value, gate = h.chunk(2, 1)
            mixed = mixer(self.drop(torch.tanh(value) * torch.sigmoid(gate)))
            if i < self.n_layers - 1:
                residual, mixed = mixed.chunk(2, 1)
                x = (x + residual) * x_mask
            total = total + mixed
        return total * x_mask


VitsBlock.__module__, VitsBlock.__qualname__, VitsBlock.__name__ = "vits.modules", "WN", "WN"


class Diffusion(nn.Module):
    """The residual block of DiffWave, which gives the gate the first half, and of DiffSinger."""

    def __init__(self, channels: int, dilation: int, width: int, cond: int, norm: Any) -> None:
        super().__init__()
        self.dilated_conv = norm(nn.Conv1d(channels, 2 * channels, 3, padding=dilation, dilation=dilation))
        self.diffusion_projection = nn.Linear(width, channels)
        self.conditioner_projection = norm(nn.Conv1d(cond, 2 * channels, 1)) if cond else None
        self.output_projection = norm(nn.Conv1d(channels, 2 * channels, 1))

    def compute(self, x: Tensor, step: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.dilated_conv(x + self.diffusion_projection(step).unsqueeze(-1))
        if self.conditioner_projection is not None:
            h = h + self.conditioner_projection(cond)
        gate, value = h.chunk(2, 1)
        residual, skip = self.output_projection(torch.sigmoid(gate) * torch.tanh(value)).chunk(2, 1)
        return (x + residual) / math.sqrt(2), skip


class DiffWaveBlock(Diffusion):
    def forward(self, x: Tensor, diffusion_step: Tensor, conditioner: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.compute(x, diffusion_step, conditioner)


class DiffSingerBlock(Diffusion):
    def forward(self, x: Tensor, conditioner: Tensor, diffusion_step: Tensor) -> tuple[Tensor, Tensor]:
        return self.compute(x, diffusion_step, conditioner)


for _cls, _module in ((DiffWaveBlock, "diffwave.model"), (DiffSingerBlock, "modules.backbones.wavenet")):
    _cls.__module__, _cls.__qualname__, _cls.__name__ = _module, "ResidualBlock", "ResidualBlock"


class ParallelWaveGANBlock(nn.Module):
    def __init__(
        self,
        kernel_size: int = 3,
        residual_channels: int = 64,
        gate_channels: int = 128,
        skip_channels: int = 64,
        aux_channels: int = 80,
        dropout: float = 0.0,
        dilation: int = 1,
        bias: bool = True,
        use_causal_conv: bool = False,
    ) -> None:
        super().__init__()
        self.dropout, self.use_causal_conv = dropout, use_causal_conv
        half = gate_channels // 2
        rows = dilation * (kernel_size - 1) // (1 if use_causal_conv else 2)
        options: Any = {"padding": rows, "dilation": dilation, "bias": bias}
        self.conv = nn.Conv1d(residual_channels, gate_channels, kernel_size, **options)
        self.conv1x1_aux = nn.Conv1d(aux_channels, gate_channels, 1, bias=False) if aux_channels else None
        self.conv1x1_out = nn.Conv1d(half, residual_channels, 1, bias=bias)
        self.conv1x1_skip = nn.Conv1d(half, skip_channels, 1, bias=bias)

    def forward(self, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.conv(F.dropout(x, self.dropout, self.training))[..., : x.shape[2]]
        if c is not None and self.conv1x1_aux is not None:
            h = h + self.conv1x1_aux(c)
        value, gate = h.chunk(2, 1)
        u = torch.tanh(value) * torch.sigmoid(gate)
        return (self.conv1x1_out(u) + x) * math.sqrt(0.5), self.conv1x1_skip(u)


class AllenNLPBlock(nn.Module):
    """layers: (kernel size, width) or (2, width, dilation) of each convolution; the last is as wide as the input."""

    def __init__(
        self, input_dim: int, layers: Sequence[tuple[int, ...]], direction: str, dropout: float, norm: Any
    ) -> None:
        super().__init__()
        self.dropout, self._direction, self._convolutions = dropout, direction, nn.ModuleList()
        width = input_dim
        for kernel, outputs, *dilation in layers:
            rate = dilation[0] if dilation else 1
            conv = nn.Conv1d(width, 2 * outputs, kernel, padding=rate * (kernel - 1), dilation=rate)
            self._convolutions.append(norm(conv))
            width = outputs

    def forward(self, x: Tensor) -> Tensor:
        out, length = F.dropout(x, self.dropout, self.training) if self.dropout else x, x.shape[2]
        for conv in self._convolutions:
            h = conv(out)
            out = F.glu(h[..., :length] if self._direction == "forward" else h[..., h.shape[2] - length :], 1)
        return (out + x) * math.sqrt(0.5)


# --- fairseq ---


class ConvTBC(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.padding = (kernel_size,), (padding,)
        deviation = math.sqrt(4 / (kernel_size * in_channels))
        self.weight = nn.Parameter(torch.randn(kernel_size, in_channels, out_channels) * deviation)
        self.bias = nn.Parameter(torch.randn(out_channels) * 0.1)

    def convolve(self, input: Tensor) -> Tensor:
        return torch.conv_tbc(input.contiguous(), self.weight, self.bias, self.padding[0])

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input)


class LinearizedConvolution(ConvTBC):
    """Of earlier rows; with an incremental_state of one row, the state's rows before it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding)
        self.register_backward_hook(self._clear_linearized_weight)

    def _clear_linearized_weight(self, *_: Any) -> None:
        pass

    def forward(self, input: Tensor, incremental_state: dict[int, Tensor] | None = None) -> Tensor:
        if incremental_state is None:
            return self.convolve(input)[: input.shape[0]]
        kernel = self.kernel_size[0]
        rows = incremental_state.get(id(self), input.new_zeros(input.shape[0], kernel, input.shape[2]))
        rows = incremental_state[id(self)] = torch.cat([rows[:, 1:], input], 1)
        return (torch.einsum("bkc,kco->bo", rows, self.weight) + self.bias).unsqueeze(1)


class Dropout(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.apply_during_inference = p, False

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        return F.dropout(x, self.p, True, inplace) if self.p > 0 and self.training else x


class Positions(nn.Embedding):
    """Of the positions without padding, which are counted from padding_idx + 1."""

    def forward(self, tokens: Tensor, incremental_state: Any = None) -> Tensor:
        live = tokens.ne(self.padding_idx).long()
        return super().forward(live.cumsum(1) * live + self.padding_idx)


class FairseqBlocks(nn.Module):
    """What the encoder and the decoder have in common. convolutions: (width, kernel size, layers back to the residual,
    0 for none)."""

    def __init__(
        self, kind: Any, same: bool, convolutions: Sequence[tuple[int, int, int]], width: int, dropout: float, norm: Any
    ) -> None:
        super().__init__()
        self.padding_idx, self.dropout_module = 1, Dropout(dropout)
        self.embed_tokens = nn.Embedding(40, width, self.padding_idx)
        self.embed_positions = Positions(300, width, self.padding_idx)
        self.fc1 = norm(nn.Linear(width, convolutions[0][0]))
        self.projections, self.convolutions = nn.ModuleList(), nn.ModuleList()
        self.residuals = [back for _, _, back in convolutions]
        widths = [convolutions[0][0]]
        for outputs, kernel, back in convolutions:
            of = widths[-back] if back else outputs
            self.projections.append(norm(nn.Linear(of, outputs)) if of != outputs else None)
            padding = (kernel // 2 if kernel % 2 else 0) if same else kernel - 1
            self.convolutions.append(norm(kind(widths[-1], 2 * outputs, kernel, padding), dim=2))
            widths.append(outputs)
        self.fc2 = norm(nn.Linear(widths[-1], width))

    def residual(self, i: int, before: list[Tensor]) -> Tensor | None:
        if not self.residuals[i]:
            return None
        x = before[-self.residuals[i]]
        return x if self.projections[i] is None else self.projections[i](x)


class FConvEncoder(FairseqBlocks):
    def __init__(
        self, convolutions: Sequence[tuple[int, int, int]], width: int, dropout: float, norm: Any, attention: int = 2
    ) -> None:
        super().__init__(ConvTBC, True, convolutions, width, dropout, norm)
        self.num_attention_layers = attention

    def forward(self, src_tokens: Tensor, src_lengths: Any) -> dict[str, Any]:
        embedded = self.dropout_module(self.embed_tokens(src_tokens) + self.embed_positions(src_tokens))
        padding = src_tokens.eq(self.padding_idx)
        x = self.fc1(embedded).transpose(0, 1)
        before = [x]
        for i, conv in enumerate(self.convolutions):
            residual = self.residual(i, before)
            if padding.any():
                x = x.masked_fill(padding.t().unsqueeze(-1), 0)
            x = self.dropout_module(x)
            if conv.kernel_size[0] % 2 == 0:
                x = F.pad(x, (0, 0, 0, 0, (conv.kernel_size[0] - 1) // 2, conv.kernel_size[0] // 2))
            x = F.glu(conv(x), 2)
            x = x if residual is None else (x + residual) * math.sqrt(0.5)
            before.append(x)
        x = self.fc2(x.transpose(0, 1)).masked_fill(padding.unsqueeze(-1), 0)
        if x.requires_grad:
            x = x.clone()
            x.register_hook(lambda gradient: gradient / (2 * self.num_attention_layers))
        y = (x + embedded) * math.sqrt(0.5)
        return {"encoder_out": (x, y), "encoder_padding_mask": padding if padding.any() else None}


class AttentionLayer(nn.Module):
    def __init__(self, channels: int, width: int, norm: Any) -> None:
        super().__init__()
        self.in_projection, self.out_projection = norm(nn.Linear(channels, width)), norm(nn.Linear(width, channels))

    def forward(self, x: Tensor, target: Tensor, encoded: Any, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = torch.bmm((self.in_projection(x) + target) * math.sqrt(0.5), encoded[0])
        live: Any = encoded[1].shape[1]
        if padding is not None:
            logits = logits.float().masked_fill(padding.unsqueeze(1), float("-inf")).type_as(x)
            live = (live - padding.type_as(x).sum(1, keepdim=True)).unsqueeze(-1)
        a = torch.softmax(logits, -1)
        return (self.out_projection(torch.bmm(a, encoded[1]) * live**0.5) + x) * math.sqrt(0.5), a


class FConvDecoder(FairseqBlocks):
    def __init__(
        self,
        convolutions: Sequence[tuple[int, int, int]],
        width: int,
        dropout: float,
        norm: Any,
        attention: Sequence[bool],
    ) -> None:
        super().__init__(LinearizedConvolution, False, convolutions, width, dropout, norm)
        self.attention = nn.ModuleList(
            AttentionLayer(conv[0], width, norm) if attended else None
            for conv, attended in zip(convolutions, attention, strict=True)
        )
        self.fc3, self.need_attn = norm(nn.Linear(width, 40)), True

    def forward(
        self, prev_output_tokens: Tensor, encoder_out: Any = None, incremental_state: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        encoded, padding, scores = None, None, None
        if encoder_out is not None:
            (keys, values), padding = encoder_out["encoder_out"], encoder_out["encoder_padding_mask"]
            encoded = keys.transpose(1, 2).contiguous(), values
        x = self.embed_tokens(prev_output_tokens) + self.embed_positions(prev_output_tokens)
        if incremental_state is not None:
            x = x[:, -1:]
        swap = (lambda t: t.transpose(0, 1)) if incremental_state is None else (lambda t: t)
        target = self.dropout_module(x)
        x = swap(self.fc1(target))
        before = [x]
        for i, (conv, attention) in enumerate(zip(self.convolutions, self.attention, strict=True)):
            residual = self.residual(i, before)
            x = F.glu(conv(self.dropout_module(x), incremental_state), 2)
            if attention is not None:
                x, a = attention(swap(x), target, encoded, padding)
                x = swap(x)
                if not self.training and self.need_attn:
                    scores = a / len(self.attention) + (0 if scores is None else scores)
            x = x if residual is None else (x + residual) * math.sqrt(0.5)
            before.append(x)
        return self.fc3(self.dropout_module(self.fc2(swap(x)))), scores


for _cls, _name in (
    (ParallelWaveGANBlock, "parallel_wavegan.layers.residual_block.WaveNetResidualBlock"),
    (AllenNLPBlock, "allennlp.modules.seq2seq_encoders.gated_cnn_encoder.ResidualBlock"),
    (FConvEncoder, "fairseq.models.fconv.FConvEncoder"),
    (FConvDecoder, "fairseq.models.fconv.FConvDecoder"),
):
    _cls.__module__, _cls.__qualname__ = _name.rsplit(".", 1)
    _cls.__name__ = _cls.__qualname__
