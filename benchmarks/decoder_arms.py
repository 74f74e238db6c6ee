"""The arms of the bake-off: every decoder at four compute levels, its controls, ablations, and growing budgets.

A level is the cost of that many base samples, each generated and scored. The sizes below stay near it: with the cost of
a value pass left out, N particles of d texts cost N (1 + d) samples for ``prior``, N (1 + 2 d) for ``block``,
N (1 + rounds) for ``pivot``, about N (1 + 0.7 rounds) for ``edit``, whose first test spares some of the reference's
forwards, and about N (1 + 3 rounds) for ``edit_greedy`` with 16 proposals and 2 checked. What each arm really costs is
counted, and the comparison is made at that figure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vgf_llm.evaluation.arms import Arm
from vgf_llm.flow.budget import TransportBudget

LEVELS = (16, 32, 64, 128)
BASE = f"best-of-{LEVELS[-1]}"
CONTROL_LEVEL = 32
DEFAULT_NATS = TransportBudget().nats


@dataclass(frozen=True)
class Decoding:
    """A decoder with its options and budget, and its size at each level: (particles, draws, rounds)."""

    name: str
    decoder: str
    budget: TransportBudget
    sizes: tuple[tuple[int, int, int], ...]
    options: dict[str, Any]

    def arm(self, level: int, **changes: Any) -> Arm:
        """Return the arm at a level; ``changes`` are fields of it."""
        particles, draws, rounds = self.sizes[LEVELS.index(level)]
        arm = Arm(
            name=f"{self.name} @{level}",
            num_particles=particles,
            draws=draws,
            budget=replace(self.budget, rounds=rounds),
            decoder=self.decoder,  # type: ignore[arg-type]
            decoder_options=self.options,
        )
        return replace(arm, **changes)


def decodings(alpha: float) -> dict[str, Decoding]:
    """Return the decoders that are compared, by name.

    Args:
        alpha: Temperature of the decoders that accept by value, in units of it.
    """
    prior_sizes = ((4, 3, 1), (8, 3, 1), (8, 7, 1), (14, 8, 1))
    timed_sizes = ((3, 2, 1), (6, 3, 1), (7, 6, 1), (11, 8, 1))  # near the seconds of best-of-N, not its FLOPs
    pivot_sizes = ((2, 1, 6), (4, 1, 6), (4, 1, 13), (8, 1, 13))
    mcmc = TransportBudget(temperature=alpha)
    found = [
        Decoding("prior", "prior", TransportBudget(nats=DEFAULT_NATS), prior_sizes, {}),
        Decoding("prior 4 nats", "prior", TransportBudget(nats=4.0), prior_sizes, {}),
        Decoding("prior 4 nats by time", "prior", TransportBudget(nats=4.0), timed_sizes, {}),
        Decoding(
            "block", "block", TransportBudget(nats=DEFAULT_NATS), ((3, 2, 1), (6, 2, 1), (9, 3, 1), (18, 3, 1)), {}
        ),
        Decoding("pivot", "pivot", mcmc, pivot_sizes, {}),
        Decoding("pivot all", "pivot", replace(mcmc, max_token_nats=0.3), pivot_sizes, {"tilted_tokens": 64}),
        Decoding("edit", "edit", mcmc, ((2, 1, 10), (4, 1, 10), (4, 1, 22), (8, 1, 22)), {}),
        Decoding(
            "edit greedy",
            "edit_greedy",
            mcmc,
            ((2, 1, 2), (4, 1, 2), (4, 1, 5), (8, 1, 5)),
            {"proposals": 16, "checked": 2},
        ),
        Decoding(
            "nearest",
            "nearest",
            TransportBudget(steps=10, step="adam", step_size=0.1),
            ((8, 1, 1), (16, 1, 1), (32, 1, 1), (64, 1, 1)),
            {},
        ),
        Decoding(
            "nearest each step",
            "nearest",
            TransportBudget(step="normalised", step_size=1.2),
            ((8, 1, 4), (16, 1, 4), (32, 1, 4), (64, 1, 4)),
            {},
        ),
    ]
    return {one.name: one for one in found}


def best_of() -> list[Arm]:
    """Return best-of-N at every level, and the base model itself."""
    return [Arm(name="base", num_particles=8, select="random")] + [
        Arm(name=f"best-of-{level}", num_particles=level) for level in LEVELS
    ]


def level_arms(alpha: float, names: list[str]) -> list[Arm]:
    """Return the named decoders at all levels."""
    found = decodings(alpha)
    return [found[name].arm(level) for name in names for level in LEVELS]


def control_arms(alpha: float, names: list[str]) -> list[Arm]:
    """Return the named decoders at one level with another direction, and with the value's raw gradient."""
    arms = []
    for name in names:
        one = decodings(alpha)[name]
        for direction in ("random", "none"):
            arms.append(one.arm(CONTROL_LEVEL, name=f"{name}, {direction}", direction=direction))
        arms.append(one.arm(CONTROL_LEVEL, name=f"{name}, raw gradient", gradient="exact"))
    flipped = decodings(alpha)["prior"].arm(CONTROL_LEVEL, name="prior, flipped", direction="flipped")
    return [*arms, flipped]


def ablation_arms() -> list[Arm]:
    """Return variations of ``prior`` at the control level and the default budget."""
    prior = decodings(1.0)["prior"]
    options: dict[str, dict[str, Any]] = {
        "one multiplier a token": {"multiplier": "token"},
        "maximal coupling": {"coupling": "maximal"},
        "tilt dropped after a change": {"after_change": "drop"},
    }
    arms = [prior.arm(CONTROL_LEVEL, name=f"prior, {name}", decoder_options=chosen) for name, chosen in options.items()]
    budgets = {"5 flow steps": {"steps": 5}, "rbf kernel": {"kernel": "rbf"}, "2 rounds": {"rounds": 2}}
    for name, changes in budgets.items():
        budget = replace(TransportBudget(nats=DEFAULT_NATS), **changes)
        arms.append(prior.arm(CONTROL_LEVEL, name=f"prior, {name}", budget=budget))
    arms.append(prior.arm(CONTROL_LEVEL, name="prior, no further draws", num_particles=16, draws=1))
    return arms


def cloud_arm(nats: float) -> Arm:
    """Return eight particles under a budget, each decoded once: the cloud as a whole."""
    budget = TransportBudget(nats=nats, max_token_nats=max(TransportBudget().max_token_nats, nats / 2))
    return Arm(name=f"prior {nats:g} nats, cloud", num_particles=8, budget=budget)


def growing_arms(alpha: float) -> list[Arm]:
    """Return clouds of 8 under budgets up to 16 times the default, and of 4 chains over 16 times the rounds."""
    arms = [cloud_arm(nats) for nats in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)]
    for rounds in (2, 4, 8, 16, 32):
        budget = TransportBudget(temperature=alpha, rounds=rounds)
        arms.append(Arm(name=f"pivot {rounds} rounds, cloud", num_particles=4, budget=budget, decoder="pivot"))
    return arms
