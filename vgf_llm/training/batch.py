"""The tensors of one forward: rows of text, what a loss reads of them, and what losses are divided by.

Rows are padded as every causal language model takes them: prompts on the left, responses on the right, so that the
last T columns are the response's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypedDict

import torch
from torch import Tensor

from reward_models.secant_online import SecantRows
from vgf_llm.text.responses import Responses


class PolicyInputs(TypedDict):
    """Arguments of `vgf_llm.training.policy_models.response_logps`, but for the model."""

    input_ids: Tensor
    attention_mask: Tensor
    length: int


@dataclass(frozen=True)
class Rows:
    """R responses behind their prompts.

    Attributes:
        input_ids_RS: int64, prompt and response.
        attention_mask_RS: int64, 1 where a token stands.
        mask_RT: bool, True on the tokens of the response that count, in its own columns.
    """

    input_ids_RS: Tensor
    attention_mask_RS: Tensor
    mask_RT: Tensor

    @property
    def policy_inputs(self) -> PolicyInputs:
        """The rows as `response_logps` takes them."""
        return {
            "input_ids": self.input_ids_RS,
            "attention_mask": self.attention_mask_RS,
            "length": self.mask_RT.shape[1],
        }

    @property
    def value_inputs(self) -> dict[str, Tensor]:
        """The rows as a token-level value model takes them."""
        prompt_columns = self.input_ids_RS.shape[1] - self.mask_RT.shape[1]
        response_mask_RS = torch.nn.functional.pad(self.mask_RT, (prompt_columns, 0), value=False)
        return {
            "input_ids": self.input_ids_RS,
            "attention_mask": self.attention_mask_RS,
            "response_mask": response_mask_RS,
        }


@dataclass(frozen=True)
class Counts:
    """What each loss of a step is divided by, as float scalars; 0 where there is no such loss.

    Attributes:
        policy: Of the distillation loss, in its own unit.
        tokens: Of the KL anchor: response tokens.
        value: Of the learned value's loss: prefixes.
        secant: Of the secant head's: substitutions.
    """

    policy: Tensor
    tokens: Tensor
    value: Tensor
    secant: Tensor

    @classmethod
    def of(cls, policy: Tensor) -> Counts:
        """Return the counts of a forward that has a distillation loss alone."""
        nothing = torch.zeros_like(policy)
        return cls(policy, nothing, nothing, nothing)

    def stacked(self) -> Tensor:
        """Return all of them as one tensor, [4]."""
        return torch.stack([getattr(self, field.name).float() for field in fields(self)])

    @classmethod
    def unstacked(cls, counts: Tensor) -> Counts:
        """Return what `stacked` gave as counts again."""
        return cls(*counts.unbind())


@dataclass(frozen=True)
class ValueBatch:
    """What a learned value regresses on.

    Attributes:
        inputs: Rows of the whole pool as the value takes them.
        targets_RT1: Targets of all prefixes.
        mask_RT1: bool, prefixes that count.
    """

    inputs: dict[str, Tensor]
    targets_RT1: Tensor
    mask_RT1: Tensor


@dataclass(frozen=True)
class TrainBatch:
    """One forward of everything that trains.

    It is on the device already, and opaque to what moves tensors between devices.

    Attributes:
        rows: What the policy learns from.
        weights: Of the rows, or of the pairs of rows: the distillation loss says which.
        counts: What this forward adds to the step's divisors.
        reference_logps_RT: Log-probabilities of the rows' tokens under the reference, 0 at padding, where a loss reads
            them.
        value: What the learned value learns from, where there is one.
        secant: What its secant head learns from, where there is one.
        has_effect: False where this process has no prompts of its own in the forward.
    """

    rows: Rows
    weights: Tensor
    counts: Counts
    reference_logps_RT: Tensor | None = None
    value: ValueBatch | None = None
    secant: SecantRows | None = None
    has_effect: bool = True

    @property
    def reference(self) -> Tensor:
        """The reference's log-probabilities, of a loss that asked for them.

        Raises:
            ValueError: They were not computed.
        """
        if self.reference_logps_RT is None:
            raise ValueError("this batch holds no log-probabilities of the reference: the loss must need_reference")
        return self.reference_logps_RT


def without_effect(batch: TrainBatch) -> TrainBatch:
    """Return a forward with nothing that counts in its losses."""
    value, secant = batch.value, batch.secant
    return replace(
        batch,
        rows=replace(batch.rows, mask_RT=torch.zeros_like(batch.rows.mask_RT)),
        weights=torch.zeros_like(batch.weights),
        counts=Counts.unstacked(torch.zeros_like(batch.counts.stacked())),
        value=None if value is None else replace(value, mask_RT1=torch.zeros_like(value.mask_RT1)),
        secant=None if secant is None else replace(secant, mask_RS=torch.zeros_like(secant.mask_RS)),
        has_effect=False,
    )


def policy_rows(responses: Responses, keep_BM: Tensor) -> Rows:
    """Lay chosen responses out for a causal language model.

    Args:
        responses: A pool of M responses per prompt.
        keep_BM: bool, those that are wanted, at least one.

    Returns:
        Rows in the order of ``keep_BM.nonzero()``, cut to the longest response among them.
    """
    prompt_R, index_R = keep_BM.nonzero(as_tuple=True)
    mask_RT = responses.mask_BNT[prompt_R, index_R]
    length = max(1, int(mask_RT.sum(-1).max()))
    tokens_RT, mask_RT = responses.tokens_BNT[prompt_R, index_R][:, :length], mask_RT[:, :length]
    prompts_BP, prompt_mask_BP = left_padded(responses.prompts, responses.pad_id, tokens_RT.device)
    return Rows(
        torch.cat([prompts_BP[prompt_R], tokens_RT], 1),
        torch.cat([prompt_mask_BP[prompt_R], mask_RT], 1).long(),
        mask_RT,
    )


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return prompts as one tensor [B, P], padded on the left, and the bool mask of what is text."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    lengths_B1 = torch.tensor([len(prompt) for prompt in prompts], device=device).unsqueeze(1)
    return torch.tensor(ids, device=device), torch.arange(longest, device=device) >= longest - lengths_B1
