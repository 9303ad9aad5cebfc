"""Layers of other packages that `fuse` serves, small: from the package, or those of fuse_blocks.py, written anew."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tests.fuse_blocks import (
    NORMS,
    AllenNLPBlock,
    DiffSingerBlock,
    DiffWaveBlock,
    FConvDecoder,
    FConvEncoder,
    ParallelWaveGANBlock,
    VitsBlock,
)


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
    pytest.importorskip("lightning", reason="gluonts needs lightning, which is not installed: pip install '.[peers]'")
    module = pytest.importorskip(
        "gluonts.torch.model.wavenet.module", reason="gluonts is not installed: pip install '.[peers]'"
    )
    return module.CausalDilatedResidualLayer(
        num_residual_channels=24, num_skip_channels=10, dilation=dilation, kernel_size=2, return_dense_output=dense
    )


def parallel_wavegan_block(**options: Any) -> nn.Module:
    """From the package where it is installed: much is installed with it."""
    sizes = {"residual_channels": 16, "gate_channels": 32, "skip_channels": 12, "aux_channels": 5, "dilation": 3}
    cls: Any = ParallelWaveGANBlock
    if importlib.util.find_spec("parallel_wavegan") is not None:
        windows = importlib.import_module("scipy.signal.windows")
        with pytest.MonkeyPatch.context() as patch:  # it imports a name that scipy has moved
            patch.setattr("scipy.signal.kaiser", windows.kaiser, raising=False)
            cls = importlib.import_module("parallel_wavegan.layers.residual_block").WaveNetResidualBlock
    return cls(**(sizes | options))


def torchmil_pool(**options: Any) -> nn.Module:
    module = pytest.importorskip(
        "torchmil.nn.attention.attention_pool", reason="torchmil is not installed: pip install '.[peers]'"
    )
    return module.AttentionPool(**({"in_dim": 20, "att_dim": 12} | options))


@dataclass(frozen=True)
class Case:
    """A layer and its arguments by a function that draws. calls: of ours, in one forward. called: layers
    inside that our forward calls as modules, and what is in them."""

    make: Callable[[], nn.Module]
    inputs: Callable[[Callable[..., Tensor], int, int], tuple[Any, ...]]
    operator: str
    calls: int
    called: tuple[str, ...] = ()


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


def _tokens(draw: Callable[..., Tensor], batch: int, length: int, pads: int) -> Tensor:
    """Of a vocabulary of 40 whose token 1 is padding: that many on the left, times the sequence's number."""
    tokens = 2 + (draw(batch, length).float().abs() * 9).long()
    return tokens.masked_fill(torch.arange(length) < pads * torch.arange(batch).unsqueeze(1), 1)


def _source(draw: Callable[..., Tensor], batch: int, length: int) -> tuple[Any, ...]:
    return _tokens(draw, batch, length, 2), None


def _target(draw: Callable[..., Tensor], batch: int, length: int) -> tuple[Any, ...]:
    padding = torch.arange(length + 4) < torch.arange(batch).unsqueeze(1)
    encoded = draw(batch, length + 4, 20), draw(batch, length + 4, 20)
    return _tokens(draw, batch, length, 0), {"encoder_out": encoded, "encoder_padding_mask": padding}


def fairseq_encoder(p: float = 0.0, norm: str = "weight_norm") -> nn.Module:
    return FConvEncoder(((24, 3, 1), (24, 4, 1), (16, 3, 2), (16, 1, 0), (16, 5, 1)), 20, p, NORMS[norm])


def fairseq_decoder(p: float = 0.0, norm: str = "weight_norm", attention: bool = True) -> nn.Module:
    attending = (attention, False, attention, False)
    return FConvDecoder(((24, 3, 1), (24, 2, 0), (16, 3, 1), (16, 1, 2)), 20, p, NORMS[norm], attending)


def allennlp_block(p: float = 0.0, direction: str = "forward", norm: str = "weight_norm", *layers: Any) -> nn.Module:
    return AllenNLPBlock(24, layers or ((4, 24),), direction, p, NORMS[norm])


CONV, POOL = "gated_conv1d", "attention_pool"
ENCODER = "embed_tokens", "embed_positions", "fc1", "fc2", "projections"
DECODER = *ENCODER, "fc3", "attention"
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
    "fairseq, encoder": Case(fairseq_encoder, _source, CONV, 5, ENCODER),
    "fairseq, encoder, parametrized": Case(lambda: fairseq_encoder(norm="parametrized"), _source, CONV, 5, ENCODER),
    "fairseq, decoder": Case(fairseq_decoder, _target, CONV, 4, DECODER),
    "fairseq, decoder, plain, no attention": Case(
        lambda: fairseq_decoder(norm="plain", attention=False), lambda *args: _source(*args)[:1], CONV, 4, DECODER
    ),
    "AllenNLP": Case(allennlp_block, _alone, CONV, 1),
    "AllenNLP, backward": Case(
        lambda: allennlp_block(0.0, "backward", "parametrized", (2, 24, 4)), _alone, CONV, 1
    ),
    "AllenNLP, backward, three convolutions": Case(
        lambda: allennlp_block(0.0, "backward", "plain", (1, 12), (5, 12), (1, 24)), _alone, CONV, 3
    ),
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
    """Outputs, and gradients of parameters and of all arguments that have some."""
    args = tree_map(lambda t: t.detach().clone().requires_grad_() if is_floating(t) else t, args)
    layer.zero_grad()
    outputs = [t for t in tree_leaves(layer(*args, **options)) if is_floating(t)]
    trained = [t for t in outputs if t.requires_grad]
    torch.autograd.backward(trained, [torch.linspace(-1, 2, t.numel()).view(t.shape).bfloat16().to(t) for t in trained])
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    given = [t for t in tree_leaves(args) if is_floating(t)]
    found |= {f"gradient of argument {i}": t.grad for i, t in enumerate(given) if t.grad is not None}
    return found | {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


def is_floating(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()
