"""Rows of an engine's batch that follow a plan: checked when they come, stepped together whatever their positions.

The engine's side of :mod:`vgf_llm.text.choosing`, torch only. A row's state is a function of how many tokens it has:
what was spent before each of them is kept, so an engine may take a row out, run it again from an earlier token, or ask
for a token twice.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vgf_llm.errors import DataError
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.choosing import RowPlan, drawn_token
from vgf_llm.text.decoders.pivot import regrown_token
from vgf_llm.text.law import Shortlist, truncate
from vgf_llm.text.tilted_step import DraftTokens, TiltedRows, TiltOptions, tilted_token

_SHAPES = {
    "draw": {"seed": 0, "start": 0},
    "tilt": {
        **{"token": 1, "inside": 1, "movable": 1, "displacement": 2, "law_ids": 2, "law_logps": 2},
        **{"seed": 0, "start": 0, "coupled": 0, "unchanged": 0, "numbers": 1},
    },
    "regrow": {"displacement": 2, "token": 1, "seed": 0, "start": 0, "numbers": 1},
}
"""Tensors of each kind of plan, with their number of dimensions."""
_WHOLE = ("seed", "start", "token", "law_ids")
_FLAGS = ("inside", "movable", "coupled", "unchanged")
_NUMBERS = {"tilt": 4, "regrow": 1}
_LAW, _OPTIONS = ("temperature", "top_k", "top_p"), ("multiplier", "coupling", "after_change")
_RULES = {"draw": (*_LAW, "ends_first"), "tilt": (*_LAW, "eos_ids", *_OPTIONS), "regrow": (*_LAW, "eos_ids")}
"""What the rule of each kind of plan holds, and nothing else but ``vocabulary``: rows are told apart by it."""
_VOCABULARY = "vocabulary"  # tokens of the tokenizer, where the model's table has more rows


@dataclass
class PlannedRow:
    """One row and how far it has come.

    Attributes:
        plan: What it is to do; tensors on the engine's device.
        key: Rows with the same key may be run as one batch.
        sampling: The reference's law.
        start: Place in the response of the first token.
        spent: Nats spent before each offset.
        unchanged: Whether the row equalled its draft before each offset.
    """

    plan: RowPlan
    key: str
    sampling: SamplingSettings
    start: int
    spent: list[float] = field(default_factory=lambda: [0.0])
    unchanged: list[bool] = field(default_factory=lambda: [True])

    @property
    def most_tokens(self) -> int | None:
        """Tokens that the plan can say something about; None where it has no end."""
        return len(self.plan.tensors["token"]) if self.plan.kind == "tilt" else None

    @classmethod
    def of(cls, plan: RowPlan, device: torch.device | str = "cpu") -> PlannedRow:
        """Check a plan and make it a row.

        Raises:
            DataError: Naming the tensor or key that is missing, of another shape or type, or out of range.
        """
        tensors, sampling = _checked_tensors(plan), _checked_rule(plan)
        start = int(tensors["start"])
        if not 0 <= start < 2**20:
            raise DataError(f"start of a {plan.kind} row must be a place in a response, got {start}")
        width = tensors["law_ids"].shape[-1] if plan.kind == "tilt" else 0
        key = json.dumps([plan.kind, plan.rule, width], sort_keys=True)
        plan = RowPlan(plan.kind, plan.rule, {name: one.to(device) for name, one in tensors.items()})
        row = cls(plan, key, sampling, start)
        if plan.kind == "tilt":
            row.unchanged = [bool(tensors["unchanged"])]
        return row

    def check_fits(self, table_VD: Tensor | None, vocabulary: int) -> None:
        """Check the plan against the engine's model and table.

        Raises:
            DataError: If there is no table, its width is another, or a token is outside the vocabulary.
        """
        if self.plan.kind == "draw":
            return
        if table_VD is None:
            raise DataError("a row asks for a tilt and the engine has no embedding table; start it with one")
        width, tensors = self.plan.tensors["displacement"].shape[-1], self.plan.tensors
        if width != table_VD.shape[1]:
            raise DataError(f"displacement of a row has width {width}, the engine's table {table_VD.shape[1]}")
        limit = min(len(table_VD), vocabulary, self.plan.rule.get(_VOCABULARY, vocabulary))
        columns = min(self.sampling.top_k or limit, limit)
        if "law_ids" in tensors and tensors["law_ids"].shape[-1] < columns:
            raise DataError(f"law_ids of a row has {tensors['law_ids'].shape[-1]} columns, its law at least {columns}")
        for name in ("token", "law_ids"):
            ids = tensors.get(name)
            if ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
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
    """Check a plan's rule and return the law in it."""
    rule, wanted = plan.rule, _RULES[plan.kind]
    if set(rule) - {_VOCABULARY} != set(wanted):
        raise DataError(f"the rule of a {plan.kind} row holds {reprlib.repr(sorted(rule))}, it must hold {wanted}")
    for name in _LAW:
        if type(rule[name]) not in ((int,) if name == "top_k" else (int, float)):
            raise DataError(f"{name} in the rule of a {plan.kind} row must be a number, got {reprlib.repr(rule[name])}")
    try:
        if not math.isfinite(rule["temperature"]):
            raise ValueError(f"temperature must be finite, got {rule['temperature']}")
        sampling = SamplingSettings(*(rule[name] for name in _LAW))
        if plan.kind == "tilt":
            TiltOptions(*(rule[name] for name in _OPTIONS))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"the rule of a {plan.kind} row: {error!r}") from error
    ids = rule["ends_first" if plan.kind == "draw" else "eos_ids"]
    if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < 2**31 for one in ids):
        raise DataError(f"the EOS ids of a {plan.kind} row must be a list of token ids, got {reprlib.repr(ids)}")
    tokens = rule.get(_VOCABULARY, 1)
    if type(tokens) is not int or not 1 <= tokens < 2**31:
        raise DataError(f"vocabulary in the rule of a {plan.kind} row must be at least 1, got {reprlib.repr(tokens)}")
    return sampling


def _checked_tensors(plan: RowPlan) -> dict[str, Tensor]:
    wanted = _SHAPES[plan.kind]
    if set(plan.tensors) != set(wanted):
        raise DataError(f"a {plan.kind} row holds {sorted(plan.tensors)}, it must hold {sorted(wanted)}")
    found = {name: _checked(name, plan.tensors[name], dims, plan.kind) for name, dims in wanted.items()}
    lengths = {len(found[name]) for name, dims in wanted.items() if dims and name != "numbers"}
    if len(lengths) > 1 or 0 in lengths:
        raise DataError(f"the tensors of a {plan.kind} row have lengths {sorted(lengths)}; they must agree")
    if plan.kind == "tilt" and found["law_ids"].shape != found["law_logps"].shape:
        raise DataError("law_ids and law_logps of a tilt row must have one shape")
    if plan.kind in _NUMBERS and len(found["numbers"]) != _NUMBERS[plan.kind]:
        raise DataError(f"numbers of a {plan.kind} row must be {_NUMBERS[plan.kind]}, got {len(found['numbers'])}")
    return found


def _checked(name: str, tensor: Tensor, dims: int, kind: str) -> Tensor:
    """Return one tensor of a plan in the type it is used in."""
    if tensor.dim() != dims:
        raise DataError(f"{name} of a {kind} row must have {dims} dimensions, got {tensor.dim()}")
    wanted = torch.bool if name in _FLAGS else torch.int64 if name in _WHOLE else torch.float32
    found = tensor.long() if tensor.dtype == torch.int32 else tensor
    found = found.float() if tensor.dtype.is_floating_point else found
    if found.dtype != wanted:
        raise DataError(f"{name} of a {kind} row must be {wanted}, got {tensor.dtype}")
    if found.isnan().any() or (name == "displacement" and not bool(found.isfinite().all())):
        raise DataError(f"{name} of a {kind} row is not finite")
    return found


def step(rows: Sequence[PlannedRow], offsets: Sequence[int], logits_RV: Tensor, table_VD: Tensor | None) -> Tensor:
    """Return the next token of rows that share a key, int64 [R], and note what it came to.

    Args:
        rows: The rows.
        offsets: Tokens that each has already.
        logits_RV: Their logits.
        table_VD: Input embeddings that the particles live in.
    """
    first, device = rows[0], logits_RV.device
    if first.plan.kind != "draw":  # a token that the table does not know has no embedding to be tilted by
        logits_RV = logits_RV[:, : len(table_VD)]
    logits_RV = logits_RV[:, : first.plan.rule.get(_VOCABULARY)]
    law = truncate(logits_RV, first.sampling)
    position_R = torch.tensor([row.start + offset for row, offset in zip(rows, offsets, strict=True)], device=device)
    steps: dict[str, Callable[..., Tensor]] = {"draw": _draw, "tilt": _tilt, "regrow": _regrow}
    return steps[first.plan.kind](rows, offsets, law, position_R, table_VD)


def _draw(rows: Sequence[PlannedRow], offsets: Any, law: Shortlist, position_R: Tensor, table_VD: Any) -> Tensor:
    return drawn_token(law, _stacked(rows, "seed"), position_R, first_rule(rows, "ends_first"))


def _tilt(
    rows: Sequence[PlannedRow], offsets: Sequence[int], law: Shortlist, position_R: Tensor, table_VD: Tensor
) -> Tensor:
    token_R, device = _stacked(rows, "token", offsets), position_R.device
    pairs = list(zip(rows, offsets, strict=True))
    spent_R = torch.tensor([row.spent[offset] for row, offset in pairs], device=device)
    unchanged_R = torch.tensor([row.unchanged[offset] for row, offset in pairs], device=device)
    multiplier_R, left_R, cap_R, share_R = _stacked(rows, "numbers").unbind(-1)
    draft = DraftTokens(
        token_R,
        _stacked(rows, "inside", offsets),
        _stacked(rows, "movable", offsets),
        _stacked(rows, "displacement", offsets),
        Shortlist(_stacked(rows, "law_ids", offsets), _stacked(rows, "law_logps", offsets)),
    )
    state = TiltedRows(
        _stacked(rows, "seed"), _stacked(rows, "coupled"), unchanged_R, multiplier_R, left_R - spent_R, cap_R, share_R
    )
    options = TiltOptions(*(first_rule(rows, name) for name in _OPTIONS))
    picked = tilted_token(law, draft, state, position_R, table_VD, first_rule(rows, "eos_ids"), options)
    unchanged_R = unchanged_R & draft.inside_R & (picked.token_R == token_R)
    after = zip(pairs, (spent_R + picked.nats_R).tolist(), unchanged_R.tolist(), strict=True)
    for (row, offset), spent, unchanged in after:
        row.spent[offset + 1 :] = [spent]
        row.unchanged[offset + 1 :] = [unchanged]
    return picked.token_R


def _regrow(
    rows: Sequence[PlannedRow], offsets: Sequence[int], law: Shortlist, position_R: Tensor, table_VD: Tensor
) -> Tensor:
    lengths = [len(row.plan.tensors["token"]) for row in rows]
    inside = [offset < length for offset, length in zip(offsets, lengths, strict=True)]
    within = [min(offset, length - 1) for offset, length in zip(offsets, lengths, strict=True)]
    return regrown_token(
        law,
        _stacked(rows, "displacement", within),
        _stacked(rows, "token", within),
        torch.tensor(inside, device=position_R.device),
        _stacked(rows, "seed"),
        position_R,
        table_VD,
        first_rule(rows, "eos_ids"),
        _stacked(rows, "numbers")[:, 0],
    )


def first_rule(rows: Sequence[PlannedRow], name: str) -> Any:
    """Return an entry of the rule that the rows share."""
    return rows[0].plan.rule[name]


def _stacked(rows: Sequence[PlannedRow], name: str, offsets: Sequence[int] | None = None) -> Tensor:
    if offsets is None:
        return torch.stack([row.plan.tensors[name] for row in rows])
    return torch.stack([row.plan.tensors[name][offset] for row, offset in zip(rows, offsets, strict=True)])
