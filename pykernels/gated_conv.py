"""gated_conv1d: a dilated convolution along the rows, a sigmoid gate and a residual blend, in one pass.

B batch, L length, C channels, K kernel size, T packed rows; L' is the length of the output.

    h = conv1d(x) + bias + cond       c, z = the value half and the gate half of h
    v = act(c)                        g = sigmoid(z), with z multiplied by the random factor f where there is one
    y = x * (1 - g) + v * g  (highway)   or   x + v * g  (add)   or   v * g  (none)

Backward, from the kept v and g: dc = dy * g * act'(c) and dz = dy * (v - x) * g * (1 - g) * f (with v instead of v - x
but for highway). dx is the transposed convolution of (dc, dz) plus dy * (1 - g) or dy of the residual; dweight is the
product of (dc, dz) with the rows that each tap read; dbias and dcond are sums of (dc, dz).
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _backend, _triton, random_bits
from ._autotune import measured
from ._checks import (
    check_form,
    check_gate_random,
    check_gated_conv1d,
    check_int,
    check_residual,
    check_tensor,
)
from ._extension import _C

# --- reference: the definition ---


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, padding: str) -> Tensor:
    """conv1d along the rows: x [B, L, C_in], weight [N, C_in, K] -> [B, L', N]."""
    reach = dilation * (weight.shape[2] - 1)
    left, right = {"same": (reach // 2, reach - reach // 2), "causal": (reach, 0), "valid": (0, 0)}[padding]
    if x.shape[1] + left + right <= reach:
        # No output rows: conv1d refuses, and a product of no rows has the same gradients.
        return F.linear(x[:, :0], weight[..., 0], bias)
    return F.conv1d(F.pad(x.transpose(1, 2), (left, right)), weight, bias, dilation=dilation).transpose(1, 2)


def gated_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    cond: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    dilation: int,
    padding: str,
    residual: str,
    value_act: str,
    split: str,
    gate_dropout: float,
    gate_noise: float,
) -> Tensor:
    """gated_conv1d in plain PyTorch; gate_dropout and gate_noise are those in effect. Arguments as in the schema."""
    reach = dilation * (weight.shape[2] - 1)
    first = reach if padding == "valid" else 0  # the x row that belongs to output row 0

    live = None
    if mask is not None:
        live = mask.bool().unsqueeze(-1)
    elif lengths is not None:
        live = (torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(-1)).unsqueeze(-1)
    if live is not None:
        x = torch.where(live, x, 0)

    place, spaced = None, 0
    if cu_seqlens is not None:
        row = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(cu_seqlens.long(), row, right=True) - 1
        place, spaced = row + sequence * reach, x.shape[0] + (cu_seqlens.shape[0] - 1) * reach
        if cond is not None and cond.dim() == 3:
            cond = cond.squeeze(1).index_select(0, sequence)

    def conv(weight: Tensor, bias: Tensor | None) -> Tensor:
        if place is None:
            return _convolve(x, weight, bias, dilation, padding)
        # Zeros between the sequences keep the taps of one apart from the rows of the next.
        rows = x.new_zeros(spaced, x.shape[1]).index_copy(0, place, x).unsqueeze(0)
        return _convolve(rows, weight, bias, dilation, padding).squeeze(0).index_select(0, place)

    def halves(h: Tensor) -> tuple[Tensor, Tensor]:
        a, b = h.chunk(2, -1)
        return (a, b) if split == "value_gate" else (b, a)

    if gate_weight is None:
        value, logits = halves(conv(weight, bias))
    else:
        value, logits = conv(weight, bias), conv(gate_weight, gate_bias)
    if cond is not None:
        value_cond, gate_cond = halves(cond)
        value, logits = value + value_cond, logits + gate_cond
    if live is not None:
        # With a value of zero and x of zero every blend is zero, whatever cond and dy hold in these rows.
        value, logits = torch.where(live[:, first:], value, 0), torch.where(live[:, first:], logits, 0)

    if seed is not None and (gate_dropout or gate_noise):
        draws = random_bits.draws16(seed, math.prod(value.shape[:-1]), value.shape[-1]).view(value.shape).to(x.device)
        if gate_dropout:
            factors = random_bits.dropout_factors(draws, gate_dropout)
        else:
            factors = 1 + random_bits.uniform_noise(draws, gate_noise).to(torch.promote_types(x.dtype, torch.float32))
        logits = (logits * factors).to(x.dtype)

    g = torch.sigmoid(logits)
    v = torch.tanh(value) if value_act == "tanh" else value
    if residual == "highway":
        return x[..., first:, :] * (1 - g) + v * g
    return x[..., first:, :] + v * g if residual == "add" else v * g


# --- raw operators: shapes while tracing, gradients ---

# Arguments in the order of csrc/ops.cpp, in two tuples.
#   tensors: x, weight, bias, gate_weight, gate_bias, cond (these six have gradients), mask, lengths, cu_seqlens, seed
#   form:    dilation, padding, residual, value_act, split, gate_dropout, gate_noise
TENSORS, DIFFERENTIABLE = 10, 6

_TENSOR_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? gate_weight, Tensor? gate_bias, Tensor? cond, Tensor? mask, "
    "Tensor? lengths, Tensor? cu_seqlens, Tensor? seed"
)
_FORM = "int dilation, str padding, str residual, str value_act, str split, float gate_dropout, float gate_noise"
_triton_fwd = _triton.operator(
    f"_gated_conv_fwd_triton({_TENSOR_ARGUMENTS}, Tensor? packed, {_FORM}, bool save) -> (Tensor y, Tensor saved)",
    "gated_conv",
    "forward",
)
_triton_bwd = _triton.operator(
    f"_gated_conv_bwd_triton(Tensor dy, {_TENSOR_ARGUMENTS}, Tensor? saved, {_FORM}, bool[6] needs) -> (Tensor dx, "
    "Tensor dweight, Tensor dbias, Tensor dgate_weight, Tensor dgate_bias, Tensor dcond)",
    "gated_conv_bwd",
    "backward",
)
_triton_pack = _triton.operator(
    "_gated_conv_pack_triton(Tensor weight, Tensor? gate_weight, str split) -> Tensor", "gated_conv", "pack"
)
_SUFFIXES = ["_triton"]

if _C is not None:
    _fwd = torch.ops.pykernels._gated_conv_fwd.default
    _bwd = torch.ops.pykernels._gated_conv_bwd.default
    _pack = torch.ops.pykernels._gated_conv_pack.default
    _SUFFIXES += [""]

    @torch.library.register_fake("pykernels::_seed")
    def _seed_fake() -> Tensor:
        return torch.empty((), dtype=torch.int64)

    @torch.library.register_fake("pykernels::_random_bits")
    def _random_bits_fake(seed: Tensor, rows: int, n: int, stream: int, step: int) -> Tensor:
        return seed.new_empty((rows, n), dtype=torch.int32)


def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    tensors, form, save = args[:TENSORS], args[TENSORS + 1 : -1], args[-1]
    shape = check_gated_conv1d(*tensors, *form)
    x = tensors[0]
    return x.new_empty(shape), x.new_empty((2, *shape) if save else (0,))


def _bwd_fake(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, form, needs = args[:TENSORS], args[TENSORS + 1 : -1], args[-1]
    check_gated_conv1d(*tensors, *form)
    return tuple(
        dy.new_empty(t.shape if needed and t is not None else (0,))
        for t, needed in zip(tensors[:DIFFERENTIABLE], needs, strict=True)
    )


def _pack_fake(weight: Tensor, gate_weight: Tensor | None, split: str) -> Tensor:
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)  # the backend's layout


def _no_vmap(*_: Any) -> None:
    raise NotImplementedError("gated_conv1d: torch.vmap is not supported; put the extra dimension into B")


for _suffix in _SUFFIXES:
    torch.library.register_fake(f"pykernels::_gated_conv_fwd{_suffix}", _fwd_fake)
    torch.library.register_fake(f"pykernels::_gated_conv_bwd{_suffix}", _bwd_fake)
    torch.library.register_fake(f"pykernels::_gated_conv_pack{_suffix}", _pack_fake)
    for _name in ("fwd", "bwd"):
        torch.library.register_vmap(f"pykernels::_gated_conv_{_name}{_suffix}", _no_vmap)


class GatedConv1dFunction(torch.autograd.Function):
    """The raw operators with gradients; about half the time of a call through torch.library.register_autograd."""

    @staticmethod
    def forward(recompute: bool, on_triton: bool, *args: Any) -> tuple[Tensor, Tensor]:
        fwd = _triton_fwd if on_triton else _fwd
        return fwd(*args[:TENSORS], None, *args[TENSORS:], not recompute)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        recompute, ctx.on_triton, *args = inputs
        saved = None if recompute else output[1]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # else backward would be given zeros as the gradient of `saved`
        ctx.save_for_backward(*args[:TENSORS], saved)
        ctx.form = args[TENSORS:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *tensors, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[2 : 2 + DIFFERENTIABLE]
        if dy is None:
            grads: Any = [None] * DIFFERENTIABLE
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_gradients(dy, tensors, ctx.form, needs)
        else:
            bwd = _triton_bwd if ctx.on_triton else _bwd
            grads = bwd(dy, *tensors, saved, *ctx.form, needs)
        rest = [None] * (len(tensors) - DIFFERENTIABLE + len(ctx.form))
        return None, None, *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *rest

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise NotImplementedError("gated_conv1d: torch.vmap is not supported; put the extra dimension into B")


# PyTorch asks for the signature at every call; inspect takes this one instead of building it anew, a third of the time.
GatedConv1dFunction.forward.__signature__ = inspect.signature(GatedConv1dFunction.forward)  # type: ignore[attr-defined]


def _differentiable_gradients(dy: Tensor, tensors: list[Any], form: Any, needs: Any) -> list[Tensor | None]:
    """Gradients that can be differentiated again (create_graph=True): those of the definition."""
    # Aliases, so that each gradient is that of one argument even where one argument was computed from another.
    alias = [t.view_as(t) if needed else t for t, needed in zip(tensors, needs, strict=False)]
    with torch.enable_grad():
        y = gated_conv1d_ref(*alias, *tensors[DIFFERENTIABLE:], *form)
    grads = iter(torch.autograd.grad(y, [t for t, n in zip(alias, needs, strict=True) if n], dy, create_graph=True))
    return [next(grads) if needed else None for needed in needs]


# --- functions ---


def _call(
    tensors: tuple[Any, ...],
    form: tuple[Any, ...],
    packed: Tensor | None,
    training: bool,
    recompute: bool,
    backend: str | None,
) -> Tensor:
    """Autocast, random bits, choice of the backend. `tensors` ends with the user's seed, `form` may be out of effect.

    The C++ operator checks its arguments itself, so that this path is short.
    """
    x, weight = tensors[:2]
    check_tensor("x", x)
    check_tensor("weight", weight)
    device = "cpu" if x.is_cpu else x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        packed, dtype = None, torch.get_autocast_dtype(device)
        cast = [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors[:DIFFERENTIABLE]]
        tensors = (*cast, *tensors[DIFFERENTIABLE:])
        x = tensors[0]
    seed = None
    if form[-2] or form[-1]:
        check_gate_random(*form[-2:])
        if training:
            seed = random_bits.seed_tensor(tensors[-1])
        else:
            form = (*form[:-2], 0.0, 0.0)
    tensors = (*tensors[:-1], seed)

    # An exported model holds PyTorch's own operators only.
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    chosen = "reference" if exporting else _backend.choose("gated_conv1d", backend, device, x.dtype)
    if chosen == "reference":
        check_gated_conv1d(*tensors, *form)
        return gated_conv1d_ref(*tensors, *form)
    inputs = [t for t in tensors[:DIFFERENTIABLE] if isinstance(t, Tensor)]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise NotImplementedError("gated_conv1d: forward-mode differentiation is not supported")
    try:
        if torch.is_grad_enabled() and any([t.requires_grad for t in inputs]):
            return GatedConv1dFunction.apply(recompute, chosen == "triton", *tensors, *form)[0]
        return (_triton_fwd if chosen == "triton" else _fwd)(*tensors, packed, *form, False)[0]
    except RuntimeError:
        # What PyTorch says of an argument of the wrong type does not begin with its name.
        check_gated_conv1d(*tensors, *form)
        raise


@measured("gated_conv1d")
def gated_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    dilation: int = 1,
    padding: str = "same",
    residual: str = "highway",
    value_act: str = "identity",
    split: str = "value_gate",
    cond: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gate_dropout: float = 0.0,
    gate_noise: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Gated dilated convolution along the rows of x, with its residual blend.

        h = conv1d(x) + bias + cond;   c, z = halves of h;   v = act(c);   g = sigmoid(z)
        highway: y = x * (1 - g) + v * g     add: y = x + v * g     none: y = v * g

    Args:
        x: [B, L, C_in], or [T, C_in] with cu_seqlens. float32, bfloat16, float16 or float64, any strides: a
            channels-first tensor is passed as `x.transpose(1, 2)` and not copied.
        weight: [2 * C_out, C_in, K], an nn.Conv1d weight that makes value and gate; or [C_out, C_in, K], the value's,
            with a `gate_weight`. All floating tensors have x's dtype; under autocast they are cast.
        bias: [2 * C_out], or [C_out] with a `gate_weight`.
        gate_weight, gate_bias: [C_out, C_in, K] and [C_out].
        dilation: rows between taps, >= 1; the taps reach over dilation * (K - 1) rows besides their own.
        padding: "same" (L' = L, as in PyTorch), "causal" (L' = L, no later rows are seen), or "valid"
            (L' = L - dilation * (K - 1); the residual is that of the last L' rows). "valid" excludes cu_seqlens.
        residual: "highway", "add" (both need C_in == C_out), or "none", also spelled "glu".
        value_act: "identity" or "tanh".
        split: "value_gate", or "gate_value" where the first half of weight, bias and cond is the gate's. With
            gate_weight it concerns cond alone.
        cond: [B, 1 or L', 2 * C_out], added to h; packed rows: [T, 2 * C_out] or [B, 1, 2 * C_out].
        mask: [B, L], bool or 0/1 integers; False rows of x are zeros to the taps, and zeros in y.
        lengths: [B] int32 or int64, 0 ... L: a mask of the first rows. Faster than a mask.
        cu_seqlens: [B + 1] int32 or int64 from 0 to T, non-decreasing: where the packed sequences begin and end.
            At most one of mask, lengths and cu_seqlens.
        gate_dropout: probability of dropping a z, 0 <= p < 1; the others are scaled up. Only when `training`.
        gate_noise: amplitude a of e, uniform in (-a, a), in z * (1 + e). Only when `training`; not with gate_dropout.
        seed: of the random bits, an int or a 0-d int64 tensor; None draws it from PyTorch's default generator.
        recompute: keep nothing but the arguments for backward and compute v and g again. The reference ignores it.
        backend: "reference", "cpu", "cuda", "triton", or "auto"; None: what `set_backend` or PYKERNELS_BACKEND says.

    Returns [B, L', C_out] or [T, C_out] in x's dtype, contiguous. Masked rows are exact zeros and get zero gradients,
    whatever they hold. Equal inputs give equal bits on the compiled kernels, with any number of threads. On CUDA the
    values of mask, lengths and cu_seqlens are not checked, since the call would have to wait for them: what lies
    outside is cut off. float32 products are made in tf32 there where PyTorch's setting for CUDA matrix products says so
    (torch.backends.cuda.matmul). Double backward works at the speed of plain PyTorch; torch.vmap and forward-mode
    differentiation are refused. Under torch.export, torch.jit.trace and ONNX export plain PyTorch operators are
    emitted.

    Raises TypeError for types and dtypes, ValueError for values, RuntimeError for a named backend that cannot serve.
    """
    tensors = (x, weight, bias, gate_weight, gate_bias, cond, mask, lengths, cu_seqlens, seed)
    form = (dilation, padding, residual, value_act, split, gate_dropout, gate_noise)
    return _call(tensors, form, None, training, recompute, backend)


class GatedConv1d(nn.Module):
    """`gated_conv1d` with parameters `weight` [2 * C_out, C_in, K] and `bias` [2 * C_out].

    They have the shapes, the initial values and the random draws of nn.Conv1d(C_in, 2 * C_out, K), whose state dicts
    load, also weight-normed ones (`weight_g` and `weight_v`, or `parametrizations.weight.original0` and `1`).
    gate_dropout and gate_noise act in training mode. Arguments as in `gated_conv1d`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        dilation: int = 1,
        padding: str = "same",
        residual: str = "highway",
        value_act: str = "identity",
        split: str = "value_gate",
        bias: bool = True,
        gate_dropout: float = 0.0,
        gate_noise: float = 0.0,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_channels", in_channels), ("out_channels", out_channels), ("kernel_size", kernel_size)):
            check_int(name, size, 1)
        check_form(dilation, padding, residual, value_act, split)
        check_gate_random(gate_dropout, gate_noise)
        check_residual(residual, in_channels, out_channels)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.dilation, self.padding, self.residual = dilation, padding, residual
        self.value_act, self.split = value_act, split
        self.gate_dropout, self.gate_noise = gate_dropout, gate_noise
        self.recompute, self.backend = recompute, backend
        self.weight = nn.Parameter(torch.empty(2 * out_channels, in_channels, kernel_size, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(2 * out_channels, device=device, dtype=dtype)) if bias else None
        )
        self._packed: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of nn.Conv1d, with the same random draws."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels * self.kernel_size)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        x: Tensor,
        *,
        cond: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """x [B, L, C_in] or [T, C_in] -> [B, L', C_out] or [T, C_out]; arguments as in `gated_conv1d`."""
        if self._packed is not None and torch.is_grad_enabled() and self.weight.requires_grad:
            self._packed = None  # the weight may be about to change
        tensors = (x, self.weight, self.bias, None, None, cond, mask, lengths, cu_seqlens, seed)
        random = (self.gate_dropout, self.gate_noise)
        form = (self.dilation, self.padding, self.residual, self.value_act, self.split, *random)
        return _call(tensors, form, self._packed, self.training, self.recompute, self.backend)

    @torch.no_grad()
    def prepack(self) -> GatedConv1d:
        """Keeps the weight in the layout of the kernels, which every call would otherwise make. Returns self.

        For inference with a weight that stays as it is: a change of the weight in place, of `weight.data`, by a merged
        adapter or by `vector_to_parameters`, is not seen until prepack() is called again. The copy is dropped by
        train(), load_state_dict(), to() and its relatives, and by a call that records gradients. It is not part of the
        state dict. Where the reference backend serves, nothing is kept.

        Raises RuntimeError in training mode.
        """
        if self.training:
            raise RuntimeError("prepack: expected a module in evaluation mode, call eval() first")
        device = self.weight.device.type
        chosen = _backend.choose("gated_conv1d", self.backend, device, self.weight.dtype)
        if chosen != "reference":
            self._packed = (_triton_pack if chosen == "triton" else _pack)(self.weight, None, self.split)
        return self

    def train(self, mode: bool = True) -> GatedConv1d:
        if mode:
            self._packed = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> GatedConv1d:
        self._packed = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._packed = None
        spellings = ("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")
        for g, v in spellings:
            # A module that is itself weight-normed has no parameter `weight` and takes these keys as they are.
            if "weight" in self._parameters and prefix + g in state_dict and prefix + v in state_dict:
                magnitude, direction = state_dict.pop(prefix + g), state_dict.pop(prefix + v)
                normed = [i for i in range(direction.dim()) if magnitude.dim() == 0 or magnitude.shape[i] == 1]
                norm = torch.linalg.vector_norm(direction, dim=normed, keepdim=True)
                state_dict[prefix + "weight"] = direction * (magnitude / norm)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        arguments = inspect.signature(GatedConv1d).parameters
        names = "dilation padding residual value_act split gate_dropout gate_noise recompute backend".split()
        told = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != arguments[name].default]
        sizes = [str(self.in_channels), str(self.out_channels), f"kernel_size={self.kernel_size}"]
        return ", ".join([*sizes, *told, *(["bias=False"] if self.bias is None else [])])
