"""The gold column of the Pythia recipes: a second reward model, trained with another seed, as a Python reward function.

It has seen the same data as the first one, so it is a held-out proxy and no gold: it shows over-optimisation of one
model's own faults, not of what both get wrong.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from reward_models.assess import pad_responses
from vgf_llm.data.dialogue import PromptText
from vgf_llm.data.encoding import encode_prompt, encode_response
from vgf_llm.errors import ModelError
from vgf_llm.machine.device import resolve_device
from vgf_llm.machine.precision import choose_dtype

_ROWS = 16  # responses per forward
TLDR_TOKENS, HH_TOKENS = 53, 128  # max_new_tokens of the two evaluate.yaml


def tldr(prompts: list[str], responses: list[str]) -> list[float]:
    """Score summaries by the model in outputs/pythia_tldr/held_out."""
    return score("outputs/pythia_tldr/held_out", prompts, responses, TLDR_TOKENS)


def hh(prompts: list[str], responses: list[str]) -> list[float]:
    """Score answers by the model in outputs/pythia_hh/held_out."""
    return score("outputs/pythia_hh/held_out", prompts, responses, HH_TOKENS)


@torch.no_grad()
def score(
    folder: str | Path, prompts: list[str], responses: list[str], max_new_tokens: int | None = None
) -> list[float]:
    """Score responses by a trained reward model.

    A response is closed with EOS unless it fills max_new_tokens, as in training: sampling has cut such a one.

    Args:
        folder: its output_dir.
        prompts: one a response.
        responses: plain text.
        max_new_tokens: longest response that was sampled, EOS included (tokens); None: every response is closed.

    Returns:
        One reward per response.

    Raises:
        ModelError: the folder does not hold a reward model and its own tokenizer.
    """
    model, tokenizer = _load(str(folder))
    rows_of: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    rewards = [0.0] * len(responses)
    for prompt, rows in rows_of.items():
        prefix = model.prefix([encode_prompt(tokenizer, PromptText(prompt).prompt)])
        for start in range(0, len(rows), _ROWS):
            chunk = rows[start : start + _ROWS]
            ids = [_encode(tokenizer, responses[row], max_new_tokens) for row in chunk]
            tokens_1NT, mask_1NT = pad_responses([ids], tokenizer.pad_token_id)
            values_1N = model.score(prefix, tokens_1NT.to(model.device), mask_1NT.to(model.device))
            for row, value in zip(chunk, values_1N[0].tolist(), strict=True):
                rewards[row] = value
    return rewards


def _encode(tokenizer: Any, response: str, max_new_tokens: int | None) -> list[int]:
    ids = encode_response(tokenizer, response, eos=True)
    return ids if max_new_tokens is None else ids[:max_new_tokens]


@functools.cache
def _load(folder: str) -> tuple[Any, Any]:
    from reward_models import load_reward_model
    from vgf_llm.models.loading import load_tokenizer

    if not (Path(folder) / "config.json").is_file():
        raise ModelError(
            f"the held-out reward model '{folder}' is not there (current folder: {Path.cwd()}); train it first, by "
            "reward.yaml with another seed, as the recipe's README says"
        )
    dtype, device = getattr(torch, choose_dtype("auto")), resolve_device("auto")
    tokenizer = load_tokenizer(folder)
    return load_reward_model(folder, tokenizer=tokenizer, dtype=dtype, device=device), tokenizer
