"""One step of ChildTuning's optimizers on lists of tensors (Xu et al. 2021, arXiv 2109.05687): the definition.

Gradients g are scaled, clipped and masked; AdamW and SGD follow.

    F      m ~ Bernoulli(p), drawn anew in each step (random_bits.py: element = flat index in the whole parameter,
           stream = the parameter's number, step = the number of its step from 1);  g <- g m / p, or with
           where="update" d <- d m / p
    D      M, fixed bits;  g <- g M and for AdamW d <- d M, or with where="update" d <- d M
    AdamW  a = b1 a + (1 - b1) g     v = b2 v + (1 - b2) g^2     c1 = 1 - b1^t     c2 = 1 - b2^t
           "torch"  w <- (1 - lr wd) w,  then w <- w - d,  d = lr / c1 a / (sqrt(v) / sqrt(c2) + eps)
           "hf"     w <- w - d,  d = lr sqrt(c2) / c1 a / (sqrt(v) + eps),  then w <- w - lr wd w
    SGD    g <- g + wd w     b = momentum b + (1 - dampening) g, in the first step g     d = lr b, with nesterov
           lr (g + momentum b);  w <- w - d

A mask is packed: uint8, bit i % 8 of byte i // 8 is element i. Moments may be compact: those of the elements that the
mask selects, one after the other. A shard is described by rows (start, length, stride), each for an equal part of its
elements: element j of a part has the index start + j // length * stride + j % length in the whole parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _extension, _triton
from .random_bits import draws16_at, keep_threshold

# Arguments in the order of csrc/ops.cpp.
_LISTS = "Tensor?[] masks, Tensor?[] runs, int[] streams"
_SHARED = "Tensor? grad_scale, Tensor? found_inf, Tensor? square_sum, Tensor lr, Tensor weight_decay"
_triton_adamw_ = _triton.operator(
    "_child_adamw_triton_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    f"Tensor(d!)[] steps, {_LISTS}, {_SHARED}, float beta1, float beta2, float eps, float? reserve_p, "
    "float max_grad_norm, int seed, str where, str decay, str order, bool correct_bias, bool maximize, "
    "bool stochastic_rounding) -> ()",
    "child_update",
    "adamw_",
)
_triton_sgd_ = _triton.operator(
    "_child_sgd_triton_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] steps, "
    f"{_LISTS}, {_SHARED}, float momentum, float dampening, bool nesterov, float? reserve_p, float max_grad_norm, "
    "int seed, str where, str decay, bool maximize, bool stochastic_rounding) -> ()",
    "child_update",
    "sgd_",
)
_triton_square_sum = _triton.operator(
    "_child_square_sum_triton(Tensor[] grads) -> Tensor", "child_update", "square_sum"
)
_SUFFIXES = ["_triton"]

if _extension._C is not None:
    _adamw_ = torch.ops.pykernels._child_adamw_.default
    _sgd_ = torch.ops.pykernels._child_sgd_.default
    _square_sum = torch.ops.pykernels._child_square_sum.default
    _SUFFIXES += [""]


def _square_sum_fake(grads: Sequence[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float64)


def _update_fake(*arguments: Any) -> None:
    return None


for _suffix in _SUFFIXES:
    torch.library.register_fake(f"pykernels::_child_square_sum{_suffix}", _square_sum_fake)
    torch.library.register_fake(f"pykernels::_child_adamw{_suffix}_", _update_fake)
    torch.library.register_fake(f"pykernels::_child_sgd{_suffix}_", _update_fake)


Tensors = Sequence[Tensor]
Masks = Sequence[Tensor | None]
PIECE = 1 << 20  # elements whose bits are drawn at a time


# --- masks ---


def pack_mask(mask: Tensor) -> Tensor:
    """A bool mask of any shape as uint8 [ceil(n / 8)], in the order of the flat index."""
    bits = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """uint8 [ceil(n / 8)] -> bool of that shape."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.view(-1)[: math.prod(shape)].view(*shape).to(torch.bool)


def compress(dense: Tensor, packed: Tensor) -> Tensor:
    """The elements that the mask selects, 1-d."""
    return dense.reshape(-1)[unpack_mask(packed, [dense.numel()])]


def expand(compact: Tensor, packed: Tensor, shape: Sequence[int]) -> Tensor:
    """`compact` where the mask selects, zeros elsewhere."""
    mask = unpack_mask(packed, shape)
    return torch.zeros(mask.shape, dtype=compact.dtype, device=compact.device).masked_scatter_(mask, compact)


def elements(numel: int, runs: Tensor | None, first: int, last: int, device: torch.device) -> Tensor:
    """Indices in the whole parameter of elements [first, last) of a shard of numel, int64."""
    local = torch.arange(first, last, device=device)
    if runs is None:
        return local
    part = numel // runs.shape[0]
    start, length, stride = runs.to(device)[local // part].unbind(-1)
    local = local % part
    return start + local // length * stride + local % length


def drawn(p: Tensor, runs: Tensor | None, seed: int, stream: int, step: int) -> Tensor:
    """The 16-bit draws of a parameter's elements, int32 of its shape."""
    key = torch.tensor(seed if seed < 2**63 else seed - 2**64)
    pieces = [
        draws16_at(key, elements(p.numel(), runs, i, min(i + PIECE, p.numel()), p.device), stream, step)
        for i in range(0, p.numel(), PIECE)
    ]
    return torch.cat(pieces).view(p.shape) if pieces else torch.empty(p.shape, dtype=torch.int32, device=p.device)


def round_stochastically(exact: Tensor, draws: Tensor) -> Tensor:
    """float32 to bfloat16: up with the probability of the remainder. NaN and infinity stay."""
    rounded = (exact.view(torch.int32) + draws) >> 16 << 16
    return torch.where(exact.isfinite(), rounded.view(torch.float32), exact).to(torch.bfloat16)


# --- the definition ---


def grad_factor(grad_scale: Any, square_sum: Any, max_grad_norm: float, maximize: bool) -> float:
    """What gradients are multiplied with before they are masked."""
    factor = -1.0 if maximize else 1.0
    if grad_scale is not None:
        factor /= float(grad_scale)
    if square_sum is not None:
        clip = max_grad_norm / (math.sqrt(float(square_sum)) * abs(factor) + 1e-6)
        factor *= clip if clip < 1 or math.isnan(clip) else 1.0
    return factor


def _masks(
    p: Tensor, mask: Tensor | None, runs: Tensor | None, stream: int, t: int, reserve_p: float | None, seed: int
) -> tuple[Tensor | None, float]:
    """Which elements are selected, None for all; and what keeps the mean of drawn masks."""
    if reserve_p is None:
        return (None if mask is None else unpack_mask(mask, p.shape)), 1.0
    threshold = keep_threshold(reserve_p)
    scale = torch.tensor(65536 / threshold, dtype=torch.float32).item()
    return drawn(p, runs, seed, stream, t) < threshold, scale


class _Step:
    """What AdamW and SGD have in common, for one parameter: the masked gradient, and the masked update."""

    def __init__(self, p: Tensor, g: Tensor, mask: Tensor | None, i: int, common: dict[str, Any], t: int) -> None:
        self.p, self.stored, self.common, self.t = p, mask, common, t
        self.runs, self.stream = common["runs"][i], common["streams"][i]
        selected, scale = _masks(p, mask, self.runs, self.stream, t, common["reserve_p"], common["seed"])
        drawn_grad = common["reserve_p"] is None or common["where"] == "grad"
        drawn_update = common["stored_masks_update"] if common["reserve_p"] is None else common["where"] == "update"
        self.selects_grad = selected if drawn_grad else None
        self.selects_update = selected if drawn_update else None
        self.update_scale = scale if drawn_update else 1.0
        self.decays = selected if common["decay"] == "reserved" else None
        self.type = torch.float64 if p.dtype == torch.float64 else torch.float32
        self.w = p.to(self.type)
        self.g = self.select(g.to(self.type) * (common["factor"] * (scale if drawn_grad else 1.0)), self.selects_grad)

    @staticmethod
    def select(t: Tensor, selected: Tensor | None) -> Tensor:
        return t if selected is None else torch.where(selected, t, torch.zeros_like(t))

    def moment(self, m: Tensor) -> Tensor:
        if m.shape != self.p.shape and self.stored is not None:
            return expand(m, self.stored, self.p.shape)
        return m.view(self.p.shape)

    def keep(self, m: Tensor, dense: Tensor) -> None:
        compact = m.shape != self.p.shape and self.stored is not None
        m.copy_(compress(dense, self.stored) if compact and self.stored is not None else dense.view(m.shape))

    def finish(self, w: Tensor, d: Tensor, after: float = 0.0) -> None:
        w = w - self.select(d * self.update_scale, self.selects_update)
        if after:
            w = w - self.select(after * w, self.decays)
        if self.common["stochastic_rounding"]:
            draws = drawn(self.p, self.runs, self.common["seed"], self.stream | 1 << 31, self.t)
            w = round_stochastically(w, draws)
        self.p.copy_(w)


def adamw_ref_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    masks: Masks,
    runs: Masks,
    streams: Sequence[int],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    square_sum: Tensor | None,
    lr: Tensor,
    weight_decay: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    reserve_p: float | None,
    max_grad_norm: float,
    seed: int,
    where: str,
    decay: str,
    order: str,
    correct_bias: bool,
    maximize: bool,
    stochastic_rounding: bool,
) -> None:
    """The step of AdamW, in the operations of PyTorch."""
    if found_inf is not None and float(found_inf):
        return
    common = {
        "runs": runs, "streams": streams, "reserve_p": reserve_p, "seed": seed, "where": where, "decay": decay,
        "stochastic_rounding": stochastic_rounding, "stored_masks_update": True,
        "factor": grad_factor(grad_scale, square_sum, max_grad_norm, maximize),
    }  # fmt: skip
    rate, shrink = float(lr), float(lr) * float(weight_decay)
    for i, (p, step) in enumerate(zip(params, steps, strict=True)):
        step += 1
        t = int(step)
        correction1 = 1 - beta1**t if correct_bias else 1.0
        root2 = math.sqrt(1 - beta2**t) if correct_bias else 1.0
        s = _Step(p, grads[i], masks[i], i, common, t)
        first = s.moment(exp_avgs[i]) * beta1 + (1 - beta1) * s.g
        second = s.moment(exp_avg_sqs[i]) * beta2 + (1 - beta2) * (s.g * s.g)
        s.keep(exp_avgs[i], first)
        s.keep(exp_avg_sqs[i], second)
        if order == "torch":
            w = s.w * (1 - shrink)
            w = w if s.decays is None else torch.where(s.decays, w, s.w)
            s.finish(w, rate / correction1 * first / (second.sqrt() / root2 + eps))
        else:
            s.finish(s.w, rate * root2 / correction1 * first / (second.sqrt() + eps), shrink)


def sgd_ref_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors,
    steps: Tensors,
    masks: Masks,
    runs: Masks,
    streams: Sequence[int],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    square_sum: Tensor | None,
    lr: Tensor,
    weight_decay: Tensor,
    momentum: float,
    dampening: float,
    nesterov: bool,
    reserve_p: float | None,
    max_grad_norm: float,
    seed: int,
    where: str,
    decay: str,
    maximize: bool,
    stochastic_rounding: bool,
) -> None:
    """The step of SGD, in the operations of PyTorch."""
    if found_inf is not None and float(found_inf):
        return
    common = {
        "runs": runs, "streams": streams, "reserve_p": reserve_p, "seed": seed, "where": where, "decay": decay,
        "stochastic_rounding": stochastic_rounding, "stored_masks_update": where == "update",
        "factor": grad_factor(grad_scale, square_sum, max_grad_norm, maximize),
    }  # fmt: skip
    for i, (p, step) in enumerate(zip(params, steps, strict=True)):
        step += 1
        t = int(step)
        s = _Step(p, grads[i], masks[i], i, common, t)
        d = s.g + s.select(float(weight_decay) * s.w, s.decays) if float(weight_decay) else s.g
        if momentum:
            buffer = d if t == 1 else momentum * s.moment(momentum_buffers[i]) + (1 - dampening) * d
            s.keep(momentum_buffers[i], buffer)
            d = d + momentum * buffer if nesterov else buffer
        s.finish(s.w, float(lr) * d)


def square_sum_ref(grads: Tensors) -> Tensor:
    """The sum of all squares, 0-d float64."""
    return torch.stack([g.double().square().sum() for g in grads]).sum()


# --- backends ---


def adamw_of(backend: str) -> Callable[..., None]:
    """The step of AdamW on that backend."""
    return adamw_ref_ if backend == "reference" else _triton_adamw_ if backend == "triton" else _adamw_


def sgd_of(backend: str) -> Callable[..., None]:
    """The step of SGD on that backend."""
    return sgd_ref_ if backend == "reference" else _triton_sgd_ if backend == "triton" else _sgd_


def square_sum_of(backend: str) -> Callable[[Tensors], Tensor]:
    """The sum of all squares on that backend."""
    return square_sum_ref if backend == "reference" else _triton_square_sum if backend == "triton" else _square_sum
