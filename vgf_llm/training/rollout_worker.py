"""Makes rollouts: sample, transport, decode and score."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from vgf_llm.training.distributions import Distributions, sample
from vgf_llm.training.metrics import MetricSums, responses_tokens, rollout_metrics
from vgf_llm.training.rewards import Rewards
from vgf_llm.training.rollout import Carried, PromptRow, Rollout
from vgf_llm.training.transport import Transport

Result = TypeVar("Result")


class RolloutWorker:
    """Rolls prompts out under the current weights.

    Args:
        distributions: What particles start from.
        transport: What carries them.
        rewards: What responses are scored by.
        metrics: Gets the figures that every rollout tells.
    """

    def __init__(
        self, distributions: Distributions, transport: Transport, rewards: Rewards, metrics: MetricSums
    ) -> None:
        self.distributions, self.transport = distributions, transport
        self.rewards, self.metrics = rewards, metrics

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
            (carried, first_move), transport_sec = _timed(
                lambda: self.transport.carry(distribution, originals, seeds_BN)
            )
        (original_scores, transported_scores), score_sec = _timed(lambda: self.score(prompts, carried))
        seconds = {"sample": sample_sec, "transport": transport_sec, "score": score_sec}
        done = Rollout(list(prompts), carried, original_scores, transported_scores, first_move, seconds)
        self.metrics.update(rollout_metrics(done))
        self.metrics.total("tokens", responses_tokens(carried.originals, carried.transported))
        return done

    def score(self, prompts: Sequence[PromptRow], carried: Carried) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the rewards of the originals and of the transported responses, by name."""
        texts = [prompt.text for prompt in prompts]
        originals = self.rewards(texts, carried.originals, learn=True)
        return originals, self.rewards(texts, carried.transported, learn=True)


def _timed(function: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    return function(), time.perf_counter() - started
