"""CDial-GPT: speakers, encoding, and that it is OpenAI's GPT with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel  # noqa: E402

from pykernels.models import CDialGPT, CDialGPTConfig, sampling  # noqa: E402
from pykernels.models.cdial_gpt import encode_dialog, encode_history, speaker_types  # noqa: E402
from tests import language_model_checks as checks  # noqa: E402

CONFIG = CDialGPTConfig(
    vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=40, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
)
FIRST, SECOND = 30, 31


def small(**more: Any) -> CDialGPT:
    torch.manual_seed(1)
    model = CDialGPT(CDialGPTConfig(**(CONFIG.to_dict() | more)))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def test_parameters_of_the_released_models() -> None:
    with torch.device("meta"):
        model = CDialGPT(CDialGPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 95_500_032
    assert model.config.speakers == (13086, 13087)


def test_encoding() -> None:
    dialog = [[7, 8], [9], [10, 11]]
    ids, labels = encode_dialog(dialog, CONFIG)
    assert ids == [0, FIRST, 7, 8, SECOND, 9, FIRST, 10, 11, 2]
    assert labels == [-100] * 7 + [10, 11, 2]
    assert encode_history(dialog[:2], CONFIG) == ids[:7]
    types = speaker_types(torch.tensor([ids]), CONFIG.speakers, 0)
    assert types.tolist() == [[0, FIRST, FIRST, FIRST, SECOND, SECOND, FIRST, FIRST, FIRST, FIRST]]
    long = [[7]] * 9
    assert encode_history(long, CONFIG, max_history=1) == [0, FIRST, 7, SECOND, 7, FIRST, 7, SECOND]
    assert len(encode_dialog(long, CONFIG, max_history=1)[0]) == 1 + 4 * 2 + 1


def test_is_openais_gpt_with_types() -> None:
    model = small().eval()
    plain = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**{k: v for k, v in CONFIG.to_dict().items() if k != "model_type"}))
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([encode_dialog([[7, 8], [9], [10, 11]], CONFIG)[0]])
    expected = plain.eval()(ids, token_type_ids=speaker_types(ids, CONFIG.speakers, 0)).logits
    assert torch.equal(model(ids).logits, expected)
    # The types reach the words' table.
    assert not torch.allclose(plain(ids).logits, expected, atol=1e-3)


def test_replies() -> None:
    """Alone and padded on the left in a batch; until a special token."""
    model, histories = small().eval(), [encode_history(h, CONFIG) for h in ([[7, 8], [9]], [[7]])]
    alone = model.generate(torch.tensor([histories[1]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    batch = torch.full((2, len(histories[0])), 1)
    for row, ids in zip(batch, histories, strict=True):
        row[len(row) - len(ids) :] = torch.tensor(ids)
    mask = (batch != 1).long()
    both = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(both[1, -6:], alone[0, -6:])
    torch.manual_seed(3)
    special = [0, 2, FIRST, SECOND]
    got = model.generate(torch.tensor([histories[0]] * 20), **sampling.cdial_gpt(special))
    replies = got[:, len(histories[0]) :].tolist()
    assert all(row[0] not in special for row in replies)
    for row in replies:
        end = next((i for i, token in enumerate(row) if token in special), None)
        assert end is None or set(row[end + 1 :]) <= {1}
    with pytest.raises(ValueError, match="token_type_ids: expected none in generation"):
        model.generate(batch, token_type_ids=torch.zeros_like(batch))


def test_shapes_and_gradients() -> None:
    checks.check_shapes_and_gradients(small(n_positions=9))


def test_round_trip(tmp_path: Path) -> None:
    checks.check_round_trip(small(), tmp_path)


def test_bf16() -> None:
    checks.check_bf16(small())


def test_compiled(forget_compiled: None) -> None:
    checks.check_compiled(small(n_layer=1), "aot_eager")


def test_apply_lora() -> None:
    checks.check_apply_lora(small(), ["c_attn", "c_proj", "c_fc"], 8)


def test_peft(tmp_path: Path) -> None:
    checks.check_peft(small(), ["c_attn", "c_proj", "c_fc"], tmp_path, fan_in_fan_out=True)


def test_child_tuning() -> None:
    checks.check_child_tuning(small(), "F")


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"input_ids: expected integers \[B, L\], got torch.float32 \[2, 9\]"):
        small()(input_ids=checks.ids().float())
    with pytest.raises(ValueError, match="input_ids: expected at most 40 tokens, got 41"):
        small()(input_ids=checks.ids(1, 41))
