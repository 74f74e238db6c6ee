"""Plans: what an engine has to know to pick one row's tokens, and what it has to know of each kind of plan.

A picker (:mod:`vgf_llm.text.choosing`) writes a :class:`RowPlan` per row. The engine's process reads it, checks it by
its :class:`PlanKind` and calls the kind's step, the same function of tensors that the picker calls here. A kind stands
beside the distribution that it picks from:

    draw    :data:`vgf_llm.text.choosing.DRAW`          the reference's own distribution
    tilt    :data:`vgf_llm.text.tilted_step.TILT`       tilted along a draft, within the row's nats
    regrow  :data:`vgf_llm.text.regrown_step.REGROW`    tilted at the first tokens, then the reference's
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vgf_llm.errors import DataError
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.distribution import Shortlist

DISTRIBUTION_RULE = ("temperature", "top_k", "top_p")
"""Entries of every rule, in the order of :class:`SamplingSettings`: the reference's distribution."""


@dataclass(frozen=True)
class PlanTensor:
    """One tensor of a kind of plan.

    Attributes:
        dims: Number of dimensions. The first of one or two is a place in the response, unless ``count`` is given.
        dtype: Its type; integers and floats of other widths are converted.
        count: Numbers that it holds.
        is_finite: Whether infinities are refused. NaN always is.
        is_token: Whether it holds token ids.
        like: Tensor whose shape it must have.
    """

    dims: int
    dtype: torch.dtype = torch.float32
    count: int | None = None
    is_finite: bool = False
    is_token: bool = False
    like: str | None = None


@dataclass(frozen=True)
class PlannedRows:
    """R rows of one kind and one rule, at the places where a token of each is to be picked.

    Attributes:
        plans: Their plans.
        offsets: Tokens that each has already.
        states: What each row's step returned for the token before, or what the kind starts with; None without states.
        table_VD: Input embeddings that the particles live in; empty where the kind needs none.
    """

    plans: Sequence[RowPlan]
    offsets: Sequence[int]
    states: Sequence[Any]
    table_VD: Tensor

    def own(self, name: str) -> Tensor:
        """Return a tensor of every row, stacked: [R, ...]."""
        return torch.stack([plan.tensors[name] for plan in self.plans])

    def here(self, name: str, offsets: Sequence[int] | None = None) -> Tensor:
        """Return what a tensor of every row holds at the row's offset, or at others, stacked: [R, ...]."""
        at = self.offsets if offsets is None else offsets
        return torch.stack([plan.tensors[name][offset] for plan, offset in zip(self.plans, at, strict=True)])

    def rule(self, name: str) -> Any:
        """Return an entry of the rule that the rows share."""
        return self.plans[0].rule[name]


PlanStep = Callable[[PlannedRows, Shortlist, Tensor], tuple[Tensor, Sequence[Any]]]
"""(rows, the reference's distribution [R, K] here, position_R) -> (token_R, the state of each row after it)."""


@dataclass(frozen=True)
class PlanKind:
    """One way of picking tokens by plan.

    Attributes:
        name: The kind's word in a plan.
        tensors: A row's own tensors by name; ``seed`` and ``start`` are among them.
        eos_rule: Entry of the rule that lists EOS ids.
        options: Further entries of the rule.
        step: Picks the next token of every row. It must not depend on which rows share the call.
        start: Returns the state of a row before its first token, from its tensors; None where there are no states.
        check_rule: Checks the entries of the rule that are the kind's own. Raises ValueError or TypeError.
        needs_table: Whether the step looks embeddings up.
        lasts: Tensor whose length is the number of tokens that the plan can pick; None where there is no limit.
        width: Tensor whose columns must agree between rows of one call; None where none must.
    """

    name: str
    tensors: Mapping[str, PlanTensor]
    eos_rule: str
    step: PlanStep
    options: tuple[str, ...] = ()
    start: Callable[[Mapping[str, Tensor]], Any] | None = None
    check_rule: Callable[[Mapping[str, Any]], object] | None = None
    needs_table: bool = False
    lasts: str | None = None
    width: str | None = None

    @property
    def rule(self) -> tuple[str, ...]:
        """Entries of the rule, all of which a plan must hold."""
        return (*DISTRIBUTION_RULE, self.eos_rule, *self.options)


@dataclass(frozen=True)
class RowPlan:
    """What an engine has to know to pick one row's tokens.

    Attributes:
        kind: Which step picks.
        rule: What rows must share to be run as one batch: the sampling distribution, EOS ids, options; plain JSON.
        tensors: The row's own numbers, by name.
    """

    kind: PlanKind
    rule: dict[str, Any]
    tensors: dict[str, Tensor]

    def encoded(self) -> str:
        """Return the plan as text: base64 of a safetensors file whose metadata hold kind and rule."""
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self.tensors.items()}
        rule = json.dumps(self.rule, sort_keys=True)
        return base64.b64encode(save(tensors, metadata={"kind": self.kind.name, "rule": rule})).decode()

    @classmethod
    def decoded(cls, text: str, kinds: Mapping[str, PlanKind]) -> RowPlan:
        """Return the plan that :meth:`encoded` wrote; what the numbers mean is not looked at.

        Args:
            text: The plan.
            kinds: Kinds that are known, by name.

        Raises:
            DataError: If the text is not such a plan, or one of another kind.
        """
        try:
            data = base64.b64decode(text, validate=True)
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            kind, rule = header["kind"], json.loads(header["rule"])
        except (binascii.Error, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"the plan of a row cannot be read: {error}; it is made by RowPlan.encoded") from error
        if kind not in kinds or not isinstance(rule, dict):
            raise DataError(f"the plan of a row is of kind {kind!r}; known: {', '.join(kinds)}")
        return cls(kinds[kind], rule, tensors)


def distribution_rule(sampling: SamplingSettings) -> dict[str, Any]:
    """Return the part of a plan's rule that states the reference's distribution."""
    return {name: getattr(sampling, name) for name in DISTRIBUTION_RULE}
