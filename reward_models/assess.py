"""Measures a trained reward or value model on held-out responses and fills in its card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.card import RewardCard, pair_figures
from reward_models.fidelity import Fidelity, gradient_fidelity, reference_shortlist
from reward_models.logged import EncodedResponse, LoggedCollator
from reward_models.losses import count_agreements
from reward_models.modelling import RewardModel
from reward_models.pairs import EncodedPair, PairCollator
from vgf_llm.data.endings import eos_ids_of, padding_id
from vgf_llm.models.loading import fingerprint
from vgf_llm.statistics.intervals import wilson_interval

_TARGETS = ("margin", "difference", "reward")  # of a batch: what scores are compared with


@torch.no_grad()
def score_pairs(
    model: RewardModel, pairs: Sequence[EncodedPair], pad_token_id: int, batch_size: int = 16
) -> tuple[list[float], list[float]]:
    """Return the scores of all chosen and all rejected responses."""
    halves = [scores_2B.chunk(2) for scores_2B, _ in _scored(model, pairs, PairCollator(pad_token_id), batch_size)]
    chosen, rejected = ([score for half in halves for score in half[side].tolist()] for side in (0, 1))
    return chosen, rejected


@torch.no_grad()
def score_responses(
    model: RewardModel, rows: Sequence[EncodedResponse], pad_token_id: int, batch_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Return the scores and the rewards of logged responses, [R] float32 on the CPU."""
    scored = list(_scored(model, rows, LoggedCollator(pad_token_id), batch_size))
    return torch.cat([scores_R.cpu() for scores_R, _ in scored]), torch.cat([batch["reward"] for _, batch in scored])


@torch.no_grad()
def objective_figures(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[EncodedPair], batch_size: int = 16
) -> dict[str, dict[str, Any]]:
    """Measure a model with an output per objective on pairs with differences.

    Returns:
        By objective: `accuracy` over the pairs that have an opinion, its Wilson `interval` (both None without any), and
        `pairs`, their number.
    """
    names = model.config.objectives
    agree_K = stated_K = torch.zeros(len(names), dtype=torch.long)
    collate = PairCollator(padding_id(tokenizer, len(model.embedding_table_VD)))
    for scores, batch in _scored(model, pairs, collate, batch_size):
        chosen_BK, rejected_BK = scores.cpu().reshape(-1, len(names)).chunk(2)
        agree, stated = count_agreements(chosen_BK, rejected_BK, batch["difference"])
        agree_K, stated_K = agree_K + agree, stated_K + stated
    figures = {}
    for name, agree, count in zip(names, agree_K.tolist(), stated_K.tolist(), strict=True):
        interval = wilson_interval(agree, count) if count else None
        figures[name] = {"accuracy": agree / count if count else None, "interval": interval, "pairs": count}
    return figures


def _scored(
    model: RewardModel, rows: Sequence[Any], collate: Callable[[Any], dict[str, Tensor]], batch_size: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield the scores and the tensors of a batch after the other."""
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size])
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name not in _TARGETS}
        yield model(**inputs), batch


def measure_fidelity(
    model: Any,
    lm: PreTrainedModel,
    groups: Sequence[tuple[list[int], list[list[int]]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    responses: int = 24,
    substitutions: int = 120,
    shortlist: int = 30,
    seed: int = 0,
) -> Fidelity:
    """Measure gradient fidelity on the responses of the first groups with distinct prompts, `responses` in all.

    A group is a prompt and its responses, as many in every group (both of a pair, say), token ids.
    """
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, group in groups:
        by_prompt.setdefault(tuple(prompt), group)
    taken = list(by_prompt.items())[: max(1, responses // len(groups[0][1]))]
    prompts = [list(prompt) for prompt, _ in taken]
    rows = min(lm.get_output_embeddings().weight.shape[0], len(model.embedding_table_VD))
    vocabulary, pad_token_id = min(len(tokenizer), rows), padding_id(tokenizer, rows)
    tokens_BNT, mask_BNT = pad_responses([group for _, group in taken], pad_token_id)
    tokens_BNT, mask_BNT = tokens_BNT.to(lm.device), mask_BNT.to(lm.device)
    k = min(shortlist, vocabulary)
    shortlist_BNTK = reference_shortlist(lm, prompts, tokens_BNT, k, pad_token_id, vocabulary)
    return gradient_fidelity(
        model,
        prompts,
        tokens_BNT,
        mask_BNT,
        shortlist_BNTK,
        substitutions=substitutions,
        seed=seed,
        description="measuring gradient fidelity",
        eos_ids=eos_ids_of(tokenizer),
    )


def pad_responses(responses: Sequence[Sequence[Sequence[int]]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pad B groups of N responses on the right: tokens_BNT and the bool mask_BNT."""
    longest = max(len(ids) for group in responses for ids in group)
    tokens = [[[*ids, *[pad_token_id] * (longest - len(ids))] for ids in group] for group in responses]
    mask = [[[True] * len(ids) + [False] * (longest - len(ids)) for ids in group] for group in responses]
    return torch.tensor(tokens), torch.tensor(mask)


def build_card(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[EncodedPair],
    folder: str | Path,
    **facts: Any,
) -> RewardCard:
    """Score the held-out pairs, if any, and return the card; `facts` are further fields of it."""
    prints, figures = fingerprint(tokenizer), {}
    if held_out:
        chosen, rejected = score_pairs(model, held_out, padding_id(tokenizer, len(model.embedding_table_VD)))
        lengths = [len(pair.chosen) for pair in held_out] + [len(pair.rejected) for pair in held_out]
        figures = pair_figures(chosen, rejected, [pair.margin for pair in held_out], lengths)
    return RewardCard(
        base_model=model.config.base_name,
        num_layers=model.config.num_layers,
        pooling=model.config.pooling,
        adapter=(Path(folder) / "adapter_config.json").is_file(),
        tokenizer_sha256=prints.tokenizer,
        template_sha256=prints.template,
        chat_template=bool(tokenizer.chat_template),
        held_out_pairs=len(held_out),
        **(figures | facts),
    )
