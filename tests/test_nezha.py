"""The dialogue model on NEZHA: its formula, recorded outputs of the original, and what transformers' models can do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.recorded import recorded

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from pykernels.models import NezhaConfig, NezhaDialog  # noqa: E402
from pykernels.models.convert import find_config, load  # noqa: E402
from pykernels.models.nezha import (  # noqa: E402
    cut_history,
    encode_dialog,
    reduce_vocabulary,
    relative_table,
    speaker_segments,
)
from tests import language_model_checks as checks  # noqa: E402

TARGETS = ["query", "key", "value", "dense"]
SEP = 3


def small(layers: int = 2, **more: Any) -> NezhaDialog:
    torch.manual_seed(1)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    model = NezhaDialog(NezhaConfig(**(sizes | {"num_hidden_layers": layers} | more)))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model


def exact(**more: Any) -> NezhaDialog:
    return small(hidden_dropout_prob=0.0, **more)


# --- what it computes ---


def test_parameters_of_the_dialogue_model() -> None:
    with torch.device("meta"):
        model = NezhaDialog(NezhaConfig())
    assert sum(p.numel() for p in model.parameters()) == 96_564_850


def test_relative_table() -> None:
    table = relative_table(16)
    assert table.shape == (129, 16)
    for p, i in ((0, 0), (64, 0), (128, 7), (3, 5)):
        angle = p / 10000 ** (2 * i / 16)
        assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    recorded_table = np.load(recorded("golden", "nezha.npz"))["relative_table"]
    assert np.abs(table.numpy() - recorded_table).max() < 3e-6


def step_by_step(model: NezhaDialog, ids: list[int], segments: list[int], causal: bool) -> Tensor:
    """Logits of one sequence in float64, from the published description, with R in a tensor [L, L, D]."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    config = model.config
    size, length = config.hidden_size // config.num_attention_heads, len(ids)

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    at = torch.arange(length)
    near = ((at - at.unsqueeze(1)).clamp(-64, 64) + 64).tolist()
    rates = 10000 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(129, dtype=torch.float64).unsqueeze(1) * rates
    R = torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[near]
    words, types = (w[f"bert.embeddings.{name}_embeddings.weight"] for name in ("word", "token_type"))
    x = norm("bert.embeddings.LayerNorm", words[ids] + types[segments])
    for i in range(config.num_hidden_layers):
        name = f"bert.encoder.layer.{i}"
        heads = [dense(f"{name}.attention.self.{part}", x) for part in ("query", "key", "value")]
        parts = []
        for h in range(config.num_attention_heads):
            q, k, v = (part[:, h * size : (h + 1) * size] for part in heads)
            scores = (q @ k.T + torch.einsum("qd,qkd->qk", q, R)) / size**0.5
            if causal:
                scores = scores.masked_fill(at > at.unsqueeze(1), -math.inf)
            weights = scores.softmax(-1)
            parts.append(weights @ v + torch.einsum("qk,qkd->qd", weights, R))
        attended = dense(f"{name}.attention.output.dense", torch.cat(parts, 1))
        x = norm(f"{name}.attention.output.LayerNorm", x + attended)
        hidden = gelu(dense(f"{name}.intermediate.dense", x))
        x = norm(f"{name}.output.LayerNorm", x + dense(f"{name}.output.dense", hidden))
    x = norm("cls.predictions.transform.LayerNorm", gelu(dense("cls.predictions.transform.dense", x)))
    return x @ words.T + w["cls.predictions.bias"]


@pytest.mark.parametrize("causal", [True, False])
def test_equals_a_step_by_step_computation(causal: bool) -> None:
    model = small(is_causal=causal).eval()
    rows = checks.ids(2, 140)  # distances are clipped beyond 64
    rows[:, ::9] = SEP
    logits = model(input_ids=rows).logits
    for row, segments, got in zip(rows.tolist(), speaker_segments(rows, SEP).tolist(), logits, strict=True):
        assert torch.allclose(got.double(), step_by_step(model, row, segments, causal), atol=5e-5)


def test_nothing_is_larger_than_the_scores() -> None:
    """No tensor of distances for each pair of positions and each channel is made, in forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    model, length = small(1, hidden_size=64), 100
    with Recorder():
        model(input_ids=checks.ids(1, length), labels=checks.ids(1, length)).loss.backward()
    assert max(sizes) == 2 * length * 129  # heads, queries, rows of R


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(recorded("golden", "nezha.npz")) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "fi"}


def original(**options: Any) -> NezhaDialog:
    checkpoint = recorded("golden", "nezha_ckpt", "model.ckpt.index")
    return load("nezha", checkpoint, dict(find_config(checkpoint, None)) | {"layer_norm_eps": 1e-7} | options)


def inputs(golden: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    return {
        "input_ids": golden[f"{prefix}in/token_ids"],
        "token_type_ids": golden[f"{prefix}in/segment_ids"],
    }


def test_equals_the_original(golden: dict[str, Tensor]) -> None:
    output = original()(**inputs(golden), output_hidden_states=True)
    assert torch.allclose(output.hidden_states[-1], golden["lm_hidden"], atol=2e-5, rtol=0)
    assert torch.allclose(output.logits, golden["logits"], atol=5e-5, rtol=0)
    assert torch.allclose(output.logits.softmax(-1), golden["probs"], atol=5e-6, rtol=0)


def test_equals_the_original_of_the_article(golden: dict[str, Tensor]) -> None:
    """Its version zeroes the attention at padding, where outputs have no meaning."""
    logits = original(layer_norm_eps=1e-12)(**inputs(golden)).logits
    live = golden["in/token_ids"] > 0
    assert torch.allclose(logits[live], golden["logits_v084"][live], atol=5e-5, rtol=0)


def test_equals_the_original_encoder(golden: dict[str, Tensor]) -> None:
    model = original()
    model.config.is_causal = False
    hidden = model(**inputs(golden), output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(hidden, golden["encoder_hidden"], atol=2e-5, rtol=0)


def test_equals_nezhas_own_code_with_its_gelu(golden: dict[str, Tensor]) -> None:
    model = original(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-12)
    live = golden["in/token_ids"] > 0
    for causal, name in ((True, "lm_hidden_tanh"), (False, "encoder_hidden_tanh")):
        model.config.is_causal = causal
        hidden = model(**inputs(golden), output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(hidden[live], golden[f"hw_tf/{name}"][live], atol=2e-5, rtol=0)


def test_reduced_vocabulary(golden: dict[str, Tensor]) -> None:
    keep = golden["compound/keep_tokens"].tolist()
    weights = reduce_vocabulary(original().state_dict(), keep, [[0], [0], [5, 7], [0]])
    assert torch.allclose(weights["bert.embeddings.word_embeddings.weight"], golden["compound/word_embeddings"])
    assert torch.allclose(weights["cls.predictions.bias"], golden["compound/output_bias"])
    config = original().config
    config.vocab_size = 64
    model = NezhaDialog(config).eval()
    model.load_state_dict(weights)
    logits = model(**inputs(golden, "compound/")).logits
    assert torch.allclose(logits, golden["compound/logits"], atol=5e-5, rtol=0)


# --- dialogues ---


def test_segments_of_speakers() -> None:
    ids, segments = encode_dialog([[7, 8], [9], [10, 11]], cls=2, sep=SEP)
    assert ids == [2, 7, 8, 3, 9, 3, 10, 11, 3] and segments == [0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert speaker_segments(torch.tensor([ids]), SEP).tolist() == [segments]
    assert encode_dialog([[7, 8], [9], [10, 11]], cls=2, sep=SEP, longest=8) == (ids[:6], segments[:6])
    assert cut_history([[7, 8], [9], [10, 11]], 6) == [[9], [10, 11]] and cut_history([[7, 8]], 3) == []


def test_a_reply_has_the_segment_of_the_next_speaker() -> None:
    model = small().eval()
    prompt, _ = encode_dialog([[7, 8], [9, 10]], cls=2, sep=SEP)
    got = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0]
    ids = list(prompt)
    for expected in got[len(prompt) :].tolist():
        replied = [0] * (len(ids) - len(prompt))
        segments = [0, 0, 0, 0, 1, 1, 1, *replied]
        logits = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([segments])).logits
        assert logits[0, -1].argmax().item() == expected
        ids.append(expected)
    with pytest.raises(ValueError, match="token_type_ids: expected none in generation"):
        model.generate(torch.tensor([prompt]), token_type_ids=torch.zeros(1, len(prompt), dtype=torch.int64))


def test_padding_is_not_seen() -> None:
    model = small().eval()
    rows = checks.ids()
    padded = torch.cat([rows, torch.zeros(2, 3, dtype=torch.int64)], 1)
    assert torch.allclose(model(input_ids=padded).logits[:, :9], model(input_ids=rows).logits, atol=1e-5)
    left = torch.cat([torch.zeros(2, 3, dtype=torch.int64), rows], 1)
    assert torch.allclose(model(input_ids=left).logits[:, 3:], model(input_ids=rows).logits, atol=1e-5)


# --- as a model of transformers ---


def test_shapes_and_gradients() -> None:
    checks.check_shapes_and_gradients(exact())


def test_round_trip(tmp_path: Path) -> None:
    checks.check_round_trip(small(), tmp_path)


def test_bf16() -> None:
    checks.check_bf16(exact())


@pytest.mark.slow
def test_compiled(forget_compiled: None) -> None:
    checks.check_compiled(small(1), "inductor")


def test_cached_generation() -> None:
    checks.check_cached_generation(small())


def test_generation_with_a_cache_of_fixed_size() -> None:
    model = small().eval()
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    fixed = model.generate(checks.ids(), cache_implementation="static", **options)
    assert torch.equal(fixed, model.generate(checks.ids(), **options))


def test_gradient_checkpointing() -> None:
    checks.check_gradient_checkpointing(small())


def test_apply_lora() -> None:
    checks.check_apply_lora(small(), TARGETS, 13)


def test_peft(tmp_path: Path) -> None:
    checks.check_peft(small(), TARGETS, tmp_path)


@pytest.mark.parametrize("mode", ["F", "D"])
def test_child_tuning(mode: str) -> None:
    checks.check_child_tuning(small(), mode)


def test_messages() -> None:
    checks.check_messages(small())
    model = small().eval()
    with pytest.raises(ValueError, match=r"token_type_ids: expected \[2, 9\], got \[2, 8\]"):
        model(input_ids=checks.ids(), token_type_ids=torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="token_type_ids: expected with inputs_embeds and with tokens in the cache"):
        model(input_ids=checks.ids(), cache=model(input_ids=checks.ids(), use_cache=True).cache)
    with pytest.raises(ValueError, match=r"hidden_size / num_attention_heads: expected an even number, got 15 / 5"):
        NezhaConfig(hidden_size=15, num_attention_heads=5)
