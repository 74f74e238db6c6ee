"""The transport budget: how far particles may leave the reference, and by which kind of step.

The budget is the regularisation of Value Gradient Flow (arXiv 2604.14265). It is one frozen dataclass, used with one
value in training and another at test time. Only the standard library is imported here, so that `--help` stays fast.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from vgf_llm.errors import require_choice, require_finite, require_integer

StepKind = Literal["sgd", "adam", "normalised"]
KernelKind = Literal["none", "rbf"]


@dataclass(frozen=True)
class TransportBudget:
    """How far the flow may carry a particle: L steps of a given kind and size, and the decoder's share in nats.

    Formula: `x <- project(x + step_size * step(phi(x)))`, `steps` times (see `vgf_llm.flow.trajectory`).

    Raises:
        SettingError: A field is outside its range; the message names the field and the value seen.
    """

    steps: int = 1
    """Flow steps L per round; integer >= 0. 0 leaves every particle where it is (best-of-N)."""
    step_size: float = 1.0
    """Size eps > 0 of a step: factor of phi (sgd), learning rate (adam), nearest-token distances (normalised)."""
    step: StepKind = "sgd"
    """Kind of step: sgd (eps * phi), adam (bias-corrected), normalised (every token moves by exactly step_size)."""
    temperature: float = 1.0
    """Temperature alpha > 0, in units of the value; the flow climbs value / alpha. Small: more value, less spread."""
    kernel: KernelKind = "none"
    """Interaction of a group's particles: none (plain ascent, the alpha -> 0 form) or rbf (Stein variational)."""
    rounds: int = 1
    """Rounds of transport -> decode -> re-embed that share the budget in nats; integer >= 1."""
    nats: float = 2.0
    """Most KL that decoding may spend on one response over all rounds, in nats >= 0; split evenly over the rounds.

    Read by the decoders prior, block and stream; edit and pivot are limited by temperature and rounds.
    """
    max_token_nats: float = 1.0
    """Largest KL at one token, in nats > 0; at or above ``nats`` it never binds."""
    bandwidth: float | None = None
    """Fixed bandwidth sigma > 0 of the rbf kernel, in units of its features; null: median heuristic at every step."""

    def __post_init__(self) -> None:
        """Checks every field; YAML values reach this without passing through any argument parser."""
        require_integer("steps", self.steps, least=0)
        require_integer("rounds", self.rounds, least=1)
        require_choice("step", self.step, get_args(StepKind))
        require_choice("kernel", self.kernel, get_args(KernelKind))
        require_finite("step_size", self.step_size, 0, "a finite number > 0", above=True)
        require_finite("temperature", self.temperature, 0, "a finite number > 0", above=True)
        require_finite("nats", self.nats, 0, "a finite number >= 0")
        if self.max_token_nats != math.inf:
            require_finite("max_token_nats", self.max_token_nats, 0, "a number > 0", above=True)
        if self.bandwidth is not None:
            require_finite("bandwidth", self.bandwidth, 0, "null or a finite number > 0", above=True)

    @classmethod
    def none(cls) -> "TransportBudget":
        """The empty budget: no step at all, which is best-of-N."""
        return cls(steps=0)

    @property
    def is_none(self) -> bool:
        """Whether no particle can move (`steps == 0`)."""
        return self.steps == 0
