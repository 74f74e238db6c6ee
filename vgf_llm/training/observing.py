"""What a trainer logs: beside each rollout's own figures, likelihoods, distances and samples of the policy itself.

A mixin for transformers' Trainer. What costs a forward is done only in the steps that end in a log line.
"""

from __future__ import annotations

import time

import torch

from vgf_llm.text.protocols import Value
from vgf_llm.training.metrics import flow_metrics, kl_estimate, nll_a_token, peak_memory_gib
from vgf_llm.training.rollout import Rollout

_POLICY_STREAM = 0x50  # the policy's own samples, drawn for the log
_OWN_SAMPLES = 4  # of these a prompt, at most


class Observes:
    """Measures and logs; expects the attributes of `VGFTrainer`."""

    @property
    def logs_this_step(self) -> bool:
        """Whether the step under way ends in a log line."""
        step = self.state.global_step + 1
        return step % self.args.logging_steps == 0 or (self.args.logging_first_step and step == 1)

    @torch.no_grad()
    def observe(self, rollout: Rollout, value: Value) -> None:
        """Add what a log line needs beside the rollout: likelihoods, distances, and the policy's own samples."""
        started = time.perf_counter()
        prompts, sums = rollout.prompts, self.metrics
        seeds_BN = self.seeds(prompts, _POLICY_STREAM)[:, :_OWN_SAMPLES]
        law = self.law_of(self.models.policy_lm)
        own = self.sample(law, prompts, seeds_BN)
        own_logps_BNT = law.logps(law.prefix(own.prompts), own)
        with self.models.reference() as base:
            law = self.law_of(base)
            prefix = law.prefix(own.prompts)
            parts = {"original": rollout.outcome.originals, "transported": rollout.outcome.transported, "policy": own}
            logps = {name: law.logps(prefix, part) for name, part in parts.items()}
        for name, part in parts.items():
            sums.add(f"nll/{name}", nll_a_token(logps[name].flatten(0, 1), part.mask_BNT.flatten(0, 1)))
        kl_BN = kl_estimate(own_logps_BNT, logps["policy"])
        sums.add("policy/kl", kl_BN)
        sums.total("policy/kl_samples", kl_BN.numel())
        for name, values_BN in self.rewards([prompt.text for prompt in prompts], own).items():
            sums.add(f"{name}/policy", values_BN)
        sums.update(flow_metrics(rollout, value, self.method.budget))
        self.journal.completions(rollout, self.state.global_step + 1)
        sums.add("seconds/observe", time.perf_counter() - started)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last line over all processes; write metrics.jsonl."""
        if "loss" in logs:
            metrics = self.metrics.means(self.accelerator)
            metrics["peak_memory_gib"] = peak_memory_gib()
            logs |= {name: round(value, 5) for name, value in metrics.items()}
            self.journal.metrics(self.state.global_step, self.state.epoch, logs)
        super().log(logs, start_time)  # type: ignore[misc]
