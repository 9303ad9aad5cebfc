"""How each article's language model draws its texts, as options of transformers' generate.

    model.generate(ids, **sampling.gpt2_ml_demo())

Nucleus sampling keeps the most probable tokens whose probabilities add up to p. The token that crosses p is kept by
bert4keras, CDial-GPT and transformers' own top_p, and left out by gpt2-ml (`NucleusWithoutCrossing`).
Where both are given, top-k comes first, and p is of what that leaves, in bert4keras and in transformers.

An end token stops a text from a length on; before, it is a token like others in gpt2-ml and in bert4keras (`EndsFrom`),
and CDial-GPT does not draw it (min_new_tokens).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria


class NucleusWithoutCrossing(LogitsProcessor):
    """Keeps tokens of which they and all more probable ones have less than p together; always the most probable one."""

    def __init__(self, p: float) -> None:
        if not 0 < p <= 1:
            raise ValueError(f"p: expected 0 < p <= 1, got {p}")
        self.p = p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V] -> the same, -inf where a token is left out."""
        ordered, order = scores.sort(dim=-1, descending=True)
        dropped = ordered.softmax(-1).cumsum(-1) >= self.p
        dropped[..., 0] = False
        return scores.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)


class EndsFrom(EosTokenCriteria):
    """Stops at an end token where a text has `length` tokens or more, of which the first `prompt` do not count."""

    def __init__(self, eos_token_id: int, length: int, prompt: int = 0) -> None:
        super().__init__(eos_token_id)
        self.length, self.prompt = length, prompt

    def __call__(
        self,
        input_ids: torch.LongTensor,
        scores: tuple[Tensor] | None,
        new_token_length: int = 1,
        **kwargs: Any,
    ) -> torch.BoolTensor:
        """input_ids [B, L] -> [B] bool."""
        ended = super().__call__(input_ids, scores, new_token_length, **kwargs)
        return ended & (input_ids.shape[1] - self.prompt >= self.length)  # type: ignore[return-value]


def gpt2_ml_demo(p: float = 0.95, *, eos: int = 102, min_length: int = 0, max_length: int = 1024) -> dict[str, Any]:
    """gpt2-ml's demo: nucleus without the crossing token, never token 0, at most max_length tokens with the prompt.

    It stops at [SEP] when the text, prompt included, is longer than min_length.
    """
    return {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "suppress_tokens": [0],
        "logits_processor": LogitsProcessorList([NucleusWithoutCrossing(p)]),
        "stopping_criteria": StoppingCriteriaList([EndsFrom(eos, min_length + 1)]),
        "eos_token_id": None,
        "pad_token_id": 0,
        "max_length": max_length,
    }


def gpt2_ml_bert4keras(
    prompt: int, *, top_k: int = 0, top_p: float = 0.95, eos: int = 511, min_new: int = 128, max_new: int = 256
) -> dict[str, Any]:
    """bert4keras's example: p 0.95, until a full stop after min_new tokens. The article: top_k=5, top_p=1.

    prompt: how many tokens it has.
    """
    return {
        "do_sample": True,
        "top_k": top_k,
        "top_p": top_p,
        "temperature": 1.0,
        "stopping_criteria": StoppingCriteriaList([EndsFrom(eos, min_new, prompt)]),
        "eos_token_id": None,
        "pad_token_id": 0,
        "max_new_tokens": max_new,
    }


def nezha_dialog(*, max_new: int = 32) -> dict[str, Any]:
    """A reply of the dialogue model of https://kexue.fm/archives/7718: top-k 5, until [SEP]."""
    return {"do_sample": True, "top_k": 5, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": max_new}


def cdial_gpt(special: list[int], *, max_new: int = 30) -> dict[str, Any]:
    """A reply of CDial-GPT: temperature 0.7, then p 0.9, one token or more, until any of the special tokens."""
    return {
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.9,
        "temperature": 0.7,
        "eos_token_id": special,
        "min_new_tokens": 1,
        "max_new_tokens": max_new,
    }
