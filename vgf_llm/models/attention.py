"""Grouped-query attention that does not copy the cache.

With a padding mask, transformers' sdpa attention repeats keys and values once per query head of a group before every
call: at one new token per step and a long shared prompt that copy is most of the time. Here the query heads of a group
stand side by side as queries of their one key-value head,

    q [R, H_kv G, T, Dh] -> [R, H_kv, G T, Dh],        mask [R, 1, T, S] -> [R, 1, G T, S],

which is the same sum of the same numbers. Without groups or without a mask it is transformers' sdpa.

Some architectures hand more to attention than queries, keys, values, mask and scaling: a cap on the scores (Gemma 2),
sinks (gpt-oss). transformers' sdpa drops these without a word, so :func:`group_attention` switches a model that asks
for one to its eager attention, which applies it, and :func:`grouped_attention` refuses what it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vgf_llm.errors import ModelError
from vgf_llm.models.architecture import decoder_of, difference, input_table, is_whole, text_config, tolerance

NAME = "grouped_sdpa"
_PROBE = "vgf_probe_sdpa"

# What changes no score: the mask holds it already, or it asks for an output.
_APPLIED_ELSEWHERE = {
    "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions", "token_type_ids",
    "output_hidden_states", "output_router_logits", "num_items_in_batch", "return_dict", "deterministic", "seq_idx",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_embeddings", "logits_to_keep",
}  # fmt: skip
_SDPA_APPLIES = {"position_bias"}


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

    Raises:
        ModelError: If the layer asks for more than this applies (a cap on the scores, sinks); load the model with
            :func:`vgf_llm.models.loading.load_causal_lm` or call :func:`group_attention`, which then choose eager
            attention.
    """
    _refuse_unapplied(module, kwargs)
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
    return output.reshape(rows, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


def unapplied(kwargs: Mapping[str, Any]) -> list[str]:
    """Return what a layer hands to its attention and scaled dot-product attention would drop, sorted."""
    known = _APPLIED_ELSEWHERE | _SDPA_APPLIES
    return sorted(name for name, value in kwargs.items() if name not in known and value is not None)


def _refuse_unapplied(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    dropped = unapplied(kwargs)
    if dropped:
        raise _Unapplied(
            f"{type(module).__name__} asks its attention for {', '.join(dropped)}, which sdpa does not apply; "
            'load the model with attn_implementation="eager"'
        )


class _Unapplied(ModelError):
    """A layer asks for what scaled dot-product attention drops."""


def _probing_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as sdpa does, and refuse what it would drop."""
    _refuse_unapplied(module, {name: given for name, given in kwargs.items() if name not in ("dropout", "scaling")})
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


for _name, _function in ((NAME, grouped_attention), (_PROBE, _probing_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)


def caps_scores(config: PreTrainedConfig) -> bool:
    """Return whether a configuration, nested or not, names a cap on the attention scores."""
    return bool(getattr(text_config(config), "attn_logit_softcapping", None))


def settle_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Switch a model to eager attention where sdpa drops what its layers ask for, or gives other hidden states.

    Args:
        model: A causal language model or a decoder; changed in place. Six tokens are run to find out. Without weights
            (meta device) or with split ones only the configuration is looked at.
    """
    decoder = decoder_of(model)
    if decoder.config._attn_implementation in ("sdpa", NAME) and (
        caps_scores(decoder.config) or _drops_something(decoder)
    ):
        _set(model, decoder, "eager")
    return model


def group_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Settle a model's attention, and group it where it uses sdpa and has fewer key-value than query heads.

    Args:
        model: As for :func:`settle_attention`.
    """
    decoder = decoder_of(settle_attention(model))
    config = text_config(decoder.config)
    heads = getattr(config, "num_attention_heads", None)
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    if not (isinstance(heads, int) and isinstance(key_value_heads, int)):  # some state one number per layer
        return model
    if decoder.config._attn_implementation == "sdpa" and key_value_heads < heads:
        _set(model, decoder, NAME)
    return model


def _set(model: PreTrainedModel, decoder: PreTrainedModel, implementation: str) -> None:
    """Set it on the model's own configuration too where it is another object than the decoder's with the same class."""
    decoder.set_attn_implementation(implementation)
    if type(model.config) is type(decoder.config) and model.config is not decoder.config:
        model.set_attn_implementation(implementation)


@torch.no_grad()
def _drops_something(decoder: PreTrainedModel) -> bool:
    """Run a few tokens and find out whether a layer asks sdpa for what it drops, or eager gives other hidden states."""
    if not is_whole(decoder) or not decoder._can_set_attn_implementation():
        return False
    before, was_training = decoder.config._attn_implementation, decoder.training
    rows = input_table(decoder).shape[0]
    ids_1S = (1 + torch.arange(6, device=next(decoder.parameters()).device)[None] * max(1, rows // 7)).remainder(rows)
    decoder.eval()
    try:
        found = []
        for implementation in (_PROBE, "eager"):
            decoder.set_attn_implementation(implementation)
            found.append(decoder(input_ids=ids_1S, use_cache=False).last_hidden_state)
    except _Unapplied:
        return True
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        return False  # attention not looked up by name (Falcon): the default stands, and `check_decoder` judges it
    finally:
        decoder.set_attn_implementation(before)
        decoder.train(was_training)
    by_sdpa, by_eager = found
    return bool(by_eager.isfinite().all()) and not difference(by_sdpa, by_eager) <= tolerance(by_eager)
