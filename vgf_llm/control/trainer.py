"""The loop: clone, cache, critics, online steps; what is logged, evaluated and saved, and when.

Phases by number of the step (from 1): `clone_steps` of the clone alone, `offline_steps` of clone and critics on the
data, `online_steps` with one environment step each. With `cached_samples` the clone's samples at all next states are
drawn once, between the first and the second phase, and the clone stays as it is from then on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgf_llm.control.agent import Batch, ControlAgent, Noise
from vgf_llm.control.data import Buffer
from vgf_llm.control.envs import Bounds, reset
from vgf_llm.control.evaluation import Evaluator, make_arms, score
from vgf_llm.control.saving import save, step_generator
from vgf_llm.control.settings import DataSettings, TrainSettings
from vgf_llm.control.trackers import Trackers
from vgf_llm.io import append_jsonl, read_jsonl, write_text_atomic
from vgf_llm.progress import track

METRICS_NAME = "metrics.jsonl"
EVALUATIONS_NAME = "evaluations.jsonl"
_CACHE_ROWS = 1024  # next states a call of the clone
_ONLINE_SEED = 500_009


class Trainer:
    """One run.

    Args:
        settings: How long, how often, where to.
        data_settings: Reward shift and score bounds.
        agent: The agent, on its device, optimisers made.
        buffer: The transitions.
        evaluator: Runs the test budgets; None skips evaluation.
        online: Takes the environment's steps; None where there are none.
        identity: What a checkpoint is a checkpoint of.
        device: Torch device.
    """

    def __init__(
        self,
        settings: TrainSettings,
        data_settings: DataSettings,
        agent: ControlAgent,
        buffer: Buffer,
        evaluator: Evaluator | None,
        online: OnlineEpisodes | None,
        identity: dict[str, Any],
        device: str,
    ) -> None:
        self.settings, self.data_settings = settings, data_settings
        self.agent, self.buffer, self.evaluator, self.online = agent, buffer, evaluator, online
        self.identity, self.device = identity, device
        self._cache_KNA: Tensor | None = None
        self._save_due = False
        self._trackers = Trackers(settings.report_to, settings.folder)

    def run(self, start: int) -> list[dict[str, Any]]:
        """Train from the step after `start` to the last.

        Returns:
            The rows of the last evaluation, one an arm; empty without an environment.
        """
        settings = self.settings
        for name in (METRICS_NAME, EVALUATIONS_NAME):
            _forget_after(settings.folder / name, start)
        last: list[dict[str, Any]] = []
        total = settings.total_steps
        for step in track(range(start + 1, total + 1), "train", total - start):
            metrics = self._train_step(step)
            if step % settings.log_every_steps == 0 or step == total:
                self._log(step, metrics)
            if self.evaluator is not None and (step % settings.eval_every_steps == 0 or step == total):
                last = self.evaluate(step)
            self._save(step)
        self._trackers.close()
        return last

    def evaluate(self, step: int) -> list[dict[str, Any]]:
        """Run all test budgets and append a line an arm to evaluations.jsonl."""
        if self.evaluator is None or step <= self.settings.clone_steps:
            return []
        outcomes = self.evaluator.run(self.agent, make_arms(self.settings, self.agent.settings))
        rows = [
            {
                "step": step,
                "arm": outcome.arm.name,
                "flow_steps": outcome.arm.budget.steps,
                "step_size": outcome.arm.budget.step_size if outcome.arm.budget.steps else None,
                "num_particles": outcome.arm.num_particles,
                "score": round(score(outcome, self.data_settings.score_min, self.data_settings.score_max), 3),
                "return": round(float(np.mean(outcome.returns)), 4),
                "moved": round(outcome.moved, 5),
                "returns": [round(value, 4) for value in outcome.returns],
                "successes": outcome.successes,
            }
            for outcome in outcomes
        ]
        append_jsonl(self.settings.folder / EVALUATIONS_NAME, rows)
        self._trackers.log({f"score/{row['arm']}": row["score"] for row in rows}, step)
        shown = ", ".join(f"{row['arm']}: {row['score']:.0f}" for row in rows)
        print(f"step {step}: {shown}", file=sys.stderr, flush=True)
        return rows

    # Steps ---------------------------------------------------------------------------------------------------------

    def _train_step(self, step: int) -> dict[str, Tensor]:
        settings = self.settings
        if self.online is not None and step > settings.clone_steps + settings.offline_steps:
            self.online.step(self.agent, self.buffer, step)
            if step - settings.clone_steps - settings.offline_steps <= settings.online_warmup:
                return {}
        generator = step_generator(settings.seed, step, self.device)
        rows_B = torch.randint(self.buffer.size, (settings.batch_size,), generator=generator, device=self.device)
        batch = self.buffer.batch(rows_B)
        noise = self._noise(batch, generator)
        metrics: dict[str, Tensor] = {}
        if step <= settings.clone_steps or not settings.cached_samples:
            metrics |= self.agent.update_clone(batch, noise)
        if step > settings.clone_steps:
            metrics |= self.agent.update_critics(batch, self._samples(batch, rows_B, noise, generator))
        return metrics

    def _noise(self, batch: Batch, generator: torch.Generator) -> Noise:
        B, A = batch.actions_BA.shape
        N = self.agent.settings.num_particles

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        times_B1 = torch.rand((B, 1), generator=generator, device=self.device)
        return Noise(normal(B, N, A), normal(B, A), times_B1)

    def _samples(self, batch: Batch, rows_B: Tensor, noise: Noise, generator: torch.Generator) -> Tensor:
        """Samples of the clone at the next states: new ones, or N of the cached ones."""
        if not self.settings.cached_samples:
            return self.agent.propose(batch.next_observations_BO, noise.particles_BNA)
        if self._cache_KNA is None:
            self._cache_KNA = self._fill_cache()
        N, cached = self.agent.settings.num_particles, self._cache_KNA.shape[1]
        taken_BC = torch.rand((len(rows_B), cached), generator=generator, device=self.device)
        taken_BN = taken_BC.argsort(1)[:, :N]
        return self._cache_KNA[rows_B.unsqueeze(1), taken_BN]

    def _fill_cache(self) -> Tensor:
        """Draw the clone at every next state of the data; the same after a resume, since the clone rests."""
        next_KO = self.buffer.tensors["next_observations"][: self.buffer.offline]
        shape = (self.settings.cached_samples, self.agent.action_size)
        generator = step_generator(self.settings.seed, -1, self.device)
        parts = [
            self.agent.propose(rows_BO, torch.randn((len(rows_BO), *shape), generator=generator, device=self.device))
            for rows_BO in track(next_KO.split(_CACHE_ROWS), "cache the clone's samples")
        ]
        return torch.cat(parts)

    # Files ---------------------------------------------------------------------------------------------------------

    def _log(self, step: int, metrics: dict[str, Tensor]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        if self.online is not None:
            values |= self.online.figures()
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad:
            print(f"warning: step {step}: {', '.join(bad)} not finite", file=sys.stderr)
        append_jsonl(self.settings.folder / METRICS_NAME, [{"step": step} | values])
        self._trackers.log(values, step)

    def _save(self, step: int) -> None:
        """Save when it is due; online not before an episode has ended, whose middle no file could bring back."""
        settings = self.settings
        self._save_due |= step % settings.save_every_steps == 0 or step == settings.total_steps
        between = self.online is None or self.online.between or step == settings.total_steps
        if self._save_due and between:
            save(settings.folder, step, self.agent, self.buffer, self.identity, settings.save_total_limit)
            self._save_due = False


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
            self._observation = reset(self._env, (settings.seed * _ONLINE_SEED + step) % 2**31)
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


def _forget_after(path: Any, step: int) -> None:
    """Drop lines that an earlier run wrote after the step that this one goes on from."""
    if path.is_file():
        kept = [row for row in read_jsonl(path) if row["step"] <= step]
        write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
