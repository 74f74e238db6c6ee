"""Lookahead: the value of the text with each likely candidate as the bonus of one-pass decoding.

With r(x, y_<t, v) what the reward model's heads read at candidate v after the text so far, and C the K likeliest
candidates,

    b_t(v) = r(x, y_<t, v) - sum_{v' in C} p_t(v') r(x, y_<t, v') / sum_{v' in C} p_t(v')     for v in C, else 0.

Under mean pooling the value of a text of t tokens is the mean of its reads, so r is what a candidate adds to t times
the value; under last pooling it is the value of the text that ends there, and an input skip counts 1 / t of it. No
direction is fitted and none is linear: this is the token-level value itself, and the measure of what linear directions
lose. A classifier that is read after its template's closing says nothing at the candidate, and is refused.

Cost per token: up to K + 1 tokens through the reward model's body, packed, with keys and values of its own
(:mod:`vgf_llm.models.branches`). Candidates below ``min_probability`` and positions with a single one left are not
run: a tilt moves little there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reward_models.modelling import RewardModel
from vgf_llm.errors import ConfigError
from vgf_llm.models.architecture import decoder_of
from vgf_llm.models.branches import Branches
from vgf_llm.text.bonus import Bonus
from vgf_llm.text.distribution import Shortlist


@dataclass(frozen=True)
class Lookahead:
    """The token-level value of likely candidates; see the module's first lines.

    Attributes:
        value: A frozen reward model in the reference's token space.
        candidates: K, at least 2.
        min_probability: Candidates below it are not run, in [0, 1).
        reads_hidden: False.
    """

    value: RewardModel
    candidates: int = 8
    min_probability: float = 0.01
    reads_hidden: bool = False

    def __post_init__(self) -> None:
        """Check that the value can be read at any token.

        Raises:
            ConfigError: It is read after its template's closing.
        """
        if self.value.config.closing:
            raise ConfigError(
                "a lookahead reads the reward model at every candidate, and this classifier is read after its "
                "template's closing; fit a direction with `vgf-llm direction`, or start a value from it"
            )

    @property
    def passes(self) -> float:
        """Forward passes of the value per written token, at most: its candidates, and a token that was none of them."""
        return float(self.candidates + 1)

    def begin(self, prompts: list[list[int]], rows_per_prompt: int) -> Bonus:
        """Run the prompts through the value once; see :class:`vgf_llm.text.bonus.BonusSource`."""
        prefix = self.value.prefix(prompts).expand(rows_per_prompt)
        return _Rows(self, Branches(decoder_of(self.value.body), prefix, self.candidates))


class _Rows:
    """R texts that are being written, with the value's keys of their tokens and of the candidates after them."""

    def __init__(self, source: Lookahead, branches: Branches) -> None:
        self.source, self.branches = source, branches
        self._written = 0
        self._ids_RC: Tensor | None = None
        self._run_RC: Tensor | None = None

    @torch.no_grad()
    def __call__(self, shortlist: Shortlist, hidden_RD: Tensor | None, last_token_R: Tensor | None) -> Tensor:
        """Return b [R, K]; see :class:`vgf_llm.text.bonus.Bonus`."""
        newest_R = self._accept(last_token_R)
        logps_RC, column_RC = shortlist.logps.topk(min(self.source.candidates, shortlist.ids.shape[-1]))
        run_RC = logps_RC >= max(math.log(self.source.min_probability or 1e-30), -60.0)
        if last_token_R is not None:
            run_RC &= (last_token_R >= 0).unsqueeze(-1)
        run_RC &= run_RC.sum(-1, keepdim=True) > 1
        ids_RC = shortlist.ids.gather(-1, column_RC)
        self._ids_RC, self._run_RC = ids_RC, run_RC
        reads_RC = self._reads(ids_RC, run_RC, newest_R, last_token_R)
        weight_RC = logps_RC.exp() * run_RC
        mean_R1 = (weight_RC * reads_RC).sum(-1, keepdim=True) / weight_RC.sum(-1, keepdim=True).clamp(min=1e-30)
        bonus_RC = (reads_RC - mean_R1) * run_RC
        return torch.zeros_like(shortlist.logps).scatter(-1, column_RC, bonus_RC)

    def _accept(self, last_token_R: Tensor | None) -> Tensor | None:
        """Append what was written; returns where it has still to be run, bool [R]."""
        if last_token_R is None or self._ids_RC is None or self._run_RC is None:
            return None
        self._written += 1
        is_it_RC = (self._ids_RC == last_token_R.unsqueeze(-1)) & self._run_RC
        known_R = is_it_RC.any(-1)
        self.branches.accept(torch.where(known_R, is_it_RC.long().argmax(-1), -1))
        return ~known_R & (last_token_R >= 0)

    def _reads(self, ids_RC: Tensor, run_RC: Tensor, newest_R: Tensor | None, last_token_R: Tensor | None) -> Tensor:
        """Return what the heads read at each candidate that is run, [R, C], elsewhere 0."""
        row_X, branch_X = run_RC.nonzero(as_tuple=True)
        token_X = ids_RC[run_RC]
        if newest_R is not None and last_token_R is not None:
            rows = newest_R.nonzero().squeeze(-1)
            row_X, branch_X = torch.cat([rows, row_X]), torch.cat([torch.full_like(rows, -1), branch_X])
            token_X = torch.cat([last_token_R[rows], token_X])
        reads_RC = torch.zeros(ids_RC.shape, dtype=torch.float32, device=ids_RC.device)
        if not len(token_X):
            return reads_RC
        value = self.source.value
        embeddings_XD = value.embed(token_X)
        hidden_XD = self.branches.forward(embeddings_XD, row_X, branch_X)
        is_branch_X = branch_X >= 0
        reads_RC[run_RC] = value.read_tokens(hidden_XD[is_branch_X], embeddings_XD[is_branch_X], self._written + 1)
        return reads_RC
