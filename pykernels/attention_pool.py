"""attention_pool: the weighted mean of a sequence's rows, weighted by a softmax over scores of a small network.

B batch, L length, D width, H hidden, J pooling heads, T packed rows.

    u[l] = act(W x[l] + bias) * sigmoid(V x[l] + gate_bias)       the second factor only with a gate_weight V
    s[j, l] = query[j] . u[l]
    a[j] = softmax of s[j] over the rows that are not masked;   out[j] = sum over l of a[j, l] x[l]

Additive attention (Bahdanau et al. 2015) with a learned query: structured self-attentive sentence embedding (Lin et al.
2017), and with the gate the attention pooling of multiple-instance learning (Ilse, Tomczak and Welling 2018).

Backward keeps the scores s with their largest and the sum of e^(s - largest), and computes u again, unless it is told
to keep what the activations are taken of (recompute=False). With
da[j, l] = dout[j] . x[l]: ds = a * (da - sum of a * da), du[l] = sum over j of ds[j, l] query[j], and from there
through the small network; dx[l] gets the sum over j of a[j, l] dout[j] besides.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _backend, _triton
from ._autotune import measured
from ._checks import ACTIVATIONS, check_attention_pool, check_choice, check_int, check_tensor
from ._extension import _C

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
}

# --- reference: the definition ---


def attention_pool_ref(
    x: Tensor,
    weight: Tensor,
    query: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    return_scores: str,
) -> tuple[Tensor, Tensor | None]:
    """attention_pool in plain PyTorch: out and, unless return_scores is "none", the scores. Arguments as in the schema.

    Softmax and returned scores are at least float32.
    """
    live = None
    if mask is not None:
        live = mask.bool()
    elif lengths is not None:
        live = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(-1)
    if live is not None:
        x, live = torch.where(live.unsqueeze(-1), x, 0), live.unsqueeze(1)

    u = _ACTIVATIONS[activation](F.linear(x, weight, bias))
    if gate_weight is not None:
        u = u * torch.sigmoid(F.linear(x, gate_weight, gate_bias))
    queries = query if query.dim() == 2 else query.unsqueeze(0)
    exact = torch.promote_types(x.dtype, torch.float32)
    s = F.linear(u, queries).transpose(-1, -2).to(exact)  # [B, J, L] or [J, T]

    if cu_seqlens is None:
        if live is not None:
            # The lowest number, not minus infinity: a row that is all masked has a softmax, and it is not used.
            a = torch.where(live, torch.softmax(torch.where(live, s, torch.finfo(exact).min), -1), 0)
            s = torch.where(live, s, 0)
        else:
            a = torch.softmax(s, -1)
        out = a.to(x.dtype) @ x
    else:
        batch = cu_seqlens.shape[0] - 1
        sequence = torch.searchsorted(cu_seqlens.long(), torch.arange(x.shape[0], device=x.device), right=True) - 1
        places = sequence.expand_as(s)
        lowest = torch.full((s.shape[0], batch), -math.inf, dtype=exact, device=x.device)
        e = torch.exp(s - lowest.scatter_reduce(1, places, s.detach(), "amax").index_select(1, sequence))
        a = e / e.new_zeros(lowest.shape).index_add(1, sequence, e).index_select(1, sequence)
        rows = a.t().unsqueeze(-1) * x.unsqueeze(1)
        out = rows.new_zeros(batch, *rows.shape[1:]).index_add(0, sequence, rows).to(x.dtype)
    returned = {"none": None, "raw": s, "softmax": a}[return_scores]
    if query.dim() == 2:
        return out, returned
    return out.squeeze(1), None if returned is None else returned.squeeze(-2)


# --- raw operators: shapes while tracing, gradients ---

# Arguments in the order of csrc/ops.cpp, in two tuples.
#   tensors: x, weight, query, bias, gate_weight, gate_bias (these six have gradients), mask, lengths, cu_seqlens
#   form:    activation, return_scores ("none", "raw" or "softmax")
TENSORS, DIFFERENTIABLE = 9, 6

_TENSOR_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor query, Tensor? bias, Tensor? gate_weight, Tensor? gate_bias, Tensor? mask, "
    "Tensor? lengths, Tensor? cu_seqlens"
)
_triton_fwd = _triton.operator(
    f"_attention_pool_fwd_triton({_TENSOR_ARGUMENTS}, str activation, str return_scores, bool save, bool keep) -> "
    "(Tensor out, Tensor scores, Tensor weights, Tensor max_sum, Tensor pooled, Tensor kept)",
    "attention_pool",
    "forward",
)
_triton_bwd = _triton.operator(
    f"_attention_pool_bwd_triton(Tensor? dout, Tensor? dscores, {_TENSOR_ARGUMENTS}, Tensor scores, Tensor max_sum, "
    "Tensor pooled, Tensor? kept, str activation, str return_scores, bool[6] needs) -> (Tensor dx, Tensor dweight, "
    "Tensor dquery, Tensor dbias, Tensor dgate_weight, Tensor dgate_bias)",
    "attention_pool_bwd",
    "backward",
)
_SUFFIXES = ["_triton"]

if _C is not None:
    _fwd = torch.ops.pykernels._attention_pool_fwd.default
    _bwd = torch.ops.pykernels._attention_pool_bwd.default
    _SUFFIXES += [""]


def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    tensors, form, (save, keep) = args[:TENSORS], args[TENSORS:-2], args[-2:]
    out, scores = check_attention_pool(*tensors, *form)
    returned = form[-1]
    x, weight, query, gate_weight = tensors[0], tensors[1], tensors[2], tensors[4]
    exact = torch.promote_types(x.dtype, torch.float32)
    heads = query.shape[0] if query.dim() == 2 else 1
    return (
        x.new_empty(out),
        x.new_empty(scores if save or returned != "none" else (0,), dtype=exact),
        x.new_empty(scores if returned == "softmax" else (0,), dtype=exact),
        x.new_empty((out[0], heads, 2), dtype=exact),
        x.new_empty(out if save and x.dtype != exact else (0,), dtype=exact),
        x.new_empty((math.prod(x.shape[:-1]), weight.shape[0] * (1 if gate_weight is None else 2)) if keep else (0,)),
    )


def _bwd_fake(dout: Tensor | None, dscores: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    tensors, form, needs = args[:TENSORS], args[TENSORS + 4 : -1], args[-1]
    check_attention_pool(*tensors, *form)
    return tuple(
        tensors[0].new_empty(t.shape if needed and t is not None else (0,))
        for t, needed in zip(tensors[:DIFFERENTIABLE], needs, strict=True)
    )


def _no_vmap(*_: Any) -> None:
    raise NotImplementedError("attention_pool: torch.vmap is not supported; put the extra dimension into B")


for _suffix in _SUFFIXES:
    torch.library.register_fake(f"pykernels::_attention_pool_fwd{_suffix}", _fwd_fake)
    torch.library.register_fake(f"pykernels::_attention_pool_bwd{_suffix}", _bwd_fake)
    for _name in ("fwd", "bwd"):
        torch.library.register_vmap(f"pykernels::_attention_pool_{_name}{_suffix}", _no_vmap)


class AttentionPoolFunction(torch.autograd.Function):
    """The raw operators with gradients; about half the time of a call through torch.library.register_autograd."""

    @staticmethod
    def forward(recompute: bool, on_triton: bool, *args: Any) -> tuple[Tensor, ...]:
        return (_triton_fwd if on_triton else _fwd)(*args, True, not recompute)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        out, scores, weights, max_sum, pooled, kept = output
        recompute, ctx.on_triton, *args = inputs
        returned = args[-1]
        unreturned = [t for t, name in ((scores, "raw"), (weights, "softmax")) if name != returned]
        ctx.mark_non_differentiable(*unreturned, max_sum, pooled, kept)
        ctx.set_materialize_grads(False)  # else backward would be given zeros for what nobody used
        rounded = out.dtype != scores.dtype
        unrounded = pooled if rounded else out
        ctx.save_for_backward(*args[:TENSORS], scores, max_sum, unrounded, None if recompute else kept)
        ctx.form = args[TENSORS:]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, scores, max_sum, pooled, kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[2 : 2 + DIFFERENTIABLE]
        dscores = {"none": None, "raw": more[0], "softmax": more[1]}[ctx.form[1]]
        if dout is None and dscores is None:
            grads: Any = [None] * DIFFERENTIABLE
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_gradients(dout, dscores, tensors, ctx.form, needs)
        else:
            bwd = _triton_bwd if ctx.on_triton else _bwd
            grads = bwd(dout, dscores, *tensors, scores, max_sum, pooled, kept, *ctx.form, needs)
        rest = [None] * (TENSORS - DIFFERENTIABLE + len(ctx.form))
        return None, None, *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *rest

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise NotImplementedError("attention_pool: torch.vmap is not supported; put the extra dimension into B")


# PyTorch asks for the signature at every call; inspect takes this one instead of building it anew, a third of the time.
AttentionPoolFunction.forward.__signature__ = inspect.signature(AttentionPoolFunction.forward)  # type: ignore[attr-defined]


def _differentiable_gradients(
    dout: Tensor | None, dscores: Tensor | None, tensors: list[Any], form: Any, needs: Any
) -> list[Tensor | None]:
    """Gradients that can be differentiated again (create_graph=True): those of the definition."""
    # Aliases, so that each gradient is that of one argument even where one argument was computed from another.
    alias = [t.view_as(t) if needed else t for t, needed in zip(tensors, needs, strict=False)]
    with torch.enable_grad():
        results = attention_pool_ref(*alias, *tensors[DIFFERENTIABLE:], *form)
    given = [(y, dy) for y, dy in zip(results, (dout, dscores), strict=True) if dy is not None]
    wanted = [t for t, needed in zip(alias, needs, strict=True) if needed]
    outputs, gradients = zip(*given, strict=True)
    grads = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
    return [next(grads) if needed else None for needed in needs]


# --- functions ---


@measured("attention_pool")
def attention_pool(
    x: Tensor,
    weight: Tensor,
    query: Tensor,
    *,
    bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str = "tanh",
    return_scores: str | None = None,
    recompute: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean of the rows of x, weighted by a softmax over query . act(weight x + bias).

        u = act(weight x + bias) * sigmoid(gate_weight x + gate_bias)
        s = query . u;   a = softmax(s);   out = sum a x

    Args:
        x: [B, L, D], or [T, D] with cu_seqlens. float32, bfloat16, float16 or float64, any strides: a channels-first
            tensor is passed as `x.transpose(1, 2)`.
        weight: [H, D], an nn.Linear weight. All floating tensors have x's dtype; under autocast they are cast.
        query: [H], or [J, H] for J pooling heads that share u.
        bias: [H].
        gate_weight, gate_bias: [H, D] and [H]: the second factor of u, one without them.
        mask: [B, L], bool or 0/1 integers; False rows take no part, whatever they hold.
        lengths: [B] int32 or int64, 0 ... L: a mask of the first rows. Faster than a mask.
        cu_seqlens: [B + 1] int32 or int64 from 0 to T, non-decreasing: where the packed sequences begin and end.
            At most one of mask, lengths and cu_seqlens.
        activation: "tanh", "swish", "relu", or "gelu" (by the error function).
        return_scores: "raw" returns s besides, "softmax" a: [B, L], with heads [B, J, L]; packed rows [T] or [J, T].
            float32 (float64 for float64), zero where masked, differentiable.
        recompute: False keeps weight x + bias (and the gate's) in x's dtype for backward, which then has three
            products instead of four. The reference ignores it.
        backend: "reference", "cpu", "cuda", "triton", or "auto"; None: what `set_backend` or PYKERNELS_BACKEND says.

    Returns out [B, D], with heads [B, J, D], in x's dtype, or (out, scores). A sequence without rows gives zeros, and
    zero gradients. Unless recompute is False, nothing of the size [B, L, H] is made: backward keeps 4 bytes a score (8
    for float64) and computes u again; its gradient exists for some rows at a time (16 MB on a CPU, 32 MB on CUDA), with
    Triton for all of them.
    Equal inputs give equal bits on the CPU kernels, with any number of threads, whatever the sequence is batched with
    and however far it is padded behind; on CUDA too, but for gradients of parameters, which depend on the padding. On
    CUDA float32 is multiplied in tf32 where PyTorch's setting for CUDA matrix products allows it, and values of lengths
    and cu_seqlens, which are not waited for, are cut off where they lie outside of x. Double backward works at the
    speed of plain PyTorch; torch.vmap and forward-mode differentiation are refused. Under torch.export, torch.jit.trace
    and ONNX export plain PyTorch operators are emitted.

    Raises TypeError for types and dtypes, ValueError for values, RuntimeError for a named backend that cannot serve.
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    check_tensor("query", query)
    if return_scores is not None:
        check_choice("return_scores", return_scores, ("raw", "softmax"))
    tensors: tuple[Any, ...] = (x, weight, query, bias, gate_weight, gate_bias, mask, lengths, cu_seqlens)
    device = "cpu" if x.is_cpu else x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        cast = [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors[:DIFFERENTIABLE]]
        tensors = (*cast, *tensors[DIFFERENTIABLE:])
        x = tensors[0]
    form: tuple[Any, ...] = (activation, return_scores or "none")

    # An exported model holds PyTorch's own operators only.
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    chosen = "reference" if exporting else _backend.choose("attention_pool", backend, device, x.dtype)
    if chosen == "reference":
        check_attention_pool(*tensors, *form)
        out, scores = attention_pool_ref(*tensors, *form)
        return out if scores is None else (out, scores)
    inputs = [t for t in tensors[:DIFFERENTIABLE] if isinstance(t, Tensor)]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise NotImplementedError("attention_pool: forward-mode differentiation is not supported")
    try:
        if torch.is_grad_enabled() and any([t.requires_grad for t in inputs]):
            on_triton = chosen == "triton"
            out, scores, weights = AttentionPoolFunction.apply(recompute, on_triton, *tensors, *form)[:3]
        else:
            fwd = _triton_fwd if chosen == "triton" else _fwd
            out, scores, weights = fwd(*tensors, *form, False, False)[:3]
    except RuntimeError:
        # What PyTorch says of an argument of the wrong type does not begin with its name.
        check_attention_pool(*tensors, *form)
        raise
    if return_scores is None:
        return out
    return out, scores if return_scores == "raw" else weights


class AttentionPool(nn.Module):
    """`attention_pool` with parameters `weight` [hidden, dim] and `query` [hidden], or [heads, hidden] with heads.

    bias adds `bias` [hidden]; gated adds `gate_weight` [hidden, dim] and, with a bias, `gate_bias` [hidden]. They begin
    as the parameters of nn.Linear(dim, hidden) and nn.Linear(hidden, heads). Arguments as in `attention_pool`.
    """

    weight: Tensor
    query: Tensor
    bias: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        hidden: int,
        heads: int | None = None,
        *,
        bias: bool = False,
        gated: bool = False,
        activation: str = "tanh",
        recompute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("hidden", hidden), *([] if heads is None else [("heads", heads)])):
            check_int(name, size, 1)
        check_choice("activation", activation, ACTIVATIONS)
        self.dim, self.hidden, self.heads = dim, hidden, heads
        self.activation, self.recompute, self.backend = activation, recompute, backend
        shapes = {
            "weight": (hidden, dim),
            "query": (hidden,) if heads is None else (heads, hidden),
            "bias": (hidden,) if bias else None,
            "gate_weight": (hidden, dim) if gated else None,
            "gate_bias": (hidden,) if gated and bias else None,
        }
        for name, shape in shapes.items():
            made = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of nn.Linear for each layer."""
        for weight, bias in ((self.weight, self.bias), (self.gate_weight, self.gate_bias)):
            if weight is not None:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            if bias is not None:
                nn.init.uniform_(bias, -1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))
        nn.init.uniform_(self.query, -1 / math.sqrt(self.hidden), 1 / math.sqrt(self.hidden))

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_scores: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, L, dim] or [T, dim] -> out [B, dim] or [B, heads, dim], or (out, scores), as `attention_pool`."""
        return attention_pool(
            x,
            self.weight,
            self.query,
            bias=self.bias,
            gate_weight=self.gate_weight,
            gate_bias=self.gate_bias,
            mask=mask,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            activation=self.activation,
            return_scores=return_scores,
            recompute=self.recompute,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        told = [str(self.dim), str(self.hidden), *([] if self.heads is None else [f"heads={self.heads}"])]
        told += ["bias=True"] * (self.bias is not None) + ["gated=True"] * (self.gate_weight is not None)
        told += [f"activation={self.activation!r}"] * (self.activation != "tanh")
        told += ["recompute=False"] * (not self.recompute)
        return ", ".join(told + [f"backend={self.backend!r}"] * (self.backend is not None))
