"""Parts of the loop by themselves: the cache of the clone's samples, and the transitions of online episodes."""

from types import SimpleNamespace

import numpy as np
import torch

from vgf_llm.control import trainer
from vgf_llm.control.data import Buffer, Transitions
from vgf_llm.control.envs import Bounds
from vgf_llm.control.settings import DataSettings, TrainSettings
from vgf_llm.flow.budget import TransportBudget

K, CACHED, N = 10, 6, 4


def buffer(room=0):
    """Row k has observation k and next observation 100 + k."""
    rows = np.arange(K, dtype=np.float32)
    ones = np.ones(K, dtype=np.float32)
    states = rows[:, None]
    return Buffer(
        Transitions(states, np.zeros((K, 2), np.float32), -ones, ones, states + 100, ones > 0), room, device="cpu"
    )


class Numbered:
    """An agent whose samples hold the state that they are drawn at and their own number."""

    settings = SimpleNamespace(num_particles=N, budget=TransportBudget(steps=1))
    action_size = 2

    def __init__(self):
        self.seen = []

    def propose(self, observations, noise):
        numbers = torch.arange(noise.shape[1]).expand(noise.shape[:2])
        return torch.stack([observations.expand(noise.shape[:2]), numbers], 2)

    def update_critics(self, batch, samples):
        self.seen.append((batch, samples))
        return {}

    def act(self, observations, noise, uniform, budget):
        return torch.tensor([[0.5, -1.0]]), torch.zeros(1)


def test_cached_samples_are_the_next_states_own_and_none_is_taken_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_CACHE_ROWS", 4)
    settings = TrainSettings(output_dir=str(tmp_path), clone_steps=1, cached_samples=CACHED, batch_size=32)
    agent = Numbered()
    loop = trainer.Trainer(settings, DataSettings(), agent, buffer(), None, None, {}, "cpu")
    loop._train_step(2)
    ((batch, samples),) = agent.seen
    assert torch.equal(samples[:, :, 0], (batch.observations_BO + 100).expand(-1, N))
    taken = [sorted(row) for row in samples[:, :, 1].int().tolist()]
    assert all(len(set(row)) == N and set(row) <= set(range(CACHED)) for row in taken)
    assert len({tuple(row) for row in taken}) > 1  # drawn anew for every transition


class Scripted:
    """Episodes of two steps; the first is terminated, the second truncated."""

    def __init__(self):
        self.episode, self.actions = 0, []

    def reset(self, seed):
        self.episode, self.steps = self.episode + 1, 0
        return np.array([10.0 * self.episode]), {}

    def step(self, action):
        self.actions.append(action.tolist())
        self.steps += 1
        over = self.steps == 2
        state = np.array([10.0 * self.episode + self.steps])
        return state, -3.0, over and self.episode == 1, over and self.episode == 2, {}


def test_online_transitions_have_masks_rewards_and_actions_as_the_data_has_them():
    env, data = Scripted(), buffer(room=4)
    bounds = Bounds(np.array([-2.0, 0.0]), np.array([2.0, 8.0]))
    online = trainer.OnlineEpisodes(lambda: env, bounds, TrainSettings(), lambda reward: (reward + 1) * 10)
    between = []
    for step in range(1, 5):
        online.step(Numbered(), data, step)
        between.append(online.between)
    added = {name: values.flatten().tolist() for name, values in data.online().items()}
    assert added["masks"] == [1, 0, 1, 1]  # 0 where terminated, 1 where only truncated
    assert between == [False, True, False, True]
    assert added["observations"] == [10, 11, 20, 21] and added["next_observations"] == [11, 12, 21, 22]
    assert added["rewards"] == [-20] * 4
    assert added["actions"] == [0.5, -1] * 4 and env.actions == [[1.0, 0.0]] * 4  # kept in [-1, 1], taken in bounds
    assert online.figures() == {"online_return": -6.0}
