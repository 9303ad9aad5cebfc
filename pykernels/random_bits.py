"""The random bits of every operator, in plain PyTorch: the specification that all kernels reproduce bit by bit.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011) is a function from a
counter of 128 bits and a key of 64 bits to 128 bits, so that any element's bits can be had without those before it:

    key      low and high 32 bits of the seed
    counter  low and high 32 bits of element // 8, stream, step
    result   four words; word w holds draw 2w in its low and draw 2w + 1 in its high 16 bits
    draw     number element % 8 of these eight

Activations of shape [..., n] have element = row * 8 * ceil(n / 8) + column, with the leading dimensions flattened to
rows, and stream = step = 0. Parameters have element = flat index in the whole tensor, however it is sharded.
32-bit words are held in int64 tensors throughout.
"""

import math

import torch
from torch import Tensor

from ._extension import _C

_WORD = 0xFFFFFFFF


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Philox with ten rounds. counter [..., 4] and key [..., 2] int64 words of 32 bits, broadcast -> [..., 4] int64."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # The 64-bit products may wrap to negative numbers; the mask after the shift removes the copies of the sign.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def _eight_draws(seed: Tensor, call: Tensor, stream: int, step: int) -> Tensor:
    """The draws of elements 8 * call ... 8 * call + 7. call [N] int64 -> [N, 8] int64."""
    key = torch.stack([seed & _WORD, seed >> 32 & _WORD]).to(call.device)
    constants = torch.full_like(call, stream), torch.full_like(call, step)
    counter = torch.stack([call & _WORD, call >> 32 & _WORD, *constants], -1)
    words = philox4x32_10(counter, key)
    return torch.stack([words & 0xFFFF, words >> 16], -1).flatten(-2)


def draws16(seed: Tensor, rows: int, n: int, stream: int = 0, step: int = 0) -> Tensor:
    """The 16-bit draws of activations. seed 0-d int64 -> [rows, n] int32 in 0 ... 65535, on the seed's device."""
    calls = -(-n // 8)
    draws = _eight_draws(seed, torch.arange(rows * calls, device=seed.device), stream, step)
    return draws.to(torch.int32).reshape(rows, 8 * calls)[:, :n]


def activation_draws(seed: Tensor, x: Tensor) -> Tensor:
    """draws16 of the elements of x, by the compiled kernel where there is one. x [..., n] -> the same shape, int32."""
    rows, n = x.shape[:-1].numel(), x.shape[-1]
    compiled = _C is not None and x.is_cpu and not (torch.compiler.is_exporting() or torch.jit.is_tracing())
    draws = torch.ops.pykernels._random_bits(seed, rows, n, 0, 0) if compiled else draws16(seed.to(x.device), rows, n)
    return draws.view(x.shape)


def draws16_at(seed: Tensor, element: Tensor, stream: int = 0, step: int = 0) -> Tensor:
    """The 16-bit draws of any elements. seed 0-d int64, element int64 of any shape -> the same shape, int32."""
    flat = element.reshape(-1)
    draws = _eight_draws(seed, flat // 8, stream, step).gather(-1, (flat % 8).unsqueeze(-1))
    return draws.to(torch.int32).reshape(element.shape)


def keep_threshold(keep_p: float) -> int:
    """An element is kept if and only if its draw is below this. ValueError where keep_p > 0 would keep nothing."""
    threshold = math.floor(keep_p * 65536 + 0.5)
    if threshold == 0 and keep_p > 0:
        raise ValueError(f"keep_p: expected 0 or at least 2**-17, got {keep_p}, which keeps fewer than one in 65536")
    return threshold


def dropout_factors(draws: Tensor, dropout: float) -> Tensor:
    """What dropout multiplies with: 0, or 65536 / threshold so that the mean is exactly 1. draws int -> float32."""
    keep, factor = kept(draws, dropout)
    return keep.to(torch.float32) * factor


def kept(draws: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """What dropout keeps, and the factor of that. draws int -> bool of the same shape, 0-d float32."""
    threshold = keep_threshold(1.0 - dropout)
    return draws < threshold, torch.full((), 65536 / max(1, threshold), dtype=torch.float32, device=draws.device)


def uniform_noise(draws: Tensor, amplitude: float) -> Tensor:
    """Uniform noise in (-amplitude, amplitude), symmetric about 0. draws int -> float32."""
    return ((2 * draws + 1).to(torch.float32) / 65536 - 1) * amplitude


def seed_tensor(seed: int | Tensor | None) -> Tensor:
    """The seed of a call, 0-d int64: the user's, or a draw from PyTorch's default generator."""
    if seed is None:
        if _C is not None:
            return torch.ops.pykernels._seed.default()
        return torch.empty((), dtype=torch.int64).random_(-(2**63), None)  # the same draw from the same generator
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(f"seed: expected an int or a 0-d int64 tensor, got {seed.dim()}-d {seed.dtype}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int | torch.SymInt):
        raise TypeError(f"seed: expected an int or a 0-d int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected 64 bits, got {seed}")
    return torch.tensor(seed if seed < 2**63 else seed - 2**64)
