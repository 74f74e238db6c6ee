"""Figures of a log line that no rollout gives: likelihoods, distances, and samples of the policy itself.

What costs a forward is done only in the steps that end in a log line.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from vgf_llm.console.progress import Bar, duration
from vgf_llm.console.screen import say
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.text.protocols import Value
from vgf_llm.training.distributions import Distributions, sample
from vgf_llm.training.metrics import MetricSums, flow_metrics, kl_estimate, nll_a_token, peak_memory_gib
from vgf_llm.training.rewards import Rewards
from vgf_llm.training.rollout import Rollout
from vgf_llm.training.run_log import RunLog

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerState, TrainingArguments

_POLICY_STREAM = 0x50  # the policy's own samples, drawn for the log
_KINDS = ("original", "transported", "policy")
_OWN_SAMPLES = 2  # of these per prompt, for rewards and for the KL: with four, a log line took as long as two steps


class Observer:
    """Measures what a log line is to hold, and writes it.

    Args:
        distributions: The run's distributions.
        rewards: What responses are scored by.
        budget: Training budget of the transport.
        metrics: Figures since the last line.
        run_log: The files of the run.
        accelerator: Of the run's processes.

    Attributes:
        logged_at: When the last line was written, or training began, by `time.perf_counter`.
    """

    def __init__(
        self,
        distributions: Distributions,
        rewards: Rewards,
        budget: TransportBudget,
        metrics: MetricSums,
        run_log: RunLog,
        accelerator: Accelerator,
    ) -> None:
        self.distributions, self.rewards, self.budget = distributions, rewards, budget
        self.metrics, self.run_log, self.accelerator = metrics, run_log, accelerator
        self.logged_at = 0.0

    @torch.no_grad()
    def observe(self, rollout: Rollout, value: Value | None, step: int) -> None:
        """Add to the rollout's own figures: likelihoods, distances, and the policy's own samples.

        Rewards are of samples under the run's sampling distribution, as users will draw them; the KL is of samples of
        the untruncated policy at temperature 1, without which its estimate would be biased.

        Args:
            rollout: Of this step.
            value: What its flow climbed; None where there was none.
            step: Optimiser steps done.
        """
        started = time.perf_counter()
        prompts, sums = rollout.prompts, self.metrics
        seeds_BN = self.distributions.seeds(prompts, step, _POLICY_STREAM)[:, :_OWN_SAMPLES]
        own = sample(self.distributions.policy(), prompts, seeds_BN)
        distribution = self.distributions.policy(
            dataclasses.replace(self.distributions.sampling, temperature=1.0, top_k=0, top_p=1.0)
        )
        free = sample(distribution, prompts, seeds_BN)
        free_logps_BNT = distribution.logps(distribution.prefix(free.prompts), free)
        outcome = rollout.outcome
        parts = {"original": outcome.originals, "transported": outcome.transported, "policy": own, "free": free}
        with self.distributions.reference() as distribution:
            prefix = distribution.prefix(own.prompts)
            logps = {name: distribution.logps(prefix, part) for name, part in parts.items()}
        kl_BN = kl_estimate(free_logps_BNT, logps.pop("free"))
        for name, logps_BNT in logps.items():
            sums.add(f"nll/{name}", nll_a_token(logps_BNT.flatten(0, 1), parts[name].mask_BNT.flatten(0, 1)))
        sums.add("policy/kl", kl_BN)
        sums.total("policy/kl_samples", kl_BN.numel())
        for name, values_BN in self.rewards([prompt.text for prompt in prompts], own).items():
            sums.add(f"{name}/policy", values_BN)
        sums.update(flow_metrics(rollout, value, self.budget))
        self.run_log.completions(rollout, step + 1)
        sums.add("seconds/observe", time.perf_counter() - started)

    def write_line(self, logs: dict[str, float], step: int, epoch: float | None) -> None:
        """Add the means since the last line over all processes to a line of losses, and write metrics.jsonl.

        Called by all processes.

        Args:
            logs: The Trainer's own figures; added to in place. One without a loss is not a step's line, and stays.
            step: Optimiser steps done.
            epoch: Passes over the prompts done.
        """
        if "loss" not in logs:
            return
        metrics = self.metrics.means(self.accelerator)
        now = time.perf_counter()
        metrics["tokens_per_second"] = metrics.get("tokens", 0.0) / (now - self.logged_at)
        self.logged_at = now
        metrics["peak_memory_gib"] = self._largest(peak_memory_gib())
        logs |= {name: round(value, 5) for name, value in metrics.items()}
        self.run_log.metrics(step, epoch, logs)

    def _largest(self, value: float) -> float:
        """Return the largest value of all processes."""
        return float(self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).max())


def ends_in_log_line(args: TrainingArguments, state: TrainerState) -> bool:
    """Return whether the step under way ends in a log line."""
    step = state.global_step + 1
    wanted = step % args.logging_steps == 0 or (args.logging_first_step and step == 1)
    return bool(wanted or step >= state.max_steps)


def bar_figures(logs: Mapping[str, float]) -> dict[str, float | str]:
    """Return what the bar shows of a log line."""
    return {"loss": f"{float(logs['loss']):.3f}"} if "loss" in logs else {}


def says_lines(args: Any) -> Callable[[int, Mapping[str, float], Bar], None]:
    """Return what prints the numbers of a log line that matter; all of them are in metrics.jsonl.

    Args:
        args: The Trainer's. Below the first line stands what measuring it took, which `logging_steps` makes rarer.
    """
    told = False

    def say_line(step: int, logs: Mapping[str, float], bar: Bar) -> None:
        nonlocal told
        if "loss" not in logs:
            return
        rewards = [f"{logs[name]:+.3f} {kind}" for kind in _KINDS if (name := f"reward/{kind}") in logs]
        parts = [f"step {step}/{bar.total}"]
        if rewards:
            parts.append(f"reward {', '.join(rewards)}")
        if "policy/kl" in logs:
            parts.append(f"KL {logs['policy/kl']:.3f} nats")
        if (left := bar.left_sec) is not None:
            parts.append(f"{duration(left)} left")
        say("  ".join(parts))
        if not told and "seconds/observe" in logs:
            told = True
            seconds = logs["seconds/observe"] * args.gradient_accumulation_steps
            say(f"measuring the policy for this line took {seconds:.1f} s; logging_steps is {args.logging_steps}")

    return say_line
