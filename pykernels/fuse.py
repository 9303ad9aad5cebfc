"""fuse: `lora_linear`, `lora_linear_multi` and `dora_linear` inside of a PEFT model."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .lora import check_layer


def fuse(model: nn.Module) -> nn.Module:
    """Gives PEFT's LoRA layers of nn.Linear and Conv1D our forward, in place. Returns the model; `unfuse` undoes it.

    Parameters, state dict, configuration, saving and loading, switching, adding, merging and disabling adapters stay
    PEFT's. Outputs and gradients are PEFT's but for rounding, and but for which elements dropout drops (it is
    `lora_linear`'s, also governed by torch.manual_seed). A layer with one active adapter, LoRA or DoRA, is computed by
    `lora_linear` or `dora_linear`, a batch with an adapter for each row (adapter_names) by `lora_linear_multi`. What
    these do not serve at the time of the call (several active adapters, merged, disabled, hooks on the layers inside,
    a mixed batch under dropout, PEFT's cache of DoRA's norms) runs in PEFT's own forward. Fusing twice is fusing once;
    adapters may be added before and after.

    LoRA of embeddings, of convolutions and of quantized layers, and modules_to_save, are left as they are.

    Raises, before anything is changed, ModuleNotFoundError without peft; TypeError for what is no module; ValueError,
    with the layer's name, where an adapter has what they never serve (variants of LoRA but DoRA, lora_bias), the base
    layer has hooks or a forward of its own, the layer was given another forward (as accelerate's dispatch does) or
    itself to fully_shard (fuse first; a block around it may have been), or there is no such layer.
    """
    linear, fused, unserved = _peft()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in (linear, fused)}
    _refuse_sharded(model, linear)
    if not layers:
        raise ValueError("model: expected a model with PEFT's LoRA layers of linear layers, got one without")
    for name, layer in layers.items():
        for adapter in layer.lora_A:
            if what := unserved(layer, adapter):
                raise ValueError(f"{name}: expected LoRA or DoRA, got {what} in the adapter {adapter!r}")
        if "forward" in vars(layer):
            raise ValueError(f"{name}: expected PEFT's forward, got one that was put in its place")
        check_layer(f"{name}.base_layer", layer.base_layer)
    for layer in layers.values():
        layer.__class__ = fused
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """PEFT's own forward again, for all layers that `fuse` has changed; there may be none.

    ValueError with the name where such a layer was itself given to fully_shard.
    """
    linear, fused, _ = _peft()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    _refuse_sharded(model, fused)
    for layer in model.modules():
        if type(layer) is fused:
            layer.__class__ = linear
    return model


def _refuse_sharded(model: nn.Module, kind: type) -> None:
    """fully_shard changes the class of a module too, to one that it makes."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for name, layer in model.named_modules() if fsdp is not None else ():
        if isinstance(layer, kind) and isinstance(layer, fsdp.FSDPModule):
            raise ValueError(f"{name}: expected a layer before fully_shard, got {type(layer).__name__}")


def _peft() -> tuple[Any, Any, Any]:
    try:
        import peft.tuners.lora.layer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"fuse needs PEFT (pip install peft): {error}", name=error.name) from None
    from .peft_linear import FusedLinear, unserved

    return peft.tuners.lora.layer.Linear, FusedLinear, unserved
