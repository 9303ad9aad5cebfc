"""lora_linear_stacked: several adapted linear layers of one x, whose rows are read once.

y_i = x W_i^T + bias_i + scale_i * (dropout_i(x) A_i^T) B_i^T;        dx = the sum over i of lora_linear's
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend, _triton, random_bits
from ._autotune import measured
from ._checks import check_dropout, check_lora_linear, check_lora_linear_stacked, check_tensor
from ._extension import _C
from .lora_linear import exporting, fwd_fake, lora_linear_ref, no_vmap, refuse_forward_mode

_TENSOR_ARGUMENTS = "Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor?[] biases, Tensor? seed"
_triton_fwd = _triton.operator(
    f"_lora_linear_stacked_fwd_triton({_TENSOR_ARGUMENTS}, float[] scales, float dropout) -> Tensor[]",
    "lora_linear",
    "forward_stacked",
)
_triton_bwd = _triton.operator(
    f"_lora_linear_stacked_bwd_triton(Tensor?[] dys, {_TENSOR_ARGUMENTS}, Tensor[] saved, float[] scales, "
    "float dropout, bool[] needs) -> Tensor[]",
    "lora_linear_bwd",
    "backward_stacked",
)
_SUFFIXES = ["_triton"]

if _C is not None:
    _fwd = torch.ops.pykernels._lora_linear_stacked_fwd.default
    _bwd = torch.ops.pykernels._lora_linear_stacked_bwd.default
    _SUFFIXES += [""]


def _fwd_fake(
    x: Tensor, weights: Any, lora_a: Any, lora_b: Any, biases: Any, seed: Any, scales: Any, dropout: float,
    on_triton: bool = False,
) -> list[Tensor]:  # fmt: skip
    results: list[Tensor] = []
    for w, a, b, c, n in zip(weights, lora_a, lora_b, biases, scales, strict=True):
        results += fwd_fake(x, w, a, b, c, None, None, seed, n, dropout, on_triton=on_triton)
    return results


def _bwd_fake(dys: Any, x: Tensor, weights: Any, lora_a: Any, lora_b: Any, biases: Any, *rest: Any) -> list[Tensor]:
    needs = rest[-1]
    grads = [x.new_empty(x.shape if needs[0] else (0,))]
    for i, group in enumerate(zip(weights, lora_a, lora_b, biases, strict=True)):
        for needed, t in zip(needs[1 + 4 * i : 5 + 4 * i], group, strict=True):
            wanted = needed and t is not None and dys[i] is not None
            grads.append((x if t is None else t).new_empty(t.shape if wanted else (0,)))
    return grads


for _suffix in _SUFFIXES:
    _fake = functools.partial(_fwd_fake, on_triton=bool(_suffix))
    torch.library.register_fake(f"pykernels::_lora_linear_stacked_fwd{_suffix}", _fake)
    torch.library.register_fake(f"pykernels::_lora_linear_stacked_bwd{_suffix}", _bwd_fake)
    for _name in ("fwd", "bwd"):
        torch.library.register_vmap(f"pykernels::_lora_linear_stacked_{_name}{_suffix}", no_vmap)


class LoraLinearStackedFunction(torch.autograd.Function):
    """Several projections of one x. Arguments: whether Triton serves, seed, scales, dropout, x, then weight, lora_a,
    lora_b and bias of each."""

    @staticmethod
    def forward(
        on_triton: bool, seed: Tensor | None, scales: list[float], dropout: float, x: Tensor, *each: Any
    ) -> tuple[Tensor, ...]:
        fwd = _triton_fwd if on_triton else _fwd
        return tuple(fwd(x, *(list(each[i::4]) for i in range(4)), seed, scales, dropout))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.on_triton, seed, ctx.scales, ctx.dropout, *tensors = inputs
        saved = [t for i, t in enumerate(output) if i % 3]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed, *tensors, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        seed, x, *rest = ctx.saved_tensors
        count = len(ctx.scales)
        each, saved = rest[: 4 * count], rest[4 * count :]
        dys, needs = list(grads[::3]), ctx.needs_input_grad[4:]
        if all(dy is None for dy in dys):
            return (None,) * (4 + len(needs))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _differentiable_gradients(dys, x, each, seed, ctx.scales, ctx.dropout, needs)
        else:
            groups = [list(each[i::4]) for i in range(4)]
            bwd = _triton_bwd if ctx.on_triton else _bwd
            found = bwd(dys, x, *groups, seed, saved, ctx.scales, ctx.dropout, list(needs))
        given = [True] + [dys[i // 4] is not None for i in range(4 * count)]
        kept = (g if needed and there else None for g, needed, there in zip(found, needs, given, strict=True))
        return None, None, None, None, *kept

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise NotImplementedError("lora_linear: torch.vmap is not supported; put the extra dimension into x's rows")


# PyTorch asks for the signature at every call; inspect takes this one instead of building it anew, a third of the time.
LoraLinearStackedFunction.forward.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    LoraLinearStackedFunction.forward
)


def _four(tensors: Sequence[Any], first: int) -> tuple[Any, Any, Any, Any]:
    """weight, lora_a, lora_b and bias of a projection."""
    weight, lora_a, lora_b, bias = tensors[first : first + 4]
    return weight, lora_a, lora_b, bias


def _differentiable_gradients(
    dys: list[Tensor | None], x: Tensor, each: list[Any], seed: Any, scales: list[float], dropout: float, needs: Any
) -> list[Tensor | None]:
    tensors = [x, *each]
    alias = [t.view_as(t) if needed else t for t, needed in zip(tensors, needs, strict=True)]
    with torch.enable_grad():
        ys = [
            lora_linear_ref(alias[0], *_four(alias, 1 + 4 * i), None, None, seed, scale, dropout, i)
            for i, scale in enumerate(scales)
        ]
    given = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None]
    outputs, incoming = zip(*given, strict=True)
    wanted = [t for t, needed in zip(alias, needs, strict=True) if needed]
    grads = iter(torch.autograd.grad(outputs, wanted, incoming, create_graph=True, allow_unused=True))
    return [next(grads) if needed else None for needed in needs]


@measured("lora_linear")
def lora_linear_stacked(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    *,
    bias: Sequence[Tensor | None] | None = None,
    scale: float | Sequence[float] = 1.0,
    dropout: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` of several projections of one x: q, k and v of attention, or gate and up of a gated network.

    Args:
        weights, lora_a, lora_b: of each projection, [N_i, K], [R_i, K] and [N_i, R_i].
        bias: of each, [N_i] or None; None for no bias at all.
        scale: a number for all, or one for each.
        dropout: each projection drops other elements: number i has stream i of the random bits, so that the first one
            gives what `lora_linear` gives with the same seed.

    Returns y_i [..., N_i] of each. One product serves all: x is read once, and the gradient of x is summed while it is
    written. The other arguments and the errors are those of `lora_linear`.
    """
    check_tensor("x", x)
    groups = check_lora_linear_stacked(weights, lora_a, lora_b, bias, scale)
    scales = groups.pop()
    device = "cpu" if x.is_cpu else x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, groups = x.to(dtype), [[t if t is None else t.to(dtype) for t in group] for group in groups]
    check_dropout("dropout", dropout)
    bits = random_bits.seed_tensor(seed) if training and dropout else None
    dropout = float(dropout) if training else 0.0
    each = [_four([group[i] for group in groups], 0) for i in range(len(scales))]
    chosen = "reference" if exporting() else _backend.choose("lora_linear", backend, device, x.dtype)
    if chosen == "reference":
        results = []
        for i, (tensors, factor) in enumerate(zip(each, scales, strict=True)):
            check_lora_linear(x, *tensors, None, None, bits, factor, dropout)
            results.append(lora_linear_ref(x, *tensors, None, None, bits, factor, dropout, i))
        return tuple(results)
    inputs = [x, *(t for tensors in each for t in tensors if t is not None)]
    refuse_forward_mode(inputs)
    try:
        if torch.is_grad_enabled() and any([t.requires_grad for t in inputs]):
            flat = [t for tensors in each for t in tensors]
            return LoraLinearStackedFunction.apply(chosen == "triton", bits, scales, dropout, x, *flat)[::3]
        fwd = _triton_fwd if chosen == "triton" else _fwd
        return tuple(fwd(x, *groups, bits, scales, dropout)[::3])
    except (RuntimeError, TypeError, ValueError):
        for i, (tensors, factor) in enumerate(zip(each, scales, strict=True)):
            try:
                check_lora_linear(x, *tensors, None, None, bits, factor, dropout)
            except (TypeError, ValueError) as error:
                raise type(error)(f"projection {i}: {error}") from None
        raise
