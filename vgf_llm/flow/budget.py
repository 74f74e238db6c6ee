"""The transport budget: how far particles may leave the reference, and by which kind of step.

The budget is the regularisation of Value Gradient Flow (arXiv 2604.14265). It is one frozen dataclass, used with one
value in training and another at test time. Only the standard library is imported here, so that `--help` stays fast.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

StepKind = Literal["sgd", "adam", "normalised"]
KernelKind = Literal["none", "rbf"]


@dataclass(frozen=True)
class TransportBudget:
    """How far the flow may carry a particle: L steps of a given kind and size, and the decoder's share in nats.

    Formula: `x <- project(x + step_size * step(phi(x)))`, `steps` times (see `vgf_llm.flow.trajectory`).

    Raises:
        ValueError: A field is outside its range; the message names the field and the value seen.
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

    Read by the decoders prior and block; edit and pivot are limited by temperature and rounds.
    """
    max_token_nats: float = 1.0
    """Largest KL at one token, in nats > 0; at or above ``nats`` it never binds."""
    bandwidth: float | None = None
    """Fixed bandwidth sigma > 0 of the rbf kernel, in units of its features; null: median heuristic at every step."""

    def __post_init__(self) -> None:
        """Checks every field; YAML values reach this without passing through any argument parser."""
        _require_integer("steps", self.steps, minimum=0)
        _require_integer("rounds", self.rounds, minimum=1)
        _require_choice("step", self.step, get_args(StepKind))
        _require_choice("kernel", self.kernel, get_args(KernelKind))
        _require_number("step_size", self.step_size, "a finite number > 0", lambda v: 0 < v < math.inf)
        _require_number("temperature", self.temperature, "a finite number > 0", lambda v: 0 < v < math.inf)
        _require_number("nats", self.nats, "a finite number >= 0", lambda v: 0 <= v < math.inf)
        _require_number("max_token_nats", self.max_token_nats, "a number > 0", lambda v: v > 0)
        if self.bandwidth is not None:
            _require_number("bandwidth", self.bandwidth, "null or a finite number > 0", lambda v: 0 < v < math.inf)

    @classmethod
    def none(cls) -> "TransportBudget":
        """The empty budget: no step at all, which is best-of-N."""
        return cls(steps=0)

    @property
    def is_none(self) -> bool:
        """Whether no particle can move (`steps == 0`)."""
        return self.steps == 0


def _require_integer(key: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{key} must be an integer >= {minimum}, got {value!r}")


def _require_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")


def _require_number(key: str, value: Any, wanted: str, holds: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not holds(value):
        hint = " (YAML reads 1e-5 as text: write 1.0e-5)" if isinstance(value, str) else ""
        raise ValueError(f"{key} must be {wanted}, got {value!r}{hint}")
