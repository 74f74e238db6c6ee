"""What one-pass transported texts cost beside plain samples of the same number and length.

Arms take turns in one process. A turn's ratio is an arm's processor time over plain sampling's; the median over turns
is given with its range. No token ends a text. ``lookahead`` runs candidates in one packed forward with a cache of its
own, ``lookahead naive`` runs each prefix and candidate anew from the prompt. ``prior`` is sampling, the flow along a
secant head's direction, and the second pass.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reward_models.lookahead import Lookahead
from reward_models.modelling import RewardModel
from reward_models.secant import SecantHead, secant_gradient
from vgf_llm.answering.assemble import make_policy
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.bonus import Bonus, BonusSource, TableBonus
from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.noise import row_seeds
from vgf_llm.text.reference import TorchReference
from vgf_llm.text.sampler import ReferenceSampler
from vgf_llm.text.stream import Steering, StreamSampler

NATS, TOKEN_CAP = 2.0, 1.0
_NO_TOKEN = -1


@dataclass(frozen=True)
class LinearHidden:
    """A causal direction of two layers on the reference's hidden state, its weights random: for timing alone."""

    first_HD: Tensor
    second_DH: Tensor
    table_VD: Tensor
    reads_hidden: bool = True
    passes: float = 0.0

    def begin(self, prompts: list[list[int]], rows_per_prompt: int) -> Bonus:
        """Return the bonus; see :class:`vgf_llm.text.bonus.BonusSource`."""

        def bonus(shortlist: Shortlist, hidden_RD: Tensor | None, last_token_R: Tensor | None) -> Tensor:
            assert hidden_RD is not None
            direction_RD = torch.relu(hidden_RD @ self.first_HD.T) @ self.second_DH.T
            return (self.table_VD[shortlist.ids] @ direction_RD.unsqueeze(-1)).squeeze(-1)

        return bonus


@dataclass(frozen=True)
class NaiveLookahead:
    """The same bonus as :class:`Lookahead`, every candidate scored as a whole response."""

    value: RewardModel
    candidates: int = 8
    reads_hidden: bool = False
    passes: float = 0.0

    def begin(self, prompts: list[list[int]], rows_per_prompt: int) -> Bonus:
        """Return the bonus; see :class:`vgf_llm.text.bonus.BonusSource`."""
        prefix = self.value.prefix(prompts).expand(rows_per_prompt)
        written: list[Tensor] = []

        def bonus(shortlist: Shortlist, hidden_RD: Tensor | None, last_token_R: Tensor | None) -> Tensor:
            if last_token_R is not None:
                written.append(last_token_R.clamp(min=0))
            logps_RC, column_RC = shortlist.logps.topk(self.candidates)
            ids_RC = shortlist.ids.gather(-1, column_RC)
            before_RCT = torch.stack(written, -1).unsqueeze(1).expand(-1, self.candidates, -1) if written else None
            tokens_RCT = ids_RC.unsqueeze(-1) if before_RCT is None else torch.cat([before_RCT, ids_RC[..., None]], -1)
            values_RC = self.value.score(prefix, tokens_RCT, torch.ones_like(tokens_RCT, dtype=torch.bool))
            values_RC = values_RC * tokens_RCT.shape[-1]
            p_RC = logps_RC.softmax(-1)
            bonus_RC = values_RC - (p_RC * values_RC).sum(-1, keepdim=True)
            return torch.zeros_like(shortlist.logps).scatter(-1, column_RC, bonus_RC)

        return bonus


def measure(
    model: PreTrainedModel,
    prompts: list[list[int]],
    pad_id: int,
    rows: Sequence[int],
    tokens: Sequence[int],
    turns: int,
) -> dict[str, Any]:
    """Return ratios of processor time by tokens and rows, their ranges, and the peak of resident memory.

    Args:
        model: The base model.
        prompts: Encoded; as many as rows are asked for, repeated.
        pad_id: Of the tokenizer.
        rows: Texts side by side.
        tokens: Lengths of the texts.
        turns: Timed turns of each arm.
    """
    value = RewardModel.from_base(model, num_layers=6, pooling="mean").freeze()
    found: dict[str, Any] = {"over_sampling_time": {}, "range": {}, "mean_candidates": {}}
    for length in tokens:
        for count in rows:
            sampling = SamplingSettings(top_k=50, max_new_tokens=length)
            reference = TorchReference(model, sampling, (_NO_TOKEN,), pad_id)
            case = f"{length} tokens, {count} rows"
            arms = _arms(reference, value, [prompts[i % len(prompts)] for i in range(count)], length)
            ratios = _ratios(arms, turns)
            found["over_sampling_time"][case] = {name: round(statistics.median(r), 3) for name, r in ratios.items()}
            found["range"][case] = {name: [round(min(r), 3), round(max(r), 3)] for name, r in ratios.items()}
            print(f"{case}: {found['over_sampling_time'][case]}", file=sys.stderr, flush=True)
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    found["lookahead_cache_mib"] = {
        f"{length} tokens, {count} rows": round(_cache_mib(value, max(map(len, prompts)) + length, count), 1)
        for length in tokens
        for count in rows
    }
    return found


def _arms(
    reference: TorchReference, value: RewardModel, prompts: list[list[int]], length: int
) -> dict[str, Callable[[], object]]:
    table_VD = value.embedding_table_VD
    generator = torch.Generator().manual_seed(0)
    width, hidden = table_VD.shape[1], reference.model.config.hidden_size
    seeds_BN = row_seeds(0, list(range(len(prompts))), 1)
    causal = LinearHidden(
        torch.randn(64, hidden, generator=generator) / hidden**0.5,
        torch.randn(width, 64, generator=generator),
        table_VD,
    )
    sources: dict[str, BonusSource] = {
        "constant": TableBonus(table_VD @ torch.randn(width, generator=generator)),
        "causal": causal,
        "lookahead": Lookahead(value),
        "lookahead, all eight": Lookahead(value, min_probability=0.0),
    }
    if length <= 24:
        sources["lookahead naive"] = NaiveLookahead(value)
    head = SecantHead(width, 64, "none")
    policy = make_policy(
        ImplicitPolicy,
        reference,
        value,
        TransportBudget(nats=NATS, max_token_nats=TOKEN_CAP),
        gradient=secant_gradient(head.eval().requires_grad_(False)),
        length_unit=1.0,
    )
    plain = ReferenceSampler(reference)
    arms: dict[str, Callable[[], object]] = {"plain": lambda: plain.sample(prompts, seeds_BN)}
    for name, source in sources.items():
        sampler = StreamSampler(reference, source, Steering(NATS, TOKEN_CAP))
        arms[name] = lambda sampler=sampler: sampler.stream(prompts, seeds_BN)  # type: ignore[misc]
    arms["prior"] = lambda: policy(prompts, seeds_BN)
    return arms


def _ratios(arms: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Return each arm's processor time over the plain arm's, turn by turn; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(turns + 1):
        order = list(arms) if turn % 2 else list(arms)[::-1]
        for name in order:
            started = time.process_time()
            arms[name]()
            if turn:
                seconds[name].append(time.process_time() - started)
    plain = seconds.pop("plain")
    return {name: [one / base for one, base in zip(own, plain, strict=True)] for name, own in seconds.items()}


def _cache_mib(value: RewardModel, columns: int, rows: int) -> float:
    """Return the size of the value's keys and values."""
    config = value.body.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * rows * heads * width * columns * 4 / 2**20
