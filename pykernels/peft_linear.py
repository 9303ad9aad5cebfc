"""PEFT's LoRA layer of a linear layer with `lora_linear` as its forward. Imported where PEFT is installed; see fuse.py.

A subclass without data of its own, so that a layer becomes one, and PEFT's layer again, by its class alone: parameters,
names, adapters, hooks on the layer, copies and pickles stay PEFT's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from ._backend import FLOATS
from .lora import has_hooks, is_conv1d
from .lora_linear import lora_linear


class FusedLinear(Linear):
    """With one active adapter one pass computes base layer and adapter. All else is PEFT's own forward:

    merged, disabled, no or several active adapters, adapter_names for a mixed batch, variants of LoRA, hooks on the
    layers inside, and mixtures of dtypes that `lora_linear` does not take.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs or self.disable_adapters or self.merged else self._only_adapter()
        if name is None or not self._takes(x, name):
            return super().forward(x, *args, **kwargs)
        layers: tuple[Any, ...] = self.base_layer, self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        base, lora_a, lora_b, dropout = layers
        return lora_linear(
            x,
            base.weight.t() if is_conv1d(base) else base.weight,
            lora_a.weight,
            lora_b.weight,
            bias=base.bias,
            scale=self.scaling[name],
            dropout=getattr(dropout, "p", 0.0),
            training=dropout.training,
        )

    def _only_adapter(self) -> str | None:
        active = [name for name in self.active_adapters if name in self.lora_A]
        return active[0] if len(active) == 1 else None

    def _takes(self, x: Tensor, name: str) -> bool:
        lora_a, lora_b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        if unserved(self, name) or any(map(has_hooks, (self.base_layer, lora_a, lora_b, dropout))):
            return False
        if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
            return False
        weights = self.base_layer.weight, lora_a.weight, lora_b.weight
        if any(type(t) not in (Tensor, nn.Parameter) for t in weights):  # sharded or quantized
            return False
        weight, a, b = (t.dtype for t in weights)
        if torch.is_autocast_enabled(x.device.type):
            return x.dtype in FLOATS and torch.float64 not in (x.dtype, weight, a, b)
        exact = torch.promote_types(x.dtype, torch.float32) if x.dtype in FLOATS else None
        return x.dtype == weight and a == b and a in (x.dtype, exact)


def unserved(layer: Linear, name: str) -> str:
    """What the adapter has that `lora_linear` does not compute; empty where there is nothing."""
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} (DoRA and other variants of LoRA)"
    if layer.lora_bias.get(name) or layer.lora_A[name].bias is not None or layer.lora_B[name].bias is not None:
        return "lora_bias"
    if type(layer.lora_dropout[name]) not in (nn.Dropout, nn.Identity):
        return f"{type(layer.lora_dropout[name]).__name__} as its dropout"
    p = getattr(layer.lora_dropout[name], "p", 0.0)
    return f"a dropout of {p:g}" if p >= 1 else ""
