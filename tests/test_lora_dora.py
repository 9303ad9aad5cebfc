"""LoRALinear and apply_lora with dora=True: values, parameters, merging, folders that PEFT reads, groups of LoRA+."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pykernels import (
    LoRALinear,
    apply_lora,
    dora_linear,
    load_lora,
    lora_disabled,
    lora_layers,
    loraplus_param_groups,
    merge_lora,
    save_lora,
    unload_lora,
    unmerge_lora,
)
from tests.helpers import FLOATS


def filled(layer: Any) -> Any:
    """As after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in (layer.lora_a, layer.lora_b):
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
        layer.magnitude.mul_(1 + torch.rand(layer.magnitude.shape, generator=generator))
    return layer


def conv1d(inputs: int, outputs: int) -> nn.Module:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    return pytorch_utils.Conv1D(outputs, inputs)


def made(kind: str, inputs: int, outputs: int, dtype: torch.dtype = torch.float32, **options: Any) -> LoRALinear:
    torch.manual_seed(0)
    if kind == "scratch":
        return LoRALinear(inputs, outputs, 5, dora=True, dtype=dtype, **options)
    base = nn.Linear(inputs, outputs) if kind == "linear" else conv1d(inputs, outputs)
    return LoRALinear.from_layer(base.to(dtype), 5, dora=True, **options)


KINDS = ["scratch", "linear", "conv1d"]


def exact_weight(layer: LoRALinear) -> Tensor:
    """[N, K], float64."""
    weight = layer.original_weight.double()
    V = (weight.t() if layer.fan_in_fan_out else weight) + layer.scale * layer.lora_b.double() @ layer.lora_a.double()
    return V * (layer.magnitude.double() / V.norm(dim=1))[:, None]


# --- the layer ---


@pytest.mark.parametrize("init", ["b_zero", "a_zero"])
@pytest.mark.parametrize("kind", KINDS)
def test_begins_as_the_linear_layer(kind: str, init: str) -> None:
    layer = made(kind, 40, 24, init=init)
    weight = layer.weight.t() if kind == "conv1d" else layer.weight
    torch.testing.assert_close(layer.magnitude, weight.norm(dim=1))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b", "magnitude"}
    assert layer.magnitude.shape == (24,) and "magnitude" in layer.state_dict()
    assert "dora=True" in repr(layer) and layer.adapter_keys == ["lora_a", "lora_b", "magnitude"]
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_function(kind: str, dtype: str, backend: str) -> None:
    layer = filled(made(kind, 9, 6, FLOATS[dtype], dropout=0.4, backend=backend))
    exact = torch.float64 if dtype == "fp64" else torch.float32
    assert layer.lora_a.dtype == layer.magnitude.dtype == exact
    x = torch.randn(2, 4, 9).to(FLOATS[dtype])
    weight = layer.weight.t() if kind == "conv1d" else layer.weight
    arguments = {"bias": layer.bias, "scale": layer.scale, "backend": backend}
    parameters = x, weight, layer.lora_a, layer.lora_b, layer.magnitude
    dropped = dora_linear(*parameters, **arguments, dropout=0.4, training=True, seed=11)
    assert torch.equal(layer(x, seed=11), dropped)
    assert torch.equal(layer.eval()(x, seed=11), dora_linear(*parameters, **arguments))
    assert not torch.equal(layer(x), dropped)
    bias = None if layer.bias is None else layer.bias.double()
    expected = F.linear(x.double(), exact_weight(layer), bias)
    tolerance = 24 * torch.finfo(FLOATS[dtype]).eps
    torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_exact_unmerge(kind: str, dtype: str) -> None:
    layer = filled(made(kind, 40, 24, FLOATS[dtype])).eval()
    x, before = torch.randn(7, 40).to(FLOATS[dtype]), layer.weight
    bits, state = before.clone(), {name: t.clone() for name, t in layer.state_dict().items()}
    separate = layer(x)
    assert layer.merge() is layer and layer.merged and layer.weight.dtype == FLOATS[dtype]
    assert torch.equal(layer.merge().weight, layer.weight), "merged twice"
    exact = exact_weight(layer).t() if kind == "conv1d" else exact_weight(layer)
    unit = torch.finfo(FLOATS[dtype]).eps / 2 + 64 * torch.finfo(torch.promote_types(FLOATS[dtype], torch.float32)).eps
    assert ((layer.weight.double() - exact).abs() <= unit * exact.abs() + unit * 2**-4).all()
    torch.testing.assert_close(before.double() + layer.delta_weight().double(), exact, rtol=1e-5, atol=1e-5)
    tolerance = 24 * torch.finfo(FLOATS[dtype]).eps
    torch.testing.assert_close(layer(x), separate, rtol=tolerance, atol=tolerance * 4)
    merged_state = layer.state_dict()
    assert merged_state.keys() == state.keys() and all(torch.equal(merged_state[n], t) for n, t in state.items())
    layer.enabled = False
    plain = before.t() if kind == "conv1d" else before
    assert torch.equal(layer(x), F.linear(x, plain, layer.bias)), "disabled while merged"
    layer.enabled = True
    assert layer.unmerge() is layer and layer.weight is before and torch.equal(before, bits)
    assert torch.equal(layer(x), separate)
    layer.enabled = False
    assert torch.equal(layer(x), F.linear(x, plain, layer.bias))


def test_a_merged_layer_is_not_trained_and_follows_load_state_dict() -> None:
    layer = filled(LoRALinear(6, 4, 2, dora=True)).merge()
    for name in ("lora_a", "lora_b"):
        getattr(layer, name).requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"^LoRALinear: expected an unmerged layer in training"):
        layer(torch.randn(3, 6))
    other = LoRALinear(6, 4, 2, dora=True)
    with torch.no_grad():
        other.magnitude.mul_(2)
    layer.load_state_dict(other.state_dict())
    assert layer.merged and torch.equal(layer.weight, copy.deepcopy(other).merge().weight)
    layer.double()
    assert layer.merged and layer.magnitude.dtype == torch.float64
    assert torch.equal(layer.unmerge().weight, other.double().weight)


def test_a_linear_layers_state_dict_brings_its_magnitude() -> None:
    """Otherwise the rows would be given the lengths of the weight that was replaced."""
    linear, layer, x = nn.Linear(6, 5), LoRALinear(6, 5, dora=True), torch.randn(4, 6)
    missing = layer.load_state_dict(linear.state_dict(), strict=False).missing_keys
    assert missing == ["lora_a", "lora_b", "magnitude"]
    torch.testing.assert_close(layer(x), linear(x))
    before = layer.magnitude.clone()
    layer.load_state_dict({"bias": linear.bias}, strict=False)
    assert torch.equal(layer.magnitude, before)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_autocast(base: torch.dtype, adapter: torch.dtype, dropout: float) -> None:
    layer = filled(LoRALinear(32, 16, 4, dropout=dropout, dora=True, dtype=base, adapter_dtype=adapter))
    for x in (torch.randn(5, 32), torch.randn(5, 32).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer.train()(x)
            evaluated = layer.eval()(x)
        y.float().sum().backward()
        assert y.dtype == evaluated.dtype == torch.bfloat16
        assert {layer.get_parameter(name).grad.dtype for name in layer.adapter_keys} == {adapter}
        expected = F.linear(x.double(), exact_weight(layer), layer.bias.double())
        torch.testing.assert_close(evaluated.double(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_dropout(use_reentrant: bool) -> None:
    layer, x = filled(LoRALinear(32, 16, 4, dropout=0.5, dora=True)), torch.randn(5, 32, requires_grad=True)
    results = []
    for call in (layer, lambda t: checkpoint(layer, t, use_reentrant=use_reentrant)):
        torch.manual_seed(9)
        layer.zero_grad()
        x.grad = None
        y = call(x)
        y.sin().sum().backward()
        results.append([y, x.grad, *(layer.get_parameter(name).grad for name in layer.adapter_keys)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_compiled_whole(extension: object) -> None:
    layers = nn.Sequential(LoRALinear(8, 12, 3, dropout=0.3, dora=True), LoRALinear(12, 4, 2, dora=True))
    for layer in layers:
        filled(layer)
    x = torch.randn(5, 8, requires_grad=True)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layers, compiled):
        torch.manual_seed(2)
        y = call(x)
        trained = [x, *(p for p in layers.parameters() if p.requires_grad)]
        results.append([y, *torch.autograd.grad(y.square().sum(), trained)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_float32_copy_of_x(kernels: str) -> None:
    """Under dropout neither: float32 adapters on a bfloat16 layer."""
    rows, inputs = 512, 1024
    for dropout in (0.0, 0.2):
        layer = filled(LoRALinear(inputs, 8, 4, dropout=dropout, dora=True, dtype=torch.bfloat16, backend=kernels))
        x = torch.randn(rows, inputs).bfloat16()
        layer(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            layer(x).sum().backward()
        floats = [e for e in profile.events() if e.cpu_memory_usage >= rows * inputs * 4]
        # Dropout's draws are 32-bit numbers for a moment.
        assert {e.name for e in floats} <= {"pykernels::_random_bits", "aten::empty"} if dropout else not floats


# --- whole models ---


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def plain() -> Model:
    torch.manual_seed(1)
    return Model().eval()


def adapted(**options: Any) -> Any:
    model = apply_lora(plain(), ["up", "down"], 3, 6.0, dora=True, **options)
    for layer in lora_layers(model).values():
        filled(layer)
    return model


def test_states_of_a_model() -> None:
    x, model = torch.randn(5, 8), adapted()
    own, base = model(x), plain()(x)
    assert not torch.allclose(own, base, atol=1e-2)
    with lora_disabled(model):
        torch.testing.assert_close(model(x), base)
    torch.testing.assert_close(merge_lora(model)(x), own, rtol=1e-5, atol=1e-5)
    assert torch.equal(unmerge_lora(model)(x), own)
    torch.testing.assert_close(unload_lora(copy.deepcopy(model), merge=True)(x), own, rtol=1e-5, atol=1e-5)
    unloaded = unload_lora(model)
    assert type(unloaded.up) is nn.Linear and torch.equal(unloaded(x), base)


def test_training_moves_magnitude_and_no_weight() -> None:
    model = adapted(dropout=0.1).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(loraplus_param_groups(model, 0.01, 4.0, weight_decay=0.0))
    x, wanted = torch.randn(16, 8), torch.randn(16, 3)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(model(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{layer}.{p}" for layer in ("up", "down") for p in ("lora_a", "lora_b", "magnitude")}


@pytest.mark.parametrize("options", [{}, {"rslora": True, "dropout": 0.25}, {"bias": "all", "trainable": ["head"]}])
def test_folders(options: dict[str, Any], tmp_path: Path) -> None:
    """There and back, through PEFT, which computes the same."""
    x, model = torch.randn(5, 8), adapted(**options).eval()
    own = model(x)
    save_lora(merge_lora(model), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["use_dora"] is True
    keys = load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
    assert {f"base_model.model.{layer}.lora_magnitude_vector" for layer in ("up", "down")} <= keys
    loaded = load_lora(plain(), tmp_path / "ours")
    assert torch.equal(loaded(x), own)
    assert all(torch.equal(t, unmerge_lora(model).state_dict()[name]) for name, t in loaded.state_dict().items())
    assert all(p.requires_grad == model.get_parameter(name).requires_grad for name, p in loaded.named_parameters())

    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path / "ours").eval()
    assert "lora_magnitude_vector" in repr(theirs)
    torch.testing.assert_close(theirs(x), own, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(load_lora(plain(), tmp_path / "theirs")(x), own)


def test_transformers_models_with_conv1d(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=30, n_positions=12)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(9)[None]
    lora = peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True)
    theirs = peft.get_peft_model(copy.deepcopy(model), lora).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.mul_(1.5).add_(0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_lora(copy.deepcopy(model), tmp_path / "theirs")
    assert all(layer.dora and layer.fan_in_fan_out for layer in lora_layers(ours).values())
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merge_lora(ours)(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    save_lora(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    torch.testing.assert_close(back(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    save_lora(adapted(), tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    key = "base_model.model.up.lora_magnitude_vector"

    def assert_refused(message: str, tensors: dict[str, Tensor], **changed: Any) -> None:
        save_file(tensors, weights)
        config.write_text(json.dumps(fields | changed))
        model = plain()
        with pytest.raises(ValueError, match=f"^adapter_model.safetensors: {message}"):
            load_lora(model, tmp_path)
        assert repr(model) == repr(plain()) and all(p.requires_grad for p in model.parameters())

    assert_refused(
        "expected lora_A and lora_B and lora_magnitude_vector of up, got none of lora_magnitude_vector",
        {name: t for name, t in tensors.items() if name != key},
    )
    column = {key: tensors[key][:, None]}
    assert_refused(r"expected shape \[12\] of up.lora_magnitude_vector, got \[12, 1\]", tensors | column)
    assert_refused("expected lora_A and lora_B of .*, got also lora_magnitude_vector", tensors, use_dora=False)
    save_file({name + ".weight" * (name == key): t for name, t in tensors.items()}, weights)
    config.write_text(json.dumps(fields))
    assert torch.equal(load_lora(plain(), tmp_path).up.magnitude, tensors[key]), "as some releases of PEFT name it"


def test_models_that_no_folder_holds(tmp_path: Path) -> None:
    model = adapted()
    model.up.magnitude.requires_grad_(False)
    message = r"^model: expected lora_a, lora_b and magnitude to require gradients .* got up frozen"
    with pytest.raises(ValueError, match=message):
        save_lora(model, tmp_path / "new")
    model = adapted()
    model.up = LoRALinear.from_layer(model.up.to_layer(), 3, 6.0)
    with pytest.raises(ValueError, match=r"^model: expected one dora for all layers, got \[False, True\]"):
        save_lora(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- LoRA+ ---


def groups_by_layer(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_loraplus_groups_are_those_of_peft() -> None:
    """A magnitude has one dimension, which the authors' rule and PEFT put beside lora_b."""
    model = adapted()
    got = groups_by_layer(model, loraplus_param_groups(model, 1e-3, 16, weight_decay=0.1))
    assert got["up.magnitude"] == got["up.lora_b"] == (16e-3, 0.1) and got["up.lora_a"] == (1e-3, 0.1)
    rates = groups_by_layer(model, loraplus_param_groups(model, 1e-3, "article", weight_decay=0.1))
    assert rates["up.magnitude"][0] == 1e-3, "the article does not speak of it"
    assert math.isclose(rates["up.lora_b"][0], 1e-3 * 8 / 12 * math.sqrt(8 / 3))

    peft = pytest.importorskip("peft", reason="peft is not installed")
    from peft.optimizers import create_loraplus_optimizer

    theirs = peft.get_peft_model(plain(), peft.LoraConfig(r=3, target_modules=["up", "down"], use_dora=True))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    expected = groups_by_layer(theirs, optimizer.param_groups)
    prefix = "base_model.model.up."
    assert expected[f"{prefix}lora_magnitude_vector.default.weight"] == got["up.magnitude"]
    assert expected == groups_by_layer(theirs, loraplus_param_groups(theirs, 1e-3, 16, weight_decay=0.1))
