"""PEFT's LoRA layer of a linear layer with our operators as its forward. Imported where PEFT is installed; see fuse.py.

A subclass without data of its own, so that a layer becomes one, and PEFT's layer again, by its class alone: parameters,
names, adapters, hooks on the layer, copies and pickles stay PEFT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn import functional as F

from ._backend import FLOATS
from .dora_linear import dora_linear
from .lora import has_hooks, is_conv1d
from .lora_linear import lora_linear, lora_linear_multi


class FusedLinear(Linear):
    """One pass computes the layer with one active adapter, of LoRA or DoRA, or with one for each row (adapter_names).

    All else is PEFT's own forward: merged, disabled, no or several active adapters, dropout or DoRA in a batch with
    adapter_names, other variants of LoRA, hooks on the layers inside, and mixtures of dtypes that the operators do not
    take.
    """

    _fused_from = Linear
    # Which parameters and modules these hold is PEFT's affair.
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or self.disable_adapters or self.merged):
            if not kwargs:
                active = [name for name in self.active_adapters if name in self.lora_A]
                if len(active) == 1 and self._takes(x, active):
                    return self._one(x, active[0])
            elif kwargs.keys() == {"adapter_names"} and self._takes_rows(x, kwargs["adapter_names"]):
                return self._rows(x, kwargs["adapter_names"])
        return super().forward(x, *args, **kwargs)

    def _one(self, x: Tensor, name: str) -> Tensor:
        factors = self.lora_A[name].weight, self.lora_B[name].weight
        dropout = self.lora_dropout[name]
        options: dict[str, Any] = {
            "bias": self.base_layer.bias,
            "scale": self.scaling[name],
            "dropout": getattr(dropout, "p", 0.0),
            "training": dropout.training,
        }
        if name not in self.lora_variant:
            return lora_linear(x, self._weight(), *factors, **options)
        options["training"] = dropout.training and self.training  # DoRA asks the layer first
        return dora_linear(x, self._weight(), *factors, self.lora_magnitude_vector[name].weight, **options)

    def _rows(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Adapters of smaller ranks are filled up with zeros, which add nothing."""
        used = self._used(names)
        rank = max(self.lora_A[name].weight.shape[0] for name in used)
        lora_a, lora_b = (torch.stack(ts) for ts in zip(*(self._padded(name, rank) for name in used), strict=True))
        place = {name: i for i, name in enumerate(used)}
        index = torch.tensor([place.get(name, -1) for name in names], dtype=torch.int32, device=x.device)
        scale = torch.tensor([self.scaling[name] for name in used], dtype=torch.float64, device=x.device)
        return lora_linear_multi(x, self._weight(), lora_a, lora_b, index, bias=self.base_layer.bias, scale=scale)

    def _padded(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = self.lora_A[name].weight, self.lora_B[name].weight
        missing = rank - lora_a.shape[0]
        return F.pad(lora_a, (0, 0, 0, missing)), F.pad(lora_b, (0, missing))

    def _weight(self) -> Tensor:
        return self.base_layer.weight.t() if is_conv1d(self.base_layer) else self.base_layer.weight

    def _used(self, names: Sequence[str]) -> list[str]:
        """The adapters of a mixed batch that this layer has; the others' rows are of the base layer alone."""
        return [name for name in dict.fromkeys(names) if name in self.lora_A and name != "__base__"]

    def _takes_rows(self, x: Tensor, names: Any) -> bool:
        if not isinstance(names, list | tuple) or x.dim() < 2 or len(names) != len(x):
            return False
        used = self._used(names)
        dropouts = [self.lora_dropout[name] for name in used]
        if not used or any(name in self.lora_variant for name in used):
            return False
        return not any(getattr(d, "p", 0.0) and d.training for d in dropouts) and self._takes(x, used)

    def _takes(self, x: Tensor, names: list[str]) -> bool:
        factors = [layers[name] for name in names for layers in (self.lora_A, self.lora_B)]
        inner = [self.base_layer, *factors, *(self.lora_dropout[name] for name in names)]
        weights = [self.base_layer.weight, *(layer.weight for layer in factors)]
        for name in names:
            if name in self.lora_variant:
                if getattr(dora, "ENABLE_DORA_CACHING", False) and not self.training:  # norms that PEFT keeps
                    return False
                inner.append(self.lora_magnitude_vector[name])
                weights.append(self.lora_magnitude_vector[name].weight)
        if any(unserved(self, name) for name in names) or any(map(has_hooks, inner)):
            return False
        if any(type(layer) is not nn.Linear for layer in factors):
            return False
        if any(type(t) not in (Tensor, nn.Parameter) for t in weights):  # sharded or quantized
            return False
        weight, adapter = (t.dtype for t in weights[:2])
        if torch.is_autocast_enabled(x.device.type):
            return x.dtype in FLOATS and torch.float64 not in (x.dtype, *(t.dtype for t in weights))
        exact = torch.promote_types(x.dtype, torch.float32) if x.dtype in FLOATS else None
        return x.dtype == weight and adapter in (x.dtype, exact) and all(t.dtype == adapter for t in weights[1:])


def unserved(layer: Linear, name: str) -> str:
    """What the adapter has that our operators do not compute; empty where there is nothing."""
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"{type(variant).__name__} (a variant of LoRA)"
    if layer.lora_bias.get(name) or layer.lora_A[name].bias is not None or layer.lora_B[name].bias is not None:
        return "lora_bias"
    if type(layer.lora_dropout[name]) not in (nn.Dropout, nn.Identity):
        return f"{type(layer.lora_dropout[name]).__name__} as its dropout"
    p = getattr(layer.lora_dropout[name], "p", 0.0)
    return f"a dropout of {p:g}" if p >= 1 else ""
