"""What the language models have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, config: Any, past: int, longest: int | None
) -> None:
    """Raises ValueError for what a model with `past` cached and at most `longest` positions cannot take."""
    if (input_ids is None) == (inputs_embeds is None):
        got = "none" if input_ids is None else "both"
        raise ValueError(f"input_ids, inputs_embeds: expected one of them, got {got}")
    if input_ids is not None and (input_ids.dim() != 2 or input_ids.is_floating_point()):
        raise ValueError(f"input_ids: expected integers [B, L], got {input_ids.dtype} {list(input_ids.shape)}")
    width = config.hidden_size
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != width):
        raise ValueError(f"inputs_embeds: expected [B, L, {width}], got {list(inputs_embeds.shape)}")
    length = (input_ids if input_ids is not None else inputs_embeds).shape[1]  # type: ignore[union-attr]
    if longest is not None and isinstance(past, int) and past + length > longest:
        raise ValueError(f"input_ids: expected at most {longest} tokens with those in the cache, got {past + length}")
