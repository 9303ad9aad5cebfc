"""LoRA+: the output-side factor of LoRA learns with a larger rate than the input-side factor.

Hayou, Ghosh and Yu 2024 (https://arxiv.org/abs/2402.12354) set the ratio of the rates by hand, 2 ... 32. The article
https://kexue.fm/archives/10001 derives it from equal contributions of both factors to the change of the loss under
SignSGD: with n inputs, m outputs and rank r,

    ratio = (n / m) sqrt(n / r)
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_float


def loraplus_param_groups(
    model: nn.Module,
    lr: float,
    ratio: float | str = 16.0,
    *,
    weight_decay: float | None = None,
    lr_embedding: float = 1e-6,
    named: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer, of a model with LoRALinear layers or of a PEFT model.

    They are those of the authors and of PEFT, in this order, with the model's trained parameters in its own order:

        A            lr            lora_a, and all other tensors of two or more dimensions (a new classifier's weight)
        embedding    lr_embedding  both factors of PEFT's LoRA embedding layers
        B            lr * ratio    lora_b, and tensors of one dimension but for those of the next group
        B_no_decay   lr * ratio    biases and the parameters of LayerNorm, without weight decay

    Args:
        lr: of A; about half of what LoRA would take, advise the authors.
        ratio: a number > 0, or "article" for the article's ratio of each layer. Then B becomes a group for each ratio
            that occurs; tensors of one dimension, of which the article does not speak, have lr.
        weight_decay: of the first three groups; None leaves it to the optimizer's own argument.
        named: tell the optimizer the parameters' names, by which ChildTuning's masks are given. All groups of an
            optimizer have names or none has.

    With ratio 1, without LoRA embeddings and without decayed biases or norms the optimizer makes the steps that it
    makes on `model.parameters()`, bit for bit. A group's "name" is for logs; optimizers keep it and do not use it.
    """
    for name, value in (("lr", lr), ("lr_embedding", lr_embedding), ("weight_decay", weight_decay)):
        if value is not None:
            check_float(name, value)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    if isinstance(ratio, str):
        if ratio != "article":
            raise ValueError(f"ratio: expected a number or 'article', got {ratio!r}")
    else:
        check_float("ratio", ratio)
        if not (math.isfinite(ratio) and ratio > 0):
            raise ValueError(f"ratio: expected a finite number > 0, got {ratio}")

    without_decay = _norm_parameters(model)
    input_side: list[Tensor] = []
    embedding: list[Tensor] = []
    output_side: dict[float, list[Tensor]] = {} if ratio == "article" else {float(ratio): []}
    no_decay: list[Tensor] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        factor = "lora_B" in name or name.rpartition(".")[2] == "lora_b"
        if _of_embedding(model, name):
            embedding.append(p)
        elif not factor and p.dim() != 1:
            input_side.append(p)
        elif "bias" in name or id(p) in without_decay:
            no_decay.append(p)
        else:
            own = float(ratio) if ratio != "article" else _article_ratio(model, name, p) if factor else 1.0
            output_side.setdefault(own, []).append(p)
    if not (input_side or embedding or any(output_side.values()) or no_decay):
        raise ValueError("model: expected parameters that require gradients, got none")

    plain = 1.0 if ratio == "article" else float(ratio)
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [
        {"name": "A", "params": input_side, "lr": lr, **decay},
        {"name": "embedding", "params": embedding, "lr": lr_embedding, **decay},
        *({"name": "B", "params": ps, "lr": lr * own, **decay} for own, ps in output_side.items()),
        {"name": "B_no_decay", "params": no_decay, "lr": lr * plain, "weight_decay": 0.0},
    ]
    if named:
        names = {id(p): name for name, p in model.named_parameters()}
        # As pairs in "params" an empty group would count as one without names.
        groups = [{**group, "param_names": [names[id(p)] for p in group["params"]]} for group in groups]
    return groups


def _norm_parameters(model: nn.Module) -> set[int]:
    """Parameters inside of LayerNorm, as transformers' trainer knows it, by identity."""
    classes = getattr(sys.modules.get("transformers.pytorch_utils"), "ALL_LAYERNORM_LAYERS", [nn.LayerNorm])
    return {id(p) for module in model.modules() if isinstance(module, tuple(classes)) for p in module.parameters()}


def _of_embedding(model: nn.Module, name: str) -> bool:
    """PEFT holds the factors of a layer in dictionaries below it: layer.lora_embedding_A.adapter."""
    layer = model.get_submodule(".".join(name.split(".")[:-2])) if name.count(".") > 1 else None
    return bool(len(getattr(layer, "lora_embedding_A", ())))


def _article_ratio(model: nn.Module, name: str, lora_b: torch.Tensor) -> float:
    try:
        lora_a = model.get_parameter(name.replace("lora_B", "lora_A").replace("lora_b", "lora_a"))
    except AttributeError:
        lora_a = None
    if lora_a is None or lora_a.dim() != 2 or lora_b.dim() != 2:
        raise ValueError(f"ratio: expected a number where LoRA is not of linear layers alone ({name}), got 'article'")
    (r, n), m = lora_a.shape, lora_b.shape[0]
    return n / m * math.sqrt(n / r)
