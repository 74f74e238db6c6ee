"""Floating-point operations of each stage, counted as 2 a parameter and token (a backward to the inputs: 2 more).

P_ref is the reference's parameters (its tied or untied head included, a pure lookup table not), P_val the value's
layers; T a response's tokens, S a prompt's.

    sample         2 P_ref T         prompt, once    2 P_ref S and 2 P_val S
    score          2 P_val T         flow step       4 P_val T

With a secant head a flow step is 2 P_val T and the head's own. A decoder counts its own tokens
(:class:`vgf_llm.text.protocols.Work`); its docstring has the formula. Attention over the context is left out: 4 D T a
token and layer, under 2% of a parameter's share at the lengths here. So is padding: rows of a batch that have ended, or
start elsewhere, ride along. The latter weighs most in ``pivot``, where 8 rows of 16 tokens with pivots anywhere run a
third more than is counted; one row runs what is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from vgf_llm.evaluation.arms import Arm
from vgf_llm.models.architecture import input_table
from vgf_llm.text.protocols import Work


@dataclass(frozen=True)
class PromptWork:
    """Tokens through the reference, the value and the table for one prompt."""

    reference: float
    value: float
    table: float

    @classmethod
    def of(cls, work: Work, b: int) -> PromptWork:
        """Take prompt ``b`` out of a batch."""
        return cls(float(work.reference_B[b]), float(work.value_B[b]), float(work.table_B[b]))


@dataclass(frozen=True)
class Sizes:
    """Parameters that take part in a forward."""

    reference: int
    value: int
    table: int

    @classmethod
    def of(cls, reference: PreTrainedModel, value: nn.Module) -> Sizes:
        """Count the parameters of the reference (with its head) and of the value (without its table)."""
        table = input_table(reference)
        head = reference.get_output_embeddings().weight
        untied = 0 if head is table else table.numel()
        value_parameters = {id(p): p for p in value.parameters()}.values()
        value_tables = sum(p.numel() for p in value_parameters if p.dim() == 2 and len(p) == len(table))
        return cls(
            reference=sum(p.numel() for p in reference.parameters()) - untied,
            value=sum(p.numel() for p in value_parameters) - value_tables,
            table=table.numel(),
        )


def arm_flops(arm: Arm, sizes: Sizes, prompt_tokens: float, sampled_tokens: float, work: PromptWork) -> float:
    """Return the FLOPs of an arm for one prompt.

    Args:
        arm: What was done.
        sizes: Parameters of the models and of the table.
        prompt_tokens: S, run once through each model.
        sampled_tokens: Tokens of all N originals.
        work: Tokens that the policy ran through the models after sampling.
    """
    if arm.is_plain_base:  # one sample is drawn, nothing is scored
        return 2 * sizes.reference * (sampled_tokens / arm.num_particles + prompt_tokens)
    reference = sampled_tokens + prompt_tokens + work.reference
    return 2 * (sizes.reference * reference + sizes.value * (prompt_tokens + work.value) + sizes.table * work.table)
