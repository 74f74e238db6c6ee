"""Episodes under several test budgets in one pass: the clone, best-of-N, and every number and size of flow steps.

All arms meet the same episodes: the same first states, so that differences between arms can be taken episode by
episode. The arms of N particles also meet, step by step, the same noise for the clone's samples; the clone's own arm
draws one sample a step from the same seed, which is other noise than theirs. A pool of environments runs in lockstep,
and every environment that finishes takes the next episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vgf_llm.console.progress import track
from vgf_llm.control.agent import ControlAgent
from vgf_llm.control.envs import Bounds, reset
from vgf_llm.control.settings import AgentSettings, TrainSettings
from vgf_llm.flow.budget import TransportBudget

_POOL = 25  # environments at a time
_EPISODE_SEED = 1_000_003  # keeps the episodes' seeds of neighbouring runs apart


@dataclass(frozen=True)
class Arm:
    """One way to act."""

    name: str
    budget: TransportBudget
    num_particles: int
    select: str | None = None


@dataclass
class Outcome:
    """What the episodes of an arm came to, in the order of their seeds."""

    arm: Arm
    returns: list[float]
    successes: list[float] | None
    """1 where the task was solved at some step; None where the environment does not say."""
    lengths: list[int]
    moved: float
    """Mean distance from the clone's sample to the action taken."""


def make_arms(train: TrainSettings, agent: AgentSettings) -> list[Arm]:
    """Return the clone, best-of-N where test_steps holds 0, and each number of steps above 0 in each size."""
    arms = [Arm("clone", TransportBudget.none(), 1)]
    for steps in sorted(set(train.test_steps)):
        if steps == 0:
            arms.append(Arm(f"best-of-{agent.num_particles}", TransportBudget.none(), agent.num_particles))
            continue
        for size in sorted(set(train.test_step_sizes)):
            budget = replace(agent.budget, steps=steps, step_size=size)
            arms.append(Arm(f"{steps} x {size:g}", budget, agent.num_particles))
    return arms


class Evaluator:
    """A pool of environments and the arms that are run in them.

    Args:
        make: Makes an environment.
        bounds: Bounds of its actions.
        episodes: Episodes an arm.
        seed: Seed of the episodes.
    """

    def __init__(self, make: Callable[[], Any], bounds: Bounds, episodes: int, seed: int) -> None:
        self.pool = [make() for _ in range(min(_POOL, episodes))]
        self.bounds = bounds
        self.episodes = episodes
        self.seed = seed

    def run(self, agent: ControlAgent, arms: list[Arm]) -> list[Outcome]:
        """Run all episodes of all arms."""
        done = track(self._finished(agent, arms), "evaluating", len(arms) * self.episodes, unit="episodes")
        records: dict[tuple[str, int], _Episode] = {(e.arm.name, e.index): e for e in done}
        return [_outcome(arm, [records[arm.name, index] for index in range(self.episodes)]) for arm in arms]

    def _finished(self, agent: ControlAgent, arms: list[Arm]) -> Iterator[_Episode]:
        waiting = [(arm, index) for arm in arms for index in range(self.episodes)]
        waiting.reverse()
        running: list[_Episode] = []
        for env in self.pool:
            if waiting:
                running.append(_Episode(env, *waiting.pop(), agent.action_size, self.seed))
        while running:
            for arm in dict.fromkeys(episode.arm for episode in running):
                self._step(agent, arm, [episode for episode in running if episode.arm == arm])
            over = [episode for episode in running if episode.over]
            running = [episode for episode in running if not episode.over]
            for episode in over:
                if waiting:
                    running.append(_Episode(episode.env, *waiting.pop(), agent.action_size, self.seed))
                yield episode

    def _step(self, agent: ControlAgent, arm: Arm, episodes: list[_Episode]) -> None:
        device = next(agent.parameters()).device
        observations_BO = torch.from_numpy(np.stack([episode.observation for episode in episodes])).to(device)
        draws = [episode.draw() for episode in episodes]
        noise_BNA = torch.stack([noise for noise, _ in draws]).to(device)
        uniform_B = torch.stack([uniform for _, uniform in draws]).to(device)
        actions_BA, moved_B = agent.act(observations_BO, noise_BNA, uniform_B, arm.budget, arm.select)
        commands = self.bounds.from_unit(actions_BA.double().cpu().numpy())
        for episode, command, moved in zip(episodes, commands, moved_B.tolist(), strict=True):
            episode.step(command, moved)


class _Episode:
    """One episode on its way."""

    def __init__(self, env: Any, arm: Arm, index: int, action_size: int, seed: int) -> None:
        self.env, self.arm, self.index = env, arm, index
        self._shape = (arm.num_particles, action_size)
        self._generator = torch.Generator().manual_seed(seed * _EPISODE_SEED + index)
        self.observation = reset(env, (seed * _EPISODE_SEED + index) % 2**31)
        self.total, self.steps, self.moved = 0.0, 0, 0.0
        self.success: float | None = None
        self.over = False

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The step's noise [N, A] and uniform number."""
        return torch.randn(self._shape, generator=self._generator), torch.rand((), generator=self._generator)

    def step(self, command: np.ndarray, moved: float) -> None:
        """Act, and note what came of it."""
        observation, reward, terminated, truncated, info = self.env.step(command)
        self.observation = np.asarray(observation, dtype=np.float32)
        self.total += float(reward)
        self.steps += 1
        self.moved += moved
        if "success" in info:
            self.success = max(self.success or 0.0, float(info["success"]))
        self.over = bool(terminated or truncated)


def score(outcome: Outcome, low: float, high: float | None) -> float:
    """Return an arm's score.

    With `high` the normalised return of D4RL, `100 (mean return - low) / (high - low)`; without it the percentage of
    episodes solved where the environment tells, else the plain return.

    Args:
        outcome: An arm's episodes.
        low: Return that scores 0.
        high: Return that scores 100, or None.
    """
    if outcome.successes is not None and high is None:
        return 100 * float(np.mean(outcome.successes))
    mean = float(np.mean(outcome.returns))
    return mean if high is None else 100 * (mean - low) / (high - low)


def _outcome(arm: Arm, episodes: list[_Episode]) -> Outcome:
    known = all(episode.success is not None for episode in episodes)
    return Outcome(
        arm,
        [episode.total for episode in episodes],
        [float(episode.success or 0.0) for episode in episodes] if known else None,
        [episode.steps for episode in episodes],
        sum(episode.moved for episode in episodes) / sum(episode.steps for episode in episodes),
    )
