"""Arms of an experiment. This module imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vgf_llm.errors import require
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import DecoderName

Direction = Literal["value", "random", "flipped", "none"]
Gradient = Literal["auto", "exact"]


@dataclass(frozen=True)
class Arm:
    """One row of the results table: how many particles, moved how far, in which direction, decoded how."""

    name: str = "best-of-8"
    """Name in the table; unique in a run."""
    num_particles: int = 8
    """Responses per prompt, at least 1. The arms of a run share their samples."""
    budget: TransportBudget | None = None
    """Transport budget; null (or steps 0) moves nothing, which is best-of-N."""
    decoder: DecoderName = "prior"
    """How moved particles become tokens."""
    decoder_options: dict[str, Any] = field(default_factory=dict)
    """Options of the decoder, by name; its class lists them."""
    draws: int = 1
    """Texts decoded from each moved particle, at least 1."""
    direction: Direction = "value"
    """The value's gradient, its negative, random vectors with the gradient's norm at every token, or no direction."""
    gradient: Gradient = "auto"
    """The secant head's gradient where the reward model has one (auto), or the exact one by a backward pass."""
    select: Literal["max", "random"] = "max"
    """The response that is returned: the best by value, or any (the plain base model)."""
    num_seeds: int = 1
    """Seeds this arm is run with, at least 1; seed i of every arm has the same samples."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        for key in ("num_particles", "draws", "num_seeds"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        if self.decoder == "stream":  # moves no particles along a gradient
            require(self.direction == "value", "direction", self.direction, "value with the decoder stream")
            require(self.gradient == "auto", "gradient", self.gradient, "auto with the decoder stream")

    @property
    def transport(self) -> TransportBudget:
        """The budget, with the empty one in place of null."""
        return self.budget or TransportBudget.none()

    @property
    def is_plain_base(self) -> bool:
        """Whether the arm is the base model itself: any sample, nothing moved, nothing chosen."""
        return self.select == "random" and self.transport.is_none


def budget_arms(num_particles: int, draws: int, best_of: list[int], budgets: list[TransportBudget]) -> list[Arm]:
    """Return the usual arms: the base model, best-of-N at several N, and the given budgets."""
    arms = [Arm(name="base", num_particles=num_particles, select="random")]
    arms += [Arm(name=f"best-of-{n}", num_particles=n) for n in best_of]
    for budget in budgets:
        name = "zero budget" if budget.is_none else f"{budget.nats:g} nat{'' if budget.nats == 1 else 's'}"
        name += f" x{budget.rounds} rounds" if budget.rounds > 1 else ""
        if any(arm.name == name for arm in arms):
            name += f" ({budget.steps} {budget.step} steps)"
        arms.append(Arm(name=name, num_particles=num_particles, draws=draws, budget=budget))
    return arms
