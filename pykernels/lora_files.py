"""save_lora and load_lora: PEFT's adapter folders, written from and read into LoRALinear layers, without PEFT.

adapter_config.json         ranks, alphas, which layers: a peft.LoraConfig
adapter_model.safetensors   base_model.model.<layer>.lora_A.weight [r, K] and .lora_B.weight [N, r], with DoRA also
                            .lora_magnitude_vector [N], and what else was trained: biases, and whole modules (PEFT:
                            modules_to_save)
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import words
from ._dtensor import is_sharded
from ._files import save_tensors, write_atomically
from .lora import LoRALinear
from .lora_model import check_model, ends_with_one, lora_layers, replace_layers

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# Fields of a LoraConfig that load_lora heeds, and those that change nothing once the tensors are there.
_HEEDED = (
    "peft_type r lora_alpha lora_dropout use_rslora use_dora bias modules_to_save rank_pattern alpha_pattern"
).split()
_WITHOUT_EFFECT = (
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules "
    "exclude_modules fan_in_fan_out layers_to_transform layers_pattern megatron_core qalora_group_size runtime_config "
    "eva_config"
).split()
# The adapter's tensors; PEFT has had magnitudes with and without ".weight".
_FACTOR = r"(.+)\.lora_(?:([AB])\.weight|(magnitude_vector)(?:\.weight)?)"
_PARAMETERS = {"A": "lora_a", "B": "lora_b", "magnitude_vector": "magnitude"}
# Initialisations that also change the weights of the base model, which the folder does not hold.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_lora(
    model: nn.Module, folder: str | os.PathLike[str], *, base_model: str | None = None, task_type: str | None = None
) -> None:
    """Writes an adapter folder that `peft.PeftModel.from_pretrained(plain model, folder)` and `load_lora` read.

    It holds the adapters, trained biases, and the modules of which every parameter is trained. Merged layers are
    written as if they were not. base_model and task_type ("SEQ_CLS", ...) are notes for PEFT. Where fully_shard has
    sharded the model, all processes must call, and each writes the whole.

    Each file is written whole or not at all. ValueError, before anything is written, for what the format cannot hold: a
    trained parameter in a module that is otherwise frozen, different dropouts, rslora or dora in some layers, or
    adapters and biases trained in part.
    """
    layers = lora_layers(model)
    modules, bias = _trained_besides(model, layers)
    common: dict[str, Any] = {}
    for name in ("dropout", "rslora", "dora"):
        common[name], *others = sorted({getattr(layer, name) for layer in layers.values()})
        if others:
            raise ValueError(f"model: expected one {name} for all layers, got {[common[name], *others]}")
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: _alpha(layer) for name, layer in layers.items()}
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": common["dropout"],
        "use_rslora": common["rslora"],
        "use_dora": common["dora"],
        "target_modules": _targets(model, layers),
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
        "bias": bias,
        "modules_to_save": modules or None,
        "rank_pattern": {f"^{re.escape(name)}": n for name, n in ranks.items() if n != r},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
    }
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b
        if layer.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.magnitude
        if bias != "none" and layer.bias is not None:
            tensors[f"{PREFIX}{name}.base_layer.bias"] = layer.bias
    if bias == "all":
        for name, p in model.named_parameters():
            owner, _, last = name.rpartition(".")
            if last == "bias" and owner not in layers:
                tensors[PREFIX + name] = p
    for module in modules:
        state = model.get_submodule(module).state_dict()
        tensors |= {f"{PREFIX}{module}.{key}": t for key, t in state.items()}
    # Sharded parameters are put together, by all processes in this order.
    tensors = {key: t.full_tensor() if is_sharded(t) else t for key, t in tensors.items()}  # type: ignore[attr-defined]
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    save_tensors(path / WEIGHTS, tensors, {"format": "pt"})
    write_atomically(path / CONFIG, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_lora(model: nn.Module, folder: str | os.PathLike[str], *, backend: str | None = None) -> nn.Module:
    """Adapts a plain model as the adapter folder says, of PEFT or of `save_lora`, and returns it, changed.

    The adapters and the biases and modules that the folder holds are trained from here on, all else is frozen.

    FileNotFoundError where a file is missing. TypeError or ValueError with the name, before anything is changed: for
    features that LoRALinear does not have (lora_bias, LoRA of embeddings, a field that is not known), for tensors that
    do not fit the model or that nothing asks for, and for models that already have adapters.
    """
    check_model(model)
    path = Path(folder)
    config, tensors = _read_config(path), _read_tensors(path)
    state = dict(model.state_dict())
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, t in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := re.fullmatch(_FACTOR, name):
            factors.setdefault(match[1], {})[match[2] or match[3]] = t
            continue
        # With bias="all" PEFT writes the biases of whole modules once more, of the frozen originals too.
        if re.search(r"\.(original_module|modules_to_save)\.(.+\.)?bias$", name):
            continue
        name = name.replace(".base_layer.", ".")
        if not key.startswith(PREFIX) or name not in state:
            raise ValueError(f"{WEIGHTS}: expected lora_A, lora_B and tensors of the model, got {key}")
        if t.shape != state[name].shape:
            raise ValueError(f"{WEIGHTS}: expected shape {list(state[name].shape)} of {key}, got {list(t.shape)}")
        others[name] = t

    ranks = {name: _rank_and_alpha(config, name, pair, model) for name, pair in factors.items()}
    if not ranks:
        raise ValueError(f"{WEIGHTS}: expected lora_A and lora_B of some layers, got none")
    for name, layer in dict(model.named_modules()).items():
        if name in ranks:
            ranks |= {n: ranks[name] for n, m in model.named_modules(remove_duplicate=False) if m is layer}
    whole = [name for name, _ in model.named_modules() if ends_with_one(name, config["modules_to_save"] or ())]
    options = {"dropout": config["lora_dropout"], "rslora": config["use_rslora"], "dora": config["use_dora"]}
    options["backend"] = backend
    replace_layers(model, ranks, whole, config["bias"], options)
    with torch.no_grad():
        for name, pair in factors.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, LoRALinear)
            for key, t in pair.items():
                getattr(layer, _PARAMETERS[key]).copy_(t)
        state = dict(model.state_dict(keep_vars=True))
        for name, t in others.items():
            state[name].copy_(t)
    return model


# --- reading ---


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"folder: expected one with {CONFIG}, got {folder}") from None
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: expected JSON, got a file that is none: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{CONFIG}: expected peft_type 'LORA', got {got!r}")
    start = config.pop("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGE_BASE):
        raise ValueError(
            f"{CONFIG}: init_lora_weights {start!r} changes the base model's weights, which are not in the folder; "
            "have PEFT convert the adapter when it saves (path_initial_model_for_weight_conversion)"
        )
    for name, value in config.items():
        if name not in _HEEDED and name not in _WITHOUT_EFFECT and value:
            raise ValueError(
                f"{CONFIG}: {name}: expected nothing or false (LoRALinear has no such thing), got {value!r}"
            )
    defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "bias": "none"}
    patterns: dict[str, Any] = {"modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
    return defaults | patterns | {name: value for name, value in config.items() if name in _HEEDED}


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.exists():
        pickled = " (adapter_model.bin is a pickle, which is not read; save it with safetensors)"
        more = pickled if (folder / "adapter_model.bin").exists() else ""
        raise FileNotFoundError(f"folder: expected one with {WEIGHTS}, got {folder}{more}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got one that is none: {error}") from None


def _rank_and_alpha(
    config: Mapping[str, Any], name: str, pair: Mapping[str, Tensor], model: nn.Module
) -> tuple[int, float]:
    """Checks the factors of one layer against the configuration and the model."""
    wanted = ["A", "B"] + ["magnitude_vector"] * bool(config["use_dora"])
    if wrong := sorted(set(wanted) ^ pair.keys()):
        got = "none of" if wrong[0] in wanted else "also"
        told = " and ".join(f"lora_{key}" for key in wanted)
        raise ValueError(f"{WEIGHTS}: expected {told} of {name}, got {got} lora_{wrong[0]}")
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{WEIGHTS}: expected layers of the model, got {name}, which it does not have") from None
    r = _of_pattern(config["rank_pattern"], name, config["r"])
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        n, k = weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1]
        shapes = {"A": (r, k), "B": (n, r), "magnitude_vector": (n,)}
        for key, shape in shapes.items():
            if key in pair and tuple(pair[key].shape) != shape:
                raise ValueError(
                    f"{WEIGHTS}: expected shape {list(shape)} of {name}.lora_{key}, got {list(pair[key].shape)}"
                )
    return r, _of_pattern(config["alpha_pattern"], name, config["lora_alpha"])


def _of_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """As PEFT looks it up: the first pattern that the end of the name matches."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


# --- writing ---


def _alpha(layer: LoRALinear) -> float:
    """That which gives the layer's scale, also where that was changed."""
    root = math.sqrt(layer.r) if layer.rslora else layer.r
    return layer.alpha if layer.alpha / root == layer.scale else layer.scale * root


def _targets(model: nn.Module, layers: Mapping[str, LoRALinear]) -> list[str] | str:
    """target_modules that PEFT understands as exactly these layers: last parts, whole names, or an expression."""
    names = [name for name, _ in model.named_modules()]
    for ends in (sorted({name.rpartition(".")[2] for name in layers}), sorted(layers)):
        if {name for name in names if ends_with_one(name, ends)} == layers.keys():
            return ends
    return "|".join(map(re.escape, layers))


def _trained_besides(model: nn.Module, layers: Mapping[str, LoRALinear]) -> tuple[list[str], str]:
    """Modules of which all parameters are trained, the outermost ones, and the `bias` of PEFT's configuration."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    for name, layer in layers.items():
        if not all(getattr(layer, parameter).requires_grad for parameter in layer.adapter_keys):
            told = f"{', '.join(layer.adapter_keys[:-1])} and {layer.adapter_keys[-1]}"
            raise ValueError(f"model: expected {told} to require gradients (what does is written), got {name} frozen")
    modules: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in modules)
        if not name or inside or not any(True for _ in module.parameters()):
            continue
        if not any(p.startswith(f"{name}.") for p in frozen) and not any(
            isinstance(m, LoRALinear) for m in module.modules()
        ):
            modules.append(name)
    factors = {f"{name}.{parameter}" for name, layer in layers.items() for parameter in layer.adapter_keys}
    rest = {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and name not in factors and not name.startswith(tuple(f"{m}." for m in modules))
    }
    if not rest:
        return modules, "none"
    adapted = {f"{name}.bias" for name, layer in layers.items() if layer.bias is not None}
    biases = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    if rest == adapted:
        return modules, "lora_only"
    if rest <= biases and not biases & set(frozen):
        return modules, "all"
    wrong = sorted(rest - biases) or sorted(biases & set(frozen))
    raise ValueError(
        "model: expected whole modules, the biases of all adapted layers, or all biases to be trained, got "
        f"{words(wrong[:3])} {'trained' if wrong[0] in rest else 'frozen'}"
    )
