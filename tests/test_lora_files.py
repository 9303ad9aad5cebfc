"""save_lora and load_lora: adapter folders that PEFT reads and writes, there and back; and damaged ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pykernels import LoRALinear, apply_lora, load_lora, lora_layers, merge_lora, save_lora


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in "12"])
        self.norm = nn.BatchNorm1d(8)  # has buffers
        self.head = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return self.head(self.norm(x.flatten(0, 1)))


def plain() -> Model:
    torch.manual_seed(1)
    return Model().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(2))


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def disturb(model: nn.Module) -> Any:
    """As after training: everything that is trained has other values, and so have the buffers of trained modules."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d) and module.weight.requires_grad:
                module.running_mean.copy_(torch.randn(8, generator=generator))
    return model


def varied(model: nn.Module) -> nn.Module:
    """Layers of different rank and scale."""
    apply_lora(model, ["up", "down"], 3, 6.0)
    for name, r, alpha in (("layers.0.up", 2, 6.0), ("layers.1.down", 3, 7.5)):
        layer = LoRALinear.from_layer(model.get_submodule(name).to_layer(), r, alpha)
        owner, _, child = name.rpartition(".")
        model.get_submodule(owner)[child] = layer
    model.layers[1]["up"].scale = 0.3
    return model


MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "names": lambda m: apply_lora(m, ["up", "down"], 3, 6.0),
    "one layer": lambda m: apply_lora(m, ["layers.1.up"], 3, 6.0, 0.25),
    "rslora": lambda m: apply_lora(m, ["up"], 4, 6.0, rslora=True),
    "all-linear": lambda m: apply_lora(m, "all-linear", 2),
    "ambiguous name": lambda m: apply_lora(m, "head.0", 2),
    "lora_only": lambda m: apply_lora(m, ["up", "down"], 3, bias="lora_only"),
    "all biases": lambda m: apply_lora(m, ["up"], 3, bias="all"),
    "modules": lambda m: apply_lora(m, ["up"], 3, trainable=["head", "norm"]),
    "modules and biases": lambda m: apply_lora(m, ["up"], 3, trainable=["head"], bias="all"),
    "varied": varied,
}


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(kind: str, ids: Tensor, tmp_path: Path) -> None:
    model = disturb(MODELS[kind](plain()))
    save_lora(model, tmp_path / "new" / "adapter")
    assert sorted(path.name for path in (tmp_path / "new" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = plain()
    assert load_lora(loaded, tmp_path / "new" / "adapter", backend=None) is loaded
    assert trained(loaded) == trained(model) and torch.equal(loaded(ids), model(ids))
    state, wanted = loaded.state_dict(), model.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[n], wanted[n]) for n in wanted)
    assert {n: m.dropout for n, m in lora_layers(loaded).items()} == {
        n: m.dropout for n, m in lora_layers(model).items()
    }
    # Written again it is the same.
    save_lora(loaded, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new" / "adapter" / name).read_bytes()


@pytest.mark.parametrize("kind", MODELS)
def test_peft_reads_what_we_write(kind: str, ids: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = disturb(MODELS[kind](plain()))
    save_lora(model, tmp_path, base_model="base")
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids), model(ids), rtol=1e-5, atol=1e-6)
    adapted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert adapted == lora_layers(model).keys()
    # And what PEFT then writes we read.
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_lora(plain(), tmp_path / "theirs")
    assert torch.equal(again(ids), model(ids)) and trained(again) == trained(model)


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["up", "down"]},
    "rslora": {"target_modules": ["up"], "use_rslora": True, "lora_dropout": 0.1},
    "patterns": {
        "target_modules": r".*\.(up|down)",
        "rank_pattern": {"up": 2},
        "alpha_pattern": {r"^layers\.1\.up": 5},
    },
    "all-linear": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "lora_only": {"target_modules": ["up"], "bias": "lora_only"},
    "all biases": {"target_modules": ["up"], "bias": "all"},
    "modules": {"target_modules": ["up"], "modules_to_save": ["head", "norm"]},
    "modules and biases": {"target_modules": ["up"], "modules_to_save": ["head"], "bias": "all"},
    "gaussian": {"target_modules": ["up"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_we_read_what_peft_writes(kind: str, ids: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(r=4, lora_alpha=6, **PEFT_CONFIGS[kind]))
    disturb(theirs).eval().save_pretrained(tmp_path)
    ours = load_lora(plain(), tmp_path)
    torch.testing.assert_close(ours(ids), theirs(ids), rtol=1e-5, atol=1e-6)
    names = {
        n.removeprefix("base_model.model.")
        .replace(".base_layer", "")
        .replace(".modules_to_save.default", "")
        .replace("lora_A.default.weight", "lora_a")
        .replace("lora_B.default.weight", "lora_b")
        for n in trained(theirs)
        if ".original_module." not in n
    }
    assert trained(ours) == names
    save_lora(ours, tmp_path / "back")
    back = peft.PeftModel.from_pretrained(plain(), tmp_path / "back").eval()
    torch.testing.assert_close(back(ids), theirs(ids), rtol=1e-5, atol=1e-6)


def test_transformers_models_with_conv1d(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=30, n_positions=12)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    )
    disturb(theirs).eval().save_pretrained(tmp_path / "peft")
    ids = torch.arange(9)[None]
    ours = load_lora(copy.deepcopy(model), tmp_path / "peft")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    save_lora(ours, tmp_path / "ours", task_type="CAUSAL_LM")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert type(back) is peft.PeftModelForCausalLM
    torch.testing.assert_close(back(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_merged_layers_are_written_as_they_were(ids: Tensor, tmp_path: Path) -> None:
    model = disturb(apply_lora(plain(), ["up"]))
    separate = model(ids)
    save_lora(merge_lora(model), tmp_path)
    assert torch.equal(load_lora(plain(), tmp_path)(ids), separate)


def test_16_bit_model_gets_float32_adapters(ids: Tensor, tmp_path: Path) -> None:
    save_lora(disturb(apply_lora(plain().bfloat16(), ["up"])), tmp_path)
    model = load_lora(plain().bfloat16(), tmp_path)
    assert model.layers[0]["up"].lora_a.dtype == torch.float32 and model(ids).dtype == torch.bfloat16


# --- refusals ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_lora(disturb(apply_lora(plain(), ["up"], 3, trainable=["head"])), tmp_path)
    return tmp_path


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_refused(folder: Path, error: type[Exception], message: str) -> None:
    model = plain()
    before = repr(model)
    with pytest.raises(error, match=message):
        load_lora(model, folder)
    assert repr(model) == before and all(p.requires_grad for p in model.parameters()), "nothing was changed"
    state, wanted = model.state_dict(), plain().state_dict()
    assert all(torch.equal(state[name], t) for name, t in wanted.items())


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"lora_bias": True}, ValueError, "^adapter_config.json: lora_bias"),
        ({"target_parameters": ["x"]}, ValueError, "^adapter_config.json: target_parameters"),
        ({"alora_invocation_tokens": [1]}, ValueError, "^adapter_config.json: alora_invocation_tokens"),
        ({"field_of_tomorrow": {"a": 1}}, ValueError, "^adapter_config.json: field_of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, ValueError, "^adapter_config.json: init_lora_weights 'pissa_niter_4'"),
        ({"peft_type": "LOHA"}, ValueError, "^adapter_config.json: expected peft_type 'LORA', got 'LOHA'"),
        (
            {"r": 5},
            ValueError,
            r"^adapter_model.safetensors: expected shape \[5, 8\] of layers.0.up.lora_A, got \[3, 8\]",
        ),
        ({"lora_alpha": "x"}, TypeError, "^alpha: expected a float, got str"),
        ({"bias": "vera_only"}, ValueError, "^bias: expected one of 'none', 'lora_only', 'all', got 'vera_only'"),
    ],
)
def test_configurations_that_are_refused(folder: Path, fields: Any, error: type[Exception], message: str) -> None:
    change_config(folder, **fields)
    assert_refused(folder, error, message)


KEY = "base_model.model.layers.0.up."


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{KEY}lora_B.weight"), "expected lora_A and lora_B of layers.0.up, got none of lora_B"),
        (
            lambda t: t.update({f"{KEY}lora_B.weight": torch.zeros(3, 3)}),
            r"expected shape \[12, 3\] of layers.0.up.lora_B",
        ),
        (
            lambda t: t.update({KEY.replace("up", "sideways") + f"lora_{x}.weight": torch.zeros(3, 3) for x in "AB"}),
            "expected layers of the model, got layers.0.sideways",
        ),
        (
            lambda t: t.update({"base_model.model.emb.lora_embedding_A": torch.zeros(3, 3)}),
            "expected lora_A, lora_B and",
        ),
        (lambda t: t.update({"head.0.weight": torch.zeros(4, 8)}), "expected lora_A, lora_B and tensors of the model"),
        (
            lambda t: t.update({"base_model.model.head.0.weight": torch.zeros(4, 9)}),
            r"expected shape \[4, 8\] of base_model.model.head.0.weight, got \[4, 9\]",
        ),
        (lambda t: [t.pop(k) for k in list(t) if "lora_" in k], "expected lora_A and lora_B of some layers, got none"),
    ],
)
def test_tensors_that_are_refused(folder: Path, change: Any, message: str) -> None:
    change_tensors(folder, change)
    assert_refused(folder, ValueError, f"^adapter_model.safetensors: {message}")


def test_folders_that_are_refused(folder: Path, tmp_path: Path) -> None:
    assert_refused(
        tmp_path / "nowhere", FileNotFoundError, "^folder: expected one with adapter_config.json, got .*nowhere"
    )
    weights = folder / "adapter_model.safetensors"
    bits = weights.read_bytes()
    weights.write_bytes(bits[: len(bits) // 2])
    assert_refused(folder, ValueError, "adapter_model.safetensors: expected a safetensors file, got one that is none")
    weights.rename(folder / "adapter_model.bin")
    assert_refused(folder, FileNotFoundError, "^folder: expected one with adapter_model.safetensors, .*is a pickle")
    (folder / "adapter_config.json").write_text("{")
    assert_refused(folder, ValueError, "adapter_config.json: expected JSON, got a file that is none")
    (folder / "adapter_config.json").write_text("[]")
    assert_refused(folder, ValueError, "^adapter_config.json: expected peft_type 'LORA', got 'list'")


def test_models_that_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model: expected a model without adapters"):
        load_lora(apply_lora(plain(), ["down"]), folder)
    with pytest.raises(ValueError, match=r"^model: expected LoRALinear layers"):
        save_lora(plain(), tmp_path / "new")
    for spoil, message in [
        (lambda m: m.norm.weight.requires_grad_(True), "expected whole modules, .* got 'norm.weight' trained"),
        (lambda m: m.norm.bias.requires_grad_(True), "expected whole modules, .* frozen"),
        (lambda m: m.layers[0]["up"].lora_a.requires_grad_(False), "expected lora_a and lora_b to require gradients"),
        (
            lambda m: setattr(m.layers[0]["up"], "dropout", 0.5),
            r"expected one dropout for all layers, got \[0.0, 0.5\]",
        ),
        (lambda m: setattr(m.layers[0]["up"], "rslora", True), "expected one rslora for all layers"),
    ]:
        model = apply_lora(plain(), ["up"])
        spoil(model)
        with pytest.raises(ValueError, match=f"^model: {message}"):
            save_lora(model, tmp_path / "new")
        assert not (tmp_path / "new").exists(), "nothing was written"
