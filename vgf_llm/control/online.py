"""The online phase's side of the environment: one step at a time, into the buffer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vgf_llm.control.agent import ControlAgent
from vgf_llm.control.agent_checkpoint import step_generator
from vgf_llm.control.data import Buffer
from vgf_llm.control.envs import Bounds, reset
from vgf_llm.control.settings import TrainSettings

_SEED = 500_009  # keeps the episodes' seeds of neighbouring runs apart


class OnlineEpisodes:
    """Environment steps whose transitions go into the buffer; an episode's seed is the step that it starts at.

    Args:
        make: Makes the environment.
        bounds: Bounds of its actions.
        settings: Seed and flow steps of the actions tried.
        reward_of: From an environment's reward to the data's (shift and scale).
    """

    def __init__(
        self, make: Callable[[], Any], bounds: Bounds, settings: TrainSettings, reward_of: Callable[[float], float]
    ) -> None:
        self._env, self._bounds, self._settings, self._reward_of = make(), bounds, settings, reward_of
        self.between = True
        self._observation: np.ndarray | None = None
        self._return, self._returns = 0.0, [float("nan")]

    def step(self, agent: ControlAgent, buffer: Buffer, step: int) -> None:
        """Take one step and keep its transition."""
        settings = self._settings
        if self.between or self._observation is None:
            self._observation = reset(self._env, (settings.seed * _SEED + step) % 2**31)
            self._return = 0.0
        generator = step_generator(settings.seed + 1, step, "cpu")
        noise_1NA = torch.randn((1, agent.settings.num_particles, agent.action_size), generator=generator)
        uniform_1 = torch.rand(1, generator=generator)
        budget = replace(agent.settings.budget, steps=settings.online_flow_steps)
        device = buffer.device
        observation_1O = torch.from_numpy(self._observation).unsqueeze(0).to(device)
        action_1A, _ = agent.act(observation_1O, noise_1NA.to(device), uniform_1.to(device), budget)
        action = action_1A[0].cpu().numpy()
        following, reward, terminated, truncated, _ = self._env.step(self._bounds.from_unit(action.astype(np.float64)))
        following = np.asarray(following, dtype=np.float32)
        buffer.add(
            observations=self._observation,
            actions=action,
            rewards=self._reward_of(float(reward)),
            masks=0.0 if terminated else 1.0,
            next_observations=following,
        )
        self._return += float(reward)
        self._observation = following
        self.between = bool(terminated or truncated)
        if self.between:
            self._returns.append(self._return)

    def figures(self) -> dict[str, float]:
        """Return of the last episode that ended, where one has."""
        return {"online_return": self._returns[-1]} if np.isfinite(self._returns[-1]) else {}
