"""Makes rollouts: sample, transport, decode and score."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from vgf_llm.answering.assemble import make_policy
from vgf_llm.answering.implicit_policy import Outcome
from vgf_llm.text.particles import token_spacing
from vgf_llm.text.protocols import Reference
from vgf_llm.training.distributions import Distributions, sample
from vgf_llm.training.metrics import MetricSums, responses_tokens, rollout_metrics
from vgf_llm.training.rewards import Flow, Rewards
from vgf_llm.training.rollout import ObservedPolicy, PromptRow, Rollout
from vgf_llm.training.settings import VGFSettings

Result = TypeVar("Result")


class RolloutWorker:
    """Rolls prompts out under the current weights.

    Args:
        distributions: What particles start from.
        flow: What moves them.
        rewards: What responses are scored by.
        method: Budget, decoder, draws.
        metrics: Gets the figures that every rollout tells.
    """

    def __init__(
        self, distributions: Distributions, flow: Flow, rewards: Rewards, method: VGFSettings, metrics: MetricSums
    ) -> None:
        self.distributions, self.flow, self.rewards = distributions, flow, rewards
        self.method, self.metrics = method, metrics
        self._length_unit: float | None = None

    def __call__(self, prompts: Sequence[PromptRow], step: int) -> Rollout:
        """Sample, transport, decode and score.

        Args:
            prompts: B prompts.
            step: Optimiser steps done.

        Raises:
            NonFiniteError: A value or gradient is not finite.
            ModelError: A reward is not.
        """
        seeds_BN = self.distributions.seeds(prompts, step)
        with self.distributions.particles() as distribution:
            originals, sample_sec = _timed(lambda: sample(distribution, prompts, seeds_BN))
            policy = self.implicit_policy(distribution)
            outcome, transport_sec = _timed(lambda: policy.improve(originals, seeds_BN))
        (original_scores, transported_scores), score_sec = _timed(lambda: self.score(prompts, outcome))
        seconds = {"sample": sample_sec, "transport": transport_sec, "score": score_sec}
        done = Rollout(list(prompts), outcome, original_scores, transported_scores, policy.first_move, seconds)
        self.metrics.update(rollout_metrics(done))
        self.metrics.total("tokens", responses_tokens(outcome.originals, outcome.transported))
        return done

    def implicit_policy(self, distribution: Reference) -> ObservedPolicy:
        """Return the policy that the training budget implies."""
        value, gradient = self.flow()
        if self._length_unit is None:
            self._length_unit = token_spacing(value.embedding_table_VD)
        return make_policy(
            ObservedPolicy,
            distribution,
            value,
            self.method.budget,
            self.method.decoder,
            self.method.decoder_options,
            draws=self.method.draws,
            gradient=gradient,
            length_unit=self._length_unit,
        )

    def score(self, prompts: Sequence[PromptRow], outcome: Outcome) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the rewards of the originals and of the transported responses, by name."""
        texts = [prompt.text for prompt in prompts]
        originals = self.rewards(texts, outcome.originals, learn=True)
        return originals, self.rewards(texts, outcome.transported, learn=True)


def _timed(function: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    return function(), time.perf_counter() - started
