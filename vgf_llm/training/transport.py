"""What carries the originals of a step to transported responses: a flow, or a direction that is fitted along.

The trainer knows a :class:`Transport` alone: it is told when a step begins, what was rolled out, and when the step
ends, and what it has learned is written into checkpoints and read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from vgf_llm.answering.assemble import make_policy
from vgf_llm.text.particles import token_spacing
from vgf_llm.text.protocols import Moved, Reference, Value
from vgf_llm.text.responses import Responses
from vgf_llm.training.distributions import Distributions
from vgf_llm.training.fitted_direction import FittedDirection
from vgf_llm.training.learned_value import LearnedValue
from vgf_llm.training.metrics import MetricSums
from vgf_llm.training.rewards import Flow, Rewards
from vgf_llm.training.rollout import Carried, ObservedPolicy, PromptRow, Rollout
from vgf_llm.training.settings import VGFSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

FirstMove = tuple[Responses, Moved]
"""Particles, and where the first flow carried them."""


class Transport(Protocol):
    """Carries originals to transported responses, and may learn to from what they bring."""

    @property
    def value(self) -> Value | None:
        """What is climbed, as it is now; None where no particle moves."""
        ...

    @property
    def table_VD(self) -> Tensor:
        """Input embeddings that particles live in."""
        ...

    @property
    def learns(self) -> bool:
        """Whether a step leaves something to learn at its end, with whole weights."""
        ...

    def carry(
        self, distribution: Reference, originals: Responses, seeds_BN: Tensor
    ) -> tuple[Carried, FirstMove | None]:
        """Return the transported responses, and the first movement of particles where there are some.

        Args:
            distribution: That the originals were drawn from.
            originals: B x N samples.
            seeds_BN: int64, their seeds.
        """
        ...

    def begin_step(self, batches: Sequence[Sequence[PromptRow]], step: int) -> None:
        """Get ready for a step; called on all processes, with whole weights.

        Args:
            batches: This process's own prompts of each forward.
            step: Optimiser steps done.
        """
        ...

    def see(self, rollout: Rollout, step: int) -> None:
        """Take in a rollout of this process's own prompts."""
        ...

    def end_step(self, step: int) -> None:
        """Learn from what was seen since the step began; called on all processes."""
        ...

    def save(self, folder: Path, with_state: bool) -> None:
        """Write what was learned, for users and, with its state, for a resumed run; called on the first process."""
        ...

    def load(self, folder: Path) -> None:
        """Read the state back from a checkpoint.

        Raises:
            CheckpointError: It is not there.
        """
        ...


class FlowTransport:
    """Moves particles along a value's direction, and decodes them; it learns nothing itself.

    Args:
        flow: What moves them.
        method: Budget, decoder, draws.
    """

    learns = False

    def __init__(self, flow: Flow, method: VGFSettings) -> None:
        self.flow, self.method = flow, method
        self._length_unit: float | None = None

    @property
    def value(self) -> Value:
        """What the flow climbs as it is now."""
        return self.flow()[0]

    @property
    def table_VD(self) -> Tensor:
        """The value's own input embeddings."""
        return self.value.embedding_table_VD

    def carry(
        self, distribution: Reference, originals: Responses, seeds_BN: Tensor
    ) -> tuple[Carried, FirstMove | None]:
        """Transport and decode; see :class:`Transport`.

        Raises:
            NonFiniteError: A value or gradient is not finite.
        """
        value, gradient = self.flow()
        if self._length_unit is None:
            self._length_unit = token_spacing(value.embedding_table_VD)
        policy = make_policy(
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
        return policy.improve(originals, seeds_BN), policy.first_move

    def begin_step(self, batches: Sequence[Sequence[PromptRow]], step: int) -> None:
        """Nothing to get ready."""

    def see(self, rollout: Rollout, step: int) -> None:
        """Nothing to take in: what a value learns from is in the batch."""

    def end_step(self, step: int) -> None:
        """Nothing to learn."""

    def save(self, folder: Path, with_state: bool) -> None:
        """Nothing to write."""

    def load(self, folder: Path) -> None:
        """Nothing to read."""


def make_transport(
    method: VGFSettings,
    distributions: Distributions,
    rewards: Rewards,
    learned: LearnedValue | None,
    metrics: MetricSums,
    accelerator: Accelerator,
) -> Transport:
    """Return the transport that the settings ask for.

    Raises:
        ConfigError: There is nothing that could move responses.
    """
    if method.direction is not None:
        return FittedDirection(method, method.direction, distributions, rewards, metrics, accelerator)
    return FlowTransport(rewards.flow() if learned is None else learned.flow, method)
