"""Runs a prompt through a decoder body once and lets any number of responses continue from its keys and values.

A batch of N particles per prompt costs P tokens per prompt once, instead of N * L * P. The cached forward is the same
sum as the uncached one: causal attention makes a prompt's keys and values independent of what follows. Departure from
`generate`'s use of the cache: the prefix is a value. A forward works on a cache of its own, so one prefix serves
every flow step, and gradients reach the responses only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from vgf_llm.models.architecture import evaluating

_ROOM_TOKENS = 64  # tokens that a cache can take before its keys are copied to a larger place


@dataclass(frozen=True)
class PromptPrefix:
    """Keys and values of B prompts, left padded to P tokens.

    Attributes:
        keys: one [B, H, P, Dh] tensor a layer, positions already applied.
        values: one [B, H, P, Dh] tensor a layer.
        mask_BP: bool, True where a prompt token stands (at the right end of each row).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask_BP: Tensor

    @classmethod
    def of(cls, cache: DynamicCache, mask_BP: Tensor) -> PromptPrefix:
        """Takes what a cache holds, without copying."""
        keys, values = (tuple(getattr(layer, name) for layer in cache.layers) for name in ("keys", "values"))
        return cls(keys, values, mask_BP)

    @property
    def num_prompts(self) -> int:
        """Number of rows."""
        return self.mask_BP.shape[0]

    @property
    def lengths_B(self) -> Tensor:
        """Prompt lengths in tokens, int64."""
        return self.mask_BP.sum(dim=-1)

    def expand(self, n: int) -> PromptPrefix:
        """Repeats every prompt n times; row b * n + i continues prompt b."""
        if n == 1:
            return self
        rows_R = torch.arange(self.num_prompts, device=self.mask_BP.device).repeat_interleave(n)
        return self.select(rows_R)

    def select(self, rows_R: Tensor) -> PromptPrefix:
        """Picks rows by index (int64 on the prefix's device), in the order given; rows may repeat."""
        return PromptPrefix(
            keys=tuple(k.index_select(0, rows_R) for k in self.keys),
            values=tuple(v.index_select(0, rows_R) for v in self.values),
            mask_BP=self.mask_BP.index_select(0, rows_R),
        )

    def rolled(self, columns_B: Tensor) -> PromptPrefix:
        """Moves each row right by its number of columns, at most P; what leaves at the right enters at the left."""
        P = self.mask_BP.shape[1]
        source_BP = (torch.arange(P, device=columns_B.device) - columns_B[:, None]).remainder(P)

        def moved(states: Tensor) -> Tensor:
            return states.gather(2, source_BP[:, None, :, None].expand_as(states))

        return PromptPrefix(
            keys=tuple(map(moved, self.keys)),
            values=tuple(map(moved, self.values)),
            mask_BP=self.mask_BP.gather(1, source_BP),
        )

    def without_last(self) -> PromptPrefix:
        """Drops each prompt's last token, so that a forward may be given it again and answer with its logits."""
        return PromptPrefix(
            keys=tuple(k[:, :, :-1] for k in self.keys),
            values=tuple(v[:, :, :-1] for v in self.values),
            mask_BP=self.mask_BP[:, :-1],
        )

    def cache(self) -> DynamicCache:
        """Copies the prefix into a transformers cache that is the caller's to change, without gradients."""
        cache = DynamicCache()
        for key, value in zip(self.keys, self.values, strict=True):
            cache.layers.append(_RoomyLayer(key, value))
        return cache


class _RoomyLayer(DynamicLayer):
    """A cache layer that writes new tokens into room it has, instead of copying all of its keys at every token."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.lazy_initialization(key, value)
        self._key_room, self._value_room = _with_room(key), _with_room(value)
        self._show(key.shape[-2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [R, H, T, Dh]; returns all of them."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._key_room.shape[-2]:
            self._key_room = _with_room(self.keys, end)
            self._value_room = _with_room(self.values, end)
        self._key_room[:, :, start:end] = key_states
        self._value_room[:, :, start:end] = value_states
        self._show(end)
        return self.keys, self.values

    def _show(self, length: int) -> None:
        self.keys, self.values = self._key_room[:, :, :length], self._value_room[:, :, :length]


def _with_room(states: Tensor, needed: int = 0) -> Tensor:
    """Copy [R, H, S, Dh] into a tensor with room for more tokens."""
    length = states.shape[-2]
    room = states.new_empty((*states.shape[:2], max(length, needed) + _ROOM_TOKENS, states.shape[-1]))
    room[:, :, :length] = states
    return room


def compute_prefix(body: nn.Module, prompts: Sequence[Sequence[int]], pad_token_id: int) -> PromptPrefix:
    """Runs the prompts through the body once, without gradients.

    Args:
        body: decoder without its language-model head (`model.base_model` of a transformers causal LM).
        prompts: B token id lists of any, also different, lengths of at least one token.
        pad_token_id: fills the left of shorter rows; never attended to, so any valid id gives the same result.

    Returns:
        The prefix on the body's device, in the body's compute dtype.

    Raises:
        ValueError: a prompt is empty, or there is none.
    """
    if not prompts:
        raise ValueError("compute_prefix: no prompts given; pass at least one")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"compute_prefix: prompt {index} is empty; give it at least one token (a BOS token, say)")
    device = next(body.parameters()).device
    longest = max(len(p) for p in prompts)
    ids_BP = torch.tensor([[pad_token_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask_BP = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=device)
    cache = DynamicCache()  # plain layers: a sliding window is the attention mask's business, nothing is dropped here
    with torch.no_grad(), evaluating(body):
        body(
            input_ids=ids_BP,
            attention_mask=mask_BP.long(),
            position_ids=positions_from_mask(mask_BP),
            past_key_values=cache,
            use_cache=True,
        )
    padding_B1P1 = ~mask_BP[:, None, :, None]
    layers: Any = cache.layers  # all keep keys and values, or `check_config` would have refused the model
    return PromptPrefix(
        keys=tuple(layer.keys.masked_fill(padding_B1P1, 0).contiguous() for layer in layers),
        values=tuple(layer.values.masked_fill(padding_B1P1, 0).contiguous() for layer in layers),
        mask_BP=mask_BP,
    )


def forward_with_prefix(
    body: nn.Module, prefix_rows: PromptPrefix, inputs_embeds_RTD: Tensor, mask_RT: Tensor
) -> Tensor:
    """Continues R prompts by their responses and returns the last hidden states.

    Args:
        body: the module that computed the prefix.
        prefix_rows: one row per response (`prefix.expand(N)` for N responses per prompt); left as it is.
        inputs_embeds_RTD: response embeddings; gradients flow to them and to the body's parameters that require them.
        mask_RT: bool or 0/1, right padded; True where a response token stands. Position ids continue the prompt's
        length.

    Returns:
        hidden_RTD after the body's final norm; what stands at padding is of no meaning.

    Raises:
        ValueError: the rows of prefix, embeddings and mask differ.
    """
    if not prefix_rows.num_prompts == inputs_embeds_RTD.shape[0] == mask_RT.shape[0]:
        raise ValueError(
            f"forward_with_prefix: prefix has {prefix_rows.num_prompts} rows, embeddings {inputs_embeds_RTD.shape[0]}, "
            f"mask {mask_RT.shape[0]}; expand the prefix to one row per response first"
        )
    mask_RT = mask_RT.bool()
    positions_RT = prefix_rows.lengths_B[:, None] + positions_from_mask(mask_RT)
    attention_mask = torch.cat([prefix_rows.mask_BP, mask_RT], dim=1).long()
    output = body(
        inputs_embeds=inputs_embeds_RTD,
        attention_mask=attention_mask,
        position_ids=positions_RT,
        past_key_values=_shared_cache(prefix_rows.keys, prefix_rows.values),
        use_cache=True,
    )
    hidden_RTD: Tensor = output.last_hidden_state
    return hidden_RTD


def positions_from_mask(mask_RT: Tensor) -> Tensor:
    """Numbers the attended tokens of each row 0, 1, 2, ... whatever the padding side (int64; padding: a valid id)."""
    return (mask_RT.long().cumsum(dim=-1) - 1).clamp(min=0)


def _shared_cache(keys: Sequence[Tensor], values: Sequence[Tensor]) -> DynamicCache:
    """Wraps tensors without copying; `DynamicLayer.update` concatenates into new ones: a forward leaves them be."""
    cache = DynamicCache()
    for key, value in zip(keys, values, strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache
