"""A direction that is fitted to the true rewards while training goes, and writes transported responses in one pass.

Before step 0, and at the end of every step that fits, on all processes together:

    1. single tokens of the responses just sampled are swapped for others of their shortlists, and the rewards are
       asked what each swap changes, every distinct text once;
    2. how the direction went with these changes, which it has not seen, is logged (`direction_correlation`);
    3. they join a bounded replay, and `constant`, `table` or `causal` is fitted to it (`reward_models/directions`);
    4. what steering needs is measured on the same responses: the variance of the new bonus under the distribution, and
       the lengths, older steps counting less.

A step's transported responses are drawn from q of the direction that earlier steps left, with the noise of their
originals; step 0 fits to samples with noise of their own. So q does not depend on that noise: each response is an exact
draw from its q, and its nats are exact (`vgf_llm/text/stream.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reward_models.directions.causal import CausalDirection, CausalHead, fit_causal
from reward_models.directions.constant import fit_constant
from reward_models.directions.positions import Positions, read_positions
from reward_models.directions.saving import Direction, FittedTo, Kind, reward_digest, save_direction
from reward_models.directions.swaps import Swaps, bonus_variances, join_swaps, swap_correlation, swaps_of, thinned
from reward_models.directions.table import fit_table
from reward_models.grammar import is_composed, reward_contents
from reward_models.secant_online import draw_substitutions, substituted
from reward_models.secant_settings import SecantTraining
from vgf_llm.answering.implicit_policy import text_seeds
from vgf_llm.distributed.gather import summed, under
from vgf_llm.distributed.processes import of_all, of_first
from vgf_llm.errors import CheckpointError
from vgf_llm.models.architecture import input_table
from vgf_llm.models.loading import fingerprint
from vgf_llm.text.bonus import TableBonus
from vgf_llm.text.protocols import Reference, Value
from vgf_llm.text.reference import TorchReference
from vgf_llm.text.responses import Responses
from vgf_llm.text.stream import Steering, StreamSampler, expected_left
from vgf_llm.training.distributions import Distributions, sample
from vgf_llm.training.metrics import MetricSums
from vgf_llm.training.rewards import NamedReward, Rewards
from vgf_llm.training.rollout import PromptRow, Rollout
from vgf_llm.training.settings import VGFSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

DIRECTION_FOLDER, STATE_NAME = "direction", "direction_state.safetensors"
_FIRST_STREAM, _SWAP_STREAM, _FIRST_SWAP_STREAM = (
    0xD1,
    0xD2,
    0xD3,
)  # samples before step 0, token changes, those of them
_SHORTLIST = 50  # likeliest tokens that swaps come from, where the distribution is not cut off
_KEPT_LENGTHS = 0.9  # share of its weight that a length keeps from one fit to the next
_RESPONSES_A_STEP = 2**32  # more than a step has: numbers of responses are unique


@dataclass(frozen=True)
class OnePass:
    """Originals, and what was written beside them in one pass; see `vgf_llm.training.rollout.Carried`."""

    originals: Responses
    transported: Responses
    nats_BN: Tensor

    @property
    def displacement_BN(self) -> Tensor:
        """NaN: no particle moved."""
        return torch.full_like(self.nats_BN, torch.nan)


class FittedDirection:
    """A direction, its replay and its steering; a `vgf_llm.training.transport.Transport`.

    Args:
        method: Budget, draws, and how the direction is fitted.
        kind: Of the direction.
        distributions: What responses are sampled from.
        rewards: What is fitted to.
        metrics: Gets correlation, calls and seconds.
        accelerator: Of the run's processes.

    Attributes:
        tensors: The direction: ``bonus``, or the parameters of a causal head; empty before the first fit.
        replay: The swaps that it is fitted to; None where there are none.
        lengths_T: How many responses had length t + 1, older ones counting less, float64.
        variance: Of the bonus under the distribution.
    """

    value: Value | None = None
    learns = True

    def __init__(
        self,
        method: VGFSettings,
        kind: Kind,
        distributions: Distributions,
        rewards: Rewards,
        metrics: MetricSums,
        accelerator: Accelerator,
    ) -> None:
        self.method, self.kind, self.options = method, kind, method.direction_options
        self.distributions, self.rewards = distributions, rewards
        self.metrics, self.accelerator = metrics, accelerator
        self.tensors: dict[str, Tensor] = {}
        self.replay: Swaps | None = None
        self.lengths_T = torch.zeros(distributions.sampling.max_new_tokens, dtype=torch.float64)
        self.variance = 0.0
        self._swaps: list[Swaps] = []
        self._positions: list[Positions] = []
        self._calls, self._seconds = 0, 0.0

    def source(self, reference: Reference) -> Direction:
        """Return the direction as it is now, in a model's input embeddings; before the first fit every bonus is 0."""
        table_VD = input_table(reference.model)
        tensors = {name: tensor.to(table_VD.device) for name, tensor in self.tensors.items()}
        if self.kind == "causal" and tensors:
            return CausalDirection.of(CausalHead.of_tensors(tensors), table_VD)
        return TableBonus(tensors.get("bonus", torch.zeros(len(table_VD), device=table_VD.device)))

    @property
    def table_VD(self) -> Tensor:
        """The base's input embeddings."""
        return input_table(self.distributions.models.policy_lm)

    @property
    def left_T(self) -> Tensor:
        """Tokens that are expected to come at each position, [T]."""
        longest = len(self.lengths_T)
        return expected_left(torch.arange(1, longest + 1), longest, self.lengths_T)

    def carry(self, distribution: Reference, originals: Responses, seeds_BN: Tensor) -> tuple[OnePass, None]:
        """Write the transported responses in one pass, with the noise of their originals."""
        budget, reference = self.method.budget, cast(TorchReference, distribution)
        steering = Steering(budget.nats, budget.max_token_nats, self.variance or None, self.left_T)
        sampler = StreamSampler(reference, self.source(reference), steering)
        streamed = sampler.stream(originals.prompts, text_seeds(seeds_BN, self.method.draws))
        return OnePass(originals, streamed.responses, streamed.nats_BN), None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is spent, so that no direction is needed."""
        return self.method.budget.nats == 0

    def begin_step(self, batches: Sequence[Sequence[PromptRow]], step: int) -> None:
        """Fit a first direction, to samples of its own to the step's prompts, where there is none."""
        if self.tensors or self.is_idle:
            return
        for prompts in batches:
            if prompts:
                self._look_at_samples(prompts, step)
        self._learn(step)

    def see(self, rollout: Rollout, step: int) -> None:
        """Ask what swaps in the originals change, where the step fits."""
        if step % self.options.refit_steps == 0 and not self.is_idle:
            rewards_BN = rollout.original_scores["reward"]
            self._look(rollout.prompts, rollout.outcome.originals, rewards_BN, step, _SWAP_STREAM)

    def end_step(self, step: int) -> None:
        """Fit to what was seen; log correlation, calls and seconds."""
        if step % self.options.refit_steps == 0 and not self.is_idle:
            self._learn(step)
        if step == 0 and self.rewards.running.by_name:
            self.replay = None  # scored before the rewards had a scale

    def _look_at_samples(self, prompts: Sequence[PromptRow], step: int) -> None:
        """Sample with noise of its own, and ask."""
        with self.distributions.particles() as distribution:
            originals = sample(distribution, prompts, self.distributions.seeds(prompts, step, _FIRST_STREAM))
        rewards_BN, calls = self.rewards.of_distinct([prompt.text for prompt in prompts], originals)
        self._calls += calls
        self._look(prompts, originals, rewards_BN, step, _FIRST_SWAP_STREAM)

    @torch.no_grad()
    def _look(
        self, prompts: Sequence[PromptRow], originals: Responses, rewards_BN: Tensor, step: int, stream: int
    ) -> None:
        """Draw swaps in B x N originals, score them, and keep them until the step ends."""
        started = time.perf_counter()
        positions, N = self._positions_of(originals), rewards_BN.shape[1]
        seeds_R = self.distributions.seeds(prompts, step, stream).flatten()
        t_RS, v_RS, is_swap_RS = draw_substitutions(
            originals, positions.distribution, seeds_R, self.options.substitutions
        )
        own_RS = originals.tokens_BNT.flatten(0, 1).gather(1, t_RS)
        swapped = substituted(originals, t_RS, torch.where(is_swap_RS, v_RS, own_RS))
        scores_BM, calls = self.rewards.of_distinct([prompt.text for prompt in prompts], swapped)
        change_RS = scores_BM.view(t_RS.shape) - rewards_BN.view(-1, 1)
        index_B = torch.tensor([prompt.index for prompt in prompts], device=rewards_BN.device)
        number_R = index_B.repeat_interleave(N) * N + torch.arange(N, device=index_B.device).repeat(len(index_B))
        look = step if stream == _SWAP_STREAM else -1
        numbers_R2 = torch.stack([number_R // N, look * _RESPONSES_A_STEP + number_R], 1)
        found = swaps_of(positions, t_RS, v_RS, change_RS, is_swap_RS, numbers_R2)
        self._swaps.append(found.to(torch.device("cpu")))
        self._positions.append(positions)
        self._calls += calls
        self._seconds += time.perf_counter() - started

    def _positions_of(self, originals: Responses) -> Positions:
        """Return what stands before the tokens: what the sampler kept, or by a forward where more is needed."""
        if self.kind != "causal" and originals.distribution is not None:
            nothing = originals.distribution.logps.new_zeros((*originals.tokens_BNT.shape, 0))
            return Positions(originals, originals.distribution, nothing)
        with self.distributions.particles() as distribution:
            shortlist = self.distributions.sampling.top_k or _SHORTLIST
            return read_positions(cast(TorchReference, distribution), originals, shortlist)

    def _learn(self, step: int) -> None:
        """Log how the direction went with the new swaps of all processes, fit, and measure what steering needs."""
        started, is_first = time.perf_counter(), bool(self.accelerator.is_main_process)
        found = [swaps for part in of_all(self._swaps) for swaps in part if len(swaps)]
        self.metrics.total("reward_calls", self._calls)
        if found:
            new = thinned(join_swaps(found).in_order(), self.options.replay, step)
            with self.distributions.particles() as distribution:
                if self.tensors:
                    source = self.source(distribution)
                    correlation = swap_correlation(source, new.to(distribution.device))
                    self.metrics.add("direction_correlation", correlation)
                joined = new if self.replay is None else join_swaps([self.replay, new])
                self.replay = joined.take(slice(-self.options.replay, None))
                if self.kind == "table" or self.replay.can_be_split:
                    self.tensors = of_first(self._fit(distribution, self.replay, step) if is_first else None)
                self._measure(self.source(distribution))
        self._swaps, self._positions, self._calls = [], [], 0
        self.metrics.add("seconds/direction", self._seconds + time.perf_counter() - started)
        self._seconds = 0.0

    def _fit(self, distribution: Reference, replay: Swaps, step: int) -> dict[str, Tensor]:
        """Return the direction that the replay gives, on the host."""
        table_VD = input_table(distribution.model).detach()
        swaps = replay.to(table_VD.device)
        if self.kind == "table":
            return {"bonus": fit_table(swaps.observations, table_VD).bonus_V.cpu()}
        targets = swaps.targets
        line = fit_constant(targets, table_VD)
        if self.kind == "constant":
            return {"bonus": line.bonus_V.cpu()}
        start = CausalHead.of_tensors(self.tensors).to(table_VD.device) if self.tensors else None
        training = SecantTraining(steps=self.options.steps, fit_seed=step)
        devices = [table_VD.device] if table_VD.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices):
            head, _ = fit_causal(targets, table_VD, training, line.direction_D, start)
        return {name: tensor.cpu().clone() for name, tensor in head.state_dict().items()}

    def _measure(self, source: Direction) -> None:
        """Take lengths and the variance of the bonus from the responses just seen, those of all processes."""
        longest, sums = len(self.lengths_T), [0.0, 0.0]
        lengths_T = torch.zeros(longest)
        for positions in self._positions:
            variance_X = bonus_variances(source, positions).double()
            sums = [sums[0] + float(variance_X.sum()), sums[1] + len(variance_X)]
            lengths = positions.responses.lengths_BN.flatten().cpu()
            lengths_T += torch.bincount(lengths[lengths > 0] - 1, minlength=longest)
        (total, count), counts = summed([sums], self.accelerator)[0], summed([lengths_T.tolist()], self.accelerator)[0]
        self.lengths_T = _KEPT_LENGTHS * self.lengths_T + torch.tensor(counts, dtype=torch.float64)
        self.variance = total / count if count else 0.0

    @functools.cached_property
    def fitted_to(self) -> FittedTo:
        """The rewards, base model and tokenizer that the saved direction names."""
        distributions = self.distributions
        prints, models = fingerprint(distributions.base.tokenizer), distributions.models
        base = str(models.policy_lm.name_or_path)
        members = self.rewards.members
        outputs = getattr(members[0].scorer, "reward_outputs", None) if _is_single(members) else None
        name, digest = _stated(members)
        return FittedTo(name, digest, base, models.base_weights, prints.tokenizer, prints.template, outputs)

    def save(self, folder: Path, with_state: bool) -> None:
        """Write the direction as ``direction/``, which commands load, and what a resumed run needs beside it."""
        if self.tensors:
            facts = {
                "steering": {"variance": self.variance, "left": [round(left, 3) for left in self.left_T.tolist()]},
                "fit": dataclasses.asdict(self.options),
                "sampling": dataclasses.asdict(self.distributions.sampling),
            }
            is_head = self.kind == "causal"
            found = CausalHead.of_tensors(self.tensors) if is_head else TableBonus(self.tensors["bonus"])
            save_direction(found, self.kind, folder / DIRECTION_FOLDER, self.fitted_to, **facts)
        if with_state:
            state = {f"direction.{name}": tensor.contiguous() for name, tensor in self.tensors.items()}
            replay = {} if self.replay is None else self.replay.tensors()
            state |= {f"replay.{name}": tensor.contiguous() for name, tensor in replay.items()}
            state |= {"lengths": self.lengths_T, "variance": torch.tensor(self.variance, dtype=torch.float64)}
            save_file(state, folder / STATE_NAME)

    def load(self, folder: Path) -> None:
        """Read direction, replay and steering back.

        Raises:
            CheckpointError: They are missing.
        """
        try:
            state = load_file(folder / STATE_NAME)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"'{folder}' lacks {STATE_NAME}, the direction that its run had fitted ({error}); resume from another "
                "checkpoint"
            ) from error
        self.tensors, replay = under(state, "direction."), under(state, "replay.")
        self.replay = Swaps(**replay) if replay else None
        self.lengths_T, self.variance = state["lengths"], float(state["variance"])


def _is_single(members: Sequence[NamedReward]) -> bool:
    """Return whether the sum is one reward as it is."""
    return len(members) == 1 and members[0].weight == 1 and not is_composed(members[0].source)


def _stated(members: Sequence[NamedReward]) -> tuple[str, str | None]:
    """Return what a sum of rewards is called, and a digest of it; a single reward by its own name and digest."""
    if _is_single(members):
        return members[0].source, reward_digest(members[0].source)
    contents = [[member.weight, reward_contents(member.source)] for member in members]
    name = " + ".join(f"{member.weight:g} * {member.source}" for member in members)
    return name, hashlib.sha256(json.dumps(contents).encode()).hexdigest()
