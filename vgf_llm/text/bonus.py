"""Bonuses that need no original: what one-pass decoding tilts the reference by, token by token.

Two-pass decoding moves a finished response and reads the bonus of a token off its displacement. Here the bonus b_t(v)
of a candidate v is known before the token is written, from the text before it alone:

    table, constant   b(v) = w_v, one number per token, the same everywhere
    prompt            b(v) = w_{x,v}, one number per prompt and token
    causal            b_t(v) = <g(h_t), e_v>, g a head on the reference's own hidden state h_t before the token
    lookahead         b_t(v) = t (V(x, y_<t, v) - mean), V the value of the text with the candidate

A :class:`BonusSource` is what is fitted and saved. Its ``begin`` gives a :class:`Bonus` for rows being written, which
may keep a state (a cache of the value's keys, say).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vgf_llm.text.distribution import Shortlist


class Bonus(Protocol):
    """The bonus of R rows that are written together, asked once per position, in order."""

    def __call__(self, shortlist: Shortlist, hidden_RD: Tensor | None, last_token_R: Tensor | None) -> Tensor:
        """Return b [R, K], float32, in units of the reward.

        Args:
            shortlist: The reference's distribution [R, K] at this position; columns of ``-inf`` are not looked at.
            hidden_RD: The reference's last hidden state, which its output layer reads here; None unless the source asks
                for it.
            last_token_R: What was written at the position before; None at the first. Rows that have ended get padding.
        """
        ...


class BonusSource(Protocol):
    """What makes a bonus for texts to given prompts."""

    @property
    def reads_hidden(self) -> bool:
        """Whether the bonus reads the reference's hidden states."""
        ...

    @property
    def passes(self) -> float:
        """Cost, in forward passes of the value per written token."""
        ...

    def begin(self, prompts: list[list[int]], rows_per_prompt: int) -> Bonus:
        """Return the bonus of R = B * N rows, ordered ``b * N + n``."""
        ...


@dataclass(frozen=True)
class TableBonus:
    """One number per token, whatever stands before it: a word list, or a constant direction g as w_v = <g, e_v>.

    Attributes:
        bonus_V: float32, in units of the reward.
        reads_hidden: False.
        passes: 0.
    """

    bonus_V: Tensor
    reads_hidden: bool = False
    passes: float = 0.0

    def begin(self, prompts: list[list[int]], rows_per_prompt: int) -> Bonus:
        """Return the same bonus for all rows."""

        def bonus(shortlist: Shortlist, hidden_RD: Tensor | None, last_token_R: Tensor | None) -> Tensor:
            return self.bonus_V[shortlist.ids]

        return bonus
