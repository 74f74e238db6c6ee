"""Figures of a run: what a rollout cost and brought, summed over steps and processes and logged as means.

Distances: KL spent while decoding (nats per response and token), displacement in nearest-token units, changed tokens,
and MMD^2 between the particles before and after the first flow with the paper's bound (pooled features, one kernel
bandwidth, the median distance of the originals). The policy's KL to the base is the mean over its own samples of
sum_t [log pi - log p], untruncated, at temperature 1.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vgf_llm.flow.budget import TransportBudget
from vgf_llm.flow.distances import mmd2, mmd2_bound
from vgf_llm.flow.kernels import squared_distances
from vgf_llm.text.protocols import Value
from vgf_llm.text.responses import Responses
from vgf_llm.training.rollout import Rollout

if TYPE_CHECKING:
    from accelerate import Accelerator


class MetricSums:
    """Running sums and counts by name; every process must add the same names."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._totals: set[str] = set()
        self._muted = False

    def add(self, name: str, values: Tensor | float, count: float | None = None) -> None:
        """Add all numbers of a tensor (NaN ones left out), or a sum of ``count`` numbers."""
        if count is None:
            numbers = torch.as_tensor(values, dtype=torch.float64).flatten()
            numbers = numbers[~numbers.isnan()]
            total, count = float(numbers.sum()), float(numbers.numel())
        else:
            total = float(values)
        if self._muted:
            total = count = 0.0
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def update(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Add several."""
        for name, values in metrics.items():
            self.add(name, values)

    def total(self, name: str, value: float) -> None:
        """Add to a figure that is summed over the processes, not averaged."""
        self._totals.add(name)
        self.add(name, value, 1)

    @contextlib.contextmanager
    def muted(self, muted: bool = True) -> Iterator[None]:
        """Let additions inside name their figures only, for a process that has no part in them."""
        before, self._muted = self._muted, muted
        try:
            yield
        finally:
            self._muted = before

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last means, as plain JSON."""
        return {"sums": dict(self._sums), "counts": dict(self._counts), "totals": sorted(self._totals)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from sums that :meth:`state_dict` gave."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
        self._totals = set(state["totals"])

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes, and start anew; called by all of them."""
        names = sorted(self._sums)
        table = torch.tensor(
            [[self._sums[name] for name in names], [self._counts[name] for name in names]], dtype=torch.float64
        )
        if accelerator.num_processes > 1 and names:
            table = accelerator.reduce(table.to(accelerator.device), reduction="sum").cpu()
        self._sums, self._counts = {}, {}
        for i, name in enumerate(names):
            if name in self._totals:
                table[1, i] = 1
        return {name: float(table[0, i] / table[1, i]) for i, name in enumerate(names) if table[1, i] > 0}


def rollout_metrics(rollout: Rollout) -> dict[str, Tensor | float]:
    """Return what every rollout tells at no cost."""
    outcome = rollout.outcome
    found: dict[str, Tensor | float] = {}
    for kind, scores in (("original", rollout.original_scores), ("transported", rollout.transported_scores)):
        found |= {f"{name}/{kind}": values_BN for name, values_BN in scores.items()}
    found |= {f"{name}/selected": values_B for name, values_B in _selected(rollout).items()}
    found["nats/response"] = outcome.nats_BN
    found["nats/token"] = outcome.nats_BN / outcome.transported.lengths_BN.clamp(min=1)
    found["displacement"] = outcome.displacement_BN
    found["changed_tokens"] = rollout.changed_BM.float()
    found["length/original"] = outcome.originals.lengths_BN.float()
    found["length/transported"] = outcome.transported.lengths_BN.float()
    found["eos/original"] = outcome.originals.eos_BNT.any(-1).float()
    found["eos/transported"] = outcome.transported.eos_BNT.any(-1).float()
    if (distribution := outcome.originals.distribution) is not None:
        entropy_BNT = -(
            distribution.logps.exp() * distribution.logps.masked_fill(distribution.logps == -torch.inf, 0)
        ).sum(-1)
        found["entropy"] = entropy_BNT[outcome.originals.mask_BNT]
    found["zero_variance_share"] = (rollout.original_scores["reward"].std(1) < 1e-8).float()
    return found | {f"seconds/{name}": seconds for name, seconds in rollout.seconds.items()}


def _selected(rollout: Rollout) -> dict[str, Tensor]:
    """Scores of the response of highest reward in the pool, by name, [B]."""
    index_B1 = rollout.pool_rewards_BM.argmax(1, keepdim=True)
    return {
        name: torch.cat([values_BN, rollout.transported_scores[name]], 1).gather(1, index_B1).squeeze(1)
        for name, values_BN in rollout.original_scores.items()
    }


def flow_metrics(rollout: Rollout, value: Value | None, budget: TransportBudget) -> dict[str, Tensor | float]:
    """Return MMD^2 of the particles before and after the flow, and for sgd steps its bound, means over prompts.

    Particles are compared by their mean over movable tokens; the bound's constant is the largest gradient met.
    """
    if rollout.first_move is None or value is None:
        return {}
    responses, moved = rollout.first_move
    weight_BNT1 = responses.movable_BNT.unsqueeze(-1).float()
    count_BN1 = weight_BNT1.sum(2).clamp(min=1)
    before_BND = (value.embed(responses.tokens_BNT).detach().float() * weight_BNT1).sum(2) / count_BN1
    shift_BND = (moved.displacement_BNTD.float() * weight_BNT1).sum(2) / count_BN1
    distances_BNN = squared_distances(before_BND, before_BND).clamp(min=0).sqrt()
    others_NN = ~torch.eye(before_BND.shape[1], dtype=torch.bool, device=before_BND.device)
    moved_by, bounds = [], []
    for b, sigma in enumerate(distances_BNN[:, others_NN].median(-1).values.tolist()):
        if not sigma > 0:
            continue  # the originals are all the same
        moved_by.append(float(mmd2(before_BND[b], before_BND[b] + shift_BND[b], sigma)))
        gradient = float(shift_BND[b].norm(dim=-1).max()) * budget.temperature / budget.step_size
        bounds.append(mmd2_bound(budget.step_size, 1, sigma, gradient, budget.temperature))
    found: dict[str, Tensor | float] = {"mmd2": torch.tensor(moved_by)}
    if budget.step == "sgd" and budget.steps == 1:
        found["mmd2_bound"] = torch.tensor(bounds)
    return found


def nll_a_token(logps_RT: Tensor, mask_RT: Tensor) -> Tensor:
    """Return the mean negative log-likelihood per token of each response, [R]."""
    return -(logps_RT.masked_fill(~mask_RT, 0)).sum(-1) / mask_RT.sum(-1).clamp(min=1)


def kl_estimate(policy_logps_BNT: Tensor, reference_logps_BNT: Tensor) -> Tensor:
    """Return sum_t [log pi - log p] of each of the policy's own samples, [B, N]; padding is 0 in both."""
    return (policy_logps_BNT - reference_logps_BNT).sum(-1)


def peak_memory_gib() -> float:
    """Return the peak memory of this process: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**30 if sys.platform == "darwin" else kib / 2**20


def nothing_learns(metrics: dict[str, float]) -> list[str]:
    """Say why nothing can be learned from what was logged; an empty list where something can."""
    found = []
    if metrics.get("zero_variance_share", 0.0) >= 1:
        found.append("every prompt's responses have one reward each: nothing to compare; check the reward")
    if metrics.get("eos/original", 1.0) == 0 and metrics.get("eos/transported", 1.0) == 0:
        found.append("no response ended before max_new_tokens; raise it, or check the tokenizer's EOS")
    if metrics.get("changed_tokens", 1.0) == 0 and metrics.get("value/value_mean", 1.0) != 0:  # it starts at zero
        found.append("transport changed no token; raise budget.nats, or check the value's gradient")
    return found


def responses_tokens(*parts: Responses) -> int:
    """Return how many tokens responses hold, EOS included."""
    return int(sum(part.lengths_BN.sum() for part in parts))
