"""A point on a square that walks to a corner: an environment of a few lines, and data from a blind walk in it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

GOAL = np.array([0.7, 0.7])
STEP = 0.2
HORIZON = 20


class Corner:
    """Observation: position in [-1, 1]^2. Action: direction. Reward -1 until within 0.25 of the goal, which ends it."""

    observation_space = SimpleNamespace(shape=(2,))
    action_space = SimpleNamespace(low=-2 * np.ones(2), high=2 * np.ones(2), shape=(2,))  # not the unit box on purpose

    def reset(self, seed):
        self.generator = np.random.default_rng(seed)
        self.position = self.generator.uniform(-1, 0.4, 2)
        self.steps = 0
        return self.position.copy(), {}

    def step(self, action):
        self.position = np.clip(self.position + STEP * np.asarray(action) / 2, -1, 1)
        self.steps += 1
        there = bool(np.linalg.norm(self.position - GOAL) < 0.25)
        return self.position.copy(), float(there) - 1, there, self.steps == HORIZON, {"success": float(there)}


def make():
    return Corner()


def walk(episodes=200, seed=0):
    """Rows in D4RL's fields, actions uniform in the environment's bounds with a faint pull to the goal."""
    generator = np.random.default_rng(seed)
    rows = {"observations": [], "actions": [], "rewards": [], "terminals": [], "timeouts": [], "next_observations": []}
    env = make()
    for episode in range(episodes):
        observation, _ = env.reset(seed * 10_000 + episode)
        ended = False
        while not ended:
            action = np.clip(generator.uniform(-2, 2, 2) + 0.3, -2, 2)
            following, reward, terminated, truncated, _ = env.step(action)
            for key, value in zip(rows, (observation, action, reward, terminated, truncated, following), strict=True):
                rows[key].append(value)
            observation, ended = following, terminated or truncated
    return {key: np.array(value) for key, value in rows.items()}
