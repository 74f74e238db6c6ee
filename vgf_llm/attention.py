"""Grouped-query attention that does not copy the cache.

With a padding mask, transformers' sdpa attention repeats keys and values once per query head of a group before every
call: at one new token a step and a long shared prompt that copy is most of the time. Here the query heads of a group
stand side by side as queries of their one key-value head,

    q [R, H_kv G, T, Dh] -> [R, H_kv, G T, Dh],        mask [R, 1, T, S] -> [R, 1, G T, S],

which is the same sum of the same numbers. Without groups or without a mask it is transformers' sdpa.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "grouped_sdpa"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' sdpa does, without repeating keys and values.

    Args:
        module: The attention layer.
        query: [R, H, T, Dh].
        key: [R, H_kv, S, Dh]; H is a multiple of H_kv.
        value: As ``key``.
        attention_mask: Bool or additive, [R, 1, T, S]; None is left to transformers, as is a mask a head.
        dropout: Probability.
        scaling: Of the scores; 1 / sqrt(Dh) when None.
        kwargs: Handed on to transformers where it takes over.

    Returns:
        Output [R, T, H, Dh], and None in place of the weights.
    """
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if groups == 1 or attention_mask is None or attention_mask.shape[1] != 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], groups * length, width),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1) if length > 1 else attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return output.reshape(rows, heads, length, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def group_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Switch a model that uses transformers' sdpa and has fewer key-value than query heads; others stay as they are."""
    config = model.config.get_text_config(decoder=True)
    key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if model.config._attn_implementation == "sdpa" and key_value_heads < config.num_attention_heads:
        model.set_attn_implementation(NAME)
    return model
