"""LoRALinear: `lora_linear` as a layer that takes the place of an nn.Linear or of GPT-2's Conv1D.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) leaves the weight as it is and trains a term of rank r beside
it; rank-stabilised LoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732) divides by sqrt(r) instead of r; DoRA
(Liu et al. 2024, https://arxiv.org/abs/2402.09353) also trains the lengths of the rows of weight and term together.
`apply_lora` (lora_model.py) puts these layers into a whole model.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_choice, check_dropout, check_float, check_floating, check_int
from ._dtensor import is_sharded
from .dora_linear import dora_linear, dora_norm, dora_scale
from .lora_linear import lora_linear

INITS = ("b_zero", "a_zero")


class LoRALinear(nn.Module):
    """A linear layer with a frozen weight and a trained low-rank term. Its keys are nn.Linear's, and two or three more.

        y = x weight^T + bias + scale * (dropout(x) lora_a^T) lora_b^T

    Args:
        in_features, out_features: K and N.
        r: rank, >= 1.
        alpha: scale is alpha / r, or alpha / sqrt(r) with rslora. The attribute `scale` may be changed at any time.
        dropout: of x in front of lora_a, in training mode.
        init: "b_zero" begins with lora_b = 0 and lora_a as the weight of nn.Linear(K, r) (PEFT, Init[1] of the LoRA+
            paper); "a_zero" with lora_a = 0 and lora_b as the weight of nn.Linear(r, N) (Init[2]). Either way the layer
            begins as the linear layer alone.
        dora: y = m * (x weight^T + scale * (x lora_a^T) lora_b^T) + bias, m = magnitude / |weight + scale * lora_b
            lora_a|, the norm of each row (`dora_linear`, which tells what dropout then is). magnitude begins as that
            norm.
        dtype: of weight and bias. adapter_dtype: of lora_a, lora_b and magnitude; None: float32, or float64 where dtype
            is. Both may be changed with to(); x has the dtype of weight, but for autocast.
        backend: as in `lora_linear`.

    Parameters: weight [N, K] and bias [N], which do not require gradients until they are told to, lora_a [r, K] and
    lora_b [N, r], with dora magnitude [N]. From a Conv1D weight is [K, N], as there (`fan_in_fan_out`).
    """

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        dora: bool = False,
        bias: bool = True,
        init: str = "b_zero",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, size, least in (("in_features", in_features, 0), ("out_features", out_features, 0), ("r", r, 1)):
            check_int(name, size, least)
        check_settings(alpha, dropout, init)
        self.in_features, self.out_features, self.r, self.alpha = in_features, out_features, r, float(alpha)
        self.dropout, self.rslora, self.init, self.backend = float(dropout), bool(rslora), init, backend
        self.dora = bool(dora)
        self.scale = self.alpha / (math.sqrt(r) if rslora else r)
        self.fan_in_fan_out = False
        self.enabled = True
        self._unmerged: tuple[nn.Parameter] | None = None  # in a tuple, so that it is no parameter of the module
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        check_floating("dtype", weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        row = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", row)
        adapter_dtype = adapter_dtype or torch.promote_types(weight.dtype, torch.float32)
        lora_a = torch.empty(r, in_features, device=device, dtype=adapter_dtype)
        check_floating("adapter_dtype", lora_a)
        self.lora_a = nn.Parameter(lora_a)
        self.lora_b = nn.Parameter(torch.empty(out_features, r, device=device, dtype=adapter_dtype))
        lengths = nn.Parameter(torch.empty(out_features, device=device, dtype=adapter_dtype)) if dora else None
        self.register_parameter("magnitude", lengths)
        self.reset_parameters()

    @classmethod
    def from_layer(
        cls, layer: nn.Module, r: int = 8, alpha: float = 16.0, dropout: float = 0.0, **options: Any
    ) -> LoRALinear:
        """A LoRALinear on the parameters of an nn.Linear or a transformers.pytorch_utils.Conv1D.

        They are shared, not copied, and frozen. Options: rslora, dora, init, adapter_dtype, backend. TypeError for
        other layers, ValueError for layers whose forward this one would not repeat (hooks, parametrizations).
        """
        check_layer("layer", layer)
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        assert weight is not None
        conv1d = is_conv1d(layer)
        inputs, outputs = weight.shape if conv1d else weight.shape[::-1]
        kind: dict[str, Any] = {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
        made = cls(inputs, outputs, r, alpha, dropout, **kind, **options)
        made.fan_in_fan_out = conv1d
        made.weight, made.bias = weight, bias
        for p in (weight, bias):
            if p is not None:
                p.requires_grad_(False)
        for name in made.adapter_keys:
            setattr(made, name, nn.Parameter(torch.empty_like(getattr(made, name), device=weight.device)))
        made.reset_adapter()
        return made.train(layer.training)

    def to_layer(self) -> nn.Module:
        """The nn.Linear or Conv1D with this layer's weight as it is now (merged or not), and bias; shared."""
        layer: Any
        if self.fan_in_fan_out:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                layer = Conv1D(self.out_features, self.in_features)
        else:
            layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)

    def reset_parameters(self) -> None:
        """weight and bias as nn.Linear has them, with the same random draws, then `reset_adapter`."""
        if self.weight.numel():
            nn.init.kaiming_uniform_(self.weight.t() if self.fan_in_fan_out else self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Back to a term of zero: `init` says which of the factors is random. Then magnitude is the weight's own."""
        random, zero = (self.lora_a, self.lora_b) if self.init == "b_zero" else (self.lora_b, self.lora_a)
        nn.init.zeros_(zero)
        if random.numel():
            nn.init.kaiming_uniform_(random, a=math.sqrt(5))
        self._reset_magnitude()

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        if self.magnitude is not None:
            self.magnitude.copy_(dora_norm(self._matrix(self.original_weight), self.lora_a, self.lora_b, self.scale))

    def _matrix(self, weight: Tensor) -> Tensor:
        """[N, K]."""
        return weight.t() if self.fan_in_fan_out else weight

    @property
    def adapter_keys(self) -> list[str]:
        """The adapter's parameters."""
        return ["lora_a", "lora_b"] + ["magnitude"] * (self.magnitude is not None)

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features]; seed of dropout as in `lora_linear`.

        RuntimeError where a merged layer is being trained: the gradients of the adapter would be lost.
        """
        weight = self.weight
        if self._unmerged is not None:
            trained = any(getattr(self, name).requires_grad for name in self.adapter_keys)
            if self.training and torch.is_grad_enabled() and trained:
                raise RuntimeError("LoRALinear: expected an unmerged layer in training, call unmerge() or eval() first")
            if not self.enabled:
                weight = self.original_weight
        matrix = self._matrix(weight)
        if not self.enabled or self._unmerged is not None:
            return F.linear(x, matrix, self.bias)
        options: dict[str, Any] = {
            "bias": self.bias,
            "scale": self.scale,
            "dropout": self.dropout,
            "training": self.training,
            "seed": seed,
            "backend": self.backend,
        }
        if self.magnitude is None:
            return lora_linear(x, matrix, self.lora_a, self.lora_b, **options)
        return dora_linear(x, matrix, self.lora_a, self.lora_b, self.magnitude, **options)

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    @property
    def original_weight(self) -> Tensor:
        """weight as it is, or was before merging."""
        return self.weight if self._unmerged is None else self._unmerged[0]

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """What merging adds, in at least float32 and the layout of weight: scale * lora_b lora_a, for DoRA more."""
        return self._merged_weight() - self.original_weight if self.dora else self._term()

    def _term(self) -> Tensor:
        exact = torch.promote_types(self.lora_a.dtype, torch.float32)
        return self._matrix(self.lora_b.to(exact) @ self.lora_a.to(exact) * self.scale)

    def _merged_weight(self) -> Tensor:
        weight, term = self.original_weight, self._term()
        merged = weight.to(term.dtype) + term
        if self.magnitude is None:
            return merged
        norm = dora_norm(self._matrix(weight), self.lora_a, self.lora_b, self.scale)
        return self._matrix(self._matrix(merged) * dora_scale(self.magnitude, norm)[:, None])

    @torch.no_grad()
    def merge(self) -> LoRALinear:
        """Makes weight + scale * lora_b lora_a the weight, in float32 and rounded once; m times that for DoRA.

        Returns self. For inference: one product instead of three. The original weight is kept besides, for `unmerge`,
        for state_dict(), which does not change, and for other modules that share it. Changes of the adapter are not
        seen until the layer is merged anew, but for those of load_state_dict() and to(). A merged layer stays so.
        RuntimeError for a layer whose parameters are sharded, which belong to what has sharded them.
        """
        if is_sharded(self.weight):
            raise RuntimeError(
                "LoRALinear: expected whole parameters to merge, got sharded ones; merge a plain model that load_lora "
                "has adapted"
            )
        if self._unmerged is None:
            assert isinstance(self.weight, nn.Parameter)
            merged = self._merged_weight().to(self.weight.dtype)
            self._unmerged = (self.weight,)
            self.weight = nn.Parameter(merged, requires_grad=False)
        return self

    def unmerge(self) -> LoRALinear:
        """The original weight again, bit for bit. Returns self."""
        if self._unmerged is not None:
            (self.weight,) = self._unmerged
            self._unmerged = None
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALinear:
        merged = self.merged
        self.unmerge()
        super()._apply(fn, recurse)
        return self.merge() if merged else self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" in state_dict and prefix + "magnitude" not in state_dict:
            self._reset_magnitude()  # that of the plain layer's weight, so that the layer begins as it
        if merged:
            self.merge()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.original_weight
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def extra_repr(self) -> str:
        told = [f"{self.in_features}, {self.out_features}, r={self.r}, alpha={self.alpha:g}"]
        told += [f"dropout={self.dropout:g}"] * (self.dropout > 0)
        told += ["rslora=True"] * self.rslora + ["dora=True"] * self.dora
        told += ["bias=False"] * (self.bias is None) + [f"init={self.init!r}"] * (self.init != "b_zero")
        told += [f"backend={self.backend!r}"] * (self.backend is not None)
        told += ["fan_in_fan_out"] * self.fan_in_fan_out
        return ", ".join(told + ["merged"] * self.merged + ["disabled"] * (not self.enabled))


def check_settings(alpha: object, dropout: Any, init: object) -> None:
    check_float("alpha", alpha)
    if isinstance(alpha, int | float) and not math.isfinite(alpha):
        raise ValueError(f"alpha: expected a finite number, got {alpha}")
    check_dropout("dropout", dropout)
    check_choice("init", init, INITS)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, of which there is none before transformers is imported."""
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and isinstance(layer, module.Conv1D)


def check_layer(name: str, layer: object) -> None:
    """Refuses what a LoRALinear on the layer's weight and bias would not compute as the layer does."""
    if not isinstance(layer, nn.Module) or not (isinstance(layer, nn.Linear) or is_conv1d(layer)):
        raise TypeError(f"{name}: expected nn.Linear or transformers' Conv1D, got {type(layer).__name__}")
    plain: Any = sys.modules["transformers.pytorch_utils"].Conv1D if is_conv1d(layer) else nn.Linear
    if type(layer).forward is not plain.forward or "forward" in vars(layer):
        raise TypeError(f"{name}: expected the forward of {plain.__name__}, got one of {type(layer).__name__}'s own")
    if has_hooks(layer):
        raise ValueError(f"{name}: expected a layer without hooks, got one whose hooks would be lost")
    besides = sorted({*layer._parameters, *layer._buffers, *layer._modules} - {"weight", "bias"})
    weight = layer._parameters.get("weight")
    if besides or weight is None:
        raise ValueError(
            f"{name}: expected the parameters weight and bias alone, got {', '.join(besides) or 'a computed weight'}"
        )
    check_floating(f"{name}.weight", weight)


def has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)
