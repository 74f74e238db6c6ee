"""The loop: clone, cache, critics, online steps; what is logged, evaluated and saved, and when.

Phases by number of the step (from 1): `clone_steps` of the clone alone, `offline_steps` of clone and critics on the
data, `online_steps` with one environment step each. With `cached_samples` the clone's samples at all next states are
drawn once, between the first and the second phase, and the clone stays as it is from then on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgf_llm.console.progress import Bar, track
from vgf_llm.console.screen import say
from vgf_llm.control.agent import Batch, ControlAgent, Noise
from vgf_llm.control.agent_checkpoint import save, step_generator
from vgf_llm.control.data import Buffer
from vgf_llm.control.episodes import Evaluator, make_arms, score
from vgf_llm.control.online import OnlineEpisodes
from vgf_llm.control.settings import EVALUATIONS_NAME, DataSettings, TrainSettings
from vgf_llm.control.trackers import Trackers
from vgf_llm.errors import DivergedError, NonFiniteError
from vgf_llm.runs.files import append_jsonl, read_jsonl, write_text_atomic

METRICS_NAME = "metrics.jsonl"
_SHOWN = ("clone_loss", "critic_loss")  # on the bar
_CACHE_ROWS = 1024  # next states a call of the clone


class Trainer:
    """One run.

    Args:
        settings: How long, how often, where to.
        data_settings: Reward shift and score bounds.
        agent: The agent, on its device, optimisers made.
        buffer: The transitions.
        evaluator: Runs the test budgets; None skips evaluation.
        online: Takes the environment's steps; None where there are none.
        identity: What a checkpoint at a step is a checkpoint of.
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
        identity: Callable[[int], dict[str, Any]],
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
        total = settings.total_steps
        with Bar("training", total, "steps") as bar:
            bar.start_at(start)
            last = self._train(start + 1, bar)
        self._trackers.close()
        return last or self._evaluated(total)

    def _train(self, first: int, bar: Bar) -> list[dict[str, Any]]:
        """Take the steps from `first` to the last; returns the rows of the last evaluation."""
        settings = self.settings
        last: list[dict[str, Any]] = []
        total = settings.total_steps
        for step in range(first, total + 1):
            metrics = self._train_step(step)
            logged, saved = (step % every == 0 for every in (settings.log_every_steps, settings.save_every_steps))
            if logged or saved or step == total:
                _check_finite(step, metrics)
            if logged or step == total:
                self._log(step, metrics)
            if self.evaluator is not None and (step % settings.eval_every_steps == 0 or step == total):
                last = self.evaluate(step)
            self._save(step)
            bar.move_to(step)
            if logged:
                bar.move_to(step, **{name: float(metrics[name]) for name in _SHOWN if name in metrics})
        return last

    def _evaluated(self, step: int) -> list[dict[str, Any]]:
        """The rows that an earlier run wrote at a step."""
        path = self.settings.folder / EVALUATIONS_NAME
        return [row for row in read_jsonl(path) if row["step"] == step] if path.is_file() else []

    def evaluate(self, step: int) -> list[dict[str, Any]]:
        """Run all test budgets and append a line an arm to evaluations.jsonl."""
        if self.evaluator is None or step <= self.settings.clone_steps:
            return []
        outcomes = self.evaluator.run(self.agent, make_arms(self.settings, self.agent.settings))
        rows: list[dict[str, Any]] = [
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
        solved = rows[0]["successes"] is not None and self.data_settings.score_max is None
        unit = "% solved" if solved else "return" if self.data_settings.score_max is None else "normalised return"
        say(f"step {step}, {unit}: {shown}")
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
            samples_BNA = self._samples(batch, rows_B, noise, generator)
            try:
                metrics |= self.agent.update_critics(batch, samples_BNA)
            except NonFiniteError as error:
                raise _diverged(step, "the value or its gradient") from error
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
        append_jsonl(self.settings.folder / METRICS_NAME, [{"step": step} | values])
        self._trackers.log(values, step)

    def _save(self, step: int) -> None:
        """Save when it is due; online not before an episode has ended, whose middle no file could bring back."""
        settings = self.settings
        self._save_due |= step % settings.save_every_steps == 0 or step == settings.total_steps
        between = self.online is None or self.online.between or step == settings.total_steps
        if self._save_due and between:
            save(settings.folder, step, self.agent, self.buffer, self.identity(step), settings.save_total_limit)
            self._save_due = False


def _check_finite(step: int, metrics: dict[str, Tensor]) -> None:
    """Stop before numbers that are not finite are logged or saved.

    Raises:
        DivergedError: Names the step and the metrics.
    """
    bad = [name for name, value in metrics.items() if not torch.isfinite(value).all()]
    if bad:
        raise _diverged(step, ", ".join(bad))


def _diverged(step: int, what: str) -> DivergedError:
    return DivergedError(
        f"step {step}: {what} not finite; lower learning_rate or budget.step_size, and go on from the newest "
        "checkpoint with --resume"
    )


def _forget_after(path: Any, step: int) -> None:
    """Drop lines that an earlier run wrote after the step that this one goes on from."""
    if path.is_file():
        kept = [row for row in read_jsonl(path) if row["step"] <= step]
        write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
