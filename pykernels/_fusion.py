"""What `fuse` knows of the layers of other packages, and what their fused forwards share.

A fused layer stays an instance of its class and keeps all its data: its class alone is changed, to a subclass that
holds our forward. So parameters, names, hooks on the layer, copies and pickles stay the layer's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from ._backend import FLOATS

_FORWARDS = (nn.Conv1d.forward, nn.Linear.forward)
_TIME_FIRST = ("ConvTBC", "LinearizedConvolution")  # fairseq's, which is not imported for their sake

# forward(layer, own, *args, **kwargs): `own` is the layer's own forward, for what the call cannot be served with.
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Fusion:
    """check: what the layer has that cannot be served, empty where there is nothing. example: the arguments of a small
    call, on which both forwards have to agree; None compares nothing."""

    forward: Forward
    check: Callable[[Any], str] | None = None
    example: Callable[[Any, Callable[..., Tensor]], tuple[Any, ...]] | None = None


# --- layers inside ---


def unserved_layer(layer: Any, kind: type[nn.Module], name: str) -> str:
    """What keeps the layer from being computed by its weight and bias alone; weight norm does not, in either form."""
    if not isinstance(layer, kind) or type(layer).forward is not kind.forward or "forward" in vars(layer):
        return f"{name}: {type(layer).__name__}, or another forward, where {kind.__name__} was expected"
    return _unserved_state(layer, name)


def _unserved_state(layer: Any, name: str) -> str:
    if _hooked(layer):
        return f"{name}: hooks, which would not be called"
    tensors = [*layer.parameters(), *layer.buffers()]
    if any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
        return f"{name}: parameters that are sharded, quantized or not initialised yet"
    return ""


def unserved_conv(layer: Any, name: str, rows: int = 0, kernel_size: int | None = None) -> str:
    """The same for nn.Conv1d. rows: those of padding that are expected, both sides together."""
    if what := unserved_layer(layer, nn.Conv1d, name):
        return what
    if type(layer)._conv_forward is not nn.Conv1d._conv_forward or "_conv_forward" in vars(layer):
        return f"{name}: another _conv_forward"
    if layer.stride != (1,) or layer.groups != 1:
        return f"{name}: a stride of {layer.stride[0]} and {layer.groups} groups"
    if kernel_size is not None and layer.kernel_size != (kernel_size,):
        return f"{name}: a kernel size of {layer.kernel_size[0]}"
    padded = {"same": reach(layer), "valid": 0}
    given = padded[layer.padding] if isinstance(layer.padding, str) else 2 * layer.padding[0]
    if given != rows or (given and layer.padding_mode != "zeros"):
        return f"{name}: padding of {given} rows ({layer.padding_mode}) where {rows} were expected"
    return ""


def unserved_time_first(layer: Any, name: str, kind: str, padding: int) -> str:
    """The same for fairseq's convolutions of [T, B, C]. padding: rows on each side."""
    if not isinstance(layer, nn.Module) or "forward" in vars(layer) or not _computes_as(layer, (kind,)):
        return f"{name}: {type(layer).__name__}, or another forward, where {kind} was expected"
    rows: Any = layer.padding
    if tuple(rows) != (padding,):
        return f"{name}: padding of {rows[0]} rows on each side where {padding} were expected"
    return _unserved_state(layer, name)


def _computes_as(layer: Any, names: tuple[str, ...]) -> bool:
    """Whether the layer's forward is that of a class so named: its own, or one that it is a subclass of."""
    cls: Any = type(layer)
    return any(base.__name__ in names and base.forward is cls.forward for base in cls.__mro__)


def reach(layer: Any) -> int:
    """Rows between the first and the last tap of a Conv1d."""
    return layer.dilation[0] * (layer.kernel_size[0] - 1)


def _hooked(layer: nn.Module) -> bool:
    before = layer._forward_pre_hooks
    if before and any(type(hook) is not WeightNorm or hook.name != "weight" for hook in before.values()):
        return True
    # fairseq's own backward hook clears a buffer that it never fills.
    if any(getattr(hook, "__name__", "") != "_clear_linearized_weight" for hook in layer._backward_hooks.values()):
        return True
    return bool(layer._forward_hooks or layer._backward_pre_hooks)


def weight(layer: Any) -> Tensor:
    """The layer's weight, weight-normed where it is; with torch.nn.utils.weight_norm a hook of the layer makes it."""
    for hook in layer._forward_pre_hooks.values():
        return hook.compute_weight(layer)
    return layer.weight


def pointwise(layer: Any, rows: Tensor) -> Tensor:
    """A Conv1d of kernel size 1 on rows [B, L, C]."""
    return F.linear(rows, weight(layer).squeeze(-1), layer.bias)


def drop(rows: Tensor, p: float) -> Tensor:
    """Dropout of rows [B, L, C] by the random bits that [B, C, L] would get."""
    return F.dropout(rows.transpose(1, 2).contiguous(), p).transpose(1, 2)


# --- the call ---


def takes(x: Any, *layers: Any, around: tuple[Any, ...] = (), others: tuple[Tensor | None, ...] = ()) -> bool:
    """Whether our operators compute on x and `others` what the layers compute now. Called by every forward: short.

    around: modules without parameters of their own that are passed over too.
    """
    if not isinstance(x, Tensor) or x.dim() != 3 or x.is_nested:
        return False
    return computes(x, *layers, around=around, others=others)


def computes(
    x: Tensor, *layers: Any, around: tuple[Any, ...] = (), others: tuple[Tensor | None, ...] = ()
) -> bool:
    """The same for any tensor of the dtype and on the device that the layers will be given."""
    if x.dtype not in FLOATS:
        return False
    dtypes = {t.dtype for t in others if t is not None}
    for layer in layers:
        if _hooked(layer) or "forward" in layer.__dict__:
            return False
        if type(layer).forward not in _FORWARDS and not _computes_as(layer, _TIME_FIRST):
            return False
        dtypes.update([p.dtype for p in layer._parameters.values() if p is not None])
    for layer in around:
        if _hooked(layer) or "forward" in layer.__dict__:
            return False
    if not torch.compiler.is_compiling():
        if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
            return False
    if torch.is_autocast_enabled(x.device.type):
        return torch.float64 not in (x.dtype, *dtypes)
    return dtypes <= {x.dtype}


# --- classes ---

_made: dict[tuple[type, Forward], type] = {}


def fused_class(cls: Any, forward: Forward) -> type:
    """A subclass of cls with that forward; the same one for the same arguments."""
    if (cls, forward) not in _made:

        @functools.wraps(cls.forward)  # exports ask for its arguments
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward(self, super(made, self).forward, *args, **kwargs)

        def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
            return restore, (cls, forward), *super(made, self).__reduce_ex__(protocol)[2:]

        made: Any = type(
            f"Fused{cls.__name__}",
            (cls,),
            {"forward": call, "__reduce_ex__": reduce, "__module__": cls.__module__, "_fused_from": cls},
        )
        _made[cls, forward] = made
    return _made[cls, forward]


def restore(cls: Any, forward: Forward) -> Any:
    made: Any = fused_class(cls, forward)
    return made.__new__(made)


# --- the comparison ---


def differs(layer: nn.Module, fusion: Fusion) -> str:
    """Compares our forward with the layer's own on a small call: how far apart they are, empty where they agree."""
    parameter = next(layer.parameters(), None)
    if fusion.example is None or parameter is None or parameter.is_meta:
        return ""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(parameter)

    training = {module: module.training for module in layer.modules()}
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
            args = fusion.example(layer, draw)
            own, ours = _tensors(layer.forward(*args)), _tensors(fusion.forward(layer, layer.forward, *args))
    finally:
        for module, was in training.items():
            module.training = was
    if [t.shape for t in own] != [t.shape for t in ours]:
        return f"shapes {[list(t.shape) for t in own]}, ours {[list(t.shape) for t in ours]}"
    # Far above rounding, also of 16 bits and tf32, and far below another formula.
    for a, b in zip(own, ours, strict=True):
        error, size = (a.double() - b.double()).abs().max().item(), a.double().abs().max().item()
        if error > 0.05 * size:
            return f"results that are {error:.2g} off, of {size:.2g}"
    return ""


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, Tensor)]
