"""Rows of an engine's batch that follow a plan: checked when they come, stepped together whatever their positions.

The engine's side of :mod:`vgf_llm.text.plans`, torch only. All that differs between kinds of plan is read from the
plan's :class:`vgf_llm.text.plans.PlanKind`. A row's state is a function of how many tokens it has: the state before
each of them is kept, so an engine may take a row out, run it again from an earlier token, or ask for a token twice.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vgf_llm.errors import DataError
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.distribution import truncate
from vgf_llm.text.plans import DISTRIBUTION_RULE, PlannedRows, PlanTensor, RowPlan

_VOCABULARY = "vocabulary"  # the one entry that any rule may have: tokens of the tokenizer, where the table has more


@dataclass
class PlannedRow:
    """One row and how far it has come.

    Attributes:
        plan: What it is to do; tensors on the engine's device.
        key: Rows with the same key may be run as one batch.
        sampling: The reference's distribution.
        start: Place in the response of the first token.
        states: State before each offset; empty where the kind has none.
    """

    plan: RowPlan
    key: str
    sampling: SamplingSettings
    start: int
    states: list[Any] = field(default_factory=list)

    @property
    def most_tokens(self) -> int | None:
        """Tokens that the plan can say something about; None where it has no end."""
        lasts = self.plan.kind.lasts
        return None if lasts is None else len(self.plan.tensors[lasts])

    @classmethod
    def of(cls, plan: RowPlan, device: torch.device | str = "cpu") -> PlannedRow:
        """Check a plan and make it a row.

        Raises:
            DataError: Naming the tensor or key that is missing, of another shape or type, or out of range.
        """
        kind, tensors, sampling = plan.kind, _checked_tensors(plan), _checked_rule(plan)
        start = int(tensors["start"])
        if not 0 <= start < 2**20:
            raise DataError(f"start of a {kind.name} row must be a place in a response, got {start}")
        width = 0 if kind.width is None else tensors[kind.width].shape[-1]
        key = json.dumps([kind.name, plan.rule, width], sort_keys=True)
        plan = RowPlan(kind, plan.rule, {name: one.to(device) for name, one in tensors.items()})
        return cls(plan, key, sampling, start, [] if kind.start is None else [kind.start(tensors)])

    def check_fits(self, table_VD: Tensor | None, vocabulary: int) -> None:
        """Check the plan against the engine's model and table.

        Raises:
            DataError: If there is no table, its width is another, or a token is outside the vocabulary.
        """
        kind, tensors = self.plan.kind, self.plan.tensors
        if not kind.needs_table:
            return
        if table_VD is None:
            raise DataError("a row asks for a tilt and the engine has no embedding table; start it with one")
        width = tensors["displacement"].shape[-1]
        if width != table_VD.shape[1]:
            raise DataError(f"displacement of a row has width {width}, the engine's table {table_VD.shape[1]}")
        limit = min(len(table_VD), vocabulary, self.plan.rule.get(_VOCABULARY, vocabulary))
        columns = min(self.sampling.top_k or limit, limit)
        if kind.width is not None and tensors[kind.width].shape[-1] < columns:
            found = tensors[kind.width].shape[-1]
            raise DataError(f"{kind.width} of a row has {found} columns, its distribution at least {columns}")
        for name in (name for name, one in kind.tensors.items() if one.is_token):
            ids = tensors[name]
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
                raise DataError(f"{name} of a row holds {int(ids.max())}, the engine knows tokens 0 to {limit - 1}")


def check_plan(plan: RowPlan, max_tokens: int | None) -> None:
    """Check a plan before it reaches an engine.

    Args:
        plan: The plan.
        max_tokens: Most tokens that are to be written by it; None where there is no limit.

    Raises:
        DataError: If it cannot be followed, or says nothing about the last of these tokens.
    """
    most = PlannedRow.of(plan).most_tokens
    if most is not None and (max_tokens is None or max_tokens > most):
        raise DataError(f"max_tokens must be at most the plan's {most}, got {max_tokens}")


def _checked_rule(plan: RowPlan) -> SamplingSettings:
    """Check a plan's rule and return the distribution in it."""
    kind, rule = plan.kind, plan.rule
    if set(rule) - {_VOCABULARY} != set(kind.rule):
        raise DataError(f"the rule of a {kind.name} row holds {reprlib.repr(sorted(rule))}, it must hold {kind.rule}")
    for name in DISTRIBUTION_RULE:
        if type(rule[name]) not in ((int,) if name == "top_k" else (int, float)):
            seen = reprlib.repr(rule[name])
            raise DataError(f"{name} in the rule of a {kind.name} row must be a number, got {seen}")
    try:
        if not math.isfinite(rule["temperature"]):
            raise ValueError(f"temperature must be finite, got {rule['temperature']}")
        sampling = SamplingSettings(*(rule[name] for name in DISTRIBUTION_RULE))
        if kind.check_rule is not None:
            kind.check_rule(rule)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"the rule of a {kind.name} row: {error!r}") from error
    ids = rule[kind.eos_rule]
    if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < 2**31 for one in ids):
        raise DataError(f"the EOS ids of a {kind.name} row must be a list of token ids, got {reprlib.repr(ids)}")
    tokens = rule.get(_VOCABULARY, 1)
    if type(tokens) is not int or not 1 <= tokens < 2**31:
        raise DataError(f"vocabulary in the rule of a {kind.name} row must be at least 1, got {reprlib.repr(tokens)}")
    return sampling


def _checked_tensors(plan: RowPlan) -> dict[str, Tensor]:
    kind, wanted = plan.kind.name, plan.kind.tensors
    if set(plan.tensors) != set(wanted):
        raise DataError(f"a {kind} row holds {sorted(plan.tensors)}, it must hold {sorted(wanted)}")
    found = {name: _checked(name, plan.tensors[name], one, kind) for name, one in wanted.items()}
    lengths = {len(found[name]) for name, one in wanted.items() if one.dims and one.count is None}
    if len(lengths) > 1 or 0 in lengths:
        raise DataError(f"the tensors of a {kind} row have lengths {sorted(lengths)}; they must agree")
    for name, one in wanted.items():
        if one.like is not None and found[name].shape != found[one.like].shape:
            raise DataError(f"{one.like} and {name} of a {kind} row must have one shape")
        if one.count is not None and len(found[name]) != one.count:
            raise DataError(f"{name} of a {kind} row must be {one.count}, got {len(found[name])}")
    return found


def _checked(name: str, tensor: Tensor, wanted: PlanTensor, kind: str) -> Tensor:
    """Return one tensor of a plan in the type it is used in."""
    if tensor.dim() != wanted.dims:
        raise DataError(f"{name} of a {kind} row must have {wanted.dims} dimensions, got {tensor.dim()}")
    found = tensor.long() if tensor.dtype == torch.int32 else tensor
    found = found.float() if tensor.dtype.is_floating_point else found
    if found.dtype != wanted.dtype:
        raise DataError(f"{name} of a {kind} row must be {wanted.dtype}, got {tensor.dtype}")
    if found.isnan().any() or (wanted.is_finite and not bool(found.isfinite().all())):
        raise DataError(f"{name} of a {kind} row is not finite")
    return found


def step(rows: Sequence[PlannedRow], offsets: Sequence[int], logits_RV: Tensor, table_VD: Tensor | None) -> Tensor:
    """Return the next token of rows that share a key, int64 [R], and note what it came to.

    Args:
        rows: The rows.
        offsets: Tokens that each has already.
        logits_RV: Their logits.
        table_VD: Input embeddings that the particles live in; None where no plan can need them.
    """
    first, kind = rows[0], rows[0].plan.kind
    table_VD = logits_RV.new_empty((0, 0)) if table_VD is None else table_VD
    if kind.needs_table:  # a token that the table does not know has no embedding to be tilted by
        logits_RV = logits_RV[:, : len(table_VD)]
    distribution = truncate(logits_RV[:, : first.plan.rule.get(_VOCABULARY)], first.sampling)
    pairs = list(zip(rows, offsets, strict=True))
    position_R = torch.tensor([row.start + offset for row, offset in pairs], device=logits_RV.device)
    before = [None if kind.start is None else row.states[offset] for row, offset in pairs]
    token_R, after = kind.step(
        PlannedRows([row.plan for row in rows], offsets, before, table_VD), distribution, position_R
    )
    if kind.start is not None:
        for (row, offset), state in zip(pairs, after, strict=True):
            row.states[offset + 1 :] = [state]
    return token_R
