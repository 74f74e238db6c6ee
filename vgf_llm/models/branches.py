"""Many one-token continuations of many texts in one forward of a decoder, each from its text's keys and values.

R texts of S tokens stand in a cache. A forward gets X tokens in one packed row [1, X]: of each text its newest token,
where that was not run before, and any number of *branches*, candidates for the token after it. A branch sees its text
and itself, never another branch:

    output_x = softmax(q_x [K_text(x), k_x]^T / sqrt(Dh)) [V_text(x), v_x]

Linear layers run on the X tokens alone, so texts with few candidates cost little. Keys of branches are written into
columns behind the text's. When one of them becomes the text's next token, :meth:`Branches.accept` moves its keys into
the text, and the token is never run again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from vgf_llm.errors import ModelError
from vgf_llm.models.attention import unapplied
from vgf_llm.models.prefix import PromptPrefix

NAME = "vgf_branches"  # without a mask function of that name, transformers builds no mask
_ROOM_TOKENS = 64


class Branches:
    """Keys and values of R growing texts, and of the branches behind them.

    Args:
        decoder: Runs the tokens; only read. Its keys and values must be a plain cache per layer.
        prefix: The texts so far, a row each; copied.
        width: Largest number of branches of a text, W.
    """

    def __init__(self, decoder: PreTrainedModel, prefix: PromptPrefix, width: int) -> None:
        self.decoder, self.width = decoder, width
        self.length = prefix.mask_BP.shape[1]
        self.mask_RS = prefix.mask_BP
        self.keys = [_roomy(states, width) for states in prefix.keys]
        self.values = [_roomy(states, width) for states in prefix.values]
        self._kept_RS = self.mask_RS
        self._row_X = self._slot_X = torch.zeros(0, dtype=torch.long)
        self._masks: dict[int, Tensor] = {}

    @property
    def positions_R(self) -> Tensor:
        """Place of the next token of each text, int64."""
        return self.mask_RS.sum(-1)

    def accept(self, branch_R: Tensor) -> None:
        """Make room for one token after every text and fill it with the branch that was taken.

        Args:
            branch_R: int64, the branch of the last forward that each text goes on with; -1 where its token was not
                among them. That token must be the text's newest in the next forward, or the text must be over.
        """
        self._reserve(self.length + 1 + self.width)
        taken_R = torch.where(branch_R >= 0, branch_R, 0)
        rows_R = torch.arange(len(branch_R), device=branch_R.device)
        for states in (*self.keys, *self.values):
            states[:, :, self.length] = states[rows_R, :, self.length + taken_R]
        self.mask_RS = torch.cat([self.mask_RS, torch.ones_like(self.mask_RS[:, :1])], 1)
        self.length += 1

    def forward(self, embeddings_XD: Tensor, row_X: Tensor, branch_X: Tensor) -> Tensor:
        """Return the last hidden states of X tokens, [X, D].

        Args:
            embeddings_XD: Their input embeddings.
            row_X: int64, the text of each.
            branch_X: int64, its place among the branches of its text, in [0, W); -1 for the text's newest token.

        Raises:
            ModelError: If the decoder asks its attention for what this does not apply, or does not call it.
        """
        self._row_X, self._slot_X = row_X, branch_X + 1
        self._masks = {}
        positions_X = self.positions_R[row_X] - (branch_X < 0).long()
        self._ran = False
        with _running(self):
            hidden_XD: Tensor = self.decoder(
                inputs_embeds=embeddings_XD.unsqueeze(0), position_ids=positions_X.unsqueeze(0), use_cache=False
            ).last_hidden_state[0]
        if not self._ran:
            raise ModelError(
                f"the architecture {self.decoder.config.model_type!r} has an attention of its own, which cannot look "
                "ahead at several candidates at once; use another direction"
            )
        return hidden_XD

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int
    ) -> Tensor:
        """Attend in one layer; [1, X, H, Dh].

        Args:
            layer: Index of the layer.
            query: [1, H, X, Dh].
            key: [1, H_kv, X, Dh].
            value: As ``key``.
            scaling: Of the scores; 1 / sqrt(Dh) when None.
            window: Largest distance that is seen; 0: any.
        """
        self._ran = True
        row_X, slot_X = self._row_X, self._slot_X
        keys, values = self.keys[layer], self.values[layer]
        column_X = self.length - 1 + slot_X
        keys[row_X, :, column_X] = key[0].transpose(0, 1)
        values[row_X, :, column_X] = value[0].transpose(0, 1)
        slots = int(slot_X.max()) + 1
        end = self.length - 1 + slots
        heads, kv_heads, width = query.shape[1], keys.shape[1], query.shape[-1]
        q_RWHd = query.new_zeros(len(keys), slots, heads, width)
        q_RWHd[row_X, slot_X] = query[0].transpose(0, 1)
        q_RHWd = q_RWHd.transpose(1, 2).reshape(len(keys), kv_heads, heads // kv_heads * slots, width)
        mask_RWS = self._mask(slots, window)
        out = scaled_dot_product_attention(
            q_RHWd,
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=mask_RWS.repeat(1, heads // kv_heads, 1).unsqueeze(1),
            scale=scaling,
        )
        out_RWHd = out.reshape(len(keys), heads, slots, -1).transpose(1, 2)
        return out_RWHd[row_X, slot_X].unsqueeze(0)

    def _mask(self, slots: int, window: int) -> Tensor:
        """Return which columns each slot sees, bool [R, slots, S + slots - 1]."""
        if window not in self._masks:
            device = self.mask_RS.device
            own_WW = torch.eye(slots, dtype=torch.bool, device=device)[:, 1:]  # slot 0 is the text's last column
            past_RWS = self.mask_RS.unsqueeze(1).expand(-1, slots, -1)
            if window:
                place_RS = self.mask_RS.cumsum(-1) - 1
                query_RW = (self.positions_R - 1).unsqueeze(1) + (torch.arange(slots, device=device) > 0).long()
                past_RWS = past_RWS & (query_RW.unsqueeze(-1) - place_RS.unsqueeze(1) < window)
            self._masks[window] = torch.cat([past_RWS, own_WW.expand(len(past_RWS), -1, -1)], -1)
        return self._masks[window]

    def _reserve(self, columns: int) -> None:
        if columns > self.keys[0].shape[2]:
            self.keys = [_roomy(states, self.width) for states in self.keys]
            self.values = [_roomy(states, self.width) for states in self.values]


def _roomy(states: Tensor, width: int) -> Tensor:
    """Copy [R, H, S, Dh] into zeros with room for more tokens and W branches."""
    room = states.new_zeros((*states.shape[:2], states.shape[2] + _ROOM_TOKENS + width, states.shape[-1]))
    room[:, :, : states.shape[2]] = states
    return room


_ACTIVE: ContextVar[Branches] = ContextVar("branches")


@contextmanager
def _running(branches: Branches) -> Iterator[None]:
    """Make the decoder's attention that of the branches, for the duration."""
    config = branches.decoder.config
    before, token = config._attn_implementation, _ACTIVE.set(branches)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _ACTIVE.reset(token)


def _branch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as :meth:`Branches.attend` does; called by transformers."""
    dropped = unapplied(kwargs)
    layer = getattr(module, "layer_idx", None)
    if dropped or not isinstance(layer, int):
        asked = ", ".join(dropped) or "a cache without an index"
        raise ModelError(
            f"{type(module).__name__} asks for {asked}, which looking ahead does not apply; use another direction"
        )
    window = kwargs.get("sliding_window") or 0
    return _ACTIVE.get().attend(layer, query, key, value, scaling, window), None


AttentionInterface.register(NAME, _branch_attention)
