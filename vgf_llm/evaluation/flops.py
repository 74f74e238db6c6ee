"""Floating-point operations of each stage, counted as 2 a parameter and token (a backward to the inputs: 2 more).

P_ref is the reference's parameters (its tied or untied head included, a pure lookup table not), P_val the value's
layers; T a response's tokens, S a prompt's.

    sample         2 P_ref T         prompt, once    2 P_ref S and 2 P_val S
    score          2 P_val T         flow step       4 P_val T
    prior decode   4 P_ref T         nearest decode  2 V D T
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from vgf_llm.evaluation.arms import Arm


@dataclass(frozen=True)
class Sizes:
    """Parameters that take part in a forward."""

    reference: int
    value: int
    table: int

    @classmethod
    def of(cls, reference: PreTrainedModel, value: nn.Module) -> Sizes:
        """Count the parameters of the reference (with its head) and of the value (without its table)."""
        table = reference.get_input_embeddings().weight
        head = reference.get_output_embeddings().weight
        untied = 0 if head is table else table.numel()
        value_parameters = {id(p): p for p in value.parameters()}.values()
        value_tables = sum(p.numel() for p in value_parameters if p.dim() == 2 and len(p) == len(table))
        return cls(
            reference=sum(p.numel() for p in reference.parameters()) - untied,
            value=sum(p.numel() for p in value_parameters) - value_tables,
            table=table.numel(),
        )


def arm_flops(arm: Arm, sizes: Sizes, prompt_tokens: float, response_tokens: float) -> float:
    """Return the FLOPs of an arm for one prompt: N responses of ``response_tokens`` tokens on average."""
    moving = not arm.transport.is_none
    tokens = arm.num_particles * response_tokens
    total = 2 * sizes.reference * tokens + 2 * sizes.reference * prompt_tokens
    if arm.is_plain_base:
        return 2 * sizes.reference * (response_tokens + prompt_tokens)  # one sample is drawn, nothing is scored
    total += 2 * sizes.value * (tokens + prompt_tokens)
    if moving:
        decode = 4 * sizes.reference * tokens if arm.decoder == "prior" else 2 * sizes.table * tokens
        a_round = 4 * sizes.value * tokens * arm.transport.steps + decode + 2 * sizes.value * tokens
        total += arm.transport.rounds * a_round
        total += 2 * sizes.reference * prompt_tokens if arm.decoder == "prior" else 0
    return total
