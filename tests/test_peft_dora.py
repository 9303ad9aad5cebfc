"""fuse with DoRA: PEFT's own model against the same with dora_linear as the forward. Skipped without peft."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykernels import fuse, random_bits, unfuse
from tests.helpers import FLOATS, FORWARD, GRADIENT, assert_close_to_reference, rounding_floor

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
    "config", [{}, {"use_rslora": True, "bias": "all"}, {"lora_dropout": 0.2}], ids=lambda c: ",".join(c) or "plain"
)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str, config: dict[str, Any], ids: Tensor, calls: list[Any], kernels: str) -> None:
    """PEFT's in evaluation; nn.Linear and Conv1D."""
    make, layers = MODELS[name]
    model = disturb(make(use_dora=True, **config)).eval()
    own = results(model, ids)
    assert not calls and any("lora_magnitude_vector" in parameter for parameter in own)
    assert_same(results(fuse(model), ids), own)
    assert [operator for operator, _ in calls] == ["dora_linear"] * layers
    again = results(unfuse(fuse(model)), ids)
    assert len(calls) == layers and all(torch.equal(again[n], own[n]) for n in own), "undone exactly"


def one_layer(dtype: torch.dtype, adapter: torch.dtype, dropout: float, conv1d: bool = False) -> nn.Module:
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(40, 24)
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        base = Conv1D(24, 40)
        nn.init.normal_(base.bias)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["0"], use_dora=True, fan_in_fan_out=conv1d
    )
    model = peft.get_peft_model(nn.Sequential(base).to(dtype), config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapter)
    return disturb(model)


def evaluated(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(5)
    y = model(x)
    grads = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return {"y": y.detach(), "dx": grads[0]} | dict(zip(parameters, grads[1:], strict=True))


def with_our_bits(model: nn.Module, x: Tensor, dropout: float) -> nn.Module:
    """PEFT's forward drops what the fused layer does after torch.manual_seed(5)."""
    torch.manual_seed(5)
    factors = random_bits.dropout_factors(random_bits.activation_draws(random_bits.seed_tensor(None), x), dropout)
    layer = model.base_model.model[0]
    layer.lora_dropout["default"].forward = lambda t: t * factors.to(t.dtype)
    return model


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    "dtype, adapter", [(d, d) for d in FLOATS] + [("bf16", "fp32"), ("fp16", "fp32")], ids=lambda d: d
)
def test_training_is_as_accurate_as_pefts(
    dtype: str, adapter: str, dropout: float, conv1d: bool, calls: list[Any]
) -> None:
    """Outputs and gradients by the error rule against PEFT in float64, with equal bits of dropout."""
    model = one_layer(FLOATS[dtype], FLOATS[adapter], dropout, conv1d).train()
    generator = torch.Generator().manual_seed(6)
    x, dy = (torch.randn(9, n, generator=generator).to(FLOATS[dtype]) for n in (40, 24))
    theirs = copy.deepcopy(model)
    exact = copy.deepcopy(model).double()
    if dropout:
        with_our_bits(theirs, x, dropout)
        with_our_bits(exact, x.double(), dropout)
    same, truth = evaluated(theirs, x, dy), evaluated(exact, x.double(), dy.double())
    got = evaluated(fuse(model), x, dy)
    assert [operator for operator, _ in calls] == ["dora_linear"]
    assert got.keys() == same.keys() == truth.keys() and len(got) == 5
    for name, t in got.items():
        factor = FORWARD if name == "y" else GRADIENT
        # On 16-bit layers the base product and dy * m are rounded to 16 bits, which PEFT holds in float32.
        floor = rounding_floor(truth[name], x.dtype, 80, scale=(9.0 if t.dtype == x.dtype else 1.0))
        assert_close_to_reference(t, truth[name], same[name], factor=factor, floor=floor, what=name)


def test_float32_adapters_keep_their_accuracy_on_a_16_bit_layer(calls: list[Any]) -> None:
    """Gradients of A, B and magnitude: no more than the roundings of y and its gradient, also under dropout."""
    for dropout in (0.0, 0.4):
        model = one_layer(torch.bfloat16, torch.float32, dropout).train()
        generator = torch.Generator().manual_seed(6)
        x, dy = (torch.randn(64, n, generator=generator).bfloat16() for n in (40, 24))
        exact = copy.deepcopy(model).double()
        if dropout:
            with_our_bits(exact, x.double(), dropout)
        truth, got = evaluated(exact, x.double(), dy.double()), evaluated(fuse(model), x, dy)
        for name in got.keys() - {"y", "dx"}:
            error = (got[name].double() - truth[name]).abs().max() / truth[name].abs().max()
            assert error < 2**-8, f"{name} {dropout}: {error}"
    assert len(calls) == 2


def test_autocast(ids: Tensor, calls: list[Any]) -> None:
    for dropout in (0.0, 0.2):
        model = disturb(bert(use_dora=True, lora_dropout=dropout)).train(dropout > 0)
        with torch.autocast("cpu", torch.bfloat16):
            own = results(model, ids)
            fused = results(fuse(model), ids)
        assert own.keys() == fused.keys() and all(own[n].dtype == fused[n].dtype for n in own)
        if not dropout:
            assert_same(fused, own, 0.05, 0.03)
    assert len(calls) == 12


def test_dropout_is_only_in_training(ids: Tensor, calls: list[Any]) -> None:
    model = fuse(disturb(bert(use_dora=True, lora_dropout=0.25))).train()
    torch.manual_seed(5)
    first = results(model, ids)
    assert all(options["dropout"] == 0.25 and options["training"] for _, options in calls)
    torch.manual_seed(5)
    assert_same(results(model, ids), first, 0, 0)
    assert not torch.equal(results(model, ids)["logits"], first["logits"])
    evaluated = results(model.eval(), ids)
    assert_same(evaluated, results(unfuse(model), ids))


def test_states(ids: Tensor, calls: list[Any]) -> None:
    """LoRA beside DoRA, several, merged, disabled, deleted."""
    model = bert(use_dora=True)
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=9, target_modules=["query"]))
    twin = copy.deepcopy(disturb(model).eval())
    fuse(model)

    def assert_calls(expected: list[str]) -> None:
        calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)
        assert [operator for operator, _ in calls] == expected

    assert_calls(["dora_linear"] * 6)
    for m in (model, twin):
        m.base_model.set_adapter(["default", "other"])
    assert_calls(["dora_linear"] * 4)  # both are active in the two queries
    for m in (model, twin):
        m.set_adapter("other")
    assert_calls(["lora_linear"] * 2)
    for m in (model, twin):
        m.delete_adapter("other")
        m.set_adapter("default")
        m.merge_adapter()
    assert_calls([])
    for m in (model, twin):
        m.unmerge_adapter()
    assert_calls(["dora_linear"] * 6)
    with model.disable_adapter(), twin.disable_adapter():
        assert_calls([])
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)


def test_pefts_cache_of_norms_is_respected(ids: Tensor, calls: list[Any]) -> None:
    from peft.helpers import DoraCaching

    model = fuse(disturb(bert(use_dora=True))).eval()
    with torch.no_grad():
        logits = model(ids).logits
        assert len(calls) == 6
        with DoraCaching():
            torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-5)
    assert len(calls) == 6


def test_hooks_on_the_magnitude_run(ids: Tensor, calls: list[Any]) -> None:
    model = fuse(disturb(bert(use_dora=True)))
    seen: list[Any] = []
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: seen.append(1))
    model(ids)
    assert seen == [1] and len(calls) == 5


def test_rows_of_zeros_give_no_nan() -> None:
    """PEFT divides zero by zero there; such an output is its bias, and its gradients are zero."""
    model = one_layer(torch.float32, torch.float32, 0.0)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for module in (layer.base_layer, layer.lora_B["default"], layer.lora_magnitude_vector["default"]):
            module.weight[3] = 0
    got = evaluated(fuse(model), torch.randn(5, 40), torch.ones(5, 24))
    assert all(torch.isfinite(t).all() for t in got.values())
    assert (got["y"][:, 3] == layer.base_layer.bias[3]).all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_whole(dropout: float, ids: Tensor, extension: object) -> None:
    model = fuse(disturb(bert(use_dora=True, lora_dropout=dropout))).train()
    torch.manual_seed(7)
    eager = results(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    model.zero_grad()
    logits = compiled(input_ids=ids).logits
    logits.float().square().mean().backward()
    torch.testing.assert_close(logits.detach(), eager["logits"], rtol=1e-4, atol=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, eager[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, ids: Tensor) -> None:
    model = fuse(disturb(bert(use_dora=True, lora_dropout=0.3))).train()
    model.enable_input_require_grads()
    torch.manual_seed(8)
    plain = results(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    torch.manual_seed(8)
    assert_same(results(model, ids), plain, 0, 0)


def test_same_losses_as_peft(ids: Tensor) -> None:
    losses = []
    for fused in (False, True):
        model = bert(modules_to_save=["classifier"], use_dora=True).train()
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
