"""Everything that a run needs to go on exactly, in one safetensors file that is whole or the one before.

Tensors: weights of all modules, state of the optimizer, the state of PyTorch's generator. The metadata holds the rest
as JSON. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from pykernels.models.files import save_tensors

from .run import Refused


def save(path: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer, progress: Mapping[str, Any]) -> None:
    """progress: whatever JSON can hold."""
    tensors: dict[str, Tensor] = {"torch_rng": torch.get_rng_state()}
    for name, module in modules.items():
        tensors |= {f"module.{name}.{key}": t for key, t in module.state_dict().items()}
    state = optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    seen: set[int] = set()
    for name, t in tensors.items():
        if t.data_ptr() in seen:
            tensors[name] = t.clone()  # safetensors refuses tied weights
        elif t.numel():
            seen.add(t.data_ptr())
    about = {"progress": progress, "optimizer_groups": state["param_groups"], "optimizer_plain": plain}
    save_tensors(path, tensors, {name: json.dumps(value) for name, value in about.items()})


def load(path: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer) -> dict[str, Any]:
    """Puts everything back and returns the progress. Refuses a file that is no such checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            about = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    except SafetensorError as error:
        raise Refused(f"{path}: no checkpoint: {error}") from None
    if missing := {"progress", "optimizer_groups", "optimizer_plain"} - about.keys():
        raise Refused(f"{path}: no checkpoint of a run: it lacks {', '.join(sorted(missing))}")
    for name, module in modules.items():
        prefix = f"module.{name}."
        module.load_state_dict({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
    state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in about["optimizer_plain"].items()}
    for key, t in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = t
    groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in about["optimizer_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    torch.set_rng_state(tensors["torch_rng"])
    return about["progress"]
