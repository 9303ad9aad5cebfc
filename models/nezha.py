"""The dialogue model on NEZHA, as a model of transformers.

Su Jianlin, https://kexue.fm/archives/7718; NEZHA: https://arxiv.org/abs/1909.00204. A BERT without position embeddings,
read from left to right, whose attention adds a fixed sinusoid R of the clipped distance to keys and to values:

    scores[q, k] = (Q[q] . K[k] + Q[q] . R[i]) / sqrt(D)        i = clip(k - q, -64, 64) + 64
    output[q] = sum over k of A[q, k] (V[k] + R[i])

R has 129 rows. The scores take theirs from Q R^T [B, H, L, 129]; the output sums A by distance to [B, H, L, 129] and
multiplies that by R. So nothing is larger than the scores [B, H, L, L]. On CUDA those sums, and the gradient of Q R^T,
are added by atomics, in an order that differs from run to run; under torch.use_deterministic_algorithms(True) PyTorch
takes its deterministic forms of both (scatter_add and the backward of gather), which raise nothing.

A dialogue is [CLS] u_0 [SEP] u_1 [SEP] ..., and utterance i, its [SEP] included, has segment i mod 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import BertConfig, GenerationMixin, PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.bert.modeling_bert import BertLayer, BertOnlyMLMHead, BertSelfAttention
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .language_models import check_inputs

MAX_DISTANCE = 64  # fixed in NEZHA's code and in bert4keras, whatever a published configuration says


@strict
class NezhaConfig(BertConfig):
    """Defaults are those of the dialogue model: NEZHA-base, vocabulary of 14,194.

    is_causal: False makes it an encoder that sees both sides. hidden_act: "gelu" is the exact one of bert4keras,
    "gelu_pytorch_tanh" that of NEZHA's own code. layer_norm_eps: 1e-12; the last bert4keras has 1e-7.
    attention_probs_dropout_prob: 0, since the article's bert4keras had no such dropout. eos_token_id: [SEP].
    """

    model_type = "nezha_dialog"

    vocab_size: int = 14194
    attention_probs_dropout_prob: float | int = 0.0
    is_causal: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads or self.hidden_size // self.num_attention_heads % 2:
            got = f"{self.hidden_size} / {self.num_attention_heads}"
            raise ValueError(f"hidden_size / num_attention_heads: expected an even number, got {got}")


def relative_table(size: int) -> Tensor:
    """R, float32 [129, size]: sin(p / 10000^(2i / size)) at 2i and its cosine at 2i + 1, for p = 0 ... 128."""
    rates = torch.exp(torch.arange(0, size, 2, dtype=torch.float64) * (-torch.log(torch.tensor(1e4).double()) / size))
    angles = torch.arange(2 * MAX_DISTANCE + 1, dtype=torch.float64).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


def speaker_segments(input_ids: Tensor, sep: int) -> Tensor:
    """Segments of dialogues [B, L]: how many tokens `sep` come before, modulo 2."""
    is_sep = (input_ids == sep).long()
    return (is_sep.cumsum(1) - is_sep) % 2


class NezhaSelfAttention(BertSelfAttention):
    """BERT's with relative positions; see the module for the formula."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        *,
        table: Tensor,
        distances: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """table: R [129, D] in the dtype of the states. distances: rows of R [Lq, Lk]."""
        B, Lq, _ = hidden_states.shape

        def heads(layer: nn.Module) -> Tensor:
            return layer(hidden_states).view(B, Lq, -1, self.attention_head_size).transpose(1, 2)

        q, k, v = heads(self.query), heads(self.key), heads(self.value)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        table = table.to(q.dtype)  # autocast has cast the projections
        index = distances.expand(*q.shape[:2], -1, -1)
        scores = (q @ k.transpose(2, 3) + (q @ table.T).gather(3, index)) * self.scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = F.softmax(scores, dim=-1).to(q.dtype)
        weights = F.dropout(weights, self.dropout.p, self.training)
        by_distance = weights.new_zeros(*weights.shape[:3], len(table)).scatter_add(3, index, weights)
        out = weights @ v + by_distance @ table
        return out.transpose(1, 2).reshape(B, Lq, -1), weights


class NezhaEmbeddings(nn.Module):
    """Dropout of the norm of word + segment embeddings."""

    def __init__(self, config: NezhaConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, words: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.dropout(self.LayerNorm(words + self.token_type_embeddings(token_type_ids)))


class NezhaEncoder(nn.Module):
    def __init__(self, config: NezhaConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(config, i) for i in range(config.num_hidden_layers)])
        for i, layer in enumerate(self.layer):
            layer.get_submodule("attention").self = NezhaSelfAttention(config, layer_idx=i)


class NezhaPreTrainedModel(PreTrainedModel):
    config_class = NezhaConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BertLayer"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": BertLayer, "attentions": NezhaSelfAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NezhaModel):
            table = module.get_buffer("relative_table")
            initialization.copy_(table, relative_table(table.shape[1]))


class NezhaModel(NezhaPreTrainedModel):
    """The network without its head. Names of the parameters are those of BERT."""

    def __init__(self, config: NezhaConfig) -> None:
        super().__init__(config)
        self.embeddings = NezhaEmbeddings(config)
        self.encoder = NezhaEncoder(config)
        table = relative_table(config.hidden_size // config.num_attention_heads)
        self.register_buffer("relative_table", table, persistent=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if use_cache and self.config.is_causal and cache is None:
            cache = DynamicCache(config=self.config)
        past = cache.get_seq_length() if cache is not None else 0
        check_inputs(input_ids, inputs_embeds, self.config, past, None)
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)
        B, L, _ = inputs_embeds.shape
        if token_type_ids is None:
            token_type_ids = torch.zeros(B, L, dtype=torch.int64, device=inputs_embeds.device)
        if token_type_ids.shape != (B, L):
            raise ValueError(f"token_type_ids: expected [{B}, {L}], got {list(token_type_ids.shape)}")
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache)
        # A cache of fixed size is longer than what it holds; the mask tells how long.
        keys = mask.shape[-1] if isinstance(mask, Tensor) else past + L
        at = torch.arange(keys, device=inputs_embeds.device)
        queries = torch.arange(L, device=inputs_embeds.device).unsqueeze(1) + past
        distances = (at - queries).clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE
        x = self.embeddings(inputs_embeds, token_type_ids)
        for layer in self.encoder.layer:
            x = layer(x, mask, cache=cache, table=self.relative_table, distances=distances, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=x, cache=cache if use_cache else None)


class NezhaDialog(NezhaPreTrainedModel, GenerationMixin):
    """NEZHA with the head of BERT's masked language model, as a language model of dialogues.

    96,564,850 parameters at the defaults. LoRA's targets are the linear layers "query", "key", "value" and "dense".
    `pykernels.models.convert` makes it of TensorFlow checkpoints of NEZHA and of the dialogue model.
    """

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: NezhaConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # which transformers finds in the names of its own classes
        self.bert = NezhaModel(config)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.cls.predictions.decoder = value
        self.cls.predictions.bias = value.bias

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, V] and, with labels, the mean cross-entropy of the next tokens.

        Args:
            input_ids: [B, L].
            cache: keys and values of the tokens before input_ids.
            attention_mask: [B, past + L], 0 for what is not to be seen; without a past the default hides padding.
            token_type_ids: [B, L], 0 or 1; without a past the default is `speaker_segments`.
            labels: [B, L], usually input_ids with -100 at the padding, which is ignored; they are shifted here.
            logits_to_keep: only of so many last positions; 0 for all.
        """
        past = cache.get_seq_length() if cache is not None else 0
        check_inputs(input_ids, inputs_embeds, self.config, past, None)
        if token_type_ids is None:
            if input_ids is None or past > 0:
                raise ValueError("token_type_ids: expected with inputs_embeds and with tokens in the cache, got none")
            token_type_ids = speaker_segments(input_ids, self._sep())
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None and not past:
            attention_mask = input_ids != self.config.pad_token_id
        outputs = self.bert(
            input_ids,
            cache=cache,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.cls(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _sep(self) -> int:
        if not isinstance(self.config.eos_token_id, int):
            raise ValueError(f"eos_token_id: expected the id of [SEP], got {self.config.eos_token_id}")
        return self.config.eos_token_id

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A reply has the segment that its history's [SEP]s tell; transformers would repeat the last speaker's."""
        if kwargs.get("token_type_ids") is not None:
            raise ValueError("token_type_ids: expected none in generation, which finds them by [SEP], got some")
        kwargs["token_type_ids"] = speaker_segments(input_ids, self._sep())
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)


def encode_dialog(
    utterances: Sequence[Sequence[int]], *, cls: int, sep: int, longest: int = 512
) -> tuple[list[int], list[int]]:
    """[CLS] u_0 [SEP] u_1 [SEP] ... and the segments.

    The utterances from the first that does not fit into `longest` on are left out, as in the article's training data;
    for a history, cut the oldest first (`cut_history`).
    """
    ids, segments = [cls], [0]
    for i, utterance in enumerate(utterances):
        if len(ids) + len(utterance) + 1 > longest:
            break
        ids += [*utterance, sep]
        segments += [i % 2] * (len(utterance) + 1)
    return ids, segments


def cut_history(utterances: Sequence[Sequence[int]], longest: int) -> list[Sequence[int]]:
    """The last utterances that fit into `longest` tokens with [CLS] and their [SEP]s."""
    room, kept = longest - 1, []
    for utterance in reversed(utterances):
        room -= len(utterance) + 1
        if room < 0:
            break
        kept.append(utterance)
    return kept[::-1]


def reduce_vocabulary(
    weights: dict[str, Tensor], keep: Sequence[int], compound: Sequence[Sequence[int]] = ()
) -> dict[str, Tensor]:
    """Weights of a NezhaDialog with another vocabulary: the rows `keep`, then the mean of each group in `compound`.

    compound: of indices into the reduced rows; [0] makes a new token like the first. bert4keras's keep_tokens and
    compound_tokens.
    """
    reduced = dict(weights)
    for name, t in weights.items():
        if name == "bert.embeddings.word_embeddings.weight" or name.startswith(
            ("cls.predictions.bias", "cls.predictions.decoder.")
        ):
            rows = t[list(keep)]
            reduced[name] = torch.cat([rows, *(rows[list(group)].mean(0, keepdim=True) for group in compound)])
    return reduced
