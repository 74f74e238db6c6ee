"""From a rollout to a loss: what policy and value learn from, and the forward that they learn in."""

from __future__ import annotations

import dataclasses
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.responses import Responses
from vgf_llm.training.batch import Counts, Rows, TrainBatch
from vgf_llm.training.distillation import Distillation
from vgf_llm.training.distributions import Distributions
from vgf_llm.training.learned_value import LearnedValue
from vgf_llm.training.metrics import MetricSums
from vgf_llm.training.policy_models import response_logps
from vgf_llm.training.rollout import Rollout

if TYPE_CHECKING:
    from accelerate import Accelerator

_SECANT_STREAM = 0x5EC  # the token changes that a secant head learns from
_SHORTLIST = 50  # likeliest tokens these come from, where the sampler's own distribution is too wide to be kept


class Learner:
    """Turns rollouts into batches, and batches into losses.

    Args:
        distillation: The policy's loss.
        learned: The value that is learned along, or None.
        distributions: The run's distributions.
        metrics: Gets the losses' figures.
        accelerator: The reference runs under its autocast, as the policy's own forward does.
    """

    def __init__(
        self,
        distillation: Distillation,
        learned: LearnedValue | None,
        distributions: Distributions,
        metrics: MetricSums,
        accelerator: Accelerator,
    ) -> None:
        self.distillation, self.learned, self.distributions = distillation, learned, distributions
        self.metrics, self.accelerator = metrics, accelerator

    @torch.no_grad()
    def batch(self, rollout: Rollout, step: int) -> TrainBatch:
        """Return the tensors of one forward, and what it adds to the counts that losses are divided by.

        Args:
            rollout: Of this process's prompts.
            step: Optimiser steps done.
        """
        started = time.perf_counter()
        batch, figures = self.distillation.batch(rollout)
        self.metrics.update(figures)
        if self.distillation.needs_reference:
            batch = dataclasses.replace(batch, reference_logps_RT=self.reference_logps(batch.rows))
        if self.learned is not None:
            batch = self._with_value(self.learned, batch, rollout, step)
        self.metrics.add("seconds/targets", time.perf_counter() - started)
        return batch

    def reference_logps(self, rows: Rows) -> Tensor:
        """Return the reference's log-probabilities of the rows' tokens, [R, T], 0 at padding."""
        with self.distributions.models.reference() as base, self._autocast():
            return response_logps(base, **rows.policy_inputs).masked_fill(~rows.mask_RT, 0)

    def loss(self, model: nn.Module, batch: TrainBatch, counts: Counts) -> Tensor:
        """Run policy and value, and return their losses over the step's counts, a scalar with a graph.

        Args:
            model: The `PolicyAndValue`, as it is wrapped for training.
            batch: Of this forward.
            counts: Of the whole step.
        """
        logps_RT, values_RS, directions_RSD = model(
            batch.rows.policy_inputs,
            None if batch.value is None else batch.value.inputs,
            None if batch.secant is None else batch.secant.features_RSF,
        )
        loss: Tensor
        loss, figures = self.distillation.loss(logps_RT, batch, counts)
        self.metrics.update(figures)
        if self.learned is not None:
            part, figures = self.learned.loss(values_RS, directions_RSD, batch, counts)
            loss = loss + part
            self.metrics.update(figures)
        return loss

    def _with_value(self, learned: LearnedValue, batch: TrainBatch, rollout: Rollout, step: int) -> TrainBatch:
        """Add what the value, and its secant head, learn from."""
        value = learned.value_batch(rollout)
        counts = dataclasses.replace(batch.counts, value=value.mask_RT1.sum().float())
        secant = None
        if learned.secant is not None:
            originals = rollout.outcome.originals
            seeds_BN = self.distributions.seeds(rollout.prompts, step, _SECANT_STREAM)
            secant = learned.secant_batch(learned.secant, originals, self._shortlists(originals), seeds_BN)
            counts = dataclasses.replace(counts, secant=secant.mask_RS.sum().float())
        return dataclasses.replace(batch, counts=counts, value=value, secant=secant)

    def _shortlists(self, originals: Responses) -> Shortlist:
        """Return the likeliest tokens at every position of the originals: those the sampler kept, or by a forward."""
        if originals.distribution is not None:
            return originals.distribution
        with self.distributions.particles() as distribution:
            sampling = dataclasses.replace(self.distributions.sampling, top_k=_SHORTLIST)
            return distribution.shortlists(distribution.prefix(originals.prompts), originals, sampling)

    def _autocast(self) -> AbstractContextManager[None]:
        found: AbstractContextManager[None] = self.accelerator.autocast()
        return found
