"""GPT2_ML: its formula, the recorded outputs of the original, and everything that transformers' models can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.recorded import recorded

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from pykernels.models import GPT2ML, GPT2MLConfig  # noqa: E402
from pykernels.models.convert import find_config, load  # noqa: E402
from pykernels.models.gpt2_ml import mask_of_zeros  # noqa: E402
from tests import language_model_checks as checks  # noqa: E402

TARGETS = ["c_attn", "c_proj", "c_fc"]


def small(layers: int = 2, **more: Any) -> GPT2ML:
    torch.manual_seed(1)
    sizes = {"vocab_size": 30, "n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 32, "eos_token_id": None}
    model = GPT2ML(GPT2MLConfig(**(sizes | more)))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model


# --- what it computes ---


@pytest.mark.parametrize(("vocab_size", "count"), [(8021, 1_373_809_152), (21130, 1_393_944_576)])
def test_parameters_of_the_released_models(vocab_size: int, count: int) -> None:
    with torch.device("meta"):
        model = GPT2ML(GPT2MLConfig(vocab_size=vocab_size))
    assert sum(p.numel() for p in model.parameters()) == count
    # The published variables; the four of each layer's joined queries, keys and values are not there.
    assert len(list(model.parameters())) == 772 - 4 * 48


def step_by_step(model: GPT2ML, ids: list[int]) -> Tensor:
    """Logits of one sequence in float64, from the published description."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    size = model.config.n_embd // model.config.n_head

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    x = norm("transformer.emb_norm", x)
    for i in range(model.config.n_layer):
        name = f"transformer.h.{i}"
        heads = dense(f"{name}.attn.c_attn", x).split(model.config.n_embd, dim=-1)
        rows = []
        for t in range(len(ids)):
            parts = []
            for h in range(model.config.n_head):
                q, k, v = (part[:, h * size : (h + 1) * size] for part in heads)
                parts.append(torch.softmax(k[: t + 1] @ q[t] / size**0.5, 0) @ v[: t + 1])
            rows.append(torch.cat(parts))
        u = x + dense(f"{name}.attn.c_proj", torch.stack(rows))
        hidden = gelu(dense(f"{name}.mlp.c_fc", norm(f"{name}.ln_0", u)))
        x = norm(f"{name}.ln_1", u + dense(f"{name}.mlp.c_proj", hidden))
    return x @ w["transformer.wte.weight"].T


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_a_step_by_step_computation(attention: str) -> None:
    model = small().eval()
    model.set_attn_implementation(attention)
    rows = checks.ids()
    logits = model(input_ids=rows).logits
    for row, got in zip(rows.tolist(), logits, strict=True):
        assert torch.allclose(got.double(), step_by_step(model, row), atol=2e-5)


def test_dropout_follows_the_projections_only() -> None:
    model = small(resid_pdrop=0.5)
    kinds = {name.rpartition(".")[2]: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert kinds == {"attn_dropout": 0.0, "resid_dropout": 0.5, "dropout": 0.5}
    assert not torch.equal(model(input_ids=checks.ids()).logits, model(input_ids=checks.ids()).logits)


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = GPT2ML(GPT2MLConfig(vocab_size=400, n_embd=128, n_layer=1, n_head=2, eos_token_id=None))
    block = model.transformer.h[0]
    for weight in (model.transformer.wte.weight, block.attn.c_attn.weight, block.attn.c_proj.weight):
        assert weight.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.03)
    for weight in (block.mlp.c_fc.weight, block.mlp.c_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(recorded("golden", "gpt2_ml.npz")) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "fi"}


@pytest.fixture(scope="module")
def original() -> GPT2ML:
    checkpoint = recorded("golden", "gpt2_ml_ckpt", "model.ckpt-3.index")
    return load("gpt2-ml", checkpoint, find_config(checkpoint, None))


@pytest.mark.parametrize("case", ["tokens", "padded", "zero_inside"])
def test_equals_the_original(case: str, original: GPT2ML, golden: dict[str, Tensor]) -> None:
    ids = golden[f"in/{case}"].long()
    output = original(input_ids=ids, output_hidden_states=True)
    assert torch.allclose(output.hidden_states[-1], golden[f"tf/hidden/{case}"], atol=2e-5, rtol=0)
    assert torch.allclose(output.logits, golden[f"tf/logits/{case}"], atol=5e-5, rtol=0)
    logits = original(input_ids=ids, attention_mask=mask_of_zeros(ids)).logits
    assert torch.allclose(logits, golden[f"b4k/logits/{case}"], atol=5e-5, rtol=0)


def test_cache_is_that_of_the_original(original: GPT2ML, golden: dict[str, Tensor]) -> None:
    cache = original(input_ids=golden["in/tokens"].long(), use_cache=True).cache
    for i, layer in enumerate(cache.layers):
        for kind, got in enumerate((layer.keys, layer.values)):
            assert torch.allclose(got, golden["tf/cache/tokens"][:, i, kind], atol=2e-5, rtol=0)


def test_loss_and_gradients_are_those_of_the_original(original: GPT2ML, golden: dict[str, Tensor]) -> None:
    ids = golden["lm/input_ids"].long()
    original.zero_grad()
    loss = original(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss
    loss.backward()
    assert loss.item() == pytest.approx(golden["lm/loss"].item(), abs=1e-5)
    wanted = {
        "transformer.wte.weight": "embeddings/word_embed",
        "transformer.wpe.weight": "embeddings/pos_embed",
        "transformer.h.0.ln_0.weight": "layer00/LayerNorm_mlp_ln0/gamma",
        "transformer.h.1.ln_1.bias": "layer01/LayerNorm_mlp_ln1/beta",
        "transformer.h.2.mlp.c_fc.weight": "layer02/intermediate/kernel",
        "transformer.h.0.attn.c_proj.weight": "layer00/context_projection_layer/kernel",
    }
    for ours, theirs in wanted.items():
        expected = golden[f"lm/grad/newslm/{theirs}"]
        got = original.get_parameter(ours).grad
        assert torch.allclose(got, expected, atol=1e-4 * expected.abs().max().item(), rtol=0), ours


# --- as a model of transformers ---


def test_shapes_and_gradients() -> None:
    checks.check_shapes_and_gradients(small(resid_pdrop=0.0, n_positions=9))


def test_round_trip(tmp_path: Path) -> None:
    checks.check_round_trip(small(), tmp_path)


def test_bf16() -> None:
    checks.check_bf16(small())


@pytest.mark.slow
def test_compiled(forget_compiled: None) -> None:
    checks.check_compiled(small(1), "inductor")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_generation(attention: str) -> None:
    model = small()
    model.set_attn_implementation(attention)
    checks.check_cached_generation(model)


def test_gradient_checkpointing() -> None:
    checks.check_gradient_checkpointing(small())


def test_apply_lora() -> None:
    checks.check_apply_lora(small(), TARGETS, 8)


def test_peft(tmp_path: Path) -> None:
    checks.check_peft(small(), TARGETS, tmp_path, fan_in_fan_out=True)


@pytest.mark.parametrize("mode", ["F", "D"])
def test_child_tuning(mode: str) -> None:
    checks.check_child_tuning(small(), mode)


def test_messages() -> None:
    checks.check_messages(small())
    with pytest.raises(ValueError, match="input_ids: expected at most 32 tokens with those in the cache, got 33"):
        small()(input_ids=checks.ids(1, 33))
    with pytest.raises(ValueError, match="got 33"):
        cache = small()(input_ids=checks.ids(1, 30), use_cache=True).cache
        small()(input_ids=checks.ids(1, 3), cache=cache)
