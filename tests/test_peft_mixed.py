"""fuse with an adapter for each row (adapter_names): PEFT's own model against lora_linear_multi. Needs peft."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykernels import fuse, unfuse
from tests.helpers import FLOATS

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from tests.peft_cases import MODELS, assert_same, disturb, gpt2, record_calls, results, token_ids  # noqa: E402

NAMES = ["other", "__base__", "default", "other", "third"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return record_calls(monkeypatch)


@pytest.fixture
def ids() -> Tensor:
    return token_ids(len(NAMES))


def three_adapters(name: str, **config: Any) -> nn.Module:
    """Of different ranks, scales and layers."""
    model = MODELS[name][0](**config)
    targets = {"bert": ["query", "value", "attention.output.dense"], "gpt2": ["c_attn", "c_fc"]}[name]
    common = {"fan_in_fan_out": name == "gpt2"} | config
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=9, target_modules=targets, **common))
    model.add_adapter("third", peft.LoraConfig(r=7, use_rslora=True, target_modules=targets[:1], **common))
    return disturb(model).eval()


def trained(model: nn.Module) -> nn.Module:
    """Every adapter, as PEFT itself trains the active one alone."""
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str, ids: Tensor, calls: list[Any], kernels: str) -> None:
    model = trained(three_adapters(name))
    own = results(model, ids, adapter_names=NAMES)
    assert not calls
    assert_same(results(fuse(model), ids, adapter_names=NAMES), own)
    layers = sum(hasattr(layer, "lora_A") for layer in model.modules())
    assert [operator for operator, _ in calls] == ["lora_linear_multi"] * layers
    again = results(unfuse(model), ids, adapter_names=NAMES)
    assert len(calls) == layers and all(torch.equal(again[n], own[n]) for n in own), "undone exactly"


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype: str, ids: Tensor, calls: list[Any]) -> None:
    """float32 adapters on 16-bit models, then adapters of the model's own type."""
    model = trained(three_adapters("bert"))
    model.to(FLOATS[dtype])
    tolerance = 40 * torch.finfo(FLOATS[dtype]).eps
    for adapter in {torch.float64 if dtype == "fp64" else torch.float32, FLOATS[dtype]}:
        for parameter, p in model.named_parameters():
            if "lora_" in parameter:
                p.data = p.data.to(adapter)
        disturb(model)
        own, before = results(model, ids, adapter_names=NAMES), len(calls)
        assert_same(results(fuse(model), ids, adapter_names=NAMES), own, tolerance, tolerance)
        assert len(calls) == before + 8
        unfuse(model)


def test_autocast(ids: Tensor, calls: list[Any]) -> None:
    model = three_adapters("bert")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own = model(ids, adapter_names=NAMES).logits
        torch.testing.assert_close(fuse(model)(ids, adapter_names=NAMES).logits, own, rtol=0.05, atol=0.02)
    assert len(calls) == 8


def test_rows_have_the_adapter_that_they_name(ids: Tensor, calls: list[Any]) -> None:
    """A mixed batch is the batches of each adapter alone; layers without any of the batch's run as the base."""
    model = fuse(three_adapters("bert"))
    with torch.no_grad():
        for names in (NAMES, ["third"] * 5, ["__base__"] * 4 + ["default"], tuple(NAMES)):
            mixed = model(ids, adapter_names=names).logits
            for row, name in enumerate(names):
                if name == "__base__":
                    with model.disable_adapter():
                        alone = model(ids[row : row + 1]).logits
                else:
                    model.set_adapter(name)
                    alone = model(ids[row : row + 1]).logits
                torch.testing.assert_close(mixed[row], alone[0], rtol=1e-4, atol=1e-5)
        calls.clear()
        model(ids, adapter_names=["third"] * 5)
        assert [operator for operator, _ in calls] == ["lora_linear_multi"] * 2
        calls.clear()
        model(ids, adapter_names=["__base__"] * 5)
        assert not calls


def test_generation(calls: list[Any]) -> None:
    """Beams repeat the names."""
    model = gpt2()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    twin = fuse(copy.deepcopy(disturb(model).eval()))
    ids = token_ids()[:, :4]
    options = {"adapter_names": ["other", "default"], "num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(twin.generate(input_ids=ids, **options), model.generate(input_ids=ids, **options))
    assert {operator for operator, _ in calls} == {"lora_linear_multi"}


def test_what_peft_refuses_is_refused(ids: Tensor, calls: list[Any]) -> None:
    def errors(model: nn.Module, names: list[str]) -> list[str]:
        found = []
        for twin in (model, fuse(copy.deepcopy(model))):
            with pytest.raises(ValueError, match="adapter") as error:
                twin(ids, adapter_names=names)
            found.append(str(error.value))
        return found

    model = three_adapters("bert")
    for names in (["nobody"] * 5, NAMES[:3]):
        ours, theirs = errors(model, names)
        assert ours == theirs
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    assert len(set(errors(merged, NAMES))) == 1
    model.add_adapter("dora", peft.LoraConfig(r=2, target_modules=["query"], use_dora=True))
    assert len(set(errors(model, [*NAMES[:4], "dora"]))) == 1
    assert len(set(errors(model.train(), NAMES))) == 1
    assert not calls


def test_disabled_and_merged_states(ids: Tensor, calls: list[Any]) -> None:
    model = three_adapters("bert")
    twin = fuse(copy.deepcopy(model))
    with torch.no_grad(), model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(model(ids, adapter_names=NAMES).logits, twin(ids, adapter_names=NAMES).logits)
    assert not calls


def test_dropout_in_training_runs_in_pefts_forward(calls: list[Any]) -> None:
    """At the layer itself, as PEFT's model refuses to train mixed batches; its bits are drawn adapter by adapter."""
    model = three_adapters("bert", lora_dropout=0.3)
    layer = fuse(model).base_model.model.bert.encoder.layer[0].attention.self.query.train()
    x = torch.randn(5, 9, 16)
    torch.manual_seed(1)
    fused = layer(x, adapter_names=["other"] * 5)
    unfuse(model)
    torch.manual_seed(1)
    assert torch.equal(layer(x, adapter_names=["other"] * 5), fused) and not calls
    fuse(model)
    layer.eval()(x, adapter_names=["other"] * 5)
    assert len(calls) == 1


def test_adapters_of_different_dtypes_and_hooks_run_in_pefts_forward(ids: Tensor, calls: list[Any]) -> None:
    model = three_adapters("bert").bfloat16()
    for parameter, p in model.named_parameters():
        if "lora_" in parameter and "other" not in parameter:
            p.data = p.data.float()
    fuse(model)
    own = results(unfuse(copy.deepcopy(model)), ids, adapter_names=NAMES)
    assert_same(results(model, ids, adapter_names=NAMES), own, 0.02, 0.02)
    assert len(calls) == 4, "layers that have one adapter alone"
    model, seen = fuse(three_adapters("bert")), []
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    query.lora_A["third"].register_forward_hook(lambda *_: seen.append(1))
    calls.clear()
    with torch.no_grad():
        model(ids, adapter_names=NAMES)
    assert seen == [1] and len(calls) == 7


def test_compiled_layer(extension: object) -> None:
    model = fuse(three_adapters("bert"))
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(5, 9, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, adapter_names=NAMES), layer(x, adapter_names=NAMES), rtol=1e-5, atol=1e-5)


def test_two_rows_of_vectors(ids: Tensor, calls: list[Any]) -> None:
    """x [B, K], as a pooler's."""
    model = three_adapters("bert")
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(5, 16)
    own = layer(x, adapter_names=NAMES)
    fuse(model)
    torch.testing.assert_close(layer(x, adapter_names=NAMES), own, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1
