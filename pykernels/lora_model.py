"""apply_lora and what else concerns the LoRALinear layers of a whole model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ._checks import check_choice, check_int
from ._dtensor import is_sharded
from .lora import LoRALinear, check_layer, check_settings, is_conv1d

BIASES = ("none", "lora_only", "all")


def apply_lora(
    model: nn.Module,
    target_modules: str | Sequence[str],
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    *,
    rslora: bool = False,
    dora: bool = False,
    init: str = "b_zero",
    bias: str = "none",
    trainable: Sequence[str] = (),
    exclude: Sequence[str] = (),
    adapter_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> nn.Module:
    """Puts a `LoRALinear` in the place of linear layers, freezes all other parameters, and returns the model, changed.

    Args:
        model: any module that contains nn.Linear or transformers' Conv1D layers. They may be shared between places,
            and so may their weights (a head tied to an embedding).
        target_modules: which layers, in the manner of PEFT. A list of names, each a whole name or its last parts
            ("query", "attention.self.query"); or one regular expression that whole names match; or "all-linear", all
            but the output layer of a transformers model and those in `exclude` and `trainable`.
        r, alpha, dropout, rslora, dora, init, adapter_dtype, backend: of each LoRALinear.
        bias: which biases are trained: "none", "lora_only" (those of the adapted layers), or "all".
        trainable: names, whole or last parts, of modules that are trained as they are, such as a new classifier; layers
            inside them are not adapted (PEFT: modules_to_save).
        exclude: names, whole or last parts, of layers to leave out.

    Raises TypeError or ValueError with a name, before anything is changed: where a name in a list matches nothing (the
    message tells what there is), a layer is no linear layer or has hooks or a forward of its own, a shared layer is
    meant under only one of its names, a layer's owner reads its weight without calling it (nn.MultiheadAttention,
    nn.TransformerEncoderLayer), or the model already has adapters, of ours or of PEFT.
    """
    for name, value in (("trainable", trainable), ("exclude", exclude)):
        _check_names(name, value)
    check_model(model)
    names = _chosen(model, target_modules, trainable, exclude)
    kept = [name for name, _ in model.named_modules() if ends_with_one(name, trainable)]
    options = {"dropout": dropout, "rslora": rslora, "dora": dora, "init": init}
    options |= {"adapter_dtype": adapter_dtype, "backend": backend}
    return replace_layers(model, {name: (r, alpha) for name in names}, kept, bias, options)


def replace_layers(
    model: nn.Module, ranks: Mapping[str, tuple[int, float]], trainable: Sequence[str], bias: str, options: Any
) -> nn.Module:
    """apply_lora with (r, alpha) of each layer by its whole name, and whole names of trainable modules."""
    check_choice("bias", bias, BIASES)
    for r, alpha in ranks.values():
        check_int("r", r, 1)
        check_settings(alpha, options["dropout"], options.get("init", "b_zero"))
    places = _places(model)
    for name in ranks:
        layer = places[name].layer
        check_layer(name, layer)
        shared = [other for other, place in places.items() if place.layer is layer]
        if missed := [other for other in shared if other not in ranks]:
            raise ValueError(
                f"target_modules: {name} and {missed[0]} are one layer, expected both of them or none, got {name}"
            )
        if len({ranks[other] for other in shared}) > 1:
            raise ValueError(f"r, alpha: {' and '.join(shared)} are one layer, expected the same for all, got several")
        _check_owner(name, places[name])
    made: dict[nn.Module, LoRALinear] = {}
    for p in model.parameters():
        p.requires_grad_(False)
    for name, (r, alpha) in ranks.items():
        parent, child, layer = places[name]
        if layer not in made:
            made[layer] = LoRALinear.from_layer(layer, r, alpha, **options)
        setattr(parent, child, made[layer])
    for name in trainable:
        model.get_submodule(name).requires_grad_(True)
    for name, p in model.named_parameters():
        if bias == "all" and name.rpartition(".")[2] == "bias":
            p.requires_grad_(True)
    if bias == "lora_only":
        for layer in made.values():
            if layer.bias is not None:
                layer.bias.requires_grad_(True)
    return model


# --- layers that are there ---


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinear layers under their names, each once. ValueError where there is none."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    if not layers:
        raise ValueError(f"model: expected LoRALinear layers (apply_lora makes them), got {_linears(model)}")
    return layers


def merge_lora(model: nn.Module) -> nn.Module:
    """`LoRALinear.merge` for all layers: inference at the speed of the plain model, until `unmerge_lora`."""
    for layer in lora_layers(model).values():
        layer.merge()
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """The original weights again, bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()
    return model


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The model without its low-rank terms while the context lasts, also where they are merged."""
    before = {layer: layer.enabled for layer in lora_layers(model).values()}
    for layer in before:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def unload_lora(model: nn.Module, merge: bool = False) -> nn.Module:
    """Plain nn.Linear and Conv1D layers again, with the original weights or, with `merge`, the merged ones.

    Which parameters require gradients stays as it is. ValueError, before anything is changed, where a weight that is
    to be merged is also that of another module, which a plain model would make one again when it is loaded; TypeError
    for sharded parameters.
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        if is_sharded(layer.weight):
            raise TypeError(f"model: expected whole parameters, got sharded ones ({name}.weight)")
    if merge:
        for name, layer in layers.items():
            shared = [
                other
                for other, module in model.named_modules()
                if module is not layer and any(p is layer.original_weight for p in module._parameters.values())
            ]
            if shared:
                raise ValueError(
                    f"merge: the weight of {name} is also that of {shared[0]}, which merging would tear apart; untie "
                    "them, or unload with merge=False"
                )
    plain: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        plain[layer] = (layer.merge() if merge else layer.unmerge()).to_layer()
    for place in _places(model).values():
        if place.layer in plain:
            setattr(place.parent, place.child, plain[place.layer])
    return model


# --- names and places ---


class _Place(NamedTuple):
    parent: nn.Module
    child: str
    layer: nn.Module


def _places(model: nn.Module) -> dict[str, _Place]:
    """Where each module is, by name; one that is shared has several."""
    return {
        f"{prefix}.{child}" if prefix else child: _Place(parent, child, layer)
        for prefix, parent in model.named_modules(remove_duplicate=False)
        for child, layer in parent._modules.items()
        if layer is not None
    }


def ends_with_one(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def _chosen(model: nn.Module, targets: Any, trainable: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Names of the layers that target_modules means, every name of those that are shared."""
    places = _places(model)
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for argument, ends in (("trainable", trainable), ("exclude", exclude)):
        for end in ends:
            if not any(ends_with_one(name, [end]) for name in names):
                raise ValueError(f"{argument}: expected names of modules, got {end!r}, which is none of the model's")
    inside = [f"{name}." for name in names if name and ends_with_one(name, trainable)]

    def free(name: str) -> bool:
        return not ends_with_one(name, exclude) and not f"{name}.".startswith(tuple(inside))

    if isinstance(targets, str) and targets == "all-linear":
        output = getattr(model, "get_output_embeddings", lambda: None)()
        found = [n for n, place in places.items() if free(n) and place.layer is not output and _is_linear(place.layer)]
    elif isinstance(targets, str):
        try:
            found = [name for name in places if free(name) and re.fullmatch(targets, name)]
        except re.error as error:
            raise ValueError(
                f"target_modules: expected a regular expression, got {targets!r}, which is none: {error}"
            ) from None
    else:
        _check_names("target_modules", targets)
        found = [name for name in places if free(name) and ends_with_one(name, targets)]
        for end in targets:
            if not any(ends_with_one(name, [end]) for name in found):
                raise ValueError(_no_match(repr(end), model))
    if not found:
        raise ValueError(_no_match(repr(targets), model))
    return found


def _no_match(wanted: str, model: nn.Module) -> str:
    return (
        f"target_modules: expected names of linear layers, got {wanted}, which matches none; there is {_linears(model)}"
    )


def _linears(model: nn.Module) -> str:
    """For messages: "query (12 times 768 -> 768), ..."."""
    counts = Counter(
        (name.rpartition(".")[2], *(layer.weight.shape if is_conv1d(layer) else layer.weight.shape[::-1]))
        for name, layer in model.named_modules()
        if _is_linear(layer)
    )
    told = [f"{name} ({count} times {k} -> {n})" for (name, k, n), count in counts.items()]
    more = f", and {len(told) - 20} more" if len(told) > 20 else ""
    return ", ".join(told[:20]) + more if told else "a model without linear layers"


def _check_names(name: str, value: object) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        raise TypeError(f"{name}: expected a list of names, got {type(value).__name__}")
    for end in value:
        if not isinstance(end, str) or not end:
            raise TypeError(f"{name}: expected names, got {end!r}")


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if _is_linear(model):
        raise TypeError(
            f"model: expected a module that contains linear layers, got {type(model).__name__} itself, for which there "
            "is LoRALinear.from_layer"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "model: expected the model itself, got DistributedDataParallel, which must be told of new parameters: wrap "
            "the model afterwards"
        )
    for name, p in model.named_parameters():
        if is_sharded(p):
            raise TypeError(f"model: expected whole parameters, got sharded ones ({name}): shard the model afterwards")
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) or is_peft(module):
            kind = "PEFT's" if is_peft(module) else "LoRALinear's; unload_lora(model) takes them out"
            raise ValueError(
                f"model: expected a model without adapters, got one with {kind} ({name or type(module).__name__})"
            )


def is_peft(module: nn.Module) -> bool:
    """Whether it is a layer or a model of PEFT, which need not be installed."""
    return any(c.__module__.startswith("peft.") for c in type(module).__mro__)


def _check_owner(name: str, place: _Place) -> None:
    parent = place.parent
    encoder = isinstance(parent, nn.TransformerEncoderLayer) and place.child in ("linear1", "linear2")
    if encoder or isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{name}: expected a layer that its owner calls, got one of {type(parent).__name__}, which reads the "
            "weight without calling it, so that the low-rank term would be lost"
        )
