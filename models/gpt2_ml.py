"""GPT2_ML, the Chinese language model of 1.4 billion parameters, as a model of transformers.

imcaspar, https://github.com/imcaspar/gpt2-ml; Su Jianlin, https://kexue.fm/archives/7292. Attention and MLP are those
of transformers' GPT-2; the block is another, and neither GPT-2's nor BERT's:

    x = LN(word embedding + position embedding)                             [B, L, D]
    u = x + attention(x)                                                    not normalised, before or after
    x = LN_1(u + MLP(LN_0(u)))                                              and so on, without a norm at the end
    logits = x @ word embedding.T                                           [B, L, V], no bias

with the exact GELU. In training, dropout follows both output projections, and there is none of attention probabilities
(bert4keras has that: `attn_pdrop=0.1`).
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationMixin, GPT2Config, PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .language_models import check_inputs


@strict
class GPT2MLConfig(GPT2Config):
    """Defaults are those of the released model of 220,000 steps; that of 100,000 steps has vocab_size=21130.

    `eos_token_id` is [SEP] in its vocabulary of 8021; the tokenizer adds neither it nor any other.
    """

    model_type = "gpt2_ml"

    vocab_size: int = 8021
    n_positions: int = 1024
    n_embd: int = 1536
    n_layer: int = 48
    n_head: int = 24
    activation_function: str = "gelu"
    embd_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0
    initializer_range: float = 0.014142135623731
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 102
    pad_token_id: int | None = 0


class GPT2MLBlock(GradientCheckpointingLayer):
    """u = x + attention(x); LN_1(u + MLP(LN_0(u)))."""

    def __init__(self, config: GPT2MLConfig, layer_idx: int) -> None:
        super().__init__()
        inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.attn = GPT2Attention(config, layer_idx=layer_idx)
        self.ln_0 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        mlp: Any = GPT2MLP(inner, config)
        # The original does not pass its range on to the MLP.
        mlp.c_fc.initializer_range = mlp.c_proj.initializer_range = 0.02
        self.mlp = mlp
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, x: Tensor, cache: Cache | None, mask: Tensor | None, **kwargs: Any) -> Tensor:
        u = x + self.attn(x, cache, mask, **kwargs)[0]
        return self.ln_1(u + self.mlp(self.ln_0(u)))


class GPT2MLPreTrainedModel(PreTrainedModel):
    config_class = GPT2MLConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2MLBlock"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": GPT2MLBlock,
        "attentions": OutputRecorder(GPT2Attention, layer_name=".attn", index=1),
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            std = getattr(module, "initializer_range", self.config.initializer_range)
            initialization.normal_(module.weight, std=std)
            initialization.zeros_(module.bias)


class GPT2MLModel(GPT2MLPreTrainedModel):
    """The network without the logits."""

    def __init__(self, config: GPT2MLConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.emb_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.h = nn.ModuleList([GPT2MLBlock(config, i) for i in range(config.n_layer)])
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value  # type: ignore[assignment]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = cache.get_seq_length() if cache is not None else 0
        check_inputs(input_ids, inputs_embeds, self.config, past, self.config.n_positions)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids=position_ids)
        x = self.emb_norm(inputs_embeds + self.wpe(position_ids))
        for block in self.h:
            x = block(x, cache, mask, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=x, cache=cache if use_cache else None)


class GPT2ML(GPT2MLPreTrainedModel, GenerationMixin):
    """GPT2_ML with its logits: from_pretrained, save_pretrained, generate and all else that transformers' models have.

    1,373,809,152 parameters at the defaults, 1,393,944,576 with vocab_size=21130. LoRA's targets are the Conv1D layers
    "c_attn", "c_proj" and "c_fc". `pykernels.models.convert` makes it of the published TensorFlow checkpoints.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2MLConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # which transformers finds in the names of its own classes
        self.transformer = GPT2MLModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, V] and, with labels, the mean cross-entropy of the next tokens.

        Args:
            input_ids: [B, L]; no token is special: 0 is seen like any other, unless attention_mask says otherwise
                (`mask_of_zeros` is bert4keras's).
            cache: keys and values of the tokens before input_ids.
            attention_mask: [B, past + L], 0 for what is not to be seen.
            position_ids: [B, L] below n_positions; by default they count from the past.
            labels: [B, L], usually input_ids; they are shifted here, and -100 is ignored.
            logits_to_keep: only of so many last positions; 0 for all.
        """
        outputs = self.transformer(
            input_ids,
            cache=cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
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


def mask_of_zeros(input_ids: Tensor) -> Tensor:
    """The attention mask of bert4keras, which does not look at tokens 0, but for a first one: [B, L] -> [B, L] bool."""
    mask = input_ids != 0
    mask[:, :1] = True
    return mask
