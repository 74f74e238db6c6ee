"""The logits processor that picks tokens inside vLLM: a request that carries a row's plan gets the token it asks for.

A plan (:class:`vgf_llm.text.plans.RowPlan`) comes as text in the request's extra arguments under ``vgf_plan``. At
every step the rows with plans are picked together and all other logits of theirs set to -inf, so that greedy sampling
takes the token. Requests without a plan are left alone, and rows of different distributions are picked in groups of
their own: nobody pays for another's budget. The embedding table is named by the engine's additional config
(:mod:`vgf_llm.engines.vllm_table`), ``{"vgf_table": <folder>}`` on a command line.

This is the one module of the package that cannot be imported without vLLM.
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from vgf_llm.engines.plan_kinds import KINDS
from vgf_llm.engines.plan_rows import PlannedRow, check_plan, step
from vgf_llm.engines.vllm_engine import PLAN_IS_CHECKED
from vgf_llm.engines.vllm_request import PLAN_ARGUMENT
from vgf_llm.engines.vllm_table import load_table
from vgf_llm.errors import DataError
from vgf_llm.text.plans import RowPlan

_GIVE_BACK_SEC = 20.0


class PlanProcessor(LogitsProcessor):
    """Forces the tokens that plans pick."""

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Refuse a plan that cannot be read, before it reaches the engine.

        Raises:
            ValueError: Naming what is wrong with it.
        """
        plan = (params.extra_args or {}).get(PLAN_ARGUMENT)
        if plan is None or getattr(params, PLAN_IS_CHECKED, False):
            return
        if params.temperature != 0:
            raise ValueError(f"temperature must be 0 with {PLAN_ARGUMENT}, got {params.temperature}: the plan picks")
        if not isinstance(plan, str):
            raise ValueError(f"{PLAN_ARGUMENT} must be text, got {type(plan).__name__}")
        try:
            check_plan(RowPlan.decoded(plan, KINDS), params.max_tokens)
        except DataError as error:
            raise ValueError(f"{PLAN_ARGUMENT}: {error}") from error

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.vocabulary = vllm_config.model_config.get_vocab_size()
        table_VD = load_table(vllm_config.additional_config)
        self.table_VD = None if table_VD is None else table_VD.to(device)
        self.rows: dict[int, tuple[PlannedRow | None, list[int]]] = {}
        self._malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        self._given_back = time.monotonic()

    def is_argmax_invariant(self) -> bool:
        """The argmax is what this processor decides."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they come, go and change places."""
        if batch_update is None:
            return
        self._give_back()
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, _, output_ids in batch_update.added:
            self.rows.pop(index, None)
            if params is not None and (params.extra_args or {}).get(PLAN_ARGUMENT) is not None:
                self.rows[index] = (self._row(params), output_ids)
        for source, target, direction in batch_update.moved:
            moved, replaced = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self.rows[source] = replaced

    def _give_back(self) -> None:
        """Return freed memory to the system now and then: glibc keeps what plans of many sizes leave between them."""
        if self._malloc_trim is not None and time.monotonic() - self._given_back > _GIVE_BACK_SEC:
            self._malloc_trim(0)
            self._given_back = time.monotonic()

    def apply(self, logits: Tensor) -> Tensor:
        """Leave each planned row one token."""
        groups: dict[str, list[int]] = {}
        for index, (row, _) in self.rows.items():
            groups.setdefault("refused" if row is None else row.key, []).append(index)
        for key, indices in groups.items():
            at = torch.tensor(indices, device=logits.device)
            # Where nothing can be picked, the sender sees that its plan was not followed.
            token_R = torch.zeros_like(at) if key == "refused" else self._picked(indices, logits[at])
            logits[at] = -torch.inf
            logits[at, token_R] = 0.0
        return logits

    def _picked(self, indices: list[int], logits_RV: Tensor) -> Tensor:
        """Return the tokens of rows that share a key; a row whose plan cannot be followed is refused alone."""
        rows = [row for index in indices if (row := self.rows[index][0]) is not None]
        offsets = [len(self.rows[index][1]) for index in indices]
        try:
            return step(rows, offsets, logits_RV, self.table_VD)
        except Exception as error:  # it would end the engine and everybody's requests
            if len(indices) > 1:
                return torch.cat([self._picked([index], logits_RV[[i]]) for i, index in enumerate(indices)])
            print(f"vgf_llm: a plan cannot be followed: {error!r}", file=sys.stderr)
            self.rows[indices[0]] = (None, self.rows[indices[0]][1])
            return torch.zeros(1, dtype=torch.int64, device=logits_RV.device)

    def _row(self, params: Any) -> PlannedRow | None:
        """Return a request's row; the same object when the engine brings a request back."""
        row = getattr(params, "_vgf_row", None)
        if row is None:
            try:
                row = PlannedRow.of(RowPlan.decoded(params.extra_args[PLAN_ARGUMENT], KINDS), self.device)
                row.check_fits(self.table_VD, self.vocabulary)
            except Exception as error:  # it would end the engine and everybody's requests
                print(f"vgf_llm: a plan is refused: {error}", file=sys.stderr)
                return None
            params._vgf_row = row
        return row
