"""The distributions that a run samples from, and the seeds of its samples.

A sample depends on the run's seed, the step and the prompt alone, which makes a resumed run the same run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vgf_llm.models.base import LoadedBase
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import TorchReference, row_seeds
from vgf_llm.text.noise import combine_seeds
from vgf_llm.text.protocols import Reference
from vgf_llm.text.responses import Responses
from vgf_llm.text.sampler import ReferenceSampler
from vgf_llm.training.particle_engine import ParticleEngine
from vgf_llm.training.policy_models import PolicyModels
from vgf_llm.training.rollout import PromptRow
from vgf_llm.training.settings import VGFSettings


class Distributions:
    """What responses are drawn from: the policy, its reference, and the one of them that particles start from.

    Args:
        models: Policy and reference.
        base: Tokenizer and ids of the base model.
        sampling: Temperature, truncation and length.
        method: Says what particles are sampled from, and how many.
        seed: Of the run.

    Attributes:
        engine: Runs the particles' distribution for as long as training lasts; None: transformers does, here.
    """

    def __init__(
        self, models: PolicyModels, base: LoadedBase, sampling: SamplingSettings, method: VGFSettings, seed: int
    ) -> None:
        self.models, self.base, self.sampling, self.method, self.seed = models, base, sampling, method, seed
        self.engine: ParticleEngine | None = None

    def of(self, model: PreTrainedModel, sampling: SamplingSettings | None = None) -> TorchReference:
        """Return a model as a distribution; a new one each time: it remembers prompts under the weights of now."""
        base = self.base
        return TorchReference(model, sampling or self.sampling, base.eos_ids, base.pad_id, base.vocabulary)

    def policy(self, sampling: SamplingSettings | None = None) -> TorchReference:
        """Return the policy as it is now."""
        return self.of(self.models.policy_lm, sampling)

    @contextlib.contextmanager
    def reference(self) -> Iterator[TorchReference]:
        """Yield the untrained base."""
        with self.models.reference() as base:
            yield self.of(base)

    @contextlib.contextmanager
    def particles(self) -> Iterator[Reference]:
        """Yield what particles start from and are decoded by."""
        if self.engine is not None:
            yield self.engine.reference
        elif self.method.particles_from == "policy":
            yield self.policy()
        else:
            with self.reference() as distribution:
                yield distribution

    def seeds(self, prompts: Sequence[PromptRow], step: int, stream: int = 0) -> Tensor:
        """Return one seed per particle, int64 [B, N].

        Args:
            prompts: B prompts.
            step: Optimiser steps done.
            stream: Keeps samples of different purposes apart.
        """
        run = combine_seeds(torch.tensor(self.seed), step)
        seed = int(combine_seeds(run, stream))
        return row_seeds(seed, [prompt.index for prompt in prompts], self.method.num_particles)


def sample(distribution: Reference, prompts: Sequence[PromptRow], seeds_BN: Tensor) -> Responses:
    """Draw N responses to each of B prompts."""
    return ReferenceSampler(distribution).sample([prompt.ids for prompt in prompts], seeds_BN)
