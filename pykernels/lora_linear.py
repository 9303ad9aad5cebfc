"""lora_linear: a linear layer with a low-rank term beside its frozen weight, in one pass.

M rows (x's leading dimensions), K inputs, N outputs, R rank, E adapters.

    d = dropout(x);   S = d A^T;   y = x W^T + bias + scale * S B^T

LoRA (Hu et al. 2021), with the names and layouts of PEFT: A is lora_a [R, K], B is lora_b [N, R]. In the notation of
the LoRA+ article (https://kexue.fm/archives/10001), Y = X (W + A B), lora_a and lora_b are A^T and B^T; lora_b takes
the larger learning rate.

Backward keeps x, S and one bit an element of what dropout kept: dS = scale * dy B, dB = scale * dy^T S, dA = dS^T d,
dx = dy W + dropout(dS A) with the factors of forward, dW = dy^T x where the weight is trained, dbias = sum of dy.
The kernels of CUDA and Triton draw the bits of dropout again instead of keeping them.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import _backend, _triton, random_bits
from ._autotune import measured
from ._checks import check_dropout, check_float, check_lora_linear, check_tensor
from ._extension import _C

# --- reference: the definition ---


def lora_linear_ref(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    stream: int = 0,
) -> Tensor:
    """lora_linear and lora_linear_multi in plain PyTorch. Arguments as in the schema, and the stream of random bits."""
    y = F.linear(x, weight, bias)
    d = x
    if dropout:
        assert seed is not None
        draws = random_bits.draws16(seed, x.shape[:-1].numel(), x.shape[-1], stream).view(x.shape).to(x.device)
        d = x * random_bits.dropout_factors(draws, dropout).to(x.dtype)
    d = d.to(lora_a.dtype)
    if adapter_index is None:
        low_rank = F.linear(F.linear(d, lora_a), lora_b) * (scale if scales is None else scales[0])
        return (y + low_rank).to(y.dtype)
    index = adapter_index.view(*adapter_index.shape, *(1,) * (x.dim() - adapter_index.dim()))
    low_rank = torch.zeros_like(y, dtype=torch.promote_types(y.dtype, lora_a.dtype))
    for e in range(lora_a.shape[0]):
        term = F.linear(F.linear(d, lora_a[e]), lora_b[e]) * (scale if scales is None else scales[e])
        low_rank = torch.where(index == e, term.to(low_rank.dtype), low_rank)
    return (y + low_rank).to(y.dtype)


# --- raw operators: shapes while tracing, gradients ---

# Arguments in the order of csrc/ops.cpp, in two tuples.
#   tensors: x, weight, lora_a, lora_b, bias (these five have gradients), scales, adapter_index, seed
#   form:    scale, dropout
TENSORS, DIFFERENTIABLE = 8, 5

_TENSOR_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? scales, Tensor? adapter_index, "
    "Tensor? seed"
)
_triton_fwd = _triton.operator(
    f"_lora_linear_fwd_triton({_TENSOR_ARGUMENTS}, float scale, float dropout) -> (Tensor y, Tensor s, Tensor keep)",
    "lora_linear",
    "forward",
)
_triton_bwd = _triton.operator(
    f"_lora_linear_bwd_triton(Tensor dy, {_TENSOR_ARGUMENTS}, Tensor s, Tensor keep, float scale, float dropout, "
    "bool[5] needs) -> (Tensor dx, Tensor dweight, Tensor dlora_a, Tensor dlora_b, Tensor dbias)",
    "lora_linear_bwd",
    "backward",
)
_SUFFIXES = ["_triton"]

if _C is not None:
    _fwd = torch.ops.pykernels._lora_linear_fwd.default
    _bwd = torch.ops.pykernels._lora_linear_bwd.default

    _SUFFIXES += [""]


def fwd_fake(*args: Any, on_triton: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    shape = check_lora_linear(*args)
    x, lora_a = args[0], args[2]
    # CUDA's and Triton's kernels draw the bits of dropout again in backward.
    stored = bool(args[-1]) and x.device.type != "cuda" and not on_triton
    rows, exact = 1, torch.promote_types(x.dtype, torch.float32)
    for n in x.shape[:-1]:
        rows = rows * n
    kept = rows * ((x.shape[-1] + 7) // 8) + 1 if stored else 0
    return (
        x.new_empty(shape),
        x.new_empty((rows, lora_a.shape[-2]), dtype=exact),
        x.new_empty((kept,), dtype=torch.uint8),
    )


def _bwd_fake(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, needs = args[:TENSORS], args[-1]
    check_lora_linear(*tensors, *args[TENSORS + 2 : -1])
    return tuple(
        torch.empty(
            t.shape if needed and t is not None else (0,),
            dtype=tensors[0].dtype if t is None else t.dtype,
            device=tensors[0].device,
        )
        for t, needed in zip(tensors[:DIFFERENTIABLE], needs, strict=True)
    )


def no_vmap(*_: Any) -> None:
    raise NotImplementedError("lora_linear: torch.vmap is not supported; put the extra dimension into x's rows")


for _suffix in _SUFFIXES:
    _fake = functools.partial(fwd_fake, on_triton=bool(_suffix))
    torch.library.register_fake(f"pykernels::_lora_linear_fwd{_suffix}", _fake)
    torch.library.register_fake(f"pykernels::_lora_linear_bwd{_suffix}", _bwd_fake)
    for _name in ("fwd", "bwd"):
        torch.library.register_vmap(f"pykernels::_lora_linear_{_name}{_suffix}", no_vmap)


class LoraLinearFunction(torch.autograd.Function):
    """The raw operators with gradients; about half the time of a call through torch.library.register_autograd."""

    @staticmethod
    def forward(on_triton: bool, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return (_triton_fwd if on_triton else _fwd)(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.on_triton, *args = inputs
        _, s, keep = output
        ctx.mark_non_differentiable(s, keep)
        ctx.set_materialize_grads(False)  # else backward would be given zeros as the gradients of s and keep
        ctx.save_for_backward(*args[:TENSORS], s, keep)
        ctx.form = args[TENSORS:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, s, keep = ctx.saved_tensors
        needs = ctx.needs_input_grad[1 : 1 + DIFFERENTIABLE]
        if dy is None:
            grads: Any = [None] * DIFFERENTIABLE
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_gradients(dy, tensors, ctx.form, needs)
        else:
            bwd = _triton_bwd if ctx.on_triton else _bwd
            grads = bwd(dy, *tensors, s, keep, *ctx.form, needs)
        rest = [None] * (TENSORS - DIFFERENTIABLE + len(ctx.form))
        return None, *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *rest

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise NotImplementedError("lora_linear: torch.vmap is not supported; put the extra dimension into x's rows")


# PyTorch asks for the signature at every call; inspect takes this one instead of building it anew, a third of the time.
LoraLinearFunction.forward.__signature__ = inspect.signature(LoraLinearFunction.forward)  # type: ignore[attr-defined]


def _differentiable_gradients(dy: Tensor, tensors: list[Any], form: Any, needs: Any) -> list[Tensor | None]:
    """Gradients that can be differentiated again (create_graph=True): those of the definition."""
    # Aliases, so that each gradient is that of one argument even where one argument was computed from another.
    alias = [t.view_as(t) if needed else t for t, needed in zip(tensors, needs, strict=False)]
    with torch.enable_grad():
        y = lora_linear_ref(*alias, *tensors[DIFFERENTIABLE:], *form)
    wanted = [t for t, needed in zip(alias, needs, strict=True) if needed]
    # materialize_grads: without adapters, E = 0, the expression uses neither lora_a nor lora_b.
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, materialize_grads=True))
    return [next(grads) if needed else None for needed in needs]


# --- functions ---


def exporting() -> bool:
    """An exported model holds PyTorch's own operators only."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def refuse_forward_mode(tensors: Any) -> None:
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError("lora_linear: forward-mode differentiation is not supported")


def _call(tensors: tuple[Any, ...], scale: Any, dropout: float, training: bool, backend: str | None) -> Tensor:
    """Autocast, random bits, choice of the backend. `tensors` ends with the user's seed."""
    x, weight, lora_a, lora_b = tensors[:4]
    check_tensor("x", x)
    check_tensor("weight", weight)
    check_tensor("lora_a", lora_a)
    check_tensor("lora_b", lora_b)
    device = "cpu" if x.is_cpu else x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        cast = [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors[:DIFFERENTIABLE]]
        tensors = (*cast, *tensors[DIFFERENTIABLE:])
        x = tensors[0]
    if not isinstance(scale, float):
        check_float("scale", scale)
        scale = float(scale)
    if dropout != 0.0:
        check_dropout("dropout", dropout)
    if training and dropout:
        tensors = (*tensors[:-1], random_bits.seed_tensor(tensors[-1]))
    else:
        dropout, tensors = 0.0, (*tensors[:-1], None)
    form: tuple[Any, ...] = (scale, float(dropout))

    chosen = "reference" if exporting() else _backend.choose("lora_linear", backend, device, x.dtype)
    if chosen == "reference":
        check_lora_linear(*tensors, *form)
        return lora_linear_ref(*tensors, *form)
    inputs = [t for t in tensors[:DIFFERENTIABLE] if isinstance(t, Tensor)]
    refuse_forward_mode(inputs)
    if torch.compiler.is_compiling() and tensors[5] is None:
        # A number given to an operator is a constant of the graph, which every other number would compile anew.
        adapters = 1 if tensors[6] is None else lora_a.shape[0]
        tensors = (*tensors[:5], torch.ones(adapters, dtype=torch.float64, device=x.device) * scale, *tensors[6:])
        form = (1.0, form[1])
    try:
        if torch.is_grad_enabled() and any([t.requires_grad for t in inputs]):
            return LoraLinearFunction.apply(chosen == "triton", *tensors, *form)[0]
        return (_triton_fwd if chosen == "triton" else _fwd)(*tensors, *form)[0]
    except RuntimeError:
        # What PyTorch says of an argument of the wrong type does not begin with its name.
        check_lora_linear(*tensors, *form)
        raise


@measured("lora_linear")
def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x weight^T + bias + scale * (dropout(x) lora_a^T) lora_b^T.

    Args:
        x: [..., K]. float32, bfloat16, float16 or float64, any strides.
        weight: [N, K], an nn.Linear weight; the transpose of a [K, N] tensor (the Conv1D of GPT-2) is read in place.
            The floating tensors have x's dtype but for the adapter; under autocast all are cast.
        lora_a, lora_b: [R, K] and [N, R], any R >= 0, of x's dtype or float32. float32 adapters of a 16-bit layer keep
            the accuracy of float32 in S, in its products and in their gradients, and x is never copied to float32.
        bias: [N].
        scale: what the low-rank term is multiplied with (alpha / R, or alpha / sqrt(R) for rsLoRA). May change from
            call to call.
        dropout: probability of dropping an element of what lora_a is multiplied with; those kept are divided by the
            probability of keeping. Only when training.
        seed: of dropout's random bits, an int or a 0-d int64 tensor; None draws one from PyTorch's default generator.
        backend: "reference", "cpu", "cuda", "triton", or "auto"; None: what `set_backend` or PYKERNELS_BACKEND says.

    Returns y [..., N] in x's dtype. Gradients have the dtypes of their arguments; the weight's is computed only where
    it requires one. Backward keeps x, S in float32 [rows, R] (float64 for float64), and on the CPU one bit an element
    of x with dropout. Equal inputs give equal bits on the kernels of both devices, with any number of threads. On CUDA
    float32 is multiplied in TF32 where PyTorch's setting allows it (torch.backends.cuda.matmul). Double backward works
    at the speed of plain PyTorch; torch.vmap and forward-mode differentiation are refused. Under torch.export,
    torch.jit.trace and ONNX export plain PyTorch operators are emitted.

    Raises TypeError for types and dtypes, ValueError for values, RuntimeError for a named backend that cannot serve.
    """
    return _call((x, weight, lora_a, lora_b, bias, None, None, seed), scale, dropout, training, backend)


@measured("lora_linear")
def lora_linear_multi(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    dropout: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`lora_linear` of a batch whose rows have different adapters, with one product for all of them.

        y = x weight^T + bias + scale[e] * (dropout(x) lora_a[e]^T) lora_b[e]^T        e = adapter_index of the row

    Args:
        lora_a, lora_b: [E, R, K] and [E, N, R].
        adapter_index: int32 or int64, the shape of x's leading dimensions or of the first of them ([B] for x
            [B, L, K]); 0 ... E - 1, or -1 for rows without an adapter. Fastest where neighbouring rows share one. On
            CUDA nobody looks at the values before the kernels do, and any other number is taken for -1.
        scale: a number, or a tensor [E] of any floating dtype, which gets no gradient.

    The other arguments, the result and the errors are those of `lora_linear`.
    """
    check_tensor("adapter_index", adapter_index)
    scales = scale.detach() if isinstance(scale, Tensor) else None
    number = 1.0 if isinstance(scale, Tensor) else scale
    return _call((x, weight, lora_a, lora_b, bias, scales, adapter_index, seed), number, dropout, training, backend)
