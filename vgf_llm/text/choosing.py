"""Choosers: they pick every row's next token, here from logits, or in an engine's own process from a plan.

A chooser is called with the logits of a position wherever the model runs in this process. An engine (vLLM) runs it in
another one: it is given each row's :class:`RowPlan`, numbers that say all there is to know, picks by the same functions
of tensors, and hands back tokens and laws. The chooser then follows what was picked, which brings its own state (nats
spent, laws met) to where calling it would have brought it, and says what it would have picked itself, so that an engine
that does something else is noticed.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vgf_llm.errors import DataError
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.law import Shortlist, truncate
from vgf_llm.text.noise import gumbel_noise
from vgf_llm.text.responses import is_any_of
from vgf_llm.text.tilted_step import ends_here

PlanKind = Literal["draw", "tilt", "regrow"]


@dataclass(frozen=True)
class RowPlan:
    """What an engine has to know to pick one row's tokens.

    Attributes:
        kind: Which function picks: :func:`drawn_token`, :func:`vgf_llm.text.tilted_step.tilted_token` or
            :func:`vgf_llm.text.decoders.pivot.regrown_token`.
        rule: What rows must share to be run as one batch: the sampling law, EOS ids, options; plain JSON.
        tensors: The row's own numbers, by name.
    """

    kind: PlanKind
    rule: dict[str, Any]
    tensors: dict[str, Tensor]

    def encoded(self) -> str:
        """Return the plan as text: base64 of a safetensors file whose metadata hold kind and rule."""
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self.tensors.items()}
        rule = json.dumps(self.rule, sort_keys=True)
        return base64.b64encode(save(tensors, metadata={"kind": self.kind, "rule": rule})).decode()

    @classmethod
    def decoded(cls, text: str) -> RowPlan:
        """Return the plan that :meth:`encoded` wrote; what the numbers mean is not looked at.

        Raises:
            DataError: If the text is no such plan.
        """
        try:
            data = base64.b64decode(text, validate=True)
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            kind, rule = header["kind"], json.loads(header["rule"])
        except (binascii.Error, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"the plan of a row cannot be read: {error}; it is made by RowPlan.encoded") from error
        if kind not in get_args(PlanKind) or not isinstance(rule, dict):
            raise DataError(f"the plan of a row is of kind {kind!r}; known: {', '.join(get_args(PlanKind))}")
        return cls(kind, rule, tensors)


class Chooser(Protocol):
    """Picks the next token of R rows."""

    def __call__(self, logits_RV: Tensor, position: Any) -> Tensor:
        """Return the tokens, int64 [R], at ``position`` (one for all rows, or int64 [R])."""
        ...

    def plans(self, start_R: Tensor, tokens: int) -> list[RowPlan]:
        """Return the plan of each row for at most ``tokens`` tokens from its place ``start_R`` in the response on."""
        ...

    def follow(self, law: Shortlist, position: Any, token_R: Tensor, live_R: Tensor) -> Tensor:
        """Take over the tokens that were picked at ``position``; returns those that this chooser would have picked.

        Args:
            law: The reference's law [R, K] there.
            position: As in a call.
            token_R: What was picked.
            live_R: bool, rows that were written to; the others are left alone.
        """
        ...


def law_rule(sampling: SamplingSettings) -> dict[str, Any]:
    """Return the part of a plan's rule that states the reference's law."""
    return {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}


def drawn_token(law: Shortlist, seeds_R: Tensor, position: int | Tensor, ends_first: Sequence[int] = ()) -> Tensor:
    """Return argmax_v(log p(v) + g_v), int64 [R], with the noise hashed from seed, position and token.

    Args:
        law: p [R, K].
        seeds_R: int64, one seed a row.
        position: Place in the response: one for all rows, or int64 [R].
        ends_first: EOS ids, where whether a row ends is to be decided by noise of its own, before the text is.
    """
    scores_RK = law.logps + gumbel_noise(seeds_R, position, law.ids)
    if ends_first:
        is_eos_RK = is_any_of(law.ids, ends_first)
        barred_RK = is_eos_RK != ends_here(law, is_eos_RK, seeds_R, position).unsqueeze(-1)
        scores_RK = scores_RK.masked_fill(barred_RK, -torch.inf)
    return law.ids.gather(-1, scores_RK.argmax(-1, keepdim=True)).squeeze(-1)


@dataclass
class Draws:
    """The chooser that draws from the reference; it keeps the laws that it met, one a position.

    Attributes:
        sampling: The reference's law.
        seeds_R: int64, one seed a row.
        ends_first: As for :func:`drawn_token`.
        kept_columns: A longer shortlist is not kept.
        laws: What was met.
    """

    sampling: SamplingSettings
    seeds_R: Tensor
    ends_first: tuple[int, ...] = ()
    kept_columns: int = 512  # 12 bytes a column and token
    laws: list[Shortlist] = field(default_factory=list)

    def __call__(self, logits_RV: Tensor, position: int) -> Tensor:
        """Draw the next token of every row."""
        return self._drawn(truncate(logits_RV, self.sampling), position)

    def plans(self, start_R: Tensor, tokens: int) -> list[RowPlan]:
        """Return a seed and a place for each row."""
        rule = {**law_rule(self.sampling), "ends_first": list(self.ends_first)}
        where = zip(self.seeds_R.cpu(), start_R.cpu().long(), strict=True)
        return [RowPlan("draw", rule, {"seed": seed, "start": start}) for seed, start in where]

    def follow(self, law: Shortlist, position: int, token_R: Tensor, live_R: Tensor) -> Tensor:
        """Keep the law; see :class:`Chooser`."""
        return self._drawn(law, position)

    def _drawn(self, law: Shortlist, position: int) -> Tensor:
        if law.ids.shape[-1] <= self.kept_columns:
            self.laws.append(law)
        return drawn_token(law, self.seeds_R, position, self.ends_first)

    def law(self) -> Shortlist | None:
        """Return the laws [R, T, K] of what was written; None where they were not kept."""
        if not self.laws:
            return None
        ids, logps = [law.ids for law in self.laws], [law.logps for law in self.laws]
        return Shortlist(torch.stack(ids, 1), torch.stack(logps, 1))
