"""Layers of other packages that `fuse` serves: from the package, or written anew where there is none to install."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

NORMS: dict[str, Callable[..., nn.Module]] = {
    "plain": lambda m, name="weight": m,
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


def transformers_vits(p: float = 0.0, speakers: int = 6, norm: str = "parametrized") -> nn.Module:
    vits = pytest.importorskip("transformers.models.vits.modeling_vits", reason="transformers is not installed")
    config = vits.VitsConfig(
        hidden_size=24, speaker_embedding_size=speakers, wavenet_dilation_rate=2, wavenet_dropout=p
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils.parametrizations, "weight_norm", NORMS[norm])
        return vits.VitsWaveNet(config, 3)


def gluonts_layer(dilation: int = 4, dense: bool = True) -> nn.Module:
    # Its own imports ask for lightning.
    pytest.importorskip("lightning", reason="gluonts needs lightning, which is not installed")
    module = pytest.importorskip("gluonts.torch.model.wavenet.module", reason="gluonts is not installed")
    return module.CausalDilatedResidualLayer(
        num_residual_channels=24, num_skip_channels=10, dilation=dilation, kernel_size=2, return_dense_output=dense
    )


def parallel_wavegan_block(**options: Any) -> nn.Module:
    pytest.importorskip("parallel_wavegan", reason="parallel_wavegan is not installed")
    windows = pytest.importorskip("scipy.signal.windows", reason="parallel_wavegan needs scipy")
    with pytest.MonkeyPatch.context() as patch:  # it imports a name that scipy has moved
        patch.setattr("scipy.signal.kaiser", windows.kaiser, raising=False)
        module = pytest.importorskip("parallel_wavegan.layers.residual_block")
    sizes = {"residual_channels": 16, "gate_channels": 32, "skip_channels": 12, "aux_channels": 5, "dilation": 3}
    return module.WaveNetResidualBlock(**(sizes | options))


def torchmil_pool(**options: Any) -> nn.Module:
    module = pytest.importorskip("torchmil.nn.attention.attention_pool", reason="torchmil is not installed")
    return module.AttentionPool(**({"in_dim": 20, "att_dim": 12} | options))


@dataclass(frozen=True)
class Case:
    """A layer and its arguments by a function that draws; operators: calls of ours in one forward."""

    make: Callable[[], nn.Module]
    inputs: Callable[[Callable[..., Tensor], int, int], tuple[Any, ...]]
    operator: str
    calls: int


def _mask(draw: Callable[..., Tensor], batch: int, length: int) -> Tensor:
    live = torch.arange(length) < length - torch.arange(batch).unsqueeze(1)
    return (draw(1) * 0 + 1) * live.unsqueeze(1)


def _vits(draw: Callable[..., Tensor], batch: int, length: int) -> tuple[Any, ...]:
    return draw(batch, 24, length), _mask(draw, batch, length), draw(batch, 6, 1)


def _diffwave(draw: Callable[..., Tensor], batch: int, length: int) -> tuple[Any, ...]:
    return draw(batch, 16, length), draw(batch, 8), draw(batch, 5, length)


def _diffsinger(draw: Callable[..., Tensor], batch: int, length: int) -> tuple[Any, ...]:
    x, step, cond = _diffwave(draw, batch, length)
    return x, cond, step


def _parallel(draw: Callable[..., Tensor], batch: int, length: int) -> tuple[Any, ...]:
    return draw(batch, 16, length), draw(batch, 5, length)


def _bags(draw: Callable[..., Tensor], batch: int, length: int) -> tuple[Any, ...]:
    return draw(batch, length, 20), _mask(draw, batch, length).squeeze(1)


def _alone(draw: Callable[..., Tensor], batch: int, length: int) -> tuple[Any, ...]:
    return (draw(batch, 24, length),)


CONV, POOL = "gated_conv1d", "attention_pool"
CASES: dict[str, Case] = {
    "transformers, plain": Case(lambda: transformers_vits(norm="plain"), _vits, CONV, 3),
    "transformers, weight_norm": Case(lambda: transformers_vits(norm="weight_norm"), _vits, CONV, 3),
    "transformers, parametrized": Case(transformers_vits, _vits, CONV, 3),
    "transformers, no speakers": Case(
        lambda: transformers_vits(speakers=0), lambda *args: _vits(*args)[:2], CONV, 3
    ),
    "VITS, weight_norm": Case(lambda: VitsBlock(24, 5, 1, 4, 6, 0.0, NORMS["weight_norm"]), _vits, CONV, 4),
    "VITS, plain": Case(lambda: VitsBlock(24, 3, 3, 2, 6, 0.0, NORMS["plain"]), _vits, CONV, 2),
    "GluonTS": Case(gluonts_layer, _alone, CONV, 1),
    "GluonTS, last": Case(lambda: gluonts_layer(1, False), _alone, CONV, 1),
    "Parallel WaveGAN": Case(parallel_wavegan_block, _parallel, CONV, 1),
    "Parallel WaveGAN, causal": Case(
        lambda: parallel_wavegan_block(use_causal_conv=True, kernel_size=2), _parallel, CONV, 1
    ),
    "Parallel WaveGAN, no bias, no conditioning": Case(
        lambda: parallel_wavegan_block(aux_channels=0, bias=False),
        lambda *args: (_parallel(*args)[0], None), CONV, 1,
    ),  # fmt: skip
    "DiffWave": Case(lambda: DiffWaveBlock(16, 2, 8, 5, NORMS["plain"]), _diffwave, CONV, 1),
    "DiffWave, unconditional": Case(
        lambda: DiffWaveBlock(16, 2, 8, 0, NORMS["plain"]), lambda *args: _diffwave(*args)[:2], CONV, 1
    ),
    "DiffSinger": Case(lambda: DiffSingerBlock(16, 4, 8, 5, NORMS["parametrized"]), _diffsinger, CONV, 1),
    "torchmil": Case(torchmil_pool, _bags, POOL, 1),
    "torchmil, gated": Case(lambda: torchmil_pool(gated=True), _bags, POOL, 1),
    "torchmil, relu": Case(lambda: torchmil_pool(act="relu"), lambda *args: _bags(*args)[:1], POOL, 1),
    "torchmil, gelu, gated": Case(lambda: torchmil_pool(act="gelu", gated=True), _bags, POOL, 1),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same layer each time: one under weight norm cannot be copied."""
    torch.manual_seed(11)
    layer = CASES[name].make().to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.to(torch.bfloat16))  # so that every dtype holds the same
    return layer


def inputs(name: str, dtype: torch.dtype, batch: int = 3, length: int = 23) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(12)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype)

    return CASES[name].inputs(draw, batch, length)


def results(layer: nn.Module, args: tuple[Any, ...], **options: Any) -> dict[str, Tensor]:
    """Outputs, and gradients of parameters and of the first argument."""
    x = args[0].detach().clone().requires_grad_()
    layer.zero_grad()
    made = layer(x, *args[1:], **options)
    outputs = made if isinstance(made, tuple) else (made,)
    trained = [t for t in outputs if t.requires_grad]
    torch.autograd.backward(trained, [torch.linspace(-1, 2, t.numel()).view(t.shape).bfloat16().to(t) for t in trained])
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)} | {"dx": x.grad}
    return found | {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
