"""apply_lora and its relatives on whole models: which layers, what is trained, shared layers, refusals, unloading."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pykernels
from pykernels import LoRALinear, apply_lora, lora_disabled, lora_layers, merge_lora, unload_lora, unmerge_lora


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.tanh(self.query(x)) * self.value(x))


class Encoder(nn.Module):
    """An embedding, two blocks of which the first is used twice, and a head on the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.again = self.blocks[0]
        self.classifier = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, checkpointing: bool = False) -> Tensor:
        x = self.embedding(ids)
        for block in (*self.blocks, self.again):
            x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        return torch.cat([self.head(x), self.classifier(x)], -1)


QUERIES = ["blocks.0.query", "blocks.1.query"]
VALUES = ["blocks.0.value", "blocks.1.value"]


@pytest.fixture
def model() -> Encoder:
    torch.manual_seed(1)
    return Encoder()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(2))


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def adapters(names: list[str]) -> set[str]:
    return {f"{name}.lora_{factor}" for name in names for factor in "ab"}


def disturb(model: nn.Module) -> nn.Module:
    """Low-rank terms that are not zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_a.copy_(torch.randn(layer.lora_a.shape, generator=generator) * 0.25)
            layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator) * 0.25)
    return model


@pytest.mark.parametrize(
    "targets, options, names",
    [
        (["query"], {}, QUERIES),
        (["query", "blocks.1.value"], {}, [*QUERIES, "blocks.1.value"]),
        (("query", "value"), {"exclude": ["blocks.1.query"]}, ["blocks.0.query", *VALUES]),
        (r".*\.(query|value)", {}, QUERIES + VALUES),
        ("head|classifier.0", {}, ["head", "classifier.0"]),
        ("all-linear", {}, [*QUERIES, *VALUES, "classifier.0", "classifier.2", "head"]),
        ("all-linear", {"trainable": ["classifier"], "exclude": ["head"]}, QUERIES + VALUES),
    ],
)
def test_which_layers(model: Encoder, ids: Tensor, targets: Any, options: dict[str, Any], names: list[str]) -> None:
    before = model(ids)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in names}
    assert apply_lora(model, targets, 3, 6.0, **options) is model
    assert set(lora_layers(model)) == set(names)
    for name, layer in lora_layers(model).items():
        assert (layer.out_features, layer.in_features) == shapes[name] and layer.r == 3 and layer.scale == 2.0
    own = {f"classifier.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")} if "trainable" in options else set()
    assert trained(model) == adapters(names) | own
    assert model.again is model.blocks[0], "shared modules stay shared"
    torch.testing.assert_close(model(ids), before)


def test_settings_reach_every_layer(model: Encoder) -> None:
    options = {"rslora": True, "init": "a_zero", "adapter_dtype": torch.float64, "backend": "reference"}
    for layer in lora_layers(apply_lora(model, ["query"], 4, 6.0, 0.25, **options)).values():
        assert layer.scale == 3.0 and layer.dropout == 0.25 and layer.init == "a_zero" and not layer.lora_a.any()
        assert layer.lora_a.dtype == torch.float64 and layer.backend == "reference"


@pytest.mark.parametrize(
    "bias, biases",
    [
        ("none", set()),
        ("lora_only", {f"{name}.bias" for name in QUERIES}),
        ("all", {name for name, _ in Encoder().named_parameters() if name.endswith("bias")}),
    ],
)
def test_biases(model: Encoder, ids: Tensor, bias: str, biases: set[str]) -> None:
    apply_lora(model, ["query"], bias=bias)
    assert trained(model) == adapters(QUERIES) | biases
    model(ids).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained(model)


def test_training_changes_the_adapter_alone_and_learns(model: Encoder, ids: Tensor, backend: str) -> None:
    apply_lora(model, "all-linear", 4, exclude=["head"], dropout=0.1, backend=backend)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten() % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained(model)


def test_a_layer_in_two_places_is_one_adapter() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"one": shared, "two": shared, "three": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=r"^target_modules: one and two are one layer, expected both of them or none"):
        apply_lora(model, ["one"])
    assert type(model["one"]) is nn.Linear and model["three"].weight.requires_grad, "nothing was changed"
    apply_lora(model, ["one", "two"])
    assert isinstance(model["one"], LoRALinear) and model["one"] is model["two"]
    unload_lora(model)
    assert type(model["one"]) is nn.Linear and model["one"] is model["two"]


def test_merge_unmerge_disable(model: Encoder, ids: Tensor) -> None:
    model.eval()
    plain, bits = model(ids), model.embedding.weight.clone()
    disturb(apply_lora(model, ["query", "value", "head"]))
    adapted, state = model(ids), copy.deepcopy(model.state_dict())
    assert not torch.allclose(adapted, plain, atol=1e-2)
    with lora_disabled(model) as same:
        assert same is model and torch.equal(model(ids), plain)
    assert torch.equal(model(ids), adapted)
    assert merge_lora(model) is model and all(layer.merged for layer in lora_layers(model).values())
    torch.testing.assert_close(model(ids), adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.embedding.weight, bits), "the head is merged, the embedding that shares its weight is not"
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    with lora_disabled(model):
        assert torch.equal(model(ids), plain), "merged and disabled"
    assert torch.equal(unmerge_lora(model)(ids), adapted)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("merged_before", [False, True])
def test_unload(model: Encoder, ids: Tensor, merge: bool, merged_before: bool) -> None:
    twin = copy.deepcopy(model).eval()
    disturb(apply_lora(model.eval(), ["query", "value"]))
    adapted = model(ids)
    if merged_before:
        merge_lora(model)
    assert unload_lora(model, merge) is model
    assert repr(model) == repr(twin) and model.state_dict().keys() == twin.state_dict().keys()
    torch.testing.assert_close(model(ids), adapted if merge else twin(ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.blocks[0].query.weight, twin.blocks[0].query.weight) != merge
    with pytest.raises(ValueError, match=r"^model: expected LoRALinear layers \(apply_lora makes them\), got query"):
        unload_lora(model)


def test_unloading_refuses_to_tear_tied_weights_apart(model: Encoder) -> None:
    disturb(apply_lora(model, ["query", "head"]))
    with pytest.raises(ValueError, match=r"^merge: the weight of head is also that of embedding"):
        unload_lora(model, merge=True)
    assert isinstance(model.blocks[0].query, LoRALinear), "nothing was changed"
    unload_lora(model)
    assert model.head.weight is model.embedding.weight


def test_state_dict_round_trip(model: Encoder, ids: Tensor) -> None:
    other = copy.deepcopy(model)
    disturb(apply_lora(model, ["query"]))
    other.load_state_dict(model.state_dict(), strict=False)
    apply_lora(other, ["query"]).load_state_dict(model.state_dict())
    assert torch.equal(other(ids), model(ids))


def test_refused_arguments(model: Encoder) -> None:
    for targets, options, error, message in [
        (["qery"], {}, ValueError, r"target_modules: expected names of linear layers, got 'qery', which matches none; "
         r"there is query \(2 times 16 -> 16\), value \(2 times 16 -> 16\), 0 \(1 times 16 -> 16\), 2 \(1 t"),
        (["query", "key"], {}, ValueError, "target_modules: expected names of linear layers, got 'key'"),
        ("query", {}, ValueError, "target_modules: expected names of linear layers, got 'query'"),
        ("(", {}, ValueError, r"target_modules: expected a regular expression, got '\('"),
        ([], {}, ValueError, r"target_modules: expected names of linear layers, got \[\]"),
        (3, {}, TypeError, "target_modules: expected a list of names, got int"),
        (["query", 3], {}, TypeError, "target_modules: expected names, got 3"),
        (["norm"], {}, TypeError, "blocks.0.norm: expected nn.Linear or transformers' Conv1D, got LayerNorm"),
        (["blocks.0"], {}, TypeError, "blocks.0: expected nn.Linear or transformers' Conv1D, got Block"),
        (["query"], {"r": 0}, ValueError, "r: expected >= 1, got 0"),
        (["query"], {"dropout": 2}, ValueError, "dropout: expected 0 <= dropout < 1"),
        (["query"], {"bias": "some"}, ValueError, "bias: expected one of 'none', 'lora_only', 'all'"),
        (["query"], {"trainable": "classifier"}, TypeError, "trainable: expected a list of names, got str"),
        (["query"], {"trainable": ["clasifier"]}, ValueError, "trainable: expected names of modules, got 'clasifier'"),
        (["query"], {"exclude": ["key"]}, ValueError, "exclude: expected names of modules, got 'key'"),
        (["classifier.0"], {"trainable": ["classifier"]}, ValueError, "target_modules: .* got 'classifier.0'"),
    ]:  # fmt: skip
        with pytest.raises(error, match=f"^{message}"):
            apply_lora(model, targets, **options)
    assert all(p.requires_grad for p in model.parameters()) and not any(
        isinstance(m, LoRALinear) for m in model.modules()
    ), "nothing was changed"


def test_refused_models(model: Encoder) -> None:
    with pytest.raises(TypeError, match=r"^model: expected an nn.Module, got dict"):
        apply_lora({}, ["query"])
    with pytest.raises(TypeError, match=r"^model: expected a module that contains linear layers, got Linear itself"):
        apply_lora(nn.Linear(4, 4), "all-linear")
    with pytest.raises(ValueError, match=r"^target_modules: .* there is a model without linear layers"):
        apply_lora(nn.Sequential(nn.Tanh()), "all-linear")
    apply_lora(model, ["query"])
    with pytest.raises(ValueError, match=r"^model: .* got one with LoRALinear's; unload_lora.* \(blocks.0.query\)"):
        apply_lora(model, ["value"])
    unload_lora(model)
    model.blocks[1].value.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"^blocks.1.value: expected a layer without hooks"):
        apply_lora(model, ["value"])


def test_layers_that_their_owner_does_not_call_are_refused() -> None:
    """#17: nn.TransformerEncoderLayer in evaluation, and nn.MultiheadAttention always, read the weights themselves."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.ModuleDict({"layer": layer, "own": nn.Linear(16, 16)})
    for name in ("linear1", "linear2", "out_proj"):
        with pytest.raises(ValueError, match=rf"{name}: expected a layer that its owner calls, got one of \w+, which"):
            apply_lora(model, [name])
    with pytest.raises(ValueError, match=r"^layer\.\S+: expected a layer that its owner calls"):
        apply_lora(model, "all-linear")
    apply_lora(model, "all-linear", exclude=["linear1", "linear2", "out_proj"])
    assert list(lora_layers(model)) == ["own"]


def test_models_of_peft_are_refused() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(Encoder(), peft.LoraConfig(target_modules=["query"]))
    for module in (model, model.base_model.model):
        with pytest.raises(ValueError, match=r"^model: expected a model without adapters, got one with PEFT's"):
            apply_lora(module, ["value"])


def test_gradient_checkpointing(model: Encoder, ids: Tensor) -> None:
    disturb(apply_lora(model, ["query", "value"], dropout=0.4))
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(6)
        model.zero_grad()
        y = model(ids, checkpointing)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16])
def test_16_bit_models(model: Encoder, ids: Tensor, adapter_dtype: torch.dtype | None, backend: str) -> None:
    """#16: float32 adapters on a bfloat16 model, and adapters of its own type."""
    model.bfloat16()
    disturb(apply_lora(model, ["query", "value"], adapter_dtype=adapter_dtype, backend=backend))
    y = model(ids)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    z = exact(ids)
    z.square().mean().backward()
    torch.testing.assert_close(y.double(), z, rtol=0.05, atol=0.1)
    for name, layer in lora_layers(model).items():
        truth = exact.get_submodule(name).lora_b.grad
        assert layer.lora_b.grad.dtype == (adapter_dtype or torch.float32)
        assert (layer.lora_b.grad.double() - truth).norm() < 0.1 * truth.norm()


def test_autocast(model: Encoder, ids: Tensor) -> None:
    disturb(apply_lora(model, ["query", "value"]))
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(ids)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and model.blocks[0].query.lora_a.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(model: Encoder, ids: Tensor, backend: str, extension: object) -> None:
    disturb(apply_lora(model, ["query", "value", "head"], dropout=0.3, trainable=["classifier"]))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for call in (model, compiled):
        torch.manual_seed(8)
        model.zero_grad()
        y = call(ids)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gpt2_with_its_conv1d_and_tied_head() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=23, n_positions=12)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 23, (2, 9))
    plain, twin = model(ids).logits, copy.deepcopy(model)
    apply_lora(model, "all-linear")
    assert set(lora_layers(model)) == {
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }, "all but the output layer"
    torch.testing.assert_close(model(ids).logits, plain)
    adapted = disturb(model)(ids).logits
    assert not torch.allclose(adapted, plain, atol=1e-3)
    torch.testing.assert_close(merge_lora(model)(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(unmerge_lora(model).generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0), generated)
    assert repr(unload_lora(model)) == repr(twin) and torch.equal(model(ids).logits, plain)


def test_public_names() -> None:
    for name in (
        "LoRALinear",
        "apply_lora",
        "merge_lora",
        "unmerge_lora",
        "unload_lora",
        "lora_disabled",
        "lora_layers",
    ):
        assert name in pykernels.__all__ and getattr(pykernels, name).__doc__
