"""Distillation of transported responses into the policy: one file per loss.

``weighted_nll`` weighs the likelihood of responses by their rewards, ``dpo`` prefers a transported response to its
original, and ``anchor`` adds the KL to the reference to either. ``protocol`` is what the trainer asks of a loss;
``losses`` holds the formulas and imports torch alone.
"""

from __future__ import annotations

from typing import assert_never

from vgf_llm.training.distillation.anchor import Anchored
from vgf_llm.training.distillation.dpo import DPO
from vgf_llm.training.distillation.protocol import Distillation
from vgf_llm.training.distillation.weighted_nll import WeightedNLL
from vgf_llm.training.settings import VGFSettings

__all__ = ["Distillation", "make_distillation"]


def make_distillation(method: VGFSettings) -> Distillation:
    """Return the loss that the settings name, with the KL anchor where they weigh one."""
    found: Distillation
    if method.loss == "weighted_nll":
        found = WeightedNLL(method.weight_temperature, method.kept)
    elif method.loss == "dpo":
        found = DPO(method.dpo_beta)
    else:
        assert_never(method.loss)
    return Anchored(found, method.kl_coefficient) if method.kl_coefficient else found
