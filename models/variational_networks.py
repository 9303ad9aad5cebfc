"""The networks of the variational models: for images those of the article, for sequences of gated convolutions.

A trunk turns x into features [B, F], a generator z [B, Z] into x; `JointCritic` is what ALI needs besides.

Images [B, C, H, W], after the code of https://kexue.fm/archives/5716, which is for 3 x 64 x 64 with width 64 and 4
layers: convolutions of 5 x 5 taps and stride 2, widths doubling downwards, leaky ReLU (0.2), batch normalisation from
the second on; the generator is a linear map to the smallest size, then transposed convolutions with batch normalisation
and ReLU. Padding is TensorFlow's SAME (the larger half after), so sizes n become ceil(n / 2), and any size will do.

Sequences [B, L, C], for example the rows of an image, or embedded words: `GatedConv1d` with highways and growing
dilations between linear maps, and `AttentionPool` with several heads over the positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels import AttentionPool, GatedConv1d

KERNEL, STRIDE, SLOPE = 5, 2, 0.2
HEADS = 8
OUTPUTS = ("tanh", "none")


def _halved(size: int) -> int:
    return (size + 1) // 2


def _padding(size: int) -> tuple[int, int]:
    """Before and after, of a dimension of that size."""
    total = (_halved(size) - 1) * STRIDE + KERNEL - size
    return total // 2, total - total // 2


def check_input(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    """t is to be [B, *shape], floating."""
    if t.dim() != len(shape) + 1 or tuple(t.shape[1:]) != shape:
        raise ValueError(f"{name}: expected [B, {', '.join(map(str, shape))}], got {list(t.shape)}")
    if not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {t.dtype}")


def _check_output(output: str) -> None:
    if output not in OUTPUTS:
        raise ValueError(f"output: expected one of {', '.join(OUTPUTS)}, got {output!r}")


# --- images ---


class HalvingConv2d(nn.Conv2d):
    """5 x 5, stride 2: [B, C_in, H, W] -> [B, C_out, ceil(H / 2), ceil(W / 2)]."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool) -> None:
        super().__init__(in_channels, out_channels, KERNEL, STRIDE, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (*_padding(x.shape[-1]), *_padding(x.shape[-2]))))


class DoublingConv2d(nn.ConvTranspose2d):
    """The transpose of `HalvingConv2d`: [B, C_in, ceil(H / 2), ceil(W / 2)] -> [B, C_out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, size: tuple[int, int], *, bias: bool) -> None:
        (top, _), (left, _) = map(_padding, size)
        super().__init__(in_channels, out_channels, KERNEL, STRIDE, padding=(top, left), bias=bias)
        self.size = size

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        # What lies before is cut by `padding`, what lies after here.
        return super().forward(x)[..., : self.size[0], : self.size[1]]


def _sizes(shape: tuple[int, ...], layers: int) -> list[tuple[int, int]]:
    """Heights and widths from the image down."""
    sizes = [(shape[1], shape[2])]
    for _ in range(layers):
        sizes.append((_halved(sizes[-1][0]), _halved(sizes[-1][1])))
    return sizes


class ImageTrunk(nn.Sequential):
    """[B, C, H, W] -> [B, features]."""

    def __init__(self, shape: tuple[int, int, int], width: int, layers: int, *, batch_norm: bool = True) -> None:
        channels = [shape[0], *(width << i for i in range(layers))]
        modules: list[nn.Module] = []
        for i in range(layers):
            modules.append(HalvingConv2d(channels[i], channels[i + 1], bias=i == 0))
            modules += [nn.BatchNorm2d(channels[i + 1])] if batch_norm and i else []
            modules.append(nn.LeakyReLU(SLOPE))
        super().__init__(*modules, nn.Flatten())
        height, across = _sizes(shape, layers)[-1]
        self.shape, self.features = shape, channels[-1] * height * across
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_input("x", x, self.shape)
        return super().forward(x)


class ImageGenerator(nn.Sequential):
    """[B, Z] -> [B, C, H, W], through tanh or as it is (logits, means)."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent: int,
        width: int,
        layers: int,
        *,
        batch_norm: bool = True,
        output: str = "tanh",
    ) -> None:
        _check_output(output)
        channels, sizes = [shape[0], *(width << i for i in range(layers))], _sizes(shape, layers)
        smallest = (channels[-1], *sizes[-1])
        features = smallest[0] * smallest[1] * smallest[2]
        modules: list[nn.Module] = [nn.Linear(latent, features, bias=False)]
        modules += [nn.BatchNorm1d(features)] if batch_norm else []
        modules += [nn.ReLU(), nn.Unflatten(1, smallest)]
        for i in reversed(range(layers)):
            modules.append(DoublingConv2d(channels[i + 1], channels[i], sizes[i], bias=i == 0))
            if i:
                modules += [nn.BatchNorm2d(channels[i])] if batch_norm else []
                modules.append(nn.ReLU())
        super().__init__(*modules, *([nn.Tanh()] if output == "tanh" else []))
        self.latent = latent
        for module in self:
            if isinstance(module, nn.Linear | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, z: Tensor) -> Tensor:
        check_input("z", z, (self.latent,))
        return super().forward(z)


# --- sequences ---


def _gated_stack(width: int, dilations: list[int], backend: str | None) -> nn.Sequential:
    return nn.Sequential(*(GatedConv1d(width, width, 3, dilation=d, backend=backend) for d in dilations))


class SequenceTrunk(nn.Module):
    """[B, L, C] -> [B, features]: positions are learned, as large as the embedding; dilations 1, 2, 4, ..."""

    def __init__(self, shape: tuple[int, int], width: int, layers: int, *, backend: str | None = None) -> None:
        super().__init__()
        self.shape, self.features = shape, HEADS * width
        self.embedding = nn.Linear(shape[1], width)
        self.positions = nn.Parameter(torch.randn(shape[0], width))
        self.blocks = _gated_stack(width, [1 << i for i in range(layers)], backend)
        self.pool = AttentionPool(width, width, HEADS, backend=backend)
        nn.init.normal_(self.pool.query)  # heads that begin near the mean of all positions are slow to part

    def forward(self, x: Tensor) -> Tensor:
        check_input("x", x, self.shape)
        h = self.embedding(x)
        return self.pool(self.blocks(h + self.positions.to(h.dtype))).flatten(1)


class SequenceGenerator(nn.Module):
    """[B, Z] -> [B, L, C], through tanh or as it is: dilations ..., 4, 2, 1."""

    def __init__(
        self,
        shape: tuple[int, int],
        latent: int,
        width: int,
        layers: int,
        *,
        output: str = "tanh",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _check_output(output)
        self.latent, self.output = latent, output
        self.first = nn.Sequential(nn.Linear(latent, shape[0] * width), nn.ReLU(), nn.Unflatten(1, (shape[0], width)))
        self.blocks = _gated_stack(width, [1 << i for i in reversed(range(layers))], backend)
        self.last = nn.Linear(width, shape[1])

    def forward(self, z: Tensor) -> Tensor:
        check_input("z", z, (self.latent,))
        x = self.last(self.blocks(self.first(z)))
        return x.tanh() if self.output == "tanh" else x


# --- critics of z, and of x and z ---


def latent_critic(latent: int, hidden: int) -> nn.Sequential:
    """[B, Z] -> [B, 1]"""
    between = [nn.LeakyReLU(SLOPE), nn.Linear(hidden, hidden), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(nn.Linear(latent, hidden), *between, nn.Linear(hidden, 1))


class JointCritic(nn.Module):
    """(x, z) -> [B, 1]: a hidden layer over the features of x and z itself."""

    def __init__(self, trunk: ImageTrunk | SequenceTrunk, latent: int, hidden: int) -> None:
        super().__init__()
        self.trunk, self.latent = trunk, latent
        self.head = latent_critic(trunk.features + latent, hidden)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        check_input("z", z, (self.latent,))
        if len(x) != len(z):
            raise ValueError(f"z: expected {len(x)} rows, as x has, got {len(z)}")
        features = self.trunk(x)
        return self.head(torch.cat([features, z.to(features.dtype)], -1))
