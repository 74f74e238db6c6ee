"""Rollouts of one batch of prompts: originals, transported responses and their rewards.

Nothing here holds weights; models are run by the rollout worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.text.protocols import Moved
from vgf_llm.text.responses import Responses, changed_tokens, concatenate


@dataclass(frozen=True)
class PromptRow:
    """A training prompt: its row in the data, its token ids, and its text for reward functions and logs."""

    index: int
    ids: list[int]
    text: str


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one forward; opaque to what moves tensors between devices."""

    rows: list[PromptRow]


class Carried(Protocol):
    """Originals, and the responses that they were carried to, M a prompt, those of an original side by side.

    `vgf_llm.answering.implicit_policy.Outcome` is one.
    """

    @property
    def originals(self) -> Responses:
        """N samples per prompt."""
        ...

    @property
    def transported(self) -> Responses:
        """M transported responses per prompt."""
        ...

    @property
    def nats_BN(self) -> Tensor:
        """KL that each transported response spent, [B, M]."""
        ...

    @property
    def displacement_BN(self) -> Tensor:
        """Mean displacement of a token, in nearest-token distances; NaN where no particle moved."""
        ...


class ObservedPolicy(ImplicitPolicy):
    """An implicit policy that keeps the first movement of its particles, for the distances that are logged."""

    first_move: tuple[Responses, Moved] | None = None

    def transport(self, value_prefix: object, responses: Responses) -> Moved:
        """Move, and keep the first."""
        moved = super().transport(value_prefix, responses)
        if self.first_move is None:
            self.first_move = (responses, moved)
        return moved


@dataclass(frozen=True)
class Rollout:
    """Responses to B prompts before and after transport.

    Attributes:
        prompts: B prompts.
        outcome: N originals, M transported responses per prompt.
        original_scores: Rewards by name, each [B, N].
        transported_scores: Rewards by name, each [B, M].
        first_move: Particles and where the first flow carried them; None where nothing moved.
        seconds: By stage.
    """

    prompts: list[PromptRow]
    outcome: Carried
    original_scores: dict[str, Tensor]
    transported_scores: dict[str, Tensor]
    first_move: tuple[Responses, Moved] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def sources(self) -> Responses:
        """The original that each transported response was moved from, M per prompt."""
        b, n = self.outcome.originals.tokens_BNT.shape[:2]
        m = self.outcome.transported.tokens_BNT.shape[1]
        device = self.outcome.originals.tokens_BNT.device
        return self.outcome.originals.take((torch.arange(m, device=device) * n // m).expand(b, -1))

    @property
    def changed_BM(self) -> Tensor:
        """Tokens that differ between each transported response and its original."""
        return changed_tokens(self.sources, self.outcome.transported)

    @property
    def pool(self) -> Responses:
        """Originals first, then the transported responses."""
        return concatenate([self.outcome.originals, self.outcome.transported])

    @property
    def all_rewards_BM(self) -> Tensor:
        """The summed reward of the pool."""
        return torch.cat([self.original_scores["reward"], self.transported_scores["reward"]], 1)

    @property
    def pool_rewards_BM(self) -> Tensor:
        """The summed reward of the pool; minus infinity on transported responses that are still their original."""
        transported_BM = self.transported_scores["reward"].masked_fill(self.changed_BM == 0, -torch.inf)
        return torch.cat([self.original_scores["reward"], transported_BM], 1)


def own_rows(rows: list[PromptRow], process: int, left: int) -> tuple[list[PromptRow], bool]:
    """Return the prompts of a forward without those that were repeated to give every process a whole batch.

    Where an epoch's prompts do not fill the last batches, the data loader continues with the epoch's first ones.

    Args:
        rows: B prompts of this process.
        process: Its rank; it holds prompts ``process * B`` and on of the forward's.
        left: Prompts that all processes together have in this forward; 0 means all that they hold.

    Returns:
        Rows, at least one, and whether they count: a process with none of its own still takes part in the step.
    """
    own = rows[: max(0, left - process * len(rows))] if left > 0 else rows
    return (own, True) if own else (rows[:1], False)


def completions(rollout: Rollout, tokenizer: Any, step: int) -> list[dict[str, Any]]:
    """Return one row per response, originals and transported, for the log of completions."""
    rows: list[dict[str, Any]] = []
    parts = (
        ("original", rollout.outcome.originals, rollout.original_scores),
        ("transported", rollout.outcome.transported, rollout.transported_scores),
    )
    for kind, responses, scores in parts:
        for b, texts in enumerate(responses.texts(tokenizer)):
            for n, text in enumerate(texts):
                row = {"step": step, "index": rollout.prompts[b].index, "prompt": rollout.prompts[b].text}
                row |= {"kind": kind, "particle": n, "completion": text}
                rows.append(row | {name: float(values_BN[b, n]) for name, values_BN in scores.items()})
    return rows
