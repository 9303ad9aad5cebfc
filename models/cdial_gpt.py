"""CDial-GPT, the dialogue model of LCCC, over transformers' OpenAI GPT.

Wang et al., https://arxiv.org/abs/2008.03946, https://github.com/thu-coai/CDial-GPT. A dialogue is
[CLS] [speaker1] u_0 [speaker2] u_1 ... [SEP]; the "type" of each token is the id of its speaker's token ([CLS] for the
first), and is embedded with the table of the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel


@strict
class CDialGPTConfig(OpenAIGPTConfig):
    """Defaults are those of the released models; the two speakers' tokens are the last of the vocabulary."""

    model_type = "cdial_gpt"

    vocab_size: int = 13088
    n_positions: int = 513
    bos_token_id: int = 0
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    @property
    def speakers(self) -> tuple[int, int]:
        return self.vocab_size - 2, self.vocab_size - 1


class CDialGPT(OpenAIGPTLMHeadModel):
    """OpenAIGPTLMHeadModel that finds the types itself. 95,500,032 parameters at the defaults.

    The published folders (GPT_LCCC-base, GPT_LCCC-large) are read by from_pretrained as they are. There is no cache of
    keys and values in transformers' OpenAI GPT.
    """

    config_class = CDialGPTConfig

    def __init__(self, config: CDialGPTConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # which transformers finds in the names of its own classes

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As OpenAIGPTLMHeadModel's. token_type_ids: default `speaker_types`. position_ids: by default, padding on
        the left, of which attention_mask tells, does not count."""
        config: Any = self.config
        if input_ids is not None:
            if input_ids.dim() != 2 or input_ids.is_floating_point():
                raise ValueError(f"input_ids: expected integers [B, L], got {input_ids.dtype} {list(input_ids.shape)}")
            longest, length = config.n_positions, input_ids.shape[1]
            if length > longest:
                raise ValueError(f"input_ids: expected at most {longest} tokens, got {length}")
            if token_type_ids is None:
                token_type_ids = speaker_types(input_ids, config.speakers, config.bos_token_id)
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        if kwargs.get("token_type_ids") is not None:
            raise ValueError("token_type_ids: expected none in generation, which finds them by the speakers, got some")
        kept = {name: kwargs[name] for name in ("attention_mask", "logits_to_keep") if kwargs.get(name) is not None}
        return {"input_ids": input_ids, **kept}


def speaker_types(input_ids: Tensor, speakers: Sequence[int], first: int) -> Tensor:
    """The last speaker's token at or before each position, and `first` where there is none; [B, L] -> [B, L]."""
    is_speaker = torch.isin(input_ids, torch.tensor(list(speakers), device=input_ids.device))
    at = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = torch.where(is_speaker, at, -1).cummax(1).values
    return torch.where(last < 0, first, input_ids.gather(1, last.clamp(min=0)))


def encode_dialog(
    utterances: Sequence[Sequence[int]], config: CDialGPTConfig, *, max_history: int = 15
) -> tuple[list[int], list[int]]:
    """Ids and labels for training on the last utterance: -100 for all but it and its [SEP].

    The speakers take turns so that the last utterance is of the second one where there are two. max_history: as many
    pairs of utterances come before the last at most, with one more: 2 * max_history + 1.
    """
    utterances = utterances[-(2 * max_history + 2) :]
    ids, labels = [config.bos_token_id], [-100]
    for i, utterance in enumerate(utterances):
        ids += [config.speakers[i % 2], *utterance]
        last = i == len(utterances) - 1
        labels += [-100, *(utterance if last else [-100] * len(utterance))]
    return [*ids, config.eos_token_id], [*labels, config.eos_token_id]  # type: ignore[list-item]


def encode_history(utterances: Sequence[Sequence[int]], config: CDialGPTConfig, *, max_history: int = 15) -> list[int]:
    """Ids from which the model replies: the last 2 * max_history + 1 utterances, and the next speaker's token."""
    utterances = utterances[-(2 * max_history + 1) :]
    ids: list[int] = [config.bos_token_id]
    for i, utterance in enumerate(utterances):
        ids += [config.speakers[i % 2], *utterance]
    return [*ids, config.speakers[len(utterances) % 2]]
