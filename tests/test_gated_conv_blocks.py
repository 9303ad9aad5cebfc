"""gated_conv1d inside public building blocks: the block in plain PyTorch, and the same with its gated convolution
replaced, give equal outputs and gradients from the same weights. The blocks are written from their formulas."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels import GatedConv1d, gated_conv1d

B, T = 2, 40


class WaveNetBlock(nn.Module):
    """A vocoder's residual block, channels first: tanh of the first half, sigmoid of the second, local conditioning."""

    def __init__(self, dilation: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.dilation, self.causal = dilation, causal
        self.conv = nn.Conv1d(16, 32, 3, dilation=dilation, padding=dilation * (2 if causal else 1))
        self.cond = nn.Conv1d(10, 32, 1, bias=False)
        self.out, self.skip = nn.Conv1d(16, 16, 1), nn.Conv1d(16, 8, 1)

    def gated(self, x: Tensor, c: Tensor) -> Tensor:
        a, b = (self.conv(x)[..., : x.shape[-1]] + c).chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.gated(x, self.cond(c))
        return torch.cat([(self.out(h) + x) * math.sqrt(0.5), self.skip(h)], 1)


class WaveNetBlockOurs(WaveNetBlock):
    split = "value_gate"

    def gated(self, x: Tensor, c: Tensor) -> Tensor:
        y = gated_conv1d(
            x.transpose(1, 2), self.conv.weight, self.conv.bias, dilation=self.dilation, residual="none",
            value_act="tanh", padding="causal" if self.causal else "same", cond=c.transpose(1, 2), split=self.split,
        )  # fmt: skip
        return y.transpose(1, 2)


class DiffusionBlock(WaveNetBlock):
    """The same with the gate in the first half, as two diffusion vocoders store it; the step's embedding joins x."""

    def gated(self, x: Tensor, c: Tensor) -> Tensor:
        a, b = (self.conv(x)[..., : x.shape[-1]] + c).chunk(2, 1)
        return torch.sigmoid(a) * torch.tanh(b)


class DiffusionBlockOurs(WaveNetBlockOurs):
    split = "gate_value"


class Flow(nn.Module):
    """The text-to-speech flow's stack: one condition a layer for all rows, a mask after every residual."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(12, 24, 5, padding=2) for _ in range(3))
        self.res = nn.ModuleList(nn.Conv1d(12, 24, 1) for _ in range(3))
        self.cond = nn.Conv1d(7, 72, 1)

    def gated(self, i: int, x: Tensor, g: Tensor, mask: Tensor) -> Tensor:
        a, b = (self.layers[i](x) + g).chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)

    def forward(self, x: Tensor, speaker: Tensor, mask: Tensor) -> Tensor:
        x, output = x * mask, torch.zeros_like(x)
        g = self.cond(speaker)
        for i in range(3):
            residual, skip = self.res[i](self.gated(i, x, g[:, 24 * i : 24 * i + 24], mask)).chunk(2, 1)
            x, output = (x + residual) * mask, output + skip
        return output * mask


class FlowOurs(Flow):
    def gated(self, i: int, x: Tensor, g: Tensor, mask: Tensor) -> Tensor:
        conv, lengths = self.layers[i], mask.sum((1, 2)).long()
        y = gated_conv1d(
            x.transpose(1, 2), conv.weight, conv.bias, residual="none", value_act="tanh", cond=g.transpose(1, 2),
            lengths=lengths,
        )  # fmt: skip
        return y.transpose(1, 2)


class ForecastBlock(nn.Module):
    """A forecaster's causal block: two convolutions with an even kernel and no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = (nn.Conv1d(24, 24, 2, dilation=8) for _ in range(2))
        self.out = nn.Conv1d(24, 24, 1)

    def gated(self, x: Tensor) -> Tensor:
        return torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x))

    def forward(self, x: Tensor) -> Tensor:
        h = self.gated(x)
        return self.out(h) + x[..., -h.shape[-1] :]


class ForecastBlockOurs(ForecastBlock):
    def gated(self, x: Tensor) -> Tensor:
        weights = {"gate_weight": self.gate.weight, "gate_bias": self.gate.bias}
        options = {"dilation": 8, "padding": "valid", "residual": "none", "value_act": "tanh"}
        return gated_conv1d(x.transpose(1, 2), self.value.weight, self.value.bias, **weights, **options).transpose(1, 2)


class TimeFirstGlu(nn.Module):
    """The convolutional translator's layer, tensors [T, B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(20, 40, 3, padding=1)

    def gated(self, x: Tensor) -> Tensor:
        return F.glu(self.conv(x.permute(1, 2, 0)), 1).permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.gated(x) + x) * math.sqrt(0.5)


class TimeFirstGluOurs(TimeFirstGlu):
    def gated(self, x: Tensor) -> Tensor:
        return gated_conv1d(x.transpose(0, 1), self.conv.weight, self.conv.bias, residual="none").transpose(0, 1)


class ConformerGlu(nn.Module):
    """The speech encoder's pointwise gate, K = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(18, 36, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.conv(x.transpose(1, 2)), 1).transpose(1, 2)


class ConformerGluOurs(ConformerGlu):
    def forward(self, x: Tensor) -> Tensor:
        return gated_conv1d(x, self.conv.weight, self.conv.bias, residual="none")


class DilatedReader(nn.Module):
    """Stacked gated dilated convolutions with highway residuals over a padded batch (also known as DGCNN)."""

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(d) for d in (1, 2, 4, 1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            if isinstance(layer, GatedConv1d):
                x = layer(x, mask=mask)
            else:
                x = x.masked_fill(~mask.unsqueeze(-1), 0)
                value, z = layer(x.transpose(1, 2)).transpose(1, 2).chunk(2, -1)
                g = torch.sigmoid(z)
                x = (x * (1 - g) + value * g) * mask.unsqueeze(-1)
        return x


def mask_of(lengths: list[int]) -> Tensor:
    return torch.arange(T) < torch.tensor(lengths).unsqueeze(-1)


def reader(ours: bool) -> nn.Module:
    if ours:
        return DilatedReader(lambda d: GatedConv1d(16, 16, 3, dilation=d))
    return DilatedReader(lambda d: nn.Conv1d(16, 32, 3, dilation=d, padding=d))


# plain block, ours, arguments
BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "wavenet": (WaveNetBlock, WaveNetBlockOurs, lambda: (torch.randn(B, 16, T), torch.randn(B, 10, T))),
    "wavenet causal": (
        lambda: WaveNetBlock(causal=True),
        lambda: WaveNetBlockOurs(causal=True),
        lambda: (torch.randn(B, 16, T), torch.randn(B, 10, T)),
    ),
    "diffusion": (DiffusionBlock, DiffusionBlockOurs, lambda: (torch.randn(B, 16, T), torch.randn(B, 10, T))),
    "flow": (
        Flow,
        FlowOurs,
        lambda: (torch.randn(B, 12, T), torch.randn(B, 7, 1), mask_of([T, 23]).unsqueeze(1).float()),
    ),
    "forecast": (ForecastBlock, ForecastBlockOurs, lambda: (torch.randn(B, 24, T),)),
    "time first": (TimeFirstGlu, TimeFirstGluOurs, lambda: (torch.randn(T, B, 20),)),
    "conformer": (ConformerGlu, ConformerGluOurs, lambda: (torch.randn(B, T, 18),)),
    "reader": (lambda: reader(False), lambda: reader(True), lambda: (torch.randn(B, T, 16), mask_of([31, T]))),
}


def results(module: nn.Module, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    first = arguments[0].clone().requires_grad_()
    y = module(first, *arguments[1:])
    grads = torch.autograd.grad(y.square().mean(), [first, *module.parameters()])
    return [y.detach(), *grads]


def assert_results_close(plain: nn.Module, ours: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """In float32, by the error of plain PyTorch against float64."""
    exact = results(copy.deepcopy(plain).double(), tuple(a.double() if a.is_floating_point() else a for a in arguments))
    same, got = results(plain, arguments), results(ours, arguments)
    for i, (e, s, g) in enumerate(zip(exact, same, got, strict=True)):
        floor = 8 * torch.finfo(torch.float32).eps * e.abs().max()
        assert (g - e).abs().max() <= (2 if i == 0 else 3) * (s - e).abs().max() + floor, i


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_with_our_operator(name: str) -> None:
    """Acceptance 3: both gate orders, every layout, outputs and gradients; and state dicts go both ways."""
    plain_of, ours_of, arguments_of = BLOCKS[name]
    torch.manual_seed(1)
    plain, ours, arguments = plain_of(), ours_of(), arguments_of()
    assert ours.state_dict().keys() == plain.state_dict().keys()
    ours.load_state_dict(plain.state_dict())
    assert_results_close(plain, ours, arguments)
    back = plain_of()
    back.load_state_dict(ours.state_dict())
    assert torch.equal(back(*arguments), plain(*arguments))


@pytest.mark.parametrize(("plain", "ours"), [(WaveNetBlock, DiffusionBlockOurs), (DiffusionBlock, WaveNetBlockOurs)])
def test_the_other_gate_order_fails(plain: type[nn.Module], ours: type[nn.Module]) -> None:
    """Acceptance 3: exchanging the order of value and gate is noticed."""
    torch.manual_seed(1)
    a, b = plain(), ours()
    b.load_state_dict(a.state_dict())
    with pytest.raises(AssertionError):
        assert_results_close(a, b, (torch.randn(B, 16, T), torch.randn(B, 10, T)))
