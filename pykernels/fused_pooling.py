"""torchmil's attention pooling on `attention_pool` (multiple-instance learning, Ilse, Tomczak and Welling 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._fusion import Fusion, takes, unserved_layer
from .attention_pool import attention_pool

_ACTIVATIONS: dict[type, str] = {nn.Tanh: "tanh", nn.ReLU: "relu", nn.GELU: "gelu"}


def forward(layer: Any, own: Callable[..., Any], X: Tensor, mask: Any = None, return_att: bool = False) -> Any:
    """AttentionPool of torchmil. A bag without instances gives zeros, where the package's softmax gives NaN."""
    linears = [layer.fc1.module, layer.fc2, *([layer.fc_gated.module] if layer.gated else [])]
    around = layer.fc1, layer.act_layer, *((layer.fc_gated, layer.act_gated) if layer.gated else ())
    if not takes(X, *linears, around=around) or X.shape[1] == 0 or not (mask is None or _is_mask(mask, X)):
        return own(X, mask, return_att)
    options: dict[str, Any] = {"bias": linears[0].bias, "activation": _ACTIVATIONS[type(layer.act_layer)]}
    if layer.gated:
        options |= {"gate_weight": linears[2].weight, "gate_bias": linears[2].bias}
    options["recompute"] = False  # no more is kept than by torchmil, and no product is made twice
    weight, query = linears[0].weight, linears[1].weight.squeeze(0)
    present = None if mask is None else mask != 0
    if not return_att:
        return attention_pool(X, weight, query, mask=present, **options)
    z, scores = attention_pool(X, weight, query, return_scores="raw", **options)
    if present is not None:
        # The scores of masked instances are wanted too, so that the mask comes after them.
        least = torch.finfo(scores.dtype).min
        a = torch.softmax(scores.masked_fill(~present, least), 1).masked_fill(~present, 0).to(z.dtype)
        z = torch.bmm(a.unsqueeze(1), X.to(z.dtype)).squeeze(1)
    return z, scores.to(z.dtype)


def _is_mask(mask: Any, X: Tensor) -> bool:
    return isinstance(mask, Tensor) and mask.shape == X.shape[:2]


def check(layer: Any) -> str:
    if type(layer.act_layer) not in _ACTIVATIONS or getattr(layer.act_layer, "approximate", "none") != "none":
        return f"act_layer: {layer.act_layer}"
    named = [("act_layer", layer.act_layer), ("fc1", layer.fc1)]
    if layer.gated:
        if type(layer.act_gated) is not nn.Sigmoid:
            return f"act_gated: {layer.act_gated}"
        named += [("act_gated", layer.act_gated), ("fc_gated", layer.fc_gated)]
    for name, module in named:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name}: hooks, which would not be called, or another forward"
    linears = [("fc2", layer.fc2), *((name, getattr(m, "module", None)) for name, m in named if name.startswith("fc"))]
    for name, linear in linears:
        if what := unserved_layer(linear, nn.Linear, name):
            return what
    if layer.fc2.bias is not None or layer.fc2.out_features != 1:
        return f"fc2: {layer.fc2} where one output without a bias was expected"
    return ""


def example(layer: Any, draw: Callable[..., Tensor]) -> tuple[Any, ...]:
    X, mask = draw(2, 5, layer.fc1.module.in_features), torch.ones_like(draw(2, 5))
    mask[1, 3:] = 0
    return X, mask


TORCHMIL = Fusion(forward, check, example)
