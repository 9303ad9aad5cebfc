"""fuse: PEFT's own model against the same with our forward, in every state that PEFT knows. Skipped without peft."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykernels import fuse, unfuse
from tests.helpers import FLOATS

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from tests.peft_cases import MODELS, assert_same, bert, disturb, record_calls, results, token_ids  # noqa: E402


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return record_calls(monkeypatch)


@pytest.fixture
def ids() -> Tensor:
    return token_ids()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"rank_pattern": {"query": 2, "c_fc": 1}, "alpha_pattern": {"value": 3, "c_attn": 5}},
        {"init_lora_weights": "gaussian"},
        {"modules_to_save": ["classifier", "ln_f"]},
    ],
    ids=lambda config: ",".join(config) or "plain",
)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str, config: dict[str, Any], ids: Tensor, calls: list[Any], kernels: str) -> None:
    make, layers = MODELS[name]
    model = disturb(make(**config))
    own = results(model, ids)
    assert not calls
    assert fuse(model) is model
    assert_same(results(model, ids), own)
    assert len(calls) == layers
    unfuse(model)
    again = results(model, ids)
    assert len(calls) == layers and all(torch.equal(again[n], own[n]) for n in own), "undone exactly"


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype: str, ids: Tensor, calls: list[Any]) -> None:
    """PEFT keeps float32 adapters on 16-bit models; then adapters of the model's own type."""
    model = bert()
    model.to(FLOATS[dtype])
    tolerance = 40 * torch.finfo(FLOATS[dtype]).eps
    for adapter in {torch.float64 if dtype == "fp64" else torch.float32, FLOATS[dtype]}:
        for parameter, p in model.named_parameters():
            if "lora_" in parameter:
                p.data = p.data.to(adapter)
        disturb(model)
        own, before = results(model, ids), len(calls)
        assert_same(results(fuse(model), ids), own, tolerance, tolerance)
        assert len(calls) == before + 6
        unfuse(model)


def test_adapters_of_fewer_bits_than_the_model_run_in_pefts_forward(ids: Tensor, calls: list[Any]) -> None:
    model = disturb(bert())
    for parameter, p in model.named_parameters():
        if "lora_" in parameter:
            p.data = p.data.bfloat16()
    own = results(model, ids)
    assert_same(results(fuse(model), ids), own, 0, 0)
    assert not calls


def test_autocast(ids: Tensor, calls: list[Any]) -> None:
    model = disturb(bert())
    with torch.autocast("cpu", torch.bfloat16):
        own = results(model, ids)
        assert_same(results(fuse(model), ids), own, 0.05, 0.02)
    assert len(calls) == 6


# --- dropout ---


def test_dropout_is_of_the_rate_and_only_in_training(ids: Tensor, calls: list[Any]) -> None:
    model = fuse(disturb(bert(lora_dropout=0.25))).train()
    torch.manual_seed(5)
    first = results(model, ids)
    assert all(options["dropout"] == 0.25 and options["training"] for _, options in calls)
    torch.manual_seed(5)
    assert_same(results(model, ids), first, 0, 0)
    assert not torch.equal(results(model, ids)["logits"], first["logits"])
    evaluated = results(model.eval(), ids)
    assert_same(evaluated, results(unfuse(model), ids))


def test_dropout_has_the_mean_of_pefts() -> None:
    """One layer, many draws: the mean over draws is the layer without dropout."""
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.5, target_modules=["0"])
    model = fuse(disturb(peft.get_peft_model(nn.Sequential(nn.Linear(8, 5)), config)))
    x = torch.randn(8, generator=torch.Generator().manual_seed(6))
    torch.manual_seed(7)
    y = model.train()(x.expand(20_000, 8))
    exact = model.eval()(x)
    assert ((y.mean(0) - exact).abs() < 5 * y.std(0) / 20_000**0.5).all() and y.std(0).min() > 0.01


# --- states of PEFT ---


def two_adapters() -> nn.Module:
    model = bert(modules_to_save=["classifier"])
    other = peft.LoraConfig(r=2, lora_alpha=9, target_modules=["query", "value", "attention.output.dense"])
    model.add_adapter("other", other)
    return disturb(model)


def set_adapter(model: nn.Module, *names: str) -> None:
    model.base_model.set_adapter(list(names))


# What is done to the model, and how many of its layers are ours then: 6 layers have the first adapter, 6 the second
# (4 of them both).
STATES: dict[str, tuple[Callable[[nn.Module], Any], int]] = {
    "first": (lambda model: None, 6),
    "second": (lambda model: set_adapter(model, "other"), 6),
    "both": (lambda model: set_adapter(model, "default", "other"), 4),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), 0),
    "merged": (lambda model: model.merge_adapter(), 0),
    "merged and unmerged": (lambda model: (model.merge_adapter(), model.unmerge_adapter()), 6),
    "second deleted": (lambda model: model.delete_adapter("other"), 6),
    "scaled": (lambda model: [m.scale_layer(0.5) for m in model.modules() if hasattr(m, "scale_layer")], 6),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("fused_first", [False, True])
def test_states(state: str, fused_first: bool, ids: Tensor, calls: list[Any]) -> None:
    model = two_adapters()
    twin = copy.deepcopy(model)
    change, served = STATES[state]
    if fused_first:
        fuse(model)
    change(model)
    change(twin)
    fuse(model)
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(logits, twin(ids).logits, rtol=1e-4, atol=1e-5)
    assert len(calls) == served
    if state != "disabled":
        assert_same(results(model, ids), results(twin, ids))


def test_an_adapter_that_is_added_later_is_served(ids: Tensor, calls: list[Any]) -> None:
    model = fuse(disturb(bert()))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["query"]))
    disturb(model).set_adapter("other")
    fused = results(model, ids)
    assert len(calls) == 2
    assert_same(fused, results(unfuse(model), ids))


def test_context_managers(ids: Tensor, calls: list[Any]) -> None:
    model = bert()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["query", "attention.output.dense"]))
    twin = fuse(copy.deepcopy(disturb(model).eval()))
    with torch.no_grad():
        with model.disable_adapter(), twin.disable_adapter():
            assert torch.equal(model(ids).logits, twin(ids).logits)
        assert not calls
        twin(ids)
    assert len(calls) == 6


def test_hooks_on_inner_layers_run(ids: Tensor, calls: list[Any]) -> None:
    model = fuse(disturb(bert()))
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    seen: list[Any] = []
    handle = layer.lora_B["default"].register_forward_hook(lambda *_: seen.append(1))
    model(ids)
    assert seen == [1] and len(calls) == 5
    handle.remove()
    layer.register_forward_hook(lambda *_: seen.append(2))
    model(ids)
    assert seen == [1, 2] and len(calls) == 11, "hooks on the layer itself stay"


def test_merge_and_unload_and_saving(ids: Tensor, tmp_path: Any) -> None:
    model = disturb(bert(modules_to_save=["classifier"])).eval()
    own, state = model(ids).logits, model.state_dict()
    fuse(model)
    assert model.state_dict().keys() == state.keys()
    model.save_pretrained(tmp_path / "adapter")
    plain = bert(modules_to_save=["classifier"]).unload()
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(fuse(loaded)(ids).logits, own, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, own, rtol=1e-4, atol=1e-5)
    assert type(merged.bert.encoder.layer[0].attention.self.query) is nn.Linear


# --- fuse itself (#29) ---


def test_twice_is_once_and_other_models_are_untouched(ids: Tensor, calls: list[Any]) -> None:
    model, other = disturb(bert()), disturb(bert())
    fuse(fuse(model))
    other(ids)
    assert not calls and "FusedLinear" not in repr(other)
    model(ids)
    assert len(calls) == 6 and "lora.FusedLinear(" in repr(model)
    unfuse(unfuse(model))
    model(ids)
    assert len(calls) == 6 and repr(model) == repr(other)


def test_copies_and_pickles_stay_fused(ids: Tensor, calls: list[Any]) -> None:
    model = fuse(disturb(bert())).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        logits = model(ids).logits
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(ids).logits, logits)
    assert len(calls) == 18


def test_one_part_of_a_model(ids: Tensor, calls: list[Any]) -> None:
    model = disturb(bert())
    fuse(model.base_model.model.bert.encoder.layer[0])
    model(ids)
    assert len(calls) == 3


def test_layers_of_other_kinds_are_left(ids: Tensor, calls: list[Any]) -> None:
    model = disturb(bert(target_modules=["query", "word_embeddings"]))
    own = results(model, ids)
    assert_same(results(fuse(model), ids), own)
    assert len(calls) == 2


def test_what_is_refused() -> None:
    query = "base_model.model.bert.encoder.layer.0.attention.self.query"
    for config, what in [
        ({"alora_invocation_tokens": [5]}, r"ALoraLinearVariant \(a variant of LoRA\)"),
        ({"lora_bias": True}, "lora_bias"),
        ({"lora_dropout": 1.0}, "a dropout of 1"),
    ]:
        model = bert(**config)
        message = rf"^{query}: expected LoRA or DoRA, got {what}.* in the adapter 'default'"
        with pytest.raises(ValueError, match=message):
            fuse(model)
        assert "FusedLinear" not in repr(model)
    model = bert()
    model.get_submodule(query).forward = lambda x: x
    with pytest.raises(ValueError, match=f"^{query}: expected the forward of Linear, got one that was"):
        fuse(model)
    model = bert()
    model.get_submodule(query).base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=rf"^{query}.base_layer: expected a layer without hooks"):
        fuse(model)
    for call in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"^model: expected an nn.Module, got str"):
            call("model")
    with pytest.raises(ValueError, match=r"^model: expected a model with PEFT's LoRA layers of linear layers, .*, got"):
        fuse(nn.Linear(2, 2))


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is imported: a model of PEFT's cannot be there where PEFT was not."""
    monkeypatch.delitem(sys.modules, "peft.tuners.lora.layer")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"^model: expected a model with PEFT's LoRA layers of linear layers, .*, got"):
        fuse(nn.Linear(2, 2))


def test_an_adapter_with_more_than_lora_added_later_runs_in_pefts_forward(ids: Tensor, calls: list[Any]) -> None:
    model = fuse(disturb(bert()))
    model.add_adapter("biased", peft.LoraConfig(r=2, target_modules=["query"], lora_bias=True))
    model.set_adapter("biased")
    fused = results(model, ids)
    assert not calls
    twin = unfuse(model)
    assert_same(fused, results(twin, ids), 0, 0)


# --- training ---


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole(backend: str, ids: Tensor, extension: object) -> None:
    model = disturb(bert())
    own = results(model, ids)
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model.zero_grad()
    logits = compiled(input_ids=ids).logits
    logits.square().mean().backward()
    torch.testing.assert_close(logits.detach(), own["logits"], rtol=1e-4, atol=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, own[name], rtol=1e-4, atol=1e-5)


def test_same_losses_as_peft(ids: Tensor) -> None:
    losses = []
    for fused in (False, True):
        model = bert(modules_to_save=["classifier"]).train()
        if fused:
            fuse(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        labels = torch.tensor([0, 2])
        history = []
        for _ in range(15):
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(torch.tensor(history))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
    assert losses[0][-1] < 0.5 * losses[0][0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, ids: Tensor) -> None:
    model = fuse(disturb(bert(lora_dropout=0.3))).train()
    model.enable_input_require_grads()
    torch.manual_seed(8)
    plain = results(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    torch.manual_seed(8)
    assert_same(results(model, ids), plain, 0, 0)
