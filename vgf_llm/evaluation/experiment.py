"""Runs the arms of an experiment on a batch of prompts: sample once, then one policy an arm, then measure.

Data goes one way: prompts -> shared samples -> an arm's outcome -> a row. A row holds every number and text of one arm,
prompt and seed; tables are made from rows alone, so a run can be stopped after any row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reward_models.composed import Remembered
from vgf_llm.answering.assemble import make_policy
from vgf_llm.answering.implicit_policy import ImplicitPolicy, Outcome
from vgf_llm.answering.one_pass import Directions, calibrate
from vgf_llm.errors import NonFiniteError
from vgf_llm.evaluation.arms import Arm
from vgf_llm.evaluation.controls import flipped_gradient, no_gradient, random_gradient
from vgf_llm.evaluation.flops import PromptWork, Sizes, arm_flops
from vgf_llm.evaluation.measures import nll_per_token, non_ascii, repetition
from vgf_llm.text.noise import row_seeds
from vgf_llm.text.particles import GradientSource, exact_gradient, token_spacing
from vgf_llm.text.protocols import Reference, Value
from vgf_llm.text.responses import Responses, changed_tokens, concatenate
from vgf_llm.text.sampler import ReferenceSampler

Row = dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts with their positions in the prompt file."""

    indices: list[int]
    texts: list[str]
    ids: list[list[int]]


@dataclass(frozen=True)
class Samples:
    """Responses shared by the arms of a batch, and the seconds that drawing the first n of them took."""

    responses: Responses
    seeds_BN: Tensor
    seconds_by_count: dict[int, float]


@dataclass(frozen=True)
class Experiment:
    """Models and measures that all arms share."""

    reference: Reference
    value: Value
    tokenizer: PreTrainedTokenizerBase
    gold: Remembered
    sizes: Sizes
    gradient: GradientSource = exact_gradient
    reward_model: str | None = None
    """The reward model, beside which fitted directions are looked for."""
    prompts: Sequence[list[int]] = ()
    """Every prompt, encoded: the first ones steer what is written in one pass."""
    policies: dict[tuple[str, int], ImplicitPolicy] = field(default_factory=dict)
    """By arm and seed, as they are made."""

    @cached_property
    def length_unit(self) -> float:
        """Nearest-token distance of the value's table, the unit of displacement."""
        return token_spacing(self.value.embedding_table_VD)

    def rows(self, arms: list[Arm], prompts: Prompts, seed: int) -> Iterator[list[Row]]:
        """Yield the rows of each arm for a batch of prompts and one seed.

        Raises:
            NonFiniteError: If a value or gradient is not finite; the message names the prompt.
        """
        samples = self._sample(arms, prompts, seed)
        _ = self.length_unit  # measured before any arm's clock starts
        prefix = self.reference.prefix(prompts.ids)
        sample_nll_BN = nll_per_token(self.reference, prefix, samples.responses)
        for arm in arms:
            policy = self._policy(arm, seed)
            started = time.perf_counter()
            originals = samples.responses.first(arm.num_particles)
            try:
                outcome = policy.improve(originals, samples.seeds_BN[:, : arm.num_particles])
            except NonFiniteError as error:
                index, text = prompts.indices[error.group], prompts.texts[error.group]
                message = f"arm {arm.name!r}, prompt {index} ({text!r}): {error}"
                raise NonFiniteError(message, group=index, step=error.step) from error
            seconds = time.perf_counter() - started
            if not outcome.one_pass:
                seconds += samples.seconds_by_count[arm.num_particles]
            if arm.is_plain_base:  # one sample, nothing scored: its share of the batch's sampling
                seconds = samples.seconds_by_count[arm.num_particles] / arm.num_particles
            if arm.transport.is_none:  # nothing was written that has not been measured
                nll_BN = sample_nll_BN[:, : arm.num_particles]
                nll_BM = torch.cat([nll_BN, nll_BN.gather(1, outcome.selected_index_B.unsqueeze(1))], 1)
            else:
                nll_BM = nll_per_token(self.reference, prefix, cloud_and_selected(outcome))
            yield self._rows(arm, prompts, seed, outcome, nll_BM, seconds / len(prompts.ids))

    def _sample(self, arms: list[Arm], prompts: Prompts, seed: int) -> Samples:
        """Draw as many responses as the largest arm needs, in pieces, so that each arm's share of the time is known."""
        counts = sorted({arm.num_particles for arm in arms})
        seeds_BN = row_seeds(seed, prompts.indices, counts[-1])
        sampler, parts, seconds_by_count = ReferenceSampler(self.reference), [], {}
        started, drawn = time.perf_counter(), 0
        for count in counts:
            parts.append(sampler.sample(prompts.ids, seeds_BN[:, drawn:count]))
            drawn = count
            seconds_by_count[count] = time.perf_counter() - started
        return Samples(concatenate(parts), seeds_BN, seconds_by_count)

    def _policy(self, arm: Arm, seed: int) -> ImplicitPolicy:
        """Return the policy of an arm, made once."""
        if (arm.name, seed) not in self.policies:
            policy = self._made(arm, seed)
            calibrate(policy, self.prompts)
            self.policies[arm.name, seed] = policy
        return self.policies[arm.name, seed]

    def _made(self, arm: Arm, seed: int) -> ImplicitPolicy:
        source = self.gradient if arm.gradient == "auto" else exact_gradient
        directions: dict[str, GradientSource] = {
            "value": source,
            "flipped": flipped_gradient(source),
            "random": random_gradient(seed, source),
            "none": no_gradient(source),
        }
        return make_policy(
            ImplicitPolicy,
            self.reference,
            self.value,
            arm.transport,
            arm.decoder,
            arm.decoder_options,
            draws=arm.draws,
            select=arm.select,
            gradient=directions[arm.direction],
            length_unit=self.length_unit,
            directions=Directions(self.tokenizer, self.reward_model),
        )

    def _rows(
        self, arm: Arm, prompts: Prompts, seed: int, outcome: Outcome, nll_BM: Tensor, seconds: float
    ) -> list[Row]:
        """Return one row a prompt; the cloud's n responses come first, the last column is the selected one."""
        cloud, n = cloud_and_selected(outcome), outcome.transported.tokens_BNT.shape[1]
        a_particle = n // outcome.originals.tokens_BNT.shape[1]
        particles_BN = (torch.arange(n) // a_particle).expand(len(prompts.ids), -1)
        sources = outcome.originals.take(particles_BN.to(outcome.originals.tokens_BNT.device))
        changed_BN = changed_tokens(sources, outcome.transported)
        sampled_B = outcome.originals.lengths_BN.sum(-1)
        texts = cloud.texts(self.tokenizer)
        rows = []
        for b, index in enumerate(prompts.indices):
            gold, parts = self.gold.scored([prompts.texts[b]] * (n + 1), texts[b])
            tokens = cloud.lengths_BN[b].tolist()
            work = PromptWork.of(outcome.work, b)
            flops = arm_flops(arm, self.sizes, len(prompts.ids[b]), int(sampled_B[b]), work)
            rows.append(
                {
                    "arm": arm.name,
                    "seed": seed,
                    "prompt_index": index,
                    "prompt": prompts.texts[b],
                    "proxy": rounded(outcome.transported_values_BN[b]),
                    "gold": [round(g, 5) for g in gold[:n]],
                    "nll": rounded(nll_BM[b, :n]),
                    "nats": None if outcome.nats_BN[b].isnan().any() else rounded(outcome.nats_BN[b]),
                    "displacement": None if outcome.one_pass else rounded(outcome.displacement_BN[b]),
                    "changed": None if outcome.one_pass else changed_BN[b].tolist(),
                    "tokens": tokens[:n],
                    "ended": cloud.eos_BNT.any(-1)[b, :n].tolist(),
                    "repetition": [round(repetition(text), 5) for text in texts[b][:n]],
                    "non_ascii": [round(share, 5) for share in non_ascii(texts[b][:n])],
                    "selected_index": int(outcome.selected_index_B[b]),
                    "selected_proxy": round(float(outcome.selected_values_B[b]), 5),
                    "selected_gold": round(gold[n], 5),
                    "selected_nll": round(float(nll_BM[b, n]), 5),
                    "selected": texts[b][n],
                    "texts": texts[b][:n],
                    "tflops": round(flops / 1e12, 6),
                    "seconds": round(seconds, 4),
                    **({"gold_parts": parts_rounded(parts)} if parts else {}),
                }
            )
        return rows


def cloud_and_selected(outcome: Outcome) -> Responses:
    """Return the transported responses and, as one more column, the selected one: [B, N + 1, T]."""
    return concatenate([outcome.transported, outcome.selected])


def rounded(values_N: Tensor) -> list[float]:
    """Return a tensor as floats of five decimals, short enough for a results file."""
    return [round(value, 5) for value in values_N.detach().to(torch.float64).tolist()]


def parts_rounded(parts: dict[str, list[float]]) -> dict[str, list[float | None]]:
    """Return the components of a composed gold as JSON has them: the cloud's, then the selected response's.

    A component that was not scored, because a constraint was broken, is None.
    """
    return {name: [None if math.isnan(v) else round(v, 5) for v in values] for name, values in parts.items()}
