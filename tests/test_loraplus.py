"""loraplus_param_groups: the authors' and PEFT's recorded groups and steps, the article's ratio, AdamW at ratio 1."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels import apply_lora, loraplus_param_groups
from tests.recorded import recorded

TOY_TARGETS = ["emb", "fc1", "fc2"]


class Toy(nn.Module):
    """The model of the recorded steps."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(7))
        self.emb = nn.Embedding(11, 6)
        self.fc1, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.fc2, self.head = nn.Linear(8, 7, bias=False), nn.Linear(7, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.fc2(torch.tanh(self.norm(self.fc1(self.emb(ids))))) * self.scale)


def toy_of_peft(case: str) -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    bias = {"toy_lora_only_bias": "lora_only", "toy_all_bias": "all"}.get(case, "none")
    saved = None if case == "toy_norm_unfrozen" else ["head"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=TOY_TARGETS, bias=bias, modules_to_save=saved)
    model = peft.get_peft_model(Toy(), config)
    if case == "toy_norm_unfrozen":
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("scale"):
                p.requires_grad_(True)
    return model


def roberta_of_peft() -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = transformers.RobertaForSequenceClassification(config)
    lora = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = peft.get_peft_model(model, lora)
    for name, p in model.named_parameters():
        if "classifier" in name and "dense" in name:
            p.requires_grad_(False)
    return model


CASES = ["toy_bias_none", "toy_lora_only_bias", "toy_all_bias", "toy_norm_unfrozen", "roberta_glue"]


# Of the recorded releases of PEFT the older one froze the biases that bias="lora_only" asks for.
RECORDS = [
    (case, run, function)
    for run, function in (("authors", "loraplus_repo"), ("current", "loraplus_repo"), ("current", "hf_peft"))
    for case in CASES
    if (run, case) != ("authors", "toy_lora_only_bias")
]


@pytest.mark.parametrize("case, run, function", RECORDS)
def test_recorded_groups(case: str, run: str, function: str) -> None:
    record = json.loads(recorded("golden", "loraplus_groups.json").read_text())["runs"][run]
    model = roberta_of_peft() if case == "roberta_glue" else toy_of_peft(case)
    kwargs = record["optimizer_kwargs"]
    lr_embedding = record["loraplus_lr_embedding"].get(case, 1e-6)
    groups = loraplus_param_groups(
        model, kwargs["lr"], record["loraplus_lr_ratio"], weight_decay=kwargs["weight_decay"], lr_embedding=lr_embedding
    )
    names = {id(p): name for name, p in model.named_parameters()}
    got = [
        {
            "group": g["name"],
            "lr": g["lr"],
            "weight_decay": g["weight_decay"],
            "names": [names[id(p)] for p in g["params"]],
        }
        for g in groups
    ]
    wanted = [{k: v for k, v in g.items() if k != "shapes"} for g in record["cases"][case][function]]
    assert got == wanted
    torch.optim.AdamW(groups, lr=kwargs["lr"])


def record_of_steps() -> tuple[dict[str, Any], dict[str, Any]]:
    file = np.load(recorded("golden", "loraplus_step.npz"))
    return {name: file[name] for name in file.files if name != "__meta__"}, json.loads(str(file["__meta__"]))


def optimizer_of(model: nn.Module, about: dict[str, Any]) -> torch.optim.AdamW:
    kwargs = about["kwargs"]
    groups = loraplus_param_groups(
        model, kwargs["lr"], about["ratio"], weight_decay=kwargs["weight_decay"], lr_embedding=about["lr_embedding"]
    )
    return torch.optim.AdamW(groups, betas=tuple(kwargs["betas"]), eps=kwargs["eps"])


def put(tree: nn.Module, name: str, p: nn.Parameter) -> None:
    """A parameter under a dotted name, in modules that are made on the way."""
    *path, last = name.split(".")
    for part in path:
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree.get_submodule(part)
    tree.register_parameter(last, p)


def test_recorded_steps_from_recorded_gradients() -> None:
    """The authors' optimizer on a model of which the names, the values and the gradients are known."""
    record, about = record_of_steps()
    tree = nn.Module()
    names = [key[2:-6] for key in record if key.startswith("p/") and key.endswith("/step0")]
    for name in names:
        trained = f"p/{name}/step1" in record
        put(tree, name, nn.Parameter(torch.tensor(record[f"p/{name}/step0"]), requires_grad=trained))
    emb = tree.get_submodule("base_model.model.emb")
    emb.lora_embedding_A = nn.ParameterDict(dict(emb.lora_embedding_A.named_parameters()))
    optimizer = optimizer_of(tree, about)
    for step in (1, 2, 3):
        for name, p in tree.named_parameters():
            if p.requires_grad:
                p.grad = torch.tensor(record[f"g/{name}/step{step}"])
        optimizer.step()
        for name, p in tree.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(
                    p.detach(), torch.tensor(record[f"p/{name}/step{step}"]), rtol=1e-6, atol=1e-7
                )


def test_recorded_steps_in_whole() -> None:
    """The same with the forward and the gradients of PEFT's model."""
    record, about = record_of_steps()
    model = toy_of_peft("toy_bias_none").train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.tensor(record[f"p/{name}/step0"]))
    optimizer = optimizer_of(model, about)
    for step in (1, 2, 3):
        x, y = (torch.tensor(record[name][step - 1]) for name in "xy")
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        torch.testing.assert_close(logits.detach(), torch.tensor(record[f"logits/step{step}"]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss.detach(), torch.tensor(record[f"loss/step{step}"]), rtol=1e-5, atol=1e-6)
        optimizer.step()
        for name, p in model.named_parameters():
            if p.requires_grad:
                wanted = torch.tensor(record[f"p/{name}/step{step}"])
                torch.testing.assert_close(p.detach(), wanted, rtol=1e-4, atol=1e-5, msg=name)


# --- our own layers ---


def ours(bias: str = "none", trainable: tuple[str, ...] = ()) -> nn.Module:
    torch.manual_seed(0)
    return apply_lora(Toy(), ["fc1", "fc2"], 2, 4.0, bias=bias, trainable=trainable)


def named(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    told: dict[str, list[str]] = {}
    for group in groups:
        told.setdefault(group["name"], []).extend(names[id(p)] for p in group["params"])
    return told


def test_groups_of_our_layers() -> None:
    model = ours("all", ("head",))
    model.scale.requires_grad_(True)
    groups = loraplus_param_groups(model, 1e-3, 16)
    assert named(model, groups) == {
        "A": ["fc1.lora_a", "fc2.lora_a", "head.weight"],
        "embedding": [],
        "B": ["scale", "fc1.lora_b", "fc2.lora_b"],
        "B_no_decay": ["fc1.bias", "norm.bias", "head.bias"],
    }
    assert [g["lr"] for g in groups] == [1e-3, 1e-6, 16e-3, 16e-3]
    assert groups[-1]["weight_decay"] == 0.0 and all("weight_decay" not in g for g in groups[:-1])
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.3)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.3, 0.3, 0.0], "the optimizer's own is heard"


def test_ratio_of_the_article() -> None:
    """(n / m) sqrt(n / r), for our layers and PEFT's alike."""
    lr, model = 1e-3, ours(trainable=("norm", "head"))
    model.scale.requires_grad_(True)
    groups = loraplus_param_groups(model, lr, "article", weight_decay=0.1)
    rates = {name: g["lr"] for g in groups for name in named(model, [g])[g["name"]]}
    assert math.isclose(rates["fc1.lora_b"], lr * 6 / 8 * math.sqrt(6 / 2))
    assert math.isclose(rates["fc2.lora_b"], lr * 8 / 7 * math.sqrt(8 / 2))
    others = {"scale", "fc1.lora_a", "fc2.lora_a", "head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert {name: rates[name] for name in others} == dict.fromkeys(others, lr)
    assert [g["name"] for g in groups] == ["A", "embedding", "B", "B", "B", "B_no_decay"]
    twin = toy_of_peft("toy_bias_none")
    of_peft = loraplus_param_groups(twin, lr, "article")
    assert {g["lr"] for g in of_peft if g["name"] == "B"} == {rates["fc1.lora_b"], rates["fc2.lora_b"]}


@pytest.mark.parametrize("weight_decay, own", [(None, 0.0), (None, 0.1), (0.1, 0.0), (0.0, 0.0)])
def test_ratio_one_is_adamw_bitwise(weight_decay: float | None, own: float) -> None:
    """Acceptance 6. With decay, whoever is told of it: by the function or by the optimizer."""
    results = []
    for plus in (True, False):
        model = ours()
        if plus:
            parameters: Any = loraplus_param_groups(model, 0.01, 1.0, weight_decay=weight_decay)
            optimizer = torch.optim.AdamW(parameters, weight_decay=own)
        else:
            decay = own if weight_decay is None else weight_decay
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=decay)
        generator = torch.Generator().manual_seed(3)
        for _ in range(20):
            ids = torch.randint(0, 11, (4, 5), generator=generator)
            loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten() % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append(dict(model.named_parameters()))
    for name, p in results[0].items():
        assert torch.equal(p, results[1][name]), name
    assert not torch.equal(results[0]["fc1.lora_b"], ours().fc1.lora_b), "it has learned something"


def test_a_larger_ratio_moves_lora_b_further() -> None:
    moved = []
    for ratio in (1, 16):
        model = ours()
        optimizer = torch.optim.AdamW(loraplus_param_groups(model, 1e-3, ratio, weight_decay=0.0))
        model(torch.arange(11)).square().sum().backward()
        optimizer.step()
        moved.append(model.fc1.lora_b.abs().max().item())
    assert moved[1] == pytest.approx(16 * moved[0], rel=1e-3)


def test_arguments() -> None:
    model = ours()
    for arguments, options, error, message in [
        ((-1.0,), {}, ValueError, "lr: expected a finite number >= 0, got -1.0"),
        (("1",), {}, TypeError, "lr: expected a float, got str"),
        ((1e-3, 0), {}, ValueError, "ratio: expected a finite number > 0, got 0"),
        ((1e-3, "paper"), {}, ValueError, "ratio: expected a number or 'article', got 'paper'"),
        ((1e-3,), {"weight_decay": -0.1}, ValueError, "weight_decay: expected a finite number >= 0"),
        ((1e-3,), {"lr_embedding": math.nan}, ValueError, "lr_embedding: expected a finite number >= 0"),
    ]:
        with pytest.raises(error, match=f"^{message}"):
            loraplus_param_groups(model, *arguments, **options)
    with pytest.raises(ValueError, match=r"^model: expected parameters that require gradients, got none"):
        loraplus_param_groups(model.requires_grad_(False), 1e-3)
