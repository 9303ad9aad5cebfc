"""Models of PEFT, what they compute, and which of our operators fused layers call. Imports peft: guard the import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from pykernels import peft_linear

OPERATORS = ("lora_linear", "lora_linear_multi", "dora_linear")


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Grows by the operator's name and options with each call by a fused layer."""
    made: list[tuple[str, dict[str, Any]]] = []

    def recorded(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            made.append((name, kwargs))
            return function(*args, **kwargs)

        return call

    for name in OPERATORS:
        monkeypatch.setattr(peft_linear, name, recorded(name, getattr(peft_linear, name)))
    return made


def token_ids(rows: int = 2) -> Tensor:
    return torch.randint(0, 30, (rows, 9), generator=torch.Generator().manual_seed(3))


def bert(**config: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    plain = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            **sizes, intermediate_size=24, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    )
    targets = {"target_modules": ["query", "value", "intermediate.dense"], "r": 4, "lora_alpha": 6}
    return peft.get_peft_model(plain, peft.LoraConfig(**(targets | config)))


def gpt2(**config: Any) -> nn.Module:
    torch.manual_seed(2)
    sizes = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=30, n_positions=12, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    targets = {"target_modules": ["c_attn", "c_fc", "c_proj"], "r": 3, "fan_in_fan_out": True}
    return peft.get_peft_model(transformers.GPT2LMHeadModel(sizes), peft.LoraConfig(**(targets | config)))


MODELS: dict[str, tuple[Callable[..., nn.Module], int]] = {"bert": (bert, 6), "gpt2": (gpt2, 8)}


def disturb(model: nn.Module) -> nn.Module:
    """Adapters that are not zero, all of them, and magnitudes that are not those of the start."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(1 + 0.5 * torch.rand(p.shape, generator=generator))
            elif "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def results(model: nn.Module, ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Logits and all gradients of trained parameters."""
    model.zero_grad()
    logits = model(input_ids=ids, **inputs).logits
    logits.float().square().mean().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
